//! Every shard's leader brings its Raft group to the roster, one change at a time; shard 0's
//! promotes who has caught up.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use holdfast_proto::peer::{PromoteMember, RosterRecord, command::Op};
use openraft::ChangeMembers;
use parking_lot::Mutex;

use super::{CAUGHT_UP_ENTRIES, entries_behind, propose};
use crate::{
    peer::Peers,
    replica::{Replica, Seen},
    replicas::Replicas,
};

/// One step of a change may take this long.
const RECONCILE_TIMEOUT: Duration = Duration::from_secs(2);
/// A learner that was level for so long is promoted.
const CAUGHT_UP_FOR: Duration = Duration::from_secs(5);

/// Since when each learner has been level with the leader of shard 0.
#[derive(Default)]
pub(crate) struct CatchingUp(Mutex<std::collections::HashMap<u64, Duration>>);

pub(crate) async fn maintain(replicas: &Replicas, peers: &Peers, groups: &[Arc<Replica>]) {
    let Some(first) = groups.first() else { return };
    let roster = match first.state().roster() {
        Ok(roster) if !roster.members.is_empty() => roster,
        _ => return,
    };
    for group in groups
        .iter()
        .filter(|group| group.leads().is_some() && !is_level(group, &roster))
    {
        // Another shard's leader may lag behind in shard 0: what it does not know yet must not be
        // undone.
        if first
            .wait_until_seen(&Seen::Everything, RECONCILE_TIMEOUT, RECONCILE_TIMEOUT)
            .await
            .is_err()
        {
            return;
        }
        let Ok(roster) = first.state().roster() else {
            return;
        };
        // Without a quorum a change waits for ever; this task has other duties.
        match tokio::time::timeout(RECONCILE_TIMEOUT, reconcile(group, &roster)).await {
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
    if first.leads().is_some() {
        promote_caught_up(replicas, peers, first, &roster).await;
    }
}

/// Nothing is to be done.
fn is_level(group: &Replica, roster: &RosterRecord) -> bool {
    let voters: BTreeSet<u64> = group.voters().into_iter().collect();
    let present: BTreeSet<u64> = voters.iter().copied().chain(group.learners()).collect();
    let wanted: BTreeSet<u64> = roster.members.iter().map(|member| member.id).collect();
    !group.changes_voters()
        && present == wanted
        && roster
            .voters
            .iter()
            .all(|id| voters.contains(id) || !wanted.contains(id))
}

/// One change towards the roster; none while another is under way.
async fn reconcile(group: &Replica, roster: &RosterRecord) -> io::Result<()> {
    let present: BTreeSet<u64> = group.voters().into_iter().chain(group.learners()).collect();
    let voters: BTreeSet<u64> = group.voters().into_iter().collect();
    let wanted: BTreeSet<u64> = roster.members.iter().map(|member| member.id).collect();
    if group.changes_voters() {
        // A change of voters is two steps, and whoever began it lost its leadership or its time
        // between them: nobody else takes the second one. Adding nobody does; while the first step
        // is not committed it is refused, and tried again.
        tracing::info!(shard = group.shard(), "finishing a change of voters");
        let finish = ChangeMembers::AddVoterIds(BTreeSet::new());
        return group
            .raft()
            .change_membership(finish, true)
            .await
            .map(|_| ())
            .map_err(io::Error::other);
    }
    if let Some(new) = roster
        .members
        .iter()
        .find(|member| !present.contains(&member.id))
    {
        tracing::info!(
            shard = group.shard(),
            name = new.name,
            id = new.id,
            "admitting a learner"
        );
        return group
            .raft()
            .add_learner(new.id, new.clone(), false)
            .await
            .map(|_| ())
            .map_err(io::Error::other);
    }
    let promoted: BTreeSet<u64> = roster
        .voters
        .iter()
        .copied()
        .filter(|id| wanted.contains(id) && !voters.contains(id))
        .collect();
    if !promoted.is_empty() {
        tracing::info!(shard = group.shard(), ?promoted, "making voters");
        return group
            .raft()
            .change_membership(ChangeMembers::AddVoterIds(promoted), true)
            .await
            .map(|_| ())
            .map_err(io::Error::other);
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
    group
        .raft()
        .change_membership(change, false)
        .await
        .map(|_| ())
        .map_err(io::Error::other)
}

/// A learner that keeps up becomes a voter while there are fewer than expected, dead ones included.
async fn promote_caught_up(
    replicas: &Replicas,
    peers: &Peers,
    first: &Replica,
    roster: &RosterRecord,
) {
    let now = replicas.clock.monotonic();
    if roster.voters.len() >= replicas.options.expect as usize {
        return;
    }
    for learner in roster
        .members
        .iter()
        .filter(|member| !member.learner_only && !roster.voters.contains(&member.id))
    {
        let level = entries_behind(first, peers, learner.id)
            .is_some_and(|behind| behind <= CAUGHT_UP_ENTRIES);
        let since = {
            let mut catching_up = replicas.catching_up.0.lock();
            if !level {
                catching_up.remove(&learner.id);
                continue;
            }
            *catching_up.entry(learner.id).or_insert(now)
        };
        if now.saturating_sub(since) >= CAUGHT_UP_FOR {
            tracing::info!(
                name = learner.name,
                "a learner has caught up: it becomes a voter"
            );
            if let Err(error) =
                propose(first, Op::PromoteMember(PromoteMember { id: learner.id })).await
            {
                tracing::warn!(%error, "promoting a learner failed");
            }
            return;
        }
    }
}
