//! Who moves and who does not.

use std::{collections::HashMap, time::Duration};

use holdfast_proto::ShardId;
use parking_lot::Mutex;

/// Since when each replica has been where it is, though there was more to have: a follower's log as
/// its leader sees it, and what this node has applied of its own. Exact to how often it is asked.
#[derive(Default)]
pub(crate) struct Progress(Mutex<HashMap<(ShardId, u64), Position>>);

#[derive(Debug, Clone, Copy)]
struct Position {
    index: u64,
    since: Duration,
}

impl Progress {
    /// How long a replica has not moved, though it is not where it could be.
    pub(crate) fn stuck_for(
        &self,
        shard: ShardId,
        id: u64,
        index: u64,
        target: u64,
        now: Duration,
    ) -> Duration {
        let mut positions = self.0.lock();
        let fresh = Position { index, since: now };
        let position = positions.entry((shard, id)).or_insert(fresh);
        if index >= target || index != position.index {
            *position = fresh;
        }
        now.saturating_sub(position.since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_behind_and_does_not_move_is_stuck() {
        let progress = Progress::default();
        let at = |index, target, second| {
            progress
                .stuck_for(0, 2, index, target, Duration::from_secs(second))
                .as_secs()
        };
        assert_eq!(at(5, 5, 10), 0);
        assert_eq!(at(5, 9, 11), 1);
        assert_eq!(at(6, 9, 12), 0, "it moved");
        assert_eq!(at(6, 9, 15), 3);
        assert_eq!(at(9, 9, 16), 0, "it has all");
    }
}
