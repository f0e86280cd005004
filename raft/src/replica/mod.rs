//! One replica of one shard: the face of this crate. Writes go through the leader, here or
//! forwarded once (`write.rs`); reads come from memory, after whatever wait their consistency asks
//! for (`read.rs`); the rest is what a replica does by itself for as long as it is open.

mod disk;
mod divergence;
mod duties;
mod leads;
mod look_up;
mod open;
mod purge;
mod read;
mod sweep;
mod write;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{
    Revision, ShardId,
    peer::{self, Header, ReplyHeader},
    timeline::Millis,
};
use openraft::type_config::async_runtime::watch::WatchReceiver;
use tokio::sync::watch;

pub(crate) use self::open::Parts;
pub use self::{
    look_up::{InMemory, Inspected},
    read::Seen,
};
use crate::{
    agreement::{
        RaftHandle,
        agreed::Agreed,
        campaign::Campaign,
        leader_proof::LeaderProof,
        leadership::{Leader, LeaderClock},
        log::{LogKept, ShardLog},
        pace::Pace,
        pins::LogPins,
        proposer::Proposer,
        read_rounds::ReadRounds,
        types::LogId,
    },
    clock::{Clock, Deadline},
    events::Events,
    peer::{Peers, snapshot},
    state::{Applied, Changes, MemoryUse, State},
    task::{Tasks, every},
};

/// How often a replica looks whether its openraft still runs.
const LIFE_CHECK_EVERY: Duration = Duration::from_millis(100);

/// How far a replica is at least. Of an answer it is asked for before the look-up: what is applied
/// after that may not be in it.
#[derive(Debug, Clone, Copy)]
pub struct Standing {
    pub revision: Revision,
    /// When it last had all that was acknowledged by then, as monotonic time; `None` if it never
    /// knew.
    pub current_at: Option<Duration>,
}

impl Standing {
    /// Of an answer that waited and shows this version.
    pub fn showing(self, version: Revision) -> Self {
        Self {
            revision: self.revision.max(version),
            ..self
        }
    }
}

pub struct Replica {
    shard: ShardId,
    clock: Clock,
    peers: Arc<Peers>,
    state: Arc<State>,
    raft: RaftHandle,
    log: ShardLog,
    leader_clock: Arc<LeaderClock>,
    proposer: Proposer,
    proof: Arc<LeaderProof>,
    read_rounds: ReadRounds,
    snapshots: Arc<snapshot::Sender>,
    keep_from: Arc<AtomicU64>,
    pins: LogPins,
    log_kept: LogKept,
    events: Arc<dyn Events>,
    campaign: Arc<Campaign>,
    /// It joined and has not been level with its leader since.
    must_catch_up: AtomicBool,
    /// Its log lost what it had acknowledged and is not level with its leader since.
    log_is_short: Arc<AtomicBool>,
    /// Snapshots that are being installed.
    installing: AtomicUsize,
    leader: watch::Sender<Option<Leader>>,
    /// The term in which this node leads and has applied all that came before.
    leads: watch::Sender<Option<u64>>,
    /// The state is not the majority's.
    diverged: Arc<AtomicBool>,
    /// As leader: no majority has the same state.
    split: AtomicBool,
    agreed: Arc<Agreed>,
    tasks: Tasks,
}

/// A snapshot that is being installed.
pub(crate) struct Installing<'r>(&'r AtomicUsize);

impl Drop for Installing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Replica {
    pub fn shard(&self) -> ShardId {
        self.shard
    }

    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    pub fn applied(&self) -> Applied {
        self.state.applied()
    }

    /// What all members of the shard understand: nothing newer is proposed.
    pub fn feature_level(&self) -> u32 {
        self.state.applied_record().feature_level
    }

    /// Whether they understand `Revalidated`, and what else came with it.
    pub fn can_revalidate(&self) -> bool {
        self.feature_level() >= 2
    }

    pub fn watch_applied(&self) -> watch::Receiver<Applied> {
        self.state.watch_applied()
    }

    /// For tokens: no answer shows more than this, if it is asked for after the look-up.
    pub fn visible(&self) -> Revision {
        self.state.visible()
    }

    /// Every change of a key that is applied here from now on.
    pub fn follow(&self) -> Changes {
        self.state.follow()
    }

