//! Who takes part: what a removed member, a copy, a moved one, one with a log that went back in
//! time and a stranger may and may not do. On stores that last over a restart, whatever the engine.

use std::{net::SocketAddr, time::Duration};

use holdfast_proto::{
    peer::{
        AppendRequest, LogId, PreVoteRequest, ProposeRequest, Vote, VoteRequest,
        replica_service_client::ReplicaServiceClient,
    },
    v1,
};
use tokio::net::TcpListener;
use tonic::Code;

use super::group::{Node, PATIENCE, leader_of, nodes, patience, set, value, write_on};
use crate::{Membership, Seen, peer::Acknowledged, store::Stores};

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waited = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, waited).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}

async fn formed(count: usize) -> Vec<Node> {
    let mut nodes = nodes(count, u32::try_from(count).unwrap(), 1).await;
    for node in &mut nodes {
        node.stores = Stores::lasting();
        node.start().await;
    }
    for node in &nodes {
        node.member().await;
    }
    leader_of(&nodes).await;
    nodes
}

async fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

async fn moves(node: &mut Node) {
    node.address = free_address().await;
    node.options.peer_address = node.address.to_string();
}

/// Why it takes part no more.
async fn retired(node: &Node) -> String {
    let mut membership = node.replicas().membership();
    let retired = membership.wait_for(|membership| matches!(membership, Membership::Retired(_)));
    let retired = tokio::time::timeout(PATIENCE, retired).await;
    match &*retired.expect("in time").expect("open") {
        Membership::Retired(why) => why.clone(),
        other => panic!("{other:?}"),
    }
}

async fn stop_all(nodes: &mut [Node]) {
    for node in nodes {
        node.stop().await;
    }
}

fn others(count: usize, leader: usize) -> Vec<usize> {
    (0..count).filter(|&node| node != leader).collect()
}

