//! Who leads the shard, and the waits for whoever leads next.

use std::time::Duration;

use holdfast_proto::v1::Role;
use openraft::{ServerState, type_config::async_runtime::watch::WatchReceiver};
use tokio::sync::watch;

use super::Replica;
use crate::{agreement::leadership::Leader, clock::Deadline};

/// Between two tries at whoever leads.
const RETRY_PAUSE: Duration = Duration::from_millis(15);
/// How long a voter that was asked to may take to lead.
const HAND_OVER: Duration = Duration::from_secs(2);

impl Replica {
    pub fn leader(&self) -> Option<Leader> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let id = self.peers.identity().node_id;
        if metrics.state == ServerState::Leader {
            let term = metrics.current_term;
            let has_lease = self.leader_clock.has_lease(term, self.clock.monotonic());
            return has_lease.then_some(Leader {
                id,
                term,
                is_self: true,
            });
        }
        let heard = self.leader_clock.heard()?;
        (heard.leader != id && heard.term >= metrics.current_term).then_some(Leader {
            id: heard.leader,
            term: heard.term,
            is_self: false,
        })
    }

    pub fn watch_leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.subscribe()
    }

    /// The term this node leads, once everything before it is applied: what refreshing, sweeping
    /// and ticking go by.
    pub fn watch_leads(&self) -> watch::Receiver<Option<u64>> {
        self.leads.subscribe()
    }

    pub fn leads(&self) -> Option<u64> {
        *self.leads.borrow()
    }

    pub fn term(&self) -> u64 {
        self.raft.metrics().borrow_watched().current_term
    }

    pub fn role(&self) -> Role {
        match self.raft.metrics().borrow_watched().state {
            ServerState::Leader => Role::Leader,
            ServerState::Learner => Role::Learner,
            _ => Role::Voter,
        }
    }

    /// Whoever leads, or is the first to within that time.
    pub async fn some_leader(&self, within: Duration) -> Option<Leader> {
        let mut leader = self.watch_leader();
        let elected = leader.wait_for(Option::is_some);
        let elected = tokio::time::timeout(within, elected).await.ok()?.ok()?;
        *elected
    }

    /// Resolves when another leader, or another term of the same, is known.
    pub async fn another_leader(&self, than: Leader) {
        let mut leader = self.watch_leader();
        let another = |leader: &Option<Leader>| leader.is_some_and(|leader| leader != than);
        if leader.wait_for(another).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// The pause before whoever leads is tried again: a moment, or less if a leader comes up.
    pub async fn next_leader(&self, deadline: &Deadline) {
        let mut leader = self.watch_leader();
        // What is known already was tried: only news ends it, or this would be no pause.
        let news = async {
            while leader.changed().await.is_ok() {
                if leader.borrow_and_update().is_some() {
                    return;
                }
            }
            std::future::pending::<()>().await;
        };
        let _ = deadline.at_most(RETRY_PAUSE).limit(news).await;
    }

    /// Hands leadership to the voter that is furthest, and waits a moment for it to take over.
    pub async fn hand_over(&self, to: Option<u64>) -> Option<u64> {
        let me = self.peers.identity().node_id;
        let furthest = || {
            self.voters()
                .into_iter()
                .filter(|&voter| voter != me)
                .filter_map(|voter| {
                    self.peers
                        .view(self.shard, voter)
                        .filter(|view| !view.diverged)
                        .map(|view| (view.heard_at, view.applied_index, voter))
                })
                .max_by_key(|&(heard_at, index, _)| (index, heard_at))
                .map(|(_, _, voter)| voter)
        };
        let to = to.or_else(furthest)?;
        self.raft.trigger().transfer_leader(to).await.ok()?;
        let mut leader = self.watch_leader();
        let taken = leader.wait_for(|leader| leader.is_some_and(|leader| !leader.is_self));
        tokio::time::timeout(HAND_OVER, taken)
            .await
            .ok()?
            .ok()
            .and_then(|leader| leader.map(|leader| leader.id))
    }
}
