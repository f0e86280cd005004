//! How far behind its leader a replica may be, never said to be less than it is, without clocks that
//! agree.
//!
//! ```text
//! follower  answers at t0 ───────────────────────────────► told: t0 is confirmed, at index i ─► applied i: current at t0
//! leader       heard at r ─► sent at q ≥ r, acknowledged by a quorum ─┘ has applied i
//! ```
//! At q this node led, so whatever was acknowledged to anybody before t0 is in what it had applied
//! after q. The follower counts from its own t0 by its own clock: ways, pauses and frozen processes
//! only make the lag longer.

use std::{collections::BTreeMap, time::Duration};

use holdfast_proto::peer::Confirmed;
use parking_lot::Mutex;

// ---- the follower's side ----

/// When this replica was current.
pub(crate) struct Currency {
    /// Makes the marks of this process differ from those of one before it.
    base: u64,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    current_at: Option<Duration>,
    /// Confirmed and not yet applied so far; the first of them, and the newest.
    waiting: Option<Claim>,
    newest: Option<Claim>,
}

/// Current at an instant, once so much is applied.
#[derive(Debug, Clone, Copy)]
struct Claim {
    at: Duration,
    index: u64,
}

impl Currency {
    pub(crate) fn new() -> Self {
        Self {
            base: rand::random(),
            known: Mutex::default(),
        }
    }

    /// Stands for this instant in an answer to the leader.
    pub(crate) fn mark(&self, now: Duration) -> u64 {
        self.base.wrapping_add(micros(now))
    }

    /// The leader led after it got the mark, and had applied so much.
    pub(crate) fn confirmed(&self, now: Duration, confirmed: &Confirmed) {
        let since = confirmed.mark.wrapping_sub(self.base);
        // Another process's.
        if since > micros(now) {
            return;
        }
        let claim = Claim {
            at: Duration::from_micros(since),
            index: confirmed.applied_index,
        };
        let mut known = self.known.lock();
        known.newest = Some(claim);
        known.waiting.get_or_insert(claim);
    }

    /// When this replica, which has applied so much, was current; `None` if it never was.
    pub(crate) fn current_at(&self, applied_index: u64) -> Option<Duration> {
        let mut known = self.known.lock();
        let reached = |claim: &Claim| claim.index <= applied_index;
        for claim in [known.waiting, known.newest].into_iter().flatten() {
            if reached(&claim) {
                known.current_at = known.current_at.max(Some(claim.at));
            }
        }
        if known.waiting.is_some_and(|claim| reached(&claim)) {
            known.waiting = known.newest.filter(|claim| !reached(claim));
        }
        known.current_at
    }
}

// ---- the leader's side ----

/// What the leader of a term confirms to each follower.
#[derive(Default)]
pub(crate) struct Confirmations {
    of: Mutex<(u64, BTreeMap<u64, Confirming>)>,
}

#[derive(Default)]
struct Confirming {
    /// A mark and when it was heard.
    waiting: Option<(u64, Duration)>,
    confirmed: Option<Confirmed>,
}

impl Confirmations {
    /// The newest mark of a follower, when it was heard, when this leader of a term sent what a
    /// quorum acknowledged, and what it has applied by now, all of earlier terms included.
    pub(crate) fn step(
        &self,
        term: u64,
        follower: u64,
        mark: (u64, Duration),
        quorum_at: Duration,
        applied_index: u64,
    ) {
        let mut of = self.of.lock();
        if of.0 != term {
            *of = (term, BTreeMap::new());
        }
        let confirming = of.1.entry(follower).or_default();
        // Kept until it is confirmed: marks come faster than quorums do.
        let (waiting, heard_at) = *confirming.waiting.get_or_insert(mark);
        if heard_at <= quorum_at {
            confirming.confirmed = Some(Confirmed {
                mark: waiting,
                applied_index,
            });
            confirming.waiting = Some(mark);
        }
    }

    /// What to tell a follower.
    pub(crate) fn of(&self, term: u64, follower: u64) -> Option<Confirmed> {
        let of = self.of.lock();
        (of.0 == term)
            .then(|| of.1.get(&follower)?.confirmed)
            .flatten()
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn confirmed(currency: &Currency, at_ms: u64, index: u64) -> Confirmed {
        Confirmed {
            mark: currency.mark(at(at_ms)),
            applied_index: index,
        }
    }

    #[test]
    fn a_replica_was_current_when_it_answered_once_it_has_applied_what_was_confirmed() {
        let currency = Currency::new();
        assert_eq!(currency.current_at(100), None);
        currency.confirmed(at(50), &confirmed(&currency, 10, 7));
        assert_eq!(currency.current_at(6), None);
        assert_eq!(currency.current_at(7), Some(at(10)));
        currency.confirmed(at(90), &confirmed(&currency, 60, 9));
        assert_eq!(currency.current_at(7), Some(at(10)));
        assert_eq!(currency.current_at(9), Some(at(60)));
    }

    #[test]
    fn it_is_current_under_load_too_though_newer_claims_come_all_the_time() {
        let currency = Currency::new();
        for n in 1..100 {
            currency.confirmed(at(n * 10 + 5), &confirmed(&currency, n * 10, n));
            let current_at = currency.current_at(n.saturating_sub(3));
            if n > 8 {
                let behind = at(n * 10) - current_at.expect("some claim was reached");
                assert!(behind <= at(80), "{behind:?} at {n}");
            }
        }
    }

    #[test]
    fn a_mark_of_another_process_says_nothing() {
        let (before, now) = (Currency::new(), Currency::new());
        now.confirmed(at(1000), &confirmed(&before, 900, 1));
        assert_eq!(now.current_at(1), None);
        now.confirmed(at(1000), &confirmed(&now, 1001, 1));
        assert_eq!(now.current_at(1), None, "nor one of the future");
    }

    #[test]
    fn a_leader_confirms_what_it_heard_before_it_led() {
        let confirmations = Confirmations::default();
        let step = |term, mark, heard, quorum| {
            confirmations.step(term, 2, (mark, at(heard)), at(quorum), mark);
            confirmations.of(term, 2).map(|confirmed| confirmed.mark)
        };
        assert_eq!(
            step(1, 11, 100, 99),
            None,
            "heard after what was acknowledged"
        );
        assert_eq!(step(1, 12, 120, 110), Some(11), "not the newer one");
        assert_eq!(step(1, 13, 130, 119), Some(11));
        assert_eq!(step(1, 14, 140, 120), Some(12));
        assert_eq!(step(2, 15, 150, 140), None, "another term");
        assert_eq!(confirmations.of(1, 2), None);
        assert_eq!(step(2, 16, 160, 150), Some(15));
        assert_eq!(
            confirmations.of(2, 3),
            None,
            "nothing was heard of that one"
        );
    }
}
