//! An upstream under the test's command: counts what it is asked, and answers, stalls, breaks off
//! or hangs as told.
//!
//! Promises real HTTP/1.1 on a port of its own that stays its own while it is stopped. Speaks TCP
//! itself rather than through a server library, because half of what it is for is what no library
//! lets a server do. Must never know what asks it.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use parking_lot::Mutex;
use tokio::io::{self, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Requests remembered; older ones are counted only.
const REQUESTS_KEPT: usize = 10_000;
/// What a streamed body is made of.
static BLOCK: [u8; 16 << 10] = [b'x'; 16 << 10];
/// Longest request head read.
const HEAD_BYTES_MAX: u64 = 64 << 10;

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
}

/// What the origin does with a call.
#[derive(Clone)]
pub enum Behaviour {
    Answer(Answer),
    /// Makes the answer from the target (path and query) and the number of the call at that path,
    /// counted from 1.
    Compute(Arc<Compute>),
    /// Does `then` once the gate opens.
    Stall {
        gate: Gate,
        then: Box<Behaviour>,
    },
    /// Does `then` after that time.
    Delay {
        by: Duration,
        then: Box<Behaviour>,
    },
    /// Chosen by the number of the call on its connection, counted from 1.
    PerConnection(Arc<Choose>),
    /// Takes the call and never answers.
    Hang,
    /// Closes the connection without an answer.
    Close,
    /// Sends the head of an answer with this Content-Length, then these bytes, then closes.
    CutShort {
        content_length: u64,
        answer: Answer,
    },
    /// Sends a body of that many bytes, in chunks of unknown total.
    Stream {
        content_type: String,
        bytes: u64,
    },
    /// Sends a byte of an endless body at each interval.
    Trickle {
        interval: Duration,
    },
    /// Sends exactly these bytes and closes.
    Raw(Bytes),
}

/// Of the target and the number of the call.
type Compute = dyn Fn(&str, u64) -> Answer + Send + Sync;

type Choose = dyn Fn(u64) -> Behaviour + Send + Sync;

/// Holds calls back until it is opened; stays open then. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate(watch::Sender<bool>);

/// One call as it arrived.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub target: String,
    pub headers: HeaderMap,
}

/// The server. Dropping it closes every connection.
pub struct Origin {
    address: SocketAddr,
    shared: Arc<Shared>,
    running: Option<JoinHandle<()>>,
    /// Holds the port while stopped: bound and not listening, so that connecting is refused.
    reserved: Option<TcpSocket>,
}

impl Answer {
    pub fn new(status: u16, content_type: &str, body: impl Into<Bytes>) -> Self {
        Self {
            status,
            headers: vec![("content-type".to_owned(), content_type.to_owned())],
            body: body.into(),
        }
    }

    pub fn json(body: impl Into<Bytes>) -> Self {
        Self::new(200, "application/json", body)
    }

    pub fn text(body: impl Into<Bytes>) -> Self {
        Self::new(200, "text/plain", body)
    }

    pub fn status(status: u16) -> Self {
        Self::new(
            status,
            "text/plain",
            StatusCode::from_u16(status)
                .map(|s| s.to_string())
                .unwrap_or_default(),
        )
    }

    /// With one more header.
    pub fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

impl Behaviour {
    pub fn json(body: impl Into<Bytes>) -> Self {
        Self::Answer(Answer::json(body))
    }

    pub fn text(body: impl Into<Bytes>) -> Self {
        Self::Answer(Answer::text(body))
    }

    pub fn status(status: u16) -> Self {
        Self::Answer(Answer::status(status))
    }

    pub fn redirect(status: u16, location: impl Into<String>) -> Self {
        Self::Answer(Answer::status(status).header("location", location))
    }

    pub fn compute(answer: impl Fn(&str, u64) -> Answer + Send + Sync + 'static) -> Self {
        Self::Compute(Arc::new(answer))
    }

    pub fn per_connection(choose: impl Fn(u64) -> Self + Send + Sync + 'static) -> Self {
        Self::PerConnection(Arc::new(choose))
    }

    /// This, once the gate opens.
    pub fn after(self, gate: &Gate) -> Self {
        Self::Stall {
            gate: gate.clone(),
            then: Box::new(self),
        }
    }

    /// This, that much later.
    pub fn delayed(self, by: Duration) -> Self {
        Self::Delay {
            by,
            then: Box::new(self),
        }
    }
}

impl fmt::Debug for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer(answer) => write!(f, "Answer({})", answer.status),
            Self::Compute(_) => f.write_str("Compute"),
            Self::PerConnection(_) => f.write_str("PerConnection"),
            Self::Stall { then, .. } => write!(f, "Stall({then:?})"),
            Self::Delay { by, then } => write!(f, "Delay({by:?}, {then:?})"),
            Self::Hang => f.write_str("Hang"),
            Self::Close => f.write_str("Close"),
            Self::CutShort { content_length, .. } => write!(f, "CutShort({content_length})"),
            Self::Stream { bytes, .. } => write!(f, "Stream({bytes})"),
            Self::Trickle { interval } => write!(f, "Trickle({interval:?})"),
            Self::Raw(bytes) => write!(f, "Raw({} bytes)", bytes.len()),
        }
    }
}

