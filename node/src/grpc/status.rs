//! How gRPC says an error, to clients and between nodes: `google.rpc.Status` with `ErrorInfo`, and
//! `RetryInfo` where waiting helps. Must never decide what is wrong.

use std::collections::HashMap;

use holdfast_proto::reason;
use tonic::{Status, metadata::MetadataValue};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{Code, Details, Error, METADATA};

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let code = tonic::Code::from(error.code());
        let Details {
            reason,
            message,
            metadata,
            retry_after,
        } = error.into_details();
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

impl From<Code> for tonic::Code {
    /// Both are numbered as `google.rpc.Code` is.
    fn from(code: Code) -> Self {
        Self::from_i32(code as i32)
    }
}

impl From<tonic::Code> for Code {
    fn from(code: tonic::Code) -> Self {
        match code {
            tonic::Code::Ok => Self::Ok,
            tonic::Code::Cancelled => Self::Cancelled,
            tonic::Code::Unknown => Self::Unknown,
            tonic::Code::InvalidArgument => Self::InvalidArgument,
            tonic::Code::DeadlineExceeded => Self::DeadlineExceeded,
            tonic::Code::NotFound => Self::NotFound,
            tonic::Code::AlreadyExists => Self::AlreadyExists,
            tonic::Code::PermissionDenied => Self::PermissionDenied,
            tonic::Code::ResourceExhausted => Self::ResourceExhausted,
            tonic::Code::FailedPrecondition => Self::FailedPrecondition,
            tonic::Code::Aborted => Self::Aborted,
            tonic::Code::OutOfRange => Self::OutOfRange,
            tonic::Code::Unimplemented => Self::Unimplemented,
            tonic::Code::Internal => Self::Internal,
            tonic::Code::Unavailable => Self::Unavailable,
            tonic::Code::DataLoss => Self::DataLoss,
            tonic::Code::Unauthenticated => Self::Unauthenticated,
        }
    }
}

/// What another node's door said; `None` if the status is not of ours, as those of a broken
/// connection.
pub(crate) fn error_of(status: &Status) -> Option<Error> {
    let details = status.get_error_details();
    let info = details
        .error_info()
        .filter(|info| info.domain == reason::DOMAIN)?;
    let metadata = METADATA
        .into_iter()
        .filter_map(|name| Some((name, info.metadata.get(name)?.clone())))
        .collect();
    Some(Error::from(Details {
        reason: info.reason.clone().into(),
        message: status.message().to_owned(),
        metadata,
        retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
    }))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_code_is_grpcs_own() {
        for number in 0..=16 {
            let code = tonic::Code::from_i32(number);
            assert_eq!(Code::from(code) as i32, number);
            assert_eq!(tonic::Code::from(Code::from(code)), code);
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

        let hopped = error_of(&status).unwrap();
        assert_eq!(
            (hopped.reason(), hopped.code()),
            ("NO_QUORUM", Code::Unavailable)
        );
        assert_eq!(hopped.metadata("applied"), Some("unknown"));
        assert!(error_of(&Status::unavailable("connection refused")).is_none());
    }
}
