//! The one layer around every request of the client listener: what `operation` does around one
//! question, for one that comes as an HTTP request.
//!
//! Promises that a request is refused before a byte of it is read, that its bytes are counted as they
//! arrive, because gRPC does not announce them, and that it is under way until the last byte of its
//! answer is taken. Must never know what a request asks for: only its path, its headers and its size.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use holdfast_proto::{limits::CLIENT_MESSAGE_BYTES_MAX, reason};
use http_body::{Body, Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Status, body::Body as TonicBody};
use tower::{Layer, Service};
use tracing::Instrument as _;

use super::trace;
use crate::{
    error::Error,
    methods::Method,
    operation::{Operation, Operations},
    serve::Caller,
};

type Response = http::Response<Leaving>;

#[derive(Debug, Clone)]
pub struct OperationLayer {
    operations: Arc<Operations>,
}

#[derive(Debug, Clone)]
pub struct Operated<S> {
    inner: S,
    operations: Arc<Operations>,
}

/// A request's body; its bytes count while their operation is under way.
#[derive(Debug)]
pub struct Arriving<B> {
    body: B,
    operation: Arc<Operation>,
}

/// An answer's body, which keeps its operation under way.
#[derive(Debug)]
pub struct Leaving {
    body: TonicBody,
    operation: Option<Arc<Operation>>,
}

/// Bytes of an answer, and what they take: HTTP/2 holds them back long after the body that they came
/// from is gone.
struct Taking {
    bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
    _operation: Arc<Operation>,
}

impl OperationLayer {
    pub fn new(operations: Arc<Operations>) -> Self {
        Self { operations }
    }
}

impl<S> Layer<S> for OperationLayer {
    type Service = Operated<S>;

    fn layer(&self, inner: S) -> Operated<S> {
        Operated {
            inner,
            operations: self.operations.clone(),
        }
    }
}

impl<S, B> Service<http::Request<B>> for Operated<S>
where
    S: Service<
            http::Request<Arriving<B>>,
            Response = http::Response<TonicBody>,
            Error = Infallible,
            Future: Send + 'static,
        >,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let method = Method::of(request.uri().path());
        let span = trace::request(method.name, request.headers());
        let caller = request.extensions().get::<Caller>().cloned();
        let begun = span.in_scope(|| self.operations.begin(method, timeout_of(&request), caller));
        let operation = match begun {
            Ok(operation) => operation,
            Err(refused) => {
                let answer = Status::from(refused).into_http();
                return Box::pin(std::future::ready(Ok(answer.map(Leaving::at_once))));
            }
        };
        request.extensions_mut().insert(operation.clone());
        let arriving = request.map(|body| Arriving {
            body,
            operation: operation.clone(),
        });
        let answer = span.in_scope(|| self.inner.call(arriving));
        Box::pin(answered(operation, answer).instrument(span))
    }
}

async fn answered(
    operation: Arc<Operation>,
    answer: impl Future<Output = Result<http::Response<TonicBody>, Infallible>>,
) -> Result<Response, Infallible> {
    let answer = match operation.in_time(answer).await {
        Ok(Ok(answer)) => of_codec(answer, operation.method()),
        Err(late) => Status::from(late).into_http(),
    };
    // What the rules answered is counted already, or is when its stream ends.
    match answer.extensions().get::<Status>() {
        Some(status) => operation.ended(status.code().into(), ""),
        None if !operation.method().is_ours() => operation.ended(crate::error::Code::Ok, ""),
        None => {}
    }
    Ok(answer.map(|body| Leaving {
        body,
        operation: Some(operation),
    }))
}

/// As the caller named it.
fn timeout_of<B>(request: &http::Request<B>) -> Option<Duration> {
    holdfast_proto::timeout::parse(request.headers().get("grpc-timeout")?.to_str().ok()?)
}

/// A message that the codec refuses never reaches a handler. tonic answers one beyond its bound with
/// OUT_OF_RANGE, and one that is no message of ours with INTERNAL; both are the caller's mistakes,
/// and are said here as every other mistake is. They are known by having no details, which every
/// status of ours has.
fn of_codec(answer: http::Response<TonicBody>, method: &Method) -> http::Response<TonicBody> {
    let Some(status) = answer
        .extensions()
        .get::<Status>()
        .filter(|status| method.is_ours() && status.details().is_empty())
    else {
        return answer;
    };
    let error = match status.code() {
        Code::OutOfRange => too_large(method),
        Code::Internal => Error::new(
            reason::INVALID_FIELD,
            format!("the message cannot be read: {}", status.message()),
        ),
        _ => return answer,
    };
    Status::from(error.not_applied()).into_http()
}

/// Of a Set only the value can be so large.
fn too_large(method: &Method) -> Error {
    let message = format!("the message has more than {CLIENT_MESSAGE_BYTES_MAX} bytes");
    match method.has_value {
        true => Error::too_large("value", message),
        false => Error::new(reason::TOO_LARGE, message),
    }
}

impl<B> Body for Arriving<B>
where
    B: Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>> + Unpin,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(context).map(|frame| {
            let frame = match frame? {
                Ok(frame) => frame,
                Err(error) => return Some(Err(Status::from_error(error.into()))),
            };
            let bytes = frame.data_ref().map_or(0, Bytes::len);
            let counted = self.operation.request_came(bytes);
            Some(counted.map(|()| frame).map_err(Status::from))
        })
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl Leaving {
    /// An answer to what was never under way.
    fn at_once(body: TonicBody) -> Self {
        Self {
            body,
            operation: None,
        }
    }

    fn taken(&self, bytes: Bytes) -> Bytes {
        let Some(operation) = self.operation.clone() else {
            return bytes;
        };
        let place = operation.call().place();
        Bytes::from_owner(Taking {
            _room: place.and_then(|place| place.answered(bytes.len())),
            _operation: operation,
            bytes,
        })
    }
}

impl Body for Leaving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = Pin::new(&mut self.body).poll_frame(context);
        frame.map(|frame| Some(frame?.map(|frame| frame.map_data(|bytes| self.taken(bytes)))))
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl AsRef<[u8]> for Taking {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}
