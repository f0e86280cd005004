//! What a node counts, for `/metrics`: a method per event, named after what happened.
//!
//! Promises that every label has a bounded set of values, whatever clients send, and that counting
//! never blocks for longer than another thread counts. One per node, with its own registry: many
//! nodes share a test process. Must never know a key, a value or a credential (P8).

mod scrape;

use std::time::Duration;

use holdfast_proto::ShardId;
use holdfast_raft::Events;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::{Family, MetricConstructor},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use tonic::metadata::MetadataMap;

pub(crate) use self::scrape::Seen;
use crate::{
    error::Code,
    methods::{METHODS, Method},
};

/// What a scrape answers with.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Of a Get that is answered, as long as nothing makes the others.
const SERVED_STATES: [&str; 4] = ["FRESH", "STALE", "STALE_ON_ERROR", "MISS"];
/// What a read waits for beyond memory.
const WAITS: [&str; 5] = ["token", "read_index", "miss", "soft_timeout", "forwarded"];
/// What a flight's commit comes to.
const COMMITS: [&str; 6] = [
    "stored",
    "revalidated",
    "negative",
    "fenced",
    "failed",
    "unstored",
];

/// From a look-up in memory to the longest deadline.
const REQUEST_SECONDS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
    1.0, 2.5, 5.0,
];
/// From a write cache that lies to a disk that makes the node leave its peers.
const SYNC_SECONDS: [f64; 13] = [
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.512, 2.0,
];
/// From a neighbour to the longest fetch timeout.
const UPSTREAM_SECONDS: [f64; 13] = [
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0, 300.0,
];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    request_duration: Family<DurationLabels, Histogram, Buckets>,
    reads_waited: Family<WhyLabel, Counter>,
    flights_started: Family<UpstreamLabel, Counter>,
    flights_joined: Family<UpstreamLabel, Counter>,
    flights_refused: Family<UpstreamLabel, Counter>,
    upstream_calls: Family<CallLabels, Counter>,
    upstream_call_duration: Family<UpstreamLabel, Histogram, Buckets>,
    commits: Family<OutcomeLabel, Counter>,
    log_sync_duration: Histogram,
    tasks_panicked: Family<TaskLabel, Counter>,
    leader_changes: Family<ShardLabel, Counter>,
    snapshots_sent: Family<ShardLabel, Counter>,
    snapshot_bytes_sent: Family<ShardLabel, Counter>,
    snapshots_installed: Family<ShardLabel, Counter>,
    snapshot_bytes_installed: Family<ShardLabel, Counter>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    state: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DurationLabels {
    method: &'static str,
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WhyLabel {
    why: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct UpstreamLabel {
    upstream: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    upstream: String,
    code: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TaskLabel {
    task: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ShardLabel {
    shard: ShardId,
}

/// Makes the histograms of a family.
#[derive(Debug, Clone)]
struct Buckets(&'static [f64]);

impl Metrics {
    pub fn new() -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("holdfast"),
            requests: Family::default(),
            request_duration: Family::new_with_constructor(Buckets(&REQUEST_SECONDS)),
            reads_waited: Family::default(),
            flights_started: Family::default(),
            flights_joined: Family::default(),
            flights_refused: Family::default(),
            upstream_calls: Family::default(),
            upstream_call_duration: Family::new_with_constructor(Buckets(&UPSTREAM_SECONDS)),
            commits: Family::default(),
            log_sync_duration: Buckets(&SYNC_SECONDS).new_metric(),
            leader_changes: Family::default(),
            tasks_panicked: Family::default(),
            snapshots_sent: Family::default(),
            snapshot_bytes_sent: Family::default(),
            snapshots_installed: Family::default(),
            snapshot_bytes_installed: Family::default(),
        };
        metrics.register();
        metrics
    }

    /// What can be counted is there before it happens, at 0: the first of its kind is a rise too,
    /// and an alert sees it.
    pub(crate) fn begin<'a>(&self, shards: ShardId, upstreams: impl IntoIterator<Item = &'a str>) {
        for method in &METHODS {
            let method = method.name;
            let states: &[&'static str] = if method == "Get" {
                &SERVED_STATES
            } else {
                &[""]
            };
            for &state in states {
                self.requests
                    .get_or_create(&RequestLabels {
                        method,
                        state,
                        code: Code::Ok.name(),
                    })
                    .inc_by(0);
                let duration = DurationLabels { method, state };
                drop(self.request_duration.get_or_create(&duration));
            }
        }
        for why in WAITS {
            self.reads_waited.get_or_create(&WhyLabel { why }).inc_by(0);
        }
        for outcome in COMMITS {
            self.commits
                .get_or_create(&OutcomeLabel { outcome })
                .inc_by(0);
        }
        for upstream in upstreams {
            for flights in [
                &self.flights_started,
                &self.flights_joined,
                &self.flights_refused,
            ] {
                flights
                    .get_or_create(&UpstreamLabel::of(upstream))
                    .inc_by(0);
            }
            self.upstream_calls
                .get_or_create(&CallLabels {
                    upstream: upstream.into(),
                    code: "200".into(),
                })
                .inc_by(0);
            drop(
                self.upstream_call_duration
                    .get_or_create(&UpstreamLabel::of(upstream)),
            );
        }
        for shard in 0..shards {
            let snapshots = [
                &self.snapshots_sent,
                &self.snapshot_bytes_sent,
                &self.snapshots_installed,
                &self.snapshot_bytes_installed,
            ];
            for counter in snapshots.into_iter().chain([&self.leader_changes]) {
                counter.get_or_create(&ShardLabel { shard }).inc_by(0);
            }
        }
    }

    /// Once per operation, when it has ended. `state` is that of the answer: empty where an answer
    /// has none; an operation without an answer counts as `ERROR`.
    pub(crate) fn request(&self, method: &Method, state: &'static str, code: Code, took: Duration) {
        let (method, state) = match code {
            Code::Ok => (method.name, state),
            _ => (method.name, "ERROR"),
        };
        self.requests
            .get_or_create(&RequestLabels {
                method,
                state,
                code: code.name(),
            })
            .inc();
        self.request_duration
            .get_or_create(&DurationLabels { method, state })
            .observe(took.as_secs_f64());
    }

    /// `why` is one of `WAITS`.
    pub fn read_waited(&self, why: &'static str) {
        self.reads_waited.get_or_create(&WhyLabel { why }).inc();
    }

    pub fn flight_started(&self, upstream: &str) {
        self.flights_started
            .get_or_create(&UpstreamLabel::of(upstream))
            .inc();
    }

    pub fn flight_joined(&self, upstream: &str) {
        self.flights_joined
            .get_or_create(&UpstreamLabel::of(upstream))
            .inc();
    }

    pub fn flight_refused(&self, upstream: &str) {
        self.flights_refused
            .get_or_create(&UpstreamLabel::of(upstream))
            .inc();
    }

    /// `code` is the HTTP status, or a failure class in lower case; any other text is `other`.
    pub fn upstream_called(&self, upstream: &str, code: &str, took: Duration) {
        let code = if is_bounded_code(code) { code } else { "other" };
        self.upstream_calls
            .get_or_create(&CallLabels {
                upstream: upstream.into(),
                code: code.into(),
            })
            .inc();
        self.upstream_call_duration
            .get_or_create(&UpstreamLabel::of(upstream))
            .observe(took.as_secs_f64());
    }

    /// What a flight's commit came to: one of `COMMITS`.
    pub fn commit(&self, outcome: &'static str) {
        self.commits.get_or_create(&OutcomeLabel { outcome }).inc();
    }

    #[cfg(test)]
    pub(crate) fn requests_counted(
        &self,
        method: &'static str,
        state: &'static str,
        code: Code,
    ) -> u64 {
        self.requests
            .get_or_create(&RequestLabels {
                method,
                state,
                code: code.name(),
            })
            .get()
    }

    fn register(&mut self) {
        let registry = &mut self.registry;
        registry.register(
            "requests",
            "Requests by method, state of the answer and gRPC code",
            self.requests.clone(),
        );
        registry.register_with_unit(
            "request_duration",
            "Time of a request, by the state of its answer",
            Unit::Seconds,
            self.request_duration.clone(),
        );
        registry.register(
            "reads_waited",
            "Reads that waited for more than memory, by why",
            self.reads_waited.clone(),
        );
        registry.register(
            "flights_started",
            "Fetches started",
            self.flights_started.clone(),
        );
        registry.register(
            "flights_joined",
            "Readers that joined a fetch under way",
            self.flights_joined.clone(),
        );
        registry.register(
            "flights_refused",
            "Fetches refused because too many wait",
            self.flights_refused.clone(),
        );
        registry.register(
            "upstream_calls",
            "Calls to upstreams by status or failure class",
            self.upstream_calls.clone(),
        );
        let calls = self.upstream_call_duration.clone();
        registry.register_with_unit(
            "upstream_call_duration",
            "Time of a call to an upstream",
            Unit::Seconds,
            calls,
        );
        registry.register(
            "commits",
            "Fetched values by what their commit came to",
            self.commits.clone(),
        );
        let syncs = self.log_sync_duration.clone();
        registry.register_with_unit(
            "log_sync_duration",
            "Time of one sync of the log, of however many writes",
            Unit::Seconds,
            syncs,
        );
        registry.register(
            "leader_changes",
            "Leaders that this node did not follow before",
            self.leader_changes.clone(),
        );
        registry.register(
            "tasks_panicked",
            "Background tasks that panicked: a defect, to be reported",
            self.tasks_panicked.clone(),
        );
        registry.register(
            "snapshots_sent",
            "Snapshots sent to followers",
            self.snapshots_sent.clone(),
        );
        registry.register(
            "snapshots_installed",
            "Snapshots installed from a leader",
            self.snapshots_installed.clone(),
        );
        let (sent, installed) = (
            self.snapshot_bytes_sent.clone(),
            self.snapshot_bytes_installed.clone(),
        );
        registry.register_with_unit(
            "snapshot_sent",
            "Bytes of snapshots sent to followers",
            Unit::Bytes,
            sent,
        );
        registry.register_with_unit(
            "snapshot_installed",
            "Bytes of snapshots installed from a leader",
            Unit::Bytes,
            installed,
        );
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Events for Metrics {
    fn log_synced(&self, took: Duration) {
        self.log_sync_duration.observe(took.as_secs_f64());
    }

    fn task_panicked(&self, task: &'static str) {
        self.tasks_panicked.get_or_create(&TaskLabel { task }).inc();
    }

    fn leader_changed(&self, shard: ShardId) {
        self.leader_changes
            .get_or_create(&ShardLabel { shard })
            .inc();
    }

    fn snapshot_sent(&self, shard: ShardId, bytes: u64) {
        self.snapshots_sent
            .get_or_create(&ShardLabel { shard })
            .inc();
        self.snapshot_bytes_sent
            .get_or_create(&ShardLabel { shard })
            .inc_by(bytes);
    }

    fn snapshot_installed(&self, shard: ShardId, bytes: u64) {
        self.snapshots_installed
            .get_or_create(&ShardLabel { shard })
            .inc();
        self.snapshot_bytes_installed
            .get_or_create(&ShardLabel { shard })
            .inc_by(bytes);
    }

    fn outgoing(&self, metadata: &mut MetadataMap) {
        crate::telemetry::outgoing(metadata);
    }
}

impl UpstreamLabel {
    fn of(upstream: &str) -> Self {
        Self {
            upstream: upstream.into(),
        }
    }
}

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

/// A status or a lower-case word: what no upstream can make many of.
fn is_bounded_code(code: &str) -> bool {
    let is_status = code.len() == 3 && code.bytes().all(|byte| byte.is_ascii_digit());
    let class = format!("FAILURE_CLASS_{}", code.to_ascii_uppercase());
    is_status || code == "ok" || holdfast_proto::v1::FailureClass::from_str_name(&class).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(metrics: &Metrics) -> String {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &metrics.registry).unwrap();
        text
    }

    #[test]
    fn requests_are_counted_by_method_state_and_code() {
        let metrics = Metrics::new();
        let get = Method::of("/holdfast.v1.CacheService/Get");
        metrics.request(get, "FRESH", Code::Ok, Duration::from_micros(80));
        metrics.request(get, "FRESH", Code::Ok, Duration::from_micros(80));
        metrics.request(get, "MISS", Code::Ok, Duration::from_millis(80));
        metrics.request(get, "", Code::Unavailable, Duration::ZERO);
        let watch = Method::of("/grpc.health.v1.Health/Watch");
        metrics.request(watch, "", Code::Ok, Duration::ZERO);
        let text = text(&metrics);
        for line in [
            r#"holdfast_requests_total{method="Get",state="FRESH",code="OK"} 2"#,
            r#"holdfast_requests_total{method="Get",state="ERROR",code="UNAVAILABLE"} 1"#,
            r#"holdfast_request_duration_seconds_count{method="Get",state="FRESH"} 2"#,
            r#"holdfast_request_duration_seconds_count{method="Get",state="MISS"} 1"#,
            r#"holdfast_requests_total{method="health",state="",code="OK"} 1"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn what_has_not_happened_yet_is_counted_as_0() {
        let metrics = Metrics::new();
        metrics.begin(2, ["profiles"]);
        let text = text(&metrics);
        for line in [
            r#"holdfast_requests_total{method="Get",state="STALE_ON_ERROR",code="OK"} 0"#,
            r#"holdfast_requests_total{method="Set",state="",code="OK"} 0"#,
            r#"holdfast_reads_waited_total{why="miss"} 0"#,
            r#"holdfast_flights_joined_total{upstream="profiles"} 0"#,
            r#"holdfast_upstream_calls_total{upstream="profiles",code="200"} 0"#,
            r#"holdfast_leader_changes_total{shard="1"} 0"#,
            r#"holdfast_snapshots_sent_total{shard="0"} 0"#,
            r#"holdfast_snapshot_installed_bytes_total{shard="1"} 0"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
        let counters = text.lines().filter(|line| line.ends_with(" counter"));
        for name in counters.filter_map(|line| line.split(' ').nth(2)) {
            assert!(
                text.lines()
                    .any(|line| line.starts_with(&format!("{name}_total{{"))),
                "{name} has no series"
            );
        }
    }

    #[test]
    fn no_client_and_no_upstream_can_make_new_labels() {
        let metrics = Metrics::new();
        for i in 0..100 {
            let made_up = Method::of(&format!("/made.up/Method{i}"));
            metrics.request(made_up, "", Code::Unimplemented, Duration::ZERO);
            metrics.upstream_called("profiles", &format!("code {i}"), Duration::ZERO);
        }
        let text = text(&metrics);
        for line in [
            r#"holdfast_requests_total{method="other",state="ERROR",code="UNIMPLEMENTED"} 100"#,
            r#"holdfast_upstream_calls_total{upstream="profiles",code="other"} 100"#,
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn names_carry_their_units() {
        let metrics = Metrics::new();
        metrics.log_synced(Duration::from_millis(3));
        metrics.snapshot_sent(2, 4096);
        metrics.upstream_called("profiles", "200", Duration::from_millis(20));
        metrics.upstream_called("profiles", "connect", Duration::from_millis(20));
        let text = text(&metrics);
        assert!(
            text.contains("holdfast_log_sync_duration_seconds_count 1"),
            "{text}"
        );
        assert!(
            text.contains(r#"holdfast_snapshot_sent_bytes_total{shard="2"} 4096"#),
            "{text}"
        );
        assert!(
            text.contains(r#"holdfast_upstream_calls_total{upstream="profiles",code="200"} 1"#),
            "{text}"
        );
    }
}
