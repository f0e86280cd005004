//! Every key and record of the state, in one table. What is here is on disk: shapes are never
//! changed in place, the first byte of each record is its format, and a record of an unknown format
//! stops the replica.
//!
//! | family      | key                              | record                                                   |
//! |-------------|----------------------------------|----------------------------------------------------------|
//! | `Entry`     | the key                          | `EntryRecord`                                            |
//! | `Value`     | the key                          | the value's bytes                                        |
//! | `Due`       | kind, instant (u64 BE), the key  | nothing: the index of what happens when                  |
//! | `Barrier`   |                                  | none until barriers are built                            |
//! | `Lease`     |                                  | none until leases are built                              |
//! | `Tombstone` | the key                          | `TombstoneRecord`                                        |
//! | `Client`    | `h`, client                      | `ClientRecord`: the head of one client's outcomes        |
//! | `Client`    | `o`, client, seq (u64 BE)        | `Outcome`                                                |
//! | `System`    | `applied`                        | `AppliedRecord`                                          |
//! | `System`    | `roster`                         | `RosterRecord`, in shard 0                               |
//! | `System`    | `cluster`                        | `ClusterRecord`: the id alone                            |

use bytes::{BufMut, Bytes, BytesMut};
use holdfast_proto::{
    limits::CLIENT_ID_BYTES,
    peer::{EntryRecord, FailureRecord},
    timeline::{FOREVER, Millis, Timeline},
    v1::Origin,
};
use prost::Message;

/// The format of every record so far.
pub(crate) const FORMAT: u8 = 1;
/// The newest feature level this version speaks.
///
/// | level | adds |
/// |-------|------|
/// | 2     | `Revalidated`, `Validators`, `keep_ms`, `age_ms` |
pub(crate) const FEATURE_LEVEL: u32 = 2;

pub(crate) const APPLIED: &[u8] = b"applied";
pub(crate) const ROSTER: &[u8] = b"roster";
/// There if the state is not the majority's.
pub(crate) const DIVERGED: &[u8] = b"diverged";
pub(crate) const CLUSTER: &[u8] = b"cluster";

pub(crate) type ClientId = [u8; CLIENT_ID_BYTES];

#[derive(Debug, thiserror::Error)]
pub enum BadRecord {
    #[error("a {what} record has format {format}, this version reads up to {FORMAT}")]
    UnknownFormat { what: &'static str, format: u8 },
    #[error("a {what} record is damaged: {reason}")]
    Damaged { what: &'static str, reason: String },
}

impl From<BadRecord> for std::io::Error {
    fn from(bad: BadRecord) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, bad)
    }
}

/// What a `Due` row announces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum DueKind {
    /// The entry may be refreshed from here on.
    Refresh = b'r',
    /// The entry is kept no more.
    Expire = b'x',
    /// The tombstone fences no more.
    Tombstone = b't',
}

pub(crate) fn encode<M: Message>(record: &M) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + record.encoded_len());
    out.put_u8(FORMAT);
    record.encode(&mut out).expect("a BytesMut grows as needed");
    out.freeze()
}

pub(crate) fn decode<M: Message + Default>(
    what: &'static str,
    bytes: &Bytes,
) -> Result<M, BadRecord> {
    let body = body(what, bytes)?;
    M::decode(body).map_err(|error| BadRecord::Damaged {
        what,
        reason: error.to_string(),
    })
}

pub(crate) fn encode_value(value: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(1 + value.len());
    out.put_u8(FORMAT);
    out.put_slice(value);
    out.freeze()
}

pub(crate) fn decode_value(bytes: &Bytes) -> Result<Bytes, BadRecord> {
    body("value", bytes)
}

fn body(what: &'static str, bytes: &Bytes) -> Result<Bytes, BadRecord> {
    match bytes.first() {
        Some(&FORMAT) => Ok(bytes.slice(1..)),
        Some(&format) => Err(BadRecord::UnknownFormat { what, format }),
        None => Err(BadRecord::Damaged {
            what,
            reason: "it is empty".into(),
        }),
    }
}

pub(crate) fn due_key(kind: DueKind, at: Millis, key: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(9 + key.len());
    out.put_u8(kind as u8);
    out.put_u64(at);
    out.put_slice(key);
    out.freeze()
}

/// The instant and the key of a `Due` row.
pub(crate) fn parse_due_key(row: &Bytes) -> Option<(Millis, Bytes)> {
    let at = row.get(1..9)?.try_into().ok()?;
    Some((u64::from_be_bytes(at), row.slice(9..)))
}

pub(crate) fn client_head_key(client: &ClientId) -> Bytes {
    [b"h".as_slice(), client].concat().into()
}

pub(crate) fn client_outcome_key(client: &ClientId, seq: u64) -> Bytes {
    [b"o".as_slice(), client, &seq.to_be_bytes()]
        .concat()
        .into()
}

/// When the entry may next be refreshed: its refresh point, or the next attempt after a failure.
/// `FOREVER` for a plain one.
pub(crate) fn refresh_at(record: &EntryRecord) -> Millis {
    if record.origin() == Origin::Plain {
        return FOREVER;
    }
    let next_attempt = record
        .failure
        .as_ref()
        .map_or(0, |failure: &FailureRecord| failure.next_attempt_ms);
    record.refresh_at_ms.max(next_attempt)
}

/// The rows of the due index that an entry has: functions of its record alone, so that apply can
/// remove what it wrote.
pub(crate) fn due_rows(key: &[u8], record: &EntryRecord) -> impl Iterator<Item = Bytes> {
    [
        (DueKind::Refresh, refresh_at(record)),
        (DueKind::Expire, Timeline::from(record).kept_until()),
    ]
    .into_iter()
    .filter(|&(_, at)| at != FOREVER)
    .map(move |(kind, at)| due_key(kind, at, key))
}

#[cfg(test)]
mod tests {
    use holdfast_proto::peer::{AppliedRecord, TombstoneRecord};
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn due_rows_sort_by_instant_and_round_trip(a in any::<u64>(), b in any::<u64>(), key in proptest::collection::vec(any::<u8>(), 1..40)) {
            let (row_a, row_b) = (due_key(DueKind::Refresh, a, &key), due_key(DueKind::Refresh, b, &key));
            prop_assert_eq!(a.cmp(&b), row_a.cmp(&row_b));
            prop_assert_eq!(parse_due_key(&row_a), Some((a, Bytes::from(key))));
        }

        #[test]
        fn records_round_trip(version in any::<u64>(), revision in any::<u64>(), tags in proptest::collection::vec(".*", 0..4)) {
            let entry = EntryRecord { version, tags, ..Default::default() };
            prop_assert_eq!(decode::<EntryRecord>("entry", &encode(&entry)).unwrap(), entry);
            let tombstone = TombstoneRecord { revision, expires_at_ms: version };
            prop_assert_eq!(decode::<TombstoneRecord>("tombstone", &encode(&tombstone)).unwrap(), tombstone);
        }
    }

    #[test]
    fn a_record_of_an_unknown_format_is_an_error_and_never_skipped() {
        let mut bytes = encode(&AppliedRecord::default()).to_vec();
        bytes[0] = FORMAT + 1;
        assert!(matches!(
            decode::<AppliedRecord>("applied", &bytes.into()),
            Err(BadRecord::UnknownFormat { format: 2, .. })
        ));
        assert!(matches!(
            decode_value(&Bytes::new()),
            Err(BadRecord::Damaged { .. })
        ));
    }
}
