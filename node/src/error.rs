//! Why a request has no answer: one table from reasons to codes, one shape for what goes with them.
//! Doors translate it into their own language.
//!
//! Promises that an error names what the caller can act on (the field, the leader, whether a write
//! was applied, how long to wait), that a caller's mistake is never INTERNAL, and that nothing an
//! upstream said is in it: only its name, the class of its failure and its status. Must never know
//! which door the request came through, or what the request was.

use std::{borrow::Cow, collections::HashMap, io, time::Duration};

use holdfast_proto::{
    InvalidKey, InvalidToken, ShardId, reason,
    v1::{FailureClass, KeyError},
};
use holdfast_raft::{ReadError, WriteError};

/// The names of metadata that go with an error.
pub(crate) const METADATA: [&str; 7] = [
    reason::FIELD,
    reason::LEADER,
    reason::APPLIED,
    reason::UPSTREAM,
    reason::CLASS,
    reason::STATUS,
    reason::VERSION,
];

/// The kinds of outcome that a caller tells apart: `google.rpc.Code`, by its numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    Ok = 0,
    Cancelled = 1,
    Unknown = 2,
    InvalidArgument = 3,
    DeadlineExceeded = 4,
    NotFound = 5,
    AlreadyExists = 6,
    PermissionDenied = 7,
    ResourceExhausted = 8,
    FailedPrecondition = 9,
    Aborted = 10,
    OutOfRange = 11,
    Unimplemented = 12,
    Internal = 13,
    Unavailable = 14,
    DataLoss = 15,
    Unauthenticated = 16,
}

/// What holds for a reason: its code, and how long to wait where waiting helps.
struct Rule {
    reason: &'static str,
    code: Code,
    wait: Option<Duration>,
}

const fn rule(reason: &'static str, code: Code) -> Rule {
    Rule {
        reason,
        code,
        wait: None,
    }
}

const fn waiting(reason: &'static str, code: Code, wait_ms: u64) -> Rule {
    Rule {
        reason,
        code,
        wait: Some(Duration::from_millis(wait_ms)),
    }
}

/// Waits are about what each trouble usually takes: an election 300 ms, a compaction that frees the
/// disk seconds.
const RULES: [Rule; 16] = [
    rule(reason::INVALID_FIELD, Code::InvalidArgument),
    rule(reason::NOT_BUILT, Code::Unimplemented),
    rule(reason::TOO_LARGE, Code::ResourceExhausted),
    rule(reason::VERSION_CONFLICT, Code::FailedPrecondition),
    waiting(reason::NO_LEADER, Code::Unavailable, 300),
    waiting(reason::NO_QUORUM, Code::Unavailable, 500),
    waiting(reason::BEHIND, Code::Unavailable, 100),
    rule(reason::TOKEN_EPOCH, Code::FailedPrecondition),
    waiting(reason::UPSTREAM_FAILED, Code::Unavailable, 1000),
    waiting(reason::OVERLOADED, Code::ResourceExhausted, 100),
    waiting(reason::DISK_FULL, Code::ResourceExhausted, 5000),
    rule(reason::DEADLINE, Code::DeadlineExceeded),
    waiting(reason::NOT_READY, Code::Unavailable, 500),
    rule(reason::NO_MEMBER, Code::FailedPrecondition),
    waiting(reason::MEMBERSHIP, Code::FailedPrecondition, 1000),
    rule(reason::INTERNAL, Code::Internal),
];

/// One request's error. Small to pass; made only when something went wrong.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{}", .0.message)]
pub struct Error(Box<Details>);

/// All that an error says, for the doors.
#[derive(Debug, Clone)]
pub(crate) struct Details {
    pub(crate) reason: Cow<'static, str>,
    pub(crate) message: String,
    pub(crate) metadata: HashMap<&'static str, String>,
    pub(crate) retry_after: Option<Duration>,
}

/// A failure of a key's upstream with nothing to serve.
#[derive(Debug, Clone, Copy)]
pub struct UpstreamFailure<'a> {
    pub upstream: &'a str,
    pub class: FailureClass,
    pub status: u32,
    /// Until the upstream is asked again for this key, if that is known.
    pub next_attempt: Option<Duration>,
}

