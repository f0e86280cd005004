//! The Raft protocol outwards: openraft's network, one client per peer, shard and purpose.
//!
//! Appends go through one bidirectional stream, pipelined: requests are sent as they come, answers arrive in their order.
//! The stream ends with an error when the follower needs entries that are to be purged, so that openraft purges them and
//! sends a snapshot. A heartbeat that was sent is never cancelled by us, so that it reaches a far learner.
#![allow(clippy::result_large_err, reason = "openraft's own error types")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{
    FutureExt, Stream, StreamExt,
    future::{BoxFuture, Future},
    stream::BoxStream,
};
use holdfast_proto::{
    ShardId,
    peer::{self as wire, Member, append_response, stream_append_response},
};
use openraft::{
    OptionalSend,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
        VoteRequest, VoteResponse,
    },
    type_config::alias::SnapshotOf,
};
use tonic::{Code, Request, Status};

use super::{Peers, Purpose};
use crate::{
    agreement::{
        leadership::LeaderClock,
        pins::LogPins,
        state_machine::SnapshotData,
        types::{Types, Vote, entry_to, log_id_from, log_id_to, vote_from, vote_to},
    },
    state::State,
};

/// A stream on which nothing was answered for this long, though something was asked, is dead.
const STREAM_STALLED: Duration = Duration::from_secs(2);
/// A unary call ends after this, unless openraft asks for longer.
const CALL_TIMEOUT_MIN: Duration = Duration::from_millis(250);

type Rpc<T> = Result<T, RPCError<Types>>;

/// Makes clients for one shard.
#[derive(Clone)]
pub(crate) struct Network {
    pub(crate) peers: Arc<Peers>,
    pub(crate) state: Arc<State>,
    pub(crate) shard: ShardId,
    /// The log below this index is about to go: followers that need it get a snapshot.
    pub(crate) keep_from: Arc<AtomicU64>,
    pub(crate) snapshots: Arc<super::snapshot::Sender>,
    pub(crate) leader_clock: Arc<LeaderClock>,
    pub(crate) pins: LogPins,
}

impl Network {
    /// Followers judge by the time that the leader stamps with, not by its raw clock.
    fn header(&self, to: u64) -> wire::Header {
        wire::Header { now_ms: self.leader_clock.leader_now(), ..self.peers.header(to, self.shard, Some(&self.state)) }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, member: &Member) -> PeerClient {
        PeerClient { network: self.clone(), target, address: member.peer_address.clone(), purpose: Purpose::Append }
    }

    async fn new_heartbeat_client(&mut self, target: u64, member: &Member) -> PeerClient {
        PeerClient { purpose: Purpose::Control, ..self.new_client(target, member).await }
    }

    async fn new_snapshot_client(&mut self, target: u64, member: &Member) -> PeerClient {
        PeerClient { purpose: Purpose::Bulk, ..self.new_client(target, member).await }
    }
}

pub(crate) struct PeerClient {
    network: Network,
    target: u64,
    address: String,
    purpose: Purpose,
}

impl PeerClient {
    fn header(&self) -> Option<wire::Header> {
        Some(self.network.header(self.target))
    }

    fn heard(&self, reply: Option<&wire::ReplyHeader>) {
        self.network.peers.heard(self.network.shard, self.target, reply);
    }

    fn open(&self) -> Rpc<()> {
        if self.network.peers.is_closed() {
            return Err(RPCError::Unreachable(Unreachable::from_string("this node's disk is stalled: it talks to no peer")));
        }
        Ok(())
    }

    fn client(&self) -> wire::replica_service_client::ReplicaServiceClient<tonic::transport::Channel> {
        self.network.peers.replica_client(&self.address, self.purpose)
    }

    /// A peer that cannot be reached, or will not have us, is left alone for a while; anything else is tried again soon.
    fn failed(&self, status: &Status) -> RPCError<Types> {
        match status.code() {
            Code::FailedPrecondition => {
                self.network.peers.note_refusal(self.target, &self.address, status);
                RPCError::Unreachable(Unreachable::from_string(status))
            }
            Code::Unavailable | Code::Unimplemented => RPCError::Unreachable(Unreachable::from_string(status)),
            _ => RPCError::Network(NetworkError::from_string(status)),
        }
    }

    fn request<T>(&self, message: T, option: &RPCOption) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(option.hard_ttl().max(CALL_TIMEOUT_MIN));
        request
    }
}

impl RaftNetworkV2<Types> for PeerClient {
    type SnapshotData = SnapshotData;

