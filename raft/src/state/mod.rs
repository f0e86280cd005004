//! The state of one replica: what the log came to. A store for everything, and a memory tier that
//! reads use.
//!
//! ```text
//! apply:   raise `visible` ─► batch into the store ─► memory ─► publish `applied`
//! read:    memory ─► (only if evicted or not yet loaded) store ─► then read `visible` for the answer's token
//! ```
//! In this order an answer never claims less than it shows: its token may name a revision whose
//! effects it did not yet see, which makes a later read wait, never go back. A wait compares with
//! `applied`, behind which everything can be seen.
//!
//! A snapshot swaps store and (empty) memory together, as one [`Generation`]: a reader holds one of
//! them throughout. Must never know: openraft, the network, a clock.

pub mod apply;
mod clients;
pub mod memory;
pub(crate) mod owner;
pub mod record;
#[cfg(test)]
mod tests;

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use holdfast_proto::{
    Key, Revision, ShardId, content_hash,
    peer::{
        AppliedRecord, EntryRecord, LogId, Member, Membership, Outcome, RosterRecord,
        TombstoneRecord,
    },
    timeline::Millis,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use self::{
    apply::{ApplyError, Run},
    clients::Clients,
    memory::{Entry, Loaded, Lookup, Memory},
    record::{BadRecord, DueKind},
};
use crate::store::{Family, Scan, StateBatch, StateStore, Stores};

/// How far a replica is: what can be seen by a read that starts now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    pub index: u64,
    pub revision: Revision,
    pub log_time: Millis,
}

/// The running hash of applied state at one index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChainHash {
    pub index: u64,
    pub hash: u64,
}

/// Hashes are compared at multiples of this index, so that replicas need to keep few.
const HASH_EVERY: u64 = 256;
/// Hashes kept for comparison with peers that are ahead or behind.
const HASHES_KEPT: usize = 64;

/// One committed log entry, ready to be applied.
pub struct Committed {
    pub log_id: LogId,
    pub payload: CommittedPayload,
}

pub enum CommittedPayload {
    Blank,
    /// An encoded `LogEntry`.
    Commands(Bytes),
    Membership(Membership),
}

/// A part of the entries, in key order.
#[derive(Default)]
pub struct Scanned {
    pub entries: Vec<(Key, Entry)>,
    /// Where the next part begins; `None` at the end.
    pub next: Option<Bytes>,
}

pub struct State {
    shard: ShardId,
    stores: Stores,
    memory_bytes_max: u64,
    generation: ArcSwap<Generation>,
    visible: AtomicU64,
    applied: watch::Sender<Applied>,
    /// Index up to which the store is known to be on disk: what a restart replays from, and purging
    /// never passes.
    flushed_index: AtomicU64,
    writer: Mutex<Writer>,
    hashes: Mutex<std::collections::VecDeque<ChainHash>>,
}

/// Everything that changes only in apply and install.
struct Writer {
    applied: AppliedRecord,
    clients: Clients,
}

/// A store and the memory in front of it; replaced together by a snapshot.
pub struct Generation {
    pub store: Arc<dyn StateStore>,
    pub memory: Memory,
}

impl State {
    pub fn open(stores: &Stores, shard: ShardId, memory_bytes_max: u64) -> io::Result<Arc<Self>> {
        let store = stores.open_state(shard)?;
        let writer = Writer::load(store.as_ref())?;
        let applied = writer.published();
        let state = Arc::new(Self {
            shard,
            stores: stores.clone(),
            memory_bytes_max,
            generation: ArcSwap::from_pointee(Generation {
                store,
                memory: Memory::new(memory_bytes_max),
            }),
            visible: AtomicU64::new(applied.revision),
            applied: watch::Sender::new(applied),
            flushed_index: AtomicU64::new(applied.index),
            writer: Mutex::new(writer),
            hashes: Mutex::default(),
        });
        state.load_memory();
        Ok(state)
    }

    pub fn shard(&self) -> ShardId {
        self.shard
    }

    // ---- reading ----

    pub fn generation(&self) -> Arc<Generation> {
        self.generation.load_full()
    }

    /// What is in memory, without touching the disk. The usual case, and lock-free.
    pub fn lookup(&self, key: &[u8]) -> Lookup {
        self.generation.load().memory.get(key)
    }

