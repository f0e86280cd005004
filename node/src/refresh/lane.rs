//! The flights of one upstream on this node: at most one per key and term, each with a slot or
//! waiting for one.
//!
//! Promises that who joins a key's flight and who starts it agree on which it is, and that a flight
//! which ends makes room for the next. Must never know what a flight does.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{Key, ShardId};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::{
    flight::{Answer, Flight},
    marks::own_key,
    slots::{Entered, Priority, Slots},
};
use crate::upstream::Upstream;

/// How much one fetch moves what is usual.
const USUAL_WEIGHT: u64 = 8;

pub(crate) struct Lane {
    upstream: Arc<Upstream>,
    /// What a fetch usually takes, in microseconds; 0 before the first.
    usual_fetch_us: AtomicU64,
    /// Flights, for who only wants to know that there are none.
    count: AtomicU64,
    board: Mutex<Board>,
}

/// What came of wanting a key fetched.
pub(crate) struct Boarded {
    /// `None` if too much waits already.
    pub(crate) answers: Option<watch::Receiver<Option<Answer>>>,
    /// There was such a flight already.
    pub(crate) is_joined: bool,
    /// To be set off by the caller.
    pub(crate) departures: Vec<Departure>,
}

/// A flight that has a slot.
pub(crate) struct Departure {
    pub(crate) flight: Arc<Flight>,
    pub(crate) priority: Priority,
}

#[derive(Default)]
struct Board {
    flights: HashMap<Key, Arc<Flight>>,
    slots: Slots,
}

impl Lane {
    pub(crate) fn new(upstream: Arc<Upstream>) -> Self {
        Self {
            upstream,
            usual_fetch_us: AtomicU64::new(0),
            count: AtomicU64::new(0),
            board: Mutex::default(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        self.upstream.name()
    }

    pub(crate) fn upstream(&self) -> &Upstream {
        &self.upstream
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
    pub(crate) fn board(
        &self,
        key: &Key,
        term: u64,
        priority: Priority,
        start: impl FnOnce(Key) -> Flight,
    ) -> Boarded {
        let mut board = self.board.lock();
        if let Some(flight) = board.flights.get(key).filter(|flight| flight.term == term) {
            flight.wanted(priority);
            let answers = Some(flight.subscribe());
            board.slots.promote(key, priority);
            return Boarded {
                answers,
                is_joined: true,
                departures: board.departures(),
            };
        }
        board.end(key, Answer::Ended);
        let boarded = board.start(own(key), priority, start);
        self.count
            .store(board.flights.len() as u64, Ordering::Relaxed);
        boarded
    }

    /// A flight that ran has ended. Says which have their slot now.
    pub(crate) fn land(&self, flight: &Arc<Flight>, priority: Priority) -> Vec<Departure> {
        let mut board = self.board.lock();
        if board
            .flights
            .get(&flight.key)
            .is_some_and(|known| Arc::ptr_eq(known, flight))
        {
            board.flights.remove(&flight.key);
        }
        board.slots.leave(priority);
        self.count
            .store(board.flights.len() as u64, Ordering::Relaxed);
        board.departures()
    }

    /// Ends a shard's flights of all terms but one.
    pub(crate) fn end_all_but(&self, shard: ShardId, term: Option<u64>) {
        let mut board = self.board.lock();
        let ended =
            |flight: &&Arc<Flight>| flight.replica.shard() == shard && Some(flight.term) != term;
        let keys: Vec<Key> = board
            .flights
            .values()
            .filter(ended)
            .map(|flight| flight.key.clone())
            .collect();
        for key in keys {
            board.end(&key, Answer::Ended);
        }
        self.count
            .store(board.flights.len() as u64, Ordering::Relaxed);
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.count.load(Ordering::Relaxed) == 0
    }

    /// When the key's flight began, on the monotonic clock; `None` without one.
    pub(crate) fn flying_since(&self, key: &[u8]) -> Option<Duration> {
        if self.is_idle() {
            return None;
        }
        self.board
            .lock()
            .flights
            .get(key)
            .map(|flight| flight.boarded_at)
    }
}

/// A reader's key is a slice of its whole message, which must not live as long as the flight: one
/// copy for all who keep it.
fn own(key: &Key) -> Key {
    own_key(key).unwrap_or_else(|| key.clone())
}

impl Board {
    fn start(
        &mut self,
        key: Key,
        priority: Priority,
        start: impl FnOnce(Key) -> Flight,
    ) -> Boarded {
        let entered = self.slots.enter(&key, priority);
        if entered == Entered::Refused {
            return Boarded {
                answers: None,
                is_joined: false,
                departures: Vec::new(),
            };
        }
        let flight = Arc::new(start(key.clone()));
        flight.wanted(priority);
        let answers = Some(flight.subscribe());
        self.flights.insert(key, flight.clone());
        let departures = match entered {
            Entered::Runs => vec![Departure { flight, priority }],
            Entered::Waits { instead_of } => {
                // Of one that was dropped nobody has heard yet: it only waited.
                if let Some(dropped) = instead_of.and_then(|dropped| self.flights.remove(&dropped))
                {
                    dropped.end(Answer::Overloaded);
                }
                Vec::new()
            }
            Entered::Refused => Vec::new(),
        };
        Boarded {
            answers,
            is_joined: false,
            departures,
        }
    }

    /// One that runs gives its slot back when it lands.
    fn end(&mut self, key: &Key, answer: Answer) {
        if let Some(flight) = self.flights.remove(key) {
            self.slots.withdraw(key);
            flight.end(answer);
        }
    }

    fn departures(&mut self) -> Vec<Departure> {
        let mut departures = Vec::new();
        while let Some((key, priority)) = self.slots.next() {
            match self.flights.get(&key) {
                Some(flight) => departures.push(Departure {
                    flight: flight.clone(),
                    priority,
                }),
                None => self.slots.leave(priority),
            }
        }
        departures
    }
}
