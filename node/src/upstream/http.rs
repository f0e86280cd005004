//! The upstream `http`: one GET, followed through redirects, read whole or not at all.
//!
//! Promises one total timeout over everything; a body bounded while it streams; nothing taken from
//! the environment (no proxy, no netrc, no cookies); and that no header of the configuration ever
//! reaches another scheme, host or port than the template's. Must never know what a fetch is for.

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use holdfast_proto::Key;
use holdfast_proto::limits::CONTENT_TYPE_BYTES_MAX;
use holdfast_proto::v1::FailureClass;
use http::StatusCode;
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Response};
use rustls::RootCertStore;
use url::Url;

use super::{FetchFailed, Fetched, body, tls};
use crate::secret::Secrets;
use crate::template::{Refused, TextTemplate, UrlTemplate};

/// Redirects followed by one fetch.
const REDIRECTS_MAX: usize = 5;
/// Longest URL a redirect may lead to.
const LOCATION_BYTES_MAX: usize = 8 << 10;
/// A `Retry-After` beyond this counts as this: an upstream's slip must not silence a key for years.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);
/// Idle connections kept to one upstream: as many as it has flights.
const IDLE_CONNECTIONS_MAX: usize = 32;
const USER_AGENT: &str = concat!("holdfast/", env!("CARGO_PKG_VERSION"));

/// Headers that say how a message is framed or where it goes: ours to set. `accept-encoding` among
/// them, because only bodies that are not encoded are understood.
const RESERVED: [HeaderName; 8] = [
    header::HOST,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::TRANSFER_ENCODING,
    header::TE,
    header::TRAILER,
    header::UPGRADE,
    header::ACCEPT_ENCODING,
];

/// What the configuration says of an http upstream.
#[derive(Debug, Clone)]
pub struct HttpSpec {
    pub url: UrlTemplate,
    pub headers: Vec<(String, TextTemplate)>,
    /// The top-level JSON fields to keep; all of the body if empty.
    pub select: Vec<String>,
    /// Over everything: connecting, redirects, headers, body.
    pub fetch_timeout: Duration,
    /// Beyond it the fetch fails.
    pub max_body_bytes: u64,
}

