//! What reads have seen: LINEARIZABLE and SESSION on nodes that were frozen, deposed or are behind,
//! and what still answers without a quorum.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::future::try_join_all;
use holdfast_client::{Consistency as Read, State};
use holdfast_proto::{
    Token, reason,
    v1::{self, Consistency},
};
use holdfast_tests::{
    cluster::Cluster,
    wire::{Told, Wire, text},
};
use rand::{RngExt as _, SeedableRng as _, rngs::SmallRng};
use tokio::task::JoinSet;
use tonic::Code;
use tracing::info;

use crate::{in_process, processes, seed};

const READS_AT_ONCE: usize = 3;
/// How often the leader is frozen, unless `HOLDFAST_CYCLES` says; `make torture` says more.
const FREEZES: usize = 15;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_leader_never_reads_the_old_value_once_it_wakes() -> anyhow::Result<()> {
    let cluster = processes().start().await?;
    let wires = cluster.wires()?;
    wires[0].set("k", "before", None).await?;
    let cycles = crate::from_environment("HOLDFAST_CYCLES").unwrap_or(FREEZES);
    for cycle in 0..cycles {
        let old = cluster.leader_of(&[0, 1, 2]).await?;
        for wire in &wires {
            // The connections are there before anything freezes.
            wire.get("k", Consistency::Linearizable, &Bytes::new())
                .await
                .context("before the leader is frozen")?;
        }

        info!("--- cycle {cycle}: freeze the leader, write through the next one");
        cluster.pause(old)?;
        let others: Vec<usize> = (0..3).filter(|&node| node != old).collect();
        let new = cluster.leader_of(&others).await?;
        let value = format!("value {cycle}");
        let written = wires[new]
            .set("k", &value, None)
            .await
            .context("a write through the new leader")?;

        // Sent before it wakes: the first thing that it sees.
        let mut reads = JoinSet::new();
        for _ in 0..READS_AT_ONCE {
            for (node, wire) in wires.iter().enumerate() {
                for consistency in [Consistency::Linearizable, Consistency::Session] {
                    let (wire, token) = (wire.clone(), written.token.clone());
                    let token = if consistency == Consistency::Session {
                        token
                    } else {
                        Bytes::new()
                    };
                    reads.spawn(async move {
                        (node, consistency, wire.get("k", consistency, &token).await)
                    });
                }
            }
        }
        cluster.resume(old)?;
        while let Some(read) = reads.join_next().await {
            let (node, consistency, read) = read?;
            let read = read.with_context(|| {
                format!("cycle {cycle}: {consistency:?} on {}", cluster.name(node))
            })?;
            ensure!(
                text(&read) == value,
                "cycle {cycle}: {consistency:?} on {} read `{}`",
                cluster.name(node),
                text(&read)
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_never_reads_older_than_it_wrote_on_any_node() -> anyhow::Result<()> {
    let seed = seed();
    let cluster = in_process().start().await?;
    let wires = cluster.wires()?;
    let mut sessions = JoinSet::new();
    for session in 0..8 {
        let wires = wires.clone();
        sessions.spawn(async move {
            let mut random = SmallRng::seed_from_u64(seed.wrapping_add(session));
            let key = format!("session {session}");
            for turn in 0..125 {
                let (writer, ahead) = (random.random_range(0..3), random.random_range(1..3));
                let value = format!("turn {turn}");
                let written = wires[writer].set(&key, &value, None).await?;
                let read = wires[(writer + ahead) % 3]
                    .get(&key, Consistency::Session, &written.token)
                    .await?;
                ensure!(
                    text(&read) == value,
                    "{key} wrote `{value}` and read `{}`",
                    text(&read)
                );
                let seen = Token::decode(&read.token)?.context("a read's token")?;
                let wrote = Token::decode(&written.token)?.context("a write's token")?;
                ensure!(
                    seen.revision(0) >= wrote.revision(0),
                    "{key} went back from {wrote:?} to {seen:?}"
                );
            }
            anyhow::Ok(())
        });
    }
    while let Some(session) = sessions.join_next().await {
        session??;
    }
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_never_reads_older_than_it_wrote_on_a_node_that_just_woke() -> anyhow::Result<()>
{
    let cluster = processes().start().await?;
    let wires = cluster.wires()?;
    for cycle in 0..20 {
        let sleeper = (cluster.leader_of(&[0, 1, 2]).await? + 1 + cycle % 2) % 3;
        let awake = (0..3).find(|&node| node != sleeper).context("a node")?;
        wires[sleeper]
            .get("k", Consistency::Local, &Bytes::new())
            .await
            .context("before it sleeps")?;

        info!("--- cycle {cycle}: freeze a follower and write what it misses");
        cluster.pause(sleeper)?;
        let mut reads = JoinSet::new();
        for key in 0..50 {
            let (key, value) = (format!("key {key}"), format!("value {cycle}"));
            let written = wires[awake].set(&key, &value, None).await?;
            let wire = wires[sleeper].clone();
            reads.spawn(async move {
                let read = wire.get(&key, Consistency::Session, &written.token).await;
                (key, value, read)
            });
        }
        cluster.resume(sleeper)?;
        while let Some(read) = reads.join_next().await {
            let (key, value, read) = read?;
            let read = text(&read.with_context(|| format!("cycle {cycle}"))?);
            ensure!(
                read == value,
                "cycle {cycle}: `{key}` was `{value}` and {} read `{read}`",
                cluster.name(sleeper)
            );
        }
    }
    Ok(())
}

/// A read or write that needs a quorum fails within its deadline and says UNAVAILABLE; LOCAL
/// answers from memory.
async fn answers_without_a_quorum(node: &Wire, value: &str) -> anyhow::Result<()> {
    let hasty = node.clone().within(Duration::from_secs(1)).once();
    let read = hasty
        .get("k", Consistency::Linearizable, &Bytes::new())
        .await;
    let told = Told::of(
        &read
            .err()
            .context("a LINEARIZABLE read was answered without a quorum")?,
    );
    ensure!(
        told.code == Code::Unavailable,
        "a LINEARIZABLE read said {told:?}"
    );
    ensure!(
        [reason::NO_LEADER, reason::NO_QUORUM].contains(&&*told.reason),
        "{told:?}"
    );

    let written = hasty.set("k", "without a quorum", None).await;
    let told = Told::of(
        &written
            .err()
            .context("a write was acknowledged without a quorum")?,
    );
    ensure!(told.code == Code::Unavailable, "a write said {told:?}");
    ensure!(
        !told.metadata(reason::APPLIED).is_empty(),
        "a write does not say what became of it: {told:?}"
    );

    let local = hasty
        .get("k", Consistency::Local, &Bytes::new())
        .await
        .context("LOCAL without a quorum")?;
    ensure!(text(&local) == value, "LOCAL read `{}`", text(&local));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_writes_and_linearizable_reads_are_unavailable_and_local_answers()
-> anyhow::Result<()> {
    let mut cluster = in_process().start().await?;
    let written = cluster.wire(0)?.set("k", "kept", None).await?;
    for survivor in cluster.wires()? {
        survivor
            .get("k", Consistency::Session, &written.token)
            .await?;
    }
    let leader = cluster.leader().await?;
    let survivor = cluster.wire(leader)?;
    for node in (0..3).filter(|&node| node != leader) {
        cluster.stop_node(node).await?;
    }
    answers_without_a_quorum(&survivor, "kept").await?;

    #[cfg(feature = "rocksdb")]
    {
        info!("--- the write is not in the way of anything afterwards");
        for node in (0..3).filter(|&node| node != leader) {
            cluster.start_node(node).await?;
        }
        cluster
            .until("a quorum is back", async || {
                survivor.set("k", "back", None).await.is_ok()
            })
            .await?;
        assert_eq!(
            text(
                &survivor
                    .get("k", Consistency::Linearizable, &Bytes::new())
                    .await?
            ),
            "back"
        );
    }
    cluster.stop().await
}

/// Peers that take connections and answer nothing are worse than peers that are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_followers_are_frozen_says_unavailable_and_local_answers()
-> anyhow::Result<()> {
    let cluster = processes().start().await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let wire = cluster.wire(leader)?;
    wire.set("k", "kept", None).await?;
    for node in (0..3).filter(|&node| node != leader) {
        cluster.pause(node)?;
    }
    answers_without_a_quorum(&wire, "kept").await?;
    answers_without_a_quorum(&wire, "kept")
        .await
        .context("again, when it knows")?;
    for node in (0..3).filter(|&node| node != leader) {
        cluster.resume(node)?;
    }
    cluster
        .until("a quorum is back", async || {
            wire.set("k", "back", None).await.is_ok()
        })
        .await?;
    assert_eq!(
        text(
            &wire
                .get("k", Consistency::Linearizable, &Bytes::new())
                .await?
        ),
        "back"
    );
    Ok(())
}

/// Peers are not heard of for seconds; who asked the frozen leader must not wait for it as long as
/// the call may take.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_on_its_way_to_a_frozen_leader_is_told_when_another_leads_and_happens_once()
-> anyhow::Result<()> {
    let cluster = processes().start().await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let asked = (leader + 1) % 3;
    let wire = cluster.wire(asked)?.within(Duration::from_secs(30)).once();
    let before = wire.set("k", "before", None).await?;

    info!("--- the leader is frozen, and a follower forwards to it");
    cluster.pause(leader)?;
    let id = v1::RequestId {
        client: Bytes::from_static(&[9; 16]),
        seq: 1,
        done_below: 0,
    };
    let answered = tokio::time::timeout(
        Duration::from_secs(10),
        wire.set("k", "after", Some(id.clone())),
    )
    .await;
    let told = Told::of(
        &answered
            .context("it waited for the frozen leader")?
            .err()
            .context("nobody can have answered it")?,
    );
    ensure!(
        (told.code, told.metadata(reason::APPLIED)) == (Code::Unavailable, "unknown"),
        "{told:?}"
    );
    // Not because the connection broke: that takes seconds more.
    ensure!(
        told.message.contains("another leader was elected"),
        "{told:?}"
    );

    info!("--- sent again it happens, and once, though the old leader has it too");
    let patient = cluster.wire(asked)?;
    let written = patient.set("k", "after", Some(id.clone())).await?;
    cluster.resume(leader)?;
    let again = cluster.wire(leader)?.set("k", "other", Some(id)).await?;
    ensure!(
        again.version == written.version && written.version > before.version,
        "{before:?}, {written:?}, {again:?}"
    );
    ensure!(
        text(
            &patient
                .get("k", Consistency::Linearizable, &Bytes::new())
                .await?
        ) == "after",
        "it happened twice"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_shows_every_key_that_stays_while_others_go() -> anyhow::Result<()> {
    const KEYS: usize = 400;
    let cluster = in_process().shards(3).start().await?;
    for number in 0..KEYS {
        cluster
            .client(0)
            .set(format!("stays/{number:04}"), "v")
            .await?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut going = JoinSet::new();
    for part in 0..8 {
        let (client, stop) = (cluster.client(part % 3), stop.clone());
        going.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                // Between the others in key order.
                let keys: Vec<String> = (0..KEYS)
                    .skip(part)
                    .step_by(8)
                    .map(|number| format!("stays/{number:04}-goes"))
                    .collect();
                try_join_all(
                    keys.iter()
                        .map(|key| client.set(key.clone(), "v").into_future()),
                )
                .await?;
                try_join_all(
                    keys.iter()
                        .map(|key| client.delete(key.clone()).into_future()),
                )
                .await?;
            }
            anyhow::Ok(())
        });
    }
    for round in 0..50 {
        let page = cluster
            .client(round % 3)
            .scan()
            .prefix("stays/")
            .limit(1000)
            .await?;
        let stayed = page
            .entries
            .iter()
            .filter(|entry| !entry.key.ends_with(b"-goes"))
            .count();
        ensure!(
            (stayed, page.next_cursor) == (KEYS, None),
            "round {round}: {stayed} of {KEYS} keys"
        );
    }
    stop.store(true, Ordering::Relaxed);
    while let Some(ended) = going.join_next().await {
        ended??;
    }
    cluster.stop().await
}

/// A leader of each shard.
async fn leaders(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let mut leaders = Vec::new();
    cluster
        .until("every shard has a leader", async || {
            let Ok(status) = cluster.client_of_all().cluster().status().await else {
                return false;
            };
            leaders = status
                .per_shard
                .iter()
                .filter_map(|shard| shard.leader.clone())
                .collect();
            status.per_shard.len() == 3 && leaders.len() == 3
        })
        .await?;
    Ok(leaders)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_shards_are_one_key_space() -> anyhow::Result<()> {
    let mut cluster = in_process().shards(3).start().await?;
    leaders(&cluster).await?;
    let client = cluster.client_of_all();
    let keys: Vec<String> = (0..300).map(|n| format!("key/{n:03}")).collect();

    info!("--- set and get through every node");
    let mut shards = std::collections::BTreeSet::new();
    for (n, key) in keys.iter().enumerate() {
        let here = cluster.client(n % 3);
        here.see(&client.token());
        let stored = here.set(key, key.clone()).await?;
        client.see(&stored.token);
    }
    for key in &keys {
        let inspected = client.inspect(key).await?;
        shards.insert(inspected.shard);
        ensure!(inspected.entry.is_some(), "`{key}` is not stored");
    }
    assert_eq!(shards.len(), 3, "the keys lie in shards {shards:?}");

    info!("--- a batch over all shards, in the order asked");
    for node in 0..3 {
        let here = cluster.client(node);
        here.see(&client.token());
        let batch = here
            .batch_get(keys.iter().rev().map(String::as_str).chain(["nowhere"]))
            .await?;
        let found: Vec<_> = batch
            .results
            .iter()
            .map(|answer| answer.as_ref().ok().and_then(|answer| answer.value.clone()))
            .collect();
        let wanted: Vec<_> = keys
            .iter()
            .rev()
            .map(|key| Some(Bytes::from(key.clone())))
            .chain([None])
            .collect();
        assert_eq!(found, wanted);

        info!("--- a scan over all shards, in the order of keys, in pages");
        let mut scanned = Vec::new();
        let mut page = here.scan().prefix("key/").limit(70).await?;
        loop {
            scanned.extend(
                page.entries
                    .iter()
                    .map(|entry| String::from_utf8_lossy(&entry.key).into_owned()),
            );
            let Some(cursor) = page.next_cursor.take() else {
                break;
            };
            page = here.scan().prefix("key/").limit(70).cursor(cursor).await?;
        }
        assert_eq!(scanned, keys);
    }

    info!("--- a node goes, whatever it led");
    let stopped = cluster.leader().await?;
    cluster.stop_node(stopped).await?;
    leaders(&cluster).await?;
    for (n, key) in keys.iter().enumerate().step_by(10) {
        client.set(key, format!("new {n}")).await?;
        let found = client.get(key).consistency(Read::Linearizable).await?;
        assert_eq!(
            (found.answer.value, found.answer.state),
            (Some(format!("new {n}").into()), State::Fresh)
        );
    }
    assert!(client.delete(&keys[0]).await?.existed);

    #[cfg(feature = "rocksdb")]
    {
        info!("--- it comes back and has missed nothing");
        cluster.start_node(stopped).await?;
        cluster.ready(stopped).await?;
        let here = cluster.wire(stopped)?;
        let token = client.token().encode();
        for (n, key) in keys.iter().enumerate().step_by(10) {
            let found = here.get(key, Consistency::Session, &token).await?;
            let wanted = if n == 0 {
                String::new()
            } else {
                format!("new {n}")
            };
            assert_eq!(text(&found), wanted);
        }
    }
    cluster.stop().await
}
