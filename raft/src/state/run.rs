//! One run of committed entries on its way into the state: it reads its own writes, and ends as one
//! batch for the store and one list of changes for the memory tier. Effects and `last_applied` are
//! in the same batch.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;
use holdfast_proto::{
    Key, Revision,
    peer::{
        AppliedRecord, Done, EntryRecord, LogId, Membership, Outcome, Rejected, RosterRecord,
        TombstoneRecord, Unchanged, outcome,
    },
    timeline::{Millis, Phase, Timeline},
};

use super::{
    clients::Clients,
    effects::Effects,
    error::ApplyError,
    hash::{self, Sum},
    memory::{Entry, Lookup, Memory},
    record::{self, DueKind, FORMAT},
};
use crate::store::{Family, StateBatch, StateStore};

/// One run of committed entries on its way into the state.
pub(crate) struct Run<'a> {
    pub(super) store: &'a dyn StateStore,
    memory: &'a Memory,
    pub(super) clients: &'a mut Clients,
    pub(super) applied: AppliedRecord,
    pub(super) effects: Effects,
    entries: HashMap<Key, Option<Arc<Entry>>>,
    tombstones: HashMap<Key, Option<TombstoneRecord>>,
    /// Of the runs before this one; `None` before the first membership.
    roster_before: Option<Arc<RosterRecord>>,
    pub(super) roster: Option<RosterRecord>,
    pub(super) commands: usize,
}

/// Each key that a run changed, with what it has at the end.
pub(crate) type Changed = HashMap<Key, Option<Arc<Entry>>>;

/// What a run came to.
pub(crate) struct Finished {
    pub batch: StateBatch,
    pub changes: Changed,
    pub applied: AppliedRecord,
    /// If it changed.
    pub roster: Option<RosterRecord>,
}

impl<'a> Run<'a> {
    pub(crate) fn new(
        store: &'a dyn StateStore,
        memory: &'a Memory,
        clients: &'a mut Clients,
        applied: AppliedRecord,
        roster_before: Option<Arc<RosterRecord>>,
    ) -> Self {
        Self {
            store,
            memory,
            clients,
            effects: Effects::new(Sum(applied.hash_sum)),
            applied,
            entries: HashMap::new(),
            tombstones: HashMap::new(),
            roster_before,
            roster: None,
            commands: 0,
        }
    }

    /// A log entry without commands: a blank one, or a membership (kept by the caller in the
    /// applied record).
    pub(crate) fn apply_empty(&mut self, log_id: LogId) {
        self.applied.last_applied = Some(log_id);
    }

    pub(crate) fn apply_membership(&mut self, log_id: LogId, membership: &Membership) {
        self.applied.membership_log_id = Some(log_id);
        self.applied.membership = Some(membership.clone());
        // Those that founded the cluster, until one comes or goes.
        if self.roster_before.is_none() && self.roster.is_none() {
            self.roster = Some(super::founding_roster(&self.applied));
        }
        self.apply_empty(log_id);
    }

    /// Commands so far: what a run is cut by.
    pub(crate) fn commands(&self) -> usize {
        self.commands
    }

    pub(crate) fn has_applied(&self, log_id: LogId) -> bool {
        self.applied
            .last_applied
            .is_some_and(|last| last.index >= log_id.index)
    }

    /// What the state comes to here: equal on all replicas at the same index.
    pub(crate) fn hash(&self) -> u64 {
        self.effects.sum.at(&self.applied, &self.roster())
    }

    pub(crate) fn finish(mut self) -> Finished {
        self.clients.finish(&mut self.effects);
        if let Some(roster) = &self.roster {
            self.effects.put(
                Family::System,
                Bytes::from_static(record::ROSTER),
                record::encode(roster),
            );
        }
        self.applied.hash_sum = self.effects.sum.0;
        self.applied.hash_version = hash::VERSION;
        self.effects.put(
            Family::System,
            Bytes::from_static(record::APPLIED),
            record::encode(&self.applied),
        );
        Finished {
            batch: self.effects.batch,
            changes: self.entries,
            applied: self.applied,
            roster: self.roster,
        }
    }
}

// ---- reading what is there, this run's own writes included ----

impl Run<'_> {
    pub(super) fn entry(&self, key: &Key) -> Result<Option<Arc<Entry>>, ApplyError> {
        if let Some(own) = self.entries.get(key) {
            return Ok(own.clone());
        }
        match self.memory.peek(key) {
            Lookup::Found(entry) => Ok(Some(entry)),
            Lookup::Absent => Ok(None),
            // What an operation goes by is in the record: the value stays on disk.
            Lookup::Unknown(_) => Ok(super::read::read_record(self.store, key)?
                .map(|record| Arc::new(Entry::without_value(record)))),
        }
    }

    pub(super) fn tombstone(&self, key: &Key) -> Result<Option<TombstoneRecord>, ApplyError> {
        if let Some(own) = self.tombstones.get(key) {
            return Ok(*own);
        }
        let bytes = self.store.get(Family::Tombstone, key)?;
        Ok(bytes
            .map(|bytes| record::decode("tombstone", &bytes))
            .transpose()?)
    }

    /// Who has which id.
    pub(super) fn roster(&self) -> RosterRecord {
        let before = || self.roster_before.as_deref().cloned();
        self.roster.clone().or_else(before).unwrap_or_default()
    }

    /// The record, if there is a value and it would still be served.
    pub(super) fn live<'e>(&self, entry: Option<&'e Entry>) -> Option<&'e EntryRecord> {
        entry.map(|entry| &entry.record).filter(|record| {
            !record.is_negative
                && Timeline::from(*record).phase(self.applied.log_time_ms) != Phase::Expired
        })
    }
}

