//! Proof that this node led when it was asked: after the question, a quorum says that it has voted
//! for nobody newer.
//!
//! openraft has such a round and credits its followers too much: one answer to a request also
//! counts for a later one that ends at the same log id, so that an answer from before the question
//! can prove what happened after it. Here every voter is asked for itself, and only its own answer
//! counts.
//!
//! ```text
//! question ─► vote of mine ─► read index ─► ask every voter: anything newer than that vote? ─► quorum: no ─► read index
//! ```
//! Whoever was elected before the question had a quorum's votes by then, and one of them answers
//! here and says so.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::{StreamExt, stream::FuturesUnordered};
use holdfast_proto::{
    ShardId,
    peer::{AppendRequest, Header, ReadIndexRequest, append_response},
};
use openraft::{
    raft::linearizable_read::LinearizerOption, type_config::async_runtime::watch::WatchReceiver,
};

use super::{RaftHandle, leadership::LeaderClock, quorum::Voters, types::vote_to};
use crate::peer::Peers;

/// A round may take this long, and what a voter's disk and its distance add.
const ROUND_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a round proved nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unproven {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
}

pub(crate) struct LeaderProof {
    pub(crate) shard: ShardId,
    pub(crate) raft: RaftHandle,
    pub(crate) peers: Arc<Peers>,
    pub(crate) leader_clock: Arc<LeaderClock>,
}

impl LeaderProof {
    pub(crate) fn leads(&self) -> bool {
        self.raft.is_leader()
    }

    pub(crate) fn round_timeout(&self) -> Duration {
        self.leader_clock.pace().answer_timeout(ROUND_TIMEOUT)
    }

    /// What must be applied before a read that came before this call may be answered.
    pub(crate) async fn prove(&self) -> Result<u64, Unproven> {
        tokio::time::timeout(self.round_timeout(), self.ask_voters())
            .await
            .unwrap_or(Err(Unproven::NoQuorum))
    }

    /// The index to wait for before a read that came before this call may be answered: proven here
    /// if this node leads, else by whoever does.
    pub(crate) async fn read_index(&self) -> Result<u64, Unproven> {
        if self.leads() {
            return self.prove().await;
        }
        let heard = self.leader_clock.heard().ok_or(Unproven::NoLeader)?;
        let header = self.peers.header(heard.leader, self.shard);
        let within = self.round_timeout() + self.leader_clock.pace().round_trip;
        let deadline = self.peers.clock().deadline(within);
        let asked = self
            .peers
            .call(header, &deadline, ReadIndexRequest::default());
        let response = asked.await.map_err(|_| Unproven::NoLeader)?;
        match response.read_log_id {
            Some(log_id) if response.confirmed => Ok(log_id.index),
            _ => Err(Unproven::NoQuorum),
        }
    }

    async fn ask_voters(&self) -> Result<u64, Unproven> {
        let me = self.peers.identity().node_id;
        // Before the read index: a vote of an earlier term is refused by a quorum if this node
        // leads a later one by then.
        let vote = self.raft.metrics().borrow_watched().vote;
        if !vote.is_committed() || vote.leader_id.voted_for != me {
            return Err(Unproven::NoLeader);
        }
        // Within a lease of the last acknowledgement openraft answers at once: here it only says
        // what is committed.
        let option = LinearizerOption::new(None, true).with_wait_timeout(self.round_timeout());
        let linearizer = self
            .raft
            .get_read_linearizer(option)
            .await
            .map_err(|_| Unproven::NoQuorum)?;
        let index = linearizer.read_log_id().index();

        // After it: whoever was elected by other voters before the question, this node had made
        // them voters before. Their addresses are the group's too: the roster forgets a voter
        // before the group does.
        let Voters { quorum, addresses } = Voters::of(&self.raft, &self.peers);
        let vote = vote_to(&vote);
        let mut agree = BTreeSet::from([me]);
        let others = quorum.voters().into_iter().filter(|&voter| voter != me);
        let mut answers: FuturesUnordered<_> = others
            .filter_map(|voter| Some(self.ask(voter, addresses.get(&voter)?, vote)))
            .collect();
        while !quorum.is_reached(&agree) {
            agree.extend(answers.next().await.ok_or(Unproven::NoQuorum)?);
        }
        Ok(index)
    }

    /// The voter, if it answers that it knows of no newer vote.
    async fn ask(
        &self,
        voter: u64,
        address: &str,
        vote: holdfast_proto::peer::Vote,
    ) -> Option<u64> {
        let header = Header {
            now_ms: self.leader_clock.log_time(),
            proof: self.leader_clock.proof(vote.term, voter),
            ..self.peers.header(voter, self.shard)
        };
        // An append of nothing, after nothing: it can only be accepted or meet a higher vote.
        let question = AppendRequest {
            vote: Some(vote),
            ..Default::default()
        };
        let deadline = self.peers.clock().deadline(self.round_timeout());
        let asked = self.peers.call_at(address, header, &deadline, question);
        let answer = asked.await.ok()?;
        match answer.result? {
            append_response::Result::HigherVote(_) => None,
            append_response::Result::Success(_)
            | append_response::Result::Partial(_)
            | append_response::Result::Conflict(_) => Some(voter),
        }
    }
}
