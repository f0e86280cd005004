//! An entry's life as arithmetic, the same on every node.
//!
//! ```text
//! fetched_at       refresh_at         fresh_until       stale_until          expires_at
//!     |---- FRESH ----|---- FRESH, due ----|------ STALE ------|-- STALE_ON_ERROR --|-- kept, not served --|
//! ```
//!
//! Instants are absolute milliseconds since 1970 made from the leader's stamp. `now >= t` means
//! past `t`, everywhere. Both stale windows count from `fresh_until` (RFC 5861): the entry expires
//! at the later end of the two.

use crate::peer::{EntryRecord, Lifetime};

/// Milliseconds since 1970, or a duration in milliseconds.
pub type Millis = u64;

/// An instant that never comes, a duration that never ends.
pub const FOREVER: Millis = Millis::MAX;

/// `instant + duration`, where for ever stays for ever.
pub fn after(instant: Millis, duration: Millis) -> Millis {
    instant.saturating_add(duration)
}

/// Where in its life an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Fresh,
    Stale,
    /// Served only if nothing better can be had.
    StaleOnError,
    Expired,
}

/// The instants of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeline {
    pub fetched_at: Millis,
    /// `FOREVER` if the entry is never refreshed.
    pub refresh_at: Millis,
    pub fresh_until: Millis,
    pub stale_while_revalidate: Millis,
    pub stale_if_error: Millis,
    pub keep: Millis,
}

impl Timeline {
    /// The life of a value stored at `stamp` that took `took` to come: it began to age when it was
    /// asked for, and was `age` old then already. Whatever the fetch took, the value is not due for a
    /// refresh within the policy's `min_refresh_interval` of its arrival, nor stale sooner than it
    /// would be by its own life: or a slow upstream would be called back to back. One without any
    /// life is never fresh.
    pub fn from_lifetime(stamp: Millis, took: Millis, age: Millis, lifetime: &Lifetime) -> Self {
        let asked_at = stamp.saturating_sub(took);
        let fetched_at = asked_at.saturating_sub(age);
        let at_rest_ms = lifetime.min_refresh_interval_ms;
        let fresh_at_least_ms = match lifetime.fresh_ms {
            0 => 0,
            fresh_ms if took >= fresh_ms => at_rest_ms,
            fresh_ms => at_rest_ms.min(fresh_ms),
        };
        Self {
            fetched_at,
            refresh_at: after(fetched_at, lifetime.refresh_after_ms).max(after(stamp, at_rest_ms)),
            fresh_until: after(fetched_at, lifetime.fresh_ms).max(after(stamp, fresh_at_least_ms)),
            stale_while_revalidate: lifetime.stale_while_revalidate_ms,
            stale_if_error: lifetime.stale_if_error_ms,
            keep: lifetime.keep_ms,
        }
    }

    pub fn stale_until(&self) -> Millis {
        after(self.fresh_until, self.stale_while_revalidate)
    }

    pub fn expires_at(&self) -> Millis {
        after(
            self.fresh_until,
            self.stale_while_revalidate.max(self.stale_if_error),
        )
    }

    /// When the entry goes: until then an expired value may turn out to be its source's still.
    pub fn kept_until(&self) -> Millis {
        after(self.expires_at(), self.keep)
    }

    pub fn phase(&self, now: Millis) -> Phase {
        match now {
            _ if now < self.fresh_until => Phase::Fresh,
            _ if now < self.stale_until() => Phase::Stale,
            _ if now < self.expires_at() => Phase::StaleOnError,
            _ => Phase::Expired,
        }
    }

    /// From when on the value is due for a refresh: its refresh point, or its end where nothing is
    /// refreshed ahead.
    pub fn due_at(&self) -> Millis {
        match self.refresh_at {
            FOREVER => self.fresh_until,
            refresh_at => refresh_at,
        }
    }

    /// Stale from `now` on, as an Invalidate makes it; never later than it would have been.
    pub fn invalidated(mut self, now: Millis) -> Self {
        self.fresh_until = self.fresh_until.min(now);
        self.refresh_at = self.refresh_at.min(now);
        self
    }

    pub fn age(&self, now: Millis) -> Millis {
        now.saturating_sub(self.fetched_at)
    }

    /// Until the value stops being fresh, negative when it has; `None` if it never does.
    pub fn ttl(&self, now: Millis) -> Option<i64> {
        (self.fresh_until != FOREVER).then(|| {
            let magnitude = |ms: Millis| i64::try_from(ms).unwrap_or(i64::MAX);
            if now <= self.fresh_until {
                magnitude(self.fresh_until - now)
            } else {
                -magnitude(now - self.fresh_until)
            }
        })
    }

    /// Until the value is served no more; `None` if always.
    pub fn expires_in(&self, now: Millis) -> Option<Millis> {
        let expires_at = self.expires_at();
        (expires_at != FOREVER).then(|| expires_at.saturating_sub(now))
    }
}

