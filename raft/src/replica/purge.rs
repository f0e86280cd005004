//! Keeps the log bounded: flushes the state, then lets go of what is before what is to be kept.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::Replica;
use crate::task::every;

const PURGE_EVERY: Duration = Duration::from_millis(500);
/// A flush of a full write buffer takes seconds on a slow disk.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);
/// openraft drops a trigger while an older build runs, which may not be far enough: asked again
/// after this long.
const TRIGGER_AGAIN: Duration = Duration::from_millis(500);

impl Replica {
    pub(super) async fn purge(self: Arc<Self>) {
        let mut every = every(PURGE_EVERY);
        loop {
            every.tick().await;
            let _alone = self.log.purge_alone().await;
            let kept = self.log.keep_from(self.log_kept).min(self.applied().index);
            let keep_from = self.pins.keep_from(kept);
            if self.log.is_worth_purging(keep_from, self.log_kept) {
                self.purge_before(keep_from).await;
            }
        }
    }

    /// Lets go of all of the log that the state has on disk, but for what a snapshot's follower
    /// reads on from. If nothing else helps, of that too: it gets the next snapshot.
    pub(crate) async fn purge_for_space(&self) {
        let _alone = self.log.purge_alone().await;
        let applied = self.applied().index;
        let keep_from = if self.disk_full() {
            applied
        } else {
            self.pins.keep_from(applied)
        };
        if keep_from > self.log.first_index() {
            self.purge_before(keep_from).await;
        }
    }

    async fn purge_before(&self, keep_from: u64) {
        // Followers that need older entries get a snapshot: their append streams end here.
        if let Err(error) =
            keeping_from(&self.keep_from, keep_from, self.flush_and_purge(keep_from)).await
        {
            tracing::warn!(%error, shard = self.shard, "purging the log failed");
        }
    }

    async fn flush_and_purge(&self, keep_from: u64) -> io::Result<()> {
        let upto = keep_from.saturating_sub(1);
        let far_enough = |metrics: &openraft::RaftMetrics<_>| {
            metrics
                .snapshot
                .as_ref()
                .is_some_and(|snapshot| snapshot.index >= upto)
        };
        let flushed = async {
            loop {
                self.raft
                    .trigger()
                    .snapshot()
                    .await
                    .map_err(io::Error::other)?;
                if self
                    .raft
                    .wait(Some(TRIGGER_AGAIN))
                    .metrics(far_enough, "the state is flushed")
                    .await
                    .is_ok()
                {
                    return io::Result::Ok(());
                }
            }
        };
        let timeout =
            || io::Error::new(io::ErrorKind::TimedOut, "the state was not flushed in time");
        tokio::time::timeout(FLUSH_TIMEOUT, flushed)
            .await
            .map_err(|_| timeout())??;
        self.raft
            .trigger()
            .purge_log(upto)
            .await
            .map_err(io::Error::other)
    }
}

/// Ends the streams of followers that need what is about to go. If it does not go after all, they
/// are served from the log again: between what is purged and a bound that stayed up they would get
/// neither log nor snapshot.
async fn keeping_from(
    bound: &AtomicU64,
    keep_from: u64,
    purge: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    let before = bound.fetch_max(keep_from, Ordering::Relaxed);
    let purged = purge.await;
    if purged.is_err() {
        bound.store(before, Ordering::Relaxed);
    }
    purged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn followers_are_served_from_the_log_again_after_a_purge_that_failed() {
        let bound = AtomicU64::new(10);
        let purge = async {
            assert_eq!(
                bound.load(Ordering::Relaxed),
                100,
                "streams that need what goes end before it goes"
            );
            Err(io::Error::other("the disk is full"))
        };
        assert!(keeping_from(&bound, 100, purge).await.is_err());
        assert_eq!(bound.load(Ordering::Relaxed), 10);
        keeping_from(&bound, 100, async { Ok(()) })
            .await
            .expect("it went");
        assert_eq!(bound.load(Ordering::Relaxed), 100);
        keeping_from(&bound, 50, async { Ok(()) })
            .await
            .expect("it went before");
        assert_eq!(
            bound.load(Ordering::Relaxed),
            100,
            "what is gone stays gone"
        );
    }
}
