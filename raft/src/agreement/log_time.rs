//! Log time: what stamps say, and what is fresh or expired follows. It goes on by one second per
//! second, whatever wall clocks do, and never back.
//!
//! ```text
//! voters' clocks ahead of it    ─► it is where they are: a quorum's clocks have all passed that
//! it is ahead of their clocks   ─► it goes on by monotonic time, a tenth slower, until they are level
//! no quorum's clocks are known  ─► it goes on by monotonic time
//! ```
//! The voters' clock is the latest instant that the clocks of a quorum have reached: the median, of
//! an even number the lower middle. A clock that is wrong alone decides nothing, in whatever order
//! nodes start, and a leader that knows too few clocks trusts none.

use std::time::Duration;

use holdfast_proto::timeline::Millis;

/// Of the time that passes, so much is left out while log time is ahead.
const SLEWED_SHARE: u32 = 10;
/// What a voter's clock may hide.
const CLOCK_STEP: Duration = Duration::from_millis(1);

/// Log time at a monotonic instant, and how it goes on from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogTime {
    /// Since 1970, finer than a millisecond: a tenth of little time is not lost.
    since_epoch: Duration,
    at: Duration,
    slewed: bool,
}

impl LogTime {
    pub(crate) fn new(log_time: Millis, at: Duration) -> Self {
        Self {
            since_epoch: Duration::from_millis(log_time),
            at,
            slewed: false,
        }
    }

    /// Where it is at a later instant, by monotonic time alone.
    pub(crate) fn at(&self, now: Duration) -> Millis {
        millis(self.continued(now))
    }

    /// The leader's next step. `voters` is their clock, if a quorum's are known; `applied` is the
    /// newest stamp.
    pub(crate) fn advance(&mut self, now: Duration, voters: Option<Millis>, applied: Millis) {
        let (going_on, voters) = (self.continued(now), voters.map(Duration::from_millis));
        // Where it would be at its full pace: a clock within what was slewed is level with it.
        let full = self.since_epoch + now.saturating_sub(self.at);
        // Clocks are read in whole milliseconds: less than one is no difference.
        self.slewed = voters.is_some_and(|voters| voters + CLOCK_STEP <= full);
        self.since_epoch = going_on
            .max(voters.unwrap_or_default())
            .max(Duration::from_millis(applied));
        self.at = now;
    }

    /// How far it is ahead of the voters' clock; behind, if negative.
    pub(crate) fn ahead_ms(&self, now: Duration, voters: Millis) -> i64 {
        let ahead = i128::from(self.at(now)) - i128::from(voters);
        i64::try_from(ahead).unwrap_or(i64::MAX)
    }

    fn continued(&self, now: Duration) -> Duration {
        let passed = now.saturating_sub(self.at);
        let left_out = if self.slewed {
            passed / SLEWED_SHARE
        } else {
            Duration::ZERO
        };
        self.since_epoch + (passed - left_out)
    }
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Millis = 1_800_000_000_000;
    const YEAR: Millis = 365 * 86_400_000;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn it_is_where_a_quorums_clocks_are() {
        let mut time = LogTime::new(NOW, at(0));
        time.advance(at(100), Some(NOW + 100), NOW);
        assert_eq!(time.at(at(100)), NOW + 100);
        assert_eq!(time.at(at(600)), NOW + 600, "and goes on between its steps");
        time.advance(at(600), Some(NOW + YEAR), NOW);
        assert_eq!(time.at(at(600)), NOW + YEAR);
    }

    #[test]
    fn without_a_quorums_clocks_it_goes_on_by_monotonic_time() {
        let mut time = LogTime::new(NOW, at(0));
        for second in 1..=60 {
            time.advance(at(second * 1000), None, NOW);
        }
        assert_eq!(time.at(at(60_000)), NOW + 60_000);
    }

    #[test]
    fn ahead_of_the_clocks_it_goes_on_a_tenth_slower_until_they_are_level() {
        let mut time = LogTime::new(NOW + 10_000, at(0));
        let mut level_at = None;
        // In steps so short that a tenth of each is less than a millisecond.
        for ms in 1..=120_000 {
            time.advance(at(ms), Some(NOW + ms), 0);
            if level_at.is_none() && time.ahead_ms(at(ms), NOW + ms) == 0 {
                level_at = Some(ms);
            }
        }
        let level_at = level_at.expect("it came to be level");
        assert!((99_000..=101_000).contains(&level_at), "{level_at} ms");
        assert_eq!(time.at(at(120_000)), NOW + 120_000, "and is not late then");
    }

    #[test]
    fn it_is_never_before_what_was_applied() {
        let mut time = LogTime::new(NOW, at(0));
        time.advance(at(10), Some(NOW + 10), NOW + 5000);
        assert_eq!(time.at(at(10)), NOW + 5000);
        assert_eq!(time.ahead_ms(at(10), NOW + 10), 4990);
    }

    proptest! {
        /// Whatever the clocks say: never back, never slower than nine tenths, and never faster than
        /// time but to where a quorum's clocks are.
        #[test]
        fn it_goes_on_whatever_the_clocks_say(
            steps in prop::collection::vec((1u64..2000, prop::option::of(-(YEAR as i64)..YEAR as i64)), 1..200)
        ) {
            let mut time = LogTime::new(NOW, at(0));
            let (mut now, mut last, mut furthest) = (0, NOW, NOW);
            for (passed, clock) in steps {
                now += passed;
                let clock = clock.map(|off| (NOW + now).saturating_add_signed(off));
                let between = time.at(at(now));
                time.advance(at(now), clock, last);
                let stamp = time.at(at(now));
                prop_assert!(stamp >= between, "a read between two stamps saw {between}, then {stamp}");
                prop_assert!(stamp - last + 1 >= passed * 9 / 10, "{passed} ms were {}", stamp - last);
                furthest = furthest.max(clock.unwrap_or_default()).max(last + passed);
                prop_assert!(stamp <= furthest, "{stamp} is past {furthest}");
                last = stamp;
            }
        }
    }
}
