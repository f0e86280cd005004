//! How committed entries become state: batch by batch, and what each command means.
//!
//! What a command means is a pure function of state, command and the stamp of its log entry. It
//! knows no clock, no randomness and no I/O but its batch, so that every replica comes to the same
//! state, whatever the sizes of its runs.

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use holdfast_proto::{
    Key, Revision, content_hash,
    limits::TOMBSTONE_KEPT,
    peer::{
        AppliedRecord, Command, CommitFetch, Conflict, EntryRecord, FailureRecord, Fenced,
        FetchFailed, Fetched, LogEntry, LogId, NotFound, Outcome, Revalidated, Set, StateHash,
        Sweep, SweepKey, command::Op, commit_fetch, outcome,
    },
    reason,
    timeline::{Millis, Timeline, after},
    v1::Origin,
};
use prost::Message as _;

use super::{
    Committed, CommittedPayload, State,
    clients::Recall,
    error::ApplyError,
    hash,
    memory::Entry,
    record::{FEATURE_LEVEL, FORMAT},
    run::{Changed, Finished, Run, rejected},
    write::Writer,
};

/// Hashes are compared at multiples of this index, so that replicas need to keep few.
const HASH_EVERY: u64 = 256;
/// Commands of one batch: more are another batch, so that memory is bounded and readers see
/// progress.
const BATCH_COMMANDS: usize = 4_096;

// ---- batches ----

impl State {
    /// Applies a run of committed entries and says what their commands came to. What is applied
    /// already, by a snapshot that was ahead, is passed over.
    pub(crate) fn apply(
        self: &Arc<Self>,
        run: &[Committed],
    ) -> Result<Vec<Vec<Outcome>>, ApplyError> {
        let mut outcomes = Vec::with_capacity(run.len());
        while outcomes.len() < run.len() {
            let rest = &run[outcomes.len()..];
            outcomes.append(&mut self.apply_batch(rest)?);
        }
        if let Some(last) = run.last() {
            self.passed_index
                .fetch_max(last.log_id.index, Ordering::AcqRel);
        }
        Ok(outcomes)
    }

    /// One batch: the outcomes of the entries at the beginning of `run` that went into it.
    fn apply_batch(self: &Arc<Self>, run: &[Committed]) -> Result<Vec<Vec<Outcome>>, ApplyError> {
        let mut writer = self.writer.lock();
        // Under the lock: a snapshot may just have taken the place of what was there.
        let generation = self.generation.load_full();
        let Writer { published, clients } = &mut *writer;
        let mut batch = Run::new(
            generation.store.as_ref(),
            &generation.memory,
            clients,
            AppliedRecord::clone(&published.applied),
            published.roster.clone(),
        );
        let mut outcomes = Vec::with_capacity(run.len());
        let mut hashes = Vec::new();
        for Committed { log_id, payload } in run {
            if batch.commands() >= BATCH_COMMANDS {
                break;
            }
            if batch.has_applied(*log_id) {
                outcomes.push(Vec::new());
                continue;
            }
            outcomes.push(match payload {
                CommittedPayload::Commands(encoded) => batch.apply(*log_id, encoded)?,
                CommittedPayload::Blank => {
                    batch.apply_empty(*log_id);
                    Vec::new()
                }
                CommittedPayload::Membership(membership) => {
                    batch.apply_membership(*log_id, membership);
                    Vec::new()
                }
            });
            if log_id.index.is_multiple_of(HASH_EVERY) {
                hashes.push(StateHash {
                    index: log_id.index,
                    hash: batch.hash(),
                    version: hash::VERSION,
                });
            }
        }
        let Finished {
            batch,
            changes,
            applied,
            roster,
        } = batch.finish();

        self.visible.store(applied.revision, Ordering::Release);
        generation.store.write(batch)?;
        let told = self.feed.has_followers().then(|| told(&changes, &applied));
        generation.memory.apply(changes);
        if generation.memory.filter_is_worn() {
            self.renew_filter();
        }
        writer.published.applied = Arc::new(applied);
        if let Some(roster) = roster {
            writer.published.roster = Some(Arc::new(roster));
        }
        writer.clients.written();
        self.remember_hashes(hashes);
        self.publish(&writer);
        if let Some(told) = told {
            self.feed.tell(told);
        }
        Ok(outcomes)
    }
}

/// What the feed says of a run.
fn told(changes: &Changed, applied: &AppliedRecord) -> Vec<(Revision, Key, bool)> {
    changes
        .iter()
        .map(|(key, entry)| match entry {
            Some(entry) => (entry.record.changed, key.clone(), true),
            None => (applied.revision, key.clone(), false),
        })
        .collect()
}

// ---- meanings ----

