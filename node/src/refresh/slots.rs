//! Who may call an upstream now, and who waits.
//!
//! ```text
//! 32 slots:  [ any flight: 24 ][ only a MISS: 8 ]        waiting: MISS, then asked for, then due; at most 10,000
//! ```
//! Promises that a waiting refresh never stands before a MISS, that a MISS is never dropped for a
//! refresh, and that what is full says so at once. Must never know what a flight does, or a clock.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
};

use holdfast_proto::Key;

/// Flights of one upstream at once on the node that leads. Fixed for now.
const FLIGHTS_MAX: usize = 32;
/// Of these, so many may be refreshes: a quarter is kept for misses, whose readers have nothing
/// else.
const REFRESHES_MAX: usize = FLIGHTS_MAX / 4 * 3;
/// Flights that wait for a slot. Fixed for now.
const WAITING_MAX: usize = 10_000;

/// Why a key is to be fetched; the greater goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Priority {
    /// The due index says so.
    Due,
    /// A reader used it past its refresh point.
    Asked,
    /// A reader has no value.
    Miss,
}

/// What became of a flight that wants a slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entered {
    /// It has a slot: it runs, and leaves later.
    Runs,
    /// It waits, perhaps in the place of one that was worth less and is dropped.
    Waits { instead_of: Option<Key> },
    /// Too many wait already.
    Refused,
}

/// The slots of one upstream.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    running: usize,
    running_refreshes: usize,
    waiting: BTreeMap<Place, Key>,
    places: HashMap<Key, Place>,
    arrived: u64,
}

/// In the order of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    priority: Reverse<Priority>,
    number: u64,
}

impl Slots {
    pub(crate) fn enter(&mut self, key: &Key, priority: Priority) -> Entered {
        if self.is_free_for(priority) {
            self.take(priority);
            return Entered::Runs;
        }
        let instead_of = match self.waiting.len() < WAITING_MAX {
            true => None,
            false => match self.drop_below(priority) {
                Some(dropped) => Some(dropped),
                None => return Entered::Refused,
            },
        };
        self.wait(key.clone(), priority);
        Entered::Waits { instead_of }
    }

    /// A waiting flight matters more now than when it came. Look for the `next` afterwards: it may
    /// be this one.
    pub(crate) fn promote(&mut self, key: &Key, priority: Priority) {
        if self
            .places
            .get(key)
            .is_some_and(|place| place.priority.0 < priority)
        {
            self.withdraw(key);
            self.wait(key.clone(), priority);
        }
    }

    /// The next to run, which has its slot then.
    pub(crate) fn next(&mut self) -> Option<(Key, Priority)> {
        // Only the first needs a look: behind a MISS without a slot nobody has one, behind a
        // refresh there are only refreshes.
        let (&place, _) = self.waiting.first_key_value()?;
        let priority = place.priority.0;
        if !self.is_free_for(priority) {
            return None;
        }
        let key = self.waiting.remove(&place)?;
        self.places.remove(&key);
        self.take(priority);
        Some((key, priority))
    }

    /// A flight that ran as `priority` has ended.
    pub(crate) fn leave(&mut self, priority: Priority) {
        self.running -= 1;
        if priority < Priority::Miss {
            self.running_refreshes -= 1;
        }
    }

    /// Waits no more; false if it did not.
    pub(crate) fn withdraw(&mut self, key: &Key) -> bool {
        match self.places.remove(key) {
            Some(place) => self.waiting.remove(&place).is_some(),
            None => false,
        }
    }

    fn is_free_for(&self, priority: Priority) -> bool {
        self.running < FLIGHTS_MAX
            && (priority == Priority::Miss || self.running_refreshes < REFRESHES_MAX)
    }

    fn take(&mut self, priority: Priority) {
        self.running += 1;
        if priority < Priority::Miss {
            self.running_refreshes += 1;
        }
    }

    fn wait(&mut self, key: Key, priority: Priority) {
        self.arrived += 1;
        let place = Place {
            priority: Reverse(priority),
            number: self.arrived,
        };
        self.places.insert(key.clone(), place);
        self.waiting.insert(place, key);
    }

    /// Drops the least useful one that is worth less than `priority`: the last to come of the
    /// lowest.
    fn drop_below(&mut self, priority: Priority) -> Option<Key> {
        let (&place, _) = self.waiting.last_key_value()?;
        if place.priority.0 >= priority {
            return None;
        }
        let key = self.waiting.remove(&place)?;
        self.places.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        Key::new(format!("k{n}")).unwrap()
    }

