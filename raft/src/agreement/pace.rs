//! The pace of the cluster: how often a leader is heard, how long it counts, and how long an
//! election may take. It follows from two things that are measured, how long the voters' disks take
//! to sync and how long a message takes to them and back, and is the same on every member: shard 0
//! keeps what was measured, its leader proposes it anew when that changes.
//!
//! ```text
//! heard            lease over                  asks for votes           vote synced, and theirs
//!   |--- lease ------|-- election (random) ------|--- vote_patience ---------------------------|
//! ```
//! openraft has a pace of its own, fixed when it starts. It is set so long that it never decides
//! (see `agreement::config`).

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use holdfast_proto::peer::SetPace;

/// At best: on fast disks in one place.
const HEARTBEAT_MIN: Duration = Duration::from_millis(50);
const LEASE_MIN: Duration = Duration::from_millis(300);
const ELECTION_MIN: Duration = Duration::from_millis(200);
const SPREAD_MIN: Duration = Duration::from_millis(100);
/// A disk that takes longer is stalled, and its node leads no more.
const SYNC_MAX: Duration = Duration::from_secs(2);
/// Farther voters are not for one cluster.
const ROUND_TRIP_MAX: Duration = Duration::from_secs(1);
/// What is measured below this is noise of the machine.
const SYNC_NOISE: Duration = Duration::from_millis(20);
/// How long less must be measured before the pace is made faster.
const SLOW_FOR: Duration = Duration::from_secs(30);

/// What the timing follows from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    pub sync: Duration,
    pub round_trip: Duration,
}

impl Pace {
    pub fn new(sync: Duration, round_trip: Duration) -> Self {
        Self {
            sync: sync.min(SYNC_MAX),
            round_trip: round_trip.min(ROUND_TRIP_MAX),
        }
    }

    /// The slower of both.
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            sync: self.sync.max(other.sync),
            round_trip: self.round_trip.max(other.round_trip),
        }
    }

    /// Between two heartbeats.
    pub fn heartbeat(self) -> Duration {
        self.round_trip.max(HEARTBEAT_MIN)
    }

    /// How long a leader counts after it sent what a quorum acknowledged, and how long a voter that
    /// heard it votes for nobody else. An answer waits for what its voter syncs, and for what it
    /// syncs next.
    pub fn lease(self) -> Duration {
        (self.heartbeat() * 3).max(LEASE_MIN) + self.sync * 5 / 2
    }

    /// How long a follower's word for who leads counts.
    pub fn heard_for(self) -> Duration {
        self.lease() * 2
    }

    /// A leader that is heard and that no quorum acknowledges for so long keeps nobody from standing.
    pub(crate) fn abandoned_after(self) -> Duration {
        self.heard_for() * 2 + self.vote_patience() + ROUND_TRIP_MAX
    }

    /// Between the end of a lease and the first question for votes. `jitter` is in [0, 1).
    pub(crate) fn election(self, jitter: f64) -> Duration {
        ELECTION_MIN + self.spread().mul_f64(jitter)
    }

    fn spread(self) -> Duration {
        SPREAD_MIN.max(self.round_trip) + self.sync / 4
    }

    /// What a question that nothing is synced for may take; long enough for a cluster whose voters
    /// are far from each other and do not know it yet.
    pub(crate) fn ask_timeout(self) -> Duration {
        ROUND_TRIP_MAX + self.round_trip
    }

    /// What an election may take: the candidate syncs its vote, the voters theirs, each maybe behind
    /// a sync that is under way, and the leader its own.
    pub(crate) fn vote_patience(self) -> Duration {
        ELECTION_MIN + self.sync * 6 + self.round_trip * 3
    }

    /// What an answer that waits for a disk may take beyond `least`.
    pub(crate) fn answer_timeout(self, least: Duration) -> Duration {
        least + self.sync * 4 + self.round_trip * 4
    }
}

impl From<SetPace> for Pace {
    fn from(set: SetPace) -> Self {
        Self::new(
            Duration::from_millis(set.sync_ms.into()),
            Duration::from_millis(set.round_trip_ms.into()),
        )
    }
}

impl From<Pace> for SetPace {
    fn from(pace: Pace) -> Self {
        Self {
            sync_ms: millis(pace.sync),
            round_trip_ms: millis(pace.round_trip),
        }
    }
}

/// The pace as all replicas of a node follow it; shard 0's says what it is.
#[derive(Debug, Default)]
pub(crate) struct SharedPace {
    sync_ms: AtomicU32,
    round_trip_ms: AtomicU32,
}

impl SharedPace {
    pub(crate) fn get(&self) -> Pace {
        SetPace {
            sync_ms: self.sync_ms.load(Ordering::Relaxed),
            round_trip_ms: self.round_trip_ms.load(Ordering::Relaxed),
        }
        .into()
    }

    pub(crate) fn set(&self, pace: Pace) {
        let SetPace {
            sync_ms,
            round_trip_ms,
        } = pace.into();
        self.sync_ms.store(sync_ms, Ordering::Relaxed);
        self.round_trip_ms.store(round_trip_ms, Ordering::Relaxed);
    }
}

