//! What a node writes down, below all meaning: two thin traits, the log of all its shards and the
//! state of one replica, each with two engines (RocksDB, and memory for development and tests).
//!
//! Promises: a batch is all there or not at all; a synced write of the log survives power loss once
//! it returned; a state comes back as of its last flush, the same for all families, and never a
//! part of it. A store that failed to write says so for ever. Must never know: openraft, tokio, a
//! clock, or what the bytes mean. The first byte of a record is its format, the caller's job.
//!
//! What is stored, and under which key (integers big-endian, so that the order of keys is theirs):
//!
//! | where | key | record | written |
//! |--|--|--|--|
//! | log, entries | shard u32, `1`, index u64 | one Raft log entry | with a WAL, synced by group commit |
//! | log, marks | shard u32, `0`, mark u64 | vote, committed, purged, cluster | in the same batches |
//! | log, `SYNCED` | | what of each shard was synced last | after each sync, in place |
//! | state, `entry` | key | times, version, changed, tags, origin, hash, failure | without a WAL: the log is the WAL |
//! | state, `value` | key | the value's bytes | 〃 |
//! | state, `due` | next instant, key | nothing | 〃 |
//! | state, `barrier` `lease` `tombstone` `client` | theirs | theirs | 〃 |
//! | state, `system` | name | applied, membership, revision, log time, epoch | 〃 |
//!
//! ```text
//! data_dir/log/                       one database for all shards; its WAL is what is synced
//! data_dir/state/<shard>/GENERATION   names the generation that counts
//! data_dir/state/<shard>/<n>/         one database; an installed snapshot is generation n + 1
//! ```

mod budget;
#[cfg_attr(
    not(feature = "rocksdb"),
    allow(dead_code, reason = "the memory engine needs only some of it")
)]
mod durable;
mod memory;
#[cfg(feature = "rocksdb")]
mod poison;
#[cfg(feature = "rocksdb")]
mod rocks;
pub(crate) mod space;
mod stores;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use holdfast_proto::ShardId;

pub use budget::Budget;
pub use stores::{Engine, Stores};

/// The log of ALL shards of a node. One writer (the sync thread), many readers.
///
/// A write for which the disk has no space waits until it has, or until [`Stores::stop_waiting`].
pub trait LogStore: Send + Sync + 'static {
    /// Writes all of it or nothing and, if `sync`, returns only after it and everything before it
    /// is durable. An error is final: whether the batch is there is unknown, the store is poisoned
    /// and every later call fails.
    fn write(&self, batch: LogBatch, sync: bool) -> io::Result<()>;

    /// The entries of the range in order. Stops once the entries read hold `max_bytes`, but gives
    /// at least one if there is any.
    fn read(
        &self,
        shard: ShardId,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<(u64, Bytes)>>;

    /// First and last index present.
    fn bounds(&self, shard: ShardId) -> io::Result<Option<(u64, u64)>>;

    fn last(&self, shard: ShardId) -> io::Result<Option<(u64, Bytes)>>;

    fn mark(&self, shard: ShardId, mark: LogMark) -> io::Result<Option<Bytes>>;

    /// What the shard's log had acknowledged and did not hold when it was opened: since then, or
    /// since an earlier start, until it is made good. Entries, a vote, or any other change.
    fn lost(&self, shard: ShardId) -> Option<Lost>;

    /// Nothing of what the shard had lost is missing any more. Durable on return.
    fn made_good(&self, shard: ShardId) -> io::Result<()>;

    /// Makes durable what is noted for [`LogStore::lost`], which otherwise survives a kill but not a
    /// power loss. Slow: now and then, and never on a thread that anybody waits for.
    fn keep_note(&self) -> io::Result<()>;

    /// Bytes on disk of all shards; the memory engine says what it holds.
    fn disk_bytes(&self) -> io::Result<u64>;

    /// Gives the space of purged and truncated entries back to the disk, where a purge alone does
    /// so only with time. Slow: never on a thread that anybody waits for, the sync thread least.
    fn compact(&self) -> io::Result<()>;
}

/// The state of one replica: families of ordered keys. Written without a WAL, because the Raft log
/// is one. A write or flush for which the disk has no space waits, as the log's do.
pub trait StateStore: Send + Sync + 'static {
    fn get(&self, family: Family, key: &[u8]) -> io::Result<Option<Bytes>>;

    /// Answers in the order of `keys`.
    fn get_many(&self, family: Family, keys: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>>;

    /// Keys at or after `from` and before `end`, in order, read as the iterator goes. It shows the
    /// moment of this call, whatever is written meanwhile. After an error it ends.
    fn scan<'a>(&'a self, family: Family, from: &[u8], end: Option<&[u8]>) -> Scan<'a>;

    /// Writes all of it or nothing, over all families. Readers see it at once; only a flush makes
    /// it durable. An error is final: the store is poisoned and every later call fails.
    fn write(&self, batch: StateBatch) -> io::Result<()>;

    /// Makes everything written so far durable, all families at the same point. The engine may
    /// flush by itself before; never a part.
    fn flush(&self) -> io::Result<()>;

    /// A consistent copy of everything written so far as plain files in `dir`, which must not
    /// exist; durable on return. `dir` is on the file system of the data directory, where the copy
    /// is mostly hard links.
    fn checkpoint(&self, dir: &Path) -> io::Result<()>;

    /// Bytes on disk; the memory engine says what it holds.
    fn disk_bytes(&self) -> io::Result<u64>;

    /// Gives the space of deleted records back to the disk. Slow: never on a thread that anybody
    /// waits for.
    fn compact(&self) -> io::Result<()>;
}

