//! What may change and what is to be done next, from what is known: no I/O and no clock.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_proto::peer::{Member, RosterRecord};

/// The members of one Raft group.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Group {
    pub(super) voters: BTreeSet<u64>,
    pub(super) learners: BTreeSet<u64>,
    /// Both, as the group has them.
    pub(super) members: BTreeMap<u64, Member>,
    /// Between the two steps of a change of voters.
    pub(super) is_joint: bool,
}

/// One change of a Raft group towards the roster.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// A change of voters is two steps, and whoever began it lost its leadership or its time
    /// between them: nobody else takes the second one.
    FinishVoters,
    Admit(Member),
    Promote(BTreeSet<u64>),
    RemoveVoters(BTreeSet<u64>),
    RemoveLearners(BTreeSet<u64>),
    /// Their addresses, region or kind have changed.
    Describe(BTreeMap<u64, Member>),
}

impl Group {
    fn present(&self) -> BTreeSet<u64> {
        self.voters.union(&self.learners).copied().collect()
    }
}

/// `None` if the group is as the roster wants it.
pub(super) fn next_step(group: &Group, roster: &RosterRecord) -> Option<Step> {
    if group.is_joint {
        return Some(Step::FinishVoters);
    }
    let present = group.present();
    let wanted: BTreeSet<u64> = roster.members.iter().map(|member| member.id).collect();
    let mut members = roster.members.iter();
    if let Some(new) = members.find(|member| !present.contains(&member.id)) {
        return Some(Step::Admit(new.clone()));
    }
    let promoted: BTreeSet<u64> = roster
        .voters
        .iter()
        .copied()
        .filter(|id| wanted.contains(id) && !group.voters.contains(id))
        .collect();
    if !promoted.is_empty() {
        return Some(Step::Promote(promoted));
    }
    let gone: BTreeSet<u64> = present.difference(&wanted).copied().collect();
    let voters: BTreeSet<u64> = gone.intersection(&group.voters).copied().collect();
    match (voters.is_empty(), gone.is_empty()) {
        (false, _) => Some(Step::RemoveVoters(voters)),
        (true, false) => Some(Step::RemoveLearners(gone)),
        (true, true) => changed(group, roster).map(Step::Describe),
    }
}

/// Members of the group that the roster describes otherwise.
fn changed(group: &Group, roster: &RosterRecord) -> Option<BTreeMap<u64, Member>> {
    let differs = |member: &&Member| {
        group
            .members
            .get(&member.id)
            .is_some_and(|known| known != *member)
    };
    let changed: BTreeMap<u64, Member> = roster
        .members
        .iter()
        .filter(differs)
        .map(|member| (member.id, member.clone()))
        .collect();
    (!changed.is_empty()).then_some(changed)
}

/// Whether a voter can go: those that vote now must be able to decide it, and those that are left
/// must be able to decide anything afterwards. `alive` are those that answered just now.
pub(super) fn may_remove(
    voters: &BTreeSet<u64>,
    alive: &BTreeSet<u64>,
    gone: &BTreeSet<u64>,
    name: &str,
) -> Result<(), String> {
    let left: BTreeSet<u64> = voters.difference(gone).copied().collect();
    let alive_of = |set: &BTreeSet<u64>| set.intersection(alive).count();
    if left.is_empty() || alive_of(&left) < majority(left.len()) {
        return Err(format!(
            "without `{name}` {} of {} voters would be alive: no quorum. Bring another voter back first",
            alive_of(&left),
            left.len()
        ));
    }
    if alive_of(voters) < majority(voters.len()) {
        return Err(format!(
            "{} of {} voters are alive: no quorum can decide that `{name}` goes. Bring another voter back first",
            alive_of(voters),
            voters.len()
        ));
    }
    Ok(())
}

fn majority(voters: usize) -> usize {
    voters / 2 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    fn group(voters: &[u64], learners: &[u64]) -> Group {
        Group {
            voters: ids(voters),
            learners: ids(learners),
            members: BTreeMap::new(),
            is_joint: false,
        }
    }

    fn member(id: u64) -> Member {
        Member {
            id,
            name: format!("n{id}"),
            ..Default::default()
        }
    }

    fn roster(members: &[u64], voters: &[u64]) -> RosterRecord {
        RosterRecord {
            members: members.iter().copied().map(member).collect(),
            voters: voters.to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn a_group_comes_to_the_roster_one_change_at_a_time() {
        let joint = Group {
            is_joint: true,
            ..group(&[1, 2], &[])
        };
        let moved = Member {
            peer_address: "elsewhere:1".into(),
            ..member(1)
        };
        let before = Group {
            members: BTreeMap::from([(1, moved), (2, member(2))]),
            ..group(&[1, 2], &[])
        };
        let now = BTreeMap::from([(1, member(1))]);
        for (group, roster, step) in [
            (before, roster(&[1, 2], &[1, 2]), Some(Step::Describe(now))),
            (group(&[1, 2], &[3]), roster(&[1, 2, 3], &[1, 2]), None),
            (joint, roster(&[1], &[1]), Some(Step::FinishVoters)),
            (
                group(&[1, 2], &[3]),
                roster(&[1, 2, 4], &[1, 2]),
                Some(Step::Admit(member(4))),
            ),
            (
                group(&[1, 2], &[3, 4]),
                roster(&[1, 2, 3], &[1, 2, 3]),
                Some(Step::Promote(ids(&[3]))),
            ),
            (
                group(&[1, 2], &[3]),
                roster(&[1], &[1]),
                Some(Step::RemoveVoters(ids(&[2]))),
            ),
            (
                group(&[1], &[3]),
                roster(&[1], &[1]),
                Some(Step::RemoveLearners(ids(&[3]))),
            ),
            // Told to vote, and forgotten before it did.
            (group(&[1], &[]), roster(&[1], &[1, 7]), None),
        ] {
            assert_eq!(next_step(&group, &roster), step, "{group:?}");
        }
    }

    #[test]
    fn a_removal_leaves_a_quorum_and_is_decided_by_one() {
        for (voters, alive, gone, may) in [
            (&[1, 2, 3][..], &[1, 2, 3][..], 3, true),
            (&[1, 2, 3], &[1, 2], 3, true),
            (&[1, 2, 3], &[1, 3], 3, false),
            (&[1, 2, 3], &[1], 3, false),
            // One would be left and is alive, and cannot decide it alone.
            (&[1, 2], &[1], 2, false),
            (&[1, 2], &[1, 2], 2, true),
            (&[1], &[1], 1, false),
        ] {
            let verdict = may_remove(&ids(voters), &ids(alive), &ids(&[gone]), "n");
            assert_eq!(verdict.is_ok(), may, "{voters:?} {alive:?} {gone}");
        }
    }
}
