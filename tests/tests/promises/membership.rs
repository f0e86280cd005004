//! Who belongs to the cluster, who votes, and who leads: nodes join by themselves, and operators
//! change the rest, by the command line, on any node.

use std::collections::BTreeMap;

use holdfast_client::Consistency;
use holdfast_proto::{
    peer::{
        JoinRequest, Member, join_response, membership_service_client::MembershipServiceClient,
    },
    v1::{TransferLeaderRequest, cluster_service_client::ClusterServiceClient},
};
use holdfast_tests::cluster::Cluster;
use serde_json::Value;
use tracing::info;

use crate::in_process;

/// What the command line ends with, and the object it printed: the answer, or the error.
fn holdfast(cluster: &Cluster, node: usize, arguments: &[&str]) -> anyhow::Result<(i32, Value)> {
    let output = cluster.holdfast(
        node,
        &[&["-o", "json", "--timeout", "20s"], arguments].concat(),
    )?;
    let code = output.status.code().unwrap_or(-1);
    let text = if code == 0 || code == 8 {
        &output.stdout
    } else {
        &output.stderr
    };
    Ok((code, serde_json::from_slice(text).unwrap_or(Value::Null)))
}

/// Role by name, as a node tells it.
async fn roles(cluster: &Cluster, node: usize) -> BTreeMap<String, (u64, String)> {
    let Ok((0, status)) = holdfast(cluster, node, &["cluster", "status"]) else {
        return BTreeMap::new();
    };
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    nodes
        .iter()
        .map(|node| {
            (
                text(&node["name"]),
                (node["id"].as_u64().unwrap_or(0), text(&node["role"])),
            )
        })
        .collect()
}

async fn has_role(
    cluster: &Cluster,
    asked: usize,
    name: &str,
    roles_wanted: &[&str],
) -> anyhow::Result<()> {
    cluster
        .until(&format!("{name} is one of {roles_wanted:?}"), async || {
            roles(cluster, asked)
                .await
                .get(name)
                .is_some_and(|(_, role)| roles_wanted.contains(&role.as_str()))
        })
        .await
}

const VOTES: [&str; 2] = ["leader", "voter"];

/// Three that formed, and further nodes that have a configuration and do not run.
async fn three_of(nodes: usize, learners: &[usize]) -> anyhow::Result<Cluster> {
    let mut cluster = in_process()
        .nodes(nodes, 3)
        .learners(learners)
        .configure()?;
    cluster.start_together(&[0, 1, 2]).await?;
    for node in 0..3 {
        cluster.ready(node).await?;
    }
    cluster.leader().await?;
    Ok(cluster)
}

/// Time enough to promote a learner goes by many times over, and it stays what it is. In steps: one
/// that was not heard of within a second is not alive, and not level.
async fn keeps_up(cluster: &Cluster, asked: usize, name: &str) -> anyhow::Result<()> {
    for step in 0..24 {
        cluster.clock.advance(std::time::Duration::from_millis(800));
        cluster.client(asked).set("level", step.to_string()).await?;
        assert_eq!(
            roles(cluster, asked).await[name].1,
            "learner",
            "step {step}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_votes_once_it_was_level_for_a_while_and_not_while_it_is_down()
-> anyhow::Result<()> {
    let mut cluster = three_of(4, &[]).await?;
    cluster.start_node(3).await?;
    cluster.ready(3).await?;
    info!("--- it is down, and there is room");
    cluster.stop_node(3).await?;
    let lost = cluster.follower().await?;
    let (name, asked) = (
        cluster.name(lost).to_owned(),
        (0..3).find(|&node| node != lost).unwrap(),
    );
    cluster.stop_node(lost).await?;
    let removed = holdfast(&cluster, asked, &["member", "remove", &name])?;
    assert_eq!(removed.0, 0, "{removed:?}");
    let status = holdfast(&cluster, asked, &["cluster", "status"])?.1;
    assert_eq!(
        status["per_shard"][0]["voters"].as_array().map(Vec::len),
        Some(2),
        "it is gone when the command ends: {status}"
    );
    keeps_up(&cluster, asked, "node-4").await?;
    let (code, error) = holdfast(&cluster, asked, &["member", "promote", "node-4"])?;
    assert_eq!(
        (code, &error["reason"]),
        (6, &"MEMBERSHIP".into()),
        "{error}"
    );
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| message.contains("has not caught up yet")),
        "{error}"
    );
    let (code, error) = holdfast(&cluster, asked, &["cluster", "transfer-leader", "node-4"])?;
    assert_eq!(
        (code, &error["reason"]),
        (6, &"MEMBERSHIP".into()),
        "{error}"
    );
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| message.contains("`node-4` is not a voter")),
        "{error}"
    );

    info!("--- it goes, and the next one is promoted, but not at once");
    assert_eq!(
        holdfast(&cluster, asked, &["member", "remove", "node-4"])?.0,
        0
    );
    let _ = std::fs::remove_dir_all(cluster.data_dir(3));
    let began = cluster.clock.monotonic();
    cluster.start_node(3).await?;
    has_role(&cluster, asked, "node-4", &VOTES).await?;
    let took = cluster.clock.monotonic() - began;
    assert!(
        took >= std::time::Duration::from_secs(5),
        "it votes after {took:?}"
    );
    cluster.stop().await
}

