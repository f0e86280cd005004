//! Clusters of real nodes on loopback: in this process for speed, or as child processes where a
//! test must kill, pause or trace them. A node keeps its ports, its configuration file and its data
//! directory over restarts.

mod process;
mod setup;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use holdfast_client::{Client, Consistency};
use holdfast_node::{Node, config::Config};
use holdfast_raft::Clock;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub use self::setup::{Place, Programs, Setup};
use self::{
    process::{Process, signal, wait},
    setup::free_ports,
};
use crate::wire::Wire;

/// How long a test waits for anything before it fails.
pub const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    pub client: SocketAddr,
    pub peer: SocketAddr,
    pub admin: SocketAddr,
}

struct Slot {
    name: String,
    file: PathBuf,
    data_dir: PathBuf,
    addresses: Addresses,
    /// Its machine's, if it is in this process.
    clock: Clock,
    running: Option<Running>,
}

enum Running {
    Here(Box<Node>),
    Child(Process),
}

pub struct Cluster {
    setup: Setup,
    dir: TempDir,
    nodes: Vec<Slot>,
    /// The true time, by which the clocks of all nodes in this process go on.
    pub clock: Clock,
}

impl Cluster {
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn name(&self, node: usize) -> &str {
        &self.nodes[node].name
    }

    pub fn addresses(&self, node: usize) -> Addresses {
        self.nodes[node].addresses
    }

    pub fn data_dir(&self, node: usize) -> &Path {
        &self.nodes[node].data_dir
    }

    pub fn config_file(&self, node: usize) -> &Path {
        &self.nodes[node].file
    }

    /// A directory that goes with the cluster.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The log of a node that runs as a child process, from all its starts.
    pub fn log_of(&self, node: usize) -> String {
        std::fs::read_to_string(self.log_file(node)).unwrap_or_default()
    }

    fn log_file(&self, node: usize) -> PathBuf {
        self.dir
            .path()
            .join(format!("{}.log", self.nodes[node].name))
    }

    /// Gives nodes that do not run other ports, in their own files and those of `told`.
    pub fn move_nodes(&mut self, moved: &[usize], told: &[usize]) -> anyhow::Result<()> {
        let ports = free_ports(moved.len() * 3)?;
        for (&node, ports) in moved.iter().zip(ports.chunks(3)) {
            let old = self.nodes[node].addresses;
            let new = Addresses {
                client: ports[0],
                peer: ports[1],
                admin: ports[2],
            };
            for file in [&[node], told]
                .concat()
                .iter()
                .map(|&n| &self.nodes[n].file)
            {
                let mut config = std::fs::read_to_string(file)?;
                for (old, new) in [
                    (old.client, new.client),
                    (old.peer, new.peer),
                    (old.admin, new.admin),
                ] {
                    config = config.replace(&format!("\"{old}\""), &format!("\"{new}\""));
                }
                std::fs::write(file, config)?;
            }
            self.nodes[node].addresses = new;
        }
        Ok(())
    }

    // ---- starting and stopping ----

    pub async fn start_node(&mut self, node: usize) -> anyhow::Result<()> {
        self.start_with(node, &[]).await
    }

    /// Starts a child process behind another program: `strace …`, `nice …`.
    pub async fn start_with(&mut self, node: usize, wrapper: &[&str]) -> anyhow::Result<()> {
        let running = match self.setup.place {
            Place::InProcess => {
                let config = Config::load(
                    Some(&self.nodes[node].file),
                    std::iter::empty(),
                    &Default::default(),
                )?;
                let started = start_when_the_port_is_free(config, &self.nodes[node].clock).await?;
                Running::Here(Box::new(started))
            }
            Place::Processes => Running::Child(Process(self.spawn(node, wrapper)?)),
        };
        self.nodes[node].running = Some(running);
        Ok(())
    }

