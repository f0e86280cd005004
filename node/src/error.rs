//! Why a request has no answer, as every door tells it: one table from reasons to codes, one shape
//! for what goes with them.
//!
//! Promises that an error names what the caller can act on (the field, the leader, whether a write
//! was applied, how long to wait), that a caller's mistake is never INTERNAL, and that nothing an
//! upstream said is in it: only its name, the class of its failure and its status. Must never know
//! which door the request came through, or what the request was.

use std::{borrow::Cow, collections::HashMap, io, time::Duration};

use holdfast_proto::{
    InvalidKey, InvalidToken, reason,
    v1::{FailureClass, KeyError},
};
use holdfast_raft::{ReadError, WriteError};
use tonic::{Code, Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Metadata: the key's version when `if_version` or `if_absent` did not hold.
pub const VERSION: &str = "version";

/// The names of metadata that go with an error.
const METADATA: [&str; 7] = [
    reason::FIELD,
    reason::LEADER,
    reason::APPLIED,
    reason::UPSTREAM,
    reason::CLASS,
    reason::STATUS,
    VERSION,
];

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
pub struct Error(Box<Told>);

#[derive(Debug, Clone)]
struct Told {
    reason: Cow<'static, str>,
    message: String,
    metadata: HashMap<&'static str, String>,
    retry_after: Option<Duration>,
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

impl Error {
    pub fn new(reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        let reason = reason.into();
        let retry_after = find(&reason).and_then(|rule| rule.wait);
        Self(Box::new(Told {
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
            .with(VERSION, version)
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

    pub fn not_ready() -> Self {
        Self::new(
            reason::NOT_READY,
            "this node does not belong to a cluster yet",
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

    /// As another node's door told it; `None` if the status is not of ours, as those of a broken
    /// connection.
    pub fn from_status(status: &Status) -> Option<Self> {
        let details = status.get_error_details();
        let info = details
            .error_info()
            .filter(|info| info.domain == reason::DOMAIN)?;
        let metadata = METADATA
            .into_iter()
            .filter_map(|name| Some((name, info.metadata.get(name)?.clone())))
            .collect();
        let retry_after = details.retry_info().and_then(|retry| retry.retry_delay);
        Some(Self(Box::new(Told {
            reason: info.reason.clone().into(),
            message: status.message().to_owned(),
            metadata,
            retry_after,
        })))
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

fn find(reason: &str) -> Option<&'static Rule> {
    RULES.iter().find(|rule| rule.reason == reason)
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = error.code();
        let Told {
            reason,
            message,
            metadata,
            retry_after,
        } = *error.0;
        let leader = metadata
            .get(reason::LEADER)
            .and_then(|leader| MetadataValue::try_from(leader.as_str()).ok());
        let metadata: HashMap<String, String> = metadata
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let mut details = ErrorDetails::with_error_info(reason, reason::DOMAIN, metadata);
        if retry_after.is_some() {
            details.set_retry_info(retry_after);
        }
        let mut status = Self::with_error_details(code, message, details);
        if let Some(leader) = leader {
            status.metadata_mut().insert(reason::LEADER_HEADER, leader);
        }
        status
    }
}

impl From<Error> for KeyError {
    fn from(error: Error) -> Self {
        let code = error.code().into();
        let Told {
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
    fn an_error_tells_all_it_knows_and_survives_a_hop() {
        let error = Error::new(reason::NO_QUORUM, "no quorum")
            .with_leader(Some("10.0.0.1:7400".into()))
            .maybe_applied();
        let status = Status::from(error);
        assert_eq!(
            status.metadata().get(reason::LEADER_HEADER).unwrap(),
            "10.0.0.1:7400"
        );
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.domain.as_str()),
            ("NO_QUORUM", "holdfast")
        );
        assert_eq!(info.metadata["leader"], "10.0.0.1:7400");
        assert_eq!(info.metadata["applied"], "unknown");
        assert_eq!(
            details.retry_info().unwrap().retry_delay,
            Some(Duration::from_millis(500))
        );

        let hopped = Error::from_status(&status).unwrap();
        assert_eq!(
            (hopped.reason(), hopped.code()),
            ("NO_QUORUM", Code::Unavailable)
        );
        assert_eq!(hopped.metadata("applied"), Some("unknown"));
        assert!(Error::from_status(&Status::unavailable("connection refused")).is_none());
    }

    #[test]
    fn a_failed_upstream_is_named_by_class_and_status_only() {
        let failure = UpstreamFailure {
            upstream: "profiles",
            class: FailureClass::Status,
            status: 503,
            next_attempt: Some(Duration::from_millis(1234)),
        };
        let status = Status::from(Error::upstream_failed(failure));
        assert_eq!(
            status.message(),
            "upstream `profiles` failed (STATUS 503) and nothing is stored"
        );
        let details = status.get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        assert_eq!(
            (
                metadata["upstream"].as_str(),
                metadata["class"].as_str(),
                metadata["status"].as_str()
            ),
            ("profiles", "STATUS", "503")
        );
        assert_eq!(
            details.retry_info().unwrap().retry_delay,
            Some(Duration::from_millis(1234))
        );
    }

    #[test]
    fn an_error_of_one_key_survives_a_hop_whole() {
        let failure = UpstreamFailure {
            upstream: "profiles",
            class: FailureClass::Status,
            status: 503,
            next_attempt: Some(Duration::from_millis(1234)),
        };
        let error = Error::upstream_failed(failure).with_leader(Some("10.0.0.1:7400".into()));
        let told = Status::from(Error::from_key_error(error.clone().into())).get_error_details();
        let before = Status::from(error).get_error_details();
        assert_eq!(
            told.error_info().unwrap().metadata,
            before.error_info().unwrap().metadata
        );
        assert_eq!(
            told.retry_info().unwrap().retry_delay,
            Some(Duration::from_millis(1234))
        );
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
