//! Who is a member of what: the roster in shard 0 says who shall be, and each shard's leader brings
//! its Raft group to it, one change at a time. So an operator's command is one write to shard 0 and
//! a wait, can be repeated, and is resumed by whoever leads next.

mod reconcile;

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use holdfast_proto::{
    ShardId,
    peer::{
        AdmitMember, ChangeMemberRequest, Command, ForgetMember, Joined, Member, Outcome,
        PromoteMember, ReportRequest, ReportResponse, RosterRecord, change_member_request,
        command::Op, outcome,
    },
    v1,
};
use tonic::Request;

pub(crate) use self::reconcile::{CatchingUp, maintain};
use crate::{
    error::{ChangeError, WriteError},
    forming::report,
    peer::{Peers, connect_lazy},
    replica::{Replica, Seen},
    replicas::Replicas,
};

const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
const REPORT_TIMEOUT: Duration = Duration::from_millis(400);
const POLL_EVERY: Duration = Duration::from_millis(50);
/// A learner that is at most so many entries behind is level with the leader.
const CAUGHT_UP_ENTRIES: u64 = 1000;
/// A member that was heard of within this is alive.
const ALIVE_WITHIN: Duration = Duration::from_secs(1);

/// What an operator asks for.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Add(Member),
    Promote(String),
    Remove(String),
    TransferLeader(String),
}

impl TryFrom<Option<change_member_request::Change>> for Change {
    type Error = &'static str;

    fn try_from(change: Option<change_member_request::Change>) -> Result<Self, Self::Error> {
        match change.ok_or("the change is missing")? {
            change_member_request::Change::Add(member) => Ok(Self::Add(member)),
            change_member_request::Change::Promote(name) => Ok(Self::Promote(name)),
            change_member_request::Change::Remove(name) => Ok(Self::Remove(name)),
            change_member_request::Change::TransferLeaderTo(name) => Ok(Self::TransferLeader(name)),
        }
    }
}

