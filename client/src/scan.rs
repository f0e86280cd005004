//! Scan: one page of keys in order, or a stream of all pages. A page comes in several messages; a
//! try that loses one begins the page anew.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures::{Stream, future::BoxFuture};
use holdfast_proto::{Token, limits::SCAN_LIMIT_MAX, v1};
use tonic::{Response, Status, Streaming};

use crate::{
    answer::{self, Consistency, Page, Scanned},
    client::{Client, cache, timed},
    error::Error,
    read::{ReadOptions, encoded},
    retry::Kind,
};

/// Reads keys in order. From [`Client::scan`]. Awaited it is one page; [`stream`](Self::stream)
/// gives all of them.
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

    /// Entry by entry to the end, reading page after page as they are taken; each page has the time
    /// of a call, and is a read of its own: there is no common snapshot.
    pub fn stream(self) -> ScanStream {
        let next = Some(self.request.cursor.clone());
        ScanStream {
            scan: self,
            page: Vec::new().into_iter(),
            reading: None,
            began: Bytes::new(),
            next,
            failed: false,
        }
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

/// All entries of a scan, in order. From [`Scan::stream`]. Ends after an error.
#[must_use = "a stream reads nothing until it is polled"]
pub struct ScanStream {
    scan: Scan,
    /// What is left of the page last read.
    page: std::vec::IntoIter<Scanned>,
    reading: Option<BoxFuture<'static, Result<Page, Error>>>,
    /// Where the page last asked for begins.
    began: Bytes,
    /// Where the next one does.
    next: Option<Bytes>,
    failed: bool,
}

impl ScanStream {
    /// Where to go on ([`Scan::cursor`]) after an error, or later: with the first page of which not
    /// all was taken, so that its entries may come again. Empty at the beginning, none at the end.
    pub fn cursor(&self) -> Option<&Bytes> {
        let within = !self.page.as_slice().is_empty() || self.reading.is_some() || self.failed;
        if within {
            Some(&self.began)
        } else {
            self.next.as_ref()
        }
    }
}

impl Stream for ScanStream {
    type Item = Result<Scanned, Error>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(scanned) = self.page.next() {
                return Poll::Ready(Some(Ok(scanned)));
            }
            if let Some(reading) = &mut self.reading {
                let page = ready!(reading.as_mut().poll(context));
                self.reading = None;
                match page {
                    Ok(page) => {
                        self.page = page.entries.into_iter();
                        self.next = page.next_cursor;
                    }
                    Err(error) => {
                        self.failed = true;
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                continue;
            }
            let Some(next) = self.next.take() else {
                return Poll::Ready(None);
            };
            self.began = next.clone();
            self.reading = Some(self.scan.clone().cursor(next).into_future());
        }
    }
}

impl std::fmt::Debug for ScanStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScanStream")
            .field("scan", &self.scan)
            .field("cursor", &self.cursor())
            .finish_non_exhaustive()
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
