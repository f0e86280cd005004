//! Members know the truth: who was removed says so and serves nothing, who comes back with nothing
//! or from elsewhere is in again by itself.

use holdfast_tests::cluster::Cluster;
use serde_json::Value;
use tracing::info;

use crate::in_process;
#[cfg(feature = "rocksdb")]
use crate::processes;

fn holdfast(cluster: &Cluster, node: usize, arguments: &[&str]) -> (i32, String) {
    let arguments = [&["-o", "json", "--timeout", "10s"], arguments].concat();
    let Ok(output) = cluster.holdfast(node, &arguments) else {
        return (-1, String::new());
    };
    let text = [output.stdout, output.stderr].concat();
    let code = output.status.code().unwrap_or(-1);
    (code, String::from_utf8_lossy(&text).into_owned())
}

fn nodes(cluster: &Cluster, asked: usize) -> Vec<Value> {
    let (_, text) = holdfast(cluster, asked, &["cluster", "status"]);
    let status: Value = serde_json::from_str(&text).unwrap_or_default();
    status["nodes"].as_array().cloned().unwrap_or_default()
}

fn of_name(cluster: &Cluster, asked: usize, name: &str) -> Value {
    let nodes = nodes(cluster, asked);
    let found = nodes.into_iter().find(|node| node["name"] == name);
    found.unwrap_or_default()
}

async fn says_removed(cluster: &Cluster, node: usize) -> anyhow::Result<()> {
    cluster
        .until("its readiness says so", async || {
            matches!(cluster.admin(node, "/readyz").await, Ok((503, why))
                if why.contains("[-]member failed: this node was removed from cluster")
                    && why.contains("remove its data directory"))
        })
        .await?;
    let (code, text) = holdfast(cluster, node, &["get", "k"]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("NOT_READY"), "{text}");
    assert!(
        text.contains("this node was removed from cluster"),
        "{text}"
    );
    let status = of_name(cluster, node, cluster.name(node));
    if !status.is_null() {
        let problems = status["problems"].to_string();
        assert!(problems.contains("this node was removed"), "{status}");
    }
    assert_eq!(cluster.health(node)?.0, Some(8));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_member_serves_no_data_and_says_why() -> anyhow::Result<()> {
    let mut cluster = in_process().start().await?;
    let leader = cluster.leader().await?;
    let gone = cluster.follower().await?;
    let name = cluster.name(gone).to_owned();
    cluster.client(gone).set("k", "old").await?;
    let (code, text) = holdfast(&cluster, leader, &["member", "remove", &name]);
    assert_eq!(code, 0, "{text}");
    cluster.client(leader).set("k", "new").await?;
    says_removed(&cluster, gone).await?;
    if cfg!(feature = "rocksdb") {
        info!("--- after a restart too");
        cluster.stop_node(gone).await?;
        cluster.start_node(gone).await?;
        says_removed(&cluster, gone).await?;
    }
    assert_eq!(cluster.health(leader)?.0, Some(0));
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_on_the_memory_engine_that_starts_again_votes_again_by_itself()
-> anyhow::Result<()> {
    let memory = in_process().extra("storage: {engine: memory}");
    let mut cluster = memory.start().await?;
    for _ in 0..2 {
        let leader = cluster.leader().await?;
        cluster.client(leader).set("k", "v").await?;
        let lost = cluster.follower().await?;
        info!("--- {} forgets everything", cluster.name(lost));
        cluster.stop_node(lost).await?;
        cluster.start_node(lost).await?;
        cluster.ready(lost).await?;
        let answer = cluster.client(lost).get("k").await?;
        assert_eq!(answer.answer.value.as_deref(), Some(b"v".as_slice()));
        cluster
            .until("it votes, and nothing is wrong", async || {
                let nodes = nodes(&cluster, lost);
                let votes = nodes.iter().filter(|node| node["role"] != "learner");
                votes.count() == 3 && cluster.health(lost).is_ok_and(|(code, _)| code == Some(0))
            })
            .await?;
    }
    cluster.stop().await
}

/// Two of three forgot everything: what is left is no quorum.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_the_memory_engine_is_not_replaced_where_that_would_cost_the_quorum()
-> anyhow::Result<()> {
    let memory = in_process().extra("storage: {engine: memory}");
    let mut cluster = memory.start().await?;
    let leader = cluster.leader().await?;
    let others: Vec<usize> = (0..3).filter(|&node| node != leader).collect();
    for &node in &others {
        cluster.stop_node(node).await?;
    }
    cluster.start_node(others[0]).await?;
    cluster
        .until("it says what stands in the way", async || {
            matches!(cluster.admin(others[0], "/readyz").await, Ok((503, why))
                if why.contains("the cluster refuses this node"))
        })
        .await?;
    cluster.stop().await
}

#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_on_new_ports_are_in_again_within_ten_seconds() -> anyhow::Result<()> {
    let mut cluster = in_process().start().await?;
    let leader = cluster.leader().await?;
    let mover = cluster.follower().await?;
    cluster.client(leader).set("k", "before").await?;
    info!("--- one of them; the others keep their lists");
    cluster.stop_node(mover).await?;
    cluster.move_nodes(&[mover], &[])?;
    cluster.start_node(mover).await?;
    let is_shown = |cluster: &Cluster, asked: usize, node: usize| {
        let addresses = cluster.addresses(node);
        let shown = of_name(cluster, asked, cluster.name(node));
        shown["peer_address"] == addresses.peer.to_string()
            && shown["client_address"] == addresses.client.to_string()
            && shown["healthy"] == true
    };
    cluster
        .until("it is shown where it is", async || {
            is_shown(&cluster, leader, mover)
        })
        .await?;
    info!("--- all of them");
    let all = [0, 1, 2];
    for node in all {
        cluster.stop_node(node).await?;
    }
    cluster.move_nodes(&all, &all)?;
    cluster.start_together(&all).await?;
    let began = cluster.clock.monotonic();
    let leader = cluster.leader().await?;
    cluster.client(leader).set("k", "after").await?;
    let took = cluster.clock.monotonic() - began;
    assert!(took < std::time::Duration::from_secs(10), "{took:?}");
    cluster
        .until("everybody is shown where it is", async || {
            all.iter().all(|&node| is_shown(&cluster, leader, node))
        })
        .await?;
    cluster.stop().await
}

#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn data_without_an_identity_is_refused() -> anyhow::Result<()> {
    let mut cluster = processes().nodes(1, 1).start().await?;
    cluster.client(0).set("k", "v").await?;
    cluster.stop_node(0).await?;
    std::fs::remove_file(cluster.data_dir(0).join("identity"))?;
    cluster.start_node(0).await?;
    assert_eq!(cluster.ended(0).await?, Some(2));
    let log = cluster.log_of(0);
    assert!(log.contains("whose data it is cannot be known"), "{log}");
    Ok(())
}
