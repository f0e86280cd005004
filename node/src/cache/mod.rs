//! The rules of reading and writing that all doors share: each way to read has a file, what changes
//! something is in `write`, and what a read waits for in `wait`.
//!
//! ```text
//! door ─► cache ─► raft (state, proposals)          every request
//!               └► refresh ─► upstream              a miss, or a stale value past its window
//! ```
//! Promises DESIGN §4 "Read" and §5: a request is checked once, here, before anything happens; a
//! read of a value inside its stale window waits for memory only, or for one disk read; every
//! answer says what it is and who gave it; every failed mutation says whether it was applied. Must
//! never know HTTP, gRPC transports, log entries, or how a value is fetched.

mod answer;
mod batch;
mod controls;
mod forward;
mod get;
mod inspect;
mod judged;
mod scan;
mod set;
mod times;
mod wait;
mod write;

use std::{sync::Arc, time::Duration};

use holdfast_proto::{Key, Token, v1};
use holdfast_raft::{Peers, Replica, Replicas, Standing};

use crate::{
    error::{Code, Error},
    metrics::Metrics,
    operation::Answered,
    refresh::Refresher,
    rules::CurrentRules,
};

pub(crate) use self::controls::Demand;
pub use self::scan::ScanStream;

/// What an operator may choose about reading and writing.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// How long a replica waits for what a session has seen before it asks the leader.
    pub session_wait: Duration,
}

/// A mutation that a quorum has on disk, and where the next one goes best.
#[derive(Debug)]
pub struct Acknowledged<T> {
    pub response: T,
    /// The leader's client address, if another node leads.
    pub leader: Option<String>,
}

impl<T> Answered for Acknowledged<T> {}

/// The cache as its doors see it. One per node.
pub struct Cache {
    replicas: Arc<Replicas>,
    rules: CurrentRules,
    refresher: Arc<Refresher>,
    settings: Settings,
    metrics: Arc<Metrics>,
}

impl Cache {
    pub fn new(
        replicas: Arc<Replicas>,
        rules: CurrentRules,
        refresher: Arc<Refresher>,
        settings: Settings,
        metrics: Arc<Metrics>,
    ) -> Arc<Self> {
        Arc::new(Self {
            replicas,
            rules,
            refresher,
            settings,
            metrics,
        })
    }

    fn peers(&self) -> Result<Arc<Peers>, Error> {
        match self.replicas.why_retired() {
            Some(why) => Err(Error::not_ready(Some(why))),
            None => self.replicas.peers().ok_or_else(|| Error::not_ready(None)),
        }
    }

    fn replica_of(&self, key: &Key) -> Result<&Arc<Replica>, Error> {
        self.replicas
            .of_key(key)
            .ok_or_else(|| Error::not_ready(self.replicas.why_retired()))
    }

    /// Of every shard: what asks for all keys cannot leave one out.
    fn all_replicas(&self) -> Result<Vec<Arc<Replica>>, Error> {
        let shards = 0..self.replicas.shards();
        let replica = |shard| self.replicas.replica(shard);
        shards
            .map(|shard| replica(shard).ok_or_else(|| Error::not_here(shard)))
            .collect()
    }

    /// The client address of the node that leads, if it is another one.
    fn leader_elsewhere(&self, replica: &Replica) -> Option<String> {
        let leader = replica.leader().filter(|leader| !leader.is_self)?;
        self.replicas
            .peers()?
            .member(leader.id)
            .map(|member| member.client_address)
    }

    /// Where an error of one shard sends its caller.
    fn sent_to_leader(&self, replica: &Replica, error: Error) -> Error {
        match error.code() {
            Code::Unavailable => error.with_leader(self.leader_elsewhere(replica)),
            _ => error,
        }
    }

    /// Who answers, and what the answer reflects: each replica with how far it was before the
    /// look-ups, so that the revision is no more and the lag no less than what they show. Call after
    /// them: then the token claims no less than they showed.
    fn position(&self, peers: &Peers, replicas: &[(&Replica, Standing)]) -> (v1::Replica, Token) {
        let identity = peers.identity();
        let mut token = Token::new(identity.epoch);
        for (replica, _) in replicas {
            token.see(replica.shard(), replica.visible());
        }
        let lag = replicas
            .iter()
            .map(|(replica, standing)| standing.current_at.map(|at| replica.lag_since(at)))
            .try_fold(Duration::ZERO, |most, lag| Some(most.max(lag?)));
        let replica = v1::Replica {
            node_id: identity.node_id,
            region: self.replicas.options().region.clone(),
            role: replicas
                .first()
                .map_or(v1::Role::Unspecified, |(replica, _)| replica.role())
                .into(),
            revision: replicas
                .iter()
                .map(|(_, standing)| standing.revision)
                .min()
                .unwrap_or(0),
            replica_lag_ms: lag.map(|lag| u64::try_from(lag.as_millis()).unwrap_or(u64::MAX)),
        };
        (replica, token)
    }
}
