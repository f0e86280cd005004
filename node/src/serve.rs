//! Listening: ports taken before anything else, connections counted, and all of them ended within a
//! bounded time.
//!
//! A port is bound first and opened later: so its address is known, and a port in use said, before
//! the node's storage is touched, while nobody gets through to a node that turns out not to start.
//! Must never know what is served.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::{Server, server::Connected};

/// Connections of one listener; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 10_000;
const BACKLOG: u32 = 1024;
/// After an accept that failed, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long tasks may take to notice that their connections are gone.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Requests of one connection at once: a client library has one connection for all its callers.
const STREAMS_MAX: u32 = 2048;

#[derive(Debug, thiserror::Error)]
#[error("cannot listen for {purpose} on {address}: {error}")]
pub struct ListenError {
    pub purpose: &'static str,
    pub address: SocketAddr,
    pub error: io::Error,
}

/// A port that is taken and not open yet.
pub(crate) struct Bound {
    purpose: &'static str,
    socket: TcpSocket,
    address: SocketAddr,
}

/// Something that serves, and the two ways to end it.
pub(crate) struct Serving {
    /// No new requests.
    drain: CancellationToken,
    /// No more connections.
    close: CancellationToken,
    task: JoinHandle<()>,
}

/// HTTP/2 windows of a listener, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    pub(crate) stream: u32,
    pub(crate) connection: u32,
}

/// One accepted connection, which ends when its listener is closed.
pub(crate) struct Connection {
    stream: TcpStream,
    end: CancellationToken,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
    _counted: OwnedSemaphorePermit,
}

/// Who is at the other end of a connection. In the extensions of every request.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    end: CancellationToken,
}

impl Caller {
    /// Ends its connection, and with it all that it asked for.
    pub(crate) fn end(&self) {
        self.end.cancel();
    }
}

impl Bound {
    /// `purpose` is for the error: `clients`.
    pub(crate) fn bind(purpose: &'static str, address: SocketAddr) -> Result<Self, ListenError> {
        let failed = |error| ListenError {
            purpose,
            address,
            error,
        };
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }
        .map_err(failed)?;
        // A restart must not wait for the old connections to be forgotten. A port that the kernel
        // picks must be nobody's.
        socket.set_reuseaddr(address.port() != 0).map_err(failed)?;
        socket.bind(address).map_err(failed)?;
        let address = socket.local_addr().map_err(failed)?;
        Ok(Self {
            purpose,
            socket,
            address,
        })
    }

    /// The port is the one that was bound, also where any would do.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn open(self) -> Result<TcpListener, ListenError> {
        let Self {
            purpose,
            socket,
            address,
        } = self;
        socket.listen(BACKLOG).map_err(|error| ListenError {
            purpose,
            address,
            error,
        })
    }
}

impl Serving {
    /// Starts what `serve` makes of the two tokens: the first means no new requests, the second no
    /// more connections.
    pub(crate) fn start<F>(serve: impl FnOnce(CancellationToken, CancellationToken) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (drain, close) = (CancellationToken::new(), CancellationToken::new());
        let task = holdfast_raft::task::spawn(serve(drain.clone(), close.clone()));
        Self { drain, close, task }
    }

    /// Lets the requests in flight end for so long, then closes their connections.
    pub(crate) async fn stop(mut self, grace: Duration) {
        self.drain.cancel();
        if tokio::time::timeout(grace, &mut self.task).await.is_ok() {
            return;
        }
        self.close.cancel();
        if tokio::time::timeout(CLOSE_TIMEOUT, &mut self.task)
            .await
            .is_err()
        {
            self.task.abort();
        }
    }
}

/// A server with the settings of both gRPC listeners.
pub(crate) fn server(windows: Windows) -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(windows.stream)
        .initial_connection_window_size(windows.connection)
}

/// The connections of a listener. Does not end and does not fail: an accept that fails is tried
/// again.
pub(crate) fn connections(
    listener: TcpListener,
    close: CancellationToken,
) -> impl Stream<Item = io::Result<Connection>> {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    futures::stream::unfold(
        (listener, room, close),
        |(listener, room, close)| async move {
            let counted = room.clone().acquire_owned().await.ok()?;
            let stream = accept(&listener).await;
            let end = close.child_token();
            let closed = Box::pin(end.clone().cancelled_owned());
            Some((
                Ok(Connection {
                    stream,
                    end,
                    closed,
                    _counted: counted,
                }),
                (listener, room, close),
            ))
        },
    )
}

async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Without it a small answer waits for the acknowledgement of the one before.
                let _ = stream.set_nodelay(true);
                return stream;
            }
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        // Looked at only where the connection would sleep: it is for waking it.
        if read.is_pending() && self.closed.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        Caller {
            end: self.end.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::io::AsyncReadExt;

    use super::*;

    fn loopback(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    #[tokio::test]
    async fn a_port_is_known_before_it_is_open_and_refused_while_it_is_used() {
        let bound = Bound::bind("clients", loopback(0)).unwrap();
        let address = bound.address();
        assert_ne!(address.port(), 0);
        assert!(
            TcpStream::connect(address).await.is_err(),
            "it must not be open yet"
        );
        let _listener = bound.open().unwrap();
        TcpStream::connect(address).await.unwrap();

        let error = Bound::bind("peers", address).err().unwrap();
        assert_eq!(error.error.kind(), io::ErrorKind::AddrInUse);
        assert!(
            error
                .to_string()
                .starts_with(&format!("cannot listen for peers on {address}: ")),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_ends_when_its_listener_is_closed() {
        let bound = Bound::bind("clients", loopback(0)).unwrap();
        let address = bound.address();
        let close = CancellationToken::new();
        let mut accepted = Box::pin(connections(bound.open().unwrap(), close.clone()));
        let _client = TcpStream::connect(address).await.unwrap();
        let mut connection = accepted.next().await.unwrap().unwrap();
        let reading = tokio::spawn(async move { connection.read_u8().await });
        close.cancel();
        assert_eq!(
            reading.await.unwrap().unwrap_err().kind(),
            io::ErrorKind::ConnectionAborted
        );
    }

    #[tokio::test]
    async fn what_does_not_end_by_itself_is_closed() {
        let serving = Serving::start(|_drain, close| async move { close.cancelled().await });
        let close = serving.close.clone();
        serving.stop(Duration::ZERO).await;
        assert!(close.is_cancelled());
        Serving::start(|_, _| std::future::pending())
            .stop(Duration::ZERO)
            .await;
    }
}
