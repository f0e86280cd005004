//! What a state is asked: one key from memory or by one read of the store, ranges of keys, and the
//! due index. Blocking where it goes to the store: on a blocking thread only.

use std::{io, ops::Deref, sync::Arc};

use arc_swap::Guard;
use bytes::Bytes;
use holdfast_proto::{
    Key, content_hash,
    peer::{EntryRecord, TombstoneRecord},
    timeline::Millis,
};

use super::{
    Generation, State,
    memory::{Entry, Lookup, Memory},
    record::{self, BadRecord, DueKind},
    view::View,
};
use crate::store::{Family, StateStore};

/// What a scan shows of each entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    Records,
    Values,
}

/// A part of the entries, in key order.
#[derive(Default)]
pub struct Scanned {
    pub entries: Vec<(Key, View)>,
    /// Where the next part begins; `None` at the end.
    pub next: Option<Bytes>,
}

/// The memory of the generation that is served now; a snapshot that is installed brings another.
pub(crate) struct CurrentMemory(Guard<Arc<Generation>>);

impl Deref for CurrentMemory {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        &self.0.memory
    }
}

impl State {
    /// What is in memory now, for a look-up that touches neither the disk nor a lock.
    pub(crate) fn memory(&self) -> CurrentMemory {
        CurrentMemory(self.generation.load())
    }

    /// From memory or disk; what came from disk is kept in memory if nothing overtook it.
    pub(crate) fn get(&self, key: &Key) -> io::Result<Option<Arc<Entry>>> {
        let generation = self.generation.load_full();
        match generation.memory.get(key) {
            Lookup::Found(entry) => Ok(Some(entry)),
            Lookup::Absent => Ok(None),
            Lookup::Unknown(ticket) => {
                let entry = read_entry(generation.store.as_ref(), key)?.map(Arc::new);
                if let Some(entry) = &entry {
                    generation.memory.fill(key, ticket, entry.clone());
                }
                Ok(entry)
            }
        }
    }

    /// From memory or disk, where the value stays, and memory as it is.
    pub(crate) fn record(&self, key: &Key) -> io::Result<Option<Arc<Entry>>> {
        let generation = self.generation.load_full();
        match generation.memory.peek(key) {
            Lookup::Found(entry) => Ok(Some(entry)),
            Lookup::Absent => Ok(None),
            Lookup::Unknown(_) => Ok(read_record(generation.store.as_ref(), key)?
                .map(|record| Arc::new(Entry::without_value(record)))),
        }
    }

    pub(crate) fn tombstone(&self, key: &Key) -> io::Result<Option<TombstoneRecord>> {
        let bytes = self.generation().store.get(Family::Tombstone, key)?;
        Ok(bytes
            .map(|bytes| record::decode("tombstone", &bytes))
            .transpose()?)
    }

    /// Stored entries under `prefix`, from `from` on, in key order: those of `limit` rows.
    pub(crate) fn scan(
        &self,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
        shown: Shown,
    ) -> io::Result<Scanned> {
        let generation = self.generation();
        let mut rows = Vec::new();
        let mut next = None;
        for (n, row) in generation
            .store
            .scan(Family::Entry, from.max(prefix), None)
            .take(limit)
            .enumerate()
        {
            let (key, record) = row?;
            if !key.starts_with(prefix) {
                break;
            }
            if n + 1 == limit {
                next = Some(after(&key));
            }
            if let Ok(key) = Key::new(key) {
                rows.push((key, record));
            }
        }
        let entries = match shown {
            Shown::Records => records(rows)?,
            Shown::Values => generation.values(rows)?,
        };
        Ok(Scanned { entries, next })
    }

    /// Rows of the due index of one kind in `[from, until]`, oldest first.
    pub(crate) fn due(
        &self,
        kind: DueKind,
        from: Millis,
        until: Millis,
        limit: usize,
    ) -> io::Result<Vec<(Millis, Key)>> {
        let generation = self.generation();
        let (start, end) = (
            record::due_key(kind, from, b""),
            record::due_key(kind, until.saturating_add(1), b""),
        );
        let mut due = Vec::new();
        for row in generation
            .store
            .scan(Family::Due, &start, Some(&end))
            .take(limit)
        {
            let (row, _) = row?;
            if let Some((at, key)) = record::parse_due_key(&row)
                && let Ok(key) = Key::new(key)
            {
                due.push((at, key));
            }
        }
        Ok(due)
    }
}

impl Generation {
    /// The entries of scanned rows with their values: from memory, else all others by one read.
    fn values(&self, rows: Vec<(Key, Bytes)>) -> io::Result<Vec<(Key, View)>> {
        let in_memory: Vec<Option<Arc<Entry>>> = rows
            .iter()
            .map(|(key, _)| match self.memory.peek(key) {
                Lookup::Found(entry) => Some(entry),
                Lookup::Absent | Lookup::Unknown(_) => None,
            })
            .collect();
        let stored: Vec<&[u8]> = rows
            .iter()
            .zip(&in_memory)
            .filter(|(_, found)| found.is_none())
            .map(|((key, _), _)| &**key)
            .collect();
        let mut stored = self.store.get_many(Family::Value, &stored)?.into_iter();
        let mut entries = Vec::with_capacity(rows.len());
        for ((key, row), found) in rows.into_iter().zip(in_memory) {
            let entry = match found {
                Some(entry) => Some(entry),
                None => {
                    let value = stored.next().flatten();
                    let entry = match joined(&row, value)? {
                        Some(entry) => Some(entry),
                        // The row shows the moment the scan began: the entry changed or went since.
                        None => read_entry(self.store.as_ref(), &key)?,
                    };
                    entry.map(Arc::new)
                }
            };
            entries.extend(entry.map(|entry| (key, View::settled(entry))));
        }
        Ok(entries)
    }
}

fn records(rows: Vec<(Key, Bytes)>) -> io::Result<Vec<(Key, View)>> {
    let settled = |(key, row): (Key, Bytes)| {
        let record: EntryRecord = record::decode("entry", &row)?;
        Ok((key, View::from(record)))
    };
    rows.into_iter().map(settled).collect()
}

/// An entry of its two records, if they belong together.
fn joined(record: &Bytes, value: Option<Bytes>) -> io::Result<Option<Entry>> {
    let Some(value) = value else { return Ok(None) };
    let record: EntryRecord = record::decode("entry", record)?;
    let value = record::decode_value(&value)?;
    Ok((content_hash(&value) == record.content_hash).then(|| Entry::new(record, value.as_ref())))
}

pub(crate) fn read_record(store: &dyn StateStore, key: &[u8]) -> io::Result<Option<EntryRecord>> {
    let record = store.get(Family::Entry, key)?;
    Ok(record
        .map(|bytes| record::decode("entry", &bytes))
        .transpose()?)
}

/// Both records of a key. They are read one after the other: a value that does not have the entry's
/// hash was written between the two reads, or is damaged.
pub(crate) fn read_entry(store: &dyn StateStore, key: &[u8]) -> io::Result<Option<Entry>> {
    const TRIES: usize = 16;
    for _ in 0..TRIES {
        let Some(record) = store.get(Family::Entry, key)? else {
            return Ok(None);
        };
        if let Some(entry) = joined(&record, store.get(Family::Value, key)?)? {
            return Ok(Some(entry));
        }
    }
    Err(BadRecord::Damaged {
        what: "value",
        reason: "its hash is not its entry's".into(),
    }
    .into())
}

/// The least key that is greater.
pub(super) fn after(key: &[u8]) -> Bytes {
    Bytes::from([key, &[0]].concat())
}
