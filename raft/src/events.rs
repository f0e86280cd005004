//! What a replica tells its owner as it happens, for metrics. The owner counts; this crate knows no
//! registry.

use std::time::Duration;

use holdfast_proto::ShardId;

/// Called from hot paths and from threads without a runtime: must not block.
pub trait Events: Send + Sync + 'static {
    /// One sync of the log, of however many entries.
    fn log_synced(&self, _took: Duration) {}
    /// A leader that this node did not follow before.
    fn leader_changed(&self, _shard: ShardId) {}
    fn snapshot_sent(&self, _shard: ShardId, _bytes: u64) {}
    fn snapshot_installed(&self, _shard: ShardId, _bytes: u64) {}
    /// A background task, which is logged and begins again or ends its owner.
    fn task_panicked(&self, _task: &'static str) {}
    /// A client's request goes on to another node: the place to pass its trace context.
    fn outgoing(&self, _metadata: &mut tonic::metadata::MetadataMap) {}
}

/// Nobody listens.
impl Events for () {}
