//! How a client is made. Nothing is connected here: the first call does that.

use std::time::Duration;

use holdfast_proto::limits::DEADLINE_DEFAULT;

use crate::{
    client::{Client, Shared},
    mutation::Mutations,
    route::{InvalidEndpoint, Routes},
};

/// Longer than a handshake around the world takes, and short enough that a dead endpoint leaves
/// most of a call's time.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(1);
/// About four seconds of pauses: an election and more.
const RETRIES_DEFAULT: u32 = 16;

/// From [`Client::builder`].
#[derive(Debug, Clone)]
#[must_use = "a builder builds nothing until `build`"]
pub struct Builder {
    endpoints: Vec<String>,
    timeout: Duration,
    connect_timeout: Duration,
    retries: u32,
    /// None: as `retries`.
    unreachable_retries: Option<u32>,
    request_ids: bool,
    follow_leader: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    #[error("no endpoint is given")]
    NoEndpoint,
    #[error(transparent)]
    Endpoint(#[from] InvalidEndpoint),
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            endpoints: Vec::new(),
            timeout: DEADLINE_DEFAULT,
            connect_timeout: CONNECT_TIMEOUT_DEFAULT,
            retries: RETRIES_DEFAULT,
            unreachable_retries: None,
            request_ids: true,
            follow_leader: true,
        }
    }

    /// Adds nodes to ask, `host:port` or `http://host:port`, in the order of preference. One is
    /// enough, but only others can stand in for it.
    pub fn endpoints<E: Into<String>>(mut self, endpoints: impl IntoIterator<Item = E>) -> Self {
        self.endpoints.extend(endpoints.into_iter().map(Into::into));
        self
    }

    /// The total time of one call, over all its tries. 5 s if not said.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The most that one connection may take, inside the call's time. 1 s if not said.
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// How often a call may ask all nodes again after a pause, inside its time. 0: each node once.
    /// 16 if not said.
    pub fn retries(mut self, rounds: u32) -> Self {
        self.retries = rounds;
        self
    }

    /// For somebody who waits at a terminal: says soon that nobody listens.
    #[cfg(feature = "cli")]
    pub(crate) fn unreachable_retries(mut self, rounds: u32) -> Self {
        self.unreachable_retries = Some(rounds);
        self
    }

    /// Without request ids a mutation whose outcome is unknown is not tried again. On if not said.
    pub fn request_ids(mut self, on: bool) -> Self {
        self.request_ids = on;
        self
    }

    /// Whether writes go straight to the leader that answers name, once a connection to its
    /// advertised address stands. Off where that address means nothing to this client, as behind a
    /// load balancer: then the node that is asked forwards. On if not said.
    pub fn follow_leader(mut self, on: bool) -> Self {
        self.follow_leader = on;
        self
    }

    /// Connects to nothing yet. The client must be used inside a tokio runtime.
    pub fn build(self) -> Result<Client, BuildError> {
        if self.endpoints.is_empty() {
            return Err(BuildError::NoEndpoint);
        }
        Ok(Client::new(Shared {
            routes: Routes::new(&self.endpoints, self.connect_timeout, self.follow_leader)?,
            mutations: Mutations::new(),
            timeout: self.timeout,
            retries: self.retries,
            unreachable_retries: self.unreachable_retries.unwrap_or(self.retries),
            request_ids: self.request_ids,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_without_a_good_endpoint_is_not_built() {
        assert_eq!(Builder::new().build().unwrap_err(), BuildError::NoEndpoint);
        let error = Builder::new()
            .endpoints(["a:1", "nonsense"])
            .build()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "endpoint `nonsense` is not host:port or http://host:port"
        );
    }
}
