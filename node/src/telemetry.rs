//! Logs and traces: where they go, and the trace context of W3C that travels with calls.
//!
//! Promises: logs as text on a terminal and JSON otherwise; spans leave the process only if
//! `OTEL_EXPORTER_OTLP_ENDPOINT` is set; flushing them is bounded. Initialised once by `main`,
//! never by a node: many nodes share a test process. Must never know a value or a credential, and
//! shows no key (P8).

use std::{io::IsTerminal, time::Duration};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::{
    Context,
    propagation::{Extractor, Injector, TextMapPropagator},
    trace::TracerProvider,
};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter};
use opentelemetry_sdk::{Resource, propagation::TraceContextPropagator, trace::SdkTracerProvider};
use tonic::metadata::{MetadataKey, MetadataMap};
use tracing::{Span, level_filters::LevelFilter};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::Targets, layer::SubscriberExt, util::SubscriberInitExt,
};

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
/// Vendors' own words in a trace context (W3C Trace Context §3.3).
const TRACE_STATE: &str = "tracestate";
const SERVICE_NAME: &str = "holdfastd";
/// Of W3C Trace Context.
const TRACEPARENT: &str = "traceparent";
/// Unless `RUST_LOG` says otherwise. openraft warns of each message that a dead peer does not take;
/// what it comes to, the replica says itself. The spans of requests are for those who export them.
const LOG_DEFAULT: &str = "info,holdfast_node::grpc::trace=warn,openraft=error,h2=warn,hyper=warn,hyper_util=warn,tonic=warn,tower=warn";
/// Crates that export spans with: their own spans would feed on themselves.
const NOT_EXPORTED: [&str; 6] = [
    "h2",
    "hyper",
    "hyper_util",
    "tonic",
    "tower",
    "opentelemetry",
];
/// A collector that does not answer holds the stop up for so long, and no longer.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("RUST_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("{ENDPOINT}: {0}")]
    Exporter(#[from] ExporterBuildError),
    #[error("logging is set up already")]
    Twice(#[from] tracing_subscriber::util::TryInitError),
}

/// What has to be flushed at the end.
#[derive(Debug)]
#[must_use = "spans are lost unless it is flushed"]
pub struct Telemetry {
    spans: Option<SdkTracerProvider>,
}

impl Telemetry {
    /// Once per process, inside a runtime: the exporter needs one.
    pub fn init() -> Result<Self, TelemetryError> {
        let filter = match std::env::var("RUST_LOG") {
            Ok(directives) if !directives.trim().is_empty() => EnvFilter::try_new(directives)?,
            _ => EnvFilter::try_new(LOG_DEFAULT)?,
        };
        let spans = std::env::var_os(ENDPOINT)
            .filter(|endpoint| !endpoint.is_empty())
            .map(|_| exporting())
            .transpose()?;
        let exporting = spans.as_ref().map(|provider| {
            let unwanted = NOT_EXPORTED.map(|target| (target, LevelFilter::OFF));
            let wanted = Targets::new()
                .with_default(LevelFilter::INFO)
                .with_targets(unwanted);
            tracing_opentelemetry::layer()
                .with_tracer(provider.tracer(SERVICE_NAME))
                .with_filter(wanted)
        });
        tracing_subscriber::registry()
            .with(logs().with_filter(filter))
            .with(exporting)
            .try_init()?;
        Ok(Self { spans })
    }

    /// Sends what is left, within a bounded time.
    pub async fn flush(self) {
        let Some(spans) = self.spans else { return };
        let flushed =
            holdfast_raft::task::blocking(move || spans.shutdown_with_timeout(FLUSH_TIMEOUT));
        match tokio::time::timeout(FLUSH_TIMEOUT, flushed).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => {
                tracing::warn!(%error, "the last spans did not reach the collector")
            }
            Ok(Err(_)) | Err(_) => tracing::warn!("the last spans did not reach the collector"),
        }
    }
}

/// The current span's context, for a call to an upstream. Empty without a trace. What other systems
/// keep in `tracestate` stays here: a client can write anything into it, and an upstream sees our
/// credentials beside it.
pub fn trace_headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    inject(&mut Headers(&mut headers));
    headers.remove(TRACE_STATE);
    headers
}

/// Puts the current span's context into a call to another node.
pub fn outgoing(metadata: &mut MetadataMap) {
    inject(&mut Metadata(metadata));
}

/// The current span's context as one header's value, for a question among many to another node.
/// Empty without a trace.
pub(crate) fn traceparent() -> String {
    let headers = trace_headers();
    let parent = headers
        .get(TRACEPARENT)
        .and_then(|value| value.to_str().ok());
    parent.unwrap_or_default().to_owned()
}