impl From<&EntryRecord> for Timeline {
    fn from(record: &EntryRecord) -> Self {
        Self {
            fetched_at: record.fetched_at_ms,
            refresh_at: record.refresh_at_ms,
            fresh_until: record.fresh_until_ms,
            stale_while_revalidate: record.stale_while_revalidate_ms,
            stale_if_error: record.stale_if_error_ms,
            keep: record.keep_ms,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn millis() -> impl Strategy<Value = Millis> {
        prop_oneof![0..10_000u64, any::<u64>(), Just(FOREVER)]
    }

    prop_compose! {
        fn timeline()(stamp in 0..10_000u64, took in 0..20_000u64, age in 0..20_000u64, fresh_ms in millis(), refresh_after_ms in millis(),
                      stale_while_revalidate_ms in millis(), stale_if_error_ms in millis(), min_refresh_interval_ms in millis(), keep_ms in millis()) -> Timeline {
            Timeline::from_lifetime(stamp, took, age, &Lifetime { fresh_ms, refresh_after_ms, stale_while_revalidate_ms, stale_if_error_ms, min_refresh_interval_ms, keep_ms })
        }
    }

    proptest! {
        #[test]
        fn the_instants_are_in_order(t in timeline()) {
            prop_assert!(t.fetched_at <= t.fresh_until);
            prop_assert!(t.fresh_until <= t.stale_until());
            prop_assert!(t.stale_until() <= t.expires_at());
            prop_assert!(t.expires_at() <= t.kept_until());
        }

        #[test]
        fn a_slow_fetch_lengthens_nothing_but_the_rest_after_it(stamp in 1_000_000..2_000_000u64, took in 0..1_000_000u64, fresh_ms in 0..1_000_000u64,
                                                                refresh_after_ms in 0..1_000_000u64, min_refresh_interval_ms in 0..10_000u64) {
            let lifetime = Lifetime { fresh_ms, refresh_after_ms, min_refresh_interval_ms, ..Lifetime::default() };
            let t = Timeline::from_lifetime(stamp, took, 0, &lifetime);
            let rested = stamp + min_refresh_interval_ms;
            prop_assert_eq!(t.refresh_at, (stamp - took + refresh_after_ms).max(rested));
            prop_assert!(t.fresh_until == stamp - took + fresh_ms || t.fresh_until <= rested);
            prop_assert!(t.fresh_until >= rested.min(stamp + fresh_ms));
            if fresh_ms > 0 && took >= fresh_ms {
                prop_assert!(t.fresh_until >= rested);
            }
        }

        #[test]
        fn what_was_old_when_it_was_sent_ends_so_much_sooner(stamp in 1_000_000..2_000_000u64, took in 0..1_000u64, age in 0..500_000u64) {
            let lifetime = Lifetime { fresh_ms: 600_000, refresh_after_ms: 550_000, ..Lifetime::default() };
            let (new, old) = (Timeline::from_lifetime(stamp, took, 0, &lifetime), Timeline::from_lifetime(stamp, took, age, &lifetime));
            prop_assert_eq!((old.fetched_at, old.fresh_until, old.refresh_at), (new.fetched_at - age, new.fresh_until - age, (new.refresh_at - age).max(stamp)));
        }

        #[test]
        fn an_entry_only_grows_older(t in timeline(), a in millis(), b in millis()) {
            let (early, late) = (a.min(b), a.max(b));
            prop_assert!(t.phase(early) <= t.phase(late));
            prop_assert!(t.age(early) <= t.age(late));
        }

        #[test]
        fn reaching_an_instant_is_being_past_it(t in timeline()) {
            prop_assert_ne!(t.phase(t.fresh_until), Phase::Fresh);
            prop_assert_eq!(t.phase(t.expires_at()), Phase::Expired);
        }

        #[test]
        fn what_lives_for_ever_has_no_end(t in timeline(), now in 0..u64::MAX) {
            if t.fresh_until == FOREVER { prop_assert_eq!(t.phase(now), Phase::Fresh); prop_assert_eq!(t.ttl(now), None); }
            if t.expires_at() == FOREVER { prop_assert_ne!(t.phase(now), Phase::Expired); prop_assert_eq!(t.expires_in(now), None); }
        }

        #[test]
        fn ttl_and_phase_agree(t in timeline(), now in millis()) {
            if let Some(ttl) = t.ttl(now) { prop_assert_eq!(ttl > 0, t.phase(now) == Phase::Fresh); }
        }

        #[test]
        fn an_invalidated_entry_is_not_fresh_and_never_lives_longer(t in timeline(), now in millis(), later in millis()) {
            let invalidated = t.invalidated(now);
            prop_assert_ne!(invalidated.phase(now), Phase::Fresh);
            prop_assert!(invalidated.due_at() <= now);
            prop_assert!(invalidated.phase(later) >= t.phase(later));
            prop_assert_eq!(invalidated.invalidated(now), invalidated);
        }
    }
}
