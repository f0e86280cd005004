//! What a replica has of a key: from memory or, if memory cannot know, by one disk read off the
//! runtime's workers. Nothing here waits for anybody else: what must have been seen before is
//! `read.rs`'s.

use std::io;

use bytes::Bytes;
use holdfast_proto::{Key, Revision, peer::TombstoneRecord, timeline::Millis};

use super::Replica;
use crate::{
    error::ReadManyError,
    state::{Lookup, Scanned, Shown, View, record::DueKind},
    task,
};

/// What memory alone says of a key.
pub enum InMemory {
    Found(View),
    /// Nothing is stored under the key.
    Absent,
    /// Only the disk knows.
    Unknown,
}

/// All there is of a key.
pub struct Inspected {
    /// Without its value if that is on disk.
    pub view: Option<View>,
    pub in_memory: bool,
    pub tombstone: Option<TombstoneRecord>,
}

impl Replica {
    /// The entry with its value. Counts as a use; what comes from disk is kept in memory.
    pub async fn read(&self, key: &Key) -> io::Result<Option<View>> {
        // Let go of before anything is awaited.
        let found = self.state.memory().get(key);
        match found {
            Lookup::Found(entry) => Ok(Some(View::settled(entry))),
            Lookup::Absent => Ok(None),
            Lookup::Unknown(_) => {
                let (state, key) = (self.state.clone(), key.clone());
                let read = disk(move || state.get(&key)).await?;
                Ok(read.map(View::settled))
            }
        }
    }

    /// As `read`, with one trip to the disk for all keys that memory does not know, which ends once
    /// the values read there hold more than `bytes_max`. In the order of `keys`.
    pub async fn read_many(
        &self,
        keys: &[Key],
        bytes_max: usize,
    ) -> Vec<Result<Option<View>, ReadManyError>> {
        let mut unknown = Vec::new();
        let mut found: Vec<Result<Option<View>, ReadManyError>> = keys
            .iter()
            .enumerate()
            .map(|(place, key)| match self.state.memory().get(key) {
                Lookup::Found(entry) => Ok(Some(View::settled(entry))),
                Lookup::Absent => Ok(None),
                Lookup::Unknown(_) => {
                    unknown.push((place, key.clone()));
                    Ok(None)
                }
            })
            .collect();
        if unknown.is_empty() {
            return found;
        }
        let places: Vec<usize> = unknown.iter().map(|&(place, _)| place).collect();
        let state = self.state.clone();
        let read = disk(move || {
            let mut bytes = 0;
            let read = unknown.iter().map(|(_, key)| {
                if bytes > bytes_max {
                    return Err(ReadManyError::OverBound);
                }
                let entry = state.get(key)?;
                let value = entry.as_ref().and_then(|entry| entry.value.as_ref());
                bytes += value.map_or(0, Bytes::len);
                Ok(entry.map(View::settled))
            });
            Ok(read.collect::<Vec<_>>())
        });
        match read.await {
            Ok(read) => places
                .into_iter()
                .zip(read)
                .for_each(|(place, view)| found[place] = view),
            Err(error) => places.into_iter().for_each(|place| {
                found[place] = Err(io::Error::new(error.kind(), error.to_string()).into())
            }),
        }
        found
    }

    /// The entry without side effects: no use counted, nothing brought into memory. Without its
    /// value if that is on disk.
    pub async fn peek(&self, key: &Key) -> io::Result<Option<View>> {
        match self.in_memory(key) {
            InMemory::Found(view) => Ok(Some(view)),
            InMemory::Absent => Ok(None),
            InMemory::Unknown => {
                let (state, key) = (self.state.clone(), key.clone());
                let read = disk(move || state.record(&key)).await?;
                Ok(read.map(View::settled))
            }
        }
    }

    /// As `peek`, as far as memory knows.
    pub fn in_memory(&self, key: &Key) -> InMemory {
        match self.state.memory().peek(key) {
            Lookup::Found(entry) => InMemory::Found(View::settled(entry)),
            Lookup::Absent => InMemory::Absent,
            Lookup::Unknown(_) => InMemory::Unknown,
        }
    }

    /// Whether the key changed in any way after a revision, as far as this replica has applied. If
    /// that cannot be read, it did.
    pub async fn changed_since(&self, key: &Key, revision: Revision) -> bool {
        if self.applied().revision <= revision {
            return false;
        }
        if let InMemory::Found(view) = self.in_memory(key) {
            // An entry is newer than any tombstone of its key.
            return view.changed() > revision;
        }
        let (state, key) = (self.state.clone(), key.clone());
        let changed = disk(move || {
            let entry = state.record(&key)?.map_or(0, |entry| entry.record.changed);
            let tombstone = state
                .tombstone(&key)?
                .map_or(0, |tombstone| tombstone.revision);
            Ok(entry.max(tombstone))
        });
        !changed.await.is_ok_and(|changed| changed <= revision)
    }

    /// Everything known of a key, as `peek`.
    pub async fn inspect(&self, key: &Key) -> io::Result<Inspected> {
        let in_memory = matches!(self.in_memory(key), InMemory::Found(_));
        let view = self.peek(key).await?;
        let (state, key) = (self.state.clone(), key.clone());
        Ok(Inspected {
            view,
            in_memory,
            tombstone: disk(move || state.tombstone(&key)).await?,
        })
    }

    /// Entries under `prefix` from `from` on, those of `limit` rows, in key order. No use counted.
    pub async fn scan(
        &self,
        prefix: Bytes,
        from: Bytes,
        limit: usize,
        shown: Shown,
    ) -> io::Result<Scanned> {
        let state = self.state.clone();
        disk(move || state.scan(&prefix, &from, limit, shown)).await
    }

    /// Keys whose refresh point is in `[from, until]`, oldest first.
    pub async fn due_for_refresh(
        &self,
        from: Millis,
        until: Millis,
        limit: usize,
    ) -> io::Result<Vec<(Millis, Key)>> {
        let state = self.state.clone();
        disk(move || state.due(DueKind::Refresh, from, until, limit)).await
    }
}

async fn disk<T: Send + 'static>(
    read: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    task::blocking(read).await.map_err(io::Error::other)?
}
