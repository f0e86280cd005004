//! What an answer says of its replica's lag is never less than it is: a recorder that knows when each
//! write was acknowledged compares it with what the answer shows.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, ensure};
use holdfast_client::{Client, Consistency};
use holdfast_raft::Clock;
use holdfast_tests::distance::Distance;
use parking_lot::Mutex;
use tracing::info;

use crate::processes;

const ROUND_TRIP: Duration = Duration::from_millis(80);
const FROZEN: Duration = Duration::from_secs(4);
const READS: usize = 150;

/// When each number was acknowledged.
#[derive(Default)]
struct Recorder {
    acknowledged: Mutex<Vec<(Duration, u64)>>,
    stop: AtomicBool,
}

impl Recorder {
    async fn write(self: Arc<Self>, client: Client, clock: Clock) {
        for number in 1.. {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            if client.set("number", number.to_string()).await.is_ok() {
                let at = clock.monotonic();
                self.acknowledged.lock().push((at, number));
            }
        }
    }

    /// The newest number that was acknowledged by then.
    fn newest_at(&self, at: Duration) -> u64 {
        let acknowledged = self.acknowledged.lock();
        let until = acknowledged.partition_point(|(when, _)| *when <= at);
        until
            .checked_sub(1)
            .map_or(0, |newest| acknowledged[newest].1)
    }

    /// One LOCAL read: its lag, which is not less than it is.
    async fn read(&self, client: &Client, clock: &Clock) -> anyhow::Result<Option<Duration>> {
        let asked_at = clock.monotonic();
        let read = client.get("number").consistency(Consistency::Local).await?;
        let shown = match read.answer.value {
            Some(value) => std::str::from_utf8(&value)?.parse::<u64>()?,
            None => 0,
        };
        let Some(lag) = read.replica.lag else {
            return Ok(None);
        };
        // The client sees milliseconds.
        let current_at = asked_at.saturating_sub(lag + Duration::from_millis(1));
        let newest = self.newest_at(current_at);
        ensure!(
            shown >= newest,
            "it shows {shown} and says it is {lag:?} behind: {newest} was acknowledged by then"
        );
        Ok(Some(lag))
    }
}

/// 40 ms away, and frozen for a while under writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_lag_is_never_understated() -> anyhow::Result<()> {
    let clock = Clock::system();
    let distance = Distance::between(3, ROUND_TRIP, &clock).await?;
    let mut cluster = processes().behind(distance.addresses()).configure()?;
    for node in 0..cluster.len() {
        distance.lead_to(node, cluster.addresses(node).peer);
        cluster.start_node(node).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }
    let leader = cluster.leader().await?;
    let followers: Vec<usize> = (0..3).filter(|&node| node != leader).collect();
    let recorder = Arc::new(Recorder::default());
    let writer = tokio::spawn(
        recorder
            .clone()
            .write(cluster.client(leader), clock.clone()),
    );

    for &follower in &followers {
        let client = cluster.client(follower);
        cluster
            .until("it knows its lag", async || {
                recorder
                    .read(&client, &clock)
                    .await
                    .is_ok_and(|lag| lag.is_some())
            })
            .await?;
    }

    info!("--- read on followers under writes");
    let mut lags = Vec::new();
    for read in 0..READS {
        let client = cluster.client(followers[read % 2]);
        lags.extend(recorder.read(&client, &clock).await?);
    }
    lags.sort_unstable();
    let (least, most) = (lags.first().context("no lag is known")?, lags.last());
    println!("lags of {} reads: {least:?} to {most:?}", lags.len());
    ensure!(lags.len() > READS / 2, "most answers know their lag");
    ensure!(
        *least >= ROUND_TRIP / 2,
        "nothing can be younger than the way it took"
    );

    info!("--- freeze one, go on writing, thaw it");
    let frozen = followers[0];
    let client = cluster.client(frozen);
    recorder.read(&client, &clock).await?;
    cluster.pause(frozen)?;
    tokio::time::sleep(FROZEN).await;
    cluster.resume(frozen)?;
    let mut longest = Duration::ZERO;
    for _ in 0..READS {
        if let Some(lag) = recorder.read(&client, &clock).await? {
            longest = longest.max(lag);
        }
    }
    println!("after {FROZEN:?} in the ice: {longest:?} at most");

    info!("--- it is level again");
    cluster
        .until("a short lag", async || {
            matches!(recorder.read(&client, &clock).await, Ok(Some(lag)) if lag < FROZEN / 2)
        })
        .await?;
    recorder.stop.store(true, Ordering::Relaxed);
    writer.await?;
    Ok(())
}
