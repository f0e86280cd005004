//! What somebody must look at when clocks are wrong: a leader's own, or log time itself, which was
//! led ahead by clocks that have been put right since. Said once when it begins and once when it is
//! over; the difference is there to be asked for all the time.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// A leader whose own clock is further than this from the voters' alarms.
const SKEW_MS_MAX: i64 = 1000;
/// Log time that is further ahead of the voters' clock than this alarms.
const AHEAD_MS_MAX: i64 = 10_000;

#[derive(Default)]
pub(crate) struct Alarms {
    is_skewed: AtomicBool,
    is_ahead: AtomicBool,
    log_time_ahead_ms: AtomicI64,
}

impl Alarms {
    /// How far this node's clock, and log time, are ahead of the voters' clock.
    pub(crate) fn note(&self, own_ahead_ms: i64, log_time_ahead_ms: i64) {
        self.log_time_ahead_ms
            .store(log_time_ahead_ms, Ordering::Relaxed);
        let is_skewed = own_ahead_ms.saturating_abs() > SKEW_MS_MAX;
        if is_skewed != self.is_skewed.swap(is_skewed, Ordering::Relaxed) {
            if is_skewed {
                tracing::error!(
                    ahead_ms = own_ahead_ms,
                    "this node's clock is far from the voters' clocks: as leader it goes by theirs"
                );
            } else {
                tracing::info!("this node's clock agrees with the voters again");
            }
        }
        let is_ahead = log_time_ahead_ms > AHEAD_MS_MAX;
        if is_ahead != self.is_ahead.swap(is_ahead, Ordering::Relaxed) {
            if is_ahead {
                tracing::error!(
                    ahead_ms = log_time_ahead_ms,
                    "log time is ahead of the voters' clocks, which were wrong or are: it goes on a tenth slower until they are level"
                );
            } else {
                tracing::info!("log time agrees with the voters' clocks again");
            }
        }
    }

    pub(crate) fn is_skewed(&self) -> bool {
        self.is_skewed.load(Ordering::Relaxed)
    }

    pub(crate) fn log_time_ahead_ms(&self) -> i64 {
        self.log_time_ahead_ms.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_off_alarms_until_it_is_right() {
        let alarms = Alarms::default();
        for (own, ahead, is_skewed) in [
            (1000, 0, false),
            (1001, 0, true),
            (-5000, 0, true),
            (0, 86_400_000, false),
        ] {
            alarms.note(own, ahead);
            assert_eq!(alarms.is_skewed(), is_skewed, "{own}");
            assert_eq!(alarms.log_time_ahead_ms(), ahead);
        }
    }
}
