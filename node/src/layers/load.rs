//! Refuses requests while too many, or too many bytes of them, are in flight. A refusal is at once
//! and cheap, and says that nothing was applied and when to come again.
//!
//! A request is in flight until the last byte of its answer is taken; its bytes are counted as they
//! arrive, because gRPC does not announce them. Probes and operators have a small lane of their
//! own, so that an overloaded node can be looked at; streams without an end have another, so that
//! they leave room in it.
//!
//! Who does not take its answer, long after its deadline, does not keep others out: its connection
//! is ended when its place is needed. Nothing less would do, since without an HTTP/2 window nobody
//! looks at the answer again.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use holdfast_proto::reason;
use holdfast_raft::Clock;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tonic::{Code, Status, body::Body};
use tonic_types::{ErrorDetails, StatusExt};
use tower::{Layer, Service};

use super::{Answer, Request, Response, deadline::timeout_of, is_mutation};
use crate::serve::Caller;

const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How long after its deadline a caller may take over its answer.
const TAKING_MAX: Duration = Duration::from_secs(5);

/// How much a node takes in at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub requests: usize,
    pub bytes: usize,
    /// Requests of probes and operators, beside the others.
    pub reserved: usize,
    /// Streams that have no end of their own.
    pub endless: usize,
}

/// What is in flight. One per node.
#[derive(Debug)]
pub struct Load {
    clock: Clock,
    bytes_max: usize,
    bytes: AtomicUsize,
    requests: Lane,
    reserved: Lane,
    endless: Lane,
}

#[derive(Debug, Clone)]
pub struct LoadLayer {
    load: Arc<Load>,
}

#[derive(Debug, Clone)]
pub struct Limited<S> {
    inner: S,
    load: Arc<Load>,
}

/// Which limit a request falls under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Request,
    Reserved,
    Endless,
}

#[derive(Debug)]
struct Lane {
    limit: usize,
    places: Mutex<Places>,
}

#[derive(Debug, Default)]
struct Places {
    taken: HashMap<u64, Place>,
    next: u64,
    /// Until then nobody is over.
    soonest: Duration,
}

/// What one request in flight holds.
#[derive(Debug)]
struct Place {
    /// On the monotonic clock; after it the place may be taken away.
    until: Duration,
    caller: Option<Caller>,
}

/// One request in flight: gives back what it took when the last that needs it is dropped.
#[derive(Debug)]
struct Admitted {
    load: Arc<Load>,
    kind: Kind,
    place: u64,
    bytes: AtomicUsize,
}

/// A body that keeps its request in flight, and counts its bytes if it is the caller's.
struct Held {
    body: Body,
    admitted: Arc<Admitted>,
    counts: bool,
    is_mutation: bool,
}

impl Default for Limits {
    /// As many endless streams as connections: a caller watches once.
    fn default() -> Self {
        Self {
            requests: 4096,
            bytes: 256 << 20,
            reserved: 64,
            endless: 10_000,
        }
    }
}

impl Load {
    pub fn new(limits: Limits, clock: Clock) -> Arc<Self> {
        let lane = |limit| Lane {
            limit,
            places: Mutex::default(),
        };
        let (requests, reserved, endless) = (
            lane(limits.requests),
            lane(limits.reserved),
            lane(limits.endless),
        );
        Arc::new(Self {
            clock,
            bytes_max: limits.bytes,
            bytes: AtomicUsize::new(0),
            requests,
            reserved,
            endless,
        })
    }

    /// Requests in flight.
    pub fn requests(&self) -> usize {
        [&self.requests, &self.reserved, &self.endless]
            .iter()
            .map(|lane| lane.places.lock().taken.len())
            .sum()
    }

    /// Bytes of requests in flight.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn lane(&self, kind: Kind) -> &Lane {
        match kind {
            Kind::Request => &self.requests,
            Kind::Reserved => &self.reserved,
            Kind::Endless => &self.endless,
        }
    }

    fn admit(self: &Arc<Self>, request: &Request) -> Option<Arc<Admitted>> {
        let kind = Kind::of(request.uri().path());
        if kind == Kind::Request && self.bytes() >= self.bytes_max {
            return None;
        }
        let now = self.clock.monotonic();
        let until = if kind == Kind::Endless {
            Duration::MAX
        } else {
            now + timeout_of(request) + TAKING_MAX
        };
        let place = self.lane(kind).take(
            now,
            Place {
                until,
                caller: request.extensions().get().cloned(),
            },
        )?;
        Some(Arc::new(Admitted {
            load: self.clone(),
            kind,
            place,
            bytes: AtomicUsize::new(0),
        }))
    }
}

