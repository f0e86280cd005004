//! Counts the requests that no handler counts: unknown methods, refusals, deadlines, messages that
//! cannot be read, and those whose caller went away. Handlers count the rest, because they know the
//! state of what they answered.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use holdfast_raft::Clock;
use tonic::Status;
use tower::{Layer, Service};

use super::{Answer, Request, Response};
use crate::{
    error::Code,
    metrics::{Metrics, counting},
};

#[derive(Debug, Clone)]
pub struct MetricsLayer {
    metrics: Arc<Metrics>,
    clock: Clock,
}

#[derive(Debug, Clone)]
pub struct Counted<S> {
    inner: S,
    metrics: Arc<Metrics>,
    clock: Clock,
}

/// Counts a request whose future was dropped before it had an answer.
struct Pending {
    metrics: Arc<Metrics>,
    clock: Clock,
    path: String,
    started: Duration,
    is_settled: bool,
}

impl MetricsLayer {
    pub(super) fn new(metrics: Arc<Metrics>, clock: Clock) -> Self {
        Self { metrics, clock }
    }
}

impl<S> Layer<S> for MetricsLayer {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted {
            inner,
            metrics: self.metrics.clone(),
            clock: self.clock.clone(),
        }
    }
}

impl<S> Service<Request> for Counted<S>
where
    S: Service<Request, Response = Response, Future: Send + 'static>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut pending = Pending {
            metrics: self.metrics.clone(),
            clock: self.clock.clone(),
            path: request.uri().path().to_owned(),
            started: self.clock.monotonic(),
            is_settled: false,
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let (answer, was_counted) = counting(answer).await;
            pending.is_settled = true;
            // An answer that is only a header and a status came from no stream: a handler's streams
            // count themselves.
            let ended = answer.as_ref().map_or(Some(Code::Internal), |answer| {
                Status::from_header_map(answer.headers()).map(|status| status.code().into())
            });
            let is_handlers = pending.path.starts_with("/holdfast.v1.") && ended.is_none();
            if !was_counted && !is_handlers {
                pending.count(ended.unwrap_or(Code::Ok));
            }
            answer
        })
    }
}

impl Pending {
    fn count(&self, code: Code) {
        self.metrics.request(
            &self.path,
            "",
            code,
            self.clock.monotonic().saturating_sub(self.started),
        );
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if !self.is_settled {
            self.count(Code::Cancelled);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tonic::body::Body;
    use tower::{ServiceBuilder, ServiceExt, service_fn};

    use super::*;

    fn request(path: &str) -> Request {
        http::Request::builder()
            .uri(path)
            .body(Body::empty())
            .unwrap()
    }

    fn layer(metrics: &Arc<Metrics>) -> MetricsLayer {
        MetricsLayer::new(metrics.clone(), Clock::system())
    }

    #[tokio::test]
    async fn what_reaches_no_handler_is_counted_and_nothing_twice() {
        let metrics = Arc::new(Metrics::new());
        let refused = service_fn(|_| async {
            Ok::<_, Infallible>(Status::unimplemented("").into_http::<Body>())
        });
        let stack = ServiceBuilder::new()
            .layer(layer(&metrics))
            .service(refused);
        stack
            .oneshot(request("/holdfast.v2.CacheService/Guess"))
            .await
            .unwrap();
        assert_eq!(
            metrics.requests_counted("other", "", Code::Unimplemented),
            1
        );

        let counter = metrics.clone();
        let handler = service_fn(move |_| {
            counter.request("Get", "MISS", Code::Ok, Duration::ZERO);
            async { Ok::<_, Infallible>(Response::new(Body::empty())) }
        });
        let handler = service_fn(move |request: Request| {
            let handler = handler.clone();
            async move { handler.oneshot(request).await }
        });
        let stack = ServiceBuilder::new()
            .layer(layer(&metrics))
            .service(handler);
        stack
            .oneshot(request("/holdfast.v1.CacheService/Get"))
            .await
            .unwrap();
        assert_eq!(metrics.requests_counted("Get", "MISS", Code::Ok), 1);
        assert_eq!(metrics.requests_counted("Get", "", Code::Ok), 0);
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_is_counted() {
        let metrics = Arc::new(Metrics::new());
        let never = service_fn(|_: Request| std::future::pending::<Result<Response, Infallible>>());
        let mut stack = ServiceBuilder::new().layer(layer(&metrics)).service(never);
        drop(stack.call(request("/holdfast.v1.CacheService/Set")));
        assert_eq!(metrics.requests_counted("Set", "", Code::Cancelled), 1);
    }
}