/// Records of one family in order.
pub type Scan<'a> = Box<dyn Iterator<Item = io::Result<(Bytes, Bytes)>> + Send + 'a>;

/// A log that once held more than it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lost {
    /// The last index that it had acknowledged.
    pub acknowledged: u64,
}

/// A small record of one shard's log that is overwritten in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LogMark {
    Vote,
    Committed,
    Purged,
    /// Which cluster the log belongs to.
    Cluster,
}

impl LogMark {
    pub const ALL: [Self; 4] = [Self::Vote, Self::Committed, Self::Purged, Self::Cluster];
}

/// The column families of a state. All exist from the first day, so that no upgrade has to make
/// one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    Entry,
    Value,
    Due,
    Barrier,
    Lease,
    Tombstone,
    Client,
    System,
}

impl Family {
    pub const ALL: [Self; 8] = [
        Self::Entry,
        Self::Value,
        Self::Due,
        Self::Barrier,
        Self::Lease,
        Self::Tombstone,
        Self::Client,
        Self::System,
    ];

    /// Its name on disk.
    pub fn name(self) -> &'static str {
        match self {
            Self::Entry => "entry",
            Self::Value => "value",
            Self::Due => "due",
            Self::Barrier => "barrier",
            Self::Lease => "lease",
            Self::Tombstone => "tombstone",
            Self::Client => "client",
            Self::System => "system",
        }
    }
}

/// Changes to the log, of any number of shards, in the order they were named: a put after a
/// truncation stays.
#[derive(Debug, Default)]
pub struct LogBatch {
    changes: Vec<LogChange>,
    size_bytes: usize,
}

#[derive(Debug)]
enum LogChange {
    Put(ShardId, u64, Bytes),
    TruncateFrom(ShardId, u64),
    PurgeTo(ShardId, u64),
    SetMark(ShardId, LogMark, Bytes),
}

impl LogChange {
    #[cfg(feature = "rocksdb")]
    fn shard(&self) -> ShardId {
        match self {
            Self::Put(shard, ..)
            | Self::TruncateFrom(shard, _)
            | Self::PurgeTo(shard, _)
            | Self::SetMark(shard, ..) => *shard,
        }
    }
}

impl LogBatch {
    pub fn put(&mut self, shard: ShardId, index: u64, entry: Bytes) {
        self.size_bytes += entry.len();
        self.changes.push(LogChange::Put(shard, index, entry));
    }

    /// Removes that index and all after it.
    pub fn truncate_from(&mut self, shard: ShardId, index: u64) {
        self.changes.push(LogChange::TruncateFrom(shard, index));
    }

    /// Removes that index and all before it.
    pub fn purge_to(&mut self, shard: ShardId, index: u64) {
        self.changes.push(LogChange::PurgeTo(shard, index));
    }

    pub fn set_mark(&mut self, shard: ShardId, mark: LogMark, record: Bytes) {
        self.size_bytes += record.len();
        self.changes.push(LogChange::SetMark(shard, mark, record));
    }

    /// Adds the changes of `later` after its own: how several appends become one sync.
    pub fn append(&mut self, mut later: Self) {
        self.size_bytes += later.size_bytes;
        self.changes.append(&mut later.changes);
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Bytes of the entries and marks in it.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }
}

/// Changes to the state in the order they were named, over any families.
#[derive(Debug, Default)]
pub struct StateBatch {
    changes: Vec<StateChange>,
}

#[derive(Debug)]
enum StateChange {
    Put(Family, Bytes, Bytes),
    Delete(Family, Bytes),
    DeleteRange(Family, Bytes, Bytes),
}

impl StateBatch {
    pub fn put(&mut self, family: Family, key: impl Into<Bytes>, value: impl Into<Bytes>) {
        self.changes
            .push(StateChange::Put(family, key.into(), value.into()));
    }

    /// Removing what is not there is fine.
    pub fn delete(&mut self, family: Family, key: impl Into<Bytes>) {
        self.changes.push(StateChange::Delete(family, key.into()));
    }

    /// Removes the keys at or after `from` and before `end`. For many keys at once: each call
    /// leaves a trace that reads must pass.
    pub fn delete_range(&mut self, family: Family, from: impl Into<Bytes>, end: impl Into<Bytes>) {
        self.changes
            .push(StateChange::DeleteRange(family, from.into(), end.into()));
    }

    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}