impl Kind {
    fn of(path: &str) -> Self {
        let begins = |prefixes: &[&str]| prefixes.iter().any(|prefix| path.starts_with(prefix));
        match path {
            _ if begins(&["/grpc.health.v1.Health/Watch", "/grpc.reflection."]) => Self::Endless,
            _ if begins(&["/grpc.health.", "/holdfast.v1.ClusterService/"]) => Self::Reserved,
            _ => Self::Request,
        }
    }
}

impl Lane {
    /// `None` if the lane is full of requests that have their time left.
    fn take(&self, now: Duration, place: Place) -> Option<u64> {
        let mut places = self.places.lock();
        if places.taken.len() >= self.limit {
            places.clear(now);
        }
        if places.taken.len() >= self.limit {
            return None;
        }
        let number = places.next;
        places.next += 1;
        places.soonest = places.soonest.min(place.until);
        places.taken.insert(number, place);
        Some(number)
    }
}

impl Places {
    /// Ends the connections of those who do not take their answers.
    fn clear(&mut self, now: Duration) {
        // Looked through no more often than it can help: a refusal must cost next to nothing.
        if now < self.soonest {
            return;
        }
        for (_, over) in self.taken.extract_if(|_, place| place.until <= now) {
            if let Some(caller) = over.caller {
                tracing::info!("a connection is ended: its caller does not take its answer");
                caller.end();
            }
        }
        self.soonest = self
            .taken
            .values()
            .map(|place| place.until)
            .min()
            .unwrap_or(Duration::MAX);
    }
}

impl Admitted {
    /// Whether so many more bytes fit.
    fn take(&self, bytes: usize) -> bool {
        let limit = match self.kind {
            Kind::Request => self.load.bytes_max,
            // A probe's bytes must fit when the others' do not.
            Kind::Reserved => usize::MAX,
            // Each message is answered and gone, but the stream is not.
            Kind::Endless => return true,
        };
        let fits = take(&self.load.bytes, bytes, limit);
        if fits {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        fits
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.load
            .bytes
            .fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
        self.load
            .lane(self.kind)
            .places
            .lock()
            .taken
            .remove(&self.place);
    }
}

impl LoadLayer {
    pub(super) fn new(load: Arc<Load>) -> Self {
        Self { load }
    }
}

impl<S> Layer<S> for LoadLayer {
    type Service = Limited<S>;

    fn layer(&self, inner: S) -> Limited<S> {
        Limited {
            inner,
            load: self.load.clone(),
        }
    }
}

impl<S> Service<Request> for Limited<S>
where
    S: Service<Request, Response = Response, Future: Send + 'static>,
    S::Error: Send + 'static,
{
    type Response = Response;
    type Error = S::Error;
    type Future = Answer<S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let is_mutation = is_mutation(request.uri().path());
        let Some(admitted) = self.load.admit(&request) else {
            return Box::pin(std::future::ready(Ok(overloaded(
                "too many requests are in flight",
                is_mutation,
            )
            .into_http())));
        };
        let held = admitted.clone();
        let answer = self.inner.call(request.map(|body| {
            Body::new(Held {
                body,
                admitted,
                counts: true,
                is_mutation,
            })
        }));
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| {
                Body::new(Held {
                    body,
                    admitted: held,
                    counts: false,
                    is_mutation,
                })
            }))
        })
    }
}

impl http_body::Body for Held {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled
            && self.counts
            && let Some(data) = frame.data_ref()
            && !self.admitted.take(data.len())
        {
            return Poll::Ready(Some(Err(overloaded(
                "the requests in flight are too large together",
                self.is_mutation,
            ))));
        }
        polled
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

/// Adds if the sum stays within the limit.
fn take(count: &AtomicUsize, more: usize, limit: usize) -> bool {
    count
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
            now.checked_add(more).filter(|sum| *sum <= limit)
        })
        .is_ok()
}

