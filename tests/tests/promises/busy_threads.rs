//! Threads that have their hands full with what clients asked for: who leads and who follows does
//! not hang on them.

use std::time::Duration;

use anyhow::{Context, ensure};

use crate::in_process;

/// As many as the runtime below has.
const THREADS: usize = 2;
/// Several leases, and elections.
const BUSY: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_that_answer_clients_are_busy_and_the_leader_stays() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let terms = cluster.terms().await?;
    let busy: Vec<_> = (0..THREADS)
        .map(|_| tokio::spawn(async { std::thread::sleep(BUSY) }))
        .collect();
    // As long as no timer of theirs goes off: several leases.
    std::thread::sleep(BUSY * 2 / 3);
    for node in 0..cluster.len() {
        let replica = cluster.here(node)?.replicas().replica(0);
        let leader = replica.context("a replica")?.leader();
        ensure!(leader.is_some(), "node {node} hears no leader");
    }
    for thread in busy {
        thread.await?;
    }
    ensure!(
        cluster.terms().await? == terms,
        "another leader was elected"
    );
    cluster.client(0).set("key", "value").await?;
    cluster.stop().await
}
