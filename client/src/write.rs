//! Set, Delete and Invalidate: each a small builder that is awaited, with one request id over all
//! its tries.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use holdfast_proto::{limits::VALUE_BYTES_MAX, v1};

use crate::{
    answer::{self, Done, Stored},
    client::{Client, cache, duration, timed},
    deadline::Deadline,
    error::{Applied, Error},
    mutation::Mutation,
    retry::Kind,
};

/// As a stale window: for ever. 10,000 years, the longest duration of the contract.
pub const FOREVER: Duration = Duration::from_secs(315_576_000_000);

/// Replaces a key's value. From [`Client::set`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct Set {
    client: Client,
    request: v1::SetRequest,
    timeout: Option<Duration>,
}

/// Removes a key. From [`Client::delete`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct Delete {
    client: Client,
    key: Bytes,
    timeout: Option<Duration>,
}

/// Makes a key stale. From [`Client::invalidate`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct Invalidate {
    client: Client,
    key: Bytes,
    timeout: Option<Duration>,
}

impl Set {
    pub(crate) fn new(client: Client, key: Bytes, value: Bytes) -> Self {
        Self {
            client,
            request: v1::SetRequest {
                key,
                value,
                ..Default::default()
            },
            timeout: None,
        }
    }

    /// Lifetime from now. Takes the place of `expires_at`.
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.request.ttl = Some(duration(ttl));
        self.request.expires_at = None;
        self
    }

    /// Lifetime until then. Takes the place of `ttl`.
    pub fn expires_at(mut self, at: SystemTime) -> Self {
        self.request.expires_at = Some(at.into());
        self.request.ttl = None;
        self
    }

    /// How long past its lifetime the value is served at once, while it is refreshed.
    pub fn stale_while_revalidate(mut self, window: Duration) -> Self {
        self.request.stale_while_revalidate = Some(duration(window));
        self
    }

    /// How long past its lifetime the value is served if no better one can be had.
    pub fn stale_if_error(mut self, window: Duration) -> Self {
        self.request.stale_if_error = Some(duration(window));
        self
    }

    /// Adds a tag, 1 to 256 bytes; at most 64.
    pub fn tag(mut self, tag: impl Into<String>) -> Self {
        self.request.tags.push(tag.into());
        self
    }

    pub fn content_type(mut self, content_type: impl Into<String>) -> Self {
        self.request.content_type = content_type.into();
        self
    }

    /// Only if the key's version is this one. Takes the place of `if_absent`.
    pub fn if_version(mut self, version: u64) -> Self {
        self.request.if_version = Some(version);
        self.request.if_absent = false;
        self
    }

    /// Only if the key has no value that would be served. Takes the place of `if_version`.
    pub fn if_absent(mut self) -> Self {
        self.request.if_absent = true;
        self.request.if_version = None;
        self
    }

    /// This call's total time instead of the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<Stored, Error> {
        let Self {
            client,
            mut request,
            timeout,
        } = self;
        // Refused here only because it might not fit a message; the node's bound is the same or
        // lower.
        if request.value.len() > VALUE_BYTES_MAX {
            let message = format!(
                "the value has {} bytes, more than {VALUE_BYTES_MAX}",
                request.value.len()
            );
            return Err(Error::too_large(Some("value"), &message, true));
        }
        let deadline = client.deadline(timeout);
        let mutation = client.mutation(deadline).await?;
        request.request_id = mutation.as_ref().map(Mutation::id);
        let response = client.call(kind(mutation.as_ref()), deadline, |channel, left| {
            let request = timed(request.clone(), left);
            async move { cache(channel).set(request).await }
        });
        let response = response.await?;
        let token = answer::token(&response.token, true)?;
        client.see(&token);
        Ok(Stored {
            version: response.version,
            replica: answer::replica(response.replica, true)?,
            token,
        })
    }
}

impl Delete {
    pub(crate) fn new(client: Client, key: Bytes) -> Self {
        Self {
            client,
            key,
            timeout: None,
        }
    }

    /// This call's total time instead of the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<Done, Error> {
        let Self {
            client,
            key,
            timeout,
        } = self;
        let deadline = client.deadline(timeout);
        let mutation = client.mutation(deadline).await?;
        let target = Some(v1::delete_request::Target::Key(key));
        let request = v1::DeleteRequest {
            target,
            request_id: mutation.as_ref().map(Mutation::id),
        };
        let response = client.call(kind(mutation.as_ref()), deadline, |channel, left| {
            let request = timed(request.clone(), left);
            async move { cache(channel).delete(request).await }
        });
        let response = response.await?;
        done(&client, response.existed, response.replica, &response.token)
    }
}

impl Invalidate {
    pub(crate) fn new(client: Client, key: Bytes) -> Self {
        Self {
            client,
            key,
            timeout: None,
        }
    }

    /// This call's total time instead of the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<Done, Error> {
        let Self {
            client,
            key,
            timeout,
        } = self;
        let deadline = client.deadline(timeout);
        let mutation = client.mutation(deadline).await?;
        let target = Some(v1::invalidate_request::Target::Key(key));
        let request = v1::InvalidateRequest {
            target,
            request_id: mutation.as_ref().map(Mutation::id),
        };
        let response = client.call(kind(mutation.as_ref()), deadline, |channel, left| {
            let request = timed(request.clone(), left);
            async move { cache(channel).invalidate(request).await }
        });
        let response = response.await?;
        done(&client, response.existed, response.replica, &response.token)
    }
}

impl IntoFuture for Set {
    type Output = Result<Stored, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

impl IntoFuture for Delete {
    type Output = Result<Done, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

impl IntoFuture for Invalidate {
    type Output = Result<Done, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

impl Client {
    /// A name for a mutation, if this client gives names. Waiting for one is part of the call's
    /// time.
    async fn mutation(&self, deadline: Deadline) -> Result<Option<Mutation<'_>>, Error> {
        if !self.shared.request_ids {
            return Ok(None);
        }
        let begun = tokio::time::timeout(deadline.left(), self.shared.mutations.begin()).await;
        begun
            .map(Some)
            .map_err(|_| Error::deadline(deadline.total(), Some(Applied::No)))
    }
}

fn kind(mutation: Option<&Mutation<'_>>) -> Kind {
    if mutation.is_some() {
        Kind::NamedWrite
    } else {
        Kind::Write
    }
}

fn done(
    client: &Client,
    existed: bool,
    replica: Option<v1::Replica>,
    token: &[u8],
) -> Result<Done, Error> {
    let token = answer::token(token, true)?;
    client.see(&token);
    Ok(Done {
        existed,
        replica: answer::replica(replica, true)?,
        token,
    })
}
