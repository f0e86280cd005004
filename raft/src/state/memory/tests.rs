//! The memory tier held to what readers rely on, and to a model of it under random histories.

use std::collections::HashMap;
use std::sync::Weak;
use std::sync::atomic::AtomicBool;

use holdfast_proto::peer::EntryRecord;
use proptest::prelude::*;

use super::*;

const UNBOUNDED: u64 = 1 << 40;
/// Enough for what the tests evict.
const FILTER_BYTES: u64 = 1 << 16;

fn key(number: usize) -> Key {
    Key::new(format!("key{number}")).unwrap()
}

fn entry(version: u64, size: usize) -> Arc<Entry> {
    Arc::new(Entry::new(
        EntryRecord {
            version,
            ..EntryRecord::default()
        },
        vec![7; size],
    ))
}

/// With room for so many entries with values of so many bytes under `key`.
fn with_room(entries: u64, size: usize) -> Memory {
    Memory::with_room(room_of(entries, size), FILTER_BYTES)
}

fn room_of(entries: u64, size: usize) -> u64 {
    entries * entry(0, size).cost(&key(100))
}

fn found(memory: &Memory, key: &Key) -> Option<u64> {
    match memory.peek(key) {
        Lookup::Found(entry) => Some(entry.record.version),
        Lookup::Absent | Lookup::Unknown(_) => None,
    }
}

fn is_absent(memory: &Memory, key: &Key) -> bool {
    matches!(memory.peek(key), Lookup::Absent)
}

fn of_another_stripe(memory: &Memory, keys: &[Key]) -> Key {
    let apart = |candidate: &Key| {
        keys.iter()
            .all(|key| stripe(memory.changes.hash(key)) != stripe(memory.changes.hash(candidate)))
    };
    (1_000..).map(key).find(apart).unwrap()
}

/// Over a store that is known to be empty.
fn loaded(memory: Memory) -> Memory {
    memory.loaded();
    memory
}

#[test]
fn absent_is_certain_only_after_loading() {
    let memory = Memory::with_room(UNBOUNDED, FILTER_BYTES);
    assert!(!is_absent(&memory, &key(1)));
    assert_eq!(
        memory.load(&key(2), memory.ticket(&key(2)), entry(5, 10)),
        Loaded::Kept
    );
    assert!(!is_absent(&memory, &key(1)));
    memory.loaded();
    assert!(is_absent(&memory, &key(1)));
    assert_eq!(found(&memory, &key(2)), Some(5));
}

#[test]
fn loading_never_goes_back_behind_apply() {
    let memory = Memory::with_room(UNBOUNDED, FILTER_BYTES);
    let other = of_another_stripe(&memory, &[key(1), key(2)]);
    let tickets = [&key(1), &key(2), &other].map(|key| memory.ticket(key));
    memory.apply([(key(1), Some(entry(2, 10))), (key(2), None)]);
    assert_eq!(memory.load(&key(1), tickets[0], entry(1, 10)), Loaded::Kept);
    assert_eq!(
        memory.load(&key(2), tickets[1], entry(1, 10)),
        Loaded::Changed
    );
    assert_eq!(memory.load(&other, tickets[2], entry(1, 10)), Loaded::Kept);
    memory.loaded();
    assert_eq!(
        (found(&memory, &key(1)), found(&memory, &other)),
        (Some(2), Some(1))
    );
    assert!(is_absent(&memory, &key(2)));
}

#[test]
fn loading_fills_without_evicting_and_remembers_what_found_no_room() {
    let memory = with_room(2, 10);
    let outcomes =
        [100, 101, 102].map(|n| memory.load(&key(n), memory.ticket(&key(n)), entry(1, 10)));
    assert_eq!(outcomes, [Loaded::Kept, Loaded::Kept, Loaded::Full]);
    memory.note_stored(&key(103));
    memory.loaded();
    assert!([102, 103].iter().all(|&n| !is_absent(&memory, &key(n))));
    assert!(is_absent(&memory, &key(104)));
    assert_eq!((memory.entries(), memory.evicted_total()), (2, 0));
}

#[test]
fn a_miss_for_an_absent_key_needs_no_disk_after_evictions() {
    let memory = loaded(with_room(10, 10));
    memory.apply((0..1_000).map(|n| (key(n), Some(entry(1, 10)))));
    assert_eq!(memory.evicted_total(), 990);
    assert!((0..1_000).all(|n| !is_absent(&memory, &key(n))));
    let absent = (1_000..11_000).filter(|n| is_absent(&memory, &key(*n)));
    assert!(absent.count() > 9_900);
}

