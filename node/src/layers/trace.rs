//! A span around each request, inside the caller's trace if it names one in `traceparent`.

use std::task::{Context, Poll};

use tower::{Layer, Service};
use tracing::{Instrument, Span, instrument::Instrumented};
use tracing_opentelemetry::OpenTelemetrySpanExt;

use super::{Request, method};
use crate::telemetry;

const TRACEPARENT: &str = "traceparent";

/// Which requests get a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TraceLayer {
    All,
    /// Those that belong to a trace: a heartbeat is nobody's request.
    Traced,
}

#[derive(Debug, Clone)]
pub struct Trace<S> {
    inner: S,
    which: TraceLayer,
}

impl<S> Layer<S> for TraceLayer {
    type Service = Trace<S>;

    fn layer(&self, inner: S) -> Trace<S> {
        Trace {
            inner,
            which: *self,
        }
    }
}

impl<S: Service<Request>> Service<Request> for Trace<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = Instrumented<S::Future>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let is_traced = request.headers().contains_key(TRACEPARENT);
        let span = if is_traced || self.which == TraceLayer::All {
            span(&request)
        } else {
            Span::none()
        };
        let _inside = span.clone().entered();
        self.inner.call(request).instrument(span)
    }
}

/// Holds the method's name and nothing of what is asked.
fn span(request: &Request) -> Span {
    let span = tracing::info_span!(
        "rpc",
        method = method(request.uri().path()),
        otel.kind = "server",
        rpc.system = "grpc"
    );
    if request.headers().contains_key(TRACEPARENT) {
        // Fails where no layer exports spans: then there is no trace to go on with.
        let _ = span.set_parent(telemetry::incoming(request.headers()));
    }
    span
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tonic::body::Body;
    use tower::{ServiceBuilder, ServiceExt, service_fn};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[tokio::test]
    async fn a_request_goes_on_in_its_callers_trace() {
        let provider = SdkTracerProvider::builder().build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        let _guard = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));

        let handler =
            service_fn(|_: Request| async { Ok::<_, Infallible>(telemetry::trace_headers()) });
        let stack = ServiceBuilder::new()
            .layer(TraceLayer::Traced)
            .service(handler);
        let mut request = http::Request::new(Body::empty());
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