impl Gate {
    pub fn closed() -> Self {
        Self(watch::Sender::new(false))
    }

    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn passed(&self) {
        // The sender is in self, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|open| *open).await;
    }
}

impl Default for Gate {
    fn default() -> Self {
        Self::closed()
    }
}

impl Origin {
    /// Listens on a free port of 127.0.0.1 and answers every call with status 200 and the JSON
    /// `{}`.
    pub async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new()),
            calls: watch::Sender::new(0),
            open: watch::Sender::new(0),
        });
        let running = Some(tokio::spawn(accept(listener, shared.clone())));
        Ok(Self {
            address,
            shared,
            running,
            reserved: None,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of a path, which may hold placeholders and must start with `/`.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// From the next call on, at every path that has no behaviour of its own.
    pub fn respond(&self, behaviour: Behaviour) {
        self.shared.state.lock().behaviour = behaviour;
    }

    /// From the next call on, at this path, whatever the query.
    pub fn respond_at(&self, path: &str, behaviour: Behaviour) {
        self.shared
            .state
            .lock()
            .behaviours
            .insert(path.to_owned(), behaviour);
    }

    /// Calls that arrived, answered or not.
    pub fn calls(&self) -> u64 {
        *self.shared.calls.borrow()
    }

    /// Calls at a path, whatever the query.
    pub fn calls_of(&self, path: &str) -> u64 {
        self.shared
            .state
            .lock()
            .calls_at
            .get(path)
            .copied()
            .unwrap_or(0)
    }

    /// Connections that were made.
    pub fn connections(&self) -> u64 {
        self.shared.state.lock().connections
    }

    /// Calls that are being answered now.
    pub fn calls_open(&self) -> usize {
        *self.shared.open.borrow()
    }

    /// The most calls there were at one time.
    pub fn calls_open_max(&self) -> usize {
        self.shared.state.lock().open_max
    }

    /// Waits until that many calls have arrived since the start.
    pub async fn reached(&self, calls: u64) {
        // The sender is in `shared`, so waiting cannot fail.
        let _ = self
            .shared
            .calls
            .subscribe()
            .wait_for(|count| *count >= calls)
            .await;
    }

    /// Waits until no call is open: each is answered, or whoever made it has gone.
    pub async fn idle(&self) {
        let _ = self
            .shared
            .open
            .subscribe()
            .wait_for(|open| *open == 0)
            .await;
    }

    /// The latest calls, oldest first, at most 10,000.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.state.lock().requests.iter().cloned().collect()
    }

    pub fn last_request(&self) -> Option<Request> {
        self.shared.state.lock().requests.back().cloned()
    }

    /// Dies: drops every connection and refuses new ones. Counts and behaviours stay.
    pub async fn stop(&mut self) -> io::Result<()> {
        let Some(running) = self.running.take() else {
            return Ok(());
        };
        running.abort();
        // Ends with the listener and all connections closed.
        let _ = running.await;
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(self.address)?;
        self.reserved = Some(socket);
        Ok(())
    }

    /// Comes back after `stop`, at the same port.
    pub fn restart(&mut self) -> io::Result<()> {
        let Some(socket) = self.reserved.take() else {
            return Ok(());
        };
        self.running = Some(tokio::spawn(accept(
            socket.listen(1024)?,
            self.shared.clone(),
        )));
        Ok(())
    }
}

impl Drop for Origin {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
    }
}

struct Shared {
    state: Mutex<State>,
    /// All calls so far.
    calls: watch::Sender<u64>,
    /// Calls in progress.
    open: watch::Sender<usize>,
}

struct State {
    behaviour: Behaviour,
    behaviours: HashMap<String, Behaviour>,
    calls_at: HashMap<String, u64>,
    open_max: usize,
    connections: u64,
    requests: VecDeque<Request>,
}

/// Counts a call as open for as long as it lives.
struct Open<'a>(&'a Shared);

impl State {
    fn new() -> Self {
        Self {
            behaviour: Behaviour::json("{}"),
            behaviours: HashMap::new(),
            calls_at: HashMap::new(),
            open_max: 0,
            connections: 0,
            requests: VecDeque::new(),
        }
    }
}

