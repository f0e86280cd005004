//! Who is a member of what: the roster in shard 0 says who shall be, and each shard's leader brings its Raft group to it,
//! one change at a time. So an operator's command is one write to shard 0 and a wait, can be repeated, and is resumed by
//! whoever leads next.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use futures::future::join_all;
use holdfast_proto::{
    ShardId,
    peer::{
        AdmitMember, ChangeMemberRequest, Command, ForgetMember, Joined, Member, Outcome, PromoteMember, ReportRequest, ReportResponse,
        RosterRecord, change_member_request, command::Op, outcome,
    },
    reason, v1,
};
use openraft::ChangeMembers;
use parking_lot::Mutex;
use tonic::Request;

use crate::{
    forming::report,
    peer::{Peers, connect_lazy},
    replica::{Replica, WriteError},
    replicas::Replicas,
};

const CHANGE_TIMEOUT: Duration = Duration::from_secs(10);
const REPORT_TIMEOUT: Duration = Duration::from_millis(400);
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(2);
const POLL_EVERY: Duration = Duration::from_millis(50);
/// A learner that is at most so many entries behind …
const CAUGHT_UP_ENTRIES: u64 = 1000;
/// … for so long is promoted.
const CAUGHT_UP_FOR: Duration = Duration::from_secs(5);
/// A member that was heard of within this is alive.
const ALIVE_WITHIN: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    #[error("there is no member `{0}`")]
    NoMember(String),
    #[error("{0}")]
    Refused(String),
    #[error("{message}")]
    Remote { reason: String, message: String },
    #[error(transparent)]
    Write(#[from] WriteError),
    #[error("the change is on its way and not yet done on every shard: repeat the command to wait for it")]
    Unfinished,
}

impl ChangeError {
    pub fn reason(&self) -> &str {
        match self {
            Self::NoMember(_) => reason::NO_MEMBER,
            Self::Refused(_) => reason::MEMBERSHIP,
            Self::Remote { reason, .. } => reason,
            Self::Write(error) => error.reason(),
            Self::Unfinished => reason::DEADLINE,
        }
    }

