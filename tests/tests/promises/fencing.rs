//! What a client said last wins: over any fetch that began before it, over time, and over its own
//! retries.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::v1::{Consistency, RequestId, SetRequest, State};
use holdfast_tests::{
    cluster::Cluster,
    origin::{Behaviour, Gate, Origin},
    wire::{Told, Wire, state, text},
};
use tokio::task::JoinSet;
use tonic::Code;
use tracing::info;

use crate::in_process;

/// What a client does while a fetch of the key is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Overtakes {
    Set,
    SetThenDelete,
    Delete,
    Invalidate,
}

/// What was there before the fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    /// A value past its lifetime, which is served while it is refreshed.
    Stale,
}

const OVERTAKES: [Overtakes; 4] = [
    Overtakes::Set,
    Overtakes::SetThenDelete,
    Overtakes::Delete,
    Overtakes::Invalidate,
];

fn users(origin: &Origin) -> String {
    let url = origin.url("/users/{1}");
    // No waiter gives up, and no refresh comes by itself.
    format!(
        "upstreams: {{users: {{http: {{url: \"{url}\"}}, fetch_timeout: 60s}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 1h, hard_timeout: 60s, stale_while_revalidate: 1d}}]"
    )
}

async fn reads_waited(cluster: &Cluster) -> anyhow::Result<f64> {
    let mut waited = 0.0;
    for node in 0..cluster.len() {
        waited += cluster
            .metric(node, "holdfast_reads_waited_total", &["why=\"miss\""])
            .await?;
    }
    Ok(waited)
}

async fn overtake(wire: &Wire, key: &str, how: Overtakes) -> anyhow::Result<Bytes> {
    Ok(match how {
        Overtakes::Set => wire.set(key, "set", None).await?.token,
        Overtakes::SetThenDelete => {
            wire.set(key, "set", None).await?;
            wire.delete(key, None).await?.token
        }
        Overtakes::Delete => wire.delete(key, None).await?.token,
        Overtakes::Invalidate => wire.invalidate(key, None).await?.token,
    })
}