/// Of five that say they are one member at once, one is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_name_joins_once() -> anyhow::Result<()> {
    let cluster = three_of(3, &[]).await?;
    let leader = cluster.addresses(cluster.leader().await?).peer;
    let mut joining = tokio::task::JoinSet::new();
    for incarnation in 1..=5 {
        let door =
            tonic::transport::Endpoint::from_shared(format!("http://{leader}"))?.connect_lazy();
        let peer_address = format!("127.0.0.1:{incarnation}");
        let member = Some(Member {
            name: "twin".into(),
            incarnation,
            peer_address,
            ..Default::default()
        });
        joining.spawn(async move {
            MembershipServiceClient::new(door)
                .join(JoinRequest { member })
                .await
        });
    }
    let mut joined = 0;
    while let Some(answer) = joining.join_next().await {
        joined += usize::from(matches!(
            answer??.into_inner().result,
            Some(join_response::Result::Joined(_))
        ));
    }
    assert_eq!(joined, 1, "so many are one member");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fourth_node_joins_as_a_learner_and_votes_once_a_voter_is_gone_for_good()
-> anyhow::Result<()> {
    let mut cluster = three_of(4, &[]).await?;
    let client = cluster.client_of(&[0, 1, 2]);
    client.set("before", "v").await?;
    info!("--- it joins by itself, and answers what was there before it");
    cluster.start_node(3).await?;
    cluster.ready(3).await?;
    has_role(&cluster, 0, "node-4", &["learner"]).await?;
    let answer = cluster
        .client(3)
        .get("before")
        .consistency(Consistency::Linearizable)
        .await?;
    assert_eq!(answer.answer.value.as_deref(), Some(b"v".as_slice()));
    cluster.client(3).set("through the learner", "v").await?;

    info!("--- with three voters it stays one, however long it has kept up");
    keeps_up(&cluster, 0, "node-4").await?;
    let lost = cluster.follower().await?;
    let asked = (0..3).find(|&node| node != lost).unwrap();
    cluster.stop_node(lost).await?;
    cluster.leader().await?;
    keeps_up(&cluster, asked, "node-4").await?;
    let name = cluster.name(lost).to_owned();
    assert_eq!(
        roles(&cluster, asked).await["node-4"].1,
        "learner",
        "dead voters count"
    );

    info!("--- the dead one is removed: there is room");
    let removed = holdfast(&cluster, asked, &["member", "remove", &name])?;
    assert_eq!(removed.0, 0, "{removed:?}");
    has_role(&cluster, asked, "node-4", &VOTES).await?;
    let status = holdfast(&cluster, asked, &["cluster", "status"])?.1;
    assert_eq!(
        status["per_shard"][0]["voters"].as_array().map(Vec::len),
        Some(3)
    );
    assert_eq!(status["per_shard"][0]["learners"], serde_json::json!([]));
    assert!(!roles(&cluster, asked).await.contains_key(&name));
    cluster.client(3).set("after", "v").await?;
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removal_that_would_cost_the_quorum_is_refused() -> anyhow::Result<()> {
    let mut cluster = three_of(3, &[]).await?;
    let (leader, down) = (cluster.leader().await?, cluster.follower().await?);
    cluster.stop_node(down).await?;
    let other = (0..3).find(|&node| node != leader && node != down).unwrap();
    for name in [leader, other].map(|node| cluster.name(node).to_owned()) {
        // At once: the dead one was heard from a moment ago.
        let (code, error) = holdfast(&cluster, other, &["member", "remove", &name])?;
        assert_eq!(
            (code, &error["code"], &error["reason"]),
            (6, &"FAILED_PRECONDITION".into(), &"MEMBERSHIP".into()),
            "{error}"
        );
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|message| message.contains("1 of 2 voters would be alive: no quorum")),
            "{error}"
        );
    }
    let status = holdfast(&cluster, leader, &["cluster", "status"])?.1;
    assert_eq!(
        status["per_shard"][0]["voters"].as_array().map(Vec::len),
        Some(3),
        "nothing changed"
    );
    cluster.client(other).set("k", "v").await?;
    assert_eq!(cluster.health(leader)?.0, Some(8));

    info!("--- a member that there is not");
    let (code, error) = holdfast(&cluster, leader, &["member", "remove", "nobody"])?;
    assert_eq!(
        (code, &error["reason"]),
        (1, &"NO_MEMBER".into()),
        "{error}"
    );
    cluster.stop().await
}

