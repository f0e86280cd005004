//! All replicas of a node: one per shard, the log they share, and the node's place in a cluster.
//! The composition root of this crate; a node opens one of these, mounts its services on the peer
//! listener and runs it.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
};

use holdfast_proto::{
    ShardId, SlotTable,
    limits::PEER_MESSAGE_BYTES_MAX,
    peer::{
        ClusterRecord, Formation, Member, membership_service_server::MembershipServiceServer,
        replica_service_server::ReplicaServiceServer,
    },
    v1,
};
use tokio::sync::watch;

use crate::{
    agreement::{
        log::{Claim, SharedLog},
        pace::SharedPace,
    },
    clock::Clock,
    error::ChangeError,
    events::Events,
    forming::Forming,
    identity::{IdentityError, IdentityFile},
    local::{Local, Membership, Opened, Options},
    membership::{self, Change, Changes, Contact},
    peer::{Identity, Peers, membership_server::MembershipServer, server::ReplicaServer, snapshot},
    replica::{Parts, Replica},
    store::{Stores, space::DiskSpace},
    task::Tasks,
    upkeep::Upkeep,
};

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("opening the node's storage: {0}")]
    Storage(#[from] io::Error),
}

pub struct Replicas {
    local: Arc<Local>,
    forming: Arc<Forming>,
    changes: Arc<Changes>,
    contact: Arc<Contact>,
    upkeep: Arc<Upkeep>,
    events: Arc<dyn Events>,
    stores: Stores,
    log: SharedLog,
    snapshots: Arc<snapshot::Sender>,
    tasks: Tasks,
}

impl Replicas {
    /// Opens what is on disk. Speaks to nobody yet.
    pub async fn open(
        options: Options,
        stores: Stores,
        clock: Clock,
        events: Arc<dyn Events>,
    ) -> Result<Arc<Self>, OpenError> {
        let durable = stores.is_durable().then_some(options.data_dir.as_path());
        let identity = IdentityFile::open(durable, &options.name)?;
        let space = Arc::new(DiskSpace::open(durable, options.disk_bytes_max)?);
        let log = SharedLog::open(stores.open_log()?, clock.clone(), events.clone());
        let scratch = match durable {
            Some(dir) => dir.join("snapshots"),
            None => std::env::temp_dir().join(format!(
                "holdfast-{}-{:x}",
                options.name,
                identity.incarnation()
            )),
        };
        let snapshots = Arc::new(snapshot::Sender::new(
            stores.clone(),
            scratch,
            events.clone(),
            space.clone(),
        )?);
        let tasks = Tasks::new(events.clone());
        let local = Arc::new(Local::new(options, clock, identity));
        let replicas = Arc::new(Self {
            forming: Arc::new(Forming::new(local.clone())),
            changes: Arc::new(Changes::new(local.clone())),
            contact: Arc::new(Contact::new(local.clone())),
            upkeep: Arc::new(Upkeep::new(local.clone(), log.clone(), space)),
            local,
            events,
            stores,
            log,
            snapshots,
            tasks,
        });
        let record = replicas.local.identity().record();
        match (record.retired, record.cluster) {
            (Some(retired), _) => replicas.local.show_retired(retired.reason),
            (None, Some(cluster)) => replicas.enter(cluster).await?,
            (None, None) => {}
        }
        Ok(replicas)
    }

    /// Services for the peer listener.
    pub fn replica_service(&self) -> ReplicaServiceServer<ReplicaServer> {
        ReplicaServiceServer::new(ReplicaServer::new(self.local.clone()))
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
    }

    pub fn membership_service(&self) -> MembershipServiceServer<MembershipServer> {
        MembershipServiceServer::new(MembershipServer::new(
            self.local.clone(),
            self.forming.clone(),
            self.changes.clone(),
            self.contact.clone(),
        ))
    }

    /// Starts finding or joining a cluster, if there is none yet, and the node's duties. Call once
    /// the peer listener is open.
    pub fn start(self: &Arc<Self>) {
        self.duty("form or join", self, |this| async move {
            if let Err(error) = this.form_or_join().await {
                this.local
                    .fail(format!("the cluster could not be entered: {error}"));
            }
        });
        self.duty("watch failures", self, Self::watch_failures);
        let upkeep = &self.upkeep;
        self.duty("guard against stalls", upkeep, |upkeep| async move {
            upkeep.guard_against_stalls().await;
        });
        self.duty("measure the disk", upkeep, |upkeep| async move {
            upkeep.measure_disk().await;
        });
        self.duty("keep space", upkeep, |upkeep| async move {
            upkeep.keep_space().await;
        });
        self.duty("maintain membership", upkeep, |upkeep| async move {
            upkeep.maintain().await;
        });
        let contact = &self.contact;
        self.duty("greet members", contact, |contact| async move {
            contact.greet().await;
        });
        self.duty("search members", contact, |contact| async move {
            contact.search().await;
        });
        self.duty("note acknowledged", contact, |contact| async move {
            contact.note_acknowledged().await;
        });
        self.duty("write acknowledged", contact, |contact| async move {
            contact.write_acknowledged().await;
        });
    }