/// One http upstream, with its own connections.
#[derive(Debug)]
pub struct Http {
    name: String,
    spec: HttpSpec,
    headers: Vec<(HeaderName, TextTemplate)>,
    secrets: Arc<Secrets>,
    client: Client,
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
    #[error("field `{0}` is selected twice")]
    RepeatedField(String),
    #[error("secret `{0}` is not declared")]
    NoSuchSecret(String),
    #[error("secret `{0}` has a line break or another control character, which no header may have")]
    UnfitSecret(String),
    #[error("the http client cannot be built")]
    Client(#[source] reqwest::Error),
    #[error("the tls client cannot be built")]
    Tls(#[from] rustls::Error),
}

impl Http {
    /// Reads the system's root certificates.
    pub fn new(name: String, spec: HttpSpec, secrets: Arc<Secrets>) -> Result<Self, InvalidHttp> {
        let roots = tls::system_roots();
        if roots.is_empty() {
            tracing::warn!(
                upstream = name,
                "the system has no root certificates: every https fetch will fail"
            );
        }
        Self::with_roots(name, spec, secrets, roots)
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
    ) -> Result<Fetched, FetchFailed> {
        let url = self.spec.url.fill(key, captures).map_err(refused)?;
        let headers = self
            .headers(key, captures, extra_headers)
            .map_err(refused)?;
        match tokio::time::timeout(
            self.spec.fetch_timeout,
            Box::pin(self.exchange(url, headers)),
        )
        .await
        {
            Ok(outcome) => outcome,
            Err(_) => Err(FailureClass::Timeout.into()),
        }
    }

    fn with_roots(
        name: String,
        spec: HttpSpec,
        secrets: Arc<Secrets>,
        roots: RootCertStore,
    ) -> Result<Self, InvalidHttp> {
        let headers = checked_headers(&spec.headers, &secrets)?;
        if let Some(field) = repeated(spec.select.iter()) {
            return Err(InvalidHttp::RepeatedField(field.clone()));
        }
        let client = Client::builder()
            .tls_backend_preconfigured(tls::client_config(roots)?)
            .no_proxy()
            .referer(false)
            .redirect(reqwest::redirect::Policy::none()) // followed here, where it is known which headers may go along
            .retry(reqwest::retry::never())
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .user_agent(USER_AGENT)
            .default_headers(HeaderMap::from_iter([(
                header::ACCEPT_ENCODING,
                HeaderValue::from_static("identity"),
            )]))
            .build()
            .map_err(InvalidHttp::Client)?;
        Ok(Self {
            name,
            spec,
            headers,
            secrets,
            client,
        })
    }

    /// The caller's, then the configuration's over them.
    fn headers(
        &self,
        key: &Key,
        captures: &[&[u8]],
        extra_headers: &HeaderMap,
    ) -> Result<HeaderMap, Refused> {
        let mut headers = extra_headers.clone();
        for (name, template) in &self.headers {
            let text = template.fill(key, captures, &self.secrets)?;
            let mut value =
                HeaderValue::from_bytes(text.as_bytes()).map_err(|_| Refused::Control)?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        Ok(headers)
    }

    /// Follows redirects. The headers stay with the template's own origin, and a chain that left it
    /// gets them never again: who sends us back chooses the path, and must not choose it for a
    /// request with our credentials.
    async fn exchange(&self, mut url: Url, mut headers: HeaderMap) -> Result<Fetched, FetchFailed> {
        for _ in 0..=REDIRECTS_MAX {
            let sent = self
                .client
                .get(url.clone())
                .headers(headers.clone())
                .send()
                .await;
            let response = sent.map_err(|error| self.failed(error))?;
            if !is_redirect(response.status()) {
                return self.read(response).await;
            }
            let next = redirect_target(&url, response.headers()).ok_or(FailureClass::Redirect)?;
            if next.origin() != url.origin() {
                headers.clear();
            }
            url = next;
        }
        Err(FailureClass::Redirect.into())
    }

    async fn read(&self, response: Response) -> Result<Fetched, FetchFailed> {
        let status = response.status();
        // 206 is a success to HTTP, but nobody asked for a part, and a part never replaces a value.
        if !status.is_success() || status == StatusCode::PARTIAL_CONTENT {
            let retry_after = retry_after(status, response.headers());
            return Err(FetchFailed {
                class: FailureClass::Status,
                status: status.as_u16().into(),
                retry_after,
            });
        }
        if response
            .headers()
            .get_all(header::CONTENT_ENCODING)
            .iter()
            .any(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"identity"))
        {
            return Err(FailureClass::Malformed.into());
        }
        let content_type = content_type(response.headers());
        let body = self.read_body(response).await?;
        Ok(body::value(body, content_type, &self.spec.select)?)
    }

    async fn read_body(&self, mut response: Response) -> Result<Bytes, FetchFailed> {
        let max = self.spec.max_body_bytes;
        if response.content_length().is_some_and(|bytes| bytes > max) {
            return Err(FailureClass::TooLarge.into());
        }
        let mut body = BytesMut::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| self.failed(error))? {
            if (body.len() + chunk.len()) as u64 > max {
                return Err(FailureClass::TooLarge.into());
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body.freeze())
    }

    /// The cause goes to the log, without the URL: a key is in it.
    fn failed(&self, error: reqwest::Error) -> FetchFailed {
        let class = if error.is_builder() {
            FailureClass::Refused
        } else if error.is_connect() {
            FailureClass::Connect
        } else if error.is_timeout() {
            FailureClass::Timeout
        } else {
            FailureClass::Incomplete
        };
        tracing::debug!(upstream = self.name, cause = ?error.without_url(), "fetch failed");
        class.into()
    }
}

fn checked_headers(
    headers: &[(String, TextTemplate)],
    secrets: &Secrets,
) -> Result<Vec<(HeaderName, TextTemplate)>, InvalidHttp> {
    let mut checked = Vec::with_capacity(headers.len());
    for (text, template) in headers {
        let name = HeaderName::from_bytes(text.as_bytes())
            .map_err(|_| InvalidHttp::HeaderName(text.clone()))?;
        if RESERVED.contains(&name) {
            return Err(InvalidHttp::ReservedHeader(text.clone()));
        }
        for secret in template.secrets() {
            let value = secrets
                .get(secret)
                .ok_or_else(|| InvalidHttp::NoSuchSecret(secret.to_owned()))?;
            HeaderValue::from_bytes(value.expose().as_bytes())
                .map_err(|_| InvalidHttp::UnfitSecret(secret.to_owned()))?;
        }
        checked.push((name, template.clone()));
    }
    match repeated(checked.iter().map(|(name, _)| name)) {
        Some(name) => Err(InvalidHttp::RepeatedHeader(name.to_string())),
        None => Ok(checked),
    }
}

fn repeated<T: Eq + Hash + Copy>(mut items: impl Iterator<Item = T>) -> Option<T> {
    let mut seen = HashSet::new();
    items.find(|item| !seen.insert(*item))
}

fn refused(reason: Refused) -> FetchFailed {
    tracing::debug!(%reason, "fetch refused");
    FailureClass::Refused.into()
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Where a redirect leads, if it may be followed: http or https, never from https down to http, no
/// credentials in it.
fn redirect_target(from: &Url, headers: &HeaderMap) -> Option<Url> {
    let location = std::str::from_utf8(headers.get(header::LOCATION)?.as_bytes()).ok()?;
    let to = from.join(location).ok()?;
    let scheme_fits = to.scheme() == "https" || (to.scheme() == "http" && from.scheme() == "http");
    let plain = to.username().is_empty() && to.password().is_none();
    (scheme_fits && plain && to.as_str().len() <= LOCATION_BYTES_MAX).then_some(to)
}

/// Only the form in seconds (RFC 9110 §10.2.3): the other is an instant of a clock that is not
/// ours.
fn retry_after(status: StatusCode, headers: &HeaderMap) -> Option<Duration> {
    if !matches!(
        status,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
    ) {
        return None;
    }
    let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let digits = !seconds.is_empty() && seconds.bytes().all(|byte| byte.is_ascii_digit());
    // More digits than a u64 holds are beyond the bound too.
    digits.then(|| {
        seconds
            .parse()
            .map_or(RETRY_AFTER_MAX, Duration::from_secs)
            .min(RETRY_AFTER_MAX)
    })
}

/// Of one too long for an entry only what stands before its parameters is kept.
fn content_type(headers: &HeaderMap) -> String {
    let text = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default();
    [text, essence]
        .into_iter()
        .find(|text| text.len() <= CONTENT_TYPE_BYTES_MAX)
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

    use super::*;
    use crate::secret::Secret;

    /// Signed by itself for `localhost` and 127.0.0.1, 2020 to 2120. Of no use but here.
    const CERTIFICATE: &[u8] = include_bytes!("testdata/localhost.cert.der");
    const CERTIFICATE_KEY: &[u8] = include_bytes!("testdata/localhost.key.der");

    fn spec(url: &str, headers: &[(&str, &str)]) -> HttpSpec {
        let headers = headers
            .iter()
            .map(|(name, text)| ((*name).to_owned(), TextTemplate::parse(text).unwrap()))
            .collect();
        let url = UrlTemplate::parse(url).unwrap();
        HttpSpec {
            url,
            headers,
            select: Vec::new(),
            fetch_timeout: Duration::from_secs(60),
            max_body_bytes: 1024,
        }
    }

    fn location(to: &[u8]) -> HeaderMap {
        HeaderMap::from_iter([(header::LOCATION, HeaderValue::from_bytes(to).unwrap())])
    }

    #[test]
    fn a_redirect_never_leads_from_https_down_to_http() {
        let target = |from: &str, to: &[u8]| {
            redirect_target(&Url::parse(from).unwrap(), &location(to)).map(String::from)
        };
        assert_eq!(target("https://h/a", b"http://h/b"), None);
        assert_eq!(
            target("https://h/a", b"https://h/b").unwrap(),
            "https://h/b"
        );
        assert_eq!(target("https://h/a", b"//g/b").unwrap(), "https://g/b");
        assert_eq!(target("http://h/a", b"https://h/b").unwrap(), "https://h/b");
        assert_eq!(target("http://h/a/b", b"c?d").unwrap(), "http://h/a/c?d");
        assert_eq!(target("http://h/a", b"gopher://h/b"), None);
        assert_eq!(target("http://h/a", b"http://u@h/b"), None);
        assert_eq!(target("http://h/a", b"\xff"), None);
    }

    #[test]
    fn retry_after_is_bounded() {
        let asked = |value: &str| {
            let headers = HeaderMap::from_iter([(
                header::RETRY_AFTER,
                HeaderValue::from_str(value).unwrap(),
            )]);
            retry_after(StatusCode::SERVICE_UNAVAILABLE, &headers)
        };
        assert_eq!(asked("120"), Some(Duration::from_secs(120)));
        assert_eq!(asked("99999999999999999999999"), Some(RETRY_AFTER_MAX));
        assert_eq!(asked("+1"), None);
        assert_eq!(asked(""), None);
    }

    #[test]
    fn a_content_type_fits_an_entry() {
        let kept = |text: &str| {
            content_type(&HeaderMap::from_iter([(
                header::CONTENT_TYPE,
                HeaderValue::from_str(text).unwrap(),
            )]))
        };
        assert_eq!(kept("text/html; charset=utf-8"), "text/html; charset=utf-8");
        assert_eq!(
            kept(&format!(
                "text/html; a={}",
                "x".repeat(CONTENT_TYPE_BYTES_MAX)
            )),
            "text/html"
        );
        assert_eq!(kept(&"x".repeat(CONTENT_TYPE_BYTES_MAX + 1)), "");
    }

    #[test]
    fn what_could_never_be_sent_is_refused_when_built() {
        let mut secrets = Secrets::default();
        secrets.insert("good", Secret::new("hunter2"));
        secrets.insert("bad", Secret::new("hunter2\n"));
        let secrets = Arc::new(secrets);
        let built = |headers: &[(&str, &str)], select: &[&str]| {
            let mut spec = spec("http://h/", headers);
            spec.select = select.iter().map(|name| (*name).to_owned()).collect();
            Http::with_roots(
                "u".to_owned(),
                spec,
                secrets.clone(),
                RootCertStore::empty(),
            )
            .map(drop)
            .map_err(|error| error.to_string())
        };
        assert_eq!(
            built(&[("a", "${secret:good}"), ("b", "")], &["a", "b"]),
            Ok(())
        );
        let refused = |headers: &[(&str, &str)], select: &[&str], why: &str| {
            let error = built(headers, select).unwrap_err();
            assert!(error.contains(why) && !error.contains("hunter2"), "{error}");
        };
        refused(&[("a b", "x")], &[], "`a b` is no header name");
        refused(
            &[("Host", "{1}")],
            &[],
            "`Host` is not for the configuration",
        );
        refused(&[("X-A", "x"), ("x-a", "y")], &[], "`x-a` is set twice");
        refused(&[("a", "${secret:other}")], &[], "`other` is not declared");
        refused(&[("a", "${secret:bad}")], &[], "`bad` has a line break");
        refused(&[], &["a", "a"], "`a` is selected twice");
    }

    #[tokio::test]
    async fn a_certificate_that_the_roots_do_not_vouch_for_is_connect() {
        let mut trusting = RootCertStore::empty();
        trusting
            .add(CertificateDer::from_slice(CERTIFICATE))
            .unwrap();
        assert_eq!(
            fetch_by_tls("localhost", trusting.clone())
                .await
                .unwrap()
                .body,
            "by tls"
        );
        assert_eq!(
            fetch_by_tls("127.0.0.1", trusting.clone())
                .await
                .unwrap()
                .body,
            "by tls"
        );
        // The certificate is good, but not for this name of the same host.
        assert_eq!(
            fetch_by_tls("127.0.0.2", trusting).await.unwrap_err().class,
            FailureClass::Connect
        );
        assert_eq!(
            fetch_by_tls("localhost", RootCertStore::empty())
                .await
                .unwrap_err()
                .class,
            FailureClass::Connect
        );
        assert_eq!(
            fetch_by_tls("localhost", tls::system_roots())
                .await
                .unwrap_err()
                .class,
            FailureClass::Connect
        );
    }

    async fn fetch_by_tls(host: &str, roots: RootCertStore) -> Result<Fetched, FetchFailed> {
        let listener = std::net::TcpListener::bind("0.0.0.0:0").unwrap();
        let spec = spec(
            &format!("https://{host}:{}/", listener.local_addr().unwrap().port()),
            &[],
        );
        let server = std::thread::spawn(move || answer_by_tls(listener));
        let http = Http::with_roots("u".to_owned(), spec, Arc::default(), roots).unwrap();
        let fetched = http
            .fetch(&Key::new("k").unwrap(), &[], &HeaderMap::new())
            .await;
        let _ = server.join().unwrap();
        fetched
    }

    /// One connection, one answer; an error is the caller's refusal.
    fn answer_by_tls(listener: std::net::TcpListener) -> std::io::Result<()> {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(CERTIFICATE_KEY));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions();
        let builder = builder
            .map_err(std::io::Error::other)?
            .with_no_client_auth();
        let config = builder
            .with_single_cert(vec![CertificateDer::from_slice(CERTIFICATE)], key)
            .map_err(std::io::Error::other)?;
        let session =
            rustls::ServerConnection::new(Arc::new(config)).map_err(std::io::Error::other)?;
        let mut stream = rustls::StreamOwned::new(session, listener.accept()?.0);
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        stream.write_all(
            b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nby tls",
        )?;
        stream.flush()
    }
}