    pub fn message(&self) -> String {
        self.to_string()
    }
}

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
    /// Admits a node as a learner: asks it who it is, gives it an id, and lets it know where the cluster is.
    pub async fn add_member(&self, name: &str, peer_address: &str) -> Result<u64, ChangeError> {
        let mut client = holdfast_proto::peer::membership_service_client::MembershipServiceClient::new(connect_lazy(peer_address));
        let record = self.identity.record();
        let hello = holdfast_proto::peer::HelloRequest {
            self_: Some(self.myself()),
            state: holdfast_proto::peer::NodeState::Formed.into(),
            cluster_id: record.cluster.map(|cluster| cluster.cluster_id).unwrap_or_default(),
            expect: self.options.expect,
        };
        let asked = tokio::time::timeout(REPORT_TIMEOUT * 4, client.hello(Request::new(hello))).await;
        let Ok(Ok(answer)) = asked else { return Err(ChangeError::Refused(format!("no node answers at {peer_address}"))) };
        let answer = answer.into_inner();
        let found = answer.self_.clone().unwrap_or_default();
        if found.name != name {
            return Err(ChangeError::Refused(format!("the node at {peer_address} is `{}`, not `{name}`", found.name)));
        }
        if answer.state() == holdfast_proto::peer::NodeState::Formed && answer.cluster_id != self.cluster_id() {
            return Err(ChangeError::Refused(format!("the node at {peer_address} belongs to another cluster")));
        }
        Ok(self.change(Change::Add(found)).await?.id)
    }

    pub async fn promote(&self, name: &str) -> Result<(), ChangeError> {
        self.change(Change::Promote(name.into())).await.map(|_| ())
    }

    pub async fn remove(&self, name: &str) -> Result<(), ChangeError> {
        self.change(Change::Remove(name.into())).await.map(|_| ())
    }

    /// Of every shard; the name of shard 0's new leader.
    pub async fn transfer_leader(&self, to: &str) -> Result<String, ChangeError> {
        self.change(Change::TransferLeader(to.into())).await.map(|changed| changed.leader)
    }

    fn cluster_id(&self) -> String {
        self.peers().map(|peers| peers.identity().cluster_id.clone()).unwrap_or_default()
    }

    /// Carries a change out where shard 0 is led.
    async fn change(&self, change: Change) -> Result<Changed, ChangeError> {
        let deadline = self.clock.monotonic() + CHANGE_TIMEOUT;
        loop {
            let (Some(peers), Some(first)) = (self.peers(), self.replica(0)) else {
                return Err(ChangeError::Write(WriteError::NoLeader));
            };
            match first.leader() {
                Some(leader) if leader.is_self => return change_here(self, 0, change).await,
                Some(leader) => return self.change_there(&peers, 0, leader.id, change).await,
                None if self.clock.monotonic() >= deadline => return Err(ChangeError::Write(WriteError::NoLeader)),
                None => tokio::time::sleep(POLL_EVERY).await,
            }
        }
    }

    async fn change_there(&self, peers: &Peers, shard: ShardId, leader: u64, change: Change) -> Result<Changed, ChangeError> {
        let member = peers.member(leader).ok_or(WriteError::NoLeader)?;
        let mut request =
            Request::new(ChangeMemberRequest { header: Some(peers.header(leader, shard, None)), change: Some(change.into()) });
        request.set_timeout(CHANGE_TIMEOUT);
        let mut client = peers.membership_client(&member.peer_address);
        let answer = client.change_member(request).await.map_err(|status| WriteError::Unknown(status.message().into()))?.into_inner();
        if !answer.reason.is_empty() {
            return Err(ChangeError::Remote { reason: answer.reason, message: answer.message });
        }
        Ok(Changed { id: answer.id, leader: answer.leader })
    }

    /// What this node knows of the cluster, and what the others say of themselves now.
    pub async fn status(&self) -> v1::StatusResponse {
        let (Some(peers), Some(first)) = (self.peers(), self.replica(0)) else { return v1::StatusResponse::default() };
        let members = self.members_of(&first);
        let reports = join_all(members.iter().map(|member| self.ask_for_report(&peers, member))).await;
        let name = |id: u64| members.iter().find(|member| member.id == id).map(|member| member.name.clone()).unwrap_or_default();
        let leader = first.leader().map_or(0, |leader| leader.id);
        let furthest =
            reports.iter().flatten().filter_map(|report| report.shards.first()).map(|shard| shard.applied_index).max().unwrap_or(0);
        let voters: BTreeSet<u64> = first.voters().into_iter().collect();
        let nodes = members.iter().zip(&reports).map(|(member, answer)| {
            let shard = answer.as_ref().and_then(|answer| answer.shards.first());
            let seen = peers.view(0, member.id);
            let applied_index = shard.map_or(seen.map_or(0, |view| view.applied_index), |shard| shard.applied_index);
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
                version: answer.as_ref().map(|answer| answer.version.clone()).unwrap_or_default(),
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
                    leader: replica.leader().map(|leader| name(leader.id)).unwrap_or_default(),
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
            _ => self.peers().map(|peers| peers.members()).unwrap_or_default(),
        }
    }

    async fn ask_for_report(&self, peers: &Peers, member: &Member) -> Option<ReportResponse> {
        if member.id == peers.identity().node_id {
            let shards = self.replicas().iter().map(|replica| report(replica)).collect();
            return Some(ReportResponse { header: None, version: env!("CARGO_PKG_VERSION").into(), shards });
        }
        let mut request = Request::new(ReportRequest { header: Some(peers.header(member.id, 0, None)) });
        request.set_timeout(REPORT_TIMEOUT);
        let mut client = peers.membership_client(&member.peer_address);
        let answer = tokio::time::timeout(REPORT_TIMEOUT, client.report(request)).await;
        Some(answer.ok()?.ok()?.into_inner())
    }
}

// ---- where shard 0 is led ----

/// Gives a node its id, if shard 0 is led here.
pub(crate) async fn admit(replicas: &Replicas, member: Member) -> Result<Admission, ChangeError> {
    let (Some(peers), Some(first)) = (replicas.peers(), replicas.replica(0)) else { return Err(WriteError::NoLeader.into()) };
    let leader = first.leader().ok_or(WriteError::NoLeader)?;
    if !leader.is_self {
        return Ok(Admission::AskLeader(peers.member(leader.id).ok_or(WriteError::NoLeader)?.peer_address));
    }
    let id = admit_here(&first, member).await?;
    let identity = peers.identity();
    let shards = u32::try_from(replicas.replicas().len()).unwrap_or(u32::MAX);
    Ok(Admission::Here(Joined { cluster_id: identity.cluster_id.clone(), epoch: identity.epoch, shards, node_id: id }))
}

async fn admit_here(first: &Replica, member: Member) -> Result<u64, ChangeError> {
    match propose(first, Op::AdmitMember(AdmitMember { member: Some(member) })).await? {
        Outcome { result: Some(outcome::Result::Admitted(admitted)) } => Ok(admitted.id),
        other => Err(unexpected(other)),
    }
}

