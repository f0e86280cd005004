//! One fetch in progress, for everybody who waits for the key.
//!
//! ```text
//! note the revision ─► still needed? ─► upstream ─► commit ─┬─► stored: everybody is told its revision
//!        ▲                                                  ├─► not stored, or late: everybody is given the value itself
//!        └──────────────── the key changed meanwhile ◄──────┘   (fenced)
//! ```
//! Promises that no answer holds what was fetched before a Delete or Invalidate that the asker
//! could know of; that a failed fetch changes nothing stored (P3); and an end, whatever happens.
//! Who waits does not matter: a flight goes on when all of them are gone. Must never know who
//! waits.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use holdfast_proto::{
    Key, Revision,
    limits::{FETCH_TIMEOUT_MAX, TAG_BYTES_MAX, VALUE_BYTES_MAX},
    peer::{self, CommitFetch, EntryRecord, command::Op, commit_fetch, outcome},
    timeline::{FOREVER, Millis, Phase, Timeline},
    v1::{FailureClass, Origin},
};
use holdfast_raft::{
    Replica,
    state::memory::{Entry, Lookup},
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

use super::{
    Refresher,
    failures::Failure,
    lane::{Departure, Lane},
    marks::Hashed,
    slots::Priority,
};
use crate::{
    policy::{Matched, Policy},
    secret::Secrets,
    telemetry,
    upstream::{FetchFailed, Fetched},
};

/// A key that changes during each of so many fetches changes faster than it can be fetched.
const ROUNDS_MAX: usize = 3;
/// How long a commit may take before its fate is nobody's concern.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);
/// What waiters give a commit at least before they get the value unstored, though the policy says
/// they never wait for a fetch: the value is here, and a commit takes a few milliseconds.
const COMMIT_PATIENCE_MIN: Duration = Duration::from_millis(20);

/// What a flight has to say to those who wait. It may say more than one thing, each later one
/// better.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// The key is as it shall be at this revision of the shard.
    Committed {
        revision: Revision,
    },
    /// Fetched and not stored, or not yet. Worth nothing if the key changed after `started`.
    Unstored {
        value: Bytes,
        content_type: String,
        started: Revision,
    },
    Failed(Failure),
    Overloaded,
    /// Its leadership ended, or it could not go on. Whoever leads now may be asked.
    Ended,
}

pub(crate) struct Flight {
    pub(crate) key: Key,
    pub(crate) replica: Arc<Replica>,
    pub(crate) term: u64,
    /// On the monotonic clock.
    pub(crate) boarded_at: Duration,
    /// Some reader has no value: it is fetched though nothing is stored.
    is_missed: AtomicBool,
    answers: watch::Sender<Option<Answer>>,
    ended: CancellationToken,
    span: Span,
}

/// How a flight ended.
struct Flown {
    answer: Answer,
    /// For all replicas to know.
    to_log: Option<CommitFetch>,
}

/// What became of a fetched value.
enum Kept {
    Stored(Revision),
    Fenced,
    /// It cannot be stored: waiters get it, and the next refresh is held back for this reason.
    Unstored(FailureClass),
}

/// Gives the slot back and ends the claim on the key, however the flight ends.
struct Landing<'a> {
    refresher: &'a Arc<Refresher>,
    lane: &'a Arc<Lane>,
    flight: &'a Arc<Flight>,
    priority: Priority,
}

