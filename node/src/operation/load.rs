//! How much a node takes in at once: operations by kind, bytes of requests, bytes of answers.
//!
//! ```text
//!             reads 4,096 ─┐ parks: waits for an upstream, a leader, a quorum
//!   caller ─► writes 2,048 ├─────────────────────────────────► waiting 20,000
//!             …           ─┘                                   (its place is free meanwhile)
//! ```
//! An operation has a place until the last byte of its answer is taken. A refusal is at once and
//! cheap, and says that nothing was applied and when to come again. The last quarter of each room is
//! for connections that have little of it: one that takes all it can leaves some to the others.
//!
//! Who does not take its answer, long after its deadline, does not keep others out: its connection
//! is ended when its place or its bytes are needed. Nothing less would do, since without an HTTP/2
//! window nobody looks at the answer again. Must never know what is asked.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use holdfast_raft::{Clock, Deadline};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::methods::{KINDS, Kind};
use crate::serve::Caller;

/// How long after its deadline a caller may take over its answer.
const TAKING_MAX: Duration = Duration::from_secs(5);
/// Between two looks for callers that do not take their answers.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Lists of who holds what: enough that no two cores meet often.
const LISTS: u64 = 16;
/// Answers up to this size are bounded by their number.
const SMALL_ANSWER: usize = 16 << 10;

/// How much a node takes in at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub reads: usize,
    pub writes: usize,
    pub operators: usize,
    pub probes: usize,
    pub endless: usize,
    /// Operations that wait for something beyond memory, in no other room meanwhile.
    pub waiting: usize,
    pub request_bytes: usize,
    pub answer_bytes: usize,
}

/// What is in flight. One per node.
#[derive(Debug)]
pub struct Load {
    clock: Clock,
    limits: Limits,
    rooms: [Room; KINDS.len()],
    waiting: Room,
    request_bytes: Room,
    answers: Arc<Semaphore>,
    answers_refused: AtomicU64,
    lists: Vec<Mutex<HashMap<u64, Held>>>,
    next: AtomicU64,
    looked_ms: AtomicU64,
}

/// So much of something, and how often there was not enough.
#[derive(Debug)]
pub(crate) struct Room {
    limit: usize,
    taken: AtomicUsize,
    refused: AtomicU64,
}

/// What a place is held by.
#[derive(Debug)]
struct Held {
    /// On the monotonic clock; after it the place may be taken away.
    until: Duration,
    caller: Caller,
}

/// One operation in flight: gives back what it took when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    load: Arc<Load>,
    kind: Kind,
    number: u64,
    caller: Option<Caller>,
    request_bytes: AtomicUsize,
    answer: Mutex<Option<OwnedSemaphorePermit>>,
    /// Its parts that wait; the place is given back while there are any.
    parked: AtomicUsize,
}

/// An operation that waits for something beyond memory.
#[derive(Debug)]
pub(crate) struct Parked<'a>(&'a Place);

/// There is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Full;

impl Default for Limits {
    /// As many endless streams as connections: a caller watches once.
    fn default() -> Self {
        Self {
            reads: 4096,
            writes: 2048,
            operators: 64,
            probes: 64,
            endless: 10_000,
            waiting: 20_000,
            request_bytes: 256 << 20,
            answer_bytes: 128 << 20,
        }
    }
}

impl Load {
    pub fn new(limits: Limits, clock: Clock) -> Arc<Self> {
        let of = |kind| match kind {
            Kind::Read => limits.reads,
            Kind::Write => limits.writes,
            Kind::Operator => limits.operators,
            Kind::Probe => limits.probes,
            Kind::Endless => limits.endless,
        };
        Arc::new(Self {
            clock,
            limits,
            rooms: KINDS.map(|kind| Room::of(of(kind))),
            waiting: Room::of(limits.waiting),
            request_bytes: Room::of(limits.request_bytes),
            answers: Arc::new(Semaphore::new(limits.answer_bytes)),
            answers_refused: AtomicU64::new(0),
            lists: (0..LISTS).map(|_| Mutex::default()).collect(),
            next: AtomicU64::new(0),
            looked_ms: AtomicU64::new(0),
        })
    }

    pub(crate) fn room(&self, kind: Kind) -> &Room {
        &self.rooms[kind as usize]
    }

    pub(crate) fn waiting(&self) -> &Room {
        &self.waiting
    }

