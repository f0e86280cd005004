//! What calls answer with: the messages of the contract as types that read well. Knows no network.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use holdfast_proto::{Revision, Token, v1};

use crate::error::Error;

/// How much a read must have seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Consistency {
    /// Reads its own writes and never goes backwards: the client sends what it has seen with every
    /// read.
    #[default]
    Session,
    /// A committed prefix, however old. Answers from memory even on an isolated node.
    Local,
    /// Sees every write acknowledged before the call, on any node.
    Linearizable,
}

/// What an answer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// Inside its lifetime.
    Fresh,
    /// Past its lifetime, inside `stale_while_revalidate`.
    Stale,
    /// Past that, inside `stale_if_error`: no better value could be had in time.
    StaleOnError,
    /// The upstream said there is no such thing.
    Negative,
    /// The policy's placeholder, while the first fetch runs.
    Placeholder,
    /// Nothing to serve.
    Miss,
    /// A state of a later version of the contract, by its number.
    Other(i32),
}

/// Time until a value stops being fresh, or since it did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ttl {
    Left(Duration),
    Past(Duration),
}

/// One key's answer.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Answer {
    /// None on a miss.
    pub value: Option<Bytes>,
    pub state: State,
    /// The revision of the value: what `if_version` compares. 0 on a miss.
    pub version: Revision,
    /// Since the value was fetched or set.
    pub age: Duration,
    /// None if it never stops being fresh, and on a miss.
    pub ttl: Option<Ttl>,
    /// Until the value is served no more. None if never, and on a miss.
    pub expires_in: Option<Duration>,
    /// Past its refresh point.
    pub refresh_due: bool,
    /// A fetch of the key is known to be under way.
    pub refreshing: bool,
    /// False for a fetched value that could not be stored.
    pub stored: bool,
    /// The upstream behind the key.
    pub upstream: Option<String>,
    /// The last fetch failed.
    pub last_error: Option<LastError>,
    pub content_type: Option<String>,
}

/// A failure of a key's upstream, by class.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LastError {
    /// As in the contract: `CONNECT`, `TIMEOUT`, `STATUS`, …
    pub class: String,
    /// The upstream's status, for class `STATUS`.
    pub status: Option<u16>,
    pub at: Option<SystemTime>,
    /// Failures in a row.
    pub count: u32,
    pub next_attempt: Option<SystemTime>,
}

/// Who answered, and how far behind it may be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replica {
    pub node_id: u64,
    pub region: String,
    pub role: Role,
    /// The answer reflects every command up to this revision of the key's shard.
    pub revision: Revision,
    /// How long ago the replica last knew itself to be current; None if unknown.
    pub lag: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    Leader,
    Voter,
    Learner,
    /// Not known to the node that answered, or a role of a later version.
    Unknown,
}

/// A Get answered.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Lookup {
    pub answer: Answer,
    pub replica: Replica,
    pub token: Token,
}

/// A BatchGet answered: for each key asked for, in order, an answer or why there is none.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Batch {
    pub results: Vec<Result<Answer, KeyError>>,
    pub replica: Replica,
    pub token: Token,
}

/// Why one key of a batch has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
#[non_exhaustive]
pub struct KeyError {
    pub code: tonic::Code,
    pub reason: String,
    pub message: String,
    pub upstream: Option<String>,
}

/// A Set acknowledged: a quorum has it on disk.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Stored {
    /// The version of the value now stored.
    pub version: Revision,
    pub replica: Replica,
    pub token: Token,
}

/// A Delete or Invalidate acknowledged.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Done {
    /// Whether there was a value that would have been served.
    pub existed: bool,
    pub replica: Replica,
    pub token: Token,
}

/// Everything known of a key, and why.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Inspection {
    /// What a Get would answer now, without the value.
    pub answer: Answer,
    pub replica: Replica,
    pub token: Token,
    /// In words for people.
    pub why: Vec<String>,
    pub shard: u32,
    pub slot: u32,
    /// The instant the replica judges by.
    pub now: Option<SystemTime>,
    /// None if nothing is stored.
    pub entry: Option<StoredEntry>,
    /// The revision of the key's last Delete, while its tombstone is kept.
    pub tombstone_revision: Option<Revision>,
    /// None if no policy matches.
    pub policy: Option<MatchedPolicy>,
}

/// What is stored of a key. Instants are None if never.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredEntry {
    pub version: Revision,
    /// The revision of its last mutation of any kind.
    pub changed: Revision,
    /// As in the contract: `PLAIN`, `SET`, `FETCHED`.
    pub origin: String,
    pub size_bytes: u64,
    pub tags: Vec<String>,
    pub fetched_at: Option<SystemTime>,
    pub refresh_at: Option<SystemTime>,
    pub fresh_until: Option<SystemTime>,
    pub stale_until: Option<SystemTime>,
    pub expires_at: Option<SystemTime>,
    /// XXH3 of the value.
    pub content_hash: u64,
    pub in_memory: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MatchedPolicy {
    pub pattern: String,
    pub captures: Vec<String>,
    pub upstream: Option<String>,
}

