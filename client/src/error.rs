//! What can go wrong with a call, typed. Answers the two questions every caller has: may I try
//! again, and did it happen? Made from `google.rpc.Status` and its details; must never know how a
//! call was routed.

use std::time::Duration;

use holdfast_proto::reason;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Why a call failed.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request is wrong; `field` names where, by its name in the `.proto`.
    #[error("{context}")]
    InvalidArgument {
        field: Option<String>,
        context: Context,
    },
    /// A field or method whose feature is not built.
    #[error("{context}")]
    NotBuilt {
        field: Option<String>,
        context: Context,
    },
    /// A value, page or batch over its bound.
    #[error("{context}")]
    TooLarge {
        field: Option<String>,
        context: Context,
    },
    /// `if_version` or `if_absent` did not hold. `version` is the key's now: what the next try may
    /// name, without another read; 0 if the key has no value.
    #[error("{context}")]
    Conflict {
        version: Option<u64>,
        context: Context,
    },
    /// No member of that name.
    #[error("{context}")]
    NoMember { context: Context },
    /// The membership cannot change that way now.
    #[error("{context}")]
    Membership { context: Context },
    /// The session's token is from before a restore. The client has let go of its own: the next
    /// call begins a new session.
    #[error("{context}")]
    TokenEpoch { context: Context },
    /// Too many requests in flight or waiting. `retry_after` is the node's advice.
    #[error("{context}")]
    Overloaded {
        retry_after: Option<Duration>,
        context: Context,
    },
    /// The cluster's disks are at their limit.
    #[error("{context}")]
    DiskFull { context: Context },
    /// The node cannot answer now: no leader, no quorum, not ready, connection lost. `reason` says
    /// which.
    #[error("{context}")]
    Unavailable {
        retry_after: Option<Duration>,
        context: Context,
    },
    /// The upstream behind the key failed and nothing is stored. `class` and `status` say how,
    /// never in the upstream's words.
    #[error("{context}")]
    UpstreamFailed {
        upstream: Option<String>,
        class: Option<String>,
        status: Option<u16>,
        /// When the upstream is tried again, as far as the node knows.
        retry_after: Option<Duration>,
        context: Context,
    },
    /// The call's time ran out.
    #[error("{context}")]
    Deadline { context: Context },
    /// No connection could be made to any endpoint, so nothing was sent.
    #[error("{context}")]
    Connect { context: Context },
    #[error("{context}")]
    Unauthenticated { context: Context },
    #[error("{context}")]
    PermissionDenied { context: Context },
    /// A bug of ours, on the node or here.
    #[error("{context}")]
    Internal { context: Context },
}

/// Whether a failed mutation may have changed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// It changed nothing and never will.
    No,
    /// It may have happened, or may still happen.
    Unknown,
}

impl Applied {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::No => reason::APPLIED_NO,
            Self::Unknown => reason::APPLIED_UNKNOWN,
        }
    }
}

/// What every error carries. Displays as its message.
#[derive(Debug, Clone)]
pub struct Context(Box<Words>);

#[derive(Debug, Clone)]
struct Words {
    code: Code,
    reason: String,
    message: String,
    leader: Option<String>,
    /// Unset for calls that change nothing.
    applied: Option<Applied>,
}

impl std::fmt::Display for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl Context {
    fn new(
        code: Code,
        reason: impl Into<String>,
        message: impl Into<String>,
        applied: Option<Applied>,
    ) -> Self {
        Self(Box::new(Words {
            code,
            reason: reason.into(),
            message: message.into(),
            leader: None,
            applied,
        }))
    }
}

