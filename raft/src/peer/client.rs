//! The Raft protocol outwards: openraft's network, one client per peer, shard and purpose.
//!
//! Appends go through one bidirectional stream, pipelined: requests are sent as they come, answers
//! arrive in their order. The stream ends with an error when the follower needs entries that are to
//! be purged, so that openraft purges them and sends a snapshot. A heartbeat is a call of its own,
//! which once sent is never cancelled by us, so that it reaches a far learner; votes take its
//! channel and wait behind no append.
#![allow(clippy::result_large_err, reason = "openraft's own error types")]

#[cfg(test)]
mod tests;

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
    entry::RaftEntry,
    errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable},
    network::{Backoff, RPCOption, RaftNetworkFactory, RaftNetworkV2},
    raft::{
        AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendError,
        StreamAppendResult, TransferLeaderRequest, VoteRequest, VoteResponse,
    },
    type_config::alias::SnapshotOf,
};
use tokio::sync::Semaphore;
use tonic::{Code, Status};

use super::{CallError, Peers, Purpose, call::MemberQuestion, snapshot::SnapshotError};
use crate::{
    agreement::{
        agreed::Agreed,
        leadership::LeaderClock,
        pins::LogPins,
        state_machine::SnapshotData,
        types::{Types, Vote, entry_to, log_id_from, log_id_to, vote_from, vote_to},
    },
    state::State,
};

/// A stream on which nothing was answered for this long, though something was asked, is dead.
const STREAM_STALLED: Duration = Duration::from_secs(2);
/// What a call may take that waits for nothing.
const CALL_TIMEOUT: Duration = Duration::from_millis(500);
/// A vote counts for as long as its candidate stands: slow disks, whose pace nobody may know yet,
/// only make it late.
const VOTE_TIMEOUT: Duration = Duration::from_secs(10);
/// A heartbeat is given up after this: the farthest learner has it by then. Until then its answer
/// counts, however late.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);
/// Heartbeats on their way to one peer: as many as are sent until the first of them is given up.
const HEARTBEATS_MAX: usize = 64;
/// A peer that does not answer a heartbeat within this is sent no snapshot.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);

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
    pub(crate) agreed: Arc<Agreed>,
}

impl Network {
    /// Followers judge by log time, not by their leader's raw clock. A leader's message names its
    /// term.
    fn header(&self, to: u64, leads: Option<u64>) -> wire::Header {
        let header = self.peers.header(to, self.shard);
        wire::Header {
            now_ms: self.leader_clock.log_time(),
            proof: leads.and_then(|term| self.leader_clock.proof(term, to)),
            agreed: leads.and_then(|_| self.agreed.get()),
            ..header
        }
    }
}

impl RaftNetworkFactory<Types> for Network {
    type Network = PeerClient;

    async fn new_client(&mut self, target: u64, member: &Member) -> PeerClient {
        PeerClient {
            network: self.clone(),
            target,
            address: member.peer_address.clone(),
            purpose: Purpose::Append,
            heartbeats: Arc::new(Semaphore::new(HEARTBEATS_MAX)),
        }
    }

    async fn new_heartbeat_client(&mut self, target: u64, member: &Member) -> PeerClient {
        PeerClient {
            purpose: Purpose::Control,
            ..self.new_client(target, member).await
        }
    }

    async fn new_snapshot_client(&mut self, target: u64, member: &Member) -> PeerClient {
        PeerClient {
            purpose: Purpose::Bulk,
            ..self.new_client(target, member).await
        }
    }
}

pub(crate) struct PeerClient {
    network: Network,
    target: u64,
    address: String,
    purpose: Purpose,
    /// One permit for each that may yet be sent.
    heartbeats: Arc<Semaphore>,
}

impl PeerClient {
    fn heard(&self, reply: Option<&wire::ReplyHeader>) {
        self.network
            .peers
            .heard(self.network.shard, self.target, reply);
    }

    async fn call<Q: MemberQuestion>(&self, question: Q, timeout: Duration) -> Rpc<Q::Reply> {
        self.open()?;
        let header = self.network.header(self.target, None);
        let deadline = self.network.leader_clock.deadline(timeout);
        self.network
            .peers
            .call_at(&self.address(), header, &deadline, question)
            .await
            .map_err(|error| failed(&error))
    }

    fn open(&self) -> Rpc<()> {
        if self.network.peers.is_closed() {
            return Err(RPCError::Unreachable(Unreachable::from_string(
                "this node's disk is stalled: it talks to no peer",
            )));
        }
        Ok(())
    }

