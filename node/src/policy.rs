//! What holds for the keys that match a pattern, and the arithmetic of a fetched value's life and
//! of retries.
//!
//! Promises that the first policy that matches decides alone, and that the arithmetic is pure:
//! chance and what is known of the upstream come in as arguments. Must never know a clock, a random
//! source or how values are fetched.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_proto::limits::VALUE_BYTES_DEFAULT;
use holdfast_proto::peer::Lifetime;
use holdfast_proto::timeline::{FOREVER, Millis};

use crate::glob::{Captures, Glob};
use crate::template::TextTemplate;
use crate::upstream::Said;
use crate::wanted::Wanted;

/// How many usual fetch times before a value goes stale its refresh begins at the latest: room for
/// one slow fetch and one that has to be repeated. Never more than half its life, or an upstream
/// would be called the more often the slower it is.
const FETCH_TIMES_AHEAD: u32 = 4;
/// Where in its life the first refresh of a value that a miss brought falls, so that keys loaded
/// together do not come due together.
const FIRST_REFRESH: std::ops::Range<f64> = 0.3..0.8;

/// In the order of the configuration.
#[derive(Debug, Clone, Default)]
pub struct Policies(Arc<[Policy]>);

/// One policy, every parameter resolved.
#[derive(Debug, Clone)]
pub struct Policy {
    pub pattern: Glob,
    /// The upstream's name, which the configuration declares.
    pub upstream: Arc<str>,
    /// How long a value is fresh whose origin does not say.
    pub ttl: Duration,
    /// What a lifetime is at least and at most, whoever says it.
    pub min_ttl: Duration,
    pub max_ttl: Duration,
    /// Whether the origin's own words on how long its values are good count.
    pub origin: OriginHeaders,
    /// Share of a lifetime by which it may be shorter, 0 to 1.
    pub ttl_jitter: f64,
    /// Share of the lifetime after which a refresh is due, 0 to 1; 0 turns refreshing ahead off.
    pub eager_refresh_threshold: f64,
    pub min_refresh_interval: Duration,
    pub read: Read,
    pub fetch_on_miss: FetchOnMiss,
    /// What a reader is given while the first fetch runs and nobody waits for it.
    pub placeholder: Option<Bytes>,
    pub stale_while_revalidate: Window,
    pub stale_if_error: Window,
    /// How long what is served no more is kept in case that the origin says it is still the same.
    pub keep: Window,
    /// How long a reader waits for a fetch before it gets the old value; 0 never.
    pub soft_timeout: Duration,
    /// How long a reader without any value waits.
    pub hard_timeout: Duration,
    /// How long it is remembered that the origin has no such thing, and once more so long it is told
    /// while that is asked anew.
    pub negative_ttl: Duration,
    pub on_not_found: OnNotFound,
    /// How long a failed miss is remembered.
    pub error_ttl: Duration,
    pub retry_base: Duration,
    /// At least 1.
    pub retry_multiplier: f64,
    pub retry_cap: Duration,
    /// Which fetched values are values at all.
    pub wanted: Wanted,
    /// A larger fetched value goes to its waiters and is not stored.
    pub max_value_bytes: u64,
    /// No secrets in them, and no captures that the pattern does not have.
    pub tags: Vec<TextTemplate>,
}

/// When readers get what is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// As long as it may be served; it is refreshed ahead.
    RefreshAhead,
    /// Only if the upstream, which each read asks, does not answer.
    NetworkFirst,
}

/// Whether a reader without any value waits for the fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchOnMiss {
    Sync,
    Async,
}

/// What becomes of a value of which the origin says that there is no such thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnNotFound {
    /// It stays, and the fetch has failed.
    KeepOld,
    /// That there is none takes its place.
    Negative,
}

/// `Cache-Control` and the like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OriginHeaders {
    Honour,
    Ignore,
}

/// A stale window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    For(Duration),
    Forever,
}

/// The policy of a key, and what its pattern captured of it.
#[derive(Debug, Clone)]
pub struct Matched<'a> {
    pub policy: &'a Policy,
    pub captures: Captures<'a>,
}

impl Policies {
    pub fn find<'a>(&'a self, key: &'a [u8]) -> Option<Matched<'a>> {
        self.0.iter().find_map(|policy| {
            Some(Matched {
                policy,
                captures: policy.pattern.captures(key)?,
            })
        })
    }

    /// As `find`, for every read: without captures, which have to be collected.
    pub fn of(&self, key: &[u8]) -> Option<&Policy> {
        self.0.iter().find(|policy| policy.pattern.matches(key))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.0.iter()
    }
}

