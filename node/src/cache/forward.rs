//! Where a read is answered: on this replica once it has seen enough, else on the leader, over one
//! hop and never further.

use std::{sync::Arc, time::Duration};

use holdfast_proto::{Key, peer::ReadRequest, reason, v1};
use holdfast_raft::{CallError, Deadline, Leader, ReadError, Replica, Seen};

use super::{Cache, controls::Controls};
use crate::{error::Error, grpc::error_of};

/// How long a read that only the leader can answer waits for there to be one: an election and some.
const LEADER_PATIENCE: Duration = Duration::from_secs(1);

/// Whether a read may go on to the leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hop {
    Allowed,
    /// It came from a peer that took this node for the leader.
    Taken,
}

/// Who answers.
pub(super) enum Reached {
    /// This replica, now: it has seen what the read asks for.
    Here,
    /// The leader has answered.
    Leader(v1::BatchGetResponse),
}

impl Cache {
    /// Waits until this replica may answer, or lets the leader answer `keys`. Does nothing for a
    /// read that takes what is there.
    pub(super) async fn reach(
        &self,
        replica: &Arc<Replica>,
        keys: &[Key],
        controls: &Controls,
        hop: Hop,
        deadline: &Deadline,
    ) -> Result<Reached, Error> {
        if !replica.must_catch_up() {
            match self.wait_here(replica, controls, deadline).await {
                Ok(()) => return Ok(Reached::Here),
                Err(ReadError::Behind { .. }) if hop == Hop::Allowed => {}
                Err(error) => return Err(self.sent_to_leader(replica, error.into())),
            }
        } else if hop == Hop::Taken {
            return Err(Error::new(
                reason::NOT_READY,
                "this replica has not caught up since it joined",
            ));
        }
        Box::pin(self.reach_leader(replica, keys, controls, deadline)).await
    }

    async fn wait_here(
        &self,
        replica: &Replica,
        controls: &Controls,
        deadline: &Deadline,
    ) -> Result<(), ReadError> {
        match &controls.seen {
            Seen::Anything => return Ok(()),
            Seen::Token(token) if token.revision(replica.shard()) > replica.applied().revision => {
                self.metrics.read_waited("token")
            }
            Seen::Token(_) => {}
            Seen::Everything => self.metrics.read_waited("read_index"),
        }
        replica
            .wait_until_seen(&controls.seen, self.settings.session_wait, deadline)
            .await
    }

    /// This replica cannot answer: whoever leads does, unless this replica comes level before there
    /// is a leader.
    async fn reach_leader(
        &self,
        replica: &Arc<Replica>,
        keys: &[Key],
        controls: &Controls,
        deadline: &Deadline,
    ) -> Result<Reached, Error> {
        let give_up = deadline.at_most(LEADER_PATIENCE);
        loop {
            let failed = match replica.leader().filter(|leader| !leader.is_self) {
                Some(leader) => tokio::select! {
                    asked = self.ask(replica, leader, keys, controls, deadline) => match asked {
                        Ok(response) => return Ok(Reached::Leader(response)),
                        // It does not answer: perhaps it is gone and another one comes.
                        Err(error) if error.reason() == reason::NO_LEADER => error,
                        Err(error) => return Err(error),
                    },
                    // A leader that hangs must not keep a replica from answering that has come
                    // level by itself.
                    () = self.level(replica, controls, deadline) => return Ok(Reached::Here),
                },
                None => Error::no_leader(),
            };
            if give_up.has_passed() {
                return Err(self.sent_to_leader(replica, failed));
            }
            tokio::select! {
                () = self.level(replica, controls, deadline) => return Ok(Reached::Here),
                () = replica.next_leader(&give_up) => {}
            }
        }
    }

    /// Resolves when this replica has seen enough; never, if it does not in time or has not caught
    /// up since it joined.
    async fn level(&self, replica: &Replica, controls: &Controls, deadline: &Deadline) {
        if replica.must_catch_up()
            || replica
                .wait_until_seen(&controls.seen, deadline.left(), deadline)
                .await
                .is_err()
        {
            std::future::pending::<()>().await;
        }
    }

    /// The leader's answer to a read.
    pub(super) async fn ask(
        &self,
        replica: &Replica,
        leader: Leader,
        keys: &[Key],
        controls: &Controls,
        deadline: &Deadline,
    ) -> Result<v1::BatchGetResponse, Error> {
        let peers = self.peers()?;
        let header = replica.header(leader.id);
        let question = ReadRequest {
            header: None,
            keys: keys.iter().map(|key| key.as_bytes().clone()).collect(),
            consistency: controls.consistency.into(),
            token: controls.token.clone(),
            max_age_ms: controls.demand.max_age,
            only_if_cached: controls.demand.only_if_cached,
            no_cache: controls.demand.no_cache,
            fetch_on_miss: controls.demand.fetch_on_miss.into(),
        };
        self.metrics.read_waited("forwarded");
        let response =
            peers
                .call(header, deadline, question)
                .await
                .map_err(|error| match error {
                    CallError::Timeout => Error::deadline(),
                    CallError::Refused(status) => {
                        error_of(&status).unwrap_or_else(Error::no_leader)
                    }
                    _ => Error::no_leader(),
                })?;
        match response.response {
            Some(read) if read.results.len() == keys.len() => Ok(read),
            _ => Err(Error::internal(
                "the leader answered a read with nothing",
                "answers are missing",
            )),
        }
    }
}
