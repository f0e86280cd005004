//! First figures of a cluster of three child processes on this machine: writes and reads a second,
//! with 1 and 64 callers. All processes and all callers share the machine's cores: read the ratios,
//! not the digits.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_client::{Client, Consistency};
use holdfast_tests::cluster::{Cluster, Place, Programs, Setup};

const PROGRAMS: Programs = Programs {
    holdfastd: env!("CARGO_BIN_EXE_holdfastd-under-test"),
    holdfast: env!("CARGO_BIN_EXE_holdfast-under-test"),
};
const TIME: Duration = Duration::from_secs(5);
const KEYS: u64 = 10_000;

#[derive(Debug, Clone, Copy)]
enum Work {
    Set,
    Get(Consistency),
}

fn main() -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(async {
        let cluster = Setup::new(PROGRAMS, Place::Processes).start().await?;
        let leader = cluster.leader().await?;
        let follower = cluster.follower().await?;
        println!("| what | where | 1 caller, /s | 64 callers, /s | ratio |\n|--|--|--|--|--|");
        for (what, work, node, place) in [
            ("Set, 128 bytes", Work::Set, leader, "leader"),
            ("Set, 128 bytes", Work::Set, follower, "follower"),
            (
                "Get, session",
                Work::Get(Consistency::Session),
                leader,
                "leader",
            ),
            (
                "Get, session",
                Work::Get(Consistency::Session),
                follower,
                "follower",
            ),
            (
                "Get, linearizable",
                Work::Get(Consistency::Linearizable),
                leader,
                "leader",
            ),
            (
                "Get, linearizable",
                Work::Get(Consistency::Linearizable),
                follower,
                "follower",
            ),
        ] {
            let (one, many) = (
                rate(&cluster, node, work, 1).await?,
                rate(&cluster, node, work, 64).await?,
            );
            println!(
                "| {what} | {place} | {one:.0} | {many:.0} | {:.1} |",
                many / one
            );
        }
        cluster.stop().await
    })
}

/// Calls that succeeded a second.
async fn rate(cluster: &Cluster, node: usize, work: Work, callers: u64) -> anyhow::Result<f64> {
    let done = Arc::new(AtomicU64::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    // As many services: a connection for each eight callers.
    let clients: Vec<Client> = (0..callers.div_ceil(8))
        .map(|_| cluster.client(node))
        .collect();
    for caller in 0..callers {
        let (client, done) = (clients[(caller / 8) as usize].clone(), done.clone());
        tasks.spawn(async move {
            let value = vec![b'v'; 128];
            for n in 0u64.. {
                let key = format!("key-{}", (caller * 7919 + n) % KEYS);
                let succeeded = match work {
                    Work::Set => client.set(key, value.clone()).await.is_ok(),
                    Work::Get(consistency) => {
                        client.get(key).consistency(consistency).await.is_ok()
                    }
                };
                done.fetch_add(u64::from(succeeded), Ordering::Relaxed);
            }
        });
    }
    tokio::time::sleep(TIME / 5).await;
    let before = done.load(Ordering::Relaxed);
    tokio::time::sleep(TIME).await;
    let after = done.load(Ordering::Relaxed);
    tasks.shutdown().await;
    Ok((after - before) as f64 / TIME.as_secs_f64())
}
