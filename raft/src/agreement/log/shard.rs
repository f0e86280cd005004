//! What a replica asks of its shard's log beside what openraft does: how far it goes, what is worth
//! purging, what it lost, and order after a crash.

use std::io;

use holdfast_proto::peer;
use openraft::entry::RaftEntry;
use tokio::sync::oneshot;

use super::{LogKept, PURGE_SHARE, ShardLog, stored_entry, thread::Write};
use crate::{
    agreement::types::{Entry, LogId, entry_bytes, log_id_from},
    store::Lost,
};

impl ShardLog {
    pub(crate) fn last_index(&self) -> u64 {
        self.tail.state.read().last.as_ref().map_or(0, LogId::index)
    }

    /// Of the newest entry, purged or not.
    pub(crate) fn last_id(&self) -> Option<LogId> {
        let state = self.tail.state.read();
        state.last.or(state.purged)
    }

    /// First index to keep: so many entries after it, or so many bytes, whichever are fewer.
    pub(crate) fn keep_from(&self, kept: LogKept) -> u64 {
        let state = self.tail.state.read();
        let next = state.last.as_ref().map_or(0, |last| last.index() + 1);
        next.saturating_sub(kept.entries)
            .max(state.weight.keep_from(kept.bytes))
    }

    /// First index that is not purged.
    pub(crate) fn first_index(&self) -> u64 {
        self.tail.state.read().first_index()
    }

    /// Whether enough goes if the log begins at this index.
    pub(crate) fn is_worth_purging(&self, keep_from: u64, kept: LogKept) -> bool {
        let state = self.tail.state.read();
        let first = state.first_index();
        let (entries, bytes) = (
            keep_from.saturating_sub(first),
            state.weight.between(first, keep_from),
        );
        entries > 0 && (entries >= kept.entries / PURGE_SHARE || bytes >= kept.bytes / PURGE_SHARE)
    }

    /// For one purge at a time: two would undo each other's idea of what is to be kept.
    pub(crate) async fn purge_alone(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.purging.lock().await
    }

    /// Brings a log in order that a crash left behind its state. The state is made of committed
    /// entries, so an entry of another term in the place of the last applied one is not committed,
    /// nor is any after it: openraft would refuse to start on them.
    pub(crate) async fn heal(&self, applied: Option<peer::LogId>) -> io::Result<()> {
        let Some(applied) = applied.map(log_id_from) else {
            return Ok(());
        };
        let index = applied.index();
        let in_its_place = self.entries(index, index + 1, 1).await?;
        // Or all of it is before, and of a later term: left over from before a snapshot.
        let left_over = self
            .tail
            .state
            .read()
            .last
            .is_some_and(|last| last.index() < index && last > applied);
        if !left_over
            && in_its_place
                .first()
                .is_none_or(|entry| entry.log_id() == applied)
        {
            return Ok(());
        }
        tracing::warn!(
            shard = self.shard,
            index,
            "the log holds uncommitted entries in the place of applied ones: they are removed"
        );
        {
            let mut state = self.tail.state.write();
            state.truncate_from(index);
            state.purge_to(applied);
            state.last = Some(applied);
        }
        self.log
            .enqueue(Write::Truncate {
                shard: self.shard,
                from: index,
            })
            .await?;
        self.log
            .enqueue(Write::Purge {
                shard: self.shard,
                to: applied,
            })
            .await?;
        let (done, durable) = oneshot::channel();
        self.log.enqueue(Write::Barrier { done }).await?;
        durable
            .await
            .map_err(|_| io::Error::other("the log cannot be written"))
    }

    /// What this log had acknowledged and does not hold any more: since it was opened, or since an
    /// earlier start, until [`ShardLog::made_good`]. Its vote is not among it: that was given back.
    ///
    /// Until then the replica must neither grant votes nor stand for one: a leader elected by its
    /// vote may lack what was committed by its acknowledgement. It is made good once the replica
    /// has applied all that a leader proved to be committed after this start (a read index): that
    /// leader was elected without it, or before the loss, and so has all of it.
    pub(crate) fn lost_acknowledged(&self) -> io::Result<Option<Lost>> {
        Ok(self.log.inner.store()?.lost(self.shard))
    }

    /// See [`ShardLog::lost_acknowledged`].
    pub(crate) async fn made_good(&self) -> io::Result<()> {
        let (store, shard) = (self.log.inner.store()?, self.shard);
        crate::task::blocking(move || store.made_good(shard))
            .await
            .map_err(io::Error::other)?
    }

    pub(crate) fn has_vote(&self) -> bool {
        self.tail.state.read().vote.is_some()
    }

    /// Entries of the range, until `max_bytes` are passed by the last of them; at least one if
    /// there is any.
    pub(super) async fn entries(
        &self,
        start: u64,
        end: u64,
        max_bytes: usize,
    ) -> io::Result<Vec<Entry>> {
        let (from_store_to, newer) = {
            let state = self.tail.state.read();
            let from_store_to = end.min(state.first);
            let skip = usize::try_from(start.saturating_sub(state.first)).unwrap_or(usize::MAX);
            let take =
                usize::try_from(end.saturating_sub(start.max(state.first))).unwrap_or(usize::MAX);
            let newer = up_to(max_bytes, state.entries.iter().skip(skip).take(take))
                .cloned()
                .collect::<Vec<_>>();
            (from_store_to, newer)
        };
        if start >= from_store_to {
            return Ok(newer);
        }
        // Off the async threads: a device that hangs must not stop them.
        let (store, shard) = (self.log.inner.store()?, self.shard);
        let read = crate::task::blocking(move || -> io::Result<Vec<Entry>> {
            let rows = store.read(shard, start..from_store_to, max_bytes)?;
            rows.iter().map(|(_, bytes)| stored_entry(bytes)).collect()
        });
        let mut entries = read.await.map_err(io::Error::other)??;
        let complete = entries
            .last()
            .is_none_or(|last| last.log_id().index() + 1 == from_store_to);
        if complete {
            let room = max_bytes.saturating_sub(entries.iter().map(entry_bytes).sum());
            let more = up_to(room, newer.iter()).count();
            entries.extend(newer.into_iter().take(more));
        }
        Ok(entries)
    }
}

/// Entries until so many bytes are passed: the last of them passes the bound.
fn up_to<'e>(
    bytes: usize,
    entries: impl Iterator<Item = &'e Entry>,
) -> impl Iterator<Item = &'e Entry> {
    let mut room = bytes;
    entries.take_while(move |entry| {
        let fits = room > 0;
        room = room.saturating_sub(entry_bytes(entry));
        fits
    })
}
