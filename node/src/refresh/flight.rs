//! How a flight begins, and what it does once it has a slot: it fetches a key's value and commits it.
//!
//! ```text
//! note the revision ─► still needed? ─► upstream ─► commit ─┬─► stored or revalidated: everybody is told its revision
//!        ▲                                                  ├─► not stored, or late: everybody is given the value itself
//!        └──────────────── the key changed meanwhile ◄──────┘   (fenced)
//! ```
//! Promises that no answer holds what was fetched before a Delete or Invalidate that the asker
//! could know of; that a failed fetch changes nothing stored (P3); and an end, whatever happens.
//! Once it runs, a flight goes on when all who waited are gone. Must never know who
//! waits.

use std::{io, sync::Arc, time::Duration};

use holdfast_proto::{
    Key, Revision, content_hash,
    limits::{FETCH_TIMEOUT_MAX, TAG_BYTES_MAX, VALUE_BYTES_MAX},
    peer::{self, CommitFetch, Validators, command::Op, commit_fetch, outcome},
    timeline::Millis,
    v1::FailureClass,
};
use holdfast_raft::{InMemory, Replica, View};
use tracing::Instrument;

use super::{
    Refresher, is_due,
    outcome::{CommitOutcome, FetchOutcome, Need},
    queue::{Flight, Priority, Queue, Ready},
    waiter::Waiter,
};
use crate::{
    policy::{Matched, OnNotFound, Policy},
    rules::Rules,
    secret::Secrets,
    telemetry,
    template::TextTemplate,
    upstream::{Content, FetchFailed, Fetched, Said, Upstream, Value},
    wanted::Before,
};

/// A key that changes during each of so many fetches changes faster than it can be fetched.
const ROUNDS_MAX: usize = 3;
/// How long a commit may take before its fate is nobody's concern.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);
/// What waiters give a commit at least before they get the value unstored, though the policy says
/// they never wait for a fetch: the value is here, and a commit takes a few milliseconds.
const COMMIT_PATIENCE_MIN: Duration = Duration::from_millis(20);

/// A flight on its way: gives the slot back and ends the claim on the key, however it ends.
struct Running<'a> {
    refresher: &'a Arc<Refresher>,
    queue: &'a Arc<Queue>,
    flight: &'a Arc<Flight>,
    priority: Priority,
}

/// How a flight ended.
struct Ended {
    outcome: FetchOutcome,
    /// For all replicas to know.
    to_log: Option<CommitFetch>,
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let left = self.queue.leave(self.flight, self.priority);
        self.refresher.run_flights(self.queue, left.ready);
        if left.is_wanted_again {
            self.refresher.ask(&self.flight.key, Priority::Asked);
        }
    }
}

impl Refresher {
    /// A refresh that nobody waits for, if this node leads and it is needed.
    pub(super) fn ask(self: &Arc<Self>, key: &Key, priority: Priority) {
        let rules = self.rules.load();
        let (Some(policy), Some(replica)) = (rules.policy(key), self.replicas.of_key(key)) else {
            return;
        };
        let Some(term) = replica.leads() else { return };
        let queue = self.queue(&policy.upstream);
        let now = replica.now();
        let wanted = match replica.in_memory(key) {
            InMemory::Found(view) => {
                view.is_live(now)
                    && is_due(&view, policy, now)
                    && queue.gate.closed_by(key, Some(&view), now).is_none()
            }
            // Deleted since: whoever wants it reads it, and waits.
            InMemory::Absent => false,
            InMemory::Unknown => true,
        };
        if wanted {
            // Dropped under pressure: the next reader asks again.
            drop(self.join_queue(&queue, key, replica, term, priority, Need::IfDue));
        }
    }

    /// For who wants to wait; `None` if too much waits already.
    pub(super) fn join_queue(
        self: &Arc<Self>,
        queue: &Arc<Queue>,
        key: &Key,
        replica: &Arc<Replica>,
        term: u64,
        priority: Priority,
        need: Need,
    ) -> Option<Waiter> {
        let joined = queue.join(key, replica, term, priority, need);
        self.run_flights(queue, joined.ready);
        if joined.is_joined {
            self.metrics.flight_joined(queue.upstream());
        }
        if joined.waiter.is_none() {
            self.metrics.flight_refused(queue.upstream());
        }
        joined.waiter
    }

