//! The work that bodies make: room for them in memory, and threads to decode and parse them on.
//!
//! Promises that the threads that send heartbeats never unpack or parse a large body, that the
//! machine works on few at a time, and that what one upstream's fetches hold is bounded. Must never
//! know what is in a body.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A body up to this is quicker parsed than handed to another thread.
const SMALL_BYTES: u64 = 64 << 10;
/// What any fetch may hold without asking for room: there are few fetches of one upstream.
pub(super) const ROOM_FREE_BYTES: u64 = 1 << 20;
/// What the larger bodies of one upstream may hold together: two of the largest that may be
/// configured, or one of those and all that it unpacks to.
const ROOM_BYTES: u64 = 128 << 20;
const KIB: u64 = 1 << 10;

/// Who may work on a large body, of all upstreams of a node: half of its processors.
#[derive(Debug, Clone)]
pub(super) struct Workers(Arc<Semaphore>);

/// What the bodies of one upstream may hold.
#[derive(Debug)]
pub(super) struct Room(Arc<Semaphore>);

/// Room taken; given back when dropped.
#[derive(Debug)]
pub(super) struct Held(#[expect(dead_code, reason = "held, not read")] OwnedSemaphorePermit);

impl Workers {
    /// `bytes` is what there is to work on. An error says that the work panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        bytes: u64,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        if bytes <= SMALL_BYTES {
            return Ok(work());
        }
        // Never closed. Held by the thread, which goes on when nobody waits for it any more.
        let place = self.0.clone().acquire_owned().await.ok();
        holdfast_raft::task::blocking(move || {
            let _place = place;
            work()
        })
        .await
    }
}

impl Default for Workers {
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Semaphore::new((processors / 2).max(1))))
    }
}

impl Room {
    /// Waits until there is room for so many bytes, at most all there is: a fetch asks once, so
    /// that none waits for room while it holds some.
    pub(super) async fn hold(&self, bytes: u64) -> Option<Held> {
        let kib = bytes.min(ROOM_BYTES).div_ceil(KIB);
        let kib = u32::try_from(kib).unwrap_or(u32::MAX);
        self.0.clone().acquire_many_owned(kib).await.ok().map(Held)
    }
}

impl Default for Room {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new((ROOM_BYTES / KIB) as usize)))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_large_body_is_worked_on_by_another_thread_and_few_at_a_time() {
        let workers = Workers(Arc::new(Semaphore::new(1)));
        let own = thread::current().id();
        let by = |bytes| workers.run(bytes, || thread::current().id());
        assert_eq!(by(SMALL_BYTES).await.unwrap(), own);
        assert_ne!(by(SMALL_BYTES + 1).await.unwrap(), own);

        let (end, ended) = std::sync::mpsc::channel::<()>();
        let first = tokio::spawn({
            let workers = workers.clone();
            async move { workers.run(u64::MAX, move || ended.recv().is_err()).await }
        });
        while workers.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        // Given up, and its thread works on: there is still no place for another.
        first.abort();
        _ = first.await;
        let second = workers.run(u64::MAX, || ());
        let waited = tokio::time::timeout(Duration::from_millis(50), second).await;
        assert!(waited.is_err(), "two at a time");
        drop(end);
        workers.run(u64::MAX, || ()).await.unwrap();
    }

    #[tokio::test]
    async fn room_is_bounded_and_comes_back() {
        let room = Room::default();
        let all = room.hold(u64::MAX).await.unwrap();
        let more = tokio::time::timeout(Duration::from_millis(50), room.hold(1)).await;
        assert!(more.is_err());
        drop(all);
        let _half = room.hold(ROOM_BYTES / 2).await.unwrap();
        let _other = room.hold(ROOM_BYTES / 2).await.unwrap();
    }
}
