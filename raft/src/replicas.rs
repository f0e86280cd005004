//! All replicas of a node: one per shard, the log they share, and the node's place in a cluster.
//! The composition root of this crate; a node opens one of these, mounts its services on the peer
//! listener and runs it.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use holdfast_proto::{
    ShardId, SlotTable,
    limits::PEER_MESSAGE_BYTES_MAX,
    peer::{
        ClusterRecord, Formation, Member, membership_service_server::MembershipServiceServer,
        replica_service_server::ReplicaServiceServer,
    },
};
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    agreement::log::{LogKept, SharedLog},
    clock::Clock,
    events::Events,
    forming::{Forming, MembershipServer},
    identity::{IdentityError, IdentityFile},
    membership::CatchingUp,
    peer::{Identity, Peers, server::ReplicaServer, snapshot},
    replica::{Parts, Replica},
    store::Stores,
};

/// What a node's replicas are opened with.
#[derive(Debug, Clone)]
pub struct Options {
    pub name: String,
    pub region: String,
    /// Never becomes a voter by itself.
    pub learner_only: bool,
    pub data_dir: PathBuf,
    /// Where peers reach this node.
    pub peer_address: String,
    /// Where clients reach this node.
    pub client_address: String,
    /// Nodes that form the cluster, and voters that a learner's promotion fills up to.
    pub expect: u32,
    /// Host names and ports of possible peers, this node perhaps among them.
    pub discover: Vec<String>,
    pub shards: u32,
    pub memory_bytes_max: u64,
    pub disk_bytes_max: u64,
    pub log_kept: LogKept,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error("opening the node's storage: {0}")]
    Storage(#[from] io::Error),
}

/// How far a node is on its way into a cluster, and out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    /// It looks for the others; the text says what it waits for.
    Forming(String),
    /// Its replicas are open.
    Member,
    /// It can go on no more.
    Failed(String),
}

pub struct Replicas {
    pub(crate) options: Options,
    pub(crate) clock: Clock,
    pub(crate) identity: IdentityFile,
    events: Arc<dyn Events>,
    stores: Stores,
    pub(crate) log: SharedLog,
    snapshots: Arc<snapshot::Sender>,
    pub(crate) opened: OnceLock<Opened>,
    pub(crate) membership: watch::Sender<Membership>,
    pub(crate) forming: Forming,
    pub(crate) catching_up: CatchingUp,
    /// Held by an operator's change of the voters: the next one sees what it came to.
    pub(crate) changing: tokio::sync::Mutex<()>,
    pub(crate) stop: CancellationToken,
    tasks: TaskTracker,
}

