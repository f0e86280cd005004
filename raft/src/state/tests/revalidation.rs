//! A value that its source says is still the same: new times and nothing else, also after its end.

use holdfast_proto::{
    content_hash,
    peer::command::Op,
    timeline::{Phase, Timeline},
};

use super::*;

const LIFETIME: peer::Lifetime = peer::Lifetime {
    fresh_ms: 1_000,
    refresh_after_ms: 800,
    stale_while_revalidate_ms: 0,
    stale_if_error_ms: 500,
    min_refresh_interval_ms: 0,
    keep_ms: 10_000,
};

fn validators(etag: &str) -> peer::Validators {
    peer::Validators {
        etag: etag.into(),
        ..Default::default()
    }
}

fn commit(started: Revision, result: peer::commit_fetch::Result) -> Op {
    Op::CommitFetch(peer::CommitFetch {
        key: "k".into(),
        fetch_started_revision: started,
        term: 1,
        result: Some(result),
    })
}

fn fetched(started: Revision, value: &'static str) -> Op {
    let fetched = peer::Fetched {
        value: value.into(),
        content_type: "text/plain".into(),
        tags: vec!["t".into()],
        lifetime: Some(LIFETIME),
        validators: Some(validators("1")),
        ..Default::default()
    };
    commit(started, peer::commit_fetch::Result::Fetched(fetched))
}

fn revalidated(value: &str) -> peer::Revalidated {
    peer::Revalidated {
        lifetime: Some(LIFETIME),
        took_ms: 20,
        age_ms: 100,
        content_hash: content_hash(value.as_bytes()),
        validators: None,
    }
}

fn revalidate(started: Revision, revalidated: peer::Revalidated) -> Op {
    commit(
        started,
        peer::commit_fetch::Result::Revalidated(revalidated),
    )
}

fn record(state: &Arc<State>) -> Option<peer::EntryRecord> {
    let entry = state
        .get(&holdfast_proto::Key::new("k").unwrap())
        .unwrap()?;
    assert_eq!(entry.value.as_deref(), Some(&b"v"[..]));
    Some(entry.record.clone())
}

fn sweep(changed: Revision) -> Op {
    let key = peer::SweepKey {
        key: "k".into(),
        changed,
    };
    Op::Sweep(peer::Sweep {
        keys: vec![key],
        ..Default::default()
    })
}

#[tokio::test]
async fn its_times_begin_again_and_nothing_else_changes() {
    let state = empty();
    applied(&state, 1, 1_000, fetched(0, "v"));
    let failure = peer::FetchFailed {
        count: 1,
        ..Default::default()
    };
    let failure = commit(1, peer::commit_fetch::Result::Failed(failure));
    applied(&state, 1, 1_500, failure);
    let before = record(&state).unwrap();
    assert!(before.failure.is_some());

    let outcome = applied(&state, 1, 1_900, revalidate(1, revalidated("v")));
    let done = peer::Done {
        revision: 2,
        existed: true,
    };
    assert_eq!(outcome, Some(peer::outcome::Result::Done(done)));
    let after = record(&state).unwrap();
    assert_eq!(
        after,
        peer::EntryRecord {
            changed: 2,
            changed_at_ms: 1_900,
            fetched_at_ms: 1_780,
            refresh_at_ms: 2_580,
            fresh_until_ms: 2_780,
            failure: None,
            ..before
        }
    );

    // The source names its values anew.
    let renamed = peer::Revalidated {
        validators: Some(validators("2")),
        ..revalidated("v")
    };
    applied(&state, 1, 2_000, revalidate(2, renamed));
    let named = record(&state).unwrap().validators.unwrap();
    assert_eq!(named.etag, "2");
}

#[tokio::test]
async fn what_changed_or_went_meanwhile_is_not_revalidated() {
    let state = empty();
    let fenced = |outcome| matches!(outcome, Some(peer::outcome::Result::Fenced(_)));
    assert!(fenced(applied(
        &state,
        1,
        1_000,
        revalidate(0, revalidated("v"))
    )));
    applied(&state, 1, 1_000, fetched(0, "v"));
    // Another value than the one that was asked about.
    assert!(fenced(applied(
        &state,
        1,
        1_100,
        revalidate(1, revalidated("w"))
    )));
    let key = peer::Invalidate { key: "k".into() };
    applied(&state, 1, 1_200, Op::Invalidate(key));
    assert!(fenced(applied(
        &state,
        1,
        1_300,
        revalidate(1, revalidated("v"))
    )));
    assert_eq!(record(&state).unwrap().fresh_until_ms, 1_200);
    assert!(!fenced(applied(
        &state,
        1,
        1_300,
        revalidate(2, revalidated("v"))
    )));
    applied(
        &state,
        1,
        1_400,
        Op::Delete(peer::Delete { key: "k".into() }),
    );
    assert!(fenced(applied(
        &state,
        1,
        1_500,
        revalidate(3, revalidated("v"))
    )));
}

