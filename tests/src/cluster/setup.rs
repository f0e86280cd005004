//! What a cluster is started with, and the configuration files that its nodes get.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    ops::Range,
};

use anyhow::{Context, ensure};
use holdfast_raft::Clock;
use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;

use super::{Addresses, Cluster, Slot};

/// A file system without a disk.
const MEMORY: &str = "/dev/shm";

/// The programs under test.
#[derive(Debug, Clone, Copy)]
pub struct Programs {
    pub holdfastd: &'static str,
    pub holdfast: &'static str,
}

/// Where nodes run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    InProcess,
    Processes,
}

/// What a cluster is started with.
#[derive(Debug, Clone)]
pub struct Setup {
    pub programs: Programs,
    pub place: Place,
    /// Nodes that have a configuration.
    pub nodes: usize,
    pub expect: usize,
    pub shards: u32,
    /// Where each node looks for the others; at their own addresses, where it is not said.
    pub discover: Option<Vec<Vec<SocketAddr>>>,
    /// Where the others reach each node; at its own peer address, where it is not said.
    pub advertise: Option<Vec<SocketAddr>>,
    /// Nodes with `node.role: learner`.
    pub learners: Vec<usize>,
    /// Data directories in memory, for tests that measure something else than the disk.
    pub in_memory: bool,
    /// Further sections of every node's configuration file: upstreams, policies, storage, …
    pub extra: String,
}

impl Setup {
    pub fn new(programs: Programs, place: Place) -> Self {
        Self {
            programs,
            place,
            nodes: 3,
            expect: 3,
            shards: 1,
            discover: None,
            advertise: None,
            learners: Vec::new(),
            in_memory: false,
            extra: String::new(),
        }
    }

    pub fn extra(self, yaml: impl Into<String>) -> Self {
        Self {
            extra: yaml.into(),
            ..self
        }
    }

    /// Syncs take no time: the data directories are in memory.
    pub fn in_memory(self) -> Self {
        Self {
            in_memory: true,
            ..self
        }
    }

    pub fn shards(self, shards: u32) -> Self {
        Self { shards, ..self }
    }

    pub fn nodes(self, nodes: usize, expect: usize) -> Self {
        Self {
            nodes,
            expect,
            ..self
        }
    }

    /// The others reach each node there, and look for it there.
    pub fn behind(self, addresses: &[SocketAddr]) -> Self {
        Self {
            discover: Some(vec![addresses.to_vec(); self.nodes]),
            advertise: Some(addresses.to_vec()),
            ..self
        }
    }

    /// Where each node looks for the others.
    pub fn discover(self, discover: Vec<Vec<SocketAddr>>) -> Self {
        Self {
            discover: Some(discover),
            ..self
        }
    }

    pub fn learners(self, learners: &[usize]) -> Self {
        Self {
            learners: learners.to_vec(),
            ..self
        }
    }

    /// Configures, starts all nodes and waits until they answer and one leads.
    pub async fn start(self) -> anyhow::Result<Cluster> {
        let mut cluster = self.configure()?;
        for node in 0..cluster.nodes.len() {
            cluster.start_node(node).await?;
        }
        for node in 0..cluster.nodes.len() {
            cluster.ready(node).await?;
        }
        cluster.leader().await?;
        Ok(cluster)
    }

    /// Writes the configuration files, starts nothing.
    pub fn configure(self) -> anyhow::Result<Cluster> {
        log_to_the_test();
        let dir = match self.in_memory {
            true => tempfile::tempdir_in(MEMORY).context(MEMORY)?,
            false => tempfile::tempdir()?,
        };
        let ports = free_ports(self.nodes * 3)?;
        let addresses_of: Vec<Addresses> = ports
            .chunks(3)
            .map(|ports| Addresses {
                client: ports[0],
                peer: ports[1],
                admin: ports[2],
            })
            .collect();
        let clock = Clock::system();
        let mut nodes = Vec::new();
        for (number, &addresses) in addresses_of.iter().enumerate() {
            let name = format!("node-{}", number + 1);
            let data_dir = dir.path().join(&name);
            let discover = peers_of(&self, number, &addresses_of);
            let role = if self.learners.contains(&number) {
                "learner"
            } else {
                "voter"
            };
            let advertise = self
                .advertise
                .as_ref()
                .map_or_else(String::new, |advertise| {
                    format!("advertise: {{peer: \"{}\"}}\n", advertise[number])
                });
            let config = format!(
                "node: {{name: {name}, role: {role}, data_dir: \"{}\"}}\n{advertise}listen: {{client: \"{}\", peer: \"{}\", admin: \"{}\"}}\ncluster: {{expect: {}, discover: [{}], shards: {}}}\n{}\n",
                data_dir.display(),
                addresses.client,
                addresses.peer,
                addresses.admin,
                self.expect,
                discover.join(", "),
                self.shards,
                self.extra,
            );
            let file = dir.path().join(format!("{name}.yaml"));
            std::fs::write(&file, config)?;
            nodes.push(Slot {
                name,
                file,
                data_dir,
                addresses,
                clock: clock.of_another_machine(),
                running: None,
            });
        }
        Ok(Cluster {
            setup: self,
            dir,
            nodes,
            clock,
        })
    }
}

fn peers_of(setup: &Setup, number: usize, addresses: &[Addresses]) -> Vec<String> {
    let peers: Vec<SocketAddr> = match &setup.discover {
        Some(discover) => discover[number].clone(),
        None if setup.expect == 1 && setup.nodes == 1 => Vec::new(),
        None => addresses.iter().map(|addresses| addresses.peer).collect(),
    };
    peers.iter().map(|peer| format!("\"{peer}\"")).collect()
}

/// Ports that were free a moment ago, none of them given out before. No connection that somebody
/// makes takes one while its node is stopped: the system takes those from above.
pub(super) fn free_ports(count: usize) -> anyhow::Result<Vec<SocketAddr>> {
    const RANGE: Range<u16> = 10_000..32_000;
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock();
    let mut ports = Vec::with_capacity(count);
    while ports.len() < count {
        ensure!(given.len() < RANGE.len() / 2, "so many ports no test needs");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, rand::random_range(RANGE)));
        if !given.contains(&address.port()) && TcpListener::bind(address).is_ok() {
            given.insert(address.port());
            ports.push(address);
        }
    }
    Ok(ports)
}

/// A test that fails is shown with its steps, and with what nodes in this process complain of.
fn log_to_the_test() {
    let steps_and_warnings = EnvFilter::new("warn,promises=info");
    let logged = tracing_subscriber::fmt()
        .with_env_filter(steps_and_warnings)
        .with_test_writer();
    // The first test of the process does it for all.
    let _ = logged.try_init();
}