    /// Starts flights that have a slot.
    fn run_flights(self: &Arc<Self>, queue: &Arc<Queue>, ready: Vec<Ready>) {
        for Ready { flight, priority } in ready {
            // A flight may end while its runtime does.
            if self.stop.is_cancelled() || tokio::runtime::Handle::try_current().is_err() {
                flight.end(FetchOutcome::NotLeading);
                continue;
            }
            let span = flight.span.clone();
            let run = Box::pin(self.clone().run(queue.clone(), flight, priority));
            self.tasks.spawn("flight", run.instrument(span));
        }
    }

    async fn run(self: Arc<Self>, queue: Arc<Queue>, flight: Arc<Flight>, priority: Priority) {
        let _running = Running {
            refresher: &self,
            queue: &queue,
            flight: &flight,
            priority,
        };
        self.metrics.flight_started(queue.upstream());
        let fetched = async {
            let ended = Box::pin(self.rounds(&queue, &flight)).await;
            flight.report(ended.outcome);
            // Before the slot is given back: an upstream that fails at once must not fill the
            // proposer's queue.
            if let Some(commit) = ended.to_log {
                self.log_failure(&flight, commit).await;
            }
        };
        tokio::select! {
            () = flight.ended() => {}
            () = self.stop.cancelled() => flight.report(FetchOutcome::NotLeading),
            () = fetched => {}
        }
    }

    async fn log_failure(&self, flight: &Flight, commit: CommitFetch) {
        let op = Op::CommitFetch(commit);
        // Without it the next leader tries once too often; not worth more than one try.
        let deadline = self.clock.deadline(COMMIT_TIMEOUT);
        if let Err(error) = flight.replica.write(op, None, &deadline).await {
            tracing::debug!(%error, "a failed fetch was not logged");
        }
    }

    async fn rounds(&self, queue: &Queue, flight: &Flight) -> Ended {
        let rules = self.rules.load_full();
        let Some((matched, upstream)) = source(&rules, queue, &flight.key) else {
            return FetchOutcome::NoPolicy.into();
        };
        for _ in 0..ROUNDS_MAX {
            flight.round_begins();
            // Before anything is looked at: whatever happens to the key from here on wins over what
            // is fetched.
            let started = flight.replica.applied().revision;
            let stored = match flight.replica.peek(&flight.key).await {
                Ok(stored) if flight.replica.leads() == Some(flight.term) => stored,
                Ok(_) => return FetchOutcome::NotLeading.into(),
                Err(error) => {
                    tracing::warn!(%error, "a fetch ended: the state cannot be read");
                    return FetchOutcome::NotLeading.into();
                }
            };
            let now = flight.replica.now();
            let live = stored.clone().filter(|stored| stored.is_live(now));
            // A refresh of what is gone by now. A reader who misses it just now is told, and asks
            // again.
            if live.is_none() && !flight.is_missed() {
                return FetchOutcome::NotLeading.into();
            }
            let (key, policy, need) = (&flight.key, matched.policy, flight.need());
            if let Some(outcome) = needless(queue, key, policy, live.as_ref(), now, need) {
                return outcome.into();
            }
            let round = Round {
                flight,
                queue,
                policy: matched.policy,
                started,
                stored: stored.as_ref(),
                live: live.as_ref(),
            };
            let came = match self.call(upstream, &round, &matched).await {
                Ok(came) => came,
                Err(failed) => return round.failed(failed),
            };
            match self.store(&round, &came).await {
                CommitOutcome::Stored(revision) => {
                    queue.gate.succeeded(&flight.key);
                    return FetchOutcome::Committed { revision }.into();
                }
                CommitOutcome::Unstored(class)
                    if !flight.replica.changed_since(&flight.key, started).await =>
                {
                    // With an entry it must not be tried again at once; without one the next reader
                    // may.
                    let held_back = live.as_ref().map(|_| round.failed(class.into()));
                    return Ended {
                        outcome: round
                            .unstored(&came)
                            .await
                            .unwrap_or(FetchOutcome::Overloaded),
                        to_log: held_back.and_then(|ended| ended.to_log),
                    };
                }
                CommitOutcome::Unstored(_) | CommitOutcome::Fenced => {}
            }
        }
        match live(flight).await {
            Ok(Some(live)) => FetchOutcome::Committed {
                revision: live.changed(),
            }
            .into(),
            _ => FetchOutcome::Overloaded.into(),
        }
    }

