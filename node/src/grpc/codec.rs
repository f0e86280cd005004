//! A message that the codec refuses never reaches a handler. tonic tells one beyond the listener's
//! bound as OUT_OF_RANGE, and one that is no message of ours as INTERNAL; both are the caller's
//! mistakes, and are told here as every other mistake is. Must never read a body.

use std::{
    convert::Infallible,
    task::{Context, Poll},
};

use futures::{TryFutureExt as _, future::MapOk};
use holdfast_proto::{limits::CLIENT_MESSAGE_BYTES_MAX, reason};
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

use crate::error::Error;

type Response = http::Response<Body>;

/// How tonic's codec begins what it says of a message over its bound …
const TOO_LARGE: &str = "Error, decoded message length too large";
/// … and prost what it says of one that it cannot read.
const MALFORMED: &str = "failed to decode Protobuf message: ";

/// A gRPC service whose codec's refusals are told as the table of errors has them.
#[derive(Debug, Clone)]
pub struct CodecTold<S>(pub(super) S);

impl<S: NamedService> NamedService for CodecTold<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for CodecTold<S>
where
    S: Service<http::Request<Body>, Response = Response, Error = Infallible>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = MapOk<S::Future, fn(Response) -> Response>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let told: fn(Response) -> Response = if request.uri().path().ends_with("/Set") {
            of_value
        } else {
            of_message
        };
        self.0.call(request).map_ok(told)
    }
}

/// Of a Set only the value can be so large.
fn of_value(response: Response) -> Response {
    told(response, || {
        Error::too_large(
            "value",
            format_args!("the message has more than {CLIENT_MESSAGE_BYTES_MAX} bytes"),
        )
    })
}

fn of_message(response: Response) -> Response {
    told(response, || {
        Error::new(
            reason::TOO_LARGE,
            format!("the message has more than {CLIENT_MESSAGE_BYTES_MAX} bytes"),
        )
    })
}

fn told(response: Response, too_large: impl FnOnce() -> Error) -> Response {
    // Nearly every answer: a status in the headers is the mark of a refusal.
    if !response.headers().contains_key(Status::GRPC_STATUS) {
        return response;
    }
    match Status::from_header_map(response.headers()) {
        Some(status)
            if status.code() == Code::OutOfRange && status.message().starts_with(TOO_LARGE) =>
        {
            Status::from(too_large().not_applied()).into_http()
        }
        // Our own INTERNAL has details: what has none never reached a handler.
        Some(status) if status.code() == Code::Internal && status.details().is_empty() => {
            Status::from(malformed(status.message()).not_applied()).into_http()
        }
        _ => response,
    }
}

fn malformed(said: &str) -> Error {
    let what = said.strip_prefix(MALFORMED).unwrap_or(said);
    let error = Error::new(
        reason::INVALID_FIELD,
        format!("the message cannot be read: {what}"),
    );
    match field(what) {
        Some(field) => error.with(reason::FIELD, field),
        None => error,
    }
}

/// `request_id.client` of `SetRequest.request_id: RequestId.client: buffer underflow`.
fn field(what: &str) -> Option<String> {
    let is_name = |text: &str| {
        !text.is_empty()
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
    };
    let segments = what.split(": ").map_while(|segment| {
        segment
            .split_once('.')
            .filter(|(message, name)| is_name(message) && is_name(name))
    });
    let fields: Vec<&str> = segments.map(|(_, name)| name).collect();
    (!fields.is_empty()).then(|| fields.join("."))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use holdfast_proto::v1::{
        self,
        cache_service_client::CacheServiceClient,
        cache_service_server::{CacheService, CacheServiceServer},
    };
    use tonic::Request;
    use tonic_types::StatusExt as _;

    use super::*;

    /// Answers a Set of any size that reaches it; the other verbs are not asked.
    struct Takes;

    #[tonic::async_trait]
    impl CacheService for Takes {
        type ScanStream = futures::stream::Empty<Result<v1::ScanResponse, Status>>;

        async fn set(
            &self,
            _: Request<v1::SetRequest>,
        ) -> Result<tonic::Response<v1::SetResponse>, Status> {
            Ok(tonic::Response::new(Default::default()))
        }
        async fn get(
            &self,
            _: Request<v1::GetRequest>,
        ) -> Result<tonic::Response<v1::GetResponse>, Status> {
            Err(Status::out_of_range("a handler's own"))
        }
        async fn batch_get(
            &self,
            _: Request<v1::BatchGetRequest>,
        ) -> Result<tonic::Response<v1::BatchGetResponse>, Status> {
            Ok(tonic::Response::new(Default::default()))
        }
        async fn delete(
            &self,
            _: Request<v1::DeleteRequest>,
        ) -> Result<tonic::Response<v1::DeleteResponse>, Status> {
            Ok(tonic::Response::new(Default::default()))
        }
        async fn invalidate(
            &self,
            _: Request<v1::InvalidateRequest>,
        ) -> Result<tonic::Response<v1::InvalidateResponse>, Status> {
            Ok(tonic::Response::new(Default::default()))
        }
        async fn inspect(
            &self,
            _: Request<v1::InspectRequest>,
        ) -> Result<tonic::Response<v1::InspectResponse>, Status> {
            Ok(tonic::Response::new(Default::default()))
        }
        async fn scan(
            &self,
            _: Request<v1::ScanRequest>,
        ) -> Result<tonic::Response<Self::ScanStream>, Status> {
            Ok(tonic::Response::new(futures::stream::empty()))
        }
    }

    #[tokio::test]
    async fn a_message_over_the_bound_is_told_as_a_size() {
        let service = CodecTold(CacheServiceServer::new(Takes).max_decoding_message_size(64));
        let mut client = CacheServiceClient::new(service);
        let set = |size: usize| v1::SetRequest {
            key: "k".into(),
            value: Bytes::from(vec![0; size]),
            ..Default::default()
        };
        client.set(set(10)).await.unwrap();

        let status = client.set(set(100)).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        let info = status.get_details_error_info().unwrap();
        assert_eq!(
            (info.reason.as_str(), info.metadata["field"].as_str()),
            (reason::TOO_LARGE, "value")
        );
        assert_eq!(info.metadata[reason::APPLIED], reason::APPLIED_NO);

        let keys = vec![Bytes::from(vec![0; 50]); 2];
        let status = client
            .batch_get(v1::BatchGetRequest {
                keys,
                ..Default::default()
            })
            .await
            .unwrap_err();
        assert_eq!(
            (
                status.code(),
                status
                    .get_details_error_info()
                    .unwrap()
                    .metadata
                    .get("field")
            ),
            (Code::ResourceExhausted, None)
        );

        let status = client.get(v1::GetRequest::default()).await.unwrap_err();
        assert_eq!(
            (status.code(), status.message()),
            (Code::OutOfRange, "a handler's own")
        );
    }

    #[test]
    fn a_malformed_message_names_the_field_that_cannot_be_read() {
        let said = "failed to decode Protobuf message: SetRequest.request_id: RequestId.client: buffer underflow";
        let error = malformed(said);
        assert_eq!(
            (error.code(), error.metadata(reason::FIELD)),
            (Code::InvalidArgument, Some("request_id.client"))
        );
        assert_eq!(
            malformed("failed to decode Protobuf message: invalid varint").metadata(reason::FIELD),
            None
        );
        assert_eq!(
            malformed("Missing request message.").code(),
            Code::InvalidArgument
        );
    }
}
