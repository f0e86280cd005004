//! Who leads, as far as this node can know, and what time it is there.
//!
//! openraft's `current_leader` comes from the stored vote: it survives a restart and an isolation.
//! So does nothing here: a node has a leader while it leads itself and a quorum acknowledged it
//! within one lease, or while it heard that term's append or heartbeat within two.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{ShardId, peer, timeline::Millis};
use parking_lot::Mutex;

use super::LEASE;
use crate::{clock::Clock, peer::Peers, state::State};

/// How long a heard leader counts.
pub(crate) const HEARD_FOR: Duration = Duration::from_millis(2 * LEASE.as_millis() as u64);
/// A leader whose wall clock is further than this from the voters' median follows the median, and
/// alarms.
const SKEW_MS_MAX: i64 = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    pub id: u64,
    pub term: u64,
    /// This node is it.
    pub is_self: bool,
}

/// The last append or heartbeat that a leader's term accepted.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) leader: u64,
    pub(crate) term: u64,
    pub(crate) at: Duration,
}

/// The leader's time as it was said at a monotonic instant of ours.
#[derive(Debug, Clone, Copy)]
struct TimeBase {
    leader_ms: Millis,
    at: Duration,
}

/// That this node led at an instant: a follower that has applied as much was current then.
#[derive(Debug, Clone, Copy)]
struct Proof {
    at: Duration,
    applied_index: u64,
}

/// What a replica knows of its leader and its time.
pub(crate) struct LeaderClock {
    shard: ShardId,
    clock: Clock,
    state: Arc<State>,
    peers: Arc<Peers>,
    heard: Mutex<Option<Heard>>,
    /// When this replica last had applied all that its leader said was committed.
    current_at: Mutex<Option<Duration>>,
    base: Mutex<Option<TimeBase>>,
    /// Of the last proposal: stamps never go back.
    last_stamp: Mutex<Millis>,
    voters: Mutex<Vec<u64>>,
    skewed: AtomicBool,
    proof: Mutex<Option<Proof>>,
}

impl LeaderClock {
    pub(crate) fn new(shard: ShardId, clock: Clock, state: Arc<State>, peers: Arc<Peers>) -> Self {
        Self {
            shard,
            clock,
            state,
            peers,
            heard: Mutex::default(),
            current_at: Mutex::default(),
            base: Mutex::default(),
            last_stamp: Mutex::default(),
            voters: Mutex::default(),
            skewed: AtomicBool::new(false),
            proof: Mutex::default(),
        }
    }

    /// A leader's message came; it said when a quorum last acknowledged it, and what it had applied
    /// after that.
    pub(crate) fn hear(&self, vote: Option<&peer::Vote>, header: Option<&peer::Header>) {
        let (Some(vote), Some(header)) = (vote, header) else {
            return;
        };
        let at = self.clock.monotonic();
        {
            let mut heard = self.heard.lock();
            // A deposed leader does not know it yet: what it says is of the past.
            if heard.is_some_and(|heard| heard.term > vote.term) {
                return;
            }
            *heard = Some(Heard {
                leader: header.from,
                term: vote.term,
                at,
            });
        }
        *self.base.lock() = Some(TimeBase {
            leader_ms: header.now_ms,
            at,
        });
        if let Some(proof) = &header.proof
            && proof.applied_index <= self.state.applied().index
        {
            // Without a quorum a leader goes on sending, and others may have committed since.
            let current_at = at.saturating_sub(Duration::from_millis(proof.ms_ago));
            let mut known = self.current_at.lock();
            *known = Some(known.map_or(current_at, |known| known.max(current_at)));
        }
    }

    pub(crate) fn heard(&self) -> Option<Heard> {
        (*self.heard.lock())
            .filter(|heard| self.clock.monotonic().saturating_sub(heard.at) < HEARD_FOR)
    }

    /// How long ago this replica last had all that its leader had committed; `None` if never.
    pub(crate) fn current_ago(&self) -> Option<Duration> {
        (*self.current_at.lock()).map(|at| self.clock.monotonic().saturating_sub(at))
    }

    /// The voters of the group, whoever leads it: a new leader needs them with its first stamp.
    pub(crate) fn know_voters(&self, voters: Vec<u64>) {
        *self.voters.lock() = voters;
    }

    /// While this node leads, its own time is the leader's. `acknowledged_ago`: by a quorum.
    pub(crate) fn lead(&self, acknowledged_ago: Option<Duration>) {
        let (leader_ms, at) = (self.leader_now(), self.clock.monotonic());
        *self.base.lock() = Some(TimeBase { leader_ms, at });
        // Applied after it: all that was acknowledged to a client until then is in it.
        let applied_index = self.state.applied().index;
        *self.proof.lock() = acknowledged_ago.map(|ago| Proof {
            at: at.saturating_sub(ago),
            applied_index,
        });
    }

