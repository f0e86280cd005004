//! Which keys the store may have and memory has not: what makes a look-up that finds nothing
//! certain without a read of the disk.
//!
//! A split-block Bloom filter (Putze, Sanders, Singler 2007; the blocks of Parquet): one key sets
//! one bit in each of the eight words of one block, so that a question touches one cache line. Ten
//! bits a key give one false "maybe" in about a hundred.
//!
//! Promises: a key that was put in is found from then on, whatever else happens. Bits are never
//! taken back, so keys that were deleted since wear it out; then another one is filled from the
//! store while both take what is new, and takes its place (`Filters`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use parking_lot::Mutex;

/// Odd, so that each spreads the bits of a hash in its own way; those that Parquet uses.
const SALTS: [u32; 8] = [
    0x47b6_137b,
    0x4497_4d91,
    0x8824_ad5b,
    0xa2b7_289d,
    0x7054_95c7,
    0x2df1_424b,
    0x9efc_4947,
    0x5c6b_fb31,
];
const BLOCK_BYTES: u64 = size_of::<Block>() as u64;
/// A filter with more of its bits set answers "maybe" too often: at this share, to one key in 60.
const WORN_PERCENT: u64 = 60;

#[derive(Default)]
#[repr(align(32))]
struct Block([AtomicU32; 8]);

/// Without blocks it has no key.
#[derive(Default)]
struct Filter {
    blocks: Box<[Block]>,
    /// Bits that are set.
    ones: AtomicU64,
}

impl Filter {
    fn of_bytes(bytes: u64) -> Self {
        let blocks = (bytes / BLOCK_BYTES).max(1);
        Self {
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            ones: AtomicU64::new(0),
        }
    }

    fn bytes(&self) -> u64 {
        self.blocks.len() as u64 * BLOCK_BYTES
    }

    fn bits(&self) -> u64 {
        self.bytes() * 8
    }

