//! What commands mean: a pure function of state, command and the stamp of its log entry. Knows no
//! clock, no randomness and no I/O but its batch, so that every replica comes to the same state,
//! whatever the sizes of its runs.
//!
//! A [`Run`] applies committed log entries one after another, reads its own writes, and ends as one
//! batch for the store and one list of changes for the memory tier. Effects and `last_applied` are
//! in the same batch.

use std::{collections::HashMap, io, sync::Arc};

use bytes::Bytes;
use holdfast_proto::{
    Key, Revision, content_hash,
    limits::TOMBSTONE_KEPT,
    peer::{
        Admitted, AppliedRecord, Command, CommitFetch, Conflict, Done, EntryRecord, FailureRecord,
        Fenced, FetchFailed, Fetched, LogEntry, LogId, Member, Membership, Outcome, Rejected,
        RemovedMember, RosterRecord, Set, Sweep, SweepKey, TombstoneRecord, Unchanged, command::Op,
        commit_fetch, outcome,
    },
    reason,
    timeline::{Millis, Phase, Timeline, after},
    v1::Origin,
};
use prost::Message as _;

use super::{
    clients::{Clients, Recall},
    effects::Effects,
    hash::{self, Sum},
    memory::{Entry, Lookup, Memory},
    record::{self, DueKind, FORMAT},
};
use crate::store::{Family, StateBatch, StateStore};

/// The newest feature level this version speaks.
pub(crate) const FEATURE_LEVEL: u32 = 1;
/// Removed members that the roster remembers by their incarnation.
const REMOVED_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub(crate) enum ApplyError {
    #[error(
        "log entry {index} has format {format}, this version reads up to {FORMAT}: upgrade this node"
    )]
    UnknownFormat { index: u64, format: u32 },
    #[error("log entry {index} holds a command that this version does not know: upgrade this node")]
    UnknownCommand { index: u64 },
    #[error("log entry {index} is damaged: {reason}")]
    Damaged { index: u64, reason: String },
    #[error(
        "the cluster's feature level is {level}, this version speaks up to {FEATURE_LEVEL}: upgrade this node"
    )]
    FeatureLevel { level: u32 },
    #[error("reading the state: {0}")]
    Io(#[from] io::Error),
}

impl From<record::BadRecord> for ApplyError {
    fn from(bad: record::BadRecord) -> Self {
        Self::Io(bad.into())
    }
}

