//! The memory engine, for development and tests: nothing survives the process, so it keeps no
//! promise of durability. All else is as with the durable engine, on purpose: a state opened again
//! is as of its last flush, a store is open once at a time, and a checkpoint is a file that goes
//! over the wire as any snapshot does.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::{Bound, Range};
use std::path::Path;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use holdfast_proto::ShardId;
use parking_lot::{Mutex, RwLock};

use super::{
    Family, LogBatch, LogChange, LogMark, LogStore, Lost, Scan, StateBatch, StateChange,
    StateStore, durable,
};

mod file;

/// Said where a snapshot names the engine that made it.
pub(super) const VERSION: &str = "memory 1";

/// What stands for the disk: outlives the handles, so that a test can restart a node in its
/// process.
#[derive(Default)]
pub(super) struct MemoryDisk {
    log: Mutex<LogSlot>,
    states: Mutex<HashMap<ShardId, StateSlot>>,
}

#[derive(Default)]
struct LogSlot {
    shards: Arc<RwLock<HashMap<ShardId, ShardLog>>>,
    open: Weak<MemoryLog>,
}

#[derive(Default)]
struct StateSlot {
    flushed: Arc<Mutex<Tables>>,
    open: Weak<MemoryState>,
}

impl MemoryDisk {
    pub(super) fn open_log(&self) -> io::Result<Arc<MemoryLog>> {
        let mut slot = self.log.lock();
        refuse_second(&slot.open, "the log")?;
        let log = Arc::new(MemoryLog {
            shards: slot.shards.clone(),
        });
        slot.open = Arc::downgrade(&log);
        Ok(log)
    }

    pub(super) fn open_state(&self, shard: ShardId) -> io::Result<Arc<MemoryState>> {
        let mut states = self.states.lock();
        let slot = states.entry(shard).or_default();
        refuse_second(&slot.open, "the state")?;
        Ok(slot.open_anew())
    }

    pub(super) fn has_state(&self, shard: ShardId) -> bool {
        self.states.lock().contains_key(&shard)
    }

    pub(super) fn install_state(
        &self,
        shard: ShardId,
        from_dir: &Path,
    ) -> io::Result<Arc<MemoryState>> {
        let tables = file::read(from_dir);
        durable::remove_directory(from_dir)?;
        let tables = tables?;
        let mut states = self.states.lock();
        let slot = states.entry(shard).or_default();
        // The old handle keeps the old slot's tables: whoever still reads them sees no mixture.
        *slot = StateSlot {
            flushed: Arc::new(Mutex::new(tables)),
            open: Weak::new(),
        };
        Ok(slot.open_anew())
    }
}

pub(super) fn read_checkpoint(dir: &Path, family: Family, key: &[u8]) -> io::Result<Option<Bytes>> {
    Ok(file::read(dir)?.families[family as usize].get(key).cloned())
}

impl StateSlot {
    fn open_anew(&mut self) -> Arc<MemoryState> {
        let live = RwLock::new(self.flushed.lock().clone());
        let state = Arc::new(MemoryState {
            live,
            flushed: self.flushed.clone(),
        });
        self.open = Arc::downgrade(&state);
        state
    }
}

/// The durable engine locks its directory; the same mistake must fail here, or tests would hide it.
fn refuse_second<T>(open: &Weak<T>, what: &str) -> io::Result<()> {
    match open.strong_count() {
        0 => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{what} is open already"),
        )),
    }
}

pub(super) struct MemoryLog {
    shards: Arc<RwLock<HashMap<ShardId, ShardLog>>>,
}

#[derive(Default)]
struct ShardLog {
    entries: BTreeMap<u64, Bytes>,
    marks: BTreeMap<LogMark, Bytes>,
}

impl MemoryLog {
    fn look<T>(&self, shard: ShardId, look: impl FnOnce(&ShardLog) -> Option<T>) -> Option<T> {
        self.shards.read().get(&shard).and_then(look)
    }
}

impl LogStore for MemoryLog {
    fn write(&self, batch: LogBatch, _sync: bool) -> io::Result<()> {
        let mut shards = self.shards.write();
        for change in batch.changes {
            match change {
                LogChange::Put(shard, index, entry) => {
                    shards
                        .entry(shard)
                        .or_default()
                        .entries
                        .insert(index, entry);
                }
                LogChange::TruncateFrom(shard, index) => {
                    shards.entry(shard).or_default().entries.split_off(&index);
                }
                LogChange::PurgeTo(shard, index) => {
                    let entries = &mut shards.entry(shard).or_default().entries;
                    *entries = index
                        .checked_add(1)
                        .map_or_else(BTreeMap::new, |next| entries.split_off(&next));
                }
                LogChange::SetMark(shard, mark, record) => {
                    shards.entry(shard).or_default().marks.insert(mark, record);
                }
            }
        }
        Ok(())
    }

