//! Listening: ports taken before anything else, connections counted, and all of them ended within a
//! bounded time.
//!
//! A port is bound first and opened later: so its address is known, and a port in use said, before
//! the node's storage is touched, while nobody gets through to a node that turns out not to start.
//! Promises that a listener never takes more connections than its terms say, nor the process's last
//! descriptors; that who says nothing is not kept, and makes room for who does. Must never know what
//! is served.

mod connections;
mod listeners;

use std::{
    convert::Infallible, io, net::SocketAddr, os::fd::AsRawFd as _, sync::Arc, time::Duration,
};

use bytes::Bytes;
use holdfast_raft::{
    Events,
    task::{self, Tasks},
};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::{Service, ServiceExt as _};
use tracing::Instrument as _;

use self::connections::InFlight;
pub(crate) use self::{
    connections::{Caller, Connections, Terms},
    listeners::Listeners,
};

const BACKLOG: u32 = 1024;
/// After an accept that failed, most likely for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How often connections are looked through for those that are over.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How long tasks may take to notice that their connections are gone.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);
/// For the head of an HTTP/1 request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

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
    tasks: Tasks,
}

/// What a listener speaks.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Protocol {
    Http1,
    Http2(Windows),
}

/// HTTP/2 windows of a listener, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Windows {
    pub(crate) stream: u32,
    pub(crate) connection: u32,
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
    pub(crate) fn start<F>(
        events: Arc<dyn Events>,
        serve: impl FnOnce(CancellationToken, CancellationToken) -> F,
    ) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (drain, close) = (CancellationToken::new(), CancellationToken::new());
        let tasks = Tasks::new(events);
        tasks.essential("listener", serve(drain.clone(), close.clone()));
        Self {
            drain,
            close,
            tasks,
        }
    }

    /// Why it serves no more; does not return while it does.
    pub(crate) async fn failed(&self) -> String {
        self.tasks.failed().await
    }

    /// Lets the requests in flight end for so long, then closes their connections.
    pub(crate) async fn stop(self, grace: Duration) {
        self.drain.cancel();
        if tokio::time::timeout(grace, self.tasks.ended())
            .await
            .is_ok()
        {
            return;
        }
        self.close.cancel();
        if tokio::time::timeout(CLOSE_TIMEOUT, self.tasks.ended())
            .await
            .is_err()
        {
            self.tasks.stop().await;
        }
    }
}

/// Serves a listener's connections until `drain`, then those that are left until they end or
/// `close`. An accept that fails is tried again.
pub(crate) async fn serve<S, B>(
    listener: TcpListener,
    protocol: Protocol,
    connections: Arc<Connections>,
    service: S,
    (drain, close): (CancellationToken, CancellationToken),
) where
    S: Service<http::Request<Incoming>, Response = http::Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: http_body::Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>
        + Send
        + Unpin
        + 'static,
{
    let tasks = TaskTracker::new();
    let mut sweep = task::every(SWEEP_EVERY);
    loop {
        let stream = tokio::select! {
            stream = listener.accept() => stream,
            _ = sweep.tick() => {
                connections.sweep();
                continue;
            }
            () = drain.cancelled() => break,
        };
        let stream = match stream {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Dropped at once where there is no room: its caller is told so, and the kernel's queue
        // stays short.
        if let Some(caller) = connections.admit(stream.as_raw_fd(), &close) {
            let served = connection(stream, protocol, caller, service.clone(), drain.clone());
            drop(tasks.spawn(served.in_current_span()));
        }
    }
    drop(listener);
    tasks.close();
    loop {
        tokio::select! {
            () = tasks.wait() => return,
            _ = sweep.tick() => connections.sweep(),
        }
    }
}

/// One connection, from its first byte to its end.
async fn connection<S, B>(
    stream: TcpStream,
    protocol: Protocol,
    caller: Caller,
    service: S,
    drain: CancellationToken,
) where
    S: Service<http::Request<Incoming>, Response = http::Response<B>, Error = Infallible>
        + Clone
        + Send
        + 'static,
    S::Future: Send,
    B: http_body::Body<Data = Bytes, Error: Into<Box<dyn std::error::Error + Send + Sync>>>
        + Send
        + Unpin
        + 'static,
{
    // Without it a small answer waits for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let known = caller.clone();
    let asked = move |mut request: http::Request<Incoming>| {
        let in_flight = InFlight::of(known.clone());
        request.extensions_mut().insert(known.clone());
        let answer = service.clone().oneshot(request);
        async move { Ok::<_, Infallible>(answer.await?.map(|body| in_flight.holds(body))) }
    };
    let builder = builder(protocol);
    let mut connection =
        std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service_fn(asked)));
    let mut is_ending = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error, "a connection ended");
                }
                return;
            }
            () = caller.ended() => return,
            () = caller.asked_to_leave(), if !is_ending => {
                is_ending = true;
                connection.as_mut().graceful_shutdown();
            }
            () = drain.cancelled(), if !is_ending => {
                is_ending = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

fn builder(protocol: Protocol) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    match protocol {
        Protocol::Http1 => {
            builder
                .http1()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT);
            builder.http1_only()
        }
        Protocol::Http2(windows) => {
            builder
                .http2()
                .timer(TokioTimer::new())
                .keep_alive_interval(KEEPALIVE_INTERVAL)
                .keep_alive_timeout(KEEPALIVE_TIMEOUT)
                .max_concurrent_streams(STREAMS_MAX)
                .initial_stream_window_size(windows.stream)
                .initial_connection_window_size(windows.connection);
            builder.http2_only()
        }
    }
}