    async fn append_entries(&mut self, rpc: AppendEntriesRequest<Types>, option: RPCOption) -> Rpc<AppendEntriesResponse<Types>> {
        self.open()?;
        let message = wire::AppendRequest {
            header: self.header(),
            vote: Some(vote_to(&rpc.vote)),
            prev_log_id: rpc.prev_log_id.as_ref().map(log_id_to),
            entries: rpc.entries.iter().map(entry_to).collect(),
            leader_commit: rpc.leader_commit.as_ref().map(log_id_to),
        };
        // In a task of its own: openraft drops this call when its time is up, and a far learner still shall get it.
        let (mut client, request) = (self.client(), self.request(message, &option));
        let call = crate::task::spawn(async move { client.append(request).await });
        let response = call.await.map_err(|error| network_error(&error))?.map_err(|status| self.failed(&status))?.into_inner();
        self.heard(response.header.as_ref());
        match response.result {
            Some(append_response::Result::Success(_)) => Ok(AppendEntriesResponse::Success),
            Some(append_response::Result::Partial(matched)) => Ok(AppendEntriesResponse::PartialSuccess(matched.log_id.map(log_id_from))),
            Some(append_response::Result::Conflict(_)) => Ok(AppendEntriesResponse::Conflict),
            Some(append_response::Result::HigherVote(vote)) => Ok(AppendEntriesResponse::HigherVote(vote_of(Some(vote))?)),
            None => Err(RPCError::Network(NetworkError::from_string("an answer without a result"))),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, Rpc<BoxStream<'s, Rpc<StreamAppendResult<Types>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        async move {
            self.open()?;
            // openraft paces its retries inside this stream: asked before the dial, so that a dead peer is not dialled all the time.
            let Some(first) = input.next().await else { return Ok(futures::stream::empty().boxed()) };
            let input = futures::stream::iter([first]).chain(input);
            let progress = Arc::new(Progress::default());
            let requests = self.outgoing(input, progress.clone());
            let responses = self.client().stream_append(requests).await.map_err(|status| self.failed(&status))?.into_inner();
            let this: &'s PeerClient = self;
            let answers = futures::stream::unfold((responses, false), move |(mut responses, ended)| {
                let progress = progress.clone();
                async move {
                    if ended {
                        return None;
                    }
                    let answer = this.next_answer(&mut responses, &progress).await?;
                    let ended = !matches!(answer, Ok(Ok(_)));
                    Some((answer, (responses, ended)))
                }
            });
            Ok(answers.boxed())
        }
        .boxed()
    }

    async fn vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Rpc<VoteResponse<Types>> {
        self.open()?;
        let message = wire::VoteRequest {
            header: self.header(),
            vote: Some(vote_to(&rpc.vote)),
            last_log_id: rpc.last_log_id.as_ref().map(log_id_to),
            leadership_transfer: rpc.leadership_transfer,
        };
        let response = self.client().vote(self.request(message, &option)).await.map_err(|status| self.failed(&status))?.into_inner();
        self.heard(response.header.as_ref());
        Ok(VoteResponse::new(vote_of(response.vote)?, response.last_log_id.map(log_id_from), response.granted))
    }