    /// Like `lookup`, without counting as a use.
    pub fn peek(&self, key: &[u8]) -> Lookup {
        self.generation.load().memory.peek(key)
    }

    /// From memory or disk; what came from disk is kept in memory if nothing overtook it. Blocks
    /// for one disk read at most.
    pub fn get(&self, key: &Key) -> io::Result<Option<Arc<Entry>>> {
        let generation = self.generation.load_full();
        match generation.memory.get(key) {
            Lookup::Found(entry) => Ok(Some(entry)),
            Lookup::Absent => Ok(None),
            Lookup::Unknown(ticket) => {
                let entry = read_entry(generation.store.as_ref(), key)?.map(Arc::new);
                if let Some(entry) = &entry {
                    generation.memory.fill(key, ticket, entry.clone());
                }
                Ok(entry)
            }
        }
    }

    pub fn tombstone(&self, key: &Key) -> io::Result<Option<TombstoneRecord>> {
        let bytes = self.generation().store.get(Family::Tombstone, key)?;
        Ok(bytes
            .map(|bytes| record::decode("tombstone", &bytes))
            .transpose()?)
    }

    /// Stored entries under `prefix`, from `from` on, in key order: those of `limit` rows.
    pub fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> io::Result<Scanned> {
        let generation = self.generation();
        let mut scanned = Scanned::default();
        let mut looked_at = 0;
        for row in generation
            .store
            .scan(Family::Entry, from.max(prefix), None)
            .take(limit)
        {
            let (key, _) = row?;
            if !key.starts_with(prefix) {
                return Ok(scanned);
            }
            looked_at += 1;
            if looked_at == limit {
                scanned.next = Some(after(&key));
            }
            let Ok(key) = Key::new(key) else { continue };
            // The row shows the moment the scan began; the entry may have gone since.
            if let Some(entry) = read_entry(generation.store.as_ref(), &key)? {
                scanned.entries.push((key, entry));
            }
        }
        Ok(scanned)
    }

    /// Rows of the due index of one kind in `[from, until]`, oldest first.
    pub fn due(
        &self,
        kind: DueKind,
        from: Millis,
        until: Millis,
        limit: usize,
    ) -> io::Result<Vec<(Millis, Key)>> {
        let generation = self.generation();
        let (start, end) = (
            record::due_key(kind, from, b""),
            record::due_key(kind, until.saturating_add(1), b""),
        );
        let mut due = Vec::new();
        for row in generation
            .store
            .scan(Family::Due, &start, Some(&end))
            .take(limit)
        {
            let (row, _) = row?;
            if let Some((at, key)) = record::parse_due_key(&row)
                && let Ok(key) = Key::new(key)
            {
                due.push((at, key));
            }
        }
        Ok(due)
    }

    pub fn roster(&self) -> io::Result<RosterRecord> {
        match self
            .generation()
            .store
            .get(Family::System, record::ROSTER)?
        {
            Some(bytes) => Ok(record::decode("roster", &bytes)?),
            None => Ok(founding_roster(&self.applied_record())),
        }
    }

    // ---- how far ----

    /// For tokens: no answer shows more than this, if it is read after the look-up.
    pub fn visible(&self) -> Revision {
        self.visible.load(Ordering::Acquire)
    }

    pub fn applied(&self) -> Applied {
        *self.applied.borrow()
    }

    pub fn watch_applied(&self) -> watch::Receiver<Applied> {
        self.applied.subscribe()
    }

    pub fn applied_record(&self) -> AppliedRecord {
        self.writer.lock().applied.clone()
    }

    pub fn flushed_index(&self) -> u64 {
        self.flushed_index.load(Ordering::Acquire)
    }

    /// The newest hash to show to a peer.
    pub fn chain_hash(&self) -> ChainHash {
        self.hashes.lock().back().copied().unwrap_or_default()
    }

    /// What this replica's hash was at an index, if it remembers.
    pub fn chain_hash_at(&self, index: u64) -> Option<u64> {
        self.hashes
            .lock()
            .iter()
            .find(|known| known.index == index)
            .map(|known| known.hash)
    }

    // ---- writing: apply, flush, snapshots ----