    async fn call(
        &self,
        upstream: &Upstream,
        round: &Round<'_>,
        matched: &Matched<'_>,
    ) -> Result<Came, FetchFailed> {
        let key = &round.flight.key;
        let tags = tags(matched, key)?;
        let headers = telemetry::trace_headers();
        // What is still the same keeps its tags.
        let stored = round.stored.filter(|stored| stored.tags() == tags);
        let known = stored.and_then(View::validators);
        let began = self.clock.monotonic();
        round.flight.called();
        let call = upstream.fetch(key, matched.captures.as_slice(), &headers, known);
        let called = tokio::time::timeout(FETCH_TIMEOUT_MAX, Box::pin(call)).await;
        let called = called.unwrap_or(Err(FailureClass::Timeout.into()));
        let took = self.clock.monotonic().saturating_sub(began);
        self.metrics
            .upstream_called(round.queue.upstream(), &code(&called), took);
        let fetched = match called {
            Err(failed) if round.is_answer(&failed) => return Ok(Came::nothing(took)),
            called => called?,
        };
        let can_revalidate = round.flight.replica.can_revalidate();
        let mut said = round.policy.heeded(fetched.said);
        if !can_revalidate {
            said.age = Duration::ZERO;
        }
        let brought = match fetched.content {
            // It was asked about nothing, then.
            Content::Unchanged => Brought::Same(stored.ok_or(FailureClass::Malformed)?.clone()),
            Content::Value(value) => {
                let before = round.live.filter(|live| !live.is_negative()).map(before);
                round.policy.wanted.judge(&value, before)?;
                let same = stored.filter(|stored| can_revalidate && is_same(stored, &value));
                match same {
                    Some(stored) => Brought::Same(stored.clone()),
                    None => Brought::New(value),
                }
            }
        };
        round.queue.fetch_took(took);
        Ok(Came {
            brought,
            said,
            validators: fetched.validators.filter(|_| can_revalidate),
            tags,
            took,
        })
    }

    /// Commits, and gives those who wait the value itself if that takes longer than they should
    /// wait.
    async fn store(&self, round: &Round<'_>, came: &Came) -> CommitOutcome {
        let (flight, policy) = (round.flight, round.policy);
        let bytes_max = policy.max_value_bytes.min(VALUE_BYTES_MAX as u64);
        let refused = match &came.brought {
            _ if came.said.no_store => Some(FailureClass::NoStore),
            Brought::New(value) if value.body.len() as u64 > bytes_max => {
                Some(FailureClass::TooLarge)
            }
            _ => None,
        };
        if let Some(class) = refused {
            self.metrics.commit("unstored");
            return CommitOutcome::Unstored(class);
        }
        let (result, stored_as) = round.result(came);
        let commit = Op::CommitFetch(round.commit(result));
        let deadline = self.clock.deadline(COMMIT_TIMEOUT);
        let mut write = Box::pin(flight.replica.write(commit, None, &deadline));
        let patience = policy.soft_timeout.max(COMMIT_PATIENCE_MIN);
        let written = match tokio::time::timeout(patience, &mut write).await {
            Ok(written) => written,
            Err(_) => {
                if let Some(late) = round.unstored(came).await {
                    flight.report(late);
                }
                write.await
            }
        };
        let (outcome, counted) = match written.map(|outcome| outcome.result) {
            Ok(Some(outcome::Result::Done(done))) => {
                (CommitOutcome::Stored(done.revision), stored_as)
            }
            Ok(Some(outcome::Result::Fenced(_))) => (CommitOutcome::Fenced, "fenced"),
            Ok(other) => {
                tracing::warn!(?other, "a fetched value was not stored");
                (CommitOutcome::Unstored(FailureClass::Unspecified), "failed")
            }
            Err(error) => {
                tracing::debug!(%error, "a fetched value was not stored");
                let counted = if error.not_applied() {
                    "unstored"
                } else {
                    "failed"
                };
                (CommitOutcome::Unstored(FailureClass::Unspecified), counted)
            }
        };
        self.metrics.commit(counted);
        outcome
    }
}

