//! One upstream's trouble is its own, and a crowd of new keys does not push out those in use.

use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use holdfast_proto::v1::{Consistency, State};
use holdfast_tests::{
    origin::{Behaviour, Gate, Origin},
    wire::Wire,
};
use tokio::{task::JoinSet, time::timeout};
use tracing::info;

use crate::in_process;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_misses_of_an_upstream_that_hangs_leave_the_others_untouched()
-> anyhow::Result<()> {
    const HANGING: usize = 10_000;
    const CONNECTIONS: usize = 60;
    /// What a read may take while so many wait in the same process.
    const SOON: Duration = Duration::from_secs(2);
    let (hangs, works) = (Origin::start().await?, Origin::start().await?);
    let gate = Gate::closed();
    hangs.respond(Behaviour::text("late").after(&gate));
    works.respond(Behaviour::text("fetched"));
    let rules = format!(
        "upstreams: {{hangs: {{http: {{url: \"{}\"}}, fetch_timeout: 60s}}, works: {{http: {{url: \"{}\"}}}}}}\npolicies: [{{match: \"hang/*\", upstream: hangs, ttl: 1h, hard_timeout: 60s}}, {{match: \"user/*\", upstream: works, ttl: 1h}}]",
        hangs.url("/{1}"),
        works.url("/{1}")
    );
    let cluster = in_process().extra(rules).start().await?;
    let wires = cluster.wires()?;
    wires[0].set("plain", "here", None).await?;

    let connections: Result<Vec<Wire>, _> = (0..CONNECTIONS)
        .map(|n| cluster.wire(n % cluster.len()))
        .collect();
    let connections = connections?;
    let mut misses = JoinSet::new();
    for n in 0..HANGING {
        let wire = connections[n % CONNECTIONS].clone().once();
        let wire = wire.within(Duration::from_secs(60));
        misses.spawn(async move {
            wire.get(&format!("hang/{n}"), Consistency::Session, &Bytes::new())
                .await
        });
    }
    cluster
        .until("they wait", async || {
            let mut waiting = 0.0;
            for node in 0..cluster.len() {
                let labels = ["kind=\"waiting\""];
                let metric = cluster.metric(node, "holdfast_requests_in_flight", &labels);
                waiting += metric.await.unwrap_or(0.0);
            }
            info!("{waiting} wait");
            waiting >= HANGING as f64
        })
        .await?;

    info!("--- plain reads and the other upstream's misses");
    for n in 0..100 {
        for wire in &wires {
            let plain = timeout(SOON, wire.read("plain")).await??;
            ensure!(plain.1 == "here", "{plain:?}");
        }
        let key = format!("user/{n}");
        let fetched = timeout(SOON, wires[n % 3].read(&key)).await??;
        ensure!(fetched == (State::Fresh, "fetched".into()), "{fetched:?}");
        wires[n % 3].set(&format!("k{n}"), "v", None).await?;
    }
    ensure!(misses.try_join_next().is_none(), "one was answered");
    misses.shutdown().await;
    gate.open();
    cluster.stop().await
}

/// Misses of unknown keys, half as many again as the upstream has answers for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_misses_leaves_a_hot_key_fresh() -> anyhow::Result<()> {
    /// With 32 calls at a time 160 a second.
    const FETCH: Duration = Duration::from_millis(200);
    const EVERY: Duration = Duration::from_millis(4);
    const MISSES: usize = 2_500;
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text("v").delayed(FETCH));
    let rules = format!(
        "upstreams: {{users: {{http: {{url: \"{}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 4s, ttl_jitter: 0, hard_timeout: 5s}}]",
        origin.url("/{1}")
    );
    let cluster = in_process().extra(rules).start().await?;
    let wires = cluster.wires()?;
    ensure!(wires[0].read("user/hot").await?.0 == State::Fresh);

    let flood = tokio::spawn({
        let wires = wires.clone();
        async move {
            let mut misses = JoinSet::new();
            let mut every = tokio::time::interval(EVERY);
            for n in 0..MISSES {
                every.tick().await;
                let wire = wires[n % wires.len()].clone().once();
                misses.spawn(async move {
                    let key = format!("user/unknown-{n}");
                    wire.get(&key, Consistency::Session, &Bytes::new()).await
                });
            }
            let answered = misses.join_all().await;
            answered.iter().filter(|answer| answer.is_ok()).count()
        }
    });
    let (mut reads, mut stale) = (0, 0);
    while !flood.is_finished() {
        for wire in &wires {
            reads += 1;
            stale += usize::from(wire.read("user/hot").await?.0 != State::Fresh);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let answered = flood.await?;
    info!("{answered} of {MISSES} misses answered, {stale} of {reads} reads stale");
    ensure!(stale == 0, "{stale} of {reads} reads were not FRESH");
    ensure!(answered < MISSES, "no flood: all were answered");
    ensure!(
        answered > MISSES / 4,
        "the upstream was not used: {answered} misses answered"
    );
    cluster.stop().await
}
