//! P9: LINEARIZABLE is linearizable, on any node, under any fault. Clients of all nodes read, write
//! and swap the same few keys while nodes are killed and frozen; what they were answered must have
//! one order that explains all of it (`holdfast_tests::history`).

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{bail, ensure};
use holdfast_client::{Applied, Client, Consistency, Error};
use holdfast_raft::Clock;
use holdfast_tests::{
    cluster::Cluster,
    history::{self, Action, Held, Operation},
};
use parking_lot::Mutex;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::task::JoinSet;
use tracing::info;

use crate::{from_environment, processes, seed};

/// How often something is broken, unless `HOLDFAST_CYCLES` says.
const CYCLES: usize = 6;
const CLIENTS_A_NODE: usize = 2;
/// Keys that are in use at the same time.
const KEYS: u64 = 3;
/// A key is left for a new one after so many operations: long histories take long to search.
const OPERATIONS_A_KEY: u64 = 300;
/// Between two operations of a client: enough for several at the same time on each key, and for
/// nodes on few cores to keep up.
const PAUSE: Duration = Duration::from_millis(3);

struct Workload {
    clock: Clock,
    begun: AtomicU64,
    values: AtomicU64,
    stop: AtomicBool,
    histories: Mutex<HashMap<String, Vec<Operation>>>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p9_linearizable_is_linearizable_while_nodes_are_killed_and_frozen() -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(seed());
    let mut cluster = processes().start().await?;
    let workload = Arc::new(Workload {
        clock: cluster.clock.clone(),
        begun: AtomicU64::new(0),
        values: AtomicU64::new(1),
        stop: AtomicBool::new(false),
        histories: Mutex::default(),
    });
    let mut clients = JoinSet::new();
    for node in 0..cluster.len() {
        for _ in 0..CLIENTS_A_NODE {
            // Each asks one node only: a fault is seen, not routed around.
            let random = StdRng::seed_from_u64(random.random());
            clients.spawn(work(workload.clone(), cluster.client(node), random));
        }
    }
    for cycle in 0..from_environment("HOLDFAST_CYCLES").unwrap_or(CYCLES) {
        break_something(&mut cluster, cycle, &mut random).await?;
    }
    workload.stop.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended?;
    }

    let histories = std::mem::take(&mut *workload.histories.lock());
    let operations: usize = histories.values().map(Vec::len).sum();
    let unknown = histories
        .values()
        .flatten()
        .filter(|operation| operation.answered.is_none())
        .count();
    println!(
        "{operations} operations on {} keys, {unknown} of unknown outcome",
        histories.len()
    );
    ensure!(operations > 200, "too little was answered to show anything");
    for (key, operations) in histories {
        if let Err(violation) = history::check(&operations) {
            bail!("no order explains what was answered of {key}: {violation:#?}");
        }
    }
    Ok(())
}

async fn break_something(
    cluster: &mut Cluster,
    cycle: usize,
    random: &mut StdRng,
) -> anyhow::Result<()> {
    let lasting = Duration::from_millis(random.random_range(300..1_500));
    let leader = cluster.leader().await?;
    let node = if random.random_bool(0.7) {
        leader
    } else {
        random.random_range(0..cluster.len())
    };
    if random.random_bool(0.5) {
        info!(cycle, node, leader, "--- kill");
        cluster.kill(node)?;
        tokio::time::sleep(lasting).await;
        cluster.start_node(node).await?;
        cluster.ready(node).await?;
    } else {
        info!(cycle, node, leader, "--- freeze");
        cluster.pause(node)?;
        tokio::time::sleep(lasting).await;
        cluster.resume(node)?;
    }
    tokio::time::sleep(Duration::from_millis(random.random_range(100..600))).await;
    Ok(())
}

async fn work(workload: Arc<Workload>, client: Client, mut random: StdRng) {
    while !workload.stop.load(Ordering::Relaxed) {
        let number = workload.begun.fetch_add(1, Ordering::Relaxed);
        let key = format!("{}/{}", number % KEYS, number / KEYS / OPERATIONS_A_KEY);
        match random.random_range(0..10) {
            0..5 => _ = read(&workload, &client, &key).await,
            5..8 => write(&workload, &client, &key).await,
            _ => swap(&workload, &client, &key).await,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// What the key holds and its version, if that could be read.
async fn read(workload: &Workload, client: &Client, key: &str) -> Option<(Held, u64)> {
    let called = workload.clock.monotonic();
    let read = client
        .get(key)
        .consistency(Consistency::Linearizable)
        .await
        .ok()?;
    let found = read
        .value_str()
        .map(|text| text.parse().expect("only numbers are written"));
    workload.record(key, Action::Read { found }, called, true);
    Some((found, read.answer.version))
}

async fn write(workload: &Workload, client: &Client, key: &str) {
    let value = workload.values.fetch_add(1, Ordering::Relaxed);
    let called = workload.clock.monotonic();
    match client.set(key, value.to_string()).await {
        Ok(_) => workload.record(key, Action::Write { value }, called, true),
        Err(error) if error.applied() == Applied::No => {}
        Err(_) => workload.record(key, Action::Write { value }, called, false),
    }
}

async fn swap(workload: &Workload, client: &Client, key: &str) {
    let Some((if_held, version)) = read(workload, client, key).await else {
        return;
    };
    let value = workload.values.fetch_add(1, Ordering::Relaxed);
    let set = client.set(key, value.to_string());
    let set = match if_held {
        Some(_) => set.if_version(version),
        None => set.if_absent(),
    };
    let called = workload.clock.monotonic();
    match set.await {
        Ok(_) => workload.record(key, Action::Swap { if_held, value }, called, true),
        Err(Error::Conflict { .. }) => {
            workload.record(key, Action::Refused { if_held }, called, true);
        }
        Err(error) if error.applied() == Applied::No => {}
        Err(_) => workload.record(key, Action::Swap { if_held, value }, called, false),
    }
}

impl Workload {
    fn record(&self, key: &str, action: Action, called: Duration, answered: bool) {
        let operation = Operation {
            action,
            called,
            answered: answered.then(|| self.clock.monotonic()),
        };
        let mut histories = self.histories.lock();
        histories.entry(key.to_owned()).or_default().push(operation);
    }
}
