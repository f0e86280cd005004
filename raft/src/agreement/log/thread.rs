//! The sync thread: takes all that is queued, writes it as one batch, syncs once, tells who waited.
//!
//! A committed index that comes alone waits for the next batch, or [`COMMITTED_WITHIN`], or the
//! end: it costs no write of its own.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_proto::{ShardId, peer};
use openraft::{entry::RaftEntry, storage::IOFlushed};
use tokio::sync::{mpsc, oneshot};

use super::{Inner, OWNER_SHARD, QUEUE, tail::Tail};
use crate::{
    agreement::types::{Entry, LogId, Types, Vote, entry_to, log_id_to, vote_to},
    events::Events,
    state::record,
    store::{LogBatch, LogMark},
};

/// How long a committed index may stay in memory only.
const COMMITTED_WITHIN: Duration = Duration::from_millis(100);

pub(super) enum Write {
    Append {
        shard: ShardId,
        entries: Vec<Entry>,
        tail: Arc<Tail>,
        flushed: IOFlushed<Types>,
    },
    Vote {
        shard: ShardId,
        vote: Vote,
        done: oneshot::Sender<io::Result<()>>,
    },
    Owner {
        owner: peer::ClusterRecord,
        done: oneshot::Sender<io::Result<()>>,
    },
    Committed {
        shard: ShardId,
        committed: Option<LogId>,
    },
    Truncate {
        shard: ShardId,
        from: u64,
    },
    Purge {
        shard: ShardId,
        to: LogId,
    },
    /// Answered after everything before it is durable.
    Barrier {
        done: oneshot::Sender<()>,
    },
    Close,
}

/// The thread's side.
pub(super) struct Syncer {
    log: Arc<Inner>,
    events: Arc<dyn Events>,
    committed: Committed,
}

/// Committed indexes that are not written yet, newest per shard.
#[derive(Default)]
struct Committed {
    of: BTreeMap<ShardId, Option<LogId>>,
    /// Since when the oldest waits, as monotonic time.
    since: Duration,
}

impl Committed {
    fn insert(&mut self, shard: ShardId, committed: Option<LogId>, now: Duration) {
        if self.of.is_empty() {
            self.since = now;
        }
        self.of.insert(shard, committed);
    }

    /// How long they may still wait; `None` if there is nothing to write.
    fn may_wait(&self, now: Duration) -> Option<Duration> {
        (!self.of.is_empty())
            .then(|| COMMITTED_WITHIN.saturating_sub(now.saturating_sub(self.since)))
    }

    fn move_into(&mut self, batch: &mut LogBatch) {
        for (shard, committed) in std::mem::take(&mut self.of) {
            batch.set_mark(
                shard,
                LogMark::Committed,
                record::encode(&committed.as_ref().map(log_id_to).unwrap_or_default()),
            );
        }
    }
}

impl Syncer {
    pub(super) fn new(log: Arc<Inner>, events: Arc<dyn Events>) -> Self {
        Self {
            log,
            events,
            committed: Committed::default(),
        }
    }

    pub(super) fn run(mut self, mut writes: mpsc::Receiver<Write>) {
        // Its own: what it has to write may come when the node's are gone.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("it takes nothing from the system");
        loop {
            let first = match self.committed.may_wait(self.log.clock.monotonic()) {
                None => writes.blocking_recv().map(Some),
                Some(wait) => runtime
                    .block_on(async { tokio::time::timeout(wait, writes.recv()).await })
                    .map_or(Some(None), |got| got.map(Some)),
            };
            let Some(first) = first else { return };
            let group: Vec<Write> = first
                .into_iter()
                .chain(std::iter::from_fn(|| writes.try_recv().ok()).take(QUEUE))
                .collect();
            let close = group.iter().any(|write| matches!(write, Write::Close));
            self.write(group);
            if close {
                return;
            }
        }
    }

