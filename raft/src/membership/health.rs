//! Who keeps up: what this node says is wrong with itself, and, of the shards it leads, with the
//! others. A voter that answers and does not move is no voter to count on.
//!
//! Looked at all the time, since it also keeps the time: see `Progress`.

use std::time::Duration;

use holdfast_proto::peer::Accusation;

use super::CAUGHT_UP_ENTRIES;
use crate::{
    local::{Local, Opened},
    replica::Replica,
};

/// Behind and without a move for so long is stuck.
const STUCK_AFTER: Duration = Duration::from_secs(3);
/// A follower that the leader has not heard from for so long is not there.
const SILENT_AFTER: Duration = Duration::from_secs(2);
/// A voter's answer, and a new leader, wait for syncs.
const SLOW_SYNC: Duration = Duration::from_millis(500);
const FULL_PERMILLE: u32 = 1000;

/// What keeps this node from its work, in words.
pub(crate) fn of_self(local: &Local, opened: &Opened) -> Vec<String> {
    let mut problems: Vec<String> = local.why_retired().into_iter().collect();
    let peers = &opened.peers;
    if peers.disk_used_permille() >= FULL_PERMILLE || peers.file_system_is_full() {
        problems.push("its disk is full: values are refused until space is free again".into());
    }
    let sync_time = peers.sync_time();
    if sync_time >= SLOW_SYNC {
        let ms = sync_time.as_millis();
        problems.push(format!("its disk is slow: a sync of the log takes {ms} ms"));
    }
    let now = local.clock().monotonic();
    for replica in opened.replicas() {
        problems.extend(of_replica(local, opened, replica, now));
    }
    problems
}

fn of_replica(local: &Local, opened: &Opened, replica: &Replica, now: Duration) -> Option<String> {
    let shard = replica.shard();
    if replica.log_is_short() {
        return Some(format!(
            "its log of shard {shard} lost entries that it had acknowledged: it does not vote until it has them again"
        ));
    }
    if replica.is_diverged() {
        return Some(format!(
            "its state of shard {shard} is not the majority's: it answers nothing until the leader's has taken its place"
        ));
    }
    if replica.states_are_split() {
        return Some(format!(
            "no majority of the voters has the same state of shard {shard}: one of them has to be chosen, and the others replaced"
        ));
    }
    if replica.must_catch_up() {
        return Some(format!(
            "it has not caught up with shard {shard} since it joined"
        ));
    }
    let (applied, last) = (replica.applied().index, replica.log_last_index());
    let me = opened.peers.identity().node_id;
    let stuck_for = local.progress().stuck_for(shard, me, applied, last, now);
    let leads_or_follows = replica.leader().is_some();
    (leads_or_follows && stuck_for >= STUCK_AFTER).then(|| {
        format!(
            "it has applied nothing of shard {shard} for {} s: it is at index {applied} of {last}",
            stuck_for.as_secs()
        )
    })
}

/// What this node, where it leads, sees of the others, and whom it has told not to take part.
pub(crate) fn of_others(local: &Local, opened: &Opened) -> Vec<Accusation> {
    let refused = opened.peers.roster().refused().into_iter();
    let mut accusations: Vec<Accusation> = refused
        .map(|(id, problem)| Accusation {
            id,
            problem,
            is_refused: true,
        })
        .collect();
    let led = opened
        .replicas()
        .filter(|replica| replica.leads().is_some());
    for replica in led {
        accusations.extend(of_followers(local, opened, replica));
    }
    accusations
}

fn of_followers(local: &Local, opened: &Opened, replica: &Replica) -> Vec<Accusation> {
    let (shard, now) = (replica.shard(), local.clock().monotonic());
    let me = opened.peers.identity().node_id;
    let committed = replica.applied().index;
    let follower = |(id, matched): (u64, u64)| {
        let heard_at = opened.peers.view(shard, id).map(|view| view.heard_at);
        let silent_for = heard_at.map(|at| now.saturating_sub(at));
        let stuck_for = local
            .progress()
            .stuck_for(shard, id, matched, committed, now);
        let problem = if silent_for.is_none_or(|silent| silent >= SILENT_AFTER) {
            format!("the leader of shard {shard} does not hear from it")
        } else if stuck_for >= STUCK_AFTER {
            format!(
                "it has taken nothing of shard {shard} for {} s: it is at index {matched} of {committed}",
                stuck_for.as_secs()
            )
        } else {
            return None;
        };
        Some(Accusation {
            id,
            problem,
            is_refused: false,
        })
    };
    let others = replica.matched().into_iter().filter(|&(id, _)| id != me);
    others.filter_map(follower).collect()
}

/// Too far behind the others to be counted on.
pub(super) fn is_behind(lag: u64) -> bool {
    lag > CAUGHT_UP_ENTRIES
}
