//! One fetch for the whole cluster: however many ask at once, ahead of readers who never wait, and
//! over a leader's death.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::v1::{Consistency, State};
use holdfast_raft::Clock;
use holdfast_tests::{
    cluster::Cluster,
    origin::{Answer, Behaviour, Gate, Origin},
    wire::{Wire, text},
};
use tokio::task::JoinSet;
use tracing::info;

use crate::{in_process, processes};

/// Upstream `users` behind the keys `user/*`. `policy` is further parameters of its policy.
fn users(origin: &Origin, policy: &str) -> String {
    let url = origin.url("/users/{1}");
    format!(
        "upstreams: {{users: {{http: {{url: \"{url}\"}}, fetch_timeout: 60s}}}}\npolicies: [{{match: \"user/*\", upstream: users, hard_timeout: 60s, {policy}}}]"
    )
}

/// Reads that waited for more than memory, on all running nodes.
async fn waited(cluster: &Cluster) -> anyhow::Result<f64> {
    let mut waited = 0.0;
    for node in (0..cluster.len()).filter(|&node| cluster.is_running(node)) {
        waited += cluster
            .metric(node, "holdfast_reads_waited_total", &[])
            .await?;
    }
    Ok(waited)
}

/// Reads a key without a token, as a client that has seen nothing does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p5_a_thousand_first_reads_over_three_nodes_are_one_call() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let gate = Gate::closed();
    origin.respond(
        Behaviour::compute(|_, number| Answer::text(format!("call {number}"))).after(&gate),
    );
    let cluster = in_process()
        .extra(users(&origin, "ttl: 60s"))
        .start()
        .await?;
    let (before, terms) = (waited(&cluster).await?, cluster.terms().await?);
    let mut readers = JoinSet::new();
    for wire in cluster
        .wires()?
        .into_iter()
        .map(|wire| wire.within(Duration::from_secs(60)))
        .cycle()
        .take(1_000)
    {
        readers.spawn(async move { wire.read("user/7").await });
    }
    cluster
        .until("a thousand readers wait", async || {
            waited(&cluster)
                .await
                .is_ok_and(|waited| waited - before >= 1_000.0)
        })
        .await?;
    gate.open();
    let calls = origin.calls();
    ensure!(
        (1..=1 + cluster.terms().await? - terms).contains(&calls),
        "{calls} calls for a thousand readers"
    );
    while let Some(reader) = readers.join_next().await {
        assert_eq!(reader??, (State::Fresh, format!("call {calls}")));
    }
    assert_eq!(origin.calls(), calls);
    cluster.stop().await
}

/// What the readers of one node saw.
#[derive(Debug, Default)]
struct Watched {
    reads: usize,
    not_fresh: Vec<State>,
}

