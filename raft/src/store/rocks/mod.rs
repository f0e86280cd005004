//! The durable engine: the only place that names RocksDB. One database for the log of all shards,
//! one for each shard's state, with one block cache and one bound on write buffers for all of them.

mod crc32c;
mod generations;
mod log;
mod settings;
mod state;
mod synced;
#[cfg(test)]
mod tests;
mod waiting;
mod wal;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use holdfast_proto::ShardId;
use parking_lot::Mutex;

use super::budget::Budget;
use super::{durable, space};
use generations::Generations;
use log::RocksLog;
use settings::Shared;
use state::RocksState;

pub(super) use state::read_checkpoint;

/// Said in a snapshot's header: an older RocksDB may be unable to read a newer one's files.
pub(super) const VERSION: &str = "rocksdb 11.8.1";

/// The databases below one data directory.
pub(super) struct RocksDisk {
    data_dir: PathBuf,
    shared: Shared,
    /// The last handle of each shard. The lock lets one open or install happen at a time.
    states: Mutex<HashMap<ShardId, Weak<RocksState>>>,
}

impl RocksDisk {
    pub(super) fn new(data_dir: &Path, budget: Budget) -> io::Result<Self> {
        durable::create_directory(data_dir)?;
        Ok(Self {
            data_dir: data_dir.to_owned(),
            shared: Shared::new(budget, space::total_bytes(data_dir)?),
            states: Mutex::default(),
        })
    }

    pub(super) fn open_log(&self) -> io::Result<Arc<RocksLog>> {
        let directory = self.data_dir.join("log");
        durable::create_directory(&directory)?;
        self.shared.waiting.resume();
        Ok(Arc::new(RocksLog::open(&directory, &self.shared)?))
    }

    pub(super) fn open_state(&self, shard: ShardId) -> io::Result<Arc<RocksState>> {
        let mut states = self.states.lock();
        if states
            .get(&shard)
            .is_some_and(|open| open.strong_count() > 0)
        {
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("the state of shard {shard} is open already"),
            ));
        }
        let (generations, current) = Generations::open(self.root(shard))?;
        let create = current == Generations::FIRST;
        let state = Arc::new(RocksState::open(
            &generations,
            current,
            create,
            &self.shared,
        )?);
        states.insert(shard, Arc::downgrade(&state));
        Ok(state)
    }

    pub(super) fn stop_waiting(&self) {
        self.shared.waiting.stop();
    }

    pub(super) fn has_state(&self, shard: ShardId) -> io::Result<bool> {
        self.root(shard).try_exists()
    }

    pub(super) fn install_state(
        &self,
        shard: ShardId,
        from_dir: &Path,
    ) -> io::Result<Arc<RocksState>> {
        let mut states = self.states.lock();
        let installed = self.install(shard, from_dir, states.get(&shard).and_then(Weak::upgrade));
        match &installed {
            Ok(state) => drop(states.insert(shard, Arc::downgrade(state))),
            Err(_) => durable::remove_directory(from_dir)?,
        }
        installed
    }

    fn install(
        &self,
        shard: ShardId,
        from_dir: &Path,
        old: Option<Arc<RocksState>>,
    ) -> io::Result<Arc<RocksState>> {
        let generations = Generations::at(self.root(shard))?;
        let current = generations.current()?;
        let next = generations.adopt(from_dir, current)?;
        let state = match RocksState::open(&generations, next, false, &self.shared) {
            Ok(state) => state,
            Err(error) => {
                // It was never pointed to; if its removal fails too, the next open discards it.
                let _ = generations.discard(next);
                return Err(error);
            }
        };
        // An error here leaves both generations, because it is unknown which one the disk now
        // points to; each is whole.
        generations.point_to(next)?;
        match old {
            Some(old) => old.retire(),
            None => current.map_or(Ok(()), |current| generations.discard(current))?,
        }
        Ok(Arc::new(state))
    }

    fn root(&self, shard: ShardId) -> PathBuf {
        self.data_dir.join("state").join(shard.to_string())
    }
}

fn io_error(error: rocksdb::Error) -> io::Error {
    let kind = match error.kind() {
        rocksdb::ErrorKind::Corruption => io::ErrorKind::InvalidData,
        rocksdb::ErrorKind::Busy => io::ErrorKind::ResourceBusy,
        _ if waiting::is_no_space(&error) => io::ErrorKind::StorageFull,
        _ => io::ErrorKind::Other,
    };
    io::Error::new(kind, error.into_string())
}
