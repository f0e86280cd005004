//! What a read must have seen before memory may answer it: nothing, a session's revisions, or every
//! write acknowledged before it, which takes a round that proves who leads.

use std::time::Duration;

use holdfast_proto::{Revision, Token};

use super::{RETRY_PAUSE, Replica};
use crate::{agreement::leader_proof::Unproven, error::ReadError};

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
