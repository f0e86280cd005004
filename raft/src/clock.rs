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
}

#[derive(Debug)]
struct Inner {
    started: Instant,
    /// Added to the wall clock, and by `advance` to monotonic time as well.
    wall_offset_ms: AtomicI64,
    monotonic_offset_ms: AtomicI64,
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
        self.inner.wall_offset_ms.fetch_add(by, Ordering::Relaxed);
    }
}
