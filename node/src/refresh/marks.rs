//! When keys were read last: what the leader compares with their last refresh, and what every node
//! tells the next leader; and on a follower what it reports.
//!
//! Promises a hot path that takes no lock twice in a tick for the same key, never waits for one,
//! and never allocates for a key that is already marked; and bounded memory. A mark may be lost,
//! when a lock is contended or memory is full: then the key is refreshed when its next reader finds
//! it due, and not before. Must never know shards, policies or a clock.

use std::{
    collections::{HashMap, HashSet},
    sync::atomic::{AtomicU64, Ordering},
};

use bytes::Bytes;
use holdfast_proto::{Key, timeline::Millis};
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

const STRIPES: usize = 64;
/// Marked keys a stripe holds twice, before it forgets the older half: together a million keys in
/// about 40 MiB.
const MARKED_MAX: usize = 8 * 1024;
/// Keys of each kind that a stripe holds for the next report.
const REPORTED_MAX: usize = 1024;
/// Keys read just now are known in so many places.
const RECENT: usize = 4096;
/// Bits of a recent word that tell the tick and the kind; the others are the key's.
const RECENT_LOW_BITS: u64 = 0xffff;

/// A key by its hash: two keys that share one share a mark, which costs a refresh at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hashed(pub(crate) u64);

pub(crate) struct Marks {
    tick: AtomicU64,
    /// One word a place: the last key read there, in which tick, and whether it was due.
    recent: Box<[AtomicU64]>,
    stripes: Box<[Mutex<Stripe>]>,
    dropped: AtomicU64,
}

/// What a follower tells its leader.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) read: Vec<Key>,
    pub(crate) due: Vec<Key>,
}

#[derive(Default)]
struct Stripe {
    /// When read, by the key's hash.
    marked: HashMap<u64, Millis>,
    /// Marked longer ago; forgotten when `marked` is full.
    marked_before: HashMap<u64, Millis>,
    read: Reported,
    due: Reported,
}

/// Keys for the next report, so many and no more.
#[derive(Default)]
struct Reported(HashSet<Key>);

impl Hashed {
    pub(crate) fn of(key: &[u8]) -> Self {
        Self(xxh3_64(key))
    }

    /// A number of the key's own below `bound`, another for each `seed`.
    pub(crate) fn spread(key: &[u8], seed: u64, bound: u64) -> u64 {
        xxhash_rust::xxh3::xxh3_64_with_seed(key, seed) % bound.max(1)
    }

    fn stripe(self) -> usize {
        (self.0 >> 32) as usize % STRIPES
    }
}

impl Default for Marks {
    fn default() -> Self {
        Self {
            tick: AtomicU64::new(1),
            recent: (0..RECENT).map(|_| AtomicU64::new(0)).collect(),
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            dropped: AtomicU64::new(0),
        }
    }
}

