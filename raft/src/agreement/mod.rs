//! Agreement: openraft, and what stands around it. The log of all shards, the state machine, the
//! proposer, the rounds that make a read linearizable, and the leader's clock. Nothing of
//! openraft's leaves this crate.

pub(crate) mod agreed;
pub(crate) mod alarms;
pub(crate) mod campaign;
pub(crate) mod election;
pub(crate) mod lag;
pub(crate) mod leader_proof;
pub(crate) mod leadership;
pub(crate) mod lease;
pub(crate) mod log;
pub(crate) mod log_time;
pub(crate) mod pace;
pub(crate) mod pins;
pub(crate) mod proposer;
pub(crate) mod quorum;
pub(crate) mod read_rounds;
pub(crate) mod state_machine;
pub(crate) mod types;

use std::{sync::Arc, time::Duration};

use openraft::{Config, SnapshotPolicy};

pub(crate) type RaftHandle = openraft::Raft<types::Types, state_machine::StateMachine>;

/// openraft's own times cannot change while it runs. They are so long that they never decide: who
/// leads, for how long, and who stands for leader follows the pace (`pace`, `lease`, `election`).
/// What openraft would drop or refuse by them we do earlier ourselves.
///
/// openraft drops the answer to a heartbeat after this; ours are left earlier, and count late.
const HEARTBEAT_ANSWER: Duration = Duration::from_secs(2);
/// openraft drops the answer to a vote after this.
const VOTE_ANSWER: Duration = Duration::from_secs(20);
/// openraft lets a leader propose for so long after an answer, and a follower refuse other
/// candidates: our own lease is asked before openraft is, and votes carry its word that they may
/// pass (`leadership_transfer`).
const OPENRAFT_LEASE: Duration = Duration::from_secs(600);

pub(crate) fn config(shard: u32) -> Result<Arc<Config>, openraft::ConfigError> {
    let config = Config {
        cluster_name: format!("shard-{shard}"),
        heartbeat_interval: millis(HEARTBEAT_ANSWER),
        election_timeout_min: millis(VOTE_ANSWER),
        election_timeout_max: millis(OPENRAFT_LEASE),
        // A restored leader may answer from a state that is not yet replayed: it shall be elected
        // anew.
        enable_leader_restore: Some(false),
        // A replica stands, and its leader sends heartbeats, at the pace (`replica/campaign.rs`).
        enable_elect: false,
        enable_heartbeat: false,
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
