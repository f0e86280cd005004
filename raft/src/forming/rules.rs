//! What a node without a cluster does next, from what it knows and whom it met: no I/O, no clock,
//! no chance.
//!
//! Why there is at most one cluster: a node accepts one formation for ever, a formation has exactly
//! `expect` members, and nobody initialises before all of its members accepted it. Two formations
//! would need two disjoint sets of `expect` nodes that do not see each other; nodes that see more
//! than `expect` empty ones propose none, and say so.

use std::{collections::BTreeSet, net::SocketAddr};

use holdfast_proto::peer::{Formation, HelloResponse, Member, NodeState};

/// What this node brings.
#[derive(Debug, Clone)]
pub(super) struct Mine {
    pub(super) member: Member,
    pub(super) expect: u32,
    pub(super) accepted: Option<Formation>,
}

/// One answer of one address.
#[derive(Debug, Clone)]
pub(crate) struct Met {
    pub(crate) address: SocketAddr,
    pub(crate) hello: HelloResponse,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step {
    /// Ask the formed cluster there to take this node in.
    Join(SocketAddr),
    /// Accept this formation and ask the others to: the cluster's id is still to be drawn.
    Propose(Vec<Member>),
    /// Ask these empty nodes to accept what this node has accepted.
    Ask {
        nodes: Vec<(u64, SocketAddr)>,
        /// What to say if none of them accepts.
        so_far: String,
    },
    /// Every member has accepted: initialise.
    Found,
    /// Nothing to do but wait; why.
    Wait(String),
}

impl Met {
    fn incarnation(&self) -> u64 {
        self.member().map_or(0, |member| member.incarnation)
    }

    pub(crate) fn member(&self) -> Option<&Member> {
        self.hello.self_.as_ref()
    }

    /// An empty node that votes: a learner founds no cluster and keeps nobody from it.
    fn may_found(&self) -> bool {
        self.hello.state() != NodeState::Formed
            && self.member().is_some_and(|member| !member.learner_only)
    }

    fn has_accepted(&self, formation: &Formation) -> bool {
        let theirs = self.hello.formation.as_ref();
        theirs.is_some_and(|theirs| theirs.cluster_id == formation.cluster_id)
    }

