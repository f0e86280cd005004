//! The upstream `http`: one GET, followed through redirects, read whole or not at all.
//!
//! ```text
//! fetch ─► headers ─► exchange ─┬─► pool ─► connection      answer ─► read ─► coding ─► body
//!                        ▲      └─► dial ─► connection         │
//!                        └──────────── redirect ◄──────────────┘
//! ```
//! Promises one total timeout over everything; a body bounded while it streams; nothing taken from
//! the environment (no proxy, no netrc, no cookies); and that no header of the configuration ever
//! reaches another scheme, host or port than the template's. Must never know what a fetch is for.

mod answer;
mod connection;
mod dial;
mod endpoint;
mod freshness;
mod headers;
mod pool;
mod redirect;

#[cfg(test)]
mod tests;

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use h2::Reason;
use holdfast_proto::Key;
use holdfast_proto::peer::Validators;
use holdfast_proto::v1::FailureClass;
use holdfast_raft::Clock;
use http::header::{self, HeaderMap, HeaderValue};
use http::{Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use url::{Host, Position, Url};
use xxhash_rust::xxh3::xxh3_64;

use self::answer::Wanted;
use self::connection::{Connection, Head};
use self::dial::{DialError, Dialer};
use self::endpoint::Endpoint;
use self::headers::Headers;
use self::pool::Pool;
pub use self::redirect::OwnListeners;
use self::redirect::{Kind, Reach};
use super::bodies::{Held, ROOM_FREE_BYTES, Room, Workers};
use super::coding::Coding;
pub use super::tls::Tls;
use super::{Content, FetchFailed, Fetched, Shared, body};
use crate::secret::Secrets;
use crate::template::{Refused, TextTemplate, UrlTemplate};

/// Redirects followed by one fetch.
const REDIRECTS_MAX: usize = 5;
/// An answer that is not wanted is read so far and so long, to keep its connection.
const DRAIN_BYTES_MAX: u64 = 16 << 10;
const DRAIN_TIMEOUT: Duration = Duration::from_millis(50);

/// What the configuration says of an http upstream.
#[derive(Debug, Clone)]
pub struct HttpSpec {
    pub url: UrlTemplate,
    pub headers: Vec<(String, TextTemplate)>,
    /// The top-level JSON fields to keep; all of the body if empty.
    pub select: Vec<String>,
    /// Statuses whose body is a value.
    pub accept_status: Vec<StatusCode>,
    pub unframed: Unframed,
    /// Hosts beside the url's own that a redirect may lead to.
    pub redirects: Vec<Host>,
    pub tls: Tls,
    /// Over everything: connecting, redirects, headers, body.
    pub fetch_timeout: Duration,
    /// Over resolving, connecting and TLS.
    pub connect_timeout: Duration,
    /// Beyond it the fetch fails, decoded or not.
    pub max_body_bytes: u64,
}

/// What becomes of a body that ends with its connection and says so nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unframed {
    Refuse,
    Allow,
}

/// One http upstream, with its own connections.
#[derive(Debug)]
pub struct Http {
    name: String,
    spec: HttpSpec,
    select: Arc<[String]>,
    headers: Headers,
    secrets: Arc<Secrets>,
    dialer: Dialer,
    pool: Pool,
    room: Room,
    workers: Workers,
    own_listeners: OwnListeners,
    clock: Clock,
}

