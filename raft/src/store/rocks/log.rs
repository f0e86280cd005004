//! The log of all shards in one database, so that one sync serves them all.
//!
//! ```text
//! family entries: shard u32 BE · 1 · index u64 BE → entry        family marks: shard u32 BE · 0 · mark u64 BE → record
//! ```
//! Entries are never overwritten in place but after a truncation. Two families, because a table
//! file that holds marks would overlap every other file and make compaction rewrite a log that is
//! only ever appended to and cut at both ends. What was synced is noted in a second place
//! (`synced.rs`), and the write-ahead files are read before RocksDB replays them (`wal.rs`): a
//! damaged log does not open, and one that lost what it had acknowledged says so.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use holdfast_proto::ShardId;
use parking_lot::Mutex;
use rocksdb::{
    ColumnFamily, DB, DBRawIterator, FlushOptions, ReadOptions, WriteBatch, WriteOptions,
};

use super::io_error;
use super::settings::{LOG_ENTRIES, LOG_MARKS, Shared};
use super::synced::{Changed, Synced};
use super::waiting::{Waiting, is_no_space};
use super::wal;
use crate::store::poison::Poison;
use crate::store::{LogBatch, LogChange, LogMark, LogStore, Lost, durable};

const MARK: u8 = 0;
const ENTRY: u8 = 1;
const KEY_BYTES: usize = 13;

pub(in crate::store) struct RocksLog {
    db: DB,
    directory: PathBuf,
    writer: Mutex<Writer>,
    waiting: Waiting,
    pub(super) poison: Poison,
}

/// What only the writer knows.
struct Writer {
    synced: Synced,
    /// Last index of each shard that was written to.
    last: HashMap<ShardId, Option<u64>>,
    /// Shards with changes that are not noted as synced, and their new vote.
    unsynced: BTreeMap<ShardId, Option<Bytes>>,
    /// No entry of the shard is below. A purge deletes from here and not from 0: ranges that all
    /// begin at 0 would pile up on each other, and every read would pass the pile.
    floors: HashMap<ShardId, u64>,
    /// Purges whose files may go, once a sync made the purge itself durable: files that vanish
    /// before it leave a log with a hole.
    reclaimable: HashMap<ShardId, u64>,
}

impl RocksLog {
    pub(super) fn open(directory: &Path, shared: &Shared) -> io::Result<Self> {
        // RocksDB's name for what says which of its files count.
        let exists = directory.join("CURRENT").exists();
        let mut synced = Synced::open(directory, exists)?;
        wal::mend_torn(directory)?;
        let db = DB::open_cf_descriptors(&shared.log(), directory, shared.log_families())
            .map_err(io_error)?;
        let lost_votes = synced.compare(db.latest_sequence_number())?;
        let writer = Writer {
            synced,
            last: HashMap::new(),
            unsynced: BTreeMap::new(),
            floors: HashMap::new(),
            reclaimable: HashMap::new(),
        };
        let log = Self {
            db,
            directory: directory.to_owned(),
            writer: Mutex::new(writer),
            waiting: shared.waiting.clone(),
            poison: Poison::default(),
        };
        let mut given_back = LogBatch::default();
        for (shard, vote) in lost_votes {
            given_back.set_mark(shard, LogMark::Vote, vote);
        }
        if !given_back.is_empty() {
            log.write(given_back, true)?;
        }
        Ok(log)
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db
            .cf_handle(name)
            .expect("the database was opened with all its families")
    }

    /// The batch in RocksDB's form. Each change must be seen by those after it, so it is made in
    /// one pass.
    fn prepare(&self, changes: Vec<LogChange>, writer: &mut Writer) -> io::Result<WriteBatch> {
        let (entries, marks) = (self.family(LOG_ENTRIES), self.family(LOG_MARKS));
        let mut prepared = WriteBatch::default();
        for change in changes {
            let unsynced = writer.unsynced.entry(change.shard()).or_default();
            if let LogChange::SetMark(_, LogMark::Vote, vote) = &change {
                *unsynced = Some(vote.clone());
            }
            match change {
                LogChange::Put(shard, index, entry) => {
                    writer.last.insert(shard, Some(index));
                    let floor = self.floor(shard, writer)?;
                    *floor = index.min(*floor);
                    prepared.put_cf(entries, key(shard, ENTRY, index), entry);
                }
                LogChange::TruncateFrom(shard, index) => {
                    let last = self.last_index(shard, writer)?;
                    *last = last.and_then(|last| index.checked_sub(1).map(|to| to.min(last)));
                    prepared.delete_range_cf(
                        entries,
                        key(shard, ENTRY, index).as_slice(),
                        end_of(shard).as_slice(),
                    );
                }
                LogChange::PurgeTo(shard, index) => {
                    let floor = self.floor(shard, writer)?;
                    if *floor <= index {
                        prepared.delete_range_cf(
                            entries,
                            key(shard, ENTRY, *floor),
                            after(shard, index),
                        );
                        *floor = index.saturating_add(1);
                        writer.reclaimable.insert(shard, index);
                    }
                }
                LogChange::SetMark(shard, mark, record) => {
                    prepared.put_cf(marks, mark_key(shard, mark), record)
                }
            }
        }
        Ok(prepared)
    }

