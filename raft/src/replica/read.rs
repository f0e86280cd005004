//! What a read must have seen before memory may answer it: nothing, a session's revisions, or every
//! write acknowledged before it, which takes a round that proves who leads.

use std::time::Duration;

use holdfast_proto::{Revision, Token, peer::ReadIndexRequest};
use tonic::Request;

use super::{RETRY_PAUSE, Replica};
use crate::{
    agreement::{
        leader_proof::{LeaderProof, ROUND_TIMEOUT},
        read_rounds::{Round, Unproven},
    },
    peer::Purpose,
};

/// What a read must have seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Whatever this replica has.
    Anything,
    /// What a session has seen.
    Token(Token),
    /// Every write acknowledged before now.
    Everything,
}

/// Why a replica may not answer a read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
    #[error("this replica is at revision {applied}, the session has seen {wanted}")]
    Behind { applied: Revision, wanted: Revision },
    #[error("the token is from epoch {token}, this cluster is in {cluster}")]
    TokenEpoch { token: u64, cluster: u64 },
    #[error("too many reads wait already")]
    Overloaded,
    #[error("the deadline passed")]
    Deadline,
}

impl Replica {
    /// Waits until this replica may answer a read that must have `seen` so much. `patience` is how
    /// long it waits for a session's revision before it says that it is behind.
    pub async fn wait_until_seen(
        &self,
        seen: &Seen,
        patience: Duration,
        timeout: Duration,
    ) -> Result<(), ReadError> {
        match seen {
            Seen::Anything => Ok(()),
            Seen::Token(token) => self.wait_for_token(token, patience.min(timeout)).await,
            Seen::Everything => self.wait_for_everything(timeout).await,
        }
    }

    async fn wait_for_token(&self, token: &Token, patience: Duration) -> Result<(), ReadError> {
        let epoch = self.peers.identity().epoch;
        if token.epoch() != epoch {
            return Err(ReadError::TokenEpoch {
                token: token.epoch(),
                cluster: epoch,
            });
        }
        let wanted = token.revision(self.shard);
        if self.state.applied().revision >= wanted {
            return Ok(());
        }
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.revision >= wanted);
        match tokio::time::timeout(patience, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Behind {
                applied: self.state.applied().revision,
                wanted,
            }),
        }
    }

    async fn wait_for_everything(&self, timeout: Duration) -> Result<(), ReadError> {
        let deadline = self.clock.monotonic() + timeout;
        let mut last = ReadError::NoLeader;
        loop {
            let left = deadline.saturating_sub(self.clock.monotonic());
            if left.is_zero() {
                return Err(last);
            }
            match tokio::time::timeout(left, self.read_rounds.join()).await {
                Err(_) => return Err(last),
                Ok(None) => return Err(ReadError::Overloaded),
                Ok(Some(Ok(index))) => {
                    return self
                        .wait_for_index(index, deadline.saturating_sub(self.clock.monotonic()))
                        .await;
                }
                Ok(Some(Err(Unproven::NoLeader))) => last = ReadError::NoLeader,
                Ok(Some(Err(Unproven::NoQuorum))) => last = ReadError::NoQuorum,
            }
            tokio::time::sleep(RETRY_PAUSE.min(left)).await;
        }
    }

    pub(super) async fn wait_for_index(
        &self,
        index: u64,
        timeout: Duration,
    ) -> Result<(), ReadError> {
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.index >= index);
        match tokio::time::timeout(timeout, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Deadline),
        }
    }

    /// Waits until this replica has applied a revision.
    pub async fn wait_for_revision(
        &self,
        revision: Revision,
        timeout: Duration,
    ) -> Result<(), ReadError> {
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.revision >= revision);
        match tokio::time::timeout(timeout, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Behind {
                applied: self.state.applied().revision,
                wanted: revision,
            }),
        }
    }

    /// Proves that this node leads, and says what must be applied before a read may be answered.
    pub(crate) async fn confirm_leadership(&self) -> Result<u64, Unproven> {
        self.proof.prove().await
    }
}

/// Here if this node leads, else asked of whoever does.
impl Round for LeaderProof {
    async fn run(&self) -> Result<u64, Unproven> {
        if self.leads() {
            return self.prove().await;
        }
        let heard = self.leader_clock.heard().ok_or(Unproven::NoLeader)?;
        let member = self.peers.member(heard.leader).ok_or(Unproven::NoLeader)?;
        let mut request = Request::new(ReadIndexRequest {
            header: Some(
                self.peers
                    .header(heard.leader, self.shard, Some(&self.state)),
            ),
        });
        request.set_timeout(ROUND_TIMEOUT);
        let mut client = self
            .peers
            .replica_client(&member.peer_address, Purpose::Control);
        let asked = tokio::time::timeout(ROUND_TIMEOUT, client.read_index(request)).await;
        let response = asked
            .map_err(|_| Unproven::NoLeader)?
            .map_err(|_| Unproven::NoLeader)?
            .into_inner();
        match response.read_log_id {
            Some(log_id) if response.confirmed => Ok(log_id.index),
            _ => Err(Unproven::NoQuorum),
        }
    }
}
