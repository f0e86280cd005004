//! What followers ask of this node as leader: the inward end of fetches, reports and forwarded
//! reads.
//!
//! Promises to answer only who belongs to the cluster, and to say so when this node does not lead.
//! Must never forward.

use std::{sync::Arc, time::Duration};

use holdfast_proto::{
    Key,
    limits::{BATCH_KEYS_MAX, DEADLINE_DEFAULT, PEER_MESSAGE_BYTES_MAX},
    peer::{
        FetchRefused, FetchRequest, FetchResponse, Header, ReadRequest, ReadResponse,
        ReportReadsRequest, ReportReadsResponse, UnstoredValue, fetch_response,
        refresh_service_server::{RefreshService, RefreshServiceServer},
    },
    v1::FailureClass,
};
use holdfast_raft::{Peers, Replica, deadline};
use tonic::{Request, Response, Status};

use super::{Landed, NoValue, Refresher, join::NoAnswer, marks::Report, reports::KEYS_MAX};

/// The service that peers call.
pub struct RefreshServer {
    refresher: Arc<Refresher>,
}

impl Refresher {
    /// For the peer listener.
    pub fn service(self: &Arc<Self>) -> RefreshServiceServer<RefreshServer> {
        RefreshServiceServer::new(RefreshServer {
            refresher: self.clone(),
        })
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
    }
}

impl RefreshServer {
    fn checked(&self, header: Option<&Header>) -> Result<(Arc<Peers>, Arc<Replica>), Status> {
        let replicas = &self.refresher.replicas;
        let peers = replicas
            .peers()
            .ok_or_else(|| Status::unavailable("this node does not belong to a cluster yet"))?;
        let shard = peers.check(header)?.shard;
        let replica = replicas.replica(shard).ok_or_else(|| {
            Status::failed_precondition(format!("this node has no replica of shard {shard}"))
        })?;
        Ok((peers, replica))
    }

    async fn fetched(
        &self,
        key: &Key,
        replica: &Arc<Replica>,
        timeout: Duration,
    ) -> Result<fetch_response::Result, Status> {
        let Some(term) = replica.leads() else {
            return Ok(not_leader());
        };
        let joined =
            tokio::time::timeout(timeout, Box::pin(self.refresher.join(key, replica, term))).await;
        match joined {
            Err(_) => Err(Status::deadline_exceeded("the fetch goes on")),
            Ok(Ok(Landed::Committed { revision })) => {
                Ok(fetch_response::Result::CommittedRevision(revision))
            }
            Ok(Ok(Landed::Unstored {
                value,
                content_type,
            })) => Ok(fetch_response::Result::Unstored(UnstoredValue {
                value,
                content_type,
            })),
            Ok(Err(NoAnswer::NotLeading)) => Ok(not_leader()),
            Ok(Err(NoAnswer::NoValue(none))) => Ok(fetch_response::Result::Refused(refused(none))),
        }
    }
}

#[tonic::async_trait]
impl RefreshService for RefreshServer {
    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<FetchResponse>, Status> {
        let timeout = timeout(&request);
        let FetchRequest { header, key } = request.into_inner();
        let (peers, replica) = self.checked(header.as_ref())?;
        let key = checked_key(key)?;
        let owner = self
            .refresher
            .replicas
            .of_key(&key)
            .map(|owner| owner.shard());
        if owner != Some(replica.shard()) {
            return Err(Status::invalid_argument("the key belongs to another shard"));
        }
        let result = Some(self.fetched(&key, &replica, timeout).await?);
        Ok(Response::new(FetchResponse {
            header: Some(peers.reply(Some(replica.state()))),
            result,
        }))
    }

    async fn report_reads(
        &self,
        request: Request<ReportReadsRequest>,
    ) -> Result<Response<ReportReadsResponse>, Status> {
        let ReportReadsRequest { header, read, due } = request.into_inner();
        let (peers, replica) = self.checked(header.as_ref())?;
        let keys = |keys: Vec<bytes::Bytes>| {
            keys.into_iter()
                .take(KEYS_MAX)
                .map(checked_key)
                .collect::<Result<Vec<_>, _>>()
        };
        let report = Report {
            read: keys(read)?,
            due: keys(due)?,
        };
        self.refresher.hear_report(report);
        Ok(Response::new(ReportReadsResponse {
            header: Some(peers.reply(Some(replica.state()))),
        }))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<ReadResponse>, Status> {
        let timeout = timeout(&request);
        let message = request.into_inner();
        let (peers, replica) = self.checked(message.header.as_ref())?;
        let consistency = message.consistency();
        if message.keys.len() > BATCH_KEYS_MAX {
            return Err(Status::invalid_argument(format!(
                "more than {BATCH_KEYS_MAX} keys"
            )));
        }
        let keys = message
            .keys
            .into_iter()
            .map(checked_key)
            .collect::<Result<Vec<_>, _>>()?;
        let reader = self
            .refresher
            .reader
            .get()
            .and_then(std::sync::Weak::upgrade);
        let reader = reader.ok_or_else(|| Status::unavailable("this node answers no reads yet"))?;
        let response = reader
            .read(keys, consistency, message.token, timeout)
            .await?;
        Ok(Response::new(ReadResponse {
            header: Some(peers.reply(Some(replica.state()))),
            response: Some(response),
        }))
    }
}

fn timeout<T>(request: &Request<T>) -> Duration {
    deadline::remaining(request.metadata()).unwrap_or(DEADLINE_DEFAULT)
}

fn checked_key(bytes: bytes::Bytes) -> Result<Key, Status> {
    Key::new(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn not_leader() -> fetch_response::Result {
    fetch_response::Result::Refused(FetchRefused {
        not_leader: true,
        ..Default::default()
    })
}

fn refused(none: NoValue) -> FetchRefused {
    match none {
        NoValue::Failed(failure) => FetchRefused {
            class: failure.class.into(),
            status: failure.status,
            count: failure.count,
            at_ms: failure.at_ms,
            next_attempt_ms: failure.next_attempt_ms,
            not_leader: false,
        },
        NoValue::Overloaded => FetchRefused {
            class: FailureClass::Overloaded.into(),
            ..Default::default()
        },
        NoValue::NoLeader | NoValue::Deadline => FetchRefused {
            not_leader: true,
            ..Default::default()
        },
    }
}
