//! What every door does around one operation of the rules: a place for it, a deadline, a count of
//! how it ended.
//!
//! ```text
//! door ─► begin: admitted or refused ─► run: the rules, until the deadline ─► counted once
//! ```
//! An operation is one question, however it came: a whole HTTP request, or one of many on a stream.
//! Promises that each is counted exactly once, whatever becomes of it, that no more are taken in
//! than this node can hold, and that each ends in time and says whether it was applied. Must never
//! know what is asked, or by which door.

mod load;
mod methods;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::{
    StreamExt as _, future,
    stream::{self, BoxStream},
};
use holdfast_proto::{
    limits::{DEADLINE_DEFAULT, FETCH_TIMEOUT_MAX},
    reason, v1,
};
use holdfast_raft::{Clock, Deadline};

pub(crate) use self::load::{Full, Place};
pub use self::{
    load::{Limits, Load},
    methods::{KINDS, Kind, METHODS, Method},
};
use crate::{
    error::{Code, Error},
    metrics::Metrics,
    serve::Caller,
};

/// The share of a caller's time kept back for the answer's way, and the most of it.
const RESERVE_SHARE: u32 = 8;
const RESERVE_MAX: Duration = Duration::from_millis(50);
/// Nothing that is asked of us takes longer than the longest fetch.
const TIMEOUT_MAX: Duration = FETCH_TIMEOUT_MAX;
/// An operator's change goes on by itself: nobody needs to wait for it so long that others cannot.
const OPERATOR_TIMEOUT_MAX: Duration = Duration::from_secs(60);

/// Begins operations. One per node.
#[derive(Debug)]
pub struct Operations {
    load: Arc<Load>,
    metrics: Arc<Metrics>,
    clock: Clock,
}

/// One operation under way. Whoever holds it keeps its place.
///
/// ```text
/// 0                           rules'      answer's   caller's
/// |------------------------------|-----------|---------|
///                                | reserve/2 | reserve/2
/// ```
/// The rules' deadline is a little before the caller's, so that their answer, which knows what was
/// applied, still arrives. If it does not come, the caller is told that nobody knows.
#[derive(Debug)]
pub struct Operation {
    method: &'static Method,
    metrics: Arc<Metrics>,
    clock: Clock,
    began: Duration,
    answer_by: Deadline,
    is_counted: AtomicBool,
    call: Call,
}

/// What the rules know of the operation that they answer.
#[derive(Debug, Clone)]
pub struct Call {
    pub deadline: Deadline,
    /// `None` for what another node asks, which has a place there.
    place: Option<Arc<Place>>,
}

/// What an answer is counted as, beside its method and code.
pub trait Answered {
    /// As metrics name it; empty where an answer has none.
    fn state(&self) -> &'static str {
        ""
    }
}

impl Operations {
    pub fn new(limits: Limits, metrics: Arc<Metrics>, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            load: Load::new(limits, clock.clone()),
            metrics,
            clock,
        })
    }

    pub(crate) fn load(&self) -> &Load {
        &self.load
    }

    /// Takes an operation in, or says why not. `timeout` as its caller named it.
    pub(crate) fn begin(
        &self,
        method: &'static Method,
        timeout: Option<Duration>,
        caller: Option<Caller>,
    ) -> Result<Arc<Operation>, Error> {
        let longest = match method.kind {
            Kind::Operator => OPERATOR_TIMEOUT_MAX,
            _ => TIMEOUT_MAX,
        };
        // Nobody counts the default but this node: the rules have all of it.
        let timeout = timeout
            .unwrap_or(DEADLINE_DEFAULT + RESERVE_MAX)
            .min(longest);
        let place = self
            .load
            .admit(method.kind, timeout, caller)
            .map_err(|Full| {
                self.metrics
                    .request(method, "ERROR", Code::ResourceExhausted, Duration::ZERO);
                refused(method, "too many requests are in flight")
            })?;
        let reserve = reserve(timeout);
        Ok(Arc::new(Operation {
            method,
            metrics: self.metrics.clone(),
            clock: self.clock.clone(),
            began: self.clock.monotonic(),
            answer_by: self.clock.deadline(timeout - reserve / 2),
            is_counted: AtomicBool::new(false),
            call: Call {
                deadline: self.clock.deadline(timeout - reserve),
                place: Some(Arc::new(place)),
            },
        }))
    }
}

