//! Who changes a state, and how that is made known: one writer at a time, for what is committed
//! (`apply.rs`) and for snapshots that take its place. Readers never wait for it, and neither does
//! anybody who asks how far it is.

use std::{
    io,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use holdfast_proto::peer::{AppliedRecord, StateHash};

use super::{
    Applied, Generation, Published, State,
    clients::Clients,
    error::ApplyError,
    hash::{self, Sum},
    memory::Memory,
    record::{self, FEATURE_LEVEL},
};
use crate::store::{Family, StateStore};

/// Hashes kept for comparison with peers that are ahead or behind.
const HASHES_KEPT: usize = 64;

/// Everything that changes only in apply and install.
pub(super) struct Writer {
    pub(super) published: Published,
    pub(super) clients: Clients,
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
    pub(super) fn publish(&self, writer: &Writer) {
        self.published.store(Arc::new(writer.published.clone()));
        self.applied
            .send_replace(applied_of(&writer.published.applied));
    }

    pub(super) fn remember_hashes(&self, new: Vec<StateHash>) {
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
        if applied.feature_level > FEATURE_LEVEL {
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