    fn client(
        &self,
        purpose: Purpose,
    ) -> wire::replica_service_client::ReplicaServiceClient<tonic::transport::Channel> {
        self.network.peers.replica_client(&self.address(), purpose)
    }

    /// Where it is now: members move.
    fn address(&self) -> String {
        match self.network.peers.member(self.target) {
            Some(member) => member.peer_address,
            None => self.address.clone(),
        }
    }

    /// A stream, of messages or of files, was ended.
    fn stream_failed(&self, status: Status) -> RPCError<Types> {
        let error = CallError::from(status);
        if let CallError::Refused(status) = &error {
            self.network
                .peers
                .note_refusal(self.target, &self.address(), status);
        }
        failed(&error)
    }

    fn call_timeout(&self) -> Duration {
        self.network
            .leader_clock
            .pace()
            .answer_timeout(CALL_TIMEOUT)
    }

    /// One append as a call, in a task of its own: openraft drops its call when its time is up, and
    /// a far learner still shall get it.
    async fn append(
        &self,
        rpc: &AppendEntriesRequest<Types>,
        timeout: Duration,
    ) -> Rpc<AppendEntriesResponse<Types>> {
        self.open()?;
        let too_many = |_| {
            RPCError::Network(NetworkError::from_string(
                "the peer has not answered the heartbeats before",
            ))
        };
        let permit = self
            .heartbeats
            .clone()
            .try_acquire_owned()
            .map_err(too_many)?;
        let mut header = self
            .network
            .header(self.target, Some(rpc.vote.leader_id.term));
        header.acknowledged = self
            .network
            .peers
            .acknowledged()
            .of_shard(self.network.shard);
        let message = wire::AppendRequest {
            header: None,
            vote: Some(vote_to(&rpc.vote)),
            prev_log_id: rpc.prev_log_id.as_ref().map(log_id_to),
            entries: rpc.entries.iter().map(entry_to).collect(),
            leader_commit: rpc.leader_commit.as_ref().map(log_id_to),
        };
        let (peers, address, target) = (self.network.peers.clone(), self.address(), self.target);
        let (leader_clock, term) = (self.network.leader_clock.clone(), rpc.vote.leader_id.term);
        let call = crate::task::spawn(async move {
            let _permit = permit;
            let sent_at = leader_clock.monotonic();
            let deadline = leader_clock.deadline(timeout);
            let response = peers.call_at(&address, header, &deadline, message).await?;
            let took = leader_clock.monotonic().saturating_sub(sent_at);
            peers.measured(target, took, response.header.as_ref());
            if is_acknowledged(response.result.as_ref()) {
                leader_clock.acknowledged(target, term, sent_at);
            }
            Ok::<_, CallError>(response.result)
        });
        let result = call
            .await
            .map_err(|error| network_error(&error))?
            .map_err(|error| failed(&error))?;
        match result {
            Some(append_response::Result::Success(_)) => Ok(AppendEntriesResponse::Success),
            Some(append_response::Result::Partial(matched)) => Ok(
                AppendEntriesResponse::PartialSuccess(matched.log_id.map(log_id_from)),
            ),
            Some(append_response::Result::Conflict(_)) => Ok(AppendEntriesResponse::Conflict),
            Some(append_response::Result::HigherVote(vote)) => {
                Ok(AppendEntriesResponse::HigherVote(vote_of(Some(vote))?))
            }
            None => Err(RPCError::Network(NetworkError::from_string(
                "an answer without a result",
            ))),
        }
    }

    /// Whether the peer is there and takes this leader for one: cheap, where a snapshot costs a
    /// checkpoint. A higher vote if it knows of one.
    async fn probe(&self, vote: &Vote) -> Rpc<Option<Vote>> {
        let heartbeat = AppendEntriesRequest {
            vote: *vote,
            prev_log_id: None,
            entries: Vec::new(),
            leader_commit: None,
        };
        match self.append(&heartbeat, PROBE_TIMEOUT).await? {
            AppendEntriesResponse::HigherVote(higher) => Ok(Some(higher)),
            _ => Ok(None),
        }
    }