impl FromIterator<Policy> for Policies {
    fn from_iter<I: IntoIterator<Item = Policy>>(policies: I) -> Self {
        Self(policies.into_iter().collect())
    }
}

const SECOND: Duration = Duration::from_secs(1);
const DAY: Duration = Duration::from_secs(86_400);
/// A year.
const MAX_TTL: Duration = Duration::from_secs(31_557_600);

impl Policy {
    /// With every default.
    pub fn new(pattern: Glob, upstream: impl Into<Arc<str>>) -> Self {
        let ttl = 60 * SECOND;
        let retry_cap = 60 * SECOND;
        Self {
            pattern,
            upstream: upstream.into(),
            ttl,
            min_ttl: Duration::ZERO,
            max_ttl: MAX_TTL,
            origin: OriginHeaders::Honour,
            ttl_jitter: 0.10,
            eager_refresh_threshold: 0.80,
            min_refresh_interval: SECOND,
            read: Read::RefreshAhead,
            fetch_on_miss: FetchOnMiss::Sync,
            placeholder: None,
            stale_while_revalidate: Window::For(600 * SECOND),
            stale_if_error: Window::For(30 * DAY),
            keep: Window::For(3_600 * SECOND),
            soft_timeout: SECOND / 10,
            hard_timeout: 4 * SECOND,
            negative_ttl: 5 * SECOND,
            on_not_found: OnNotFound::KeepOld,
            error_ttl: SECOND,
            retry_base: default_retry_base(ttl).min(retry_cap),
            retry_multiplier: 1.5,
            retry_cap,
            wanted: Wanted::default(),
            max_value_bytes: VALUE_BYTES_DEFAULT as u64,
            tags: Vec::new(),
        }
    }

    /// The life of a value fetched just now, of which its origin `said` so much. `random` is uniform
    /// in 0 to 1; `usual_fetch` what a fetch from this upstream usually takes; `after_miss` whether
    /// nothing was stored before.
    pub fn lifetime(
        &self,
        said: &Said,
        random: f64,
        usual_fetch: Duration,
        after_miss: bool,
    ) -> Lifetime {
        let random = random.clamp(0.0, 1.0);
        let life = said.lifetime.unwrap_or(self.ttl);
        // As `clamp`, which panics where the two contradict each other.
        let life = life.max(self.min_ttl).min(self.max_ttl);
        let fresh_ms = scaled(life, 1.0 - self.ttl_jitter * random);
        let window =
            |said: Option<Duration>, own: Window| said.map_or(own, Window::For).as_millis();
        Lifetime {
            fresh_ms,
            refresh_after_ms: self.refresh_after(fresh_ms, random, usual_fetch, after_miss),
            stale_while_revalidate_ms: window(
                said.stale_while_revalidate,
                self.stale_while_revalidate,
            ),
            stale_if_error_ms: window(said.stale_if_error, self.stale_if_error),
            min_refresh_interval_ms: millis(self.min_refresh_interval),
            keep_ms: self.keep.as_millis(),
        }
    }

    /// How long it is told that the origin has no such thing.
    pub fn negative_lifetime(&self, random: f64, usual_fetch: Duration) -> Lifetime {
        let fresh_ms = scaled(self.negative_ttl, 1.0 - self.ttl_jitter * random);
        Lifetime {
            fresh_ms,
            refresh_after_ms: self.refresh_after(fresh_ms, random, usual_fetch, false),
            stale_while_revalidate_ms: millis(self.negative_ttl),
            stale_if_error_ms: 0,
            min_refresh_interval_ms: millis(self.min_refresh_interval),
            keep_ms: 0,
        }
    }

    /// What counts of the origin's words.
    pub fn heeded(&self, said: Said) -> Said {
        match self.origin {
            OriginHeaders::Honour => said,
            OriginHeaders::Ignore => Said::default(),
        }
    }

    /// When what a client stored while its node had no such policy is to be refreshed: as what is
    /// fetched would be.
    pub fn refresh_after_plain(&self) -> Millis {
        let share = match self.eager_refresh_threshold {
            0.0 => 1.0,
            share => share,
        };
        scaled(self.ttl, share).max(millis(self.min_refresh_interval))
    }

