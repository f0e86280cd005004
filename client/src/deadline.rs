//! One call's total time: every try gets what is left of it.

use std::time::Duration;

use tokio::time::Instant;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    total: Duration,
}

/// The client's only clock: real time spent waiting for the network, monotonic, never compared with
/// anything of a node's.
#[allow(
    clippy::disallowed_methods,
    reason = "a deadline of real waiting on the network; the client has no Clock handed down, and depends on no raft"
)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

impl Deadline {
    /// A longer time than a century is cut to it, so that adding cannot overflow.
    pub(crate) fn after(total: Duration) -> Self {
        const CENTURY: Duration = Duration::from_secs(100 * 366 * 86_400);
        Self {
            at: now() + total.min(CENTURY),
            total,
        }
    }

    pub(crate) fn left(&self) -> Duration {
        self.at.saturating_duration_since(now())
    }

    pub(crate) fn total(&self) -> Duration {
        self.total
    }
}
