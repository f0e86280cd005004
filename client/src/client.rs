//! The client: a handle on the cluster's key space and what one session has seen of it.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_proto::{Token, limits::CLIENT_MESSAGE_BYTES_MAX, v1};
use tonic::{Response, Status, transport::Channel};

use crate::{
    builder::Builder,
    call::Call,
    cluster::Cluster,
    deadline::Deadline,
    error::Error,
    mutation::Mutations,
    read::{BatchGet, Get, Inspect},
    retry::Kind,
    route::Routes,
    scan::Scan,
    session::Session,
    value::Value,
    write::{Delete, FOREVER, Invalidate, Set},
};

/// Cheap to clone; clones share connections, session and request ids. [`Client::session`] makes one
/// that shares all but the session.
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    session: Arc<Session>,
}

/// What all sessions have in common.
pub(crate) struct Shared {
    pub(crate) routes: Routes,
    pub(crate) mutations: Mutations,
    pub(crate) timeout: Duration,
    pub(crate) retries: u32,
    /// As `retries`, for rounds in which no node can be connected to.
    pub(crate) unreachable_retries: u32,
    pub(crate) request_ids: bool,
}

impl Client {
    pub fn builder() -> Builder {
        Builder::new()
    }

    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared: Arc::new(shared),
            session: Arc::default(),
        }
    }

    /// A new session over the same connections: it has seen nothing yet, and what it sees concerns
    /// no other. A server gives one to each of its users, so that nobody's read waits for what
    /// somebody else wrote; [`see`](Self::see) continues a session that began elsewhere.
    #[must_use = "it changes nothing of this client"]
    pub fn session(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            session: Arc::default(),
        }
    }

    /// Reads one key. A miss is an answer, not an error.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Get {
        Get::new(self.clone(), key_bytes(key))
    }

    /// Reads up to 1,000 keys, each answered for itself: there is no common snapshot.
    pub fn batch_get<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> BatchGet {
        BatchGet::new(self.clone(), keys.into_iter().map(key_bytes).collect())
    }

    /// Replaces a key's value, times and tags. What owns its bytes is moved; what is borrowed is
    /// copied.
    pub fn set(&self, key: impl AsRef<[u8]>, value: impl Into<Value>) -> Set {
        Set::new(self.clone(), key_bytes(key), value.into().into_bytes())
    }

    /// Removes a key. Succeeds on an absent key too, and outranks any fetch that began before it.
    pub fn delete(&self, key: impl AsRef<[u8]>) -> Delete {
        Delete::new(self.clone(), key_bytes(key))
    }

    /// Makes a key stale now: still served inside its stale windows, and refreshed from its
    /// upstream.
    pub fn invalidate(&self, key: impl AsRef<[u8]>) -> Invalidate {
        Invalidate::new(self.clone(), key_bytes(key))
    }

    /// Everything known of a key and why, without side effects.
    pub fn inspect(&self, key: impl AsRef<[u8]>) -> Inspect {
        Inspect::new(self.clone(), key_bytes(key))
    }

    /// Reads keys in order: awaited one page, or as a stream all of them.
    pub fn scan(&self) -> Scan {
        Scan::new(self.clone())
    }

    /// What operators call.
    pub fn cluster(&self) -> Cluster<'_> {
        Cluster::new(self)
    }

    /// What this session has seen, from all its answers.
    pub fn token(&self) -> Token {
        self.session.token()
    }

    /// Takes in what another session has seen: session reads from now on see at least that.
    pub fn see(&self, token: &Token) {
        self.session.see(token);
    }

    /// The session's token is from before a restore.
    pub(crate) fn forget_epoch(&self, epoch: u64) {
        self.session.forget_epoch(epoch);
    }

    /// A call's time begins.
    pub(crate) fn deadline(&self, timeout: Option<Duration>) -> Deadline {
        Deadline::after(timeout.unwrap_or(self.shared.timeout))
    }

    pub(crate) async fn call<T, F, S>(
        &self,
        kind: Kind,
        deadline: Deadline,
        send: F,
    ) -> Result<T, Error>
    where
        F: Fn(Channel, Duration) -> S,
        S: Future<Output = Result<Response<T>, Status>>,
    {
        let Shared {
            routes,
            retries,
            unreachable_retries,
            ..
        } = &*self.shared;
        Call::new(routes, kind, deadline, *retries, *unreachable_retries)
            .run(send)
            .await
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("timeout", &self.shared.timeout)
            .finish_non_exhaustive()
    }
}

/// A stub whose size limits are the contract's.
pub(crate) fn cache(channel: Channel) -> v1::cache_service_client::CacheServiceClient<Channel> {
    v1::cache_service_client::CacheServiceClient::new(channel)
        .max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
}

/// The request with what is left of the call's time.
pub(crate) fn timed<T>(message: T, left: Duration) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(left);
    request
}

fn key_bytes(key: impl AsRef<[u8]>) -> Bytes {
    Bytes::copy_from_slice(key.as_ref())
}

/// Longer than for ever is for ever.
pub(crate) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration::try_from(duration.min(FOREVER)).expect("10,000 years fit")
}