    /// Whether it has accepted a formation that has this member.
    fn wants(&self, incarnation: u64) -> bool {
        let formation = self.hello.formation.as_ref();
        formation.is_some_and(|formation| has(formation, incarnation))
    }
}

/// Incarnations of the empty nodes that may found a cluster, this node among them.
pub(super) fn sees(mine: &Mine, met: &[Met]) -> BTreeSet<u64> {
    let others = met.iter().filter(|met| met.may_found());
    let mut sees: BTreeSet<u64> = others.map(Met::incarnation).collect();
    if !mine.member.learner_only {
        sees.insert(mine.member.incarnation);
    }
    sees
}

/// `just_accepted` are those that said yes since `met` was heard.
pub(super) fn decide(mine: &Mine, met: &[Met], just_accepted: &BTreeSet<u64>) -> Step {
    let formed = |met: &&Met| met.hello.state() == NodeState::Formed;
    if let Some(formation) = &mine.accepted {
        let strange = |met: &&Met| formed(met) && met.hello.cluster_id != formation.cluster_id;
        if met.iter().any(|met| strange(&met)) {
            return Step::Wait(
                "another cluster is there than the one this node has accepted to form: to join that one, stop this node and remove its data".into(),
            );
        }
        return finish(mine, formation, met, just_accepted);
    }
    // One that refuses this node is asked only if all do.
    let willing = |met: &&Met| formed(met) && met.hello.refusal.is_empty();
    match met.iter().find(willing).or_else(|| met.iter().find(formed)) {
        Some(met) => Step::Join(met.address),
        None => form(mine, met),
    }
}

/// Among empty nodes.
fn form(mine: &Mine, met: &[Met]) -> Step {
    if mine.member.learner_only {
        return Step::Wait("a learner waits for a cluster to join".into());
    }
    let (expect, sees) = (mine.expect as usize, sees(mine, met));
    let others: Vec<&Met> = met.iter().filter(|met| met.may_found()).collect();
    if let Some(why) = must_wait(mine, &others, &sees) {
        return Step::Wait(why);
    }
    if sees.first() != Some(&mine.member.incarnation) {
        return Step::Wait(format!(
            "{expect} of {expect} nodes are here: another one proposes"
        ));
    }
    let members = others.iter().filter_map(|met| met.member().cloned());
    Step::Propose(numbered(members.chain([mine.member.clone()]).collect()))
}

/// What keeps this node from proposing, and from waiting for a proposal.
fn must_wait(mine: &Mine, others: &[&Met], sees: &BTreeSet<u64>) -> Option<String> {
    let (expect, count) = (mine.expect as usize, sees.len());
    let accepted = |met: &&&Met| met.hello.state() == NodeState::Accepted;
    if others.iter().any(|met| accepted(&met)) {
        let wanted = others.iter().any(|met| met.wants(mine.member.incarnation));
        return Some(match wanted {
            true => "others have accepted to form a cluster with this node: it waits to be asked".into(),
            false => "others have accepted a formation without this node: it waits for their cluster, to join it".into(),
        });
    }
    if count > expect {
        return Some(format!(
            "{count} empty nodes see each other and `cluster.expect` is {expect}: none of them forms a cluster; stop {} of them, or start them after it",
            count - expect
        ));
    }
    if count < expect {
        return Some(format!("{count} of {expect} nodes are here"));
    }
    let agrees = |met: &&&Met| {
        met.hello.expect == mine.expect
            && met.hello.sees.iter().copied().collect::<BTreeSet<_>>() == *sees
    };
    if others.iter().filter(agrees).count() + 1 != expect {
        return Some(format!(
            "{expect} nodes are here, and do not all see each other"
        ));
    }
    let names: BTreeSet<&str> = others
        .iter()
        .filter_map(|met| met.member())
        .chain([&mine.member])
        .map(|member| member.name.as_str())
        .collect();
    (names.len() != expect).then(|| "two of the nodes have the same `node.name`".into())
}

/// Ids in the order of names, so that they are what people expect.
fn numbered(mut members: Vec<Member>) -> Vec<Member> {
    members.sort_by(|a, b| a.name.cmp(&b.name));
    for (member, id) in members.iter_mut().zip(1..) {
        member.id = id;
    }
    members
}

/// Brings an accepted formation to its end.
fn finish(mine: &Mine, formation: &Formation, met: &[Met], just_accepted: &BTreeSet<u64>) -> Step {
    let mut accepted = just_accepted.clone();
    accepted.insert(mine.member.incarnation);
    let of_formation = met.iter().filter(|met| has(formation, met.incarnation()));
    for met in of_formation
        .clone()
        .filter(|met| met.has_accepted(formation))
    {
        accepted.insert(met.incarnation());
        // Formed with it: then all had accepted.
        if met.hello.state() == NodeState::Formed {
            accepted.extend(formation.members.iter().map(|member| member.incarnation));
        }
    }
    let all = |member: &Member| accepted.contains(&member.incarnation);
    if formation.members.iter().all(all) {
        return Step::Found;
    }
    let to_ask: Vec<(u64, SocketAddr)> = of_formation
        .filter(|met| met.hello.state() == NodeState::Empty)
        .map(|met| (met.incarnation(), met.address))
        .filter(|(incarnation, _)| !accepted.contains(incarnation))
        .collect();
    let so_far = format!(
        "{} of {} nodes have accepted to form the cluster",
        accepted.len(),
        formation.members.len()
    );
    if to_ask.is_empty() {
        return Step::Wait(so_far);
    }
    Step::Ask {
        nodes: to_ask,
        so_far,
    }
}

/// Why an empty node does not accept a formation. One that came since the proposer looked joins
/// what is formed: to refuse because of it would leave those that have accepted, once and for ever,
/// with nothing to form.
pub(super) fn may_accept(
    mine: &Mine,
    shards: u32,
    sees: &BTreeSet<u64>,
    formation: &Formation,
    proposer: u64,
) -> Result<(), &'static str> {
    let members: BTreeSet<u64> = formation
        .members
        .iter()
        .map(|member| member.incarnation)
        .collect();
    if !members.contains(&mine.member.incarnation) || !sees.is_superset(&members) {
        return Err("this node does not see all of these nodes");
    }
    if members.first() != Some(&proposer) || members.len() != mine.expect as usize {
        return Err("this formation is not for the least incarnation to propose");
    }
    if formation.members.iter().any(|member| member.learner_only) {
        return Err("a node with `node.role: learner` founds no cluster");
    }
    if formation.shards != shards {
        return Err("`cluster.shards` differs between the nodes");
    }
    Ok(())
}