    fn floor<'a>(&self, shard: ShardId, writer: &'a mut Writer) -> io::Result<&'a mut u64> {
        use std::collections::hash_map::Entry;
        match writer.floors.entry(shard) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(unknown) => {
                let first = self.first(shard)?.unwrap_or(u64::MAX);
                Ok(unknown.insert(first))
            }
        }
    }

    fn last_index<'a>(
        &self,
        shard: ShardId,
        writer: &'a mut Writer,
    ) -> io::Result<&'a mut Option<u64>> {
        use std::collections::hash_map::Entry;
        match writer.last.entry(shard) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(unknown) => {
                let last = self.bounds(shard)?.map(|(_, last)| last);
                Ok(unknown.insert(last))
            }
        }
    }

    /// Notes what is on disk now, before anybody hears of it.
    fn note_synced(&self, writer: &mut Writer) -> io::Result<()> {
        let sequence = self.db.latest_sequence_number();
        let mut changed = Vec::new();
        for (shard, vote) in std::mem::take(&mut writer.unsynced) {
            let last_index = *self.last_index(shard, writer)?;
            changed.push((shard, Changed { last_index, vote }));
        }
        writer.synced.advance(sequence, changed)
    }

    /// Removes table files that hold nothing but purged entries, without reading them.
    fn reclaim(&self, writer: &mut Writer) -> io::Result<()> {
        let entries = self.family(LOG_ENTRIES);
        for (shard, index) in writer.reclaimable.drain() {
            let (from, to) = (key(shard, ENTRY, 0), key(shard, ENTRY, index));
            match self.db.delete_file_in_range_cf(entries, from, to) {
                // Compaction gives their space back as well, later.
                Err(error) if is_no_space(&error) => {}
                result => result.map_err(io_error)?,
            }
        }
        Ok(())
    }

    fn first(&self, shard: ShardId) -> io::Result<Option<u64>> {
        let mut entries = self.entries(shard, 0, end_of(shard));
        entries.seek_to_first();
        current(&entries).map(|found| found.map(|(index, _)| index))
    }

    /// An iterator over that part of the shard's entries. What it reads stays out of the cache: old
    /// entries are read once.
    fn entries(&self, shard: ShardId, from: u64, end: Vec<u8>) -> DBRawIterator<'_> {
        let mut options = ReadOptions::default();
        options.fill_cache(false);
        options.set_iterate_lower_bound(key(shard, ENTRY, from));
        options.set_iterate_upper_bound(end);
        self.db
            .raw_iterator_cf_opt(self.family(LOG_ENTRIES), options)
    }
}

impl LogStore for RocksLog {
    fn write(&self, batch: LogBatch, sync: bool) -> io::Result<()> {
        let mut writer = self.writer.lock();
        self.poison.check()?;
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        let prepared = self
            .poison
            .watch(self.prepare(batch.changes, &mut writer))?;
        let written = self.waiting.for_space("the log", &self.db, || {
            let again = WriteBatch::from_data(prepared.data());
            self.db.write_opt(again, &options)
        });
        self.poison.watch(written)?;
        if sync {
            self.poison.watch(self.note_synced(&mut writer))?;
        }
        if sync && !writer.reclaimable.is_empty() {
            self.poison.watch(self.reclaim(&mut writer))?;
        }
        Ok(())
    }

