//! The memory tier of one replica: what reads use. Every entry of the shard while they fit, then
//! the ones worth it, with the store behind.
//!
//! Promises: a read never takes a lock and never waits for a writer (P2). What it finds is the last
//! applied entry of the key. `Absent` is said only when the store cannot have the key. Memory stays
//! below `bytes_max`, exceeded for a moment by at most the one entry that is being applied (P10).
//! Must never know: clocks, phases, the store, openraft.
//!
//! # The order of an apply run
//!
//! ```text
//! raise `visible` ─► write the run's batch to the store ─► Memory::apply ─► publish `applied`
//! ```
//! Waits compare with `applied`, so who waited for a revision finds it in memory or, if it is not
//! there, in the store. Answers carry `visible`, read after the look-up: a read that goes to the
//! store may see the run before memory has it, and its token must then cover that run. (Without a
//! token the same reader may, until `Memory::apply` is through, be answered from memory with the
//! entry before.)
//!
//! # Why a fill needs a change counter
//!
//! ```text
//! reader: finds nothing ─ reads v4 from the store ──────────────────────────────────────────► puts v4: wrong for ever
//! apply:                                            v5 to the store ─ v5 to memory ─ evicted
//! ```
//! Being absent does not tell that nothing happened: v5 may have come and gone, or the key was
//! deleted. So the reader takes a [`FillTicket`] *before* it reads the store (before it even picks
//! the store's handle, which a snapshot swaps), and the fill is refused if the counter of the key's
//! stripe moved since. Apply, eviction and `clear` raise it, inside the segment's lock and before
//! they change the map. Eviction too: a second fill may have brought v5 before apply did.
//!
//! # Who does what
//!
//! Readers: one look-up in a lock-free map, one atomic load. Writers lock one segment, chosen by
//! the key's hash, never two (`clear` alone takes all, in order). The budget is one for all
//! segments; room is made in the fuller of two neighbours, so that they stay of a size.

mod changes;
mod completeness;
mod entry;
mod queue;
#[cfg(test)]
mod tests;

use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use holdfast_proto::Key;
use parking_lot::{Mutex, MutexGuard};

use self::changes::{Changes, stripe};
pub(crate) use self::changes::{FillTicket, FillTickets};
use self::completeness::Completeness;
#[allow(
    unused_imports,
    reason = "`examples/memory` compares it with what it measures"
)]
pub(crate) use self::entry::{ENTRY_OVERHEAD_BYTES, Entry};
use self::queue::{FREQUENCY_MAX, NodeId, Queues};

/// One segment for so many bytes of budget, …
const SEGMENT_BYTES: u64 = 4 << 20;
/// … up to so many: enough that fillers seldom meet.
const SEGMENTS_MAX: u64 = 64;
/// What memory knows of a key.
pub(crate) enum Lookup {
    Found(Arc<Entry>),
    /// Certainly not in the state.
    Absent,
    /// Not in memory; the store may have it. The ticket is for putting what the store has.
    Unknown(FillTicket),
}

/// One pass over the store that puts everything into memory. Void after `Memory::clear`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Loading {
    generation: u64,
}

/// What became of one entry that was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// In memory, now or already: what was there is at least as new.
    Kept,
    /// Something changed since the ticket: take a new one, read this key again and load what is
    /// there, if anything.
    Changed,
    /// Full. Loading can stop: memory will not be complete.
    Full,
    /// Memory was cleared since loading began: stop.
    Void,
}

pub(crate) struct Memory {
    bytes_max: u64,
    map: papaya::HashMap<Key, Slot, RandomState>,
    segments: Box<[Segment]>,
    changes: Changes,
    completeness: Completeness,
    bytes: AtomicU64,
    entries: AtomicU64,
    evicted: AtomicU64,
    /// The segment where room is made next.
    hand: AtomicUsize,
}

struct Segment {
    queues: Mutex<Queues>,
    /// `queues.bytes()` for who compares segments without a lock.
    bytes: AtomicU64,
}

/// A key's place in the map; overwriting the key keeps it.
struct Slot {
    node: NodeId,
    /// Reads since it came or was last looked at for eviction, up to `FREQUENCY_MAX`.
    frequency: AtomicU8,
    /// Emptied when the slot leaves the map: the map frees what it removed later, in batches, and a
    /// batch of values would be far over the budget.
    entry: ArcSwapOption<Entry>,
}

impl Memory {
    /// Empty and not loaded yet.
    pub(crate) fn new(bytes_max: u64) -> Self {
        let hasher = RandomState::new();
        let segments = (bytes_max / SEGMENT_BYTES)
            .clamp(1, SEGMENTS_MAX)
            .next_power_of_two();
        Self {
            bytes_max,
            map: papaya::HashMap::with_hasher(hasher.clone()),
            segments: (0..segments)
                .map(|_| Segment {
                    queues: Mutex::default(),
                    bytes: AtomicU64::new(0),
                })
                .collect(),
            changes: Changes::new(hasher),
            completeness: Completeness::default(),
            bytes: AtomicU64::new(0),
            entries: AtomicU64::new(0),
            evicted: AtomicU64::new(0),
            hand: AtomicUsize::new(0),
        }
    }