/// Reads every 50 ms until told to stop.
async fn watch(wire: Wire, stop: Arc<AtomicBool>) -> anyhow::Result<Watched> {
    let mut watched = Watched::default();
    let mut every = tokio::time::interval(Duration::from_millis(50));
    while !stop.load(Ordering::Relaxed) {
        every.tick().await;
        let (state, _) = wire.read("user/7").await?;
        watched.reads += 1;
        if state != State::Fresh {
            watched.not_fresh.push(state);
        }
    }
    Ok(watched)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_is_read_is_refreshed_ahead_once_for_the_cluster_and_nobody_waits()
-> anyhow::Result<()> {
    // Of 2 s; the first one after a miss comes sooner, at a moment of its own.
    const INTERVAL: Duration = Duration::from_millis(1_600);
    let origin = Origin::start().await?;
    let clock = Clock::system();
    let cluster = in_process()
        .extra(users(&origin, "ttl: 2s, ttl_jitter: 0"))
        .start()
        .await?;
    for wire in cluster.wires()? {
        assert_eq!(wire.read("user/7").await?.0, State::Fresh);
    }
    assert_eq!(origin.calls(), 1);
    let before = waited(&cluster).await?;

    info!("--- readers on every node, and time");
    let stop = Arc::new(AtomicBool::new(false));
    let mut readers = JoinSet::new();
    for wire in cluster.wires()? {
        readers.spawn(watch(wire, stop.clone()));
    }
    tokio::time::timeout(Duration::from_secs(10), origin.reached(2))
        .await
        .context("the first refresh after the miss")?;
    let from = clock.monotonic();
    // Ten intervals, and until the next call.
    tokio::time::timeout(Duration::from_secs(60), origin.reached(2 + 9))
        .await
        .context("nine more refreshes")?;
    let elapsed = clock.monotonic() - from;
    stop.store(true, Ordering::Relaxed);

    let expected = elapsed.as_secs_f64() / INTERVAL.as_secs_f64();
    println!("9 calls in {elapsed:?}: {expected:.2} intervals");
    ensure!(
        (9.0 / 1.2..9.0 / 0.8).contains(&expected),
        "9 calls in {elapsed:?}, {expected:.2} intervals of {INTERVAL:?}"
    );
    let mut reads = 0;
    while let Some(watched) = readers.join_next().await {
        let watched = watched??;
        ensure!(
            watched.not_fresh.is_empty(),
            "reads that were not FRESH: {watched:?}"
        );
        reads += watched.reads;
    }
    ensure!(reads > 100, "only {reads} reads");
    assert_eq!(
        waited(&cluster).await? - before,
        0.0,
        "of {reads} reads some waited"
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_killed_in_mid_fetch_costs_one_more_call_and_no_waiter() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let gate = Gate::closed();
    origin.respond(
        Behaviour::compute(|_, number| Answer::text(format!("call {number}"))).after(&gate),
    );
    let mut cluster = processes()
        .extra(users(&origin, "ttl: 60s"))
        .start()
        .await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let followers: Vec<usize> = (0..3).filter(|&node| node != leader).collect();

    info!("--- readers on the followers wait for the leader's fetch");
    let mut readers = JoinSet::new();
    for n in 0..20 {
        let wire = cluster
            .wire(followers[n % 2])?
            .within(Duration::from_secs(60));
        readers.spawn(async move { wire.read("user/7").await });
    }
    tokio::time::timeout(Duration::from_secs(20), origin.reached(1))
        .await
        .context("the leader fetches")?;
    cluster
        .until("all readers wait", async || {
            waited(&cluster).await.is_ok_and(|waited| waited >= 20.0)
        })
        .await?;
    assert_eq!(origin.calls(), 1);

    info!("--- the leader is killed");
    cluster.kill(leader)?;
    tokio::time::timeout(Duration::from_secs(20), origin.reached(2))
        .await
        .context("the next leader fetches")?;
    gate.open();
    while let Some(reader) = readers.join_next().await {
        assert_eq!(reader??, (State::Fresh, "call 2".to_owned()));
    }
    assert_eq!(origin.calls(), 2);
    Ok(())
}

/// It still holds the connections of those who asked it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_frozen_in_mid_fetch_is_left_for_the_next_and_changes_nothing_when_it_wakes()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let gate = Gate::closed();
    origin.respond(
        Behaviour::compute(|_, number| Answer::text(format!("call {number}"))).after(&gate),
    );
    let cluster = processes()
        .extra(users(&origin, "ttl: 60s"))
        .start()
        .await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let mut readers = JoinSet::new();
    for node in (0..3).filter(|&node| node != leader) {
        let wire = cluster.wire(node)?.within(Duration::from_secs(60));
        readers.spawn(async move { wire.read("user/7").await });
    }
    tokio::time::timeout(Duration::from_secs(20), origin.reached(1))
        .await
        .context("the leader fetches")?;
    cluster
        .until("all readers wait", async || {
            waited(&cluster).await.is_ok_and(|waited| waited >= 2.0)
        })
        .await?;

    info!(
        "--- the leader is frozen; the connection to it breaks in 4 s, and nobody waits for that"
    );
    cluster.pause(leader)?;
    tokio::time::timeout(Duration::from_secs(3), origin.reached(2))
        .await
        .context("the next leader fetches")?;
    gate.open();
    while let Some(reader) = readers.join_next().await {
        assert_eq!(reader??, (State::Fresh, "call 2".to_owned()));
    }
    info!("--- it wakes");
    cluster.resume(leader)?;
    for wire in cluster.wires()? {
        assert_eq!(
            text(
                &wire
                    .get("user/7", Consistency::Linearizable, &Bytes::new())
                    .await?
            ),
            "call 2"
        );
    }
    assert_eq!(origin.calls(), 2);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalidated_key_is_refreshed_though_nobody_reads_it() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::compute(|_, number| {
        Answer::text(format!("call {number}"))
    }));
    let cluster = in_process()
        .extra(users(&origin, "ttl: 1h"))
        .start()
        .await?;
    for (node, wire) in cluster.wires()?.into_iter().enumerate() {
        let (key, path) = (format!("user/{node}"), format!("/users/{node}"));
        ensure!(wire.read(&key).await?.0 == State::Fresh, "{key}");

        info!("--- {key} is invalidated, at any node; its only reader went away before");
        wire.invalidate(&key, None).await?;
        cluster
            .until("the upstream is asked again", async || {
                origin.calls_of(&path) == 2
            })
            .await?;
        let fresh = async || {
            wire.inspect(&key).await.is_ok_and(|seen| {
                seen.answer
                    .is_some_and(|answer| answer.state() == State::Fresh)
            })
        };
        cluster.until("it is fresh again", fresh).await?;
    }
    ensure!(origin.calls() == 6, "{} calls", origin.calls());
    cluster.stop().await
}