    /// Writes that wait to be put into the log.
    pub fn proposals_waiting(&self) -> usize {
        self.proposer.waiting()
    }

    pub fn memory_use(&self) -> MemoryUse {
        self.state.memory_use()
    }

    /// Of the state, without the log.
    pub fn disk_bytes(&self) -> io::Result<u64> {
        self.state.disk_bytes()
    }

    /// What a read on this replica judges by.
    pub fn now(&self) -> Millis {
        self.leader_clock.now()
    }

    /// Joined and not yet level with its leader: it must not answer reads by itself.
    pub fn must_catch_up(&self) -> bool {
        self.must_catch_up.load(Ordering::Relaxed) || self.is_diverged()
    }

    /// The log lost what this replica had acknowledged: until it is level again it neither votes nor
    /// stands, and answers no reads by itself.
    pub fn log_is_short(&self) -> bool {
        self.log_is_short.load(Ordering::Relaxed)
    }

    /// A snapshot has arrived: what this replica has is being replaced by it.
    pub fn is_installing(&self) -> bool {
        self.installing.load(Ordering::Relaxed) > 0
    }

    /// For as long as the guard lives.
    pub(crate) fn install_begins(&self) -> Installing<'_> {
        self.installing.fetch_add(1, Ordering::Relaxed);
        Installing(&self.installing)
    }

    /// What every look-up that begins now will show.
    pub fn standing(&self) -> Standing {
        Standing {
            revision: self.state.applied().revision,
            current_at: self.current_at(),
        }
    }

    /// When this replica last had all that was acknowledged by then, as monotonic time; `None` if
    /// it never knew.
    fn current_at(&self) -> Option<Duration> {
        match self.leader() {
            Some(leader) if leader.is_self && self.leads() == Some(leader.term) => {
                let now = self.clock.monotonic();
                let ago = self
                    .leader_clock
                    .quorum_acknowledged_ago(leader.term, now)?;
                Some(now.saturating_sub(ago))
            }
            _ => self.leader_clock.current_at(),
        }
    }

    /// How long ago this replica was current.
    pub fn lag(&self) -> Option<Duration> {
        self.current_at().map(|at| self.lag_since(at))
    }

    /// How far behind is now what was current then.
    pub fn lag_since(&self, current_at: Duration) -> Duration {
        self.clock.monotonic().saturating_sub(current_at)
    }

    /// What heartbeats and elections are timed by.
    pub fn pace(&self) -> Pace {
        self.leader_clock.pace()
    }

    pub fn voters(&self) -> Vec<u64> {
        self.raft.voter_ids().collect()
    }

    pub fn learners(&self) -> Vec<u64> {
        self.raft.learner_ids().collect()
    }

    /// Of any member of the Raft group, also of one that the roster has forgotten.
    pub(crate) fn node_named(&self, name: &str) -> Option<u64> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        metrics
            .membership_config
            .nodes()
            .find(|(_, member)| member.name == name)
            .map(|(&id, _)| id)
    }

    /// How far log time is ahead of the voters' clocks if this replica leads, else of its own.
    pub fn log_time_ahead_ms(&self) -> i64 {
        if self.leads().is_some() {
            return self.leader_clock.log_time_ahead_ms();
        }
        let ahead = i128::from(self.now()) - i128::from(self.clock.wall_ms());
        i64::try_from(ahead).unwrap_or(i64::MAX)
    }

    /// Whether this leader's own clock is off.
    pub fn clock_is_skewed(&self) -> bool {
        self.leader_clock.is_skewed()
    }

    /// Last log index minus applied: what this replica has and has not applied, plus what it knows
    /// to be committed.
    pub fn log_last_index(&self) -> u64 {
        self.log.last_index()
    }

    /// How far the log went: what is applied was in it, and what is known to be lost.
    pub(crate) fn log_reached(&self) -> u64 {
        let lost = match self.log_is_short() {
            true => self.log.lost_acknowledged().ok().flatten(),
            false => None,
        };
        let last = self.log_last_index().max(self.applied().index);
        lost.map_or(last, |lost| lost.acknowledged.max(last))
    }

    /// As a leader: a follower is about to come back with less log than it had. openraft would
    /// count what it had acknowledged for ever.
    pub(crate) async fn expect_less_of(&self, follower: u64) {
        if self.raft.is_leader() {
            let allowed = self.raft.trigger().allow_next_revert(&follower, true).await;
            if let Ok(Err(error)) = allowed {
                tracing::debug!(%error, follower, "it is not replicated to yet");
            }
        }
    }

    pub(crate) fn changes_voters(&self) -> bool {
        self.raft
            .metrics()
            .borrow_watched()
            .membership_config
            .get_joint_config()
            .len()
            > 1
    }

    #[cfg(test)]
    pub(crate) fn peers_identity(&self) -> &crate::peer::Identity {
        self.peers.identity()
    }

    /// So much from now, by the clock that this replica goes by.
    pub fn deadline(&self, timeout: Duration) -> Deadline {
        self.clock.deadline(timeout)
    }

    pub(crate) fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    // ---- what peers say ----

    pub(crate) fn raft(&self) -> &RaftHandle {
        &self.raft
    }

    pub(crate) fn snapshots(&self) -> &snapshot::Sender {
        &self.snapshots
    }

    /// What a message to a peer about this shard begins with.
    pub fn header(&self, to: u64) -> Header {
        self.peers.header(to, self.shard)
    }

    /// What an answer to a peer about this shard begins with.
    pub fn reply(&self) -> ReplyHeader {
        ReplyHeader {
            mark: Some(self.leader_clock.mark()),
            diverged: self.is_diverged(),
            ..self.peers.reply(Some(&self.state))
        }
    }

    pub(crate) fn campaign(&self) -> &Campaign {
        &self.campaign
    }

    /// As a leader: how far the log of each member has what this one has; 0 if it has nothing.
    pub(crate) fn matched(&self) -> Vec<(u64, u64)> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let replication = metrics.replication.as_ref();
        let index = |matched: &Option<LogId>| matched.as_ref().map_or(0, |id| id.index());
        replication.map_or_else(Vec::new, |all| {
            all.iter()
                .map(|(&id, matched)| (id, index(matched)))
                .collect()
        })
    }

    /// As a leader: how far each member has acknowledged what is committed.
    pub(crate) fn acknowledged(&self) -> Vec<(u64, u64)> {
        let committed = self.applied().index;
        let mut acknowledged = self.matched();
        for (_, index) in &mut acknowledged {
            *index = committed.min(*index);
        }
        acknowledged.retain(|&(_, index)| index > 0);
        acknowledged
    }

    /// What the leader says that voters have acknowledged.
    pub(crate) fn note_acknowledged(&self, header: Option<&Header>) {
        if let Some(header) = header {
            self.peers.acknowledged().note(&header.acknowledged);
        }
    }

    /// Every member of the Raft group as its log has it, committed or not.
    pub(crate) fn members(&self) -> Vec<peer::Member> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let nodes = metrics.membership_config.nodes();
        nodes.map(|(_, member)| member.clone()).collect()
    }

    pub(crate) fn heard_append(&self, vote: Option<&peer::Vote>, header: Option<&Header>) {
        self.leader_clock.hear(vote, header);
    }

    /// Resolves when this replica can go on no more, and says why. Looks now and then: openraft
    /// tells of each entry, and of its end in the same place.
    pub(crate) async fn died(&self) -> String {
        let raft_stopped = async {
            let mut every = every(LIFE_CHECK_EVERY);
            loop {
                every.tick().await;
                if let Err(fatal) = &self.raft.metrics().borrow_watched().running_state {
                    return fatal.to_string();
                }
            }
        };
        tokio::select! {
            why = raft_stopped => why,
            why = self.tasks.failed() => why,
        }
    }

    /// Of this replica: they stop with it.
    pub(crate) fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    // ---- stopping ----

    pub(crate) async fn close(&self) -> io::Result<()> {
        // Whoever waits to apply must be able to end.
        self.state.hold(false);
        self.tasks.stop().await;
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(%error, "the replica did not stop cleanly");
        }
        let state = self.state.clone();
        let flushed = crate::task::blocking(move || {
            let flushed = state.flush();
            state.close();
            flushed
        });
        flushed.await.map_err(io::Error::other)?.map(|_| ())
    }
}
