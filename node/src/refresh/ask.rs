//! A follower's question for the leader's flight of a key, and the leader's answer.

use std::sync::Arc;

use holdfast_proto::{
    Key,
    peer::{FetchRequest, fetch_response},
};
use holdfast_raft::{Deadline, Events, Leader, Replica};
use tonic::{Code, Request};

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
        let Some(member) = peers.member(leader.id) else {
            return FetchOutcome::NotLeading;
        };
        let header = Some(replica.header(leader.id));
        let mut request = Request::new(FetchRequest {
            header,
            key: key.as_bytes().clone(),
        });
        request.set_timeout(deadline.left());
        self.metrics.outgoing(request.metadata_mut());
        let mut client = peers.refresh_client(&member.peer_address);
        // A leader that hangs is left as soon as there is another.
        let response = tokio::select! {
            response = deadline.limit(client.fetch(request)) => response,
            () = another_leader(replica, leader) => return FetchOutcome::NotLeading,
        };
        let response = match response {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) if status.code() == Code::ResourceExhausted => {
                return FetchOutcome::Overloaded;
            }
            Ok(Err(status)) => {
                tracing::debug!(leader = leader.id, code = ?status.code(), "the leader did not fetch");
                return FetchOutcome::NotLeading;
            }
            Err(_) => return FetchOutcome::NotLeading,
        };
        peers.heard(replica.shard(), leader.id, response.header.as_ref());
        response
            .result
            .map_or(FetchOutcome::NotLeading, FetchOutcome::from)
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