    /// Whoever sees what the caller does afterwards, sees this.
    fn insert(&self, hash: u64) {
        let block = &self.blocks[self.block(hash)];
        for (word, bit) in block.0.iter().zip(bits(hash)) {
            // A word that readers share is written only if it changes.
            if word.load(Ordering::Acquire) & bit == 0
                && word.fetch_or(bit, Ordering::AcqRel) & bit == 0
            {
                self.ones.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn may_have(&self, hash: u64) -> bool {
        if self.blocks.is_empty() {
            return false;
        }
        let block = &self.blocks[self.block(hash)];
        let mut words = block.0.iter().zip(bits(hash));
        words.all(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// By the upper half of the hash; the bits are by the lower one.
    fn block(&self, hash: u64) -> usize {
        (((hash >> 32) * self.blocks.len() as u64) >> 32) as usize
    }
}

fn bits(hash: u64) -> [u32; 8] {
    SALTS.map(|salt| 1 << ((hash as u32).wrapping_mul(salt) >> 27))
}

/// The filter in use, and the one that is being filled to take its place.
pub(super) struct Filters {
    /// Of one filter; there may be two.
    bytes: u64,
    now: ArcSwap<Pair>,
    /// Held by whoever changes which filters there are.
    changing: Mutex<Rebuilt>,
}

#[derive(Default)]
struct Pair {
    current: Arc<Filter>,
    next: Option<Arc<Filter>>,
}

/// What the last rebuild came to.
#[derive(Default)]
struct Rebuilt {
    /// Bits that were set when it ended.
    ones: u64,
}

impl Filters {
    /// Two of so many bytes at most; none before there is a key to remember.
    pub(super) fn new(bytes: u64) -> Self {
        Self {
            bytes,
            now: ArcSwap::default(),
            changing: Mutex::default(),
        }
    }

    /// What they take now.
    pub(super) fn bytes(&self) -> u64 {
        let now = self.now.load();
        now.current.bytes() + now.next.as_ref().map_or(0, |next| next.bytes())
    }

    pub(super) fn insert(&self, hash: u64) {
        let mut now = self.now.load();
        if now.current.blocks.is_empty() {
            self.begin();
            now = self.now.load();
        }
        now.current.insert(hash);
        if let Some(next) = &now.next {
            next.insert(hash);
        }
    }

    /// Ask it after the map.
    pub(super) fn may_have(&self, hash: u64) -> bool {
        self.now.load().current.may_have(hash)
    }

    /// Whether another filter, filled from the store, is worth its read: not again before half of
    /// what the last one left unset is set.
    pub(super) fn is_worn(&self) -> bool {
        let now = self.now.load();
        let (ones, bits) = (now.current.ones.load(Ordering::Relaxed), now.current.bits());
        // Cheap in the usual case: the lock only for a filter that is full enough.
        now.next.is_none() && ones * 100 > bits * WORN_PERCENT && {
            let left_by_rebuild = self.changing.lock().ones;
            ones > left_by_rebuild + (bits - left_by_rebuild) / 2
        }
    }

    /// From now on both take what is put in. Who has put a key into one only must be through
    /// before the store is read: the caller sees to that. False if somebody else is at it, or there
    /// is nothing to take the place of.
    pub(super) fn begin_rebuild(&self) -> bool {
        let _changing = self.changing.lock();
        let now = self.now.load_full();
        if now.next.is_some() || now.current.blocks.is_empty() {
            return false;
        }
        self.now.store(Arc::new(Pair {
            current: now.current.clone(),
            next: Some(Arc::new(Filter::of_bytes(self.bytes))),
        }));
        true
    }

    /// Into the one being filled.
    pub(super) fn insert_stored(&self, hash: u64) {
        if let Some(next) = &self.now.load().next {
            next.insert(hash);
        }
    }

    /// The new one takes the old one's place if it has all keys, else it goes.
    pub(super) fn end_rebuild(&self, has_all: bool) {
        let mut changing = self.changing.lock();
        let now = self.now.load_full();
        let Some(next) = &now.next else { return };
        let current = if has_all { next } else { &now.current };
        changing.ones = current.ones.load(Ordering::Relaxed);
        self.now.store(Arc::new(Pair {
            current: current.clone(),
            next: None,
        }));
    }

    fn begin(&self) {
        let _changing = self.changing.lock();
        let now = self.now.load_full();
        if now.current.blocks.is_empty() {
            self.now.store(Arc::new(Pair {
                current: Arc::new(Filter::of_bytes(self.bytes)),
                next: now.next.clone(),
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher as _, RandomState};

    use super::*;

    #[test]
    fn a_key_that_was_put_in_is_found_and_few_others_are() {
        const KEYS: u64 = 100_000;
        let hasher = RandomState::new();
        let filters = Filters::new(KEYS * 10 / 8);
        assert!(!filters.may_have(hasher.hash_one(0)));
        assert_eq!(filters.bytes(), 0, "nothing to remember yet");
        (0..KEYS).for_each(|key| filters.insert(hasher.hash_one(key)));
        assert!((0..KEYS).all(|key| filters.may_have(hasher.hash_one(key))));
        let wrong = (KEYS..2 * KEYS)
            .filter(|key| filters.may_have(hasher.hash_one(key)))
            .count();
        assert!(wrong < KEYS as usize / 33, "{wrong} of {KEYS}");
        assert!(filters.bytes() <= KEYS * 10 / 8);
    }

    #[test]
    fn a_worn_filter_is_rebuilt_and_what_comes_meanwhile_is_in_the_new_one() {
        let hasher = RandomState::new();
        let hash = |key: u64| hasher.hash_one(key);
        let filters = Filters::new(1_024);
        assert!(!filters.is_worn());
        (0..10_000).for_each(|key| filters.insert(hash(key)));
        assert!(filters.is_worn());

        assert!(filters.begin_rebuild());
        assert!(!filters.begin_rebuild() && !filters.is_worn());
        filters.insert(hash(20_000));
        (0..100).for_each(|key| filters.insert_stored(hash(key)));
        assert!(filters.may_have(hash(9_000)), "the old one is in use");
        filters.end_rebuild(true);
        assert!(
            (0..100)
                .chain([20_000])
                .all(|key| filters.may_have(hash(key)))
        );
        let wrong = (100..10_000)
            .filter(|&key| filters.may_have(hash(key)))
            .count();
        assert!(wrong < 500, "{wrong}");
        assert!(!filters.is_worn() && filters.bytes() <= 1_024);
    }

    #[test]
    fn a_rebuild_that_was_broken_off_changes_nothing() {
        let hasher = RandomState::new();
        let filters = Filters::new(1_024);
        filters.insert(hasher.hash_one(1));
        assert!(filters.begin_rebuild());
        filters.end_rebuild(false);
        assert!(filters.may_have(hasher.hash_one(1)));
        assert!(filters.begin_rebuild(), "it can be tried again");
    }

    #[test]
    fn a_store_of_too_many_keys_is_not_read_again_and_again() {
        let hasher = RandomState::new();
        let filters = Filters::new(1_024);
        (0..10_000).for_each(|key| filters.insert(hasher.hash_one(key)));
        assert!(filters.begin_rebuild());
        (0..2_000).for_each(|key| filters.insert_stored(hasher.hash_one(key)));
        filters.end_rebuild(true);
        assert!(!filters.is_worn());
        (10_000..10_010).for_each(|key| filters.insert(hasher.hash_one(key)));
        assert!(!filters.is_worn());
        (10_000..20_000).for_each(|key| filters.insert(hasher.hash_one(key)));
        assert!(filters.is_worn());
    }
}
