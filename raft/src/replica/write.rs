//! Writes: proposed here if this node leads, else forwarded once. What became of a write is said
//! exactly: `applied: no` only where it is certain.

use std::time::Duration;

use holdfast_proto::{
    peer::{Command, Outcome, ProposeRequest, command::Op, propose_response},
    v1::RequestId,
};
use tonic::Request;

use super::{RETRY_PAUSE, Replica};
use crate::{agreement::leadership::Leader, clock::Deadline, error::WriteError, peer::Purpose};

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
        loop {
            let left = deadline.left();
            if left.is_zero() {
                return Err(WriteError::NoLeader);
            }
            match self.leader() {
                None => self.leader_change(left).await,
                Some(leader) if leader.is_self => {
                    match self.propose_here(command.clone(), left).await {
                        // Certain not to be in the log: whoever leads now may have it.
                        Err(WriteError::NotLeader { .. } | WriteError::NoQuorum) => {
                            tokio::time::sleep(RETRY_PAUSE.min(left)).await
                        }
                        outcome => return outcome,
                    }
                }
                Some(leader) => match self.forward(leader, command.clone(), left).await {
                    // There was no connection to forward it on: not forwarded, and whoever leads
                    // next may have it.
                    Err(WriteError::NoLeader) => tokio::time::sleep(RETRY_PAUSE.min(left)).await,
                    outcome => return outcome,
                },
            }
        }
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
        timeout: Duration,
    ) -> Result<Outcome, WriteError> {
        let Some(member) = self.peers.member(leader.id) else {
            return Err(WriteError::NoLeader);
        };
        let header = Some(self.peers.header(leader.id, self.shard, None));
        let mut request = Request::new(ProposeRequest {
            header,
            command: Some(command),
        });
        request.set_timeout(timeout);
        self.events.outgoing(request.metadata_mut());
        let mut client = self
            .peers
            .replica_client(&member.peer_address, Purpose::Control);
        let answer = tokio::select! {
            answer = tokio::time::timeout(timeout, client.propose(request)) => answer,
            () = self.deposed(leader) => return Err(WriteError::Unknown("another leader was elected while the write was under way".into())),
        };
        let response = match answer {
            Err(_) => return Err(WriteError::DeadlineAfter),
            Ok(Err(status)) if timed_out(&status) => return Err(WriteError::DeadlineAfter),
            Ok(Err(status)) if never_connected(&status) => return Err(WriteError::NoLeader),
            Ok(Err(status)) => {
                return Err(WriteError::Unknown(format!(
                    "the leader did not answer: {}",
                    status.message()
                )));
            }
            Ok(Ok(response)) => response.into_inner(),
        };
        self.peers
            .heard(self.shard, leader.id, response.header.as_ref());
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

    async fn leader_change(&self, within: Duration) {
        let mut leader = self.watch_leader();
        let _ = tokio::time::timeout(
            within.min(RETRY_PAUSE * 4),
            leader.wait_for(Option::is_some),
        )
        .await;
    }
}

/// The request did not leave this node: there was no connection to send it on.
fn never_connected(status: &tonic::Status) -> bool {
    is_caused_by::<tonic::ConnectError>(status)
}

/// The transport keeps the deadline too, and may be first to see it pass.
fn timed_out(status: &tonic::Status) -> bool {
    is_caused_by::<tonic::TimeoutExpired>(status)
}

fn is_caused_by<E: std::error::Error + 'static>(status: &tonic::Status) -> bool {
    std::iter::successors(std::error::Error::source(status), |error| error.source())
        .any(|error| error.is::<E>())
}
