//! Waiting for the cluster's flight of a key: here if this node leads the key's shard, else at the
//! leader, and at the next one if that is lost meanwhile.
//!
//! Promises that nobody waits longer than asked, that an answer is never older than what was
//! acknowledged before the question, and that an upstream that was not called is not blamed. Must
//! never know how a value is fetched.

use std::{sync::Arc, time::Duration};

use holdfast_proto::{Key, Revision};
use holdfast_raft::{Deadline, InMemory, Leader, Replica, Seen};
use tokio_util::sync::CancellationToken;

use super::{
    Refresher,
    flight::needless,
    outcome::{FetchOutcome, Need},
    queue::Priority,
    waiter::Waiter,
};
use crate::policy::Policy;

/// How long one who waits gives an election, at most.
const ELECTION: Duration = Duration::from_secs(2);
/// How long a leader tries to prove that it is one.
const PROOF: Duration = Duration::from_secs(1);

impl Refresher {
    /// Until there is an outcome, or nobody led until the deadline.
    pub(super) async fn fetch_from_leader(
        self: &Arc<Self>,
        key: &Key,
        policy: &Policy,
        deadline: &Deadline,
        need: Need,
    ) -> FetchOutcome {
        let Some(replica) = self.replicas.of_key(key) else {
            return FetchOutcome::NotLeading;
        };
        let called = CancellationToken::new();
        loop {
            let leader = match replica.leader() {
                Some(leader) => leader,
                None => match replica.some_leader(deadline.left().min(ELECTION)).await {
                    Some(leader) => leader,
                    None => return FetchOutcome::NotLeading,
                },
            };
            let outcome = match replica.leads() {
                Some(term) if leader.is_self => {
                    let question = Question {
                        key,
                        replica,
                        term,
                        need,
                    };
                    self.join(question, policy, deadline, &called).await
                }
                None if leader.is_self => FetchOutcome::NotLeading,
                _ => {
                    let upstream = &policy.upstream;
                    self.ask_leader(key, need, upstream, replica, leader, deadline)
                        .await
                }
            };
            if outcome != FetchOutcome::NotLeading || deadline.has_passed() {
                return outcome;
            }
            replica.next_leader(deadline).await;
        }
    }

    /// Joins the key's flight on this node, which leads in `term`, or starts it. Cancels `called`
    /// once the upstream is called for it.
    pub(super) async fn join(
        self: &Arc<Self>,
        question: Question<'_>,
        policy: &Policy,
        deadline: &Deadline,
        called: &CancellationToken,
    ) -> FetchOutcome {
        let Question {
            key, replica, need, ..
        } = question;
        let queue = self.queue(&policy.upstream);
        loop {
            // Whatever was acknowledged before this question is in here.
            let asked_at = replica.applied().revision;
            let now = replica.now();
            let found = replica.in_memory(key);
            let live = match &found {
                InMemory::Found(view) => Some(view).filter(|view| view.is_live(now)),
                InMemory::Absent | InMemory::Unknown => None,
            };
            if !matches!(found, InMemory::Unknown)
                && let Some(outcome) = needless(&queue, key, policy, live, now, need)
                && let Some(outcome) = question.holding(outcome, asked_at).await
            {
                return outcome;
            }
            let priority = if live.is_some() {
                Priority::Asked
            } else {
                Priority::Miss
            };
            let term = question.term;
            let joined = self.join_queue(&queue, key, replica, term, priority, need);
            let Some(mut waiter) = joined else {
                return FetchOutcome::Overloaded;
            };
            match deadline
                .limit(question.wait(&mut waiter, asked_at, called))
                .await
            {
                Ok(Some(outcome)) => return outcome,
                // The flight ended with nothing that holds for this question.
                Ok(None) => {}
                Err(_) if waiter.is_called() => return FetchOutcome::TimedOut,
                Err(_) => return FetchOutcome::Overloaded,
            }
        }
    }
}

/// What one who waits wants to know, of whom.
#[derive(Clone, Copy)]
pub(super) struct Question<'a> {
    pub(super) key: &'a Key,
    pub(super) replica: &'a Arc<Replica>,
    /// In which this node leads.
    pub(super) term: u64,
    pub(super) need: Need,
}

impl Question<'_> {
    /// `None` if the flight ended and what it reported does not hold for who asked at `asked_at`.
    async fn wait(
        &self,
        waiter: &mut Waiter,
        asked_at: Revision,
        called: &CancellationToken,
    ) -> Option<FetchOutcome> {
        let mut leads = self.replica.watch_leads();
        loop {
            if waiter.is_called() {
                called.cancel();
            }
            let is_called = waiter.is_called();
            if let Some(outcome) = waiter.reported()
                && self.need.is_met_by(&outcome, is_called)
                && let Some(outcome) = self.holding(outcome, asked_at).await
            {
                return Some(outcome);
            }
            tokio::select! {
                more = waiter.another() => if !more { return None },
                _ = leads.wait_for(|leads| *leads != Some(self.term)) => {
                    return Some(FetchOutcome::NotLeading);
                }
            }
        }
    }

    /// The outcome as far as it holds for who asked at `asked_at`; `None` if the key changed since:
    /// something better comes, or the flight ends and another is due.
    async fn holding(&self, outcome: FetchOutcome, asked_at: Revision) -> Option<FetchOutcome> {
        match outcome {
            // Asked after the commit, and the key changed between the two: it may be gone.
            FetchOutcome::Committed { revision }
                if asked_at > revision && self.changed_after(revision).await =>
            {
                None
            }
            // Its only proof is this replica's state, which is the newest only if this node still
            // leads: a quorum says so.
            FetchOutcome::Unstored { .. } if !self.leads_still().await => {
                Some(FetchOutcome::NotLeading)
            }
            FetchOutcome::Unstored { started, .. } if self.changed_after(started).await => None,
            outcome => Some(outcome),
        }
    }

    async fn changed_after(&self, revision: Revision) -> bool {
        self.replica.changed_since(self.key, revision).await
    }

    /// Proven by a round that begins after the question. What was acknowledged before it is applied
    /// here then.
    async fn leads_still(&self) -> bool {
        let proven = self
            .replica
            .wait_until_seen(&Seen::Everything, PROOF, &self.replica.deadline(PROOF))
            .await;
        let leads = |leader: Leader| leader.is_self && leader.term == self.term;
        proven.is_ok() && self.replica.leader().is_some_and(leads)
    }
}
