//! The log of all shards of a node: openraft's log storage on one [`LogStore`], one queue and one
//! sync thread.
//!
//! ```text
//! append ─► tail (readable at once) ─► queue ─► sync thread: take all ─► one write ─► ONE sync ─► callbacks ─► again
//! vote   ────────────────────────────► queue ─┘ (the same queue: a vote is durable only after all that came before it)
//! ```
//!
//! Promises: a callback comes only after its entries are synced; `append` never waits for the disk;
//! a failed sync is the end of this node's log, for ever. The committed index rides along with the
//! next sync, or reaches the file within 100 ms, so that a node that restarts alone shows what was
//! committed. The thread groups whatever came while it was syncing: no timers.

mod shard;
mod sync_times;
mod tail;
#[cfg(test)]
mod tests;
mod thread;

use std::{
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use holdfast_proto::{ShardId, limits::APPEND_BATCH_BYTES, peer};
use openraft::{
    RaftLogReader,
    entry::RaftEntry,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot, watch};

use self::{
    sync_times::SyncTimes,
    tail::{Tail, TailState, Weight},
    thread::{Syncer, Write},
};
use super::types::{Entry, LogId, Types, Vote, entry_from, log_id_from, vote_from};
use crate::{
    clock::Clock,
    events::Events,
    state::record,
    store::{LogMark, LogStore},
};

/// Operations that wait for the sync thread; beyond it openraft's core waits, and with it the
/// proposers.
const QUEUE: usize = 8192;
/// Read at a time of what is to be applied.
const READ_AHEAD_BYTES: usize = 2 << 20;
/// A purge costs a flush: it is worth it for an eighth of what is kept.
const PURGE_SHARE: u64 = 8;

/// How much log a replica keeps for followers that come back.
#[derive(Debug, Clone, Copy)]
pub struct LogKept {
    pub entries: u64,
    pub bytes: u64,
}

/// Whose log it is stands among the marks of the shard that every node has.
const OWNER_SHARD: ShardId = 0;

/// Whether a log was already what it is claimed to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    New,
    Known,
}

/// One per node. Cheap to clone.
#[derive(Clone)]
pub(crate) struct SharedLog {
    inner: Arc<Inner>,
}

struct Inner {
    /// Gone once the log is closed.
    store: RwLock<Option<Arc<dyn LogStore>>>,
    queue: mpsc::Sender<Write>,
    clock: Clock,
    /// When the write that is under way began; 0 if none is. A watchdog looks at it.
    writing_since_ms: AtomicU64,
    sync_times: SyncTimes,
    failed: watch::Sender<Option<String>>,
    thread: parking_lot::Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Inner {
    fn store(&self) -> io::Result<Arc<dyn LogStore>> {
        self.store
            .read()
            .clone()
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the log is closed"))
    }
}

impl SharedLog {
    pub(crate) fn open(store: Arc<dyn LogStore>, clock: Clock, events: Arc<dyn Events>) -> Self {
        let (queue, writes) = mpsc::channel(QUEUE);
        let inner = Arc::new(Inner {
            store: RwLock::new(Some(store)),
            queue,
            clock,
            writing_since_ms: AtomicU64::new(0),
            sync_times: SyncTimes::default(),
            failed: watch::Sender::new(None),
            thread: parking_lot::Mutex::new(None),
        });
        let syncer = Syncer::new(inner.clone(), events);
        let thread = std::thread::Builder::new()
            .name("log-sync".into())
            .spawn(move || syncer.run(writes));
        *inner.thread.lock() = Some(thread.expect("the system can start one thread"));
        Self { inner }
    }

    pub(crate) fn shard(&self, shard: ShardId) -> io::Result<ShardLog> {
        let store = self.inner.store()?;
        let purged = mark::<peer::LogId>(store.as_ref(), shard, LogMark::Purged)?.map(log_id_from);
        let last = store
            .last(shard)?
            .map(|(_, bytes)| stored_entry(&bytes))
            .transpose()?
            .map(|entry| entry.log_id());
        let vote = mark::<peer::Vote>(store.as_ref(), shard, LogMark::Vote)?
            .map(|vote| vote_from(Some(vote)).map_err(io::Error::other))
            .transpose()?;
        let state = TailState::new(last, purged, vote, stored_weight(store.as_ref(), shard)?);
        let tail = Arc::new(Tail {
            state: RwLock::new(state),
        });
        Ok(ShardLog {
            shard,
            log: self.clone(),
            tail,
            purging: Arc::default(),
        })
    }

