//! The stores of one node, opened once. Knows where each lives and which engine runs it; must never
//! know what is in them.

use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_proto::ShardId;

use super::budget::Budget;
use super::memory::{self, MemoryDisk};
#[cfg(feature = "rocksdb")]
use super::rocks::{self, RocksDisk};
use super::{Family, LogStore, StateStore};

/// What keeps the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Durable. Only in builds with the cargo feature `rocksdb`.
    Rocksdb,
    /// For development and tests: nothing survives the process.
    Memory,
}

impl Engine {
    /// The one to use when nobody chose: the durable one if this build has it.
    pub const DEFAULT: Self = if cfg!(feature = "rocksdb") {
        Self::Rocksdb
    } else {
        Self::Memory
    };
}

/// All stores of one node. Clones are the same stores. Each of them is open once at a time: drop
/// every handle before opening again.
#[derive(Clone)]
pub struct Stores {
    disk: Disk,
    /// A test keeps them over what it calls a restart.
    lasting: bool,
}

#[derive(Clone)]
enum Disk {
    Memory(Arc<MemoryDisk>),
    #[cfg(feature = "rocksdb")]
    Rocks(Arc<RocksDisk>),
}

impl Stores {
    /// Uses `data_dir/log` and `data_dir/state`, made as needed; the memory engine touches neither.
    /// The caller sees to it that no other process uses `data_dir`.
    pub fn open(engine: Engine, data_dir: &Path, budget: Budget) -> io::Result<Self> {
        match engine {
            Engine::Memory => Ok(Self::memory()),
            #[cfg(feature = "rocksdb")]
            Engine::Rocksdb => Ok(Self {
                disk: Disk::Rocks(Arc::new(RocksDisk::new(data_dir, budget)?)),
                lasting: false,
            }),
            #[cfg(not(feature = "rocksdb"))]
            Engine::Rocksdb => {
                let _ = (data_dir, budget);
                Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "this build has no engine `rocksdb`: its cargo feature is off",
                ))
            }
        }
    }

    /// Empty stores in memory. What they hold lives as long as this value or a clone of it.
    pub fn memory() -> Self {
        Self {
            disk: Disk::Memory(Arc::default()),
            lasting: false,
        }
    }

    /// The same, for a test that keeps them over what it calls a restart of the node.
    #[cfg(test)]
    pub(crate) fn lasting() -> Self {
        Self {
            lasting: true,
            ..Self::memory()
        }
    }

    pub fn open_log(&self) -> io::Result<Arc<dyn LogStore>> {
        match &self.disk {
            Disk::Memory(disk) => Ok(disk.open_log()?),
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(disk) => Ok(disk.open_log()?),
        }
    }

    /// The state of that shard as of its last flush, empty if there was none.
    pub fn open_state(&self, shard: ShardId) -> io::Result<Arc<dyn StateStore>> {
        match &self.disk {
            Disk::Memory(disk) => Ok(disk.open_state(shard)?),
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(disk) => Ok(disk.open_state(shard)?),
        }
    }

    /// Lets nothing wait for space any more: what finds none fails. For a node that stops; opening
    /// the log takes it back.
    pub fn stop_waiting(&self) {
        match &self.disk {
            Disk::Memory(_) => {}
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(disk) => disk.stop_waiting(),
        }
    }

    /// Whether the shard's state was ever opened here.
    pub fn has_state(&self, shard: ShardId) -> io::Result<bool> {
        match &self.disk {
            Disk::Memory(disk) => Ok(disk.has_state(shard)),
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(disk) => disk.has_state(shard),
        }
    }

    /// Replaces the state by a checkpoint: all of it, durable, in `from_dir` on the data
    /// directory's file system. `from_dir` is used up, also by an error, after which the old state
    /// stands. After a crash it is the old state or the new one. Nobody may write to the old handle
    /// any more; who still reads from it reads the old state until the last handle is dropped.
    pub fn install_state(
        &self,
        shard: ShardId,
        from_dir: &Path,
    ) -> io::Result<Arc<dyn StateStore>> {
        match &self.disk {
            Disk::Memory(disk) => Ok(disk.install_state(shard, from_dir)?),
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(disk) => Ok(disk.install_state(shard, from_dir)?),
        }
    }

    /// One record of a checkpoint directory, without changing anything there.
    pub fn read_checkpoint(
        &self,
        dir: &Path,
        family: Family,
        key: &[u8],
    ) -> io::Result<Option<Bytes>> {
        match &self.disk {
            Disk::Memory(_) => memory::read_checkpoint(dir, family, key),
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(_) => rocks::read_checkpoint(dir, family, key),
        }
    }

    /// Says who can read a checkpoint of this node: for the header of a snapshot.
    pub fn engine_version(&self) -> &'static str {
        match &self.disk {
            Disk::Memory(_) => memory::VERSION,
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(_) => rocks::VERSION,
        }
    }

    /// Whether a restart of the process finds what was synced and flushed.
    pub fn is_durable(&self) -> bool {
        match &self.disk {
            Disk::Memory(_) => self.lasting,
            #[cfg(feature = "rocksdb")]
            Disk::Rocks(_) => true,
        }
    }
}
