//! A caller's trace goes through the cluster: over the node that is asked, the leader and the
//! upstream, to whatever collects it.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, ensure};
use futures::StreamExt as _;
use holdfast_proto::v1::{self, cache_service_client::CacheServiceClient};
use holdfast_tests::{
    cluster::{Cluster, until},
    origin::{Behaviour, Origin},
};
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value},
    trace::v1::{ResourceSpans, Span},
};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::task::JoinHandle;
use tonic::{Request, Response, Status, transport::Server};
use tracing::info;

use crate::processes;

/// The caller's own span, the parent of all.
const CALLER: &str = "b7ad6b7169203331";
const GET: &str = "0af7651916cd43dd8448eb211c80319c";
const SET: &str = "1bf7651916cd43dd8448eb211c80319d";
const UNSAMPLED: &str = "2cf7651916cd43dd8448eb211c80319e";

const KEY: &str = "key-of-nobodys-business";
const VALUE: &str = "a-value-of-nobodys-business";
const FETCHED: &str = "a-fetched-value-of-nobodys-business";
const SECRET: &str = "a-secret-of-nobodys-business";

/// Takes spans as any collector of OTLP does, and keeps them.
struct Collector {
    address: SocketAddr,
    kept: Arc<Mutex<Vec<ResourceSpans>>>,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

struct Keeping(Arc<Mutex<Vec<ResourceSpans>>>);

#[tonic::async_trait]
impl TraceService for Keeping {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().extend(request.into_inner().resource_spans);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> anyhow::Result<Self> {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let kept = Arc::new(Mutex::default());
        let server = Server::builder().add_service(TraceServiceServer::new(Keeping(kept.clone())));
        let accepted = tokio_stream::wrappers::TcpListenerStream::new(listener).boxed();
        let serving = tokio::spawn(server.serve_with_incoming(accepted));
        Ok(Self {
            address,
            kept,
            serving,
        })
    }

    /// The spans of one trace that one node sent.
    fn spans(&self, trace: &str, node: &str) -> Vec<Span> {
        let kept = self.kept.lock();
        let of_node = kept.iter().filter(|spans| {
            spans
                .resource
                .as_ref()
                .is_some_and(|of| attribute(&of.attributes, "service.instance.id") == node)
        });
        let spans = of_node
            .flat_map(|spans| &spans.scope_spans)
            .flat_map(|scope| &scope.spans);
        spans
            .filter(|span| hex(&span.trace_id) == trace)
            .cloned()
            .collect()
    }

    /// A span of one trace that one node sent, by name and method, once it is there.
    async fn span(
        &self,
        trace: &str,
        node: &str,
        name: &str,
        method: &str,
    ) -> anyhow::Result<Span> {
        let mut found = None;
        let is_there = async || {
            let mut spans = self.spans(trace, node).into_iter();
            found = spans
                .find(|span| span.name == name && attribute(&span.attributes, "method") == method);
            found.is_some()
        };
        let waited = until(&format!("{node} sends a span `{name}` {method}"), is_there).await;
        waited.with_context(|| {
            format!(
                "it sent {:?}",
                self.spans(trace, node)
                    .into_iter()
                    .map(|span| span.name)
                    .collect::<Vec<_>>()
            )
        })?;
        found.context("a span")
    }