impl Error {
    /// Whether the same call may succeed later, though nothing about it is changed. This client has
    /// tried again as often as that made sense; [`retry_after`](Self::retry_after) may say more. For
    /// a mutation whose [`applied`](Self::applied) is `Unknown`, trying again may do it twice.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Overloaded { .. }
                | Self::Unavailable { .. }
                | Self::UpstreamFailed { .. }
                | Self::Deadline { .. }
                | Self::Connect { .. }
                | Self::DiskFull { .. }
        )
    }

    /// Whether the failed call may have changed something: `No` for every read.
    pub fn applied(&self) -> Applied {
        self.context().0.applied.unwrap_or(Applied::No)
    }

    /// The stable word for the cause: one of [`holdfast_proto::reason`], or for our side
    /// of the wire `CONNECT`, `CONNECTION` (lost) or `NO_ANSWER`.
    pub fn reason(&self) -> &str {
        &self.context().0.reason
    }

    /// How long to wait before the same call, where the node knew.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Overloaded { retry_after, .. }
            | Self::Unavailable { retry_after, .. }
            | Self::UpstreamFailed { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The key's version, of a precondition that did not hold.
    pub fn version(&self) -> Option<u64> {
        match self {
            Self::Conflict { version, .. } => *version,
            _ => None,
        }
    }

    /// Where writes go, as far as the answering node knows.
    pub fn leader(&self) -> Option<&str> {
        self.context().0.leader.as_deref()
    }

    pub fn code(&self) -> Code {
        self.context().0.code
    }

    /// What was wrong with the request, by its name in the `.proto`.
    pub fn field(&self) -> Option<&str> {
        match self {
            Self::InvalidArgument { field, .. }
            | Self::NotBuilt { field, .. }
            | Self::TooLarge { field, .. } => field.as_deref(),
            _ => None,
        }
    }

    /// Unset for calls that change nothing.
    #[cfg(feature = "cli")]
    pub(crate) fn applied_if_mutation(&self) -> Option<Applied> {
        self.context().0.applied
    }

    fn context(&self) -> &Context {
        match self {
            Self::InvalidArgument { context, .. }
            | Self::NotBuilt { context, .. }
            | Self::TooLarge { context, .. }
            | Self::Conflict { context, .. }
            | Self::NoMember { context }
            | Self::Membership { context }
            | Self::TokenEpoch { context }
            | Self::Overloaded { context, .. }
            | Self::DiskFull { context }
            | Self::Unavailable { context, .. }
            | Self::UpstreamFailed { context, .. }
            | Self::Deadline { context }
            | Self::Connect { context }
            | Self::Unauthenticated { context }
            | Self::PermissionDenied { context }
            | Self::Internal { context } => context,
        }
    }

    fn context_mut(&mut self) -> &mut Context {
        match self {
            Self::InvalidArgument { context, .. }
            | Self::NotBuilt { context, .. }
            | Self::TooLarge { context, .. }
            | Self::Conflict { context, .. }
            | Self::NoMember { context }
            | Self::Membership { context }
            | Self::TokenEpoch { context }
            | Self::Overloaded { context, .. }
            | Self::DiskFull { context }
            | Self::Unavailable { context, .. }
            | Self::UpstreamFailed { context, .. }
            | Self::Deadline { context }
            | Self::Connect { context }
            | Self::Unauthenticated { context }
            | Self::PermissionDenied { context }
            | Self::Internal { context } => context,
        }
    }
}

/// `ErrorInfo.reason` of errors made on our side of the wire.
const CONNECT: &str = "CONNECT";
const CONNECTION: &str = "CONNECTION";
const NO_ANSWER: &str = "NO_ANSWER";

