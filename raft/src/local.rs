//! This node, to the parts of this crate that act for it: what it was configured with, who it is,
//! where it stands, and its replicas once it belongs to a cluster.
//!
//! The bottom of forming, membership and the peer services, which share it and do not know each
//! other's insides. Must never know any of them.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use holdfast_proto::{
    ShardId, SlotTable,
    peer::{Member, Retired, Standing},
};
use tokio::sync::watch;

use crate::{
    agreement::log::LogKept,
    clock::Clock,
    identity::{self, IdentityFile},
    peer::Peers,
    progress::Progress,
    replica::Replica,
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

/// How far a node is on its way into a cluster, and out of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Membership {
    /// It looks for the others; the text says what it waits for.
    Forming(String),
    /// Its replicas are open.
    Member,
    /// It must not take part any more, and answers no data: removed, a copy of another node, or its
    /// log lost what it had acknowledged. The text says which, and what to do.
    Retired(String),
    /// It can go on no more.
    Failed(String),
}

pub(crate) struct Local {
    options: Options,
    clock: Clock,
    identity: IdentityFile,
    /// This process of the node.
    session: u64,
    /// It is about to end, and says nothing of itself any more.
    closing: AtomicBool,
    membership: watch::Sender<Membership>,
    progress: Progress,
    opened: OnceLock<Opened>,
    /// Of the policies that this node is configured with; whoever opens it says which.
    policy_hash: AtomicU64,
}

/// What there is once the node belongs to a cluster.
pub(crate) struct Opened {
    pub(crate) peers: Arc<Peers>,
    /// Of the shards that are kept here.
    replicas: BTreeMap<ShardId, Arc<Replica>>,
    pub(crate) table: SlotTable,
}

impl Opened {
    pub(crate) fn new(
        peers: Arc<Peers>,
        replicas: impl IntoIterator<Item = Arc<Replica>>,
        table: SlotTable,
    ) -> Self {
        let by_shard = |replica: Arc<Replica>| (replica.shard(), replica);
        Self {
            peers,
            replicas: replicas.into_iter().map(by_shard).collect(),
            table,
        }
    }

    /// `None` if the shard is not kept here.
    pub(crate) fn replica(&self, shard: ShardId) -> Option<&Arc<Replica>> {
        self.replicas.get(&shard)
    }

    /// By shard.
    pub(crate) fn replicas(&self) -> impl DoubleEndedIterator<Item = &Arc<Replica>> + Clone {
        self.replicas.values()
    }
}

impl Local {
    pub(crate) fn new(options: Options, clock: Clock, identity: IdentityFile) -> Self {
        Self {
            options,
            clock,
            identity,
            session: identity::draw(),
            closing: AtomicBool::new(false),
            membership: watch::Sender::new(Membership::Forming("starting".into())),
            progress: Progress::default(),
            opened: OnceLock::new(),
            policy_hash: AtomicU64::new(0),
        }
    }

    pub(crate) fn policy_hash(&self) -> &AtomicU64 {
        &self.policy_hash
    }

    pub(crate) fn options(&self) -> &Options {
        &self.options
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(crate) fn identity(&self) -> &IdentityFile {
        &self.identity
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
            volatile: self.identity.dir().is_none(),
        }
    }

    pub(crate) fn session(&self) -> u64 {
        self.session
    }

    /// Where what outlives the process is; `None` if nothing does.
    pub(crate) fn durable_dir(&self) -> Option<&Path> {
        self.identity.dir()
    }

    pub(crate) fn begin_to_close(&self) {
        self.closing.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    // ---- where it stands ----

    pub(crate) fn membership(&self) -> watch::Receiver<Membership> {
        self.membership.subscribe()
    }

    pub(crate) fn set_membership(&self, new: Membership) {
        self.membership.send_if_modified(|membership| {
            let changed = *membership != new;
            *membership = new;
            changed
        });
    }

    /// Ends the node: its owner sees it, and stops the process.
    pub(crate) fn fail(&self, why: String) {
        tracing::error!("{why}");
        self.set_membership(Membership::Failed(why));
    }

    /// Ends this node's part in the cluster: it talks to no peer and answers no data any more. Not
    /// written down for a copy: whether it is one is found out at each start.
    pub(crate) fn retire(&self, standing: Standing, reason: String) {
        if let Some(peers) = self.peers() {
            peers.retire();
        }
        if matches!(*self.membership.borrow(), Membership::Retired(_)) && self.is_retired() {
            return;
        }
        let retired = Retired {
            standing: standing.into(),
            reason: self.what_to_do(standing, &reason),
        };
        if standing != Standing::Copy
            && let Err(error) = self.identity.retire(retired.clone())
        {
            tracing::error!(%error, "noting that this node must not take part any more failed");
        }
        self.show_retired(retired.reason);
    }

    /// In memory only: it may still be needed by those that let it go.
    pub(crate) fn show_retired(&self, reason: String) {
        if !matches!(*self.membership.borrow(), Membership::Retired(_)) {
            tracing::error!("this node serves no data any more: {reason}");
        }
        self.set_membership(Membership::Retired(reason));
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.identity.record().retired.is_some()
    }

    /// Why this node answers no data though its replicas may be open.
    pub(crate) fn why_retired(&self) -> Option<String> {
        match &*self.membership.borrow() {
            Membership::Retired(why) => Some(why.clone()),
            _ => None,
        }
    }

    pub(crate) fn what_to_do(&self, standing: Standing, reason: &str) -> String {
        let name = &self.options.name;
        match standing {
            Standing::Copy => format!(
                "{reason}: stop this one, and never run a node from the copy of another's data directory"
            ),
            Standing::LostLog => format!(
                "{reason}: it does not vote and is not counted. Run `holdfast member remove {name}`, stop it, remove its data directory and start it again: it joins as a new member"
            ),
            _ => format!(
                "{reason}: stop it; to let it join again as a new member, remove its data directory first"
            ),
        }
    }

    pub(crate) fn progress(&self) -> &Progress {
        &self.progress
    }

    // ---- its replicas ----

    pub(crate) fn opened(&self) -> Option<&Opened> {
        self.opened.get()
    }

    /// Once, ever: false if there were replicas already.
    pub(crate) fn open(&self, opened: Opened) -> bool {
        self.opened.set(opened).is_ok()
    }

    pub(crate) fn peers(&self) -> Option<Arc<Peers>> {
        self.opened().map(|opened| opened.peers.clone())
    }

    pub(crate) fn replica(&self, shard: ShardId) -> Option<&Arc<Replica>> {
        self.opened()?.replica(shard)
    }

    /// Of the shards that are kept here, none until the node belongs to a cluster.
    pub(crate) fn replicas(&self) -> impl DoubleEndedIterator<Item = &Arc<Replica>> + Clone {
        self.opened().into_iter().flat_map(Opened::replicas)
    }

    /// How many the cluster has; 0 until the node belongs to one.
    pub(crate) fn shards(&self) -> u32 {
        self.opened().map_or(0, |opened| opened.table.shards())
    }

    /// `None` until the node belongs to a cluster.
    pub(crate) fn cluster_id(&self) -> Option<String> {
        let cluster = self.identity.record().cluster?;
        Some(cluster.cluster_id)
    }
}
