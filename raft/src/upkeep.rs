//! What a node does by itself for as long as it belongs to a cluster. Each duty is a task of its
//! own: the one that watches for a stalled disk must wait for nothing that needs the disk.

use std::{io, sync::Arc, time::Duration};

use futures::future::join_all;
use holdfast_proto::peer::{
    ClusterRecord, Command, Member, RaiseFeatureLevel, Standing, command::Op,
};

use crate::{
    agreement::log::SharedLog,
    local::{Local, Opened},
    membership::{Reconciler, health},
    replica::Replica,
    state::record::FEATURE_LEVEL,
    store::space::DiskSpace,
    task::{self, every},
};

const GUARD_EVERY: Duration = Duration::from_millis(200);
const MAINTAIN_EVERY: Duration = Duration::from_millis(200);
/// How often the file system is asked. What log and states take is added up each fifth time.
const MEASURE_EVERY: Duration = Duration::from_millis(200);
const ADD_UP_EVERY: u32 = 5;
/// A sync older than this is a stalled disk: a leader on it must not go on leading.
const STALL: Duration = Duration::from_secs(2);
const HAND_OVER_TIMEOUT: Duration = Duration::from_millis(500);
/// From here on a leader gives space back without being asked.
const COMPACT_PERMILLE: u32 = 950;
const COMPACT_EVERY: Duration = Duration::from_secs(15);

pub(crate) struct Upkeep {
    local: Arc<Local>,
    log: SharedLog,
    space: Arc<DiskSpace>,
    reconciler: Reconciler,
}

impl Upkeep {
    pub(crate) fn new(local: Arc<Local>, log: SharedLog, space: Arc<DiskSpace>) -> Self {
        Self {
            reconciler: Reconciler::new(local.clone()),
            local,
            log,
            space,
        }
    }

    pub(crate) async fn maintain(&self) {
        let mut every = every(MAINTAIN_EVERY);
        loop {
            every.tick().await;
            let Some(opened) = self.local.opened() else {
                continue;
            };
            self.know_members(opened);
            self.note_caught_up(opened).await;
            self.raise_feature_levels(opened).await;
            // Keeps the time of who is stuck, whoever asks.
            let _ = health::of_self(&self.local, opened);
            let _ = health::of_others(&self.local, opened);
            self.reconciler.step(opened).await;
        }
    }

    pub(crate) async fn guard_against_stalls(&self) {
        let mut every = every(GUARD_EVERY);
        loop {
            every.tick().await;
            if let Some(opened) = self.local.opened() {
                opened.peers.set_sync_time(self.log.sync_time());
                self.guard_stalled_disk(opened).await;
            }
        }
    }

    /// A disk that hangs, or has no room for the log, must not keep a leader that can commit
    /// nothing: it hands over if it can, and speaks to no peer until the disk takes writes again.
    /// Local reads go on.
    async fn guard_stalled_disk(&self, opened: &Opened) {
        let out_of_room = self.space.is_out_of_room();
        let stalled = out_of_room || self.log.stalled_for() > STALL;
        if stalled == opened.peers.is_stalled() {
            return;
        }
        if stalled {
            if out_of_room {
                tracing::error!(
                    "the disk is full to the last: this node leaves its peers until there is space"
                );
            } else {
                tracing::error!(
                    "the disk has not answered for {} s: this node leaves its peers until it does",
                    STALL.as_secs()
                );
            }
            let led = opened
                .replicas()
                .filter(|replica| replica.leader().is_some_and(|leader| leader.is_self));
            join_all(
                led.map(|replica| tokio::time::timeout(HAND_OVER_TIMEOUT, replica.hand_over(None))),
            )
            .await;
        } else {
            tracing::info!("the disk answers again");
        }
        opened.peers.set_closed(stalled);
    }

    /// What shard 0 has applied says who is a member; the groups may know some sooner, and need
    /// some longer.
    fn know_members(&self, opened: &Opened) {
        let Some(first) = opened.replica(0) else {
            return;
        };
        let roster = first.state().roster();
        if roster.members.is_empty() {
            return;
        }
        let groups = opened.replicas().flat_map(|group| group.members());
        let groups: Vec<Member> = groups.collect();
        let me = opened.peers.identity().node_id;
        let is_in = |members: &[Member]| members.iter().any(|member| member.id == me);
        if me < roster.next_id && !is_in(&roster.members) {
            let reason = format!(
                "this node was removed from cluster {}",
                opened.peers.identity().cluster_id
            );
            match is_in(&groups) {
                // Those that stay may need its vote to let it go.
                true => self
                    .local
                    .show_retired(self.local.what_to_do(Standing::Removed, &reason)),
                false => self.local.retire(Standing::Removed, reason),
            }
        }
        opened.peers.roster().set(&roster, groups);
        let is_member = |id| opened.peers.member(id).is_some();
        opened.peers.acknowledged().keep_only(is_member);
    }