/// One page of a Scan.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Page {
    pub entries: Vec<Scanned>,
    /// Where the next page begins; None if this was the last.
    pub next_cursor: Option<Bytes>,
    pub replica: Replica,
    pub token: Token,
}

#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Scanned {
    pub key: Bytes,
    pub answer: Answer,
}

impl Answer {
    /// There is a value: fresh, stale, or a stand-in.
    pub fn is_hit(&self) -> bool {
        self.value.is_some()
    }
}

impl State {
    /// As in the contract, without its prefix.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fresh => "FRESH",
            Self::Stale => "STALE",
            Self::StaleOnError => "STALE_ON_ERROR",
            Self::Negative => "NEGATIVE",
            Self::Placeholder => "PLACEHOLDER",
            Self::Miss => "MISS",
            Self::Other(_) => "UNKNOWN",
        }
    }
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Leader => "leader",
            Self::Voter => "voter",
            Self::Learner => "learner",
            Self::Unknown => "unknown",
        }
    }
}

impl Consistency {
    pub(crate) fn to_wire(self) -> i32 {
        match self {
            Self::Session => v1::Consistency::Session as i32,
            Self::Local => v1::Consistency::Local as i32,
            Self::Linearizable => v1::Consistency::Linearizable as i32,
        }
    }
}

impl Ttl {
    fn from_wire(ttl_ms: i64) -> Self {
        let duration = Duration::from_millis(ttl_ms.unsigned_abs());
        if ttl_ms < 0 {
            Self::Past(duration)
        } else {
            Self::Left(duration)
        }
    }
}

impl From<i32> for State {
    fn from(state: i32) -> Self {
        match v1::State::try_from(state) {
            Ok(v1::State::Fresh) => Self::Fresh,
            Ok(v1::State::Stale) => Self::Stale,
            Ok(v1::State::StaleOnError) => Self::StaleOnError,
            Ok(v1::State::Negative) => Self::Negative,
            Ok(v1::State::Placeholder) => Self::Placeholder,
            Ok(v1::State::Miss) => Self::Miss,
            Ok(v1::State::Unspecified) | Err(_) => Self::Other(state),
        }
    }
}

impl From<i32> for Role {
    fn from(role: i32) -> Self {
        match v1::Role::try_from(role) {
            Ok(v1::Role::Leader) => Self::Leader,
            Ok(v1::Role::Voter) => Self::Voter,
            Ok(v1::Role::Learner) => Self::Learner,
            Ok(v1::Role::Unspecified) | Err(_) => Self::Unknown,
        }
    }
}

impl From<v1::Answer> for Answer {
    fn from(answer: v1::Answer) -> Self {
        Self {
            value: answer.value,
            state: answer.state.into(),
            version: answer.version,
            age: Duration::from_millis(answer.age_ms),
            ttl: answer.ttl_ms.map(Ttl::from_wire),
            expires_in: answer.expires_in_ms.map(Duration::from_millis),
            refresh_due: answer.refresh_due,
            refreshing: answer.refreshing,
            stored: answer.stored,
            upstream: said(answer.upstream),
            last_error: answer.last_error.map(Into::into),
            content_type: said(answer.content_type),
        }
    }
}

impl From<v1::LastError> for LastError {
    fn from(error: v1::LastError) -> Self {
        Self {
            class: without_prefix(error.class().as_str_name(), "FAILURE_CLASS_"),
            status: u16::try_from(error.status)
                .ok()
                .filter(|&status| status != 0),
            at: error.at.and_then(instant),
            count: error.count,
            next_attempt: error.next_attempt.and_then(instant),
        }
    }
}

impl From<v1::Replica> for Replica {
    fn from(replica: v1::Replica) -> Self {
        Self {
            node_id: replica.node_id,
            region: replica.region,
            role: replica.role.into(),
            revision: replica.revision,
            lag: replica.replica_lag_ms.map(Duration::from_millis),
        }
    }
}

impl From<v1::KeyError> for KeyError {
    fn from(error: v1::KeyError) -> Self {
        Self {
            code: error.code.into(),
            reason: error.reason,
            message: error.message,
            upstream: said(error.upstream),
        }
    }
}

impl From<v1::StoredEntry> for StoredEntry {
    fn from(entry: v1::StoredEntry) -> Self {
        Self {
            version: entry.version,
            changed: entry.changed,
            origin: without_prefix(entry.origin().as_str_name(), "ORIGIN_"),
            size_bytes: entry.size_bytes,
            tags: entry.tags,
            fetched_at: entry.fetched_at.and_then(instant),
            refresh_at: entry.refresh_at.and_then(instant),
            fresh_until: entry.fresh_until.and_then(instant),
            stale_until: entry.stale_until.and_then(instant),
            expires_at: entry.expires_at.and_then(instant),
            content_hash: entry.content_hash,
            in_memory: entry.in_memory,
        }
    }
}