    /// A reader's look-up: lock-free, and counts as a read for eviction.
    pub(crate) fn get(&self, key: &[u8]) -> Lookup {
        self.look_up(key, |slot| {
            let frequency = slot.frequency.load(Ordering::Relaxed);
            // Written only when it changes, so that a hot key's cache line stays shared; a lost
            // increment does no harm.
            if frequency < FREQUENCY_MAX {
                slot.frequency.store(frequency + 1, Ordering::Relaxed);
            }
        })
    }

    /// A look-up that does not count as a read.
    pub(crate) fn peek(&self, key: &[u8]) -> Lookup {
        self.look_up(key, |_| ())
    }

    /// Takes over the changes of one run; `None` is a removal. One run at a time, each key once
    /// with its last change, after the run's batch is in the store and before `applied` is
    /// published.
    pub(crate) fn apply(&self, changes: impl IntoIterator<Item = (Key, Option<Arc<Entry>>)>) {
        for (key, entry) in changes {
            match entry {
                Some(entry) => self.put(&key, entry),
                None => self.remove(&key),
            }
        }
    }

    /// Puts what a reader found in the store, making room for it, unless the key is there or its
    /// stripe changed since the ticket. Returns whether it was put.
    pub(crate) fn fill(&self, key: &[u8], ticket: FillTicket, entry: Arc<Entry>) -> bool {
        let hash = self.changes.hash(key);
        let cost = entry.cost(key);
        // Before making room for nothing.
        if !self.changes.none_since(hash, ticket) || !self.make_room(cost) {
            return false;
        }
        let segment = self.segment(hash);
        let mut queues = segment.queues.lock();
        let fits = self.changes.none_since(hash, ticket) && !self.map.pin().contains_key(key);
        match fits {
            true => self.insert(segment, &mut queues, key, hash, entry, cost),
            false => self.give_back(cost),
        }
        fits
    }

    /// The ticket for a read of the store that begins after this.
    pub(crate) fn ticket(&self, key: &[u8]) -> FillTicket {
        self.changes.ticket(self.changes.hash(key))
    }

    /// As `ticket`, for every key. Costs some 10 µs: once per page.
    pub(crate) fn tickets(&self) -> FillTickets {
        self.changes.tickets()
    }

    /// Begins a pass over the store. Take it before the store's handle.
    pub(crate) fn loading(&self) -> Loading {
        Loading {
            generation: self.completeness.generation(),
        }
    }

    /// As `fill`, but never evicts, and says why not.
    pub(crate) fn load(
        &self,
        loading: Loading,
        key: &[u8],
        ticket: FillTicket,
        entry: Arc<Entry>,
    ) -> Loaded {
        let hash = self.changes.hash(key);
        let cost = entry.cost(key);
        let segment = self.segment(hash);
        let mut queues = segment.queues.lock();
        if self.completeness.generation() != loading.generation {
            return Loaded::Void;
        }
        if self.map.pin().contains_key(key) {
            return Loaded::Kept;
        }
        if !self.changes.none_since(hash, ticket) {
            return Loaded::Changed;
        }
        if !self.take_room(cost) {
            self.completeness.lose();
            return Loaded::Full;
        }
        self.insert(segment, &mut queues, key, hash, entry, cost);
        Loaded::Kept
    }

    /// Ends a pass that put every entry of the store: from now on what is not in memory is
    /// `Absent`, unless something did not fit, was evicted, or memory was cleared since the pass
    /// began. Returns whether it is so.
    pub(crate) fn loaded(&self, loading: Loading) -> bool {
        self.completeness.complete(loading.generation)
    }

    /// Empties memory for another state: back to not loaded, every ticket and pass void. Swap the
    /// store's handle first: who takes a ticket after this then reads the new state.
    pub(crate) fn clear(&self) {
        let mut locked: Vec<MutexGuard<'_, Queues>> = self
            .segments
            .iter()
            .map(|segment| segment.queues.lock())
            .collect();
        self.completeness.restart();
        self.changes.raise_all();
        for (segment, queues) in self.segments.iter().zip(&mut locked) {
            let bytes = queues.bytes();
            for key in queues.clear() {
                self.take_out(&key);
            }
            segment.bytes.store(0, Ordering::Relaxed);
            // Not set to 0: fills under way hold reservations, which they give back themselves.
            self.give_back(bytes);
        }
    }

    /// Whether a look-up that finds nothing is certain.
    pub(crate) fn is_complete(&self) -> bool {
        self.completeness.observe().is_complete()
    }

