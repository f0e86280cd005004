//! Duties: tasks that a replica runs for as long as it is open.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use holdfast_proto::peer::{Command, Tick, command::Op};

use super::Replica;
use crate::{
    agreement::{leader_proof::ROUND_TIMEOUT, leadership::Leader},
    task::every,
};

/// How often a replica looks at who leads.
const WATCH_EVERY: Duration = Duration::from_millis(20);
/// Log time moves at least this often while there is a leader.
const TICK_EVERY: Duration = Duration::from_millis(500);

impl Replica {
    pub(super) fn start_duties(self: &Arc<Self>) {
        self.duty("replica.watch", Self::watch_who_leads);
        self.duty("replica.tick", Self::tick);
        self.duty("replica.sweep", Self::sweep);
        self.duty("replica.purge", Self::purge);
    }

    /// Runs until the replica closes; the replica awaits it then.
    fn duty<F>(self: &Arc<Self>, name: &'static str, run: impl FnOnce(Arc<Self>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, work) = (self.stop.clone(), run(self.clone()));
        let span =
            tracing::info_span!(parent: None, "replica.duty", duty = name, shard = self.shard);
        self.tasks.spawn(tracing::Instrument::instrument(
            async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = work => {}
                }
            },
            span,
        ));
    }

    async fn watch_who_leads(self: Arc<Self>) {
        let mut every = every(WATCH_EVERY);
        let mut campaigning = false;
        loop {
            every.tick().await;
            if !campaigning && !self.votes_quietly() {
                self.raft.runtime_config().elect(true);
                campaigning = true;
            }
            let leader = self.leader();
            self.leader_clock.know_voters(self.voters());
            if leader.is_some_and(|leader| leader.is_self) {
                self.leader_clock.lead(self.quorum_acknowledged_ago());
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
            if self.must_catch_up() {
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
                .wait_for_index(index, &self.clock.deadline(ROUND_TIMEOUT))
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
                .wait_for_index(index, &self.clock.deadline(ROUND_TIMEOUT))
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
}
