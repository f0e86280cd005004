//! A span around each request, inside the caller's trace if it names one in `traceparent`.
//!
//! Its target is this module, so that logs can leave it out: where nobody exports spans, a request
//! costs none. Must never know a key or a value.

use std::task::{Context, Poll};

use http::HeaderMap;
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, instrument::Instrumented};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::telemetry;

const TRACEPARENT: &str = "traceparent";

/// Spans for those requests of other nodes that belong to a trace: a heartbeat is nobody's request.
#[derive(Debug, Clone, Copy)]
pub struct TraceLayer;

#[derive(Debug, Clone)]
pub struct Trace<S> {
    inner: S,
}

/// Holds the method's name and nothing of what is asked.
pub(super) fn request(method: &str, headers: &HeaderMap) -> Span {
    let span = tracing::info_span!("rpc", method, otel.kind = "server", rpc.system = "grpc");
    if !span.is_disabled() && headers.contains_key(TRACEPARENT) {
        // Fails where no layer exports spans: then there is no trace to go on with.
        let _ = span.set_parent(telemetry::incoming(headers));
    }
    span
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace { inner }
    }
}

impl<S, B> Service<http::Request<B>> for Trace<S>
where
    S: Service<http::Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let span = match request.headers().contains_key(TRACEPARENT) {
            true => self::request(last_segment(request.uri().path()), request.headers()),
            false => Span::none(),
        };
        let answer = span.in_scope(|| self.inner.call(request));
        answer.instrument(span)
    }
}

/// `Get` of `/holdfast.v1.CacheService/Get`.
fn last_segment(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tower::{ServiceBuilder, ServiceExt, service_fn};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[tokio::test]
    async fn a_request_goes_on_in_its_callers_trace() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));

        let handler = service_fn(|_: http::Request<()>| async {
            Ok::<_, Infallible>(telemetry::trace_headers())
        });
        let stack = ServiceBuilder::new().layer(TraceLayer).service(handler);
        let mut request = http::Request::new(());
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        request
            .headers_mut()
            .insert("traceparent", parent.parse().unwrap());
        let passed_on = stack.oneshot(request).await.unwrap();
        let passed_on = passed_on.get("traceparent").unwrap().to_str().unwrap();
        assert!(
            passed_on.starts_with("00-0af7651916cd43dd8448eb211c80319c-"),
            "{passed_on}"
        );
    }
}
