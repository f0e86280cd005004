//! How the cluster is: what this node knows of it, and what the others say of themselves now.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use holdfast_proto::{
    peer::{Member, ReportRequest, ReportResponse, ShardReport},
    v1,
};
use tonic::Request;

use super::members_of;
use crate::{local::Local, peer::Peers, replica::Replica};

const REPORT_TIMEOUT: Duration = Duration::from_millis(400);

/// Needs neither a leader nor a quorum; a node without a cluster knows nothing.
pub(crate) async fn status(local: &Local) -> v1::StatusResponse {
    let (Some(peers), Some(first)) = (local.peers(), local.replica(0)) else {
        return v1::StatusResponse::default();
    };
    let members = members_of(local, first);
    let asked = members
        .iter()
        .map(|member| ask_for_report(local, &peers, member));
    let reports = join_all(asked).await;
    let name = |id: u64| {
        let member = members.iter().find(|member| member.id == id);
        member.map(|member| member.name.clone()).unwrap_or_default()
    };
    let shards = local.replicas();
    let identity = peers.identity();
    v1::StatusResponse {
        cluster_id: identity.cluster_id.clone(),
        epoch: identity.epoch,
        shards: u32::try_from(shards.len()).unwrap_or(u32::MAX),
        leader: first
            .leader()
            .map(|leader| name(leader.id))
            .unwrap_or_default(),
        nodes: nodes(&peers, first, &members, &reports),
        per_shard: shards.iter().map(|shard| of_shard(shard, name)).collect(),
    }
}

fn nodes(
    peers: &Peers,
    first: &Replica,
    members: &[Member],
    reports: &[Option<ReportResponse>],
) -> Vec<v1::NodeStatus> {
    let leader = first.leader().map_or(0, |leader| leader.id);
    let voters: BTreeSet<u64> = first.voters().into_iter().collect();
    let shard_of = |report: &Option<ReportResponse>| {
        report
            .as_ref()
            .and_then(|report| report.shards.first().copied())
    };
    let furthest = reports
        .iter()
        .filter_map(shard_of)
        .map(|shard| shard.applied_index)
        .max()
        .unwrap_or(0);
    let node = |(member, answer): (&Member, &Option<ReportResponse>)| {
        let (shard, seen) = (shard_of(answer), peers.view(0, member.id));
        let applied_index = shard.map_or(seen.map_or(0, |view| view.applied_index), |shard| {
            shard.applied_index
        });
        v1::NodeStatus {
            name: member.name.clone(),
            id: member.id,
            role: match member.id {
                id if id == leader => v1::Role::Leader,
                id if voters.contains(&id) => v1::Role::Voter,
                _ => v1::Role::Learner,
            }
            .into(),
            region: member.region.clone(),
            revision: shard.map_or(seen.map_or(0, |view| view.revision), |shard| shard.revision),
            lag: furthest.saturating_sub(applied_index),
            version: answer
                .as_ref()
                .map(|answer| answer.version.clone())
                .unwrap_or_default(),
            healthy: answer.is_some(),
            client_address: member.client_address.clone(),
            peer_address: member.peer_address.clone(),
        }
    };
    members.iter().zip(reports).map(node).collect()
}

fn of_shard(replica: &Replica, name: impl Fn(u64) -> String) -> v1::ShardStatus {
    v1::ShardStatus {
        shard: replica.shard(),
        leader: replica
            .leader()
            .map(|leader| name(leader.id))
            .unwrap_or_default(),
        term: replica.term(),
        revision: replica.applied().revision,
        voters: replica.voters().into_iter().map(&name).collect(),
        learners: replica.learners().into_iter().map(&name).collect(),
    }
}

/// A member's own word, this node's included; `None` if it does not answer now.
pub(super) async fn ask_for_report(
    local: &Local,
    peers: &Peers,
    member: &Member,
) -> Option<ReportResponse> {
    if member.id == peers.identity().node_id {
        return Some(report(local));
    }
    let mut request = Request::new(ReportRequest {
        header: Some(peers.header(member.id, 0, None)),
    });
    request.set_timeout(REPORT_TIMEOUT);
    let mut client = peers.membership_client(&member.peer_address);
    let answer = tokio::time::timeout(REPORT_TIMEOUT, client.report(request)).await;
    Some(answer.ok()?.ok()?.into_inner())
}

/// This node's word of itself.
pub(crate) fn report(local: &Local) -> ReportResponse {
    let first = local.replica(0);
    let peers = local.peers();
    ReportResponse {
        header: peers.map(|peers| peers.reply(first.map(|first| first.state().as_ref()))),
        version: env!("CARGO_PKG_VERSION").into(),
        shards: local.replicas().iter().map(|shard| of(shard)).collect(),
    }
}

fn of(replica: &Replica) -> ShardReport {
    let applied = replica.applied();
    ShardReport {
        shard: replica.shard(),
        term: replica.term(),
        applied_index: applied.index,
        revision: applied.revision,
        leader: replica.leader().map_or(0, |leader| leader.id),
        role: replica.role().into(),
    }
}