/// A voter that is told to go still counts for the quorum that lets it go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_shrinks_to_one_voter_and_reads_and_writes_go_on() -> anyhow::Result<()> {
    let mut cluster = three_of(3, &[]).await?;
    let leader = cluster.leader().await?;
    cluster.client(leader).set("k", "v").await?;
    for (gone, left) in (0..3).filter(|&node| node != leader).zip([2, 1]) {
        info!("--- {left} are to be left");
        let (code, answer) = holdfast(&cluster, leader, &["member", "remove", cluster.name(gone)])?;
        assert_eq!(code, 0, "{answer}");
        cluster.stop_node(gone).await?;
        let status = holdfast(&cluster, leader, &["cluster", "status"])?.1;
        assert_eq!(
            status["per_shard"][0]["voters"].as_array().map(Vec::len),
            Some(left),
            "{status}"
        );
        cluster.client(leader).set("k", format!("{left}")).await?;
        let read = cluster
            .client(leader)
            .get("k")
            .consistency(Consistency::Linearizable)
            .await?;
        assert_eq!(
            read.answer.value.as_deref(),
            Some(format!("{left}").as_bytes())
        );
    }
    let (code, error) = holdfast(
        &cluster,
        leader,
        &["member", "remove", cluster.name(leader)],
    )?;
    assert_eq!(
        (code, &error["reason"]),
        (6, &"MEMBERSHIP".into()),
        "the last one stays: {error}"
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_where_it_is_sent() -> anyhow::Result<()> {
    let cluster = three_of(3, &[]).await?;
    for _ in 0..2 {
        let (leader, to) = (cluster.leader().await?, cluster.follower().await?);
        let asked = (0..3).find(|&node| node != leader && node != to).unwrap();
        let (code, answer) = holdfast(
            &cluster,
            asked,
            &["cluster", "transfer-leader", cluster.name(to)],
        )?;
        assert_eq!(
            (code, answer["leader"].as_str()),
            (0, Some(cluster.name(to))),
            "{answer}"
        );
        cluster
            .until("it leads", async || {
                cluster.leader().await.is_ok_and(|leader| leader == to)
            })
            .await?;
        cluster.client(asked).set("k", "v").await?;
    }
    info!("--- asked of a follower, which passes it on");
    let (leader, to) = (cluster.leader().await?, cluster.follower().await?);
    let asked = (0..3).find(|&node| node != leader && node != to).unwrap();
    let to = cluster.name(to).to_owned();
    let mut members = ClusterServiceClient::new(cluster.channel(asked));
    assert_eq!(
        members
            .transfer_leader(TransferLeaderRequest { to: to.clone() })
            .await?
            .into_inner()
            .leader,
        to
    );
    info!("--- to whoever is furthest");
    let before = cluster.leader().await?;
    let (code, answer) = holdfast(&cluster, before, &["cluster", "transfer-leader"])?;
    assert_eq!(code, 0, "{answer}");
    assert_ne!(answer["leader"].as_str(), Some(cluster.name(before)));
    info!("--- to nobody");
    let (code, error) = holdfast(&cluster, before, &["cluster", "transfer-leader", "nobody"])?;
    assert_eq!((code, &error["reason"]), (1, &"NO_MEMBER".into()));
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_promotes_a_learner_and_removes_it_again() -> anyhow::Result<()> {
    let mut cluster = three_of(4, &[]).await?;
    cluster.start_node(3).await?;
    cluster.ready(3).await?;
    for node in 0..4 {
        let (code, list) = holdfast(&cluster, node, &["member", "list"])?;
        let names: Vec<&str> = list["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|node| node["name"].as_str())
            .collect();
        assert_eq!(
            (code, names.as_slice()),
            (0, ["node-1", "node-2", "node-3", "node-4"].as_slice())
        );
    }
    info!(
        "--- a voter beyond what forms the cluster, by an operator's word; and again, which changes nothing"
    );
    for _ in 0..2 {
        let promoted = holdfast(&cluster, 1, &["member", "promote", "node-4"])?;
        assert_eq!(promoted.0, 0, "{promoted:?}");
        assert!(VOTES.contains(&roles(&cluster, 1).await["node-4"].1.as_str()));
    }
    info!("--- it leads, and is removed by its own hand");
    let (code, _) = holdfast(&cluster, 1, &["cluster", "transfer-leader", "node-4"])?;
    assert_eq!(code, 0);
    cluster
        .until("it leads", async || {
            cluster.leader().await.is_ok_and(|leader| leader == 3)
        })
        .await?;
    cluster
        .until("it is no member any more", async || {
            let removed = holdfast(&cluster, 0, &["member", "remove", "node-4"]);
            let told =
                removed.is_ok_and(|(code, error)| code == 0 || error["reason"] == "NO_MEMBER");
            told && !roles(&cluster, 0).await.contains_key("node-4")
        })
        .await?;
    cluster.stop_node(3).await?;
    let leader = cluster.leader().await?;
    assert_ne!(leader, 3);
    cluster.client(0).set("k", "v").await?;
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_node_with_an_empty_directory_joins_with_an_id_never_used_before()
-> anyhow::Result<()> {
    let mut cluster = three_of(4, &[]).await?;
    cluster.client(0).set("k", "v").await?;
    cluster.start_node(3).await?;
    let mut last = 3;
    for _ in 0..2 {
        cluster.ready(3).await?;
        let (id, _) = roles(&cluster, 0).await["node-4"].clone();
        assert!(id > last, "{id} after {last}");
        last = id;
        info!("--- {id} is removed while it is down");
        cluster.stop_node(3).await?;
        let removed = holdfast(&cluster, 0, &["member", "remove", "node-4"])?;
        assert_eq!(removed.0, 0, "{removed:?}");
        let _ = std::fs::remove_dir_all(cluster.data_dir(3));
        cluster.start_node(3).await?;
    }
    cluster.ready(3).await?;
    assert!(roles(&cluster, 0).await["node-4"].0 > last);
    let answer = cluster
        .client(3)
        .get("k")
        .consistency(Consistency::Linearizable)
        .await?;
    assert_eq!(answer.answer.value.as_deref(), Some(b"v".as_slice()));
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_configured_to_learn_never_votes() -> anyhow::Result<()> {
    let mut cluster = three_of(4, &[3]).await?;
    cluster.start_node(3).await?;
    cluster.ready(3).await?;
    has_role(&cluster, 0, "node-4", &["learner"]).await?;
    cluster.client(3).set("k", "v").await?;
    let answer = cluster.client(3).get("k").await?;
    assert_eq!(
        (answer.answer.value.as_deref(), answer.replica.role.as_str()),
        (Some(b"v".as_slice()), "learner")
    );

    info!("--- not where there is room");
    let lost = cluster.follower().await?;
    let asked = (0..3).find(|&node| node != lost).unwrap();
    let name = cluster.name(lost).to_owned();
    cluster.stop_node(lost).await?;
    assert_eq!(
        holdfast(&cluster, asked, &["member", "remove", &name])?.0,
        0
    );
    keeps_up(&cluster, asked, "node-4").await?;
    info!("--- nor by an operator's word");
    let (code, error) = holdfast(&cluster, asked, &["member", "promote", "node-4"])?;
    assert_eq!(
        (code, &error["reason"]),
        (6, &"MEMBERSHIP".into()),
        "{error}"
    );
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|message| message.contains("`node.role: learner`")),
        "{error}"
    );
    assert_eq!(roles(&cluster, asked).await["node-4"].1, "learner");
    cluster.stop().await
}

/// With nobody but learners there is no cluster: they wait for one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn learners_alone_form_nothing() -> anyhow::Result<()> {
    let mut cluster = in_process()
        .learners(&[0, 1, 2])
        .extra("storage: {engine: memory}")
        .configure()?;
    cluster.start_together(&[0, 1, 2]).await?;
    for node in 0..3 {
        cluster
            .until("it says what it waits for", async || {
                cluster
                    .admin(node, "/readyz")
                    .await
                    .is_ok_and(|(_, body)| body.contains("a learner waits for a cluster to join"))
            })
            .await?;
    }
    cluster.stop().await
}
