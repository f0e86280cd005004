//! What applied commands leave behind, and what a scan shows of it.

use holdfast_proto::peer;
use proptest::prelude::*;

use super::*;

/// Its rows were there when a scan began, and are gone when they are looked up.
struct Leaving(&'static [&'static str]);

impl StateStore for Leaving {
    fn get(&self, _: Family, _: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(None)
    }

    fn get_many(&self, family: Family, keys: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>> {
        Closed.get_many(family, keys)
    }

    fn scan<'a>(&'a self, _: Family, from: &[u8], _: Option<&[u8]>) -> Scan<'a> {
        let from = from.to_vec();
        let rows = self
            .0
            .iter()
            .filter(move |key| key.as_bytes() >= from.as_slice());
        Box::new(rows.map(|key| Ok((Bytes::from_static(key.as_bytes()), Bytes::new()))))
    }

    fn write(&self, batch: StateBatch) -> io::Result<()> {
        Closed.write(batch)
    }

    fn flush(&self) -> io::Result<()> {
        closed()
    }

    fn checkpoint(&self, dir: &Path) -> io::Result<()> {
        Closed.checkpoint(dir)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        closed()
    }

    fn compact(&self) -> io::Result<()> {
        closed()
    }
}

/// Applies one command in a term of its own, to a state of its own.
fn applied(
    state: &State,
    term: u64,
    stamp_ms: u64,
    op: peer::command::Op,
) -> Option<peer::outcome::Result> {
    let command = peer::Command {
        op: Some(op),
        ..Default::default()
    };
    let entry = peer::LogEntry {
        format: 1,
        stamp_ms,
        commands: vec![command],
    };
    let payload = CommittedPayload::Commands(prost::Message::encode_to_vec(&entry).into());
    let log_id = LogId {
        term,
        index: state.applied().index + 1,
    };
    let mut outcomes = state.apply(&[Committed { log_id, payload }]).unwrap();
    outcomes
        .pop()
        .and_then(|mut outcomes| outcomes.pop())
        .and_then(|outcome| outcome.result)
}

fn empty() -> Arc<State> {
    let stores = Stores::open(
        crate::store::Engine::Memory,
        Path::new(""),
        crate::store::Budget::default(),
    )
    .unwrap();
    State::open(&stores, 0, 1 << 20).unwrap()
}

/// Its leader led in another term: somebody else may have fetched since, and known better.
#[tokio::test]
async fn what_was_fetched_in_another_term_is_not_stored() {
    let state = empty();
    let commit = |term| {
        let fetched = peer::Fetched {
            value: "v".into(),
            ..Default::default()
        };
        let result = Some(peer::commit_fetch::Result::Fetched(fetched));
        peer::command::Op::CommitFetch(peer::CommitFetch {
            key: "k".into(),
            fetch_started_revision: 0,
            term,
            result,
        })
    };
    assert!(matches!(
        applied(&state, 5, 1_000, commit(4)),
        Some(peer::outcome::Result::Fenced(_))
    ));
    assert!(matches!(
        applied(&state, 5, 1_000, commit(5)),
        Some(peer::outcome::Result::Done(_))
    ));
}

/// What the broom saw, and no newer value of the same key.
#[tokio::test]
async fn a_sweep_removes_what_it_was_meant_for() {
    let state = empty();
    let set = peer::Set {
        key: "k".into(),
        value: "v".into(),
        lifetime: Some(peer::Lifetime::default()),
        ..Default::default()
    };
    let sweep = |changed| {
        let keys = vec![peer::SweepKey {
            key: "k".into(),
            changed,
        }];
        peer::command::Op::Sweep(peer::Sweep {
            keys,
            ..Default::default()
        })
    };
    applied(&state, 1, 1_000, peer::command::Op::Set(set.clone()));
    applied(&state, 1, 1_000, peer::command::Op::Set(set));
    assert!(matches!(
        applied(&state, 1, 9_000, sweep(1)),
        Some(peer::outcome::Result::Unchanged(_))
    ));
    assert!(matches!(
        applied(&state, 1, 9_000, sweep(2)),
        Some(peer::outcome::Result::Done(_))
    ));
}

#[tokio::test]
async fn a_scan_goes_on_behind_rows_that_have_gone_since() {
    let state = empty();
    state.generation.store(Arc::new(Generation {
        store: Arc::new(Leaving(&["a", "b", "c"])),
        memory: Memory::new(1 << 20),
    }));
    let first = state.scan(b"", b"", 2).unwrap();
    assert_eq!(
        (first.entries.len(), first.next),
        (0, Some(after(b"b"))),
        "the rows go on behind those that are gone"
    );
    let last = state.scan(b"", &after(b"b"), 2).unwrap();
    assert_eq!((last.entries.len(), last.next), (0, None));
}

proptest! {
    #[test]
    fn nothing_lies_between_a_key_and_what_comes_after(a in proptest::collection::vec(any::<u8>(), 1..8), b in proptest::collection::vec(any::<u8>(), 1..8)) {
        prop_assert_eq!(b > a, b.as_slice() >= &after(&a)[..]);
    }
}
