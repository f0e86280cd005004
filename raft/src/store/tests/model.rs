//! Random changes, on both engines, against ordered maps. proptest prints the failing case and its
//! seed.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::{Home, homes};
use crate::store::{Family, LogBatch, LogMark, LogStore, StateBatch, StateStore};

#[derive(Debug, Clone)]
enum LogStep {
    Write(Vec<LogOp>, bool),
    Reopen,
}

#[derive(Debug, Clone)]
enum LogOp {
    Put(u32, u64, Bytes),
    TruncateFrom(u32, u64),
    PurgeTo(u32, u64),
    SetMark(u32, LogMark, Bytes),
}

#[derive(Debug, Default, PartialEq)]
struct LogModel {
    entries: BTreeMap<u32, BTreeMap<u64, Bytes>>,
    marks: BTreeMap<(u32, LogMark), Bytes>,
}

impl LogModel {
    fn change(&mut self, op: &LogOp, batch: &mut LogBatch) {
        match op.clone() {
            LogOp::Put(shard, index, entry) => {
                self.entries
                    .entry(shard)
                    .or_default()
                    .insert(index, entry.clone());
                batch.put(shard, index, entry);
            }
            LogOp::TruncateFrom(shard, from) => {
                self.entries
                    .entry(shard)
                    .or_default()
                    .retain(|index, _| *index < from);
                batch.truncate_from(shard, from);
            }
            LogOp::PurgeTo(shard, to) => {
                self.entries
                    .entry(shard)
                    .or_default()
                    .retain(|index, _| *index > to);
                batch.purge_to(shard, to);
            }
            LogOp::SetMark(shard, mark, record) => {
                self.marks.insert((shard, mark), record.clone());
                batch.set_mark(shard, mark, record);
            }
        }
    }

    fn check(&self, log: &dyn LogStore) {
        for shard in 0..3 {
            let expected = self.entries.get(&shard).cloned().unwrap_or_default();
            let ends = expected.first_key_value().zip(expected.last_key_value());
            assert_eq!(
                log.bounds(shard).unwrap(),
                ends.map(|(first, last)| (*first.0, *last.0))
            );
            assert_eq!(
                log.last(shard).unwrap(),
                ends.map(|(_, last)| (*last.0, last.1.clone()))
            );
            assert_eq!(
                log.read(shard, 0..u64::MAX, usize::MAX).unwrap(),
                expected.clone().into_iter().collect::<Vec<_>>()
            );
            let middle: Vec<_> = expected
                .range(3..9)
                .map(|(index, entry)| (*index, entry.clone()))
                .collect();
            assert_eq!(log.read(shard, 3..9, usize::MAX).unwrap(), middle);
            for mark in LogMark::ALL {
                assert_eq!(
                    log.mark(shard, mark).unwrap(),
                    self.marks.get(&(shard, mark)).cloned()
                );
            }
        }
    }
}

fn log_step() -> impl Strategy<Value = LogStep> {
    let shard = 0..3_u32;
    let op = prop_oneof![
        6 => (shard.clone(), 0..12_u64, record()).prop_map(|(shard, index, entry)| LogOp::Put(shard, index, entry)),
        1 => (shard.clone(), 0..14_u64).prop_map(|(shard, index)| LogOp::TruncateFrom(shard, index)),
        1 => (shard.clone(), 0..14_u64).prop_map(|(shard, index)| LogOp::PurgeTo(shard, index)),
        1 => (shard, prop::sample::select(&LogMark::ALL[..]), record()).prop_map(|(shard, mark, record)| LogOp::SetMark(shard, mark, record)),
    ];
    prop_oneof![
        8 => (prop::collection::vec(op, 0..8), any::<bool>()).prop_map(|(ops, sync)| LogStep::Write(ops, sync)),
        1 => Just(LogStep::Reopen),
    ]
}

#[derive(Debug, Clone)]
enum StateStep {
    Write(Vec<StateOp>),
    Flush,
    Compact,
    Reopen,
    /// Takes a checkpoint, writes on, and goes back to it by installing it.
    Install(Vec<StateOp>),
}

#[derive(Debug, Clone)]
enum StateOp {
    Put(Family, Bytes, Bytes),
    Delete(Family, Bytes),
    DeleteRange(Family, Bytes, Bytes),
}

type StateModel = BTreeMap<(Family, Bytes), Bytes>;