/// Decides when what is measured asks for another pace: slower at once, faster only after less was
/// measured for long, so that it never goes to and fro.
#[derive(Debug, Default)]
pub(crate) struct Governor {
    sync_less_since: Option<Duration>,
    round_trip_less_since: Option<Duration>,
}

impl Governor {
    /// The pace to propose, if it is another one.
    pub(crate) fn adjust(&mut self, now: Duration, pace: Pace, measured: Pace) -> Option<Pace> {
        let sync = if measured.sync < SYNC_NOISE {
            Duration::ZERO
        } else {
            measured.sync
        };
        let round_trip = if measured.round_trip < HEARTBEAT_MIN {
            Duration::ZERO
        } else {
            measured.round_trip
        };
        let next = Pace::new(
            adjusted(now, pace.sync, sync, &mut self.sync_less_since),
            adjusted(
                now,
                pace.round_trip,
                round_trip,
                &mut self.round_trip_less_since,
            ),
        );
        (next != pace).then_some(next)
    }
}

/// A fifth more than is measured, in whole hundredths of a second.
fn with_room(measured: Duration) -> Duration {
    let hundredths = (measured.as_millis() * 12).div_ceil(100);
    Duration::from_millis(u64::try_from(hundredths).unwrap_or(u64::MAX) * 10)
}

fn adjusted(
    now: Duration,
    current: Duration,
    measured: Duration,
    less_since: &mut Option<Duration>,
) -> Duration {
    if measured > current {
        *less_since = None;
        return with_room(measured);
    }
    if measured * 2 >= current {
        *less_since = None;
        return current;
    }
    let since = *less_since.get_or_insert(now);
    if now.saturating_sub(since) < SLOW_FOR {
        return current;
    }
    *less_since = None;
    with_room(measured)
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(sync_ms: u64, round_trip_ms: u64) -> Pace {
        Pace::new(
            Duration::from_millis(sync_ms),
            Duration::from_millis(round_trip_ms),
        )
    }

    #[test]
    fn at_best_the_pace_is_that_of_fast_disks_in_one_place() {
        let best = pace(0, 0);
        assert_eq!(best.heartbeat().as_millis(), 50);
        assert_eq!(best.lease().as_millis(), 300);
        assert_eq!(best.election(0.0).as_millis(), 200);
        assert_eq!(best.election(1.0).as_millis(), 300);
    }

    /// What DESIGN asks of a failover: the lease, the wait, the question, and the syncs of an
    /// election, of its first entry and of the write that waited.
    #[test]
    fn a_failover_is_within_its_bound_at_any_pace() {
        for (sync_ms, gap_ms) in [(0, 1000), (150, 3000), (400, 6000), (1000, 15_000)] {
            let paced = pace(sync_ms * 12 / 10, 0);
            let gap = paced.lease() + paced.election(1.0) + Duration::from_millis(7 * sync_ms);
            assert!(
                gap.as_millis() < gap_ms,
                "{sync_ms} ms a sync: {gap:?} of {gap_ms} ms"
            );
        }
        for round_trip_ms in [80, 150, 300] {
            let paced = pace(0, round_trip_ms * 12 / 10);
            let trips = Duration::from_millis(4 * round_trip_ms);
            let gap = paced.lease() + paced.election(1.0) + trips;
            let bound = Duration::from_millis(10 * round_trip_ms + 1000);
            assert!(gap < bound, "{round_trip_ms} ms: {gap:?} of {bound:?}");
        }
    }

    /// A heartbeat's answer may be late by what its voter syncs and the next one, and by the way.
    #[test]
    fn a_lease_outlasts_the_slowest_answer() {
        for sync_ms in [0, 20, 150, 400, 1000, 2000] {
            for round_trip_ms in [0, 50, 80, 150, 300, 1000] {
                let pace = pace(sync_ms, round_trip_ms);
                let oldest = pace.heartbeat() + pace.round_trip + pace.sync * 2;
                assert!(oldest < pace.lease(), "{pace:?}");
                assert!(pace.heard_for() > pace.lease());
            }
        }
    }

    #[test]
    fn the_pace_slows_at_once_and_quickens_late() {
        let mut governor = Governor::default();
        let at = Duration::from_secs;
        assert_eq!(governor.adjust(at(1), pace(0, 0), pace(19, 40)), None);
        let slower = governor.adjust(at(2), pace(0, 0), pace(150, 80));
        assert_eq!(slower, Some(pace(180, 100)));
        let slower = slower.expect("slower");
        for (second, sync_ms) in [(3, 150), (4, 180), (5, 100), (6, 90)] {
            let measured = pace(sync_ms, 80);
            assert_eq!(governor.adjust(at(second), slower, measured), None);
        }
        // Fast for a moment, and slow again: it stays.
        assert_eq!(governor.adjust(at(10), slower, pace(1, 80)), None);
        assert_eq!(governor.adjust(at(39), slower, pace(1, 80)), None);
        assert_eq!(governor.adjust(at(40), slower, pace(100, 80)), None);
        assert_eq!(governor.adjust(at(41), slower, pace(1, 80)), None);
        assert_eq!(governor.adjust(at(70), slower, pace(1, 80)), None);
        let faster = governor.adjust(at(71), slower, pace(1, 80));
        assert_eq!(faster, Some(pace(0, 100)));
    }
}
