//! One replica of one shard: the face of this crate. Writes go through the leader, here or forwarded once; reads come from
//! memory, after whatever wait their consistency asks for.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{
    Key, Revision, ShardId, Token,
    peer::{self, Command, Header, Outcome, ProposeRequest, ReadIndexRequest, ReplyHeader, SweepKey, Tick, command::Op, propose_response},
    reason,
    timeline::Millis,
    v1::{RequestId, Role},
};
use openraft::{Instant as _, ServerState, raft::linearizable_read::LinearizerOption, type_config::async_runtime::watch::WatchReceiver};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::Request;

use crate::{
    agreement::{
        self, LEASE, RaftHandle,
        leadership::{Leader, LeaderClock},
        log::{ShardLog, SharedLog},
        pins::LogPins,
        proposer::Proposer,
        read_rounds::{ReadRounds, Round, Unproven},
        state_machine::StateMachine,
    },
    clock::Clock,
    events::Events,
    peer::{Peers, Purpose, client::Network, snapshot},
    state::{Applied, State, memory::Lookup, record::DueKind},
    store::Stores,
};

/// How often a replica looks at who leads.
const WATCH_EVERY: Duration = Duration::from_millis(20);
/// Log time moves at least this often while there is a leader.
const TICK_EVERY: Duration = Duration::from_millis(500);
const SWEEP_EVERY: Duration = Duration::from_millis(1000);
/// The due index is read from its beginning again this often: rows may be written behind the broom.
const SWEEP_ALL_EVERY: u32 = 60;
const SWEEP_BATCH: usize = 1000;
/// Batches of one tick.
const SWEEP_BATCHES: usize = 50;
const PURGE_EVERY: Duration = Duration::from_millis(500);
/// A round that proves leadership may take this long.
const ROUND_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two tries of a wait for a leader.
const RETRY_PAUSE: Duration = Duration::from_millis(15);
/// Sets are refused from here on; deletes and sweeps go on.
const DISK_FULL_PERMILLE: u32 = 1000;

/// How much log a replica keeps for followers that come back.
#[derive(Debug, Clone, Copy)]
pub struct LogKept {
    pub entries: u64,
    pub bytes: u64,
}

/// Why a write has no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
    #[error("this node does not lead the shard")]
    NotLeader { leader: Option<u64> },
    #[error("too many writes wait already")]
    Overloaded,
    #[error("the disk of a voter is at its limit: values are refused until space is free again")]
    DiskFull,
    #[error("the deadline passed before the write left this node")]
    DeadlineBefore,
    #[error("the deadline passed while the write was under way")]
    DeadlineAfter,
    #[error("this node is stopping")]
    Stopped,
    #[error("what became of the write is unknown: {0}")]
    Unknown(String),
    #[error("{message}")]
    Remote { reason: String, message: String, not_applied: bool, leader: Option<u64> },
}

impl WriteError {
    /// It is certain that the write was not and will not be applied.
    pub fn not_applied(&self) -> bool {
        match self {
            Self::DeadlineAfter | Self::Unknown(_) => false,
            Self::Remote { not_applied, .. } => *not_applied,
            Self::NoLeader
            | Self::NoQuorum
            | Self::NotLeader { .. }
            | Self::Overloaded
            | Self::DiskFull
            | Self::DeadlineBefore
            | Self::Stopped => true,
        }
    }

    pub fn reason(&self) -> &str {
        match self {
            Self::NoLeader | Self::NotLeader { .. } => reason::NO_LEADER,
            Self::NoQuorum | Self::Unknown(_) => reason::NO_QUORUM,
            Self::Overloaded => reason::OVERLOADED,
            Self::DiskFull => reason::DISK_FULL,
            Self::DeadlineBefore | Self::DeadlineAfter => reason::DEADLINE,
            Self::Stopped => reason::NOT_READY,
            Self::Remote { reason, .. } => reason,
        }
    }

    pub fn leader(&self) -> Option<u64> {
        match self {
            Self::NotLeader { leader } | Self::Remote { leader, .. } => *leader,
            _ => None,
        }
    }
}

/// What a read must have seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Whatever this replica has.
    Anything,
    /// What a session has seen.
    Token(Token),
    /// Every write acknowledged before now.
    Everything,
}