// How the client makes errors.
impl Error {
    /// From what a node answered, or from how the connection to it ended.
    pub(crate) fn from_status(status: &Status, mutation: bool) -> Self {
        if std::error::Error::source(status).is_some() {
            return Self::lost(status, mutation);
        }
        let details = status.get_error_details();
        let retry_after = details.retry_info().and_then(|info| info.retry_delay);
        let info = details
            .error_info()
            .filter(|info| info.domain == reason::DOMAIN);
        let metadata = |name: &str| {
            info.and_then(|info| info.metadata.get(name))
                .filter(|value| !value.is_empty())
                .cloned()
        };
        let why = info.map_or("", |info| info.reason.as_str());

        // Only a node's own word makes it a No: a proxy's error says nothing of what became of the
        // request.
        let applied = mutation.then(|| match metadata(reason::APPLIED) {
            Some(word) if word == reason::APPLIED_NO => Applied::No,
            _ => Applied::Unknown,
        });
        let message = if status.message().is_empty() {
            status.code().description()
        } else {
            status.message()
        };
        let mut context = Context::new(
            status.code(),
            if why.is_empty() {
                word(status.code())
            } else {
                why
            },
            message,
            applied,
        );
        context.0.leader = metadata(reason::LEADER).or_else(|| header(status.metadata()));
        let field = metadata(reason::FIELD);
        let version = metadata(reason::VERSION).and_then(|version| version.parse().ok());

        match (why, status.code()) {
            (reason::NOT_BUILT, _) | (_, Code::Unimplemented) => Self::NotBuilt { field, context },
            (reason::TOO_LARGE, _) => Self::TooLarge { field, context },
            (reason::VERSION_CONFLICT, _) => Self::Conflict { version, context },
            (reason::NO_MEMBER, _) => Self::NoMember { context },
            (reason::MEMBERSHIP, _) => Self::Membership { context },
            (reason::TOKEN_EPOCH, _) => Self::TokenEpoch { context },
            (reason::DISK_FULL, _) => Self::DiskFull { context },
            (reason::OVERLOADED, _) | (_, Code::ResourceExhausted) => Self::Overloaded {
                retry_after,
                context,
            },
            (reason::UPSTREAM_FAILED, _) => Self::UpstreamFailed {
                upstream: metadata(reason::UPSTREAM),
                class: metadata(reason::CLASS),
                status: metadata(reason::STATUS).and_then(|status| status.parse().ok()),
                retry_after,
                context,
            },
            (reason::INVALID_FIELD, _) | (_, Code::InvalidArgument) => {
                Self::InvalidArgument { field, context }
            }
            (reason::DEADLINE, _) | (_, Code::DeadlineExceeded) => Self::Deadline { context },
            // CANCELLED without our having cancelled: the node let go of the call, as when it
            // stops.
            (_, Code::Unavailable | Code::Cancelled) => Self::Unavailable {
                retry_after,
                context,
            },
            (_, Code::FailedPrecondition | Code::Aborted) => Self::Conflict { version, context },
            (_, Code::Unauthenticated) => Self::Unauthenticated { context },
            (_, Code::PermissionDenied) => Self::PermissionDenied { context },
            // tonic's own word, before sending, for a message over the size both sides agreed on.
            (_, Code::OutOfRange) => Self::too_large(None, message, mutation),
            _ => Self::Internal { context },
        }
    }

    /// From how the connection ended while a request may have been on it.
    fn lost(status: &Status, mutation: bool) -> Self {
        if never_connected(status) {
            return Self::unconnected(
                format!("cannot connect again: {}", status.message()),
                mutation,
            );
        }
        let applied = mutation.then_some(Applied::Unknown);
        if is_timeout(status) {
            return Self::Deadline {
                context: Context::new(
                    Code::DeadlineExceeded,
                    reason::DEADLINE,
                    "the call's time ran out",
                    applied,
                ),
            };
        }
        let message = format!("the connection was lost: {}", status.message());
        Self::Unavailable {
            retry_after: None,
            context: Context::new(Code::Unavailable, CONNECTION, message, applied),
        }
    }

    pub(crate) fn deadline(timeout: Duration, applied: Option<Applied>) -> Self {
        let message = format!("no answer within {timeout:?}");
        Self::Deadline {
            context: Context::new(Code::DeadlineExceeded, reason::DEADLINE, message, applied),
        }
    }

    /// A read that is taken elsewhere.
    pub(crate) fn no_answer(address: &str, within: Duration) -> Self {
        let message = format!("{address} did not answer within {within:?}");
        Self::Unavailable {
            retry_after: None,
            context: Context::new(Code::Unavailable, NO_ANSWER, message, None),
        }
    }

    /// No connection was made, so nothing was sent.
    pub(crate) fn connect(address: &str, why: &str, mutation: bool) -> Self {
        Self::unconnected(format!("cannot connect to {address}: {why}"), mutation)
    }