/// One run of committed entries on its way into the state.
pub(crate) struct Run<'a> {
    store: &'a dyn StateStore,
    memory: &'a Memory,
    clients: &'a mut Clients,
    applied: AppliedRecord,
    effects: Effects,
    entries: HashMap<Key, Option<Arc<Entry>>>,
    tombstones: HashMap<Key, Option<TombstoneRecord>>,
    /// Of the runs before this one; `None` before the first membership.
    roster_before: Option<Arc<RosterRecord>>,
    roster: Option<RosterRecord>,
    commands: usize,
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

    /// Applies one log entry, `encoded` as the leader wrote it, and tells what each of its commands
    /// came to.
    pub(crate) fn apply(
        &mut self,
        log_id: LogId,
        encoded: &Bytes,
    ) -> Result<Vec<Outcome>, ApplyError> {
        let index = log_id.index;
        let entry = LogEntry::decode(encoded.clone()).map_err(|error| ApplyError::Damaged {
            index,
            reason: error.to_string(),
        })?;
        if entry.format != u32::from(FORMAT) {
            return Err(ApplyError::UnknownFormat {
                index,
                format: entry.format,
            });
        }
        self.applied.log_time_ms = self.applied.log_time_ms.max(entry.stamp_ms);
        self.clients
            .forget_idle(self.applied.log_time_ms, &mut self.effects);

        let outcomes = entry
            .commands
            .iter()
            .map(|command| self.command(log_id, command))
            .collect::<Result<Vec<_>, _>>()?;
        self.commands += outcomes.len();
        self.applied.last_applied = Some(log_id);
        Ok(outcomes)
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

    /// One command. A retried request is answered with what it came to the first time.
    fn command(&mut self, log_id: LogId, command: &Command) -> Result<Outcome, ApplyError> {
        let op = command.op.as_ref().ok_or(ApplyError::UnknownCommand {
            index: log_id.index,
        })?;
        let Some(request) = &command.request_id else {
            return self.operation(log_id, op);
        };
        match self.clients.recall(
            self.store,
            request,
            self.applied.log_time_ms,
            &mut self.effects,
        )? {
            Recall::Done(outcome) => Ok(outcome),
            Recall::Forgotten => Ok(rejected(
                reason::INVALID_FIELD,
                "request_id: this request was already answered, and its outcome is forgotten",
            )),
            Recall::New => {
                let outcome = self.operation(log_id, op)?;
                self.clients.remember(request, &outcome, &mut self.effects);
                Ok(outcome)
            }
        }
    }

    fn operation(&mut self, log_id: LogId, op: &Op) -> Result<Outcome, ApplyError> {
        match op {
            Op::Set(set) => self.set(log_id, set),
            Op::Delete(delete) => self.delete(&key(log_id, &delete.key)?),
            Op::Invalidate(invalidate) => self.invalidate(&key(log_id, &invalidate.key)?),
            Op::CommitFetch(commit) => self.commit_fetch(log_id, commit),
            Op::Sweep(sweep) => self.sweep(log_id, sweep),
            Op::Tick(_) => Ok(self.unchanged()),
            Op::AdmitMember(admit) => self.admit_member(log_id, admit.member.as_ref()),
            Op::PromoteMember(promote) => self.promote_member(promote.id),
            Op::ForgetMember(forget) => self.forget_member(forget.id),
            Op::RaiseFeatureLevel(raise) => self.raise_feature_level(raise.level),
            Op::SetPace(pace) => {
                self.applied.pace = Some(*pace);
                Ok(self.unchanged())
            }
        }
    }

    fn set(&mut self, log_id: LogId, set: &Set) -> Result<Outcome, ApplyError> {
        let key = key(log_id, &set.key)?;
        let old = self.entry(&key)?;
        let live_version = self.live(old.as_deref()).map_or(0, |record| record.version);
        let lost = set.if_version.is_some_and(|wanted| wanted != live_version)
            || (set.if_absent && live_version != 0);
        if lost {
            return Ok(outcome::Result::Conflict(Conflict {
                version: live_version,
                revision: self.applied.revision,
            })
            .into());
        }

        let now = self.applied.log_time_ms;
        let lifetime = set.lifetime.unwrap_or_default();
        let mut timeline = Timeline::from_lifetime(now, 0, &lifetime);
        if let Some(expires_at) = set.expires_at_ms {
            timeline.fresh_until = expires_at;
        }
        let value = &set.value;
        let record = self.stamped(EntryRecord {
            origin: set.origin,
            size_bytes: value.len() as u64,
            content_hash: content_hash(value),
            content_type: set.content_type.clone(),
            tags: set.tags.clone(),
            ..at(timeline)
        });
        self.put_entry(&key, old.as_deref(), record, Some(value));
        Ok(self.done(live_version != 0))
    }

    fn delete(&mut self, key: &Key) -> Result<Outcome, ApplyError> {
        let old = self.entry(key)?;
        let existed = self.live(old.as_deref()).is_some();
        self.applied.revision += 1;
        if let Some(old) = &old {
            self.remove_entry(key, &old.record);
        }
        self.put_tombstone(
            key,
            self.applied.revision,
            after(
                self.applied.log_time_ms,
                TOMBSTONE_KEPT.as_millis() as Millis,
            ),
        )?;
        Ok(self.done(existed))
    }

    fn invalidate(&mut self, key: &Key) -> Result<Outcome, ApplyError> {
        let Some(old) = self.entry(key)? else {
            self.applied.revision += 1;
            self.put_tombstone(
                key,
                self.applied.revision,
                after(
                    self.applied.log_time_ms,
                    TOMBSTONE_KEPT.as_millis() as Millis,
                ),
            )?;
            return Ok(self.done(false));
        };
        let existed = self.live(Some(&old)).is_some();
        let timeline = Timeline::from(&old.record).invalidated(self.applied.log_time_ms);
        self.applied.revision += 1;
        let record = EntryRecord {
            changed: self.applied.revision,
            changed_at_ms: self.applied.log_time_ms,
            refresh_at_ms: timeline.refresh_at,
            fresh_until_ms: timeline.fresh_until,
            ..old.record.clone()
        };
        self.put_entry(key, Some(&old), record, None);
        Ok(self.done(existed))
    }

    /// The end of a flight. Whatever happened to the key after the fetch began wins over it.
    fn commit_fetch(&mut self, log_id: LogId, commit: &CommitFetch) -> Result<Outcome, ApplyError> {
        let key = key(log_id, &commit.key)?;
        let old = self.entry(&key)?;
        let changed = old.as_ref().map_or(0, |old| old.record.changed);
        let deleted = self
            .tombstone(&key)?
            .map_or(0, |tombstone| tombstone.revision);
        if commit.term != log_id.term || changed.max(deleted) > commit.fetch_started_revision {
            return Ok(outcome::Result::Fenced(Fenced {
                revision: self.applied.revision,
            })
            .into());
        }
        match &commit.result {
            Some(commit_fetch::Result::Fetched(fetched)) => {
                Ok(self.store_fetched(&key, old.as_deref(), fetched))
            }
            Some(commit_fetch::Result::Failed(failed)) => {
                Ok(self.record_failure(&key, old.as_deref(), failed))
            }
            None => Err(ApplyError::UnknownCommand {
                index: log_id.index,
            }),
        }
    }

    fn store_fetched(&mut self, key: &Key, old: Option<&Entry>, fetched: &Fetched) -> Outcome {
        let existed = self.live(old).is_some();
        let timeline = Timeline::from_lifetime(
            self.applied.log_time_ms,
            fetched.took_ms,
            &fetched.lifetime.unwrap_or_default(),
        );
        let value = &fetched.value;
        let record = self.stamped(EntryRecord {
            origin: Origin::Fetched.into(),
            size_bytes: value.len() as u64,
            content_hash: content_hash(value),
            content_type: fetched.content_type.clone(),
            tags: fetched.tags.clone(),
            ..at(timeline)
        });
        self.put_entry(key, old, record, Some(value));
        self.done(existed)
    }

    /// Remembered so that a new leader goes on waiting where the old one was. The entry itself does
    /// not change.
    fn record_failure(&mut self, key: &Key, old: Option<&Entry>, failed: &FetchFailed) -> Outcome {
        let Some(old) = old else {
            return self.unchanged();
        };
        let now = self.applied.log_time_ms;
        let failure = FailureRecord {
            class: failed.class,
            status: failed.status,
            count: failed.count,
            at_ms: now,
            next_attempt_ms: after(now, failed.retry_after_ms),
        };
        let record = EntryRecord {
            failure: Some(failure),
            ..old.record.clone()
        };
        self.put_entry(key, Some(old), record, None);
        self.unchanged()
    }

    /// Removes what is past its last instant. What a slow fetch or lease may still have begun
    /// before goes on being fenced.
    fn sweep(&mut self, log_id: LogId, sweep: &Sweep) -> Result<Outcome, ApplyError> {
        let now = self.applied.log_time_ms;
        let mut removed = Vec::new();
        for SweepKey {
            key: bytes,
            changed,
        } in &sweep.keys
        {
            let key = key(log_id, bytes)?;
            if let Some(old) = self.entry(&key)?
                && old.record.changed == *changed
                && Timeline::from(&old.record).phase(now) == Phase::Expired
            {
                removed.push((key, old));
            }
        }
        for SweepKey {
            key: bytes,
            changed,
        } in &sweep.tombstones
        {
            let key = key(log_id, bytes)?;
            if let Some(tombstone) = self.tombstone(&key)?
                && tombstone.revision == *changed
                && now >= tombstone.expires_at_ms
            {
                self.remove_tombstone(&key, &tombstone);
            }
        }
        if removed.is_empty() {
            return Ok(self.unchanged());
        }
        self.applied.revision += 1;
        for (key, old) in removed {
            self.remove_entry(&key, &old.record);
            let fences_until = after(
                old.record.changed_at_ms,
                TOMBSTONE_KEPT.as_millis() as Millis,
            );
            if fences_until > now {
                self.put_tombstone(&key, old.record.changed, fences_until)?;
            }
        }
        Ok(self.done(true))
    }

    /// Ids come from a counter and are never used again. The same incarnation asking twice gets the
    /// same id.
    fn admit_member(
        &mut self,
        log_id: LogId,
        member: Option<&Member>,
    ) -> Result<Outcome, ApplyError> {
        let member = member.ok_or(ApplyError::UnknownCommand {
            index: log_id.index,
        })?;
        let mut roster = self.roster();
        roster.version += 1;
        let same = |known: &&mut Member| known.incarnation == member.incarnation;
        if let Some(known) = roster.members.iter_mut().find(same) {
            let id = known.id;
            *known = Member {
                id,
                ..member.clone()
            };
            self.roster = Some(roster);
            return Ok(outcome::Result::Admitted(Admitted { id }).into());
        }
        let was_removed = |gone: &RemovedMember| gone.incarnation == member.incarnation;
        if member.id != 0 || roster.removed.iter().any(was_removed) {
            let message = format!(
                "`{}` was removed: to let it join again as a new member, remove its data directory first",
                member.name
            );
            return Ok(rejected(reason::MEMBERSHIP, &message));
        }
        // Nothing of it survived its restart: who comes under its name takes its place.
        let is_replaced =
            |known: &&Member| known.name == member.name && known.volatile && member.volatile;
        if let Some(replaced) = roster.members.iter().find(is_replaced) {
            let id = replaced.id;
            forget(&mut roster, id);
        }
        let taken = |known: &&Member| {
            known.name == member.name || known.peer_address == member.peer_address
        };
        if let Some(known) = roster.members.iter().find(taken) {
            let message = format!(
                "a member `{}` at {} exists with another incarnation: run `holdfast member remove {}` if it is gone for good",
                known.name, known.peer_address, known.name
            );
            return Ok(rejected(reason::MEMBERSHIP, &message));
        }
        let id = roster.next_id;
        roster.next_id += 1;
        roster.members.push(Member {
            id,
            ..member.clone()
        });
        self.roster = Some(roster);
        Ok(outcome::Result::Admitted(Admitted { id }).into())
    }

    fn promote_member(&mut self, id: u64) -> Result<Outcome, ApplyError> {
        let mut roster = self.roster();
        if !roster.members.iter().any(|member| member.id == id) {
            return Ok(rejected(
                reason::NO_MEMBER,
                &format!("there is no member with id {id}"),
            ));
        }
        if !roster.voters.contains(&id) {
            roster.voters.push(id);
            roster.version += 1;
        }
        self.roster = Some(roster);
        Ok(self.unchanged())
    }

    fn forget_member(&mut self, id: u64) -> Result<Outcome, ApplyError> {
        let mut roster = self.roster();
        roster.version += 1;
        forget(&mut roster, id);
        self.roster = Some(roster);
        Ok(self.unchanged())
    }

    fn raise_feature_level(&mut self, level: u32) -> Result<Outcome, ApplyError> {
        if level > FEATURE_LEVEL {
            return Err(ApplyError::FeatureLevel { level });
        }
        self.applied.feature_level = self.applied.feature_level.max(level);
        Ok(self.unchanged())
    }
}

