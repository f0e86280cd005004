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

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use holdfast_proto::{
    limits::{DEADLINE_DEFAULT, FETCH_TIMEOUT_MAX, SCAN_MESSAGE_BYTES},
    reason, v1,
};
use holdfast_raft::{Clock, Deadline};
use prost::Message as _;

pub(crate) use self::load::{Full, Place};
pub use self::load::{Limits, Load};
use crate::{
    error::{Code, Error},
    methods::{Kind, Method},
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

/// What the wrapper asks of an answer.
pub trait Answered {
    /// As metrics name it; empty where an answer has none.
    fn state(&self) -> &'static str {
        ""
    }

    /// What it takes on its way, where that is bounded by more than the number of answers.
    fn bytes(&self) -> usize {
        0
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
        let work = self.parked_while_it_waits(work);
        let result = self.in_time(work).await.unwrap_or_else(Err);
        match &result {
            Ok(answer) => self.ended(Code::Ok, answer.state()),
            Err(error) => self.ended(error.code(), ""),
        }
        result
    }

    /// As `run`, for an answer that carries values. One that finds no room is let go, and read again
    /// when there is some: nothing is held for callers that do not take what they asked for.
    pub(crate) async fn run_read<T, F>(&self, read: impl Fn() -> F) -> Result<T, Error>
    where
        T: Answered,
        F: Future<Output = Result<T, Error>>,
    {
        let roomy = async {
            let answer = read().await?;
            let (place, bytes) = (self.call.place(), answer.bytes());
            let Some(place) = place.filter(|place| place.try_answer(bytes).is_err()) else {
                return Ok(answer);
            };
            drop(answer);
            let full = |Full| refused(self.method, "the answers in flight are too large together");
            let room = place.room_for_answer(bytes, &self.call.deadline);
            room.await.map_err(full)?;
            let answer = read().await?;
            let more = answer.bytes().saturating_sub(bytes);
            place.try_answer(more).map(|()| answer).map_err(full)
        };
        self.run(Box::pin(roomy)).await
    }

    /// A read that does not end at once waits for more than memory, and gives its place to those that
    /// need not.
    async fn parked_while_it_waits<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let mut work = std::pin::pin!(work);
        if let Poll::Ready(done) = futures::poll!(work.as_mut()) {
            return done;
        }
        let place = self.call.place().filter(|_| self.method.kind == Kind::Read);
        let parked = place.map(Place::park).transpose();
        let _parked =
            parked.map_err(|Full| refused(self.method, "too many requests wait already"))?;
        work.await
    }

    /// As `run`, for an answer in parts: counted when the last of them is taken.
    pub(crate) async fn run_stream<T: Answered + Send + 'static>(
        self: &Arc<Self>,
        work: impl Future<Output = Result<BoxStream<'static, Result<T, Error>>, Error>>,
    ) -> Result<BoxStream<'static, Result<T, Error>>, Error> {
        let work = self.parked_while_it_waits(work);
        let begun = self.in_time(work).await.unwrap_or_else(Err);
        let parts = begun.inspect_err(|error| self.ended(error.code(), ""))?;
        let operation = self.clone();
        let taken = stream::unfold(Some((parts, operation)), |state| async {
            let (mut parts, operation) = state?;
            match operation.next_part(&mut parts).await {
                Some(Ok(part)) => Some((Ok(part), Some((parts, operation)))),
                Some(Err(error)) => {
                    operation.ended(error.code(), "");
                    Some((Err(error), None))
                }
                None => {
                    operation.ended(Code::Ok, "");
                    None
                }
            }
        });
        Ok(taken.boxed())
    }

    /// Room comes first: nothing is read for a caller that does not take what was read before.
    async fn next_part<T: Answered>(
        &self,
        parts: &mut BoxStream<'static, Result<T, Error>>,
    ) -> Option<Result<T, Error>> {
        let Some(place) = self.call.place() else {
            return parts.next().await;
        };
        let full = |Full| refused(self.method, "the answers in flight are too large together");
        let room = place.room_for_answer(SCAN_MESSAGE_BYTES, &self.call.deadline);
        if let Err(error) = room.await.map_err(full) {
            return Some(Err(error));
        }
        let part = parts.next().await?;
        let bytes = part.as_ref().map_or(0, Answered::bytes);
        drop(place.answered(SCAN_MESSAGE_BYTES.saturating_sub(bytes)));
        let more = place.try_answer(bytes.saturating_sub(SCAN_MESSAGE_BYTES));
        Some(part.and_then(|part| more.map(|()| part).map_err(full)))
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

    fn bytes(&self) -> usize {
        self.encoded_len()
    }
}