    fn unconnected(message: String, mutation: bool) -> Self {
        Self::Connect {
            context: Context::new(
                Code::Unavailable,
                CONNECT,
                message,
                mutation.then_some(Applied::No),
            ),
        }
    }

    /// Refused here: it would not fit a message.
    pub(crate) fn too_large(field: Option<&str>, message: &str, mutation: bool) -> Self {
        let context = Context::new(
            Code::ResourceExhausted,
            reason::TOO_LARGE,
            message,
            mutation.then_some(Applied::No),
        );
        Self::TooLarge {
            field: field.map(str::to_owned),
            context,
        }
    }

    /// An answer that the contract does not allow. A mutation so answered was acknowledged, but not
    /// in words we can read.
    pub(crate) fn malformed(what: &str, mutation: bool) -> Self {
        let message = format!("the node's answer is not understood: {what}");
        Self::Internal {
            context: Context::new(
                Code::Internal,
                reason::INTERNAL,
                message,
                mutation.then_some(Applied::Unknown),
            ),
        }
    }

    /// An earlier try of the same mutation may have happened, whatever became of this one. A lost
    /// precondition stands: the state remembers the outcome of the request id, so it is the first
    /// try's outcome too.
    pub(crate) fn after_unknown_try(mut self) -> Self {
        if !matches!(self, Self::Conflict { .. }) {
            self.context_mut().0.applied = Some(Applied::Unknown);
        }
        self
    }
}

/// The leader's client address, from response or error metadata.
pub(crate) fn header(metadata: &tonic::metadata::MetadataMap) -> Option<String> {
    let value = metadata.get(reason::LEADER_HEADER)?.to_str().ok()?;
    (!value.is_empty()).then(|| value.to_owned())
}

/// A gRPC code as its name on the wire's documents, `DEADLINE_EXCEEDED`.
pub(crate) fn word(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

fn never_connected(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::ConnectError>())
}

