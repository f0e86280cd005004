//! A leader that finds millions of keys overdue does its other work meanwhile.

use std::{path::Path, time::Duration};

use anyhow::ensure;
use holdfast_proto::v1::State;
use holdfast_raft::{Budget, Engine, Family, StateBatch, Stores};
use holdfast_tests::origin::{Behaviour, Origin};

use crate::processes;

/// As after an hour without a quorum.
const OVERDUE: u64 = 5_000_000;
const A_BATCH: u64 = 100_000;
/// What the leader takes to look at all of them, and some.
const WATCHED_FOR: Duration = Duration::from_secs(40);
/// What a read or a write may wait on a busy machine.
const SOON: Duration = Duration::from_secs(2);
/// In the due index: a refresh.
const REFRESH: u8 = b'r';
const FORMAT: u8 = 1;

/// Rows of keys that were to be refreshed in the last hour.
fn plant(data_dir: &Path, now: u64) -> anyhow::Result<()> {
    let stores = Stores::open(Engine::Rocksdb, data_dir, Budget::default())?;
    let state = stores.open_state(0)?;
    let hour_ago = now - 3_600_000;
    for first in (0..OVERDUE).step_by(A_BATCH as usize) {
        let mut batch = StateBatch::default();
        for n in first..first + A_BATCH {
            let at = hour_ago + n * 3_500_000 / OVERDUE;
            let mut row = vec![REFRESH];
            row.extend_from_slice(&at.to_be_bytes());
            row.extend_from_slice(format!("user/{n}").as_bytes());
            batch.put(Family::Due, row, &[FORMAT][..]);
        }
        state.write(batch)?;
    }
    state.flush()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_million_overdue_keys_stall_neither_reads_nor_writes_nor_a_refresh()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text("v"));
    let rules = format!(
        "upstreams: {{users: {{http: {{url: \"{}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 6s, ttl_jitter: 0}}]",
        origin.url("/{1}")
    );
    let mut cluster = processes().nodes(1, 1).extra(rules).start().await?;
    cluster.stop_node(0).await?;
    plant(cluster.data_dir(0), cluster.clock.wall_ms())?;
    cluster.start_node(0).await?;
    cluster.ready(0).await?;
    let wire = cluster.wire(0)?;
    ensure!(wire.read("user/hot").await?.0 == State::Fresh);

    let now = || cluster.clock.monotonic();
    let (began, mut stale) = (now(), 0);
    let (mut longest, mut at) = (Duration::ZERO, Duration::ZERO);
    while now() - began < WATCHED_FOR {
        let asked = now();
        stale += usize::from(wire.read("user/hot").await?.0 != State::Fresh);
        wire.set("plain", "v", None).await?;
        if now() - asked > longest {
            (longest, at) = (now() - asked, asked - began);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("a read and a write took {longest:?} at most, {at:?} after the start");
    ensure!(longest < SOON, "{longest:?}, {at:?} after the start");
    ensure!(stale == 0, "{stale} reads were stale");
    cluster.stop().await
}
