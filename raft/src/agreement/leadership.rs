//! Who leads, as far as this node can know, and what time it is there.
//!
//! openraft's `current_leader` comes from the stored vote: it survives a restart and an isolation.
//! So does nothing here: a node has a leader while it leads itself and a quorum acknowledged it
//! within one lease, or while it heard that term's append or heartbeat within two.

use std::{sync::Arc, time::Duration};

use holdfast_proto::{ShardId, peer, timeline::Millis};
use parking_lot::Mutex;

use super::{
    alarms::Alarms,
    lag::{Confirmations, Currency},
    lease::Lease,
    log_time::LogTime,
    pace::{Pace, SharedPace},
    quorum::Quorum,
};
use crate::{
    clock::{Clock, Deadline},
    peer::Peers,
    state::State,
};

/// The clock of a voter that has not been heard for longer is not known.
const CLOCK_COUNTS_FOR: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leader {
    pub id: u64,
    pub term: u64,
    /// This node is it.
    pub is_self: bool,
}

/// The last append or heartbeat of a leader. Instants are monotonic.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    pub(crate) leader: u64,
    pub(crate) term: u64,
    at: Duration,
    /// Of this leader in this term.
    first_at: Duration,
    /// When it sent what a quorum acknowledged, as far as it has said so; never too early by more
    /// than its message took.
    quorum_at: Option<Duration>,
}

impl Heard {
    /// Until when it keeps this replica from voting for others. One that no quorum acknowledges for
    /// long, though it is heard here, keeps nobody.
    fn until(&self, pace: Pace) -> Duration {
        let kept_by = self.quorum_at.unwrap_or(self.first_at).max(self.first_at);
        (self.at + pace.lease()).min(kept_by + pace.abandoned_after())
    }
}

/// Log time here, and whether a leader said what it is since this node started.
struct Time {
    log: LogTime,
    is_known: bool,
}

/// What a replica knows of its leader and its time.
pub(crate) struct LeaderClock {
    shard: ShardId,
    clock: Clock,
    state: Arc<State>,
    peers: Arc<Peers>,
    pace: Arc<SharedPace>,
    lease: Lease,
    heard: Mutex<Option<Heard>>,
    time: Mutex<Time>,
    quorum: Mutex<Quorum>,
    currency: Currency,
    confirmations: Confirmations,
    alarms: Alarms,
}

impl LeaderClock {
    pub(crate) fn new(
        shard: ShardId,
        clock: Clock,
        state: Arc<State>,
        peers: Arc<Peers>,
        pace: Arc<SharedPace>,
    ) -> Self {
        let log = LogTime::new(state.applied().log_time, clock.monotonic());
        Self {
            shard,
            clock,
            state,
            peers,
            pace,
            lease: Lease::default(),
            heard: Mutex::default(),
            time: Mutex::new(Time {
                log,
                is_known: false,
            }),
            quorum: Mutex::default(),
            currency: Currency::new(),
            confirmations: Confirmations::default(),
            alarms: Alarms::default(),
        }
    }