fn has(formation: &Formation, incarnation: u64) -> bool {
    let mut members = formation.members.iter();
    members.any(|member| member.incarnation == incarnation)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(incarnation: u64) -> Member {
        Member {
            name: format!("n{incarnation}"),
            incarnation,
            ..Default::default()
        }
    }

    fn mine(incarnation: u64) -> Mine {
        Mine {
            member: member(incarnation),
            expect: 3,
            accepted: None,
        }
    }

    fn address(incarnation: u64) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], incarnation as u16))
    }

    fn met(incarnation: u64, state: NodeState, sees: &[u64]) -> Met {
        Met {
            address: address(incarnation),
            hello: HelloResponse {
                self_: Some(member(incarnation)),
                state: state.into(),
                expect: 3,
                sees: sees.to_vec(),
                ..Default::default()
            },
        }
    }

    fn formation(of: &[u64]) -> Formation {
        Formation {
            cluster_id: "f".into(),
            members: of.iter().copied().map(member).collect(),
            shards: 1,
        }
    }

    fn accepted(incarnation: u64, state: NodeState, formation: &Formation) -> Met {
        let mut met = met(incarnation, state, &[]);
        met.hello.formation = Some(formation.clone());
        if state == NodeState::Formed {
            met.hello.cluster_id = formation.cluster_id.clone();
        }
        met
    }

    fn next(mine: &Mine, met: &[Met]) -> Step {
        decide(mine, met, &BTreeSet::new())
    }

    fn waits(step: Step) -> String {
        match step {
            Step::Wait(why) => why,
            other => panic!("{other:?}"),
        }
    }

    const ALL: [u64; 3] = [1, 2, 3];

    #[test]
    fn the_least_of_exactly_the_expected_nodes_proposes() {
        let empty = |incarnation| met(incarnation, NodeState::Empty, &ALL);
        match next(&mine(1), &[empty(2), empty(3)]) {
            Step::Propose(members) => {
                assert_eq!(members.iter().map(|m| m.id).collect::<Vec<_>>(), [1, 2, 3])
            }
            other => panic!("{other:?}"),
        }
        let why = waits(next(&mine(2), &[empty(1), empty(3)]));
        assert!(why.contains("another one proposes"), "{why}");
    }

    #[test]
    fn what_keeps_a_node_from_proposing_is_named() {
        let empty = |incarnation, sees: &[u64]| met(incarnation, NodeState::Empty, sees);
        let other_expect = {
            let mut met = empty(3, &ALL);
            met.hello.expect = 5;
            met
        };
        let same_name = {
            let mut met = empty(3, &ALL);
            met.hello.self_.as_mut().unwrap().name = "n1".into();
            met
        };
        let learner = {
            let mut met = empty(3, &ALL);
            met.hello.self_.as_mut().unwrap().learner_only = true;
            met
        };
        let with_me = accepted(3, NodeState::Accepted, &formation(&ALL));
        let without_me = accepted(3, NodeState::Accepted, &formation(&[2, 3, 4]));
        for (others, why) in [
            (vec![empty(2, &ALL)], "2 of 3 nodes are here"),
            (vec![empty(2, &ALL), learner], "2 of 3 nodes are here"),
            (
                vec![empty(2, &ALL), empty(3, &ALL), empty(4, &ALL)],
                "stop 1 of them",
            ),
            (vec![empty(2, &ALL), empty(3, &[1, 3])], "do not all see"),
            (vec![empty(2, &ALL), other_expect], "do not all see"),
            (vec![empty(2, &ALL), same_name], "the same `node.name`"),
            (vec![empty(2, &ALL), with_me], "waits to be asked"),
            (vec![empty(2, &ALL), without_me], "waits for their cluster"),
        ] {
            let said = waits(next(&mine(1), &others));
            assert!(said.contains(why), "{said}, and not {why}");
        }
    }

    #[test]
    fn a_formed_cluster_is_joined_unless_it_is_ones_own() {
        let formed = accepted(2, NodeState::Formed, &formation(&ALL));
        assert_eq!(
            next(&mine(9), std::slice::from_ref(&formed)),
            Step::Join(address(2))
        );
        let founder = Mine {
            accepted: Some(formation(&ALL)),
            ..mine(1)
        };
        assert_eq!(next(&founder, &[formed]), Step::Found);
        let mut other = accepted(4, NodeState::Formed, &formation(&[4, 5, 6]));
        other.hello.cluster_id = "g".into();
        let why = waits(next(&founder, &[other]));
        assert!(why.contains("another cluster is there"), "{why}");
    }

    #[test]
    fn a_formation_begins_when_all_its_members_have_accepted_it() {
        let mine = Mine {
            accepted: Some(formation(&ALL)),
            ..mine(1)
        };
        let (two, three) = (
            accepted(2, NodeState::Accepted, &formation(&ALL)),
            met(3, NodeState::Empty, &[]),
        );
        let both = [two.clone(), three];
        let asks = Step::Ask {
            nodes: vec![(3, address(3))],
            so_far: "2 of 3 nodes have accepted to form the cluster".into(),
        };
        assert_eq!(next(&mine, &both), asks);
        assert_eq!(decide(&mine, &both, &BTreeSet::from([3])), Step::Found);
        let why = waits(next(&mine, &[two]));
        assert_eq!(why, "2 of 3 nodes have accepted to form the cluster");
    }

    #[test]
    fn who_may_not_be_asked_does_not_accept() {
        let all = BTreeSet::from(ALL);
        let learner = {
            let mut formation = formation(&ALL);
            formation.members[1].learner_only = true;
            formation
        };
        assert_eq!(may_accept(&mine(2), 1, &all, &formation(&ALL), 1), Ok(()));
        for (sees, formation, proposer, shards, why) in [
            (
                BTreeSet::from([1, 2]),
                formation(&ALL),
                1,
                1,
                "does not see",
            ),
            (all.clone(), formation(&[1, 3, 4]), 1, 1, "does not see"),
            (all.clone(), formation(&ALL), 2, 1, "least incarnation"),
            (all.clone(), formation(&[1, 2]), 1, 1, "least incarnation"),
            (all.clone(), learner, 1, 1, "founds no cluster"),
            (all, formation(&ALL), 1, 2, "`cluster.shards` differs"),
        ] {
            let refused = may_accept(&mine(2), shards, &sees, &formation, proposer).unwrap_err();
            assert!(refused.contains(why), "{refused}, and not {why}");
        }
    }

    proptest! {
        /// However many see each other: one of exactly the expected number proposes, else nobody.
        #[test]
        fn nodes_that_all_see_each_other_propose_once(
            count in 1_u64..6,
            expect in 1_u32..6,
        ) {
            let everybody: Vec<u64> = (1..=count).collect();
            let proposals = everybody.iter().filter(|&&me| {
                let others: Vec<Met> = everybody
                    .iter()
                    .filter(|&&other| other != me)
                    .map(|&other| {
                        let mut met = met(other, NodeState::Empty, &everybody);
                        met.hello.expect = expect;
                        met
                    })
                    .collect();
                let mine = Mine { expect, ..mine(me) };
                matches!(next(&mine, &others), Step::Propose(_))
            });
            prop_assert_eq!(proposals.count(), usize::from(count == u64::from(expect)));
        }
    }
}
