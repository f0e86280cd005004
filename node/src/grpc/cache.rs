//! CacheService over gRPC.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt as _, future, stream};
use holdfast_proto::{
    limits::CLIENT_MESSAGE_BYTES_MAX,
    reason,
    v1::{
        self,
        cache_service_server::{CacheService, CacheServiceServer},
    },
};
use holdfast_raft::Clock;
use tonic::{Request, Response, Status, metadata::MetadataValue};

use super::CodecTold;
use crate::{
    cache::{Acknowledged, Cache},
    error::{Code, Error},
    layers::deadline_of,
    metrics::Metrics,
};

/// What the client listener serves of the cache.
pub fn cache_service(
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
    clock: Clock,
) -> CodecTold<CacheServiceServer<CacheServer>> {
    let service = CacheServiceServer::new(CacheServer {
        cache,
        metrics,
        clock,
    });
    CodecTold(
        service
            .max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(CLIENT_MESSAGE_BYTES_MAX),
    )
}

pub struct CacheServer {
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
    clock: Clock,
}

impl CacheServer {
    /// Counts the request, and tells its error as gRPC does.
    fn end<T>(
        &self,
        method: &'static str,
        began: Duration,
        result: Result<T, Error>,
        state: &str,
    ) -> Result<T, Status> {
        let (code, state) = match &result {
            Ok(_) => (Code::Ok, state),
            Err(error) => (error.code(), "ERROR"),
        };
        self.metrics.request(
            method,
            state,
            code,
            self.clock.monotonic().saturating_sub(began),
        );
        result.map_err(Status::from)
    }

    fn end_write<T>(
        &self,
        method: &'static str,
        began: Duration,
        result: Result<Acknowledged<T>, Error>,
    ) -> Result<Response<T>, Status> {
        let Acknowledged { response, leader } = self.end(method, began, result, "")?;
        let mut response = Response::new(response);
        if let Some(leader) = leader.and_then(|leader| MetadataValue::try_from(leader).ok()) {
            response
                .metadata_mut()
                .insert(reason::LEADER_HEADER, leader);
        }
        Ok(response)
    }
}

#[tonic::async_trait]
impl CacheService for CacheServer {
    type ScanStream = Pin<Box<dyn Stream<Item = Result<v1::ScanResponse, Status>> + Send>>;

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let read = self.cache.get(request.into_inner(), &deadline).await;
        let state = read
            .as_ref()
            .ok()
            .and_then(|read| read.answer.as_ref())
            .map_or("", |answer| state_name(answer.state()));
        self.end("Get", began, read, state).map(Response::new)
    }

    async fn batch_get(
        &self,
        request: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let read = self.cache.batch_get(request.into_inner(), &deadline).await;
        self.end("BatchGet", began, read, "").map(Response::new)
    }

    async fn set(
        &self,
        request: Request<v1::SetRequest>,
    ) -> Result<Response<v1::SetResponse>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let written = self.cache.set(request.into_inner(), &deadline).await;
        self.end_write("Set", began, written)
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let written = self.cache.delete(request.into_inner(), &deadline).await;
        self.end_write("Delete", began, written)
    }

    async fn invalidate(
        &self,
        request: Request<v1::InvalidateRequest>,
    ) -> Result<Response<v1::InvalidateResponse>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let written = self.cache.invalidate(request.into_inner(), &deadline).await;
        self.end_write("Invalidate", began, written)
    }

    async fn inspect(
        &self,
        request: Request<v1::InspectRequest>,
    ) -> Result<Response<v1::InspectResponse>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let read = self.cache.inspect(request.into_inner(), &deadline).await;
        self.end("Inspect", began, read, "").map(Response::new)
    }

    async fn scan(
        &self,
        request: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let (began, deadline) = (self.clock.monotonic(), deadline_of(&request, &self.clock));
        let page = match self.cache.scan(request.into_inner(), &deadline).await {
            Ok(page) => page,
            Err(error) => return self.end("Scan", began, Err(error), ""),
        };
        let mut counted = CountedScan {
            metrics: self.metrics.clone(),
            clock: self.clock.clone(),
            began,
            code: Code::Cancelled,
        };
        let ending = stream::once(async { None });
        let messages = page.map(Some).chain(ending).filter_map(move |message| {
            let message = match message {
                Some(Ok(message)) => Some(Ok(message)),
                Some(Err(error)) => {
                    counted.code = error.code();
                    Some(Err(Status::from(error)))
                }
                None => {
                    counted.ended_well();
                    None
                }
            };
            future::ready(message)
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

/// Counts a page when its stream is gone: sent whole, broken off by an error of ours, or by a
/// caller that went away.
struct CountedScan {
    metrics: Arc<Metrics>,
    clock: Clock,
    began: Duration,
    code: Code,
}

impl CountedScan {
    fn ended_well(&mut self) {
        if self.code == Code::Cancelled {
            self.code = Code::Ok;
        }
    }
}

impl Drop for CountedScan {
    fn drop(&mut self) {
        let state = if self.code == Code::Ok { "" } else { "ERROR" };
        self.metrics.request(
            "Scan",
            state,
            self.code,
            self.clock.monotonic().saturating_sub(self.began),
        );
    }
}

/// As metrics and the command line name it: without its enum's prefix.
fn state_name(state: v1::State) -> &'static str {
    let name = state.as_str_name();
    name.strip_prefix("STATE_").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_named_without_their_prefix() {
        assert_eq!(state_name(v1::State::StaleOnError), "STALE_ON_ERROR");
        assert_eq!(state_name(v1::State::Miss), "MISS");
    }
}
