//! CacheService over gRPC.

use std::{pin::Pin, sync::Arc};

use futures::{Stream, StreamExt as _};
use holdfast_proto::{
    limits::CLIENT_MESSAGE_BYTES_MAX,
    reason,
    v1::{
        self,
        cache_service_server::{CacheService, CacheServiceServer},
    },
};
use tonic::{Request, Response, Status, metadata::MetadataValue};

use super::operation_of;
use crate::cache::{Acknowledged, Cache};

/// What the client listener serves of the cache.
pub fn cache_service(cache: Arc<Cache>) -> CacheServiceServer<CacheServer> {
    CacheServiceServer::new(CacheServer { cache })
        .max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
}

pub struct CacheServer {
    cache: Arc<Cache>,
}

#[tonic::async_trait]
impl CacheService for CacheServer {
    type ScanStream = Pin<Box<dyn Stream<Item = Result<v1::ScanResponse, Status>> + Send>>;

    async fn get(
        &self,
        request: Request<v1::GetRequest>,
    ) -> Result<Response<v1::GetResponse>, Status> {
        let operation = operation_of(&request)?;
        let request = request.into_inner();
        let read = || self.cache.get(request.clone(), operation.call());
        Ok(Response::new(operation.run_read(read).await?))
    }

    async fn batch_get(
        &self,
        request: Request<v1::BatchGetRequest>,
    ) -> Result<Response<v1::BatchGetResponse>, Status> {
        let operation = operation_of(&request)?;
        let request = request.into_inner();
        let read = || self.cache.batch_get(request.clone(), operation.call());
        Ok(Response::new(operation.run_read(read).await?))
    }

    async fn set(
        &self,
        request: Request<v1::SetRequest>,
    ) -> Result<Response<v1::SetResponse>, Status> {
        let operation = operation_of(&request)?;
        let write = self.cache.set(request.into_inner(), operation.call());
        Ok(acknowledged(operation.run(Box::pin(write)).await?))
    }

    async fn delete(
        &self,
        request: Request<v1::DeleteRequest>,
    ) -> Result<Response<v1::DeleteResponse>, Status> {
        let operation = operation_of(&request)?;
        let write = self.cache.delete(request.into_inner(), operation.call());
        Ok(acknowledged(operation.run(Box::pin(write)).await?))
    }

    async fn invalidate(
        &self,
        request: Request<v1::InvalidateRequest>,
    ) -> Result<Response<v1::InvalidateResponse>, Status> {
        let operation = operation_of(&request)?;
        let write = self
            .cache
            .invalidate(request.into_inner(), operation.call());
        Ok(acknowledged(operation.run(Box::pin(write)).await?))
    }

    async fn inspect(
        &self,
        request: Request<v1::InspectRequest>,
    ) -> Result<Response<v1::InspectResponse>, Status> {
        let operation = operation_of(&request)?;
        let read = self.cache.inspect(request.into_inner(), operation.call());
        Ok(Response::new(operation.run(Box::pin(read)).await?))
    }

    async fn scan(
        &self,
        request: Request<v1::ScanRequest>,
    ) -> Result<Response<Self::ScanStream>, Status> {
        let operation = operation_of(&request)?;
        let page = self.cache.scan(request.into_inner(), operation.call());
        let messages = operation.run_stream(page).await?;
        Ok(Response::new(Box::pin(
            messages.map(|message| message.map_err(Status::from)),
        )))
    }
}

/// Names the leader, so that the next one goes there.
fn acknowledged<T>(written: Acknowledged<T>) -> Response<T> {
    let Acknowledged { response, leader } = written;
    let mut response = Response::new(response);
    if let Some(leader) = leader.and_then(|leader| MetadataValue::try_from(leader).ok()) {
        response
            .metadata_mut()
            .insert(reason::LEADER_HEADER, leader);
    }
    response
}