    /// A leader's message came.
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
            let before =
                heard.filter(|heard| heard.term == vote.term && heard.leader == header.from);
            // Not every message says it; what the last one said still holds.
            let quorum_at = header
                .proof
                .as_ref()
                .map(|proof| at.saturating_sub(Duration::from_millis(proof.ms_ago)))
                .or(before.and_then(|before| before.quorum_at));
            *heard = Some(Heard {
                leader: header.from,
                term: vote.term,
                at,
                first_at: before.map_or(at, |before| before.first_at),
                quorum_at,
            });
        }
        *self.time.lock() = Time {
            log: LogTime::new(header.now_ms, at),
            is_known: true,
        };
        if let Some(confirmed) = header
            .proof
            .as_ref()
            .and_then(|proof| proof.confirmed.as_ref())
        {
            self.currency.confirmed(at, confirmed);
        }
    }

    // ---- at what pace ----

    pub(crate) fn pace(&self) -> Pace {
        self.pace.get()
    }

    /// Shard 0's state says what the cluster's pace is.
    pub(crate) fn follow_pace(&self) {
        if self.shard == 0 {
            self.pace.set(self.state.applied().pace.into());
        }
    }

    pub(crate) fn monotonic(&self) -> Duration {
        self.clock.monotonic()
    }

    pub(crate) fn deadline(&self, timeout: Duration) -> Deadline {
        self.clock.deadline(timeout)
    }

    // ---- who leads ----

    /// The leader that this replica hears, while a quorum acknowledges it.
    pub(crate) fn heard(&self) -> Option<Heard> {
        let (now, heard_for) = (self.clock.monotonic(), self.pace().heard_for());
        let counts = |at: Duration| now.saturating_sub(at) < heard_for;
        (*self.heard.lock()).filter(|heard| counts(heard.at) && heard.quorum_at.is_some_and(counts))
    }

    /// Until when a leader of this term or a later one counts here; `None` if none was heard.
    pub(crate) fn leader_until(&self, term: u64) -> Option<Duration> {
        let pace = self.pace();
        (*self.heard.lock())
            .filter(|heard| heard.term >= term)
            .map(|heard| heard.until(pace))
    }

    /// A member acknowledged what this replica sent it then, as leader of that term.
    pub(crate) fn acknowledged(&self, member: u64, term: u64, sent_at: Duration) {
        let me = self.peers.identity().node_id;
        self.lease.acknowledge(me, member, term, sent_at);
    }

    /// How long ago this leader of a term sent what a quorum acknowledged; `None` if never.
    pub(crate) fn quorum_acknowledged_ago(&self, term: u64, now: Duration) -> Option<Duration> {
        let me = self.peers.identity().node_id;
        let at = self.lease.by_quorum(me, term, now)?;
        Some(now.saturating_sub(at))
    }

    /// Whether this replica, which leads a term, may count as its leader.
    pub(crate) fn has_lease(&self, term: u64, now: Duration) -> bool {
        self.quorum_acknowledged_ago(term, now)
            .is_some_and(|ago| ago < self.pace().lease())
    }

    /// The voters of the group, whoever leads it: a new leader needs them with its first stamp.
    pub(crate) fn know_voters(&self, quorum: Quorum) {
        self.lease
            .know_quorum(self.peers.identity().node_id, quorum.clone());
        *self.quorum.lock() = quorum;
    }

    // ---- how far behind it a replica may be ----

    /// When this replica, which follows, had all that was acknowledged by then; `None` if it never
    /// had.
    pub(crate) fn current_at(&self) -> Option<Duration> {
        self.currency.current_at(self.state.applied().index)
    }

    /// For each answer to the leader.
    pub(crate) fn mark(&self) -> u64 {
        self.currency.mark(self.clock.monotonic())
    }

    /// What a message of the leader of a term says of its leading.
    pub(crate) fn proof(&self, term: u64, to: u64) -> Option<peer::LeaderProof> {
        let ago = self.quorum_acknowledged_ago(term, self.clock.monotonic())?;
        Some(peer::LeaderProof {
            ms_ago: millis(ago),
            confirmed: self.confirmations.of(term, to),
        })
    }

    /// Confirms to followers that they are current. This replica leads the term and has applied what
    /// was before it.
    pub(crate) fn confirm(&self, term: u64, members: impl Iterator<Item = u64>) {
        let now = self.clock.monotonic();
        let Some(ago) = self.quorum_acknowledged_ago(term, now) else {
            return;
        };
        // Applied after it: all that was acknowledged to a client until then is in it.
        let applied_index = self.state.applied().index;
        for member in members {
            let view = self.peers.view(self.shard, member);
            if let Some((mark, heard_at)) = view.and_then(|view| Some((view.mark?, view.heard_at)))
            {
                let quorum_at = now.saturating_sub(ago);
                self.confirmations
                    .step(term, member, (mark, heard_at), quorum_at, applied_index);
            }
        }
    }

    // ---- what time it is ----

    /// What reads judge by: log time, as the leader had it and as it goes on without it; before any
    /// contact the node's own wall clock.
    pub(crate) fn now(&self) -> Millis {
        let applied = self.state.applied().log_time;
        let time = self.time.lock();
        let now = if time.is_known {
            time.log.at(self.clock.monotonic())
        } else {
            self.clock.wall_ms()
        };
        now.max(applied)
    }

    /// What a leader tells its followers of its time: never later than its next stamp.
    pub(crate) fn log_time(&self) -> Millis {
        self.time.lock().log.at(self.clock.monotonic())
    }

    /// The time of a log entry that this leader proposes; never before the one before.
    pub(crate) fn stamp(&self) -> Millis {
        let now = self.clock.monotonic();
        let voters = self.voters_clock(now);
        let mut time = self.time.lock();
        time.log.advance(now, voters, self.state.applied().log_time);
        time.is_known = true;
        time.log.at(now)
    }

    /// Keeps log time at the voters' clock while this replica leads, and says when a clock is wrong.
    pub(crate) fn keep_time(&self) {
        self.stamp();
        let now = self.clock.monotonic();
        if let Some(voters) = self.voters_clock(now) {
            let ahead_ms = self.time.lock().log.ahead_ms(now, voters);
            self.alarms
                .note(difference_ms(self.clock.wall_ms(), voters), ahead_ms);
        }
    }

    /// How far log time is ahead of the voters' clock, as this leader last saw it.
    pub(crate) fn log_time_ahead_ms(&self) -> i64 {
        self.alarms.log_time_ahead_ms()
    }

    /// Whether this leader's own clock is off.
    pub(crate) fn is_skewed(&self) -> bool {
        self.alarms.is_skewed()
    }

    /// The latest instant that the clocks of a quorum have reached; `None` if too few are known.
    fn voters_clock(&self, now: Duration) -> Option<Millis> {
        let me = self.peers.identity().node_id;
        let clock_of = |voter| {
            if voter == me {
                return Some(Duration::from_millis(self.clock.wall_ms()));
            }
            let view = self.peers.view(self.shard, voter)?;
            let is_there = now.saturating_sub(view.heard_at) < CLOCK_COUNTS_FOR;
            let wall = millis(now).saturating_add_signed(view.wall_ahead_of_monotonic_ms);
            is_there.then(|| Duration::from_millis(wall))
        };
        self.quorum.lock().latest(clock_of).map(millis)
    }
}

fn millis(duration: Duration) -> Millis {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn difference_ms(one: Millis, other: Millis) -> i64 {
    i64::try_from(i128::from(one) - i128::from(other)).unwrap_or(i64::MAX)
}
