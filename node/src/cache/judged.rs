//! A Set whose key another node leads, and judges by policies of its own: that node forms it.

use std::sync::Arc;

use holdfast_proto::{Key, peer::ForwardSetRequest, reason, v1};
use holdfast_raft::{CallError, Leader, Replica};

use super::{Acknowledged, Cache};
use crate::{error::Error, grpc::error_of, operation::Call, rules::Rules};

impl Cache {
    /// Lets the leader of the key form the Set and write it, if it is another node that is known to
    /// have other policies; `None` if this node forms it.
    pub(super) async fn set_by_leader(
        &self,
        request: &v1::SetRequest,
        rules: &Rules,
        call: &Call,
    ) -> Result<Option<Acknowledged<v1::SetResponse>>, Error> {
        let mut last = None;
        // Whoever is no leader any more, or not reached, did not apply it: the next one judges.
        while let Some((replica, leader)) = self.judge_of(request, rules) {
            if let Some(error) = last.take_if(|_| call.deadline.has_passed()) {
                return Err(error);
            }
            match self.forward_set(&replica, leader, request, call).await {
                Err(error) if error.is_not_applied() && error.reason() == reason::NO_LEADER => {
                    last = Some(error);
                    replica.next_leader(&call.deadline).await;
                }
                outcome => return outcome.map(Some),
            }
        }
        Ok(None)
    }

    /// Another node that leads the key and is known to have other policies.
    fn judge_of(&self, request: &v1::SetRequest, rules: &Rules) -> Option<(Arc<Replica>, Leader)> {
        let key = Key::new(request.key.clone()).ok()?;
        let replica = self.replica_of(&key).ok()?;
        let leader = self.refresher.judged_by(replica, rules)?;
        Some((replica.clone(), leader))
    }

    async fn forward_set(
        &self,
        replica: &Replica,
        leader: Leader,
        request: &v1::SetRequest,
        call: &Call,
    ) -> Result<Acknowledged<v1::SetResponse>, Error> {
        let peers = self.peers().map_err(Error::not_applied)?;
        let question = ForwardSetRequest {
            header: None,
            set: Some(request.clone()),
        };
        let header = replica.header(leader.id);
        let answered = peers.call(header, &call.deadline, question).await;
        let response = answered.map_err(|error| match error {
            CallError::NeverSent(_) => Error::no_leader().not_applied(),
            CallError::Refused(status) => {
                error_of(&status).unwrap_or_else(|| Error::no_leader().maybe_applied())
            }
            CallError::Timeout => Error::deadline().maybe_applied(),
            CallError::GivenUp | CallError::Lost(_) => Error::no_leader().maybe_applied(),
        })?;
        let response = response.set.ok_or_else(|| {
            Error::internal("the leader answered a Set with nothing", "it is empty").maybe_applied()
        })?;
        Ok(Acknowledged {
            response,
            leader: self.leader_elsewhere(replica),
        })
    }
}