/// Also one that was due in the same instant: it was read, refreshed and invalidated before the
/// leader looked at the clock again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalidate_right_after_another_is_refreshed_too() -> anyhow::Result<()> {
    const KEYS: usize = 20;
    let origin = Origin::start().await?;
    let cluster = in_process()
        .extra(users(&origin, "ttl: 1h"))
        .start()
        .await?;
    for (node, wire) in cluster.wires()?.into_iter().enumerate() {
        for key in (0..KEYS).map(|n| format!("user/{node}-{n}")) {
            ensure!(wire.read(&key).await?.0 == State::Fresh, "{key}");
            wire.invalidate(&key, None).await?;
            wire.invalidate(&key, None).await?;
        }
        let fresh = async || {
            for key in (0..KEYS).map(|n| format!("user/{node}-{n}")) {
                let seen = wire.inspect(&key).await.ok();
                let answer = seen.and_then(|seen| seen.answer);
                if answer.is_none_or(|answer| answer.state() != State::Fresh) {
                    return false;
                }
            }
            true
        };
        cluster
            .until("all are fresh again, and nobody reads them", fresh)
            .await?;
    }
    cluster.stop().await
}

/// Reads all keys through one node, and what was not FRESH of it.
async fn stale_of(wire: &Wire, keys: usize) -> anyhow::Result<Vec<(usize, State)>> {
    let mut stale = Vec::new();
    for n in 0..keys {
        let (state, _) = wire.read(&format!("user/{n}")).await?;
        if state != State::Fresh {
            stale.push((n, state));
        }
    }
    Ok(stale)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_follower_reads_stays_fresh_when_the_leader_changes() -> anyhow::Result<()> {
    const KEYS: usize = 200;
    let origin = Origin::start().await?;
    let cluster = in_process()
        .extra(users(&origin, "ttl: 20s, ttl_jitter: 0"))
        .start()
        .await?;
    let reader = cluster.wire(cluster.follower().await?)?;
    assert_eq!(stale_of(&reader, KEYS).await?, []);
    assert_eq!(stale_of(&reader, KEYS).await?, []);
    let calls = origin.calls();

    info!("--- three leaders more, and nobody reads");
    for _ in 0..3 {
        let leader = cluster.leader().await?;
        let term = cluster.terms().await?;
        cluster
            .client(leader)
            .cluster()
            .transfer_leader(None)
            .await?;
        cluster
            .until("another leader", async || {
                cluster.terms().await.is_ok_and(|now| now > term)
            })
            .await?;
    }
    cluster
        .until("each key is fetched again", async || {
            (0..KEYS).all(|n| origin.calls_of(&format!("/users/{n}")) >= 2)
        })
        .await?;
    ensure!(calls >= KEYS as u64, "{calls} calls");
    assert_eq!(stale_of(&reader, KEYS).await?, []);
    cluster.stop().await
}

/// Each node is stopped, started and awaited in turn, as a deployment does it, while one of them is
/// read all the time it is there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_restart_leaves_what_one_follower_reads_fresh() -> anyhow::Result<()> {
    const KEYS: usize = 200;
    let origin = Origin::start().await?;
    let mut cluster = in_process()
        .extra(users(&origin, "ttl: 10s, ttl_jitter: 0"))
        .start()
        .await?;
    let reader = cluster.follower().await?;
    let wire = cluster.wire(reader)?;
    assert_eq!(stale_of(&wire, KEYS).await?, []);
    // Who has it takes the node out of the readers' rotation.
    let rotation = Arc::new(tokio::sync::Mutex::new(wire));
    let stop = Arc::new(AtomicBool::new(false));
    let reads = tokio::spawn({
        let (rotation, stop) = (rotation.clone(), stop.clone());
        async move {
            let (mut passes, mut stale) = (0, Vec::new());
            while !stop.load(Ordering::Relaxed) {
                stale.extend(stale_of(&*rotation.lock().await, KEYS).await?);
                passes += 1;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            anyhow::Ok((passes, stale))
        }
    });
    for node in 0..cluster.len() {
        let out_of_rotation = match node == reader {
            true => Some(rotation.lock().await),
            false => None,
        };
        cluster.stop_node(node).await?;
        cluster.start_node(node).await?;
        cluster.ready(node).await?;
        drop(out_of_rotation);
        let before: Vec<u64> = (0..KEYS)
            .map(|n| origin.calls_of(&format!("/users/{n}")))
            .collect();
        cluster
            .until("each key is fetched again", async || {
                (0..KEYS).all(|n| origin.calls_of(&format!("/users/{n}")) > before[n])
            })
            .await?;
    }
    stop.store(true, Ordering::Relaxed);
    let (passes, stale) = reads.await??;
    ensure!(stale.is_empty(), "{stale:?} in {passes} passes");
    ensure!(passes > 20, "{passes} passes");
    cluster.stop().await
}

/// Its refresh begins no sooner than half its life, and what took longer than its life is fresh
/// when it comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_upstream_is_not_called_more_often_and_its_values_are_fresh_when_they_come()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text("slow").delayed(Duration::from_millis(1_500)));
    let policy = "ttl: 1s, ttl_jitter: 0, min_refresh_interval: 1s";
    let cluster = in_process().extra(users(&origin, policy)).start().await?;
    let wire = cluster.wire(0)?;
    for n in 0..3 {
        let key = format!("user/{n}");
        assert_eq!(wire.read(&key).await?, (State::Fresh, "slow".into()));
        let seen = wire.inspect(&key).await?;
        let entry = seen.entry.context("it is stored")?;
        let at = |instant: Option<prost_types::Timestamp>| -> anyhow::Result<i64> {
            let instant = instant.context("an instant")?;
            Ok(instant.seconds * 1_000 + i64::from(instant.nanos) / 1_000_000)
        };
        let (fetched, fresh) = (at(entry.fetched_at)?, at(entry.fresh_until)?);
        let refresh = at(entry.refresh_at)?;
        ensure!(
            fresh - fetched >= 1_500 + 1_000 && refresh >= fresh,
            "fetched at {fetched}, due at {refresh}, fresh until {fresh}"
        );
    }
    cluster.stop().await
}
