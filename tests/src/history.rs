//! Histories of one register each, and whether they are linearizable: whether every operation can
//! have happened at one instant between its call and its answer. The search is Wing and Gong's with
//! Lowe's memory of what was tried ("Testing for linearizability", 2017). Knows no cluster; values
//! are numbers that no two writes of a history share.

use std::{collections::HashSet, time::Duration};

/// What a register holds: nothing, or what some write put there.
pub type Held = Option<u64>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Read {
        found: Held,
    },
    Write {
        value: u64,
    },
    /// `value`, if the register holds `if_held`.
    Swap {
        if_held: Held,
        value: u64,
    },
    /// A swap that was refused because the register held something else.
    Refused {
        if_held: Held,
    },
}

#[derive(Debug, Clone, Copy)]
pub struct Operation {
    pub action: Action,
    pub called: Duration,
    /// None: nobody knows whether it happened, or it may happen yet.
    pub answered: Option<Duration>,
}

/// Histories longer than this are searched in parts by the caller, or by other keys.
pub const OPERATIONS_MAX: usize = 2_000;

/// A history that nothing explains: the longest beginning that could be explained ends before one of
/// these.
#[derive(Debug, Clone)]
pub struct Violation {
    pub explained: usize,
    pub stuck_before: Vec<Operation>,
}

/// Whether the operations on one register, in any order, are linearizable.
pub fn check(operations: &[Operation]) -> Result<(), Violation> {
    assert!(
        operations.len() <= OPERATIONS_MAX,
        "{} operations are too many to search",
        operations.len()
    );
    let mut search = Search::new(operations);
    if search.explain() {
        return Ok(());
    }
    Err(Violation {
        explained: search.best,
        stuck_before: search.stuck,
    })
}

struct Search {
    /// By the time of their call.
    operations: Vec<Operation>,
    /// How many have an answer, and so must have happened.
    answered: usize,
    best: usize,
    stuck: Vec<Operation>,
}

/// Which operations have happened, as a set of their numbers.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Done(Vec<u64>);

impl Done {
    fn has(&self, number: usize) -> bool {
        self.0[number / 64] & (1 << (number % 64)) != 0
    }

    fn with(&self, number: usize) -> Self {
        let mut more = self.clone();
        more.0[number / 64] |= 1 << (number % 64);
        more
    }
}

impl Search {
    fn new(operations: &[Operation]) -> Self {
        let mut operations = operations.to_vec();
        operations.sort_by_key(|operation| operation.called);
        Self {
            answered: operations
                .iter()
                .filter(|operation| operation.answered.is_some())
                .count(),
            operations,
            best: 0,
            stuck: Vec::new(),
        }
    }

    /// Depth first over what may happen next; a set of operations with what the register holds
    /// after them is tried once.
    fn explain(&mut self) -> bool {
        let nothing = Done(vec![0; self.operations.len().div_ceil(64)]);
        let mut tried = HashSet::from([(nothing.clone(), None)]);
        let mut open = vec![(nothing, None, 0)];
        while let Some((done, held, happened)) = open.pop() {
            if happened == self.answered {
                return true;
            }
            let next = self.next(&done);
            if happened >= self.best {
                self.best = happened;
                self.stuck = next.iter().map(|&number| self.operations[number]).collect();
            }
            for number in next {
                let operation = self.operations[number];
                let Some(after) = apply(operation.action, held) else {
                    continue;
                };
                let happened = happened + usize::from(operation.answered.is_some());
                let reached = (done.with(number), after);
                if tried.insert(reached.clone()) {
                    open.push((reached.0, reached.1, happened));
                }
            }
        }
        false
    }

    /// What may happen next: all that were called before the first answer among those left.
    fn next(&self, done: &Done) -> Vec<usize> {
        let left = || (0..self.operations.len()).filter(|&number| !done.has(number));
        let first_answer = left()
            .filter_map(|number| self.operations[number].answered)
            .min();
        left()
            .take_while(|&number| {
                first_answer.is_none_or(|answer| self.operations[number].called <= answer)
            })
            .collect()
    }
}

