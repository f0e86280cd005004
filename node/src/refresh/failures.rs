//! What the leader remembers of fetches that failed, between and beyond what it logs.
//!
//! ```text
//! with an entry:     1 ─ logged   2 ─ logged   3   4 ─ logged   5 6 7   8 ─ logged …   and at each change of class
//! without:           here only, for `error_ttl`
//! ```
//! Promises that nothing is asked for again before its next attempt, and bounded memory: when full,
//! what may be tried again soonest is forgotten first. Classes and statuses only, never text. Must
//! never know an upstream or a clock.

use std::collections::{BTreeSet, HashMap};

use holdfast_proto::{
    Key, Revision,
    peer::FailureRecord,
    timeline::{Millis, after},
    v1::FailureClass,
};
use holdfast_raft::View;
use parking_lot::Mutex;

use crate::{policy::Policy, upstream::FetchFailed};

/// Keys whose failures are remembered.
const KEYS_MAX: usize = 100_000;
/// A `Retry-After` counts up to so many times `retry_cap`.
const RETRY_AFTER_CAPS: u32 = 10;

/// Fetches of one key that failed, in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// Of the last one.
    pub class: FailureClass,
    pub status: u32,
    pub count: u32,
    /// In the leader's time, as all instants here.
    pub at_ms: Millis,
    pub next_attempt_ms: Millis,
}

/// One more failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Noted {
    pub(crate) failure: Failure,
    /// Every replica shall know it.
    pub(crate) is_logged: bool,
}

pub(crate) struct Failures {
    keys_max: usize,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    failures: HashMap<Key, Held>,
    by_next_attempt: BTreeSet<(Millis, Key)>,
}

struct Held {
    failure: Failure,
    /// Of the value that could not be refreshed, 0 without one: a failure says nothing about
    /// another value's refresh.
    version: Revision,
}

impl Default for Failures {
    fn default() -> Self {
        Self {
            keys_max: KEYS_MAX,
            known: Mutex::default(),
        }
    }
}

impl Failures {
    /// Failures of the key in a row so far: what is remembered here or what the log says of the
    /// entry, whichever is later. The log knows less of the failures of one term, and more once
    /// another node has led.
    pub(crate) fn last(&self, key: &Key, view: Option<&View>) -> Option<Failure> {
        let version = view.map_or(0, View::version);
        let known = self
            .known
            .lock()
            .failures
            .get(key)
            .filter(|held| held.version == version)
            .map(|held| held.failure);
        let logged = view.and_then(View::failure).map(Failure::from);
        [logged, known]
            .into_iter()
            .flatten()
            .max_by_key(|failure| failure.at_ms)
    }

    /// The failure because of which the key is left alone at `now`.
    pub(crate) fn backoff(&self, key: &Key, view: Option<&View>, now: Millis) -> Option<Failure> {
        self.last(key, view)
            .filter(|failure| now < failure.next_attempt_ms)
    }

    /// Counts one more. The next attempt comes after the policy's delay (without an entry after
    /// `error_ttl`) and not before the upstream's `Retry-After`, which counts up to ten times
    /// `retry_cap`: the upstream knows better than we guess, but how long a key may go without being
    /// tried is the operator's word.
    pub(crate) fn note(
        &self,
        key: &Key,
        view: Option<&View>,
        policy: &Policy,
        failed: &FetchFailed,
        now: Millis,
        random: f64,
    ) -> Noted {
        let before = self.last(key, view);
        let count = before.map_or(0, |before| before.count).saturating_add(1);
        let delay = if view.is_some() {
            policy.retry_delay(count, random)
        } else {
            policy.error_ttl
        };
        let asked = failed.retry_after.unwrap_or_default();
        let delay = delay.max(asked.min(policy.retry_cap * RETRY_AFTER_CAPS));
        let next_attempt_ms = after(
            now,
            Millis::try_from(delay.as_millis()).unwrap_or(Millis::MAX),
        );
        let failure = Failure {
            class: failed.class,
            status: failed.status,
            count,
            at_ms: now,
            next_attempt_ms,
        };
        self.known.lock().insert(
            key,
            Held {
                failure,
                version: view.map_or(0, View::version),
            },
            self.keys_max,
        );
        let is_news =
            count.is_power_of_two() || before.is_none_or(|before| before.class != failed.class);
        Noted {
            failure,
            is_logged: view.is_some() && is_news,
        }
    }

    /// A fetch succeeded.
    pub(crate) fn forget(&self, key: &Key) {
        self.known.lock().remove(key);
    }
}

impl From<&FailureRecord> for Failure {
    fn from(record: &FailureRecord) -> Self {
        Self {
            class: record.class(),
            status: record.status,
            count: record.count,
            at_ms: record.at_ms,
            next_attempt_ms: record.next_attempt_ms,
        }
    }
}

impl Known {
    fn insert(&mut self, key: &Key, held: Held, keys_max: usize) {
        self.remove(key);
        if self.failures.len() >= keys_max
            && let Some((_, soonest)) = self.by_next_attempt.pop_first()
        {
            self.failures.remove(&soonest);
        }
        self.by_next_attempt
            .insert((held.failure.next_attempt_ms, key.clone()));
        self.failures.insert(key.clone(), held);
    }

