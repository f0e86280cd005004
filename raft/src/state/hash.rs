//! The hash of a state, by which replicas find that they have parted: equal on all replicas at the
//! same log index.
//!
//! It is a sum over what the state holds, each record by its meaning, not by its encoding: an
//! upgrade that adds a field which nobody uses yet changes nothing. Apply keeps it up in the same
//! batch as the records, at the cost of the records that change. What counts in it has a version:
//! only hashes of one version are compared.

use std::io;

use holdfast_proto::peer::{
    AppliedRecord, ClientRecord, EntryRecord, RosterRecord, TombstoneRecord,
};
use xxhash_rust::xxh3::Xxh3;

use super::record::{self, ClientId};
use crate::store::{Family, StateStore};

/// What is summed up, and how. Whoever changes it counts it up.
pub(crate) const VERSION: u32 = 1;

/// The sum over the records. Each counts once, so that taking one out is adding it again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Sum(pub(crate) u64);

impl Sum {
    /// Adds what was not in it, or takes out what was.
    pub(crate) fn toggle(&mut self, record: u64) {
        self.0 ^= record;
    }

    /// From the records themselves: what apply would have come to.
    pub(crate) fn of(store: &dyn StateStore) -> io::Result<Self> {
        let mut sum = Self::default();
        for row in store.scan(Family::Entry, b"", None) {
            let (key, bytes) = row?;
            sum.toggle(entry(&key, &record::decode("entry", &bytes)?));
        }
        for row in store.scan(Family::Tombstone, b"", None) {
            let (key, bytes) = row?;
            sum.toggle(tombstone(&key, &record::decode("tombstone", &bytes)?));
        }
        for row in store.scan(Family::Client, b"h", Some(b"i")) {
            let (key, bytes) = row?;
            let head: ClientRecord = record::decode("client", &bytes)?;
            let Some(Ok(id)) = key.get(1..).map(ClientId::try_from) else {
                continue;
            };
            sum.toggle(client(&id, &head));
            head.seqs
                .iter()
                .for_each(|&seq| sum.toggle(outcome(&id, seq)));
        }
        Ok(sum)
    }

    /// With what is not a record of its own.
    pub(crate) fn at(self, applied: &AppliedRecord, roster: &RosterRecord) -> u64 {
        let mut fields = Fields::of(b's', b"");
        fields
            .number(self.0)
            .number(applied.revision)
            .number(applied.log_time_ms)
            .number(applied.feature_level.into())
            .number(roster.next_id);
        roster
            .members
            .iter()
            .for_each(|member| _ = fields.number(member.id).number(member.incarnation));
        roster
            .voters
            .iter()
            .for_each(|&voter| _ = fields.number(voter));
        if applied.unfenced_revision != 0 {
            fields.number(applied.unfenced_revision);
        }
        fields.digest()
    }
}

pub(crate) fn entry(key: &[u8], record: &EntryRecord) -> u64 {
    let mut fields = Fields::of(b'e', key);
    fields
        .number(record.version)
        .number(record.changed)
        .number(record.changed_at_ms)
        .number(record.fetched_at_ms)
        .number(record.refresh_at_ms)
        .number(record.fresh_until_ms)
        .number(record.stale_while_revalidate_ms)
        .number(record.stale_if_error_ms)
        .number(record.origin as u64)
        .number(record.size_bytes)
        .number(record.content_hash)
        .bytes(record.content_type.as_bytes());
    record
        .tags
        .iter()
        .for_each(|tag| _ = fields.bytes(tag.as_bytes()));
    if let Some(failure) = &record.failure {
        fields
            .number(failure.class as u64)
            .number(failure.status.into())
            .number(failure.count.into())
            .number(failure.at_ms)
            .number(failure.next_attempt_ms);
    }
    // What was added later counts only where it is used: a state without it has the hash it had.
    if record.keep_ms != 0 {
        fields.number(u64::from(b'k')).number(record.keep_ms);
    }
    if record.is_negative {
        fields.number(u64::from(b'n'));
    }
    if let Some(validators) = &record.validators {
        fields
            .number(u64::from(b'v'))
            .bytes(validators.etag.as_bytes())
            .bytes(validators.last_modified.as_bytes())
            .number(validators.source);
    }
    fields.digest()
}

pub(crate) fn tombstone(key: &[u8], record: &TombstoneRecord) -> u64 {
    Fields::of(b't', key)
        .number(record.revision)
        .number(record.expires_at_ms)
        .digest()
}

/// Without what is remembered of its requests, which counts one by one.
pub(crate) fn client(id: &ClientId, head: &ClientRecord) -> u64 {
    Fields::of(b'c', id)
        .number(head.last_seen_ms)
        .number(head.done_below)
        .digest()
}

pub(crate) fn outcome(id: &ClientId, seq: u64) -> u64 {
    Fields::of(b'o', id).number(seq).digest()
}

/// The fields of one record, in an order that never changes.
struct Fields(Xxh3);

impl Fields {
    fn of(kind: u8, key: &[u8]) -> Self {
        let mut fields = Self(Xxh3::new());
        fields.number(kind.into()).bytes(key);
        fields
    }

    fn number(&mut self, number: u64) -> &mut Self {
        self.0.update(&number.to_be_bytes());
        self
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.number(bytes.len() as u64);
        self.0.update(bytes);
        self
    }

    fn digest(&self) -> u64 {
        self.0.digest()
    }
}
