//! Writes: proposed here if this node leads, else forwarded once. What became of a write is said
//! exactly: `applied: no` only where it is certain.

use std::time::Duration;

use holdfast_proto::{
    peer::{Command, Outcome, ProposeRequest, command::Op, propose_response},
    v1::RequestId,
};

use super::Replica;
use crate::{agreement::leadership::Leader, clock::Deadline, error::WriteError, peer::CallError};

impl Replica {
    /// Proposes a command, here or through the leader, and says what it came to. A forwarded
    /// command is forwarded once.
    pub async fn write(
        &self,
        op: Op,
        request_id: Option<RequestId>,
        deadline: &Deadline,
    ) -> Result<Outcome, WriteError> {
        let command = Command {
            request_id,
            caller: String::new(),
            op: Some(op),
        };
        let mut last = WriteError::NoLeader;
        while !deadline.has_passed() {
            let outcome = match self.leader() {
                None => {
                    self.next_leader(deadline).await;
                    continue;
                }
                Some(leader) if leader.is_self => {
                    self.propose_here(command.clone(), deadline.left()).await
                }
                Some(leader) => self.forward(leader, command.clone(), deadline).await,
            };
            match outcome {
                // Certain not to be in a log, whoever leads now or next may have it.
                Err(
                    error @ (WriteError::NotLeader { .. }
                    | WriteError::NoQuorum
                    | WriteError::Unreachable),
                ) => last = error,
                outcome => return outcome,
            }
            self.next_leader(deadline).await;
        }
        Err(last)
    }

    /// Proposes here, whether this node leads or not: only a leader gets an outcome.
    pub(crate) async fn propose_here(
        &self,
        command: Command,
        timeout: Duration,
    ) -> Result<Outcome, WriteError> {
        if matches!(command.op, Some(Op::Set(_) | Op::CommitFetch(_))) && self.disk_full() {
            return Err(WriteError::DiskFull);
        }
        self.proposer.propose(command, timeout).await
    }

    async fn forward(
        &self,
        leader: Leader,
        command: Command,
        deadline: &Deadline,
    ) -> Result<Outcome, WriteError> {
        let header = self.peers.header(leader.id, self.shard);
        let question = ProposeRequest {
            header: None,
            command: Some(command),
        };
        let response = self
            .peers
            .call_until(header, deadline, question, self.deposed(leader))
            .await
            .map_err(|error| match error {
                CallError::NeverSent(_) => WriteError::Unreachable,
                CallError::Timeout => WriteError::DeadlineAfter,
                CallError::GivenUp => WriteError::Unknown(
                    "another leader was elected while the write was under way".into(),
                ),
                CallError::Refused(_) | CallError::Lost(_) => {
                    WriteError::Unknown(error.to_string())
                }
            })?;
        match response.result {
            Some(propose_response::Result::Outcome(outcome)) => Ok(outcome),
            Some(propose_response::Result::Failed(failed)) => Err(WriteError::Remote {
                reason: failed.reason,
                message: failed.message,
                not_applied: failed.not_applied,
                leader: (failed.leader != 0).then_some(failed.leader),
            }),
            None => Err(WriteError::Unknown("the leader answered nothing".into())),
        }
    }

    /// Resolves when another term's leader is known, and the old one had the time to answer what it
    /// committed.
    async fn deposed(&self, old: Leader) {
        let mut leader = self.watch_leader();
        if leader
            .wait_for(|leader| leader.is_some_and(|leader| leader.term > old.term))
            .await
            .is_err()
        {
            return std::future::pending().await;
        }
        tokio::time::sleep(self.pace().lease()).await;
    }
}