impl Shared {
    /// Counts a call; what to do with it and its number at its path.
    fn arrived(&self, request: Request) -> (Open<'_>, Behaviour, u64) {
        let mut state = self.state.lock();
        let path = request
            .target
            .split('?')
            .next()
            .unwrap_or_default()
            .to_owned();
        let behaviour = state
            .behaviours
            .get(&path)
            .unwrap_or(&state.behaviour)
            .clone();
        let count = state.calls_at.entry(path).or_default();
        *count += 1;
        let number = *count;
        self.open.send_modify(|open| *open += 1);
        state.open_max = state.open_max.max(*self.open.borrow());
        if state.requests.len() == REQUESTS_KEPT {
            state.requests.pop_front();
        }
        state.requests.push_back(request);
        drop(state);
        self.calls.send_modify(|calls| *calls += 1);
        (Open(self), behaviour, number)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.open.send_modify(|open| *open -= 1);
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    let shared = shared.clone();
                    shared.state.lock().connections += 1;
                    connections.spawn(async move { serve(stream, &shared).await });
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

/// One connection, call after call. An error means that the caller went away.
async fn serve(mut stream: TcpStream, shared: &Shared) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (reader, mut writer) = stream.split();
    let mut reader = BufReader::new(reader);
    let mut on_this = 0;
    while let Some(request) = read_request(&mut reader).await? {
        on_this += 1;
        let target = request.target.clone();
        let (_open, behaviour, number) = shared.arrived(request);
        // A caller that gives up is no longer open: a hung call ends when its connection does.
        let stays = tokio::select! {
            stays = behave(behaviour, &mut writer, &target, [number, on_this]) => stays?,
            _ = reader.fill_buf() => false,
        };
        if !stays {
            break;
        }
    }
    writer.shutdown().await
}

/// `None` once the caller is done. Bodies are not read: only GET is served.
async fn read_request(reader: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Option<Request>> {
    let mut reader = reader.take(HEAD_BYTES_MAX);
    let mut line = String::new();
    if reader.read_line(&mut line).await? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut headers = HeaderMap::new();
    loop {
        let mut bytes = Vec::new();
        reader.read_until(b'\n', &mut bytes).await?;
        let line = bytes.trim_ascii();
        if line.is_empty() {
            return Ok(Some(Request {
                method,
                target,
                headers,
            }));
        }
        let colon = line
            .iter()
            .position(|byte| *byte == b':')
            .unwrap_or(line.len());
        let (name, value) = line.split_at(colon);
        let value = value.strip_prefix(b":").unwrap_or_default().trim_ascii();
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }
}

/// Whether the connection stays open. The call's numbers are those at its path and on its
/// connection.
async fn behave(
    mut behaviour: Behaviour,
    writer: &mut (impl AsyncWriteExt + Unpin),
    target: &str,
    [number, on_this]: [u64; 2],
) -> io::Result<bool> {
    loop {
        behaviour = match behaviour {
            Behaviour::Stall { gate, then } => {
                gate.passed().await;
                *then
            }
            Behaviour::Delay { by, then } => {
                tokio::time::sleep(by).await;
                *then
            }
            Behaviour::Compute(answer) => Behaviour::Answer(answer(target, number)),
            Behaviour::Answer(answer) => {
                write_whole(writer, &answer, answer.body.len() as u64).await?;
                return Ok(true);
            }
            Behaviour::CutShort {
                content_length,
                answer,
            } => {
                write_whole(writer, &answer, content_length).await?;
                return Ok(false);
            }
            Behaviour::Stream {
                content_type,
                bytes,
            } => {
                return write_stream(writer, &content_type, bytes)
                    .await
                    .map(|()| true);
            }
            Behaviour::Trickle { interval } => {
                writer
                    .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
                    .await?;
                loop {
                    writer.write_all(b"x").await?;
                    tokio::time::sleep(interval).await;
                }
            }
            Behaviour::Raw(bytes) => {
                writer.write_all(&bytes).await?;
                return Ok(false);
            }
            Behaviour::Hang => std::future::pending().await,
            Behaviour::PerConnection(choose) => choose(on_this),
            Behaviour::Close => return Ok(false),
        }
    }
}

async fn write_whole(
    writer: &mut (impl AsyncWriteExt + Unpin),
    answer: &Answer,
    content_length: u64,
) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {} {}\r\n", answer.status, reason(answer.status));
    for (name, value) in &answer.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    // A 204 has no length (RFC 9110 §8.6).
    if answer.status != 204 {
        head.push_str(&format!("content-length: {content_length}\r\n"));
    }
    head.push_str("\r\n");
    writer.write_all(head.as_bytes()).await?;
    writer.write_all(&answer.body).await?;
    writer.flush().await
}

async fn write_stream(
    writer: &mut (impl AsyncWriteExt + Unpin),
    content_type: &str,
    mut bytes: u64,
) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ntransfer-encoding: chunked\r\n\r\n"
    );
    writer.write_all(head.as_bytes()).await?;
    while bytes > 0 {
        let size = bytes.min(BLOCK.len() as u64) as usize;
        writer.write_all(format!("{size:x}\r\n").as_bytes()).await?;
        writer.write_all(&BLOCK[..size]).await?;
        writer.write_all(b"\r\n").await?;
        bytes -= size as u64;
    }
    writer.write_all(b"0\r\n\r\n").await
}

fn reason(status: u16) -> &'static str {
    StatusCode::from_u16(status)
        .ok()
        .and_then(|status| status.canonical_reason())
        .unwrap_or("Unknown")
}