    async fn send_snapshot(
        &self,
        vote: &Vote,
        announced: u64,
        install_timeout: Duration,
    ) -> Rpc<SnapshotResponse<Types>> {
        if let Some(higher) = self.probe(vote).await? {
            return Ok(SnapshotResponse { vote: higher });
        }
        let Network {
            snapshots,
            state,
            pins,
            ..
        } = &self.network;
        // openraft goes on from the index it announced, however much newer the files are.
        let pinned = pins.pin(self.target, announced);
        let sent = snapshots
            .send(
                state,
                self.client(Purpose::Bulk),
                Some(self.network.header(self.target, None)),
                vote,
                install_timeout,
            )
            .await;
        let response = sent.map_err(|error| match error {
            SnapshotError::Peer(status) => self.stream_failed(*status),
            other => network_error(&other),
        })?;
        self.heard(response.header.as_ref());
        let vote = vote_of(response.vote)?;
        pinned.arrived();
        Ok(SnapshotResponse { vote })
    }
}

/// The same with a pause before it is tried again: each try may cost a checkpoint, and openraft
/// repeats ten at once without one.
fn unhurried(error: RPCError<Types>) -> StreamingError<Types> {
    StreamingError::Unreachable(Unreachable::from_string(error))
}

impl RaftNetworkV2<Types> for PeerClient {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<Types>,
        _option: RPCOption,
    ) -> Rpc<AppendEntriesResponse<Types>> {
        self.append(&rpc, self.call_timeout()).await
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
            // openraft paces its retries inside this stream: asked before anything can fail, or what
            // fails at once would be tried again without a pause.
            let Some(first) = input.next().await else {
                return Ok(futures::stream::empty().boxed());
            };
            self.open()?;
            // openraft's heartbeat worker sends a stream of one, and the next when this one is
            // done: it is not kept waiting longer than until the next is due.
            if self.purpose == Purpose::Control {
                let pace = self.network.leader_clock.pace();
                let answer = self.append(&first, pace.answer_timeout(HEARTBEAT_TIMEOUT));
                let late = |_| RPCError::Network(NetworkError::from_string("the answer is late"));
                let answer = tokio::time::timeout(pace.heartbeat(), answer)
                    .await
                    .map_err(late)??;
                let last = first
                    .entries
                    .last()
                    .map(RaftEntry::log_id)
                    .or(first.prev_log_id);
                let answer = answer.into_stream_result(first.prev_log_id, last);
                return Ok(futures::stream::once(futures::future::ready(Ok(answer))).boxed());
            }
            let input = futures::stream::iter([first]).chain(input);
            let progress = Arc::new(Progress::default());
            let requests = self.outgoing(input, progress.clone());
            let responses = self
                .client(self.purpose)
                .stream_append(requests)
                .await
                .map_err(|status| self.stream_failed(status))?
                .into_inner();
            let this: &'s PeerClient = self;
            let answers =
                futures::stream::unfold((responses, false), move |(mut responses, ended)| {
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

    async fn vote(
        &mut self,
        rpc: VoteRequest<Types>,
        _option: RPCOption,
    ) -> Rpc<VoteResponse<Types>> {
        let question = wire::VoteRequest {
            header: None,
            vote: Some(vote_to(&rpc.vote)),
            last_log_id: rpc.last_log_id.as_ref().map(log_id_to),
            leadership_transfer: rpc.leadership_transfer,
        };
        let response = self.call(question, VOTE_TIMEOUT).await?;
        Ok(VoteResponse::new(
            vote_of(response.vote)?,
            response.last_log_id.map(log_id_from),
            response.granted,
        ))
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: SnapshotOf<Types, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        let announced = snapshot
            .meta
            .last_log_id
            .as_ref()
            .map_or(0, |last| last.index());
        drop(snapshot);
        tokio::select! {
            closed = cancel => Err(StreamingError::Closed(closed)),
            sent = self.send_snapshot(&vote, announced, option.hard_ttl()) => sent.map_err(unhurried),
        }
    }

    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Types>,
        _option: RPCOption,
    ) -> Rpc<openraft::raft::TransferLeaderResponse<Types>> {
        let question = wire::TransferLeaderRequest {
            header: None,
            from_leader: Some(vote_to(req.from_leader())),
            to_node: *req.to_node_id(),
            last_log_id: req.last_log_id().map(log_id_to),
        };
        let response = self.call(question, self.call_timeout()).await?;
        if !response.accepted {
            return Err(RPCError::Network(NetworkError::from_string(
                "the peer cannot take over now",
            )));
        }
        Ok(Ok(()))
    }

    fn backoff(&self) -> Option<Backoff> {
        const FIRST: Duration = Duration::from_millis(20);
        const LAST: Duration = Duration::from_millis(500);
        const LAST_SNAPSHOT: Duration = Duration::from_secs(2);
        let longest = if self.purpose == Purpose::Bulk {
            LAST_SNAPSHOT
        } else {
            LAST
        };
        let steps = std::iter::successors(Some(FIRST), move |last| Some((*last * 2).min(longest)));
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
    /// The requests as messages, until one needs what is about to be purged, or this node talks to
    /// its peers no more.
    fn outgoing<S>(
        &self,
        input: S,
        progress: Arc<Progress>,
    ) -> impl Stream<Item = wire::StreamAppendRequest> + Send + 'static + use<S>
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + Send + Unpin + 'static,
    {
        let (network, target) = (self.network.clone(), self.target);
        input
            .map(move |rpc| {
                let next = rpc.prev_log_id.as_ref().map_or(0, |prev| prev.index() + 1);
                if network.peers.is_closed() {
                    return None;
                }
                // Without entries it only tells what is committed, or asks what the follower has.
                if !rpc.entries.is_empty() && next < network.keep_from.load(Ordering::Relaxed) {
                    progress.behind.store(true, Ordering::Relaxed);
                    return None;
                }
                progress.sent.fetch_add(1, Ordering::Relaxed);
                Some(wire::StreamAppendRequest {
                    header: Some(network.header(target, Some(rpc.vote.leader_id.term))),
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
            let stalled = self
                .network
                .leader_clock
                .pace()
                .answer_timeout(STREAM_STALLED);
            match tokio::time::timeout(stalled, responses.message()).await {
                Ok(response) => break response,
                Err(_)
                    if progress.sent.load(Ordering::Relaxed)
                        == progress.answered.load(Ordering::Relaxed) => {}
                Err(_) => {
                    return Some(Err(RPCError::Network(NetworkError::from_string(
                        "the peer answers no appends",
                    ))));
                }
            }
        };
        match response {
            Ok(Some(response)) => {
                progress.answered.fetch_add(1, Ordering::Relaxed);
                self.heard(response.header.as_ref());
                let answer = append_answer(response.result);
                if let Ok(Ok(Some(matched))) = &answer {
                    self.network.pins.moved(self.target, matched.index());
                }
                Some(answer)
            }
            Ok(None) if progress.behind.load(Ordering::Relaxed) => Some(Err(RPCError::Network(
                NetworkError::from_string("the follower needs entries that are to be purged"),
            ))),
            Ok(None) => self.open().err().map(Err),
            Err(status) => Some(Err(self.stream_failed(status))),
        }
    }
}

/// A peer that cannot be reached, or will not have us, is left alone for a while; anything else is
/// tried again soon.
fn failed(error: &CallError) -> RPCError<Types> {
    let is_for_a_while = match error {
        CallError::NeverSent(_) | CallError::Lost(_) => true,
        CallError::Refused(status) => matches!(
            status.code(),
            Code::FailedPrecondition | Code::Unavailable | Code::Unimplemented
        ),
        CallError::Timeout | CallError::GivenUp => false,
    };
    match is_for_a_while {
        true => RPCError::Unreachable(Unreachable::from_string(error)),
        false => RPCError::Network(NetworkError::from_string(error)),
    }
}

/// Whoever answers so takes this leader for the leader of its term.
fn is_acknowledged(result: Option<&append_response::Result>) -> bool {
    match result {
        Some(
            append_response::Result::Success(_)
            | append_response::Result::Partial(_)
            | append_response::Result::Conflict(_),
        ) => true,
        Some(append_response::Result::HigherVote(_)) | None => false,
    }
}

fn append_answer(result: Option<stream_append_response::Result>) -> Rpc<StreamAppendResult<Types>> {
    match result {
        Some(stream_append_response::Result::Matched(matched)) => {
            Ok(Ok(matched.log_id.map(log_id_from)))
        }
        Some(stream_append_response::Result::Conflict(log_id)) => {
            Ok(Err(StreamAppendError::Conflict(log_id_from(log_id))))
        }
        Some(stream_append_response::Result::HigherVote(vote)) => {
            Ok(Err(StreamAppendError::HigherVote(vote_of(Some(vote))?)))
        }
        None => Err(RPCError::Network(NetworkError::from_string(
            "an answer without a result",
        ))),
    }
}

fn vote_of(vote: Option<wire::Vote>) -> Rpc<Vote> {
    vote_from(vote).map_err(|missing| network_error(&missing))
}

fn network_error(error: &(dyn std::error::Error + 'static)) -> RPCError<Types> {
    RPCError::Network(NetworkError::from_string(error))
}
