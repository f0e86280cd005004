//! What a read must have seen before memory may answer it: nothing, a session's revisions, or every
//! write acknowledged before it, which takes a round that proves who leads.

use std::time::Duration;

use holdfast_proto::{Revision, Token};

use super::Replica;
use crate::{agreement::leader_proof::Unproven, clock::Deadline, error::ReadError};

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
    /// Whether this replica may answer a read that must have `seen` so much, at once.
    pub fn has_seen(&self, seen: &Seen) -> bool {
        let has_seen = match seen {
            Seen::Anything => true,
            Seen::Token(token) => {
                token.epoch() == self.peers.identity().epoch
                    && token.revision(self.shard) <= self.state.applied().revision
            }
            Seen::Everything => false,
        };
        has_seen && !self.must_catch_up()
    }

    /// Waits until this replica may answer a read that must have `seen` so much. `patience` is how
    /// long it waits for a session's revision before it says that it is behind.
    pub async fn wait_until_seen(
        &self,
        seen: &Seen,
        patience: Duration,
        deadline: &Deadline,
    ) -> Result<(), ReadError> {
        match seen {
            Seen::Anything => Ok(()),
            Seen::Token(token) => {
                self.wait_for_token(token, &deadline.at_most(patience))
                    .await
            }
            Seen::Everything => self.wait_for_everything(deadline).await,
        }
    }

    async fn wait_for_token(&self, token: &Token, deadline: &Deadline) -> Result<(), ReadError> {
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
        self.wait_for_revision(wanted, deadline).await
    }

    async fn wait_for_everything(&self, deadline: &Deadline) -> Result<(), ReadError> {
        let mut last = ReadError::NoLeader;
        while !deadline.has_passed() {
            match deadline.limit(self.read_rounds.join()).await {
                Err(_) => return Err(last),
                Ok(None) => return Err(ReadError::Overloaded),
                Ok(Some(Ok(index))) => return self.wait_for_index(index, deadline).await,
                Ok(Some(Err(Unproven::NoLeader))) => last = ReadError::NoLeader,
                Ok(Some(Err(Unproven::NoQuorum))) => last = ReadError::NoQuorum,
            }
            self.next_leader(deadline).await;
        }
        Err(last)
    }

    pub(super) async fn wait_for_index(
        &self,
        index: u64,
        deadline: &Deadline,
    ) -> Result<(), ReadError> {
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.index >= index);
        match deadline.limit(reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Deadline),
        }
    }

    /// Waits until this replica has applied a revision.
    pub async fn wait_for_revision(
        &self,
        revision: Revision,
        deadline: &Deadline,
    ) -> Result<(), ReadError> {
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.revision >= revision);
        match deadline.limit(reached).await {
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