async fn status(node: &Node, name: &str) -> Option<v1::NodeStatus> {
    let nodes = node.replicas().status().await.nodes;
    nodes.into_iter().find(|node| node.name == name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_removed_while_it_was_down_learns_it_and_serves_no_data_ever_after() {
    let mut nodes = formed(3).await;
    let leader = leader_of(&nodes).await;
    let gone = others(3, leader)[0];
    write_on(&nodes[gone].replica(), set("k", "old")).await;
    nodes[gone].stop().await;
    let name = nodes[gone].options.name.clone();
    nodes[leader]
        .replicas()
        .remove(&name)
        .await
        .expect("removed");

    nodes[gone].start().await;
    for _ in 0..2 {
        let why = retired(&nodes[gone]).await;
        assert!(why.contains("this node was removed from cluster"), "{why}");
        assert!(why.contains("remove its data directory"), "{why}");
        assert!(nodes[gone].replicas().of_key(b"k").is_none());
        // Its own word, after a restart too, whoever is there to tell it.
        nodes[gone].stop().await;
        nodes[gone].options.discover.clear();
        nodes[gone].start().await;
    }
    assert!(nodes[gone].replicas().peers().is_none());
    stop_all(&mut nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_removed_while_it_runs_learns_it() {
    let mut nodes = formed(3).await;
    let leader = leader_of(&nodes).await;
    let gone = others(3, leader)[0];
    let name = nodes[gone].options.name.clone();
    nodes[leader]
        .replicas()
        .remove(&name)
        .await
        .expect("removed");
    let why = retired(&nodes[gone]).await;
    assert!(why.contains("this node was removed from cluster"), "{why}");
    assert!(nodes[gone].replicas().of_key(b"k").is_none());
    write_on(&nodes[leader].replica(), set("k", "v")).await;
    stop_all(&mut nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copy_of_a_live_member_is_told_so_and_the_member_goes_on() {
    let mut nodes = formed(3).await;
    let leader = leader_of(&nodes).await;
    let original = others(3, leader)[0];
    let mut copy = super::group::nodes(1, 3, 1).await.remove(0);
    copy.stores = Stores::lasting();
    copy.options.name = nodes[original].options.name.clone();
    copy.options.discover = nodes[leader].options.discover.clone();
    std::fs::copy(
        nodes[original].dir.path().join("identity"),
        copy.dir.path().join("identity"),
    )
    .unwrap();
    copy.start().await;
    let why = retired(&copy).await;
    assert!(why.contains("another process with the identity"), "{why}");
    assert!(copy.replicas().of_key(b"k").is_none());

    // The original still counts for the quorum.
    nodes[others(3, leader)[1]].stop().await;
    write_on(&nodes[original].replica(), set("k", "v")).await;
    assert_eq!(
        *nodes[original].replicas().membership().borrow(),
        Membership::Member
    );
    copy.stop().await;
    stop_all(&mut nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_moved_is_found_where_it_is_now() {
    let mut nodes = formed(3).await;
    let leader = leader_of(&nodes).await;
    let [mover, other] = others(3, leader)[..] else {
        unreachable!()
    };
    nodes[mover].stop().await;
    write_on(&nodes[leader].replica(), set("k", "while away")).await;
    moves(&mut nodes[mover]).await;
    nodes[mover].options.client_address = "elsewhere:7400".into();
    nodes[mover].start().await;

    let (name, address) = (
        nodes[mover].options.name.clone(),
        nodes[mover].address.to_string(),
    );
    for node in &nodes {
        until("the roster has the new addresses everywhere", async || {
            status(node, &name).await.is_some_and(|seen| {
                seen.peer_address == address && seen.client_address == "elsewhere:7400"
            })
        })
        .await;
    }
    until("Raft's own members follow", async || {
        let members = nodes[leader].replica().members();
        members.iter().any(|member| member.peer_address == address)
    })
    .await;
    // It counts for the quorum.
    nodes[other].stop().await;
    write_on(&nodes[mover].replica(), set("k", "after")).await;
    stop_all(&mut nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_have_moved_they_find_each_other_through_discover() {
    let mut nodes = formed(3).await;
    write_on(&nodes[0].replica(), set("k", "v")).await;
    stop_all(&mut nodes).await;
    for node in &mut nodes {
        moves(node).await;
    }
    let discover: Vec<String> = nodes.iter().map(|node| node.address.to_string()).collect();
    for node in &mut nodes {
        node.options.discover = discover.clone();
        node.start().await;
    }
    leader_of(&nodes).await;
    for node in &nodes {
        let read = node.replica();
        read.wait_until_seen(&Seen::Everything, PATIENCE, &patience())
            .await
            .expect("linearizable");
        assert_eq!(value(&read, "k").as_deref(), Some(b"v".as_slice()));
        until("everybody is where it is", async || {
            let members = node.replicas().peers().unwrap().members();
            members
                .iter()
                .all(|member| discover.contains(&member.peer_address))
        })
        .await;
    }
    stop_all(&mut nodes).await;
}

/// Nobody's address is right, and `discover` is of no use: an operator says where one is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn adding_a_known_member_says_where_it_is_now() {
    let mut nodes = formed(2).await;
    stop_all(&mut nodes).await;
    for node in &mut nodes {
        moves(node).await;
        node.options.discover.clear();
        node.start().await;
    }
    let (name, address) = (nodes[1].options.name.clone(), nodes[1].address.to_string());
    let id = nodes[0].replicas().add_member(&name, &address).await;
    assert_eq!(
        id.expect("found"),
        nodes[1].replicas().peers().unwrap().identity().node_id
    );
    write_on(&nodes[1].replica(), set("k", "v")).await;
    stop_all(&mut nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_in_no_roster_is_no_peer() {
    let mut nodes = formed(1).await;
    let replica = nodes[0].replica();
    let peers = nodes[0].replicas().peers().unwrap();
    let mut client = ReplicaServiceClient::connect(format!("http://{}", nodes[0].address))
        .await
        .unwrap();
    let term = replica.term() + 100;
    let vote = Some(Vote {
        term,
        voted_for: Some(99),
        committed: false,
    });
    let last_log_id = Some(LogId {
        term,
        index: 1 << 40,
    });
    let own = peers.header(peers.identity().node_id, 0);
    // One that never was a member, and one that says it is a member and is another process.
    for (from, session) in [(99, 1), (own.from, own.from_session + 1)] {
        let header = Some(holdfast_proto::peer::Header {
            from,
            from_session: session,
            ..own.clone()
        });
        let append = AppendRequest {
            header: header.clone(),
            vote: vote.map(|vote| Vote {
                committed: true,
                ..vote
            }),
            ..Default::default()
        };
        let pre_vote = PreVoteRequest {
            header: header.clone(),
            vote,
            last_log_id,
        };
        let vote = VoteRequest {
            header: header.clone(),
            vote,
            last_log_id,
            leadership_transfer: true,
        };
        let propose = ProposeRequest {
            header,
            ..Default::default()
        };
        let answers = [
            client.append(append).await.map(|_| ()),
            client.pre_vote(pre_vote).await.map(|_| ()),
            client.vote(vote).await.map(|_| ()),
            client.propose(propose).await.map(|_| ()),
        ];
        for answer in answers {
            assert_eq!(answer.unwrap_err().code(), Code::FailedPrecondition);
        }
    }
    assert!(replica.term() < term);
    write_on(&replica, set("k", "v")).await;
    stop_all(&mut nodes).await;
}

/// The disk of a voter is as it was some time ago: entries that it had acknowledged are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_whose_log_lost_what_it_acknowledged_elects_nobody_and_says_so() {
    let mut nodes = formed(3).await;
    let leader = leader_of(&nodes).await;
    let [lost, behind] = others(3, leader)[..] else {
        unreachable!()
    };
    for number in 0..20 {
        write_on(&nodes[leader].replica(), set("k", &number.to_string())).await;
    }
    // Everybody has heard what everybody acknowledged.
    let id = nodes[lost].replicas().peers().unwrap().identity().node_id;
    until("it is known what it acknowledged", async || {
        let peers = nodes[behind].replicas().peers().unwrap();
        peers.acknowledged().lost(id, 0, &[20]).is_some()
    })
    .await;
    until("it is written down", async || {
        let written = Acknowledged::default();
        written.read(nodes[behind].dir.path()).unwrap();
        written.lost(id, 0, &[20]).is_some()
    })
    .await;
    nodes[lost].stop().await;
    // All others start again as well, and know it from their disks.
    nodes[leader].stop().await;
    nodes[behind].stop().await;
    nodes[lost].stores = Stores::lasting();
    nodes[lost].start().await;
    nodes[behind].start().await;
    let why = retired(&nodes[lost]).await;
    assert!(
        why.contains("lost entries that it had acknowledged"),
        "{why}"
    );
    assert!(why.contains("holdfast member remove"), "{why}");
    let name = nodes[lost].options.name.clone();
    until("the others say why it does not count", async || {
        status(&nodes[behind], &name).await.is_some_and(|seen| {
            !seen.healthy
                && seen.problems.len() == 1
                && seen.problems[0].contains("lost entries that it had acknowledged")
        })
    })
    .await;
    // Two of three, and no leader: its vote does not count, in time enough for many elections.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(nodes[behind].replica().leads().is_none());
    nodes[leader].start().await;
    write_on(&nodes[behind].replica(), set("k", "on")).await;
    stop_all(&mut nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_of_which_nothing_survives_comes_back_by_itself_while_a_quorum_stays() {
    let mut nodes = nodes(3, 3, 1).await;
    for node in &mut nodes {
        node.stores = Stores::memory();
        node.start().await;
    }
    for node in &nodes {
        node.member().await;
    }
    let leader = leader_of(&nodes).await;
    write_on(&nodes[leader].replica(), set("k", "v")).await;
    let lost = others(3, leader)[0];
    nodes[lost].stop().await;
    nodes[lost].stores = Stores::memory();
    nodes[lost].start().await;
    nodes[lost].member().await;
    let id = nodes[lost].replicas().peers().unwrap().identity().node_id;
    assert_eq!(id, 4, "an id is never used again");
    until("it votes again", async || {
        let voters = nodes[leader].replica().voters();
        voters.len() == 3 && voters.contains(&id)
    })
    .await;
    nodes[lost]
        .replica()
        .wait_until_seen(&Seen::Everything, PATIENCE, &patience())
        .await
        .expect("level");
    assert_eq!(
        value(&nodes[lost].replica(), "k").as_deref(),
        Some(b"v".as_slice())
    );
    stop_all(&mut nodes).await;
}
