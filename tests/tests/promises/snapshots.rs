//! A follower that is behind catches up, whatever the log still has, and then keeps up.

use std::{sync::Arc, time::Duration};

use anyhow::{Context, ensure};
use holdfast_client::{Client, Consistency};
use holdfast_tests::{cluster::Cluster, reads::Readers, writes::Writes};
use tracing::info;

use crate::processes;

const BEHIND: f64 = 5000.0;
/// How long the full load lasts, unless `HOLDFAST_LOAD_SECONDS` says.
const LOAD_SECONDS: u64 = 10;
const CALLERS: usize = 64;
const LAG_MAX: Duration = Duration::from_secs(1);
const LEVEL_WITHIN: Duration = Duration::from_secs(2);
/// The committed index reaches the file within a tenth of a second: three times that.
const COMMITTED_WITHIN: Duration = Duration::from_millis(300);
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// 5,000 entries behind a log that keeps 1,000.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_behind_the_log_catches_up_by_one_snapshot() -> anyhow::Result<()> {
    let mut cluster = processes()
        .extra("storage: {log_keep_entries: 1000}")
        .start()
        .await?;
    Readers::prepare(&cluster.client(0)).await?;
    let (leader, behind) = (cluster.leader().await?, cluster.follower().await?);
    cluster
        .until("the follower has the steady key", async || {
            revision(&cluster, behind).await.is_ok_and(|at| at > 0)
        })
        .await?;

    // What is committed is on its disk a moment later, so that it shows it when it is back.
    tokio::time::sleep(COMMITTED_WITHIN).await;

    info!("--- fall behind");
    let at_kill = cluster
        .metric(leader, "holdfast_applied_index", &[])
        .await?;
    cluster.kill(behind)?;
    let writes = Arc::new(Writes::start(
        vec![cluster.client_of_all(); 8],
        "k",
        100,
        &cluster.clock,
    ));
    while cluster
        .metric(leader, "holdfast_applied_index", &[])
        .await?
        < at_kill + BEHIND
    {
        writes.more(200).await?;
    }
    let others: Vec<usize> = (0..cluster.len()).filter(|&node| node != behind).collect();
    let readers_of_others = Readers::start(&cluster, &others, &writes);

    info!("--- catch up");
    let newest = writes
        .newest()
        .context("writes were acknowledged")?
        .1
        .revision(0);
    cluster.start_node(behind).await?;
    cluster
        .until("it answers", async || {
            cluster
                .client(behind)
                .get("steady")
                .consistency(Consistency::Local)
                .await
                .is_ok()
        })
        .await?;
    let readers = Readers::start(&cluster, &[behind], &writes);
    cluster
        .until("it has what it missed", async || {
            revision(&cluster, behind)
                .await
                .is_ok_and(|at| at >= newest)
        })
        .await?;
    cluster.ready(behind).await?;
    readers.stop().await?;
    readers_of_others.stop().await?;
    let installed = cluster
        .metric(behind, "holdfast_snapshots_installed_total", &[])
        .await?;
    ensure!(installed == 1.0, "caught up by {installed} snapshots");
    let sent = async || {
        cluster
            .metric(leader, "holdfast_snapshots_sent_total", &[])
            .await
            .unwrap_or_default()
    };
    cluster
        .until("the leader knows that its snapshot arrived", async || {
            sent().await > 0.0
        })
        .await?;
    let sent = sent().await;
    ensure!(sent == 1.0, "the leader sent {sent} snapshots");

    info!("--- everything is there");
    let written = Arc::into_inner(writes)
        .context("the readers are gone")?
        .stop()
        .await;
    written.check(&cluster.client(behind)).await?;
    ensure!(
        cluster
            .metric(behind, "holdfast_snapshots_installed_total", &[])
            .await?
            == 1.0,
        "not by one snapshot"
    );
    Ok(())
}

/// As many writes as go, and every follower shows each within a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn followers_keep_up_with_full_load() -> anyhow::Result<()> {
    let seconds = crate::from_environment("HOLDFAST_LOAD_SECONDS").unwrap_or(LOAD_SECONDS);
    let cluster = processes().start().await?;
    let leader = cluster.leader().await?;
    let writes = Writes::start(
        vec![cluster.client_of_all(); CALLERS],
        "k",
        100,
        &cluster.clock,
    );
    writes.more(CALLERS as u64).await?;
    let followers: Vec<Client> = (0..cluster.len())
        .filter(|&node| node != leader)
        .map(|node| cluster.client(node))
        .collect();
    for follower in &followers {
        cluster
            .until("it knows its lag", async || knows_its_lag(follower).await)
            .await?;
    }

    info!("--- load");
    let until = writes.now() + Duration::from_secs(seconds);
    let mut longest = Duration::ZERO;
    while writes.now() < until {
        for follower in &followers {
            longest = longest.max(lag(follower, &writes).await?);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    println!(
        "{} writes in {seconds} s, the longest lag {longest:?}",
        writes.count()
    );
    ensure!(longest < LAG_MAX, "a follower was {longest:?} behind");

    info!("--- rest");
    let written = writes.stop().await;
    let level = cluster.until("no lag", async || {
        let mut level = true;
        for node in 0..cluster.len() {
            level &= revision(&cluster, node)
                .await
                .is_ok_and(|at| at >= written.token.revision(0));
        }
        let status = cluster.client(leader).cluster().status().await;
        level && status.is_ok_and(|status| status.nodes.iter().all(|node| node.lag == 0))
    });
    tokio::time::timeout(LEVEL_WITHIN, level)
        .await
        .with_context(|| format!("a lag is left {} s later", LEVEL_WITHIN.as_secs()))?
}

async fn knows_its_lag(follower: &Client) -> bool {
    let read = follower.get("k0").consistency(Consistency::Local).await;
    read.is_ok_and(|read| read.replica.lag.is_some())
}

/// How long a follower takes to show the newest write, or what it says itself if that is more.
async fn lag(follower: &Client, writes: &Writes) -> anyhow::Result<Duration> {
    let newest = writes
        .newest()
        .context("a write was acknowledged")?
        .1
        .revision(0);
    let began = writes.now();
    loop {
        let replica = follower
            .get("k0")
            .consistency(Consistency::Local)
            .await?
            .replica;
        let told = replica
            .lag
            .context("a follower that hears its leader knows its lag")?;
        let took = writes.now().saturating_sub(began);
        if replica.revision >= newest || took > LAG_MAX {
            return Ok(took.max(told));
        }
    }
}

async fn revision(cluster: &Cluster, node: usize) -> anyhow::Result<u64> {
    Ok(cluster
        .client(node)
        .get("steady")
        .consistency(Consistency::Local)
        .await?
        .replica
        .revision)
}
