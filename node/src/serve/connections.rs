//! The connections of one listener: how many there may be, and which of them are over.
//!
//! ```text
//! accepted ── first request ──── idle ─────────── asked to leave ── ended
//!     └── 10 s without one ──────────────────────────┘      └ 5 s ┘
//! ```
//! Who asks nothing makes room for who comes: where there is none left, the connection that has been
//! idle for longest ends. Must never know what is asked.

use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use holdfast_raft::Clock;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

/// From the start of a connection to its first request.
const FIRST_REQUEST: Duration = Duration::from_secs(10);
/// For those that were asked to leave.
const LEAVING: Duration = Duration::from_secs(5);

/// What a listener allows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    /// For logs and metrics: `client`.
    pub(crate) listener: &'static str,
    pub(crate) connections_max: usize,
    /// Descriptors of the process from which on it takes no connection.
    pub(crate) descriptors_max: u64,
    /// How long a connection may stay that asks nothing.
    pub(crate) idle: Duration,
    /// How long a request may go on without another one; `None` where some have no end.
    pub(crate) busy: Option<Duration>,
}

/// All connections of one listener.
#[derive(Debug)]
pub(crate) struct Connections {
    terms: Terms,
    clock: Clock,
    open: Mutex<HashMap<u64, Arc<State>>>,
    accepted: AtomicU64,
    refused: AtomicU64,
    is_refusing: AtomicBool,
}

/// Who is at the other end of a connection. In the extensions of every request.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    state: Arc<State>,
    /// Takes the connection off the list when the last that knows it is gone.
    _listed: Arc<Listed>,
}

#[derive(Debug)]
struct State {
    leave: CancellationToken,
    end: CancellationToken,
    requests: AtomicU64,
    in_flight: AtomicUsize,
    /// Operations under way, which one request may have many of.
    operations: AtomicUsize,
    /// When a request last began or ended, or the connection was made.
    active_ms: AtomicU64,
    clock: Clock,
}

#[derive(Debug)]
struct Listed {
    number: u64,
    connections: Arc<Connections>,
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Stays,
    Leaves,
    Ends,
}

/// A request in flight, until the last byte of its answer is taken or nobody takes it any more.
#[derive(Debug)]
pub(super) struct InFlight(Caller);

/// An answer's body that keeps its request in flight.
#[derive(Debug)]
pub(super) struct Answer<B> {
    body: B,
    _in_flight: InFlight,
}

impl Connections {
    pub(crate) fn new(terms: Terms, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            terms,
            clock,
            open: Mutex::default(),
            accepted: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            is_refusing: AtomicBool::new(false),
        })
    }

    pub(crate) fn listener(&self) -> &'static str {
        self.terms.listener
    }

    pub(crate) fn count(&self) -> usize {
        self.open.lock().len()
    }

    /// Connections that found no room.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Takes a new connection in, if there is room. The kernel gives the least descriptor that is
    /// free: so many are open at least.
    pub(crate) fn admit(
        self: &Arc<Self>,
        descriptor: i32,
        close: &CancellationToken,
    ) -> Option<Caller> {
        let descriptors = u64::try_from(descriptor).unwrap_or(u64::MAX);
        let mut open = self.open.lock();
        let is_full = open.len() >= self.terms.connections_max;
        if is_full || descriptors >= self.terms.descriptors_max {
            // Its room is free in a moment, for the next one.
            if let Some(idlest) = idlest(open.values()) {
                idlest.end.cancel();
            }
            self.refused.fetch_add(1, Ordering::Relaxed);
            if !self.is_refusing.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    listener = self.terms.listener,
                    connections = open.len(),
                    descriptors,
                    "no room for more connections"
                );
            }
            return None;
        }
        self.is_refusing.store(false, Ordering::Relaxed);
        let number = self.accepted.fetch_add(1, Ordering::Relaxed);
        let state = Arc::new(State {
            leave: CancellationToken::new(),
            end: close.child_token(),
            requests: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            operations: AtomicUsize::new(0),
            active_ms: AtomicU64::new(self.clock.monotonic_ms()),
            clock: self.clock.clone(),
        });
        open.insert(number, state.clone());
        let listed = Listed {
            number,
            connections: self.clone(),
        };
        Some(Caller {
            state,
            _listed: Arc::new(listed),
        })
    }

    /// Ends what is over.
    pub(super) fn sweep(&self) {
        for state in self.open.lock().values() {
            match state.verdict(&self.terms) {
                Verdict::Stays => {}
                Verdict::Leaves => state.leave.cancel(),
                Verdict::Ends => state.end.cancel(),
            }
        }
    }
}

/// The one that has asked nothing for longest; `None` if all wait for an answer.
fn idlest<'a>(open: impl Iterator<Item = &'a Arc<State>>) -> Option<&'a Arc<State>> {
    open.filter(|state| state.in_flight.load(Ordering::Relaxed) == 0 && !state.end.is_cancelled())
        .min_by_key(|state| state.active_ms.load(Ordering::Relaxed))
}