    /// Everything, byte for byte.
    fn bytes(&self) -> Vec<u8> {
        self.kept
            .lock()
            .iter()
            .flat_map(|spans| spans.encode_to_vec())
            .collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Empty if there is none.
fn attribute<'a>(attributes: &'a [KeyValue], key: &str) -> &'a str {
    let found = attributes
        .iter()
        .find(|attribute| attribute.key == key)
        .and_then(|attribute| attribute.value.as_ref()?.value.as_ref());
    match found {
        Some(any_value::Value::StringValue(text)) => text,
        _ => "",
    }
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A request inside a trace.
fn traced<T>(message: T, trace: &str, flags: &str) -> anyhow::Result<Request<T>> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(
        "traceparent",
        format!("00-{trace}-{CALLER}-{flags}").parse()?,
    );
    request.set_timeout(Duration::from_secs(10));
    Ok(request)
}

fn get(key: &str) -> v1::GetRequest {
    v1::GetRequest {
        key: format!("user/{key}").into(),
        ..Default::default()
    }
}

/// Starts every node as one that sends its spans to a collector, under its own name.
async fn start(cluster: &mut Cluster, collector: SocketAddr) -> anyhow::Result<()> {
    for node in 0..cluster.len() {
        let endpoint = format!("OTEL_EXPORTER_OTLP_ENDPOINT=http://{collector}");
        let name = format!(
            "OTEL_RESOURCE_ATTRIBUTES=service.instance.id={}",
            cluster.name(node)
        );
        cluster
            .start_with(
                node,
                &["env", &endpoint, &name, "OTEL_BSP_SCHEDULE_DELAY=50"],
            )
            .await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_callers_trace_goes_on_over_follower_leader_and_upstream() -> anyhow::Result<()> {
    let collector = Collector::start().await?;
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text(FETCHED));
    let secrets = tempfile::tempdir()?;
    let file = secrets.path().join("token");
    std::fs::write(&file, SECRET)?;
    let extra = format!(
        "secrets: {{token: {{file: \"{}\"}}}}\nupstreams: {{users: {{http: {{url: \"{}\", headers: {{authorization: \"Bearer ${{secret:token}}\"}}}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 1h}}]",
        file.display(),
        origin.url("/users/{1}"),
    );
    let mut cluster = processes().extra(extra).configure()?;
    start(&mut cluster, collector.address).await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let follower = (leader + 1) % 3;
    let mut cache = CacheServiceClient::new(cluster.channel(follower));
    let (leader, follower) = (cluster.name(leader), cluster.name(follower));

    info!("--- a trace that its caller does not record goes on, and is not recorded here");
    let answer = cache
        .get(traced(get("unsampled"), UNSAMPLED, "00")?)
        .await?
        .into_inner()
        .answer
        .context("an answer")?;
    ensure!(
        answer.value.as_deref() == Some(FETCHED.as_bytes()),
        "{answer:?}"
    );
    ensure!(
        passed_on(&origin)?.starts_with(&format!("00-{UNSAMPLED}-"))
            && passed_on(&origin)?.ends_with("-00"),
        "{}",
        passed_on(&origin)?
    );

    info!("--- a miss at a follower, which the leader fetches");
    let answer = cache
        .get(traced(get(KEY), GET, "01")?)
        .await?
        .into_inner()
        .answer
        .context("an answer")?;
    ensure!(
        answer.value.as_deref() == Some(FETCHED.as_bytes()),
        "{answer:?}"
    );
    let asked = collector.span(GET, follower, "rpc", "Get").await?;
    ensure!(
        hex(&asked.parent_span_id) == CALLER,
        "the caller's span is not the parent of {asked:?}"
    );
    let taken = collector.span(GET, leader, "refresh.question", "").await?;
    ensure!(
        ids(&collector.spans(GET, follower)).contains(&taken.parent_span_id),
        "no span of the follower is the parent of {taken:?}"
    );
    let flight = collector.span(GET, leader, "refresh.fetch", "").await?;
    ensure!(
        flight.parent_span_id == taken.span_id,
        "the flight is not the request's: {flight:?}"
    );
    ensure!(
        attribute(&flight.attributes, "upstream") == "users",
        "{flight:?}"
    );
    let call = collector.span(GET, leader, "upstream.fetch", "").await?;
    ensure!(
        call.parent_span_id == flight.span_id,
        "the call is not the flight's: {call:?}"
    );
    let received = passed_on(&origin)?;
    let parent = received
        .strip_prefix(&format!("00-{GET}-"))
        .and_then(|rest| rest.strip_suffix("-01"));
    let parent = parent.with_context(|| format!("the upstream received `{received}`"))?;
    ensure!(
        ids(&collector.spans(GET, leader))
            .iter()
            .any(|id| hex(id) == parent),
        "no span of the leader is the parent of `{received}`"
    );
    ensure!(origin.calls() == 2, "{} calls", origin.calls());

    info!("--- a write at a follower, which the leader proposes");
    let set = v1::SetRequest {
        key: KEY.into(),
        value: VALUE.into(),
        ..Default::default()
    };
    cache.set(traced(set, SET, "01")?).await?;
    let asked = collector.span(SET, follower, "rpc", "Set").await?;
    ensure!(
        hex(&asked.parent_span_id) == CALLER,
        "the caller's span is not the parent of {asked:?}"
    );
    let taken = collector.span(SET, leader, "rpc", "Propose").await?;
    ensure!(
        ids(&collector.spans(SET, follower)).contains(&taken.parent_span_id),
        "no span of the follower is the parent of {taken:?}"
    );

    info!("--- what the collector has seen of what was asked");
    for node in 0..3 {
        ensure!(cluster.stop_node(node).await? == Some(0));
        ensure!(
            collector
                .spans(UNSAMPLED, &format!("node-{}", node + 1))
                .is_empty(),
            "spans of a trace that nobody records"
        );
    }
    let seen = collector.bytes();
    let shows = |text: &str| {
        seen.windows(text.len())
            .any(|bytes| bytes == text.as_bytes())
    };
    ensure!(
        shows("holdfastd") && shows("upstream.fetch"),
        "the search finds nothing"
    );
    for hidden in [KEY, VALUE, FETCHED, SECRET] {
        ensure!(!shows(hidden), "`{hidden}` is in a span");
    }
    Ok(())
}

/// What the upstream was told last of the trace that it is called in.
fn passed_on(origin: &Origin) -> anyhow::Result<String> {
    let request = origin.last_request().context("a call")?;
    Ok(request
        .headers
        .get("traceparent")
        .context("the upstream received no `traceparent`")?
        .to_str()?
        .to_owned())
}

fn ids(spans: &[Span]) -> BTreeSet<Vec<u8>> {
    spans.iter().map(|span| span.span_id.clone()).collect()
}

/// Whoever looks is not to be needed: reads, writes and a stop go on as if nobody did.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_away_or_hangs_harms_nobody() -> anyhow::Result<()> {
    // One takes connections and says nothing, the other's port is nobody's.
    let hangs = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let away = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    for collector in [hangs.local_addr()?, away] {
        let mut cluster = processes().nodes(1, 1).configure()?;
        start(&mut cluster, collector).await?;
        cluster.leader().await?;
        let mut cache = CacheServiceClient::new(cluster.channel(0));
        for _ in 0..100 {
            let set = v1::SetRequest {
                key: KEY.into(),
                value: VALUE.into(),
                ..Default::default()
            };
            cache.set(traced(set, SET, "01")?).await?;
            let get = v1::GetRequest {
                key: KEY.into(),
                ..Default::default()
            };
            let answer = cache
                .get(traced(get, GET, "01")?)
                .await?
                .into_inner()
                .answer
                .context("an answer")?;
            ensure!(
                answer.value.as_deref() == Some(VALUE.as_bytes()),
                "{answer:?}"
            );
        }
        let code = tokio::time::timeout(Duration::from_secs(10), cluster.stop_node(0))
            .await
            .context("it has not stopped within 10 s")??;
        ensure!(
            code == Some(0),
            "it exited with {code:?}: {}",
            cluster.log_of(0)
        );
    }
    Ok(())
}
