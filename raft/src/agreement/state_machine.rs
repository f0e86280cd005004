//! openraft's state machine on our [`State`]: a run of committed entries becomes one batch, then
//! the callers are answered.
//!
//! A snapshot is at first only a promise: for purging, a flush and its metadata are enough. Files
//! are made when a follower needs them (`snapshot.rs`).

use std::{io, sync::Arc};

use futures::{FutureExt as _, Stream, StreamExt};
use holdfast_proto::peer::{AppliedRecord, Outcome};
use openraft::{
    RaftLogReader as _,
    entry::RaftEntry,
    storage::{
        ApplyResponder, EntryResponder, RaftLogStorage as _, RaftSnapshotBuilder, RaftStateMachine,
        Snapshot,
    },
};
use parking_lot::Mutex;

use super::log::ShardLog;
use super::types::{
    Entry, LogId, Outcomes, Payload, SnapshotMeta, StoredMembership, Types, entry_bytes,
    log_id_from, log_id_to, membership_from, membership_to,
};
use crate::{
    events::Events,
    peer::snapshot::{self, Scratch},
    state::{Committed, CommittedPayload, Install, State},
    task,
};

/// A run ends with the entry that reaches either: enough to amortise a batch, few enough that
/// readers see progress, and bounded memory, however far behind this replica is.
const RUN_ENTRIES: usize = 512;
const RUN_BYTES: usize = 4 << 20;

/// What a snapshot is made of.
pub(crate) enum SnapshotData {
    /// The state itself: files are made when they are sent.
    Promise(Arc<State>),
    /// Received files, complete, checked and synced. They go if they are not installed.
    Received { dir: Scratch, bytes: u64 },
}

pub(crate) struct StateMachine {
    state: Arc<State>,
    snapshots: Arc<snapshot::Sender>,
    events: Arc<dyn Events>,
    /// The newest flush that openraft knows of as a snapshot.
    current: Arc<Mutex<Option<SnapshotMeta>>>,
}

impl StateMachine {
    pub(crate) fn new(
        state: Arc<State>,
        snapshots: Arc<snapshot::Sender>,
        events: Arc<dyn Events>,
    ) -> io::Result<Self> {
        // Everything that was there at the start is on disk: that is a snapshot.
        let current = snapshot_meta(&state.applied_record())?;
        Ok(Self {
            state,
            snapshots,
            events,
            current: Arc::new(Mutex::new(current)),
        })
    }
}

impl RaftStateMachine<Types> for StateMachine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let record = self.state.applied_record();
        Ok((
            record.last_applied.map(log_id_from),
            stored_membership(&record)?,
        ))
    }

    async fn apply<Strm>(&mut self, entries: Strm) -> io::Result<()>
    where
        Strm: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + Send,
    {
        let mut entries = entries;
        let size = |item: &io::Result<EntryResponder<Types>>| match item {
            Ok((entry, _)) => entry_bytes(entry),
            Err(_) => 0,
        };
        while let Some(run) = next_run(&mut entries, size).await {
            let mut committed = Vec::with_capacity(run.len());
            let mut responders: Vec<Option<ApplyResponder<Types>>> = Vec::with_capacity(run.len());
            for item in run {
                let (entry, responder) = item?;
                committed.push(committed_entry(entry));
                responders.push(responder);
            }
            self.state.may_apply().await;
            let outcomes = apply_run(&self.state, committed).await?;
            for (responder, outcomes) in responders.into_iter().zip(outcomes) {
                if let Some(responder) = responder {
                    responder.send(Outcomes(outcomes));
                }
            }
        }
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, _force: bool) -> Option<SnapshotBuilder> {
        Some(self.get_snapshot_builder().await)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        SnapshotBuilder {
            state: self.state.clone(),
            current: self.current.clone(),
        }
    }

    async fn install_snapshot(
        &mut self,
        _meta: &SnapshotMeta,
        snapshot: SnapshotData,
    ) -> io::Result<()> {
        let (dir, bytes) = match snapshot {
            SnapshotData::Received { dir, bytes } => (dir, bytes),
            // Its own: already there.
            SnapshotData::Promise(source) if Arc::ptr_eq(&source, &self.state) => return Ok(()),
            SnapshotData::Promise(source) => (self.snapshots.copy(source).await?, 0),
        };
        let state = self.state.clone();
        let record = task::blocking(move || state.install(dir.path(), Install::Newer))
            .await
            .map_err(io::Error::other)??;
        if let Some(meta) = snapshot_meta(&record)? {
            announce(&self.current, meta);
        }
        self.events.snapshot_installed(self.state.shard(), bytes);
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<openraft::type_config::alias::SnapshotOf<Types, SnapshotData>>> {
        Ok(self.current.lock().clone().map(|meta| Snapshot {
            meta,
            snapshot: SnapshotData::Promise(self.state.clone()),
        }))
    }
}

/// Flushes the state, so that the log before it may be purged.
pub(crate) struct SnapshotBuilder {
    state: Arc<State>,
    current: Arc<Mutex<Option<SnapshotMeta>>>,
}