/// The member is gone for good: its id is never used again, and its data directory never welcome.
fn forget(roster: &mut RosterRecord, id: u64) {
    let Some(at) = roster.members.iter().position(|member| member.id == id) else {
        return;
    };
    let gone = roster.members.remove(at);
    roster.voters.retain(|&voter| voter != id);
    roster.removed.push(RemovedMember {
        id,
        incarnation: gone.incarnation,
        name: gone.name,
    });
    let too_many = roster.removed.len().saturating_sub(REMOVED_MAX);
    roster.removed.drain(..too_many);
}

// ---- reading what is there, this run's own writes included ----

impl Run<'_> {
    fn entry(&self, key: &Key) -> Result<Option<Arc<Entry>>, ApplyError> {
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

    fn tombstone(&self, key: &Key) -> Result<Option<TombstoneRecord>, ApplyError> {
        if let Some(own) = self.tombstones.get(key) {
            return Ok(*own);
        }
        let bytes = self.store.get(Family::Tombstone, key)?;
        Ok(bytes
            .map(|bytes| record::decode("tombstone", &bytes))
            .transpose()?)
    }

    /// Who has which id.
    fn roster(&self) -> RosterRecord {
        let before = || self.roster_before.as_deref().cloned();
        self.roster.clone().or_else(before).unwrap_or_default()
    }

    /// The record, if the value would still be served.
    fn live<'e>(&self, entry: Option<&'e Entry>) -> Option<&'e EntryRecord> {
        entry.map(|entry| &entry.record).filter(|record| {
            Timeline::from(*record).phase(self.applied.log_time_ms) != Phase::Expired
        })
    }
}

