//! Waiting for the cluster's flight of a key: here if this node leads the key's shard, else at the
//! leader, and at the next one if that is lost meanwhile.
//!
//! Promises that nobody waits longer than asked, and that an answer is never older than what was
//! acknowledged before the question. Must never know how a value is fetched.

use std::{sync::Arc, time::Duration};

use holdfast_proto::{
    Key, Revision,
    peer::{FetchRefused, FetchRequest, fetch_response},
    v1::FailureClass,
};
use holdfast_raft::{Events, Leader, Replica, Seen, state::memory::Lookup};
use tokio::sync::watch;
use tonic::{Code, Request};

use super::{
    Landed, NoValue, Refresher,
    failures::Failure,
    flight::{Answer, Flight, changed_after, if_live, is_due},
    slots::Priority,
};

/// How long one who waits gives an election, at most.
const ELECTION: Duration = Duration::from_secs(2);
/// How long a leader tries to prove that it is one.
const PROOF: Duration = Duration::from_secs(1);
/// Between two questions to whoever leads.
const PAUSE: Duration = Duration::from_millis(25);

/// Why there is no answer from here.
pub(super) enum NoAnswer {
    NoValue(NoValue),
    /// Whom this was asked leads no more, or not yet.
    NotLeading,
}

/// What to do with something a flight says.
enum Judged {
    Take(Result<Landed, NoAnswer>),
    /// The key changed since: something better comes, or the flight ends and another is due.
    Wait,
}

impl Refresher {
    /// Until there is an answer; the caller bounds it.
    pub(super) async fn fetch_from_leader(
        self: &Arc<Self>,
        key: &Key,
        timeout: Duration,
    ) -> Result<Landed, NoValue> {
        let replica = self.replicas.of_key(key).ok_or(NoValue::NoLeader)?;
        let deadline = self.clock.monotonic() + timeout;
        loop {
            let leader = match replica.leader() {
                Some(leader) => leader,
                None => some_leader(replica, timeout.min(ELECTION))
                    .await
                    .ok_or(NoValue::NoLeader)?,
            };
            let answer = match replica.leads() {
                Some(term) if leader.is_self => self.join(key, replica, term).await,
                None if leader.is_self => Err(NoAnswer::NotLeading),
                _ => {
                    self.ask_leader(
                        key,
                        replica,
                        leader,
                        deadline.saturating_sub(self.clock.monotonic()),
                    )
                    .await
                }
            };
            match answer {
                Ok(landed) => return Ok(landed),
                Err(NoAnswer::NoValue(none)) => return Err(none),
                Err(NoAnswer::NotLeading) => {
                    _ = tokio::time::timeout(PAUSE, another_leader(replica, leader)).await
                }
            }
        }
    }

    /// Joins the key's flight on this node, which leads in `term`, or starts it.
    pub(super) async fn join(
        self: &Arc<Self>,
        key: &Key,
        replica: &Arc<Replica>,
        term: u64,
    ) -> Result<Landed, NoAnswer> {
        loop {
            // Whatever was acknowledged before this question is in here.
            let asked_at = replica.applied().revision;
            let now = replica.now();
            let found = replica.state().peek(key);
            let live = match &found {
                Lookup::Found(entry) => if_live(entry, now),
                Lookup::Absent | Lookup::Unknown(_) => None,
            };
            if !matches!(found, Lookup::Unknown(_))
                && let Some(answer) = self.needless(key, live, now)
                && let Judged::Take(taken) = judge(answer, key, replica, term, asked_at).await
            {
                return taken;
            }
            let priority = if live.is_some() {
                Priority::Asked
            } else {
                Priority::Miss
            };
            let answers = self.board(key, replica, term, priority)?;
            if let Some(answered) = wait(answers, key, replica, term, asked_at).await {
                return answered;
            }
        }
    }

    /// A refresh that nobody waits for, if this node leads and it is needed.
    pub(super) fn ask(self: &Arc<Self>, key: &Key, priority: Priority) {
        let Some(replica) = self.replicas.of_key(key) else {
            return;
        };
        let Some(term) = replica.leads() else { return };
        let now = replica.now();
        let wanted = match replica.state().peek(key) {
            Lookup::Found(entry) => if_live(&entry, now).is_some_and(|record| {
                is_due(record, now) && self.failures.backoff(key, Some(record), now).is_none()
            }),
            // Deleted since: whoever wants it reads it, and waits.
            Lookup::Absent => false,
            Lookup::Unknown(_) => true,
        };
        if !wanted {
            return;
        }
        // Dropped under pressure: the next reader asks again.
        let _ = self.board(key, replica, term, priority);
    }

    fn board(
        self: &Arc<Self>,
        key: &Key,
        replica: &Arc<Replica>,
        term: u64,
        priority: Priority,
    ) -> Result<watch::Receiver<Option<Answer>>, NoAnswer> {
        let lane = self.lane_of(key).ok_or(NoAnswer::NotLeading)?;
        if self.stop.is_cancelled() {
            return Err(NoAnswer::NotLeading);
        }
        let start = |key| {
            Flight::new(
                key,
                replica.clone(),
                term,
                lane.name(),
                self.clock.monotonic(),
            )
        };
        let boarded = lane.board(key, term, priority, start);
        self.depart(lane, boarded.departures);
        match boarded.answers {
            Some(answers) => {
                if boarded.is_joined {
                    self.metrics.flight_joined(lane.name());
                }
                Ok(answers)
            }
            None => {
                self.metrics.flight_refused(lane.name());
                Err(NoAnswer::NoValue(NoValue::Overloaded))
            }
        }
    }

