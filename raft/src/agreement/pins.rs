//! Which part of the log the followers of snapshots still need: what was committed after theirs was
//! made. Were that purged before a follower has it, the follower would need the next snapshot, and
//! under load never come level.
//!
//! A follower's pin is set when its snapshot sets out, and goes forward with what the follower has.
//! It falls if the snapshot does not arrive, once the follower is level with what is kept for
//! everybody, or when it has not moved for a while: a follower that takes no snapshot, try after
//! try, must not hold the log.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::clock::Clock;

/// How long a follower may stand still before its pin falls.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(crate) struct LogPins {
    clock: Clock,
    pins: Arc<Mutex<HashMap<u64, Pin>>>,
}

struct Pin {
    /// What the follower has, or will have with its snapshot.
    index: u64,
    /// Snapshots to it that are on their way: two when a transfer is replaced by another.
    sending: u32,
    /// Monotonic.
    moved_at: Duration,
}

/// A follower's pin, while its snapshot is on its way.
pub(crate) struct Pinned {
    pins: LogPins,
    follower: u64,
    arrived: bool,
}

impl LogPins {
    pub(crate) fn new(clock: Clock) -> Self {
        Self {
            clock,
            pins: Arc::default(),
        }
    }

    /// A snapshot that is as far as `index` sets out to a follower.
    pub(crate) fn pin(&self, follower: u64, index: u64) -> Pinned {
        let moved_at = self.clock.monotonic();
        let mut pins = self.pins.lock();
        let pin = pins.entry(follower).or_insert(Pin {
            index,
            sending: 0,
            moved_at,
        });
        // A pin without a transfer is that of an older snapshot, after which the follower fell
        // behind again.
        pin.index = if pin.sending == 0 {
            index
        } else {
            pin.index.min(index)
        };
        pin.sending += 1;
        pin.moved_at = moved_at;
        Pinned {
            pins: self.clone(),
            follower,
            arrived: false,
        }
    }

    /// A follower says that it has the log up to `index`.
    pub(crate) fn moved(&self, follower: u64, index: u64) {
        if let Some(pin) = self.pins.lock().get_mut(&follower)
            && index > pin.index
        {
            pin.index = index;
            pin.moved_at = self.clock.monotonic();
        }
    }

    /// The first index to keep, where `kept` is what is kept for everybody.
    pub(crate) fn keep_from(&self, kept: u64) -> u64 {
        let now = self.clock.monotonic();
        let mut pins = self.pins.lock();
        pins.retain(|_, pin| pin.sending > 0 || (pin.index < kept && now < pin.moved_at + GRACE));
        pins.values()
            .map(|pin| pin.index)
            .min()
            .map_or(kept, |needed| needed.min(kept))
    }
}

impl Pinned {
    /// The follower has the snapshot: it has time to read on from the log.
    pub(crate) fn arrived(mut self) {
        self.arrived = true;
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let now = self.pins.clock.monotonic();
        let mut pins = self.pins.pins.lock();
        let Some(pin) = pins.get_mut(&self.follower) else {
            return;
        };
        pin.sending -= 1;
        pin.moved_at = now;
        if pin.sending == 0 && !self.arrived {
            pins.remove(&self.follower);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: Duration = Duration::from_secs(GRACE.as_secs() / 2);

    #[test]
    fn the_log_after_a_snapshot_is_kept_while_it_is_on_its_way_and_a_grace_longer() {
        let clock = Clock::system();
        let pins = LogPins::new(clock.clone());
        assert_eq!(pins.keep_from(100), 100);
        let (first, second) = (pins.pin(1, 7), pins.pin(2, 5));
        clock.advance(GRACE * 10);
        assert_eq!(pins.keep_from(100), 5);
        assert_eq!(pins.keep_from(3), 3, "a pin lets go of nothing");
        second.arrived();
        assert_eq!(pins.keep_from(100), 5);
        clock.advance(GRACE);
        assert_eq!(pins.keep_from(100), 7);
        first.arrived();
        clock.advance(GRACE);
        assert_eq!(pins.keep_from(100), 100);
    }

    #[test]
    fn a_follower_that_moves_keeps_its_pin_until_it_is_level() {
        let clock = Clock::system();
        let pins = LogPins::new(clock.clone());
        pins.pin(1, 10).arrived();
        for index in [20, 30, 40, 50] {
            clock.advance(HALF);
            pins.moved(1, index);
            assert_eq!(pins.keep_from(100), index);
        }
        pins.moved(1, 30);
        assert_eq!(
            pins.keep_from(100),
            50,
            "an answer that was overtaken moves nothing back"
        );
        pins.moved(1, 100);
        assert_eq!(pins.keep_from(100), 100);
        assert_eq!(pins.keep_from(200), 200, "level once, it is one of all");
    }

    #[test]
    fn a_snapshot_that_does_not_arrive_holds_nothing() {
        let pins = LogPins::new(Clock::system());
        drop(pins.pin(1, 10));
        assert_eq!(pins.keep_from(100), 100);
    }

    #[test]
    fn a_second_transfer_to_the_same_follower_outlives_the_first() {
        let clock = Clock::system();
        let pins = LogPins::new(clock.clone());
        let first = pins.pin(1, 10);
        let second = pins.pin(1, 50);
        drop(first);
        clock.advance(GRACE);
        assert_eq!(pins.keep_from(100), 10);
        second.arrived();
        let _third = pins.pin(1, 60);
        assert_eq!(pins.keep_from(100), 60);
    }
}
