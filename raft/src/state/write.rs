//! How a state changes: runs of committed entries, and snapshots that take its place. One writer at
//! a time; readers never wait for it, and neither does anybody who asks how far it is.

use std::{
    io,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use holdfast_proto::{
    Key, Revision,
    peer::{AppliedRecord, Outcome, StateHash},
};

use super::{
    Applied, Committed, CommittedPayload, Generation, Published, State,
    apply::{self, ApplyError, Finished, Run},
    clients::Clients,
    hash::{self, Sum},
    memory::Memory,
    record,
};
use crate::store::{Family, StateStore};

/// Hashes are compared at multiples of this index, so that replicas need to keep few.
const HASH_EVERY: u64 = 256;
/// Hashes kept for comparison with peers that are ahead or behind.
const HASHES_KEPT: usize = 64;
/// Commands of one batch: more are another batch, so that memory is bounded and readers see
/// progress.
const BATCH_COMMANDS: usize = 4_096;

/// Everything that changes only in apply and install.
pub(super) struct Writer {
    pub(super) published: Published,
    clients: Clients,
}

/// Whether a snapshot continues a state or replaces a wrong one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Install {
    /// Never goes back in revisions.
    Newer,
    /// The state here is wrong, its revision too; never goes back in the log.
    Repair,
}

impl State {
    /// Applies a run of committed entries and says what their commands came to. What is applied
    /// already, by a snapshot that was ahead, is passed over.
    pub(crate) fn apply(
        self: &Arc<Self>,
        run: &[Committed],
    ) -> Result<Vec<Vec<Outcome>>, ApplyError> {
        let mut outcomes = Vec::with_capacity(run.len());
        while outcomes.len() < run.len() {
            let rest = &run[outcomes.len()..];
            outcomes.append(&mut self.apply_batch(rest)?);
        }
        if let Some(last) = run.last() {
            self.passed_index
                .fetch_max(last.log_id.index, Ordering::AcqRel);
        }
        Ok(outcomes)
    }

    /// One batch: the outcomes of the entries at the beginning of `run` that went into it.
    fn apply_batch(self: &Arc<Self>, run: &[Committed]) -> Result<Vec<Vec<Outcome>>, ApplyError> {
        let mut writer = self.writer.lock();
        // Under the lock: a snapshot may just have taken the place of what was there.
        let generation = self.generation.load_full();
        let Writer { published, clients } = &mut *writer;
        let mut batch = Run::new(
            generation.store.as_ref(),
            &generation.memory,
            clients,
            AppliedRecord::clone(&published.applied),
            published.roster.clone(),
        );
        let mut outcomes = Vec::with_capacity(run.len());
        let mut hashes = Vec::new();
        for Committed { log_id, payload } in run {
            if batch.commands() >= BATCH_COMMANDS {
                break;
            }
            if batch.has_applied(*log_id) {
                outcomes.push(Vec::new());
                continue;
            }
            outcomes.push(match payload {
                CommittedPayload::Commands(encoded) => batch.apply(*log_id, encoded)?,
                CommittedPayload::Blank => {
                    batch.apply_empty(*log_id);
                    Vec::new()
                }
                CommittedPayload::Membership(membership) => {
                    batch.apply_membership(*log_id, membership);
                    Vec::new()
                }
            });
            if log_id.index.is_multiple_of(HASH_EVERY) {
                hashes.push(StateHash {
                    index: log_id.index,
                    hash: batch.hash(),
                    version: hash::VERSION,
                });
            }
        }
        let Finished {
            batch,
            changes,
            applied,
            roster,
        } = batch.finish();

        self.visible.store(applied.revision, Ordering::Release);
        generation.store.write(batch)?;
        let told = self.feed.has_followers().then(|| told(&changes, &applied));
        generation.memory.apply(changes);
        if generation.memory.filter_is_worn() {
            self.renew_filter();
        }
        writer.published.applied = Arc::new(applied);
        if let Some(roster) = roster {
            writer.published.roster = Some(Arc::new(roster));
        }
        writer.clients.written();
        self.remember_hashes(hashes);
        self.publish(&writer);
        if let Some(told) = told {
            self.feed.tell(told);
        }
        Ok(outcomes)
    }