impl Answered for v1::BatchGetResponse {
    fn bytes(&self) -> usize {
        self.encoded_len()
    }
}

impl Answered for v1::ScanResponse {
    fn bytes(&self) -> usize {
        self.encoded_len()
    }
}

impl Answered for v1::InspectResponse {}
impl Answered for v1::StatusResponse {}
impl Answered for v1::AddMemberResponse {}
impl Answered for v1::PromoteResponse {}
impl Answered for v1::RemoveResponse {}
impl Answered for v1::TransferLeaderResponse {}

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

    fn part() -> v1::ScanResponse {
        v1::ScanResponse::default()
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
        let parts =
            |parts: Vec<Result<v1::ScanResponse, Error>>| async { Ok(stream::iter(parts).boxed()) };

        let operation = begin(&operations, scan, None);
        let mut whole = operation.run_stream(parts(vec![Ok(part())])).await.unwrap();
        assert!(matches!(whole.next().await, Some(Ok(_))));
        assert_eq!(counted("", Code::Ok), 0);
        assert!(whole.next().await.is_none());
        assert_eq!(counted("", Code::Ok), 1);

        let operation = begin(&operations, scan, None);
        let broken = operation.run_stream(parts(vec![Ok(part()), Err(Error::deadline())]));
        let broken: Vec<_> = broken.await.unwrap().collect().await;
        assert_eq!(
            (broken.len(), counted("ERROR", Code::DeadlineExceeded)),
            (2, 1)
        );

        let operation = begin(&operations, scan, None);
        let left = operation.run_stream(parts(vec![Ok(part())])).await.unwrap();
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

    #[tokio::test]
    async fn a_read_that_waits_keeps_out_no_read_that_need_not() {
        let (operations, _) = operations(1);
        let reads = operations.load().room(Kind::Read);
        let operation = begin(&operations, GET, None);
        let (fetched, fetch) = tokio::sync::oneshot::channel::<()>();
        let waits = tokio::spawn(async move {
            let fetch = async {
                let _ = fetch.await;
                Ok(answer(v1::State::Fresh))
            };
            operation.run(fetch).await.map(|_| ())
        });
        while operations.load().waiting().taken() == 0 {
            tokio::task::yield_now().await;
        }
        assert_eq!(reads.taken(), 0);
        let hit = begin(&operations, GET, None);
        hit.run(async { Ok(answer(v1::State::Fresh)) })
            .await
            .unwrap();
        drop(hit);
        fetched.send(()).unwrap();
        waits.await.unwrap().unwrap();
        assert_eq!((reads.taken(), operations.load().waiting().taken()), (0, 0));
    }

    #[tokio::test]
    async fn an_answer_without_room_is_let_go_and_read_again_when_there_is_some() {
        let limits = Limits {
            answer_bytes: 1 << 20,
            ..Limits::default()
        };
        let operations = Operations::new(limits, Arc::new(Metrics::new()), Clock::system());
        let reads = std::cell::Cell::new(0);
        let read = || {
            reads.set(reads.get() + 1);
            async {
                let mut large = answer(v1::State::Fresh);
                large.answer.as_mut().unwrap().value = Some(vec![7; 1 << 19].into());
                Ok(large)
            }
        };
        let first = begin(&operations, GET, None);
        first.run_read(read).await.unwrap();
        assert_eq!(reads.get(), 1);

        let late = begin(&operations, GET, Some(Duration::from_millis(100)));
        let refused = late.run_read(read).await.unwrap_err();
        assert_eq!((refused.reason(), reads.get()), (reason::OVERLOADED, 2));

        let second = begin(&operations, GET, None);
        let waits = second.run_read(read);
        let frees = async {
            tokio::task::yield_now().await;
            drop(first);
        };
        let (answered, ()) = tokio::join!(waits, frees);
        answered.unwrap();
        assert_eq!(reads.get(), 4);
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
