//! Spawning that keeps the tracing span, for this crate and for the node's.

use std::future::Future;

use tokio::task::JoinHandle;
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
