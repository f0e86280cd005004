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

mod apply;
mod clients;
mod closed;
mod diverged;
mod effects;
mod error;
mod feed;
mod hash;
mod load;
mod members;
pub(crate) mod memory;
pub(crate) mod owner;
mod read;
pub(crate) mod record;
mod run;
#[cfg(test)]
mod tests;
mod view;
mod write;

use std::{
    collections::VecDeque,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use holdfast_proto::{
    Revision, ShardId,
    peer::{AppliedRecord, LogId, Member, Membership, RosterRecord, SetPace, StateHash},
    timeline::Millis,
};
use parking_lot::Mutex;
use tokio::sync::watch;

use self::{
    closed::Closed,
    feed::Feed,
    memory::Memory,
    write::{Writer, applied_of},
};
pub use self::{
    feed::{Change, Changes},
    read::{Scanned, Shown},
    view::View,
};
pub(crate) use self::{memory::Lookup, write::Install};
use crate::store::{StateStore, Stores};

/// How far a replica is: what can be seen by a read that starts now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    pub index: u64,
    pub revision: Revision,
    pub log_time: Millis,
    /// The cluster's, in shard 0.
    pub pace: SetPace,
}

/// What the memory tier holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    pub bytes: u64,
    pub entries: u64,
    /// Since the start.
    pub evicted: u64,
}

/// One committed log entry, ready to be applied.
pub(crate) struct Committed {
    pub log_id: LogId,
    pub payload: CommittedPayload,
}

pub(crate) enum CommittedPayload {
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
    /// Index that the log has brought here, also where a snapshot was ahead of it.
    passed_index: AtomicU64,
    writer: Mutex<Writer>,
    published: ArcSwap<Published>,
    hashes: Mutex<VecDeque<StateHash>>,
    /// Nothing more is applied: another state is to take the place of this one, which is not the
    /// majority's.
    held: watch::Sender<bool>,
    feed: Feed,
}

/// What is known of a state without asking whoever writes to it.
#[derive(Clone)]
struct Published {
    applied: Arc<AppliedRecord>,
    /// `None` before the first membership.
    roster: Option<Arc<RosterRecord>>,
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
        let applied = applied_of(&writer.published.applied);
        let is_diverged = diverged::is_marked(store.as_ref())?;
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
            passed_index: AtomicU64::new(applied.index),
            published: ArcSwap::from_pointee(writer.published.clone()),
            writer: Mutex::new(writer),
            hashes: Mutex::default(),
            held: watch::Sender::new(is_diverged),
            feed: Feed::default(),
        });
        state.load_memory();
        Ok(state)
    }

    pub fn shard(&self) -> ShardId {
        self.shard
    }

    /// A state that differs from the majority's goes no further, or what comes to take its place
    /// would never be as far as it is.
    pub(crate) fn hold(&self, held: bool) {
        self.held.send_replace(held);
    }

    pub(crate) fn is_held(&self) -> bool {
        *self.held.borrow()
    }

    /// A restart goes on holding what was there when it was found to be another state than the
    /// majority's.
    pub(crate) fn remember_divergence(&self, of: &Arc<Generation>) -> io::Result<()> {
        // Nothing takes its place meanwhile.
        let _writer = self.writer.lock();
        if Arc::ptr_eq(&self.generation.load(), of) {
            diverged::mark(of.store.as_ref())?;
        }
        Ok(())
    }

    /// Resolves when what is committed may be applied.
    pub(crate) async fn may_apply(&self) {
        // The sender is this state's own: it cannot be gone.
        let _ = self.held.subscribe().wait_for(|held| !held).await;
    }

    // ---- reading: `read.rs` ----

    pub(crate) fn generation(&self) -> Arc<Generation> {
        self.generation.load_full()
    }

    /// Who has which id, as of the last run.
    pub fn roster(&self) -> Arc<RosterRecord> {
        self.published.load().roster.clone().unwrap_or_default()
    }

    /// Every change from now on.
    pub(crate) fn follow(&self) -> Changes {
        self.feed.follow()
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

    /// As of the last run.
    pub fn applied_record(&self) -> Arc<AppliedRecord> {
        self.published.load().applied.clone()
    }

    /// Whether the log is as far as the state: not while a snapshot is ahead of it.
    pub(crate) fn is_level_with_log(&self) -> bool {
        self.applied().index <= self.passed_index.load(Ordering::Acquire)
    }

    pub fn flushed_index(&self) -> u64 {
        self.flushed_index.load(Ordering::Acquire)
    }

    /// At the newest index that hashes are compared at.
    pub(crate) fn hash(&self) -> Option<StateHash> {
        self.hashes.lock().back().copied()
    }

    /// What it was at an index, if it is remembered.
    pub(crate) fn hash_at(&self, index: u64) -> Option<StateHash> {
        let hashes = self.hashes.lock();
        hashes.iter().find(|known| known.index == index).copied()
    }

    // ---- writing: `write.rs` ----

    pub fn compact(&self) -> io::Result<()> {
        self.generation().store.compact()
    }

    pub fn disk_bytes(&self) -> io::Result<u64> {
        self.generation().store.disk_bytes()
    }

    /// Lets go of the store, so that it can be opened again. Whoever still reads finds an error,
    /// never another state.
    pub(crate) fn close(&self) {
        self.generation.store(Arc::new(Generation {
            store: Arc::new(Closed),
            memory: Memory::new(0),
        }));
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