#[test]
fn a_filter_worn_out_by_keys_that_are_gone_is_renewed_from_the_store() {
    let memory = loaded(Memory::with_room(room_of(10, 10), 256));
    for n in 0..2_000 {
        memory.apply([(key(n), Some(entry(1, 10)))]);
    }
    // Of all these the store has the last 100.
    assert!(memory.filter_is_worn());
    let rebuild = memory.rebuild_filter().unwrap();
    (1_900..2_000).for_each(|n| rebuild.note_stored(&key(n)));
    // What is only in memory now is evicted while the other filter is filled.
    memory.apply((2_000..2_020).map(|n| (key(n), Some(entry(1, 10)))));
    rebuild.finish();
    assert!((1_900..2_020).all(|n| !is_absent(&memory, &key(n))));
    assert!((0..1_900).filter(|n| is_absent(&memory, &key(*n))).count() > 1_700);
    assert!(!memory.filter_is_worn());
}

#[test]
fn a_fill_loses_to_any_change_since_its_ticket() {
    let memory = Memory::with_room(UNBOUNDED, FILTER_BYTES);
    let ticket = memory.ticket(&key(1));
    memory.apply([(key(1), Some(entry(2, 10))), (key(1), None)]);
    assert!(
        !memory.fill(&key(1), ticket, entry(1, 10)),
        "set and deleted since"
    );
    assert!(memory.fill(&key(1), memory.ticket(&key(1)), entry(3, 10)));
    assert!(
        !memory.fill(&key(1), memory.ticket(&key(1)), entry(1, 10)),
        "it is there"
    );
    assert_eq!(found(&memory, &key(1)), Some(3));
    assert_eq!(
        memory.bytes(),
        entry(3, 10).cost(&key(1)),
        "refused fills give their room back"
    );
}

#[test]
fn a_fill_loses_to_an_eviction_since_its_ticket() {
    let memory = with_room(1, 10);
    let ticket = memory.ticket(&key(100));
    assert!(memory.fill(&key(100), memory.ticket(&key(100)), entry(5, 10)));
    memory.apply([(key(101), Some(entry(1, 10)))]);
    assert_eq!(memory.evicted_total(), 1);
    assert!(
        !memory.fill(&key(100), ticket, entry(4, 10)),
        "a reader may have seen version 5"
    );
}

#[test]
fn what_was_evicted_is_not_absent() {
    let memory = loaded(with_room(2, 10));
    memory.apply([
        (key(100), Some(entry(1, 10))),
        (key(101), Some(entry(2, 10))),
    ]);
    assert!(is_absent(&memory, &key(102)));
    memory.apply([(key(102), Some(entry(3, 10)))]);
    assert_eq!((memory.entries(), memory.evicted_total()), (2, 1));
    assert!(matches!(memory.get(&key(100)), Lookup::Unknown(_)));
}

#[test]
fn an_entry_over_the_whole_budget_is_not_kept_and_not_denied() {
    let memory = loaded(with_room(2, 10));
    memory.apply([
        (key(100), Some(entry(1, 10))),
        (key(101), Some(entry(2, 10))),
    ]);
    memory.apply([(key(100), Some(entry(3, 10_000)))]);
    assert!(matches!(memory.get(&key(100)), Lookup::Unknown(_)));
    assert!(!memory.fill(&key(100), memory.ticket(&key(100)), entry(3, 10_000)));
    assert_eq!(
        (
            memory.entries(),
            found(&memory, &key(101)),
            memory.evicted_total()
        ),
        (1, Some(2), 0)
    );
}

#[test]
fn an_entry_larger_than_a_segments_share_is_kept() {
    let memory = loaded(Memory::with_room(16 * SEGMENT_BYTES, FILTER_BYTES));
    assert_eq!(memory.segments.len(), 16);
    memory.apply((0..20).map(|n| (key(n), Some(entry(1, 2 * SEGMENT_BYTES as usize)))));
    assert!(memory.entry_bytes() <= memory.bytes_max);
    assert_eq!(memory.entries(), 7, "as many as fit with their overhead");
    assert_eq!(memory.evicted_total(), 13);
}

