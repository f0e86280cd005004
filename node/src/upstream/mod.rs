//! Upstreams: the named places where values come from, and what one fetch from them gives.
//!
//! Promises a whole value or a failure, nothing between, within the upstream's own timeout; and
//! that a failure says its class and never any text of the upstream, the URL or a credential. Must
//! never know who waits for a fetch, when to fetch again, or where values are kept: that is the
//! refresh.

pub mod http;
pub mod tls;

mod bodies;
mod body;
mod coding;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use ::http::HeaderMap;
use bytes::Bytes;
use holdfast_proto::Key;
use holdfast_proto::peer::Validators;
use holdfast_proto::v1::FailureClass;
use holdfast_raft::Clock;

use self::bodies::Workers;
use self::http::{Http, HttpSpec, InvalidHttp, OwnListeners};
use self::tls::SystemRoots;
use crate::secret::Secrets;

/// What the configuration says of an upstream: one kind of place.
#[derive(Debug, Clone)]
pub enum Spec {
    Http(HttpSpec),
}

/// What all upstreams of one node share.
#[derive(Debug, Clone)]
pub struct Shared {
    clock: Clock,
    own_listeners: OwnListeners,
    system_roots: SystemRoots,
    workers: Workers,
}

/// Why an upstream cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum InvalidUpstream {
    #[error(transparent)]
    Http(#[from] InvalidHttp),
}

/// One place where values come from.
#[derive(Debug)]
pub enum Upstream {
    Http(Http),
}

/// Every upstream of this node, by name.
#[derive(Debug, Default)]
pub struct Upstreams(BTreeMap<String, Arc<Upstream>>);

/// What a fetch brought, whole and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Fetched {
    pub content: Content,
    pub said: Said,
    /// For a later fetch to ask with; `None` if there are none.
    pub validators: Option<Validators>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    Value(Value),
    /// What it was asked about is still the same.
    Unchanged,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    pub body: Bytes,
    /// At most `CONTENT_TYPE_BYTES_MAX` bytes; empty if the upstream did not say.
    pub content_type: String,
}

/// What an upstream says of how long its value is good. Nothing, by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Said {
    pub lifetime: Option<Duration>,
    /// How old the value was when it was sent.
    pub age: Duration,
    pub stale_while_revalidate: Option<Duration>,
    pub stale_if_error: Option<Duration>,
    /// Nobody but those who wait for it may have it.
    pub no_store: bool,
}

/// Why a fetch brought nothing. All of it may be stored, logged and shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchFailed {
    pub class: FailureClass,
    /// The upstream's status, for class STATUS; else 0.
    pub status: u32,
    /// How long the upstream asks to be left alone, with status 429 or 503.
    pub retry_after: Option<Duration>,
}

impl Fetched {
    /// `None` if it is what it was asked about.
    pub fn into_value(self) -> Option<Value> {
        match self.content {
            Content::Value(value) => Some(value),
            Content::Unchanged => None,
        }
    }
}

impl Spec {
    /// The most that is read of one body.
    pub fn max_body_bytes(&self) -> u64 {
        match self {
            Self::Http(http) => http.max_body_bytes,
        }
    }

    /// What it takes from a key: how that is called, and the highest capture in it.
    pub fn captures(&self) -> Vec<(String, usize)> {
        match self {
            Self::Http(http) => http.captures().collect(),
        }
    }
}

impl Shared {
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            own_listeners: OwnListeners::default(),
            system_roots: SystemRoots::default(),
            workers: Workers::default(),
        }
    }

    /// Where this node listens, once it does: nothing an upstream says leads there.
    pub fn own_listeners(&self) -> &OwnListeners {
        &self.own_listeners
    }
}

impl Upstream {
    pub fn new(
        name: String,
        spec: Spec,
        secrets: Arc<Secrets>,
        shared: &Shared,
    ) -> Result<Self, InvalidUpstream> {
        Ok(match spec {
            Spec::Http(spec) => Self::Http(Http::new(name, spec, secrets, shared)?),
        })
    }

    pub fn name(&self) -> &str {
        match self {
            Self::Http(http) => http.name(),
        }
    }

    /// `captures` are what the policy's pattern captured of `key`; `extra_headers` the caller's
    /// own, such as the trace context. With `known`, those of a value that is there, the answer may
    /// be that it is still the same. Dropping the future ends the call.
    pub async fn fetch(
        &self,
        key: &Key,
        captures: &[&[u8]],
        extra_headers: &HeaderMap,
        known: Option<&Validators>,
    ) -> Result<Fetched, FetchFailed> {
        match self {
            Self::Http(http) => http.fetch(key, captures, extra_headers, known).await,
        }
    }
}

impl Upstreams {
    pub fn get(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.0.get(name)
    }

    /// In the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.0.values()
    }
}

/// Of two with one name the later counts.
impl FromIterator<Upstream> for Upstreams {
    fn from_iter<I: IntoIterator<Item = Upstream>>(upstreams: I) -> Self {
        Self(
            upstreams
                .into_iter()
                .map(|upstream| (upstream.name().to_owned(), Arc::new(upstream)))
                .collect(),
        )
    }
}

impl From<FailureClass> for FetchFailed {
    fn from(class: FailureClass) -> Self {
        Self {
            class,
            status: 0,
            retry_after: None,
        }
    }
}

impl fmt::Display for FetchFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let class = self.class.as_str_name();
        f.write_str(
            &class
                .strip_prefix("FAILURE_CLASS_")
                .unwrap_or(class)
                .to_ascii_lowercase(),
        )?;
        if self.status != 0 {
            write!(f, " {}", self.status)?;
        }
        Ok(())
    }
}

impl std::error::Error for FetchFailed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_shows_its_class_and_status() {
        assert_eq!(
            FetchFailed::from(FailureClass::MissingField).to_string(),
            "missing_field"
        );
        let failed = FetchFailed {
            class: FailureClass::Status,
            status: 503,
            retry_after: None,
        };
        assert_eq!(failed.to_string(), "status 503");
    }
}