impl From<v1::MatchedPolicy> for MatchedPolicy {
    fn from(policy: v1::MatchedPolicy) -> Self {
        Self {
            pattern: policy.r#match,
            captures: policy.captures,
            upstream: said(policy.upstream),
        }
    }
}

impl Lookup {
    /// None on a miss.
    pub fn value(&self) -> Option<&Bytes> {
        self.answer.value.as_ref()
    }

    /// None on a miss, and if the value is not UTF-8.
    pub fn value_str(&self) -> Option<&str> {
        std::str::from_utf8(self.value()?).ok()
    }

    /// None on a miss.
    pub fn into_value(self) -> Option<Bytes> {
        self.answer.value
    }

    pub(crate) fn from_wire(response: v1::GetResponse) -> Result<Self, Error> {
        let answer = response
            .answer
            .ok_or_else(|| Error::malformed("a Get without an answer", false))?;
        Ok(Self {
            answer: answer.into(),
            replica: replica(response.replica, false)?,
            token: token(&response.token, false)?,
        })
    }
}

impl Batch {
    /// `asked`: how many keys, each of which has a result.
    pub(crate) fn from_wire(response: v1::BatchGetResponse, asked: usize) -> Result<Self, Error> {
        let malformed = || Error::malformed("a BatchGet without a result for each key", false);
        if response.results.len() != asked {
            return Err(malformed());
        }
        let result = |result: v1::BatchGetResult| match result.result.ok_or_else(malformed)? {
            v1::batch_get_result::Result::Answer(answer) => Ok(Ok(answer.into())),
            v1::batch_get_result::Result::Error(error) => Ok(Err(error.into())),
        };
        let results = response
            .results
            .into_iter()
            .map(result)
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            results,
            replica: replica(response.replica, false)?,
            token: token(&response.token, false)?,
        })
    }
}

impl Inspection {
    pub(crate) fn from_wire(response: v1::InspectResponse) -> Result<Self, Error> {
        let answer = response
            .answer
            .ok_or_else(|| Error::malformed("an Inspect without an answer", false))?;
        Ok(Self {
            answer: answer.into(),
            replica: replica(response.replica, false)?,
            token: token(&response.token, false)?,
            why: response.why,
            shard: response.shard,
            slot: response.slot,
            now: response.now.and_then(instant),
            entry: response.entry.map(Into::into),
            tombstone_revision: response.tombstone_revision,
            policy: response.policy.map(Into::into),
        })
    }
}

/// Every answer says who gave it.
pub(crate) fn replica(replica: Option<v1::Replica>, mutation: bool) -> Result<Replica, Error> {
    replica
        .map(Into::into)
        .ok_or_else(|| Error::malformed("it does not say who gave it", mutation))
}

/// No bytes are a token that has seen nothing.
pub(crate) fn token(bytes: &[u8], mutation: bool) -> Result<Token, Error> {
    Ok(Token::decode(bytes)
        .map_err(|_| Error::malformed("its token", mutation))?
        .unwrap_or_default())
}

fn said(word: String) -> Option<String> {
    (!word.is_empty()).then_some(word)
}

fn without_prefix(name: &str, prefix: &str) -> String {
    name.strip_prefix(prefix).unwrap_or(name).to_owned()
}

/// An instant out of range is taken as never.
fn instant(timestamp: prost_types::Timestamp) -> Option<SystemTime> {
    SystemTime::try_from(timestamp).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ttl_keeps_its_sign() {
        assert_eq!(Ttl::from_wire(1500), Ttl::Left(Duration::from_millis(1500)));
        assert_eq!(Ttl::from_wire(-1), Ttl::Past(Duration::from_millis(1)));
        assert_eq!(
            Ttl::from_wire(i64::MIN),
            Ttl::Past(Duration::from_millis(1 << 63))
        );
    }

    #[test]
    fn a_state_of_a_later_contract_is_kept_by_number() {
        assert_eq!(
            State::from(v1::State::StaleOnError as i32),
            State::StaleOnError
        );
        assert_eq!(State::from(77), State::Other(77));
    }

    #[test]
    fn a_failure_is_told_by_class_without_prefix() {
        let wire = v1::LastError {
            class: v1::FailureClass::MissingField as i32,
            count: 3,
            ..Default::default()
        };
        let error = LastError::from(wire);
        assert_eq!(
            (error.class.as_str(), error.status, error.count),
            ("MISSING_FIELD", None, 3)
        );
    }

    #[test]
    fn an_answer_without_its_parts_is_refused_not_guessed() {
        let lookup = Lookup::from_wire(v1::GetResponse::default());
        assert!(matches!(lookup, Err(Error::Internal { .. })));
        let batch = v1::BatchGetResponse {
            replica: Some(v1::Replica::default()),
            ..Default::default()
        };
        assert!(matches!(
            Batch::from_wire(batch, 1),
            Err(Error::Internal { .. })
        ));
        assert!(token(b"\xff", true).is_err());
        assert!(token(b"", true).unwrap().is_empty());
    }
}
