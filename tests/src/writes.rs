//! A stream of writes that remembers what was acknowledged and when, for tests that break a cluster
//! under it. Every write has its own key, so that none hides the loss of another.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use holdfast_client::{Applied, Client, Consistency, Token};
use holdfast_raft::Clock;
use parking_lot::Mutex;
use tokio::{sync::watch, task::JoinSet};

use crate::cluster::PATIENCE;

/// Keys of one read.
const BATCH: usize = 500;

/// Writers that go on until they are stopped.
pub struct Writes {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
}

/// What became of a stream of writes.
#[derive(Debug, Default, Clone)]
pub struct Written {
    pub acknowledged: Vec<String>,
    /// Failed, and said `applied: no`: must never be seen.
    pub refused: Vec<String>,
    /// Failed, and may have happened or may happen yet: once seen it must stay.
    pub unknown: Vec<String>,
    seen: Arc<Mutex<Seen>>,
    /// Has seen all that was acknowledged.
    pub token: Token,
}

/// The writes of unknown outcome that a check has seen, and how far that check was.
#[derive(Debug, Default)]
struct Seen {
    keys: HashSet<String>,
    token: Token,
}

struct Shared {
    prefix: String,
    value_bytes: usize,
    clock: Clock,
    next: AtomicU64,
    stop: AtomicBool,
    outcome: Mutex<Outcome>,
    acknowledged: watch::Sender<u64>,
}

#[derive(Default)]
struct Outcome {
    written: Written,
    /// Of each acknowledgement, in order.
    at: Vec<Duration>,
    last_error: Option<String>,
}

impl Writes {
    /// One writer per client. Keys are `<prefix><number>`.
    pub fn start(
        clients: Vec<Client>,
        prefix: impl Into<String>,
        value_bytes: usize,
        clock: &Clock,
    ) -> Self {
        let shared = Arc::new(Shared {
            prefix: prefix.into(),
            value_bytes,
            clock: clock.clone(),
            next: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            outcome: Mutex::default(),
            acknowledged: watch::Sender::new(0),
        });
        let mut tasks = JoinSet::new();
        for client in clients {
            tasks.spawn(write(shared.clone(), client));
        }
        Self { shared, tasks }
    }

    pub fn count(&self) -> u64 {
        *self.shared.acknowledged.borrow()
    }

    /// Waits until that many more writes are acknowledged.
    pub async fn more(&self, writes: u64) -> anyhow::Result<()> {
        let wanted = self.count() + writes;
        let mut acknowledged = self.shared.acknowledged.subscribe();
        let waited =
            tokio::time::timeout(PATIENCE, acknowledged.wait_for(|count| *count >= wanted)).await;
        if waited.is_err() {
            bail!(
                "{writes} more writes were not acknowledged; the last failure: {:?}",
                self.shared.outcome.lock().last_error
            );
        }
        Ok(())
    }

    /// A key that was acknowledged last, and a token that has seen it.
    pub fn newest(&self) -> Option<(String, Token)> {
        let outcome = self.shared.outcome.lock();
        Some((
            outcome.written.acknowledged.last()?.clone(),
            outcome.written.token.clone(),
        ))
    }

    pub fn now(&self) -> Duration {
        self.shared.clock.monotonic()
    }

    /// The longest time without an acknowledgement, from then until now.
    pub fn longest_gap_since(&self, from: Duration) -> Duration {
        let outcome = self.shared.outcome.lock();
        let after = outcome.at.partition_point(|at| *at <= from);
        let ends = outcome.at[after..].iter().copied().chain([self.now()]);
        ends.scan(from, |last, at| {
            Some(at.saturating_sub(std::mem::replace(last, at)))
        })
        .max()
        .unwrap_or_default()
    }

    /// Ends the writers after the write that each has under way.
    pub async fn stop(mut self) -> Written {
        self.shared.stop.store(true, Ordering::Relaxed);
        while self.tasks.join_next().await.is_some() {}
        std::mem::take(&mut self.shared.outcome.lock().written)
    }
}

impl Written {
    /// Everything of another stream as well.
    pub fn merge(&mut self, other: Self) {
        self.acknowledged.extend(other.acknowledged);
        self.refused.extend(other.refused);
        self.unknown.extend(other.unknown);
        self.token.merge(&other.token);
        let other = std::mem::take(&mut *other.seen.lock());
        let mut seen = self.seen.lock();
        seen.keys.extend(other.keys);
        seen.token.merge(&other.token);
    }

    /// Every acknowledged write is there for a client, none that was said not to be, and what an
    /// earlier check has seen of the others.
    pub async fn check(&self, client: &Client) -> anyhow::Result<()> {
        for keys in self.acknowledged.chunks(BATCH) {
            let batch = client.batch_get(keys).token(self.token.clone()).await?;
            for (key, result) in keys.iter().zip(batch.results) {
                let value = result?
                    .value
                    .with_context(|| format!("{key} was acknowledged and is lost"))?;
                ensure!(value.starts_with(key.as_bytes()), "{key} has another value");
            }
        }
        for keys in self.unknown.chunks(BATCH) {
            let token = self.seen.lock().token.clone();
            let batch = client.batch_get(keys).token(token).await?;
            let mut seen = self.seen.lock();
            for (key, result) in keys.iter().zip(batch.results) {
                if result?.value.is_some() {
                    seen.keys.insert(key.clone());
                } else {
                    ensure!(
                        !seen.keys.contains(key),
                        "{key} was seen, though nobody knew of it, and is lost"
                    );
                }
            }
            seen.token.merge(&batch.token);
        }
        for keys in self.refused.chunks(BATCH) {
            let batch = client
                .batch_get(keys)
                .token(self.token.clone())
                .consistency(Consistency::Session)
                .await?;
            for (key, result) in keys.iter().zip(batch.results) {
                ensure!(
                    result?.value.is_none(),
                    "{key} was said not to be applied and is there"
                );
            }
        }
        Ok(())
    }
}

impl Drop for Writes {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

async fn write(shared: Arc<Shared>, client: Client) {
    while !shared.stop.load(Ordering::Relaxed) {
        let key = format!(
            "{}{}",
            shared.prefix,
            shared.next.fetch_add(1, Ordering::Relaxed)
        );
        let mut value = key.clone().into_bytes();
        value.resize(value.len().max(shared.value_bytes), b'.');
        let outcome = client.set(&key, value).await;
        let at = shared.clock.monotonic();
        let mut kept = shared.outcome.lock();
        match outcome {
            Ok(stored) => {
                kept.written.acknowledged.push(key);
                kept.written.token.merge(&stored.token);
                kept.at.push(at);
                drop(kept);
                shared.acknowledged.send_modify(|count| *count += 1);
            }
            Err(error) => {
                kept.last_error = Some(format!("{error} ({})", error.reason()));
                match error.applied() {
                    Applied::No => kept.written.refused.push(key),
                    Applied::Unknown => kept.written.unknown.push(key),
                }
            }
        }
    }
}