#[test]
fn values_are_freed_at_once_when_their_entry_goes() {
    let memory = with_room(2, 10);
    let put = |n: usize| -> Weak<Entry> {
        let entry = entry(1, 10);
        let weak = Arc::downgrade(&entry);
        memory.apply([(key(n), Some(entry))]);
        weak
    };
    let overwritten = put(100);
    let removed = put(100);
    assert!(overwritten.upgrade().is_none());
    memory.apply([(key(100), None)]);
    assert!(removed.upgrade().is_none());
    let (evicted, kept) = (put(101), put(102));
    put(103);
    assert!(evicted.upgrade().is_none());
    assert!(kept.upgrade().is_some());
}

#[test]
fn a_key_rewritten_for_ever_leaves_nothing_behind() {
    let memory = loaded(Memory::with_room(UNBOUNDED, FILTER_BYTES));
    for version in 0..10_000 {
        memory.apply([(key(1), Some(entry(version, version as usize % 100)))]);
        if version % 3 == 0 {
            memory.apply([(key(1), None)]);
        }
    }
    memory.apply([(key(1), Some(entry(1, 10)))]);
    assert_eq!(
        (memory.entries(), memory.bytes()),
        (1, entry(1, 10).cost(&key(1)))
    );
    assert_eq!(
        memory
            .segments
            .iter()
            .map(|segment| segment.queues.lock().len())
            .sum::<usize>(),
        1
    );
}

#[test]
fn overwriting_a_key_keeps_its_standing() {
    let memory = with_room(3, 10);
    memory.apply((100..103).map(|n| (key(n), Some(entry(1, 10)))));
    (0..2).for_each(|_| drop(memory.get(&key(100))));
    memory.apply([
        (key(100), Some(entry(2, 10))),
        (key(103), Some(entry(1, 10))),
    ]);
    assert_eq!(found(&memory, &key(100)), Some(2), "it was read twice");
    assert_eq!(found(&memory, &key(101)), None);
}

#[test]
fn a_scan_of_keys_read_once_does_not_evict_what_is_read_repeatedly() {
    let memory = with_room(100, 10);
    memory.apply((100..150).map(|n| (key(n), Some(entry(1, 10)))));
    for n in 200..10_000 {
        if n % 20 == 0 {
            (100..150).for_each(|hot| drop(memory.get(&key(hot))));
        }
        memory.fill(&key(n), memory.ticket(&key(n)), entry(1, 10));
    }
    assert!(memory.evicted_total() > 9_000);
    assert_eq!(
        (100..150)
            .filter(|n| found(&memory, &key(*n)).is_some())
            .count(),
        50
    );
}

#[test]
fn peek_does_not_keep_a_key() {
    let memory = with_room(2, 10);
    memory.apply((100..102).map(|n| (key(n), Some(entry(1, 10)))));
    (0..5).for_each(|_| drop(memory.peek(&key(100))));
    memory.apply([(key(102), Some(entry(1, 10)))]);
    assert_eq!(
        (found(&memory, &key(100)), found(&memory, &key(101))),
        (None, Some(1))
    );
}

#[test]
fn segments_stay_of_a_size_under_eviction() {
    let memory = Memory::with_room(4 * SEGMENT_BYTES, FILTER_BYTES);
    memory.apply((0..60_000).map(|n| (key(n), Some(entry(1, 1_000)))));
    let sizes: Vec<u64> = memory
        .segments
        .iter()
        .map(|segment| segment.queues.lock().bytes())
        .collect();
    assert_eq!(sizes.iter().sum::<u64>(), memory.entry_bytes());
    assert!(memory.evicted_total() > 40_000);
    assert!(
        sizes
            .iter()
            .all(|size| size.abs_diff(SEGMENT_BYTES) < SEGMENT_BYTES / 10),
        "{sizes:?}"
    );
}

#[derive(Debug, Clone)]
enum Step {
    Set {
        key: usize,
        size: usize,
    },
    Delete {
        key: usize,
    },
    Read {
        key: usize,
    },
    /// A reader that missed goes to the store …
    Fetch {
        key: usize,
    },
    /// … and puts what it found, any time later.
    Fill {
        reader: usize,
    },
    /// A whole pass over the store.
    Load,
    /// Another one, for the filter.
    Renew,
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..12usize;
    prop_oneof![
        6 => (key.clone(), 0..3_000usize).prop_map(|(key, size)| Step::Set { key, size }),
        2 => key.clone().prop_map(|key| Step::Delete { key }),
        4 => key.clone().prop_map(|key| Step::Read { key }),
        4 => key.prop_map(|key| Step::Fetch { key }),
        4 => (0..8usize).prop_map(|reader| Step::Fill { reader }),
        1 => Just(Step::Load),
        1 => Just(Step::Renew),
    ]
}