/// What a call brought, as far as the policy heeds it.
struct Came {
    brought: Brought,
    said: Said,
    validators: Option<Validators>,
    tags: Vec<String>,
    took: Duration,
}

enum Brought {
    New(Value),
    /// What is stored, by the upstream's word or because it is equal.
    Same(View),
    /// There is no such thing.
    Nothing,
}

impl Came {
    fn nothing(took: Duration) -> Self {
        Self {
            brought: Brought::Nothing,
            said: Said::default(),
            validators: None,
            tags: Vec::new(),
            took,
        }
    }
}

/// One try of a flight.
struct Round<'a> {
    flight: &'a Flight,
    queue: &'a Queue,
    policy: &'a Policy,
    started: Revision,
    /// Also what is kept only to be asked about.
    stored: Option<&'a View>,
    /// What may be served.
    live: Option<&'a View>,
}

impl Round<'_> {
    /// Whether that an upstream has no such thing is what it was asked for, and not a failure.
    fn is_answer(&self, failed: &FetchFailed) -> bool {
        let is_not_found =
            failed.class == FailureClass::Status && matches!(failed.status, 404 | 410);
        let may_be_replaced = self.live.is_none_or(View::is_negative)
            || self.policy.on_not_found == OnNotFound::Negative;
        is_not_found
            && may_be_replaced
            && !self.policy.negative_ttl.is_zero()
            && self.flight.replica.can_revalidate()
    }

    /// What a call brought, as a commit says it: of a value that is there already only the times.
    /// Also how the commit is counted.
    fn result(&self, came: &Came) -> (commit_fetch::Result, &'static str) {
        let usual = self.queue.usual_fetch();
        let mut lifetime =
            self.policy
                .lifetime(&came.said, rand::random(), usual, self.live.is_none());
        let known = match &came.brought {
            Brought::Same(stored) => stored.validators(),
            Brought::New(_) | Brought::Nothing => None,
        };
        // What cannot be asked about is not kept for it.
        if came.validators.is_none() && known.is_none() {
            lifetime.keep_ms = 0;
        }
        let took_ms = millis(came.took);
        let age_ms = millis(came.said.age);
        match &came.brought {
            Brought::Same(stored) => {
                let new = came.validators.as_ref().filter(|new| known != Some(new));
                let revalidated = peer::Revalidated {
                    lifetime: Some(lifetime),
                    took_ms,
                    age_ms,
                    content_hash: stored.content_hash(),
                    validators: new.cloned(),
                };
                let result = commit_fetch::Result::Revalidated(revalidated);
                (result, "revalidated")
            }
            Brought::New(value) => {
                let fetched = peer::Fetched {
                    value: value.body.clone(),
                    content_type: value.content_type.clone(),
                    tags: came.tags.clone(),
                    lifetime: Some(lifetime),
                    took_ms,
                    age_ms,
                    validators: came.validators.clone(),
                };
                (commit_fetch::Result::Fetched(fetched), "stored")
            }
            Brought::Nothing => {
                let lifetime = self.policy.negative_lifetime(rand::random(), usual);
                let not_found = peer::NotFound {
                    lifetime: Some(lifetime),
                    took_ms,
                };
                (commit_fetch::Result::NotFound(not_found), "negative")
            }
        }
    }

    /// What those who wait are given if it is not stored, or not in time.
    async fn unstored(&self, came: &Came) -> Option<FetchOutcome> {
        let (value, content_type) = match &came.brought {
            Brought::Nothing => return None,
            Brought::New(value) => (value.body.clone(), value.content_type.clone()),
            Brought::Same(_) => {
                let read = self.flight.replica.read(&self.flight.key).await;
                let stored = read.ok().flatten();
                let stored = stored.as_ref()?;
                (stored.value()?.clone(), stored.content_type().to_owned())
            }
        };
        Some(FetchOutcome::Unstored {
            value,
            content_type,
            started: self.started,
        })
    }

    fn failed(&self, failed: FetchFailed) -> Ended {
        let now = self.flight.replica.now();
        let noted = self.queue.gate.failed(
            &self.flight.key,
            self.live,
            self.policy,
            &failed,
            now,
            rand::random(),
        );
        let failure = noted.failure;
        // What has no class is our own trouble with storing, which the log would not take either.
        let is_logged = noted.is_logged && failure.class != FailureClass::Unspecified;
        let to_log = is_logged.then(|| {
            self.commit(commit_fetch::Result::Failed(peer::FetchFailed {
                class: failure.class.into(),
                status: failure.status,
                count: failure.count,
                retry_after_ms: failure.next_attempt_ms.saturating_sub(now),
            }))
        });
        Ended {
            outcome: FetchOutcome::Failed(failure),
            to_log,
        }
    }

    fn commit(&self, result: commit_fetch::Result) -> CommitFetch {
        CommitFetch {
            key: self.flight.key.clone().into(),
            fetch_started_revision: self.started,
            term: self.flight.term,
            result: Some(result),
        }
    }
}

