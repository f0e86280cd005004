//! Standing for leader, voting, and staying one: a replica's part in elections, at the pace of the
//! cluster.
//!
//! openraft runs the election itself, terms, votes and all that safety rests on. What it leaves to
//! its fixed timers is here: when to stand, whom to vote for while a leader counts, and when to send
//! heartbeats. A candidate asks first whether a quorum would vote for it, so that one that cannot
//! reach them raises no term.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use holdfast_proto::{
    ShardId,
    peer::{PreVoteRequest, PreVoteResponse},
};
use openraft::{ServerState, raft::VoteRequest, type_config::async_runtime::watch::WatchReceiver};
use parking_lot::Mutex;

use super::{
    RaftHandle,
    election::{Candidate, Election, Situation},
    leadership::LeaderClock,
    log::ShardLog,
    pace::Pace,
    quorum::Voters,
    types::{LeaderId, LogId, Types, Vote, log_id_to, vote_from, vote_to},
};
use crate::peer::Peers;

/// How often a replica looks whether its leader still counts.
const LOOK_EVERY: Duration = Duration::from_millis(20);

pub(crate) struct Campaign {
    shard: ShardId,
    raft: RaftHandle,
    log: ShardLog,
    peers: Arc<Peers>,
    leader_clock: Arc<LeaderClock>,
    /// Until then a replica that had a vote before it started grants none and stands for none: it
    /// may have acknowledged a lease that it no longer knows of.
    quiet_until: Duration,
    /// Its log lost what it had acknowledged: until it is level again its vote is worth nothing.
    log_is_short: Arc<AtomicBool>,
    /// Its state is not the majority's: it votes, since its log is right, and does not stand.
    diverged: Arc<AtomicBool>,
    election: Mutex<Election>,
}

impl Campaign {
    pub(crate) fn new(
        shard: ShardId,
        raft: RaftHandle,
        log: ShardLog,
        peers: Arc<Peers>,
        leader_clock: Arc<LeaderClock>,
        log_is_short: Arc<AtomicBool>,
        diverged: Arc<AtomicBool>,
    ) -> Self {
        let quiet_until = if log.has_vote() {
            // Twice, since clocks do not run equally fast.
            leader_clock.monotonic() + leader_clock.pace().lease() * 2
        } else {
            Duration::ZERO
        };
        Self {
            shard,
            raft,
            log,
            peers,
            leader_clock,
            quiet_until,
            log_is_short,
            diverged,
            election: Mutex::default(),
        }
    }

    /// It neither votes nor stands.
    pub(crate) fn is_quiet(&self) -> bool {
        self.log_is_short.load(Ordering::Relaxed)
            || self.leader_clock.monotonic() < self.quiet_until
    }

    // ---- staying leader ----

    /// Sends heartbeats while this replica leads, and at once when it begins to.
    pub(crate) async fn send_heartbeats(&self) {
        let mut server = self.raft.server_metrics();
        loop {
            if self.raft.is_leader() && self.raft.trigger().heartbeat().await.is_err() {
                return;
            }
            tokio::select! {
                () = tokio::time::sleep(self.leader_clock.pace().heartbeat()) => {}
                changed = server.changed() => if changed.is_err() { return },
            }
        }
    }

    // ---- standing ----

