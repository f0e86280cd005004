//! States that have parted: the majority is right, whoever leads; the odd one serves nothing until the
//! majority's state has taken its place; nobody else's word counts.

use std::{pin::pin, sync::Arc, time::Duration};

use futures::FutureExt as _;
use holdfast_proto::peer::{Header, StateHash};
use openraft::type_config::async_runtime::watch::WatchReceiver as _;
use tokio::time::timeout;

use super::group::{
    Node, PATIENCE, formed, formed_of, leader_of, nodes, patience, set, stop, value,
};
use crate::{Clock, Replica, agreement::types::vote_to};

/// Writes until `so`: past indexes at which states are compared.
async fn write_until(nodes: &[Node], so: impl Fn() -> bool) {
    let writing = async {
        let mut n = 0u64;
        while !so() {
            n += 1;
            for node in nodes {
                let op = set("k", &format!("v{n}"));
                let soon = Clock::system().deadline(Duration::from_millis(500));
                let replica = node.replica();
                let mut write = pin!(replica.write(op, None, &soon));
                // What is awaited may be over before the write is.
                while timeout(Duration::from_millis(1), &mut write).await.is_err() {
                    if so() {
                        return;
                    }
                }
                if so() {
                    return;
                }
            }
        }
    };
    if timeout(PATIENCE * 3, writing).await.is_err() {
        let stands = nodes.iter().map(|node| {
            let replica = node.replica();
            let (applied, hash) = (replica.applied(), replica.state().hash());
            format!(
                "diverged {}, catching up {}, {applied:?}, {hash:?}",
                replica.is_diverged(),
                replica.must_catch_up()
            )
        });
        panic!("not in time: {:#?}", stands.collect::<Vec<_>>());
    }
}

/// All have the same hash at an index that was reached after `index`.
fn are_level(replicas: &[Arc<Replica>], index: u64) -> bool {
    let Some(newest) = replicas[0].state().hash() else {
        return false;
    };
    newest.index > index
        && replicas.iter().all(|replica| {
            !replica.is_diverged() && replica.state().hash_at(newest.index) == Some(newest)
        })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_state_is_not_the_majoritys_gets_the_leaders() {
    let (nodes, leader) = formed(3).await;
    let replicas: Vec<_> = nodes.iter().map(Node::replica).collect();
    let odd = (leader + 1) % 3;
    replicas[odd].state().spoil(42);
    // It answers nothing by itself.
    write_until(&nodes, || {
        replicas[odd].is_diverged() && replicas[odd].must_catch_up()
    })
    .await;
    assert!(
        !replicas[leader].is_diverged() && !replicas[(leader + 2) % 3].is_diverged(),
        "the others go on"
    );
    let index = replicas[odd].applied().index;
    write_until(&nodes, || are_level(&replicas, index)).await;
    assert!(!replicas[odd].must_catch_up());
    drop(replicas);
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_state_is_not_the_majoritys_hands_over_and_gets_anothers() {
    let (nodes, leader) = formed(3).await;
    let replicas: Vec<_> = nodes.iter().map(Node::replica).collect();
    replicas[leader].state().spoil(42);
    // It may be repaired within a moment of that.
    write_until(&nodes, || {
        (0..3).any(|other| other != leader && replicas[other].leads().is_some())
    })
    .await;
    let index = replicas[leader].applied().index;
    write_until(&nodes, || are_level(&replicas, index)).await;
    let now = leader_of(&nodes).await;
    assert_ne!(now, leader, "another leads");
    drop(replicas);
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nobody_stops_and_the_leader_says_so() {
    let mut nodes = nodes(3, 3, 1).await;
    for node in &mut nodes {
        // Who falls behind on a busy machine gets the log, not a snapshot: that would heal it.
        node.options.log_kept.entries = u64::MAX;
    }
    let (nodes, leader) = formed_of(nodes).await;
    let replicas: Vec<_> = nodes.iter().map(Node::replica).collect();
    // None is still to come to an index that the others had before: there it would be the only odd
    // one. The next such index is far away.
    write_until(&nodes, || are_level(&replicas, 0)).await;
    replicas[0].state().spoil(1);
    replicas[1].state().spoil(2);
    write_until(&nodes, || {
        replicas.iter().any(|replica| replica.states_are_split())
    })
    .await;
    assert!(replicas.iter().all(|replica| !replica.is_diverged()));
    assert!(value(&replicas[leader], "k").is_some());
    drop(replicas);
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hash_from_anybody_but_the_leader_accuses_nobody() {
    let (nodes, leader) = formed(3).await;
    let follower = nodes[(leader + 1) % 3].replica();
    write_until(&nodes, || follower.state().hash().is_some()).await;
    let known = follower.state().hash().expect("a hash");
    let wrong = StateHash {
        hash: known.hash ^ 1,
        ..known
    };
    let vote = vote_to(&follower.raft().metrics().borrow_watched().vote);
    let leads = nodes[leader].replica();
    let genuine = Header {
        agreed: Some(wrong),
        ..leads.header(follower.peers_identity().node_id)
    };

    let stranger = Header {
        from: 99,
        ..genuine.clone()
    };
    let another_member = nodes[(leader + 2) % 3].replica();
    let another_member = Header {
        agreed: Some(wrong),
        ..another_member.header(follower.peers_identity().node_id)
    };
    let of_an_earlier_life = Header {
        from_incarnation: genuine.from_incarnation ^ 1,
        ..genuine.clone()
    };
    for header in [&stranger, &another_member, &of_an_earlier_life] {
        follower.hear_agreed(Some(&vote), Some(header));
    }
    let mut older = vote;
    older.term -= 1;
    follower.hear_agreed(Some(&older), Some(&genuine));
    let mut uncommitted = vote;
    uncommitted.committed = false;
    follower.hear_agreed(Some(&uncommitted), Some(&genuine));
    let another_version = Header {
        agreed: Some(StateHash {
            version: wrong.version + 1,
            ..wrong
        }),
        ..genuine.clone()
    };
    follower.hear_agreed(Some(&vote), Some(&another_version));
    assert!(!follower.is_diverged());

    follower.hear_agreed(Some(&vote), Some(&genuine));
    assert!(follower.is_diverged(), "the leader's own word counts");
    assert!(
        follower.state().may_apply().now_or_never().is_none(),
        "it applies nothing until it is repaired"
    );
    drop((follower, leads));
    stop(nodes).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_waits_while_a_state_is_held() {
    let (nodes, leader) = formed(3).await;
    let (leads, follower) = (nodes[leader].replica(), nodes[(leader + 1) % 3].replica());
    follower.state().hold(true);
    leads
        .write(set("k", "v"), None, &patience())
        .await
        .expect("a quorum is left");
    let reads_it = async || {
        while value(&follower, "k").is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let held = timeout(Duration::from_millis(500), reads_it()).await;
    assert!(held.is_err(), "it was applied");
    follower.state().hold(false);
    timeout(PATIENCE, reads_it()).await.expect("it goes on");
    drop((leads, follower));
    stop(nodes).await;
}