/// What there is once the node belongs to a cluster.
pub(crate) struct Opened {
    pub(crate) peers: Arc<Peers>,
    pub(crate) replicas: Vec<Arc<Replica>>,
    table: SlotTable,
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
        )?);
        let replicas = Arc::new(Self {
            options,
            clock,
            identity,
            events,
            stores,
            log,
            snapshots,
            opened: OnceLock::new(),
            membership: watch::Sender::new(Membership::Forming("starting".into())),
            forming: Forming::default(),
            catching_up: CatchingUp::default(),
            changing: tokio::sync::Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        if let Some(cluster) = replicas.identity.record().cluster {
            replicas.enter(cluster).await?;
        }
        Ok(replicas)
    }

    /// Services for the peer listener.
    pub fn replica_service(self: &Arc<Self>) -> ReplicaServiceServer<ReplicaServer> {
        ReplicaServiceServer::new(ReplicaServer::new(self.clone()))
            .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
    }

    pub fn membership_service(self: &Arc<Self>) -> MembershipServiceServer<MembershipServer> {
        MembershipServiceServer::new(MembershipServer::new(self.clone()))
    }

    /// Starts finding or joining a cluster, if there is none yet, and the node's duties. Call once
    /// the peer listener is open.
    pub fn start(self: &Arc<Self>) {
        let this = self.clone();
        self.spawn(async move {
            if let Err(error) = this.clone().form_or_join().await {
                this.fail(format!("the cluster could not be entered: {error}"));
            }
        });
        self.keep_up();
        let this = self.clone();
        self.spawn(async move { this.watch_failures().await });
    }

    pub fn membership(&self) -> watch::Receiver<Membership> {
        self.membership.subscribe()
    }

    pub fn options(&self) -> &Options {
        &self.options
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn peers(&self) -> Option<Arc<Peers>> {
        self.opened.get().map(|opened| opened.peers.clone())
    }

    pub fn replica(&self, shard: ShardId) -> Option<Arc<Replica>> {
        let replicas = &self.opened.get()?.replicas;
        replicas.get(usize::try_from(shard).ok()?).cloned()
    }

    pub fn replicas(&self) -> &[Arc<Replica>] {
        self.opened.get().map_or(&[], |opened| &opened.replicas)
    }

    /// The replica of the shard that owns a key; `None` until the node belongs to a cluster.
    pub fn of_key(&self, key: &[u8]) -> Option<&Arc<Replica>> {
        let opened = self.opened.get()?;
        opened
            .replicas
            .get(usize::try_from(opened.table.shard_of(key)).ok()?)
    }

    /// The node itself, as peers know it.
    pub(crate) fn myself(&self) -> Member {
        let identity = self.identity.record();
        Member {
            id: identity.cluster.map_or(0, |cluster| cluster.node_id),
            name: self.options.name.clone(),
            incarnation: identity.incarnation,
            peer_address: self.options.peer_address.clone(),
            client_address: self.options.client_address.clone(),
            region: self.options.region.clone(),
            learner_only: self.options.learner_only,
        }
    }

    /// Belongs to a cluster from now on: opens a replica of each of its shards.
    pub(crate) async fn enter(self: &Arc<Self>, cluster: ClusterRecord) -> io::Result<()> {
        let record = self.identity.record();
        let identity = Identity {
            cluster_id: cluster.cluster_id.clone(),
            epoch: cluster.epoch,
            node_id: cluster.node_id,
            incarnation: record.incarnation,
        };
        let peers = Arc::new(Peers::new(self.clock.clone(), identity));
        peers.set_members(
            record
                .accepted
                .iter()
                .flat_map(|formation| formation.members.clone())
                .chain(self.forming.known_members()),
        );
        let mut replicas = Vec::new();
        for shard in 0..cluster.shards.max(1) {
            let parts = Parts {
                shard,
                clock: self.clock.clone(),
                stores: self.stores.clone(),
                log: self.log.clone(),
                peers: peers.clone(),
                snapshots: self.snapshots.clone(),
                events: self.events.clone(),
                memory_bytes_max: self.options.memory_bytes_max / u64::from(cluster.shards.max(1)),
                log_kept: self.options.log_kept,
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
        if self
            .opened
            .set(Opened {
                peers,
                replicas,
                table,
            })
            .is_err()
        {
            return Err(io::Error::other("this node already belongs to a cluster"));
        }
        self.membership.send_replace(Membership::Member);
        Ok(())
    }

    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        });
    }

    fn fail(&self, why: String) {
        tracing::error!("{why}");
        self.membership.send_replace(Membership::Failed(why));
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
            let ends = self.replicas().iter().map(|replica| {
                Box::pin(async move {
                    let mut diverged = replica.watch_diverged();
                    tokio::select! {
                        why = replica.died() => format!("the replica of shard {} stopped: {why}", replica.shard()),
                        why = diverged.wait_for(Option::is_some) => why.ok().and_then(|why| why.clone()).unwrap_or_default(),
                    }
                })
            });
            futures::future::select_all(ends).await.0
        };
        let why = tokio::select! { why = log => why, why = replicas => why };
        self.fail(why);
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
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        for replica in self.replicas() {
            if let Err(error) = replica.close().await {
                tracing::error!(%error, shard = replica.shard(), "closing a replica failed");
            }
        }
        self.log.close().await;
        self.identity.release();
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