// ---- writing ----

impl Run<'_> {
    /// Gives a new value its revision.
    pub(super) fn stamped(&mut self, record: EntryRecord) -> EntryRecord {
        self.applied.revision += 1;
        let revision: Revision = self.applied.revision;
        EntryRecord {
            version: revision,
            changed: revision,
            changed_at_ms: self.applied.log_time_ms,
            ..record
        }
    }

    /// `value` is `None` if only the record changes.
    pub(super) fn put_entry(
        &mut self,
        key: &Key,
        old: Option<&Entry>,
        record: EntryRecord,
        value: Option<&Bytes>,
    ) {
        if let Some(old) = old {
            self.remove_due_rows(key, &old.record);
            self.effects.sum.toggle(hash::entry(key, &old.record));
        }
        self.effects.sum.toggle(hash::entry(key, &record));
        for row in record::due_rows(key, &record) {
            self.effects
                .put(Family::Due, row, Bytes::from_static(&[FORMAT]));
        }
        self.effects.put(
            Family::Entry,
            key.as_bytes().clone(),
            record::encode(&record),
        );
        let entry = match (value, old) {
            (Some(value), _) => {
                self.effects.put(
                    Family::Value,
                    key.as_bytes().clone(),
                    record::encode_value(value),
                );
                Entry::new(record, value.as_ref())
            }
            (None, Some(old)) => old.with_record(record),
            (None, None) => return,
        };
        self.entries.insert(key.clone(), Some(Arc::new(entry)));
    }

    pub(super) fn remove_entry(&mut self, key: &Key, old: &EntryRecord) {
        self.remove_due_rows(key, old);
        self.effects.sum.toggle(hash::entry(key, old));
        self.effects.delete(Family::Entry, key.as_bytes().clone());
        self.effects.delete(Family::Value, key.as_bytes().clone());
        self.entries.insert(key.clone(), None);
    }

    pub(super) fn remove_due_rows(&mut self, key: &Key, old: &EntryRecord) {
        for row in record::due_rows(key, old) {
            self.effects.delete(Family::Due, row);
        }
    }

    /// Never lowers what an earlier tombstone fences.
    pub(super) fn put_tombstone(
        &mut self,
        key: &Key,
        revision: Revision,
        expires_at_ms: Millis,
    ) -> Result<(), ApplyError> {
        let old = self.tombstone(key)?;
        let revision = revision.max(old.map_or(0, |old| old.revision));
        let expires_at_ms = expires_at_ms.max(old.map_or(0, |old| old.expires_at_ms));
        if let Some(old) = old {
            self.remove_tombstone(key, &old);
        }
        let tombstone = TombstoneRecord {
            revision,
            expires_at_ms,
        };
        self.effects.sum.toggle(hash::tombstone(key, &tombstone));
        self.effects.put(
            Family::Tombstone,
            key.as_bytes().clone(),
            record::encode(&tombstone),
        );
        self.effects.put(
            Family::Due,
            record::due_key(DueKind::Tombstone, expires_at_ms, key),
            Bytes::from_static(&[FORMAT]),
        );
        self.tombstones.insert(key.clone(), Some(tombstone));
        Ok(())
    }

    pub(super) fn remove_tombstone(&mut self, key: &Key, tombstone: &TombstoneRecord) {
        self.effects.sum.toggle(hash::tombstone(key, tombstone));
        self.effects
            .delete(Family::Tombstone, key.as_bytes().clone());
        self.effects.delete(
            Family::Due,
            record::due_key(DueKind::Tombstone, tombstone.expires_at_ms, key),
        );
        self.tombstones.insert(key.clone(), None);
    }

    pub(super) fn done(&self, existed: bool) -> Outcome {
        outcome::Result::Done(Done {
            revision: self.applied.revision,
            existed,
        })
        .into()
    }

    pub(super) fn unchanged(&self) -> Outcome {
        outcome::Result::Unchanged(Unchanged {
            revision: self.applied.revision,
        })
        .into()
    }
}

pub(super) fn rejected(reason: &str, message: &str) -> Outcome {
    outcome::Result::Rejected(Rejected {
        reason: reason.into(),
        message: message.into(),
    })
    .into()
}
