//! The Raft protocol inwards: what peers ask of this node's replicas. The node mounts it on its
//! peer listener.

use std::{sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream::BoxStream};
use holdfast_proto::{
    ShardId,
    peer::{
        self as wire, Header, ReplyHeader, append_response, install_snapshot_request::Part,
        propose_response, replica_service_server::ReplicaService, stream_append_response,
    },
    timeout,
};
use openraft::{
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, StreamAppendError, StreamAppendResult,
        TransferLeaderRequest, VoteResponse,
    },
    storage::Snapshot,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    agreement::{
        campaign::voting_past_leases,
        state_machine::{SnapshotData, snapshot_meta},
        types::{Types, entry_from, log_id_from, log_id_to, vote_from, vote_to},
    },
    error::WriteError,
    local::Local,
    replica::Replica,
};

/// What a leader may take over a forwarded command when its sender names no time.
const PROPOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Answers of one append stream that wait to be sent; openraft keeps as many requests at work.
const APPENDS_IN_PIPELINE: usize = 64;

#[derive(Clone)]
pub struct ReplicaServer {
    local: Arc<Local>,
}

impl ReplicaServer {
    pub(crate) fn new(local: Arc<Local>) -> Self {
        Self { local }
    }

    fn replica(&self, header: Option<&Header>) -> Result<Arc<Replica>, Status> {
        let shard = header.map_or(0, |header| header.shard);
        let peers = self.local.peers().ok_or_else(not_formed)?;
        peers.check(header)?;
        self.of_shard(shard)
    }

    /// For what openraft takes part in.
    fn raft_replica(&self, header: Option<&Header>) -> Result<Arc<Replica>, Status> {
        let shard = header.map_or(0, |header| header.shard);
        let peers = self.local.peers().ok_or_else(not_formed)?;
        peers.check_raft(header)?;
        self.of_shard(shard)
    }

    fn of_shard(&self, shard: ShardId) -> Result<Arc<Replica>, Status> {
        self.local.replica(shard).cloned().ok_or_else(|| {
            Status::failed_precondition(format!("this node has no replica of shard {shard}"))
        })
    }

    /// A voter that restarted may have granted a lease it no longer knows of: it votes for nobody
    /// until that has run out.
    fn may_vote(replica: &Replica) -> Result<(), Status> {
        if replica.campaign().is_quiet() {
            return Err(Status::unavailable(
                "this node started just now and votes for nobody yet",
            ));
        }
        Ok(())
    }
}

fn not_formed() -> Status {
    Status::unavailable("this node does not belong to a cluster yet")
}

fn fatal(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("this replica has stopped: {error}"))
}

fn missing(missing: crate::agreement::types::Missing) -> Status {
    Status::invalid_argument(missing.to_string())
}

#[tonic::async_trait]
impl ReplicaService for ReplicaServer {
    type StreamAppendStream = BoxStream<'static, Result<wire::StreamAppendResponse, Status>>;

    async fn stream_append(
        &self,
        request: Request<Streaming<wire::StreamAppendRequest>>,
    ) -> Result<Response<Self::StreamAppendStream>, Status> {
        let mut messages = request.into_inner();
        let Some(first) = messages.message().await? else {
            return Ok(Response::new(futures::stream::empty().boxed()));
        };
        let replica = self.raft_replica(first.header.as_ref())?;

        let (server, target) = (self.clone(), replica.clone());
        let requests = futures::stream::once(futures::future::ready(Ok(first))).chain(messages);
        let requests = requests.map(move |message| {
            let message = message?;
            server.raft_replica(message.header.as_ref())?;
            target.heard_append(message.vote.as_ref(), message.header.as_ref());
            target.hear_agreed(message.vote.as_ref(), message.header.as_ref());
            append_request(
                message.vote,
                message.prev_log_id,
                message.entries,
                message.leader_commit,
            )
        });
        Ok(Response::new(answers(replica, requests).boxed()))
    }

    async fn append(
        &self,
        request: Request<wire::AppendRequest>,
    ) -> Result<Response<wire::AppendResponse>, Status> {
        let message = request.into_inner();
        let replica = self.raft_replica(message.header.as_ref())?;
        let arrived_at = replica.monotonic();
        replica.note_acknowledged(message.header.as_ref());
        // On arrival, as on the stream: the answer waits for the disk, and for a snapshot that is
        // being installed.
        replica.heard_append(message.vote.as_ref(), message.header.as_ref());
        let rpc = append_request(
            message.vote,
            message.prev_log_id,
            message.entries,
            message.leader_commit,
        )?;
        let response = replica.raft().append_entries(rpc).await.map_err(fatal)?;
        let result = match response {
            AppendEntriesResponse::Success => append_response::Result::Success(wire::Appended {}),
            AppendEntriesResponse::PartialSuccess(log_id) => {
                append_response::Result::Partial(wire::Matched {
                    log_id: log_id.as_ref().map(log_id_to),
                })
            }
            AppendEntriesResponse::Conflict => {
                append_response::Result::Conflict(wire::Conflicted {})
            }
            AppendEntriesResponse::HigherVote(vote) => {
                append_response::Result::HigherVote(vote_to(&vote))
            }
        };
        let held = replica.monotonic().saturating_sub(arrived_at);
        Ok(Response::new(wire::AppendResponse {
            header: Some(ReplyHeader {
                held_us: u32::try_from(held.as_micros()).ok(),
                ..replica.reply()
            }),
            result: Some(result),
        }))
    }

