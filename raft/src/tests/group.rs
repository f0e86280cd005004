//! Groups of nodes in one process, on real listeners: form, write, read, fail over, restart, join.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use holdfast_proto::{
    Key, Token,
    peer::{self, Delete, Lifetime, Outcome, Set, command::Op, outcome},
    timeline::FOREVER,
    v1::{Origin, RequestId},
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;

use crate::{
    Clock, Deadline, LogKept, Membership, Options, Replica, Replicas, Seen,
    agreement::types::{Types, log_id_from, vote_from},
    store::{Budget, Engine, Stores},
};

pub(super) struct Node {
    pub(super) dir: TempDir,
    pub(super) options: Options,
    pub(super) stores: Stores,
    pub(super) address: SocketAddr,
    running: Option<Running>,
}

struct Running {
    replicas: Arc<Replicas>,
    stop: CancellationToken,
    server: tokio::task::JoinHandle<()>,
}

pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn patience() -> Deadline {
    Clock::system().deadline(PATIENCE)
}

impl Node {
    pub(super) async fn start(&mut self) {
        let listener = bind(self.address).await;
        let replicas = Replicas::open(
            self.options.clone(),
            self.stores.clone(),
            Clock::system(),
            Arc::new(()),
        )
        .await
        .expect("opens");
        let stop = CancellationToken::new();
        let served = tonic::transport::Server::builder()
            .add_service(replicas.replica_service())
            .add_service(replicas.membership_service())
            .serve_with_incoming_shutdown(
                TcpListenerStream::new(listener),
                stop.clone().cancelled_owned(),
            );
        let server = tokio::spawn(async move { served.await.expect("serves") });
        replicas.start();
        self.running = Some(Running {
            replicas,
            stop,
            server,
        });
    }

    pub(super) async fn stop(&mut self) {
        let Some(running) = self.running.take() else {
            return;
        };
        running.replicas.close().await;
        running.stop.cancel();
        running.server.abort();
        let _ = running.server.await;
        drop(running.replicas);
    }

    pub(super) fn replicas(&self) -> &Arc<Replicas> {
        &self.running.as_ref().expect("running").replicas
    }

    pub(super) async fn member(&self) {
        let mut membership = self.replicas().membership();
        tokio::time::timeout(
            PATIENCE,
            membership.wait_for(|membership| *membership == Membership::Member),
        )
        .await
        .expect("in time")
        .expect("open");
    }

    pub(super) fn replica(&self) -> Arc<Replica> {
        self.replicas().replica(0).expect("shard 0")
    }
}

