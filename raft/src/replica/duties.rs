//! Duties: tasks that a replica runs for as long as it is open.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_proto::peer::{Command, Tick, command::Op};

use super::Replica;
use crate::{
    agreement::{
        leadership::Leader,
        pace::{Governor, Pace},
        quorum::Quorum,
    },
    task::every,
};

/// How often a replica looks at who leads.
const WATCH_EVERY: Duration = Duration::from_millis(20);
/// How often the leader looks at what the pace follows from.
const PACE_EVERY: Duration = Duration::from_millis(500);
/// What was measured of a voter that has not been heard for longer does not count.
const MEASURE_COUNTS_FOR: Duration = Duration::from_secs(10);
/// Log time moves at least this often while there is a leader.
const TICK_EVERY: Duration = Duration::from_millis(500);

impl Replica {
    pub(super) fn start_duties(self: &Arc<Self>) {
        self.duty("replica.watch", Self::watch_who_leads);
        self.duty("replica.heartbeat", |replica| async move {
            replica.campaign.send_heartbeats().await;
        });
        self.duty("replica.stand", |replica| async move {
            replica.campaign.stand_when_due().await;
        });
        self.duty("replica.pace", Self::keep_pace);
        self.duty("replica.tick", Self::tick);
        self.duty("replica.sweep", Self::sweep);
        self.duty("replica.purge", Self::purge);
        self.duty("replica.judge", Self::judge_states);
    }

    /// Runs until the replica closes; the replica awaits it then.
    fn duty<F>(self: &Arc<Self>, name: &'static str, run: impl Fn(Arc<Self>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let span =
            tracing::info_span!(parent: None, "replica.duty", duty = name, shard = self.shard);
        let this = self.clone();
        self.tasks.duty(name, span, move || run(this.clone()));
    }

    async fn watch_who_leads(self: Arc<Self>) {
        let mut every = every(WATCH_EVERY);
        loop {
            every.tick().await;
            self.leader_clock.follow_pace();
            self.leader_clock.know_voters(Quorum::of(&self.raft));
            let leader = self.leader();
            if let Some(leader) = leader.filter(|leader| leader.is_self) {
                self.leader_clock.keep_time();
                if self.leads() == Some(leader.term) {
                    let members = self.voters().into_iter().chain(self.learners());
                    self.leader_clock.confirm(leader.term, members);
                }
            }
            let changed = self.leader.send_if_modified(|known| {
                let other = known.map(|leader| (leader.id, leader.term))
                    != leader.map(|leader| (leader.id, leader.term));
                *known = leader;
                other
            });
            if changed {
                match leader {
                    Some(leader) => {
                        tracing::info!(
                            shard = self.shard,
                            leader = leader.id,
                            term = leader.term,
                            "a leader"
                        );
                        self.events.leader_changed(self.shard);
                    }
                    None => tracing::warn!(shard = self.shard, "no leader"),
                }
            }
            self.watch_own_leadership(leader).await;
            if self.must_catch_up.load(Ordering::Relaxed) {
                self.watch_catching_up().await;
            }
        }
    }

    /// Leadership is used only after everything before it is applied, and ends at once.
    async fn watch_own_leadership(&self, leader: Option<Leader>) {
        let term = leader
            .filter(|leader| leader.is_self)
            .map(|leader| leader.term);
        if *self.leads.borrow() == term {
            return;
        }
        if term.is_some() {
            let Ok(index) = self.confirm_leadership().await else {
                return;
            };
            if self
                .wait_for_index(index, &self.clock.deadline(self.proof.round_timeout()))
                .await
                .is_err()
            {
                return;
            }
        }
        self.leads.send_replace(term);
    }

    async fn watch_catching_up(&self) {
        if let Some(Ok(index)) = self.read_rounds.join().await
            && self
                .wait_for_index(index, &self.clock.deadline(self.proof.round_timeout()))
                .await
                .is_ok()
        {
            // It has all that a leader proved to be committed since it started.
            if self.log_is_short() {
                if let Err(error) = self.log.made_good().await {
                    tracing::warn!(%error, shard = self.shard, "noting that the log is whole again failed");
                    return;
                }
                self.log_is_short.store(false, Ordering::Relaxed);
                self.peers.set_log_is_short(false);
            }
            tracing::info!(shard = self.shard, "this replica has caught up");
            self.must_catch_up.store(false, Ordering::Relaxed);
        }
    }

    /// Keeps log time going, so that replicas agree on what has expired though nobody writes.
    async fn tick(self: Arc<Self>) {
        let mut every = every(TICK_EVERY);
        let mut last_index = 0;
        loop {
            every.tick().await;
            let index = self.applied().index;
            let idle = index == last_index;
            last_index = index;
            if idle && self.leads().is_some() {
                let tick = Command {
                    request_id: None,
                    caller: String::new(),
                    op: Some(Op::Tick(Tick {})),
                };
                let _ = self.propose_here(tick, TICK_EVERY).await;
                last_index = self.applied().index;
            }
        }
    }

    /// The leader of shard 0 measures what the cluster's pace follows from, and proposes another one
    /// when it changed.
    async fn keep_pace(self: Arc<Self>) {
        let mut every = every(PACE_EVERY);
        let mut governor = Governor::default();
        loop {
            every.tick().await;
            if self.shard != 0 || !self.raft.is_leader() {
                governor = Governor::default();
                continue;
            }
            let (now, pace) = (self.clock.monotonic(), self.leader_clock.pace());
            if let Some(next) = governor.adjust(now, pace, self.measured_pace(now)) {
                tracing::info!(?pace, ?next, "the pace of the cluster changes");
                let set = Command {
                    request_id: None,
                    caller: String::new(),
                    op: Some(Op::SetPace(next.into())),
                };
                let timeout = pace.max(next).answer_timeout(PACE_EVERY);
                let _ = self.propose_here(set, timeout).await;
            }
        }
    }

    /// The slowest disk and the longest way among the voters that are there.
    fn measured_pace(&self, now: Duration) -> Pace {
        let own = Pace::new(self.peers.sync_time(), Duration::ZERO);
        let me = self.peers.identity().node_id;
        self.voters()
            .into_iter()
            .filter(|&voter| voter != me)
            .filter_map(|voter| {
                let view = self.peers.view(self.shard, voter)?;
                let is_there = now.saturating_sub(view.heard_at) < MEASURE_COUNTS_FOR;
                is_there.then(|| Pace::new(view.sync_time, self.peers.round_trip(voter)))
            })
            .fold(own, Pace::max)
    }
}
