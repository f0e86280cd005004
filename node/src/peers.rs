//! What other nodes ask of this one beside agreement: fetches and reports for the leader of a key,
//! reads that they could not answer themselves, and Sets that its policies judge.
//!
//! Promises to answer only who belongs to the cluster, and never to pass a question on. Must never
//! know how a value is fetched or a read is answered.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_proto::{
    Key,
    limits::{BATCH_KEYS_MAX, DEADLINE_DEFAULT, PEER_MESSAGE_BYTES_MAX},
    peer::{
        FetchRequest, ForwardSetRequest, ForwardSetResponse, Header, ReadRequest, ReadResponse,
        ReportReadsRequest, ReportReadsResponse,
        refresh_service_server::{RefreshService, RefreshServiceServer},
    },
    timeout,
};
use holdfast_raft::{Replica, Replicas};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    cache::{Cache, Demand},
    operation::Call,
    refresh::{Answers, Refresher},
};

/// How long a stream's first message may take.
const FIRST_WITHIN: Duration = Duration::from_secs(2);

/// The service that peers call.
pub struct PeerServer {
    replicas: Arc<Replicas>,
    cache: Arc<Cache>,
    refresher: Arc<Refresher>,
}

/// For the peer listener.
pub fn peer_service(
    replicas: Arc<Replicas>,
    cache: Arc<Cache>,
    refresher: Arc<Refresher>,
) -> RefreshServiceServer<PeerServer> {
    let server = PeerServer {
        replicas,
        cache,
        refresher,
    };
    RefreshServiceServer::new(server)
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
}

impl PeerServer {
    fn call<T>(&self, request: &Request<T>) -> Call {
        let timeout = timeout::remaining(request.metadata()).unwrap_or(DEADLINE_DEFAULT);
        Call::of_peer(self.replicas.clock(), timeout)
    }

    fn checked(&self, header: Option<&Header>) -> Result<Arc<Replica>, Status> {
        let peers = self
            .replicas
            .peers()
            .ok_or_else(|| Status::unavailable("this node does not belong to a cluster yet"))?;
        let shard = peers.check(header)?.shard;
        self.replicas.replica(shard).ok_or_else(|| {
            Status::failed_precondition(format!("this node has no replica of shard {shard}"))
        })
    }
}

#[tonic::async_trait]
impl RefreshService for PeerServer {
    type FetchStream = Answers;

    async fn fetch(
        &self,
        request: Request<Streaming<FetchRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let mut questions = request.into_inner();
        let first = tokio::time::timeout(FIRST_WITHIN, questions.message()).await;
        let first = first.map_err(|_| Status::deadline_exceeded("a stream without a header"))??;
        let first = first.ok_or_else(|| Status::invalid_argument("a stream without a header"))?;
        let replica = self.checked(first.header.as_ref())?;
        let answers = self.refresher.answer_peer(replica, first, questions);
        Ok(Response::new(answers))
    }

    async fn report_reads(
        &self,
        request: Request<ReportReadsRequest>,
    ) -> Result<Response<ReportReadsResponse>, Status> {
        let ReportReadsRequest {
            header,
            read,
            due,
            read_before,
            read_before_at_ms,
        } = request.into_inner();
        let replica = self.checked(header.as_ref())?;
        self.refresher.hear_marks(&read_before, &read_before_at_ms);
        self.refresher
            .reads_reported(checked_keys(read)?, checked_keys(due)?);
        Ok(Response::new(ReportReadsResponse {
            header: Some(replica.reply()),
            policy_hash: self.refresher.policy_hash(),
        }))
    }

    async fn forward_set(
        &self,
        request: Request<ForwardSetRequest>,
    ) -> Result<Response<ForwardSetResponse>, Status> {
        let call = self.call(&request);
        let message = request.into_inner();
        let replica = self.checked(message.header.as_ref())?;
        let set = message
            .set
            .ok_or_else(|| Status::invalid_argument("no Set"))?;
        let set = self.cache.set_for_peer(set, &call).await?;
        Ok(Response::new(ForwardSetResponse {
            header: Some(replica.reply()),
            set: Some(set),
        }))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<ReadResponse>, Status> {
        let call = self.call(&request);
        let message = request.into_inner();
        let replica = self.checked(message.header.as_ref())?;
        let consistency = message.consistency();
        let demand = Demand {
            max_age: message.max_age_ms,
            only_if_cached: message.only_if_cached,
            no_cache: message.no_cache,
            fetch_on_miss: message.fetch_on_miss(),
        };
        if message.keys.len() > BATCH_KEYS_MAX {
            return Err(Status::invalid_argument(format!(
                "more than {BATCH_KEYS_MAX} keys"
            )));
        }
        let response = self
            .cache
            .read_for_peer(message.keys, consistency, message.token, demand, &call)
            .await?;
        Ok(Response::new(ReadResponse {
            header: Some(replica.reply()),
            response: Some(response),
        }))
    }
}

fn checked_key(bytes: Bytes) -> Result<Key, Status> {
    Key::new(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn checked_keys(keys: Vec<Bytes>) -> Result<Vec<Key>, Status> {
    keys.into_iter().map(checked_key).collect()
}
