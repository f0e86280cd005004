//! How the cluster is: what this node knows of it, and what the others say of themselves now.

use std::{collections::BTreeSet, sync::atomic::Ordering, time::Duration};

use futures::future::join_all;
use holdfast_proto::{
    ShardId,
    peer::{Accusation, Member, ReportRequest, ReportResponse, ShardReport},
    v1,
};

use super::{health, members_of};
use crate::{local::Local, peer::Peers, replica::Replica};

const REPORT_TIMEOUT: Duration = Duration::from_millis(400);

/// Needs neither a leader nor a quorum; a node without a cluster knows nothing.
pub(crate) async fn status(local: &Local) -> v1::StatusResponse {
    let (Some(peers), Some(first)) = (local.peers(), local.replica(0)) else {
        return alone(local);
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
    let identity = peers.identity();
    v1::StatusResponse {
        cluster_id: identity.cluster_id.clone(),
        epoch: identity.epoch,
        shards: local.shards(),
        leader: first
            .leader()
            .map(|leader| name(leader.id))
            .unwrap_or_default(),
        nodes: nodes(&peers, first, &members, &reports),
        per_shard: local
            .replicas()
            .map(|shard| of_shard(shard, name))
            .collect(),
    }
}

/// Of a node that was told not to take part and started again: it knows itself.
fn alone(local: &Local) -> v1::StatusResponse {
    let Some(why) = local.why_retired() else {
        return v1::StatusResponse::default();
    };
    let me = local.myself();
    v1::StatusResponse {
        cluster_id: local.cluster_id().unwrap_or_default(),
        nodes: vec![v1::NodeStatus {
            name: me.name,
            id: me.id,
            region: me.region,
            version: env!("CARGO_PKG_VERSION").into(),
            client_address: me.client_address,
            peer_address: me.peer_address,
            problems: vec![why],
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// What the members said, as far as they answered.
struct Reports<'r>(&'r [Option<ReportResponse>]);

impl Reports<'_> {
    fn answered(&self) -> impl Iterator<Item = &ReportResponse> {
        self.0.iter().flatten()
    }

    /// Of a shard, the most that anybody has applied.
    fn furthest(&self, shard: ShardId) -> u64 {
        let shards = self.answered().flat_map(|report| &report.shards);
        let applied = shards.filter(|of| of.shard == shard);
        applied.map(|of| of.applied_index).max().unwrap_or(0)
    }

    /// Why a member is not healthy.
    fn problems(&self, member: u64, own: Option<&ReportResponse>) -> Vec<String> {
        let accusations = self.answered().flat_map(|report| &report.accusations);
        let accusations = accusations.filter(|accusation| accusation.id == member);
        let said = |accusation: &Accusation| accusation.problem.clone();
        let Some(own) = own else {
            let refused: BTreeSet<String> = accusations
                .filter(|accusation| accusation.is_refused)
                .map(said)
                .collect();
            return match refused.is_empty() {
                true => vec!["it does not answer".to_owned()],
                false => refused.into_iter().collect(),
            };
        };
        let behind = own.shards.iter().filter_map(|of| {
            let lag = self.furthest(of.shard).saturating_sub(of.applied_index);
            health::is_behind(lag)
                .then(|| format!("it is {lag} entries behind in shard {}", of.shard))
        });
        let problems = own.problems.iter().cloned().chain(behind);
        let mut known = BTreeSet::new();
        let mut problems: Vec<String> = problems.chain(accusations.map(said)).collect();
        problems.retain(|problem| known.insert(problem.clone()));
        problems
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
    let all = Reports(reports);
    let leaders = members
        .iter()
        .zip(reports)
        .find(|(member, _)| member.id == leader);
    let judged_by = leaders.and_then(|(_, answer)| Some(answer.as_ref()?.policy_hash));
    let node = |(member, answer): (&Member, &Option<ReportResponse>)| {
        let shard = answer.as_ref().and_then(|answer| answer.shards.first());
        let seen = peers.view(0, member.id).unwrap_or_default();
        let (revision, applied_index) = match shard {
            Some(shard) => (shard.revision, shard.applied_index),
            None => (seen.revision, seen.applied_index),
        };
        let problems = all.problems(member.id, answer.as_ref());
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
            revision,
            lag: all.furthest(0).saturating_sub(applied_index),
            version: answer
                .as_ref()
                .map(|answer| answer.version.clone())
                .unwrap_or_default(),
            healthy: problems.is_empty(),
            client_address: member.client_address.clone(),
            peer_address: member.peer_address.clone(),
            problems,
            policy_hash: answer.as_ref().map_or(0, |answer| answer.policy_hash),
            policies_differ: answer.as_ref().is_some_and(|answer| {
                judged_by.is_some_and(|leaders| answer.policy_hash != leaders)
            }),
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
        log_time_ahead_ms: replica.log_time_ahead_ms(),
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
    let header = peers.header(member.id, 0);
    let deadline = local.clock().deadline(REPORT_TIMEOUT);
    let asked = peers.call_at(
        &member.peer_address,
        header,
        &deadline,
        ReportRequest::default(),
    );
    asked.await.ok()
}

/// This node's word of itself.
pub(crate) fn report(local: &Local) -> ReportResponse {
    let first = local.replica(0);
    let peers = local.peers();
    ReportResponse {
        policy_hash: local.policy_hash().load(Ordering::Relaxed),
        header: peers.map(|peers| peers.reply(first.map(|first| first.state().as_ref()))),
        version: env!("CARGO_PKG_VERSION").into(),
        shards: local.replicas().map(|shard| of(shard)).collect(),
        problems: local
            .opened()
            .map(|opened| health::of_self(local, opened))
            .unwrap_or_default(),
        accusations: local
            .opened()
            .map(|opened| health::of_others(local, opened))
            .unwrap_or_default(),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn report(applied_index: u64, accusations: &[(u64, bool)]) -> ReportResponse {
        let accusation = |&(id, is_refused): &(u64, bool)| Accusation {
            id,
            problem: format!("accused of {is_refused}"),
            is_refused,
        };
        ReportResponse {
            shards: vec![ShardReport {
                applied_index,
                ..Default::default()
            }],
            accusations: accusations.iter().map(accusation).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn a_member_is_healthy_if_nobody_knows_why_not() {
        let leader = report(5000, &[(2, false), (3, true), (3, true), (4, false)]);
        let own = ReportResponse {
            problems: vec!["its disk is full".into()],
            ..report(5000, &[])
        };
        let reports = [
            Some(leader),
            Some(report(3999, &[(3, true)])),
            Some(own),
            None,
        ];
        let all = Reports(&reports);
        let problems = |id, of: usize| all.problems(id, reports[of].as_ref());
        assert!(problems(1, 0).is_empty());
        assert_eq!(
            problems(2, 1),
            ["it is 1001 entries behind in shard 0", "accused of false"]
        );
        assert_eq!(problems(7, 2), ["its disk is full"]);
        // Who does not answer is not heard from either.
        assert_eq!(problems(3, 3), ["accused of true"]);
        assert_eq!(problems(4, 3), ["it does not answer"]);
    }
}