    /// What this leader's followers count their lag from.
    pub(crate) fn proof(&self) -> Option<peer::LeaderProof> {
        let proof = (*self.proof.lock())?;
        let ago = self.clock.monotonic().saturating_sub(proof.at);
        Some(peer::LeaderProof {
            ms_ago: millis(ago),
            applied_index: proof.applied_index,
        })
    }

    /// What reads judge by: the leader's time, which goes on without it; before any contact the
    /// node's own wall clock.
    pub(crate) fn now(&self) -> Millis {
        let log_time = self.state.applied().log_time;
        let estimate = self.continued().unwrap_or_else(|| self.clock.wall_ms());
        estimate.max(log_time)
    }

    /// Whether this node's clock is off and it stamps with the voters' median.
    pub(crate) fn is_skewed(&self) -> bool {
        self.skewed.load(Ordering::Relaxed)
    }

    /// The leader's time as it was last known, carried on by the monotonic clock.
    fn continued(&self) -> Option<Millis> {
        let base = (*self.base.lock())?;
        Some(
            base.leader_ms
                .saturating_add(millis(self.clock.monotonic().saturating_sub(base.at))),
        )
    }

    /// The time of a log entry that this leader proposes.
    pub(crate) fn stamp(&self) -> Millis {
        let now = self.leader_now().max(self.state.applied().log_time);
        let mut last = self.last_stamp.lock();
        *last = now.max(*last);
        *last
    }

    /// Own wall clock, or the voters' median if that is far off.
    pub(crate) fn leader_now(&self) -> Millis {
        let (me, monotonic, wall) = (
            self.peers.identity().node_id,
            millis(self.clock.monotonic()),
            self.clock.wall_ms(),
        );
        let others: Vec<Millis> = {
            let voters = self.voters.lock();
            let views = voters
                .iter()
                .filter(|&&voter| voter != me)
                .filter_map(|&voter| self.peers.view(self.shard, voter));
            views
                .map(|view| monotonic.saturating_add_signed(view.wall_ahead_of_monotonic_ms))
                .collect()
        };
        let median = median(wall, others, self.continued());
        let off_ms = i64::try_from(i128::from(median) - i128::from(wall)).unwrap_or(i64::MAX);
        let skewed = off_ms.abs() > SKEW_MS_MAX;
        if skewed != self.skewed.swap(skewed, Ordering::Relaxed) {
            if skewed {
                tracing::error!(
                    off_ms,
                    "this node's clock is far from the voters' median: as leader it stamps with the median"
                );
            } else {
                tracing::info!("this node's clock agrees with the voters again");
            }
        }
        if skewed { median } else { wall }
    }
}

/// Of all voters whose clocks are known. Of an even number the leader's time so far decides, and
/// before there was any this node's own clock: the later half of two must not win because it is
/// later.
fn median(own: Millis, others: Vec<Millis>, so_far: Option<Millis>) -> Millis {
    let mut clocks = others;
    clocks.push(own);
    if clocks.len().is_multiple_of(2) {
        let Some(so_far) = so_far else { return own };
        clocks.push(so_far);
    }
    clocks.sort_unstable();
    clocks[clocks.len() / 2]
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Millis = 10_000_000;
    const HOUR: Millis = 3_600_000;

    #[test]
    fn one_clock_that_is_off_never_decides() {
        for own in [NOW, NOW + HOUR, NOW - HOUR] {
            assert_eq!(median(own, vec![NOW, NOW], None), NOW, "three voters");
        }
        assert_eq!(median(NOW, vec![NOW + HOUR, NOW], None), NOW);
    }

    #[test]
    fn of_two_the_leaders_time_so_far_decides() {
        assert_eq!(
            median(NOW, vec![NOW + HOUR], Some(NOW)),
            NOW,
            "the other one is ahead"
        );
        assert_eq!(
            median(NOW + HOUR, vec![NOW], Some(NOW)),
            NOW,
            "this one is ahead"
        );
        assert_eq!(
            median(NOW - HOUR, vec![NOW], Some(NOW)),
            NOW,
            "this one is behind"
        );
        assert_eq!(
            median(NOW, vec![NOW + HOUR], None),
            NOW,
            "there was no leader yet"
        );
    }

    #[test]
    fn a_lone_voter_has_its_own_clock() {
        assert_eq!(median(NOW, vec![], None), NOW);
        assert_eq!(median(NOW, vec![], Some(NOW + HOUR)), NOW);
    }
}