/// Why a replica may not answer a read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
    #[error("this replica is at revision {applied}, the session has seen {wanted}")]
    Behind { applied: Revision, wanted: Revision },
    #[error("the token is from epoch {token}, this cluster is in {cluster}")]
    TokenEpoch { token: u64, cluster: u64 },
    #[error("too many reads wait already")]
    Overloaded,
    #[error("the deadline passed")]
    Deadline,
}

/// What a replica is opened with.
pub(crate) struct Parts {
    pub(crate) shard: ShardId,
    pub(crate) clock: Clock,
    pub(crate) stores: Stores,
    pub(crate) log: SharedLog,
    pub(crate) peers: Arc<Peers>,
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
    read_rounds: ReadRounds,
    snapshots: Arc<snapshot::Sender>,
    keep_from: Arc<AtomicU64>,
    pins: LogPins,
    log_kept: LogKept,
    events: Arc<dyn Events>,
    /// Until then a replica that had a vote before it started grants none and stands for none.
    quiet_until: Duration,
    /// It joined and has not been level with its leader since.
    must_catch_up: AtomicBool,
    /// Snapshots that are being received or installed.
    installing: AtomicUsize,
    leader: watch::Sender<Option<Leader>>,
    /// The term in which this node leads and has applied all that came before.
    leads: watch::Sender<Option<u64>>,
    diverged: watch::Sender<Option<String>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// A snapshot that is being received or installed.
pub(crate) struct Installing<'r>(&'r AtomicUsize);

impl Drop for Installing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How far the broom is.
struct Swept {
    /// Where the next batch begins.
    next: Millis,
    more: bool,
}

/// What `confirm_leadership` asks, from wherever this replica is.
struct LeaderRound {
    shard: ShardId,
    raft: RaftHandle,
    peers: Arc<Peers>,
    state: Arc<State>,
    leader_clock: Arc<LeaderClock>,
}