impl State {
    fn verdict(&self, terms: &Terms) -> Verdict {
        let inactive = self.inactive();
        if self.in_flight.load(Ordering::Relaxed) > 0 {
            return match terms.busy {
                Some(busy) if inactive >= busy => Verdict::Ends,
                _ => Verdict::Stays,
            };
        }
        let patience = match self.requests.load(Ordering::Relaxed) {
            0 => FIRST_REQUEST,
            _ => terms.idle,
        };
        match inactive {
            inactive if inactive >= patience + LEAVING => Verdict::Ends,
            inactive if inactive >= patience => Verdict::Leaves,
            _ => Verdict::Stays,
        }
    }

    fn inactive(&self) -> Duration {
        let since = self.active_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.clock.monotonic_ms().saturating_sub(since))
    }

    fn is_active(&self) {
        self.active_ms
            .store(self.clock.monotonic_ms(), Ordering::Relaxed);
    }
}

impl Caller {
    /// Ends its connection, and with it all that it asked for.
    pub(crate) fn end(&self) {
        self.state.end.cancel();
    }

    pub(crate) fn operations(&self) -> usize {
        self.state.operations.load(Ordering::Relaxed)
    }

    pub(crate) fn operation_began(&self) {
        self.state.operations.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn operation_ended(&self) {
        self.state.operations.fetch_sub(1, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn is_ended(&self) -> bool {
        self.state.end.is_cancelled()
    }

    pub(super) async fn ended(&self) {
        self.state.end.cancelled().await;
    }

    /// It has been idle for too long: it should go when it has its answers.
    pub(super) async fn asked_to_leave(&self) {
        self.state.leave.cancelled().await;
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.connections.open.lock().remove(&self.number);
    }
}

impl InFlight {
    pub(super) fn of(caller: Caller) -> Self {
        caller.state.requests.fetch_add(1, Ordering::Relaxed);
        caller.state.in_flight.fetch_add(1, Ordering::Relaxed);
        caller.state.is_active();
        Self(caller)
    }

    /// It is in flight as long as this body.
    pub(super) fn holds<B>(self, body: B) -> Answer<B> {
        Answer {
            body,
            _in_flight: self,
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let Caller { state, .. } = &self.0;
        state.is_active();
        state.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answer<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms = Terms {
        listener: "test",
        connections_max: 2,
        descriptors_max: 100,
        idle: Duration::from_secs(300),
        busy: Some(Duration::from_secs(60)),
    };

    fn connections() -> (Arc<Connections>, Clock) {
        let clock = Clock::system();
        (Connections::new(TERMS, clock.clone()), clock)
    }

    fn admit(connections: &Arc<Connections>) -> Option<Caller> {
        connections.admit(7, &CancellationToken::new())
    }

    fn verdict(caller: &Caller) -> Verdict {
        caller.state.verdict(&TERMS)
    }

    #[test]
    fn who_asks_nothing_in_10_s_leaves_and_ends_soon_after() {
        let (connections, clock) = connections();
        let caller = admit(&connections).unwrap();
        assert_eq!(verdict(&caller), Verdict::Stays);
        clock.advance(FIRST_REQUEST);
        assert_eq!(verdict(&caller), Verdict::Leaves);
        connections.sweep();
        assert!(caller.state.leave.is_cancelled() && !caller.state.end.is_cancelled());
        clock.advance(LEAVING);
        connections.sweep();
        assert!(caller.state.end.is_cancelled());
    }

    #[test]
    fn who_asked_may_be_idle_for_longer_and_who_waits_is_not_idle() {
        let (connections, clock) = connections();
        let caller = admit(&connections).unwrap();
        let request = InFlight::of(caller.clone());
        clock.advance(Duration::from_secs(59));
        assert_eq!(verdict(&caller), Verdict::Stays);
        clock.advance(Duration::from_secs(1));
        assert_eq!(verdict(&caller), Verdict::Ends, "nobody asks for so long");
        let endless = Terms {
            busy: None,
            ..TERMS
        };
        assert_eq!(caller.state.verdict(&endless), Verdict::Stays);
        drop(request);
        clock.advance(Duration::from_secs(299));
        assert_eq!(verdict(&caller), Verdict::Stays);
        clock.advance(Duration::from_secs(1));
        assert_eq!(verdict(&caller), Verdict::Leaves);
    }

    #[test]
    fn a_full_listener_ends_its_idlest_connection_and_none_that_waits() {
        let (connections, clock) = connections();
        let first = admit(&connections).unwrap();
        clock.advance(Duration::from_secs(1));
        let second = admit(&connections).unwrap();
        let _waits = InFlight::of(first.clone());
        assert!(admit(&connections).is_none());
        assert_eq!((connections.count(), connections.refused()), (2, 1));
        assert!(second.state.end.is_cancelled() && !first.state.end.is_cancelled());
        drop(second);
        assert!(admit(&connections).is_some());
    }

    #[test]
    fn the_last_descriptors_are_not_for_connections() {
        let (connections, _) = connections();
        let close = CancellationToken::new();
        assert!(connections.admit(99, &close).is_some());
        assert!(connections.admit(100, &close).is_none());
        assert_eq!(connections.count(), 0, "the first one is gone");
    }
}
