//! Whether the voters' disks take values, and who shall lead when this node's does not.
//!
//! A voter over its `storage.max_bytes` keeps everybody from storing values: what it cannot keep is
//! not durable there. A full file system is the machine's trouble, not the cluster's: while a quorum
//! of others has room, values go on there, and who leads on a full disk hands over.

use std::time::Duration;

use super::Replica;

const FULL_PERMILLE: u32 = 1000;
/// What a voter said of its disk; one that is gone keeps nobody from writing to the others.
const REPORT_COUNTS_FOR: Duration = Duration::from_secs(5);

/// What is known of a voter's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    HasRoom,
    /// It has as much as it may have.
    OverLimit,
    /// Its file system is full.
    Full,
    /// Not heard of for a while.
    Unknown,
}

impl Disk {
    fn of(used_permille: u32, file_system_is_full: bool) -> Self {
        match (used_permille >= FULL_PERMILLE, file_system_is_full) {
            (_, true) => Self::Full,
            (true, false) => Self::OverLimit,
            (false, false) => Self::HasRoom,
        }
    }
}

/// Of all voters.
fn take_values(disks: &[Disk]) -> bool {
    let count = |of: Disk| disks.iter().filter(|disk| **disk == of).count();
    let quorum = disks.len() / 2 + 1;
    count(Disk::OverLimit) == 0 && (count(Disk::Full) == 0 || count(Disk::HasRoom) >= quorum)
}

impl Replica {
    /// Values are refused; deletes and sweeps go on.
    pub fn disk_full(&self) -> bool {
        let disks: Vec<Disk> = self
            .voters()
            .into_iter()
            .map(|voter| self.disk_of(voter))
            .collect();
        !take_values(&disks)
    }

    /// If this node leads on a full disk, and others can go on without it: one of them shall.
    pub(crate) async fn hand_over_for_space(&self) {
        let me = self.peers.identity().node_id;
        let leads = self.leader().is_some_and(|leader| leader.is_self);
        if !leads || self.disk_of(me) != Disk::Full || self.disk_full() {
            return;
        }
        let furthest = self
            .voters()
            .into_iter()
            .filter(|&voter| voter != me && self.disk_of(voter) == Disk::HasRoom)
            .max_by_key(|&voter| {
                self.peers
                    .view(self.shard, voter)
                    .map(|view| view.applied_index)
            });
        if let Some(to) = furthest {
            tracing::warn!(
                shard = self.shard,
                to,
                "the disk is full: leadership goes to a voter that has space"
            );
            self.hand_over(Some(to)).await;
        }
    }

    fn disk_of(&self, voter: u64) -> Disk {
        if voter == self.peers.identity().node_id {
            let peers = &self.peers;
            return Disk::of(peers.disk_used_permille(), peers.file_system_is_full());
        }
        let now = self.clock.monotonic();
        match self.peers.view(self.shard, voter) {
            Some(view) if now.saturating_sub(view.heard_at) < REPORT_COUNTS_FOR => {
                Disk::of(view.disk_used_permille, view.file_system_is_full)
            }
            _ => Disk::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        Disk::{Full, HasRoom, OverLimit, Unknown},
        *,
    };

    #[test]
    fn values_go_on_where_a_quorum_has_room_and_nobody_is_over_its_limit() {
        for (disks, taken) in [
            (&[HasRoom][..], true),
            (&[Full], false),
            (&[OverLimit], false),
            (&[HasRoom, HasRoom, HasRoom], true),
            (&[HasRoom, Unknown, Unknown], true),
            (&[Full, HasRoom, HasRoom], true),
            (&[Full, HasRoom, Unknown], false),
            (&[Full, Full, HasRoom], false),
            (&[Full, Full, Full], false),
            (&[OverLimit, HasRoom, HasRoom], false),
            (&[Full, OverLimit, HasRoom, HasRoom, HasRoom], false),
            (&[Full, Full, HasRoom, HasRoom, HasRoom], true),
        ] {
            assert_eq!(take_values(disks), taken, "{disks:?}");
        }
    }
}
