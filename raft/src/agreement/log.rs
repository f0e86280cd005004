//! The log of all shards of a node: openraft's log storage on one [`LogStore`], one queue and one sync thread.
//!
//! ```text
//! append ─► tail (readable at once) ─► queue ─► sync thread: take all ─► one write ─► ONE sync ─► callbacks ─► again
//! vote   ────────────────────────────► queue ─┘ (the same queue: a vote is durable only after all that came before it)
//! ```
//!
//! Promises: a callback comes only after its entries are synced; `append` never waits for the disk; a failed sync is the end
//! of this node's log, for ever. The committed index rides along with the next sync, or reaches the file within 100 ms, so
//! that a node that restarts alone shows what was committed. The thread groups whatever came while it was syncing: no timers.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Debug,
    io,
    ops::{Bound, RangeBounds},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{ShardId, limits::APPEND_BATCH_BYTES, peer};
use openraft::{
    RaftLogReader,
    entry::RaftEntry,
    storage::{IOFlushed, LogState, RaftLogStorage},
};
use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot, watch};

use super::types::{Entry, LogId, Types, Vote, entry_bytes, entry_from, entry_to, log_id_from, log_id_to, vote_from, vote_to};
use crate::{
    clock::Clock,
    events::Events,
    replica::LogKept,
    state::record,
    store::{LogBatch, LogMark, LogStore},
};

/// Operations that wait for the sync thread; beyond it openraft's core waits, and with it the proposers.
const QUEUE: usize = 8192;
/// How long a committed index may stay in memory only.
const COMMITTED_WITHIN: Duration = Duration::from_millis(100);
/// Synced entries kept in memory for replication and apply.
const TAIL_BYTES: usize = 64 << 20;

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
    failed: watch::Sender<Option<String>>,
    thread: parking_lot::Mutex<Option<std::thread::JoinHandle<()>>>,
}

enum Write {
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

impl Inner {
    fn store(&self) -> io::Result<Arc<dyn LogStore>> {
        self.store.read().clone().ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "the log is closed"))
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
            failed: watch::Sender::new(None),
            thread: parking_lot::Mutex::new(None),
        });
        let syncer = Syncer { log: inner.clone(), events, committed: BTreeMap::new() };
        let runtime = tokio::runtime::Handle::current();
        let thread = std::thread::Builder::new().name("log-sync".into()).spawn(move || syncer.run(writes, &runtime));
        *inner.thread.lock() = Some(thread.expect("the system can start one thread"));
        Self { inner }
    }

    pub(crate) fn shard(&self, shard: ShardId) -> io::Result<ShardLog> {
        let store = self.inner.store()?;
        let purged = mark::<peer::LogId>(store.as_ref(), shard, LogMark::Purged)?.map(log_id_from);
        let last = store.last(shard)?.map(|(_, bytes)| stored_entry(&bytes)).transpose()?.map(|entry| entry.log_id());
        let first_in_tail = last.as_ref().or(purged.as_ref()).map_or(0, |id| id.index() + 1);
        let vote = mark::<peer::Vote>(store.as_ref(), shard, LogMark::Vote)?
            .map(|vote| vote_from(Some(vote)).map_err(io::Error::other))
            .transpose()?;
        let tail = Tail {
            state: RwLock::new(TailState {
                first: first_in_tail,
                entries: VecDeque::new(),
                bytes: 0,
                synced_to: first_in_tail,
                last,
                purged,
                vote,
                appended_bytes: 0,
                marks: VecDeque::new(),
            }),
        };
        Ok(ShardLog { shard, log: self.clone(), tail: Arc::new(tail) })
    }

    /// How long the write that is under way has taken so far.
    pub(crate) fn stalled_for(&self) -> Duration {
        match self.inner.writing_since_ms.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => Duration::from_millis(self.inner.clock.monotonic_ms().saturating_sub(since)),
        }
    }

    /// Why the log can be written no more; `None` while it can.
    pub(crate) fn failed(&self) -> watch::Receiver<Option<String>> {
        self.inner.failed.subscribe()
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
        self.inner.queue.send(write).await.map_err(|_| io::Error::other("the log is closed"))
    }
}

/// The thread's side.
struct Syncer {
    log: Arc<Inner>,
    events: Arc<dyn Events>,
    /// Not yet written, newest per shard.
    committed: BTreeMap<ShardId, Option<LogId>>,
}