pub(crate) async fn change_here(replicas: &Replicas, shard: ShardId, change: Change) -> Result<Changed, ChangeError> {
    let first = replicas.replica(shard).ok_or(WriteError::NoLeader)?;
    let peers = replicas.peers().ok_or(WriteError::NoLeader)?;
    let find = |name: &str| {
        let known = replicas.members_of(&first).into_iter().find(|member| member.name == name);
        known.ok_or_else(|| ChangeError::NoMember(name.into()))
    };
    match change {
        Change::Add(member) => Ok(Changed { id: admit_here(&first, member).await?, ..Changed::default() }),
        Change::Promote(name) => {
            let member = find(&name)?;
            if member.learner_only {
                return Err(ChangeError::Refused(format!("`{name}` has `node.role: learner`: it never votes")));
            }
            let behind = entries_behind(&first, &peers, member.id);
            if !first.voters().contains(&member.id) && behind.is_none_or(|behind| behind > CAUGHT_UP_ENTRIES) {
                return Err(ChangeError::Refused(format!("`{name}` has not caught up yet: promote it when it has")));
            }
            propose(&first, Op::PromoteMember(PromoteMember { id: member.id })).await?;
            wait_until(replicas, |group| group.voters().contains(&member.id)).await?;
            Ok(Changed { id: member.id, ..Changed::default() })
        }
        Change::Remove(name) => {
            let member = find(&name)?;
            may_remove(replicas, &first, &peers, &member).await?;
            propose(&first, Op::ForgetMember(ForgetMember { id: member.id })).await?;
            wait_until(replicas, |group| !group.voters().contains(&member.id) && !group.learners().contains(&member.id)).await?;
            Ok(Changed { id: member.id, ..Changed::default() })
        }
        Change::TransferLeader(name) => transfer_here(replicas, &first, &name, &find).await,
    }
}

async fn transfer_here(
    replicas: &Replicas,
    first: &Replica,
    name: &str,
    find: &impl Fn(&str) -> Result<Member, ChangeError>,
) -> Result<Changed, ChangeError> {
    let to = if name.is_empty() { None } else { Some(find(name)?.id) };
    if let Some(to) = to
        && !first.voters().contains(&to)
    {
        return Err(ChangeError::Refused(format!("`{name}` is not a voter")));
    }
    let mut leader = None;
    for replica in replicas.replicas().iter().filter(|replica| replica.leader().is_some_and(|leader| leader.is_self)) {
        let me = replicas.peers().map_or(0, |peers| peers.identity().node_id);
        let taken = if to == Some(me) { Some(me) } else { replica.hand_over(to).await };
        if replica.shard() == 0 {
            leader = taken;
        }
    }
    let leader = leader.ok_or_else(|| ChangeError::Refused("no other voter could take over".into()))?;
    let name = replicas.members_of(first).into_iter().find(|member| member.id == leader).map(|member| member.name);
    Ok(Changed { id: leader, leader: name.unwrap_or_default() })
}

/// A removal must leave a majority of the remaining voters alive: each is asked now, because one that died a moment ago was
/// heard from a moment ago.
async fn may_remove(replicas: &Replicas, first: &Replica, peers: &Peers, member: &Member) -> Result<(), ChangeError> {
    let voters = first.voters();
    if !voters.contains(&member.id) {
        return Ok(());
    }
    let left: Vec<u64> = voters.into_iter().filter(|&voter| voter != member.id).collect();
    let members = replicas.members_of(first);
    let asked = members.iter().filter(|member| left.contains(&member.id)).map(|member| replicas.ask_for_report(peers, member));
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
    peers.view(replica.shard(), member).is_some_and(|view| replica.monotonic().saturating_sub(view.heard_at) < ALIVE_WITHIN)
}

fn entries_behind(replica: &Replica, peers: &Peers, member: u64) -> Option<u64> {
    let view = peers.view(replica.shard(), member)?;
    is_alive(replica, peers, member).then(|| replica.applied().index.saturating_sub(view.applied_index))
}

async fn propose(first: &Replica, op: Op) -> Result<Outcome, ChangeError> {
    let command = Command { request_id: None, caller: String::new(), op: Some(op) };
    let outcome = first.propose_here(command, CHANGE_TIMEOUT).await?;
    match outcome.result {
        Some(outcome::Result::Rejected(_)) | None => Err(unexpected(outcome)),
        Some(_) => Ok(outcome),
    }
}