impl From<Change> for change_member_request::Change {
    fn from(change: Change) -> Self {
        match change {
            Change::Add(member) => Self::Add(member),
            Change::Promote(name) => Self::Promote(name),
            Change::Remove(name) => Self::Remove(name),
            Change::TransferLeader(name) => Self::TransferLeaderTo(name),
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Changed {
    pub(crate) id: u64,
    pub(crate) leader: String,
}

/// Where a node that wants to join is taken in.
pub(crate) enum Admission {
    Here(Joined),
    AskLeader(String),
}

// ---- what operators call, on any node ----

impl Replicas {
    /// Admits a node as a learner: asks it who it is, gives it an id, and lets it know where the
    /// cluster is.
    pub async fn add_member(&self, name: &str, peer_address: &str) -> Result<u64, ChangeError> {
        let mut client =
            holdfast_proto::peer::membership_service_client::MembershipServiceClient::new(
                connect_lazy(peer_address),
            );
        let record = self.identity.record();
        let hello = holdfast_proto::peer::HelloRequest {
            self_: Some(self.myself()),
            state: holdfast_proto::peer::NodeState::Formed.into(),
            cluster_id: record
                .cluster
                .map(|cluster| cluster.cluster_id)
                .unwrap_or_default(),
            expect: self.options.expect,
        };
        let asked =
            tokio::time::timeout(REPORT_TIMEOUT * 4, client.hello(Request::new(hello))).await;
        let Ok(Ok(answer)) = asked else {
            return Err(ChangeError::Refused(format!(
                "no node answers at {peer_address}"
            )));
        };
        let answer = answer.into_inner();
        let found = answer.self_.clone().unwrap_or_default();
        if found.name != name {
            return Err(ChangeError::Refused(format!(
                "the node at {peer_address} is `{}`, not `{name}`",
                found.name
            )));
        }
        if answer.state() == holdfast_proto::peer::NodeState::Formed
            && answer.cluster_id != self.cluster_id()
        {
            return Err(ChangeError::Refused(format!(
                "the node at {peer_address} belongs to another cluster"
            )));
        }
        Ok(self.change(0, Change::Add(found)).await?.id)
    }

    pub async fn promote(&self, name: &str) -> Result<(), ChangeError> {
        self.change(0, Change::Promote(name.into()))
            .await
            .map(|_| ())
    }

    pub async fn remove(&self, name: &str) -> Result<(), ChangeError> {
        self.change(0, Change::Remove(name.into()))
            .await
            .map(|_| ())
    }

    /// Of every shard; the name of shard 0's new leader.
    pub async fn transfer_leader(&self, to: &str) -> Result<String, ChangeError> {
        let deadline = self.clock.monotonic() + CHANGE_TIMEOUT;
        let mut leader = String::new();
        // Shard 0 last: it is the one whose leader is told.
        for replica in self.replicas().iter().rev() {
            leader = loop {
                let leader = self
                    .change(replica.shard(), Change::TransferLeader(to.into()))
                    .await?
                    .leader;
                if to.is_empty() || leader == to {
                    break leader;
                }
                // The election that a transfer begins was won by a third voter: now that one is
                // asked.
                if self.clock.monotonic() >= deadline {
                    return Err(ChangeError::Refused(format!(
                        "`{leader}` was elected in the place of `{to}`"
                    )));
                }
            };
        }
        Ok(leader)
    }

    fn cluster_id(&self) -> String {
        self.peers()
            .map(|peers| peers.identity().cluster_id.clone())
            .unwrap_or_default()
    }

    /// Carries a change out where the shard is led. The roster's changes are shard 0's.
    async fn change(&self, shard: ShardId, change: Change) -> Result<Changed, ChangeError> {
        let deadline = self.clock.monotonic() + CHANGE_TIMEOUT;
        loop {
            let (Some(peers), Some(group)) = (self.peers(), self.replica(shard)) else {
                return Err(ChangeError::Write(WriteError::NoLeader));
            };
            match group.leader() {
                Some(leader) if leader.is_self => return change_here(self, shard, change).await,
                Some(leader) => return self.change_there(&peers, shard, leader.id, change).await,
                None if self.clock.monotonic() >= deadline => {
                    return Err(ChangeError::Write(WriteError::NoLeader));
                }
                None => tokio::time::sleep(POLL_EVERY).await,
            }
        }
    }

    async fn change_there(
        &self,
        peers: &Peers,
        shard: ShardId,
        leader: u64,
        change: Change,
    ) -> Result<Changed, ChangeError> {
        let member = peers.member(leader).ok_or(WriteError::NoLeader)?;
        let mut request = Request::new(ChangeMemberRequest {
            header: Some(peers.header(leader, shard, None)),
            change: Some(change.into()),
        });
        request.set_timeout(CHANGE_TIMEOUT);
        let mut client = peers.membership_client(&member.peer_address);
        let answer = client
            .change_member(request)
            .await
            .map_err(|status| WriteError::Unknown(status.message().into()))?
            .into_inner();
        if !answer.reason.is_empty() {
            return Err(ChangeError::Remote {
                reason: answer.reason,
                message: answer.message,
            });
        }
        Ok(Changed {
            id: answer.id,
            leader: answer.leader,
        })
    }

    /// What this node knows of the cluster, and what the others say of themselves now.
    pub async fn status(&self) -> v1::StatusResponse {
        let (Some(peers), Some(first)) = (self.peers(), self.replica(0)) else {
            return v1::StatusResponse::default();
        };
        let members = self.members_of(&first);
        let reports = join_all(
            members
                .iter()
                .map(|member| self.ask_for_report(&peers, member)),
        )
        .await;
        let name = |id: u64| {
            members
                .iter()
                .find(|member| member.id == id)
                .map(|member| member.name.clone())
                .unwrap_or_default()
        };
        let leader = first.leader().map_or(0, |leader| leader.id);
        let furthest = reports
            .iter()
            .flatten()
            .filter_map(|report| report.shards.first())
            .map(|shard| shard.applied_index)
            .max()
            .unwrap_or(0);
        let voters: BTreeSet<u64> = first.voters().into_iter().collect();
        let nodes = members.iter().zip(&reports).map(|(member, answer)| {
            let shard = answer.as_ref().and_then(|answer| answer.shards.first());
            let seen = peers.view(0, member.id);
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
                revision: shard
                    .map_or(seen.map_or(0, |view| view.revision), |shard| shard.revision),
                lag: furthest.saturating_sub(applied_index),
                version: answer
                    .as_ref()
                    .map(|answer| answer.version.clone())
                    .unwrap_or_default(),
                healthy: answer.is_some(),
                client_address: member.client_address.clone(),
                peer_address: member.peer_address.clone(),
            }
        });
        v1::StatusResponse {
            cluster_id: peers.identity().cluster_id.clone(),
            epoch: peers.identity().epoch,
            shards: u32::try_from(self.replicas().len()).unwrap_or(u32::MAX),
            leader: name(leader),
            nodes: nodes.collect(),
            per_shard: self
                .replicas()
                .iter()
                .map(|replica| v1::ShardStatus {
                    shard: replica.shard(),
                    leader: replica
                        .leader()
                        .map(|leader| name(leader.id))
                        .unwrap_or_default(),
                    term: replica.term(),
                    revision: replica.applied().revision,
                    voters: replica.voters().into_iter().map(name).collect(),
                    learners: replica.learners().into_iter().map(name).collect(),
                })
                .collect(),
        }
    }

    /// The roster, or before the first applied membership whoever this node was told of.
    fn members_of(&self, first: &Replica) -> Vec<Member> {
        match first.state().roster() {
            Ok(RosterRecord { members, .. }) if !members.is_empty() => members,
            _ => self
                .peers()
                .map(|peers| peers.members())
                .unwrap_or_default(),
        }
    }

    async fn ask_for_report(&self, peers: &Peers, member: &Member) -> Option<ReportResponse> {
        if member.id == peers.identity().node_id {
            let shards = self
                .replicas()
                .iter()
                .map(|replica| report(replica))
                .collect();
            return Some(ReportResponse {
                header: None,
                version: env!("CARGO_PKG_VERSION").into(),
                shards,
            });
        }
        let mut request = Request::new(ReportRequest {
            header: Some(peers.header(member.id, 0, None)),
        });
        request.set_timeout(REPORT_TIMEOUT);
        let mut client = peers.membership_client(&member.peer_address);
        let answer = tokio::time::timeout(REPORT_TIMEOUT, client.report(request)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }
}

// ---- where shard 0 is led ----

/// Gives a node its id, if shard 0 is led here.
pub(crate) async fn admit(replicas: &Replicas, member: Member) -> Result<Admission, ChangeError> {
    let (Some(peers), Some(first)) = (replicas.peers(), replicas.replica(0)) else {
        return Err(WriteError::NoLeader.into());
    };
    let leader = first.leader().ok_or(WriteError::NoLeader)?;
    if !leader.is_self {
        return Ok(Admission::AskLeader(
            peers
                .member(leader.id)
                .ok_or(WriteError::NoLeader)?
                .peer_address,
        ));
    }
    let id = admit_here(&first, member).await?;
    let identity = peers.identity();
    let shards = u32::try_from(replicas.replicas().len()).unwrap_or(u32::MAX);
    Ok(Admission::Here(Joined {
        cluster_id: identity.cluster_id.clone(),
        epoch: identity.epoch,
        shards,
        node_id: id,
    }))
}

async fn admit_here(first: &Replica, member: Member) -> Result<u64, ChangeError> {
    match propose(
        first,
        Op::AdmitMember(AdmitMember {
            member: Some(member),
        }),
    )
    .await?
    {
        Outcome {
            result: Some(outcome::Result::Admitted(admitted)),
        } => Ok(admitted.id),
        other => Err(unexpected(other)),
    }
}

pub(crate) async fn change_here(
    replicas: &Replicas,
    shard: ShardId,
    change: Change,
) -> Result<Changed, ChangeError> {
    let group = replicas.replica(shard).ok_or(WriteError::NoLeader)?;
    let first = replicas.replica(0).ok_or(WriteError::NoLeader)?;
    let peers = replicas.peers().ok_or(WriteError::NoLeader)?;
    // Two removals that each leave a quorum may together leave none: the second one sees what the
    // first one came to.
    let _one = match &change {
        Change::Promote(_) | Change::Remove(_) => Some(replicas.changing.lock().await),
        Change::Add(_) | Change::TransferLeader(_) => None,
    };
    if _one.is_some() {
        // A new leader too: it may not have applied yet what its predecessor's operators did.
        first
            .wait_until_seen(&Seen::Everything, CHANGE_TIMEOUT, CHANGE_TIMEOUT)
            .await
            .map_err(|_| WriteError::NoLeader)?;
    }
    let members = replicas.members_of(&first);
    let find = |name: &str| {
        let known = members.iter().find(|member| member.name == name);
        known
            .cloned()
            .ok_or_else(|| ChangeError::NoMember(name.into()))
    };
    match change {
        Change::Add(member) => Ok(Changed {
            id: admit_here(&first, member).await?,
            ..Changed::default()
        }),
        Change::Promote(name) => {
            let member = find(&name)?;
            if member.learner_only {
                return Err(ChangeError::Refused(format!(
                    "`{name}` has `node.role: learner`: it never votes"
                )));
            }
            let behind = entries_behind(&first, &peers, member.id);
            if !first.voters().contains(&member.id)
                && behind.is_none_or(|behind| behind > CAUGHT_UP_ENTRIES)
            {
                return Err(ChangeError::Refused(format!(
                    "`{name}` has not caught up yet: promote it when it has"
                )));
            }
            propose(&first, Op::PromoteMember(PromoteMember { id: member.id })).await?;
            wait_until(replicas, |group| group.voters().contains(&member.id)).await?;
            Ok(Changed {
                id: member.id,
                ..Changed::default()
            })
        }
        Change::Remove(name) => {
            let id = match find(&name) {
                Ok(member) => {
                    may_remove(replicas, &first, &peers, &member).await?;
                    propose(&first, Op::ForgetMember(ForgetMember { id: member.id })).await?;
                    member.id
                }
                // Forgotten before, and not yet gone from every group: repeated to wait for it.
                Err(error) => replicas
                    .replicas()
                    .iter()
                    .find_map(|group| group.node_named(&name))
                    .ok_or(error)?,
            };
            wait_until(replicas, |group| {
                !group.voters().contains(&id) && !group.learners().contains(&id)
            })
            .await?;
            Ok(Changed {
                id,
                ..Changed::default()
            })
        }
        Change::TransferLeader(name) => {
            let to = if name.is_empty() {
                None
            } else {
                Some(find(&name)?.id)
            };
            let leader = transfer_here(&group, &name, to).await?;
            let name = members
                .iter()
                .find(|member| member.id == leader)
                .map(|member| member.name.clone());
            Ok(Changed {
                id: leader,
                leader: name.unwrap_or_default(),
            })
        }
    }
}

/// Who leads then: another voter than the one named, if it won the election.
async fn transfer_here(group: &Replica, name: &str, to: Option<u64>) -> Result<u64, ChangeError> {
    let leader = group
        .leader()
        .filter(|leader| leader.is_self)
        .ok_or(WriteError::NoLeader)?;
    if to == Some(leader.id) {
        return Ok(leader.id);
    }
    if to.is_some_and(|to| !group.voters().contains(&to)) {
        return Err(ChangeError::Refused(format!("`{name}` is not a voter")));
    }
    group
        .hand_over(to)
        .await
        .ok_or_else(|| ChangeError::Refused("no other voter could take over".into()))
}

/// A removal must leave a majority of the remaining voters alive: each is asked now, because one
/// that died a moment ago was heard from a moment ago.
async fn may_remove(
    replicas: &Replicas,
    first: &Replica,
    peers: &Peers,
    member: &Member,
) -> Result<(), ChangeError> {
    let voters = first.voters();
    if !voters.contains(&member.id) {
        return Ok(());
    }
    let members = replicas.members_of(first);
    // Those that are forgotten already and not yet gone do not count.
    let stays = |voter: u64| voter != member.id && members.iter().any(|member| member.id == voter);
    let left: Vec<u64> = voters.into_iter().filter(|&voter| stays(voter)).collect();
    let asked = members
        .iter()
        .filter(|member| left.contains(&member.id))
        .map(|member| replicas.ask_for_report(peers, member));
    let alive = join_all(asked).await.into_iter().flatten().count();
    if left.is_empty() || alive < left.len() / 2 + 1 {
        return Err(ChangeError::Refused(format!(
            "without `{}` {alive} of {} voters would be alive: no quorum. Bring another voter back first",
            member.name,
            left.len()
        )));
    }
    Ok(())
}

fn is_alive(replica: &Replica, peers: &Peers, member: u64) -> bool {
    peers
        .view(replica.shard(), member)
        .is_some_and(|view| replica.monotonic().saturating_sub(view.heard_at) < ALIVE_WITHIN)
}

fn entries_behind(replica: &Replica, peers: &Peers, member: u64) -> Option<u64> {
    let view = peers.view(replica.shard(), member)?;
    is_alive(replica, peers, member)
        .then(|| replica.applied().index.saturating_sub(view.applied_index))
}

async fn propose(first: &Replica, op: Op) -> Result<Outcome, ChangeError> {
    let command = Command {
        request_id: None,
        caller: String::new(),
        op: Some(op),
    };
    let outcome = first.propose_here(command, CHANGE_TIMEOUT).await?;
    match outcome.result {
        Some(outcome::Result::Rejected(_)) | None => Err(unexpected(outcome)),
        Some(_) => Ok(outcome),
    }
}

fn unexpected(outcome: Outcome) -> ChangeError {
    match outcome.result {
        Some(outcome::Result::Rejected(rejected)) => ChangeError::Remote {
            reason: rejected.reason,
            message: rejected.message,
        },
        other => ChangeError::Refused(format!("the cluster answered {other:?}")),
    }
}

async fn wait_until(
    replicas: &Replicas,
    done: impl Fn(&Replica) -> bool,
) -> Result<(), ChangeError> {
    let all_done = async {
        while !replicas.replicas().iter().all(|replica| done(replica)) {
            tokio::time::sleep(POLL_EVERY).await;
        }
    };
    tokio::time::timeout(CHANGE_TIMEOUT, all_done)
        .await
        .map_err(|_| ChangeError::Unfinished)
}
