//! `/metrics` of whole nodes: all that operators ask is there before it happens, moves when it
//! does, and shows nobody's data.

use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_client::Error;
use holdfast_proto::{
    Token,
    v1::{Consistency, State},
};
use holdfast_tests::{
    cluster::Cluster,
    origin::{Behaviour, Gate, Origin},
    wire::{state, text},
};
use tokio::task::JoinSet;
use tonic::Code;
use tracing::info;

use super::exposition::Exposition;
use crate::in_process;

const KEY: &str = "plain/a-key-of-nobodys-business";
const VALUE: &str = "a-value-of-nobodys-business";
const FETCHED: &str = "a-fetched-value-of-nobodys-business";
const SECRET: &str = "a-secret-of-nobodys-business";

const GET: (&str, &str) = ("method", "Get");
const SET: (&str, &str) = ("method", "Set");
const OK: (&str, &str) = ("code", "OK");
const SHARD: &[(&str, &str)] = &[("shard", "0")];
const USERS: (&str, &str) = ("upstream", "users");

/// What is there, at 0, on a node that waits for others.
const AT_FIRST: [(&str, &[(&str, &str)]); 23] = [
    ("holdfast_requests_total", &[GET, ("state", "FRESH"), OK]),
    (
        "holdfast_requests_total",
        &[GET, ("state", "STALE_ON_ERROR"), OK],
    ),
    ("holdfast_requests_total", &[SET, OK]),
    ("holdfast_request_duration_seconds_count", &[GET]),
    ("holdfast_reads_waited_total", &[("why", "miss")]),
    ("holdfast_reads_waited_total", &[("why", "read_index")]),
    ("holdfast_flights_started_total", &[USERS]),
    ("holdfast_flights_joined_total", &[USERS]),
    ("holdfast_flights_refused_total", &[USERS]),
    ("holdfast_upstream_calls_total", &[USERS, ("code", "200")]),
    ("holdfast_upstream_call_duration_seconds_count", &[USERS]),
    ("holdfast_commits_total", &[("outcome", "stored")]),
    ("holdfast_commits_total", &[("outcome", "revalidated")]),
    ("holdfast_commits_total", &[("outcome", "fenced")]),
    ("holdfast_log_sync_duration_seconds_count", &[]),
    ("holdfast_log_sync_duration_seconds_sum", &[]),
    ("holdfast_leader_changes_total", SHARD),
    ("holdfast_snapshots_sent_total", SHARD),
    ("holdfast_snapshot_sent_bytes_total", SHARD),
    ("holdfast_snapshots_installed_total", SHARD),
    ("holdfast_snapshot_installed_bytes_total", SHARD),
    ("holdfast_ready", &[]),
    ("holdfast_insecure", &[]),
];

/// What rises by one with one flight that goes well.
const OF_A_FLIGHT: [(&str, &[(&str, &str)]); 4] = [
    ("holdfast_flights_started_total", &[USERS]),
    ("holdfast_upstream_calls_total", &[USERS, ("code", "200")]),
    ("holdfast_upstream_call_duration_seconds_count", &[USERS]),
    ("holdfast_commits_total", &[("outcome", "stored")]),
];

/// What is there on every member of a cluster, whatever it is.
const OF_A_MEMBER: [&str; 11] = [
    "holdfast_applied_revision",
    "holdfast_applied_index",
    "holdfast_feature_level",
    "holdfast_replica_lag_seconds",
    "holdfast_is_leader",
    "holdfast_has_leader",
    "holdfast_memory_bytes",
    "holdfast_memory_entries",
    "holdfast_memory_evicted_total",
    "holdfast_state_disk_bytes",
    "holdfast_disk_used_bytes",
];

/// All nodes' metrics at a moment.
struct Before<'c> {
    cluster: &'c Cluster,
    scrapes: Vec<Exposition>,
}

impl<'c> Before<'c> {
    async fn now(cluster: &'c Cluster) -> anyhow::Result<Self> {
        let mut scrapes = Vec::new();
        for node in 0..cluster.len() {
            scrapes.push(scrape(cluster, node).await?);
        }
        Ok(Self { cluster, scrapes })
    }