    /// How long to leave the upstream alone after failure number `count` in a row, counted from 1.
    pub fn retry_delay(&self, count: u32, random: f64) -> Duration {
        let earlier = i32::try_from(count.saturating_sub(1)).unwrap_or(i32::MAX);
        let grown = self.retry_base.as_secs_f64() * self.retry_multiplier.powi(earlier);
        // Grown may be infinite, never NaN: the base is not 0 and the multiplier at least 1.
        let delay = grown.min(self.retry_cap.as_secs_f64());
        Duration::from_secs_f64(delay * (0.5 + 0.5 * random.clamp(0.0, 1.0)))
    }

    fn refresh_after(
        &self,
        fresh_ms: Millis,
        random: f64,
        usual_fetch: Duration,
        after_miss: bool,
    ) -> Millis {
        if self.eager_refresh_threshold == 0.0 {
            return FOREVER;
        }
        let share = if after_miss {
            FIRST_REFRESH.start + (FIRST_REFRESH.end - FIRST_REFRESH.start) * random
        } else {
            self.eager_refresh_threshold
        };
        let eager = scaled(Duration::from_millis(fresh_ms), share);
        let lead = millis(usual_fetch.saturating_mul(FETCH_TIMES_AHEAD)).min(fresh_ms / 2);
        eager.min(fresh_ms - lead)
    }
}

impl Window {
    pub fn as_millis(self) -> Millis {
        match self {
            Self::For(duration) => millis(duration),
            Self::Forever => FOREVER,
        }
    }
}

/// What the first retry waits where nobody chose.
pub(crate) fn default_retry_base(ttl: Duration) -> Duration {
    SECOND.max(ttl / 20)
}

fn millis(duration: Duration) -> Millis {
    Millis::try_from(duration.as_millis()).unwrap_or(FOREVER)
}

