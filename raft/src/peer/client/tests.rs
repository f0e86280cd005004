//! What openraft asks of the network, against peers that hang, refuse or are not there.

use std::sync::atomic::AtomicUsize;

use openraft::{raft::AppendEntriesRequest, storage::Snapshot};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Streaming};

use super::*;
use crate::{
    agreement::{
        state_machine::snapshot_meta,
        types::{Commands, CommittedLeaderId, Entry, LogId, Payload},
    },
    clock::Clock,
    peer::{Identity, snapshot},
    store::{Stores, space::DiskSpace},
};

const PATIENCE: Duration = Duration::from_secs(20);
/// What openraft gives a heartbeat.
const HEARTBEAT: Duration = Duration::from_millis(50);

/// A follower that counts what it is asked, and answers once it may.
#[derive(Clone)]
struct Follower {
    asked: Arc<Asked>,
    answers: watch::Receiver<bool>,
}

#[derive(Default)]
struct Asked {
    began: AtomicUsize,
    ended: AtomicUsize,
    streams: AtomicUsize,
    snapshots: AtomicUsize,
}

impl Follower {
    async fn may_answer(&self) {
        let _ = self.answers.clone().wait_for(|answers| *answers).await;
    }
}

fn reply() -> Option<wire::ReplyHeader> {
    Some(wire::ReplyHeader::default())
}

fn no_part<T>() -> Result<Response<T>, Status> {
    Err(Status::unimplemented("no part of this test"))
}

#[tonic::async_trait]
impl wire::replica_service_server::ReplicaService for Follower {
    type StreamAppendStream = BoxStream<'static, Result<wire::StreamAppendResponse, Status>>;