impl From<FetchOutcome> for Ended {
    fn from(outcome: FetchOutcome) -> Self {
        Self {
            outcome,
            to_log: None,
        }
    }
}

/// `None` if the rules changed since the key was queued for this upstream.
fn source<'a>(
    rules: &'a Rules,
    queue: &Queue,
    key: &'a Key,
) -> Option<(Matched<'a>, &'a Arc<Upstream>)> {
    let matched = rules.matched(key)?;
    let upstream = rules.upstream(&matched.policy.upstream)?;
    (*matched.policy.upstream == *queue.upstream()).then_some((matched, upstream))
}

/// The outcome that needs no fetch: the entry is not due, or the key is to be left alone.
pub(super) fn needless(
    queue: &Queue,
    key: &Key,
    policy: &Policy,
    live: Option<&View>,
    now: Millis,
    need: Need,
) -> Option<FetchOutcome> {
    match live {
        Some(view) if need == Need::IfDue && !is_due(view, policy, now) => {
            Some(FetchOutcome::Committed {
                revision: view.changed(),
            })
        }
        _ => queue
            .gate
            .closed_by(key, live, now)
            .map(FetchOutcome::Failed),
    }
}

/// What is stored and may still be served.
async fn live(flight: &Flight) -> io::Result<Option<View>> {
    let view = flight.replica.peek(&flight.key).await?;
    let now = flight.replica.now();
    Ok(view.filter(|view| view.is_live(now)))
}

/// Whether a value is what is stored, so that only its times are new.
fn is_same(stored: &View, value: &Value) -> bool {
    !stored.is_negative()
        && stored.size_bytes() == value.body.len() as u64
        && stored.content_type() == value.content_type
        && stored.content_hash() == content_hash(&value.body)
}

fn before(live: &View) -> Before<'_> {
    Before {
        content_type: live.content_type(),
        origin: live.origin(),
        is_empty: live.size_bytes() == 0,
    }
}

/// A key whose tags do not fit is refused before any call, as one that makes no URL is.
fn tags(matched: &Matched<'_>, key: &Key) -> Result<Vec<String>, FetchFailed> {
    let fill = |template: &TextTemplate| {
        let filled = template.fill(key, matched.captures.as_slice(), &Secrets::default());
        filled
            .ok()
            .filter(|tag| !tag.is_empty() && tag.len() <= TAG_BYTES_MAX)
            .ok_or_else(|| FailureClass::Refused.into())
    };
    matched.policy.tags.iter().map(fill).collect()
}

fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(Millis::MAX)
}

/// For metrics: a status, or the name of a class.
fn code(called: &Result<Fetched, FetchFailed>) -> String {
    match called {
        Ok(fetched) if fetched.content == Content::Unchanged => "304".to_owned(),
        Ok(_) => "200".to_owned(),
        Err(failed) if failed.status != 0 => failed.status.to_string(),
        Err(failed) => failed.to_string(),
    }
}
