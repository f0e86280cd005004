//! What a node is told to be: defaults < file < `HOLDFAST__*` variables < flags, checked once,
//! whole, before anything runs.
//!
//! Promises that a `Config` makes sense as it is, that every mistake is reported with its file and
//! line, and that no formatting shows a secret. Must never know how a setting is used, nor read the
//! process's environment by itself.
//!
//! ```text
//! file, variables, flags ─► layers (one tree) ─► fields (types) ─► sections, upstreams, policies ─► Config
//! ```

mod address;
mod error;
mod fields;
mod layers;
mod policies;
mod quantity;
mod sections;
mod tree;
mod upstreams;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use self::address::Address;
pub use self::error::{ConfigError, Place, Problem};
pub use self::layers::Overrides;
use crate::policy::Policies;
use crate::secret::Secrets;
use crate::upstream::Spec;

/// Every option with its default, as `holdfastd default-config` prints it.
pub const DEFAULT_YAML: &str = include_str!("../../../deploy/holdfastd.yaml");

/// A checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    pub node: Node,
    pub listen: Listen,
    pub advertise: Advertise,
    pub cluster: Cluster,
    pub secrets: Arc<Secrets>,
    /// In the order of the configuration.
    pub upstreams: Vec<Upstream>,
    pub policies: Policies,
    pub storage: Storage,
    pub memory: Memory,
    pub reads: Reads,
    pub security: Security,
    pub places: Places,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub name: String,
    /// Empty if there is only one.
    pub region: String,
    pub role: Role,
    pub data_dir: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Voter,
    /// Holds everything and never votes.
    Learner,
}

/// A port of 0 takes any that is free.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    pub client: SocketAddr,
    pub peer: SocketAddr,
    pub admin: SocketAddr,
}

/// Where others reach this node. A port of 0 stands for the one that was bound.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertise {
    pub client: Address,
    pub peer: Address,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// How many empty nodes form it, and the most voters it has. 1 without `discover`.
    pub expect: u64,
    /// Peer addresses, this node's own perhaps among them.
    pub discover: Vec<Address>,
    /// Counts only when the cluster is formed.
    pub shards: u16,
}

/// A place where values come from.
#[derive(Debug, Clone)]
pub struct Upstream {
    pub name: String,
    pub spec: Spec,
    pub place: Place,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Storage {
    pub engine: Engine,
    /// 80 % of the file system if unset.
    pub max_bytes: Option<u64>,
    pub log_keep_entries: u64,
    pub log_keep_bytes: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Rocksdb,
    /// Forgets everything when the node stops.
    Memory,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// Half of what the cgroup or the machine has if unset.
    pub max_bytes: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reads {
    /// How long a read waits for its token's revision before the leader is asked.
    pub session_wait: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Security {
    /// Listens beyond loopback without TLS and authentication.
    pub insecure: bool,
}

/// Where the settings stand that may turn out to be unusable only when they are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    pub name: Place,
    pub data_dir: Place,
    pub engine: Place,
    pub client: Place,
    pub peer: Place,
    pub admin: Place,
}

impl Config {
    /// `environment` is the process's, whole: of it count the names that begin `HOLDFAST__`, and
    /// those that a secret names.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
        overrides: &Overrides,
    ) -> Result<Self, ConfigError> {
        let environment = layers::environment(environment);
        let tree = layers::stack(file, &environment, overrides)?;
        sections::read(tree, &environment)
    }

    /// Makes the data directory, for its owner only, and proves that it can be written.
    pub fn check_data_dir(&self) -> Result<(), ConfigError> {
        let path = &self.node.data_dir;
        let cannot = |what: &str, error: std::io::Error| {
            ConfigError::at(
                self.places.data_dir.clone(),
                format!(
                    "data directory `{}` cannot be {what}: {error}",
                    path.display()
                ),
            )
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(|error| cannot("made", error))?;
        // Permissions alone do not say it: the file system may be full or read-only.
        let probe = path.join(format!(".write-test-{}", std::process::id()));
        let written =
            std::fs::write(&probe, b"holdfast").and_then(|()| std::fs::remove_file(&probe));
        written.map_err(|error| cannot("written", error))
    }
}
