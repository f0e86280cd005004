//! What a read waits for that memory alone does not answer: the cluster's fetch of its key, and this
//! replica to have what that brought.
//!
//! Promises that nobody waits longer than the policy and the caller say, and that who gets no value
//! learns why.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_proto::{
    Key, Revision, reason,
    timeline::Millis,
    v1::{self, FailureClass},
};
use holdfast_raft::{Deadline, ReadError, Replica, View};

use super::{
    Cache,
    controls::{Controls, Demand},
    forward::Hop,
};
use crate::{
    error::{Error, UpstreamFailure},
    policy::Policy,
    refresh::{FetchOutcome, Need},
    rules::Rules,
};

/// Fetches one read waits for, if what they bring is deleted or expired again before it can be
/// looked up.
const FETCHES_MAX: usize = 3;

/// One key asked for, at a replica that has seen enough.
#[derive(Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) key: &'a Key,
    pub(super) replica: &'a Arc<Replica>,
    pub(super) controls: &'a Controls,
    pub(super) rules: &'a Rules,
    pub(super) hop: Hop,
    pub(super) deadline: &'a Deadline,
}

/// What there is after the wait.
pub(super) enum Waited {
    /// Stored here, to be served whatever its phase is by now.
    Stored(View),
    /// Fetched and not stored.
    Unstored { value: Bytes, content_type: String },
    /// This replica lagged behind a value that the cluster has: the leader answered.
    Leader(v1::BatchGetResponse),
    /// Nothing, and nobody failed.
    Nothing,
    /// Nothing, and nowhere to get it from.
    NoUpstream,
}