impl Operation {
    pub(crate) fn method(&self) -> &'static Method {
        self.method
    }

    pub(crate) fn call(&self) -> &Call {
        &self.call
    }

    /// The answer of the rules, if it comes in time. Counts the operation.
    pub(crate) async fn run<T: Answered>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let result = self.in_time(work).await.unwrap_or_else(|late| Err(late));
        match &result {
            Ok(answer) => self.ended(Code::Ok, answer.state()),
            Err(error) => self.ended(error.code(), ""),
        }
        result
    }

    /// As `run`, for an answer in parts: counted when the last of them is taken.
    pub(crate) async fn run_stream<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<BoxStream<'static, Result<T, Error>>, Error>>,
    ) -> Result<BoxStream<'static, Result<T, Error>>, Error> {
        let begun = self.in_time(work).await.unwrap_or_else(|late| Err(late));
        let parts = begun.inspect_err(|error| self.ended(error.code(), ""))?;
        let operation = self.clone();
        let ending = stream::once(async { None });
        let counted = parts.map(Some).chain(ending).filter_map(move |part| {
            match &part {
                Some(Ok(_)) => {}
                Some(Err(error)) => operation.ended(error.code(), ""),
                None => operation.ended(Code::Ok, ""),
            }
            future::ready(part)
        });
        Ok(counted.boxed())
    }

    /// Waits no longer than the caller does.
    pub(crate) async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Error> {
        let ended = self.answer_by.limit(work).await;
        ended.map_err(|_| match self.method.is_mutation {
            true => Error::deadline().maybe_applied(),
            false => Error::deadline(),
        })
    }

    /// Counts it, with the state of its answer; what is said later does not count.
    pub(crate) fn ended(&self, code: Code, state: &'static str) {
        if !self.is_counted.swap(true, Ordering::Relaxed) {
            let took = self.clock.monotonic().saturating_sub(self.began);
            self.metrics.request(self.method, state, code, took);
        }
    }

    /// So many more bytes of the request have come.
    pub(crate) fn request_came(&self, bytes: usize) -> Result<(), Error> {
        let Some(place) = &self.call.place else {
            return Ok(());
        };
        place
            .request_came(bytes)
            .map_err(|Full| refused(self.method, "the requests in flight are too large together"))
    }
}

impl Drop for Operation {
    /// Its caller went away.
    fn drop(&mut self) {
        self.ended(Code::Cancelled, "");
    }
}

impl Call {
    /// What another node asks, which waits so long.
    pub(crate) fn of_peer(clock: &Clock, timeout: Duration) -> Self {
        Self {
            deadline: clock.deadline(timeout.saturating_sub(reserve(timeout))),
            place: None,
        }
    }

    pub(crate) fn place(&self) -> Option<&Place> {
        self.place.as_deref()
    }
}

/// Kept back of a caller's time.
fn reserve(timeout: Duration) -> Duration {
    (timeout / RESERVE_SHARE).min(RESERVE_MAX)
}

/// An operation that is refused here has not begun.
fn refused(method: &Method, message: &str) -> Error {
    let error = Error::new(reason::OVERLOADED, message);
    match method.is_mutation {
        true => error.not_applied(),
        false => error,
    }
}

impl Answered for v1::GetResponse {
    fn state(&self) -> &'static str {
        self.answer.as_ref().map_or("", |answer| {
            let name = answer.state().as_str_name();
            name.strip_prefix("STATE_").unwrap_or(name)
        })
    }
}

impl Answered for v1::BatchGetResponse {}
impl Answered for v1::InspectResponse {}
impl Answered for v1::StatusResponse {}
impl Answered for v1::AddMemberResponse {}
impl Answered for v1::PromoteResponse {}
impl Answered for v1::RemoveResponse {}
impl Answered for v1::TransferLeaderResponse {}

