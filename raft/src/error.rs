//! Why an operation on a shard or on the cluster has no result: one narrow enum per operation, each
//! of which says whether the operation may have happened. What a node's error table is made from.

use std::io;

use holdfast_proto::{Revision, reason};

/// Why a write has no outcome.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
    #[error("this node does not lead the shard")]
    NotLeader { leader: Option<u64> },
    #[error("the leader cannot be reached")]
    Unreachable,
    #[error("too many writes wait already")]
    Overloaded,
    #[error("the disk of a voter is at its limit: values are refused until space is free again")]
    DiskFull,
    #[error("the deadline passed before the write left this node")]
    DeadlineBefore,
    #[error("the deadline passed while the write was under way")]
    DeadlineAfter,
    #[error("this node is stopping")]
    Stopped,
    #[error("what became of the write is unknown: {0}")]
    Unknown(String),
    #[error("{message}")]
    Remote {
        reason: String,
        message: String,
        not_applied: bool,
        leader: Option<u64>,
    },
}

impl WriteError {
    /// It is certain that the write was not and will not be applied.
    pub fn not_applied(&self) -> bool {
        match self {
            Self::DeadlineAfter | Self::Unknown(_) => false,
            Self::Remote { not_applied, .. } => *not_applied,
            Self::NoLeader
            | Self::NoQuorum
            | Self::NotLeader { .. }
            | Self::Unreachable
            | Self::Overloaded
            | Self::DiskFull
            | Self::DeadlineBefore
            | Self::Stopped => true,
        }
    }

    pub fn reason(&self) -> &str {
        match self {
            Self::NoLeader | Self::NotLeader { .. } | Self::Unreachable => reason::NO_LEADER,
            Self::NoQuorum | Self::Unknown(_) => reason::NO_QUORUM,
            Self::Overloaded => reason::OVERLOADED,
            Self::DiskFull => reason::DISK_FULL,
            Self::DeadlineBefore | Self::DeadlineAfter => reason::DEADLINE,
            Self::Stopped => reason::NOT_READY,
            Self::Remote { reason, .. } => reason,
        }
    }

    pub fn leader(&self) -> Option<u64> {
        match self {
            Self::NotLeader { leader } | Self::Remote { leader, .. } => *leader,
            _ => None,
        }
    }
}

/// Why a replica may not answer a read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error("nobody leads the shard")]
    NoLeader,
    #[error("the leader cannot reach a quorum")]
    NoQuorum,
    #[error("this replica is at revision {applied}, the session has seen {wanted}")]
    Behind { applied: Revision, wanted: Revision },
    #[error("the token is from epoch {token}, this cluster is in {cluster}")]
    TokenEpoch { token: u64, cluster: u64 },
    #[error("too many reads wait already")]
    Overloaded,
    #[error("the deadline passed")]
    Deadline,
}

/// Why a change of the cluster's members was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("there is no member `{0}`")]
    NoMember(String),
    #[error("{0}")]
    Refused(String),
    #[error("{message}")]
    Remote { reason: String, message: String },
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error(
        "the change is on its way and not yet done on every shard: repeat the command to wait for it"
    )]
    Unfinished,
}

impl ChangeError {
    pub fn reason(&self) -> &str {
        match self {
            Self::NoMember(_) => reason::NO_MEMBER,
            Self::Refused(_) => reason::MEMBERSHIP,
            Self::Remote { reason, .. } => reason,
            Self::Write(error) => error.reason(),
            Self::Unfinished => reason::DEADLINE,
        }
    }
}

/// Why one key of many was not read.
#[derive(Debug, thiserror::Error)]
pub enum ReadManyError {
    #[error("the values before this one are all that was asked for")]
    OverBound,
    #[error(transparent)]
    Disk(#[from] io::Error),
}