impl Code {
    /// As metrics and clients name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::Cancelled => "CANCELLED",
            Self::Unknown => "UNKNOWN",
            Self::InvalidArgument => "INVALID_ARGUMENT",
            Self::DeadlineExceeded => "DEADLINE_EXCEEDED",
            Self::NotFound => "NOT_FOUND",
            Self::AlreadyExists => "ALREADY_EXISTS",
            Self::PermissionDenied => "PERMISSION_DENIED",
            Self::ResourceExhausted => "RESOURCE_EXHAUSTED",
            Self::FailedPrecondition => "FAILED_PRECONDITION",
            Self::Aborted => "ABORTED",
            Self::OutOfRange => "OUT_OF_RANGE",
            Self::Unimplemented => "UNIMPLEMENTED",
            Self::Internal => "INTERNAL",
            Self::Unavailable => "UNAVAILABLE",
            Self::DataLoss => "DATA_LOSS",
            Self::Unauthenticated => "UNAUTHENTICATED",
        }
    }
}

impl Error {
    pub fn new(reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        let reason = reason.into();
        let retry_after = find(&reason).and_then(|rule| rule.wait);
        Self(Box::new(Details {
            reason,
            message: message.into(),
            metadata: HashMap::new(),
            retry_after,
        }))
    }

    /// The request is wrong, and where.
    pub fn field(field: &'static str, message: impl std::fmt::Display) -> Self {
        Self::new(reason::INVALID_FIELD, format!("{field}: {message}")).with(reason::FIELD, field)
    }

    pub fn not_built(field: &'static str) -> Self {
        Self::new(
            reason::NOT_BUILT,
            format!("{field}: this version does not have it"),
        )
        .with(reason::FIELD, field)
    }

    pub fn too_large(field: &'static str, message: impl std::fmt::Display) -> Self {
        Self::new(reason::TOO_LARGE, format!("{field}: {message}")).with(reason::FIELD, field)
    }

    pub fn key(field: &'static str, invalid: InvalidKey) -> Self {
        Self::field(field, invalid)
    }

    pub fn conflict(version: u64) -> Self {
        let message = match version {
            0 => "the key has no value that would be served".to_owned(),
            version => format!("the key's version is {version}"),
        };
        Self::new(reason::VERSION_CONFLICT, message)
            .with(reason::VERSION, version)
            .not_applied()
    }

    pub fn upstream_failed(failure: UpstreamFailure<'_>) -> Self {
        let UpstreamFailure {
            upstream,
            class,
            status,
            next_attempt,
        } = failure;
        let name = class.as_str_name();
        let class = name.strip_prefix("FAILURE_CLASS_").unwrap_or(name);
        let said = if status == 0 {
            String::new()
        } else {
            format!(" {status}")
        };
        let message = format!("upstream `{upstream}` failed ({class}{said}) and nothing is stored");
        let mut error = Self::new(reason::UPSTREAM_FAILED, message)
            .with(reason::UPSTREAM, upstream)
            .with(reason::CLASS, class);
        if status != 0 {
            error = error.with(reason::STATUS, status);
        }
        if next_attempt.is_some() {
            error.0.retry_after = next_attempt;
        }
        error
    }

    /// Something of ours broke. The cause goes to the log and not to the caller.
    pub fn internal(what: &'static str, cause: impl std::fmt::Display) -> Self {
        tracing::error!(%cause, "{what}");
        Self::new(reason::INTERNAL, what)
    }

    pub fn disk(error: &io::Error) -> Self {
        Self::internal("reading the state failed", error)
    }

    /// `why` is what the node itself says of it.
    pub fn not_ready(why: Option<String>) -> Self {
        let why = why.unwrap_or_else(|| "this node does not belong to a cluster yet".to_owned());
        Self::new(reason::NOT_READY, why)
    }

    pub fn not_here(shard: ShardId) -> Self {
        Self::new(
            reason::NOT_READY,
            format!("this node has no replica of shard {shard}"),
        )
    }

    pub fn no_leader() -> Self {
        Self::new(reason::NO_LEADER, "nobody leads the key's shard")
    }