impl Flight {
    /// In the caller's span: what is fetched for a request shows in its trace.
    pub(crate) fn new(
        key: Key,
        replica: Arc<Replica>,
        term: u64,
        upstream: &str,
        boarded_at: Duration,
    ) -> Self {
        let span = tracing::info_span!("refresh.fetch", upstream, shard = replica.shard());
        Self {
            key,
            replica,
            term,
            boarded_at,
            is_missed: AtomicBool::new(false),
            answers: watch::Sender::new(None),
            ended: CancellationToken::new(),
            span,
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Answer>> {
        self.answers.subscribe()
    }

    pub(crate) fn wanted(&self, priority: Priority) {
        if priority == Priority::Miss {
            self.is_missed.store(true, Ordering::Relaxed);
        }
    }

    /// From outside: it shall not go on.
    pub(crate) fn end(&self, answer: Answer) {
        self.say(answer);
        self.ended.cancel();
    }

    fn say(&self, answer: Answer) {
        self.answers.send_replace(Some(answer));
    }

    fn leads(&self) -> bool {
        self.replica.leads() == Some(self.term)
    }

    fn commit(&self, started: Revision, result: commit_fetch::Result) -> CommitFetch {
        CommitFetch {
            key: self.key.clone().into(),
            fetch_started_revision: started,
            term: self.term,
            result: Some(result),
        }
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let departures = self.lane.land(self.flight, self.priority);
        self.refresher.depart(self.lane, departures);
    }
}

impl Refresher {
    /// Sets off flights that have a slot.
    pub(super) fn depart(self: &Arc<Self>, lane: &Arc<Lane>, departures: Vec<Departure>) {
        for Departure { flight, priority } in departures {
            // A flight may land while its runtime ends.
            if self.stop.is_cancelled() || tokio::runtime::Handle::try_current().is_err() {
                flight.end(Answer::Ended);
                continue;
            }
            let span = flight.span.clone();
            self.tasks
                .spawn(Box::pin(self.clone().fly(lane.clone(), flight, priority)).instrument(span));
        }
    }

    async fn fly(self: Arc<Self>, lane: Arc<Lane>, flight: Arc<Flight>, priority: Priority) {
        let landing = Landing {
            refresher: &self,
            lane: &lane,
            flight: &flight,
            priority,
        };
        self.metrics.flight_started(lane.name());
        let flown = tokio::select! {
            () = flight.ended.cancelled() => return,
            () = self.stop.cancelled() => Flown::from(Answer::Ended),
            flown = Box::pin(self.rounds(&lane, &flight)) => flown,
        };
        flight.say(flown.answer);
        drop(landing);
        if let Some(commit) = flown.to_log {
            // Without it the next leader tries once too often; not worth more than one try.
            if let Err(error) = flight
                .replica
                .write(Op::CommitFetch(commit), None, COMMIT_TIMEOUT)
                .await
            {
                tracing::debug!(%error, "a failed fetch was not logged");
            }
        }
    }

    async fn rounds(&self, lane: &Lane, flight: &Flight) -> Flown {
        let Some(matched) = self.policies.find(&flight.key) else {
            return Answer::Ended.into();
        };
        for _ in 0..ROUNDS_MAX {
            // Before anything is looked at: whatever happens to the key from here on wins over what
            // is fetched.
            let started = flight.replica.applied().revision;
            let live = match live_record(&flight.replica, &flight.key).await {
                Ok(live) if flight.leads() => live,
                Ok(_) => return Answer::Ended.into(),
                Err(error) => {
                    tracing::warn!(%error, "a fetch ended: the state cannot be read");
                    return Answer::Ended.into();
                }
            };
            // A refresh of what is gone by now. A reader who misses it just now is told, and asks
            // again.
            if live.is_none() && !flight.is_missed.load(Ordering::Relaxed) {
                return Answer::Ended.into();
            }
            if let Some(answer) = self.needless(&flight.key, live.as_ref(), flight.replica.now()) {
                return answer.into();
            }
            self.marks.take(Hashed::of(&flight.key));
            let fetched = match self.call(lane, flight, &matched).await {
                Ok(fetched) => fetched,
                Err(failed) => {
                    return self.failed(flight, matched.policy, live.as_ref(), started, failed);
                }
            };
            let unstored = Answer::Unstored {
                value: fetched.value.clone(),
                content_type: fetched.content_type.clone(),
                started,
            };
            match self
                .keep(
                    lane,
                    flight,
                    matched.policy,
                    live.is_some(),
                    fetched,
                    &unstored,
                )
                .await
            {
                Kept::Stored(revision) => {
                    self.failures.forget(&flight.key);
                    return Answer::Committed { revision }.into();
                }
                Kept::Unstored(class)
                    if !changed_after(&flight.replica, &flight.key, started).await =>
                {
                    // With an entry it must not be tried again at once; without one the next reader
                    // may.
                    let held_back = live.as_ref().map(|live| {
                        self.failed(flight, matched.policy, Some(live), started, class.into())
                    });
                    return Flown {
                        answer: unstored,
                        to_log: held_back.and_then(|flown| flown.to_log),
                    };
                }
                Kept::Unstored(_) | Kept::Fenced => {}
            }
        }
        match live_record(&flight.replica, &flight.key).await {
            Ok(Some(live)) => Answer::Committed {
                revision: live.changed,
            }
            .into(),
            _ => Answer::Overloaded.into(),
        }
    }

    /// The answer that needs no fetch: the entry is not due, or the key is to be left alone.
    pub(super) fn needless(
        &self,
        key: &Key,
        live: Option<&EntryRecord>,
        now: Millis,
    ) -> Option<Answer> {
        match live {
            Some(record) if !is_due(record, now) => Some(Answer::Committed {
                revision: record.changed,
            }),
            _ => self.failures.backoff(key, live, now).map(Answer::Failed),
        }
    }

    async fn call(
        &self,
        lane: &Lane,
        flight: &Flight,
        matched: &Matched<'_>,
    ) -> Result<peer::Fetched, FetchFailed> {
        let tags = tags(matched, &flight.key)?;
        let headers = telemetry::trace_headers();
        let began = self.clock.monotonic();
        let call = lane
            .upstream()
            .fetch(&flight.key, matched.captures.as_slice(), &headers);
        let called = tokio::time::timeout(FETCH_TIMEOUT_MAX, Box::pin(call)).await;
        let called = called.unwrap_or(Err(FailureClass::Timeout.into()));
        let took = self.clock.monotonic().saturating_sub(began);
        self.metrics
            .upstream_called(lane.name(), &code(&called), took);
        let Fetched { body, content_type } = called?;
        lane.fetch_took(took);
        let took_ms = Millis::try_from(took.as_millis()).unwrap_or(Millis::MAX);
        Ok(peer::Fetched {
            value: body,
            content_type,
            tags,
            lifetime: None,
            took_ms,
        })
    }

    /// Commits, and gives those who wait the value itself if that takes longer than they shall
    /// wait.
    async fn keep(
        &self,
        lane: &Lane,
        flight: &Flight,
        policy: &Policy,
        existed: bool,
        mut fetched: peer::Fetched,
        late: &Answer,
    ) -> Kept {
        let &Answer::Unstored { started, .. } = late else {
            return Kept::Fenced;
        };
        if fetched.value.len() as u64 > policy.max_value_bytes.min(VALUE_BYTES_MAX as u64) {
            self.metrics.commit("unstored");
            return Kept::Unstored(FailureClass::TooLarge);
        }
        fetched.lifetime = Some(policy.lifetime(rand::random(), lane.usual_fetch(), !existed));
        let commit =
            Op::CommitFetch(flight.commit(started, commit_fetch::Result::Fetched(fetched)));
        let mut write = Box::pin(flight.replica.write(commit, None, COMMIT_TIMEOUT));
        let outcome =
            match tokio::time::timeout(policy.soft_timeout.max(COMMIT_PATIENCE_MIN), &mut write)
                .await
            {
                Ok(outcome) => outcome,
                Err(_) => {
                    flight.say(late.clone());
                    write.await
                }
            };
        match outcome.map(|outcome| outcome.result) {
            Ok(Some(outcome::Result::Done(done))) => {
                self.metrics.commit("stored");
                Kept::Stored(done.revision)
            }
            Ok(Some(outcome::Result::Fenced(_))) => {
                self.metrics.commit("fenced");
                Kept::Fenced
            }
            Ok(other) => {
                tracing::warn!(?other, "a fetched value was not stored");
                self.metrics.commit("failed");
                Kept::Unstored(FailureClass::Unspecified)
            }
            Err(error) => {
                tracing::debug!(%error, "a fetched value was not stored");
                self.metrics.commit(if error.not_applied() {
                    "unstored"
                } else {
                    "failed"
                });
                Kept::Unstored(FailureClass::Unspecified)
            }
        }
    }

    fn failed(
        &self,
        flight: &Flight,
        policy: &Policy,
        live: Option<&EntryRecord>,
        started: Revision,
        failed: FetchFailed,
    ) -> Flown {
        let now = flight.replica.now();
        let noted = self
            .failures
            .note(&flight.key, live, policy, &failed, now, rand::random());
        let failure = noted.failure;
        // What has no class is our own trouble with storing, which the log would not take either.
        let is_logged = noted.is_logged && failure.class != FailureClass::Unspecified;
        let to_log = is_logged.then(|| {
            let logged = peer::FetchFailed {
                class: failure.class.into(),
                status: failure.status,
                count: failure.count,
                retry_after_ms: failure.next_attempt_ms.saturating_sub(now),
            };
            flight.commit(started, commit_fetch::Result::Failed(logged))
        });
        Flown {
            answer: Answer::Failed(failure),
            to_log,
        }
    }
}

impl From<Answer> for Flown {
    fn from(answer: Answer) -> Self {
        Self {
            answer,
            to_log: None,
        }
    }
}

/// Past its refresh point, which may come after its lifetime (`min_refresh_interval`), or stale
/// where nothing is refreshed ahead. A plain entry is nobody's to refresh.
pub(crate) fn is_due(record: &EntryRecord, now: Millis) -> bool {
    let due_at = if record.refresh_at_ms == FOREVER {
        record.fresh_until_ms
    } else {
        record.refresh_at_ms
    };
    record.origin() != Origin::Plain && now >= due_at
}

/// The record, if its value may still be served.
pub(super) fn if_live(entry: &Entry, now: Millis) -> Option<&EntryRecord> {
    Some(&entry.record).filter(|record| Timeline::from(*record).phase(now) != Phase::Expired)
}

/// Whether the key changed in any way after a revision, as far as this replica has applied. If that
/// cannot be read, it did.
pub(super) async fn changed_after(replica: &Arc<Replica>, key: &Key, revision: Revision) -> bool {
    if replica.applied().revision <= revision {
        return false;
    }
    if let Lookup::Found(entry) = replica.state().peek(key) {
        // An entry is newer than any tombstone of its key.
        return entry.record.changed > revision;
    }
    let (state, key) = (replica.state().clone(), key.clone());
    let read = holdfast_raft::task::blocking(move || -> io::Result<Revision> {
        let entry = state.get(&key)?.map_or(0, |entry| entry.record.changed);
        let tombstone = state
            .tombstone(&key)?
            .map_or(0, |tombstone| tombstone.revision);
        Ok(entry.max(tombstone))
    });
    match read.await {
        Ok(Ok(changed)) => changed > revision,
        _ => true,
    }
}

async fn live_record(replica: &Arc<Replica>, key: &Key) -> io::Result<Option<EntryRecord>> {
    let entry = match replica.state().peek(key) {
        Lookup::Found(entry) => Some(entry),
        Lookup::Absent => None,
        Lookup::Unknown(_) => {
            let (state, key) = (replica.state().clone(), key.clone());
            holdfast_raft::task::blocking(move || state.get(&key))
                .await
                .map_err(io::Error::other)??
        }
    };
    let now = replica.now();
    Ok(entry.and_then(|entry| if_live(&entry, now).cloned()))
}

/// A key whose tags do not fit is refused before any call, as one that makes no URL is.
fn tags(matched: &Matched<'_>, key: &Key) -> Result<Vec<String>, FetchFailed> {
    let fill = |template: &crate::template::TextTemplate| {
        let filled = template.fill(key, matched.captures.as_slice(), &Secrets::default());
        filled
            .ok()
            .filter(|tag| !tag.is_empty() && tag.len() <= TAG_BYTES_MAX)
            .ok_or_else(|| FailureClass::Refused.into())
    };
    matched.policy.tags.iter().map(fill).collect()
}

/// For metrics: a status, or the name of a class.
fn code(called: &Result<Fetched, FetchFailed>) -> String {
    match called {
        Ok(_) => "200".to_owned(),
        Err(failed) if failed.status != 0 => failed.status.to_string(),
        Err(failed) => failed.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(origin: Origin, refresh_at_ms: Millis, fresh_until_ms: Millis) -> EntryRecord {
        EntryRecord {
            origin: origin.into(),
            refresh_at_ms,
            fresh_until_ms,
            ..Default::default()
        }
    }

    #[test]
    fn a_value_is_due_at_its_refresh_point_or_else_when_it_is_stale() {
        assert!(!is_due(&record(Origin::Fetched, 1_800, 2_000), 1_799));
        assert!(is_due(&record(Origin::Fetched, 1_800, 2_000), 1_800));
        assert!(!is_due(&record(Origin::Fetched, FOREVER, 2_000), 1_999));
        assert!(is_due(&record(Origin::Fetched, FOREVER, 2_000), 2_000));
        // min_refresh_interval is longer than the lifetime.
        assert!(!is_due(&record(Origin::Fetched, 5_000, 2_000), 2_000));
        assert!(!is_due(&record(Origin::Plain, 1_800, 2_000), 2_000));
    }
}
