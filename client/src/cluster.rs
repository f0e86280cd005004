//! What operators call: the cluster's status and its members. Mutations carry no request id here,
//! so one whose outcome is unknown is not tried again.

use holdfast_proto::{Revision, limits::CLIENT_MESSAGE_BYTES_MAX, v1};
use tonic::transport::Channel;

use crate::{
    answer::Role,
    client::{Client, timed},
    error::Error,
    retry::Kind,
};

/// From [`Client::cluster`].
#[derive(Debug, Clone, Copy)]
pub struct Cluster<'a> {
    client: &'a Client,
}

/// What the answering node knows of the cluster.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ClusterStatus {
    pub cluster_id: String,
    pub epoch: u64,
    pub shards: u32,
    /// The name of shard 0's leader.
    pub leader: Option<String>,
    pub nodes: Vec<NodeStatus>,
    pub per_shard: Vec<ShardStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeStatus {
    pub name: String,
    pub id: u64,
    /// In shard 0.
    pub role: Role,
    pub region: String,
    /// Applied by its replica of shard 0.
    pub revision: Revision,
    /// Log entries of shard 0 that are committed and that it has not applied.
    pub lag: u64,
    /// Of the software.
    pub version: String,
    /// It answers, keeps up and has no problems.
    pub healthy: bool,
    pub client_address: String,
    pub peer_address: String,
    /// Why it is not healthy, in words.
    pub problems: Vec<String>,
    /// Of the policies it is configured with; 0 if it does not answer.
    pub policy_hash: u64,
    /// They are not those of shard 0's leader.
    pub policies_differ: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardStatus {
    pub shard: u32,
    pub leader: Option<String>,
    pub term: u64,
    pub revision: Revision,
    pub voters: Vec<String>,
    pub learners: Vec<String>,
    /// How far log time is ahead of the voters' clocks, or of the asked node's own where it does not
    /// lead.
    pub log_time_ahead_ms: i64,
}

impl<'a> Cluster<'a> {
    pub(crate) fn new(client: &'a Client) -> Self {
        Self { client }
    }

    /// Answers without leader or quorum.
    pub async fn status(self) -> Result<ClusterStatus, Error> {
        let response = self.client.call(
            Kind::Read,
            self.client.deadline(None),
            |channel, left| async move {
                cluster(channel)
                    .status(timed(v1::StatusRequest {}, left))
                    .await
            },
        );
        Ok(response.await?.into())
    }

    /// Admits a node as a learner and answers its id. Usually nodes join by themselves.
    pub async fn add_member(self, name: &str, peer_address: &str) -> Result<u64, Error> {
        let request = v1::AddMemberRequest {
            name: name.to_owned(),
            peer_address: peer_address.to_owned(),
        };
        let response =
            self.client
                .call(Kind::Write, self.client.deadline(None), |channel, left| {
                    let request = timed(request.clone(), left);
                    async move { cluster(channel).add_member(request).await }
                });
        Ok(response.await?.id)
    }

    /// Makes a learner a voter, once it has caught up.
    pub async fn promote(self, name: &str) -> Result<(), Error> {
        let request = v1::PromoteRequest {
            name: name.to_owned(),
        };
        let response =
            self.client
                .call(Kind::Write, self.client.deadline(None), |channel, left| {
                    let request = timed(request.clone(), left);
                    async move { cluster(channel).promote(request).await }
                });
        response.await.map(|_| ())
    }

    /// Removes a member. Its id is never used again.
    pub async fn remove(self, name: &str) -> Result<(), Error> {
        let request = v1::RemoveRequest {
            name: name.to_owned(),
        };
        let response =
            self.client
                .call(Kind::Write, self.client.deadline(None), |channel, left| {
                    let request = timed(request.clone(), left);
                    async move { cluster(channel).remove(request).await }
                });
        response.await.map(|_| ())
    }

    /// Hands leadership on, to the voter named or to the one that is furthest. Answers the new
    /// leader's name.
    pub async fn transfer_leader(self, to: Option<&str>) -> Result<String, Error> {
        let request = v1::TransferLeaderRequest {
            to: to.unwrap_or_default().to_owned(),
        };
        let response =
            self.client
                .call(Kind::Write, self.client.deadline(None), |channel, left| {
                    let request = timed(request.clone(), left);
                    async move { cluster(channel).transfer_leader(request).await }
                });
        Ok(response.await?.leader)
    }
}

impl ClusterStatus {
    /// What keeps the cluster from its promises: a shard without leader, a voter that does not
    /// answer, keep up or take part. Empty if nothing.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.leader.is_none() && self.per_shard.iter().all(|shard| shard.shard != 0) {
            problems.push("shard 0 has no leader".to_owned());
        }
        let leaderless = self
            .per_shard
            .iter()
            .filter(|shard| shard.leader.is_none() || (shard.shard == 0 && self.leader.is_none()));
        problems.extend(leaderless.map(|shard| format!("shard {} has no leader", shard.shard)));
        let votes = |node: &NodeStatus| {
            matches!(node.role, Role::Leader | Role::Voter)
                || self
                    .per_shard
                    .iter()
                    .any(|shard| shard.voters.contains(&node.name))
        };
        let unhealthy = |node: &&NodeStatus| !node.healthy && votes(node);
        for node in self.nodes.iter().filter(unhealthy) {
            let of_node = |problem: &String| format!("voter {}: {problem}", node.name);
            problems.extend(node.problems.iter().map(of_node));
            if node.problems.is_empty() {
                problems.push(format!("voter {} is not healthy", node.name));
            }
        }
        // A node that knows only itself was told not to take part.
        if self.nodes.len() == 1 && self.per_shard.is_empty() {
            problems.extend(self.nodes[0].problems.iter().cloned());
        }
        problems
    }
}

