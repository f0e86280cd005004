//! Get, BatchGet and Inspect: each a small builder that is awaited.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use holdfast_proto::{Revision, Token, limits::BATCH_KEYS_MAX, v1};

use crate::{
    answer::{Batch, Consistency, Inspection, Lookup},
    client::{Client, cache, duration, timed},
    error::Error,
    retry::Kind,
};

/// Reads one key. From [`Client::get`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct Get {
    client: Client,
    key: Bytes,
    options: ReadOptions,
    demand: Demand,
}

/// Whether a miss waits for its fetch. Without a word, as the key's policy says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchOnMiss {
    Sync,
    /// Answered at once, with [`State::Placeholder`](crate::State::Placeholder).
    Async,
}

/// What a Get takes for an answer.
#[derive(Debug, Clone, Copy, Default)]
struct Demand {
    max_age: Option<Duration>,
    only_if_cached: bool,
    no_cache: bool,
    if_version_not: Option<Revision>,
    fetch_on_miss: Option<FetchOnMiss>,
}

/// Reads many keys. From [`Client::batch_get`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct BatchGet {
    client: Client,
    keys: Vec<Bytes>,
    options: ReadOptions,
}

/// Explains one key. From [`Client::inspect`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct Inspect {
    client: Client,
    key: Bytes,
    options: ReadOptions,
}

/// What every read may say.
#[derive(Debug, Clone, Default)]
pub(crate) struct ReadOptions {
    pub(crate) consistency: Consistency,
    pub(crate) token: Option<Token>,
    pub(crate) timeout: Option<Duration>,
}

impl Get {
    pub(crate) fn new(client: Client, key: Bytes) -> Self {
        Self {
            client,
            key,
            options: ReadOptions::default(),
            demand: Demand::default(),
        }
    }

    /// SESSION if not said.
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.options.consistency = consistency;
        self
    }

    /// No value that is older will do: the upstream is asked, and what is older is not served though
    /// that fails.
    pub fn max_age(mut self, max_age: Duration) -> Self {
        self.demand.max_age = Some(max_age);
        self
    }

    /// Nobody is asked or waited for: what is stored, or a miss.
    pub fn only_if_cached(mut self) -> Self {
        self.demand.only_if_cached = true;
        self
    }

    /// The upstream is asked whatever is stored, which is not served though that fails.
    pub fn no_cache(mut self) -> Self {
        self.demand.no_cache = true;
        self
    }

    /// Without the value if its version is this one.
    pub fn if_version_not(mut self, version: Revision) -> Self {
        self.demand.if_version_not = Some(version);
        self
    }

    pub fn fetch_on_miss(mut self, fetch_on_miss: FetchOnMiss) -> Self {
        self.demand.fetch_on_miss = Some(fetch_on_miss);
        self
    }

    /// For this call only: see at least what this token has seen, beside what the client has.
    pub fn token(mut self, token: Token) -> Self {
        self.options.token = Some(token);
        self
    }

    /// This call's total time instead of the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<Lookup, Error> {
        let Self {
            client,
            key,
            options,
            demand,
        } = self;
        let token = options.token_for(&client);
        let fetch_on_miss = match demand.fetch_on_miss {
            None => v1::FetchOnMiss::Unspecified,
            Some(FetchOnMiss::Sync) => v1::FetchOnMiss::Sync,
            Some(FetchOnMiss::Async) => v1::FetchOnMiss::Async,
        };
        let request = v1::GetRequest {
            key,
            consistency: options.consistency.to_wire(),
            token: encoded(token.as_ref()),
            max_age: demand.max_age.map(duration),
            only_if_cached: demand.only_if_cached,
            no_cache: demand.no_cache,
            if_version_not: demand.if_version_not,
            fetch_on_miss: fetch_on_miss.into(),
            ..Default::default()
        };
        let response = client.call(
            Kind::Read,
            client.deadline(options.timeout),
            |channel, left| {
                let request = timed(request.clone(), left);
                async move { cache(channel).get(request).await }
            },
        );
        let found = Lookup::from_wire(client.session_of(token, response.await)?)?;
        client.see(&found.token);
        Ok(found)
    }
}

impl BatchGet {
    pub(crate) fn new(client: Client, keys: Vec<Bytes>) -> Self {
        Self {
            client,
            keys,
            options: ReadOptions::default(),
        }
    }

