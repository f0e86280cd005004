//! Disks whose syncs take long: a cluster on them keeps its leader while it runs, and elects another
//! when it is gone.

use std::time::Duration;

use anyhow::ensure;
use holdfast_tests::{slow_disk::SlowDisk, writes::Writes};
use tracing::info;

use crate::processes;

/// For a busy machine.
const SLACK: Duration = Duration::from_secs(2);
const KILLS: usize = 2;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn syncs_of_150_ms_fail_over_within_3_s() -> anyhow::Result<()> {
    fails_over(Duration::from_millis(150), Duration::from_secs(3)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn syncs_of_400_ms_fail_over_within_6_s() -> anyhow::Result<()> {
    fails_over(Duration::from_millis(400), Duration::from_secs(6)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn syncs_of_1_s_fail_over_within_15_s() -> anyhow::Result<()> {
    fails_over(Duration::from_secs(1), Duration::from_secs(15)).await
}

async fn fails_over(sync: Duration, gap_max: Duration) -> anyhow::Result<()> {
    let mut cluster = processes().configure()?;
    let disk = SlowDisk::build(cluster.dir())?;
    let wrapper = disk.wrapper();
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    for node in 0..cluster.len() {
        cluster.start_with(node, &wrapper).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }
    let leader = cluster.leader().await?;

    disk.wait(sync)?;
    info!("--- the tool delays: a write waits for a sync");
    let client = cluster.client(leader);
    let began = cluster.clock.monotonic();
    client.set("first", "written").await?;
    ensure!(cluster.clock.monotonic() - began >= sync, "no delay");

    for kill in 0..KILLS {
        info!(kill, "--- write for a while: nobody else is elected");
        let clients = (0..4).map(|_| cluster.client_of_all()).collect();
        let writes = Writes::start(clients, format!("{kill}/"), 10, &cluster.clock);
        writes.more(4).await?;
        let term = cluster.terms().await?;
        writes.more(20).await?;
        ensure!(
            cluster.terms().await? == term,
            "a leader was elected though none was gone"
        );

        info!(kill, "--- kill the leader");
        let leader = cluster.leader().await?;
        let killed_at = writes.now();
        cluster.kill(leader)?;
        writes.more(4).await?;
        let gap = writes.longest_gap_since(killed_at);
        println!("a sync takes {sync:?}: gap {gap:?}");
        ensure!(
            gap <= gap_max + SLACK,
            "no write was acknowledged for {gap:?}"
        );
        // Opening a store takes many syncs.
        disk.wait(Duration::ZERO)?;
        cluster.start_with(leader, &wrapper).await?;
        cluster.ready(leader).await?;
        disk.wait(sync)?;
        writes.more(4).await?;
        disk.wait(Duration::ZERO)?;
        let written = writes.stop().await;
        written.check(&cluster.client((leader + 1) % 3)).await?;
        disk.wait(sync)?;
    }
    Ok(())
}
