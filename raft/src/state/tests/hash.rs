//! The hash of a state: the same whatever the runs, kept up as the records say, another one for
//! another state.

use holdfast_proto::v1::RequestId;
use proptest::prelude::*;

use super::*;
use crate::state::hash::Sum;

fn op() -> impl Strategy<Value = peer::command::Op> {
    use peer::command::Op;
    let key = prop_oneof![Just("a"), Just("b"), Just("c")];
    let lifetime = Some(peer::Lifetime {
        fresh_ms: 500,
        ..Default::default()
    });
    prop_oneof![
        (key.clone(), "[a-z]{0,3}").prop_map(move |(key, value)| Op::Set(peer::Set {
            key: key.into(),
            value: value.into(),
            lifetime,
            ..Default::default()
        })),
        key.clone()
            .prop_map(|key| Op::Delete(peer::Delete { key: key.into() })),
        key.clone()
            .prop_map(|key| Op::Invalidate(peer::Invalidate { key: key.into() })),
        (key.clone(), 0..9u64).prop_map(|(key, started)| {
            let failed = peer::FetchFailed {
                class: 1,
                count: 2,
                ..Default::default()
            };
            Op::CommitFetch(peer::CommitFetch {
                key: key.into(),
                fetch_started_revision: started,
                term: 1,
                result: Some(peer::commit_fetch::Result::Failed(failed)),
            })
        }),
        (key, 0..9u64).prop_map(|(key, changed)| {
            let swept = peer::SweepKey {
                key: key.into(),
                changed,
            };
            Op::Sweep(peer::Sweep {
                keys: vec![swept.clone()],
                tombstones: vec![swept],
            })
        }),
    ]
}

fn entries(commands: Vec<(peer::command::Op, u64, u64, u64)>) -> Vec<Committed> {
    let entry = |(index, (op, client, seq, stamp)): (usize, (_, u64, u64, u64))| {
        let command = peer::Command {
            request_id: Some(RequestId {
                client: vec![u8::try_from(client).unwrap(); 16].into(),
                seq,
                done_below: seq.saturating_sub(3),
            }),
            op: Some(op),
            ..Default::default()
        };
        let entry = peer::LogEntry {
            format: 1,
            // Minutes apart: clients and tombstones run out.
            stamp_ms: stamp * 300_000,
            commands: vec![command],
        };
        Committed {
            log_id: LogId {
                term: 1,
                index: index as u64 + 1,
            },
            payload: CommittedPayload::Commands(prost::Message::encode_to_vec(&entry).into()),
        }
    };
    commands.into_iter().enumerate().map(entry).collect()
}

fn sum(state: &State) -> (u64, u64) {
    let kept = state.applied_record().hash_sum;
    let records = Sum::of(state.generation().store.as_ref()).unwrap().0;
    (kept, records)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn it_is_what_the_records_say_whatever_the_runs(commands in proptest::collection::vec((op(), 1..4u64, 1..20u64, 1..12u64), 1..60), cut in 1..9usize) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _entered = runtime.enter();
        let (one, other) = (empty(), empty());
        let log = entries(commands);
        one.apply(&log).unwrap();
        for run in log.chunks(cut) {
            other.apply(run).unwrap();
            let (kept, records) = sum(&other);
            prop_assert_eq!(kept, records);
        }
        prop_assert_eq!(sum(&one), sum(&other));
    }
}

#[tokio::test]
async fn another_state_has_another_hash_at_the_index_where_all_are_compared() {
    let log = |value: &'static str| {
        let set = |n: u64| {
            let op = peer::command::Op::Set(peer::Set {
                key: "k".into(),
                value: if n == 200 { value } else { "same" }.into(),
                lifetime: Some(peer::Lifetime::default()),
                ..Default::default()
            });
            (op, 1, n, 1)
        };
        entries((1..=600).map(set).collect())
    };
    let (one, same, other) = (empty(), empty(), empty());
    one.apply(&log("one")).unwrap();
    for run in log("one").chunks(7) {
        same.apply(run).unwrap();
    }
    other.apply(&log("other")).unwrap();
    assert_eq!(one.hash().unwrap().index, 512);
    assert_eq!(one.hash(), same.hash());
    assert_eq!(one.hash_at(256), same.hash_at(256));
    // Overwritten since: what is the same again hashes the same.
    assert_eq!(one.hash(), other.hash());
    let deleted = peer::command::Op::Delete(peer::Delete { key: "k".into() });
    applied(&other, 1, 300_000, deleted);
    assert_ne!(sum(&one), sum(&other));
}