#[tokio::test]
async fn what_is_kept_after_its_end_comes_back_and_goes_once_it_is_kept_no_more() {
    let state = empty();
    applied(&state, 1, 1_000, fetched(0, "v"));
    // Fresh until 2,000, stale until 2,500, kept until 12,500.
    applied(&state, 1, 12_499, sweep(1));
    let kept = record(&state).expect("it is kept");
    assert_eq!(Timeline::from(&kept).phase(12_499), Phase::Expired);
    let outcome = applied(&state, 1, 12_499, revalidate(1, revalidated("v")));
    let done = peer::Done {
        revision: 2,
        existed: false,
    };
    assert_eq!(outcome, Some(peer::outcome::Result::Done(done)));
    let back = record(&state).unwrap();
    assert_eq!((back.version, back.changed), (1, 2));
    assert_eq!(Timeline::from(&back).phase(12_499), Phase::Fresh);

    applied(&state, 1, 23_878, sweep(2));
    assert!(record(&state).is_some());
    applied(&state, 1, 23_879, sweep(2));
    assert!(record(&state).is_none());
}

#[tokio::test]
async fn the_log_and_the_batch_hold_no_value() {
    let state = empty();
    applied(&state, 1, 1_000, fetched(0, "v"));
    let command = peer::Command {
        op: Some(revalidate(1, revalidated("v"))),
        ..Default::default()
    };
    assert!(prost::Message::encoded_len(&command) <= 64);
    let generation = state.generation();
    let spoiled = Bytes::from_static(b"\x01other");
    let mut batch = crate::store::StateBatch::default();
    batch.put(
        crate::store::Family::Value,
        Bytes::from_static(b"k"),
        spoiled.clone(),
    );
    generation.store.write(batch).unwrap();
    applied(&state, 1, 1_900, command.op.unwrap());
    let stored = generation
        .store
        .get(crate::store::Family::Value, b"k")
        .unwrap();
    assert_eq!(stored, Some(spoiled), "the value was not written again");
}

#[tokio::test]
async fn that_there_is_none_is_no_value_for_those_who_name_conditions() {
    let state = empty();
    let none = || {
        let not_found = peer::NotFound {
            lifetime: Some(LIFETIME),
            took_ms: 10,
        };
        peer::commit_fetch::Result::NotFound(not_found)
    };
    let existed = |outcome| match outcome {
        Some(peer::outcome::Result::Done(done)) => done.existed,
        other => panic!("{other:?}"),
    };
    applied(&state, 1, 1_000, fetched(0, "v"));
    assert!(existed(applied(&state, 1, 1_000, commit(1, none()))));
    let key = holdfast_proto::Key::new("k").unwrap();
    let view = View::settled(state.get(&key).unwrap().unwrap());
    assert!(view.is_negative() && view.is_live(1_500) && view.value().is_none());
    assert_eq!((view.version(), view.tags().len()), (2, 0));

    assert!(!existed(applied(&state, 1, 1_100, commit(2, none()))));
    let set = peer::Set {
        key: "k".into(),
        value: "mine".into(),
        lifetime: Some(LIFETIME),
        if_absent: true,
        ..Default::default()
    };
    assert!(!existed(applied(&state, 1, 1_200, Op::Set(set))));
    let view = View::settled(state.get(&key).unwrap().unwrap());
    assert_eq!(view.value().map(|value| &value[..]), Some(&b"mine"[..]));
    applied(&state, 1, 1_300, commit(4, none()));
    let delete = peer::Delete { key: "k".into() };
    assert!(!existed(applied(&state, 1, 1_400, Op::Delete(delete))));
}

/// The clocks may have been put forward, so that what fences was kept for a moment only.
#[tokio::test]
async fn a_fetch_that_outlives_what_fences_it_is_not_stored() {
    const HOUR: u64 = 3_600_000;
    let fenced = |outcome| matches!(outcome, Some(peer::outcome::Result::Fenced(_)));
    let swept = |changed| {
        let key = peer::SweepKey {
            key: "k".into(),
            changed,
        };
        Op::Sweep(peer::Sweep {
            tombstones: vec![key],
            ..Default::default()
        })
    };
    let state = empty();
    let level = peer::RaiseFeatureLevel { level: 2 };
    applied(&state, 1, 1_000, Op::RaiseFeatureLevel(level));
    applied(
        &state,
        1,
        1_000,
        Op::Delete(peer::Delete { key: "k".into() }),
    );
    applied(&state, 1, HOUR, swept(1));
    let key = holdfast_proto::Key::new("k").unwrap();
    assert!(state.tombstone(&key).unwrap().is_none(), "it is swept");
    assert!(fenced(applied(&state, 1, HOUR, fetched(0, "old"))));
    assert!(!fenced(applied(&state, 1, HOUR, fetched(1, "v"))));

    // An entry that goes by itself fences too.
    applied(&state, 1, 2 * HOUR, sweep(2));
    assert!(record(&state).is_none());
    assert!(fenced(applied(&state, 1, 2 * HOUR, fetched(1, "old"))));
    assert!(!fenced(applied(&state, 1, 2 * HOUR, fetched(3, "v"))));
}