    fn remove(&mut self, key: &Key) {
        if let Some(held) = self.failures.remove(key) {
            self.by_next_attempt
                .remove(&(held.failure.next_attempt_ms, key.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use holdfast_proto::peer::EntryRecord;

    use super::*;
    use crate::refresh::testing::policy;

    const REFUSED: FetchFailed = FetchFailed {
        class: FailureClass::Connect,
        status: 0,
        retry_after: None,
    };

    fn key(n: usize) -> Key {
        Key::new(format!("k{n}")).unwrap()
    }

    fn value(version: Revision) -> View {
        View::from(EntryRecord {
            version,
            ..Default::default()
        })
    }

    fn status(status: u32, retry_after: Option<u64>) -> FetchFailed {
        FetchFailed {
            class: FailureClass::Status,
            status,
            retry_after: retry_after.map(Duration::from_secs),
        }
    }

    #[test]
    fn a_failure_is_logged_on_the_first_on_each_doubling_and_on_a_change_of_class() {
        let (failures, policy, record) = (Failures::default(), policy(), value(7));
        let logged = |failed: &FetchFailed| {
            let noted = failures.note(&key(0), Some(&record), &policy, failed, 0, 1.0);
            noted.is_logged.then_some(noted.failure.count)
        };
        let counts: Vec<_> = (0..20).filter_map(|_| logged(&REFUSED)).collect();
        assert_eq!(counts, [1, 2, 4, 8, 16]);
        assert_eq!(logged(&status(500, None)), Some(21));
        assert_eq!(logged(&status(503, None)), None);
    }

    #[test]
    fn a_new_leader_goes_on_counting_where_the_log_stopped() {
        let failure = FailureRecord {
            class: FailureClass::Connect.into(),
            count: 8,
            at_ms: 1_000,
            next_attempt_ms: 9_000,
            ..Default::default()
        };
        let record = View::from(EntryRecord {
            version: 7,
            failure: Some(failure),
            ..Default::default()
        });
        let failures = Failures::default();
        assert!(failures.backoff(&key(0), Some(&record), 8_999).is_some());
        assert!(failures.backoff(&key(0), Some(&record), 9_000).is_none());
        let noted = failures.note(&key(0), Some(&record), &policy(), &REFUSED, 9_000, 1.0);
        assert_eq!((noted.failure.count, noted.is_logged), (9, false));
        assert!(failures.backoff(&key(0), Some(&record), 9_001).is_some());
    }

    #[test]
    fn what_another_leader_logged_since_counts_more_than_what_is_remembered() {
        let logged = |at_ms, count| {
            let failure = FailureRecord {
                count,
                at_ms,
                next_attempt_ms: at_ms + 9_000,
                ..Default::default()
            };
            View::from(EntryRecord {
                version: 7,
                failure: Some(failure),
                ..Default::default()
            })
        };
        let failures = Failures::default();
        failures.note(
            &key(0),
            Some(&logged(1_000, 2)),
            &policy(),
            &REFUSED,
            5_000,
            1.0,
        );
        assert_eq!(
            failures
                .last(&key(0), Some(&logged(1_000, 2)))
                .unwrap()
                .count,
            3
        );
        assert_eq!(
            failures
                .last(&key(0), Some(&logged(60_000, 16)))
                .unwrap()
                .count,
            16
        );
        assert!(
            failures
                .backoff(&key(0), Some(&logged(60_000, 16)), 68_999)
                .is_some()
        );
    }

    #[test]
    fn retry_after_is_the_least_and_ten_times_retry_cap_the_most_of_it() {
        let (failures, policy, record) = (Failures::default(), policy(), value(7));
        let next = |retry_after| {
            failures
                .note(
                    &key(0),
                    Some(&record),
                    &policy,
                    &status(503, retry_after),
                    0,
                    1.0,
                )
                .failure
                .next_attempt_ms
        };
        assert_eq!(next(None), 3_000);
        assert_eq!(next(Some(20)), 20_000);
        assert_eq!(next(Some(599)), 599_000);
        assert_eq!(next(Some(86_400)), 600_000);
    }

    #[test]
    fn without_an_entry_a_failure_is_never_logged_and_holds_for_error_ttl() {
        let (failures, policy) = (Failures::default(), policy());
        let noted = failures.note(&key(0), None, &policy, &REFUSED, 5_000, 1.0);
        assert_eq!(
            (noted.failure.next_attempt_ms, noted.is_logged),
            (6_000, false)
        );
        assert_eq!(failures.backoff(&key(0), None, 5_999), Some(noted.failure));
        assert_eq!(failures.backoff(&key(0), None, 6_000), None);
        // A value came by another way: its refresh did not fail.
        assert_eq!(failures.backoff(&key(0), Some(&value(7)), 5_999), None);
    }

    #[test]
    fn success_resets_the_count() {
        let (failures, policy, record) = (Failures::default(), policy(), value(7));
        (0..5).for_each(|_| _ = failures.note(&key(0), Some(&record), &policy, &REFUSED, 0, 1.0));
        failures.forget(&key(0));
        assert_eq!(
            failures
                .note(&key(0), Some(&record), &policy, &REFUSED, 0, 1.0)
                .failure
                .count,
            1
        );
    }

    #[test]
    fn memory_of_failures_is_bounded() {
        let (failures, policy) = (
            Failures {
                keys_max: 10,
                ..Default::default()
            },
            policy(),
        );
        for n in 0..100 {
            failures.note(&key(n), None, &policy, &REFUSED, n as u64, 1.0);
            failures.note(&key(n), None, &policy, &REFUSED, n as u64 + 1, 1.0);
        }
        let known = failures.known.lock();
        assert_eq!(
            (known.failures.len(), known.by_next_attempt.len()),
            (10, 10)
        );
        assert!(known.failures.contains_key(&key(99)) && !known.failures.contains_key(&key(89)));
    }
}
