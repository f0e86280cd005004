//! How a replica comes to be: state and log are brought to one point, then openraft starts over them.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize},
    },
};

use holdfast_proto::ShardId;
use tokio::sync::watch;

use super::Replica;
use crate::{
    agreement::{
        self, RaftHandle,
        agreed::Agreed,
        campaign::Campaign,
        leader_proof::LeaderProof,
        leadership::LeaderClock,
        log::{LogKept, ShardLog, SharedLog},
        pace::SharedPace,
        pins::LogPins,
        proposer::Proposer,
        read_rounds::ReadRounds,
        state_machine::{StateMachine, replay},
    },
    clock::Clock,
    events::Events,
    peer::{Peers, client::Network, snapshot},
    state::{State, owner},
    store::{Lost, Stores},
    task::Tasks,
};

/// What a replica is opened with.
pub(crate) struct Parts {
    pub(crate) shard: ShardId,
    pub(crate) clock: Clock,
    pub(crate) stores: Stores,
    pub(crate) log: SharedLog,
    pub(crate) peers: Arc<Peers>,
    pub(crate) pace: Arc<SharedPace>,
    pub(crate) snapshots: Arc<snapshot::Sender>,
    pub(crate) events: Arc<dyn Events>,
    pub(crate) memory_bytes_max: u64,
    pub(crate) log_kept: LogKept,
    pub(crate) must_catch_up: bool,
}

impl Replica {
    pub(crate) async fn open(parts: Parts) -> io::Result<Arc<Self>> {
        let Parts {
            shard,
            clock,
            stores,
            log,
            peers,
            pace,
            snapshots,
            events,
            memory_bytes_max,
            log_kept,
            must_catch_up,
        } = parts;
        // Off the async threads: other shards' heartbeats go on while this one is read.
        let (opening, cluster_id) = (stores.clone(), peers.identity().cluster_id.clone());
        let opened = crate::task::blocking(move || -> io::Result<_> {
            let state = State::open(&opening, shard, memory_bytes_max)?;
            owner::claim(state.generation().store.as_ref(), &cluster_id)?;
            Ok((state, log.shard(shard)?))
        });
        let (state, mut log) = opened.await.map_err(io::Error::other)??;
        log.heal(state.applied_record().last_applied).await?;
        let keep_from = Arc::new(AtomicU64::new(0));
        let agreed = Arc::new(Agreed::default());
        let leader_clock = Arc::new(LeaderClock::new(
            shard,
            clock.clone(),
            state.clone(),
            peers.clone(),
            pace,
        ));
        leader_clock.follow_pace();
        let pins = LogPins::new(clock.clone());
        let network = Network {
            peers: peers.clone(),
            state: state.clone(),
            shard,
            keep_from: keep_from.clone(),
            snapshots: snapshots.clone(),
            leader_clock: leader_clock.clone(),
            pins: pins.clone(),
            agreed: agreed.clone(),
        };
        let machine = StateMachine::new(state.clone(), snapshots.clone(), events.clone())?;
        if log.first_index() > state.applied().index + 1 {
            let message = format!(
                "the state of shard {shard} is at log index {}, the log begins at {}: what is between is gone; remove the data and let the node join again",
                state.applied().index,
                log.first_index()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidData, message));
        }
        replay(&state, &mut log).await?;
        let raft = RaftHandle::new(
            peers.identity().node_id,
            agreement::config(shard).map_err(io::Error::other)?,
            network,
            log.clone(),
            machine,
        )
        .await
        .map_err(io::Error::other)?;
        let lost = log.lost_acknowledged()?;
        if let Some(lost) = lost {
            lost_log(&raft, &log, lost, shard, peers.identity().node_id).await?;
            peers.set_log_is_short(true);
        }

        let proof = Arc::new(LeaderProof {
            shard,
            raft: raft.clone(),
            peers: peers.clone(),
            leader_clock: leader_clock.clone(),
        });
        let log_is_short = Arc::new(AtomicBool::new(lost.is_some()));
        let diverged = Arc::new(AtomicBool::new(state.is_held()));
        let campaign = Arc::new(Campaign::new(
            shard,
            raft.clone(),
            log.clone(),
            peers.clone(),
            leader_clock.clone(),
            log_is_short.clone(),
            diverged.clone(),
        ));
        let tasks = Tasks::new(events.clone());
        let replica = Arc::new(Self {
            shard,
            campaign,
            proposer: Proposer::start(&tasks, raft.clone(), leader_clock.clone()),
            read_rounds: ReadRounds::start(&tasks, proof.clone()),
            proof,
            clock,
            peers,
            state,
            raft,
            log,
            leader_clock,
            snapshots,
            keep_from,
            pins,
            log_kept,
            events,
            must_catch_up: AtomicBool::new(must_catch_up || lost.is_some()),
            log_is_short,
            installing: AtomicUsize::new(0),
            leader: watch::Sender::new(None),
            leads: watch::Sender::new(None),
            diverged,
            split: AtomicBool::new(false),
            agreed,
            tasks,
        });
        replica.start_duties();
        Ok(replica)
    }
}

/// Says what is lost. With nobody to get it back from, that is the end.
async fn lost_log(
    raft: &RaftHandle,
    log: &ShardLog,
    lost: Lost,
    shard: ShardId,
    node_id: u64,
) -> io::Result<()> {
    let what = format!(
        "the log of shard {shard} had acknowledged entries up to {} and ends at {}: its last writes are gone from this disk",
        lost.acknowledged,
        log.last_index()
    );
    // From the core itself: its metrics may not be out yet.
    let is_alone = raft
        .with_raft_state(move |state| {
            let membership = state.membership_state.effective();
            membership.voter_ids().all(|voter| voter == node_id)
        })
        .await
        .map_err(io::Error::other)?;
    if !is_alone {
        tracing::error!("{what}; this node does not vote until it has them from the others");
        return Ok(());
    }
    if let Err(error) = raft.shutdown().await {
        tracing::warn!(%error, "the replica did not stop cleanly");
    }
    let message = format!(
        "{what}, and no other node has them: restore the node's data from a copy, or remove it to begin anew"
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}
