//! Whether a key of one upstream may be fetched now: asked before a flight starts, by readers who
//! wonder whether to wait, and by what refreshes ahead.
//!
//! Promises that nothing is asked for again before its next attempt, and that failures are written
//! to the log at a bounded rate, however many keys fail at once. Must never know a clock.

use std::time::Duration;

use holdfast_proto::{Key, timeline::Millis};
use holdfast_raft::View;
use parking_lot::Mutex;

use super::failures::{Failure, Failures, Noted};
use crate::{policy::Policy, upstream::FetchFailed};

/// Failures of one upstream that are logged in a second. Of the others the leader alone knows, and
/// the next one to lead tries them once too often.
const LOGGED_PER_SECOND: u32 = 100;

/// The gate of one upstream.
#[derive(Default)]
pub(crate) struct Gate {
    failures: Failures,
    logged: Mutex<Logged>,
}

/// What was logged in one second.
#[derive(Default)]
struct Logged {
    second: u64,
    count: u32,
}

impl Gate {
    /// The failure because of which the key is left alone at `now`.
    pub(crate) fn closed_by(&self, key: &Key, view: Option<&View>, now: Millis) -> Option<Failure> {
        self.failures.backoff(key, view, now)
    }

    pub(crate) fn failed(
        &self,
        key: &Key,
        view: Option<&View>,
        policy: &Policy,
        failed: &FetchFailed,
        now: Millis,
        random: f64,
    ) -> Noted {
        let noted = self.failures.note(key, view, policy, failed, now, random);
        Noted {
            is_logged: noted.is_logged && self.logged.lock().may_log(now),
            ..noted
        }
    }

    pub(crate) fn succeeded(&self, key: &Key) {
        self.failures.forget(key);
    }
}

impl Logged {
    fn may_log(&mut self, now: Millis) -> bool {
        let second = now / Duration::from_secs(1).as_millis() as Millis;
        if second != self.second {
            *self = Self { second, count: 0 };
        }
        self.count += 1;
        self.count <= LOGGED_PER_SECOND
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::{peer::EntryRecord, v1::FailureClass};

    use super::*;
    use crate::refresh::testing::policy;

    #[test]
    fn failures_of_many_keys_are_logged_at_a_bounded_rate_and_all_of_them_are_remembered() {
        let (gate, policy) = (Gate::default(), policy());
        let view = View::from(EntryRecord {
            version: 7,
            ..Default::default()
        });
        let key = |n: u64| Key::new(format!("k{n}")).unwrap();
        let failed = FetchFailed::from(FailureClass::Connect);
        for second in [5, 6] {
            let now = second * 1_000 + 300;
            let logged = (0..1_000)
                .filter(|&n| {
                    gate.failed(
                        &key(second * 1_000 + n),
                        Some(&view),
                        &policy,
                        &failed,
                        now,
                        1.0,
                    )
                    .is_logged
                })
                .count();
            assert_eq!(logged, LOGGED_PER_SECOND as usize);
            let is_closed = |n| {
                gate.closed_by(&key(second * 1_000 + n), Some(&view), now)
                    .is_some()
            };
            assert!((0..1_000).all(is_closed));
        }
    }
}