impl Syncer {
    fn run(mut self, mut writes: mpsc::Receiver<Write>, runtime: &tokio::runtime::Handle) {
        loop {
            let first = if self.committed.is_empty() {
                writes.blocking_recv().map(Some)
            } else {
                runtime
                    .block_on(async { tokio::time::timeout(COMMITTED_WITHIN, writes.recv()).await })
                    .map_or(Some(None), |got| got.map(Some))
            };
            let Some(first) = first else { return };
            let group: Vec<Write> = first.into_iter().chain(std::iter::from_fn(|| writes.try_recv().ok()).take(QUEUE)).collect();
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
        for (shard, committed) in std::mem::take(&mut self.committed) {
            batch.set_mark(shard, LogMark::Committed, record::encode(&committed.as_ref().map(log_id_to).unwrap_or_default()));
        }

        self.log.writing_since_ms.store(self.log.clock.monotonic_ms().max(1), Ordering::Relaxed);
        let began = self.log.clock.monotonic();
        let sync = waiting.needs_sync();
        let result = if batch.is_empty() && !sync { Ok(()) } else { self.log.store().and_then(|store| store.write(batch, sync)) };
        let took = self.log.clock.monotonic().saturating_sub(began);
        self.log.writing_since_ms.store(0, Ordering::Relaxed);

        match result {
            Ok(()) => {
                if sync {
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
            Write::Append { shard, entries, tail, flushed } => {
                for entry in &entries {
                    batch.put(shard, entry.log_id().index(), record::encode(&entry_to(entry)));
                }
                waiting.appends.push(Appended { shard, end: entries.last().map(|entry| entry.log_id().index() + 1), tail, flushed });
            }
            Write::Vote { shard, vote, done } => {
                batch.set_mark(shard, LogMark::Vote, record::encode(&vote_to(&vote)));
                waiting.votes.push(done);
            }
            Write::Committed { shard, committed } => {
                self.committed.insert(shard, committed);
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
    end: Option<u64>,
    tail: Arc<Tail>,
    flushed: IOFlushed<Types>,
}

/// Who hears about a group.
#[derive(Default)]
struct Waiting {
    appends: Vec<Appended>,
    votes: Vec<oneshot::Sender<io::Result<()>>>,
    barriers: Vec<oneshot::Sender<()>>,
    durable: bool,
}

impl Waiting {
    fn needs_sync(&self) -> bool {
        self.durable || !self.appends.is_empty() || !self.votes.is_empty() || !self.barriers.is_empty()
    }

    /// openraft takes a completion as a watermark: of many only each shard's newest is told, which saves it as many wake-ups.
    fn succeed(self) {
        let mut told: Vec<ShardId> = Vec::new();
        for appended in self.appends.into_iter().rev() {
            appended.tail.synced(appended.end);
            let newest = !told.contains(&appended.shard);
            if newest || !matches!(appended.flushed, IOFlushed::Notify(_)) {
                appended.flushed.io_completed(Ok(()));
                told.push(appended.shard);
            }
        }
        for done in self.votes {
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
        for done in self.votes {
            let _ = done.send(Err(copy()));
        }
    }
}

/// The newest entries of a shard, in memory: everything not yet synced, and as much of the rest as fits.
struct Tail {
    state: RwLock<TailState>,
}

struct TailState {
    /// Index of `entries[0]`; what is below it is in the store.
    first: u64,
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Entries below this index are in the store.
    synced_to: u64,
    last: Option<LogId>,
    purged: Option<LogId>,
    vote: Option<Vote>,
    /// Bytes of entries since this node started, and what they were at some indexes: where to purge to keep so many.
    appended_bytes: u64,
    marks: VecDeque<(u64, u64)>,
}

/// Entries between two marks.
const MARK_EVERY: u64 = 256;

impl Tail {
    fn synced(&self, end: Option<u64>) {
        let Some(end) = end else { return };
        let mut state = self.state.write();
        state.synced_to = state.synced_to.max(end);
        state.trim();
    }
}

impl TailState {
    fn push(&mut self, entry: Entry) {
        if self.entries.is_empty() {
            self.first = entry.log_id().index();
        }
        let index = entry.log_id().index();
        if index.is_multiple_of(MARK_EVERY) {
            self.marks.push_back((index, self.appended_bytes));
        }
        self.appended_bytes += entry_bytes(&entry) as u64;
        self.bytes += entry_bytes(&entry);
        self.last = Some(entry.log_id());
        self.entries.push_back(entry);
    }

    /// Gives up what is in the store, oldest first, while there is too much.
    fn trim(&mut self) {
        while self.bytes > TAIL_BYTES && self.first < self.synced_to {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        if let Some(entry) = self.entries.pop_front() {
            self.bytes -= entry_bytes(&entry);
            self.first += 1;
        }
    }

    fn truncate_from(&mut self, from: u64) {
        while self.entries.back().is_some_and(|entry| entry.log_id().index() >= from) {
            if let Some(entry) = self.entries.pop_back() {
                self.bytes -= entry_bytes(&entry);
            }
        }
        while self.marks.back().is_some_and(|&(index, _)| index >= from) {
            self.marks.pop_back();
        }
        self.first = self.first.min(from);
        self.synced_to = self.synced_to.min(from);
    }

    fn purge_to(&mut self, to: LogId) {
        while self.entries.front().is_some_and(|entry| entry.log_id().index() <= to.index()) {
            self.pop_front();
        }
        if self.entries.is_empty() {
            self.first = self.first.max(to.index() + 1);
        }
        if self.last.as_ref().is_none_or(|last| last.index() <= to.index()) {
            self.last = Some(to);
        }
        while self.marks.front().is_some_and(|&(index, _)| index <= to.index()) {
            self.marks.pop_front();
        }
        self.purged = Some(to);
    }
}

/// One shard's log, as openraft sees it.
#[derive(Clone)]
pub(crate) struct ShardLog {
    shard: ShardId,
    log: SharedLog,
    tail: Arc<Tail>,
}

impl ShardLog {
    pub(crate) fn last_index(&self) -> u64 {
        self.tail.state.read().last.as_ref().map_or(0, LogId::index)
    }

    /// First index to keep: no more than so many entries and bytes after it.
    pub(crate) fn keep_from(&self, kept: LogKept) -> u64 {
        let state = self.tail.state.read();
        let next = state.last.as_ref().map_or(0, |last| last.index() + 1);
        let by_entries = next.saturating_sub(kept.entries);
        let surplus = state.appended_bytes.saturating_sub(kept.bytes);
        let by_bytes = state.marks.iter().take_while(|(_, bytes)| *bytes <= surplus).last().map_or(0, |&(index, _)| index);
        by_entries.max(by_bytes)
    }

    /// First index that is not purged.
    pub(crate) fn first_index(&self) -> u64 {
        self.tail.state.read().purged.as_ref().map_or(0, |purged| purged.index() + 1)
    }

    pub(crate) fn has_vote(&self) -> bool {
        self.tail.state.read().vote.is_some()
    }

    /// Entries of the range, until `max_bytes` are passed; at least one if there is any.
    fn entries(&self, start: u64, end: u64, max_bytes: usize) -> io::Result<Vec<Entry>> {
        let (from_store_to, mut newer) = {
            let state = self.tail.state.read();
            let from_store_to = end.min(state.first);
            let skip = usize::try_from(start.saturating_sub(state.first)).unwrap_or(usize::MAX);
            let take = usize::try_from(end.saturating_sub(start.max(state.first))).unwrap_or(usize::MAX);
            let mut room = max_bytes;
            let newer: Vec<Entry> = state
                .entries
                .iter()
                .skip(skip)
                .take(take)
                .take_while(|entry| {
                    let fits = room > 0;
                    room = room.saturating_sub(entry_bytes(entry));
                    fits
                })
                .cloned()
                .collect();
            (from_store_to, newer)
        };
        if start >= from_store_to {
            return Ok(newer);
        }
        let rows = self.log.inner.store()?.read(self.shard, start..from_store_to, max_bytes)?;
        let cut_short = rows.last().is_some_and(|(index, _)| index + 1 < from_store_to);
        let mut entries = rows.iter().map(|(_, bytes)| stored_entry(bytes)).collect::<io::Result<Vec<_>>>()?;
        if !cut_short && entries.iter().map(entry_bytes).sum::<usize>() < max_bytes {
            entries.append(&mut newer);
        }
        Ok(entries)
    }
}

impl RaftLogReader<Types> for ShardLog {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(&mut self, range: RB) -> io::Result<Vec<Entry>> {
        let (start, end) = bounds(&range);
        self.entries(start, end, usize::MAX)
    }

    async fn read_vote(&mut self) -> io::Result<Option<Vote>> {
        Ok(self.tail.state.read().vote)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> io::Result<Vec<Entry>> {
        self.entries(start, end, APPEND_BATCH_BYTES)
    }
}

impl RaftLogStorage<Types> for ShardLog {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> io::Result<LogState<Types>> {
        let state = self.tail.state.read();
        Ok(LogState { last_purged_log_id: state.purged, last_log_id: state.last.or(state.purged) })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> io::Result<()> {
        let (done, durable) = oneshot::channel();
        self.log.enqueue(Write::Vote { shard: self.shard, vote: *vote, done }).await?;
        durable.await.map_err(|_| io::Error::other("the log is closed"))??;
        self.tail.state.write().vote = Some(*vote);
        Ok(())
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> io::Result<()> {
        self.log.enqueue(Write::Committed { shard: self.shard, committed }).await
    }

    /// Never past what the log holds: the mark may have reached the file before the entries it speaks of were synced.
    async fn read_committed(&mut self) -> io::Result<Option<LogId>> {
        let committed = mark::<peer::LogId>(self.log.inner.store()?.as_ref(), self.shard, LogMark::Committed)?;
        let Some(committed) = committed.filter(|id| *id != peer::LogId::default()).map(log_id_from) else { return Ok(None) };
        let last = self.tail.state.read().last;
        Ok(if last.is_some_and(|last| last < committed) { last } else { Some(committed) })
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
        self.log.enqueue(Write::Append { shard: self.shard, entries, tail: self.tail.clone(), flushed }).await
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
        self.log.enqueue(Write::Truncate { shard: self.shard, from }).await
    }

    async fn purge(&mut self, to: LogId) -> io::Result<()> {
        self.tail.state.write().purge_to(to);
        self.log.enqueue(Write::Purge { shard: self.shard, to }).await
    }
}

fn mark<M: prost::Message + Default>(store: &dyn LogStore, shard: ShardId, which: LogMark) -> io::Result<Option<M>> {
    Ok(store.mark(shard, which)?.map(|bytes| record::decode("log mark", &bytes)).transpose()?)
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
