//! What operators ask for, on any node: carried out where the shard is led, and waited for.

use std::{sync::Arc, time::Duration};

use futures::future::join_all;
use holdfast_proto::{
    ShardId,
    peer::{
        AdmitMember, ChangeMemberRequest, ForgetMember, Joined, Member, NodeState, Outcome,
        PromoteMember, RosterRecord, change_member_request, command::Op, outcome,
    },
};

use super::{
    CAUGHT_UP_ENTRIES, CHANGE_TIMEOUT, entries_behind, members_of, propose, rules,
    status::ask_for_report, unexpected,
};
use crate::{
    error::{ChangeError, WriteError},
    forming::meet,
    local::Local,
    peer::{CallError, Peers},
    replica::{Replica, Seen},
};

const POLL_EVERY: Duration = Duration::from_millis(50);
const GREETING_TIMEOUT: Duration = Duration::from_secs(2);

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
    /// Who leads then.
    pub(crate) leader: String,
}

/// Where a node that wants to join is taken in.
pub(crate) enum Admission {
    Here(Joined),
    AskLeader(String),
}

pub(crate) struct Changes {
    local: Arc<Local>,
    /// Held by a change of the voters: the next one sees what it came to.
    changing: tokio::sync::Mutex<()>,
}

// ---- on any node ----

