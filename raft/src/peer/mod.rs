//! Talking to peers: who this node is to them, what it knows of them, and the channels to them.
//! Both ends of the protocol are in this folder, side by side.
//!
//! Every request carries who sends it, to whom, in which cluster, and what time it is there; every
//! answer carries the time and how the answering replica is. What does not fit is refused on
//! arrival and said on both sides.

mod acknowledged;
mod call;
mod channel;
pub(crate) mod client;
pub(crate) mod membership_server;
mod roster;
mod round_trips;
pub(crate) mod server;
pub(crate) mod snapshot;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{
    ShardId,
    limits::PEER_MESSAGE_BYTES_MAX,
    peer::{Header, Member, ReplyHeader, StateHash, replica_service_client::ReplicaServiceClient},
    timeline::Millis,
};
use parking_lot::Mutex;
use tonic::{Status, metadata::AsciiMetadataValue, transport::Channel};

pub use self::call::CallError;
use self::channel::Channels;
pub(crate) use self::{call::ask_stranger, channel::Purpose};

pub(crate) use self::{acknowledged::Acknowledged, roster::Roster};
use self::{roster::Stranger, round_trips::RoundTrips};
use crate::{
    clock::Clock,
    events::Events,
    state::{State, record::FEATURE_LEVEL},
    store::space::Fill,
};

/// The version of the peer protocol.
pub(crate) const PROTOCOL: u32 = 1;
/// The same refusal is said again no sooner: whoever is refused tries on for ever.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Refusals remembered as said.
const SAID_MAX: usize = 64;
/// How a refusal on arrival begins, so that the other side knows it.
const REFUSED: &str = "peer refused: ";
/// In the metadata of a refusal that a hello may end.
const STRANGER: &str = "holdfast-stranger";
const WHY_CLOSED: &str = "this node talks to no peer: its disk is stalled, or it was retired";

/// Who this node is, once it belongs to a cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub cluster_id: String,
    pub epoch: u64,
    pub node_id: u64,
    pub incarnation: u64,
    /// This process of it.
    pub session: u64,
}

/// What a node last heard of a peer, from its answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeerView {
    /// Monotonic.
    pub heard_at: Duration,
    /// The peer's wall clock minus our monotonic one, to about a round trip: a step of our own wall
    /// clock changes nothing here.
    pub wall_ahead_of_monotonic_ms: i64,
    /// Its instant of that answer, for it to count its lag from.
    pub mark: Option<u64>,
    /// What its slower syncs take.
    pub sync_time: Duration,
    pub disk_used_permille: u32,
    pub file_system_is_full: bool,
    /// It lost log that it had acknowledged, and does not vote until it has it again.
    pub log_is_short: bool,
    pub feature_level: u32,
    pub applied_index: u64,
    pub revision: u64,
    /// At the newest index that hashes are compared at.
    pub state_hash: Option<StateHash>,
    /// Its state is not the majority's.
    pub diverged: bool,
}

/// One per node.
pub struct Peers {
    clock: Clock,
    identity: Identity,
    events: Arc<dyn Events>,
    channels: Channels,
    views: Mutex<HashMap<(ShardId, u64), PeerView>>,
    roster: Roster,
    acknowledged: Acknowledged,
    /// Without what the peer did in between.
    round_trips: RoundTrips,
    sync_ms: AtomicU32,
    /// While set, this node neither sends to peers nor takes anything from them.
    closed: AtomicBool,
    /// The same for good.
    retired: AtomicBool,
    disk_used_bytes: AtomicU64,
    disk_used_permille: AtomicU32,
    file_system_is_full: AtomicBool,
    /// Replicas whose log is short.
    short_logs: AtomicU32,
    /// When each refusal was last said, as monotonic time.
    said: Mutex<HashMap<String, Duration>>,
}