    pub fn deadline() -> Self {
        Self::new(reason::DEADLINE, "the deadline passed")
    }

    /// Beside the error: one of the names this table knows.
    pub fn with(mut self, name: &'static str, value: impl ToString) -> Self {
        debug_assert!(METADATA.contains(&name));
        self.0.metadata.insert(name, value.to_string());
        self
    }

    /// The client address of the leader, so that the caller goes there next.
    pub fn with_leader(self, leader: Option<String>) -> Self {
        match leader {
            Some(leader) => self.with(reason::LEADER, leader),
            None => self,
        }
    }

    /// It is certain that the mutation was not and will not be applied.
    pub fn not_applied(self) -> Self {
        self.with(reason::APPLIED, reason::APPLIED_NO)
    }

    pub fn maybe_applied(self) -> Self {
        self.with(reason::APPLIED, reason::APPLIED_UNKNOWN)
    }

    pub fn is_not_applied(&self) -> bool {
        self.metadata(reason::APPLIED) == Some(reason::APPLIED_NO)
    }

    pub fn reason(&self) -> &str {
        &self.0.reason
    }

    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.0.metadata.get(name).map(String::as_str)
    }

    /// A reason that this version does not know comes from a newer peer.
    pub fn code(&self) -> Code {
        find(&self.0.reason).map_or(Code::Unknown, |rule| rule.code)
    }

    pub(crate) fn into_details(self) -> Details {
        *self.0
    }

    /// As a peer tells it of one key.
    pub fn from_key_error(error: KeyError) -> Self {
        let KeyError {
            reason,
            message,
            upstream,
            mut metadata,
            retry_after,
            ..
        } = error;
        let mut told = Self::new(reason, message);
        told.0.metadata = METADATA
            .into_iter()
            .filter_map(|name| Some((name, metadata.remove(name)?)))
            .collect();
        told.0.retry_after = retry_after
            .and_then(|wait| Duration::try_from(wait).ok())
            .or(told.0.retry_after);
        if upstream.is_empty() {
            told
        } else {
            told.with(reason::UPSTREAM, upstream)
        }
    }
}

impl From<Details> for Error {
    fn from(details: Details) -> Self {
        Self(Box::new(details))
    }
}

fn find(reason: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.reason == reason)
}

impl From<Error> for KeyError {
    fn from(error: Error) -> Self {
        let code = error.code() as i32;
        let Details {
            reason,
            message,
            mut metadata,
            retry_after,
        } = *error.0;
        Self {
            code,
            reason: reason.into_owned(),
            message,
            upstream: metadata.remove(reason::UPSTREAM).unwrap_or_default(),
            metadata: metadata
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            retry_after: retry_after.and_then(|wait| wait.try_into().ok()),
        }
    }
}

impl From<InvalidToken> for Error {
    fn from(invalid: InvalidToken) -> Self {
        Self::field("token", invalid)
    }
}

impl From<ReadError> for Error {
    fn from(error: ReadError) -> Self {
        let reason = match &error {
            ReadError::NoLeader => reason::NO_LEADER,
            ReadError::NoQuorum => reason::NO_QUORUM,
            ReadError::Behind { .. } => reason::BEHIND,
            ReadError::TokenEpoch { .. } => {
                return Self::new(reason::TOKEN_EPOCH, error.to_string())
                    .with(reason::FIELD, "token");
            }
            ReadError::Overloaded => reason::OVERLOADED,
            ReadError::Deadline => reason::DEADLINE,
        };
        Self::new(reason, error.to_string())
    }
}

