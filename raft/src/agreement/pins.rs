//! Which part of the log a snapshot on its way still needs: what was committed after it was made. Were that purged before the
//! follower has it, the follower would need the next snapshot, and under load never come level.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;

use crate::clock::Clock;

/// How long a follower has after its snapshot to read on from the log.
const GRACE: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub(crate) struct LogPins {
    clock: Clock,
    pins: Arc<Mutex<Vec<Pin>>>,
}

struct Pin {
    index: u64,
    /// Monotonic; `None` while the snapshot is on its way.
    until: Option<Duration>,
}

/// The log after an index, for as long as it lives and a little longer.
pub(crate) struct Pinned {
    pins: LogPins,
    index: u64,
}

impl LogPins {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, pins: Arc::default() }
    }

    pub(crate) fn pin(&self, index: u64) -> Pinned {
        self.pins.lock().push(Pin { index, until: None });
        Pinned { pins: self.clone(), index }
    }

    /// The lowest index that is still needed.
    pub(crate) fn lowest(&self) -> Option<u64> {
        let now = self.clock.monotonic();
        let mut pins = self.pins.lock();
        pins.retain(|pin| pin.until.is_none_or(|until| now < until));
        pins.iter().map(|pin| pin.index).min()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let until = self.pins.clock.monotonic() + GRACE;
        let mut pins = self.pins.pins.lock();
        if let Some(pin) = pins.iter_mut().find(|pin| pin.index == self.index && pin.until.is_none()) {
            pin.until = Some(until);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_after_a_snapshot_is_kept_until_its_follower_had_time_to_read_on() {
        let clock = Clock::system();
        let pins = LogPins::new(clock.clone());
        assert_eq!(pins.lowest(), None);
        let (first, second) = (pins.pin(7), pins.pin(5));
        assert_eq!(pins.lowest(), Some(5));
        drop(second);
        assert_eq!(pins.lowest(), Some(5));
        clock.advance(GRACE);
        assert_eq!(pins.lowest(), Some(7));
        drop(first);
        clock.advance(GRACE);
        assert_eq!(pins.lowest(), None);
    }
}
