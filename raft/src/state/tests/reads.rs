//! What a state reads from its store, and what it spares the disk.

use std::collections::HashMap;

use bytes::Bytes;
use holdfast_proto::Key;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::{
    state::{memory::Lookup, read::after},
    store::{Family, Scan, StateBatch},
};

/// A store that counts what is read of each family, key by key.
struct Counted {
    store: Arc<dyn StateStore>,
    reads: Mutex<HashMap<Family, usize>>,
    /// What each batch wrote, in words.
    batches: Mutex<Vec<String>>,
    /// Rows that were there when a scan began, and are gone when they are looked up.
    gone: &'static [&'static str],
}

impl Counted {
    fn reads(&self, family: Family) -> usize {
        self.reads.lock().get(&family).copied().unwrap_or(0)
    }

    fn count(&self, family: Family, keys: usize) {
        *self.reads.lock().entry(family).or_default() += keys;
    }
}

impl StateStore for Counted {
    fn get(&self, family: Family, key: &[u8]) -> io::Result<Option<Bytes>> {
        self.count(family, 1);
        self.store.get(family, key)
    }

    fn get_many(&self, family: Family, keys: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>> {
        self.count(family, keys.len());
        self.store.get_many(family, keys)
    }

    fn scan<'a>(&'a self, family: Family, from: &[u8], end: Option<&[u8]>) -> Scan<'a> {
        let from = from.to_vec();
        if self.gone.is_empty() {
            return self.store.scan(family, &from, end);
        }
        let rows = self
            .gone
            .iter()
            .filter(move |key| key.as_bytes() >= from.as_slice());
        Box::new(rows.map(|key| Ok((Bytes::from_static(key.as_bytes()), Bytes::new()))))
    }

    fn write(&self, batch: StateBatch) -> io::Result<()> {
        self.batches.lock().push(format!("{batch:?}"));
        self.store.write(batch)
    }

    fn flush(&self) -> io::Result<()> {
        self.store.flush()
    }

    fn checkpoint(&self, dir: &Path) -> io::Result<()> {
        self.store.checkpoint(dir)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        self.store.disk_bytes()
    }

    fn compact(&self) -> io::Result<()> {
        self.store.compact()
    }
}

/// Puts a counted store under a state, with so much memory in front of it.
fn counted(state: &State, memory_bytes: u64, gone: &'static [&'static str]) -> Arc<Counted> {
    let store = Arc::new(Counted {
        store: state.generation().store.clone(),
        reads: Mutex::default(),
        batches: Mutex::default(),
        gone,
    });
    state.generation.store(Arc::new(Generation {
        store: store.clone(),
        memory: Memory::new(memory_bytes),
    }));
    store
}

fn set(key: &str) -> peer::command::Op {
    peer::command::Op::Set(peer::Set {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: format!("value of {key}").into(),
        lifetime: Some(peer::Lifetime::default()),
        ..Default::default()
    })
}

#[tokio::test]
async fn a_scan_goes_on_behind_rows_that_have_gone_since() {
    let state = empty();
    counted(&state, 1 << 20, &["a", "b", "c"]);
    let first = state.scan(b"", b"", 2, Shown::Values).unwrap();
    assert_eq!(
        (first.entries.len(), first.next),
        (0, Some(after(b"b"))),
        "the rows go on behind those that are gone"
    );
    let last = state.scan(b"", &after(b"b"), 2, Shown::Values).unwrap();
    assert_eq!((last.entries.len(), last.next), (0, None));
}

#[tokio::test]
async fn a_scan_of_keys_reads_no_values_and_one_of_values_reads_each_once() {
    let state = empty();
    for key in ["a", "b", "c"] {
        applied(&state, 1, 1_000, set(key));
    }
    let store = counted(&state, 1 << 20, &[]);
    let keys = state.scan(b"", b"", 10, Shown::Records).unwrap();
    assert_eq!(keys.entries.len(), 3);
    assert!(keys.entries.iter().all(|(_, view)| view.value().is_none()));
    assert_eq!(
        (store.reads(Family::Entry), store.reads(Family::Value)),
        (0, 0),
        "the rows of the scan say all"
    );

    let values = state.scan(b"", b"", 10, Shown::Values).unwrap();
    let values: Vec<_> = values
        .entries
        .iter()
        .map(|(_, view)| view.value().unwrap().clone())
        .collect();
    assert_eq!(values, ["value of a", "value of b", "value of c"]);
    assert_eq!(
        (store.reads(Family::Entry), store.reads(Family::Value)),
        (0, 3),
    );

    // What is in memory is not read again.
    let before = store.reads(Family::Value);
    state.get(&Key::new("b").unwrap()).unwrap();
    state.scan(b"", b"", 10, Shown::Values).unwrap();
    assert_eq!(store.reads(Family::Value) - before, 1 + 2);
}

