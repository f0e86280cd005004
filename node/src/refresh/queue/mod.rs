//! The flights of one upstream on this node: at most one per key and term, each with a slot or
//! waiting for one.
//!
//! Promises that who joins a key's flight and who starts it agree on which it is; that a flight
//! which ends makes room for the next; and that one without a slot ends with the last reader that
//! needs it. Must never know what a flight does.

mod slots;

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{Key, ShardId};
use holdfast_raft::{Clock, Replica};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::sync::CancellationToken;
use tracing::Span;

pub(crate) use self::slots::Priority;
use self::slots::{Entered, Slots};
use super::{
    backlog::UpstreamBacklog,
    gate::Gate,
    marks::own_key,
    outcome::{FetchOutcome, Need},
    waiter::{Reporter, Waiter},
};

/// Readers of this node that wait for one upstream: with all slots of all nodes taken there are
/// some 10,000 flights to wait for.
const READERS_MAX: usize = 12_000;
/// How much one fetch moves what is usual.
const USUAL_WEIGHT: u64 = 8;

/// What this node has to do with one upstream; it lives as long as the node, whatever the rules.
pub(crate) struct Queue {
    upstream: Arc<str>,
    pub(crate) gate: Gate,
    /// One permit for each reader of this node that waits for this upstream.
    readers: Semaphore,
    clock: Clock,
    /// What a fetch usually takes, in microseconds; 0 before the first.
    usual_fetch_us: AtomicU64,
    /// Flights, for who only wants to know that there are none.
    count: AtomicU64,
    flights: Mutex<Flights>,
}

/// One fetch, for everybody who waits for the key.
pub(crate) struct Flight {
    pub(crate) key: Key,
    pub(crate) replica: Arc<Replica>,
    pub(crate) term: u64,
    pub(crate) span: Span,
    /// On the monotonic clock.
    since: Duration,
    /// Some reader has no value: it is fetched though nothing is stored.
    is_missed: AtomicBool,
    /// Some reader wants to know what the upstream says, whatever is stored.
    is_wanted_anew: AtomicBool,
    /// It was wanted again since its round began.
    is_wanted_again: AtomicBool,
    reporter: Reporter,
    ended: CancellationToken,
}

/// What came of wanting a key fetched.
pub(crate) struct Joined {
    /// For who wants to wait; `None` if too much waits already.
    pub(crate) waiter: Option<Waiter>,
    /// There was such a flight already.
    pub(crate) is_joined: bool,
    /// For the caller to start.
    pub(crate) ready: Vec<Ready>,
}

/// What follows when a flight has left.
pub(crate) struct Left {
    /// For the caller to start.
    pub(crate) ready: Vec<Ready>,
    /// Somebody joined it since its last round began: the key may have changed after that.
    pub(crate) is_wanted_again: bool,
}

/// A flight that has a slot.
pub(crate) struct Ready {
    pub(crate) flight: Arc<Flight>,
    pub(crate) priority: Priority,
}

#[derive(Default)]
struct Flights {
    by_key: HashMap<Key, Arc<Flight>>,
    slots: Slots,
}