/// What the register holds afterwards; none if it cannot happen so.
fn apply(action: Action, held: Held) -> Option<Held> {
    match action {
        Action::Read { found } => (found == held).then_some(held),
        Action::Write { value } => Some(Some(value)),
        Action::Swap { if_held, value } => (if_held == held).then_some(Some(value)),
        Action::Refused { if_held } => (if_held != held).then_some(held),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(action: Action, called: u64, answered: u64) -> Operation {
        Operation {
            action,
            called: Duration::from_millis(called),
            answered: Some(Duration::from_millis(answered)),
        }
    }

    fn unknown(action: Action, called: u64) -> Operation {
        Operation {
            answered: None,
            ..at(action, called, 0)
        }
    }

    const fn read(found: u64) -> Action {
        Action::Read { found: Some(found) }
    }

    const fn write(value: u64) -> Action {
        Action::Write { value }
    }

    #[test]
    fn operations_at_the_same_time_may_happen_in_any_order() {
        let history = [
            at(write(1), 0, 10),
            at(write(2), 0, 10),
            at(read(2), 11, 12),
        ];
        assert!(check(&history).is_ok());
        let history = [at(write(1), 0, 10), at(read(1), 5, 6), at(read(1), 7, 8)];
        assert!(check(&history).is_ok());
    }

    #[test]
    fn a_stale_read_is_found() {
        let history = [at(write(1), 0, 1), at(write(2), 2, 3), at(read(1), 4, 5)];
        let violation = check(&history).unwrap_err();
        assert_eq!(violation.explained, 2);
        assert_eq!(violation.stuck_before[0].action, read(1));
    }

    #[test]
    fn a_value_that_was_seen_and_goes_back_is_found() {
        let history = [
            at(write(1), 0, 1),
            at(write(2), 2, 9),
            at(read(2), 3, 4),
            at(read(1), 5, 6),
        ];
        assert!(check(&history).is_err());
    }

    #[test]
    fn a_lost_write_and_one_from_nowhere_are_found() {
        let history = [at(write(1), 0, 1), at(Action::Read { found: None }, 2, 3)];
        assert!(check(&history).is_err());
        assert!(check(&[at(read(7), 0, 1)]).is_err());
    }

    #[test]
    fn two_swaps_of_the_same_value_cannot_both_have_happened() {
        let swap = |value| Action::Swap {
            if_held: Some(1),
            value,
        };
        let history = [at(write(1), 0, 1), at(swap(2), 2, 9), at(swap(3), 2, 9)];
        assert!(check(&history).is_err());
        let refused = Action::Refused { if_held: Some(1) };
        let history = [at(write(1), 0, 1), at(swap(2), 2, 9), at(refused, 2, 9)];
        assert!(check(&history).is_ok());
        let history = [at(write(1), 0, 1), at(refused, 2, 3)];
        assert!(check(&history).is_err(), "refused without a reason");
    }

    #[test]
    fn what_nobody_knows_of_may_happen_late_or_never_but_not_twice() {
        let history = [
            at(write(1), 0, 1),
            unknown(write(2), 2),
            at(read(1), 10, 11),
            at(read(2), 20, 21),
        ];
        assert!(check(&history).is_ok(), "late");
        assert!(check(&history[..3]).is_ok(), "never");
        let mut again = history.to_vec();
        again.extend([at(write(3), 30, 31), at(read(2), 40, 41)]);
        assert!(check(&again).is_err(), "twice");
        let early = [unknown(write(2), 5), at(read(2), 1, 2)];
        assert!(check(&early).is_err(), "before it was called");
    }

    proptest! {
        /// A history made by a real register, its calls and answers spread around the instants at
        /// which they happened, is explained; with one read falsified it is not.
        #[test]
        fn what_a_register_did_is_explained_and_a_falsified_read_is_not(
            steps in prop::collection::vec((0..3_u8, 0..40_u64, 0..40_u64), 1..60),
            falsified in any::<prop::sample::Index>(),
        ) {
            let (mut held, mut history, mut reads) = (None, Vec::new(), Vec::new());
            for (number, (kind, before, after)) in steps.into_iter().enumerate() {
                let instant = 1_000 + 10 * number as u64;
                let action = match kind {
                    0 => {
                        reads.push(number);
                        Action::Read { found: held }
                    }
                    1 => write(number as u64),
                    _ => Action::Swap { if_held: held, value: number as u64 },
                };
                held = apply(action, held).expect("it happened");
                history.push(at(action, instant - before, instant + after));
            }
            prop_assert!(check(&history).is_ok());
            if !reads.is_empty() {
                let number = reads[falsified.index(reads.len())];
                history[number].action = read(u64::MAX);
                prop_assert!(check(&history).is_err());
            }
        }
    }
}