// ---- writing ----

impl Run<'_> {
    /// Gives a new value its revision.
    fn stamped(&mut self, record: EntryRecord) -> EntryRecord {
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
    fn put_entry(
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

    fn remove_entry(&mut self, key: &Key, old: &EntryRecord) {
        self.remove_due_rows(key, old);
        self.effects.sum.toggle(hash::entry(key, old));
        self.effects.delete(Family::Entry, key.as_bytes().clone());
        self.effects.delete(Family::Value, key.as_bytes().clone());
        self.entries.insert(key.clone(), None);
    }

    fn remove_due_rows(&mut self, key: &Key, old: &EntryRecord) {
        for row in record::due_rows(key, old) {
            self.effects.delete(Family::Due, row);
        }
    }

    /// Never lowers what an earlier tombstone fences.
    fn put_tombstone(
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

    fn remove_tombstone(&mut self, key: &Key, tombstone: &TombstoneRecord) {
        self.effects.sum.toggle(hash::tombstone(key, tombstone));
        self.effects
            .delete(Family::Tombstone, key.as_bytes().clone());
        self.effects.delete(
            Family::Due,
            record::due_key(DueKind::Tombstone, tombstone.expires_at_ms, key),
        );
        self.tombstones.insert(key.clone(), None);
    }

    fn done(&self, existed: bool) -> Outcome {
        outcome::Result::Done(Done {
            revision: self.applied.revision,
            existed,
        })
        .into()
    }

    fn unchanged(&self) -> Outcome {
        outcome::Result::Unchanged(Unchanged {
            revision: self.applied.revision,
        })
        .into()
    }
}

fn rejected(reason: &str, message: &str) -> Outcome {
    outcome::Result::Rejected(Rejected {
        reason: reason.into(),
        message: message.into(),
    })
    .into()
}

fn at(timeline: Timeline) -> EntryRecord {
    EntryRecord {
        fetched_at_ms: timeline.fetched_at,
        refresh_at_ms: timeline.refresh_at,
        fresh_until_ms: timeline.fresh_until,
        stale_while_revalidate_ms: timeline.stale_while_revalidate,
        stale_if_error_ms: timeline.stale_if_error,
        ..Default::default()
    }
}

fn key(log_id: LogId, bytes: &Bytes) -> Result<Key, ApplyError> {
    Key::new(bytes.clone()).map_err(|error| ApplyError::Damaged {
        index: log_id.index,
        reason: error.to_string(),
    })
}