impl Replica {
    pub(crate) async fn open(parts: Parts) -> io::Result<Arc<Self>> {
        let Parts { shard, clock, stores, log, peers, snapshots, events, memory_bytes_max, log_kept, must_catch_up } = parts;
        let state = State::open(&stores, shard, memory_bytes_max)?;
        let log = log.shard(shard)?;
        let keep_from = Arc::new(AtomicU64::new(0));
        let leader_clock = Arc::new(LeaderClock::new(shard, clock.clone(), state.clone(), peers.clone()));
        let pins = LogPins::new(clock.clone());
        let network = Network {
            peers: peers.clone(),
            state: state.clone(),
            shard,
            keep_from: keep_from.clone(),
            snapshots: snapshots.clone(),
            leader_clock: leader_clock.clone(),
            pins: pins.clone(),
        };
        let machine = StateMachine::new(state.clone(), snapshots.clone(), events.clone())?;
        let had_vote = log.has_vote();
        if log.first_index() > state.applied().index + 1 {
            let message = format!(
                "the state of shard {shard} is at log index {}, the log begins at {}: what is between is gone; remove the data and let the node join again",
                state.applied().index,
                log.first_index()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        let raft =
            RaftHandle::new(peers.identity().node_id, agreement::config(shard).map_err(io::Error::other)?, network, log.clone(), machine)
                .await
                .map_err(io::Error::other)?;

        let round =
            LeaderRound { shard, raft: raft.clone(), peers: peers.clone(), state: state.clone(), leader_clock: leader_clock.clone() };
        let replica = Arc::new(Self {
            shard,
            quiet_until: if had_vote { clock.monotonic() + LEASE } else { Duration::ZERO },
            proposer: Proposer::start(raft.clone(), leader_clock.clone()),
            read_rounds: ReadRounds::start(Arc::new(round)),
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
            must_catch_up: AtomicBool::new(must_catch_up),
            installing: AtomicUsize::new(0),
            leader: watch::Sender::new(None),
            leads: watch::Sender::new(None),
            diverged: watch::Sender::new(None),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        replica.start_duties();
        Ok(replica)
    }

    pub fn shard(&self) -> ShardId {
        self.shard
    }

    pub fn state(&self) -> &Arc<State> {
        &self.state
    }

    // ---- writing ----

    /// Proposes a command, here or through the leader, and says what it came to. A forwarded command is forwarded once.
    pub async fn write(&self, op: Op, request_id: Option<RequestId>, timeout: Duration) -> Result<Outcome, WriteError> {
        let deadline = self.clock.monotonic() + timeout;
        let command = Command { request_id, caller: String::new(), op: Some(op) };
        loop {
            let left = deadline.saturating_sub(self.clock.monotonic());
            if left.is_zero() {
                return Err(WriteError::NoLeader);
            }
            match self.leader() {
                None => self.leader_change(left).await,
                Some(leader) if leader.is_self => match self.propose_here(command.clone(), left).await {
                    // Certain not to be in the log: whoever leads now may have it.
                    Err(WriteError::NotLeader { .. } | WriteError::NoQuorum) => tokio::time::sleep(RETRY_PAUSE.min(left)).await,
                    outcome => return outcome,
                },
                Some(leader) => match self.forward(leader, command.clone(), left).await {
                    // There was no connection to forward it on: not forwarded, and whoever leads next may have it.
                    Err(WriteError::NoLeader) => tokio::time::sleep(RETRY_PAUSE.min(left)).await,
                    outcome => return outcome,
                },
            }
        }
    }

    /// Proposes here, whether this node leads or not: only a leader gets an outcome.
    pub(crate) async fn propose_here(&self, command: Command, timeout: Duration) -> Result<Outcome, WriteError> {
        if matches!(command.op, Some(Op::Set(_) | Op::CommitFetch(_))) && self.disk_full() {
            return Err(WriteError::DiskFull);
        }
        self.proposer.propose(command, timeout).await
    }

    async fn forward(&self, leader: Leader, command: Command, timeout: Duration) -> Result<Outcome, WriteError> {
        let Some(member) = self.peers.member(leader.id) else { return Err(WriteError::NoLeader) };
        let header = Some(self.peers.header(leader.id, self.shard, None));
        let mut request = Request::new(ProposeRequest { header, command: Some(command) });
        request.set_timeout(timeout);
        self.events.outgoing(request.metadata_mut());
        let mut client = self.peers.replica_client(&member.peer_address, Purpose::Control);
        let response = match tokio::time::timeout(timeout, client.propose(request)).await {
            Err(_) => return Err(WriteError::DeadlineAfter),
            Ok(Err(status)) if never_connected(&status) => return Err(WriteError::NoLeader),
            Ok(Err(status)) => return Err(WriteError::Unknown(format!("the leader did not answer: {}", status.message()))),
            Ok(Ok(response)) => response.into_inner(),
        };
        self.peers.heard(self.shard, leader.id, response.header.as_ref());
        match response.result {
            Some(propose_response::Result::Outcome(outcome)) => Ok(outcome),
            Some(propose_response::Result::Failed(failed)) => Err(WriteError::Remote {
                reason: failed.reason,
                message: failed.message,
                not_applied: failed.not_applied,
                leader: (failed.leader != 0).then_some(failed.leader),
            }),
            None => Err(WriteError::Unknown("the leader answered nothing".into())),
        }
    }

    /// The fullest voter decides: what it cannot keep is not durable.
    pub fn disk_full(&self) -> bool {
        let fullest = self
            .voters()
            .into_iter()
            .filter_map(|voter| self.peers.view(self.shard, voter))
            .map(|view| view.disk_used_permille)
            .chain([self.peers.disk_used_permille()])
            .max();
        fullest.is_some_and(|used| used >= DISK_FULL_PERMILLE)
    }

    // ---- reading ----

    /// Waits until this replica may answer a read that must have `seen` so much. `patience` is how long it waits for a
    /// session's revision before it says that it is behind.
    pub async fn wait_until_seen(&self, seen: &Seen, patience: Duration, timeout: Duration) -> Result<(), ReadError> {
        match seen {
            Seen::Anything => Ok(()),
            Seen::Token(token) => self.wait_for_token(token, patience.min(timeout)).await,
            Seen::Everything => self.wait_for_everything(timeout).await,
        }
    }

    async fn wait_for_token(&self, token: &Token, patience: Duration) -> Result<(), ReadError> {
        let epoch = self.peers.identity().epoch;
        if token.epoch() != epoch {
            return Err(ReadError::TokenEpoch { token: token.epoch(), cluster: epoch });
        }
        let wanted = token.revision(self.shard);
        if self.state.applied().revision >= wanted {
            return Ok(());
        }
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.revision >= wanted);
        match tokio::time::timeout(patience, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Behind { applied: self.state.applied().revision, wanted }),
        }
    }

    async fn wait_for_everything(&self, timeout: Duration) -> Result<(), ReadError> {
        let deadline = self.clock.monotonic() + timeout;
        let mut last = ReadError::NoLeader;
        loop {
            let left = deadline.saturating_sub(self.clock.monotonic());
            if left.is_zero() {
                return Err(last);
            }
            match tokio::time::timeout(left, self.read_rounds.join()).await {
                Err(_) => return Err(last),
                Ok(None) => return Err(ReadError::Overloaded),
                Ok(Some(Ok(index))) => return self.wait_for_index(index, deadline.saturating_sub(self.clock.monotonic())).await,
                Ok(Some(Err(Unproven::NoLeader))) => last = ReadError::NoLeader,
                Ok(Some(Err(Unproven::NoQuorum))) => last = ReadError::NoQuorum,
            }
            tokio::time::sleep(RETRY_PAUSE.min(left)).await;
        }
    }

    async fn wait_for_index(&self, index: u64, timeout: Duration) -> Result<(), ReadError> {
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.index >= index);
        match tokio::time::timeout(timeout, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Deadline),
        }
    }