    /// How much a metric has risen since, node by node.
    async fn risen(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<Vec<f64>> {
        let mut risen = Vec::new();
        for (node, before) in self.scrapes.iter().enumerate() {
            let now = scrape(self.cluster, node).await?;
            now.check_against_earlier(before)?;
            risen.push(
                now.get(name, labels).unwrap_or_default()
                    - before.get(name, labels).unwrap_or_default(),
            );
        }
        Ok(risen)
    }

    async fn risen_everywhere(&self, name: &str, labels: &[(&str, &str)]) -> anyhow::Result<f64> {
        Ok(self.risen(name, labels).await?.iter().sum())
    }

    async fn until_risen(
        &self,
        by: f64,
        name: &str,
        labels: &[(&str, &str)],
    ) -> anyhow::Result<()> {
        let has = async || {
            self.risen_everywhere(name, labels)
                .await
                .is_ok_and(|risen| risen >= by)
        };
        self.cluster
            .until(&format!("{name}{labels:?} rises by {by}"), has)
            .await
    }
}

/// One scrape, as a scraper reads it. Shows nothing of what is stored or how it is got.
async fn scrape(cluster: &Cluster, node: usize) -> anyhow::Result<Exposition> {
    let (status, body) = cluster.admin(node, "/metrics").await?;
    ensure!(status == 200, "/metrics answered {status}");
    for hidden in [KEY, VALUE, FETCHED, SECRET, "user/"] {
        ensure!(!body.contains(hidden), "`{hidden}` is in\n{body}");
    }
    Exposition::parse(&body)
}

async fn until_above(
    cluster: &Cluster,
    node: usize,
    name: &str,
    labels: &[(&str, &str)],
    than: f64,
) -> anyhow::Result<()> {
    let is_above = async || {
        scrape(cluster, node)
            .await
            .is_ok_and(|now| now.get(name, labels).is_some_and(|value| value > than))
    };
    cluster
        .until(
            &format!("{name} of {} is over {than}", cluster.name(node)),
            is_above,
        )
        .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_are_there_before_anything_happens_and_move_when_it_does() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let gate = Gate::closed();
    origin.respond(Behaviour::text(FETCHED).after(&gate));
    origin.respond_at("/users/gone", Behaviour::status(503));
    origin.respond_at("/users/broken", Behaviour::json(format!("{{\"{SECRET}")));
    let secrets = tempfile::tempdir()?;
    let file = secrets.path().join("token");
    std::fs::write(&file, SECRET)?;
    let extra = format!(
        "secrets: {{token: {{file: \"{}\"}}}}\nupstreams: {{users: {{http: {{url: \"{}\", headers: {{authorization: \"Bearer ${{secret:token}}\"}}}}, fetch_timeout: 60s}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 1min, hard_timeout: 60s}}]\nstorage: {{max_bytes: 256MiB}}",
        file.display(),
        origin.url("/users/{1}"),
    );
    let mut cluster = in_process().extra(extra).configure()?;

    info!("--- a node that waits for others: nothing has happened, and it says so");
    cluster.start_node(0).await?;
    let alone = scrape(&cluster, 0).await?;
    for (name, labels) in AT_FIRST {
        ensure!(
            alone.get(name, labels) == Some(0.0),
            "{name}{labels:?} is {:?}",
            alone.get(name, labels)
        );
    }
    ensure!(
        alone.get(
            "holdfast_build_info",
            &[("version", env!("CARGO_PKG_VERSION"))]
        ) == Some(1.0),
        "{alone:?}"
    );

    info!("--- a cluster");
    cluster.start_node(1).await?;
    cluster.start_node(2).await?;
    for node in 0..3 {
        cluster.ready(node).await?;
    }
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let follower = (leader + 1) % 3;
    let wires = cluster.wires()?;
    let term = cluster.terms().await?;
    for node in 0..3 {
        let lag = async || {
            scrape(&cluster, node)
                .await
                .ok()?
                .get("holdfast_replica_lag_seconds", SHARD)
        };
        cluster
            .until("the node is level with its leader", async || {
                lag().await.is_some_and(|lag| lag < 1.0)
            })
            .await?;
        let now = scrape(&cluster, node).await?;
        if node == 0 {
            now.check_against_earlier(&alone)?;
        }
        for name in OF_A_MEMBER {
            ensure!(now.get(name, &[]).is_some(), "{name} is not there");
        }
        ensure!(
            now.get("holdfast_has_leader", SHARD) == Some(1.0)
                && now.get("holdfast_ready", &[]) == Some(1.0),
            "{now:?}"
        );
        until_above(&cluster, node, "holdfast_leader_changes_total", SHARD, 0.0).await?;
    }

    info!("--- writes: here, forwarded, refused");
    let before = Before::now(&cluster).await?;
    let mut written = Bytes::new();
    for wire in &wires {
        written = wire.set(KEY, VALUE, None).await?.token;
    }
    ensure!(
        before.risen("holdfast_requests_total", &[SET, OK]).await? == [1.0; 3],
        "every node took a Set"
    );
    ensure!(
        before
            .risen("holdfast_request_duration_seconds_count", &[SET])
            .await?
            == [1.0; 3],
        "and each took its time"
    );
    ensure!(
        before
            .risen_everywhere("holdfast_request_duration_seconds_sum", &[SET])
            .await?
            > 0.0,
        "that is no time at all"
    );
    let revision = Token::decode(&written)?.context("a token")?.revision(0) as f64;
    for node in 0..3 {
        until_above(
            &cluster,
            node,
            "holdfast_applied_revision",
            SHARD,
            revision - 1.0,
        )
        .await?;
    }
    let syncs = before
        .risen("holdfast_log_sync_duration_seconds_count", &[])
        .await?;
    ensure!(
        syncs.iter().filter(|syncs| **syncs >= 1.0).count() >= 2,
        "a quorum synced its log: {syncs:?}"
    );
    ensure!(
        before
            .risen_everywhere("holdfast_log_sync_duration_seconds_sum", &[])
            .await?
            > 0.0,
        "syncs that took no time"
    );
    let refused = cluster
        .client(follower)
        .set(KEY, VALUE)
        .if_version(9_999)
        .await
        .err();
    ensure!(
        matches!(refused, Some(Error::Conflict { .. })),
        "{refused:?}"
    );
    ensure!(
        before
            .risen(
                "holdfast_requests_total",
                &[SET, ("code", "FAILED_PRECONDITION")]
            )
            .await?[follower]
            == 1.0,
        "a refused Set is counted"
    );
    let refused = wires[follower].set("", VALUE, None).await;
    ensure!(refused.is_err_and(|status| status.code() == Code::InvalidArgument));
    ensure!(
        before
            .risen(
                "holdfast_requests_total",
                &[SET, ("code", "INVALID_ARGUMENT")]
            )
            .await?[follower]
            == 1.0,
        "a wrong Set is counted"
    );

    info!("--- reads: hits, misses, the newest");
    let before = Before::now(&cluster).await?;
    for wire in &wires {
        ensure!(text(&wire.get(KEY, Consistency::Local, &Bytes::new()).await?) == VALUE);
        ensure!(
            state(
                &wire
                    .get("plain/nothing", Consistency::Local, &Bytes::new())
                    .await?
            ) == State::Miss
        );
    }
    ensure!(
        before
            .risen("holdfast_requests_total", &[GET, ("state", "FRESH"), OK])
            .await?
            == [1.0; 3],
        "hits"
    );
    ensure!(
        before
            .risen("holdfast_requests_total", &[GET, ("state", "MISS"), OK])
            .await?
            == [1.0; 3],
        "misses"
    );
    ensure!(
        before.risen("holdfast_reads_waited_total", &[]).await? == [0.0; 3],
        "a read of memory waited"
    );
    wires[follower]
        .get(KEY, Consistency::Linearizable, &Bytes::new())
        .await?;
    ensure!(
        before
            .risen("holdfast_reads_waited_total", &[("why", "read_index")])
            .await?[follower]
            == 1.0,
        "a LINEARIZABLE read waits"
    );
    for node in 0..3 {
        let now = scrape(&cluster, node).await?;
        ensure!(
            now.get("holdfast_memory_entries", SHARD) >= Some(1.0)
                && now.get("holdfast_memory_bytes", SHARD) >= Some(VALUE.len() as f64)
        );
    }

    info!("--- a miss on every node: one flight, which the others join");
    let mut readers = JoinSet::new();
    for wire in wires.iter().cloned() {
        let wire = wire.within(Duration::from_secs(60));
        readers.spawn(async move {
            wire.get("user/7", Consistency::Session, &Bytes::new())
                .await
        });
    }
    before
        .until_risen(3.0, "holdfast_reads_waited_total", &[("why", "miss")])
        .await?;
    before
        .until_risen(2.0, "holdfast_flights_joined_total", &[USERS])
        .await?;
    gate.open();
    while let Some(read) = readers.join_next().await {
        ensure!(text(&read??) == FETCHED);
    }
    let elections = (cluster.terms().await? - term) as f64;
    for (name, labels) in OF_A_FLIGHT {
        let risen = before.risen_everywhere(name, labels).await?;
        ensure!(
            (1.0..=1.0 + elections).contains(&risen),
            "{name} rose by {risen} for one flight"
        );
    }

    info!("--- an upstream that fails");
    for (key, code) in [("user/gone", "503"), ("user/broken", "malformed")] {
        let read = wires[follower]
            .get(key, Consistency::Session, &Bytes::new())
            .await;
        ensure!(
            read.is_err_and(|status| status.code() == Code::Unavailable),
            "{key} was answered"
        );
        ensure!(
            before
                .risen_everywhere("holdfast_upstream_calls_total", &[USERS, ("code", code)])
                .await?
                >= 1.0,
            "{code} is not counted"
        );
    }
    ensure!(
        before
            .risen(
                "holdfast_requests_total",
                &[GET, ("state", "ERROR"), ("code", "UNAVAILABLE")]
            )
            .await?[follower]
            == 2.0
    );

    info!("--- a refresh, which nobody waits for");
    cluster.until_level(2).await?;
    let before = Before::now(&cluster).await?;
    cluster.advance(Duration::from_secs(70)).await?;
    // Past its lifetime, unless the refresh ahead was sooner than this reader.
    let seen = state(
        &wires[follower]
            .get("user/7", Consistency::Session, &Bytes::new())
            .await?,
    );
    ensure!([State::Stale, State::Fresh].contains(&seen), "{seen:?}");
    before
        .until_risen(1.0, "holdfast_flights_started_total", &[USERS])
        .await?;
    // The upstream answers as before.
    before
        .until_risen(1.0, "holdfast_commits_total", &[("outcome", "revalidated")])
        .await?;
    ensure!(
        before
            .risen(
                "holdfast_requests_total",
                &[
                    GET,
                    ("state", seen.as_str_name().trim_start_matches("STATE_")),
                    OK
                ]
            )
            .await?[follower]
            == 1.0,
        "the read is counted"
    );
    ensure!(
        before
            .risen_everywhere("holdfast_reads_waited_total", &[("why", "miss")])
            .await?
            == 0.0,
        "a reader waited for the refresh"
    );

    #[cfg(feature = "rocksdb")]
    {
        info!("--- disk in use");
        let used = scrape(&cluster, leader)
            .await?
            .get("holdfast_disk_used_bytes", &[])
            .context("disk in use")?;
        let client = cluster.client(leader);
        for key in 0..8 {
            client
                .set(format!("large/{key}"), vec![b'x'; 512 << 10])
                .await?;
        }
        until_above(&cluster, leader, "holdfast_disk_used_bytes", &[], used).await?;
        ensure!(
            scrape(&cluster, leader)
                .await?
                .get("holdfast_disk_limit_bytes", &[])
                == Some(256.0 * f64::from(1 << 20)),
            "the limit"
        );
    }

    info!("--- the next leader");
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let earlier = Before::now(&cluster).await?.scrapes;
    let old = earlier
        .iter()
        .filter(|scrape| scrape.get("holdfast_is_leader", SHARD) == Some(1.0))
        .count();
    ensure!(old == 1, "{old} nodes lead");
    cluster.stop_node(leader).await?;
    let others: Vec<usize> = (0..3).filter(|&node| node != leader).collect();
    cluster.leader_of(&others).await?;
    let mut leads = 0.0;
    for &node in &others {
        let now = scrape(&cluster, node).await?;
        now.check_against_earlier(&earlier[node])?;
        let changes = earlier[node]
            .get("holdfast_leader_changes_total", SHARD)
            .context("leader changes")?;
        until_above(
            &cluster,
            node,
            "holdfast_leader_changes_total",
            SHARD,
            changes,
        )
        .await?;
        leads += now.get("holdfast_is_leader", SHARD).unwrap_or_default();
    }
    ensure!(leads == 1.0, "{leads} nodes lead");
    cluster.stop().await
}
