//! `cluster health` tells of a voter that runs and does not keep up, and why; nothing once it does.

use std::time::Duration;

use anyhow::{Context, ensure};
use holdfast_tests::{cluster::Cluster, slow_disk::SlowDisk};
use parking_lot::Mutex;
use tracing::info;

use crate::processes;

/// Longer than a sync may take, shorter than any move has to.
const SLOW: Duration = Duration::from_millis(700);
/// Longer than a voter may stand still.
const STUCK: Duration = Duration::from_secs(8);

/// What `health` says at each other node while writes go on.
async fn health_says(cluster: &Cluster, ill: usize, what: &str) -> anyhow::Result<()> {
    let client = cluster.client_of_all();
    let name = cluster.name(ill);
    for asked in (0..cluster.len()).filter(|&node| node != ill) {
        cluster
            .until(&format!("node {asked} says {what:?}"), async || {
                let _ = client.set("k", "v").await;
                let health = cluster.health(asked);
                health.is_ok_and(|(code, said)| {
                    let mut lines = said.lines();
                    code == Some(8) && lines.any(|line| line.contains(name) && line.contains(what))
                })
            })
            .await?;
    }
    Ok(())
}

/// While writes go on: how slow a disk is follows from its last syncs.
async fn all_is_well(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.client_of_all();
    for asked in 0..cluster.len() {
        let last = Mutex::default();
        cluster
            .until(&format!("node {asked} finds all well"), async || {
                let _ = client.set("k", "v").await;
                let health = cluster.health(asked);
                let is_well = matches!(health, Ok((Some(0), _)));
                *last.lock() = Some(health);
                is_well
            })
            .await
            .with_context(|| format!("{:?}", last.into_inner()))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_does_not_keep_up_is_no_healthy_one() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    let disk = SlowDisk::build(cluster.dir())?;
    let wrapper = disk.wrapper();
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    let ill = cluster.follower().await?;
    cluster.stop_node(ill).await?;
    cluster.start_with(ill, &wrapper).await?;
    cluster.ready(ill).await?;
    all_is_well(&cluster).await?;
    let term = cluster.terms().await?;

    info!("--- node {ill} is frozen");
    cluster.pause(ill)?;
    health_says(&cluster, ill, "it does not answer").await?;
    cluster.resume(ill)?;
    all_is_well(&cluster).await?;

    info!("--- its disk is slow");
    disk.wait(SLOW)?;
    health_says(&cluster, ill, "its disk is slow: a sync of the log takes").await?;
    disk.wait(Duration::ZERO)?;
    all_is_well(&cluster).await?;

    info!("--- its disk hangs: it answers, and takes nothing");
    disk.wait(STUCK)?;
    health_says(&cluster, ill, "it has taken nothing of shard 0 for").await?;
    disk.wait(Duration::ZERO)?;
    all_is_well(&cluster).await?;

    ensure!(
        cluster.terms().await? == term,
        "one voter's trouble cost the cluster its leader"
    );
    cluster.stop().await
}
