//! Who may call an upstream now, and who waits.
//!
//! ```text
//! 32 slots:  [ only a MISS: 8 ][ any: 16, a MISS first ][ only a refresh: 8 ]        waiting: at most 10,000
//! ```
//! Promises that neither misses nor refreshes can take all the slots; that a MISS is never dropped
//! for a refresh; that of many waiting misses the newest goes first, because its reader is the one
//! who still waits (adaptive LIFO, as in "Fail at Scale", ACM Queue 2015); and that what is full
//! says so at once. Must never know what a flight does, or a clock.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use holdfast_proto::Key;

/// Flights of one upstream at once on the node that leads. Fixed for now.
pub(crate) const FLIGHTS_MAX: usize = 32;
/// Of these, so many are kept for misses, whose readers have nothing else, and as many for
/// refreshes, whose readers would be told STALE of a healthy upstream.
const RESERVED: usize = FLIGHTS_MAX / 4;
/// Flights that wait for a slot. Fixed for now.
pub(crate) const WAITING_MAX: usize = 10_000;
/// More misses than these are more than the upstream serves soon: the newest goes first.
const IN_ORDER_MAX: usize = FLIGHTS_MAX;
/// A refresh that waited so long is dropped: whoever reads the key asks again.
const REFRESH_WAITS_MAX: Duration = Duration::from_secs(30);

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
    running_misses: usize,
    running_refreshes: usize,
    /// By priority, each in the order of arrival.
    waiting: [BTreeMap<u64, Waiting>; 3],
    places: HashMap<Key, (Priority, u64)>,
    arrived: u64,
}

#[derive(Debug)]
struct Waiting {
    key: Key,
    since: Duration,
}

impl Slots {
    /// `now` is of a monotonic clock, as everywhere here.
    pub(crate) fn enter(&mut self, key: &Key, priority: Priority, now: Duration) -> Entered {
        if self.is_free_for(priority) {
            self.take(priority);
            return Entered::Runs;
        }
        let instead_of = match self.waiting() < WAITING_MAX {
            true => None,
            false => match self.drop_below(priority) {
                Some(dropped) => Some(dropped),
                None => return Entered::Refused,
            },
        };
        self.wait(key.clone(), priority, now);
        Entered::Waits { instead_of }
    }

    /// A waiting flight matters more now than when it came. Look for the `next` afterwards: it may
    /// be this one.
    pub(crate) fn promote(&mut self, key: &Key, priority: Priority, now: Duration) {
        if self
            .places
            .get(key)
            .is_some_and(|&(waits_as, _)| waits_as < priority)
        {
            self.withdraw(key);
            self.wait(key.clone(), priority, now);
        }
    }

    /// The next to run, which has its slot then.
    pub(crate) fn next(&mut self) -> Option<(Key, Priority)> {
        let priority = [Priority::Miss, Priority::Asked, Priority::Due]
            .into_iter()
            .find(|&priority| {
                !self.waiting[priority as usize].is_empty() && self.is_free_for(priority)
            })?;
        let waiting = &mut self.waiting[priority as usize];
        let newest_first = priority == Priority::Miss && waiting.len() > IN_ORDER_MAX;
        let (_, Waiting { key, .. }) = match newest_first {
            true => waiting.pop_last()?,
            false => waiting.pop_first()?,
        };
        self.places.remove(&key);
        self.take(priority);
        Some((key, priority))
    }

    /// A refresh that has waited too long, and waits no more.
    pub(crate) fn expired(&mut self, now: Duration) -> Option<Key> {
        let waiting = [Priority::Due, Priority::Asked]
            .into_iter()
            .map(|priority| priority as usize)
            .find(|&priority| {
                self.waiting[priority]
                    .first_key_value()
                    .is_some_and(|(_, first)| now.saturating_sub(first.since) >= REFRESH_WAITS_MAX)
            })?;
        let (_, Waiting { key, .. }) = self.waiting[waiting].pop_first()?;
        self.places.remove(&key);
        Some(key)
    }

    /// A flight that ran as `priority` has ended.
    pub(crate) fn leave(&mut self, priority: Priority) {
        match priority {
            Priority::Miss => self.running_misses -= 1,
            Priority::Asked | Priority::Due => self.running_refreshes -= 1,
        }
    }

    /// Waits no more; false if it did not.
    pub(crate) fn withdraw(&mut self, key: &Key) -> bool {
        match self.places.remove(key) {
            Some((priority, number)) => self.waiting[priority as usize].remove(&number).is_some(),
            None => false,
        }
    }

    pub(crate) fn running(&self) -> usize {
        self.running_misses + self.running_refreshes
    }

    pub(crate) fn waiting(&self) -> usize {
        self.places.len()
    }

    fn is_free_for(&self, priority: Priority) -> bool {
        let alike = match priority {
            Priority::Miss => self.running_misses,
            Priority::Asked | Priority::Due => self.running_refreshes,
        };
        self.running() < FLIGHTS_MAX && alike < FLIGHTS_MAX - RESERVED
    }

    fn take(&mut self, priority: Priority) {
        match priority {
            Priority::Miss => self.running_misses += 1,
            Priority::Asked | Priority::Due => self.running_refreshes += 1,
        }
    }

    fn wait(&mut self, key: Key, priority: Priority, since: Duration) {
        self.arrived += 1;
        self.places.insert(key.clone(), (priority, self.arrived));
        self.waiting[priority as usize].insert(self.arrived, Waiting { key, since });
    }

