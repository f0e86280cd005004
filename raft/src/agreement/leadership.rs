//! Who leads, as far as this node can know, and what time it is there.
//!
//! openraft's `current_leader` comes from the stored vote: it survives a restart and an isolation. So does nothing here: a
//! node has a leader while it leads itself and a quorum acknowledged it within one lease, or while it heard that term's
//! append or heartbeat within two.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{ShardId, peer, timeline::Millis};
use parking_lot::Mutex;

use super::{LEASE, proposer::Stamp};
use crate::{clock::Clock, peer::Peers, state::State};

/// How long a heard leader counts.
pub(crate) const HEARD_FOR: Duration = Duration::from_millis(2 * LEASE.as_millis() as u64);
/// A leader whose wall clock is further than this from the voters' median follows the median, and alarms.
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
        }
    }

    /// A leader's message was accepted; it said what it has committed.
    pub(crate) fn hear(&self, vote: Option<&peer::Vote>, header: Option<&peer::Header>, committed: Option<&peer::LogId>) {
        let (Some(vote), Some(header)) = (vote, header) else { return };
        let at = self.clock.monotonic();
        *self.heard.lock() = Some(Heard { leader: header.from, term: vote.term, at });
        if committed.is_some_and(|committed| committed.index <= self.state.applied().index) {
            *self.current_at.lock() = Some(at);
        }
        *self.base.lock() = Some(TimeBase { leader_ms: header.now_ms, at });
    }

    pub(crate) fn heard(&self) -> Option<Heard> {
        (*self.heard.lock()).filter(|heard| self.clock.monotonic().saturating_sub(heard.at) < HEARD_FOR)
    }

    /// How long ago this replica last had all that its leader had committed; `None` if never.
    pub(crate) fn current_ago(&self) -> Option<Duration> {
        (*self.current_at.lock()).map(|at| self.clock.monotonic().saturating_sub(at))
    }

    /// While this node leads, its own time is the leader's.
    pub(crate) fn lead(&self, voters: Vec<u64>) {
        *self.voters.lock() = voters;
        let base = TimeBase { leader_ms: self.leader_now(), at: self.clock.monotonic() };
        *self.base.lock() = Some(base);
    }

    /// What reads judge by: the leader's time, which goes on without it; before any contact the node's own wall clock.
    pub(crate) fn now(&self) -> Millis {
        let log_time = self.state.applied().log_time;
        let estimate = match *self.base.lock() {
            Some(base) => {
                let since = self.clock.monotonic().saturating_sub(base.at);
                base.leader_ms.saturating_add(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
            }
            None => self.clock.wall_ms(),
        };
        estimate.max(log_time)
    }

    /// Whether this node's clock is off and it stamps with the voters' median.
    pub(crate) fn is_skewed(&self) -> bool {
        self.skewed.load(Ordering::Relaxed)
    }

    /// Own wall clock, or the voters' median if that is far off.
    pub(crate) fn leader_now(&self) -> Millis {
        let voters = self.voters.lock();
        let mut offsets: Vec<i64> =
            voters.iter().filter_map(|&voter| self.peers.view(self.shard, voter)).map(|view| view.clock_offset_ms).collect();
        offsets.push(0);
        offsets.sort_unstable();
        let median = offsets[offsets.len() / 2];
        let skewed = median.abs() > SKEW_MS_MAX;
        if skewed != self.skewed.swap(skewed, Ordering::Relaxed) {
            if skewed {
                tracing::error!(offset_ms = median, "this leader's clock is far from the voters' median: it stamps with the median");
            } else {
                tracing::info!("this leader's clock agrees with the voters again");
            }
        }
        let wall = self.clock.wall_ms();
        if skewed { wall.saturating_add_signed(median) } else { wall }
    }
}

impl Stamp for LeaderClock {
    fn stamp(&self) -> Millis {
        let now = self.leader_now().max(self.state.applied().log_time);
        let mut last = self.last_stamp.lock();
        *last = now.max(*last);
        *last
    }
}