/// Why an http upstream cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum InvalidHttp {
    #[error("`{0}` is no header name")]
    HeaderName(String),
    #[error("header `{0}` is not for the configuration to set")]
    ReservedHeader(String),
    #[error("header `{0}` is set twice")]
    RepeatedHeader(String),
    #[error("header `accept-encoding` may ask for `gzip`, `zstd` and `identity` only")]
    UnknownCoding,
    #[error("field `{0}` is selected twice")]
    RepeatedField(String),
    #[error("secret `{0}` is not declared")]
    NoSuchSecret(String),
    #[error("secret `{0}` has a line break or another control character, which no header may have")]
    UnfitSecret(String),
    #[error("the tls client cannot be built")]
    Tls(#[from] rustls::Error),
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum NoAnswer {
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("the connection ended before the answer: {0}")]
    Send(#[from] hyper::Error),
    #[error("the body is not whole: {0}")]
    Body(#[source] hyper::Error),
    #[error("the url is too long or has what no request may have")]
    Url,
}

/// The head of an answer, and the connection that its body comes over.
type Answered = (Response<Incoming>, Connection);

impl HttpSpec {
    pub const FETCH_TIMEOUT: Duration = Duration::from_secs(4);
    pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
    pub const MAX_BODY_BYTES: u64 = 8 << 20;
    pub const ACCEPT_STATUS: [StatusCode; 2] =
        [StatusCode::OK, StatusCode::NON_AUTHORITATIVE_INFORMATION];

    /// With every default.
    pub fn new(url: UrlTemplate) -> Self {
        Self {
            url,
            headers: Vec::new(),
            select: Vec::new(),
            accept_status: Self::ACCEPT_STATUS.to_vec(),
            unframed: Unframed::Refuse,
            redirects: Vec::new(),
            tls: Tls::default(),
            fetch_timeout: Self::FETCH_TIMEOUT,
            connect_timeout: Self::CONNECT_TIMEOUT,
            max_body_bytes: Self::MAX_BODY_BYTES,
        }
    }

    /// What the url and each header take from a key: how it is called, and its highest capture.
    pub fn captures(&self) -> impl Iterator<Item = (String, usize)> {
        let headers = self
            .headers
            .iter()
            .map(|(name, template)| (format!("header `{name}`"), template.captures_max()));
        std::iter::once(("url".to_owned(), self.url.captures_max())).chain(headers)
    }
}

impl Http {
    pub fn new(
        name: String,
        spec: HttpSpec,
        secrets: Arc<Secrets>,
        shared: &Shared,
    ) -> Result<Self, InvalidHttp> {
        let headers = Headers::check(&spec.headers, &secrets)?;
        if let Some(field) = headers::repeated(spec.select.iter()) {
            return Err(InvalidHttp::RepeatedField(field.clone()));
        }
        let tls = spec.tls.client(&shared.system_roots)?;
        Ok(Self {
            name,
            select: spec.select.clone().into(),
            headers,
            secrets,
            dialer: Dialer::new(tls, spec.connect_timeout, shared.clock.clone()),
            pool: Pool::default(),
            room: Room::default(),
            workers: shared.workers.clone(),
            own_listeners: shared.own_listeners.clone(),
            clock: shared.clock.clone(),
            spec,
        })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    #[tracing::instrument(name = "upstream.fetch", skip_all, fields(upstream = self.name))]
    pub async fn fetch(
        &self,
        key: &Key,
        captures: &[&[u8]],
        extra_headers: &HeaderMap,
        known: Option<&Validators>,
    ) -> Result<Fetched, FetchFailed> {
        let url = self.spec.url.fill(key, captures).map_err(refused)?;
        let mut headers = self
            .headers
            .fill(key, captures, extra_headers, &self.secrets)
            .map_err(refused)?;
        let source = self.source(&url);
        let known = known.filter(|known| known.source == source);
        if let Some(known) = known {
            freshness::ask_whether(known, &mut headers);
        }
        let answered = Box::pin(self.follow(url, headers, source));
        tokio::time::timeout(self.spec.fetch_timeout, answered)
            .await
            .unwrap_or(Err(FailureClass::Timeout.into()))
    }

    /// Of all that decides what a value is: validators of one that was asked for otherwise say
    /// nothing. Headers count by their templates, so that no secret is in it.
    fn source(&self, url: &Url) -> u64 {
        let asked = format!("{url} {:?} {:?}", self.spec.headers, self.spec.select);
        xxh3_64(asked.as_bytes())
    }

    /// Follows redirects. The headers stay with the template's own origin, and a chain that left it
    /// gets them never again: who sends us back chooses the path, and must not choose it for a
    /// request with our credentials.
    async fn follow(
        &self,
        configured: Url,
        mut headers: HeaderMap,
        source: u64,
    ) -> Result<Fetched, FetchFailed> {
        let mut url = configured.clone();
        let mut reach = Reach::Configured;
        for _ in 0..=REDIRECTS_MAX {
            let asked = Box::pin(self.ask(&url, &headers, &reach)).await;
            let (answer, connection) = asked.map_err(|error| self.failed(&error))?;
            if !answer::is_redirect(answer.status()) {
                let is_conditional = freshness::is_conditional(&headers);
                return Box::pin(self.take(answer, connection, source, is_conditional)).await;
            }
            let hosts = &self.spec.redirects;
            let next = redirect::target(&configured, &url, answer.headers(), hosts)
                .ok_or(FailureClass::Redirect)?;
            if let Reach::Configured = reach {
                let configured = Kind::of(connection.address.ip());
                let own = self.own_listeners.clone();
                reach = Reach::Redirected { configured, own };
            }
            self.drain(answer, connection).await;
            if next.origin() != url.origin() {
                headers = headers::plain();
            }
            url = next;
        }
        Err(FailureClass::Redirect.into())
    }

    /// One request and the head of its answer. An origin closes idle connections when it likes,
    /// perhaps just now: what was sent over a used one that ended without an answer is sent once
    /// more over a new one, as any GET may be (RFC 9110 §9.2.2).
    async fn ask(
        &self,
        url: &Url,
        headers: &HeaderMap,
        reach: &Reach,
    ) -> Result<Answered, NoAnswer> {
        let endpoint = Endpoint::of(url).ok_or(NoAnswer::Url)?;
        let now = self.clock.monotonic();
        if let Some(mut used) = self.pool.take(&endpoint, reach, now).await {
            match used.send(head(url, headers, used.is_http2())?).await {
                Ok(answer) => return Ok((answer, used)),
                Err(error) if !ended_unanswered(&error) => return Err(error.into()),
                Err(error) => {
                    let upstream = self.name.as_str();
                    tracing::debug!(upstream, %error, "a used connection ended: a new one is tried");
                }
            }
        }
        let mut new = self.dialer.dial(&endpoint, reach).await?;
        if let Some(shared) = new.share() {
            self.pool.put(shared, self.clock.monotonic());
        }
        let answer = new.send(head(url, headers, new.is_http2())?).await?;
        Ok((answer, new))
    }

    /// The value that an answer holds, if it is wanted and whole.
    async fn take(
        &self,
        answer: Response<Incoming>,
        connection: Connection,
        source: u64,
        is_conditional: bool,
    ) -> Result<Fetched, FetchFailed> {
        let said = freshness::said(answer.headers());
        let validators = freshness::validators(answer.headers(), source);
        if is_conditional && answer.status() == StatusCode::NOT_MODIFIED {
            self.drain(answer, connection).await;
            return Ok(Fetched {
                content: Content::Unchanged,
                said,
                validators,
            });
        }
        let wanted = match answer::judge(&answer, &self.spec) {
            Ok(wanted) => wanted,
            Err(failed) => {
                self.drain(answer, connection).await;
                return Err(failed);
            }
        };
        let (body, held) = self.read(answer.into_body(), &wanted).await?;
        self.pool.put(connection, self.clock.monotonic());
        let Wanted {
            content_type,
            coding,
            ..
        } = wanted;
        let (select, bytes_max) = (self.select.clone(), self.spec.max_body_bytes);
        let mut work_bytes = body.len() as u64;
        let mut held = held;
        if coding != Coding::Identity {
            work_bytes = bytes_max;
            if held.is_none() {
                held = self.room.hold(bytes_max).await;
            }
        }
        let work = move || {
            let _held = held;
            let body = coding.decode(body, bytes_max)?;
            body::value(body, content_type, &select)
        };
        match self.workers.run(work_bytes, work).await {
            Ok(worked) => Ok(Fetched {
                content: Content::Value(worked?),
                said,
                validators,
            }),
            Err(error) => {
                tracing::error!(%error, upstream = self.name, "a body could not be worked on");
                Err(FailureClass::Malformed.into())
            }
        }
    }

    /// All of a body, as it comes. Beyond what any may hold it first waits for room, once: for what
    /// is declared, else for the most there may be, and for what that may unpack to.
    async fn read(
        &self,
        mut body: Incoming,
        wanted: &Wanted,
    ) -> Result<(Bytes, Option<Held>), FetchFailed> {
        let bytes_max = self.spec.max_body_bytes;
        let mut room_bytes = wanted.body_bytes.unwrap_or(bytes_max);
        if wanted.coding != Coding::Identity {
            room_bytes += bytes_max;
        }
        let mut held = None;
        let mut read = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.failed(&NoAnswer::Body(error)))?;
            // What is no data are trailers, which nobody asked for.
            let Ok(data) = frame.into_data() else {
                continue;
            };
            let bytes = (read.len() + data.len()) as u64;
            if bytes > bytes_max {
                return Err(FailureClass::TooLarge.into());
            }
            if bytes > ROOM_FREE_BYTES && held.is_none() {
                held = self.room.hold(room_bytes).await;
            }
            read.extend_from_slice(&data);
        }
        Ok((read.freeze(), held))
    }

    /// Reads what nobody wants, if it is little and comes at once: then its connection can be used
    /// again.
    async fn drain(&self, answer: Response<Incoming>, connection: Connection) {
        let mut body = answer.into_body();
        if body
            .size_hint()
            .exact()
            .is_none_or(|bytes| bytes > DRAIN_BYTES_MAX)
        {
            return;
        }
        let drained = async {
            while let Some(frame) = body.frame().await {
                frame?;
            }
            hyper::Result::Ok(())
        };
        if let Ok(Ok(())) = tokio::time::timeout(DRAIN_TIMEOUT, drained).await {
            self.pool.put(connection, self.clock.monotonic());
        }
    }

    /// The cause goes to the log; no URL is in it, for a key would be in that.
    fn failed(&self, error: &NoAnswer) -> FetchFailed {
        let cause: &dyn std::error::Error = error;
        tracing::debug!(upstream = self.name, cause, "fetch failed");
        error.class().into()
    }
}

impl NoAnswer {
    fn class(&self) -> FailureClass {
        match self {
            Self::Dial(error) => error.class(),
            Self::Url => FailureClass::Refused,
            Self::Send(_) | Self::Body(_) => FailureClass::Incomplete,
        }
    }
}

/// The request itself. HTTP/1.1 names the path in its first line and the host in a header, HTTP/2
/// all of it in fields of its own.
fn head(url: &Url, headers: &HeaderMap, is_http2: bool) -> Result<Head, NoAnswer> {
    let mut request = Request::new(Empty::new());
    *request.headers_mut() = headers.clone();
    let target = if is_http2 {
        &url[..Position::AfterQuery]
    } else {
        let host = &url[Position::BeforeHost..Position::AfterPort];
        let host = HeaderValue::from_str(host).map_err(|_| NoAnswer::Url)?;
        request.headers_mut().insert(header::HOST, host);
        &url[Position::BeforePath..Position::AfterQuery]
    };
    *request.uri_mut() = Uri::try_from(target).map_err(|_| NoAnswer::Url)?;
    if is_http2 {
        *request.version_mut() = Version::HTTP_2;
    }
    Ok(request)
}

/// Whether the connection ended with no answer on it. What an origin did answer, if only by ending
/// the one stream, it is not asked again.
fn ended_unanswered(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|cause| cause.downcast_ref());
    let was_answered = cause
        .is_some_and(|h2: &h2::Error| h2.is_reset() && h2.reason() != Some(Reason::REFUSED_STREAM));
    !was_answered && !error.is_parse() && !error.is_user()
}

fn refused(reason: Refused) -> FetchFailed {
    tracing::debug!(%reason, "fetch refused");
    FailureClass::Refused.into()
}
