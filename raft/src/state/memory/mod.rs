//! The memory tier of one replica: what reads use. Every entry of the shard while they fit, then
//! the ones worth it, with the store behind.
//!
//! Promises: a read never takes a lock and never waits for a writer (P2). What it finds is the last
//! applied entry of the key. `Absent` is said only when the store cannot have the key: once the
//! store was read through, each of its keys is in the map or in a filter (`filter.rs`), so that a
//! miss of a key that nobody has costs no read of the disk, after evictions too. Memory stays below
//! `bytes_max`, exceeded for a moment by at most the one entry that is being applied (P10).
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
//! stripe moved since. Apply and eviction raise it, inside the segment's lock and before they change
//! the map. Eviction too: a second fill may have brought v5 before apply did.
//!
//! # Why absent is certain
//!
//! ```text
//! reader: is all loaded? ─► the map has no slot ─► no filter has the key ─► absent
//! evict:                     filter gets the key ─► the map loses the slot
//! ```
//! Each side goes in the other's order. Had the key been stored when the map was asked, the filter
//! had it by then, and has it still, or one that took its place: that one has every key the store
//! had since.
//!
//! # Who does what
//!
//! Readers: one look-up in a lock-free map, one atomic load. Writers lock one segment, chosen by
//! the key's hash, never two. The budget is one for all segments; room is made in the fuller of two
//! neighbours, so that they stay of a size.

mod changes;
mod entry;
mod filter;
mod queue;
#[cfg(test)]
mod tests;

use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use holdfast_proto::Key;
use parking_lot::Mutex;

pub(crate) use self::changes::FillTicket;
use self::changes::{Changes, stripe};
#[allow(
    unused_imports,
    reason = "`examples/memory` compares it with what it measures"
)]
pub(crate) use self::entry::{ENTRY_OVERHEAD_BYTES, Entry};
use self::filter::Filters;
use self::queue::{FREQUENCY_MAX, NodeId, Queues};

/// One segment for so many bytes of budget, …
const SEGMENT_BYTES: u64 = 4 << 20;
/// … up to so many: enough that fillers seldom meet.
const SEGMENTS_MAX: u64 = 64;
/// One filter takes such a part of the budget, and another while it is rebuilt: at 10 bits a key
/// enough for eight times the entries that fit.
const FILTER_SHARE: u64 = 64;
/// Enough for 200 million keys.
const FILTER_BYTES_MAX: u64 = 256 << 20;

/// What memory knows of a key.
pub(crate) enum Lookup {
    Found(Arc<Entry>),
    /// Certainly not in the state.
    Absent,
    /// Not in memory; the store may have it. The ticket is for putting what the store has.
    Unknown(FillTicket),
}

/// What became of one entry that was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Loaded {
    /// In memory, now or already: what was there is at least as new.
    Kept,
    /// Something changed since the ticket: take a new one, read this key again and load what is
    /// there, if anything.
    Changed,
    /// There is no room, and it is remembered that the store has it: the rest need not be read.
    Full,
}