impl Changes {
    pub(crate) fn new(local: Arc<Local>) -> Self {
        Self {
            local,
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// Admits a node as a learner: asks it who it is, gives it an id, and lets it know where the
    /// cluster is.
    pub(crate) async fn add(&self, name: &str, peer_address: &str) -> Result<u64, ChangeError> {
        let answer = meet::greet(&self.local, peer_address, GREETING_TIMEOUT).await;
        let answer = answer
            .ok_or_else(|| ChangeError::Refused(format!("no node answers at {peer_address}")))?;
        let found = answer.self_.clone().unwrap_or_default();
        if found.name != name {
            return Err(ChangeError::Refused(format!(
                "the node at {peer_address} is `{}`, not `{name}`",
                found.name
            )));
        }
        if answer.state() == NodeState::Formed && Some(answer.cluster_id) != self.local.cluster_id()
        {
            return Err(ChangeError::Refused(format!(
                "the node at {peer_address} belongs to another cluster"
            )));
        }
        // One that is known has moved: an operator says so, and with it there may be a leader again.
        if let Some(peers) = self.local.peers()
            && let Some(known) = peers.member(found.id)
            && known.incarnation == found.incarnation
        {
            peers.roster().meet(&found, answer.session);
        }
        Ok(self.run(0, Change::Add(found)).await?.id)
    }

    /// Of every shard; the name of shard 0's new leader.
    pub(crate) async fn transfer_leader(&self, to: &str) -> Result<String, ChangeError> {
        let deadline = self.local.clock().deadline(CHANGE_TIMEOUT);
        let mut leader = String::new();
        // Shard 0 last: it is the one whose leader is told.
        for replica in self.local.replicas().rev() {
            leader = loop {
                let transfer = Change::TransferLeader(to.into());
                let leader = self.run(replica.shard(), transfer).await?.leader;
                if to.is_empty() || leader == to {
                    break leader;
                }
                // The election that a transfer begins was won by a third voter: now that one is
                // asked.
                if deadline.has_passed() {
                    return Err(ChangeError::Refused(format!(
                        "`{leader}` was elected in the place of `{to}`"
                    )));
                }
            };
        }
        Ok(leader)
    }

    /// Carries a change out where the shard is led. The roster's changes are shard 0's.
    pub(crate) async fn run(&self, shard: ShardId, change: Change) -> Result<Changed, ChangeError> {
        let deadline = self.local.clock().deadline(CHANGE_TIMEOUT);
        loop {
            let (Some(peers), Some(group)) = (self.local.peers(), self.local.replica(shard)) else {
                return Err(ChangeError::Write(WriteError::NoLeader));
            };
            match group.leader() {
                Some(leader) if leader.is_self => return self.run_here(shard, change).await,
                Some(leader) => return ask_leader(&peers, shard, leader.id, change).await,
                None if deadline.has_passed() => {
                    return Err(ChangeError::Write(WriteError::NoLeader));
                }
                None => tokio::time::sleep(POLL_EVERY).await,
            }
        }
    }
}

async fn ask_leader(
    peers: &Peers,
    shard: ShardId,
    leader: u64,
    change: Change,
) -> Result<Changed, ChangeError> {
    let question = ChangeMemberRequest {
        header: None,
        change: Some(change.into()),
    };
    let deadline = peers.clock().deadline(CHANGE_TIMEOUT);
    let asked = peers.call(peers.header(leader, shard), &deadline, question);
    let answer = asked.await.map_err(|error| match error {
        CallError::NeverSent(_) => WriteError::Unreachable,
        error => WriteError::Unknown(error.to_string()),
    })?;
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

// ---- where the shard is led ----

impl Changes {
    /// Gives a node that asks for it its id, if shard 0 is led here.
    pub(crate) async fn admit(&self, member: Member) -> Result<Admission, ChangeError> {
        let (Some(peers), Some(first)) = (self.local.peers(), self.local.replica(0)) else {
            return Err(WriteError::NoLeader.into());
        };
        let leader = first.leader().ok_or(WriteError::NoLeader)?;
        if !leader.is_self {
            let leader = peers.member(leader.id).ok_or(WriteError::NoLeader)?;
            return Ok(Admission::AskLeader(leader.peer_address));
        }
        let id = self.admit_here(first, &peers, member).await?;
        let identity = peers.identity();
        Ok(Admission::Here(Joined {
            cluster_id: identity.cluster_id.clone(),
            epoch: identity.epoch,
            shards: self.local.shards(),
            node_id: id,
            roster: Some(RosterRecord::clone(&first.state().roster())),
        }))
    }

    /// A member of which nothing survives a restart is replaced by whoever comes under its name.
    async fn admit_here(
        &self,
        first: &Replica,
        peers: &Peers,
        member: Member,
    ) -> Result<u64, ChangeError> {
        let replaced = peers
            .members()
            .into_iter()
            .find(|known| known.volatile && member.volatile && known.name == member.name);
        let Some(replaced) = replaced.filter(|known| known.incarnation != member.incarnation)
        else {
            return admit(first, member).await;
        };
        let _one = self.changing.lock().await;
        has_seen_everything(first).await?;
        self.may_remove(first, &replaced).await?;
        tracing::info!(
            name = member.name,
            id = replaced.id,
            "a member came back with nothing: it is replaced"
        );
        admit(first, member).await
    }

    pub(crate) async fn run_here(
        &self,
        shard: ShardId,
        change: Change,
    ) -> Result<Changed, ChangeError> {
        let group = self.local.replica(shard).ok_or(WriteError::NoLeader)?;
        let first = self.local.replica(0).ok_or(WriteError::NoLeader)?;
        match change {
            Change::Add(member) => admit(first, member).await.map(changed),
            Change::Promote(name) => {
                // Two changes that each leave a quorum may together leave none: the second one
                // sees what the first one came to.
                let _one = self.changing.lock().await;
                has_seen_everything(first).await?;
                self.promote(first, &name).await.map(changed)
            }
            Change::Remove(name) => {
                let _one = self.changing.lock().await;
                has_seen_everything(first).await?;
                self.remove(first, &name).await.map(changed)
            }
            Change::TransferLeader(name) => self.transfer(group, &name).await,
        }
    }

    fn find(&self, first: &Replica, name: &str) -> Result<Member, ChangeError> {
        let mut members = members_of(&self.local, first).into_iter();
        let found = members.find(|member| member.name == name);
        found.ok_or_else(|| ChangeError::NoMember(name.into()))
    }

    async fn promote(&self, first: &Replica, name: &str) -> Result<u64, ChangeError> {
        let member = self.find(first, name)?;
        if member.learner_only {
            return Err(ChangeError::Refused(format!(
                "`{name}` has `node.role: learner`: it never votes"
            )));
        }
        let peers = self.local.peers().ok_or(WriteError::NoLeader)?;
        let behind = entries_behind(first, &peers, member.id);
        if !first.voters().contains(&member.id)
            && behind.is_none_or(|behind| behind > CAUGHT_UP_ENTRIES)
        {
            return Err(ChangeError::Refused(format!(
                "`{name}` has not caught up yet: promote it when it has"
            )));
        }
        propose(first, Op::PromoteMember(PromoteMember { id: member.id })).await?;
        self.wait_until(|group| group.voters().contains(&member.id))
            .await?;
        Ok(member.id)
    }

    async fn remove(&self, first: &Replica, name: &str) -> Result<u64, ChangeError> {
        let id = match self.find(first, name) {
            Ok(member) => {
                self.may_remove(first, &member).await?;
                propose(first, Op::ForgetMember(ForgetMember { id: member.id })).await?;
                member.id
            }
            // Forgotten before, and not yet gone from every group: repeated to wait for it.
            Err(error) => {
                let mut groups = self.local.replicas();
                groups
                    .find_map(|group| group.node_named(name))
                    .ok_or(error)?
            }
        };
        self.wait_until(|group| !group.voters().contains(&id) && !group.learners().contains(&id))
            .await?;
        Ok(id)
    }

    /// Each voter is asked now, because one that died a moment ago was heard from a moment ago.
    async fn may_remove(&self, first: &Replica, member: &Member) -> Result<(), ChangeError> {
        let voters = first.voters().into_iter().collect();
        let members = members_of(&self.local, first);
        let peers = self.local.peers().ok_or(WriteError::NoLeader)?;
        if !first.voters().contains(&member.id) {
            return Ok(());
        }
        let asked = members.iter().map(|member| {
            let asked = ask_for_report(&self.local, &peers, member);
            async move { asked.await.map(|_| member.id) }
        });
        let alive = join_all(asked).await.into_iter().flatten().collect();
        // Those that are forgotten already and not yet gone are on their way out as well.
        let stays =
            |voter: &u64| *voter != member.id && members.iter().any(|member| member.id == *voter);
        let gone = first
            .voters()
            .into_iter()
            .filter(|voter| !stays(voter))
            .collect();
        rules::may_remove(&voters, &alive, &gone, &member.name).map_err(ChangeError::Refused)
    }

    async fn wait_until(&self, done: impl Fn(&Replica) -> bool) -> Result<(), ChangeError> {
        let all_done = async {
            while !self.local.replicas().all(|replica| done(replica)) {
                tokio::time::sleep(POLL_EVERY).await;
            }
        };
        tokio::time::timeout(CHANGE_TIMEOUT, all_done)
            .await
            .map_err(|_| ChangeError::Unfinished)
    }

    /// Who leads then: another voter than the one named, if it won the election.
    async fn transfer(&self, group: &Replica, name: &str) -> Result<Changed, ChangeError> {
        let first = self.local.replica(0).ok_or(WriteError::NoLeader)?;
        let to = match name.is_empty() {
            true => None,
            false => Some(self.find(first, name)?.id),
        };
        let leader = group
            .leader()
            .filter(|leader| leader.is_self)
            .ok_or(WriteError::NoLeader)?;
        let id = if to == Some(leader.id) {
            leader.id
        } else if to.is_some_and(|to| !group.voters().contains(&to)) {
            return Err(ChangeError::Refused(format!("`{name}` is not a voter")));
        } else {
            group
                .hand_over(to)
                .await
                .ok_or_else(|| ChangeError::Refused("no other voter could take over".into()))?
        };
        let members = members_of(&self.local, first);
        let leader = members.into_iter().find(|member| member.id == id);
        Ok(Changed {
            id,
            leader: leader.map(|member| member.name).unwrap_or_default(),
        })
    }
}

fn changed(id: u64) -> Changed {
    Changed {
        id,
        ..Changed::default()
    }
}

/// A new leader too: it may not have applied yet what its predecessor's operators did.
async fn has_seen_everything(first: &Replica) -> Result<(), ChangeError> {
    first
        .wait_until_seen(
            &Seen::Everything,
            CHANGE_TIMEOUT,
            &first.deadline(CHANGE_TIMEOUT),
        )
        .await
        .map_err(|_| WriteError::NoLeader.into())
}

async fn admit(first: &Replica, member: Member) -> Result<u64, ChangeError> {
    let admit = AdmitMember {
        member: Some(member),
    };
    match propose(first, Op::AdmitMember(admit)).await? {
        Outcome {
            result: Some(outcome::Result::Admitted(admitted)),
        } => Ok(admitted.id),
        other => Err(unexpected(other)),
    }
}
