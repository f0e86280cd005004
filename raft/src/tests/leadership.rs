//! What a follower knows of who leads it.

use holdfast_proto::peer::{Header, Vote};

use super::group::{formed, stop};

/// A round that proves who leads asks followers with messages of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_says_nothing_of_the_quorum_takes_no_leader_away() {
    let (nodes, leader) = formed(3).await;
    let (leads, follower) = (nodes[leader].replica(), nodes[(leader + 1) % 3].replica());
    let mut known = follower.watch_leader();
    known.wait_for(Option::is_some).await.expect("it hears one");
    let vote = Vote {
        term: leads.term(),
        voted_for: Some(leads.peers_identity().node_id),
        committed: true,
    };
    let header = Header {
        proof: None,
        ..leads.header(follower.peers_identity().node_id)
    };
    follower.heard_append(Some(&vote), Some(&header));
    assert!(follower.leader().is_some());
    drop((leads, follower));
    stop(nodes).await;
}
