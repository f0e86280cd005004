//! Why what is committed cannot be applied: then the replica stops, it never skips.

use std::io;

use super::record::{self, FEATURE_LEVEL, FORMAT};

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
