//! Every request has a deadline: its caller's, in `grpc-timeout`, or the default.
//!
//! ```text
//! 0                         handler's     layer's   caller's
//! |------------------------------|-----------|---------|
//!                                | reserve/2 | reserve/2
//! ```
//! A handler's deadline is a little before the caller's, so that its answer, which knows what was
//! applied, still arrives. If it does not come, the layer answers, which can only say that it does
//! not know. Both are before the caller's own end.
//!
//! The time counts until the answer begins. A stream ends at the deadline by its handler's hand:
//! ending it from outside would cut a page in two.

use std::{
    collections::HashMap,
    task::{Context, Poll},
    time::Duration,
};

use holdfast_proto::{
    limits::{DEADLINE_DEFAULT, FETCH_TIMEOUT_MAX},
    reason, timeout,
};
use holdfast_raft::{Clock, Deadline};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service};

use super::{Answer, Request, Response, is_mutation};

/// The share of a call's time kept back for its answer, and the most of it.
const RESERVE_SHARE: u32 = 8;
const RESERVE_MAX: Duration = Duration::from_millis(50);
/// Nothing that is asked of us takes longer than the longest fetch.
const TIMEOUT_MAX: Duration = FETCH_TIMEOUT_MAX;

#[derive(Debug, Clone)]
pub struct DeadlineLayer {
    clock: Clock,
}

#[derive(Debug, Clone)]
pub struct Timed<S> {
    inner: S,
    clock: Clock,
}

/// By when a handler has to have answered: what this layer put into the extensions of the request,
/// else, on a listener without it, by what the caller says.
pub fn deadline_of<T>(request: &tonic::Request<T>, clock: &Clock) -> Deadline {
    match request.extensions().get::<Deadline>() {
        Some(deadline) => deadline.clone(),
        None => clock.deadline(
            timeout::remaining(request.metadata())
                .map_or(DEADLINE_DEFAULT, |given| given - reserve(given)),
        ),
    }
}

/// Kept back of what a caller gives.
fn reserve(given: Duration) -> Duration {
    (given / RESERVE_SHARE).min(RESERVE_MAX)
}

impl DeadlineLayer {
    pub(super) fn new(clock: Clock) -> Self {
        Self { clock }
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Timed<S>;

    fn layer(&self, inner: S) -> Timed<S> {
        Timed {
            inner,
            clock: self.clock.clone(),
        }
    }
}

impl<S> Service<Request> for Timed<S>
where
    S: Service<Request, Response = Response, Future: Send + 'static>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let timeout = timeout_of(&request);
        let reserve = reserve(timeout);
        let is_mutation = is_mutation(request.uri().path());
        request
            .extensions_mut()
            .insert(self.clock.deadline(timeout - reserve));
        let answer = self.inner.call(request);
        Box::pin(async move {
            match tokio::time::timeout(timeout - reserve / 2, answer).await {
                Ok(answer) => answer,
                Err(_) => Ok(passed(is_mutation).into_http()),
            }
        })
    }
}

/// Nobody counts the default but this node: the handler has all of it.
pub(super) fn timeout_of(request: &Request) -> Duration {
    named_timeout(request).unwrap_or(DEADLINE_DEFAULT + RESERVE_MAX)
}

fn named_timeout(request: &Request) -> Option<Duration> {
    let text = request.headers().get("grpc-timeout")?.to_str().ok()?;
    Some(timeout::parse(text)?.min(TIMEOUT_MAX))
}

fn passed(is_mutation: bool) -> Status {
    let applied: HashMap<String, String> = is_mutation
        .then(|| (reason::APPLIED.into(), reason::APPLIED_UNKNOWN.into()))
        .into_iter()
        .collect();
    let details = ErrorDetails::with_error_info(reason::DEADLINE, reason::DOMAIN, applied);
    Status::with_error_details(Code::DeadlineExceeded, "the deadline passed", details)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tonic::body::Body;
    use tower::{ServiceBuilder, ServiceExt, service_fn};

    use super::*;

    fn request(path: &str, timeout: Option<&str>) -> Request {
        let request = http::Request::builder().uri(path);
        let request = timeout.into_iter().fold(request, |request, timeout| {
            request.header("grpc-timeout", timeout)
        });
        request.body(Body::empty()).unwrap()
    }

    async fn given(timeout: Option<&str>) -> Duration {
        let handler = service_fn(|request: Request| async move {
            let left = request.extensions().get::<Deadline>().unwrap().left();
            let mut response = Response::new(Body::empty());
            response.extensions_mut().insert(left);
            Ok::<_, Infallible>(response)
        });
        let stack = ServiceBuilder::new()
            .layer(DeadlineLayer::new(Clock::system()))
            .service(handler);
        let response = stack
            .oneshot(request("/holdfast.v1.CacheService/Get", timeout))
            .await
            .unwrap();
        *response.extensions().get::<Duration>().unwrap()
    }

    #[tokio::test]
    async fn a_handler_is_given_a_little_less_than_its_caller_has() {
        let about = |timeout: Duration| timeout - timeout / 10..=timeout;
        assert!(about(Duration::from_millis(750)).contains(&given(Some("800m")).await));
        assert!(about(Duration::from_millis(70)).contains(&given(Some("80m")).await));
        assert!(about(DEADLINE_DEFAULT).contains(&given(None).await));
        assert!(about(DEADLINE_DEFAULT).contains(&given(Some("made up")).await));
        assert!(given(Some("99999999H")).await <= TIMEOUT_MAX);
    }

    #[tokio::test]
    async fn a_handler_that_does_not_answer_is_answered_for() {
        let never = service_fn(|_: Request| std::future::pending::<Result<Response, Infallible>>());
        for (path, applied) in [
            ("/holdfast.v1.CacheService/Set", Some("unknown")),
            ("/holdfast.v1.CacheService/Get", None),
        ] {
            let stack = ServiceBuilder::new()
                .layer(DeadlineLayer::new(Clock::system()))
                .service(never);
            let response = stack.oneshot(request(path, Some("50m"))).await.unwrap();
            let status = Status::from_header_map(response.headers()).unwrap();
            assert_eq!(status.code(), Code::DeadlineExceeded);
            let info = status.get_details_error_info().unwrap();
            assert_eq!(
                (
                    info.reason.as_str(),
                    info.metadata.get("applied").map(String::as_str)
                ),
                (reason::DEADLINE, applied)
            );
        }
    }
}