/// A request that is refused here has reached no handler.
fn overloaded(message: &str, is_mutation: bool) -> Status {
    let applied: HashMap<String, String> = is_mutation
        .then(|| (reason::APPLIED.into(), reason::APPLIED_NO.into()))
        .into_iter()
        .collect();
    let mut details = ErrorDetails::with_error_info(reason::OVERLOADED, reason::DOMAIN, applied);
    details.set_retry_info(Some(RETRY_AFTER));
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::{BodyExt, Full};
    use tonic::transport::Endpoint;
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tower::{ServiceBuilder, ServiceExt, service_fn};

    use super::*;
    use crate::serve::{self, Bound, Connections, Protocol, Serving, Terms, Windows};

    const GET: &str = "/holdfast.v1.CacheService/Get";
    const SET: &str = "/holdfast.v1.CacheService/Set";
    const STATUS: &str = "/holdfast.v1.ClusterService/Status";

    fn request(path: &str, bytes: usize) -> Request {
        http::Request::builder()
            .uri(path)
            .body(Body::new(Full::new(Bytes::from(vec![0; bytes]))))
            .unwrap()
    }

    /// Reads the request and answers, or passes the body's error on as tonic's handlers do.
    async fn echo(request: Request) -> Result<Response, Infallible> {
        Ok(match request.into_body().collect().await {
            Ok(body) => Response::new(Body::new(Full::new(body.to_bytes()))),
            Err(status) => status.into_http(),
        })
    }

    fn refusal(response: &Response) -> Option<Status> {
        Status::from_header_map(response.headers())
    }

    #[tokio::test]
    async fn requests_beyond_the_limit_are_refused_at_once_until_one_ends() {
        let load = Load::new(
            Limits {
                requests: 1,
                bytes: 1024,
                reserved: 1,
                endless: 1,
            },
            Clock::system(),
        );
        let stack = ServiceBuilder::new()
            .layer(LoadLayer::new(load.clone()))
            .service(service_fn(echo));
        let first = stack.clone().oneshot(request(GET, 10)).await.unwrap();
        assert!(refusal(&first).is_none());
        assert_eq!(
            (load.requests(), load.bytes()),
            (1, 10),
            "an answer that nobody has read yet is in flight"
        );

        let refused = refusal(&stack.clone().oneshot(request(SET, 10)).await.unwrap()).unwrap();
        assert_eq!(refused.code(), Code::ResourceExhausted);
        let info = refused.get_details_error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.metadata["applied"].as_str()),
            (reason::OVERLOADED, "no")
        );
        assert_eq!(
            refused.get_details_retry_info().unwrap().retry_delay,
            Some(RETRY_AFTER)
        );

        drop(first);
        assert_eq!((load.requests(), load.bytes()), (0, 0));
        assert!(refusal(&stack.oneshot(request(GET, 10)).await.unwrap()).is_none());
    }

    #[tokio::test]
    async fn bytes_beyond_the_limit_are_refused_while_they_arrive() {
        let load = Load::new(
            Limits {
                requests: 10,
                bytes: 1024,
                reserved: 1,
                endless: 1,
            },
            Clock::system(),
        );
        let stack = ServiceBuilder::new()
            .layer(LoadLayer::new(load.clone()))
            .service(service_fn(echo));
        let _first = stack.clone().oneshot(request(SET, 1000)).await.unwrap();
        let second = stack.clone().oneshot(request(SET, 25)).await.unwrap();
        let status = refusal(&second).unwrap();
        assert_eq!(
            status.get_details_error_info().unwrap().reason,
            reason::OVERLOADED
        );
        drop(second);
        assert!(refusal(&stack.oneshot(request(SET, 24)).await.unwrap()).is_none());
        assert_eq!(load.bytes(), 1000);
    }

    #[tokio::test]
    async fn an_overloaded_node_can_be_looked_at() {
        let load = Load::new(
            Limits {
                requests: 1,
                bytes: 1,
                reserved: 1,
                endless: 1,
            },
            Clock::system(),
        );
        let stack = ServiceBuilder::new()
            .layer(LoadLayer::new(load))
            .service(service_fn(echo));
        let _held = stack.clone().oneshot(request(GET, 1)).await.unwrap();
        assert!(refusal(&stack.clone().oneshot(request(GET, 1)).await.unwrap()).is_some());
        let _looked = stack.clone().oneshot(request(STATUS, 5)).await.unwrap();
        assert!(refusal(&_looked).is_none());
        assert!(
            refusal(&stack.oneshot(request(STATUS, 5)).await.unwrap()).is_some(),
            "the lane is bounded too"
        );
    }

    #[tokio::test]
    async fn what_is_given_up_takes_no_room() {
        let load = Load::new(
            Limits {
                requests: 1,
                bytes: 1024,
                reserved: 1,
                endless: 1,
            },
            Clock::system(),
        );
        let never = service_fn(|_: Request| std::future::pending::<Result<Response, Infallible>>());
        let mut stack = ServiceBuilder::new()
            .layer(LoadLayer::new(load.clone()))
            .service(never);
        let call = stack.call(request(GET, 10));
        assert_eq!(load.requests(), 1);
        drop(call);
        assert_eq!(load.requests(), 0);
    }

    #[tokio::test]
    async fn streams_without_an_end_leave_room_for_operators() {
        let load = Load::new(
            Limits {
                requests: 1,
                bytes: 1024,
                reserved: 1,
                endless: 2,
            },
            Clock::system(),
        );
        let stack = ServiceBuilder::new()
            .layer(LoadLayer::new(load.clone()))
            .service(service_fn(echo));
        let reflection = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
        let _watched = [
            stack
                .clone()
                .oneshot(request("/grpc.health.v1.Health/Watch", 5))
                .await
                .unwrap(),
            stack.clone().oneshot(request(reflection, 5)).await.unwrap(),
        ];
        let looked = stack.clone().oneshot(request(STATUS, 5)).await.unwrap();
        assert!(refusal(&looked).is_none());
        assert!(
            refusal(&stack.clone().oneshot(request(reflection, 5)).await.unwrap()).is_some(),
            "they are bounded too"
        );
        assert_eq!(
            load.bytes(),
            5,
            "what a stream said is not in flight as long as the stream"
        );
    }

    /// A node's listener with room for one answer, and an answer for every call.
    async fn listening(clock: Clock) -> (String, Serving) {
        let bound = Bound::bind("clients", "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = format!("http://{}", bound.address());
        let load = Load::new(
            Limits {
                requests: 1,
                bytes: 1024,
                reserved: 1,
                endless: 1,
            },
            clock.clone(),
        );
        let (_, health) = tonic_health::server::health_reporter();
        let windows = Windows {
            stream: 1 << 20,
            connection: 1 << 20,
        };
        let service = ServiceBuilder::new()
            .map_request(|request: http::Request<hyper::body::Incoming>| request.map(Body::new))
            .layer(LoadLayer::new(load))
            .service(tonic::service::Routes::new(health).prepare());
        let terms = Terms {
            listener: "test",
            connections_max: 10,
            descriptors_max: u64::MAX,
            idle: Duration::from_secs(600),
            busy: None,
        };
        let (listener, known) = (bound.open().unwrap(), Connections::new(terms, clock));
        let serving = Serving::start(|drain, close| {
            serve::serve(
                listener,
                Protocol::Http2(windows),
                known,
                service,
                (drain, close),
            )
        });
        (address, serving)
    }

    #[tokio::test]
    async fn who_does_not_take_an_answer_long_after_its_deadline_makes_room() {
        let clock = Clock::system();
        let (address, serving) = listening(clock.clone()).await;
        let check = |endpoint: Endpoint| async move {
            let mut client = HealthClient::new(endpoint.connect().await.unwrap());
            client
                .check(HealthCheckRequest::default())
                .await
                .map(|_| ())
                .map_err(|status| status.code())
        };
        let endpoint = Endpoint::from_shared(address).unwrap();
        let windowless = endpoint.clone().initial_stream_window_size(0);
        let never_takes = tokio::spawn(async move {
            loop {
                let ended = check(windowless.clone()).await;
                if ended != Err(Code::ResourceExhausted) {
                    return ended;
                }
            }
        });
        // It holds the lane once others are refused; its own time is not over.
        while check(endpoint.clone()).await.is_ok() {}
        clock.advance(Duration::from_secs(9));
        assert_eq!(check(endpoint.clone()).await, Err(Code::ResourceExhausted));
        clock.advance(Duration::from_secs(2));
        assert_eq!(check(endpoint.clone()).await, Ok(()));
        let ended = tokio::time::timeout(Duration::from_secs(20), never_takes)
            .await
            .expect("its connection ends");
        assert!(ended.unwrap().is_err());
        serving.stop(Duration::ZERO).await;
    }
}
