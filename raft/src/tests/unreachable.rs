//! A write whose leader is known and cannot be reached: nothing of it has left, and it says so.

use std::time::Duration;

use holdfast_proto::peer::ReadIndexRequest;

use super::group::{formed, patience, set};
use crate::{CallError, WriteError};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_leader_cannot_be_reached_was_not_applied() {
    let (mut nodes, leader) = formed(3).await;
    let (asked, third) = ((leader + 1) % 3, (leader + 2) % 3);
    let replica = nodes[asked].replica();
    replica
        .write(set("k", "1"), None, &patience())
        .await
        .expect("forwarded");

    // Nobody is left to elect another one.
    nodes[third].stop().await;
    let id = replica.leader().expect("it was just heard of").id;
    nodes[leader].stop().await;
    let peers = nodes[asked].replicas().peers().expect("a member");
    let deadline = patience();
    loop {
        let header = peers.header(id, 0);
        let asked = peers.call(header, &deadline, ReadIndexRequest::default());
        if let Err(CallError::NeverSent(_)) = asked.await {
            break;
        }
        assert!(!deadline.has_passed(), "its port is closed");
    }

    let soon = replica.deadline(Duration::from_millis(200));
    let failed = replica.write(set("k", "2"), None, &soon).await;
    let error = failed.expect_err("nobody leads");
    assert!(error.not_applied(), "{error:?}");
    assert!(
        matches!(error, WriteError::Unreachable | WriteError::NoLeader),
        "{error:?}"
    );
}