/// What a read waits for.
pub(super) enum Wait<'p> {
    /// Nothing is stored.
    ForValue { policy: &'p Policy },
    /// A better value than this one, for a moment.
    Softly { live: View, policy: &'p Policy },
    /// What the upstream says now, and nothing else.
    Anew {
        live: Option<View>,
        policy: &'p Policy,
    },
    /// What the upstream says now, else what is stored.
    NetworkFirst {
        live: Option<View>,
        policy: &'p Policy,
    },
    /// By the rules here there is no upstream.
    NoPolicy,
}

/// What a reader wants who waits for a fetch.
struct Wanted {
    need: Need,
    /// It is served already, so that finding it again is nothing new.
    known: Option<View>,
}

impl Cache {
    pub(super) async fn wait(&self, asked: Asked<'_>, wait: Wait<'_>) -> Result<Waited, Error> {
        match wait {
            Wait::ForValue { policy } => self.wait_for_value(asked, policy).await,
            Wait::Softly { live, policy } => self.wait_softly(asked, live, policy).await,
            Wait::Anew { live, policy } => {
                let wanted = Wanted {
                    need: Need::Anew,
                    known: live,
                };
                self.wait_for(asked, policy, &wanted).await
            }
            Wait::NetworkFirst { live, policy } => {
                let wanted = Wanted {
                    need: Need::Anew,
                    known: live,
                };
                match self.wait_for(asked, policy, &wanted).await {
                    // As it is now: a client may have changed it meanwhile.
                    Err(_) | Ok(Waited::NoUpstream) if wanted.known.is_some() => {
                        let stored = read(asked).await?;
                        Ok(stored.map_or(Waited::Nothing, Waited::Stored))
                    }
                    waited => waited,
                }
            }
            Wait::NoPolicy => self.ask_other_rules(asked).await,
        }
    }

    /// Nothing is stored, and by the rules here no upstream has it either. Where the leader has
    /// other rules, they count.
    async fn ask_other_rules(&self, asked: Asked<'_>) -> Result<Waited, Error> {
        let judge = self.refresher.judged_by(asked.replica, asked.rules);
        let Some(leader) = judge.filter(|_| asked.hop == Hop::Allowed) else {
            return Ok(Waited::NoUpstream);
        };
        let key = std::slice::from_ref(asked.key);
        let told = self.ask(asked.replica, leader, key, asked.controls, asked.deadline);
        match told.await {
            Ok(response) => Ok(Waited::Leader(response)),
            Err(error) if error.metadata(reason::UPSTREAM).is_some() => Err(error),
            // Without the leader this node is as good as it gets.
            Err(_) => Ok(Waited::NoUpstream),
        }
    }

    /// Past stale_while_revalidate, with an upstream that may answer: a better value if it comes in
    /// time, else the one there is.
    async fn wait_softly(
        &self,
        asked: Asked<'_>,
        old: View,
        policy: &Policy,
    ) -> Result<Waited, Error> {
        self.metrics.read_waited("soft_timeout");
        let patience = asked.deadline.at_most(policy.soft_timeout);
        let outcome = self
            .refresher
            .fetch(asked.key, policy, patience.left(), Need::IfDue)
            .await;
        match outcome {
            FetchOutcome::Unstored {
                value,
                content_type,
                ..
            } => {
                return Ok(Waited::Unstored {
                    value,
                    content_type,
                });
            }
            FetchOutcome::Committed { revision } => {
                // Late here: the old value is still within its window.
                let _ = asked.replica.wait_for_revision(revision, &patience).await;
            }
            _ => {}
        }
        match read(asked).await? {
            Some(view) if view.is_live(asked.controls.now(asked.replica)) => {
                Ok(Waited::Stored(view))
            }
            // It ran out in these milliseconds; it was being served when the reader came.
            Some(view) if view.changed() == old.changed() => Ok(Waited::Stored(old)),
            _ => self.wait_for_value(asked, policy).await,
        }
    }

    /// A miss: waits for the flight that the whole cluster shares. Once the upstream is called, the
    /// fetch goes on and is stored whether somebody waits or not.
    async fn wait_for_value(&self, asked: Asked<'_>, policy: &Policy) -> Result<Waited, Error> {
        let wanted = Wanted {
            need: Need::IfDue,
            known: None,
        };
        self.wait_for(asked, policy, &wanted).await
    }

    async fn wait_for(
        &self,
        asked: Asked<'_>,
        policy: &Policy,
        wanted: &Wanted,
    ) -> Result<Waited, Error> {
        self.metrics.read_waited("miss");
        let patience = asked.deadline.at_most(policy.hard_timeout);
        for _ in 0..FETCHES_MAX {
            let outcome = self
                .refresher
                .fetch(asked.key, policy, patience.left(), wanted.need)
                .await;
            let revision = match outcome {
                FetchOutcome::Committed { revision } => revision,
                FetchOutcome::Unstored {
                    value,
                    content_type,
                    ..
                } => {
                    return Ok(Waited::Unstored {
                        value,
                        content_type,
                    });
                }
                FetchOutcome::NoPolicy => return Ok(Waited::NoUpstream),
                failed => {
                    // Whose time it was that ran out, if one did.
                    let hurried = !patience.is_before(asked.deadline);
                    return self
                        .without_fetch(asked, policy, wanted, failed, hurried)
                        .await;
                }
            };
            if let Some(elsewhere) = self.catch_up_with(asked, revision, &patience).await? {
                return Ok(elsewhere);
            }
            let view = read(asked).await?;
            let now = asked.controls.now(asked.replica);
            if let Some(view) = view.filter(|view| is_fetched(view, revision, now)) {
                return Ok(Waited::Stored(view));
            }
        }
        Ok(Waited::Nothing)
    }

    /// The fetch is committed; this replica may not have it yet. One that lags lets the leader
    /// answer.
    async fn catch_up_with(
        &self,
        asked: Asked<'_>,
        revision: Revision,
        patience: &Deadline,
    ) -> Result<Option<Waited>, Error> {
        let briefly = &patience.at_most(self.settings.session_wait);
        if asked
            .replica
            .wait_for_revision(revision, briefly)
            .await
            .is_ok()
        {
            return Ok(None);
        }
        let rest = asked.replica.wait_for_revision(revision, asked.deadline);
        let leader = asked
            .replica
            .leader()
            .filter(|leader| !leader.is_self && asked.hop == Hop::Allowed);
        let reached = match leader {
            None => rest.await,
            Some(leader) => {
                let (key, deadline) = (std::slice::from_ref(asked.key), asked.deadline);
                // The upstream was asked: what that brought is good enough.
                let controls = &Controls {
                    demand: Demand::default(),
                    ..asked.controls.clone()
                };
                tokio::pin!(rest);
                tokio::select! {
                    Ok(response) = self.ask(asked.replica, leader, key, controls, deadline) => {
                        return Ok(Some(Waited::Leader(response)));
                    }
                    reached = &mut rest => reached,
                    else => Err(ReadError::NoLeader),
                }
            }
        };
        match reached {
            Ok(()) => Ok(None),
            Err(error) => Err(self.sent_to_leader(asked.replica, error.into())),
        }
    }

    /// No fetch succeeded. A client's Set may have come meanwhile; else the reader learns why there is
    /// nothing.
    async fn without_fetch(
        &self,
        asked: Asked<'_>,
        policy: &Policy,
        wanted: &Wanted,
        outcome: FetchOutcome,
        hurried: bool,
    ) -> Result<Waited, Error> {
        if let Some(view) = read(asked).await?
            && view.is_live(asked.controls.now(asked.replica))
            && wanted.is_new(&view)
        {
            return Ok(Waited::Stored(view));
        }
        let error = no_value(outcome, &policy.upstream, asked.replica.now(), hurried);
        Err(self.sent_to_leader(asked.replica, error))
    }
}

impl Wanted {
    fn is_new(&self, view: &View) -> bool {
        let is_known = |known: &View| known.changed() == view.changed();
        !self.known.as_ref().is_some_and(is_known)
    }
}

/// What this replica has of the key.
async fn read(asked: Asked<'_>) -> Result<Option<View>, Error> {
    let read = asked.replica.read(asked.key).await;
    read.map_err(|error| Error::disk(&error))
}

/// Whether this is what a reader waited for: servable, or brought by its own fetch and untouched
/// since, however short its life.
fn is_fetched(view: &View, revision: Revision, now: Millis) -> bool {
    view.is_live(now)
        || view.changed() == revision
        || (view.version() >= revision && view.changed() == view.version())
}

/// Why there is no value. `hurried`: the caller's deadline was shorter than the time a miss may
/// take.
fn no_value(outcome: FetchOutcome, upstream: &str, now: Millis, hurried: bool) -> Error {
    let failed = |class, status, next_attempt| {
        Error::upstream_failed(UpstreamFailure {
            upstream,
            class,
            status,
            next_attempt,
        })
    };
    match outcome {
        FetchOutcome::Failed(failure) => {
            let next_attempt = Duration::from_millis(failure.next_attempt_ms.saturating_sub(now));
            failed(failure.class, failure.status, Some(next_attempt))
        }
        FetchOutcome::TimedOut if hurried => Error::deadline().with(reason::UPSTREAM, upstream),
        FetchOutcome::TimedOut => failed(FailureClass::Timeout, 0, None),
        FetchOutcome::Overloaded => {
            let message =
                format!("too many fetches from upstream `{upstream}` are in flight or waiting");
            Error::new(reason::OVERLOADED, message).with(reason::UPSTREAM, upstream)
        }
        // Of the others none is the upstream's fault.
        _ => Error::no_leader().with(reason::UPSTREAM, upstream),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::peer::EntryRecord;

    use super::*;
    use crate::error::Code;
    use crate::refresh::Failure;

    fn view(version: u64, changed: u64, fresh_until_ms: Millis) -> View {
        View::from(EntryRecord {
            version,
            changed,
            fresh_until_ms,
            ..Default::default()
        })
    }

    #[test]
    fn a_waiter_gets_what_its_fetch_brought_even_if_that_expired_at_once() {
        assert!(is_fetched(&view(5, 5, 2_000), 5, 1_000));
        assert!(
            is_fetched(&view(5, 5, 2_000), 5, 2_000),
            "expired, but its own"
        );
        assert!(is_fetched(&view(6, 6, 2_000), 5, 2_000), "a newer one");
        assert!(!is_fetched(&view(4, 4, 2_000), 5, 2_000), "from before");
        assert!(
            !is_fetched(&view(5, 6, 2_000), 5, 2_000),
            "invalidated since"
        );
        assert!(
            is_fetched(&view(3, 5, 2_000), 5, 2_000),
            "expired, and found to be the same by its own"
        );
    }

    fn told(outcome: FetchOutcome) -> Error {
        no_value(outcome, "profiles", 10_000, false)
    }

    #[test]
    fn without_a_value_the_reader_learns_why() {
        let failure = |class| Failure {
            class,
            status: 0,
            count: 1,
            at_ms: 9_000,
            next_attempt_ms: 12_500,
        };
        let failed = told(FetchOutcome::Failed(failure(FailureClass::Connect)));
        assert_eq!(
            (failed.code(), failed.reason()),
            (Code::Unavailable, reason::UPSTREAM_FAILED)
        );
        assert_eq!(
            (
                failed.metadata(reason::UPSTREAM),
                failed.metadata(reason::CLASS)
            ),
            (Some("profiles"), Some("CONNECT"))
        );

        assert_eq!(
            told(FetchOutcome::Overloaded).code(),
            Code::ResourceExhausted
        );
        assert_eq!(told(FetchOutcome::NotLeading).reason(), reason::NO_LEADER);
    }

    #[test]
    fn who_ran_out_of_time_decides_what_is_said() {
        let hard_timeout = told(FetchOutcome::TimedOut);
        assert_eq!(
            (hard_timeout.code(), hard_timeout.metadata(reason::CLASS)),
            (Code::Unavailable, Some("TIMEOUT"))
        );
        assert_eq!(
            no_value(FetchOutcome::TimedOut, "profiles", 10_000, true).code(),
            Code::DeadlineExceeded
        );
    }
}
