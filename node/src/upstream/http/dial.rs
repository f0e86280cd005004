//! A new connection: the name resolved, every address of it tried, TLS where it is asked for.
//!
//! Promises an end within the connect timeout, that one dead address of several costs a quarter of
//! a second (RFC 8305), and that no address is dialled that the request may not reach: it is the
//! address that is judged, not the name. Must never know what is asked for.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use holdfast_proto::v1::FailureClass;
use holdfast_raft::Clock;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio_rustls::TlsConnector;
use url::Host;

use super::connection::Connection;
use super::endpoint::Endpoint;
use super::redirect::Reach;

/// How long an address may be tried alone (RFC 8305 §5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 16;
/// Look-ups of one upstream at a time. They take threads that disk reads need too, and one that
/// hangs keeps its thread though nobody waits for it.
const LOOK_UPS_MAX: usize = 4;

pub(super) struct Dialer {
    tls: TlsConnector,
    connect_timeout: Duration,
    look_ups: Arc<Semaphore>,
    clock: Clock,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("connecting took longer than the connect timeout")]
    Timeout,
    #[error("the name cannot be resolved: {0}")]
    Resolve(io::Error),
    #[error("no address of the redirect's host may be reached")]
    Forbidden,
    #[error("no connection: {0}")]
    Connect(io::Error),
    #[error("no tls: {0}")]
    Tls(io::Error),
    #[error("no http: {0}")]
    Handshake(#[from] hyper::Error),
}

impl Dialer {
    pub(super) fn new(tls: ClientConfig, connect_timeout: Duration, clock: Clock) -> Self {
        Self {
            tls: TlsConnector::from(Arc::new(tls)),
            connect_timeout,
            look_ups: Arc::new(Semaphore::new(LOOK_UPS_MAX)),
            clock,
        }
    }

    pub(super) async fn dial(
        &self,
        endpoint: &Endpoint,
        reach: &Reach,
    ) -> Result<Connection, DialError> {
        tokio::time::timeout(
            self.connect_timeout,
            Box::pin(self.connect(endpoint, reach)),
        )
        .await
        .unwrap_or(Err(DialError::Timeout))
    }

    async fn connect(&self, endpoint: &Endpoint, reach: &Reach) -> Result<Connection, DialError> {
        let dialled_at = self.clock.monotonic();
        let mut addresses = self.resolve(endpoint).await.map_err(DialError::Resolve)?;
        addresses.retain(|address| reach.permits(*address));
        if addresses.is_empty() {
            return Err(DialError::Forbidden);
        }
        let stream = first_to_answer(interleaved(addresses))
            .await
            .map_err(DialError::Connect)?;
        let address = stream.peer_addr().map_err(DialError::Connect)?;
        stream.set_nodelay(true).map_err(DialError::Connect)?;
        if !endpoint.is_tls {
            return Ok(
                Connection::open(stream, false, endpoint.clone(), address, dialled_at).await?,
            );
        }
        let stream = self
            .tls
            .connect(server_name(&endpoint.host)?, stream)
            .await
            .map_err(DialError::Tls)?;
        let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
        Ok(Connection::open(stream, is_http2, endpoint.clone(), address, dialled_at).await?)
    }

    /// At least one address.
    async fn resolve(&self, endpoint: &Endpoint) -> io::Result<Vec<SocketAddr>> {
        let port = endpoint.port;
        let name = match &endpoint.host {
            Host::Ipv4(ip) => return Ok(vec![SocketAddr::new(IpAddr::V4(*ip), port)]),
            Host::Ipv6(ip) => return Ok(vec![SocketAddr::new(IpAddr::V6(*ip), port)]),
            Host::Domain(name) => name.clone(),
        };
        let permit = self
            .look_ups
            .clone()
            .acquire_owned()
            .await
            .map_err(io::Error::other)?;
        let found = holdfast_raft::task::blocking(move || {
            let _held_until_the_look_up_ends = permit;
            (name.as_str(), port)
                .to_socket_addrs()
                .map(|addresses| addresses.take(ADDRESSES_MAX).collect::<Vec<_>>())
        });
        let addresses = found.await.map_err(io::Error::other)??;
        if addresses.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no address"));
        }
        Ok(addresses)
    }
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