impl Peers {
    /// To be called on the threads that Raft runs on.
    pub(crate) fn new(clock: Clock, identity: Identity, events: Arc<dyn Events>) -> Self {
        Self {
            clock,
            identity,
            events,
            channels: Channels::new(),
            views: Mutex::default(),
            roster: Roster::default(),
            acknowledged: Acknowledged::default(),
            round_trips: RoundTrips::default(),
            sync_ms: AtomicU32::new(0),
            closed: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            disk_used_bytes: AtomicU64::new(0),
            disk_used_permille: AtomicU32::new(0),
            file_system_is_full: AtomicBool::new(false),
            short_logs: AtomicU32::new(0),
            said: Mutex::default(),
        }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    // ---- what is said ----

    pub fn header(&self, to: u64, shard: ShardId) -> Header {
        Header {
            cluster_id: self.identity.cluster_id.clone(),
            epoch: self.identity.epoch,
            from: self.identity.node_id,
            from_incarnation: self.identity.incarnation,
            from_session: self.identity.session,
            acknowledged: Vec::new(),
            to,
            shard,
            protocol: PROTOCOL,
            now_ms: self.clock.wall_ms(),
            agreed: None,
            proof: None,
        }
    }

    pub fn reply(&self, state: Option<&State>) -> ReplyHeader {
        let applied = state.map(State::applied).unwrap_or_default();
        ReplyHeader {
            now_ms: self.clock.wall_ms(),
            disk_used_permille: self.disk_used_permille.load(Ordering::Relaxed),
            file_system_full: self.file_system_is_full(),
            log_is_short: self.short_logs.load(Ordering::Relaxed) > 0,
            feature_level: FEATURE_LEVEL,
            applied_index: applied.index,
            revision: applied.revision,
            sync_ms: self.sync_ms.load(Ordering::Relaxed),
            held_us: None,
            mark: None,
            state_hash: state.and_then(State::hash),
            diverged: false,
        }
    }

    /// Whether a request is meant for this node, and its sender is who it says.
    pub fn check<'h>(&self, header: Option<&'h Header>) -> Result<&'h Header, Status> {
        if self.is_closed() {
            return Err(Status::unavailable(WHY_CLOSED));
        }
        let header =
            header.ok_or_else(|| Status::invalid_argument("the peer header is missing"))?;
        let mine = &self.identity;
        let refusal = if header.protocol != PROTOCOL {
            format!(
                "it speaks peer protocol {}, this node {PROTOCOL}",
                header.protocol
            )
        } else if header.cluster_id != mine.cluster_id {
            format!(
                "it belongs to cluster {}, this node to {}",
                header.cluster_id, mine.cluster_id
            )
        } else if header.epoch != mine.epoch {
            format!(
                "it is in epoch {}, this node in {}",
                header.epoch, mine.epoch
            )
        } else if header.to != mine.node_id {
            format!(
                "it looks for node {}, this is node {}",
                header.to, mine.node_id
            )
        } else {
            return self.check_sender(header);
        };
        if self.is_news(&refusal) {
            tracing::warn!(from = header.from, %refusal, "a peer was refused");
        }
        Err(Status::failed_precondition(format!("{REFUSED}{refusal}")))
    }

    fn check_sender<'h>(&self, header: &'h Header) -> Result<&'h Header, Status> {
        let mine = &self.identity;
        let is_self = header.from == mine.node_id
            && header.from_incarnation == mine.incarnation
            && header.from_session == mine.session;
        match is_self {
            true => Ok(header),
            false => self
                .roster
                .check(header)
                .map(|()| header)
                .map_err(|stranger| self.refused(header, stranger)),
        }
    }

    /// As `check`, for what Raft says: its sender has also judged this node, and would know if its
    /// log had lost what it acknowledged.
    pub(crate) fn check_raft<'h>(&self, header: Option<&'h Header>) -> Result<&'h Header, Status> {
        let header = self.check(header)?;
        if header.from != self.identity.node_id
            && let Err(stranger) = self.roster.check_judge(header)
        {
            self.roster.forget_judge(header.from);
            return Err(self.refused(header, stranger));
        }
        Ok(header)
    }

    fn refused(&self, header: &Header, stranger: Stranger) -> Status {
        let refusal = format!("node {} {stranger}", header.from);
        if stranger.is_worth_a_word() && self.is_news(&refusal) {
            tracing::warn!(from = header.from, %refusal, "a peer was refused");
        }
        let mut status = Status::failed_precondition(format!("{REFUSED}{refusal}"));
        status
            .metadata_mut()
            .insert(STRANGER, AsciiMetadataValue::from_static("hello"));
        status
    }

    /// Says that a peer refused this node: the other half of what `check` said there. If the peer
    /// does not know this process, it is said hello to, and tells where this node stands.
    pub(crate) fn note_refusal(&self, by: u64, address: &str, status: &Status) {
        if status.metadata().contains_key(STRANGER) {
            self.roster.forget_judge(by);
            return;
        }
        if let Some(refusal) = status.message().strip_prefix(REFUSED)
            && self.is_news(refusal)
        {
            tracing::warn!(by, address, %refusal, "a peer refused this node");
        }
    }

    /// Whether a refusal was not said a moment ago.
    pub(crate) fn is_news(&self, refusal: &str) -> bool {
        let now = self.clock.monotonic();
        let mut said = self.said.lock();
        said.retain(|_, at| now.saturating_sub(*at) < SAY_EVERY);
        let is_news = !said.contains_key(refusal) && said.len() < SAID_MAX;
        if is_news {
            said.insert(refusal.to_owned(), now);
        }
        is_news
    }

    // ---- what is known ----

    /// Takes in an answer from a peer's replica.
    pub fn heard(&self, shard: ShardId, from: u64, reply: Option<&ReplyHeader>) {
        let Some(reply) = reply else { return };
        let heard_at = self.clock.monotonic();
        let view = PeerView {
            heard_at,
            wall_ahead_of_monotonic_ms: ahead_ms(reply.now_ms, heard_at),
            mark: reply.mark,
            sync_time: Duration::from_millis(reply.sync_ms.into()),
            disk_used_permille: reply.disk_used_permille,
            file_system_is_full: reply.file_system_full,
            log_is_short: reply.log_is_short,
            feature_level: reply.feature_level,
            applied_index: reply.applied_index,
            revision: reply.revision,
            state_hash: reply.state_hash,
            diverged: reply.diverged,
        };
        self.views.lock().insert((shard, from), view);
    }

    /// A request was answered after `took`, of which the peer held it for a while.
    pub(crate) fn measured(&self, peer: u64, took: Duration, reply: Option<&ReplyHeader>) {
        let Some(held_us) = reply.and_then(|reply| reply.held_us) else {
            return;
        };
        let round_trip = took.saturating_sub(Duration::from_micros(held_us.into()));
        self.round_trips.add(peer, round_trip);
    }

    /// How long a message takes to a peer and back; nothing if it was never measured.
    pub(crate) fn round_trip(&self, peer: u64) -> Duration {
        self.round_trips.to(peer)
    }

    pub fn view(&self, shard: ShardId, peer: u64) -> Option<PeerView> {
        self.views.lock().get(&(shard, peer)).copied()
    }

    /// A peer's wall clock minus ours now.
    pub fn clock_offset_ms(&self, view: &PeerView) -> i64 {
        view.wall_ahead_of_monotonic_ms
            .saturating_sub(ahead_ms(self.clock.wall_ms(), self.clock.monotonic()))
    }

    pub(crate) fn roster(&self) -> &Roster {
        &self.roster
    }

    pub(crate) fn acknowledged(&self) -> &Acknowledged {
        &self.acknowledged
    }

    pub fn members(&self) -> Vec<Member> {
        self.roster.members()
    }

    /// With the addresses that it announced last.
    pub fn member(&self, id: u64) -> Option<Member> {
        self.roster.member(id)
    }

    // ---- the disk guard ----

    pub(crate) fn set_closed(&self, closed: bool) {
        self.closed.store(closed, Ordering::Relaxed);
    }

    /// Closed for good.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Closed until the disk takes writes again.
    pub(crate) fn is_stalled(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_stalled() || self.retired.load(Ordering::Relaxed)
    }

    /// A replica's log lost what it had acknowledged, or has it again.
    pub(crate) fn set_log_is_short(&self, is_short: bool) {
        match is_short {
            true => self.short_logs.fetch_add(1, Ordering::Relaxed),
            false => self.short_logs.fetch_sub(1, Ordering::Relaxed),
        };
    }

    /// What the slower syncs of this node's log take.
    pub(crate) fn sync_time(&self) -> Duration {
        Duration::from_millis(self.sync_ms.load(Ordering::Relaxed).into())
    }

    pub(crate) fn set_sync_time(&self, sync_time: Duration) {
        let ms = u32::try_from(sync_time.as_millis()).unwrap_or(u32::MAX);
        self.sync_ms.store(ms, Ordering::Relaxed);
    }

    pub(crate) fn set_disk(&self, fill: Fill) {
        self.disk_used_bytes
            .store(fill.used_bytes, Ordering::Relaxed);
        self.disk_used_permille
            .store(fill.used_permille, Ordering::Relaxed);
        self.file_system_is_full
            .store(fill.file_system_is_full, Ordering::Relaxed);
    }

    /// What state and log files of this node take.
    pub fn disk_used_bytes(&self) -> u64 {
        self.disk_used_bytes.load(Ordering::Relaxed)
    }

    /// This node's file system has nothing left for values.
    pub fn file_system_is_full(&self) -> bool {
        self.file_system_is_full.load(Ordering::Relaxed)
    }

    pub fn disk_used_permille(&self) -> u32 {
        self.disk_used_permille.load(Ordering::Relaxed)
    }

    // ---- channels ----

    pub(crate) fn replica_client(
        &self,
        address: &str,
        purpose: Purpose,
    ) -> ReplicaServiceClient<Channel> {
        ReplicaServiceClient::new(self.channels.to(address, purpose))
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
    }
}

