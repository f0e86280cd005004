//! The one clock of a node: wall time for stamps, monotonic time for leases. Built at the
//! composition root, handed down, moved by tests. Every other clock is banned by lint, so that
//! nothing in the system can disagree about the time.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use holdfast_proto::timeline::Millis;

/// Cheap to clone; clones share one time.
#[derive(Debug, Clone)]
pub struct Clock {
    inner: Arc<Inner>,
    /// How far this machine's wall clock is set off.
    skew_ms: Arc<AtomicI64>,
}

#[derive(Debug)]
struct Inner {
    started: Instant,
    /// Added to the wall clock, and by `advance` to monotonic time as well.
    wall_offset_ms: AtomicI64,
    monotonic_offset_ms: AtomicI64,
}

/// By when something has to be over, by the monotonic clock of one node. Handed down from whoever
/// waits, so that every step of a request sees the same end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Deadline {
    clock: Clock,
    at: Duration,
}

impl Clock {
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the system's clocks"
    )]
    pub fn system() -> Self {
        let inner = Inner {
            started: Instant::now(),
            wall_offset_ms: AtomicI64::new(0),
            monotonic_offset_ms: AtomicI64::new(0),
        };
        Self {
            inner: Arc::new(inner),
            skew_ms: Arc::default(),
        }
    }

    /// The same time with a wall clock of its own, which can be set off alone. For tests.
    pub fn of_another_machine(&self) -> Self {
        Self {
            inner: self.inner.clone(),
            skew_ms: Arc::new(AtomicI64::new(self.skew_ms.load(Ordering::Relaxed))),
        }
    }

    /// Milliseconds since 1970, as this node's wall clock has them. May go backwards: never order
    /// by it.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the system's clocks"
    )]
    pub fn wall_ms(&self) -> Millis {
        let since_epoch = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let wall = i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX);
        wall.saturating_add(self.inner.wall_offset_ms.load(Ordering::Relaxed))
            .saturating_add(self.skew_ms.load(Ordering::Relaxed))
            .try_into()
            .unwrap_or(0)
    }

    /// Since the clock was made; never goes back.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the system's clocks"
    )]
    pub fn monotonic(&self) -> Duration {
        let offset = self
            .inner
            .monotonic_offset_ms
            .load(Ordering::Relaxed)
            .max(0)
            .unsigned_abs();
        Instant::now().duration_since(self.inner.started) + Duration::from_millis(offset)
    }

    pub fn monotonic_ms(&self) -> Millis {
        u64::try_from(self.monotonic().as_millis()).unwrap_or(u64::MAX)
    }

    /// So much from now.
    pub fn deadline(&self, timeout: Duration) -> Deadline {
        Deadline {
            clock: self.clone(),
            at: self.monotonic().saturating_add(timeout),
        }
    }

    /// Moves time forward, for tests.
    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_millis()).unwrap_or(i64::MAX);
        self.inner.wall_offset_ms.fetch_add(by, Ordering::Relaxed);
        self.inner
            .monotonic_offset_ms
            .fetch_add(by, Ordering::Relaxed);
    }

    /// Sets the wall clock off by so much, as a badly set machine would be. For tests.
    pub fn skew_wall_ms(&self, by: i64) {
        self.skew_ms.fetch_add(by, Ordering::Relaxed);
    }
}

impl Deadline {
    /// What is left; zero once it has passed.
    pub fn left(&self) -> Duration {
        self.at.saturating_sub(self.clock.monotonic())
    }

    pub fn has_passed(&self) -> bool {
        self.left().is_zero()
    }

    /// The sooner of this one and so much from now.
    pub fn at_most(&self, longest: Duration) -> Self {
        let other = self.clock.deadline(longest);
        Self {
            at: self.at.min(other.at),
            ..other
        }
    }

    /// Whether this one ends before another of the same node.
    pub fn is_before(&self, other: &Self) -> bool {
        self.at < other.at
    }

    /// The future's output, if it comes in time.
    pub async fn limit<F: Future>(&self, future: F) -> Result<F::Output, DeadlinePassed> {
        tokio::time::timeout(self.left(), future)
            .await
            .map_err(|_| DeadlinePassed)
    }
}

/// Something was not over by its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the deadline passed")]
pub struct DeadlinePassed;

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_deadline_runs_out_with_the_nodes_clock() {
        let clock = Clock::system();
        let deadline = clock.deadline(10 * SECOND);
        assert!(deadline.left() > 9 * SECOND && deadline.left() <= 10 * SECOND);
        clock.advance(4 * SECOND);
        assert!(deadline.left() > 5 * SECOND && deadline.left() <= 6 * SECOND);
        clock.advance(6 * SECOND);
        assert!(deadline.has_passed());
        assert_eq!(deadline.left(), Duration::ZERO);
    }

    #[test]
    fn a_step_gets_no_more_than_the_whole_has_left() {
        let clock = Clock::system();
        let whole = clock.deadline(10 * SECOND);
        let step = whole.at_most(2 * SECOND);
        assert!(step.left() <= 2 * SECOND && step.is_before(&whole));
        clock.advance(9 * SECOND);
        let last = whole.at_most(2 * SECOND);
        assert!(last.left() <= SECOND && !last.is_before(&whole));
    }

    #[tokio::test]
    async fn what_does_not_come_in_time_is_given_up() {
        let clock = Clock::system();
        let deadline = clock.deadline(Duration::from_millis(5));
        let never = std::future::pending::<()>();
        assert_eq!(deadline.limit(never).await, Err(DeadlinePassed));
        assert_eq!(clock.deadline(SECOND).limit(async { 7 }).await, Ok(7));
    }
}
