//! Keeps the log bounded: flushes the state, then lets go of what is before what is to be kept.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::Replica;

const PURGE_EVERY: Duration = Duration::from_millis(500);
/// A flush of a full write buffer takes seconds on a slow disk.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(60);

impl Replica {
    pub(super) async fn purge(self: Arc<Self>) {
        let mut every = tokio::time::interval(PURGE_EVERY);
        loop {
            every.tick().await;
            let kept = self.log.keep_from(self.log_kept).min(self.applied().index);
            let keep_from = self.pins.lowest().map_or(kept, |needed| kept.min(needed));
            // In steps of an eighth: each costs a flush.
            if keep_from < self.log.first_index() + (self.log_kept.entries / 8).max(1) {
                continue;
            }
            // Followers that need older entries get a snapshot: their append streams end here.
            self.keep_from.store(keep_from, Ordering::Relaxed);
            if let Err(error) = self.flush_and_purge(keep_from).await {
                tracing::warn!(%error, shard = self.shard, "purging the log failed");
            }
        }
    }

    /// Lets go of all of the log that the state has on disk.
    pub(crate) async fn purge_for_space(&self) {
        let keep_from = self.applied().index;
        self.keep_from.store(keep_from, Ordering::Relaxed);
        if let Err(error) = self.flush_and_purge(keep_from).await {
            tracing::warn!(%error, shard = self.shard, "purging the log failed");
        }
    }

    async fn flush_and_purge(&self, keep_from: u64) -> io::Result<()> {
        self.raft.trigger().snapshot().await.map_err(io::Error::other)?;
        let upto = keep_from.saturating_sub(1);
        let flushed = self.raft.wait(Some(FLUSH_TIMEOUT));
        let far_enough = |metrics: &openraft::RaftMetrics<_>| metrics.snapshot.as_ref().is_some_and(|snapshot| snapshot.index >= upto);
        flushed.metrics(far_enough, "the state is flushed").await.map_err(io::Error::other)?;
        self.raft.trigger().purge_log(upto).await.map_err(io::Error::other)
    }
}
