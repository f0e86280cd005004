//! First figures of a cluster of three child processes on this machine: writes and reads a second
//! and how long they take, with 1 and 64 callers. All processes and all callers share the machine's
//! cores: read the ratios, not the digits. A call that fails is counted and shown.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
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
        println!("| what | where | callers | /s | p50 | p99 | failed |\n|--|--|--|--|--|--|--|");
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
            for callers in [1, 64] {
                let Load { done, failed } = load(&cluster, node, work, callers).await?;
                let rate = done.len() as f64 / TIME.as_secs_f64();
                let (p50, p99) = (percentile(&done, 50), percentile(&done, 99));
                println!(
                    "| {what} | {place} | {callers} | {rate:.0} | {p50:.1?} | {p99:.1?} | {failed} |"
                );
            }
        }
        cluster.stop().await
    })
}

/// What callers saw in [`TIME`].
#[derive(Default)]
struct Load {
    /// How long each call took, in order.
    done: Vec<Duration>,
    failed: u64,
}

/// Of numbers in order.
fn percentile(done: &[Duration], percent: usize) -> Duration {
    let last = done.len().saturating_sub(1);
    done.get(last * percent / 100).copied().unwrap_or_default()
}

async fn load(cluster: &Cluster, node: usize, work: Work, callers: u64) -> anyhow::Result<Load> {
    let counts = Arc::new(AtomicBool::new(false));
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = tokio::task::JoinSet::new();
    // As many services: a connection for each eight callers.
    let clients: Vec<Client> = (0..callers.div_ceil(8))
        .map(|_| cluster.client(node))
        .collect();
    for caller in 0..callers {
        let client = clients[(caller / 8) as usize].clone();
        let (counts, stop, clock) = (counts.clone(), stop.clone(), cluster.clock.clone());
        tasks.spawn(async move {
            let (value, mut load) = (vec![b'v'; 128], Load::default());
            for n in 0u64.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                let key = format!("key-{}", (caller * 7919 + n) % KEYS);
                let (called, counted) = (clock.monotonic(), counts.load(Ordering::Relaxed));
                let succeeded = match work {
                    Work::Set => client.set(key, &value).await.is_ok(),
                    Work::Get(consistency) => {
                        client.get(key).consistency(consistency).await.is_ok()
                    }
                };
                if counted && succeeded {
                    load.done.push(clock.monotonic().saturating_sub(called));
                } else if counted {
                    load.failed += 1;
                }
            }
            load
        });
    }
    tokio::time::sleep(TIME / 5).await;
    counts.store(true, Ordering::Relaxed);
    tokio::time::sleep(TIME).await;
    counts.store(false, Ordering::Relaxed);
    stop.store(true, Ordering::Relaxed);
    let mut all = Load::default();
    for load in tasks.join_all().await {
        all.done.extend(load.done);
        all.failed += load.failed;
    }
    all.done.sort_unstable();
    Ok(all)
}
