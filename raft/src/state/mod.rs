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

pub(crate) mod apply;
mod clients;
mod closed;
#[allow(dead_code, reason = "cleared no more: a generation goes as a whole")]
pub(crate) mod memory;
pub(crate) mod owner;
mod read;
pub(crate) mod record;
#[cfg(test)]
mod tests;
mod view;

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
    Revision, ShardId,
    peer::{AppliedRecord, LogId, Member, Membership, Outcome, RosterRecord, SetPace},
    timeline::Millis,
};
use parking_lot::Mutex;
use tokio::sync::watch;

pub(crate) use self::memory::Lookup;
use self::{
    apply::{ApplyError, Run},
    clients::Clients,
    closed::Closed,
    memory::{Loaded, Memory},
    read::read_entry,
};
pub use self::{
    read::{Scanned, Shown},
    view::View,
};
use crate::store::{Family, StateStore, Stores};

/// How far a replica is: what can be seen by a read that starts now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    pub index: u64,
    pub revision: Revision,
    pub log_time: Millis,
    /// The cluster's, in shard 0.
    pub pace: SetPace,
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

/// What the memory tier holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    pub bytes: u64,
    pub entries: u64,
    /// Since the start.
    pub evicted: u64,
}

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
pub(crate) struct Generation {
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

    // ---- reading: `read.rs` ----

    pub(crate) fn generation(&self) -> Arc<Generation> {
        self.generation.load_full()
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

    pub(crate) fn memory_use(&self) -> MemoryUse {
        let generation = self.generation.load();
        MemoryUse {
            bytes: generation.memory.bytes(),
            entries: generation.memory.entries(),
            evicted: generation.memory.evicted_total(),
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
            pace: self.applied.pace.unwrap_or_default(),
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
        ..Default::default()
    }
}
