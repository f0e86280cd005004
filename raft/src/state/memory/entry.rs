//! An entry as readers see it.

use bytes::Bytes;
use holdfast_proto::peer::{EntryRecord, Validators};

/// What one entry costs beside the bytes of its key, value, content type and tags: the map's slot
/// and its share of the table, the entry itself, its place in the queues and in the ghost, and what
/// the allocator adds. `examples/memory` measures 485 on Linux with glibc; the rest is for tables
/// that have just doubled and for the ghost.
pub(crate) const ENTRY_OVERHEAD_BYTES: u64 = 640;

/// Shared, never changed in place.
#[allow(
    clippy::manual_non_exhaustive,
    reason = "the attribute says nothing inside the crate, where entries are made"
)]
pub(crate) struct Entry {
    pub record: EntryRecord,
    /// `None` if only the record was read; memory holds no such entry.
    pub value: Option<Bytes>,
    /// Entries are made by `new`, so that no value is a slice that keeps a whole message alive.
    _owns_its_value: (),
}

impl Entry {
    /// Copies a slice; takes a `Vec<u8>` over without copying if it has no spare capacity.
    pub(crate) fn new(record: EntryRecord, value: impl Into<Box<[u8]>>) -> Self {
        Self {
            record,
            value: Some(Bytes::from(value.into())),
            _owns_its_value: (),
        }
    }

    /// What the store's record alone says.
    pub(crate) fn without_value(record: EntryRecord) -> Self {
        Self {
            record,
            value: None,
            _owns_its_value: (),
        }
    }

    /// The same value with new times: a Revalidate, an Invalidate, a failure.
    pub(crate) fn with_record(&self, record: EntryRecord) -> Self {
        Self {
            record,
            value: self.value.clone(),
            _owns_its_value: (),
        }
    }

    /// What it counts for in memory under this key.
    pub(super) fn cost(&self, key: &[u8]) -> u64 {
        let tags: usize = self
            .record
            .tags
            .iter()
            .map(|tag| tag.len() + size_of::<String>())
            .sum();
        let validators = self.record.validators.as_ref().map_or(0, |validators| {
            size_of::<Validators>() + validators.etag.len() + validators.last_modified.len()
        });
        let value = self.value.as_ref().map_or(0, Bytes::len);
        let texts = self.record.content_type.len() + tags + validators;
        (key.len() + value + texts) as u64 + ENTRY_OVERHEAD_BYTES
    }
}
