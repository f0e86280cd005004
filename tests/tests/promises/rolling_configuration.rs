//! Nodes whose policies differ, as while a change of configuration goes from node to node: those of
//! the node that leads a key judge its requests.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::v1::{Consistency, Origin as StoredBy, State};
use holdfast_tests::{
    cluster::Cluster,
    origin::{Behaviour, Origin},
    wire::{Told, Wire, state, text},
};
use serde_json::Value;
use tonic::Code;
use tracing::info;

use crate::in_process;

/// Has no policy for any key, unlike the others.
const BARE: usize = 2;

/// How a key is stored: by whom, and for how many seconds it is fresh, if not for ever.
async fn stored(wire: &Wire, key: &str) -> anyhow::Result<(StoredBy, Option<i64>)> {
    let entry = wire.inspect(key).await?.entry.context("it is stored")?;
    let fetched = entry.fetched_at.context("when it came")?;
    let fresh = entry
        .fresh_until
        .map(|until| until.seconds - fetched.seconds);
    Ok((entry.origin(), fresh))
}

async fn lead(cluster: &Cluster, node: usize) -> anyhow::Result<()> {
    let leader = cluster.leader().await?;
    if leader != node {
        let client = cluster.client(leader);
        let to = Some(cluster.name(node));
        client.cluster().transfer_leader(to).await?;
    }
    cluster
        .until("it leads", async || {
            cluster.leader().await.is_ok_and(|leader| leader == node)
        })
        .await
}

/// Sets a key through a node until it is stored as wanted: the node hears of the leader's policies
/// with its next report.
async fn set_until(
    cluster: &Cluster,
    through: usize,
    key: &str,
    wanted: (StoredBy, Option<i64>),
) -> anyhow::Result<()> {
    let wire = cluster.wire(through)?;
    cluster
        .until("the leader's policies judge", async || {
            wire.set(key, "set", None).await.is_ok()
                && stored(&wire, key).await.is_ok_and(|found| found == wanted)
        })
        .await?;
    for _ in 0..20 {
        wire.set(key, "set again", None).await?;
        let found = stored(&wire, key).await?;
        ensure!(found == wanted, "{found:?} after {wanted:?}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_policies_of_who_leads_a_key_judge_it_while_they_differ() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text("fetched"));
    let url = origin.url("/users/{1}");
    let rules = format!(
        "upstreams: {{users: {{http: {{url: \"{url}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 1h, ttl_jitter: 0}}]"
    );
    let mut cluster = in_process().extra(&rules).configure()?;
    let file = cluster.config_file(BARE);
    let config = std::fs::read_to_string(file)?;
    std::fs::write(file, config.replace(&rules, ""))?;
    for node in 0..cluster.len() {
        cluster.start_node(node).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }

    info!("--- the leader has the policy");
    lead(&cluster, 0).await?;
    set_until(&cluster, BARE, "user/set", (StoredBy::Set, Some(3_600))).await?;
    let bare = cluster.wire(BARE)?;
    let read = bare
        .get("user/miss", Consistency::Session, &Bytes::new())
        .await?;
    ensure!((state(&read), text(&read).as_str()) == (State::Fresh, "fetched"));

    let status = cluster.holdfast(0, &["-o", "json", "cluster", "status"])?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let nodes = status["nodes"].as_array().context("nodes")?;
    let differs = |node: usize| {
        let found = nodes.iter().find(|seen| seen["name"] == cluster.name(node));
        found.map(|node| node["policies_differ"].clone())
    };
    ensure!(
        [0, 1, BARE].map(differs) == [Some(false.into()), Some(false.into()), Some(true.into())],
        "{status}"
    );
    let hash = |node: usize| {
        nodes
            .iter()
            .find(|seen| seen["name"] == cluster.name(node))
            .map(|node| node["policy_hash"].clone())
    };
    ensure!(hash(0) == hash(1) && hash(0) != hash(BARE), "{status}");

    info!("--- the leader has none");
    lead(&cluster, BARE).await?;
    let calls = origin.calls();
    set_until(&cluster, 1, "user/plain", (StoredBy::Plain, None)).await?;
    // No upstream has failed: none was called.
    let wire = cluster.wire(1)?.within(Duration::from_secs(5));
    let read = wire
        .get("user/never", Consistency::Session, &Bytes::new())
        .await;
    match read {
        Ok(read) => ensure!(read.answer.is_some_and(|answer| answer.value.is_none())),
        Err(status) => {
            let told = Told::of(&status);
            ensure!(
                told.code != Code::Internal && told.metadata("upstream").is_empty(),
                "{told:?}"
            );
        }
    }
    ensure!(origin.calls() == calls, "{} calls", origin.calls());
    cluster.stop().await
}