    /// How long the write that is under way has taken so far.
    pub(crate) fn stalled_for(&self) -> Duration {
        match self.inner.writing_since_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_millis(self.inner.clock.monotonic_ms().saturating_sub(since)),
        }
    }

    /// How long a sync takes here, of the slower ones; the one that is under way counts as soon as
    /// it takes longer.
    pub(crate) fn sync_time(&self) -> Duration {
        self.inner.sync_times.slow().max(self.stalled_for())
    }

    /// Syncs twice for nothing, so that a cluster without a leader knows how long that takes:
    /// what an election may take depends on it.
    pub(crate) async fn measure(&self) -> io::Result<()> {
        for _ in 0..2 {
            let (done, synced) = oneshot::channel();
            self.enqueue(Write::Barrier { done }).await?;
            let _ = synced.await;
        }
        Ok(())
    }

    /// Why the log can be written no more; `None` while it can.
    pub(crate) fn failed(&self) -> watch::Receiver<Option<String>> {
        self.inner.failed.subscribe()
    }

    /// Makes this the log of that node of that cluster, durably, before anything is written for it.
    /// Refused if it is another's already. `Claim::Known` if it was this one's.
    pub(crate) async fn claim(&self, cluster_id: &str, node_id: u64) -> io::Result<Claim> {
        if let Some(owner) = self.owner()? {
            return if (owner.cluster_id.as_str(), owner.node_id) == (cluster_id, node_id) {
                Ok(Claim::Known)
            } else {
                Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "the log in the data directory belongs to node {} of cluster {}, this is node {node_id} of cluster {cluster_id}: is it the right directory?",
                        owner.node_id, owner.cluster_id
                    ),
                ))
            };
        }
        let owner = peer::ClusterRecord {
            cluster_id: cluster_id.to_owned(),
            node_id,
            ..Default::default()
        };
        let (done, durable) = oneshot::channel();
        self.enqueue(Write::Owner { owner, done }).await?;
        durable
            .await
            .map_err(|_| io::Error::other("the log is closed"))??;
        Ok(Claim::New)
    }

    /// The cluster and node that the log belongs to; `None` while it is nobody's.
    pub(crate) fn owner(&self) -> io::Result<Option<peer::ClusterRecord>> {
        mark(self.inner.store()?.as_ref(), OWNER_SHARD, LogMark::Cluster)
    }

    /// Makes durable what is noted of what was synced. Slow: off the async threads.
    pub(crate) fn keep_note(&self) -> io::Result<()> {
        self.inner.store()?.keep_note()
    }

    pub(crate) fn disk_bytes(&self) -> io::Result<u64> {
        self.inner.store()?.disk_bytes()
    }

    /// Gives the space of purged entries back. Slow: off the async threads.
    pub(crate) fn compact(&self) -> io::Result<()> {
        self.inner.store()?.compact()
    }

    /// Waits until everything enqueued so far is durable, then ends the thread.
    pub(crate) async fn close(&self) {
        let (done, synced) = oneshot::channel();
        if self.enqueue(Write::Barrier { done }).await.is_ok() {
            let _ = synced.await;
        }
        let _ = self.enqueue(Write::Close).await;
        let thread = self.inner.thread.lock().take();
        if let Some(thread) = thread {
            let _ = crate::task::blocking(move || thread.join()).await;
        }
        self.inner.store.write().take();
    }

    async fn enqueue(&self, write: Write) -> io::Result<()> {
        self.inner
            .queue
            .send(write)
            .await
            .map_err(|_| io::Error::other("the log is closed"))
    }
}

/// One shard's log, as openraft sees it.
#[derive(Clone)]
pub(crate) struct ShardLog {
    shard: ShardId,
    log: SharedLog,
    tail: Arc<Tail>,
    purging: Arc<tokio::sync::Mutex<()>>,
}

