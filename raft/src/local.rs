//! This node, to the parts of this crate that act for it: what it was configured with, who it is,
//! where it stands, and its replicas once it belongs to a cluster.
//!
//! The bottom of forming, membership and the peer services, which share it and do not know each
//! other's insides. Must never know any of them.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use holdfast_proto::{ShardId, SlotTable, peer::Member};
use tokio::sync::watch;

use crate::{
    agreement::log::LogKept, clock::Clock, identity::IdentityFile, peer::Peers, replica::Replica,
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
    /// It can go on no more.
    Failed(String),
}

pub(crate) struct Local {
    options: Options,
    clock: Clock,
    identity: IdentityFile,
    membership: watch::Sender<Membership>,
    opened: OnceLock<Opened>,
}

/// What there is once the node belongs to a cluster.
pub(crate) struct Opened {
    pub(crate) peers: Arc<Peers>,
    pub(crate) replicas: Vec<Arc<Replica>>,
    pub(crate) table: SlotTable,
}

impl Local {
    pub(crate) fn new(options: Options, clock: Clock, identity: IdentityFile) -> Self {
        Self {
            options,
            clock,
            identity,
            membership: watch::Sender::new(Membership::Forming("starting".into())),
            opened: OnceLock::new(),
        }
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
        }
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
        self.replicas().get(usize::try_from(shard).ok()?)
    }

    pub(crate) fn replicas(&self) -> &[Arc<Replica>] {
        self.opened().map_or(&[], |opened| &opened.replicas)
    }

    /// `None` until the node belongs to a cluster.
    pub(crate) fn cluster_id(&self) -> Option<String> {
        let cluster = self.identity.record().cluster?;
        Some(cluster.cluster_id)
    }
}