    /// Everything applied so far survives a restart without the log. Returns the index that is
    /// certain.
    pub(crate) fn flush(&self) -> io::Result<u64> {
        let index = self.applied().index;
        self.generation().store.flush()?;
        Ok(self
            .flushed_index
            .fetch_max(index, Ordering::AcqRel)
            .max(index))
    }

    /// A copy of the state as files in `dir`, to send to a follower. The applied record inside it
    /// says how far it is.
    pub(crate) fn checkpoint(&self, dir: &Path) -> io::Result<()> {
        self.generation().store.checkpoint(dir)
    }

    /// Replaces everything by a checkpoint that was fully received into `dir`.
    pub(crate) fn install(
        self: &Arc<Self>,
        dir: &Path,
        install: Install,
    ) -> io::Result<Arc<AppliedRecord>> {
        let mut writer = self.writer.lock();
        let here = applied_of(&writer.published.applied);
        let there = self
            .stores
            .read_checkpoint(dir, Family::System, record::APPLIED)?;
        let there = applied_of(&decoded(there)?);
        let goes_back = match install {
            Install::Newer => there.revision < here.revision,
            Install::Repair => there.index < here.index,
        };
        if goes_back {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a snapshot would take this replica back in time",
            ));
        }
        let store = self.stores.install_state(self.shard, dir)?;
        *writer = Writer::load(store.as_ref())?;
        let record = writer.published.applied.clone();
        self.visible.store(record.revision, Ordering::Release);
        self.generation.store(Arc::new(Generation {
            store,
            memory: Memory::new(self.memory_bytes_max),
        }));
        self.flushed_index.store(there.index, Ordering::Release);
        self.hashes.lock().clear();
        self.publish(&writer);
        self.feed.missed();
        drop(writer);
        self.load_memory();
        Ok(record)
    }

    /// Makes this state another one than its peers have, as damage or a bug would.
    #[cfg(test)]
    pub(crate) fn spoil(&self, by: u64) {
        let mut writer = self.writer.lock();
        Arc::make_mut(&mut writer.published.applied).hash_sum ^= by;
        self.publish(&writer);
    }

    /// For everybody who asks how far this is, at the end of each change.
    fn publish(&self, writer: &Writer) {
        self.published.store(Arc::new(writer.published.clone()));
        self.applied
            .send_replace(applied_of(&writer.published.applied));
    }

    fn remember_hashes(&self, new: Vec<StateHash>) {
        let mut hashes = self.hashes.lock();
        hashes.extend(new);
        while hashes.len() > HASHES_KEPT {
            hashes.pop_front();
        }
    }
}

impl Writer {
    pub(super) fn load(store: &dyn StateStore) -> io::Result<Self> {
        let mut applied = decoded(store.get(Family::System, record::APPLIED)?)?;
        if applied.feature_level > apply::FEATURE_LEVEL {
            return Err(io::Error::other(ApplyError::FeatureLevel {
                level: applied.feature_level,
            }));
        }
        // Written by a version that summed up something else.
        if applied.hash_version != hash::VERSION {
            applied.hash_sum = Sum::of(store)?.0;
        }
        let roster = store.get(Family::System, record::ROSTER)?;
        let roster = roster
            .map(|bytes| record::decode("roster", &bytes))
            .transpose()?;
        Ok(Self {
            published: Published {
                applied: Arc::new(applied),
                roster: roster.map(Arc::new),
            },
            clients: Clients::load(store)?,
        })
    }
}

pub(super) fn applied_of(record: &AppliedRecord) -> Applied {
    Applied {
        index: record.last_applied.map_or(0, |log_id| log_id.index),
        revision: record.revision,
        log_time: record.log_time_ms,
        pace: record.pace.unwrap_or_default(),
    }
}

fn decoded(applied: Option<bytes::Bytes>) -> io::Result<AppliedRecord> {
    Ok(applied
        .map(|bytes| record::decode("applied", &bytes))
        .transpose()?
        .unwrap_or_default())
}

/// What the feed says of a run.
fn told(changes: &apply::Changed, applied: &AppliedRecord) -> Vec<(Revision, Key, bool)> {
    changes
        .iter()
        .map(|(key, entry)| match entry {
            Some(entry) => (entry.record.changed, key.clone(), true),
            None => (applied.revision, key.clone(), false),
        })
        .collect()
}
