//! Every setting of RocksDB, each with its reason. What is not named here is RocksDB's default,
//! checksums on read among them.

use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DBCompressionType, DBRecoveryMode, LogLevel,
    Options, WriteBufferManager,
};

use super::waiting::Waiting;
use crate::store::Family;
use crate::store::budget::Budget;

pub(super) const LOG_ENTRIES: &str = "entries";
pub(super) const LOG_MARKS: &str = "marks";

const MIB: usize = 1 << 20;

/// Of a file system, one part of this is what one part of a write buffer may be: what is in the
/// buffers must fit into what is kept free for it (`space.rs`).
const BUFFER_SHARE: u64 = 1024;
const BUFFER_PARTS: usize = 16;

/// What all databases of a node share, so that memory is bounded however many shards there are.
pub(super) struct Shared {
    cache: Cache,
    write_buffers: WriteBufferManager,
    pub(super) waiting: Waiting,
    /// A sixteenth of a full write buffer: a MiB on all but small disks.
    part: usize,
}

impl Shared {
    pub(super) fn new(budget: Budget, disk_bytes: u64) -> Self {
        let part = usize::try_from(disk_bytes / BUFFER_SHARE).unwrap_or(usize::MAX) / BUFFER_PARTS;
        let part = part.clamp(MIB / BUFFER_PARTS, MIB);
        Self {
            waiting: Waiting::default(),
            part,
            cache: Cache::new_lru_cache(budget.block_cache_bytes),
            // Over its bound a database flushes; it never stalls writers, because the sync thread
            // is one of them.
            write_buffers: WriteBufferManager::new_write_buffer_manager(
                budget.write_buffer_bytes.min(256 * part),
                false,
            ),
        }
    }

    pub(super) fn log(&self) -> Options {
        let mut options = self.database(Options::default());
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        // A crash tears the end of the last WAL and no other place: damage elsewhere must stop the
        // node, not shorten the log. What is in the last 32 KiB this mode takes for torn, whatever
        // it is: that is told before it opens (`wal.rs`).
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
        // WALs that were closed are all there, at their length.
        options.set_track_and_verify_wals_in_manifest(true);
        // A recycled WAL ends in old records, which that mode takes for damage or, worse, for its
        // own.
        options.set_recycle_log_file_num(0);
        // Marks change often and fill no buffer: without a bound they would keep every WAL.
        options.set_max_total_wal_size(128 * self.part as u64);
        options.set_max_open_files(256);
        options
    }

    pub(super) fn log_families(&self) -> Vec<ColumnFamilyDescriptor> {
        let mut entries = self.family(Filter::None);
        entries.set_compression_type(DBCompressionType::None);
        // Most entries are purged before their buffer is full and so are never written a second
        // time.
        entries.set_write_buffer_size(64 * self.part);
        entries.set_max_write_buffer_number(4);
        let mut marks = self.family(Filter::None);
        marks.set_write_buffer_size(self.part);
        vec![
            ColumnFamilyDescriptor::new(
                rocksdb::DEFAULT_COLUMN_FAMILY_NAME,
                self.family(Filter::None),
            ),
            ColumnFamilyDescriptor::new(LOG_ENTRIES, entries),
            ColumnFamilyDescriptor::new(LOG_MARKS, marks),
        ]
    }

    pub(super) fn state(&self, create: bool) -> Result<Options, rocksdb::Error> {
        // Closing would write what was not flushed, so that a restart came back to another point
        // than a crash does. A restart is the last flush and a replay, always the same path. The
        // binding has no setter for it.
        let options =
            Options::default().get_options_from_string("avoid_flush_during_shutdown=true")?;
        let mut options = self.database(options);
        options.create_if_missing(create);
        options.create_missing_column_families(create);
        // `applied` and its effects are in different families and must be durable together.
        options.set_atomic_flush(true);
        options.set_max_open_files(512);
        Ok(options)
    }

    pub(super) fn state_families(&self) -> Vec<ColumnFamilyDescriptor> {
        let unused = ColumnFamilyDescriptor::new(
            rocksdb::DEFAULT_COLUMN_FAMILY_NAME,
            self.family(Filter::None),
        );
        Family::ALL
            .iter()
            .map(|family| ColumnFamilyDescriptor::new(family.name(), self.state_family(*family)))
            .chain([unused])
            .collect()
    }

    fn state_family(&self, family: Family) -> Options {
        // Looked up by whole keys that are often absent; the others are scanned, or are few.
        let filter = match family {
            Family::Entry | Family::Value | Family::Tombstone | Family::Client => Filter::Bloom,
            Family::Due | Family::Barrier | Family::Lease | Family::System => Filter::None,
        };
        let mut options = self.family(filter);
        options.set_compression_type(DBCompressionType::Lz4);
        options.set_write_buffer_size(if family == Family::Value {
            32 * self.part
        } else {
            16 * self.part
        });
        options
    }

    fn database(&self, mut options: Options) -> Options {
        options.set_paranoid_checks(true);
        options.set_write_buffer_manager(&self.write_buffers);
        options.set_max_background_jobs(2);
        // RocksDB's own LOG: kept small, without its periodic statistics.
        options.set_log_level(LogLevel::Warn);
        options.set_keep_log_file_num(2);
        options.set_max_log_file_size(MIB);
        options.set_stats_dump_period_sec(0);
        options.set_stats_persist_period_sec(0);
        options
    }

    fn family(&self, filter: Filter) -> Options {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.cache);
        // Indexes and filters grow with the data: in the cache they are part of the budget.
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);
        if let Filter::Bloom = filter {
            table.set_bloom_filter(10.0, false);
        }
        let mut options = Options::default();
        options.set_block_based_table_factory(&table);
        // Of unused families too: RocksDB goes on after a full disk once there is room for the
        // largest buffer of all.
        options.set_write_buffer_size(self.part);
        options
    }
}

#[derive(Clone, Copy)]
enum Filter {
    None,
    Bloom,
}