    /// Starts nodes of this process all at the same time.
    pub async fn start_together(&mut self, nodes: &[usize]) -> anyhow::Result<()> {
        let configs: Result<Vec<Config>, _> = nodes
            .iter()
            .map(|&node| {
                Config::load(
                    Some(&self.nodes[node].file),
                    std::iter::empty(),
                    &Default::default(),
                )
            })
            .collect();
        let clocks = nodes.iter().map(|&node| &self.nodes[node].clock);
        let starts = configs?
            .into_iter()
            .zip(clocks)
            .map(|(config, clock)| start_when_the_port_is_free(config, clock));
        let started = futures::future::try_join_all(starts).await?;
        for (&node, started) in nodes.iter().zip(started) {
            self.nodes[node].running = Some(Running::Here(Box::new(started)));
        }
        Ok(())
    }

    fn spawn(&self, node: usize, wrapper: &[&str]) -> anyhow::Result<Child> {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.log_file(node))?;
        let words: Vec<&str> = wrapper
            .iter()
            .copied()
            .chain([self.setup.programs.holdfastd])
            .collect();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .arg("--config")
            .arg(&self.nodes[node].file);
        // What the machine's environment says is not the test's configuration.
        for (name, _) in std::env::vars()
            .filter(|(name, _)| name.starts_with("HOLDFAST") || name.starts_with("OTEL"))
        {
            command.env_remove(name);
        }
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        command
            .spawn()
            .with_context(|| format!("start {}", words.join(" ")))
    }

    /// `SIGTERM`, or a clean stop in this process; says how a child ended.
    pub async fn stop_node(&mut self, node: usize) -> anyhow::Result<Option<i32>> {
        match self.nodes[node].running.take() {
            Some(Running::Child(mut process)) => {
                signal(&process.0, rustix::process::Signal::TERM)?;
                Ok(wait(&mut process.0).await?.code())
            }
            Some(Running::Here(node)) => {
                node.stop().await;
                Ok(None)
            }
            None => Ok(None),
        }
    }

    /// `kill -9`.
    pub fn kill(&mut self, node: usize) -> anyhow::Result<()> {
        match &mut self.nodes[node].running {
            Some(Running::Child(process)) => {
                process.0.kill()?;
                process.0.wait()?;
                self.nodes[node].running = None;
                Ok(())
            }
            Some(Running::Here(_)) => bail!("a node in this process cannot be killed"),
            None => Ok(()),
        }
    }

    /// `SIGSTOP`; returns once every thread of the process stands still.
    pub fn pause(&self, node: usize) -> anyhow::Result<()> {
        self.send(node, rustix::process::Signal::STOP)?;
        let tasks = format!("/proc/{}/task", self.pid(node).context("a child process")?);
        for _ in 0..2000 {
            let stopped = |task: std::io::Result<std::fs::DirEntry>| -> bool {
                let stat = task
                    .and_then(|task| std::fs::read_to_string(task.path().join("stat")))
                    .unwrap_or_default();
                stat.rsplit(") ")
                    .next()
                    .is_some_and(|rest| rest.starts_with(['T', 't']))
            };
            if std::fs::read_dir(&tasks)?.all(stopped) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("the process does not stop")
    }

    pub fn resume(&self, node: usize) -> anyhow::Result<()> {
        self.send(node, rustix::process::Signal::CONT)
    }

    fn send(&self, node: usize, what: rustix::process::Signal) -> anyhow::Result<()> {
        match &self.nodes[node].running {
            Some(Running::Child(process)) => signal(&process.0, what),
            _ => bail!("only a child process takes signals"),
        }
    }

    pub fn is_running(&self, node: usize) -> bool {
        self.nodes[node].running.is_some()
    }

    pub fn pid(&self, node: usize) -> Option<u32> {
        match &self.nodes[node].running {
            Some(Running::Child(process)) => Some(process.0.id()),
            _ => None,
        }
    }

    /// Waits for a child to end by itself, and says how.
    pub async fn ended(&mut self, node: usize) -> anyhow::Result<Option<i32>> {
        match &mut self.nodes[node].running {
            Some(Running::Child(process)) => Ok(wait(&mut process.0).await?.code()),
            _ => bail!("not a child process"),
        }
    }

    /// The node in this process.
    pub fn here(&self, node: usize) -> anyhow::Result<&Node> {
        match &self.nodes[node].running {
            Some(Running::Here(node)) => Ok(node),
            _ => bail!("the node does not run in this process"),
        }
    }

    // ---- asking ----

    /// A client that knows only this node.
    pub fn client(&self, node: usize) -> Client {
        self.client_of(&[node])
    }

    /// A client that knows all nodes.
    pub fn client_of_all(&self) -> Client {
        self.client_of(&(0..self.nodes.len()).collect::<Vec<_>>())
    }

    pub fn client_of(&self, nodes: &[usize]) -> Client {
        let endpoints = nodes
            .iter()
            .map(|&node| self.nodes[node].addresses.client.to_string());
        Client::builder()
            .endpoints(endpoints)
            .build()
            .expect("addresses are endpoints")
    }

    /// The contract's stub, against one node.
    pub fn wire(&self, node: usize) -> anyhow::Result<Wire> {
        Wire::to(self.nodes[node].addresses.client)
    }

    /// Stubs of all nodes.
    pub fn wires(&self) -> anyhow::Result<Vec<Wire>> {
        (0..self.nodes.len()).map(|node| self.wire(node)).collect()
    }

    /// For the generated gRPC clients, as any other program has them.
    pub fn channel(&self, node: usize) -> tonic::transport::Channel {
        let endpoint = tonic::transport::Endpoint::from_shared(format!(
            "http://{}",
            self.nodes[node].addresses.client
        ));
        endpoint
            .expect("an address makes an endpoint")
            .connect_lazy()
    }

    /// Sets one machine's wall clock off by so much; for nodes in this process.
    pub fn skew_clock(&self, node: usize, by_ms: i64) {
        self.nodes[node].clock.skew_wall_ms(by_ms);
    }

    /// Moves time, for nodes in this process, and waits until each of them judges by it: in its own
    /// reads, and in what the leader stamps.
    pub async fn advance(&self, by: Duration) -> anyhow::Result<()> {
        let now = async |client: &Client, consistency| {
            client
                .inspect("time")
                .consistency(consistency)
                .await
                .ok()?
                .now
        };
        let mut wanted = Vec::new();
        for client in (0..self.nodes.len())
            .filter(|&node| self.is_running(node))
            .map(|node| self.client(node))
        {
            let instant = now(&client, Consistency::Local)
                .await
                .context("what time a node has")?;
            wanted.push((client, instant + by));
        }
        self.clock.advance(by);
        for (client, wanted) in wanted {
            for consistency in [Consistency::Local, Consistency::Linearizable] {
                self.until("time has moved for a node", async || {
                    now(&client, consistency)
                        .await
                        .is_some_and(|now| now >= wanted)
                })
                .await?;
            }
        }
        Ok(())
    }

    /// The command line, against one node.
    pub fn holdfast(&self, node: usize, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(self.setup.programs.holdfast);
        command
            .args(["-e", &self.nodes[node].addresses.client.to_string()])
            .args(arguments)
            .stdin(Stdio::null());
        command.env_remove("HOLDFAST_ENDPOINTS");
        Ok(command.output()?)
    }

    /// How `holdfast cluster health` exits at one node, and what it prints.
    pub fn health(&self, asked: usize) -> anyhow::Result<(Option<i32>, String)> {
        let output = self.holdfast(asked, &["cluster", "health"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok((output.status.code(), text))
    }

    /// `GET path` on the admin listener: status and body.
    pub async fn admin(&self, node: usize, path: &str) -> anyhow::Result<(u16, String)> {
        http_get(self.nodes[node].addresses.admin, path).await
    }

    /// Until every node knows that all members understand what came with a feature level.
    pub async fn until_level(&self, level: u32) -> anyhow::Result<()> {
        self.until("all know what all understand", async || {
            for node in 0..self.len() {
                let known = self.metric(node, "holdfast_feature_level", &[]).await;
                if known.is_ok_and(|known| known < f64::from(level)) {
                    return false;
                }
            }
            true
        })
        .await
    }

    /// One sample of `/metrics`, summed over its series that have all the labels given
    /// (`name="value"`).
    pub async fn metric(&self, node: usize, name: &str, labels: &[&str]) -> anyhow::Result<f64> {
        let (status, body) = self.admin(node, "/metrics").await?;
        ensure!(status == 200, "/metrics answered {status}");
        let series = body.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' ']))
                && labels.iter().all(|label| line.contains(label))
        });
        Ok(series
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum())
    }

    pub async fn ready(&self, node: usize) -> anyhow::Result<()> {
        self.until(&format!("{} is ready", self.nodes[node].name), async || {
            matches!(self.admin(node, "/readyz").await, Ok((200, _)))
        })
        .await
    }

    /// The node that leads shard 0, as running nodes agree.
    pub async fn leader(&self) -> anyhow::Result<usize> {
        let mut found = None;
        let running: Vec<usize> = (0..self.nodes.len())
            .filter(|&node| self.is_running(node))
            .collect();
        self.until("a leader", async || {
            for &node in &running {
                let Ok(status) = self.client(node).cluster().status().await else {
                    continue;
                };
                let leader = self
                    .nodes
                    .iter()
                    .position(|slot| Some(&slot.name) == status.leader.as_ref());
                if let Some(leader) = leader.filter(|leader| running.contains(leader)) {
                    found = Some(leader);
                    return true;
                }
            }
            false
        })
        .await?;
        found.context("a leader")
    }

    /// The node that leads shard 0, as each of these nodes says for itself.
    pub async fn leader_of(&self, nodes: &[usize]) -> anyhow::Result<usize> {
        let mut found = None;
        self.until(
            &format!("nodes {nodes:?} know the same leader among them"),
            async || {
                let mut named = std::collections::BTreeSet::new();
                for &node in nodes {
                    let Ok(status) = self.client(node).cluster().status().await else {
                        return false;
                    };
                    let leader = self
                        .nodes
                        .iter()
                        .position(|slot| Some(&slot.name) == status.leader.as_ref());
                    named.insert(leader.filter(|leader| nodes.contains(leader)));
                }
                found = named.pop_first().flatten().filter(|_| named.is_empty());
                found.is_some()
            },
        )
        .await?;
        found.context("a leader")
    }

    /// The terms of all shards together: another leader, another number. What happens once does so
    /// once a term.
    pub async fn terms(&self) -> anyhow::Result<u64> {
        Ok(self
            .client_of_all()
            .cluster()
            .status()
            .await?
            .per_shard
            .iter()
            .map(|shard| shard.term)
            .sum())
    }

    /// Some running node that does not lead.
    pub async fn follower(&self) -> anyhow::Result<usize> {
        let leader = self.leader().await?;
        (0..self.nodes.len())
            .find(|&node| node != leader && self.is_running(node))
            .context("a follower")
    }

    /// Waits until something holds, and fails saying what did not.
    pub async fn until(&self, what: &str, holds: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
        until(what, holds).await
    }

    /// Stops every node cleanly.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        for node in 0..self.nodes.len() {
            self.stop_node(node).await?;
        }
        Ok(())
    }
}

/// Waits until something holds, and fails saying what did not.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) -> anyhow::Result<()> {
    let waiting = async {
        while !holds().await {
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting)
        .await
        .with_context(|| format!("waited {} s for: {what}", PATIENCE.as_secs()))
}

/// A restart in this process may find its ports still held for a moment.
async fn start_when_the_port_is_free(config: Config, clock: &Clock) -> anyhow::Result<Node> {
    let mut last = None;
    for _ in 0..300 {
        match Node::start(config.clone(), clock.clone()).await {
            Ok(node) => return Ok(node),
            Err(holdfast_node::StartError::Config(error)) => return Err(error.into()),
            Err(error) => last = Some(error),
        }
        tokio::time::sleep(POLL).await;
    }
    Err(last.map_or_else(|| anyhow::anyhow!("not started"), Into::into))
}

/// A small GET; the admin listener speaks HTTP/1.1.
pub async fn http_get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream
            .write_all(
                format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
                    .as_bytes(),
            )
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(5), asked).await??;
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .context("a status line")?;
    let body = answer
        .split_once("\r\n\r\n")
        .map(|(_, body)| body.to_owned())
        .unwrap_or_default();
    Ok((status, body))
}