    /// Waits until this replica has applied a revision.
    pub async fn wait_for_revision(&self, revision: Revision, timeout: Duration) -> Result<(), ReadError> {
        let mut applied = self.state.watch_applied();
        let reached = applied.wait_for(|applied| applied.revision >= revision);
        match tokio::time::timeout(timeout, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ReadError::Behind { applied: self.state.applied().revision, wanted: revision }),
        }
    }

    /// Keys and instants of one kind of the due index, oldest first.
    pub fn due_for_refresh(&self, from: Millis, until: Millis, limit: usize) -> io::Result<Vec<(Millis, Key)>> {
        self.state.due(DueKind::Refresh, from, until, limit)
    }

    pub fn applied(&self) -> Applied {
        self.state.applied()
    }

    /// What a read on this replica judges by.
    pub fn now(&self) -> Millis {
        self.leader_clock.now()
    }

    /// Joined and not yet level with its leader: it must not answer reads by itself.
    pub fn must_catch_up(&self) -> bool {
        self.must_catch_up.load(Ordering::Relaxed)
    }

    /// A snapshot is on its way in: what this replica has is about to be replaced.
    pub fn is_installing(&self) -> bool {
        self.installing.load(Ordering::Relaxed) > 0
    }

    /// For as long as the guard lives.
    pub(crate) fn install_begins(&self) -> Installing<'_> {
        self.installing.fetch_add(1, Ordering::Relaxed);
        Installing(&self.installing)
    }

    /// How long ago this replica last knew itself to be current; `None` if it never did.
    pub fn lag(&self) -> Option<Duration> {
        match self.leader() {
            Some(leader) if leader.is_self => Some(Duration::ZERO),
            _ => self.leader_clock.current_ago(),
        }
    }

    // ---- who leads ----

    pub fn leader(&self) -> Option<Leader> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow_watched();
        let id = self.peers.identity().node_id;
        if metrics.state == ServerState::Leader {
            let heard = metrics.last_quorum_acked.as_ref().is_some_and(|at| at.elapsed() < LEASE);
            // A lone voter is its own quorum, and nobody else acknowledges anything.
            let acknowledged = heard || metrics.membership_config.voter_ids().eq([id]);
            return acknowledged.then_some(Leader { id, term: metrics.current_term, is_self: true });
        }
        let heard = self.leader_clock.heard()?;
        (heard.leader != id && heard.term >= metrics.current_term).then_some(Leader { id: heard.leader, term: heard.term, is_self: false })
    }

    pub fn watch_leader(&self) -> watch::Receiver<Option<Leader>> {
        self.leader.subscribe()
    }

    /// The term this node leads, once everything before it is applied: what refreshing, sweeping and ticking go by.
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

    /// Whether this leader's clock is off and it stamps with the voters' median.
    pub fn clock_is_skewed(&self) -> bool {
        self.leader_clock.is_skewed()
    }

    /// Last log index minus applied: what this replica has and has not applied, plus what it knows to be committed.
    pub fn log_last_index(&self) -> u64 {
        self.log.last_index()
    }

    /// Proves that this node leads, and says what must be applied before a read may be answered.
    pub(crate) async fn confirm_leadership(&self) -> Result<u64, Unproven> {
        confirm_leadership(&self.raft).await
    }

    async fn leader_change(&self, within: Duration) {
        let mut leader = self.watch_leader();
        let _ = tokio::time::timeout(within.min(RETRY_PAUSE * 4), leader.wait_for(Option::is_some)).await;
    }

    /// A voter change that is not yet through.
    pub(crate) fn changes_voters(&self) -> bool {
        self.raft.metrics().borrow_watched().membership_config.get_joint_config().len() > 1
    }

    #[cfg(test)]
    pub(crate) fn peers_identity(&self) -> &crate::peer::Identity {
        self.peers.identity()
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

    pub(crate) fn reply(&self) -> ReplyHeader {
        self.peers.reply(Some(&self.state))
    }

    pub(crate) fn votes_quietly(&self) -> bool {
        self.clock.monotonic() < self.quiet_until
    }

    pub(crate) fn heard_append(&self, vote: Option<&peer::Vote>, header: Option<&Header>, committed: Option<&peer::LogId>) {
        self.leader_clock.hear(vote, header, committed);
    }

    /// Compares the running hash of applied state with a peer's. Replicas that differ have applied different things: this one
    /// stops rather than answer wrongly.
    pub(crate) fn check_hash(&self, header: Option<&Header>) -> Result<(), tonic::Status> {
        let Some(header) = header.filter(|header| header.hash_index != 0) else { return Ok(()) };
        match self.state.chain_hash_at(header.hash_index) {
            Some(mine) if mine != header.hash => {
                let message = format!(
                    "the state of this replica of shard {} differs from node {}'s at log index {}: stop it, remove its data, let it join again",
                    self.shard, header.from, header.hash_index
                );
                tracing::error!("{message}");
                self.diverged.send_replace(Some(message.clone()));
                Err(tonic::Status::data_loss(message))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn watch_diverged(&self) -> watch::Receiver<Option<String>> {
        self.diverged.subscribe()
    }

    /// Resolves when this replica can go on no more, and says why.
    pub(crate) async fn died(&self) -> String {
        let mut metrics = self.raft.metrics();
        loop {
            if let Err(fatal) = &metrics.borrow_watched().running_state {
                return fatal.to_string();
            }
            if metrics.changed().await.is_err() {
                return "its task ended".into();
            }
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
                .filter_map(|voter| self.peers.view(self.shard, voter).map(|view| (view.heard_at, view.applied_index, voter)))
                .max_by_key(|&(heard_at, index, _)| (index, heard_at))
                .map(|(_, _, voter)| voter)
        };
        let to = to.or_else(furthest)?;
        self.raft.trigger().transfer_leader(to).await.ok()?;
        let mut leader = self.watch_leader();
        let taken = leader.wait_for(|leader| leader.is_some_and(|leader| !leader.is_self));
        tokio::time::timeout(Duration::from_secs(2), taken).await.ok()?.ok().and_then(|leader| leader.map(|leader| leader.id))
    }

    pub(crate) async fn close(&self) -> io::Result<()> {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
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

impl Round for LeaderRound {
    async fn run(&self) -> Result<u64, Unproven> {
        if self.raft.is_leader() {
            return confirm_leadership(&self.raft).await;
        }
        let heard = self.leader_clock.heard().ok_or(Unproven::NoLeader)?;
        let member = self.peers.member(heard.leader).ok_or(Unproven::NoLeader)?;
        let mut request = Request::new(ReadIndexRequest { header: Some(self.peers.header(heard.leader, self.shard, Some(&self.state))) });
        request.set_timeout(ROUND_TIMEOUT);
        let mut client = self.peers.replica_client(&member.peer_address, Purpose::Control);
        let asked = tokio::time::timeout(ROUND_TIMEOUT, client.read_index(request)).await;
        let response = asked.map_err(|_| Unproven::NoLeader)?.map_err(|_| Unproven::NoLeader)?.into_inner();
        match response.read_log_id {
            Some(log_id) if response.confirmed => Ok(log_id.index),
            _ => Err(Unproven::NoQuorum),
        }
    }
}

async fn confirm_leadership(raft: &RaftHandle) -> Result<u64, Unproven> {
    // Age zero: only acknowledgements of heartbeats sent after this call count. No clock is trusted.
    let option = LinearizerOption::new(Some(Duration::ZERO), true).with_wait_timeout(ROUND_TIMEOUT);
    let proven = tokio::time::timeout(ROUND_TIMEOUT, raft.get_read_linearizer(option)).await;
    match proven {
        Ok(Ok(linearizer)) => Ok(linearizer.read_log_id().index()),
        _ => Err(Unproven::NoQuorum),
    }
}

/// The request did not leave this node: there was no connection to send it on.
fn never_connected(status: &tonic::Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        source = error.source();
    }
    false
}

// ---- duties: tasks that a replica runs for as long as it is open ----

impl Replica {
    fn start_duties(self: &Arc<Self>) {
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
        let span = tracing::info_span!(parent: None, "duty", name, shard = self.shard);
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
        let mut every = tokio::time::interval(WATCH_EVERY);
        let mut campaigning = false;
        loop {
            every.tick().await;
            if !campaigning && !self.votes_quietly() {
                self.raft.runtime_config().elect(true);
                campaigning = true;
            }
            let leader = self.leader();
            if leader.is_some_and(|leader| leader.is_self) {
                let me = self.peers.identity().node_id;
                self.leader_clock.lead(self.voters().into_iter().filter(|&voter| voter != me).collect());
            }
            let changed = self.leader.send_if_modified(|known| {
                let other = known.map(|leader| (leader.id, leader.term)) != leader.map(|leader| (leader.id, leader.term));
                *known = leader;
                other
            });
            if changed {
                match leader {
                    Some(leader) => {
                        tracing::info!(shard = self.shard, leader = leader.id, term = leader.term, "a leader");
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
        let term = leader.filter(|leader| leader.is_self).map(|leader| leader.term);
        if *self.leads.borrow() == term {
            return;
        }
        if term.is_some() {
            let Ok(index) = self.confirm_leadership().await else { return };
            if self.wait_for_index(index, ROUND_TIMEOUT).await.is_err() {
                return;
            }
        }
        self.leads.send_replace(term);
    }

    async fn watch_catching_up(&self) {
        if let Some(Ok(index)) = self.read_rounds.join().await
            && self.wait_for_index(index, ROUND_TIMEOUT).await.is_ok()
        {
            tracing::info!(shard = self.shard, "this replica has caught up");
            self.must_catch_up.store(false, Ordering::Relaxed);
        }
    }

    /// Keeps log time going, so that replicas agree on what has expired though nobody writes.
    async fn tick(self: Arc<Self>) {
        let mut every = tokio::time::interval(TICK_EVERY);
        let mut last_index = 0;
        loop {
            every.tick().await;
            let index = self.applied().index;
            let idle = index == last_index;
            last_index = index;
            if idle && self.leads().is_some() {
                let tick = Command { request_id: None, caller: String::new(), op: Some(Op::Tick(Tick {})) };
                let _ = self.propose_here(tick, TICK_EVERY).await;
                last_index = self.applied().index;
            }
        }
    }

    /// The leader's broom: proposes the removal of what is past its last instant.
    async fn sweep(self: Arc<Self>) {
        let mut every = tokio::time::interval(SWEEP_EVERY);
        let mut rounds = 0u32;
        let mut from = 0;
        loop {
            every.tick().await;
            if self.leads().is_none() {
                from = 0;
                continue;
            }
            rounds = rounds.wrapping_add(1);
            if rounds.is_multiple_of(SWEEP_ALL_EVERY) {
                from = 0;
            }
            // On without a pause while there is more, so that what expires cannot outrun the broom.
            for _ in 0..SWEEP_BATCHES {
                match self.sweep_once(from).await {
                    Ok(swept) => {
                        from = swept.next;
                        if !swept.more {
                            break;
                        }
                    }
                    Err(error) => {
                        tracing::warn!(%error, shard = self.shard, "sweeping failed");
                        break;
                    }
                }
            }
        }
    }

    /// One batch from `from` on.
    async fn sweep_once(self: &Arc<Self>, from: Millis) -> io::Result<Swept> {
        let now = self.applied().log_time;
        let this = self.clone();
        let (keys, tombstones, swept) = crate::task::blocking(move || this.expired(from, now)).await.map_err(io::Error::other)??;
        if keys.is_empty() && tombstones.is_empty() {
            return Ok(swept);
        }
        let op = Op::Sweep(peer::Sweep { keys, tombstones });
        let command = Command { request_id: None, caller: String::new(), op: Some(op) };
        self.propose_here(command, ROUND_TIMEOUT).await.map_err(io::Error::other)?;
        Ok(swept)
    }

    fn expired(&self, from: Millis, now: Millis) -> io::Result<(Vec<SweepKey>, Vec<SweepKey>, Swept)> {
        let expired = self.state.due(DueKind::Expire, from, now, SWEEP_BATCH)?;
        let full = expired.len() == SWEEP_BATCH;
        let next = if full { expired.last().map_or(from, |&(at, _)| at) } else { now };
        let mut keys = Vec::new();
        for (_, key) in expired {
            let entry = match self.state.peek(&key) {
                Lookup::Found(entry) => Some(entry),
                Lookup::Absent => None,
                Lookup::Unknown(_) => crate::state::read_entry(self.state.generation().store.as_ref(), &key)?.map(Arc::new),
            };
            if let Some(entry) = entry {
                keys.push(SweepKey { key: key.into(), changed: entry.record.changed });
            }
        }
        let mut tombstones = Vec::new();
        let settled = self.state.due(DueKind::Tombstone, 0, now, SWEEP_BATCH)?;
        let more = full || settled.len() == SWEEP_BATCH;
        for (_, key) in settled {
            if let Some(tombstone) = self.state.tombstone(&key)? {
                tombstones.push(SweepKey { key: key.into(), changed: tombstone.revision });
            }
        }
        Ok((keys, tombstones, Swept { next, more }))
    }

    /// Keeps the log bounded: flushes the state, then lets go of what is before what is to be kept.
    async fn purge(self: Arc<Self>) {
        let mut every = tokio::time::interval(PURGE_EVERY);
        loop {
            every.tick().await;
            let kept = self.log.keep_from(self.log_kept).min(self.applied().index);
            let keep_from = self.pins.lowest().map_or(kept, |needed| kept.min(needed));
            // In steps of an eighth: each costs a flush.
            if keep_from < self.log.first_index() + (self.log_kept.entries / 8).max(1) {
                continue;
            }
            // Followers that need older entries get a snapshot: their append streams end here.
            self.keep_from.store(keep_from, Ordering::Relaxed);
            if let Err(error) = self.flush_and_purge(keep_from).await {
                tracing::warn!(%error, shard = self.shard, "purging the log failed");
            }
        }
    }

    /// Lets go of all of the log that the state has on disk.
    pub(crate) async fn purge_for_space(&self) {
        let keep_from = self.applied().index;
        self.keep_from.store(keep_from, Ordering::Relaxed);
        if let Err(error) = self.flush_and_purge(keep_from).await {
            tracing::warn!(%error, shard = self.shard, "purging the log failed");
        }
    }

    async fn flush_and_purge(&self, keep_from: u64) -> io::Result<()> {
        const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);
        self.raft.trigger().snapshot().await.map_err(io::Error::other)?;
        let upto = keep_from.saturating_sub(1);
        let flushed = self.raft.wait(Some(FLUSH_TIMEOUT));
        let far_enough = |metrics: &openraft::RaftMetrics<_>| metrics.snapshot.as_ref().is_some_and(|snapshot| snapshot.index >= upto);
        flushed.metrics(far_enough, "the state is flushed").await.map_err(io::Error::other)?;
        self.raft.trigger().purge_log(upto).await.map_err(io::Error::other)
    }
}
