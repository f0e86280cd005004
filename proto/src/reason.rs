//! The stable words of `google.rpc.ErrorInfo.reason`, and the names of its metadata. Clients branch
//! on them.

/// `ErrorInfo.domain` of every error.
pub const DOMAIN: &str = "holdfast";

/// The request is wrong; metadata `field` names where.
pub const INVALID_FIELD: &str = "INVALID_FIELD";
/// A field or method whose feature is not built; metadata `field` names it.
pub const NOT_BUILT: &str = "NOT_BUILT";
/// A value, page or batch over its bound.
pub const TOO_LARGE: &str = "TOO_LARGE";
/// `if_version` or `if_absent` did not hold.
pub const VERSION_CONFLICT: &str = "VERSION_CONFLICT";
/// Nobody leads the key's shard.
pub const NO_LEADER: &str = "NO_LEADER";
/// The leader cannot reach a quorum.
pub const NO_QUORUM: &str = "NO_QUORUM";
/// The answering replica cannot reach what the token has seen.
pub const BEHIND: &str = "BEHIND";
/// The token is from before a restore.
pub const TOKEN_EPOCH: &str = "TOKEN_EPOCH";
/// The upstream failed and nothing is stored; metadata `upstream` and `class`.
pub const UPSTREAM_FAILED: &str = "UPSTREAM_FAILED";
/// Too many requests, or fetches, in flight or waiting.
pub const OVERLOADED: &str = "OVERLOADED";
/// The disk is at `storage.max_bytes`.
pub const DISK_FULL: &str = "DISK_FULL";
/// The call's time ran out.
pub const DEADLINE: &str = "DEADLINE";
/// The node is starting, joining or draining.
pub const NOT_READY: &str = "NOT_READY";
/// No such member.
pub const NO_MEMBER: &str = "NO_MEMBER";
/// The membership cannot change that way now.
pub const MEMBERSHIP: &str = "MEMBERSHIP";
/// A bug of ours.
pub const INTERNAL: &str = "INTERNAL";

/// Metadata names.
pub const FIELD: &str = "field";
pub const LEADER: &str = "leader";
pub const APPLIED: &str = "applied";
pub const UPSTREAM: &str = "upstream";
pub const CLASS: &str = "class";
pub const STATUS: &str = "status";
/// The key's version, of a precondition that did not hold.
pub const VERSION: &str = "version";

/// Values of the metadata `applied`.
pub const APPLIED_NO: &str = "no";
pub const APPLIED_UNKNOWN: &str = "unknown";

/// Trailing and leading gRPC metadata that names the client address of the leader of the request's
/// shard.
pub const LEADER_HEADER: &str = "holdfast-leader";
