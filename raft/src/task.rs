//! Spawning that keeps the tracing span, for this crate and for the node's.

use std::{future::Future, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Interval, MissedTickBehavior},
};
use tracing::Instrument;

pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send + 'static> + Send + 'static,
{
    tokio::spawn(future.in_current_span())
}

/// Runs blocking work off the async threads, inside the caller's span.
#[expect(clippy::disallowed_methods, reason = "the wrapper that keeps the span")]
pub fn blocking<F, T>(work: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    let span = tracing::Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
}

/// After a pause of the whole process a duty goes on once, not as often as it was missed.
pub fn every(period: Duration) -> Interval {
    let mut every = tokio::time::interval(period);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    every
}