#[cfg(test)]
mod tests {
    use holdfast_raft::Clock;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

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

    const TERMS: Terms = Terms {
        listener: "test",
        connections_max: 2,
        descriptors_max: u64::MAX,
        idle: Duration::from_secs(60),
        busy: None,
    };
    const HTTP2: Protocol = Protocol::Http2(Windows {
        stream: 1 << 20,
        connection: 1 << 20,
    });

    /// A listener that answers each request with nothing.
    fn listening(protocol: Protocol, clock: Clock) -> (SocketAddr, Arc<Connections>, Serving) {
        let bound = Bound::bind("clients", loopback(0)).unwrap();
        let (address, listener) = (bound.address(), bound.open().unwrap());
        let connections = Connections::new(TERMS, clock);
        let known = connections.clone();
        let service = tower::service_fn(|_| async {
            Ok::<_, Infallible>(http::Response::new(axum::body::Body::empty()))
        });
        let serving = Serving::start(Arc::new(()), |drain, close| async move {
            serve(listener, protocol, known, service, (drain, close)).await;
        });
        (address, connections, serving)
    }

    /// What comes until the other side ends the connection; panics if it does not.
    async fn until_ended(stream: &mut TcpStream) -> Vec<u8> {
        let mut read = Vec::new();
        let ended = stream.read_to_end(&mut read);
        let _ = tokio::time::timeout(Duration::from_secs(20), ended)
            .await
            .expect("the connection ends in time");
        read
    }

    async fn counted(connections: &Connections, count: usize) {
        let reached = async {
            while connections.count() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), reached)
            .await
            .expect("so many connections in time");
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_or_half_a_preface_ends_by_itself() {
        for (protocol, begins) in [
            (Protocol::Http1, "GET / HT"),
            (Protocol::Http1, ""),
            (HTTP2, "PRI * HTTP/2.0\r\n"),
            (HTTP2, ""),
            (
                HTTP2,
                "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0",
            ),
        ] {
            let clock = Clock::system();
            let (address, connections, serving) = listening(protocol, clock.clone());
            let mut silent = TcpStream::connect(address).await.unwrap();
            silent.write_all(begins.as_bytes()).await.unwrap();
            counted(&connections, 1).await;
            clock.advance(Duration::from_secs(15));
            until_ended(&mut silent).await;
            counted(&connections, 0).await;
            serving.stop(Duration::ZERO).await;
        }
    }

    #[tokio::test]
    async fn who_is_idle_for_too_long_is_let_go_after_its_answers() {
        let clock = Clock::system();
        let (address, connections, serving) = listening(Protocol::Http1, clock.clone());
        let mut caller = TcpStream::connect(address).await.unwrap();
        caller
            .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            .await
            .unwrap();
        let mut begin = [0; 12];
        caller.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin, b"HTTP/1.1 200");
        clock.advance(Duration::from_secs(30));
        tokio::time::sleep(2 * SWEEP_EVERY).await;
        assert_eq!(connections.count(), 1);
        clock.advance(Duration::from_secs(30));
        until_ended(&mut caller).await;
        counted(&connections, 0).await;
        serving.stop(Duration::ZERO).await;
    }

    #[tokio::test]
    async fn silent_connections_keep_nobody_out() {
        let (address, connections, serving) = listening(Protocol::Http1, Clock::system());
        let mut silent = Vec::new();
        for _ in 0..2 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        counted(&connections, 2).await;
        let request = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let answered = async {
            loop {
                let mut caller = TcpStream::connect(address).await.unwrap();
                let _ = caller.write_all(request).await;
                if until_ended(&mut caller).await.starts_with(b"HTTP/1.1 200") {
                    return;
                }
            }
        };
        tokio::time::timeout(Duration::from_secs(5), answered)
            .await
            .expect("there is room long before the silent ones end by themselves");
        serving.stop(Duration::ZERO).await;
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_ends_when_its_listener_is_closed() {
        let (address, connections, serving) = listening(HTTP2, Clock::system());
        let mut silent = TcpStream::connect(address).await.unwrap();
        counted(&connections, 1).await;
        serving.stop(Duration::ZERO).await;
        until_ended(&mut silent).await;
        assert_eq!(connections.count(), 0);
    }

    #[tokio::test]
    async fn a_listener_that_panics_says_so() {
        let serving = Serving::start(Arc::new(()), |_, _| async { panic!("it stops") });
        let why = serving.failed().await;
        assert!(why.contains("listener"), "{why}");
    }

    #[tokio::test]
    async fn what_does_not_end_by_itself_is_closed() {
        let serving = Serving::start(Arc::new(()), |_drain, close| async move {
            close.cancelled().await
        });
        let close = serving.close.clone();
        serving.stop(Duration::ZERO).await;
        assert!(close.is_cancelled());
        Serving::start(Arc::new(()), |_, _| std::future::pending())
            .stop(Duration::ZERO)
            .await;
    }
}