/// Plays the steps on a memory and on a map that stands for the store, and compares after each.
fn play(memory: &Memory, steps: Vec<Step>) {
    let mut store: HashMap<usize, Arc<Entry>> = HashMap::new();
    let mut fetched: Vec<(usize, FillTicket, Arc<Entry>)> = Vec::new();
    for (version, step) in (1..).zip(steps) {
        match step {
            Step::Set { key: n, size } => {
                store.insert(n, entry(version, size));
                memory.apply([(key(n), store.get(&n).cloned())]);
            }
            Step::Delete { key: n } => {
                store.remove(&n);
                memory.apply([(key(n), None)]);
            }
            Step::Read { key: n } => drop(memory.get(&key(n))),
            Step::Fetch { key: n } => {
                if let (Lookup::Unknown(ticket), Some(entry)) = (memory.get(&key(n)), store.get(&n))
                {
                    fetched.push((n, ticket, entry.clone()));
                }
            }
            Step::Fill { reader } if reader < fetched.len() => {
                let (n, ticket, entry) = fetched.swap_remove(reader);
                memory.fill(&key(n), ticket, entry);
            }
            Step::Fill { .. } => {}
            Step::Load => load_all(memory, &store),
            Step::Renew => {
                let Some(rebuild) = memory.rebuild_filter() else {
                    continue;
                };
                store.keys().for_each(|n| rebuild.note_stored(&key(*n)));
                rebuild.finish();
            }
        }
        compare(memory, &store);
    }
}

fn load_all(memory: &Memory, store: &HashMap<usize, Arc<Entry>>) {
    for (n, entry) in store {
        memory.load(&key(*n), memory.ticket(&key(*n)), entry.clone());
    }
    memory.loaded();
}

fn compare(memory: &Memory, store: &HashMap<usize, Arc<Entry>>) {
    let mut bytes = 0;
    for n in 0..12 {
        match memory.peek(&key(n)) {
            Lookup::Found(entry) => {
                assert!(
                    store
                        .get(&n)
                        .is_some_and(|latest| Arc::ptr_eq(latest, &entry)),
                    "{} is not the latest",
                    key(n)
                );
                bytes += entry.cost(&key(n));
            }
            Lookup::Absent => assert!(!store.contains_key(&n), "{} is in the store", key(n)),
            Lookup::Unknown(_) => {}
        }
    }
    assert_eq!(memory.entry_bytes(), bytes, "every byte is accounted for");
    assert!(bytes <= memory.bytes_max);
}

proptest! {
    #[test]
    fn with_room_for_all_memory_is_the_state(steps in prop::collection::vec(step(), 0..200)) {
        let memory = loaded(Memory::with_room(UNBOUNDED, FILTER_BYTES));
        play(&memory, steps);
        prop_assert!((0..12).all(|n| !matches!(memory.peek(&key(n)), Lookup::Unknown(_))));
    }

    #[test]
    fn with_little_room_memory_never_lies(steps in prop::collection::vec(step(), 0..300), room in 2_000..12_000u64) {
        play(&Memory::with_room(room, 32), steps);
    }
}

const STRESS_KEYS: usize = 64;

/// What the store and the applied state hold of each key: a version, odd while the key is deleted.
struct Versions {
    store: Vec<AtomicU64>,
    applied: Vec<AtomicU64>,
    done: AtomicBool,
}

fn is_alive(version: u64) -> bool {
    version.is_multiple_of(2)
}

/// Ends the other threads, also when this one panics.
struct Done<'a>(&'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// One run after another in the order of the module's documentation.
fn stress_apply(memory: &Memory, versions: &Versions) {
    let _done = Done(&versions.done);
    let mut random = 88_172_645_463_325_252u64;
    for _ in 0..10_000 {
        let mut run = Vec::new();
        for _ in 0..4 {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let n = random as usize % STRESS_KEYS;
            if run.iter().all(|(other, _)| *other != n) {
                let version = versions.store[n].load(Ordering::SeqCst);
                // From alive to the next one alive or deleted, from deleted to alive.
                run.push((
                    n,
                    version
                        + if is_alive(version) && random >> 62 > 0 {
                            2
                        } else {
                            1
                        },
                ));
            }
        }
        for (n, version) in &run {
            versions.store[*n].store(*version, Ordering::SeqCst);
        }
        std::thread::yield_now();
        memory.apply(
            run.iter()
                .map(|(n, version)| (key(*n), is_alive(*version).then(|| entry(*version, 10)))),
        );
        for (n, version) in &run {
            versions.applied[*n].store(*version, Ordering::SeqCst);
        }
    }
}