fn is_timeout(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::TimeoutExpired>())
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    std::iter::successors(std::error::Error::source(status), |cause| cause.source())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn status(code: Code, why: &str, metadata: &[(&str, &str)]) -> Status {
        let metadata: HashMap<String, String> = metadata
            .iter()
            .map(|&(k, v)| (k.into(), v.into()))
            .collect();
        Status::with_error_details(
            code,
            "words",
            ErrorDetails::with_error_info(why, reason::DOMAIN, metadata),
        )
    }

    #[test]
    fn an_invalid_argument_names_its_field_and_is_not_retryable() {
        let error = Error::from_status(
            &status(
                Code::InvalidArgument,
                reason::INVALID_FIELD,
                &[("field", "ttl"), ("applied", "no")],
            ),
            true,
        );
        assert!(
            matches!(&error, Error::InvalidArgument { field: Some(field), .. } if field == "ttl")
        );
        assert!(!error.is_retryable());
        assert_eq!(
            (error.applied(), error.code(), error.reason()),
            (Applied::No, Code::InvalidArgument, reason::INVALID_FIELD)
        );
    }

    #[test]
    fn an_upstreams_failure_names_it_its_class_and_status() {
        let metadata = [
            ("upstream", "profiles"),
            ("class", "STATUS"),
            ("status", "503"),
        ];
        let error = Error::from_status(
            &status(Code::Unavailable, reason::UPSTREAM_FAILED, &metadata),
            false,
        );
        let Error::UpstreamFailed {
            upstream,
            class,
            status,
            ..
        } = &error
        else {
            panic!("{error:?}")
        };
        assert_eq!(
            (upstream.as_deref(), class.as_deref(), *status),
            (Some("profiles"), Some("STATUS"), Some(503))
        );
    }

    #[test]
    fn only_a_nodes_own_word_makes_a_failed_mutation_not_applied() {
        let applied = |metadata: &[(&str, &str)]| {
            Error::from_status(
                &status(Code::Unavailable, reason::NO_QUORUM, metadata),
                true,
            )
            .applied()
        };
        assert_eq!(applied(&[("applied", "no")]), Applied::No);
        assert_eq!(applied(&[("applied", "unknown")]), Applied::Unknown);
        assert_eq!(applied(&[]), Applied::Unknown);
        assert_eq!(
            Error::from_status(&Status::unavailable("from a proxy"), true).applied(),
            Applied::Unknown
        );
        assert_eq!(
            Error::from_status(&Status::unavailable("from a proxy"), false).applied(),
            Applied::No
        );
    }

    #[test]
    fn the_leader_is_read_from_the_details_or_else_the_header() {
        let error = Error::from_status(
            &status(Code::Unavailable, reason::NO_LEADER, &[("leader", "a:1")]),
            true,
        );
        assert_eq!(error.leader(), Some("a:1"));
        let mut status = Status::unavailable("");
        status
            .metadata_mut()
            .insert(reason::LEADER_HEADER, "b:1".parse().unwrap());
        assert_eq!(Error::from_status(&status, true).leader(), Some("b:1"));
    }

    #[test]
    fn overload_carries_the_nodes_advice() {
        let mut details =
            ErrorDetails::with_error_info(reason::OVERLOADED, reason::DOMAIN, HashMap::new());
        details.set_retry_info(Some(Duration::from_millis(70)));
        let error = Error::from_status(
            &Status::with_error_details(Code::ResourceExhausted, "full", details),
            false,
        );
        assert!(
            matches!(error, Error::Overloaded { retry_after: Some(after), .. } if after == Duration::from_millis(70))
        );
    }

    #[test]
    fn another_domains_reason_is_not_ours() {
        let metadata = HashMap::from([("applied".to_owned(), "no".to_owned())]);
        let details = ErrorDetails::with_error_info(reason::DISK_FULL, "elsewhere", metadata);
        let error = Error::from_status(
            &Status::with_error_details(Code::Unavailable, "", details),
            true,
        );
        assert!(matches!(error, Error::Unavailable { .. }));
        assert_eq!(error.applied(), Applied::Unknown);
    }

    #[test]
    fn after_a_try_of_unknown_outcome_only_a_lost_precondition_is_certain() {
        let connect = Error::connect("a:1", "refused", true);
        assert_eq!(connect.applied(), Applied::No);
        assert_eq!(connect.after_unknown_try().applied(), Applied::Unknown);
        let conflict = Error::from_status(
            &status(
                Code::FailedPrecondition,
                reason::VERSION_CONFLICT,
                &[("applied", "no"), ("version", "12")],
            ),
            true,
        );
        assert!(matches!(
            conflict,
            Error::Conflict {
                version: Some(12),
                ..
            }
        ));
        assert_eq!(conflict.after_unknown_try().applied(), Applied::No);
    }

    #[test]
    fn every_reason_of_the_contract_becomes_an_error_of_its_own() {
        let variant = |code, why| {
            let text = format!("{:?}", Error::from_status(&status(code, why, &[]), false));
            text.split_whitespace().next().unwrap().to_owned()
        };
        for (code, why, expected) in [
            (Code::Unimplemented, reason::NOT_BUILT, "NotBuilt"),
            (Code::ResourceExhausted, reason::TOO_LARGE, "TooLarge"),
            (Code::ResourceExhausted, reason::DISK_FULL, "DiskFull"),
            (
                Code::FailedPrecondition,
                reason::VERSION_CONFLICT,
                "Conflict",
            ),
            (Code::FailedPrecondition, reason::TOKEN_EPOCH, "TokenEpoch"),
            (Code::FailedPrecondition, reason::MEMBERSHIP, "Membership"),
            (Code::NotFound, reason::NO_MEMBER, "NoMember"),
            (Code::Unavailable, reason::NO_LEADER, "Unavailable"),
            (Code::Unavailable, reason::BEHIND, "Unavailable"),
            (Code::Unavailable, reason::NOT_READY, "Unavailable"),
            (Code::DeadlineExceeded, reason::DEADLINE, "Deadline"),
            (Code::Internal, reason::INTERNAL, "Internal"),
            (Code::Unauthenticated, "", "Unauthenticated"),
            (Code::PermissionDenied, "", "PermissionDenied"),
        ] {
            assert_eq!(variant(code, why), expected, "{why}");
        }
    }
}
