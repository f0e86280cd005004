//! The voters of a Raft group, and what a quorum of them is: more than half, and while the voters
//! change more than half of the old and of the new ones.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use openraft::type_config::async_runtime::watch::WatchReceiver;

use super::RaftHandle;
use crate::peer::Peers;

/// Two sets of voters while the group changes them, else one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Quorum {
    configs: Vec<BTreeSet<u64>>,
}

/// A group's voters as its membership has them now.
pub(crate) struct Voters {
    pub(crate) quorum: Quorum,
    /// Where the roster has them; the group's own for one that the roster has forgotten already.
    pub(crate) addresses: BTreeMap<u64, String>,
}

impl Voters {
    pub(crate) fn of(raft: &RaftHandle, peers: &Peers) -> Self {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        let membership = &metrics.membership_config;
        Self {
            quorum: Quorum::new(membership.get_joint_config().clone()),
            addresses: membership
                .nodes()
                .map(|(&id, node)| {
                    let member = peers.member(id);
                    let address = member
                        .map_or_else(|| node.peer_address.clone(), |member| member.peer_address);
                    (id, address)
                })
                .collect(),
        }
    }
}

impl Quorum {
    pub(crate) fn of(raft: &RaftHandle) -> Self {
        let metrics = raft.metrics();
        let metrics = metrics.borrow_watched();
        Self::new(metrics.membership_config.get_joint_config().clone())
    }

    pub(crate) fn new(configs: Vec<BTreeSet<u64>>) -> Self {
        Self { configs }
    }

    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.configs.iter().flatten().copied().collect()
    }

    pub(crate) fn is_only(&self, id: u64) -> bool {
        !self.configs.is_empty() && self.configs.iter().all(|config| config.iter().eq([&id]))
    }

    pub(crate) fn is_reached(&self, agree: &BTreeSet<u64>) -> bool {
        self.configs
            .iter()
            .all(|config| config.intersection(agree).count() > config.len() / 2)
    }

    /// The latest instant that a quorum has reached, when each voter has reached its own.
    pub(crate) fn latest(&self, reached: impl Fn(u64) -> Option<Duration>) -> Option<Duration> {
        let of_config = |config: &BTreeSet<u64>| {
            let mut instants: Vec<_> = config.iter().map(|&voter| reached(voter)).collect();
            instants.sort_unstable_by(|one, other| other.cmp(one));
            instants.get(config.len() / 2).copied().flatten()
        };
        self.configs.iter().map(of_config).min().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quorum(configs: &[&[u64]]) -> Quorum {
        Quorum::new(
            configs
                .iter()
                .map(|config| config.iter().copied().collect())
                .collect(),
        )
    }

    fn reached<const N: usize>(configs: &[&[u64]], agree: [u64; N]) -> bool {
        quorum(configs).is_reached(&agree.into())
    }

    #[test]
    fn a_quorum_is_more_than_half() {
        assert!(reached(&[&[1]], [1]));
        assert!(!reached(&[&[1, 2]], [1]));
        assert!(reached(&[&[1, 2, 3]], [1, 3]));
        assert!(!reached(&[&[1, 2, 3]], [1]));
        assert!(!reached(&[&[1, 2, 3, 4]], [1, 2]));
        assert!(!reached(&[&[1, 2, 3]], [1, 8, 9]), "others do not count");
    }

    #[test]
    fn while_voters_change_it_is_more_than_half_of_both() {
        assert!(!reached(&[&[1, 2, 3], &[3, 4, 5]], [1, 2, 3]));
        assert!(!reached(&[&[1, 2, 3], &[3, 4, 5]], [3, 4, 5]));
        assert!(reached(&[&[1, 2, 3], &[3, 4, 5]], [2, 3, 5]));
    }

    #[test]
    fn a_quorum_has_reached_what_more_than_half_have() {
        let latest = |configs: &[&[u64]], of: &[(u64, u64)]| {
            quorum(configs)
                .latest(|voter| {
                    of.iter()
                        .find(|(id, _)| *id == voter)
                        .map(|&(_, at)| Duration::from_millis(at))
                })
                .map(|at| at.as_millis())
        };
        assert_eq!(latest(&[&[1]], &[(1, 7)]), Some(7));
        assert_eq!(latest(&[&[1, 2, 3]], &[(1, 9), (2, 5), (3, 3)]), Some(5));
        assert_eq!(latest(&[&[1, 2, 3]], &[(1, 9), (3, 3)]), Some(3));
        assert_eq!(latest(&[&[1, 2, 3]], &[(1, 9)]), None);
        assert_eq!(latest(&[&[1, 2]], &[(1, 9)]), None);
        assert_eq!(
            latest(&[&[1, 2, 3, 4]], &[(1, 9), (2, 8), (3, 4), (4, 2)]),
            Some(4)
        );
        assert_eq!(
            latest(&[&[1, 2, 3], &[3, 4, 5]], &[(1, 9), (2, 8), (3, 7), (4, 2)]),
            Some(2),
            "the slower of both"
        );
        assert_eq!(latest(&[&[1, 2, 3], &[4]], &[(1, 9), (2, 8)]), None);
        assert_eq!(latest(&[], &[(1, 9)]), None, "no voters, no quorum");
    }
}