/// Nothing fits into memory: all is on disk.
#[tokio::test]
async fn what_operations_go_by_is_read_without_values() {
    let state = empty();
    applied(&state, 1, 1_000, set("a"));
    let store = counted(&state, 1, &[]);
    applied(&state, 1, 2_000, set("a"));
    let invalidate = peer::command::Op::Invalidate(peer::Invalidate { key: "a".into() });
    applied(&state, 1, 3_000, invalidate);
    assert_eq!(
        (store.reads(Family::Entry), store.reads(Family::Value)),
        (2, 0)
    );

    // The value is still the key's.
    let read = state.get(&Key::new("a").unwrap()).unwrap().unwrap();
    assert_eq!(read.value.as_deref(), Some(b"value of a".as_slice()));
    assert_eq!((read.record.version, read.record.changed), (2, 3));
}

fn delete(key: &str) -> peer::command::Op {
    peer::command::Op::Delete(peer::Delete {
        key: Bytes::copy_from_slice(key.as_bytes()),
    })
}

/// How many of a thousand keys that nobody ever set cost a read of the disk.
fn reads_for_absent_keys(state: &State, store: &Counted) -> usize {
    let before = store.reads(Family::Entry);
    for n in 0..1_000 {
        let absent = Key::new(format!("absent{n}")).unwrap();
        assert!(state.get(&absent).unwrap().is_none());
    }
    store.reads(Family::Entry) - before
}

async fn until_loaded(state: &State) {
    let loaded = async {
        while !matches!(state.memory().peek(b"nobody's"), Lookup::Absent) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), loaded).await.unwrap();
}

#[tokio::test]
async fn a_miss_for_an_absent_key_reads_no_disk_after_evictions_and_a_restart() {
    const KEYS: usize = 4_000;
    let state = empty();
    let mut store = counted(&state, 1 << 20, &[]);
    state.load_memory();
    until_loaded(&state).await;
    for n in 0..KEYS {
        applied(&state, 1, 1_000, set(&format!("k{n}")));
    }
    assert!(state.memory_use().evicted > 2_000);
    assert!(
        store.reads(Family::Entry) < 100,
        "nor does a set of a new key"
    );
    assert!(reads_for_absent_keys(&state, &store) < 50);

    // Another memory over the same store, too small for all of it.
    store = counted(&state, 1 << 20, &[]);
    state.load_memory();
    until_loaded(&state).await;
    assert!(reads_for_absent_keys(&state, &store) < 50);
    let read = |n| state.get(&Key::new(format!("k{n}")).unwrap()).unwrap();
    assert!((0..KEYS).all(|n| read(n).is_some()));
}

#[tokio::test]
async fn keys_that_came_and_went_do_not_make_misses_go_to_the_disk_for_ever() {
    let state = empty();
    let store = counted(&state, 1 << 17, &[]);
    state.load_memory();
    until_loaded(&state).await;
    for n in 0..10_000 {
        applied(&state, 1, 1_000, set(&format!("k{n}")));
        applied(&state, 1, 1_000, set(&format!("stays{}", n % 300)));
        if n >= 300 {
            applied(&state, 1, 1_000, delete(&format!("k{}", n - 300)));
        }
        // The other filter is filled beside.
        tokio::task::yield_now().await;
    }
    assert!(state.memory_use().evicted > 5_000);
    assert!(reads_for_absent_keys(&state, &store) < 400);
    let stays = |n| state.get(&Key::new(format!("stays{n}")).unwrap()).unwrap();
    assert!((0..300).all(|n| stays(n).is_some()));
}

#[tokio::test]
async fn many_commands_are_applied_in_batches_and_a_clients_head_is_written_once_in_each() {
    const ENTRIES: u64 = 10;
    const COMMANDS: u64 = 1_000;
    let state = empty();
    let store = counted(&state, 1 << 24, &[]);
    let command = |seq| peer::Command {
        request_id: Some(holdfast_proto::v1::RequestId {
            client: Bytes::from_static(&[7; 16]),
            seq,
            done_below: 0,
        }),
        op: Some(set(&format!("k{seq}"))),
        ..Default::default()
    };
    let entry = |index: u64| {
        let entry = peer::LogEntry {
            format: 1,
            stamp_ms: 1_000,
            commands: (0..COMMANDS)
                .map(|n| command(index * COMMANDS + n))
                .collect(),
        };
        Committed {
            log_id: LogId { term: 1, index },
            payload: CommittedPayload::Commands(prost::Message::encode_to_vec(&entry).into()),
        }
    };
    let run: Vec<_> = (1..=ENTRIES).map(entry).collect();
    let outcomes = state.apply(&run).unwrap();
    assert_eq!(outcomes.len() as u64, ENTRIES);
    assert!(
        outcomes
            .iter()
            .all(|outcomes| outcomes.len() as u64 == COMMANDS)
    );
    let batches = store.batches.lock();
    assert_eq!(batches.len(), 2, "5 and 5 entries");
    let head = format!(
        "Put(Client, {:?}",
        Bytes::from([b"h".as_slice(), &[7; 16]].concat())
    );
    for batch in batches.iter() {
        assert_eq!(batch.matches(&head).count(), 1);
    }
}

proptest! {
    #[test]
    fn nothing_lies_between_a_key_and_what_comes_after(a in proptest::collection::vec(any::<u8>(), 1..8), b in proptest::collection::vec(any::<u8>(), 1..8)) {
        prop_assert_eq!(b > a, b.as_slice() >= &after(&a)[..]);
    }
}
