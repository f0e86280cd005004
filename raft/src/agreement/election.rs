//! When a replica stands for leader. openraft's own timer is switched off, since its times are
//! fixed: this one follows the pace, and asks first whether a quorum would vote for it.
//!
//! ```text
//! leader heard ─► lease over ─► random wait ─► "would you?" ─► quorum: yes ─► election
//!                                   ▲              │ no            │ lost: twice the patience
//!                                   └──────────────┴───────────────┘
//! ```
//! A voter that said yes to one candidate says no to others, and does not stand itself, until that
//! one had the time to be elected: slow disks do not make candidates collide. Of two that ask each
//! other at the same time the one with the shorter log gives way, of equal logs the one with the
//! lesser id, so that far voters do not collide either.

use std::time::Duration;

use super::{pace::Pace, types::LogId};

/// Patience is doubled so often at most.
const DOUBLED_MAX: u32 = 4;
/// It grows no further than this, unless the pace itself asks for more: what a disk takes is
/// measured, and a cluster that lost elections by chance must not wait for minutes.
const PATIENCE_MAX: Duration = Duration::from_secs(5);

/// How a replica stands to its leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Situation {
    /// Not a voter, or one that has just started: it may not stand.
    Bystander,
    Leads,
    /// A leader counts until then, as monotonic time; in the past if it counts no more.
    Follows {
        until: Duration,
    },
    Leaderless,
}

/// Who asks for votes. The greater one is preferred: it may win the lesser one's vote, and not the
/// other way round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Candidate {
    pub(crate) last_log_id: Option<LogId>,
    pub(crate) id: u64,
}

#[derive(Debug, Clone, Copy)]
struct Promise {
    candidate: Candidate,
    until: Duration,
    /// To itself, while it only asks: it may still give way.
    asks: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Election {
    /// When this replica next asks whether it would be elected; unset while a leader counts.
    next: Option<Duration>,
    /// Elections it stood in since there was a leader.
    lost: u32,
    promised: Option<Promise>,
}

impl Election {
    /// Whether it is time to ask for votes. `jitter` is in [0, 1).
    pub(crate) fn is_due(
        &mut self,
        now: Duration,
        situation: Situation,
        pace: Pace,
        jitter: f64,
    ) -> bool {
        let from = match situation {
            Situation::Bystander => {
                self.next = None;
                return false;
            }
            Situation::Leads => {
                *self = Self::default();
                return false;
            }
            Situation::Follows { until } if until > now => {
                *self = Self::default();
                return false;
            }
            Situation::Follows { until } => until,
            Situation::Leaderless => now,
        };
        let next = *self.next.get_or_insert(from + pace.election(jitter));
        now >= next && self.promised(now).is_none()
    }

    /// Whether this voter would vote for a candidate as far as others are concerned; if so it keeps
    /// to that for as long as an election takes.
    pub(crate) fn promise(&mut self, now: Duration, candidate: Candidate, pace: Pace) -> bool {
        let is_kept =
            |kept: &Promise| kept.candidate.id != candidate.id && !kept.gives_way_to(candidate);
        if self.promised(now).as_ref().is_some_and(is_kept) {
            return false;
        }
        self.keep(candidate, now + pace.vote_patience());
        true
    }

    /// This replica asks others now: it promises itself nothing else meanwhile.
    pub(crate) fn asks(&mut self, now: Duration, me: Candidate, pace: Pace) {
        self.promised = Some(Promise {
            candidate: me,
            until: now + pace.ask_timeout() * 2,
            asks: true,
        });
    }

    /// Whether it gave way to nobody since it asked.
    pub(crate) fn may_stand(&self) -> bool {
        self.promised.is_some_and(|promise| promise.asks)
    }

    /// They would not vote for it.
    pub(crate) fn is_refused(&mut self, now: Duration, pace: Pace, jitter: f64) {
        if self.may_stand() {
            self.promised = None;
        }
        self.next = Some(now + pace.election(jitter));
    }

    /// It stands: the next time only after this election had its time.
    pub(crate) fn stands(&mut self, now: Duration, me: Candidate, pace: Pace, jitter: f64) {
        let least = pace.vote_patience();
        let patience = (least * 2u32.pow(self.lost.min(DOUBLED_MAX))).min(least.max(PATIENCE_MAX));
        self.lost = self.lost.saturating_add(1);
        self.keep(me, now + patience);
        self.next = Some(now + patience + pace.election(jitter));
    }

    fn keep(&mut self, candidate: Candidate, until: Duration) {
        self.promised = Some(Promise {
            candidate,
            until,
            asks: false,
        });
    }