impl DialError {
    pub(super) fn class(&self) -> FailureClass {
        match self {
            Self::Forbidden => FailureClass::Redirect,
            _ => FailureClass::Connect,
        }
    }
}

fn server_name(host: &Host) -> Result<ServerName<'static>, DialError> {
    match host {
        Host::Ipv4(ip) => Ok(IpAddr::V4(*ip).into()),
        Host::Ipv6(ip) => Ok(IpAddr::V6(*ip).into()),
        Host::Domain(name) => ServerName::try_from(name.clone())
            .map_err(|error| DialError::Tls(io::Error::other(error))),
    }
}

/// The families in turn, the system's first choice first: of a host whose IPv6 is dead the second
/// address tried is IPv4 (RFC 8305 §4).
fn interleaved(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_ipv6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (preferred, others): (Vec<_>, Vec<_>) = addresses
        .into_iter()
        .partition(|address| address.is_ipv6() == first_is_ipv6);
    let mut others = others.into_iter();
    let mut in_turn: Vec<SocketAddr> = preferred
        .into_iter()
        .flat_map(|address| [Some(address), others.next()])
        .flatten()
        .collect();
    in_turn.extend(others);
    in_turn
}

/// Each is given a head start over the next; one that fails gives way at once.
async fn first_to_answer(addresses: Vec<SocketAddr>) -> io::Result<TcpStream> {
    let mut ahead = addresses.into_iter().peekable();
    let mut attempts = FuturesUnordered::new();
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "no address");
    loop {
        attempts.extend(ahead.next().map(TcpStream::connect));
        tokio::select! {
            answered = attempts.next() => match answered {
                Some(Ok(stream)) => return Ok(stream),
                Some(Err(error)) => failed = error,
                None => return Err(failed),
            },
            () = tokio::time::sleep(ATTEMPT_DELAY), if ahead.peek().is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_families_take_turns() {
        let in_turn = |addresses: &[&str]| {
            let addresses = addresses.iter().map(|text| text.parse().unwrap());
            interleaved(addresses.collect())
                .iter()
                .map(SocketAddr::to_string)
                .collect::<Vec<_>>()
        };
        assert_eq!(
            in_turn(&["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1"]),
            ["[::1]:1", "1.1.1.1:1", "[::2]:1", "[::3]:1"]
        );
        assert_eq!(
            in_turn(&["1.1.1.1:1", "[::1]:1", "[::2]:1"]),
            ["1.1.1.1:1", "[::1]:1", "[::2]:1"]
        );
    }

    #[tokio::test]
    async fn an_address_that_refuses_gives_way_and_one_that_is_silent_is_overtaken() {
        let good = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let refusing = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (good, refused) = (good.local_addr().unwrap(), refusing.local_addr().unwrap());
        drop(refusing);
        // A listener whose backlog is full does not answer.
        let silent = tokio::net::TcpSocket::new_v4().unwrap();
        silent.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let silent = silent.listen(0).unwrap();
        let mut waiting = Vec::new();
        let full = silent.local_addr().unwrap();
        while let Ok(Ok(stream)) =
            tokio::time::timeout(Duration::from_millis(200), TcpStream::connect(full)).await
        {
            waiting.push(stream);
        }
        let reached = first_to_answer(vec![refused, full, good]);
        let reached = tokio::time::timeout(Duration::from_secs(20), reached).await;
        let reached = reached.expect("the silent one is overtaken").unwrap();
        assert_eq!(reached.peer_addr().unwrap(), good);
        assert!(first_to_answer(vec![refused, refused]).await.is_err());
        assert!(first_to_answer(Vec::new()).await.is_err());
    }
}