fn ahead_ms(wall: Millis, monotonic: Duration) -> i64 {
    i64::try_from(i128::from(wall) - monotonic.as_millis().cast_signed()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_that_is_not_meant_for_this_node_is_refused() {
        let identity = Identity {
            cluster_id: "c".into(),
            epoch: 1,
            node_id: 2,
            incarnation: 22,
            session: 2,
        };
        let peers = Peers::new(Clock::system(), identity, Arc::new(()));
        let member = Member {
            id: 1,
            incarnation: 11,
            ..Default::default()
        };
        peers.roster().begin_with([member.clone()]);
        peers.roster().meet(&member, 1);
        let good = Header {
            cluster_id: "c".into(),
            epoch: 1,
            from: 1,
            from_incarnation: 11,
            from_session: 1,
            to: 2,
            protocol: PROTOCOL,
            ..Default::default()
        };
        assert!(peers.check(Some(&good)).is_ok());
        let unjudged = peers.check_raft(Some(&good)).map(|_| ()).unwrap_err();
        assert!(unjudged.message().contains("has not judged"), "{unjudged}");
        peers.roster().was_judged_by(1, 1);
        assert!(peers.check_raft(Some(&good)).is_ok());
        for (header, why) in [
            (
                Header {
                    cluster_id: "d".into(),
                    ..good.clone()
                },
                "it belongs to cluster d",
            ),
            (
                Header {
                    epoch: 2,
                    ..good.clone()
                },
                "it is in epoch 2",
            ),
            (
                Header {
                    to: 3,
                    ..good.clone()
                },
                "it looks for node 3",
            ),
            (
                Header {
                    from_incarnation: 12,
                    ..good.clone()
                },
                "node 1 uses a member's id with another incarnation",
            ),
            (
                Header {
                    from: 9,
                    ..good.clone()
                },
                "node 9 is in no roster",
            ),
            (
                Header {
                    from_session: 2,
                    ..good.clone()
                },
                "node 1 was not met",
            ),
            (
                Header {
                    protocol: PROTOCOL + 1,
                    ..good
                },
                "it speaks peer protocol",
            ),
        ] {
            let refused = peers.check(Some(&header)).map(|_| ()).unwrap_err();
            assert!(
                refused.message().starts_with(&format!("{REFUSED}{why}")),
                "{refused}"
            );
        }
    }
}
