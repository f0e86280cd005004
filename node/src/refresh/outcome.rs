//! How a fetch ends: for those who wait for it, and for what it brought.

use bytes::Bytes;
use holdfast_proto::{
    Revision,
    peer::{FetchRefused, UnstoredValue, fetch_response},
    v1::FailureClass,
};

use super::failures::Failure;

/// What one who waits for a fetch is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchOutcome {
    /// The key is as it should be at this revision of its shard: wait for it, then read.
    Committed { revision: Revision },
    /// Fetched, and not stored or not stored in time.
    Unstored {
        value: Bytes,
        content_type: String,
        /// Worth nothing if the key changed after it.
        started: Revision,
    },
    /// The upstream failed, now or a short time ago.
    Failed(Failure),
    /// The upstream was not called: too many fetches run or wait, or the key changes faster than
    /// it can be fetched.
    Overloaded,
    /// Time ran out while the upstream was being called; the fetch goes on.
    TimedOut,
    /// The leader's policies name no upstream for this key.
    NoPolicy,
    /// Nobody leads the key's shard, or whom this was asked leads no more.
    NotLeading,
}

/// What one wants who asks for a fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Need {
    /// A value that is not due; if there is one, the upstream is not asked.
    IfDue,
    /// What the upstream says from now on.
    Anew,
}

impl Need {
    /// A flight that found the value to be good enough, and did not call the upstream, did so before
    /// it knew of who wants it anew: another one has to. Whatever else it came to counts for all.
    pub(super) fn is_met_by(self, outcome: &FetchOutcome, is_called: bool) -> bool {
        let is_needless = matches!(outcome, FetchOutcome::Committed { .. }) && !is_called;
        self == Self::IfDue || !is_needless
    }
}

/// What became of a fetched value.
pub(super) enum CommitOutcome {
    Stored(Revision),
    /// Something newer was there.
    Fenced,
    /// It cannot be stored: waiters get it, and the next refresh is held back for this reason.
    Unstored(FailureClass),
}

/// As the leader tells a follower.
impl From<FetchOutcome> for fetch_response::Result {
    fn from(outcome: FetchOutcome) -> Self {
        Self::Refused(match outcome {
            FetchOutcome::Committed { revision } => return Self::CommittedRevision(revision),
            FetchOutcome::Unstored {
                value,
                content_type,
                ..
            } => {
                return Self::Unstored(UnstoredValue {
                    value,
                    content_type,
                });
            }
            FetchOutcome::Failed(failure) => FetchRefused {
                class: failure.class.into(),
                status: failure.status,
                count: failure.count,
                at_ms: failure.at_ms,
                next_attempt_ms: failure.next_attempt_ms,
                ..Default::default()
            },
            FetchOutcome::Overloaded => FetchRefused {
                class: FailureClass::Overloaded.into(),
                ..Default::default()
            },
            FetchOutcome::TimedOut => FetchRefused {
                timed_out: true,
                ..Default::default()
            },
            FetchOutcome::NoPolicy => FetchRefused {
                no_policy: true,
                ..Default::default()
            },
            FetchOutcome::NotLeading => FetchRefused {
                not_leader: true,
                ..Default::default()
            },
        })
    }
}

/// As a follower hears it from the leader, which has judged by its own state.
impl From<fetch_response::Result> for FetchOutcome {
    fn from(result: fetch_response::Result) -> Self {
        match result {
            fetch_response::Result::CommittedRevision(revision) => Self::Committed { revision },
            fetch_response::Result::Unstored(unstored) => Self::Unstored {
                value: unstored.value,
                content_type: unstored.content_type,
                started: Revision::MAX,
            },
            fetch_response::Result::Refused(refused) => Self::refused(&refused),
        }
    }
}

impl FetchOutcome {
    fn refused(refused: &FetchRefused) -> Self {
        match refused.class() {
            _ if refused.not_leader => Self::NotLeading,
            _ if refused.no_policy => Self::NoPolicy,
            _ if refused.timed_out => Self::TimedOut,
            FailureClass::Overloaded => Self::Overloaded,
            class => Self::Failed(Failure {
                class,
                status: refused.status,
                count: refused.count,
                at_ms: refused.at_ms,
                next_attempt_ms: refused.next_attempt_ms,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_value_that_was_not_asked_for_is_nothing_to_who_wants_it_anew() {
        let committed = FetchOutcome::Committed { revision: 7 };
        assert!(Need::IfDue.is_met_by(&committed, false));
        assert!(Need::Anew.is_met_by(&committed, true));
        assert!(!Need::Anew.is_met_by(&committed, false));
        // Else it would ask for ever what is refused at once.
        for refused in [
            FetchOutcome::NoPolicy,
            FetchOutcome::Overloaded,
            FetchOutcome::NotLeading,
            FetchOutcome::TimedOut,
        ] {
            assert!(Need::Anew.is_met_by(&refused, false), "{refused:?}");
        }
    }

    #[test]
    fn a_follower_hears_what_the_leader_says() {
        let failure = Failure {
            class: FailureClass::Status,
            status: 503,
            count: 4,
            at_ms: 1_000,
            next_attempt_ms: 9_000,
        };
        for outcome in [
            FetchOutcome::Committed { revision: 7 },
            FetchOutcome::Unstored {
                value: Bytes::from_static(b"v"),
                content_type: "text/plain".into(),
                started: Revision::MAX,
            },
            FetchOutcome::Failed(failure),
            FetchOutcome::Overloaded,
            FetchOutcome::TimedOut,
            FetchOutcome::NoPolicy,
            FetchOutcome::NotLeading,
        ] {
            let told = fetch_response::Result::from(outcome.clone());
            assert_eq!(FetchOutcome::from(told), outcome);
        }
    }
}