    /// Runs until the node closes.
    fn duty<T, F>(
        &self,
        name: &'static str,
        owner: &Arc<T>,
        run: impl Fn(Arc<T>) -> F + Send + 'static,
    ) where
        T: Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let owner = owner.clone();
        let span = tracing::info_span!(parent: None, "node.duty", duty = name);
        self.tasks.duty(name, span, move || run(owner.clone()));
    }

    // ---- what it is ----

    pub fn membership(&self) -> watch::Receiver<Membership> {
        self.local.membership()
    }

    pub fn options(&self) -> &Options {
        self.local.options()
    }

    pub fn clock(&self) -> &Clock {
        self.local.clock()
    }

    pub fn peers(&self) -> Option<Arc<Peers>> {
        self.local.peers()
    }

    pub fn replica(&self, shard: ShardId) -> Option<Arc<Replica>> {
        self.local.replica(shard).cloned()
    }

    /// Of the shards that are kept here, none until the node belongs to a cluster.
    pub fn replicas(&self) -> impl Iterator<Item = &Arc<Replica>> + Clone {
        self.local.replicas()
    }

    /// How many the cluster has; 0 until the node belongs to one.
    pub fn shards(&self) -> u32 {
        self.local.shards()
    }

    /// Why this node answers no data for good, though its replicas may be open: it was removed, is
    /// a copy, or its log lost what it had acknowledged.
    pub fn why_retired(&self) -> Option<String> {
        self.local.why_retired()
    }

    /// What this node says of its policies in every Status.
    pub fn set_policy_hash(&self, hash: u64) {
        self.local.policy_hash().store(hash, Ordering::Relaxed);
    }

    /// Whose keys have such an xxh3_64.
    pub fn shard_of_hash(&self, hash: u64) -> Option<ShardId> {
        Some(self.local.opened()?.table.shard_of_hash(hash))
    }

    /// The replica of the shard that owns a key; `None` unless the node belongs to a cluster.
    pub fn of_key(&self, key: &[u8]) -> Option<&Arc<Replica>> {
        if self.local.why_retired().is_some() {
            return None;
        }
        let table = &self.local.opened()?.table;
        self.local.replica(table.shard_of(key))
    }

    #[cfg(test)]
    pub(crate) fn local(&self) -> Arc<Local> {
        self.local.clone()
    }

    // ---- what operators ask for, on any node ----

    /// Admits the node of that name, which answers at that address, as a learner: its id.
    pub async fn add_member(&self, name: &str, peer_address: &str) -> Result<u64, ChangeError> {
        self.changes.add(name, peer_address).await
    }

    pub async fn promote(&self, name: &str) -> Result<(), ChangeError> {
        let promoted = self.changes.run(0, Change::Promote(name.into())).await;
        promoted.map(|_| ())
    }

    pub async fn remove(&self, name: &str) -> Result<(), ChangeError> {
        let removed = self.changes.run(0, Change::Remove(name.into())).await;
        removed.map(|_| ())
    }

    /// Of every shard, to the named voter or, if `to` is empty, to the one that is furthest; the
    /// name of shard 0's new leader.
    pub async fn transfer_leader(&self, to: &str) -> Result<String, ChangeError> {
        self.changes.transfer_leader(to).await
    }

    pub async fn status(&self) -> v1::StatusResponse {
        membership::status(&self.local).await
    }

    // ---- entering ----

    async fn form_or_join(&self) -> io::Result<()> {
        match self.local.opened() {
            Some(_) => Ok(()),
            None if self.local.is_retired() => Ok(()),
            None => self.enter(self.forming.run().await?).await,
        }
    }

    /// Belongs to a cluster from now on: opens a replica of each of its shards.
    async fn enter(&self, cluster: ClusterRecord) -> io::Result<()> {
        let record = self.local.identity().record();
        // Before any state is made: a state beside a log that is nobody's has lost its log.
        let claim = self.log.claim(&cluster.cluster_id, cluster.node_id).await?;
        if claim == Claim::New && self.stores.has_state(0)? {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the data directory has a state and an empty log: what the log had acknowledged is gone; restore this node's data whole, or remove it and let the node join again",
            ));
        }
        self.log.measure().await?;
        let identity = Identity {
            cluster_id: cluster.cluster_id.clone(),
            epoch: cluster.epoch,
            node_id: cluster.node_id,
            incarnation: record.incarnation,
            session: self.local.session(),
        };
        let peers = Arc::new(Peers::new(
            self.local.clock().clone(),
            identity,
            self.events.clone(),
        ));
        let founders = record.accepted.iter();
        peers
            .roster()
            .begin_with(founders.flat_map(|formation| formation.members.clone()));
        if let Some(roster) = &cluster.roster {
            peers.roster().learn(roster);
        }
        if let Some(dir) = self.local.durable_dir() {
            peers.acknowledged().read(dir)?;
        }
        let pace = Arc::new(SharedPace::default());
        let mut replicas = Vec::new();
        for shard in 0..cluster.shards.max(1) {
            let parts = Parts {
                shard,
                clock: self.local.clock().clone(),
                stores: self.stores.clone(),
                log: self.log.clone(),
                peers: peers.clone(),
                pace: pace.clone(),
                snapshots: self.snapshots.clone(),
                events: self.events.clone(),
                memory_bytes_max: self.local.options().memory_bytes_max
                    / u64::from(cluster.shards.max(1)),
                log_kept: self.local.options().log_kept,
                must_catch_up: !cluster.founder && !cluster.caught_up,
            };
            let replica = Replica::open(parts).await?;
            if let Some(formation) = record.accepted.as_ref().filter(|_| cluster.founder) {
                found(&replica, formation).await?;
            }
            replicas.push(replica);
        }
        let table = SlotTable::even(cluster.shards);
        tracing::info!(
            cluster = cluster.cluster_id,
            node_id = cluster.node_id,
            shards = cluster.shards,
            "this node belongs to a cluster"
        );
        let opened = Opened::new(peers, replicas, table);
        if !self.local.open(opened) {
            return Err(io::Error::other("this node already belongs to a cluster"));
        }
        self.local.set_membership(Membership::Member);
        Ok(())
    }

    /// Anything that makes this node's answers or acknowledgements worthless ends it.
    async fn watch_failures(self: Arc<Self>) {
        let mut log_failed = self.log.failed();
        let mut membership = self.membership();
        let log = async {
            match log_failed.wait_for(Option::is_some).await {
                Ok(why) => format!(
                    "the log cannot be written: {}",
                    why.clone().unwrap_or_default()
                ),
                Err(_) => "the log is closed".into(),
            }
        };
        let replicas = async {
            let _ = membership
                .wait_for(|membership| *membership == Membership::Member)
                .await;
            let ends = self.replicas().map(|replica| {
                Box::pin(async move {
                    let why = replica.died().await;
                    format!("the replica of shard {} stopped: {why}", replica.shard())
                })
            });
            futures::future::select_all(ends).await.0
        };
        let why = tokio::select! { why = log => why, why = replicas => why };
        self.local.fail(why);
    }

    // ---- stopping ----

    /// Hands leadership on, before listeners close.
    pub async fn hand_over(&self) {
        for replica in self.replicas() {
            if replica.leader().is_some_and(|leader| leader.is_self) && replica.voters().len() > 1 {
                replica.hand_over(None).await;
            }
        }
    }

    /// Stops replicas and flushes what they have. The node speaks to nobody afterwards.
    pub async fn close(&self) {
        self.local.begin_to_close();
        self.stores.stop_waiting();
        self.tasks.stop().await;
        for replica in self.replicas() {
            if let Err(error) = replica.close().await {
                tracing::error!(%error, shard = replica.shard(), "closing a replica failed");
            }
        }
        self.log.close().await;
        self.local.identity().release();
    }
}

/// Every founder initialises its replica with the same formation; one that already has a log has
/// done so before.
async fn found(replica: &Replica, formation: &Formation) -> io::Result<()> {
    if replica
        .raft()
        .is_initialized()
        .await
        .map_err(io::Error::other)?
    {
        return Ok(());
    }
    let members: std::collections::BTreeMap<u64, Member> = formation
        .members
        .iter()
        .map(|member| (member.id, member.clone()))
        .collect();
    replica
        .raft()
        .initialize(members)
        .await
        .map_err(io::Error::other)
}
