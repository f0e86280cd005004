//! A replica that starts again may have acknowledged a lease that it no longer knows of: it votes
//! for nobody until that is over.

use std::sync::Arc;

use holdfast_proto::peer::{
    LogId, PreVoteRequest, Vote, VoteRequest, replica_service_server::ReplicaService,
};
use tonic::{Code, Request};

use super::group::{leader_of, nodes};
use crate::{Clock, Replicas, peer::server::ReplicaServer, store::Engine};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_voted_for_within_two_leases_of_a_start() {
    if Engine::DEFAULT == Engine::Memory {
        // Has forgotten its vote, and itself.
        return;
    }
    let mut nodes = nodes(1, 1, 1).await;
    nodes[0].options.discover.clear();
    nodes[0].start().await;
    nodes[0].member().await;
    leader_of(&nodes).await;
    nodes[0].stop().await;

    let clock = Clock::system();
    let replicas = Replicas::open(
        nodes[0].options.clone(),
        nodes[0].stores.clone(),
        clock.clone(),
        Arc::new(()),
    )
    .await
    .expect("opens");
    let replica = replicas.replica(0).expect("it belongs to a cluster");
    let peers = replicas.peers().expect("it belongs to a cluster");
    let service = ReplicaServer::new(replicas.local());
    // A candidate with a higher term and as much log as anybody.
    let header = Some(peers.header(peers.identity().node_id, 0));
    let vote = Some(Vote {
        term: 1000,
        voted_for: Some(2),
        committed: false,
    });
    let last_log_id = Some(LogId {
        term: 999,
        index: 1_000_000,
    });
    let pre_vote = PreVoteRequest {
        header: header.clone(),
        vote,
        last_log_id,
    };
    let vote = VoteRequest {
        header,
        vote,
        last_log_id,
        leadership_transfer: true,
    };

    let refused = [
        service
            .pre_vote(Request::new(pre_vote))
            .await
            .map(|_| ())
            .map_err(|status| status.code()),
        service
            .vote(Request::new(vote.clone()))
            .await
            .map(|_| ())
            .map_err(|status| status.code()),
    ];
    // On a machine that was busy for so long the lease is over by itself.
    // Twice the lease, since clocks do not run equally fast.
    let quiet_for = replica.pace().lease() * 2;
    if clock.monotonic() < quiet_for {
        assert!(replica.campaign().is_quiet());
        assert_eq!(refused, [Err(Code::Unavailable), Err(Code::Unavailable)]);
    }
    clock.advance(quiet_for);
    assert!(!replica.campaign().is_quiet());
    let answer = service
        .vote(Request::new(vote))
        .await
        .expect("it may vote now")
        .into_inner();
    assert!(answer.vote.is_some_and(|vote| vote.term >= 1));
    replicas.close().await;
}