    async fn stream_append(
        &self,
        request: Request<Streaming<wire::StreamAppendRequest>>,
    ) -> Result<Response<Self::StreamAppendStream>, Status> {
        self.asked.streams.fetch_add(1, Ordering::SeqCst);
        let answers = request.into_inner().map(|message| {
            let matched = message?.entries.last().and_then(|last| last.log_id);
            let result = Some(stream_append_response::Result::Matched(wire::Matched {
                log_id: matched,
            }));
            Ok(wire::StreamAppendResponse {
                header: reply(),
                result,
            })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn append(
        &self,
        _: Request<wire::AppendRequest>,
    ) -> Result<Response<wire::AppendResponse>, Status> {
        self.asked.began.fetch_add(1, Ordering::SeqCst);
        self.may_answer().await;
        self.asked.ended.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(wire::AppendResponse {
            header: reply(),
            result: Some(append_response::Result::Success(wire::Appended {})),
        }))
    }

    async fn vote(
        &self,
        _: Request<wire::VoteRequest>,
    ) -> Result<Response<wire::VoteResponse>, Status> {
        no_part()
    }

    async fn pre_vote(
        &self,
        _: Request<wire::PreVoteRequest>,
    ) -> Result<Response<wire::PreVoteResponse>, Status> {
        no_part()
    }

    async fn transfer_leader(
        &self,
        _: Request<wire::TransferLeaderRequest>,
    ) -> Result<Response<wire::TransferLeaderResponse>, Status> {
        no_part()
    }

    async fn install_snapshot(
        &self,
        _: Request<Streaming<wire::InstallSnapshotRequest>>,
    ) -> Result<Response<wire::InstallSnapshotResponse>, Status> {
        self.asked.snapshots.fetch_add(1, Ordering::SeqCst);
        Err(Status::data_loss("it cannot use it"))
    }

    async fn propose(
        &self,
        _: Request<wire::ProposeRequest>,
    ) -> Result<Response<wire::ProposeResponse>, Status> {
        no_part()
    }

    async fn read_index(
        &self,
        _: Request<wire::ReadIndexRequest>,
    ) -> Result<Response<wire::ReadIndexResponse>, Status> {
        no_part()
    }
}

/// A leader's network, and one follower.
struct Pair {
    network: Network,
    member: Member,
    asked: Arc<Asked>,
    answers: watch::Sender<bool>,
    _home: tempfile::TempDir,
}

impl Pair {
    async fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound").to_string();
        let (answers, may_answer) = watch::channel(true);
        let asked = Arc::new(Asked::default());
        let follower = Follower {
            asked: asked.clone(),
            answers: may_answer,
        };
        let service = wire::replica_service_server::ReplicaServiceServer::new(follower);
        let served = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(served);

        let home = tempfile::tempdir().expect("a directory");
        let (clock, stores) = (Clock::system(), Stores::memory());
        let state = State::open(&stores, 0, 1 << 20).expect("a state");
        let identity = Identity {
            session: 1,
            cluster_id: "c".into(),
            epoch: 1,
            node_id: 1,
            incarnation: 1,
        };
        let peers = Arc::new(Peers::new(clock.clone(), identity, Arc::new(())));
        let space = Arc::new(DiskSpace::open(None, u64::MAX).expect("a disk"));
        let scratch = home.path().join("snapshots");
        let snapshots =
            snapshot::Sender::new(stores, scratch, Arc::new(()), space).expect("snapshots");
        let network = Network {
            agreed: Arc::default(),
            leader_clock: Arc::new(LeaderClock::new(
                0,
                clock.clone(),
                state.clone(),
                peers.clone(),
                Arc::default(),
            )),
            peers,
            state,
            shard: 0,
            keep_from: Arc::default(),
            snapshots: Arc::new(snapshots),
            pins: LogPins::new(clock),
        };
        let member = Member {
            id: 2,
            peer_address: address,
            ..Member::default()
        };
        Self {
            network,
            member,
            asked,
            answers,
            _home: home,
        }
    }

    async fn appends(&self) -> PeerClient {
        self.network.clone().new_client(2, &self.member).await
    }

    async fn heartbeats(&self) -> PeerClient {
        self.network
            .clone()
            .new_heartbeat_client(2, &self.member)
            .await
    }

    async fn snapshots(&self) -> PeerClient {
        self.network
            .clone()
            .new_snapshot_client(2, &self.member)
            .await
    }
}

async fn until(what: &str, reached: impl Fn() -> bool) {
    let reaching = async {
        while !reached() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reaching)
        .await
        .unwrap_or_else(|_| panic!("not in time: {what}"));
}

fn vote() -> Vote {
    vote_from(Some(wire::Vote {
        term: 1,
        voted_for: Some(1),
        committed: true,
    }))
    .expect("a whole vote")
}

fn log_id(index: u64) -> LogId {
    LogId::new(CommittedLeaderId::new(1), index)
}

fn heartbeat() -> AppendEntriesRequest<Types> {
    AppendEntriesRequest {
        vote: vote(),
        prev_log_id: Some(log_id(5)),
        entries: Vec::new(),
        leader_commit: Some(log_id(5)),
    }
}

fn append(index: u64) -> AppendEntriesRequest<Types> {
    let entry: Entry = RaftEntry::new(
        log_id(index),
        Payload::Normal(Commands(b"x".as_slice().into())),
    );
    AppendEntriesRequest {
        prev_log_id: Some(log_id(index - 1)),
        entries: vec![entry],
        ..heartbeat()
    }
}

/// As openraft's heartbeat worker does it.
async fn beat(client: &mut PeerClient) -> Option<Rpc<StreamAppendResult<Types>>> {
    let input = futures::stream::iter([heartbeat()]);
    match client.stream_append(input, RPCOption::new(HEARTBEAT)).await {
        Ok(mut answers) => answers.next().await,
        Err(error) => Some(Err(error)),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_is_a_call_of_its_own_and_reaches_a_follower_that_the_log_has_left_behind() {
    let pair = Pair::new().await;
    pair.network.keep_from.store(1000, Ordering::Relaxed);
    let answer = beat(&mut pair.heartbeats().await).await;
    assert!(matches!(answer, Some(Ok(Ok(Some(matched)))) if matched == log_id(5)));
    assert_eq!(
        (
            pair.asked.ended.load(Ordering::SeqCst),
            pair.asked.streams.load(Ordering::SeqCst)
        ),
        (1, 0)
    );
    assert!(
        pair.network.peers.view(0, 2).is_some(),
        "its answer was heard"
    );

    // On the append stream what tells only of a commit goes through; what needs purged entries ends
    // it.
    let input = futures::stream::iter([heartbeat(), append(6), heartbeat()]);
    let mut client = pair.appends().await;
    let answers = client
        .stream_append(input, RPCOption::new(HEARTBEAT))
        .await
        .expect("connected");
    let answers: Vec<_> = answers.collect().await;
    assert!(
        matches!(answers.as_slice(), [Ok(Ok(_)), Err(RPCError::Network(_))]),
        "{answers:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_openraft_gave_up_still_arrives_and_a_peer_that_hangs_gets_no_pile_of_them()
 {
    let pair = Pair::new().await;
    let mut client = pair.heartbeats().await;
    pair.answers.send_replace(false);
    for sent in 1..=HEARTBEATS_MAX {
        tokio::select! {
            answer = beat(&mut client) => panic!("the follower hangs: {answer:?}"),
            () = until("the heartbeat arrives", || pair.asked.began.load(Ordering::SeqCst) == sent) => {}
        }
    }
    assert!(
        matches!(beat(&mut client).await, Some(Err(RPCError::Network(_)))),
        "no more until it answers"
    );
    assert_eq!(pair.asked.began.load(Ordering::SeqCst), HEARTBEATS_MAX);

    pair.answers.send_replace(true);
    until("all are answered", || {
        pair.asked.ended.load(Ordering::SeqCst) == HEARTBEATS_MAX
    })
    .await;
    until("room again", || {
        client.heartbeats.available_permits() == HEARTBEATS_MAX
    })
    .await;
    assert!(matches!(beat(&mut client).await, Some(Ok(Ok(_)))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn votes_never_wait_behind_appends() {
    let pair = Pair::new().await;
    let mut client = pair.appends().await;
    let option = RPCOption::new(PATIENCE);
    let _ = client
        .vote(VoteRequest::new(vote(), None), option.clone())
        .await;
    let _ = client
        .pre_vote(VoteRequest::new(vote(), None), option.clone())
        .await;
    let _ = client
        .transfer_leader(TransferLeaderRequest::new(vote(), 2, None), option)
        .await;
    assert_eq!(pair.network.peers.channels.used_for(), [Purpose::Control]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_leaves_its_peers_ends_its_append_streams() {
    let pair = Pair::new().await;
    let (requests, input) = tokio::sync::mpsc::channel(1);
    let mut client = pair.appends().await;
    requests.send(append(6)).await.expect("open");
    let input = tokio_stream::wrappers::ReceiverStream::new(input);
    let mut answers = client
        .stream_append(input, RPCOption::new(HEARTBEAT))
        .await
        .expect("connected");
    assert!(matches!(answers.next().await, Some(Ok(Ok(Some(_))))));
    pair.network.peers.set_closed(true);
    requests.send(append(7)).await.expect("open");
    assert!(matches!(
        answers.next().await,
        Some(Err(RPCError::Unreachable(_)))
    ));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_follower_has_moves_its_pin() {
    let pair = Pair::new().await;
    let pin = pair.network.pins.pin(2, 3);
    let mut client = pair.appends().await;
    let answers = client
        .stream_append(
            futures::stream::iter([append(6)]),
            RPCOption::new(HEARTBEAT),
        )
        .await
        .expect("connected");
    assert_eq!(answers.count().await, 1);
    assert_eq!(pair.network.pins.keep_from(100), 6);
    drop(pin);
}

async fn send_snapshot(pair: &Pair) -> StreamingError<Types> {
    let record = wire::AppliedRecord {
        last_applied: Some(wire::LogId { term: 1, index: 5 }),
        ..wire::AppliedRecord::default()
    };
    let meta = snapshot_meta(&record)
        .expect("no membership to misread")
        .expect("not empty");
    let snapshot = Snapshot {
        meta,
        snapshot: SnapshotData::Promise(pair.network.state.clone()),
    };
    let mut client = pair.snapshots().await;
    client
        .full_snapshot(
            vote(),
            snapshot,
            futures::future::pending(),
            RPCOption::new(PATIENCE),
        )
        .await
        .expect_err("it does not arrive")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_checkpoint_is_made_for_a_peer_that_is_not_there_and_no_failure_is_repeated_at_once() {
    let mut pair = Pair::new().await;
    let error = send_snapshot(&pair).await;
    assert!(matches!(error, StreamingError::Unreachable(_)), "{error}");
    assert_eq!(pair.network.pins.keep_from(100), 100, "it holds no log");

    // It hangs, then it is gone. A checkpoint would fail, and say so.
    pair.network.state.close();
    let error = send_snapshot(&pair).await.to_string();
    assert!(error.contains("the state is closed"), "{error}");
    pair.answers.send_replace(false);
    let error = send_snapshot(&pair).await;
    assert!(
        matches!(&error, StreamingError::Unreachable(_)) && !error.to_string().contains("closed"),
        "{error}"
    );
    let gone = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a port")
        .local_addr()
        .expect("bound");
    pair.member.peer_address = gone.to_string();
    let error = send_snapshot(&pair).await;
    assert!(
        matches!(&error, StreamingError::Unreachable(_)) && !error.to_string().contains("closed"),
        "{error}"
    );
}

/// The pause between two tries is in the stream: who has left its peers asks for it first, or its
/// threads would do nothing but try.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_left_its_peers_tries_at_openrafts_pace() {
    let pair = Pair::new().await;
    pair.network.peers.set_closed(true);
    for mut client in [pair.appends().await, pair.heartbeats().await] {
        let paused = client.stream_append(futures::stream::pending(), RPCOption::new(HEARTBEAT));
        let early = tokio::time::timeout(Duration::from_millis(20), paused).await;
        assert!(early.is_err(), "it failed before its time");
        drop(early);
        let tried = beat(&mut client).await;
        assert!(
            matches!(tried, Some(Err(RPCError::Unreachable(_)))),
            "{tried:?}"
        );
    }
}
