//! One replica of one shard: the face of this crate. Writes go through the leader, here or
//! forwarded once (`write.rs`); reads come from memory, after whatever wait their consistency asks
//! for (`read.rs`); the rest is what a replica does by itself for as long as it is open.

mod disk;
mod divergence;
mod duties;
mod look_up;
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
    v1::Role,
};
use openraft::{ServerState, type_config::async_runtime::watch::WatchReceiver};
use tokio::sync::watch;

pub use self::{
    look_up::{InMemory, Inspected},
    read::Seen,
};
use crate::{
    agreement::{
        self, RaftHandle,
        agreed::Agreed,
        campaign::Campaign,
        leader_proof::LeaderProof,
        leadership::{Leader, LeaderClock},
        log::{LogKept, ShardLog, SharedLog},
        pace::{Pace, SharedPace},
        pins::LogPins,
        proposer::Proposer,
        read_rounds::ReadRounds,
        state_machine::{StateMachine, replay},
        types::LogId,
    },
    clock::{Clock, Deadline},
    events::Events,
    peer::{Peers, client::Network, snapshot},
    state::{Applied, Changes, MemoryUse, State, owner},
    store::{Lost, Stores},
    task::{Tasks, every},
};

/// Between two tries of a wait for a leader.
const RETRY_PAUSE: Duration = Duration::from_millis(15);

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

/// What a replica is opened with.
pub(crate) struct Parts {
    pub(crate) shard: ShardId,
    pub(crate) clock: Clock,
    pub(crate) stores: Stores,
    pub(crate) log: SharedLog,
    pub(crate) peers: Arc<Peers>,
    pub(crate) pace: Arc<SharedPace>,
    pub(crate) snapshots: Arc<snapshot::Sender>,
    pub(crate) events: Arc<dyn Events>,
    pub(crate) memory_bytes_max: u64,
    pub(crate) log_kept: LogKept,
    pub(crate) must_catch_up: bool,
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

/// Says what is lost. With nobody to get it back from, that is the end.
async fn lost_log(
    raft: &RaftHandle,
    log: &ShardLog,
    lost: Lost,
    shard: ShardId,
    node_id: u64,
) -> io::Result<()> {
    let what = format!(
        "the log of shard {shard} had acknowledged entries up to {} and ends at {}: its last writes are gone from this disk",
        lost.acknowledged,
        log.last_index()
    );
    // From the core itself: its metrics may not be out yet.
    let is_alone = raft
        .with_raft_state(move |state| {
            let membership = state.membership_state.effective();
            membership.voter_ids().all(|voter| voter == node_id)
        })
        .await
        .map_err(io::Error::other)?;
    if !is_alone {
        tracing::error!("{what}; this node does not vote until it has them from the others");
        return Ok(());
    }
    if let Err(error) = raft.shutdown().await {
        tracing::warn!(%error, "the replica did not stop cleanly");
    }
    let message = format!(
        "{what}, and no other node has them: restore the node's data from a copy, or remove it to begin anew"
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

impl Replica {
    pub(crate) async fn open(parts: Parts) -> io::Result<Arc<Self>> {
        let Parts {
            shard,
            clock,
            stores,
            log,
            peers,
            pace,
            snapshots,
            events,
            memory_bytes_max,
            log_kept,
            must_catch_up,
        } = parts;
        // Off the async threads: other shards' heartbeats go on while this one is read.
        let (opening, cluster_id) = (stores.clone(), peers.identity().cluster_id.clone());
        let opened = crate::task::blocking(move || -> io::Result<_> {
            let state = State::open(&opening, shard, memory_bytes_max)?;
            owner::claim(state.generation().store.as_ref(), &cluster_id)?;
            Ok((state, log.shard(shard)?))
        });
        let (state, mut log) = opened.await.map_err(io::Error::other)??;
        log.heal(state.applied_record().last_applied).await?;
        let keep_from = Arc::new(AtomicU64::new(0));
        let agreed = Arc::new(Agreed::default());
        let leader_clock = Arc::new(LeaderClock::new(
            shard,
            clock.clone(),
            state.clone(),
            peers.clone(),
            pace,
        ));
        leader_clock.follow_pace();
        let pins = LogPins::new(clock.clone());
        let network = Network {
            peers: peers.clone(),
            state: state.clone(),
            shard,
            keep_from: keep_from.clone(),
            snapshots: snapshots.clone(),
            leader_clock: leader_clock.clone(),
            pins: pins.clone(),
            agreed: agreed.clone(),
        };
        let machine = StateMachine::new(state.clone(), snapshots.clone(), events.clone())?;
        if log.first_index() > state.applied().index + 1 {
            let message = format!(
                "the state of shard {shard} is at log index {}, the log begins at {}: what is between is gone; remove the data and let the node join again",
                state.applied().index,
                log.first_index()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        replay(&state, &mut log).await?;
        let raft = RaftHandle::new(
            peers.identity().node_id,
            agreement::config(shard).map_err(io::Error::other)?,
            network,
            log.clone(),
            machine,
        )
        .await
        .map_err(io::Error::other)?;
        let lost = log.lost_acknowledged()?;
        if let Some(lost) = lost {
            lost_log(&raft, &log, lost, shard, peers.identity().node_id).await?;
            peers.set_log_is_short(true);
        }

        let proof = Arc::new(LeaderProof {
            shard,
            raft: raft.clone(),
            peers: peers.clone(),
            leader_clock: leader_clock.clone(),
        });
        let log_is_short = Arc::new(AtomicBool::new(lost.is_some()));
        let diverged = Arc::new(AtomicBool::new(state.is_held()));
        let campaign = Arc::new(Campaign::new(
            shard,
            raft.clone(),
            log.clone(),
            peers.clone(),
            leader_clock.clone(),
            log_is_short.clone(),
            diverged.clone(),
        ));
        let tasks = Tasks::new(events.clone());
        let replica = Arc::new(Self {
            shard,
            campaign,
            proposer: Proposer::start(&tasks, raft.clone(), leader_clock.clone()),
            read_rounds: ReadRounds::start(&tasks, proof.clone()),
            proof,
            clock,
            peers,
            state,
            raft,
            log,
            leader_clock,
            snapshots,
            keep_from,
            pins,
            log_kept,
            events,
            must_catch_up: AtomicBool::new(must_catch_up || lost.is_some()),
            log_is_short,
            installing: AtomicUsize::new(0),
            leader: watch::Sender::new(None),
            leads: watch::Sender::new(None),
            diverged,
            split: AtomicBool::new(false),
            agreed,
            tasks,
        });
        replica.start_duties();
        Ok(replica)
    }

    pub fn shard(&self) -> ShardId {
        self.shard
    }

    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    pub fn applied(&self) -> Applied {
        self.state.applied()
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

    // ---- who leads ----

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

    /// What heartbeats and elections are timed by.
    pub fn pace(&self) -> Pace {
        self.leader_clock.pace()
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

    // ---- stopping ----

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
        tokio::time::timeout(Duration::from_secs(2), taken)
            .await
            .ok()?
            .ok()
            .and_then(|leader| leader.map(|leader| leader.id))
    }

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
