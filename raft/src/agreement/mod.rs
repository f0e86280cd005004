//! Agreement: openraft, and what stands around it. The log of all shards, the state machine, the
//! proposer, the rounds that make a read linearizable, and the leader's clock. Nothing of
//! openraft's leaves this crate.

pub(crate) mod leader_proof;
pub(crate) mod leadership;
pub(crate) mod log;
pub(crate) mod pins;
pub(crate) mod proposer;
pub(crate) mod read_rounds;
pub(crate) mod state_machine;
pub(crate) mod types;

use std::{sync::Arc, time::Duration};

use openraft::{Config, SnapshotPolicy};

pub(crate) type RaftHandle = openraft::Raft<types::Types, state_machine::StateMachine>;

/// How a leader keeps its followers, and they notice that it is gone.
pub(crate) const HEARTBEAT: Duration = Duration::from_millis(50);
const ELECTION_MIN: Duration = Duration::from_millis(200);
const ELECTION_MAX: Duration = Duration::from_millis(300);
/// openraft grants a leader this much after an acknowledged heartbeat.
pub(crate) const LEASE: Duration = ELECTION_MAX;

pub(crate) fn config(shard: u32) -> Result<Arc<Config>, openraft::ConfigError> {
    let config = Config {
        cluster_name: format!("shard-{shard}"),
        heartbeat_interval: millis(HEARTBEAT),
        election_timeout_min: millis(ELECTION_MIN),
        election_timeout_max: millis(ELECTION_MAX),
        // A restarted node that cannot reach a quorum must not raise the term of those that can.
        enable_pre_vote: Some(true),
        // A restored leader may answer from a state that is not yet replayed: it shall be elected
        // anew.
        enable_leader_restore: Some(false),
        // A replica switches elections on itself, once it may vote.
        enable_elect: false,
        // A follower whose log lost its end is sent it again; without this it would be stuck for as
        // long as the leader leads. What it acknowledged before stays committed, and it does not
        // vote until it is level (`log_is_short`).
        allow_log_reversion: Some(true),
        max_payload_entries: 1024,
        // When to flush and purge is ours to say: by entries and bytes (`replica/purge.rs`).
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: u64::MAX / 4,
        purge_batch_size: 1024,
        install_snapshot_timeout: millis(Duration::from_secs(600)),
        // Backpressure early: admission stands in front.
        api_channel_size: Some(8192),
        ..Config::default()
    };
    Ok(Arc::new(config.validate()?))
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