    /// Drops the least useful one that is worth less than `priority`: the last to come of the
    /// lowest.
    fn drop_below(&mut self, priority: Priority) -> Option<Key> {
        let lowest = self.waiting[..priority as usize]
            .iter_mut()
            .find(|waiting| !waiting.is_empty())?;
        let (_, Waiting { key, .. }) = lowest.pop_last()?;
        self.places.remove(&key);
        Some(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn key(n: usize) -> Key {
        Key::new(format!("k{n}")).unwrap()
    }

    fn runs(slots: &mut Slots, n: usize, priority: Priority) {
        assert_eq!(slots.enter(&key(n), priority, NOW), Entered::Runs);
    }

    fn waits(slots: &mut Slots, n: usize, priority: Priority) {
        assert_eq!(
            slots.enter(&key(n), priority, NOW),
            Entered::Waits { instead_of: None }
        );
    }

    /// Each kind has all it may have, so that everything else waits.
    fn full() -> Slots {
        let mut slots = Slots::default();
        (0..24).for_each(|n| runs(&mut slots, n, Priority::Miss));
        (24..32).for_each(|n| runs(&mut slots, n, Priority::Asked));
        slots
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
    fn a_quarter_of_the_slots_is_kept_for_misses_and_a_quarter_for_refreshes() {
        for (kind, other) in [
            (Priority::Due, Priority::Miss),
            (Priority::Miss, Priority::Due),
        ] {
            let mut slots = Slots::default();
            (0..24).for_each(|n| runs(&mut slots, n, kind));
            waits(&mut slots, 24, kind);
            (25..33).for_each(|n| runs(&mut slots, n, other));
            waits(&mut slots, 33, other);
            // A slot that either may have goes to the MISS, those of the other kind to the other.
            slots.leave(other);
            assert_eq!(slots.next(), Some((key(33), other)));
            slots.leave(kind);
            assert_eq!(slots.next(), Some((key(24), kind)));
            assert_eq!(slots.next(), None);
        }
    }

    #[test]
    fn a_flood_of_misses_starves_no_refresh() {
        let mut slots = full();
        (100..5_000).for_each(|n| waits(&mut slots, n, Priority::Miss));
        waits(&mut slots, 9_000, Priority::Due);
        // Misses end and others follow, for as long as the flood lasts.
        for _ in 0..100 {
            slots.leave(Priority::Miss);
            assert_eq!(
                slots.next().map(|(_, priority)| priority),
                Some(Priority::Miss)
            );
        }
        slots.leave(Priority::Asked);
        assert_eq!(slots.next(), Some((key(9_000), Priority::Due)));
    }

    #[test]
    fn of_many_waiting_misses_the_newest_goes_first_of_few_the_oldest() {
        let mut slots = full();
        (100..200).for_each(|n| waits(&mut slots, n, Priority::Miss));
        let order: Vec<_> = (0..100)
            .map(|_| {
                slots.leave(Priority::Miss);
                slots.next().unwrap().0
            })
            .collect();
        let newest_first = (132..200).rev().chain(100..132).map(key);
        assert_eq!(order, newest_first.collect::<Vec<_>>());
    }

    #[test]
    fn a_full_backlog_drops_a_refresh_for_a_miss_and_never_a_miss() {
        let mut slots = full();
        (0..WAITING_MAX - 2).for_each(|n| waits(&mut slots, 1_000 + n, Priority::Miss));
        waits(&mut slots, 100, Priority::Asked);
        waits(&mut slots, 101, Priority::Due);
        let instead_of = |n| Entered::Waits {
            instead_of: Some(key(n)),
        };
        let mut enter = |n, priority| slots.enter(&key(n), priority, NOW);
        assert_eq!(enter(102, Priority::Due), Entered::Refused);
        assert_eq!(enter(103, Priority::Asked), instead_of(101));
        assert_eq!(enter(104, Priority::Asked), Entered::Refused);
        assert_eq!(enter(105, Priority::Miss), instead_of(103));
        assert_eq!(enter(106, Priority::Miss), instead_of(100));
        assert_eq!(enter(107, Priority::Miss), Entered::Refused);
    }

    #[test]
    fn a_waiting_refresh_for_which_a_miss_comes_is_a_miss() {
        let mut slots = Slots::default();
        (0..24).for_each(|n| runs(&mut slots, n, Priority::Due));
        waits(&mut slots, 24, Priority::Due);
        assert_eq!(slots.next(), None);
        slots.promote(&key(24), Priority::Miss, NOW);
        assert_eq!(slots.next(), Some((key(24), Priority::Miss)));
    }

    #[test]
    fn a_refresh_does_not_wait_for_ever_and_a_miss_for_as_long_as_its_reader() {
        let mut slots = full();
        waits(&mut slots, 100, Priority::Asked);
        waits(&mut slots, 101, Priority::Due);
        waits(&mut slots, 102, Priority::Miss);
        assert_eq!(slots.expired(NOW + REFRESH_WAITS_MAX / 2), None);
        let later = NOW + REFRESH_WAITS_MAX;
        let expired: Vec<_> = std::iter::from_fn(|| slots.expired(later)).collect();
        assert_eq!(expired, [key(101), key(100)]);
        assert_eq!(slots.waiting(), 1);
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
