//! Empty nodes form one cluster, ever, whatever the order they come in, whom they see, and when
//! they die. Who does not belong is refused, and both sides say so.

use std::{collections::BTreeSet, time::Duration};

use holdfast_proto::v1::{
    StatusRequest, StatusResponse, cluster_service_client::ClusterServiceClient,
};
use holdfast_tests::{
    cluster::{Cluster, Setup, http_get},
    links::Links,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use tracing::info;

use crate::{from_environment, in_process, processes, seed};

const TOO_MANY: &str =
    "5 empty nodes see each other and `cluster.expect` is 3: none of them forms a cluster";

/// Nothing is on disk: forming is the same, and five nodes start in a moment.
fn five_that_expect_three() -> Setup {
    in_process().nodes(5, 3).extra("storage: {engine: memory}")
}

/// What a node knows of its cluster; nothing before it belongs to one.
async fn status(cluster: &Cluster, node: usize) -> StatusResponse {
    let answer = ClusterServiceClient::new(cluster.channel(node))
        .status(StatusRequest {})
        .await;
    answer.map(tonic::Response::into_inner).unwrap_or_default()
}

/// What a node says of itself.
async fn says(cluster: &Cluster, node: usize) -> String {
    cluster
        .admin(node, "/readyz")
        .await
        .map(|(_, body)| body)
        .unwrap_or_default()
}

fn running(cluster: &Cluster) -> Vec<usize> {
    (0..cluster.len())
        .filter(|&node| cluster.is_running(node))
        .collect()
}

/// The clusters that running nodes belong to, added to those seen before: there must never be two.
async fn count_clusters(cluster: &Cluster, seen: &mut BTreeSet<String>) {
    for node in running(cluster) {
        let id = status(cluster, node).await.cluster_id;
        if !id.is_empty() {
            seen.insert(id);
        }
    }
    assert!(seen.len() <= 1, "two clusters: {seen:?}");
}

/// Waits until all running nodes are in one cluster, or none is and all say why. True if there is a
/// cluster.
async fn settled(cluster: &Cluster, seen: &mut BTreeSet<String>) -> anyhow::Result<bool> {
    let mut formed = false;
    let waited = cluster.until(
        "one cluster of all, or none and every node says why",
        async || {
            count_clusters(cluster, seen).await;
            let (mut members, mut too_many) = (0, 0);
            for node in running(cluster) {
                let says = says(cluster, node).await;
                members +=
                    usize::from(says.contains("[+]member ok") && says.ends_with("\nready\n"));
                too_many += usize::from(says.contains(TOO_MANY));
            }
            formed = members == running(cluster).len();
            formed || (too_many == cluster.len() && seen.is_empty())
        },
    );
    if let Err(error) = waited.await {
        for node in running(cluster) {
            eprintln!("{}: {}", cluster.name(node), says(cluster, node).await);
        }
        return Err(error);
    }
    Ok(formed)
}

/// Three voters, who founded it, and all others learners.
async fn is_of_three_voters(cluster: &Cluster) -> anyhow::Result<()> {
    let (mut voters, mut learners) = (0, 0);
    cluster
        .until("three voters, and the rest learners", async || {
            let status = status(cluster, running(cluster)[0]).await;
            let shard = status.per_shard.first().cloned().unwrap_or_default();
            (voters, learners) = (shard.voters.len(), shard.learners.len());
            !shard.leader.is_empty() && (voters, learners) == (3, cluster.len() - 3)
        })
        .await?;
    let (first, last) = (cluster.client(0), cluster.client(cluster.len() - 1));
    first.set("k", "v").await?;
    let answer = last
        .get("k")
        .consistency(holdfast_client::Consistency::Linearizable)
        .await?;
    assert_eq!(answer.answer.value.as_deref(), Some(b"v".as_slice()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_nodes_that_expect_three_form_one_cluster_or_none_in_any_order() -> anyhow::Result<()>
{
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..from_environment("HOLDFAST_FORMINGS").unwrap_or(4) {
        info!("--- seed {seed}, round {round}");
        let mut cluster = five_that_expect_three().configure()?;
        let mut order: Vec<usize> = (0..5).collect();
        order.shuffle(&mut random);
        let gap_max = [1, 100, 300, 600][round % 4];
        let mut seen = BTreeSet::new();
        for node in order {
            cluster.start_node(node).await?;
            tokio::time::sleep(Duration::from_millis(random.random_range(0..gap_max))).await;
            count_clusters(&cluster, &mut seen).await;
        }
        if settled(&cluster, &mut seen).await? {
            is_of_three_voters(&cluster).await?;
        }
        count_clusters(&cluster, &mut seen).await;
        cluster.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_founds_nothing_and_keeps_nobody_from_it() -> anyhow::Result<()> {
    let mut cluster = in_process()
        .nodes(4, 3)
        .learners(&[0])
        .extra("storage: {engine: memory}")
        .configure()?;
    info!("--- two voters and a learner are three nodes, and not the three that are expected");
    cluster.start_together(&[0, 1, 2]).await?;
    cluster
        .until("both voters see that one is missing", async || {
            says(&cluster, 1).await.contains("2 of 3 nodes are here")
                && says(&cluster, 2).await.contains("2 of 3 nodes are here")
        })
        .await?;
    ensure_not_formed(&cluster, &[0, 1, 2]).await;

    info!("--- with the third voter there are four nodes, and one cluster of three voters");
    cluster.start_node(3).await?;
    is_of_three_voters(&cluster).await?;
    let status = status(&cluster, 1).await;
    assert_eq!(status.per_shard[0].learners, [cluster.name(0)]);
    cluster.stop().await
}

async fn ensure_not_formed(cluster: &Cluster, nodes: &[usize]) {
    for &node in nodes {
        assert_eq!(
            status(cluster, node).await.cluster_id,
            "",
            "{} belongs to a cluster",
            cluster.name(node)
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_nodes_partly_connected_form_one_cluster_or_none() -> anyhow::Result<()> {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..from_environment("HOLDFAST_FORMINGS").unwrap_or(4) {
        info!("--- seed {seed}, round {round}: some see some");
        let links = Links::between(5).await?;
        let mut cluster = five_that_expect_three()
            .discover(links.discover())
            .configure()?;
        links.lead_to(
            &(0..5)
                .map(|node| cluster.addresses(node).peer)
                .collect::<Vec<_>>(),
        );
        let mut ways: Vec<(usize, usize)> = (0..5)
            .flat_map(|from| (0..5).map(move |to| (from, to)))
            .collect();
        ways.shuffle(&mut random);
        let (now, later) = ways.split_at(random.random_range(5..25));
        now.iter().for_each(|&(from, to)| links.open(from, to));
        cluster.start_together(&[0, 1, 2, 3, 4]).await?;
        let mut seen = BTreeSet::new();
        cluster
            .until(
                "every node belongs to a cluster or says why not",
                async || {
                    count_clusters(&cluster, &mut seen).await;
                    let mut said = 0;
                    for node in 0..5 {
                        let says = says(&cluster, node).await;
                        said += usize::from(
                            says.contains("[+]member ok")
                                || (says.contains("[-]member failed: ")
                                    && !says.contains("starting")),
                        );
                    }
                    said == 5
                },
            )
            .await?;
        info!("--- the other ways, one after the other");
        for &(from, to) in later {
            links.open(from, to);
            tokio::time::sleep(Duration::from_millis(random.random_range(0..60))).await;
            count_clusters(&cluster, &mut seen).await;
        }
        if settled(&cluster, &mut seen).await? {
            is_of_three_voters(&cluster).await?;
        }
        cluster.stop().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_nodes_that_all_see_each_other_form_none_and_say_so() -> anyhow::Result<()> {
    let links = Links::between(5).await?;
    let mut cluster = five_that_expect_three()
        .discover(links.discover())
        .configure()?;
    links.lead_to(
        &(0..5)
            .map(|node| cluster.addresses(node).peer)
            .collect::<Vec<_>>(),
    );
    cluster.start_together(&[0, 1, 2, 3, 4]).await?;
    for node in 0..5 {
        cluster
            .until("it sees nobody", async || {
                says(&cluster, node)
                    .await
                    .contains("[-]member failed: 1 of 3 nodes are here")
            })
            .await?;
    }
    info!("--- all see all");
    links.open_all();
    let mut seen = BTreeSet::new();
    assert!(!settled(&cluster, &mut seen).await?);
    for node in 0..5 {
        assert!(
            says(&cluster, node)
                .await
                .contains("stop 2 of them, or start them after it"),
            "what to do about it"
        );
        assert_eq!(cluster.admin(node, "/readyz").await?.0, 503);
    }
    info!("--- done as told: three are left, and form");
    cluster.stop_node(1).await?;
    cluster.stop_node(3).await?;
    assert!(settled(&cluster, &mut seen).await?);
    info!("--- the other two join it");
    cluster.start_node(1).await?;
    cluster.start_node(3).await?;
    assert!(settled(&cluster, &mut seen).await?);
    is_of_three_voters(&cluster).await?;
    count_clusters(&cluster, &mut seen).await;
    cluster.stop().await
}

/// Whoever accepted a formation, or initialised with it, is who it was after a kill.
#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_killed_while_forming_forms_with_the_others_in_the_end() -> anyhow::Result<()> {
    let seed = seed();
    let mut random = StdRng::seed_from_u64(seed);
    for round in 0..from_environment("HOLDFAST_FORMING_KILLS").unwrap_or(4) {
        let mut cluster = processes().configure()?;
        for node in 0..3 {
            cluster.start_node(node).await?;
        }
        info!("--- seed {seed}, round {round}: until somebody proposes, and a moment more");
        let mut proposer = 0;
        cluster
            .until("a proposal", async || {
                let found = (0..3).find(|&node| cluster.log_of(node).contains("proposing to form"));
                proposer = found.unwrap_or(proposer);
                found.is_some()
            })
            .await?;
        tokio::time::sleep(Duration::from_millis(random.random_range(0..40))).await;
        let victims = match random.random_range(0..4) {
            0 => vec![proposer],
            1 => vec![(proposer + 1) % 3],
            2 => vec![proposer, (proposer + 2) % 3],
            _ => vec![0, 1, 2],
        };
        info!("--- kill {victims:?}");
        for &node in &victims {
            cluster.kill(node)?;
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..200))).await;
        for &node in &victims {
            cluster.start_node(node).await?;
        }
        let mut seen = BTreeSet::new();
        assert!(settled(&cluster, &mut seen).await?);
        is_of_three_voters(&cluster).await?;
        count_clusters(&cluster, &mut seen).await;
    }
    Ok(())
}

/// A node of another cluster answers where a member should be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_of_another_cluster_is_refused_and_both_say_so() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    cluster.client(0).set("k", "ours").await?;
    info!("--- a stranger takes the third node's place");
    cluster.stop_node(2).await?;
    let place = cluster.addresses(2);
    let mut strangers = processes().nodes(1, 1).configure()?;
    let own = strangers.addresses(0);
    let mut config = std::fs::read_to_string(strangers.config_file(0))?;
    for (old, new) in [
        (own.client, place.client),
        (own.peer, place.peer),
        (own.admin, place.admin),
    ] {
        config = config.replace(&old.to_string(), &new.to_string());
    }
    std::fs::write(strangers.config_file(0), config)?;
    strangers.start_node(0).await?;
    cluster
        .until("the stranger is ready", async || {
            matches!(http_get(place.admin, "/readyz").await, Ok((200, _)))
        })
        .await?;

    cluster
        .until("both sides say so", async || {
            let ours: String = [cluster.log_of(0), cluster.log_of(1)].concat();
            let theirs = strangers.log_of(0);
            ours.contains("a peer refused this node")
                && theirs.contains("a peer was refused")
                && theirs.contains("it belongs to cluster")
        })
        .await?;
    info!("--- neither takes anything from the other");
    cluster.client(1).set("k", "still ours").await?;
    let theirs = cluster.client(2).get("k").await?;
    assert_eq!(theirs.answer.value, None);
    let id = status(&cluster, 0).await.cluster_id;
    assert_ne!(status(&cluster, 2).await.cluster_id, id);
    info!("--- it goes, and the member comes back");
    strangers.stop_node(0).await?;
    cluster.start_node(2).await?;
    // With nothing on disk it is not the member that it was.
    if cfg!(feature = "rocksdb") {
        cluster.ready(2).await?;
        let answer = cluster
            .client(2)
            .get("k")
            .consistency(holdfast_client::Consistency::Linearizable)
            .await?;
        assert_eq!(
            answer.answer.value.as_deref(),
            Some(b"still ours".as_slice())
        );
    }
    let said = strangers.log_of(0).matches("a peer was refused").count();
    assert!(said < 20, "said {said} times: once in a while is enough");
    Ok(())
}

/// One of the memory engine comes back by itself instead: nothing of it could be lost.
#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_members_name_with_an_empty_directory_is_refused_and_both_say_so() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    cluster.client(0).set("k", "v").await?;
    let id = status(&cluster, 0).await.cluster_id;
    let lost = cluster.follower().await?;
    let name = cluster.name(lost).to_owned();
    info!("--- its directory is lost");
    cluster.kill(lost)?;
    std::fs::remove_dir_all(cluster.data_dir(lost))?;
    cluster.start_node(lost).await?;
    cluster
        .until("both sides say so", async || {
            let here = format!("the cluster refuses this node: `{name}` at");
            says(&cluster, lost).await.contains(&here)
                && cluster.log_of(lost).contains(&here)
                && (0..3).any(|node| cluster.log_of(node).contains("a node was refused"))
        })
        .await?;
    let said = says(&cluster, lost).await;
    assert!(
        said.contains(&format!("run `holdfast member remove {name}` first")),
        "what to do about it: {said}"
    );
    assert_eq!(cluster.admin(lost, "/readyz").await?.0, 503);

    info!("--- done as told, by the command line");
    let removed = cluster.holdfast((lost + 1) % 3, &["member", "remove", &name])?;
    assert!(
        removed.status.success(),
        "{}",
        String::from_utf8_lossy(&removed.stderr)
    );
    cluster.ready(lost).await?;
    let status = status(&cluster, lost).await;
    assert_eq!(status.cluster_id, id);
    let ids: BTreeSet<u64> = status.nodes.iter().map(|node| node.id).collect();
    let first_id = u64::try_from(lost)? + 1;
    let expected = (1..=4).filter(|&id| id != first_id).collect();
    assert_eq!(ids, expected, "an id is never used again");
    let answer = cluster
        .client(lost)
        .get("k")
        .consistency(holdfast_client::Consistency::Linearizable)
        .await?;
    assert_eq!(answer.answer.value.as_deref(), Some(b"v".as_slice()));
    Ok(())
}