/// A share of a duration, never more than all of it.
fn scaled(duration: Duration, share: f64) -> Millis {
    let all = millis(duration);
    // A cast from a float saturates, and is exact enough: a millisecond in 285,000 years.
    ((all as f64 * share).round() as Millis).min(all)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn policy(pattern: &str) -> Policy {
        Policy {
            stale_if_error: Window::Forever,
            ..Policy::new(Glob::parse(pattern).unwrap(), "u")
        }
    }

    fn unsaid() -> Said {
        Said::default()
    }

    #[test]
    fn the_first_policy_that_matches_decides() {
        let policies =
            Policies::from_iter([policy("user/*/profile"), policy("user/*"), policy("*.json")]);
        let matched = policies.find(b"user/7/profile").unwrap();
        assert_eq!(
            (matched.policy.pattern.as_str(), matched.captures.get(1)),
            ("user/*/profile", Some(b"7".as_slice()))
        );
        assert_eq!(
            policies.find(b"user/7").unwrap().policy.pattern.as_str(),
            "user/*"
        );
        assert_eq!(
            policies.find(b"a.json").unwrap().policy.pattern.as_str(),
            "*.json"
        );
        assert!(policies.find(b"other").is_none());
        for key in ["user/7/profile", "user/7", "a.json", "other"] {
            let found = policies
                .find(key.as_bytes())
                .map(|matched| matched.policy.pattern.as_str());
            assert_eq!(
                policies
                    .of(key.as_bytes())
                    .map(|policy| policy.pattern.as_str()),
                found
            );
        }
    }

    #[test]
    fn a_lifetime_is_what_the_defaults_say() {
        let policy = policy("*");
        let lifetime = policy.lifetime(&unsaid(), 0.0, Duration::from_millis(50), false);
        assert_eq!(
            (lifetime.fresh_ms, lifetime.refresh_after_ms),
            (60_000, 48_000)
        );
        assert_eq!(
            (
                lifetime.stale_while_revalidate_ms,
                lifetime.stale_if_error_ms
            ),
            (600_000, FOREVER)
        );
        assert_eq!(
            policy
                .lifetime(&unsaid(), 1.0, Duration::ZERO, false)
                .fresh_ms,
            54_000
        );
        // A slow upstream is asked earlier, and after a miss chance decides.
        let slow = |seconds| {
            let usual_fetch = Duration::from_secs(seconds);
            policy
                .lifetime(&unsaid(), 0.0, usual_fetch, false)
                .refresh_after_ms
        };
        assert_eq!(
            [slow(5), slow(7), slow(8), slow(60)],
            [40_000, 32_000, 30_000, 30_000]
        );
        assert_eq!(
            policy
                .lifetime(&unsaid(), 0.0, Duration::ZERO, true)
                .refresh_after_ms,
            18_000
        );
        assert_eq!(
            policy
                .lifetime(&unsaid(), 1.0, Duration::ZERO, true)
                .refresh_after_ms,
            43_200
        );
    }

    #[test]
    fn a_threshold_of_nothing_never_refreshes_ahead() {
        let policy = Policy {
            eager_refresh_threshold: 0.0,
            ..policy("*")
        };
        assert_eq!(
            policy
                .lifetime(&unsaid(), 0.5, Duration::ZERO, false)
                .refresh_after_ms,
            FOREVER
        );
        assert_eq!(
            policy
                .lifetime(&unsaid(), 0.5, Duration::ZERO, true)
                .refresh_after_ms,
            FOREVER
        );
    }

    #[test]
    fn retries_come_later_and_later_until_the_cap() {
        let policy = policy("*");
        let delays = [1, 2, 3, 100, u32::MAX].map(|count| policy.retry_delay(count, 1.0));
        assert_eq!(
            delays,
            [3_000, 4_500, 6_750, 60_000, 60_000].map(Duration::from_millis)
        );
        assert_eq!(policy.retry_delay(1, 0.0), Duration::from_millis(1_500));
        assert_eq!(policy.retry_delay(0, 1.0), policy.retry_delay(1, 1.0));
    }

    prop_compose! {
        fn any_policy()(ttl in 0..10_000_000u64, ttl_jitter in 0.0..=1.0f64, threshold in 0.0..=1.0f64, interval in 0..100_000u64,
                        base in 1..1_000_000u64, multiplier in 1.0..=100.0f64, cap in 1..1_000_000u64) -> Policy {
            Policy {
                ttl: Duration::from_millis(ttl),
                ttl_jitter,
                eager_refresh_threshold: threshold,
                min_refresh_interval: Duration::from_millis(interval),
                retry_base: Duration::from_millis(base),
                retry_multiplier: multiplier,
                retry_cap: Duration::from_millis(cap),
                ..policy("*")
            }
        }
    }

    proptest! {
        #[test]
        fn jitter_only_shortens(policy in any_policy(), random in 0.0..=1.0f64, miss: bool) {
            let fresh = policy.lifetime(&unsaid(), random, Duration::ZERO, miss).fresh_ms as f64;
            let ttl = policy.ttl.as_millis() as f64;
            prop_assert!(fresh <= ttl && fresh >= ttl * (1.0 - policy.ttl_jitter) - 1.0);
        }

        #[test]
        fn a_refresh_is_in_time_but_a_slow_upstream_is_not_called_more_often(policy in any_policy(), random in 0.0..=1.0f64, usual in 0..100_000u64, miss: bool) {
            prop_assume!(policy.eager_refresh_threshold > 0.0);
            let lifetime = policy.lifetime(&unsaid(), random, Duration::from_millis(usual), miss);
            let refresh = lifetime.refresh_after_ms;
            prop_assert!(refresh + (4 * usual).min(lifetime.fresh_ms / 2) <= lifetime.fresh_ms);
            let share = if miss { 0.3 + 0.5 * random } else { policy.eager_refresh_threshold };
            prop_assert!(refresh as f64 >= share.min(0.5) * lifetime.fresh_ms as f64 - 1.0);
            prop_assert!(refresh as f64 <= share * lifetime.fresh_ms as f64 + 1.0);
            prop_assert_eq!(lifetime.min_refresh_interval_ms, policy.min_refresh_interval.as_millis() as u64);
        }

        #[test]
        fn after_a_miss_a_fast_upstream_is_asked_between_three_and_eight_tenths(policy in any_policy(), random in 0.0..=1.0f64) {
            prop_assume!(policy.eager_refresh_threshold > 0.0);
            let policy = Policy { min_refresh_interval: Duration::ZERO, ..policy };
            let lifetime = policy.lifetime(&unsaid(), random, Duration::ZERO, true);
            let share = lifetime.refresh_after_ms as f64;
            let fresh = lifetime.fresh_ms as f64;
            prop_assert!(share >= 0.3 * fresh - 1.0 && share <= 0.8 * fresh + 1.0);
        }

        #[test]
        fn a_retry_waits_between_half_and_all_of_its_delay(policy in any_policy(), count: u32, random in 0.0..=1.0f64) {
            let full = policy.retry_delay(count, 1.0);
            let delay = policy.retry_delay(count, random);
            prop_assert!(full <= policy.retry_cap);
            prop_assert!(delay <= full && delay + Duration::from_nanos(2) >= full / 2);
            prop_assert!(full >= policy.retry_base.min(policy.retry_cap).saturating_sub(Duration::from_nanos(2)));
            prop_assert!(policy.retry_delay(count.saturating_add(1), 1.0) >= full);
        }
    }
}