/// The span of one such question, inside the trace of who asked; none outside a trace.
pub(crate) fn span_of_peer(traceparent: &str) -> Span {
    let Ok(parent) = HeaderValue::from_str(traceparent) else {
        return Span::none();
    };
    if parent.is_empty() {
        return Span::none();
    }
    let span = tracing::info_span!("refresh.question", otel.kind = "server");
    let headers = HeaderMap::from_iter([(HeaderName::from_static(TRACEPARENT), parent)]);
    // Fails where no layer exports spans: then there is no trace to go on with.
    let _ = span.set_parent(incoming(&headers));
    span
}

/// What a caller says its span is.
pub(crate) fn incoming(headers: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Incoming(headers))
}

fn inject(carrier: &mut dyn Injector) {
    TraceContextPropagator::new().inject_context(&Span::current().context(), carrier);
}

fn logs() -> Box<dyn Layer<Registry> + Send + Sync> {
    let to_stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        to_stderr.boxed()
    } else {
        to_stderr
            .with_ansi(false)
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed()
    }
}

fn exporting() -> Result<SdkTracerProvider, ExporterBuildError> {
    let exporter = SpanExporter::builder().with_tonic().build()?;
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource())
        .build())
}

/// `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` go first.
fn resource() -> Resource {
    let attributes = std::env::var("OTEL_RESOURCE_ATTRIBUTES").unwrap_or_default();
    let is_named = std::env::var_os("OTEL_SERVICE_NAME").is_some_and(|name| !name.is_empty())
        || attributes.contains("service.name=");
    let builder = Resource::builder();
    if is_named {
        builder.build()
    } else {
        builder.with_service_name(SERVICE_NAME).build()
    }
}

struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, name: &str, value: String) {
        // The propagator writes nothing that is no header; a state that a caller made up may be.
        if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(value)) {
            self.0.insert(name, value);
        }
    }
}

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, name: &str, value: String) {
        if let (Ok(name), Ok(value)) = (MetadataKey::from_bytes(name.as_bytes()), value.try_into())
        {
            self.0.insert(name, value);
        }
    }
}

struct Incoming<'a>(&'a HeaderMap);

impl Extractor for Incoming<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(HeaderName::as_str).collect()
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::TraceContextExt;

    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    /// For this thread only: a subscriber of the process is `main`'s alone.
    fn traced<T>(work: impl FnOnce() -> T) -> T {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), work)
    }

    #[test]
    fn a_callers_trace_goes_on_to_followers_and_upstreams() {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", PARENT.parse().unwrap());
        headers.insert(TRACE_STATE, "vendor=made-up".parse().unwrap());
        let mut metadata = MetadataMap::new();
        let headers = traced(|| {
            let span = tracing::info_span!("rpc");
            span.set_parent(incoming(&headers)).unwrap();
            let _inside = span.enter();
            outgoing(&mut metadata);
            trace_headers()
        });
        for passed_on in [
            headers.get("traceparent").unwrap().to_str().unwrap(),
            metadata.get("traceparent").unwrap().to_str().unwrap(),
        ] {
            assert!(
                passed_on.starts_with(&format!("00-{TRACE}-")) && passed_on.ends_with("-01"),
                "{passed_on}"
            );
            assert_ne!(
                passed_on, PARENT,
                "the parent is this node's span, not the caller's"
            );
        }
        // What the client wrote into it reaches our nodes, and no upstream.
        assert!(metadata.contains_key(TRACE_STATE) && !headers.contains_key(TRACE_STATE));
    }

    #[test]
    fn without_a_trace_nothing_is_passed_on() {
        let mut metadata = MetadataMap::new();
        outgoing(&mut metadata);
        assert!(metadata.is_empty() && trace_headers().is_empty());
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", "made up".parse().unwrap());
        assert!(!incoming(&headers).span().span_context().is_valid());
    }

    /// Does not end while its sender lives.
    #[derive(Debug)]
    struct Stuck(std::sync::Mutex<std::sync::mpsc::Receiver<()>>);

    impl opentelemetry_sdk::trace::SpanProcessor for Stuck {
        fn on_start(&self, _: &mut opentelemetry_sdk::trace::Span, _: &Context) {}

        fn on_end(&self, _: opentelemetry_sdk::trace::SpanData) {}

        fn force_flush(&self) -> opentelemetry_sdk::error::OTelSdkResult {
            Ok(())
        }

        fn shutdown_with_timeout(&self, _: Duration) -> opentelemetry_sdk::error::OTelSdkResult {
            let _ = self.0.lock().unwrap().recv();
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_collector_that_hangs_holds_a_stop_up_for_a_second_at_most() {
        let (held, stuck) = std::sync::mpsc::channel();
        let spans = SdkTracerProvider::builder()
            .with_span_processor(Stuck(std::sync::Mutex::new(stuck)))
            .build();
        let flushed = tokio::time::timeout(
            Duration::from_millis(1500),
            Telemetry { spans: Some(spans) }.flush(),
        )
        .await;
        drop(held);
        flushed.expect("flushing is bounded");
    }
}
