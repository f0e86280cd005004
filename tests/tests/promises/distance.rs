//! Voters far from each other: a cluster whose messages take long elects, writes and reads as one
//! whose messages do not, however long it was idle.

use std::time::Duration;

use anyhow::{Context, ensure};
use holdfast_client::Consistency;
use holdfast_raft::Clock;
use holdfast_tests::{cluster::PATIENCE, distance::Distance, writes::Writes};
use tracing::info;

use crate::processes;

/// Several of the longest leases.
const IDLE: Duration = Duration::from_secs(5);
/// For a busy machine.
const SLACK: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_80_ms_apart_write_after_idling_and_fail_over() -> anyhow::Result<()> {
    voters_apart(Duration::from_millis(80)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_150_ms_apart_write_after_idling_and_fail_over() -> anyhow::Result<()> {
    voters_apart(Duration::from_millis(150)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn voters_300_ms_apart_write_after_idling_and_fail_over() -> anyhow::Result<()> {
    voters_apart(Duration::from_millis(300)).await
}

async fn voters_apart(round_trip: Duration) -> anyhow::Result<()> {
    let distance = Distance::between(3, round_trip, &Clock::system()).await?;
    let mut cluster = processes()
        .behind(distance.addresses())
        .in_memory()
        .configure()?;
    for node in 0..cluster.len() {
        distance.lead_to(node, cluster.addresses(node).peer);
        cluster.start_node(node).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }
    let leader = cluster.leader().await?;

    info!("--- the tool delays: a write waits for one way there and back");
    let client = cluster.client(leader);
    let began = cluster.clock.monotonic();
    client.set("first", "written").await?;
    ensure!(cluster.clock.monotonic() - began >= round_trip, "no delay");

    info!("--- idle, and write and read linearizably after it");
    // The leader has measured the way by then, and the cluster goes at its pace.
    tokio::time::sleep(IDLE).await;
    let term = cluster.terms().await?;
    for round in 0..3 {
        tokio::time::sleep(IDLE).await;
        let value = format!("{round}");
        client
            .set("key", value.clone())
            .await
            .with_context(|| format!("round {round}"))?;
        for node in 0..cluster.len() {
            let read = cluster
                .client(node)
                .get("key")
                .consistency(Consistency::Linearizable)
                .await
                .with_context(|| format!("round {round} on node {node}"))?;
            ensure!(read.answer.value.as_deref() == Some(value.as_bytes()));
            cluster
                .until("it says that it takes writes", async || {
                    matches!(cluster.admin(node, "/readyz/write").await, Ok((200, _)))
                })
                .await?;
        }
    }
    ensure!(
        cluster.terms().await? == term,
        "a leader was elected though none was gone"
    );

    info!("--- kill the leader under writes");
    let clients = vec![cluster.client_of_all()];
    let writes = Writes::start(clients, "under-way/", 10, &cluster.clock);
    writes.more(3).await?;
    let leader = cluster.leader().await?;
    let killed_at = writes.now();
    cluster.kill(leader)?;
    writes.more(3).await?;
    let gap = writes.longest_gap_since(killed_at);
    println!("round trip {round_trip:?}: gap {gap:?}");
    ensure!(
        gap <= round_trip * 10 + Duration::from_secs(1) + SLACK,
        "no write was acknowledged for {gap:?}"
    );
    let survivor = (leader + 1) % 3;
    let written = tokio::time::timeout(PATIENCE, writes.stop()).await?;
    written.check(&cluster.client(survivor)).await
}