    /// What the entries count for, room reserved by fills under way included.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Entries evicted since the start.
    pub(crate) fn evicted_total(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    fn look_up(&self, key: &[u8], found: impl FnOnce(&Slot)) -> Lookup {
        let before = self.completeness.observe();
        let map = self.map.pin();
        if let Some(slot) = map.get(key) {
            // A slot without entry is on its way out of the map, by then already removed.
            if let Some(entry) = slot.entry.load_full() {
                found(slot);
                return Lookup::Found(entry);
            }
        }
        match self.completeness.held_since(before) {
            true => Lookup::Absent,
            false => Lookup::Unknown(self.ticket(key)),
        }
    }

    fn put(&self, key: &[u8], entry: Arc<Entry>) {
        let hash = self.changes.hash(key);
        let cost = entry.cost(key);
        let segment = self.segment(hash);
        let mut queues = segment.queues.lock();
        self.changes.raise(hash);
        // What came without its value is for the next reader to bring.
        if cost > self.bytes_max || entry.value.is_none() {
            self.completeness.lose();
            self.unlink(segment, &mut queues, key);
        } else if let Some(slot) = self.map.pin().get(key) {
            let cost_before = queues.resize(slot.node, cost);
            self.bytes.fetch_add(cost, Ordering::SeqCst);
            slot.entry.store(Some(entry));
            self.give_back(cost_before);
            segment.bytes.store(queues.bytes(), Ordering::Relaxed);
        } else {
            self.bytes.fetch_add(cost, Ordering::SeqCst);
            self.insert(segment, &mut queues, key, hash, entry, cost);
        }
        drop(queues);
        // Afterwards, since an overwrite may need none; there is one apply, so one entry at most is
        // over the budget.
        while self.bytes() > self.bytes_max && self.evict_one() {}
    }

    fn remove(&self, key: &[u8]) {
        let hash = self.changes.hash(key);
        let segment = self.segment(hash);
        let mut queues = segment.queues.lock();
        self.changes.raise(hash);
        self.unlink(segment, &mut queues, key);
    }

    /// The room is taken already.
    fn insert(
        &self,
        segment: &Segment,
        queues: &mut Queues,
        key: &[u8],
        hash: u64,
        entry: Arc<Entry>,
        cost: u64,
    ) {
        // Copied: the caller's key may be a slice of the message it came in, and would keep all of
        // it.
        let key = Key::new(Bytes::copy_from_slice(key))
            .expect("what is in the state was checked at the door");
        let node = queues.insert(key.clone(), hash, cost);
        self.map.pin().insert(
            key,
            Slot {
                node,
                frequency: AtomicU8::new(0),
                entry: ArcSwapOption::new(Some(entry)),
            },
        );
        self.entries.fetch_add(1, Ordering::Relaxed);
        segment.bytes.store(queues.bytes(), Ordering::Relaxed);
    }

    fn unlink(&self, segment: &Segment, queues: &mut Queues, key: &[u8]) {
        let Some(node) = self.take_out(key) else {
            return;
        };
        self.give_back(queues.remove(node));
        segment.bytes.store(queues.bytes(), Ordering::Relaxed);
    }

    /// Out of the map, its value freed as soon as the readers that hold it let go.
    fn take_out(&self, key: &[u8]) -> Option<NodeId> {
        let map = self.map.pin();
        let slot = map.remove(key)?;
        slot.entry.store(None);
        self.entries.fetch_sub(1, Ordering::Relaxed);
        Some(slot.node)
    }

    fn make_room(&self, cost: u64) -> bool {
        if cost > self.bytes_max {
            return false;
        }
        while !self.take_room(cost) {
            if !self.evict_one() {
                return false;
            }
        }
        true
    }

    fn take_room(&self, cost: u64) -> bool {
        let within = |bytes: u64| bytes.checked_add(cost).filter(|sum| *sum <= self.bytes_max);
        self.bytes
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, within)
            .is_ok()
    }

    fn give_back(&self, cost: u64) {
        self.bytes.fetch_sub(cost, Ordering::SeqCst);
    }

    /// False if there was nothing to evict.
    fn evict_one(&self) -> bool {
        let count = self.segments.len();
        (0..count).any(|_| {
            let hand = self.hand.fetch_add(1, Ordering::Relaxed);
            let (one, other) = (
                &self.segments[hand % count],
                &self.segments[hand.wrapping_add(1) % count],
            );
            let fuller = if one.bytes.load(Ordering::Relaxed) >= other.bytes.load(Ordering::Relaxed)
            {
                one
            } else {
                other
            };
            self.evict_from(fuller)
        })
    }

    fn evict_from(&self, segment: &Segment) -> bool {
        let mut queues = segment.queues.lock();
        let map = self.map.pin();
        let victim = queues.evict(|key, step| match map.get(&**key) {
            Some(slot) => {
                let frequency = slot.frequency.load(Ordering::Relaxed);
                slot.frequency.store(step(frequency), Ordering::Relaxed);
                frequency
            }
            None => 0,
        });
        let Some(victim) = victim else { return false };
        // First, so that no reader takes what is evicted for absent.
        self.completeness.lose();
        self.changes.raise(victim.hash);
        self.take_out(&victim.key);
        self.give_back(victim.bytes);
        segment.bytes.store(queues.bytes(), Ordering::Relaxed);
        self.evicted.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// All keys of a stripe are of one segment, as segments divide stripes.
    fn segment(&self, hash: u64) -> &Segment {
        &self.segments[stripe(hash) % self.segments.len()]
    }
}
