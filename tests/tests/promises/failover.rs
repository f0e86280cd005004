//! Nodes are killed, stopped and paused under load, and nobody who was promised anything is let
//! down.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use holdfast_client::Consistency;
use holdfast_tests::{
    cluster::Cluster,
    reads::Readers,
    writes::{Writes, Written},
};
use rand::RngExt;
use tracing::info;

use crate::processes;

/// How often the leader is killed, unless `HOLDFAST_CYCLES` says.
const CYCLES: usize = 50;
/// No write waits longer for the next leader, but for one in 25.
const GAP: Duration = Duration::from_secs(2);
/// None at all.
const GAP_MAX: Duration = Duration::from_secs(4);
/// How often a follower is paused.
const PAUSES: usize = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p1_acknowledged_write_survives_leader_kill() -> anyhow::Result<()> {
    let cycles = crate::from_environment("HOLDFAST_CYCLES").unwrap_or(CYCLES);
    let mut random = crate::seeded();
    // A log so short that it is purged all the time: never past what the state has on disk. That
    // "disk" outlives a process as any other does, and a busy real one makes gaps of its own, which
    // `slow_disks` bounds.
    let mut cluster = processes()
        .extra("storage: {log_keep_entries: 500}")
        .in_memory()
        .start()
        .await?;
    Readers::prepare(&cluster.client(0)).await?;

    let mut all = Written::default();
    let mut gaps = Vec::new();
    for cycle in 0..cycles {
        let clients = (0..2).map(|_| cluster.client_of_all()).collect();
        let writes = Arc::new(Writes::start(
            clients,
            format!("{cycle}/"),
            100,
            &cluster.clock,
        ));
        writes.more(random.random_range(1..50)).await?;
        let leader = cluster.leader().await?;
        let others: Vec<usize> = (0..cluster.len()).filter(|&node| node != leader).collect();
        let readers = Readers::start(&cluster, &others, &writes);
        writes.more(random.random_range(1..50)).await?;

        info!(cycle, leader, "--- kill the leader");
        let killed_at = writes.now();
        cluster.kill(leader)?;
        writes.more(random.random_range(1..100)).await?;

        info!("--- start it again");
        let newest = writes.newest().context("a write was acknowledged")?;
        cluster.start_node(leader).await?;
        cluster.ready(leader).await?;
        caught_up(&cluster, leader, &newest.0).await?;
        writes.more(10).await?;
        let gap = writes.longest_gap_since(killed_at);
        ensure!(
            gap <= GAP_MAX,
            "no write was acknowledged for {gap:?} in cycle {cycle}"
        );
        gaps.push(gap);
        readers
            .stop()
            .await
            .with_context(|| format!("cycle {cycle}"))?;

        let written = Arc::into_inner(writes)
            .context("the readers are gone")?
            .stop()
            .await;
        for node in 0..cluster.len() {
            written
                .check(&cluster.client(node))
                .await
                .with_context(|| format!("node {node} after cycle {cycle}"))?;
        }
        all.merge(written);
    }
    gaps.sort_unstable();
    println!(
        "gaps of {cycles} cycles: median {:?}, longest {:?}; {} writes",
        gaps[cycles / 2],
        gaps[cycles - 1],
        all.acknowledged.len()
    );
    // As few as 2 of 50.
    let long = gaps.iter().filter(|gap| **gap > GAP).count();
    ensure!(
        long <= cycles.div_ceil(25),
        "{long} of {cycles} gaps were over {GAP:?}: {gaps:?}"
    );

    info!("--- kill all, start all");
    for node in 0..cluster.len() {
        cluster.kill(node)?;
    }
    for node in 0..cluster.len() {
        cluster.start_node(node).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
        all.check(&cluster.client(node))
            .await
            .with_context(|| format!("node {node} after all were killed"))?;
    }
    Ok(())
}

/// A node told to stop hands over what it leads, and what it acknowledged is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_told_to_stop_under_load_exits_with_0_and_loses_nothing() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    let clients = (0..8).map(|_| cluster.client_of_all()).collect();
    let writes = Writes::start(clients, "k", 100, &cluster.clock);
    writes.more(100).await?;

    info!("--- SIGTERM");
    let leader = cluster.leader().await?;
    let code = tokio::time::timeout(Duration::from_secs(10), cluster.stop_node(leader))
        .await
        .context("it stops within 10 s")??;
    ensure!(
        code == Some(0),
        "it exited with {code:?}: {}",
        cluster.log_of(leader)
    );
    let last_words = cluster
        .log_of(leader)
        .split_once("stopping")
        .map(|(_, after)| after.to_owned())
        .unwrap_or_default();
    ensure!(
        last_words.contains("a leader"),
        "it left before another led: {last_words}"
    );
    writes.more(100).await?;
    let written = writes.stop().await;
    for node in (0..cluster.len()).filter(|&node| node != leader) {
        written.check(&cluster.client(node)).await?;
    }

    info!("--- start it again");
    cluster.start_node(leader).await?;
    cluster.ready(leader).await?;
    written.check(&cluster.client(leader)).await
}

/// A follower that was frozen deposes nobody when it wakes, and catches up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_paused_catches_up_and_deposes_nobody() -> anyhow::Result<()> {
    let cluster = processes().start().await?;
    let leader = cluster.leader().await?;
    let follower = cluster.follower().await?;
    let term = term(&cluster, leader).await?;
    let client = cluster.client(leader);
    let there = cluster.client(follower);
    for round in 0..PAUSES {
        let (old, new) = (format!("old {round}"), format!("new {round}"));
        let shows = async |value: &str| {
            let read = there.get("k").consistency(Consistency::Local).await;
            read.is_ok_and(|read| read.answer.value.as_deref() == Some(value.as_bytes()))
        };
        client.set("k", old.clone()).await?;
        cluster
            .until("the follower has the old value", async || shows(&old).await)
            .await?;

        info!(round, "--- SIGSTOP");
        cluster.pause(follower)?;
        let missed = async || {
            let status = client.cluster().status().await;
            status.is_ok_and(|status| {
                status
                    .nodes
                    .iter()
                    .any(|node| node.name == cluster.name(follower) && !node.healthy)
            })
        };
        cluster
            .until("the leader misses the follower", missed)
            .await?;
        client.set("k", new.clone()).await?;

        info!("--- SIGCONT");
        cluster.resume(follower)?;
        let read = there.get("k").token(client.token()).await?;
        ensure!(
            read.answer.value.as_deref() == Some(new.as_bytes()),
            "a session read was older than the session: {read:?}"
        );
        cluster
            .until("the follower has what it missed", async || {
                shows(&new).await
            })
            .await?;
        let writable =
            async || matches!(cluster.admin(follower, "/readyz/write").await, Ok((200, _)));
        cluster
            .until("the follower hears its leader", writable)
            .await?;
        ensure!(
            cluster.leader().await? == leader && self::term(&cluster, leader).await? == term,
            "the leader was deposed"
        );
    }
    Ok(())
}

/// Waits until a node shows a key from its own memory.
async fn caught_up(cluster: &Cluster, node: usize, key: &str) -> anyhow::Result<()> {
    let client = cluster.client(node);
    let has = async || {
        client
            .get(key)
            .consistency(Consistency::Local)
            .await
            .is_ok_and(|read| read.answer.is_hit())
    };
    cluster
        .until(&format!("{} catches up", cluster.name(node)), has)
        .await
}

async fn term(cluster: &Cluster, node: usize) -> anyhow::Result<u64> {
    let status = cluster.client(node).cluster().status().await?;
    Ok(status.per_shard.first().context("shard 0")?.term)
}
