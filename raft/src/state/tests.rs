//! What applied commands leave behind, what a scan shows of it, and what is read from disk for it.

mod changes;
mod hash;
mod reads;
mod revalidation;

use std::{path::Path, time::Duration};

use holdfast_proto::peer;
use tokio::time::timeout;

use super::*;

/// Applies one command in a term of its own, to a state of its own.
fn applied(
    state: &Arc<State>,
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

/// Again, as soon as what loads its entries has let go.
async fn opened(stores: &Stores) -> Arc<State> {
    let opened = async {
        loop {
            match State::open(stores, 0, 1 << 20) {
                Ok(state) => return state,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    timeout(Duration::from_secs(30), opened).await.unwrap()
}

#[tokio::test]
async fn a_restart_goes_on_holding_a_state_that_is_not_the_majoritys() {
    let stores = Stores::memory();
    let state = State::open(&stores, 0, 1 << 20).unwrap();
    assert!(!state.is_held());
    state.hold(true);
    state.remember_divergence(&state.generation()).unwrap();
    drop(state);
    assert!(opened(&stores).await.is_held());
}

/// It took its place between the two: the mark was not meant for it.
#[tokio::test]
async fn a_state_that_takes_the_place_of_a_diverged_one_is_not_marked() {
    let stores = Stores::memory();
    let state = State::open(&stores, 0, 1 << 20).unwrap();
    let diverged = state.generation();
    state.generation.store(Arc::new(Generation {
        store: diverged.store.clone(),
        memory: Memory::new(1 << 20),
    }));
    state.remember_divergence(&diverged).unwrap();
    drop((state, diverged));
    assert!(!opened(&stores).await.is_held());
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