    /// SESSION if not said.
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.options.consistency = consistency;
        self
    }

    /// For this call only: see at least what this token has seen, beside what the client has.
    pub fn token(mut self, token: Token) -> Self {
        self.options.token = Some(token);
        self
    }

    /// This call's total time instead of the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<Batch, Error> {
        let Self {
            client,
            keys,
            options,
        } = self;
        let asked = keys.len();
        // Refused here only because so many might not fit a message; the node's bound is the same.
        if asked > BATCH_KEYS_MAX {
            return Err(Error::too_large(
                Some("keys"),
                &format!("{asked} keys are more than {BATCH_KEYS_MAX}"),
                false,
            ));
        }
        let token = options.token_for(&client);
        let request = v1::BatchGetRequest {
            keys,
            consistency: options.consistency.to_wire(),
            token: encoded(token.as_ref()),
        };
        let response = client.call(
            Kind::Read,
            client.deadline(options.timeout),
            |channel, left| {
                let request = timed(request.clone(), left);
                async move { cache(channel).batch_get(request).await }
            },
        );
        let batch = Batch::from_wire(client.session_of(token, response.await)?, asked)?;
        client.see(&batch.token);
        Ok(batch)
    }
}

impl Inspect {
    pub(crate) fn new(client: Client, key: Bytes) -> Self {
        Self {
            client,
            key,
            options: ReadOptions::default(),
        }
    }

    /// SESSION if not said.
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.options.consistency = consistency;
        self
    }

    /// For this call only: see at least what this token has seen, beside what the client has.
    pub fn token(mut self, token: Token) -> Self {
        self.options.token = Some(token);
        self
    }

    /// This call's total time instead of the client's.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.options.timeout = Some(timeout);
        self
    }

    async fn send(self) -> Result<Inspection, Error> {
        let Self {
            client,
            key,
            options,
        } = self;
        let token = options.token_for(&client);
        let request = v1::InspectRequest {
            key,
            consistency: options.consistency.to_wire(),
            token: encoded(token.as_ref()),
        };
        let response = client.call(
            Kind::Read,
            client.deadline(options.timeout),
            |channel, left| {
                let request = timed(request.clone(), left);
                async move { cache(channel).inspect(request).await }
            },
        );
        let inspection = Inspection::from_wire(client.session_of(token, response.await)?)?;
        client.see(&inspection.token);
        Ok(inspection)
    }
}

impl IntoFuture for Get {
    type Output = Result<Lookup, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

impl IntoFuture for BatchGet {
    type Output = Result<Batch, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

impl IntoFuture for Inspect {
    type Output = Result<Inspection, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

impl ReadOptions {
    /// What to send: with SESSION all that the client has seen, and always what the caller has
    /// named.
    pub(crate) fn token_for(&self, client: &Client) -> Option<Token> {
        let kept = Some(client.token()).filter(|_| self.consistency == Consistency::Session);
        let mut token = kept.filter(|token| !token.is_empty());
        if let Some(named) = &self.token {
            token.get_or_insert_with(|| named.clone()).merge(named);
        }
        token
    }
}

impl Client {
    /// Lets go of the session's token if the node says it is from before a restore; without that,
    /// no session read of this client would ever succeed again.
    pub(crate) fn session_of<T>(
        &self,
        sent: Option<Token>,
        outcome: Result<T, Error>,
    ) -> Result<T, Error> {
        if let (Err(Error::TokenEpoch { .. }), Some(sent)) = (&outcome, sent) {
            self.forget_epoch(sent.epoch());
        }
        outcome
    }
}

pub(crate) fn encoded(token: Option<&Token>) -> Bytes {
    token.map(Token::encode).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(shard: u32, revision: u64) -> Token {
        let mut token = Token::new(1);
        token.see(shard, revision);
        token
    }

    fn client() -> Client {
        Client::builder()
            .endpoints(["127.0.0.1:1"])
            .build()
            .unwrap()
    }

    #[test]
    fn a_session_read_sends_what_was_seen_and_what_was_named() {
        let client = client();
        assert_eq!(client.get("k").options.token_for(&client), None);
        client.see(&token(0, 5));
        assert_eq!(
            client.get("k").options.token_for(&client),
            Some(token(0, 5))
        );
        let merged = client
            .get("k")
            .token(token(1, 9))
            .options
            .token_for(&client)
            .unwrap();
        assert_eq!((merged.revision(0), merged.revision(1)), (5, 9));
        assert_eq!(
            client.token().revision(1),
            0,
            "a token for one call stays with that call"
        );
    }

    #[test]
    fn a_local_read_sends_only_what_was_named() {
        let client = client();
        client.see(&token(0, 5));
        let local = client.get("k").consistency(Consistency::Local);
        assert_eq!(local.options.token_for(&client), None);
        assert_eq!(
            local.token(token(0, 2)).options.token_for(&client),
            Some(token(0, 2))
        );
    }
}
