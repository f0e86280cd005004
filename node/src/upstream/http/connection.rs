//! One connection to an origin: HTTP/1.1 with a request at a time, or HTTP/2 shared by many.
//!
//! Promises that the socket closes with the last holder: a fetch that is given up gives up its
//! connection. Must never know what is asked for, or who else waits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::task::AbortOnDropHandle;

use super::endpoint::Endpoint;

/// A request without a body: all that is sent are GETs.
pub(super) type Head = Request<Empty<Bytes>>;

/// A connection over which nothing comes for so long is asked whether it lives …
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// … and is closed without an answer after so long.
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// What one stream and all of them may send before it is read.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Response headers, as HTTP/2 counts them.
const HEADER_LIST_BYTES_MAX: u32 = 64 << 10;
/// An HTTP/1.1 connection is idle a moment after its last body ended, when its task has run.
const READY_TIMEOUT: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) endpoint: Endpoint,
    /// What was dialled: names may lead elsewhere by now.
    pub(super) address: SocketAddr,
    /// On the monotonic clock.
    pub(super) dialled_at: Duration,
    sender: Sender,
    driver: Arc<AbortOnDropHandle<()>>,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Empty<Bytes>>),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

impl Connection {
    pub(super) async fn open(
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        is_http2: bool,
        endpoint: Endpoint,
        address: SocketAddr,
        dialled_at: Duration,
    ) -> hyper::Result<Self> {
        let io = TokioIo::new(io);
        // Not in the span of the fetch that happened to dial: the connection outlives it.
        let (sender, driver) = if is_http2 {
            let (sender, connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(PING_INTERVAL)
                .keep_alive_timeout(PING_TIMEOUT)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_header_list_size(HEADER_LIST_BYTES_MAX)
                .handshake(io)
                .await?;
            let driver = tokio::spawn(async move { _ = connection.await });
            (Sender::Http2(sender), driver)
        } else {
            let (sender, connection) = http1::Builder::new().handshake(io).await?;
            let driver = tokio::spawn(async move { _ = connection.await });
            (Sender::Http1(sender), driver)
        };
        Ok(Self {
            endpoint,
            address,
            dialled_at,
            sender,
            driver: Arc::new(AbortOnDropHandle::new(driver)),
        })
    }

    /// Another holder of the same connection, if it can have many.
    pub(super) fn share(&self) -> Option<Self> {
        let Sender::Http2(sender) = &self.sender else {
            return None;
        };
        Some(Self {
            endpoint: self.endpoint.clone(),
            sender: Sender::Http2(sender.clone()),
            driver: self.driver.clone(),
            ..*self
        })
    }

    pub(super) fn is_http2(&self) -> bool {
        matches!(self.sender, Sender::Http2(_))
    }

    pub(super) fn is_closed(&self) -> bool {
        match &self.sender {
            Sender::Http1(sender) => sender.is_closed(),
            Sender::Http2(sender) => sender.is_closed(),
        }
    }

    /// Whether it takes another request.
    pub(super) async fn is_ready(&mut self) -> bool {
        let ready = async {
            match &mut self.sender {
                Sender::Http1(sender) => sender.ready().await,
                Sender::Http2(sender) => sender.ready().await,
            }
        };
        matches!(tokio::time::timeout(READY_TIMEOUT, ready).await, Ok(Ok(())))
    }

    /// Returns with the head of the answer; this must live until its body is read.
    pub(super) async fn send(&mut self, head: Head) -> hyper::Result<Response<Incoming>> {
        match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(head).await,
            Sender::Http2(sender) => sender.send_request(head).await,
        }
    }
}
