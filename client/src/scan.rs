//! Scan: one page of keys in order. A page comes in several messages; a try that loses one begins
//! the page anew.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use holdfast_proto::{Token, limits::SCAN_LIMIT_MAX, v1};
use tonic::{Response, Status, Streaming};

use crate::{
    answer::{self, Consistency, Page, Scanned},
    client::{Client, cache, timed},
    error::Error,
    read::{ReadOptions, encoded},
    retry::Kind,
};

/// Reads a page of keys. From [`Client::scan`].
#[derive(Debug, Clone)]
#[must_use = "a request is not sent until it is awaited"]
pub struct Scan {
    client: Client,
    request: v1::ScanRequest,
    options: ReadOptions,
}

impl Scan {
    pub(crate) fn new(client: Client) -> Self {
        Self {
            client,
            request: v1::ScanRequest::default(),
            options: ReadOptions::default(),
        }
    }

    /// Only keys that begin with this.
    pub fn prefix(mut self, prefix: impl AsRef<[u8]>) -> Self {
        self.request.prefix = Bytes::copy_from_slice(prefix.as_ref());
        self
    }

    /// Entries of the page, at most 1,000. 100 if not said.
    pub fn limit(mut self, entries: u32) -> Self {
        self.request.limit = entries;
        self
    }

    /// Where the page before said that this one begins.
    pub fn cursor(mut self, cursor: impl Into<Bytes>) -> Self {
        self.request.cursor = cursor.into();
        self
    }

    /// Without values.
    pub fn keys_only(mut self) -> Self {
        self.request.keys_only = true;
        self
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

    async fn send(self) -> Result<Page, Error> {
        let Self {
            client,
            mut request,
            options,
        } = self;
        let token = options.token_for(&client);
        request.consistency = options.consistency.to_wire();
        request.token = encoded(token.as_ref());
        let response = client.call(
            Kind::Read,
            client.deadline(options.timeout),
            |channel, left| {
                let request = timed(request.clone(), left);
                async move { whole_page(cache(channel).scan(request).await?).await }
            },
        );
        let page = page(client.session_of(token, response.await)?)?;
        client.see(&page.token);
        Ok(page)
    }
}

impl IntoFuture for Scan {
    type Output = Result<Page, Error>;
    type IntoFuture = BoxFuture<'static, Self::Output>;
    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

/// The messages of a page as one. Stops reading at more entries than a page may have.
async fn whole_page(
    response: Response<Streaming<v1::ScanResponse>>,
) -> Result<Response<v1::ScanResponse>, Status> {
    let (metadata, mut messages, extensions) = response.into_parts();
    let mut page = v1::ScanResponse::default();
    while let Some(message) = messages.message().await? {
        page.entries.extend(message.entries);
        page.next_cursor = message.next_cursor;
        page.replica = message.replica;
        page.token = message.token;
        if page.entries.len() > SCAN_LIMIT_MAX as usize {
            return Err(Status::internal(
                "a scan page has more entries than the contract allows",
            ));
        }
    }
    Ok(Response::from_parts(metadata, page, extensions))
}

/// Without its last message a page would end early and look complete; the last one says who
/// answered.
fn page(response: v1::ScanResponse) -> Result<Page, Error> {
    let scanned = |entry: v1::ScanEntry| {
        let answer = entry
            .answer
            .ok_or_else(|| Error::malformed("a scanned key without an answer", false))?;
        Ok(Scanned {
            key: entry.key,
            answer: answer.into(),
        })
    };
    Ok(Page {
        entries: response
            .entries
            .into_iter()
            .map(scanned)
            .collect::<Result<_, Error>>()?,
        next_cursor: Some(response.next_cursor).filter(|cursor| !cursor.is_empty()),
        replica: answer::replica(response.replica, false)?,
        token: answer::token(&response.token, false)?,
    })
}
