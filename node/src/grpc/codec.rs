//! A message that the codec refuses never reaches a handler. tonic answers one beyond the listener's
//! bound with OUT_OF_RANGE, and one that is no message of ours with INTERNAL; both are the caller's
//! mistakes, and are said here as every other mistake is. They are known by having no details, which
//! every status of ours has. Must never read a body.

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
    let Some(status) = response
        .extensions()
        .get::<Status>()
        .filter(|status| status.details().is_empty())
    else {
        return response;
    };
    let error = match status.code() {
        Code::OutOfRange => too_large(),
        Code::Internal => Error::new(
            reason::INVALID_FIELD,
            format!("the message cannot be read: {}", status.message()),
        ),
        _ => return response,
    };
    Status::from(error.not_applied()).into_http()
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
            Err(Error::new(reason::NOT_BUILT, "a handler's own").into())
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
            (Code::Unimplemented, "a handler's own")
        );
    }
}
