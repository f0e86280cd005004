//! The state of one replica in one database, a column family for each family, without a WAL.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    ColumnFamily, DB, DBRawIterator, FlushOptions, ReadOptions, WriteBatch, WriteOptions,
};

use super::generations::Generations;
use super::io_error;
use super::settings::Shared;
use super::waiting::Waiting;
use crate::store::poison::Poison;
use crate::store::{Family, Scan, StateBatch, StateChange, StateStore, durable};

pub(in crate::store) struct RocksState {
    // Before `place`: fields are dropped in order, and a database is closed before its directory
    // goes.
    db: DB,
    place: Place,
    waiting: Waiting,
    pub(super) poison: Poison,
}

impl RocksState {
    pub(super) fn open(
        generations: &Generations,
        number: u64,
        create: bool,
        shared: &Shared,
    ) -> io::Result<Self> {
        let place = Place {
            root: generations.root().to_owned(),
            generation: generations.path(number),
            retired: AtomicBool::new(false),
        };
        let options = shared.state(create).map_err(io_error)?;
        let db = DB::open_cf_descriptors(&options, &place.generation, shared.state_families())
            .map_err(io_error)?;
        // RocksDB makes the first directory by itself and does not make its name durable.
        durable::sync_directory(&place.root)?;
        Ok(Self {
            db,
            place,
            waiting: shared.waiting.clone(),
            poison: Poison::default(),
        })
    }

    /// Another generation counts now: this one goes with its last handle.
    pub(super) fn retire(&self) {
        self.place.retired.store(true, Ordering::Release);
    }

    fn family(&self, family: Family) -> &ColumnFamily {
        self.db
            .cf_handle(family.name())
            .expect("the database was opened with all its families")
    }
}

/// Where the database lives.
struct Place {
    /// The shard's directory, with all generations.
    root: PathBuf,
    generation: PathBuf,
    retired: AtomicBool,
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.retired.load(Ordering::Acquire) {
            return;
        }
        if let Err(error) = durable::remove_directory(&self.generation) {
            tracing::warn!(%error, "a replaced state was not removed; the next start tries again");
        }
    }
}

impl StateStore for RocksState {
    fn get(&self, family: Family, key: &[u8]) -> io::Result<Option<Bytes>> {
        self.poison.check()?;
        let value = self.db.get_cf(self.family(family), key).map_err(io_error)?;
        Ok(value.map(Bytes::from))
    }

    fn get_many(&self, family: Family, keys: &[&[u8]]) -> io::Result<Vec<Option<Bytes>>> {
        self.poison.check()?;
        let values = self
            .db
            .batched_multi_get_cf(self.family(family), keys.iter().copied(), false);
        let copied = values.into_iter().map(|value| {
            Ok(value
                .map_err(io_error)?
                .map(|value| Bytes::copy_from_slice(&value)))
        });
        copied.collect()
    }

    fn scan<'a>(&'a self, family: Family, from: &[u8], end: Option<&[u8]>) -> Scan<'a> {
        if let Err(error) = self.poison.check() {
            return Box::new(std::iter::once(Err(error)));
        }
        let mut options = ReadOptions::default();
        // A walk over all entries or values would push out what readers look up one by one.
        options.fill_cache(!matches!(family, Family::Entry | Family::Value));
        if let Some(end) = end {
            options.set_iterate_upper_bound(end);
        }
        let mut records = self.db.raw_iterator_cf_opt(self.family(family), options);
        records.seek(from);
        Box::new(RocksScan {
            records,
            at: At::Record,
        })
    }

    fn write(&self, batch: StateBatch) -> io::Result<()> {
        self.poison.check()?;
        let mut prepared = WriteBatch::default();
        for change in batch.changes {
            match change {
                StateChange::Put(family, key, value) => {
                    prepared.put_cf(self.family(family), key, value)
                }
                StateChange::Delete(family, key) => prepared.delete_cf(self.family(family), key),
                // RocksDB refuses a whole batch for one range that ends before it begins.
                StateChange::DeleteRange(_, from, end) if from >= end => {}
                StateChange::DeleteRange(family, from, end) => {
                    prepared.delete_range_cf(self.family(family), from, end)
                }
            }
        }
        let mut options = WriteOptions::default();
        options.disable_wal(true);
        let written = self.waiting.for_space("the state", &self.db, || {
            let again = WriteBatch::from_data(prepared.data());
            self.db.write_opt(again, &options)
        });
        self.poison.watch(written)
    }

    fn flush(&self) -> io::Result<()> {
        self.poison.check()?;
        let families = Family::ALL.map(|family| self.family(family));
        let flushed = self.waiting.for_space("the state", &self.db, || {
            self.db.flush_cfs_opt(&families, &FlushOptions::default())
        });
        self.poison.watch(flushed)
    }

    fn checkpoint(&self, dir: &Path) -> io::Result<()> {
        self.poison.check()?;
        // It flushes first; that flush is atomic as every flush here.
        let checkpoint = Checkpoint::new(&self.db).map_err(io_error)?;
        checkpoint.create_checkpoint(dir).map_err(io_error)?;
        durable::sync_files(dir)
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        self.poison.check()?;
        durable::size_bytes(&self.place.root)
    }

    fn compact(&self) -> io::Result<()> {
        self.flush()?;
        Family::ALL.iter().for_each(|family| {
            self.db
                .compact_range_cf(self.family(*family), None::<&[u8]>, None::<&[u8]>)
        });
        self.poison.check()
    }
}

/// One record of a checkpoint, opened so that nothing in it changes.
pub(in crate::store) fn read_checkpoint(
    dir: &Path,
    family: Family,
    key: &[u8],
) -> io::Result<Option<Bytes>> {
    let families = Family::ALL.map(Family::name);
    let db = DB::open_cf_for_read_only(&rocksdb::Options::default(), dir, families, false)
        .map_err(io_error)?;
    let handle = db
        .cf_handle(family.name())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a checkpoint lacks a family"))?;
    Ok(db.get_cf(handle, key).map_err(io_error)?.map(Bytes::from))
}

/// Reads on as it is asked. RocksDB keeps the view of its start.
struct RocksScan<'a> {
    records: DBRawIterator<'a>,
    at: At,
}

/// Where the iterator stands.
enum At {
    /// On a record that was not given yet, or past the last.
    Record,
    /// On the record given last.
    Given,
    End,
}

impl Iterator for RocksScan<'_> {
    type Item = io::Result<(Bytes, Bytes)>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.at {
            At::Record => {}
            At::Given => self.records.next(),
            At::End => return None,
        }
        if let Some((key, value)) = self.records.item() {
            self.at = At::Given;
            return Some(Ok((
                Bytes::copy_from_slice(key),
                Bytes::copy_from_slice(value),
            )));
        }
        self.at = At::End;
        self.records
            .status()
            .err()
            .map(|error| Err(io_error(error)))
    }
}