    /// One group: one batch, one sync if anybody waits for it, then the callbacks.
    fn write(&mut self, group: Vec<Write>) {
        let mut batch = LogBatch::default();
        let mut waiting = Waiting::default();
        for write in group {
            self.stage(write, &mut batch, &mut waiting);
        }
        let sync = waiting.needs_sync();
        let overdue = self.committed.may_wait(self.log.clock.monotonic()) == Some(Duration::ZERO);
        if sync || overdue || !batch.is_empty() {
            self.committed.move_into(&mut batch);
        }

        self.log
            .writing_since_ms
            .store(self.log.clock.monotonic_ms().max(1), Ordering::Relaxed);
        let began = self.log.clock.monotonic();
        let result = if batch.is_empty() && !sync {
            Ok(())
        } else {
            self.log.store().and_then(|store| store.write(batch, sync))
        };
        let took = self.log.clock.monotonic().saturating_sub(began);
        self.log.writing_since_ms.store(0, Ordering::Relaxed);

        match result {
            Ok(()) => {
                if sync {
                    self.log.sync_times.add(took);
                    self.events.log_synced(took);
                }
                waiting.succeed();
            }
            Err(error) => {
                tracing::error!(%error, "the log cannot be written: this node stops");
                self.log.failed.send_replace(Some(error.to_string()));
                waiting.fail(&error);
            }
        }
    }

    fn stage(&mut self, write: Write, batch: &mut LogBatch, waiting: &mut Waiting) {
        match write {
            Write::Append {
                shard,
                entries,
                tail,
                flushed,
            } => {
                for entry in &entries {
                    batch.put(
                        shard,
                        entry.log_id().index(),
                        record::encode(&entry_to(entry)),
                    );
                }
                waiting.appends.push(Appended {
                    shard,
                    last: entries.last().map(|entry| entry.log_id()),
                    tail,
                    flushed,
                });
            }
            Write::Vote { shard, vote, done } => {
                batch.set_mark(shard, LogMark::Vote, record::encode(&vote_to(&vote)));
                waiting.marks.push(done);
            }
            Write::Owner { owner, done } => {
                batch.set_mark(OWNER_SHARD, LogMark::Cluster, record::encode(&owner));
                waiting.marks.push(done);
            }
            Write::Committed { shard, committed } => {
                let now = self.log.clock.monotonic();
                self.committed.insert(shard, committed, now);
            }
            Write::Truncate { shard, from } => {
                batch.truncate_from(shard, from);
                waiting.durable = true;
            }
            // The mark says what is gone before it goes, in the same batch.
            Write::Purge { shard, to } => {
                batch.set_mark(shard, LogMark::Purged, record::encode(&log_id_to(&to)));
                batch.purge_to(shard, to.index());
            }
            Write::Barrier { done } => waiting.barriers.push(done),
            Write::Close => waiting.durable = true,
        }
    }
}

struct Appended {
    shard: ShardId,
    last: Option<LogId>,
    tail: Arc<Tail>,
    flushed: IOFlushed<Types>,
}

/// Who hears about a group.
#[derive(Default)]
struct Waiting {
    appends: Vec<Appended>,
    /// Of votes, and of whose log it is.
    marks: Vec<oneshot::Sender<io::Result<()>>>,
    barriers: Vec<oneshot::Sender<()>>,
    durable: bool,
}

impl Waiting {
    fn needs_sync(&self) -> bool {
        self.durable
            || !self.appends.is_empty()
            || !self.marks.is_empty()
            || !self.barriers.is_empty()
    }

    /// openraft takes a completion as a watermark: of many only each shard's newest is told, which
    /// saves it as many wake-ups.
    fn succeed(self) {
        let mut told: Vec<ShardId> = Vec::new();
        for appended in self.appends.into_iter().rev() {
            appended.tail.synced(appended.last);
            let newest = !told.contains(&appended.shard);
            if newest || !matches!(appended.flushed, IOFlushed::Notify(_)) {
                appended.flushed.io_completed(Ok(()));
                told.push(appended.shard);
            }
        }
        for done in self.marks {
            let _ = done.send(Ok(()));
        }
        for done in self.barriers {
            let _ = done.send(());
        }
    }

    fn fail(self, error: &io::Error) {
        let copy = || io::Error::new(error.kind(), error.to_string());
        for appended in self.appends {
            appended.flushed.io_completed(Err(copy()));
        }
        for done in self.marks {
            let _ = done.send(Err(copy()));
        }
    }
}