impl Marks {
    /// From here on keys count as read again.
    pub(crate) fn tick(&self) {
        self.tick.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the same was noted in this tick; notes it.
    pub(crate) fn is_repeated(&self, key: Hashed, due: bool) -> bool {
        let tick = self.tick.load(Ordering::Relaxed);
        let word = (key.0 & !RECENT_LOW_BITS) | ((tick << 1 | u64::from(due)) & RECENT_LOW_BITS);
        let place = &self.recent[key.0 as usize % RECENT];
        // Compared before it is written: readers of one hot key share the cache line and do not
        // fight for it.
        if place.load(Ordering::Relaxed) == word {
            return true;
        }
        place.store(word, Ordering::Relaxed);
        false
    }

    /// Read at `at`. Never waits.
    pub(crate) fn try_mark(&self, key: Hashed, at: Millis) {
        match self.stripes[key.stripe()].try_lock() {
            Some(mut stripe) => stripe.mark(key, at),
            None => self.drop_one(),
        }
    }

    /// The same of another node's readers.
    pub(crate) fn mark(&self, key: Hashed, at: Millis) {
        self.stripes[key.stripe()].lock().mark(key, at);
    }

    /// Marked here, and told to the leader with the next report. Never waits.
    pub(crate) fn try_report(&self, hashed: Hashed, key: &[u8], due: bool, at: Millis) {
        let is_kept = self.stripes[hashed.stripe()]
            .try_lock()
            .is_some_and(|mut stripe| stripe.report(hashed, key, due, at));
        if !is_kept {
            self.drop_one();
        }
    }

    /// Nothing follows from one read.
    pub(crate) fn drop_one(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// As a reader would who finds it due, but never lost to another's lock: what was invalidated
    /// has to be refreshed though nobody reads it.
    pub(crate) fn report_due(&self, key: &[u8], at: Millis) {
        let hashed = Hashed::of(key);
        let is_kept = self.stripes[hashed.stripe()]
            .lock()
            .report(hashed, key, true, at);
        if !is_kept {
            self.drop_one();
        }
    }

    /// A report that reached nobody goes with the next one, as far as there is room.
    pub(crate) fn put_back(&self, report: Report) {
        for key in report.due {
            self.stripes[Hashed::of(&key).stripe()]
                .lock()
                .due
                .insert_if_room(key);
        }
        for key in report.read {
            self.stripes[Hashed::of(&key).stripe()]
                .lock()
                .read
                .insert_if_room(key);
        }
    }

    /// When the key was read last, as far as it is known.
    pub(crate) fn read_at(&self, key: Hashed) -> Option<Millis> {
        let stripe = self.stripes[key.stripe()].lock();
        let known = stripe.marked.get(&key.0);
        known.or_else(|| stripe.marked_before.get(&key.0)).copied()
    }

    /// All marks, in as many parts as there are stripes: no lock is held for long.
    pub(crate) fn all(&self) -> impl Iterator<Item = Vec<(Hashed, Millis)>> {
        self.stripes.iter().map(|stripe| {
            let stripe = stripe.lock();
            let older = stripe
                .marked_before
                .iter()
                .filter(|(key, _)| !stripe.marked.contains_key(key));
            let all = stripe.marked.iter().chain(older);
            all.map(|(&key, &at)| (Hashed(key), at)).collect()
        })
    }

    /// What was noted since the last one: what is due, and if `all` what was read.
    pub(crate) fn take_report(&self, all: bool) -> Report {
        let mut report = Report::default();
        for stripe in &self.stripes {
            let mut stripe = stripe.lock();
            report.due.extend(stripe.due.0.drain());
            if all {
                report.read.extend(stripe.read.0.drain());
            }
        }
        report
    }
}

impl Stripe {
    fn mark(&mut self, key: Hashed, at: Millis) {
        if self.marked.len() >= MARKED_MAX && !self.marked.contains_key(&key.0) {
            self.marked_before = std::mem::take(&mut self.marked);
        }
        let known = self.marked.entry(key.0).or_insert(at);
        *known = at.max(*known);
    }

    /// False if there is no room for it.
    fn report(&mut self, hashed: Hashed, key: &[u8], due: bool, at: Millis) -> bool {
        self.mark(hashed, at);
        let keys = if due { &mut self.due } else { &mut self.read };
        keys.0.contains(key) || own_key(key).is_some_and(|key| keys.insert_if_room(key))
    }
}

impl Reported {
    fn insert_if_room(&mut self, key: Key) -> bool {
        let has_room = self.0.len() < REPORTED_MAX;
        if has_room {
            self.0.insert(key);
        }
        has_room
    }
}

/// A reader's key may be a slice of a whole message, which must not live as long as the mark.
pub(super) fn own_key(key: &[u8]) -> Option<Key> {
    Key::new(Bytes::copy_from_slice(key)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashed(n: usize) -> Hashed {
        Hashed::of(&n.to_be_bytes())
    }

    #[test]
    fn a_read_counts_once_a_tick_and_a_due_one_beside_it() {
        let marks = Marks::default();
        assert!(!marks.is_repeated(hashed(1), false));
        assert!(marks.is_repeated(hashed(1), false));
        assert!(!marks.is_repeated(hashed(1), true));
        assert!(marks.is_repeated(hashed(1), true));
        marks.tick();
        assert!(!marks.is_repeated(hashed(1), true));
    }

    #[test]
    fn the_last_read_counts_in_whatever_order_reads_are_told() {
        let marks = Marks::default();
        assert_eq!(marks.read_at(hashed(1)), None);
        marks.try_mark(hashed(1), 2_000);
        marks.mark(hashed(1), 1_000);
        assert_eq!(marks.read_at(hashed(1)), Some(2_000));
        marks.try_report(hashed(2), &2usize.to_be_bytes(), false, 3_000);
        let mut all: Vec<_> = marks.all().flatten().map(|(_, at)| at).collect();
        all.sort_unstable();
        assert_eq!(all, [2_000, 3_000]);
    }

    #[test]
    fn what_is_invalidated_is_reported_though_its_read_was_just_now() {
        let marks = Marks::default();
        let key = 1usize.to_be_bytes();
        assert!(!marks.is_repeated(hashed(1), true));
        marks.try_report(hashed(1), &key, true, 1);
        assert_eq!(marks.take_report(false).due.len(), 1);
        assert!(marks.is_repeated(hashed(1), true));
        marks.report_due(&key, 2);
        assert_eq!(marks.take_report(false).due.len(), 1);
    }

    #[test]
    fn marks_are_bounded_and_the_newest_stay() {
        let marks = Marks::default();
        let many = 4 * STRIPES * MARKED_MAX;
        (0..many).for_each(|n| marks.mark(hashed(n), 1));
        let kept: usize = marks
            .stripes
            .iter()
            .map(|stripe| {
                let stripe = stripe.lock();
                stripe.marked.len() + stripe.marked_before.len()
            })
            .sum();
        assert!(kept <= 2 * STRIPES * MARKED_MAX, "{kept}");
        assert!((many - 1000..many).all(|n| marks.read_at(hashed(n)).is_some()));
        assert!(marks.read_at(hashed(0)).is_none());
    }

    #[test]
    fn reports_are_bounded_deduplicated_and_due_ones_come_sooner() {
        let marks = Marks::default();
        for n in 0..3 * STRIPES * REPORTED_MAX {
            let key = n.to_be_bytes();
            marks.try_report(Hashed::of(&key), &key, false, 1);
            marks.try_report(Hashed::of(&key), &key, n % 2 == 0, 1);
        }
        assert!(marks.dropped() > 0);
        let soon = marks.take_report(false);
        assert!(
            soon.read.is_empty()
                && !soon.due.is_empty()
                && soon.due.len() <= STRIPES * REPORTED_MAX
        );
        let all = marks.take_report(true);
        assert!(all.due.is_empty() && all.read.len() <= STRIPES * REPORTED_MAX);
        let unique: HashSet<_> = all.read.iter().cloned().collect();
        assert_eq!(unique.len(), all.read.len());
        assert!(marks.take_report(true).read.is_empty());
        marks.put_back(Report {
            read: all.read.clone(),
            due: soon.due,
        });
        marks.put_back(Report {
            read: all.read,
            due: Vec::new(),
        });
        let again = marks.take_report(true);
        assert_eq!(
            (again.read.len(), again.due.is_empty()),
            (unique.len(), false)
        );
    }
}
