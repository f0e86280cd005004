//! What waits in the refresh engine at one moment, for whoever watches the node.

use holdfast_proto::{ShardId, timeline::Millis};

use super::Refresher;

/// Of one upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UpstreamBacklog {
    pub(crate) upstream: String,
    pub(crate) flights_running: usize,
    pub(crate) flights_waiting: usize,
    /// Requests that wait for a flight.
    pub(crate) readers_waiting: usize,
}

/// Of one shard this node leads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct DueBacklog {
    /// Keys that were overdue when it began to lead and wait for their turn.
    pub(crate) overdue: usize,
    /// How far the look at what comes due is behind.
    pub(crate) behind_ms: Millis,
}

impl Refresher {
    pub(crate) fn upstream_backlogs(&self) -> Vec<UpstreamBacklog> {
        let queues = self.queues.load();
        queues.values().map(|queue| queue.backlog()).collect()
    }

    pub(crate) fn due_backlog(&self, shard: ShardId) -> Option<DueBacklog> {
        self.due_backlogs.lock().get(&shard).copied()
    }

    /// `None` if another node leads.
    pub(super) fn set_due_backlog(&self, shard: ShardId, backlog: Option<DueBacklog>) {
        let mut backlogs = self.due_backlogs.lock();
        match backlog {
            Some(backlog) => backlogs.insert(shard, backlog),
            None => backlogs.remove(&shard),
        };
    }

    /// Reads that were not marked, so that no refresh follows from them: a lock was held or there
    /// was no room.
    pub(crate) fn marks_dropped(&self) -> u64 {
        self.marks.dropped()
    }
}