impl From<WriteError> for Error {
    fn from(error: WriteError) -> Self {
        let told = Self::new(error.reason().to_owned(), error.to_string());
        if error.not_applied() {
            told.not_applied()
        } else {
            told.maybe_applied()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure() -> UpstreamFailure<'static> {
        UpstreamFailure {
            upstream: "profiles",
            class: FailureClass::Status,
            status: 503,
            next_attempt: Some(Duration::from_millis(1234)),
        }
    }

    #[test]
    fn every_reason_has_one_code_and_only_ours_is_internal() {
        let reasons = [
            (reason::INVALID_FIELD, Code::InvalidArgument),
            (reason::NOT_BUILT, Code::Unimplemented),
            (reason::TOO_LARGE, Code::ResourceExhausted),
            (reason::VERSION_CONFLICT, Code::FailedPrecondition),
            (reason::NO_LEADER, Code::Unavailable),
            (reason::NO_QUORUM, Code::Unavailable),
            (reason::BEHIND, Code::Unavailable),
            (reason::TOKEN_EPOCH, Code::FailedPrecondition),
            (reason::UPSTREAM_FAILED, Code::Unavailable),
            (reason::OVERLOADED, Code::ResourceExhausted),
            (reason::DISK_FULL, Code::ResourceExhausted),
            (reason::DEADLINE, Code::DeadlineExceeded),
            (reason::NOT_READY, Code::Unavailable),
            (reason::NO_MEMBER, Code::FailedPrecondition),
            (reason::MEMBERSHIP, Code::FailedPrecondition),
            (reason::INTERNAL, Code::Internal),
        ];
        assert_eq!(reasons.len(), RULES.len());
        for (reason, code) in reasons {
            assert_eq!(
                RULES.iter().filter(|rule| rule.reason == reason).count(),
                1,
                "{reason}"
            );
            assert_eq!(Error::new(reason, "").code(), code, "{reason}");
        }
        assert_eq!(
            RULES
                .iter()
                .filter(|rule| rule.code == Code::Internal)
                .count(),
            1
        );
    }

    /// The reasons that `holdfast_proto` has and this table forgot would be told as UNKNOWN.
    #[test]
    fn no_reason_of_the_contract_is_missing() {
        let source = include_str!("../../proto/src/reason.rs");
        let (reasons, _) = source.split_once("/// Metadata names.").unwrap();
        let named = reasons
            .lines()
            .filter_map(|line| line.strip_prefix("pub const ")?.split(':').next());
        for name in named.filter(|&name| name != "DOMAIN") {
            assert!(find(name).is_some(), "{name}");
        }
    }

    #[test]
    fn a_failed_upstream_is_named_by_class_and_status_only() {
        let error = Error::upstream_failed(failure());
        assert_eq!(
            error.to_string(),
            "upstream `profiles` failed (STATUS 503) and nothing is stored"
        );
        let said = ["upstream", "class", "status"].map(|name| error.metadata(name));
        assert_eq!(said, [Some("profiles"), Some("STATUS"), Some("503")]);
        assert_eq!(
            error.into_details().retry_after,
            Some(Duration::from_millis(1234))
        );
    }

    #[test]
    fn an_error_of_one_key_survives_a_hop_whole() {
        let error = Error::upstream_failed(failure()).with_leader(Some("10.0.0.1:7400".into()));
        let hopped = Error::from_key_error(error.clone().into()).into_details();
        let before = error.into_details();
        assert_eq!(hopped.metadata, before.metadata);
        assert_eq!(hopped.retry_after, Some(Duration::from_millis(1234)));
    }

    #[test]
    fn a_write_says_no_only_when_it_is_certain() {
        let applied = |error: WriteError| {
            Error::from(error)
                .metadata(reason::APPLIED)
                .map(str::to_owned)
        };
        for certain in [
            WriteError::NoLeader,
            WriteError::DiskFull,
            WriteError::Overloaded,
            WriteError::DeadlineBefore,
        ] {
            assert_eq!(applied(certain).as_deref(), Some("no"));
        }
        for uncertain in [
            WriteError::DeadlineAfter,
            WriteError::Unknown("the leader is gone".into()),
        ] {
            assert_eq!(applied(uncertain).as_deref(), Some("unknown"));
        }
    }

    #[test]
    fn a_mistake_names_its_field() {
        let error = Error::key("key", InvalidKey::Empty);
        assert_eq!(
            (
                error.code(),
                error.metadata("field"),
                error.to_string().as_str()
            ),
            (Code::InvalidArgument, Some("key"), "key: the key is empty")
        );
        assert_eq!(Error::not_built("lease").code(), Code::Unimplemented);
        assert_eq!(Error::from(InvalidToken).metadata("field"), Some("token"));
    }
}
