//! What followers of a state's changes are told, and what a state does that a snapshot brought ahead
//! of its log.

use holdfast_proto::Key;

use super::*;

fn set(key: &str) -> peer::command::Op {
    peer::command::Op::Set(peer::Set {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: "v".into(),
        lifetime: Some(peer::Lifetime::default()),
        ..Default::default()
    })
}

fn key(key: &str) -> Key {
    Key::new(key.to_owned()).unwrap()
}

fn delete(key: &str) -> peer::command::Op {
    peer::command::Op::Delete(peer::Delete {
        key: Bytes::copy_from_slice(key.as_bytes()),
    })
}

#[tokio::test]
async fn a_follower_is_told_every_change_in_order() {
    let state = empty();
    applied(&state, 1, 1_000, set("before"));
    let mut changes = state.follow();
    applied(&state, 1, 1_000, set("a"));
    applied(&state, 1, 1_000, set("b"));
    applied(&state, 1, 1_000, delete("a"));
    let expected = [
        Change::Stored {
            key: key("a"),
            revision: 2,
        },
        Change::Stored {
            key: key("b"),
            revision: 3,
        },
        Change::Removed {
            key: key("a"),
            revision: 4,
        },
    ];
    for change in expected {
        assert_eq!(changes.next().await, Some(change));
    }
    drop(state);
    assert_eq!(changes.next().await, None);
}

#[tokio::test]
async fn the_changes_of_one_run_come_in_the_order_of_their_revisions() {
    const KEYS: u64 = 50;
    let state = empty();
    let mut changes = state.follow();
    let command = |n: u64| peer::Command {
        op: Some(set(&format!("k{n}"))),
        ..Default::default()
    };
    let entry = peer::LogEntry {
        format: 1,
        stamp_ms: 1_000,
        commands: (1..=KEYS).map(command).collect(),
    };
    let log_id = LogId { term: 1, index: 1 };
    let payload = CommittedPayload::Commands(prost::Message::encode_to_vec(&entry).into());
    state.apply(&[Committed { log_id, payload }]).unwrap();
    for n in 1..=KEYS {
        let stored = Change::Stored {
            key: key(&format!("k{n}")),
            revision: n,
        };
        assert_eq!(changes.next().await, Some(stored));
    }
}

#[tokio::test]
async fn a_follower_that_is_too_slow_holds_up_nobody_and_learns_that_it_missed_something() {
    let state = empty();
    let mut changes = state.follow();
    for _ in 0..20_000 {
        applied(&state, 1, 1_000, set("k"));
    }
    assert_eq!(state.applied().revision, 20_000);
    assert_eq!(changes.next().await, Some(Change::Missed));
    let Some(Change::Stored { revision, .. }) = changes.next().await else {
        panic!("what is still kept comes next");
    };
    assert!(revision > 1, "{revision}");
}

#[tokio::test]
async fn a_repaired_state_passes_over_what_it_has_and_tells_its_followers() {
    let (right, wrong) = (empty(), empty());
    for state in [&right, &wrong] {
        applied(state, 1, 1_000, set("a"));
    }
    applied(&right, 1, 1_000, set("b"));
    let ahead = right.applied();
    let mut changes = wrong.follow();
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("checkpoint");
    right.checkpoint(&files).unwrap();
    wrong.install(&files, Install::Repair).unwrap();
    assert_eq!(wrong.applied(), ahead);
    assert_eq!(changes.next().await, Some(Change::Missed));
    assert!(!wrong.is_level_with_log(), "the log is one entry behind");

    // The log brings what the snapshot had: it happens once.
    let log_id = LogId {
        term: 1,
        index: ahead.index,
    };
    let entry = peer::LogEntry {
        format: 1,
        stamp_ms: 1_000,
        commands: vec![peer::Command {
            op: Some(set("b")),
            ..Default::default()
        }],
    };
    let payload = CommittedPayload::Commands(prost::Message::encode_to_vec(&entry).into());
    wrong.apply(&[Committed { log_id, payload }]).unwrap();
    assert_eq!(wrong.applied(), ahead);
    assert!(wrong.is_level_with_log());

    // What is behind takes the place of nothing.
    let behind = empty();
    applied(&behind, 1, 1_000, set("a"));
    let files = dir.path().join("behind");
    behind.checkpoint(&files).unwrap();
    assert!(wrong.install(&files, Install::Repair).is_err());
}