    /// All slots run a MISS, so that everything else waits.
    fn full() -> Slots {
        let mut slots = Slots::default();
        for n in 0..FLIGHTS_MAX {
            assert_eq!(slots.enter(&key(n), Priority::Miss), Entered::Runs);
        }
        slots
    }

    fn waits(slots: &mut Slots, n: usize, priority: Priority) {
        assert_eq!(
            slots.enter(&key(n), priority),
            Entered::Waits { instead_of: None }
        );
    }

    #[test]
    fn a_miss_goes_first_then_what_was_asked_for_then_what_is_due() {
        let mut slots = full();
        waits(&mut slots, 100, Priority::Due);
        waits(&mut slots, 101, Priority::Asked);
        waits(&mut slots, 102, Priority::Miss);
        waits(&mut slots, 103, Priority::Miss);
        assert_eq!(slots.next(), None);
        (0..4).for_each(|_| slots.leave(Priority::Miss));
        let order: Vec<_> = std::iter::from_fn(|| slots.next()).collect();
        assert_eq!(
            order,
            [
                (key(102), Priority::Miss),
                (key(103), Priority::Miss),
                (key(101), Priority::Asked),
                (key(100), Priority::Due)
            ]
        );
    }

    #[test]
    fn a_quarter_of_the_slots_is_kept_for_misses() {
        let mut slots = Slots::default();
        for n in 0..24 {
            assert_eq!(slots.enter(&key(n), Priority::Due), Entered::Runs);
        }
        waits(&mut slots, 24, Priority::Asked);
        for n in 25..33 {
            assert_eq!(slots.enter(&key(n), Priority::Miss), Entered::Runs);
        }
        waits(&mut slots, 33, Priority::Miss);
        // A freed slot of a refresh goes to the MISS; the next of the misses' own never to a
        // refresh.
        slots.leave(Priority::Due);
        assert_eq!(slots.next(), Some((key(33), Priority::Miss)));
        slots.leave(Priority::Miss);
        assert_eq!(slots.next(), Some((key(24), Priority::Asked)));
        slots.leave(Priority::Miss);
        waits(&mut slots, 34, Priority::Due);
        assert_eq!(slots.next(), None);
    }

    #[test]
    fn a_full_backlog_drops_a_refresh_for_a_miss_and_never_a_miss() {
        let mut slots = full();
        for n in 0..WAITING_MAX - 2 {
            waits(&mut slots, 1_000 + n, Priority::Miss);
        }
        waits(&mut slots, 100, Priority::Asked);
        waits(&mut slots, 101, Priority::Due);
        assert_eq!(slots.enter(&key(102), Priority::Due), Entered::Refused);
        assert_eq!(
            slots.enter(&key(103), Priority::Asked),
            Entered::Waits {
                instead_of: Some(key(101))
            }
        );
        assert_eq!(slots.enter(&key(104), Priority::Asked), Entered::Refused);
        assert_eq!(
            slots.enter(&key(105), Priority::Miss),
            Entered::Waits {
                instead_of: Some(key(103))
            }
        );
        assert_eq!(
            slots.enter(&key(106), Priority::Miss),
            Entered::Waits {
                instead_of: Some(key(100))
            }
        );
        assert_eq!(slots.enter(&key(107), Priority::Miss), Entered::Refused);
    }

    #[test]
    fn a_waiting_refresh_for_which_a_miss_comes_is_a_miss() {
        let mut slots = Slots::default();
        (0..24).for_each(|n| assert_eq!(slots.enter(&key(n), Priority::Due), Entered::Runs));
        waits(&mut slots, 24, Priority::Due);
        assert_eq!(slots.next(), None);
        slots.promote(&key(24), Priority::Miss);
        assert_eq!(slots.next(), Some((key(24), Priority::Miss)));
    }

    #[test]
    fn a_withdrawn_flight_waits_no_more() {
        let mut slots = full();
        waits(&mut slots, 100, Priority::Miss);
        assert!(slots.withdraw(&key(100)));
        assert!(!slots.withdraw(&key(100)));
        slots.leave(Priority::Miss);
        assert_eq!(slots.next(), None);
    }
}