    async fn pre_vote(&mut self, rpc: VoteRequest<Types>, option: RPCOption) -> Rpc<VoteResponse<Types>> {
        self.open()?;
        let message = wire::PreVoteRequest {
            header: self.header(),
            vote: Some(vote_to(&rpc.vote)),
            last_log_id: rpc.last_log_id.as_ref().map(log_id_to),
            leadership_transfer: rpc.leadership_transfer,
        };
        let response = self.client().pre_vote(self.request(message, &option)).await.map_err(|status| self.failed(&status))?.into_inner();
        self.heard(response.header.as_ref());
        Ok(VoteResponse::new(vote_of(response.vote)?, response.last_log_id.map(log_id_from), response.granted))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Types, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        self.open()?;
        // openraft goes on from the index it announced, however much newer the files are.
        let _pinned = self.network.pins.pin(snapshot.meta.last_log_id.as_ref().map_or(0, |last| last.index()));
        drop(snapshot);
        let header = self.header();
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.network.snapshots.send(&self.network.state, self.client(), header, &vote) => {
                let response = sent.map_err(|error| StreamingError::Network(NetworkError::from_string(error)))?;
                self.heard(response.header.as_ref());
                Ok(SnapshotResponse { vote: vote_of(response.vote).map_err(StreamingError::from)? })
            }
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Rpc<openraft::raft::TransferLeaderResponse<Types>> {
        self.open()?;
        let message = wire::TransferLeaderRequest {
            header: self.header(),
            from_leader: Some(vote_to(req.from_leader())),
            to_node: *req.to_node_id(),
            last_log_id: req.last_log_id().map(log_id_to),
        };
        let sent = self.client().transfer_leader(self.request(message, &option)).await;
        let response = sent.map_err(|status| self.failed(&status))?.into_inner();
        self.heard(response.header.as_ref());
        if !response.accepted {
            return Err(RPCError::Network(NetworkError::from_string("the peer cannot take over now")));
        }
        Ok(Ok(()))
    }

    fn backoff(&self) -> Option<Backoff> {
        const FIRST: Duration = Duration::from_millis(20);
        const LAST: Duration = Duration::from_millis(500);
        let steps = std::iter::successors(Some(FIRST), |last| Some((*last * 2).min(LAST)));
        Some(Backoff::new(steps))
    }
}

/// What both halves of an append stream know of each other.
#[derive(Default)]
struct Progress {
    sent: AtomicU64,
    answered: AtomicU64,
    behind: AtomicBool,
}

impl PeerClient {
    /// The requests as messages, until one needs what is about to be purged.
    fn outgoing<S>(&self, input: S, progress: Arc<Progress>) -> impl Stream<Item = wire::StreamAppendRequest> + Send + 'static + use<S>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
    {
        let (network, target) = (self.network.clone(), self.target);
        input
            .map(move |rpc| {
                let next = rpc.prev_log_id.as_ref().map_or(0, |prev| prev.index() + 1);
                if next < network.keep_from.load(Ordering::Relaxed) {
                    progress.behind.store(true, Ordering::Relaxed);
                    return None;
                }
                progress.sent.fetch_add(1, Ordering::Relaxed);
                Some(wire::StreamAppendRequest {
                    header: Some(network.header(target)),
                    vote: Some(vote_to(&rpc.vote)),
                    prev_log_id: rpc.prev_log_id.as_ref().map(log_id_to),
                    entries: rpc.entries.iter().map(entry_to).collect(),
                    leader_commit: rpc.leader_commit.as_ref().map(log_id_to),
                })
            })
            .take_while(|message| futures::future::ready(message.is_some()))
            .filter_map(futures::future::ready)
    }

    async fn next_answer(
        &self,
        responses: &mut tonic::Streaming<wire::StreamAppendResponse>,
        progress: &Progress,
    ) -> Option<Rpc<StreamAppendResult<Types>>> {
        let response = loop {
            match tokio::time::timeout(STREAM_STALLED, responses.message()).await {
                Ok(response) => break response,
                Err(_) if progress.sent.load(Ordering::Relaxed) == progress.answered.load(Ordering::Relaxed) => {}
                Err(_) => return Some(Err(RPCError::Network(NetworkError::from_string("the peer answers no appends")))),
            }
        };
        match response {
            Ok(Some(response)) => {
                progress.answered.fetch_add(1, Ordering::Relaxed);
                self.heard(response.header.as_ref());
                Some(append_answer(response.result))
            }
            Ok(None) if progress.behind.load(Ordering::Relaxed) => {
                Some(Err(RPCError::Network(NetworkError::from_string("the follower needs entries that are to be purged"))))
            }
            Ok(None) => None,
            Err(status) => Some(Err(self.failed(&status))),
        }
    }
}

fn append_answer(result: Option<stream_append_response::Result>) -> Rpc<StreamAppendResult<Types>> {
    match result {
        Some(stream_append_response::Result::Matched(matched)) => Ok(Ok(matched.log_id.map(log_id_from))),
        Some(stream_append_response::Result::Conflict(log_id)) => Ok(Err(StreamAppendError::Conflict(log_id_from(log_id)))),
        Some(stream_append_response::Result::HigherVote(vote)) => Ok(Err(StreamAppendError::HigherVote(vote_of(Some(vote))?))),
        None => Err(RPCError::Network(NetworkError::from_string("an answer without a result"))),
    }
}

fn vote_of(vote: Option<wire::Vote>) -> Rpc<Vote> {
    vote_from(vote).map_err(|missing| network_error(&missing))
}

fn network_error(error: &(dyn std::error::Error + 'static)) -> RPCError<Types> {
    RPCError::Network(NetworkError::from_string(error))
}