    pub(crate) fn request_bytes(&self) -> &Room {
        &self.request_bytes
    }

    /// Bytes of answers that are not taken yet.
    pub(crate) fn answer_bytes(&self) -> usize {
        self.limits
            .answer_bytes
            .saturating_sub(self.answers.available_permits())
    }

    /// Answers that found no room in time.
    pub(crate) fn answers_refused(&self) -> u64 {
        self.answers_refused.load(Ordering::Relaxed)
    }

    /// A place for an operation whose caller waits so long.
    pub(crate) fn admit(
        self: &Arc<Self>,
        kind: Kind,
        timeout: Duration,
        caller: Option<Caller>,
    ) -> Result<Place, Full> {
        let is_write_or_read = matches!(kind, Kind::Read | Kind::Write);
        if is_write_or_read && self.request_bytes.is_full() {
            return Err(self.request_bytes.refuse());
        }
        let room = self.room(kind);
        let has = caller.as_ref().map_or(0, Caller::operations);
        if !room.take(1, has) {
            self.end_the_overdue();
            if !room.take(1, has) {
                return Err(room.refuse());
            }
        }
        if let Some(caller) = &caller {
            caller.operation_began();
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if let Some(caller) = caller.clone().filter(|_| kind != Kind::Endless) {
            let until = self.clock.monotonic() + timeout + TAKING_MAX;
            self.list(number)
                .lock()
                .insert(number, Held { until, caller });
        }
        Ok(Place {
            load: self.clone(),
            kind,
            number,
            caller,
            request_bytes: AtomicUsize::new(0),
            answer: Mutex::default(),
            parked: AtomicUsize::new(0),
        })
    }

    fn list(&self, number: u64) -> &Mutex<HashMap<u64, Held>> {
        &self.lists[(number % LISTS) as usize]
    }

    /// Ends the connections of those who do not take their answers. Looks no more often than it can
    /// help: a refusal must cost next to nothing.
    fn end_the_overdue(&self) {
        let now = self.clock.monotonic();
        let now_ms = self.clock.monotonic_ms();
        let looked = self.looked_ms.load(Ordering::Relaxed);
        let is_soon = now_ms < looked + u64::try_from(LOOK_EVERY.as_millis()).unwrap_or(u64::MAX);
        if looked != 0 && is_soon {
            return;
        }
        self.looked_ms.store(now_ms, Ordering::Relaxed);
        for list in &self.lists {
            for (_, held) in list.lock().extract_if(|_, held| held.until <= now) {
                tracing::info!("a connection is ended: its caller does not take its answer");
                held.caller.end();
            }
        }
    }
}

impl Room {
    fn of(limit: usize) -> Self {
        Self {
            limit,
            taken: AtomicUsize::new(0),
            refused: AtomicU64::new(0),
        }
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn is_full(&self) -> bool {
        self.taken() >= self.limit
    }

    /// `has`: how much of it the same caller has already.
    fn take(&self, more: usize, has: usize) -> bool {
        let limit = match has {
            has if has > self.limit / 16 => self.limit - self.limit / 4,
            _ => self.limit,
        };
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                now.checked_add(more).filter(|sum| *sum <= limit)
            })
            .is_ok()
    }

    /// Of what was given back and is needed again: it has nowhere else to go.
    fn take_anyway(&self) {
        self.taken.fetch_add(1, Ordering::Relaxed);
    }

    fn give(&self, back: usize) {
        self.taken.fetch_sub(back, Ordering::Relaxed);
    }

    fn refuse(&self) -> Full {
        self.refused.fetch_add(1, Ordering::Relaxed);
        Full
    }
}

impl Place {
    /// So many more bytes of the request have come.
    pub(crate) fn request_came(&self, bytes: usize) -> Result<(), Full> {
        let room = &self.load.request_bytes;
        match self.kind {
            Kind::Read | Kind::Write if !room.take(bytes, 0) => return Err(room.refuse()),
            Kind::Read | Kind::Write => {}
            // A probe's bytes must fit when the others' do not.
            Kind::Operator | Kind::Probe => _ = room.taken.fetch_add(bytes, Ordering::Relaxed),
            // Each message is answered and gone, but the stream is not.
            Kind::Endless => return Ok(()),
        }
        self.request_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Gives the place back while its operation waits for something beyond memory, so that it keeps
    /// nobody out who need not wait. It comes back in any case.
    pub(crate) fn park(&self) -> Result<Parked<'_>, Full> {
        if self.parked.fetch_add(1, Ordering::Relaxed) == 0 {
            if !self.load.waiting.take(1, 0) {
                self.parked.fetch_sub(1, Ordering::Relaxed);
                return Err(self.load.waiting.refuse());
            }
            self.load.room(self.kind).give(1);
        }
        Ok(Parked(self))
    }