    fn read(
        &self,
        shard: ShardId,
        range: Range<u64>,
        max_bytes: usize,
    ) -> io::Result<Vec<(u64, Bytes)>> {
        self.poison.check()?;
        let mut read = Vec::new();
        if range.is_empty() {
            return Ok(read);
        }
        let mut entries = self.entries(shard, range.start, key(shard, ENTRY, range.end));
        let mut size_bytes = 0;
        entries.seek_to_first();
        while let Some((index, entry)) = current(&entries)? {
            size_bytes += entry.len();
            read.push((index, Bytes::copy_from_slice(entry)));
            if size_bytes >= max_bytes {
                break;
            }
            entries.next();
        }
        Ok(read)
    }

    fn bounds(&self, shard: ShardId) -> io::Result<Option<(u64, u64)>> {
        self.poison.check()?;
        // One iterator for both ends, so that they are of one moment.
        let mut entries = self.entries(shard, 0, end_of(shard));
        entries.seek_to_first();
        let Some((first, _)) = current(&entries)? else {
            return Ok(None);
        };
        entries.seek_to_last();
        Ok(current(&entries)?.map(|(last, _)| (first, last)))
    }

    fn last(&self, shard: ShardId) -> io::Result<Option<(u64, Bytes)>> {
        self.poison.check()?;
        let mut entries = self.entries(shard, 0, end_of(shard));
        entries.seek_to_last();
        Ok(current(&entries)?.map(|(index, entry)| (index, Bytes::copy_from_slice(entry))))
    }

    fn mark(&self, shard: ShardId, mark: LogMark) -> io::Result<Option<Bytes>> {
        self.poison.check()?;
        let record = self
            .db
            .get_cf(self.family(LOG_MARKS), mark_key(shard, mark))
            .map_err(io_error)?;
        Ok(record.map(Bytes::from))
    }

    fn lost(&self, shard: ShardId) -> Option<Lost> {
        self.writer.lock().synced.lost(shard)
    }

    fn made_good(&self, shard: ShardId) -> io::Result<()> {
        self.writer.lock().synced.made_good(shard)
    }

    fn keep_note(&self) -> io::Result<()> {
        // A writer that waits for space has nothing to note.
        match self.writer.try_lock() {
            None => Ok(()),
            Some(writer) => {
                let note = writer.synced.handle()?;
                drop(writer);
                note.sync_data()
            }
        }
    }

    fn disk_bytes(&self) -> io::Result<u64> {
        self.poison.check()?;
        durable::size_bytes(&self.directory)
    }

    fn compact(&self) -> io::Result<()> {
        self.poison.check()?;
        let families = [self.family(LOG_ENTRIES), self.family(LOG_MARKS)];
        // The WALs go with the buffers: all of them, or the oldest keeps the others.
        let flushed = self.waiting.for_space("the log", &self.db, || {
            self.db.flush_cfs_opt(&families, &FlushOptions::default())
        });
        self.poison.watch(flushed)?;
        families.iter().for_each(|family| {
            self.db
                .compact_range_cf(*family, None::<&[u8]>, None::<&[u8]>)
        });
        Ok(())
    }
}

/// Where the iterator stands, unless it ended; an iterator that failed has ended too.
fn current<'a>(entries: &'a DBRawIterator<'_>) -> io::Result<Option<(u64, &'a [u8])>> {
    let Some((key, entry)) = entries.item() else {
        return entries.status().map(|()| None).map_err(io_error);
    };
    let index = key.last_chunk().filter(|_| key.len() == KEY_BYTES);
    let index = index.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "a key of the log has a wrong length",
        )
    })?;
    Ok(Some((u64::from_be_bytes(*index), entry)))
}

fn key(shard: ShardId, kind: u8, number: u64) -> Vec<u8> {
    [&shard.to_be_bytes()[..], &[kind], &number.to_be_bytes()].concat()
}

fn mark_key(shard: ShardId, mark: LogMark) -> Vec<u8> {
    let number = match mark {
        LogMark::Vote => 0,
        LogMark::Committed => 1,
        LogMark::Purged => 2,
        LogMark::Cluster => 3,
    };
    key(shard, MARK, number)
}

/// The first key after that entry.
fn after(shard: ShardId, index: u64) -> Vec<u8> {
    index
        .checked_add(1)
        .map_or_else(|| end_of(shard), |next| key(shard, ENTRY, next))
}

/// The first key after all entries of the shard.
fn end_of(shard: ShardId) -> Vec<u8> {
    key(shard, ENTRY + 1, 0)
}