impl Queue {
    pub(crate) fn new(upstream: &str, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            upstream: upstream.into(),
            gate: Gate::default(),
            readers: Semaphore::new(READERS_MAX),
            clock,
            usual_fetch_us: AtomicU64::new(0),
            count: AtomicU64::new(0),
            flights: Mutex::default(),
        })
    }

    pub(crate) fn upstream(&self) -> &str {
        &self.upstream
    }

    /// A place to wait in; `None` if too many readers wait for this upstream.
    pub(crate) fn place(&self) -> Option<SemaphorePermit<'_>> {
        self.readers.try_acquire().ok()
    }

    pub(crate) fn usual_fetch(&self) -> Duration {
        Duration::from_micros(self.usual_fetch_us.load(Ordering::Relaxed))
    }

    /// A moving average. Two at once may lose one: it is an estimate.
    pub(crate) fn fetch_took(&self, took: Duration) {
        let took = u64::try_from(took.as_micros())
            .unwrap_or(u64::MAX / USUAL_WEIGHT)
            .min(u64::MAX / USUAL_WEIGHT);
        let usual = match self.usual_fetch_us.load(Ordering::Relaxed) {
            0 => took,
            usual => (usual * (USUAL_WEIGHT - 1) + took) / USUAL_WEIGHT,
        };
        self.usual_fetch_us.store(usual, Ordering::Relaxed);
    }

    /// Joins the flight of a key in this term, or starts it. One of an earlier term has lost its
    /// claim.
    pub(crate) fn join(
        self: &Arc<Self>,
        key: &Key,
        replica: &Arc<Replica>,
        term: u64,
        priority: Priority,
        need: Need,
    ) -> Joined {
        let now = self.clock.monotonic();
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.by_key.get(key).filter(|flight| flight.term == term) {
            let flight = flight.clone();
            flight.is_wanted_as(priority, need);
            flight.is_wanted_again.store(true, Ordering::Relaxed);
            flights.slots.promote(key, priority, now);
            return Joined {
                waiter: Some(self.waiter(&flight)),
                is_joined: true,
                ready: flights.ready(now),
            };
        }
        flights.end(key, &FetchOutcome::NotLeading);
        // A reader's key is a slice of its whole message, which must not live as long as the
        // flight.
        let key = own_key(key).unwrap_or_else(|| key.clone());
        let flight = Arc::new(Flight::new(key, replica.clone(), term, &self.upstream, now));
        flight.is_wanted_as(priority, need);
        let started = flights.start(flight.clone(), priority, now);
        self.count(&flights);
        Joined {
            waiter: started.is_some().then(|| self.waiter(&flight)),
            is_joined: false,
            ready: started.unwrap_or_default(),
        }
    }

    /// A flight that ran has ended.
    pub(crate) fn leave(&self, flight: &Arc<Flight>, priority: Priority) -> Left {
        let now = self.clock.monotonic();
        let mut flights = self.flights.lock();
        if flights
            .by_key
            .get(&flight.key)
            .is_some_and(|known| Arc::ptr_eq(known, flight))
        {
            flights.by_key.remove(&flight.key);
        }
        flights.slots.leave(priority);
        let ready = flights.ready(now);
        self.count(&flights);
        Left {
            ready,
            is_wanted_again: flight.is_wanted_again.load(Ordering::Relaxed),
        }
    }

    /// Ends a shard's flights of all terms but one.
    pub(crate) fn end_all_but(&self, shard: ShardId, term: Option<u64>) {
        if self.is_idle() {
            return;
        }
        let mut flights = self.flights.lock();
        let ended =
            |flight: &&Arc<Flight>| flight.replica.shard() == shard && Some(flight.term) != term;
        let keys: Vec<Key> = flights
            .by_key
            .values()
            .filter(ended)
            .map(|flight| flight.key.clone())
            .collect();
        for key in keys {
            flights.end(&key, &FetchOutcome::NotLeading);
        }
        self.count(&flights);
    }

    pub(crate) fn backlog(&self) -> UpstreamBacklog {
        let flights = self.flights.lock();
        UpstreamBacklog {
            upstream: self.upstream.to_string(),
            flights_running: flights.slots.running(),
            flights_waiting: flights.slots.waiting(),
            readers_waiting: READERS_MAX.saturating_sub(self.readers.available_permits()),
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// When the key's flight began, on the monotonic clock; `None` without one.
    pub(crate) fn in_flight_since(&self, key: &[u8]) -> Option<Duration> {
        if self.is_idle() {
            return None;
        }
        let flights = self.flights.lock();
        flights.by_key.get(key).map(|flight| flight.since)
    }

    fn waiter(self: &Arc<Self>, flight: &Arc<Flight>) -> Waiter {
        let (queue, waited_for) = (self.clone(), flight.clone());
        flight.reporter.waiter(move || queue.left(&waited_for))
    }

    /// One who waited is gone: if it was the last who needed a flight, and that has no slot, nobody
    /// misses it. A refresh needs no reader.
    fn left(&self, flight: &Arc<Flight>) {
        if !flight.is_missed() || flight.reporter.has_waiters() {
            return;
        }
        let mut flights = self.flights.lock();
        let is_current = flights
            .by_key
            .get(&flight.key)
            .is_some_and(|known| Arc::ptr_eq(known, flight));
        if is_current && !flight.reporter.has_waiters() && flights.slots.withdraw(&flight.key) {
            flights.by_key.remove(&flight.key);
            flight.end(FetchOutcome::Overloaded);
        }
        self.count(&flights);
    }

    fn count(&self, flights: &Flights) {
        self.count
            .store(flights.by_key.len() as u64, Ordering::Relaxed);
    }
}

impl Flights {
    /// Says which can run now; `None` if too much waits already.
    fn start(
        &mut self,
        flight: Arc<Flight>,
        priority: Priority,
        now: Duration,
    ) -> Option<Vec<Ready>> {
        let mut ready = Vec::new();
        match self.slots.enter(&flight.key, priority, now) {
            Entered::Refused => return None,
            Entered::Runs => ready.push(Ready {
                flight: flight.clone(),
                priority,
            }),
            Entered::Waits { instead_of } => {
                // One that was dropped only waited: nobody has heard of it yet.
                if let Some(dropped) = instead_of.and_then(|key| self.by_key.remove(&key)) {
                    dropped.end(FetchOutcome::Overloaded);
                }
            }
        }
        self.by_key.insert(flight.key.clone(), flight);
        Some(ready)
    }

    /// One that runs gives its slot back when it has ended.
    fn end(&mut self, key: &Key, outcome: &FetchOutcome) {
        if let Some(flight) = self.by_key.remove(key) {
            self.slots.withdraw(key);
            flight.end(outcome.clone());
        }
    }

    fn ready(&mut self, now: Duration) -> Vec<Ready> {
        while let Some(key) = self.slots.expired(now) {
            self.end(&key, &FetchOutcome::Overloaded);
        }
        let mut ready = Vec::new();
        while let Some((key, priority)) = self.slots.next() {
            match self.by_key.get(&key) {
                Some(flight) => ready.push(Ready {
                    flight: flight.clone(),
                    priority,
                }),
                None => self.slots.leave(priority),
            }
        }
        ready
    }
}

impl Flight {
    /// In the caller's span: what is fetched for a request shows in its trace.
    fn new(key: Key, replica: Arc<Replica>, term: u64, upstream: &str, since: Duration) -> Self {
        let span = tracing::info_span!("refresh.fetch", upstream, shard = replica.shard());
        Self {
            key,
            replica,
            term,
            span,
            since,
            is_missed: AtomicBool::new(false),
            is_wanted_anew: AtomicBool::new(false),
            is_wanted_again: AtomicBool::new(false),
            reporter: Reporter::default(),
            ended: CancellationToken::new(),
        }
    }

    /// It may report more than once, each later outcome better.
    pub(crate) fn report(&self, outcome: FetchOutcome) {
        self.reporter.report(outcome);
    }

    /// From outside: it must not go on.
    pub(crate) fn end(&self, outcome: FetchOutcome) {
        self.report(outcome);
        self.ended.cancel();
    }

    /// Resolves when it was ended from outside.
    pub(crate) async fn ended(&self) {
        self.ended.cancelled().await;
    }

    pub(crate) fn is_missed(&self) -> bool {
        self.is_missed.load(Ordering::Relaxed)
    }

    pub(crate) fn called(&self) {
        self.reporter.called();
    }

    /// A round begins: whoever wanted the key so far is served by it.
    pub(crate) fn round_begins(&self) {
        // Before the round looks at the state, which an exchange makes sure of.
        self.is_wanted_again.swap(false, Ordering::AcqRel);
    }

    pub(crate) fn need(&self) -> Need {
        match self.is_wanted_anew.load(Ordering::Relaxed) {
            true => Need::Anew,
            false => Need::IfDue,
        }
    }

    fn is_wanted_as(&self, priority: Priority, need: Need) {
        if priority == Priority::Miss {
            self.is_missed.store(true, Ordering::Relaxed);
        }
        if need == Need::Anew {
            self.is_wanted_anew.store(true, Ordering::Relaxed);
        }
    }
}