impl RaftSnapshotBuilder<Types> for SnapshotBuilder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(
        &mut self,
    ) -> io::Result<openraft::type_config::alias::SnapshotOf<Types, SnapshotData>> {
        let is_level = self.state.is_level_with_log();
        let state = self.state.clone();
        let record = task::blocking(move || {
            // The record first: what is flushed is at least that far.
            let record = state.applied_record();
            state.flush().map(|_| record)
        })
        .await
        .map_err(io::Error::other)??;
        let meta = snapshot_meta(&record)?.unwrap_or_default();
        // openraft knows no state that is ahead of what it has applied, as a repaired one may be.
        if !is_level && let Some(known) = self.current.lock().clone() {
            return Ok(Snapshot {
                meta: known,
                snapshot: SnapshotData::Promise(self.state.clone()),
            });
        }
        announce(&self.current, meta.clone());
        Ok(Snapshot {
            meta,
            snapshot: SnapshotData::Promise(self.state.clone()),
        })
    }
}

/// A flush may end after a newer snapshot was installed: what openraft was told of stays.
fn announce(current: &Mutex<Option<SnapshotMeta>>, meta: SnapshotMeta) {
    let mut current = current.lock();
    if current
        .as_ref()
        .is_none_or(|known| known.last_log_id < meta.last_log_id)
    {
        *current = Some(meta);
    }
}

/// What is ready of a stream, at least one item, until a run is full.
async fn next_run<T>(
    entries: &mut (impl Stream<Item = T> + Unpin),
    bytes: impl Fn(&T) -> usize,
) -> Option<Vec<T>> {
    let first = entries.next().await?;
    let mut held = bytes(&first);
    let mut run = vec![first];
    while run.len() < RUN_ENTRIES
        && held < RUN_BYTES
        && let Some(Some(next)) = entries.next().now_or_never()
    {
        held += bytes(&next);
        run.push(next);
    }
    Some(run)
}

async fn apply_run(state: &Arc<State>, run: Vec<Committed>) -> io::Result<Vec<Vec<Outcome>>> {
    // It may read what is evicted: a disk that hangs must not take one of the runtime's few workers
    // with it.
    let state = state.clone();
    task::blocking(move || state.apply(&run))
        .await
        .map_err(io::Error::other)?
        .map_err(io::Error::other)
}

/// Brings a state up to what its log says is committed, before openraft looks at it: openraft would
/// hold 64 entries at once, however large they are.
pub(crate) async fn replay(state: &Arc<State>, log: &mut ShardLog) -> io::Result<()> {
    let committed = log.read_committed().await?;
    let end = committed.map_or(0, |committed| committed.index + 1);
    loop {
        let next = state.applied().index + 1;
        // The first entry of all has index 0.
        let next = match state.applied_record().last_applied {
            Some(_) => next,
            None => 0,
        };
        if next >= end {
            return Ok(());
        }
        let entries = log.limited_get_log_entries(next, end).await?;
        let run: Vec<_> = entries.into_iter().map(committed_entry).collect();
        if run.is_empty() {
            return Ok(());
        }
        apply_run(state, run).await?;
    }
}

fn committed_entry(entry: Entry) -> Committed {
    let log_id = log_id_to(&entry.log_id());
    let payload = match entry.payload {
        Payload::Blank => CommittedPayload::Blank,
        Payload::Normal(commands) => CommittedPayload::Commands(commands.0),
        Payload::Membership(membership) => CommittedPayload::Membership(membership_to(&membership)),
    };
    Committed { log_id, payload }
}

fn stored_membership(record: &AppliedRecord) -> io::Result<StoredMembership> {
    match &record.membership {
        Some(membership) => {
            let membership = membership_from(membership.clone()).map_err(io::Error::other)?;
            Ok(StoredMembership::new(
                record.membership_log_id.map(log_id_from),
                membership,
            ))
        }
        None => Ok(StoredMembership::default()),
    }
}

/// What a state that is as far as `record` is as a snapshot; nothing if it is empty.
pub(crate) fn snapshot_meta(record: &AppliedRecord) -> io::Result<Option<SnapshotMeta>> {
    let Some(last) = record.last_applied else {
        return Ok(None);
    };
    Ok(Some(SnapshotMeta {
        last_log_id: Some(log_id_from(last)),
        last_membership: stored_membership(record)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(index: u64) -> SnapshotMeta {
        let record = AppliedRecord {
            last_applied: Some(holdfast_proto::peer::LogId { term: 1, index }),
            ..AppliedRecord::default()
        };
        snapshot_meta(&record)
            .expect("no membership to misread")
            .expect("not empty")
    }

    #[tokio::test]
    async fn a_run_is_bounded_by_entries_and_by_bytes() {
        async fn runs(sizes: Vec<usize>) -> Vec<(usize, usize)> {
            let mut entries = futures::stream::iter(sizes);
            let mut runs = Vec::new();
            while let Some(run) = next_run(&mut entries, |size| *size).await {
                runs.push((run.len(), run.iter().sum()));
            }
            runs
        }
        assert_eq!(runs(vec![1; 1_000]).await, [(512, 512), (488, 488)]);
        let large = runs(vec![1 << 20; 64]).await;
        assert!(
            large.iter().all(|&(_, bytes)| bytes <= RUN_BYTES),
            "{large:?}"
        );
        // One that is larger than a run stands alone.
        assert_eq!(
            runs(vec![8 << 20, 8 << 20]).await,
            [(1, 8 << 20), (1, 8 << 20)]
        );
    }

    #[test]
    fn a_flush_that_ends_after_a_newer_snapshot_was_installed_does_not_take_its_place() {
        let current = Mutex::new(None);
        for (announced, newest) in [(10, 10), (200, 200), (100, 200), (201, 201)] {
            announce(&current, snapshot(announced));
            assert_eq!(current.lock().as_ref(), Some(&snapshot(newest)));
        }
    }
}