impl From<v1::StatusResponse> for ClusterStatus {
    fn from(status: v1::StatusResponse) -> Self {
        Self {
            cluster_id: status.cluster_id,
            epoch: status.epoch,
            shards: status.shards,
            leader: named(status.leader),
            nodes: status.nodes.into_iter().map(Into::into).collect(),
            per_shard: status.per_shard.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<v1::NodeStatus> for NodeStatus {
    fn from(node: v1::NodeStatus) -> Self {
        Self {
            name: node.name,
            id: node.id,
            role: node.role.into(),
            region: node.region,
            revision: node.revision,
            lag: node.lag,
            version: node.version,
            healthy: node.healthy,
            client_address: node.client_address,
            peer_address: node.peer_address,
            problems: node.problems,
            policy_hash: node.policy_hash,
            policies_differ: node.policies_differ,
        }
    }
}

impl From<v1::ShardStatus> for ShardStatus {
    fn from(shard: v1::ShardStatus) -> Self {
        Self {
            shard: shard.shard,
            leader: named(shard.leader),
            term: shard.term,
            revision: shard.revision,
            voters: shard.voters,
            learners: shard.learners,
            log_time_ahead_ms: shard.log_time_ahead_ms,
        }
    }
}

fn cluster(channel: Channel) -> v1::cluster_service_client::ClusterServiceClient<Channel> {
    v1::cluster_service_client::ClusterServiceClient::new(channel)
        .max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(CLIENT_MESSAGE_BYTES_MAX)
}

fn named(name: String) -> Option<String> {
    (!name.is_empty()).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(leader: &str, nodes: &[(&str, v1::Role, bool)]) -> ClusterStatus {
        let node = |&(name, role, healthy): &(&str, v1::Role, bool)| v1::NodeStatus {
            name: name.into(),
            role: role as i32,
            healthy,
            ..Default::default()
        };
        let per_shard = vec![v1::ShardStatus {
            leader: leader.into(),
            ..Default::default()
        }];
        v1::StatusResponse {
            leader: leader.into(),
            nodes: nodes.iter().map(node).collect(),
            per_shard,
            ..Default::default()
        }
        .into()
    }

    #[test]
    fn a_cluster_is_degraded_without_a_leader_or_with_a_silent_voter_only() {
        use v1::Role::{Leader, Learner, Voter};
        assert!(
            status(
                "a",
                &[
                    ("a", Leader, true),
                    ("b", Voter, true),
                    ("c", Learner, false)
                ]
            )
            .problems()
            .is_empty()
        );
        assert_eq!(
            status("", &[("a", Voter, true)]).problems(),
            ["shard 0 has no leader"]
        );
        assert_eq!(
            status("a", &[("a", Leader, true), ("b", Voter, false)]).problems(),
            ["voter b is not healthy"]
        );
    }
}