fn unexpected(outcome: Outcome) -> ChangeError {
    match outcome.result {
        Some(outcome::Result::Rejected(rejected)) => ChangeError::Remote { reason: rejected.reason, message: rejected.message },
        other => ChangeError::Refused(format!("the cluster answered {other:?}")),
    }
}

async fn wait_until(replicas: &Replicas, done: impl Fn(&Replica) -> bool) -> Result<(), ChangeError> {
    let all_done = async {
        while !replicas.replicas().iter().all(|replica| done(replica)) {
            tokio::time::sleep(POLL_EVERY).await;
        }
    };
    tokio::time::timeout(CHANGE_TIMEOUT, all_done).await.map_err(|_| ChangeError::Unfinished)
}

// ---- every shard's leader: bring the group to the roster ----

/// Since when each learner has been level with the leader of shard 0.
#[derive(Default)]
pub(crate) struct CatchingUp(Mutex<std::collections::HashMap<u64, Duration>>);

pub(crate) async fn maintain(replicas: &Replicas, peers: &Peers, groups: &[Arc<Replica>]) {
    let Some(first) = groups.first() else { return };
    let roster = match first.state().roster() {
        Ok(roster) if !roster.members.is_empty() => roster,
        _ => return,
    };
    for group in groups.iter().filter(|group| group.leads().is_some()) {
        // Without a quorum a change waits for ever; this task has other duties.
        match tokio::time::timeout(RECONCILE_TIMEOUT, reconcile(group, &roster)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, shard = group.shard(), "a membership change did not go through"),
            Err(_) => tracing::warn!(shard = group.shard(), "a membership change is still on its way"),
        }
    }
    if first.leads().is_some() {
        promote_caught_up(replicas, peers, first, &roster).await;
    }
}

/// One change towards the roster; none while another is under way.
async fn reconcile(group: &Replica, roster: &RosterRecord) -> io::Result<()> {
    let present: BTreeSet<u64> = group.voters().into_iter().chain(group.learners()).collect();
    let voters: BTreeSet<u64> = group.voters().into_iter().collect();
    let wanted: BTreeSet<u64> = roster.members.iter().map(|member| member.id).collect();
    if group.changes_voters() {
        return Ok(());
    }
    if let Some(new) = roster.members.iter().find(|member| !present.contains(&member.id)) {
        tracing::info!(shard = group.shard(), name = new.name, id = new.id, "admitting a learner");
        return group.raft().add_learner(new.id, new.clone(), false).await.map(|_| ()).map_err(io::Error::other);
    }
    let promoted: BTreeSet<u64> = roster.voters.iter().copied().filter(|id| wanted.contains(id) && !voters.contains(id)).collect();
    if !promoted.is_empty() {
        tracing::info!(shard = group.shard(), ?promoted, "making voters");
        return group.raft().change_membership(ChangeMembers::AddVoterIds(promoted), true).await.map(|_| ()).map_err(io::Error::other);
    }
    let gone: BTreeSet<u64> = present.difference(&wanted).copied().collect();
    if gone.is_empty() {
        return Ok(());
    }
    tracing::info!(shard = group.shard(), ?gone, "removing members");
    let gone_voters: BTreeSet<u64> = gone.intersection(&voters).copied().collect();
    let change = match gone_voters.is_empty() {
        true => ChangeMembers::RemoveNodes(gone),
        false => ChangeMembers::RemoveVoters(gone_voters),
    };
    group.raft().change_membership(change, false).await.map(|_| ()).map_err(io::Error::other)
}

/// A learner that keeps up becomes a voter while there are fewer than expected, dead ones included.
async fn promote_caught_up(replicas: &Replicas, peers: &Peers, first: &Replica, roster: &RosterRecord) {
    let now = replicas.clock.monotonic();
    if roster.voters.len() >= replicas.options.expect as usize {
        return;
    }
    for learner in roster.members.iter().filter(|member| !member.learner_only && !roster.voters.contains(&member.id)) {
        let level = entries_behind(first, peers, learner.id).is_some_and(|behind| behind <= CAUGHT_UP_ENTRIES);
        let since = {
            let mut catching_up = replicas.catching_up.0.lock();
            if !level {
                catching_up.remove(&learner.id);
                continue;
            }
            *catching_up.entry(learner.id).or_insert(now)
        };
        if now.saturating_sub(since) >= CAUGHT_UP_FOR {
            tracing::info!(name = learner.name, "a learner has caught up: it becomes a voter");
            if let Err(error) = propose(first, Op::PromoteMember(PromoteMember { id: learner.id })).await {
                tracing::warn!(%error, "promoting a learner failed");
            }
            return;
        }
    }
}