async fn bind(address: SocketAddr) -> TcpListener {
    for _ in 0..200 {
        if let Ok(listener) = TcpListener::bind(address).await {
            return listener;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    TcpListener::bind(address)
        .await
        .expect("the port is free again")
}

/// `n` nodes that know of each other; `expect` of them form.
pub(super) async fn nodes(n: usize, expect: u32, shards: u32) -> Vec<Node> {
    let mut listeners = Vec::new();
    for _ in 0..n {
        listeners.push(TcpListener::bind("127.0.0.1:0").await.expect("a port"));
    }
    let addresses: Vec<SocketAddr> = listeners
        .iter()
        .map(|listener| listener.local_addr().expect("bound"))
        .collect();
    let discover: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let node = |(number, &address): (usize, &SocketAddr)| {
        let dir = tempfile::tempdir().expect("a directory");
        let stores = Stores::open(Engine::DEFAULT, dir.path(), Budget::default()).expect("stores");
        let options = Options {
            name: format!("n{}", number + 1),
            region: String::new(),
            learner_only: false,
            data_dir: dir.path().into(),
            peer_address: address.to_string(),
            client_address: String::new(),
            expect,
            discover: discover.clone(),
            shards,
            memory_bytes_max: 64 << 20,
            disk_bytes_max: 1 << 40,
            log_kept: LogKept {
                entries: 1000,
                bytes: 64 << 20,
            },
        };
        Node {
            dir,
            options,
            stores,
            address,
            running: None,
        }
    };
    addresses.iter().enumerate().map(node).collect()
}

pub(super) fn set(key: &str, value: &str) -> Op {
    Op::Set(Set {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        lifetime: Some(Lifetime {
            fresh_ms: FOREVER,
            refresh_after_ms: FOREVER,
            ..Lifetime::default()
        }),
        origin: Origin::Plain.into(),
        ..Set::default()
    })
}

fn revision(outcome: Outcome) -> u64 {
    match outcome.result {
        Some(outcome::Result::Done(done)) => done.revision,
        other => panic!("not done: {other:?}"),
    }
}

pub(super) fn value(replica: &Replica, key: &str) -> Option<Bytes> {
    replica
        .state()
        .get(&Key::new(key.to_owned()).expect("a key"))
        .expect("reads")
        .and_then(|entry| entry.value.clone())
}

/// Writes again until somebody says what it came to, as a client does: the request id makes it
/// happen once.
pub(super) async fn write_on(replica: &Replica, op: Op) -> Outcome {
    let request_id = RequestId {
        client: Bytes::from_static(&[7; 16]),
        seq: 1,
        done_below: 0,
    };
    let written = async {
        loop {
            match replica
                .write(op.clone(), Some(request_id.clone()), &patience())
                .await
            {
                Ok(outcome) => return outcome,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, written)
        .await
        .expect("written in time")
}

pub(super) async fn leader_of(nodes: &[Node]) -> usize {
    let found = async {
        loop {
            for (number, node) in nodes.iter().enumerate() {
                if node.running.is_some()
                    && node
                        .replicas()
                        .replica(0)
                        .is_some_and(|replica| replica.leads().is_some())
                {
                    return number;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found)
        .await
        .expect("a leader in time")
}

/// `n` voters of one shard and which of them leads.
pub(super) async fn formed(n: u32) -> (Vec<Node>, usize) {
    formed_of(nodes(n as usize, n, 1).await).await
}

pub(super) async fn formed_of(mut nodes: Vec<Node>) -> (Vec<Node>, usize) {
    for node in &mut nodes {
        node.start().await;
    }
    for node in &nodes {
        node.member().await;
    }
    let leader = leader_of(&nodes).await;
    (nodes, leader)
}

pub(super) async fn stop(nodes: Vec<Node>) {
    for mut node in nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_form_replicate_fail_over_and_restart() {
    let (mut nodes, leader) = formed(3).await;
    let follower = (leader + 1) % 3;

    // A write through a follower is forwarded, and every node has it.
    let outcome = nodes[follower]
        .replica()
        .write(set("greeting", "hello"), None, &patience())
        .await
        .expect("written");
    let revision_1 = revision(outcome);
    let mut token = Token::new(1);
    token.see(0, revision_1);
    for node in &nodes {
        node.replica()
            .wait_until_seen(&Seen::Token(token.clone()), PATIENCE, &patience())
            .await
            .expect("seen");
        assert_eq!(
            value(&node.replica(), "greeting").as_deref(),
            Some(b"hello".as_slice())
        );
    }

    // The leader goes: the others elect, write, and read linearizably.
    nodes[leader].stop().await;
    let outcome = write_on(&nodes[follower].replica(), set("greeting", "again")).await;
    assert!(revision(outcome) > revision_1);
    let other = (leader + 2) % 3;
    nodes[other]
        .replica()
        .wait_until_seen(&Seen::Everything, PATIENCE, &patience())
        .await
        .expect("linearizable on a follower");
    assert_eq!(
        value(&nodes[other].replica(), "greeting").as_deref(),
        Some(b"again".as_slice())
    );

    if Engine::DEFAULT == Engine::Memory {
        return;
    }
    // It comes back and catches up.
    nodes[leader].start().await;
    nodes[leader]
        .replica()
        .wait_until_seen(&Seen::Everything, PATIENCE, &patience())
        .await
        .expect("caught up");
    assert_eq!(
        value(&nodes[leader].replica(), "greeting").as_deref(),
        Some(b"again".as_slice())
    );

    // All of them go and come back: nothing acknowledged is lost.
    let deleted = nodes[other]
        .replica()
        .write(
            Op::Delete(Delete {
                key: Bytes::from_static(b"greeting"),
            }),
            None,
            &patience(),
        )
        .await;
    revision(deleted.expect("deleted"));
    for node in &mut nodes {
        node.stop().await;
    }
    for node in &mut nodes {
        node.start().await;
    }
    nodes[0]
        .replica()
        .wait_until_seen(&Seen::Everything, PATIENCE, &patience())
        .await
        .expect("a quorum again");
    assert_eq!(value(&nodes[0].replica(), "greeting"), None);
    for node in &mut nodes {
        node.stop().await;
        assert!(node.dir.path().exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_node_is_a_cluster_of_three_shards() {
    let mut nodes = nodes(1, 1, 3).await;
    nodes[0].options.discover.clear();
    nodes[0].start().await;
    nodes[0].member().await;
    for n in 0..50 {
        let key = format!("key-{n}");
        let replica = nodes[0]
            .replicas()
            .of_key(key.as_bytes())
            .expect("open")
            .clone();
        revision(
            replica
                .write(set(&key, "v"), None, &patience())
                .await
                .expect("written"),
        );
        assert_eq!(value(&replica, &key).as_deref(), Some(b"v".as_slice()));
    }
    nodes[0].stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_empty_nodes_that_expect_three_form_no_cluster_and_a_fourth_joins_one_that_is_there() {
    let mut nodes = nodes(4, 3, 1).await;
    for node in &mut nodes[..3] {
        node.start().await;
    }
    for node in &nodes[..3] {
        node.member().await;
    }
    leader_of(&nodes[..3]).await;
    nodes[3].start().await;
    nodes[3].member().await;
    let joined = nodes[3].replica();
    joined
        .wait_until_seen(&Seen::Everything, PATIENCE, &patience())
        .await
        .expect("the new node is level");
    assert_eq!(joined.peers_identity().node_id, 4);
    for node in &mut nodes {
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_voters_that_nobody_finished_is_finished() {
    let (mut nodes, leader) = formed(3).await;
    let replica = nodes[leader].replica();
    let gone = replica
        .voters()
        .into_iter()
        .find(|&voter| voter != replica.peers_identity().node_id)
        .expect("another voter");

    // Asked once and dropped: the first of its two steps is committed, and nobody takes the second.
    let mut change = Box::pin(
        replica
            .raft()
            .change_membership(openraft::ChangeMembers::RemoveVoters([gone].into()), true),
    );
    assert!(futures::poll!(&mut change).is_pending());
    let until = async |what: &str, done: &dyn Fn() -> bool| {
        let reached = async {
            while !done() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .unwrap_or_else(|_| panic!("waited for: {what}"));
    };
    until("two sets of voters", &|| replica.changes_voters()).await;
    drop(change);

    // Whoever leads ends it, and brings back whom the roster has as a voter.
    until("one set of voters, as the roster has it", &|| {
        !replica.changes_voters() && replica.voters().len() == 3
    })
    .await;
    for node in &mut nodes {
        node.stop().await;
    }
}

/// Both others have voted for somebody newer, and nobody told the leader: within its lease only
/// their own word says so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_a_quorum_has_left_proves_nothing() {
    let (mut nodes, _) = formed(3).await;
    let mut forged = 0;
    for round in 0..5 {
        // Elected after the last one was left, and by now it knows that.
        let (leader, replica) = loop {
            let leader = leader_of(&nodes).await;
            let replica = nodes[leader].replica();
            let seen = replica
                .wait_until_seen(&Seen::Everything, PATIENCE, &patience())
                .await;
            seen.expect("somebody leads");
            if replica
                .leader()
                .is_some_and(|leader| leader.is_self && leader.term > forged)
            {
                break (leader, replica);
            }
        };
        let others: Vec<_> = (0..3)
            .filter(|&node| node != leader)
            .map(|node| nodes[node].replica())
            .collect();
        let term = replica.term();
        forged = term + 1;
        let vote = peer::Vote {
            term: term + 1,
            voted_for: Some(others[0].peers_identity().node_id),
            committed: false,
        };
        let vote = vote_from(Some(vote)).unwrap_or_else(|_| panic!("a vote"));
        let last = log_id_from(peer::LogId {
            term,
            index: 1 << 40,
        });
        let mut request = openraft::raft::VoteRequest::<Types>::new(vote, Some(last));
        request.leadership_transfer = true;
        for other in &others {
            assert!(
                other
                    .raft()
                    .vote(request.clone())
                    .await
                    .expect("votes")
                    .vote_granted,
                "round {round}"
            );
        }
        assert!(
            replica.confirm_leadership().await.is_err(),
            "round {round}: it took itself for the leader"
        );
    }
    for node in &mut nodes {
        node.stop().await;
    }
}