    async fn vote(
        &self,
        request: Request<wire::VoteRequest>,
    ) -> Result<Response<wire::VoteResponse>, Status> {
        let message = request.into_inner();
        let replica = self.raft_replica(message.header.as_ref())?;
        Self::may_vote(&replica)?;
        let campaign = replica.campaign();
        let candidate = vote_from(message.vote).map_err(missing)?;
        let last = message.last_log_id.map(log_id_from);
        let refused = !campaign.may_vote(message.leadership_transfer);
        let response = if refused {
            VoteResponse::new(campaign.vote(), campaign.last_log_id(), false)
        } else {
            campaign.promise(&candidate, last);
            let asked = replica.raft().vote(voting_past_leases(candidate, last));
            asked.await.map_err(fatal)?
        };
        Ok(Response::new(wire::VoteResponse {
            header: Some(replica.reply()),
            vote: Some(vote_to(&response.vote)),
            granted: response.vote_granted,
            last_log_id: response.last_log_id.as_ref().map(log_id_to),
        }))
    }

    async fn pre_vote(
        &self,
        request: Request<wire::PreVoteRequest>,
    ) -> Result<Response<wire::PreVoteResponse>, Status> {
        let message = request.into_inner();
        let replica = self.raft_replica(message.header.as_ref())?;
        Self::may_vote(&replica)?;
        let candidate = vote_from(message.vote).map_err(missing)?;
        let last = message.last_log_id.map(log_id_from);
        let granted = replica.campaign().would_vote(&candidate, last);
        Ok(Response::new(wire::PreVoteResponse {
            // Nothing was waited for.
            header: Some(ReplyHeader {
                held_us: Some(0),
                ..replica.reply()
            }),
            vote: Some(vote_to(&replica.campaign().vote())),
            granted,
        }))
    }

    async fn transfer_leader(
        &self,
        request: Request<wire::TransferLeaderRequest>,
    ) -> Result<Response<wire::TransferLeaderResponse>, Status> {
        let message = request.into_inner();
        let replica = self.raft_replica(message.header.as_ref())?;
        if replica.is_diverged() {
            return Err(Status::unavailable(
                "the state of this replica is not the majority's: it cannot lead",
            ));
        }
        Self::may_vote(&replica)?;
        let vote = vote_from(message.from_leader).map_err(missing)?;
        let rpc = TransferLeaderRequest::<Types>::new(
            vote,
            message.to_node,
            message.last_log_id.map(log_id_from),
        );
        let accepted = replica
            .raft()
            .handle_transfer_leader(rpc)
            .await
            .map_err(fatal)?
            .is_ok();
        Ok(Response::new(wire::TransferLeaderResponse {
            header: Some(replica.reply()),
            accepted,
        }))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<wire::InstallSnapshotRequest>>,
    ) -> Result<Response<wire::InstallSnapshotResponse>, Status> {
        let mut parts = request.into_inner();
        let Some(Part::Header(header)) = parts.message().await?.and_then(|message| message.part)
        else {
            return Err(Status::invalid_argument(
                "a snapshot begins with its header",
            ));
        };
        let replica = self.raft_replica(header.header.as_ref())?;
        let sender_vote = header.vote;
        let vote = vote_from(header.vote).map_err(missing)?;
        if header.repair
            && !(replica.is_diverged()
                && replica.is_from_leader(sender_vote.as_ref(), header.header.as_ref()))
        {
            return Err(Status::failed_precondition(
                "this replica needs no other state, or not from this node",
            ));
        }
        // The old state goes on answering until it is replaced.
        let received = replica.snapshots().receive(&header, &mut parts).await;
        let (dir, applied, bytes) =
            received.map_err(|error| Status::data_loss(error.to_string()))?;
        if header.repair {
            let _installing = replica.install_begins();
            replica.repair(dir).await.map_err(fatal)?;
            return Ok(Response::new(wire::InstallSnapshotResponse {
                header: Some(replica.reply()),
                vote: sender_vote,
            }));
        }
        let meta = snapshot_meta(&applied)
            .map_err(fatal)?
            .ok_or_else(|| Status::invalid_argument("an empty snapshot"))?;
        // The files may be newer than the header, and its sender deposed since: openraft takes no
        // entry of a term that is later than its sender's.
        let newest_term = meta
            .last_log_id
            .as_ref()
            .map_or(0, |last| last.committed_leader_id().term);
        if newest_term > vote.leader_id.term {
            return Err(Status::failed_precondition(
                "the snapshot is of a later term than its sender's",
            ));
        }
        let _installing = replica.install_begins();
        tracing::info!(shard = replica.shard(), bytes, "installing a snapshot");
        let snapshot = Snapshot {
            meta,
            snapshot: SnapshotData::Received { dir, bytes },
        };
        let response = replica
            .raft()
            .install_full_snapshot(vote, snapshot)
            .await
            .map_err(fatal)?;
        Ok(Response::new(wire::InstallSnapshotResponse {
            header: Some(replica.reply()),
            vote: Some(vote_to(&response.vote)),
        }))
    }