    /// Stands for leader whenever there is none for long enough.
    pub(crate) async fn stand_when_due(&self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            let (now, pace) = (self.leader_clock.monotonic(), self.own_pace());
            let situation = self.situation();
            if self
                .election
                .lock()
                .is_due(now, situation, pace, rand::random())
                && self.stand(pace).await.is_err()
            {
                return;
            }
        }
    }

    /// The cluster's pace, or this node's own where that is slower: a cluster without a leader learns
    /// of no slower one.
    fn own_pace(&self) -> Pace {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let voters = metrics.membership_config.voter_ids();
        let farthest = voters.map(|id| self.peers.round_trip(id)).max();
        let own = Pace::new(self.peers.sync_time(), farthest.unwrap_or_default());
        self.leader_clock.pace().max(own)
    }

    fn situation(&self) -> Situation {
        let me = self.peers.identity().node_id;
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let votes = [
            &metrics.membership_config,
            &metrics.committed_membership_config,
        ]
        .iter()
        .any(|membership| membership.voter_ids().any(|voter| voter == me));
        if metrics.state == ServerState::Leader {
            return Situation::Leads;
        }
        if !votes || self.is_quiet() || self.diverged.load(Ordering::Relaxed) {
            return Situation::Bystander;
        }
        match self.leader_clock.leader_until(metrics.current_term) {
            Some(until) => Situation::Follows { until },
            None => Situation::Leaderless,
        }
    }

    /// Asks the voters, and stands if a quorum would vote for this replica. Fails when the replica
    /// has stopped.
    async fn stand(&self, pace: Pace) -> Result<(), ()> {
        let me = Candidate {
            last_log_id: self.log.last_id(),
            id: self.peers.identity().node_id,
        };
        let voters = Voters::of(&self.raft, &self.peers);
        self.election
            .lock()
            .asks(self.leader_clock.monotonic(), me, pace);
        let alone = voters.quorum.is_only(me.id);
        let (elected, newer) = if alone {
            (true, None)
        } else {
            self.ask_voters(me, &voters, pace).await
        };
        let (now, jitter) = (self.leader_clock.monotonic(), rand::random());
        let stands = {
            let mut election = self.election.lock();
            let stands = elected && election.may_stand();
            if stands {
                election.stands(now, me, pace, jitter);
            } else {
                election.is_refused(now, pace, jitter);
            }
            stands
        };
        if stands {
            return self.raft.trigger().elect(false).await.map_err(|_| ());
        }
        match newer {
            Some(vote) => self.adopt(vote).await,
            None => Ok(()),
        }
    }

    /// Whether a quorum would vote for this replica, and the newest vote that is newer than the one
    /// it asks for.
    async fn ask_voters(&self, me: Candidate, voters: &Voters, pace: Pace) -> (bool, Option<Vote>) {
        let term = self.raft.metrics().borrow_watched().current_term + 1;
        let vote = Vote {
            leader_id: LeaderId {
                term,
                voted_for: me.id,
            },
            committed: false,
        };
        let question = PreVoteRequest {
            header: None,
            vote: Some(vote_to(&vote)),
            last_log_id: me.last_log_id.as_ref().map(log_id_to),
        };
        let others = voters.quorum.voters().into_iter().filter(|&id| id != me.id);
        let mut answers: FuturesUnordered<_> = others
            .filter_map(|id| Some(self.ask(id, voters.addresses.get(&id)?, question.clone(), pace)))
            .collect();
        let (mut agree, mut newer) = (BTreeSet::from([me.id]), None);
        let mut patience = pace.ask_timeout();
        while !voters.quorum.is_reached(&agree)
            && let Ok(Some(answer)) = tokio::time::timeout(patience, answers.next()).await
        {
            let Some((id, answer)) = answer else { continue };
            if answer.granted {
                agree.insert(id);
                continue;
            }
            // One that was refused waits no longer for those that may be gone: meanwhile it keeps
            // others waiting.
            patience = pace.heartbeat();
            if let Ok(theirs) = vote_from(answer.vote)
                && theirs.leader_id.term >= term
            {
                newer = newer.max(Some((theirs.leader_id.term, theirs.leader_id.voted_for)));
            }
        }
        let newer = newer.map(|(term, voted_for)| Vote {
            leader_id: LeaderId { term, voted_for },
            committed: false,
        });
        (voters.quorum.is_reached(&agree), newer)
    }

    async fn ask(
        &self,
        voter: u64,
        address: &str,
        question: PreVoteRequest,
        pace: Pace,
    ) -> Option<(u64, PreVoteResponse)> {
        let header = self.peers.header(voter, self.shard);
        let deadline = self.leader_clock.deadline(pace.ask_timeout());
        let asked_at = self.leader_clock.monotonic();
        let answer = self
            .peers
            .call_at(address, header, &deadline, question)
            .await
            .ok()?;
        let took = self.leader_clock.monotonic().saturating_sub(asked_at);
        self.peers.measured(voter, took, answer.header.as_ref());
        Some((voter, answer))
    }

    /// Votes for whoever a newer vote went to, as openraft does when it loses an election to one:
    /// the next question is for a term that nobody has voted in.
    async fn adopt(&self, vote: Vote) -> Result<(), ()> {
        let request = voting_past_leases(vote, self.log.last_id());
        self.raft.vote(request).await.map(|_| ()).map_err(|_| ())
    }

    // ---- voting ----

    pub(crate) fn vote(&self) -> Vote {
        self.raft.metrics().borrow_watched().vote
    }

    pub(crate) fn last_log_id(&self) -> Option<LogId> {
        self.log.last_id()
    }

    /// Whether this voter would vote for a candidate; if so it promises to, for as long as an
    /// election takes.
    pub(crate) fn would_vote(&self, candidate: &Vote, last: Option<LogId>) -> bool {
        candidate.leader_id > self.vote().leader_id
            && last >= self.log.last_id()
            && self.is_free()
            && self.promise(candidate, last)
    }

    /// Whether this voter may vote for a candidate: while a leader counts only for one to which
    /// that leader hands over. What its log and its term have to be is for openraft to judge.
    pub(crate) fn may_vote(&self, handed_over: bool) -> bool {
        handed_over || self.is_free()
    }

    /// Lets a candidate that asks for a vote be elected before this voter stands itself.
    pub(crate) fn promise(&self, candidate: &Vote, last: Option<LogId>) -> bool {
        let candidate = Candidate {
            last_log_id: last,
            id: candidate.leader_id.voted_for,
        };
        let (now, pace) = (self.leader_clock.monotonic(), self.own_pace());
        self.election.lock().promise(now, candidate, pace)
    }

    /// No leader counts here.
    fn is_free(&self) -> bool {
        let now = self.leader_clock.monotonic();
        let (leads, term) = {
            let metrics = self.raft.metrics();
            let metrics = metrics.borrow_watched();
            (metrics.state == ServerState::Leader, metrics.current_term)
        };
        if leads {
            !self.leader_clock.has_lease(term, now)
        } else {
            self.leader_clock
                .leader_until(term)
                .is_none_or(|until| until <= now)
        }
    }
}

/// A request for a vote that openraft does not judge by its own lease, which is far longer than
/// ours: ours was asked before.
pub(crate) fn voting_past_leases(vote: Vote, last: Option<LogId>) -> VoteRequest<Types> {
    let mut request = VoteRequest::new(vote, last);
    request.leadership_transfer = true;
    request
}
