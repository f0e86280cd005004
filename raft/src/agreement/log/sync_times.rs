//! How long syncs take on this disk: what the pace of the cluster follows from.

use std::{collections::VecDeque, time::Duration};

use parking_lot::Mutex;

/// So many of the last ones count: an idle leader syncs twice a second.
const COUNTED: usize = 64;
/// The slowest ones that do not count: a hiccup is not how a disk is.
const HICCUPS: usize = 1;

#[derive(Default)]
pub(super) struct SyncTimes {
    last: Mutex<VecDeque<Duration>>,
}

impl SyncTimes {
    pub(super) fn add(&self, took: Duration) {
        let mut last = self.last.lock();
        if last.len() == COUNTED {
            last.pop_front();
        }
        last.push_back(took);
    }

    /// Of the last ones the slowest but a hiccup; nothing before there was more than that.
    pub(super) fn slow(&self) -> Duration {
        let mut last: Vec<Duration> = self.last.lock().iter().copied().collect();
        last.sort_unstable();
        last.iter().rev().nth(HICCUPS).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_as_slow_as_its_slower_syncs_and_one_hiccup_does_not_count() {
        let ms = Duration::from_millis;
        let times = SyncTimes::default();
        assert_eq!(times.slow(), Duration::ZERO);
        times.add(ms(900));
        assert_eq!(times.slow(), Duration::ZERO);
        times.add(ms(2));
        assert_eq!(times.slow(), ms(2));
        times.add(ms(700));
        assert_eq!(times.slow(), ms(700));
        for _ in 0..COUNTED {
            times.add(ms(3));
        }
        assert_eq!(times.slow(), ms(3), "what was long ago is forgotten");
    }
}