    /// Room for an answer of so many bytes, if there is some now.
    pub(crate) fn try_answer(&self, bytes: usize) -> Result<(), Full> {
        if bytes <= SMALL_ANSWER {
            return Ok(());
        }
        let permits = u32::try_from(bytes).map_err(|_| Full)?;
        match self.load.answers.clone().try_acquire_many_owned(permits) {
            Ok(permit) => self.hold(permit),
            Err(_) => return Err(Full),
        }
        Ok(())
    }

    /// Waits for room for an answer of so many bytes. Nothing of the answer should be held
    /// meanwhile.
    pub(crate) async fn room_for_answer(
        &self,
        bytes: usize,
        deadline: &Deadline,
    ) -> Result<(), Full> {
        let permits = u32::try_from(bytes).map_err(|_| Full)?;
        let mut waiting = Box::pin(self.load.answers.clone().acquire_many_owned(permits));
        loop {
            self.load.end_the_overdue();
            let patience = deadline.left().min(LOOK_EVERY);
            match tokio::time::timeout(patience, &mut waiting).await {
                Ok(Ok(permit)) => {
                    self.hold(permit);
                    return Ok(());
                }
                Err(_) if !deadline.has_passed() => {}
                Ok(Err(_)) | Err(_) => {
                    self.load.answers_refused.fetch_add(1, Ordering::Relaxed);
                    return Err(Full);
                }
            }
        }
    }

    /// What was taken for an answer of so many bytes, for as long as they exist.
    pub(crate) fn answered(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let mut answer = self.answer.lock();
        let held = answer.as_mut()?;
        match held.num_permits() <= bytes {
            true => answer.take(),
            false => held.split(bytes),
        }
    }