/// Reads the store for every key that is missing, and only then puts what it read: long after the
/// tickets.
fn stress_fill(memory: &Memory, versions: &Versions) {
    let mut filled = 0;
    while !versions.done.load(Ordering::SeqCst) {
        let mut fetched = Vec::new();
        for n in 0..STRESS_KEYS {
            let Lookup::Unknown(ticket) = memory.peek(&key(n)) else {
                continue;
            };
            let version = versions.store[n].load(Ordering::SeqCst);
            if is_alive(version) {
                fetched.push((key(n), ticket, entry(version, 10)));
            }
        }
        std::thread::yield_now();
        filled += fetched
            .into_iter()
            .filter(|(key, ticket, entry)| memory.fill(key, *ticket, entry.clone()))
            .count();
    }
    assert!(filled > 0);
}

fn stress_read(memory: &Memory, versions: &Versions) {
    let mut seen = [0; STRESS_KEYS];
    while !versions.done.load(Ordering::SeqCst) {
        for (n, seen) in seen.iter_mut().enumerate() {
            let applied = versions.applied[n].load(Ordering::SeqCst);
            match memory.get(&key(n)) {
                Lookup::Found(entry) => {
                    let version = entry.record.version;
                    assert!(
                        version >= *seen,
                        "{} went back from {seen} to {version}",
                        key(n)
                    );
                    assert!(
                        version >= applied,
                        "{} is {version} after {applied} was applied",
                        key(n)
                    );
                    *seen = version;
                }
                Lookup::Unknown(_) => {}
                Lookup::Absent => panic!("memory was never complete"),
            }
        }
        std::thread::yield_now();
    }
}

#[test]
fn readers_never_see_a_key_go_back_while_it_is_applied_filled_and_evicted() {
    let memory = with_room(STRESS_KEYS as u64 / 4, 10);
    let zeros = || (0..STRESS_KEYS).map(|_| AtomicU64::new(0)).collect();
    let versions = Versions {
        store: zeros(),
        applied: zeros(),
        done: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        scope.spawn(|| stress_apply(&memory, &versions));
        for _ in 0..2 {
            scope.spawn(|| stress_fill(&memory, &versions));
            scope.spawn(|| stress_read(&memory, &versions));
        }
    });
    assert!(memory.evicted_total() > 0 && memory.entry_bytes() <= memory.bytes_max);
}

#[test]
fn readers_never_take_a_stored_key_for_absent_while_it_is_loaded_evicted_filled_and_the_filter_renewed()
 {
    const STORED: std::ops::Range<usize> = 100..130;
    // A filter of one block, so that it is worn all the time.
    let memories: Vec<Memory> = (0..200)
        .map(|_| Memory::with_room(room_of(10, 10), 32))
        .collect();
    let now = AtomicUsize::new(0);
    let done = AtomicBool::new(false);
    let renewed = AtomicU64::new(0);
    let memory = || memories.get(now.load(Ordering::SeqCst));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _done = Done(&done);
            for memory in &memories {
                for n in STORED {
                    memory.load(&key(n), memory.ticket(&key(n)), entry(1, 10));
                }
                memory.loaded();
                // All are evicted and filled again, now and then.
                for n in STORED.cycle().take(1_000) {
                    memory.fill(&key(n), memory.ticket(&key(n)), entry(1, 10));
                }
                now.fetch_add(1, Ordering::SeqCst);
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                if let Some(rebuild) = memory().and_then(Memory::rebuild_filter) {
                    STORED.for_each(|n| rebuild.note_stored(&key(n)));
                    rebuild.finish();
                    renewed.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    for (n, memory) in STORED.zip(std::iter::repeat_with(memory)) {
                        let is_absent = memory.is_some_and(|memory| is_absent(memory, &key(n)));
                        assert!(!is_absent, "{} is in the store", key(n));
                    }
                }
            });
        }
    });
    assert!(renewed.load(Ordering::SeqCst) > 0);
}
