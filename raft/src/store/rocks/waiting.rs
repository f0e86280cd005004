//! What a full disk does to a write: it waits. RocksDB takes no more writes once it found no space,
//! looks for space every few seconds, and goes on by itself when there is some: it writes all that
//! it had in memory into new files, so that nothing rests on a file that a write failed on. Until
//! then a write is tried again and again, and nobody hears that it is done. Any other failure is
//! passed on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rocksdb::{DB, WriteBatch, WriteOptions};

use super::io_error;

const TRY_EVERY: Duration = Duration::from_millis(100);

/// Shared by all databases of a node.
#[derive(Clone, Default)]
pub(super) struct Waiting {
    stopped: Arc<AtomicBool>,
}

impl Waiting {
    /// From here on a write that finds no space fails: the node stops.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    pub(super) fn resume(&self) {
        self.stopped.store(false, Ordering::Relaxed);
    }

    /// Runs the write, or flush, until it finds space. Between two tries it asks only whether the
    /// database takes writes again: RocksDB goes on once no flush is under way, so that flushes
    /// tried again and again would keep it from that.
    pub(super) fn for_space<T>(
        &self,
        whose: &str,
        database: &DB,
        mut write: impl FnMut() -> Result<T, rocksdb::Error>,
    ) -> io::Result<T> {
        let mut waited = false;
        loop {
            match write() {
                Err(error) if is_no_space(&error) && !self.stopped.load(Ordering::Relaxed) => {
                    if !waited {
                        tracing::error!(%error, "the disk is full: {whose} waits for space");
                    }
                    waited = true;
                    self.until_writable(database);
                }
                result => {
                    if waited && result.is_ok() {
                        tracing::info!("there is space again: {whose} goes on");
                    }
                    return result.map_err(io_error);
                }
            }
        }
    }

    fn until_writable(&self, database: &DB) {
        loop {
            std::thread::sleep(TRY_EVERY);
            let full = write_nothing(database).is_err_and(|error| is_no_space(&error));
            if !full || self.stopped.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

fn write_nothing(database: &DB) -> Result<(), rocksdb::Error> {
    let mut options = WriteOptions::default();
    options.disable_wal(true);
    database.write_opt(WriteBatch::default(), &options)
}

/// RocksDB says it in words only: the binding does not pass its sub-codes on.
pub(super) fn is_no_space(error: &rocksdb::Error) -> bool {
    error.kind() == rocksdb::ErrorKind::IOError
        && error.as_ref().contains("No space left on device")
}