/// A fetch that began before is slow; the client acts; the fetch ends. `node` is where the client
/// acts.
async fn overtaken(
    cluster: &Cluster,
    origin: &Origin,
    how: Overtakes,
    before: Before,
    node: usize,
) -> anyhow::Result<()> {
    let name = format!("{how:?}-{before:?}-{node}");
    let (key, path) = (format!("user/{name}"), format!("/users/{name}"));
    let wires: Vec<Wire> = cluster
        .wires()?
        .into_iter()
        .map(|wire| wire.within(Duration::from_secs(60)))
        .collect();
    let slow = Gate::closed();
    let overtaken = Behaviour::text("overtaken").after(&slow);
    let mut calls = 0;
    if before == Before::Stale {
        origin.respond_at(&path, Behaviour::text("first"));
        let first = wires[0]
            .get(&key, Consistency::Session, &Bytes::new())
            .await?;
        ensure!(
            text(&first) == "first",
            "{name}: the first read got `{}`",
            text(&first)
        );
        calls = 1;
        // Before it comes due: the refresh ahead may be sooner than the reader.
        origin.respond_at(&path, overtaken);
        cluster.advance(Duration::from_secs(2 * 3600)).await?;
    } else {
        origin.respond_at(&path, overtaken);
    }

    info!("--- {name}: a slow fetch");
    let reader = {
        let (wire, key) = (wires[(node + 1) % 3].clone(), key.clone());
        tokio::spawn(async move { wire.get(&key, Consistency::Session, &Bytes::new()).await })
    };
    cluster
        .until(&format!("{name}: the fetch has begun"), async || {
            origin.calls_of(&path) > calls
        })
        .await?;
    // Whoever calls from here on gets what is true now.
    origin.respond_at(&path, Behaviour::text("newest"));
    let waited = reads_waited(cluster).await?;
    let token = overtake(&wires[node], &key, how)
        .await
        .with_context(|| name.clone())?;

    info!("--- {name}: who asks now, on any node, with what the client knows or with nothing");
    let mut askers = JoinSet::new();
    for wire in &wires {
        for consistency in [Consistency::Session, Consistency::Linearizable] {
            let (wire, key, token) = (wire.clone(), key.clone(), token.clone());
            askers.spawn(async move { wire.get(&key, consistency, &token).await });
        }
        // Without a token a value that was stored before may still be there; where nothing was,
        // nothing may come.
        if before == Before::Nothing && how != Overtakes::Set && how != Overtakes::SetThenDelete {
            let (wire, key) = (wire.clone(), key.clone());
            askers.spawn(async move { wire.get(&key, Consistency::Local, &Bytes::new()).await });
        }
    }
    let asking = askers.len() as f64;
    let they_wait =
        how != Overtakes::Set && !(how == Overtakes::Invalidate && before == Before::Stale);
    let mut early = None;
    if they_wait {
        let what = format!("{name}: they wait");
        let all_wait = cluster.until(&what, async || {
            reads_waited(cluster)
                .await
                .is_ok_and(|now| now - waited >= asking)
        });
        tokio::select! {
            all_wait = all_wait => all_wait?,
            // By a leader that was elected meanwhile, whose call is not slow.
            answer = askers.join_next() => early = answer,
        }
    }
    slow.open();
    while let Some(answer) = match early.take() {
        Some(early) => Some(early),
        None => askers.join_next().await,
    } {
        let answer = answer?.with_context(|| name.clone())?;
        let allowed: &[&str] = match (how, before) {
            (Overtakes::Set, _) => &["set"],
            // Stale now, and served until the refresh that began after it.
            (Overtakes::Invalidate, Before::Stale) => &["first", "newest"],
            _ => &["newest"],
        };
        ensure!(
            allowed.contains(&&*text(&answer)),
            "{name}: who asked afterwards got `{}`",
            text(&answer)
        );
    }
    let waiter = reader.await??;
    ensure!(
        text(&waiter) != "overtaken",
        "{name}: who waited got what was overtaken"
    );

    info!("--- {name}: and so it stays");
    let lasts = if how == Overtakes::Set {
        "set"
    } else {
        "newest"
    };
    cluster
        .until(&format!("{name}: `{lasts}` is there"), async || {
            let read = wires[node]
                .get(&key, Consistency::Linearizable, &Bytes::new())
                .await;
            // A leader that was elected meanwhile may have fetched it before the Invalidate.
            read.is_ok_and(|read| (&*text(&read), state(&read)) == (lasts, State::Fresh))
        })
        .await?;
    for wire in &wires {
        let read = wire
            .get(&key, Consistency::Linearizable, &Bytes::new())
            .await?;
        ensure!(
            (&*text(&read), state(&read)) == (lasts, State::Fresh),
            "{name}: at last {:?} `{}`",
            state(&read),
            text(&read)
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p4_what_a_client_does_during_a_slow_fetch_wins_over_it() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let cluster = in_process().extra(users(&origin)).start().await?;
    for how in OVERTAKES {
        for node in 0..3 {
            overtaken(&cluster, &origin, how, Before::Nothing, node).await?;
        }
    }
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_does_during_a_slow_refresh_wins_over_it() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let cluster = in_process().extra(users(&origin)).start().await?;
    for how in OVERTAKES {
        for node in 0..3 {
            overtaken(&cluster, &origin, how, Before::Stale, node).await?;
        }
    }
    cluster.stop().await
}

/// No commit fences what is not stored: who leads has to see for itself that the key has changed
/// since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_does_during_a_slow_fetch_wins_over_a_value_too_large_to_store()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let cluster = in_process()
        .extra(users(&origin).replace("ttl: 1h", "ttl: 1h, max_value_bytes: 8B"))
        .start()
        .await?;
    let wires: Vec<Wire> = cluster
        .wires()?
        .into_iter()
        .map(|wire| wire.within(Duration::from_secs(60)))
        .collect();
    for how in [
        Overtakes::Delete,
        Overtakes::Invalidate,
        Overtakes::SetThenDelete,
    ] {
        for node in 0..3 {
            let (key, path) = (
                format!("user/{how:?}-{node}"),
                format!("/users/{how:?}-{node}"),
            );
            let slow = Gate::closed();
            origin.respond_at(&path, Behaviour::text("overtaken and large").after(&slow));
            let (reader, reads) = (wires[(node + 1) % 3].clone(), key.clone());
            let reader = tokio::spawn(async move {
                reader
                    .get(&reads, Consistency::Session, &Bytes::new())
                    .await
            });
            cluster
                .until(&format!("{key}: the fetch has begun"), async || {
                    origin.calls_of(&path) == 1
                })
                .await?;
            origin.respond_at(&path, Behaviour::text("newest and large"));
            let waited = reads_waited(&cluster).await?;
            let token = overtake(&wires[node], &key, how).await?;
            let mut askers = JoinSet::new();
            for wire in &wires {
                let (wire, key, token) = (wire.clone(), key.clone(), token.clone());
                askers.spawn(async move { wire.get(&key, Consistency::Session, &token).await });
            }
            cluster
                .until("they wait", async || {
                    reads_waited(&cluster)
                        .await
                        .is_ok_and(|now| now - waited >= 3.0)
                })
                .await?;
            slow.open();
            while let Some(answer) = askers.join_next().await {
                let answer = answer?.with_context(|| key.clone())?;
                ensure!(
                    text(&answer) == "newest and large",
                    "{key}: who asked afterwards got `{}`",
                    text(&answer)
                );
                ensure!(
                    answer.answer.is_some_and(|answer| !answer.stored),
                    "{key}: it is stored"
                );
            }
            ensure!(
                text(&reader.await??) == "newest and large",
                "{key}: who waited got what was overtaken"
            );
        }
    }
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_value_is_there_and_fresh_a_year_later() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let wires = cluster.wires()?;
    let plain = wires[0].set("plain", "kept", None).await?;
    cluster
        .client(0)
        .set("short", "gone")
        .ttl(Duration::from_secs(3600))
        .await?;
    cluster
        .advance(Duration::from_secs(366 * 24 * 3600))
        .await?;
    let is_swept = async || {
        wires[0]
            .inspect("short")
            .await
            .is_ok_and(|inspected| inspected.entry.is_none())
    };
    cluster
        .until("the broom has been by: the short one is swept", is_swept)
        .await?;
    for wire in &wires {
        let found = wire
            .get("plain", Consistency::Linearizable, &Bytes::new())
            .await?;
        assert_eq!((&*text(&found), state(&found)), ("kept", State::Fresh));
        let answer = found.answer.context("an answer")?;
        assert_eq!(
            (answer.version, answer.ttl_ms, answer.expires_in_ms),
            (plain.version, None, None)
        );
        assert!(
            answer.age_ms >= 365 * 24 * 3_600_000,
            "{} ms old",
            answer.age_ms
        );
        assert_eq!(
            state(
                &wire
                    .get("short", Consistency::Linearizable, &Bytes::new())
                    .await?
            ),
            State::Miss
        );
    }
    cluster.stop().await
}

fn id(seq: u64) -> Option<RequestId> {
    Some(RequestId {
        client: vec![7; 16].into(),
        seq,
        done_below: 1,
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retried_write_happens_once_on_any_node_and_over_leader_changes() -> anyhow::Result<()> {
    let mut cluster = in_process().start().await?;
    let wires = cluster.wires()?;
    let absent = SetRequest {
        key: "k".into(),
        value: "first".into(),
        if_absent: true,
        request_id: id(1),
        ..Default::default()
    };
    let first = wires[0].send_set(absent.clone()).await?;
    let second = wires[1].set("k", "second", id(2)).await?;
    let deleted = wires[2].delete("k", id(3)).await?;
    assert!(deleted.existed && second.version > first.version);
    let third = wires[0].set("k", "third", id(4)).await?;
    let invalidated = wires[1].invalidate("nothing", id(5)).await?;
    let conflict = SetRequest {
        request_id: id(6),
        ..absent.clone()
    };
    let refused = Told::of(
        &wires[2]
            .send_set(conflict.clone())
            .await
            .err()
            .context("a Set of a key that is there")?,
    );
    assert_ne!(refused.code, Code::Ok);
    let revision = async |wire: &Wire| {
        let found = wire
            .get("k", Consistency::Linearizable, &Bytes::new())
            .await?;
        anyhow::Ok((
            found.replica.as_ref().context("a replica")?.revision,
            text(&found),
            found.answer.context("an answer")?.version,
        ))
    };
    let settled = revision(&wires[0]).await?;
    assert_eq!((settled.1.as_str(), settled.2), ("third", third.version));

    for round in 0..4 {
        info!("--- each again, on every node");
        for wire in (0..3)
            .filter(|&node| cluster.is_running(node))
            .map(|node| &wires[node])
        {
            assert_eq!(wire.send_set(absent.clone()).await?.version, first.version);
            assert_eq!(
                wire.set("k", "second", id(2)).await?.version,
                second.version
            );
            assert!(wire.delete("k", id(3)).await?.existed);
            assert_eq!(wire.set("k", "third", id(4)).await?.version, third.version);
            assert_eq!(
                wire.invalidate("nothing", id(5)).await?.existed,
                invalidated.existed
            );
            let again = Told::of(
                &wire
                    .send_set(conflict.clone())
                    .await
                    .err()
                    .context("what lost goes on losing")?,
            );
            assert_eq!((again.code, &again.reason), (refused.code, &refused.reason));
            assert_eq!(
                revision(wire).await?,
                settled,
                "round {round}: something happened again"
            );
        }
        let running: Vec<usize> = (0..3).filter(|&node| cluster.is_running(node)).collect();
        let old = cluster.leader_of(&running).await?;
        if round < 2 {
            info!("--- leadership is handed on");
            let new = cluster.client(old).cluster().transfer_leader(None).await?;
            assert_ne!(new, cluster.name(old));
            cluster.leader_of(&running).await?;
        } else if round == 2 {
            info!("--- the leader goes");
            cluster.stop_node(old).await?;
            cluster.leader().await?;
        }
    }
    cluster.stop().await
}
