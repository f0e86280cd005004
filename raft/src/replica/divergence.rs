//! What a replica does about states that have parted: the leader finds out what the majority has
//! and sends its state to who has another; who has another stops serving until that has come.
//!
//! ```text
//! leader:    own and voters' hashes ─► judge ─► agreed ─┬─► in each append
//!                                                       └─► own differs: serve no more, hand over
//! follower:  agreed ≠ own ─► serve no more, say so in each answer ─► the leader's state comes ─► serve
//! ```
//! Heard is only who leads this replica's term and is a member. The log is right on all of them, so
//! an odd replica goes on acknowledging and voting; it stands for no election and applies nothing
//! more, so that the leader's state overtakes it.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use holdfast_proto::peer::{self, Header, StateHash};

use openraft::type_config::async_runtime::watch::WatchReceiver as _;

use super::Replica;
use crate::{
    agreement::{
        agreed::{Judge, Verdict},
        types::vote_to,
    },
    peer::{Purpose, snapshot::Scratch},
    state::Install,
    task::every,
};

const JUDGE_EVERY: Duration = Duration::from_millis(200);
/// A follower has so long to put the state it was sent in the place of its own.
const REPAIR_TIMEOUT: Duration = Duration::from_secs(60);

impl Replica {
    /// The state here is not the majority's: it answers nothing by itself.
    pub fn is_diverged(&self) -> bool {
        self.diverged.load(Ordering::Relaxed)
    }

    /// No majority of the voters has the same state: an operator has to choose.
    pub fn states_are_split(&self) -> bool {
        self.split.load(Ordering::Relaxed)
    }

    pub(super) async fn judge_states(self: Arc<Self>) {
        let mut every = every(JUDGE_EVERY);
        let mut judging: Option<(u64, Judge)> = None;
        loop {
            every.tick().await;
            let leader = self.leader().filter(|leader| leader.is_self);
            let Some(leader) = leader else {
                judging = None;
                self.agreed.set(None);
                self.split.store(false, Ordering::Relaxed);
                continue;
            };
            if judging
                .as_ref()
                .is_none_or(|(term, _)| *term != leader.term)
            {
                judging = Some((leader.term, Judge::default()));
            }
            if let Some((_, judge)) = &mut judging {
                self.judge(judge).await;
            }
            if !self.is_diverged() && self.agreed.get().is_some() {
                self.repair_others().await;
            }
        }
    }

    async fn judge(&self, judge: &mut Judge) {
        let me = self.peers.identity().node_id;
        let voters = self.voters();
        let reports = voters.iter().filter(|&&voter| voter != me);
        let reports = reports.filter_map(|&voter| {
            let hash = self.peers.view(self.shard, voter)?.state_hash?;
            Some((voter, hash))
        });
        for (voter, hash) in reports {
            judge.hear(voter, hash);
            if let Some(own) = self.state.hash_at(hash.index) {
                judge.hear(me, own);
            }
        }
        match judge.verdict(&voters) {
            Some(Verdict::Agreed(agreed)) => {
                self.split.store(false, Ordering::Relaxed);
                self.agreed.set(Some(agreed));
                if self.compare(agreed) {
                    let _ = self.hand_over(None).await;
                }
            }
            Some(Verdict::Split { index }) => {
                self.agreed.set(None);
                if !self.split.swap(true, Ordering::Relaxed) {
                    tracing::error!(
                        shard = self.shard,
                        index,
                        "the states of the voters differ and no majority has the same: nobody stops, somebody has to choose"
                    );
                }
            }
            None => {}
        }
    }

    /// What a message of this shard's leader says a majority has. Whoever else sends it, an id that
    /// is no member's or a leader of another term, is not heard.
    pub(crate) fn hear_agreed(&self, vote: Option<&peer::Vote>, header: Option<&Header>) {
        let agreed = header.and_then(|header| header.agreed);
        if let Some(agreed) = agreed
            && self.is_from_leader(vote, header)
        {
            self.compare(agreed);
        }
    }

    pub(crate) fn is_from_leader(
        &self,
        vote: Option<&peer::Vote>,
        header: Option<&Header>,
    ) -> bool {
        let (Some(vote), Some(header)) = (vote, header) else {
            return false;
        };
        let is_member = self
            .peers
            .member(header.from)
            .is_some_and(|member| member.incarnation == header.from_incarnation);
        let accepted = vote_to(&self.raft.metrics().borrow_watched().vote);
        is_member && vote.committed && vote.voted_for == Some(header.from) && *vote == accepted
    }

    /// True if that is not what this replica had there: it serves no more.
    fn compare(&self, agreed: StateHash) -> bool {
        let own = self.state.hash_at(agreed.index);
        let differs = own.is_some_and(|own| own.version == agreed.version && own != agreed);
        if differs && !self.diverged.swap(true, Ordering::Acquire) {
            self.state.hold(true);
            self.remember_divergence();
            tracing::error!(
                shard = self.shard,
                index = agreed.index,
                "the state of this replica is not the majority's: it answers nothing until the leader's has taken its place"
            );
        }
        differs
    }

    fn remember_divergence(&self) {
        let (state, shard) = (self.state.clone(), self.shard);
        let diverged = state.generation();
        // Detached on purpose: it is one write, and this replica serves no more, remembered or not.
        drop(crate::task::blocking(move || {
            if let Err(error) = state.remember_divergence(&diverged) {
                tracing::warn!(%error, shard, "a restart will not know that this state is not the majority's");
            }
        }));
    }

    /// One after the other: each costs a checkpoint.
    async fn repair_others(&self) {
        let me = self.peers.identity().node_id;
        let members = self.voters().into_iter().chain(self.learners());
        for id in members.filter(|&id| id != me) {
            let view = self.peers.view(self.shard, id);
            let Some(member) = self.peers.member(id) else {
                continue;
            };
            if !view.is_some_and(|view| view.diverged) {
                continue;
            }
            tracing::warn!(
                shard = self.shard,
                node = id,
                "sending this state to a replica that has diverged"
            );
            let vote = self.raft.metrics().borrow_watched().vote;
            let client = self
                .peers
                .replica_client(&member.peer_address, Purpose::Bulk);
            let header = Some(self.header(id));
            let sent = self
                .snapshots
                .repair(&self.state, client, header, &vote, REPAIR_TIMEOUT)
                .await;
            match sent {
                Ok(response) => self.peers.heard(self.shard, id, response.header.as_ref()),
                Err(error) => {
                    tracing::warn!(%error, shard = self.shard, node = id, "a diverged replica was not repaired")
                }
            }
        }
    }

    /// Puts the leader's state in the place of the one here, which is kept aside for whoever wants
    /// to know what happened.
    pub(crate) async fn repair(&self, dir: Scratch) -> std::io::Result<()> {
        if let Err(error) = self.snapshots.set_aside(self.state.clone()).await {
            tracing::warn!(%error, shard = self.shard, "the state that had diverged is not kept");
        }
        let state = self.state.clone();
        crate::task::blocking(move || state.install(dir.path(), Install::Repair))
            .await
            .map_err(std::io::Error::other)??;
        // In this order: who finds it diverged again holds it again.
        self.state.hold(false);
        self.diverged.store(false, Ordering::Release);
        tracing::info!(
            shard = self.shard,
            "the leader's state took the place of the diverged one"
        );
        Ok(())
    }
}
