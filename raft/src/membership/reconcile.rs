//! Every shard's leader brings its Raft group to the roster, one change at a time; shard 0's
//! promotes who has caught up.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::Arc,
    time::Duration,
};

use holdfast_proto::peer::{AdmitMember, Member, PromoteMember, RosterRecord, command::Op};
use openraft::ChangeMembers;
use parking_lot::Mutex;

use super::{
    CAUGHT_UP_ENTRIES, entries_behind, propose,
    rules::{self, Group, Step},
};
use crate::{
    local::{Local, Opened},
    replica::{Replica, Seen},
};

/// One step of a change may take this long.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(2);
/// A learner that was level for so long is promoted.
const CAUGHT_UP_FOR: Duration = Duration::from_secs(5);

pub(crate) struct Reconciler {
    local: Arc<Local>,
    /// Since when each learner has been level with the leader of shard 0.
    level_since: Mutex<HashMap<u64, Duration>>,
}

impl Reconciler {
    pub(crate) fn new(local: Arc<Local>) -> Self {
        Self {
            local,
            level_since: Mutex::default(),
        }
    }

    /// One step of each group that this node leads.
    pub(crate) async fn step(&self, opened: &Opened) {
        let Some(first) = opened.replica(0) else {
            return;
        };
        let roster = first.state().roster();
        if roster.members.is_empty() {
            return;
        }
        for group in opened.replicas() {
            if group.leads().is_some() && rules::next_step(&group_of(group), &roster).is_some() {
                reconcile(first, group).await;
            }
        }
        if first.leads().is_some() {
            write_announced(opened, first).await;
            self.promote_caught_up(opened, first, &roster).await;
        }
    }

    /// A learner that keeps up becomes a voter while there are fewer than expected, dead ones
    /// included.
    async fn promote_caught_up(&self, opened: &Opened, first: &Replica, roster: &RosterRecord) {
        if roster.voters.len() >= self.local.options().expect as usize {
            return;
        }
        let may_vote =
            |member: &&Member| !member.learner_only && !roster.voters.contains(&member.id);
        for learner in roster.members.iter().filter(may_vote) {
            if !self.has_caught_up(opened, first, learner.id) {
                continue;
            }
            tracing::info!(
                name = learner.name,
                "a learner has caught up: it becomes a voter"
            );
            let promote = Op::PromoteMember(PromoteMember { id: learner.id });
            if let Err(error) = propose(first, promote).await {
                tracing::warn!(%error, "promoting a learner failed");
            }
            return;
        }
    }

    fn has_caught_up(&self, opened: &Opened, first: &Replica, learner: u64) -> bool {
        let now = self.local.clock().monotonic();
        let behind = entries_behind(first, &opened.peers, learner);
        let mut level_since = self.level_since.lock();
        if behind.is_none_or(|behind| behind > CAUGHT_UP_ENTRIES) {
            level_since.remove(&learner);
            return false;
        }
        now.saturating_sub(*level_since.entry(learner).or_insert(now)) >= CAUGHT_UP_FOR
    }
}

/// Members that moved, or are configured otherwise than the roster says.
async fn write_announced(opened: &Opened, first: &Replica) {
    for member in opened.peers.roster().announced() {
        tracing::info!(
            name = member.name,
            address = member.peer_address,
            "a member's addresses or role have changed"
        );
        let name = member.name.clone();
        let described = Op::AdmitMember(AdmitMember {
            member: Some(member),
        });
        if let Err(error) = propose(first, described).await {
            tracing::warn!(%error, name, "writing a member's addresses down failed");
        }
    }
}

fn group_of(group: &Replica) -> Group {
    Group {
        voters: group.voters().into_iter().collect(),
        learners: group.learners().into_iter().collect(),
        members: group
            .members()
            .into_iter()
            .map(|member| (member.id, member))
            .collect(),
        is_joint: group.changes_voters(),
    }
}

async fn reconcile(first: &Replica, group: &Replica) {
    // Another shard's leader may lag behind in shard 0: what it does not know yet must not be
    // undone.
    let deadline = first.deadline(RECONCILE_TIMEOUT);
    let seen = first.wait_until_seen(&Seen::Everything, RECONCILE_TIMEOUT, &deadline);
    if seen.await.is_err() {
        return;
    }
    let roster = first.state().roster();
    let Some(step) = rules::next_step(&group_of(group), &roster) else {
        return;
    };
    tracing::info!(shard = group.shard(), ?step, "changing the members");
    // Without a quorum a change waits for ever; this task has other duties.
    match tokio::time::timeout(RECONCILE_TIMEOUT, take(group, step)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%error, shard = group.shard(), "a membership change did not go through")
        }
        Err(_) => tracing::warn!(
            shard = group.shard(),
            "a membership change is still on its way"
        ),
    }
}

async fn take(group: &Replica, step: Step) -> io::Result<()> {
    let raft = group.raft();
    let (change, retain) = match step {
        Step::Admit(member) => {
            let added = raft.add_learner(member.id, member, false).await;
            return added.map(|_| ()).map_err(io::Error::other);
        }
        // Adding nobody takes the second step; while the first one is not committed it is refused,
        // and tried again.
        Step::FinishVoters => (ChangeMembers::AddVoterIds(BTreeSet::new()), true),
        Step::Promote(voters) => (ChangeMembers::AddVoterIds(voters), true),
        Step::RemoveVoters(voters) => (ChangeMembers::RemoveVoters(voters), false),
        Step::RemoveLearners(gone) => (ChangeMembers::RemoveNodes(gone), false),
        Step::Describe(members) => (ChangeMembers::SetNodes(members), true),
    };
    let changed = raft.change_membership(change, retain).await;
    changed.map(|_| ()).map_err(io::Error::other)
}