fn change(model: &mut StateModel, ops: &[StateOp]) -> StateBatch {
    let mut batch = StateBatch::default();
    for op in ops.iter().cloned() {
        match op {
            StateOp::Put(family, key, value) => {
                model.insert((family, key.clone()), value.clone());
                batch.put(family, key, value);
            }
            StateOp::Delete(family, key) => {
                model.remove(&(family, key.clone()));
                batch.delete(family, key);
            }
            StateOp::DeleteRange(family, from, end) => {
                model.retain(|(of, key), _| *of != family || *key < from || *key >= end);
                batch.delete_range(family, from, end);
            }
        }
    }
    batch
}

fn check(model: &StateModel, state: &dyn StateStore) {
    for family in Family::ALL {
        let expected: Vec<_> = model
            .iter()
            .filter(|((of, _), _)| *of == family)
            .map(|((_, key), value)| (key.clone(), value.clone()))
            .collect();
        let found: Vec<_> = state.scan(family, b"", None).map(Result::unwrap).collect();
        assert_eq!(found, expected, "{family:?}");
        let keys: Vec<&[u8]> = expected.iter().map(|(key, _)| &key[..]).collect();
        let values: Vec<_> = expected
            .iter()
            .map(|(_, value)| Some(value.clone()))
            .collect();
        assert_eq!(state.get_many(family, &keys).unwrap(), values);
    }
}

fn walk(home: &Home, steps: &[StateStep]) {
    let (mut live, mut flushed) = (StateModel::new(), StateModel::new());
    let mut stores = home.stores();
    let mut state: Arc<dyn StateStore> = stores.open_state(0).unwrap();
    for step in steps {
        match step {
            StateStep::Write(ops) => state.write(change(&mut live, ops)).unwrap(),
            StateStep::Flush => {
                state.flush().unwrap();
                flushed = live.clone();
            }
            StateStep::Compact => {
                state.flush().unwrap();
                state.compact().unwrap();
                flushed = live.clone();
            }
            StateStep::Reopen => {
                drop((state, stores));
                stores = home.stores();
                state = stores.open_state(0).unwrap();
                // The engine may have flushed more, by itself; so little it does not.
                live = flushed.clone();
            }
            StateStep::Install(ops) => {
                let copy = home.path("copy");
                state.checkpoint(&copy).unwrap();
                flushed = live.clone();
                state.write(change(&mut live, ops)).unwrap();
                let new = stores.install_state(0, &copy).unwrap();
                check(&live, &*state);
                (state, live) = (new, flushed.clone());
            }
        }
        check(&live, &*state);
    }
}

fn state_step() -> impl Strategy<Value = StateStep> {
    let key = || prop::collection::vec(0..4_u8, 0..3).prop_map(Bytes::from);
    let family = || prop::sample::select(&Family::ALL[..]);
    let op = prop_oneof![
        6 => (family(), key(), record()).prop_map(|(family, key, value)| StateOp::Put(family, key, value)),
        2 => (family(), key()).prop_map(|(family, key)| StateOp::Delete(family, key)),
        1 => (family(), key(), key()).prop_map(|(family, from, end)| StateOp::DeleteRange(family, from, end)),
    ];
    let ops = prop::collection::vec(op, 0..8);
    prop_oneof![
        8 => ops.clone().prop_map(StateStep::Write),
        2 => Just(StateStep::Flush),
        1 => Just(StateStep::Compact),
        1 => Just(StateStep::Reopen),
        1 => ops.prop_map(StateStep::Install),
    ]
}

fn record() -> impl Strategy<Value = Bytes> {
    prop::collection::vec(any::<u8>(), 0..16).prop_map(Bytes::from)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_log_is_an_ordered_map(steps in prop::collection::vec(log_step(), 1..24)) {
        for home in homes() {
            let mut model = LogModel::default();
            let mut log = home.stores().open_log().unwrap();
            for step in &steps {
                match step {
                    LogStep::Write(ops, sync) => {
                        let mut batch = LogBatch::default();
                        ops.iter().for_each(|op| model.change(op, &mut batch));
                        log.write(batch, *sync).unwrap();
                    }
                    LogStep::Reopen => {
                        drop(log);
                        log = home.stores().open_log().unwrap();
                    }
                }
                model.check(&*log);
            }
        }
    }

    #[test]
    fn a_state_is_ordered_maps_that_restart_as_of_a_flush(steps in prop::collection::vec(state_step(), 1..16)) {
        for home in homes() {
            walk(&home, &steps);
        }
    }
}
