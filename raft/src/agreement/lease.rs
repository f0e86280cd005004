//! A leader's lease: when a quorum last acknowledged something that this node sent as leader of a
//! term. It counts from the sending, so that whoever acknowledged it votes for nobody else for as
//! long. Answers count whenever they come: a lease that was lost is earned back.

use std::{collections::BTreeMap, time::Duration};

use parking_lot::Mutex;

use super::quorum::Quorum;

/// What was acknowledged, as monotonic instants of sending.
#[derive(Default)]
pub(crate) struct Lease {
    acknowledged: Mutex<Acknowledged>,
}

#[derive(Default)]
struct Acknowledged {
    term: u64,
    by: BTreeMap<u64, Duration>,
    quorum: Quorum,
    by_quorum: Option<Duration>,
}

impl Lease {
    /// The voters may have changed.
    pub(crate) fn know_quorum(&self, me: u64, quorum: Quorum) {
        let mut acknowledged = self.acknowledged.lock();
        if acknowledged.quorum != quorum {
            acknowledged.quorum = quorum;
            acknowledged.count(me);
        }
    }

    /// A voter acknowledged what this node sent then, as leader of that term.
    pub(crate) fn acknowledge(&self, me: u64, voter: u64, term: u64, sent_at: Duration) {
        let mut acknowledged = self.acknowledged.lock();
        if term < acknowledged.term {
            return;
        }
        if term > acknowledged.term {
            acknowledged.term = term;
            acknowledged.by.clear();
        }
        let latest = acknowledged.by.entry(voter).or_default();
        *latest = sent_at.max(*latest);
        acknowledged.count(me);
    }

    /// When this leader sent what a quorum has acknowledged in this term; `now` for a lone voter,
    /// who is its own quorum.
    pub(crate) fn by_quorum(&self, me: u64, term: u64, now: Duration) -> Option<Duration> {
        let acknowledged = self.acknowledged.lock();
        if acknowledged.quorum.is_only(me) {
            return Some(now);
        }
        (acknowledged.term == term)
            .then_some(acknowledged.by_quorum)
            .flatten()
    }
}

impl Acknowledged {
    fn count(&mut self, me: u64) {
        let by = &self.by;
        self.by_quorum = self.quorum.latest(|voter| {
            if voter == me {
                Some(Duration::MAX)
            } else {
                by.get(&voter).copied()
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ME: u64 = 1;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn of_three() -> Lease {
        let lease = Lease::default();
        lease.know_quorum(ME, Quorum::new(vec![[1, 2, 3].into()]));
        lease
    }

    #[test]
    fn a_quorum_acknowledges_what_its_slowest_member_has() {
        let lease = of_three();
        assert_eq!(lease.by_quorum(ME, 1, at(9)), None);
        lease.acknowledge(ME, 2, 1, at(10));
        assert_eq!(lease.by_quorum(ME, 1, at(99)), Some(at(10)));
        lease.acknowledge(ME, 3, 1, at(30));
        assert_eq!(lease.by_quorum(ME, 1, at(99)), Some(at(30)));
        lease.know_quorum(ME, Quorum::new(vec![[1, 2, 3, 4, 5].into()]));
        assert_eq!(lease.by_quorum(ME, 1, at(99)), Some(at(10)));
    }

    #[test]
    fn a_late_answer_never_takes_back_a_later_one() {
        let lease = of_three();
        lease.acknowledge(ME, 2, 1, at(30));
        lease.acknowledge(ME, 2, 1, at(10));
        assert_eq!(lease.by_quorum(ME, 1, at(99)), Some(at(30)));
    }

    #[test]
    fn what_was_acknowledged_in_another_term_does_not_count() {
        let lease = of_three();
        lease.acknowledge(ME, 2, 1, at(10));
        assert_eq!(lease.by_quorum(ME, 2, at(99)), None);
        lease.acknowledge(ME, 3, 2, at(20));
        assert_eq!(lease.by_quorum(ME, 2, at(99)), Some(at(20)));
        lease.acknowledge(ME, 2, 1, at(90));
        assert_eq!(lease.by_quorum(ME, 2, at(99)), Some(at(20)));
        assert_eq!(lease.by_quorum(ME, 1, at(99)), None);
    }

    #[test]
    fn a_lone_voter_is_its_own_quorum() {
        let lease = Lease::default();
        assert_eq!(lease.by_quorum(ME, 1, at(9)), None, "not a voter yet");
        lease.know_quorum(ME, Quorum::new(vec![[1].into()]));
        assert_eq!(lease.by_quorum(ME, 1, at(9)), Some(at(9)));
    }
}