    fn promised(&self, now: Duration) -> Option<Promise> {
        self.promised.filter(|promise| promise.until > now)
    }
}

impl Promise {
    fn gives_way_to(&self, candidate: Candidate) -> bool {
        self.asks && candidate > self.candidate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agreement::types::CommittedLeaderId;

    const ME: Candidate = candidate(1);

    const fn candidate(id: u64) -> Candidate {
        Candidate {
            last_log_id: None,
            id,
        }
    }

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn slow() -> Pace {
        Pace::new(at(400), Duration::ZERO)
    }

    #[test]
    fn a_replica_stands_only_after_its_leaders_lease_and_a_wait() {
        let (mut election, pace) = (Election::default(), Pace::default());
        let follows = |until| Situation::Follows { until: at(until) };
        let mut due = |now, situation| election.is_due(at(now), situation, pace, 0.5);
        assert!(!due(0, follows(300)));
        assert!(!due(299, follows(300)));
        assert!(!due(301, follows(300)));
        assert!(!due(549, follows(300)));
        assert!(due(550, follows(300)), "300 and 250");
        assert!(!due(560, follows(860)), "it was heard again");
        assert!(!due(1000, follows(860)));
        assert!(due(1110, follows(860)));
    }

    #[test]
    fn who_may_not_stand_or_leads_never_does() {
        let (mut election, pace) = (Election::default(), Pace::default());
        for situation in [Situation::Bystander, Situation::Leads] {
            assert!(!election.is_due(at(0), situation, pace, 0.0));
            assert!(!election.is_due(at(100_000), situation, pace, 0.0));
        }
        assert!(!election.is_due(at(100_000), Situation::Leaderless, pace, 0.0));
        assert!(election.is_due(at(100_200), Situation::Leaderless, pace, 0.0));
    }

    #[test]
    fn a_voter_promises_one_candidate_and_does_not_stand_meanwhile() {
        let (mut election, pace) = (Election::default(), slow());
        election.is_due(at(0), Situation::Leaderless, pace, 0.0);
        assert!(election.promise(at(100), candidate(2), pace));
        assert!(
            election.promise(at(110), candidate(2), pace),
            "again to the same"
        );
        assert!(!election.promise(at(120), candidate(3), pace));
        assert!(!election.is_due(at(1000), Situation::Leaderless, pace, 0.0));
        let over = at(110) + pace.vote_patience();
        assert!(election.is_due(over, Situation::Leaderless, pace, 0.0));
        assert!(
            election.promise(over, candidate(3), pace),
            "the other had its time"
        );
    }

    #[test]
    fn a_candidate_waits_twice_as_long_after_each_lost_election() {
        let (mut election, pace) = (Election::default(), Pace::default());
        let mut now = at(0);
        let mut waits = Vec::new();
        for _ in 0..6 {
            election.asks(now, ME, pace);
            election.stands(now, ME, pace, 0.0);
            assert!(
                !election.promise(now, candidate(2), pace),
                "it stands itself"
            );
            let stood = now;
            while !election.is_due(now, Situation::Leaderless, pace, 0.0) {
                now += at(20);
            }
            waits.push((now - stood - at(200)).as_millis() / pace.vote_patience().as_millis());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 16]);
        // On slow disks too it waits for seconds and not for minutes.
        let (mut election, now) = (Election::default(), at(0));
        for _ in 0..6 {
            election.stands(now, ME, slow(), 0.0);
        }
        let longest = now + PATIENCE_MAX + at(400);
        assert!(election.is_due(longest, Situation::Leaderless, slow(), 0.0));
        let mut election = Election::default();
        election.is_due(now, Situation::Leads, pace, 0.0);
        election.stands(now, ME, pace, 0.0);
        assert!(election.is_due(
            now + pace.vote_patience() + at(200),
            Situation::Leaderless,
            pace,
            0.0
        ));
    }

    #[test]
    fn of_two_that_ask_each_other_one_gives_way() {
        let pace = slow();
        let (mut lesser, mut greater) = (Election::default(), Election::default());
        lesser.asks(at(0), candidate(1), pace);
        greater.asks(at(0), candidate(2), pace);
        assert!(!greater.promise(at(1), candidate(1), pace));
        assert!(lesser.promise(at(1), candidate(2), pace));
        assert!(greater.may_stand());
        assert!(!lesser.may_stand(), "though a third may have said yes");
        lesser.is_refused(at(2), pace, 0.0);
        assert!(!lesser.promise(at(3), candidate(3), pace), "it keeps to it");
    }

    #[test]
    fn of_two_that_ask_each_other_the_one_with_the_shorter_log_gives_way() {
        let pace = slow();
        let with_log = |id, index| Candidate {
            last_log_id: Some(LogId::new(CommittedLeaderId::new(1), index)),
            id,
        };
        let (longer, shorter) = (with_log(1, 8), with_log(2, 7));
        let (mut of_longer, mut of_shorter) = (Election::default(), Election::default());
        of_longer.asks(at(0), longer, pace);
        of_shorter.asks(at(0), shorter, pace);
        assert!(!of_longer.promise(at(1), shorter, pace));
        assert!(of_shorter.promise(at(1), longer, pace));
        assert!(of_longer.may_stand() && !of_shorter.may_stand());
    }

    #[test]
    fn who_is_refused_asks_again_soon_and_may_promise_another_at_once() {
        let (mut election, pace) = (Election::default(), slow());
        election.is_due(at(0), Situation::Leaderless, pace, 0.0);
        election.asks(at(200), ME, pace);
        election.is_refused(at(210), pace, 0.0);
        assert!(!election.is_due(at(400), Situation::Leaderless, pace, 0.0));
        assert!(election.is_due(at(410), Situation::Leaderless, pace, 0.0));
        assert!(election.promise(at(411), candidate(2), pace));
    }
}
