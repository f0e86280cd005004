//! One answer of `/metrics`: what was counted, and how the replicas are at this moment. Gauges live
//! for one scrape, so that a replica, a peer or a leader that is gone leaves nothing behind.

use std::{fmt, sync::atomic::AtomicU64};

use holdfast_raft::{Peers, Replica, Replicas};
use prometheus_client::{
    encoding::{
        EncodeLabelSet,
        text::{encode_eof, encode_registry},
    },
    metrics::{counter::Counter, family::Family, gauge::Gauge, info::Info},
    registry::{Registry, Unit},
};

use super::{Metrics, ShardLabel, UpstreamLabel};
use crate::{methods::KINDS, operation::Load, refresh::Refresher, resources, serve::Listeners};

/// What a scrape shows beside what was counted.
#[derive(Clone, Copy)]
pub(crate) struct Seen<'a> {
    pub(crate) replicas: &'a Replicas,
    pub(crate) listeners: &'a Listeners,
    pub(crate) load: &'a Load,
    pub(crate) refresher: &'a Refresher,
    /// A listener beyond loopback is open without TLS and auth.
    pub(crate) is_insecure: bool,
    pub(crate) is_ready: bool,
}

type ByShard<N, A> = Family<ShardLabel, Gauge<N, A>>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    peer: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ListenerLabel {
    listener: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

/// The gauges of the replicas.
#[derive(Default)]
struct Gauges {
    applied_revision: ByShard<i64, std::sync::atomic::AtomicI64>,
    applied_index: ByShard<i64, std::sync::atomic::AtomicI64>,
    lag: ByShard<f64, AtomicU64>,
    is_leader: ByShard<i64, std::sync::atomic::AtomicI64>,
    has_leader: ByShard<i64, std::sync::atomic::AtomicI64>,
    term: ByShard<i64, std::sync::atomic::AtomicI64>,
    clock_skewed: ByShard<i64, std::sync::atomic::AtomicI64>,
    log_time_ahead: ByShard<f64, AtomicU64>,
    proposals_waiting: ByShard<i64, std::sync::atomic::AtomicI64>,
    refresh_overdue: ByShard<i64, std::sync::atomic::AtomicI64>,
    refresh_behind: ByShard<f64, AtomicU64>,
    feature_level: ByShard<i64, std::sync::atomic::AtomicI64>,
    is_diverged: ByShard<i64, std::sync::atomic::AtomicI64>,
    is_split: ByShard<i64, std::sync::atomic::AtomicI64>,
    memory: ByShard<i64, std::sync::atomic::AtomicI64>,
    memory_entries: ByShard<i64, std::sync::atomic::AtomicI64>,
    memory_evicted: Family<ShardLabel, Counter>,
    state_disk: ByShard<i64, std::sync::atomic::AtomicI64>,
}

impl Metrics {
    /// Everything, in the text format. Reads sizes from the disk: not on a thread that anybody
    /// waits for.
    pub(crate) fn scrape(&self, seen: Seen<'_>) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("holdfast");
        register_node(&mut registry, seen);
        register_connections(&mut registry, seen.listeners);
        register_load(&mut registry, seen.load);
        register_refresh(&mut registry, seen.refresher);
        if let Some(peers) = seen.replicas.peers() {
            register_peers(
                &mut registry,
                &peers,
                seen.replicas.options().disk_bytes_max,
            );
        }
        let gauges = Gauges::default();
        seen.replicas
            .replicas()
            .for_each(|replica| gauges.read(replica, seen.refresher));
        gauges.register(&mut registry);

        let mut text = String::new();
        encode_registry(&mut text, &self.registry)?;
        encode_registry(&mut text, &registry)?;
        encode_eof(&mut text)?;
        Ok(text)
    }
}

fn register_node(registry: &mut Registry, seen: Seen<'_>) {
    let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("build", "The software that runs", build);
    let insecure = gauge(i64::from(seen.is_insecure));
    registry.register(
        "insecure",
        "1 if a listener beyond loopback is open without TLS and auth",
        insecure,
    );
    registry.register(
        "ready",
        "1 if the node can answer reads",
        gauge(i64::from(seen.is_ready)),
    );
}

fn register_connections(registry: &mut Registry, listeners: &Listeners) {
    let open = Family::<ListenerLabel, Gauge>::default();
    let refused = Family::<ListenerLabel, Counter>::default();
    for connections in [&listeners.client, &listeners.peer, &listeners.admin] {
        let label = ListenerLabel {
            listener: connections.listener(),
        };
        open.get_or_create(&label)
            .set(i64::try_from(connections.count()).unwrap_or(i64::MAX));
        refused.get_or_create(&label).inc_by(connections.refused());
    }
    registry.register("connections", "Open connections by listener", open);
    registry.register(
        "connections_refused",
        "Connections that a listener had no room for",
        refused,
    );
    if let Some(descriptors) = resources::descriptors_open() {
        let descriptors = gauge(signed(descriptors));
        registry.register(
            "descriptors",
            "Descriptors this process has open",
            descriptors,
        );
    }
    registry.register(
        "descriptors_limit",
        "Descriptors this process may have open",
        gauge(signed(resources::descriptors_max())),
    );
}

fn register_load(registry: &mut Registry, load: &Load) {
    let in_flight = Family::<KindLabel, Gauge>::default();
    let refused = Family::<KindLabel, Counter>::default();
    let rooms = KINDS.map(|kind| (kind.name(), load.room(kind)));
    for (kind, room) in rooms.into_iter().chain([("waiting", load.waiting())]) {
        let taken = i64::try_from(room.taken()).unwrap_or(i64::MAX);
        in_flight.get_or_create(&KindLabel { kind }).set(taken);
        refused
            .get_or_create(&KindLabel { kind })
            .inc_by(room.refused());
    }
    for (kind, count) in [
        ("request_bytes", load.request_bytes().refused()),
        ("answer_bytes", load.answers_refused()),
    ] {
        refused.get_or_create(&KindLabel { kind }).inc_by(count);
    }
    registry.register(
        "requests_in_flight",
        "Places taken, by kind; `waiting`: requests that wait beyond memory, which take none",
        in_flight,
    );
    registry.register(
        "requests_shed",
        "Requests refused because too many, or too many bytes of them, were in flight",
        refused,
    );
    let bytes = |bytes| gauge(i64::try_from(bytes).unwrap_or(i64::MAX));
    registry.register_with_unit(
        "request_in_flight",
        "Bytes of requests in flight",
        Unit::Bytes,
        bytes(load.request_bytes().taken()),
    );
    registry.register_with_unit(
        "answer_in_flight",
        "Bytes of answers that are not taken yet",
        Unit::Bytes,
        bytes(load.answer_bytes()),
    );
}

fn register_refresh(registry: &mut Registry, refresher: &Refresher) {
    let running = Family::<UpstreamLabel, Gauge>::default();
    let waiting = Family::<UpstreamLabel, Gauge>::default();
    let readers = Family::<UpstreamLabel, Gauge>::default();
    for backlog in refresher.upstream_backlogs() {
        let label = UpstreamLabel::of(&backlog.upstream);
        let set = |gauges: &Family<UpstreamLabel, Gauge>, count: usize| {
            gauges.get_or_create(&label).set(signed(count as u64));
        };
        set(&running, backlog.flights_running);
        set(&waiting, backlog.flights_waiting);
        set(&readers, backlog.readers_waiting);
    }
    registry.register("flights_running", "Fetches under way", running);
    registry.register(
        "flights_waiting",
        "Fetches that wait for a slot of their upstream",
        waiting,
    );
    registry.register(
        "flight_readers",
        "Requests that wait for a fetch, here or at the leader",
        readers,
    );
    let dropped = Counter::<u64>::default();
    dropped.inc_by(refresher.marks_dropped());
    registry.register(
        "reads_unmarked",
        "Reads from which no refresh follows: there was no room to remember them",
        dropped,
    );
    let policies = Info::new([("hash", refresher.policy_hash().to_string())]);
    registry.register(
        "policies",
        "The policies this node judges by: nodes with another hash judge otherwise",
        policies,
    );
}

fn register_peers(registry: &mut Registry, peers: &Peers, disk_bytes_max: u64) {
    let permille = u64::from(peers.disk_used_permille());
    let used = gauge(signed(peers.disk_used_bytes()));
    registry.register_with_unit(
        "disk_used",
        "Disk that state and log take",
        Unit::Bytes,
        used,
    );
    registry.register(
        "disk_used_permille",
        "The same in thousandths of storage.max_bytes",
        gauge(signed(permille)),
    );
    registry.register_with_unit(
        "disk_limit",
        "storage.max_bytes",
        Unit::Bytes,
        gauge(signed(disk_bytes_max)),
    );
    let offsets = Family::<PeerLabel, Gauge<f64, AtomicU64>>::default();
    for member in peers.members() {
        if let Some(view) = peers.view(0, member.id) {
            // Exact enough: a millisecond in 285,000 years.
            offsets
                .get_or_create(&PeerLabel { peer: member.name })
                .set(peers.clock_offset_ms(&view) as f64 / 1000.0);
        }
    }
    registry.register_with_unit(
        "clock_offset",
        "A peer's wall clock minus this node's",
        Unit::Seconds,
        offsets,
    );
}

impl Gauges {
    fn read(&self, replica: &Replica, refresher: &Refresher) {
        let shard = ShardLabel {
            shard: replica.shard(),
        };
        let applied = replica.applied();
        self.applied_revision
            .get_or_create(&shard)
            .set(signed(applied.revision));
        self.applied_index
            .get_or_create(&shard)
            .set(signed(applied.index));
        // Unknown is no number: a replica that hears no leader has no lag to show.
        if let Some(lag) = replica.lag() {
            self.lag.get_or_create(&shard).set(lag.as_secs_f64());
        }
        let leader = replica.leader();
        self.is_leader
            .get_or_create(&shard)
            .set(i64::from(leader.is_some_and(|leader| leader.is_self)));
        self.has_leader
            .get_or_create(&shard)
            .set(i64::from(leader.is_some()));
        self.term.get_or_create(&shard).set(signed(replica.term()));
        self.clock_skewed
            .get_or_create(&shard)
            .set(i64::from(replica.clock_is_skewed()));
        self.log_time_ahead
            .get_or_create(&shard)
            .set(replica.log_time_ahead_ms() as f64 / 1000.0);
        self.proposals_waiting
            .get_or_create(&shard)
            .set(signed(replica.proposals_waiting() as u64));
        // Of what this node leads.
        if let Some(backlog) = refresher.due_backlog(replica.shard()) {
            self.refresh_overdue
                .get_or_create(&shard)
                .set(signed(backlog.overdue as u64));
            self.refresh_behind
                .get_or_create(&shard)
                .set(backlog.behind_ms as f64 / 1000.0);
        }
        self.feature_level
            .get_or_create(&shard)
            .set(replica.feature_level().into());
        self.is_diverged
            .get_or_create(&shard)
            .set(i64::from(replica.is_diverged()));
        self.is_split
            .get_or_create(&shard)
            .set(i64::from(replica.states_are_split()));
        let memory = replica.memory_use();
        self.memory.get_or_create(&shard).set(signed(memory.bytes));
        self.memory_entries
            .get_or_create(&shard)
            .set(signed(memory.entries));
        self.memory_evicted
            .get_or_create(&shard)
            .inc_by(memory.evicted);
        match replica.disk_bytes() {
            Ok(bytes) => _ = self.state_disk.get_or_create(&shard).set(signed(bytes)),
            Err(error) => {
                tracing::warn!(%error, shard = replica.shard(), "measuring the state on disk failed")
            }
        }
    }

    fn register(self, registry: &mut Registry) {
        registry.register(
            "applied_revision",
            "Revision that this replica has applied",
            self.applied_revision,
        );
        registry.register(
            "applied_index",
            "Index of the log entry that this replica has applied",
            self.applied_index,
        );
        registry.register_with_unit(
            "replica_lag",
            "How far behind the leader this replica may be",
            Unit::Seconds,
            self.lag,
        );
        registry.register(
            "is_leader",
            "1 if this node leads the shard",
            self.is_leader,
        );
        registry.register(
            "has_leader",
            "1 if there is a leader for this node",
            self.has_leader,
        );
        registry.register("term", "Term of the shard's log", self.term);
        registry.register(
            "clock_is_skewed",
            "1 if this leader's clock is too far from the voters'",
            self.clock_skewed,
        );
        registry.register_with_unit(
            "log_time_ahead",
            "How far log time is ahead of the voters' clocks",
            Unit::Seconds,
            self.log_time_ahead,
        );
        registry.register(
            "proposals_waiting",
            "Writes that wait to be put into the log",
            self.proposals_waiting,
        );
        registry.register(
            "refresh_overdue",
            "Keys that were overdue when this node began to lead and wait for their turn",
            self.refresh_overdue,
        );
        registry.register_with_unit(
            "refresh_behind",
            "How far the look at what comes due is behind",
            Unit::Seconds,
            self.refresh_behind,
        );
        registry.register(
            "feature_level",
            "What all members of the shard understand: nothing newer is written",
            self.feature_level,
        );
        registry.register(
            "state_is_diverged",
            "1 if this replica's state is not the majority's and waits for the leader's",
            self.is_diverged,
        );
        registry.register(
            "states_are_split",
            "1 if this leader finds no majority with the same state",
            self.is_split,
        );
        registry.register_with_unit("memory", "Entries in memory", Unit::Bytes, self.memory);
        registry.register("memory_entries", "Entries in memory", self.memory_entries);
        registry.register(
            "memory_evicted",
            "Entries evicted from memory, still on disk",
            self.memory_evicted,
        );
        registry.register_with_unit(
            "state_disk",
            "The state of the shard on disk",
            Unit::Bytes,
            self.state_disk,
        );
    }
}

fn gauge(value: i64) -> Gauge {
    let gauge = Gauge::default();
    gauge.set(value);
    gauge
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