    async fn note_caught_up(&self, opened: &Opened) {
        let Some(cluster) = self.local.identity().record().cluster else {
            return;
        };
        let caught_up = opened.replicas().all(|replica| !replica.must_catch_up());
        if !caught_up || cluster.caught_up {
            return;
        }
        let (local, noted) = (
            self.local.clone(),
            ClusterRecord {
                caught_up,
                ..cluster
            },
        );
        let noted = task::blocking(move || local.identity().belong(noted)).await;
        if let Err(error) = noted.map_err(io::Error::other).and_then(|noted| noted) {
            tracing::warn!(%error, "noting that this node has caught up failed");
        }
    }

    pub(crate) async fn measure_disk(&self) {
        let mut every = every(MEASURE_EVERY);
        let mut measured = 0u32;
        loop {
            every.tick().await;
            let Some(opened) = self.local.opened() else {
                continue;
            };
            if measured.is_multiple_of(ADD_UP_EVERY) {
                self.add_up(opened).await;
            }
            measured = measured.wrapping_add(1);
            let space = self.space.clone();
            match task::blocking(move || space.measure()).await {
                Ok(Ok(fill)) => opened.peers.set_disk(fill),
                Ok(Err(error)) => tracing::warn!(%error, "measuring the disk failed"),
                Err(_) => {}
            }
            for replica in opened.replicas() {
                replica.hand_over_for_space().await;
            }
        }
    }

    async fn add_up(&self, opened: &Opened) {
        let (log, states) = (
            self.log.clone(),
            opened
                .replicas()
                .map(|replica| replica.state().clone())
                .collect::<Vec<_>>(),
        );
        let added_up = task::blocking(move || -> io::Result<u64> {
            log.keep_note()?;
            states.iter().try_fold(
                log.disk_bytes()?,
                |sum, state| Ok(sum + state.disk_bytes()?),
            )
        });
        if let Ok(Ok(bytes)) = added_up.await {
            self.space.set_used(bytes);
        }
    }

    /// Gives space back when there is little left. What is measured goes on being told meanwhile.
    pub(crate) async fn keep_space(&self) {
        let mut every = every(COMPACT_EVERY);
        loop {
            every.tick().await;
            match self.local.opened() {
                Some(opened) if opened.peers.disk_used_permille() >= COMPACT_PERMILLE => {
                    self.give_space_back(opened).await
                }
                _ => {}
            }
        }
    }

    /// Purges what the state has on disk, and compacts what was deleted.
    async fn give_space_back(&self, opened: &Opened) {
        for replica in opened.replicas() {
            replica.purge_for_space().await;
            let state = replica.state().clone();
            if let Ok(Err(error)) = task::blocking(move || state.compact()).await {
                tracing::warn!(%error, shard = replica.shard(), "compaction failed");
            }
        }
        let log = self.log.clone();
        if let Ok(Err(error)) = task::blocking(move || log.compact()).await {
            tracing::warn!(%error, "compacting the log failed");
        }
    }

    /// A shard's level is what all its members speak; nothing above it is written.
    async fn raise_feature_levels(&self, opened: &Opened) {
        for replica in opened.replicas() {
            let level = spoken_by_all(opened, replica);
            if replica.leads().is_none() || replica.feature_level() >= level {
                continue;
            }
            let op = Op::RaiseFeatureLevel(RaiseFeatureLevel { level });
            let command = Command {
                request_id: None,
                caller: String::new(),
                op: Some(op),
            };
            // Without it the next round tries again.
            let _ = replica.propose_here(command, MAINTAIN_EVERY).await;
        }
    }
}

/// The highest feature level that every member of the shard speaks, as far as they have been heard.
fn spoken_by_all(opened: &Opened, replica: &Replica) -> u32 {
    let me = opened.peers.identity().node_id;
    let members = replica.voters().into_iter().chain(replica.learners());
    let spoken_by = |id| {
        let view = opened.peers.view(replica.shard(), id);
        view.map_or(0, |view| view.feature_level)
    };
    let others = members.filter(|&id| id != me).map(spoken_by);
    others.min().unwrap_or(FEATURE_LEVEL).min(FEATURE_LEVEL)
}
