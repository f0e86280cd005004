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
    read::{BatchGet, Get, Inspect},
    retry::Kind,
    route::Routes,
    scan::Scan,
    session::Session,
    write::{Delete, Invalidate, Set},
};

/// Cheap to clone; clones share connections, session and request ids.
#[derive(Clone)]
pub struct Client(pub(crate) Arc<Shared>);

pub(crate) struct Shared {
    pub(crate) routes: Routes,
    pub(crate) session: Session,
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

    /// Reads one key. A miss is an answer, not an error.
    pub fn get(&self, key: impl AsRef<[u8]>) -> Get {
        Get::new(self.clone(), key_bytes(key))
    }

    /// Reads up to 1,000 keys, each answered for itself: there is no common snapshot.
    pub fn batch_get<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> BatchGet {
        BatchGet::new(self.clone(), keys.into_iter().map(key_bytes).collect())
    }

    /// Replaces a key's value, times and tags.
    pub fn set(&self, key: impl AsRef<[u8]>, value: impl Into<Bytes>) -> Set {
        Set::new(self.clone(), key_bytes(key), value.into())
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

    /// Reads one page of keys in order.
    pub fn scan(&self) -> Scan {
        Scan::new(self.clone())
    }

    /// What operators call.
    pub fn cluster(&self) -> Cluster<'_> {
        Cluster::new(self)
    }

    /// What this client has seen, from all its answers.
    pub fn token(&self) -> Token {
        self.0.session.token()
    }

    /// Takes in what another client has seen: session reads from now on see at least that.
    pub fn see(&self, token: &Token) {
        self.0.session.see(token);
    }

    /// A call's time begins.
    pub(crate) fn deadline(&self, timeout: Option<Duration>) -> Deadline {
        Deadline::after(timeout.unwrap_or(self.0.timeout))
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
        } = &*self.0;
        Call::new(routes, kind, deadline, *retries, *unreachable_retries)
            .run(send)
            .await
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("timeout", &self.0.timeout)
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