    fn read(
        &self,
        shard: ShardId,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<(u64, Bytes)>> {
        let mut read = Vec::new();
        if range.is_empty() {
            return Ok(read);
        }
        if let Some(log) = self.shards.read().get(&shard) {
            let mut size_bytes = 0;
            for (index, entry) in log.entries.range(range) {
                size_bytes += entry.len();
                read.push((*index, entry.clone()));
                if size_bytes >= max_bytes {
                    break;
                }
            }
        }
        Ok(read)
    }

    fn bounds(&self, shard: ShardId) -> io::Result<Option<(u64, u64)>> {
        Ok(self.look(shard, |log| {
            Some((
                *log.entries.first_key_value()?.0,
                *log.entries.last_key_value()?.0,
            ))
        }))
    }

    fn last(&self, shard: ShardId) -> io::Result<Option<(u64, Bytes)>> {
        Ok(self.look(shard, |log| {
            log.entries
                .last_key_value()
                .map(|(index, entry)| (*index, entry.clone()))
        }))
    }

    fn mark(&self, shard: ShardId, mark: LogMark) -> io::Result<Option<Bytes>> {
        Ok(self.look(shard, |log| log.marks.get(&mark).cloned()))
    }

    fn lost(&self, _shard: ShardId) -> Option<Lost> {
        None
    }

    fn made_good(&self, _shard: ShardId) -> io::Result<()> {
        Ok(())
    }

    fn keep_note(&self) -> io::Result<()> {
        Ok(())
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        let shards = self.shards.read();
        let records = shards
            .values()
            .flat_map(|log| log.entries.values().chain(log.marks.values()));
        Ok(records.map(|record| record.len() as u64).sum())
    }

    fn compact(&self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) struct MemoryState {
    live: RwLock<Tables>,
    flushed: Arc<Mutex<Tables>>,
}

type Table = BTreeMap<Bytes, Bytes>;

/// The families, each shared until somebody writes to it: a scan, a flush and a checkpoint cost
/// nothing but that copy.
#[derive(Clone, Default)]
struct Tables {
    families: [Arc<Table>; Family::ALL.len()],
    size_bytes: u64,
}

impl Tables {
    fn put(&mut self, family: Family, key: &[u8], value: &[u8]) {
        // Copied, because a slice would keep the whole log entry or message it came from.
        let old = self
            .table(family)
            .insert(Bytes::copy_from_slice(key), Bytes::copy_from_slice(value));
        let freed = old.map_or(0, |old| key.len() + old.len());
        self.size_bytes = self.size_bytes + (key.len() + value.len()) as u64 - freed as u64;
    }

    fn delete(&mut self, family: Family, key: &[u8]) {
        if let Some(old) = self.table(family).remove(key) {
            self.size_bytes -= (key.len() + old.len()) as u64;
        }
    }

    fn delete_range(&mut self, family: Family, from: &Bytes, end: &Bytes) {
        if from >= end {
            return;
        }
        let doomed: Vec<Bytes> = self
            .table(family)
            .range::<Bytes, _>(from..end)
            .map(|(key, _)| key.clone())
            .collect();
        doomed.iter().for_each(|key| self.delete(family, key));
    }

    fn table(&mut self, family: Family) -> &mut Table {
        Arc::make_mut(&mut self.families[family as usize])
    }
}

impl StateStore for MemoryState {
    fn get(&self, family: Family, key: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(self.live.read().families[family as usize].get(key).cloned())
    }

    fn get_many(&self, family: Family, keys: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>> {
        let live = self.live.read();
        Ok(keys
            .iter()
            .map(|key| live.families[family as usize].get(*key).cloned())
            .collect())
    }

    fn scan<'a>(&'a self, family: Family, from: &[u8], end: Option<&[u8]>) -> Scan<'a> {
        Box::new(TableScan {
            table: self.live.read().families[family as usize].clone(),
            next: Bound::Included(Bytes::copy_from_slice(from)),
            end: end.map(Bytes::copy_from_slice),
        })
    }

    fn write(&self, batch: StateBatch) -> io::Result<()> {
        let mut live = self.live.write();
        for change in batch.changes {
            match change {
                StateChange::Put(family, key, value) => live.put(family, &key, &value),
                StateChange::Delete(family, key) => live.delete(family, &key),
                StateChange::DeleteRange(family, from, end) => {
                    live.delete_range(family, &from, &end)
                }
            }
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let live = self.live.read();
        *self.flushed.lock() = live.clone();
        Ok(())
    }

    fn checkpoint(&self, dir: &Path) -> io::Result<()> {
        let tables = self.live.read().clone();
        file::write(dir, &tables)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        Ok(self.live.read().size_bytes)
    }

    fn compact(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Walks a table that nobody can change any more.
struct TableScan {
    table: Arc<Table>,
    next: Bound<Bytes>,
    end: Option<Bytes>,
}

impl Iterator for TableScan {
    type Item = io::Result<(Bytes, Bytes)>;

    fn next(&mut self) -> Option<Self::Item> {
        let from = (self.next.as_ref(), Bound::Unbounded);
        let (key, value) = self.table.range::<Bytes, _>(from).next()?;
        if self.end.as_ref().is_some_and(|end| key >= end) {
            return None;
        }
        let record = (key.clone(), value.clone());
        self.next = Bound::Excluded(record.0.clone());
        Some(Ok(record))
    }
}