pub(crate) struct Memory {
    /// For entries; the filters' share is taken off.
    bytes_max: u64,
    map: papaya::HashMap<Key, Slot, RandomState>,
    segments: Box<[Segment]>,
    changes: Changes,
    filters: Filters,
    /// Every key of the store is in the map or in the filters.
    is_loaded: AtomicBool,
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
        let filter_bytes = (bytes_max / FILTER_SHARE).min(FILTER_BYTES_MAX);
        Self::with_room(bytes_max - 2 * filter_bytes, filter_bytes)
    }

    fn with_room(bytes_max: u64, filter_bytes: u64) -> Self {
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
            filters: Filters::new(filter_bytes),
            is_loaded: AtomicBool::new(false),
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

    /// As `fill`, but never evicts, and says why not.
    pub(crate) fn load(&self, key: &[u8], ticket: FillTicket, entry: Arc<Entry>) -> Loaded {
        let hash = self.changes.hash(key);
        let cost = entry.cost(key);
        let segment = self.segment(hash);
        let mut queues = segment.queues.lock();
        if self.map.pin().contains_key(key) {
            return Loaded::Kept;
        }
        if !self.changes.none_since(hash, ticket) {
            return Loaded::Changed;
        }
        if !self.take_room(cost) {
            self.filters.insert(hash);
            return Loaded::Full;
        }
        self.insert(segment, &mut queues, key, hash, entry, cost);
        Loaded::Kept
    }

    /// Remembers that the store has this key, if memory has not.
    pub(crate) fn note_stored(&self, key: &[u8]) {
        // Who evicts it after this look remembers it too.
        if !self.map.pin().contains_key(key) {
            self.filters.insert(self.changes.hash(key));
        }
    }

    /// Ends a pass that loaded or noted every key of the store: from now on a key that is neither
    /// in memory nor in the filters is `Absent`.
    pub(crate) fn loaded(&self) {
        self.is_loaded.store(true, Ordering::SeqCst);
    }

    /// Whether the filter holds so many keys that the store no longer has that it is worth to read
    /// the store's keys for another one.
    pub(crate) fn filter_is_worn(&self) -> bool {
        self.is_loaded.load(Ordering::SeqCst) && self.filters.is_worn()
    }

    /// Begins to fill another filter: note all keys of the store, as of a moment after this, by the
    /// guard. `None` if somebody else is at it, or nothing was ever put in.
    pub(crate) fn rebuild_filter(&self) -> Option<FilterRebuild<'_>> {
        if !self.filters.begin_rebuild() {
            return None;
        }
        // Who evicts a key does so under a segment's lock: whoever knew of one filter only is
        // through when each was free once, and what comes to the store later goes into both.
        for segment in &self.segments {
            drop(segment.queues.lock());
        }
        Some(FilterRebuild {
            memory: self,
            has_all: false,
        })
    }

    /// What the entries count for, room reserved by fills under way included, and the filters.
    pub(crate) fn bytes(&self) -> u64 {
        self.entry_bytes() + self.filters.bytes()
    }

    fn entry_bytes(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst)
    }

    pub(crate) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// Entries evicted since the start.
    pub(crate) fn evicted_total(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    fn look_up(&self, key: &[u8], found: impl FnOnce(&Slot)) -> Lookup {
        // Before the map: what is loaded after it was asked says nothing of what it had.
        let is_loaded = self.is_loaded.load(Ordering::SeqCst);
        let map = self.map.pin();
        if let Some(slot) = map.get(key) {
            // A slot without entry is on its way out of the map, by then already removed.
            if let Some(entry) = slot.entry.load_full() {
                found(slot);
                return Lookup::Found(entry);
            }
        }
        let hash = self.changes.hash(key);
        match is_loaded && !self.filters.may_have(hash) {
            true => Lookup::Absent,
            false => Lookup::Unknown(self.changes.ticket(hash)),
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
            self.filters.insert(hash);
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
        while self.entry_bytes() > self.bytes_max && self.evict_one() {}
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
        self.filters.insert(victim.hash);
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

/// A filter that is being filled from the store; thrown away unless it is finished.
pub(crate) struct FilterRebuild<'m> {
    memory: &'m Memory,
    has_all: bool,
}

impl FilterRebuild<'_> {
    /// The store has this key. Memory may have it too: a reader may have asked the map before it
    /// came there, and asks the new filter.
    pub(crate) fn note_stored(&self, key: &[u8]) {
        self.memory
            .filters
            .insert_stored(self.memory.changes.hash(key));
    }

    /// All keys were noted.
    pub(crate) fn finish(mut self) {
        self.has_all = true;
    }
}

impl Drop for FilterRebuild<'_> {
    fn drop(&mut self) {
        self.memory.filters.end_rebuild(self.has_all);
    }
}
