//! A follower's question for the leader's flight of a key, and the leader's answer.

use std::sync::Arc;

use holdfast_proto::{
    Key,
    peer::{FetchRequest, fetch_response},
};
use holdfast_raft::{CallError, Deadline, Leader, Replica};
use tonic::Code;

use super::{Refresher, join::another_leader, outcome::FetchOutcome};

impl Refresher {
    pub(super) async fn ask_leader(
        &self,
        key: &Key,
        upstream: &str,
        replica: &Replica,
        leader: Leader,
        deadline: &Deadline,
    ) -> FetchOutcome {
        let Ok(_asks) = self.asks.try_acquire() else {
            self.metrics.flight_refused(upstream);
            return FetchOutcome::Overloaded;
        };
        let Some(peers) = self.replicas.peers() else {
            return FetchOutcome::NotLeading;
        };
        let header = replica.header(leader.id);
        let question = FetchRequest {
            header: None,
            key: key.as_bytes().clone(),
        };
        // A leader that hangs is left as soon as there is another.
        let another = another_leader(replica, leader);
        match peers.call_until(header, deadline, question, another).await {
            Ok(response) => response
                .result
                .map_or(FetchOutcome::NotLeading, FetchOutcome::from),
            Err(CallError::Refused(status)) if status.code() == Code::ResourceExhausted => {
                FetchOutcome::Overloaded
            }
            Err(error) => {
                tracing::debug!(leader = leader.id, %error, "the leader did not fetch");
                FetchOutcome::NotLeading
            }
        }
    }

    /// Joins the flight of a follower's reader, who waits so long, by the policies of this node,
    /// which leads the key.
    pub(crate) async fn fetch_for_peer(
        self: &Arc<Self>,
        key: &Key,
        replica: &Arc<Replica>,
        deadline: &Deadline,
    ) -> fetch_response::Result {
        let rules = self.rules.load_full();
        let Some(term) = replica.leads() else {
            return FetchOutcome::NotLeading.into();
        };
        let Some(policy) = rules.policy(key) else {
            return FetchOutcome::NoPolicy.into();
        };
        let joined = Box::pin(self.join(key, &policy.upstream, replica, term, deadline));
        joined.await.into()
    }
}