impl<T> Answered for crate::cache::Acknowledged<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: &str = "/holdfast.v1.CacheService/Get";
    const SET: &str = "/holdfast.v1.CacheService/Set";

    fn operations(reads: usize) -> (Arc<Operations>, Arc<Metrics>) {
        let metrics = Arc::new(Metrics::new());
        let limits = Limits {
            reads,
            ..Limits::default()
        };
        let operations = Operations::new(limits, metrics.clone(), Clock::system());
        (operations, metrics)
    }

    fn begin(operations: &Operations, path: &str, timeout: Option<Duration>) -> Arc<Operation> {
        operations.begin(Method::of(path), timeout, None).unwrap()
    }

    fn answer(state: v1::State) -> v1::GetResponse {
        v1::GetResponse {
            answer: Some(v1::Answer {
                state: state.into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_rules_are_given_a_little_less_than_the_caller_has() {
        let (operations, _) = operations(10);
        let given = |timeout| begin(&operations, GET, timeout).call().deadline.left();
        let about = |timeout: Duration| timeout - timeout / 10..=timeout;
        let millis = Duration::from_millis;
        assert!(about(millis(750)).contains(&given(Some(millis(800)))));
        assert!(about(millis(70)).contains(&given(Some(millis(80)))));
        assert!(about(DEADLINE_DEFAULT).contains(&given(None)));
        assert_eq!(given(Some(Duration::ZERO)), Duration::ZERO);
        assert!(given(Some(Duration::MAX)) <= TIMEOUT_MAX);
        let promote = begin(
            &operations,
            "/holdfast.v1.ClusterService/Promote",
            Some(Duration::MAX),
        );
        assert!(promote.call().deadline.left() <= OPERATOR_TIMEOUT_MAX);
    }

    #[tokio::test]
    async fn each_operation_is_counted_once_by_how_it_ended() {
        let (operations, metrics) = operations(1);
        let counted = |state, code| metrics.requests_counted("Get", state, code);

        let operation = begin(&operations, GET, None);
        let refused = operations.begin(Method::of(GET), None, None).unwrap_err();
        assert_eq!(refused.reason(), reason::OVERLOADED);
        assert_eq!(counted("ERROR", Code::ResourceExhausted), 1);
        let stale = async { Ok(answer(v1::State::StaleOnError)) };
        operation.run(stale).await.unwrap();
        operation.ended(Code::Internal, "");
        drop(operation);
        assert_eq!(counted("STALE_ON_ERROR", Code::Ok), 1);

        let operation = begin(&operations, GET, None);
        let failed = async { Err::<v1::GetResponse, _>(Error::no_leader()) };
        operation.run(failed).await.unwrap_err();
        drop(operation);
        assert_eq!(counted("ERROR", Code::Unavailable), 1);

        drop(begin(&operations, GET, None));
        assert_eq!(counted("ERROR", Code::Cancelled), 1);
        for other in [Code::Internal, Code::DeadlineExceeded] {
            assert_eq!(counted("ERROR", other), 0);
        }
    }

    #[tokio::test]
    async fn a_stream_is_counted_when_its_last_part_is_taken() {
        let (operations, metrics) = operations(10);
        let scan = "/holdfast.v1.CacheService/Scan";
        let counted = |state, code| metrics.requests_counted("Scan", state, code);
        let parts = |parts: Vec<Result<u8, Error>>| async { Ok(stream::iter(parts).boxed()) };

        let operation = begin(&operations, scan, None);
        let mut whole = Box::pin(operation.run_stream(parts(vec![Ok(1)])).await.unwrap());
        assert!(matches!(whole.next().await, Some(Ok(1))));
        assert_eq!(counted("", Code::Ok), 0);
        assert!(whole.next().await.is_none());
        assert_eq!(counted("", Code::Ok), 1);

        let operation = begin(&operations, scan, None);
        let broken = operation.run_stream(parts(vec![Ok(1), Err(Error::deadline())]));
        let broken: Vec<_> = broken.await.unwrap().collect().await;
        assert_eq!(
            (broken.len(), counted("ERROR", Code::DeadlineExceeded)),
            (2, 1)
        );

        let operation = begin(&operations, scan, None);
        let left = operation.run_stream(parts(vec![Ok(1)])).await.unwrap();
        drop((left, operation));
        assert_eq!(counted("ERROR", Code::Cancelled), 1);
    }

    #[tokio::test]
    async fn rules_that_do_not_answer_are_answered_for() {
        let (operations, _) = operations(10);
        for (path, applied) in [(SET, Some("unknown")), (GET, None)] {
            let operation = begin(&operations, path, Some(Duration::from_millis(40)));
            let never = std::future::pending::<Result<v1::GetResponse, Error>>();
            let error = operation.run(never).await.unwrap_err();
            assert_eq!(
                (error.reason(), error.metadata(reason::APPLIED)),
                (reason::DEADLINE, applied)
            );
        }
    }

    #[test]
    fn a_refused_write_was_not_applied() {
        let (operations, _) = operations(10);
        let writes = Limits::default().writes;
        let _all: Vec<_> = (0..writes).map(|_| begin(&operations, SET, None)).collect();
        let refused = operations.begin(Method::of(SET), None, None).unwrap_err();
        assert_eq!(refused.metadata(reason::APPLIED), Some("no"));
        assert!(operations.begin(Method::of(GET), None, None).is_ok());
    }
}