    /// Applies a run of committed entries as one batch and says what their commands came to.
    pub fn apply(&self, run: &[Committed]) -> Result<Vec<Vec<Outcome>>, ApplyError> {
        let generation = self.generation.load_full();
        let mut writer = self.writer.lock();
        let Writer { applied, clients } = &mut *writer;
        let mut batch = Run::new(
            generation.store.as_ref(),
            &generation.memory,
            clients,
            applied.clone(),
        );
        let mut outcomes = Vec::with_capacity(run.len());
        let mut hashes = Vec::new();
        for committed in run {
            outcomes.push(match &committed.payload {
                CommittedPayload::Commands(encoded) => batch.apply(committed.log_id, encoded)?,
                CommittedPayload::Blank => {
                    batch.apply_empty(committed.log_id);
                    Vec::new()
                }
                CommittedPayload::Membership(membership) => {
                    batch.applied_mut().membership_log_id = Some(committed.log_id);
                    batch.applied_mut().membership = Some(membership.clone());
                    batch.apply_empty(committed.log_id);
                    Vec::new()
                }
            });
            if committed.log_id.index.is_multiple_of(HASH_EVERY) {
                hashes.push(ChainHash {
                    index: committed.log_id.index,
                    hash: batch.applied_mut().chain_hash,
                });
            }
        }
        let finished = batch.finish();

        self.visible
            .store(finished.applied.revision, Ordering::Release);
        generation.store.write(finished.batch)?;
        generation.memory.apply(finished.changes);
        writer.applied = finished.applied;
        writer.clients.written();
        self.remember_hashes(hashes);
        self.applied.send_replace(writer.published());
        Ok(outcomes)
    }

    /// Everything applied so far survives a restart without the log. Returns the index that is
    /// certain.
    pub fn flush(&self) -> io::Result<u64> {
        let index = self.applied().index;
        self.generation().store.flush()?;
        Ok(self
            .flushed_index
            .fetch_max(index, Ordering::AcqRel)
            .max(index))
    }

    pub fn compact(&self) -> io::Result<()> {
        self.generation().store.compact()
    }

    pub fn disk_bytes(&self) -> io::Result<u64> {
        self.generation().store.disk_bytes()
    }

    /// A copy of the state as files in `dir`, to send to a follower. The applied record inside it
    /// says how far it is.
    pub fn checkpoint(&self, dir: &Path) -> io::Result<()> {
        self.generation().store.checkpoint(dir)
    }

    /// Replaces everything by a checkpoint that was fully received into `dir`. Never goes
    /// backwards.
    pub fn install(self: &Arc<Self>, dir: &Path) -> io::Result<AppliedRecord> {
        let mut writer = self.writer.lock();
        let store = self.stores.install_state(self.shard, dir)?;
        let installed = Writer::load(store.as_ref())?;
        let record = installed.applied.clone();
        if record.revision < writer.applied.revision {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a snapshot would take this replica back in time",
            ));
        }
        *writer = installed;
        self.visible.store(record.revision, Ordering::Release);
        self.generation.store(Arc::new(Generation {
            store,
            memory: Memory::new(self.memory_bytes_max),
        }));
        let applied = writer.published();
        self.flushed_index.store(applied.index, Ordering::Release);
        self.hashes.lock().clear();
        self.applied.send_replace(applied);
        drop(writer);
        self.load_memory();
        Ok(record)
    }

    /// Lets go of the store, so that it can be opened again. Whoever still reads finds an error,
    /// never another state.
    pub(crate) fn close(&self) {
        self.generation.store(Arc::new(Generation {
            store: Arc::new(Closed),
            memory: Memory::new(0),
        }));
    }

    fn remember_hashes(&self, new: Vec<ChainHash>) {
        let mut hashes = self.hashes.lock();
        hashes.extend(new);
        while hashes.len() > HASHES_KEPT {
            hashes.pop_front();
        }
    }

    /// Brings the stored entries into memory in the background. Until it ends, a look-up that finds
    /// nothing asks the disk.
    fn load_memory(self: &Arc<Self>) {
        let generation = self.generation.load_full();
        let state = Arc::downgrade(self);
        // Detached on purpose: it holds one generation, ends by itself, and stops when the state is
        // gone or replaced.
        drop(crate::task::blocking(move || {
            let replaced = || {
                state
                    .upgrade()
                    .is_none_or(|state| !Arc::ptr_eq(&state.generation.load(), &generation))
            };
            if let Err(error) = load_all(&generation, replaced) {
                tracing::warn!(%error, "loading entries into memory stopped: reads go to the disk");
            }
        }));
    }
}