    fn hold(&self, permit: OwnedSemaphorePermit) {
        let mut answer = self.answer.lock();
        match answer.as_mut() {
            Some(held) => held.merge(permit),
            None => *answer = Some(permit),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.load.request_bytes.give(*self.request_bytes.get_mut());
        self.load.room(self.kind).give(1);
        if let Some(caller) = &self.caller {
            caller.operation_ended();
            self.load.list(self.number).lock().remove(&self.number);
        }
    }
}

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        let place = self.0;
        if place.parked.fetch_sub(1, Ordering::Relaxed) == 1 {
            place.load.room(place.kind).take_anyway();
            place.load.waiting.give(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::serve::{Connections, Terms};

    const LIMITS: Limits = Limits {
        reads: 32,
        writes: 1,
        operators: 1,
        probes: 1,
        endless: 1,
        waiting: 1,
        request_bytes: 1024,
        answer_bytes: 1 << 20,
    };
    const LONG: Duration = Duration::from_secs(5);

    fn load(limits: Limits) -> (Arc<Load>, Clock) {
        let clock = Clock::system();
        (Load::new(limits, clock.clone()), clock)
    }

    fn callers(count: usize) -> Vec<Caller> {
        let terms = Terms {
            listener: "test",
            connections_max: count,
            descriptors_max: u64::MAX,
            idle: LONG,
            busy: None,
        };
        let connections = Connections::new(terms, Clock::system());
        let admit = || connections.admit(1, &CancellationToken::new()).unwrap();
        (0..count).map(|_| admit()).collect()
    }

    fn admit(load: &Arc<Load>, kind: Kind) -> Result<Place, Full> {
        load.admit(kind, LONG, None)
    }

    #[test]
    fn each_kind_has_its_own_room_and_what_ends_gives_it_back() {
        let (load, _) = load(LIMITS);
        for kind in KINDS.into_iter().filter(|kind| *kind != Kind::Read) {
            let held = admit(&load, kind).unwrap();
            assert_eq!(admit(&load, kind).unwrap_err(), Full, "{kind:?}");
            assert_eq!((load.room(kind).taken(), load.room(kind).refused()), (1, 1));
            drop(held);
            assert!(admit(&load, kind).is_ok(), "{kind:?}");
        }
        let reads: Vec<Place> = (0..32)
            .map_while(|_| admit(&load, Kind::Read).ok())
            .collect();
        assert_eq!(reads.len(), 32);
        assert!(admit(&load, Kind::Read).is_err() && admit(&load, Kind::Write).is_ok());
    }

    #[test]
    fn bytes_are_bounded_as_they_arrive_and_a_probe_fits_always() {
        let (load, _) = load(LIMITS);
        let write = admit(&load, Kind::Write).unwrap();
        write.request_came(1000).unwrap();
        assert_eq!(write.request_came(25), Err(Full));
        write.request_came(24).unwrap();
        assert_eq!(
            admit(&load, Kind::Read).unwrap_err(),
            Full,
            "nothing more is begun"
        );
        admit(&load, Kind::Probe).unwrap().request_came(5).unwrap();
        drop(write);
        assert_eq!(load.request_bytes().taken(), 0);
    }

    #[test]
    fn who_waits_gives_its_place_to_who_need_not() {
        let limits = Limits { reads: 1, ..LIMITS };
        let (load, _) = load(limits);
        let waits = admit(&load, Kind::Read).unwrap();
        assert!(admit(&load, Kind::Read).is_err());
        let first = waits.park().unwrap();
        let second = waits.park().unwrap();
        assert_eq!(
            (load.room(Kind::Read).taken(), load.waiting().taken()),
            (0, 1)
        );
        let reads = admit(&load, Kind::Read).unwrap();
        assert_eq!(
            reads.park().unwrap_err(),
            Full,
            "the waiting are bounded too"
        );
        drop(first);
        assert_eq!(load.waiting().taken(), 1, "another part of it still waits");
        drop(second);
        assert_eq!(
            (load.room(Kind::Read).taken(), load.waiting().taken()),
            (2, 0)
        );
        drop((waits, reads));
        assert_eq!(load.room(Kind::Read).taken(), 0);
    }

    #[test]
    fn one_connection_leaves_a_quarter_to_the_others() {
        let (load, _) = load(LIMITS);
        let callers = callers(2);
        let admit = |caller: &Caller| load.admit(Kind::Read, LONG, Some(caller.clone()));
        let greedy: Vec<Place> = (0..32).map_while(|_| admit(&callers[0]).ok()).collect();
        assert_eq!(greedy.len(), 24);
        let modest: Vec<Place> = (0..32).map_while(|_| admit(&callers[1]).ok()).collect();
        assert!(!modest.is_empty(), "the other one is let in");
    }

    #[tokio::test]
    async fn answers_are_bounded_by_their_bytes_until_they_are_taken() {
        let (load, clock) = load(LIMITS);
        let first = admit(&load, Kind::Read).unwrap();
        let second = admit(&load, Kind::Read).unwrap();
        first.try_answer(1 << 20).unwrap();
        assert_eq!(load.answer_bytes(), 1 << 20);
        second.try_answer(SMALL_ANSWER).unwrap();
        assert_eq!(second.try_answer(SMALL_ANSWER + 1), Err(Full));
        let soon = clock.deadline(Duration::from_millis(20));
        assert_eq!(second.room_for_answer(1 << 19, &soon).await, Err(Full));
        assert_eq!(load.answers_refused(), 1);

        let frame = first.answered((1 << 20) - 100).unwrap();
        drop(first);
        assert_eq!(
            load.answer_bytes(),
            (1 << 20) - 100,
            "its bytes are not sent"
        );
        drop(frame);
        assert_eq!(load.answer_bytes(), 0);
        let later = clock.deadline(LONG);
        second.room_for_answer(1 << 19, &later).await.unwrap();
    }

    #[test]
    fn who_does_not_take_an_answer_long_after_its_deadline_is_ended_when_room_is_needed() {
        let limits = Limits { reads: 1, ..LIMITS };
        let (load, clock) = load(limits);
        let callers = callers(1);
        let _held = load
            .admit(Kind::Read, LONG, Some(callers[0].clone()))
            .unwrap();
        assert!(admit(&load, Kind::Read).is_err());
        assert!(!callers[0].is_ended());
        clock.advance(LONG + TAKING_MAX);
        assert!(admit(&load, Kind::Read).is_err());
        assert!(callers[0].is_ended(), "its place is free in a moment");
    }
}