    async fn ask_leader(
        &self,
        key: &Key,
        replica: &Replica,
        leader: Leader,
        left: Duration,
    ) -> Result<Landed, NoAnswer> {
        let Ok(_asks) = self.asks.try_acquire() else {
            self.lane_of(key)
                .inspect(|lane| self.metrics.flight_refused(lane.name()));
            return Err(NoAnswer::NoValue(NoValue::Overloaded));
        };
        let peers = self.replicas.peers().ok_or(NoAnswer::NotLeading)?;
        let member = peers.member(leader.id).ok_or(NoAnswer::NotLeading)?;
        let header = Some(peers.header(leader.id, replica.shard(), Some(replica.state())));
        let mut request = Request::new(FetchRequest {
            header,
            key: key.as_bytes().clone(),
        });
        request.set_timeout(left);
        self.metrics.outgoing(request.metadata_mut());
        let mut client = peers.refresh_client(&member.peer_address);
        // A leader that hangs is left as soon as there is another.
        let response = tokio::select! {
            response = client.fetch(request) => response,
            () = another_leader(replica, leader) => return Err(NoAnswer::NotLeading),
        };
        let response = match response {
            Ok(response) => response.into_inner(),
            Err(status) if status.code() == Code::ResourceExhausted => {
                return Err(NoAnswer::NoValue(NoValue::Overloaded));
            }
            Err(status) => {
                tracing::debug!(leader = leader.id, code = ?status.code(), "the leader did not fetch");
                return Err(NoAnswer::NotLeading);
            }
        };
        peers.heard(replica.shard(), leader.id, response.header.as_ref());
        match response.result {
            Some(fetch_response::Result::CommittedRevision(revision)) => {
                Ok(Landed::Committed { revision })
            }
            Some(fetch_response::Result::Unstored(unstored)) => Ok(Landed::Unstored {
                value: unstored.value,
                content_type: unstored.content_type,
            }),
            Some(fetch_response::Result::Refused(refused)) if !refused.not_leader => {
                Err(NoAnswer::NoValue(refused.into()))
            }
            Some(fetch_response::Result::Refused(_)) | None => Err(NoAnswer::NotLeading),
        }
    }
}

impl From<FetchRefused> for NoValue {
    fn from(refused: FetchRefused) -> Self {
        match refused.class() {
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

/// `None` if the flight ended and what it said does not hold for who asked at `asked_at`.
async fn wait(
    mut answers: watch::Receiver<Option<Answer>>,
    key: &Key,
    replica: &Arc<Replica>,
    term: u64,
    asked_at: Revision,
) -> Option<Result<Landed, NoAnswer>> {
    let mut leads = replica.watch_leads();
    loop {
        let said = answers.borrow_and_update().clone();
        if let Some(answer) = said
            && let Judged::Take(taken) = judge(answer, key, replica, term, asked_at).await
        {
            return Some(taken);
        }
        tokio::select! {
            changed = answers.changed() => changed.ok()?,
            _ = leads.wait_for(|leads| *leads != Some(term)) => return Some(Err(NoAnswer::NotLeading)),
        }
    }
}

async fn judge(
    answer: Answer,
    key: &Key,
    replica: &Arc<Replica>,
    term: u64,
    asked_at: Revision,
) -> Judged {
    Judged::Take(match answer {
        // Asked after the commit, and the key changed between the two: it may be gone.
        Answer::Committed { revision }
            if asked_at > revision && changed_after(replica, key, revision).await =>
        {
            return Judged::Wait;
        }
        Answer::Committed { revision } => Ok(Landed::Committed { revision }),
        // Its only proof is this replica's state, which is the newest only if this node still
        // leads: a quorum says so.
        Answer::Unstored { .. } if !leads_still(replica, term).await => Err(NoAnswer::NotLeading),
        Answer::Unstored { started, .. } if changed_after(replica, key, started).await => {
            return Judged::Wait;
        }
        Answer::Unstored {
            value,
            content_type,
            ..
        } => Ok(Landed::Unstored {
            value,
            content_type,
        }),
        Answer::Failed(failure) => Err(NoAnswer::NoValue(NoValue::Failed(failure))),
        Answer::Overloaded => Err(NoAnswer::NoValue(NoValue::Overloaded)),
        Answer::Ended => Err(NoAnswer::NotLeading),
    })
}

/// Proven by a round that begins after the question. What was acknowledged before it is applied
/// here then.
async fn leads_still(replica: &Replica, term: u64) -> bool {
    replica
        .wait_until_seen(&Seen::Everything, PROOF, PROOF)
        .await
        .is_ok()
        && replica
            .leader()
            .is_some_and(|leader| leader.is_self && leader.term == term)
}

async fn some_leader(replica: &Replica, within: Duration) -> Option<Leader> {
    let mut leader = replica.watch_leader();
    let elected = leader.wait_for(Option::is_some);
    tokio::time::timeout(within, elected)
        .await
        .ok()?
        .ok()
        .and_then(|leader| *leader)
}

/// Resolves when another leader, or another term of the same, is known.
async fn another_leader(replica: &Replica, than: Leader) {
    let mut leader = replica.watch_leader();
    let another = |leader: &Option<Leader>| {
        leader.is_some_and(|leader| (leader.id, leader.term) != (than.id, than.term))
    };
    if leader.wait_for(another).await.is_err() {
        std::future::pending::<()>().await;
    }
}