fn load_all(generation: &Generation, replaced: impl Fn() -> bool) -> io::Result<()> {
    const CHECK_EVERY: usize = 1024;
    let memory = &generation.memory;
    let loading = memory.loading();
    for (n, row) in generation.store.scan(Family::Entry, b"", None).enumerate() {
        if n % CHECK_EVERY == 0 && replaced() {
            return Ok(());
        }
        let (key, _) = row?;
        // The ticket comes before the read; a key that changed meanwhile is read again.
        loop {
            let ticket = memory.ticket(&key);
            let Some(entry) = read_entry(generation.store.as_ref(), &key)? else {
                break;
            };
            match memory.load(loading, &key, ticket, Arc::new(entry)) {
                Loaded::Kept => break,
                Loaded::Changed => {}
                Loaded::Full | Loaded::Void => return Ok(()),
            }
        }
    }
    memory.loaded(loading);
    Ok(())
}

/// The least key that is greater.
fn after(key: &[u8]) -> Bytes {
    Bytes::from([key, &[0]].concat())
}

/// What is left of a state that was closed.
struct Closed;

fn closed<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::NotConnected,
        "the state is closed",
    ))
}

impl StateStore for Closed {
    fn get(&self, _: Family, _: &[u8]) -> io::Result<Option<Bytes>> {
        closed()
    }

    fn get_many(&self, _: Family, _: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>> {
        closed()
    }

    fn scan<'a>(&'a self, _: Family, _: &[u8], _: Option<&[u8]>) -> Scan<'a> {
        Box::new(std::iter::once(closed()))
    }

    fn write(&self, _: StateBatch) -> io::Result<()> {
        closed()
    }

    fn flush(&self) -> io::Result<()> {
        closed()
    }

    fn checkpoint(&self, _: &Path) -> io::Result<()> {
        closed()
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        closed()
    }

    fn compact(&self) -> io::Result<()> {
        closed()
    }
}

impl Writer {
    fn load(store: &dyn StateStore) -> io::Result<Self> {
        let applied = store.get(Family::System, record::APPLIED)?;
        let applied: AppliedRecord = applied
            .map(|bytes| record::decode("applied", &bytes))
            .transpose()?
            .unwrap_or_default();
        if applied.feature_level > apply::FEATURE_LEVEL {
            return Err(io::Error::other(ApplyError::FeatureLevel {
                level: applied.feature_level,
            }));
        }
        Ok(Self {
            applied,
            clients: Clients::load(store)?,
        })
    }

    fn published(&self) -> Applied {
        Applied {
            index: self.applied.last_applied.map_or(0, |log_id| log_id.index),
            revision: self.applied.revision,
            log_time: self.applied.log_time_ms,
        }
    }
}

/// Who is a member before the first change: those that founded the cluster.
fn founding_roster(applied: &AppliedRecord) -> RosterRecord {
    let membership = applied.membership.clone().unwrap_or_default();
    let members: Vec<Member> = membership
        .members
        .into_iter()
        .filter_map(|node| node.member)
        .collect();
    let next_id = members.iter().map(|member| member.id).max().unwrap_or(0) + 1;
    let voters = membership
        .configs
        .last()
        .map_or(Vec::new(), |voters| voters.ids.clone());
    RosterRecord {
        next_id,
        members,
        voters,
    }
}

/// Both records of a key. They are read one after the other: a value that does not have the entry's
/// hash was written between the two reads, or is damaged.
pub(crate) fn read_entry(store: &dyn StateStore, key: &[u8]) -> io::Result<Option<Entry>> {
    const TRIES: usize = 16;
    for _ in 0..TRIES {
        let Some(entry) = store.get(Family::Entry, key)? else {
            return Ok(None);
        };
        let Some(value) = store.get(Family::Value, key)? else {
            continue;
        };
        let entry: EntryRecord = record::decode("entry", &entry)?;
        let value = record::decode_value(&value)?;
        if content_hash(&value) == entry.content_hash {
            return Ok(Some(Entry::new(entry, value.as_ref())));
        }
    }
    Err(BadRecord::Damaged {
        what: "value",
        reason: "its hash is not its entry's".into(),
    }
    .into())
}
