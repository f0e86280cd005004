//! Who has the right state: at indexes that all replicas hash theirs at, the majority of the voters.
//!
//! ```text
//! followers ─ hash ─► leader: counts over the voters ─ what the majority has ─► followers compare with their own
//! ```
//! A hash alone accuses nobody: the odd one may be the leader. Only hashes of one version are
//! compared. Without a majority nobody is right and nobody stops. Pure: knows no clock, no network.

use std::collections::BTreeMap;

use arc_swap::ArcSwapOption;
use holdfast_proto::peer::StateHash;

/// Indexes of which reports are kept: voters reach them one after the other.
const INDEXES_KEPT: usize = 16;

/// What a majority of the voters has, as this node's leader work found last; for its messages.
#[derive(Default)]
pub(crate) struct Agreed(ArcSwapOption<StateHash>);

impl Agreed {
    pub(crate) fn set(&self, agreed: Option<StateHash>) {
        self.0.store(agreed.map(std::sync::Arc::new));
    }

    pub(crate) fn get(&self) -> Option<StateHash> {
        self.0.load().as_deref().copied()
    }
}

/// What the voters' reports say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// A majority of the voters has this.
    Agreed(StateHash),
    /// All voters reported, and no majority has the same.
    Split { index: u64 },
}

/// The reports of one leader's term.
#[derive(Default)]
pub(crate) struct Judge {
    reports: BTreeMap<u64, BTreeMap<u64, StateHash>>,
}

impl Judge {
    pub(crate) fn hear(&mut self, voter: u64, hash: StateHash) {
        self.reports
            .entry(hash.index)
            .or_default()
            .insert(voter, hash);
        while self.reports.len() > INDEXES_KEPT {
            self.reports.pop_first();
        }
    }

    /// At the newest index at which something is certain.
    pub(crate) fn verdict(&self, voters: &[u64]) -> Option<Verdict> {
        self.reports
            .values()
            .rev()
            .find_map(|reports| judge(reports, voters))
    }
}

fn judge(reports: &BTreeMap<u64, StateHash>, voters: &[u64]) -> Option<Verdict> {
    let heard: Vec<&StateHash> = voters
        .iter()
        .filter_map(|voter| reports.get(voter))
        .collect();
    let has_majority = |hash: &&&StateHash| {
        let same = heard.iter().filter(|other| *other == *hash).count();
        same > voters.len() / 2
    };
    if let Some(agreed) = heard.iter().find(has_majority) {
        return Some(Verdict::Agreed(**agreed));
    }
    let first = heard.first()?;
    let comparable = heard.iter().all(|hash| hash.version == first.version);
    let all = heard.len() == voters.len();
    (all && comparable).then_some(Verdict::Split { index: first.index })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(index: u64, hash: u64, version: u32) -> StateHash {
        StateHash {
            index,
            hash,
            version,
        }
    }

    fn verdict(voters: &[u64], reports: &[(u64, StateHash)]) -> Option<Verdict> {
        let mut judge = Judge::default();
        reports
            .iter()
            .for_each(|&(voter, hash)| judge.hear(voter, hash));
        judge.verdict(voters)
    }

    #[test]
    fn the_majority_is_right_whoever_is_the_odd_one() {
        let (right, wrong) = (hash(256, 1, 1), hash(256, 2, 1));
        for odd in 1..=3 {
            let reports = [1, 2, 3].map(|voter| (voter, if voter == odd { wrong } else { right }));
            assert_eq!(
                verdict(&[1, 2, 3], &reports),
                Some(Verdict::Agreed(right)),
                "{odd} is odd"
            );
        }
    }

    #[test]
    fn without_a_majority_nobody_is_right() {
        let (one, other, third) = (hash(256, 1, 1), hash(256, 2, 1), hash(256, 3, 1));
        let split = Some(Verdict::Split { index: 256 });
        assert_eq!(verdict(&[1, 2], &[(1, one), (2, other)]), split);
        assert_eq!(
            verdict(&[1, 2, 3], &[(1, one), (2, other), (3, third)]),
            split
        );
        // The third may yet agree with one of them.
        assert_eq!(verdict(&[1, 2, 3], &[(1, one), (2, other)]), None);
        // A lone report of three is no majority.
        assert_eq!(verdict(&[1, 2, 3], &[(1, one)]), None);
    }

    #[test]
    fn only_voters_count_and_only_hashes_of_one_version_are_compared() {
        let (one, other) = (hash(256, 1, 1), hash(256, 2, 1));
        let strangers = [(1, one), (99, other), (98, other)];
        assert_eq!(verdict(&[1, 2, 3], &strangers), None);
        let upgraded = hash(256, 2, 2);
        assert_eq!(verdict(&[1, 2], &[(1, one), (2, upgraded)]), None);
    }

    #[test]
    fn the_newest_index_that_says_something_counts() {
        let reports = [
            (1, hash(256, 1, 1)),
            (2, hash(256, 1, 1)),
            (1, hash(512, 5, 1)),
        ];
        assert_eq!(
            verdict(&[1, 2, 3], &reports),
            Some(Verdict::Agreed(hash(256, 1, 1)))
        );
    }
}