    async fn propose(
        &self,
        request: Request<wire::ProposeRequest>,
    ) -> Result<Response<wire::ProposeResponse>, Status> {
        let given = timeout::remaining(request.metadata()).unwrap_or(PROPOSE_TIMEOUT);
        let message = request.into_inner();
        let replica = self.replica(message.header.as_ref())?;
        let command = message
            .command
            .ok_or_else(|| Status::invalid_argument("the command is missing"))?;
        let result = match replica.propose_here(command, given).await {
            Ok(outcome) => propose_response::Result::Outcome(outcome),
            Err(error) => propose_response::Result::Failed(failed(&error)),
        };
        Ok(Response::new(wire::ProposeResponse {
            header: Some(replica.reply()),
            result: Some(result),
        }))
    }

    async fn read_index(
        &self,
        request: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexResponse>, Status> {
        let message = request.into_inner();
        let replica = self.replica(message.header.as_ref())?;
        let index = replica.confirm_leadership().await;
        Ok(Response::new(wire::ReadIndexResponse {
            header: Some(replica.reply()),
            confirmed: index.is_ok(),
            read_log_id: index.ok().map(|index| wire::LogId { term: 0, index }),
            leader: replica.leader().map_or(0, |leader| leader.id),
        }))
    }
}

fn failed(error: &WriteError) -> wire::ProposeFailed {
    wire::ProposeFailed {
        reason: error.reason().into(),
        message: error.to_string(),
        not_applied: error.not_applied(),
        leader: error.leader().unwrap_or(0),
    }
}

/// Feeds openraft's pipeline, and answers in order.
fn answers(
    replica: Arc<Replica>,
    requests: impl Stream<Item = Result<AppendEntriesRequest<Types>, Status>> + Send + 'static,
) -> impl Stream<Item = Result<wire::StreamAppendResponse, Status>> + Send + 'static {
    // openraft's pipeline takes requests only: what is wrong with one ends the stream and is told
    // after the last answer.
    let refused = Arc::new(parking_lot::Mutex::new(None));
    let refusal = refused.clone();
    let accepted = requests.map(move |request| {
        request
            .map_err(|status| *refusal.lock() = Some(status))
            .ok()
    });
    let accepted = accepted
        .take_while(|request| futures::future::ready(request.is_some()))
        .filter_map(futures::future::ready);
    // openraft's stream borrows its handle, a response may not: a task in between owns both.
    let (answers, received) = mpsc::channel(APPENDS_IN_PIPELINE);
    let tasks = replica.tasks().clone();
    tasks.detach("appends", async move {
        let raft = replica.raft().clone();
        let mut results = std::pin::pin!(raft.stream_append(accepted));
        while let Some(result) = results.next().await {
            if answers
                .send(append_response(&replica, result))
                .await
                .is_err()
            {
                return;
            }
        }
        let refusal = refused.lock().take();
        if let Some(status) = refusal {
            let _ = answers.send(Err(status)).await;
        }
    });
    ReceiverStream::new(received)
}

fn append_response(
    replica: &Replica,
    result: Result<StreamAppendResult<Types>, impl std::fmt::Display>,
) -> Result<wire::StreamAppendResponse, Status> {
    let result = match result.map_err(fatal)? {
        Ok(log_id) => stream_append_response::Result::Matched(wire::Matched {
            log_id: log_id.as_ref().map(log_id_to),
        }),
        Err(StreamAppendError::Conflict(log_id)) => {
            stream_append_response::Result::Conflict(log_id_to(&log_id))
        }
        Err(StreamAppendError::HigherVote(vote)) => {
            stream_append_response::Result::HigherVote(vote_to(&vote))
        }
    };
    Ok(wire::StreamAppendResponse {
        header: Some(replica.reply()),
        result: Some(result),
    })
}

fn append_request(
    vote: Option<wire::Vote>,
    prev: Option<wire::LogId>,
    entries: Vec<wire::Entry>,
    commit: Option<wire::LogId>,
) -> Result<AppendEntriesRequest<Types>, Status> {
    Ok(AppendEntriesRequest {
        vote: vote_from(vote).map_err(missing)?,
        prev_log_id: prev.map(log_id_from),
        entries: entries
            .into_iter()
            .map(entry_from)
            .collect::<Result<_, _>>()
            .map_err(missing)?,
        leader_commit: commit.map(log_id_from),
    })
}