impl Run<'_> {
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
        let mut timeline = Timeline::from_lifetime(now, 0, 0, &lifetime);
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
        let began_at = commit.fetch_started_revision;
        if commit.term != log_id.term
            || changed.max(deleted) > began_at
            || self.applied.unfenced_revision > began_at
        {
            return Ok(outcome::Result::Fenced(Fenced {
                revision: self.applied.revision,
            })
            .into());
        }
        match &commit.result {
            Some(commit_fetch::Result::Fetched(fetched)) => {
                Ok(self.store_fetched(&key, old.as_deref(), fetched))
            }
            Some(commit_fetch::Result::Revalidated(revalidated)) => {
                Ok(self.revalidate(&key, old.as_deref(), revalidated))
            }
            Some(commit_fetch::Result::NotFound(not_found)) => {
                Ok(self.store_negative(&key, old.as_deref(), not_found))
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
            fetched.age_ms,
            &fetched.lifetime.unwrap_or_default(),
        );
        let value = &fetched.value;
        let record = self.stamped(EntryRecord {
            origin: Origin::Fetched.into(),
            size_bytes: value.len() as u64,
            content_hash: content_hash(value),
            content_type: fetched.content_type.clone(),
            tags: fetched.tags.clone(),
            validators: fetched.validators.clone().map(Box::new),
            ..at(timeline)
        });
        self.put_entry(key, old, record, Some(value));
        self.done(existed)
    }

    /// The value's times begin again, be it one that was only kept. Not if it is gone, or another
    /// one than was asked about: then it has to be fetched.
    fn revalidate(&mut self, key: &Key, old: Option<&Entry>, new: &Revalidated) -> Outcome {
        let Some(old) = old.filter(|old| old.record.content_hash == new.content_hash) else {
            return outcome::Result::Fenced(Fenced {
                revision: self.applied.revision,
            })
            .into();
        };
        let existed = self.live(Some(old)).is_some();
        let timeline = Timeline::from_lifetime(
            self.applied.log_time_ms,
            new.took_ms,
            new.age_ms,
            &new.lifetime.unwrap_or_default(),
        );
        self.applied.revision += 1;
        let record = EntryRecord {
            version: old.record.version,
            changed: self.applied.revision,
            changed_at_ms: self.applied.log_time_ms,
            origin: Origin::Fetched.into(),
            size_bytes: old.record.size_bytes,
            content_hash: old.record.content_hash,
            content_type: old.record.content_type.clone(),
            tags: old.record.tags.clone(),
            validators: match &new.validators {
                Some(validators) => Some(Box::new(validators.clone())),
                None => old.record.validators.clone(),
            },
            ..at(timeline)
        };
        self.put_entry(key, Some(old), record, None);
        self.done(existed)
    }

    /// Takes the place of whatever is there: whether it may is the leader's to know.
    fn store_negative(&mut self, key: &Key, old: Option<&Entry>, new: &NotFound) -> Outcome {
        let existed = self.live(old).is_some();
        let timeline = Timeline::from_lifetime(
            self.applied.log_time_ms,
            new.took_ms,
            0,
            &new.lifetime.unwrap_or_default(),
        );
        let value = Bytes::new();
        let record = self.stamped(EntryRecord {
            origin: Origin::Fetched.into(),
            content_hash: content_hash(&value),
            is_negative: true,
            ..at(timeline)
        });
        self.put_entry(key, old, record, Some(&value));
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
                && now >= Timeline::from(&old.record).kept_until()
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
                self.fences_no_more(tombstone.revision);
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
            } else {
                self.fences_no_more(old.record.changed);
            }
        }
        Ok(self.done(true))
    }

    /// What is removed kept older fetches of its key out for longer than any fetch may take, by log
    /// time. That may have been a moment, if the clocks were put forward: no fetch that began before
    /// it is stored any more.
    fn fences_no_more(&mut self, revision: Revision) {
        if self.applied.feature_level >= 2 {
            let applied = &mut self.applied;
            applied.unfenced_revision = applied.unfenced_revision.max(revision);
        }
    }

    fn raise_feature_level(&mut self, level: u32) -> Result<Outcome, ApplyError> {
        if level > FEATURE_LEVEL {
            return Err(ApplyError::FeatureLevel { level });
        }
        self.applied.feature_level = self.applied.feature_level.max(level);
        Ok(self.unchanged())
    }
}

fn at(timeline: Timeline) -> EntryRecord {
    EntryRecord {
        fetched_at_ms: timeline.fetched_at,
        refresh_at_ms: timeline.refresh_at,
        fresh_until_ms: timeline.fresh_until,
        stale_while_revalidate_ms: timeline.stale_while_revalidate,
        stale_if_error_ms: timeline.stale_if_error,
        keep_ms: timeline.keep,
        ..Default::default()
    }
}

fn key(log_id: LogId, bytes: &Bytes) -> Result<Key, ApplyError> {
    Key::new(bytes.clone()).map_err(|error| ApplyError::Damaged {
        index: log_id.index,
        reason: error.to_string(),
    })
}