impl RaftLogReader<Types> for ShardLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        self.entries(start, end, usize::MAX).await
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.tail.state.read().vote)
    }

    /// A part at a time: what is read and not yet applied is bounded, however much there is.
    async fn entries_stream<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> impl Stream<Item = io::Result<Entry>> + Send {
        let (start, end) = bounds(&range);
        let parts = stream::try_unfold((self.clone(), start), move |(log, next)| async move {
            if next >= end {
                return Ok(None);
            }
            let part = log.entries(next, end, READ_AHEAD_BYTES).await?;
            let Some(last) = part.last() else {
                return Ok(None);
            };
            let next = last.log_id().index() + 1;
            io::Result::Ok(Some((stream::iter(part).map(Ok), (log, next))))
        });
        parts.try_flatten().boxed()
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.entries(start, end, APPEND_BATCH_BYTES).await
    }
}

impl RaftLogStorage<Types> for ShardLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let state = self.tail.state.read();
        Ok(LogState {
            last_purged_log_id: state.purged,
            last_log_id: state.last.or(state.purged),
        })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (done, durable) = oneshot::channel();
        self.log
            .enqueue(Write::Vote {
                shard: self.shard,
                vote: *vote,
                done,
            })
            .await?;
        durable
            .await
            .map_err(|_| io::Error::other("the log is closed"))??;
        self.tail.state.write().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.log
            .enqueue(Write::Committed {
                shard: self.shard,
                committed,
            })
            .await
    }

    /// Never past what the log holds: the mark may have reached the file before the entries it
    /// speaks of were synced.
    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let committed = mark::<peer::LogId>(
            self.log.inner.store()?.as_ref(),
            self.shard,
            LogMark::Committed,
        )?;
        let Some(committed) = committed
            .filter(|id| *id != peer::LogId::default())
            .map(log_id_from)
        else {
            return Ok(None);
        };
        let last = self.tail.state.read().last;
        Ok(if last.is_some_and(|last| last < committed) {
            last
        } else {
            Some(committed)
        })
    }

    async fn append<I>(&mut self, entries: I, flushed: IOFlushed<Types>) -> io::Result<()>
    where
        I: IntoIterator<Item = Entry> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        {
            let mut state = self.tail.state.write();
            for entry in &entries {
                state.push(entry.clone());
            }
        }
        self.log
            .enqueue(Write::Append {
                shard: self.shard,
                entries,
                tail: self.tail.clone(),
                flushed,
            })
            .await
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> io::Result<()> {
        let from = last.as_ref().map_or(0, |last| last.index() + 1);
        {
            let mut state = self.tail.state.write();
            if state.last.as_ref().is_none_or(|known| known.index() < from) {
                return Ok(());
            }
            state.truncate_from(from);
            state.last = last.or(state.purged);
        }
        self.log
            .enqueue(Write::Truncate {
                shard: self.shard,
                from,
            })
            .await
    }

    async fn purge(&mut self, to: LogId) -> io::Result<()> {
        self.tail.state.write().purge_to(to);
        self.log
            .enqueue(Write::Purge {
                shard: self.shard,
                to,
            })
            .await
    }
}

/// What a shard's log weighs that is there already: its share of the file's bytes.
fn stored_weight(store: &dyn LogStore, shard: ShardId) -> io::Result<Weight> {
    let Some((first, last)) = store.bounds(shard)? else {
        return Ok(Weight::default());
    };
    let mut all = 0u64;
    // Shards are numbered from 0, and a shard whose log is empty has no share.
    for other in 0.. {
        match store.bounds(other)? {
            Some((first, last)) => all += last - first + 1,
            None if other >= shard => break,
            None => {}
        }
    }
    let entries = last - first + 1;
    let share =
        u128::from(store.disk_bytes()?) * u128::from(entries) / u128::from(all.max(entries));
    Ok(Weight::of_store(
        first,
        last + 1,
        u64::try_from(share).unwrap_or(u64::MAX),
    ))
}

fn mark<M: prost::Message + Default>(
    store: &dyn LogStore,
    shard: ShardId,
    which: LogMark,
) -> io::Result<Option<M>> {
    Ok(store
        .mark(shard, which)?
        .map(|bytes| record::decode("log mark", &bytes))
        .transpose()?)
}

fn stored_entry(bytes: &bytes::Bytes) -> io::Result<Entry> {
    entry_from(record::decode("log entry", bytes)?).map_err(io::Error::other)
}

fn bounds(range: &impl RangeBounds<u64>) -> (u64, u64) {
    let start = match range.start_bound() {
        Bound::Included(&start) => start,
        Bound::Excluded(&start) => start + 1,
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(&end) => end.saturating_add(1),
        Bound::Excluded(&end) => end,
        Bound::Unbounded => u64::MAX,
    };
    (start, end)
}
