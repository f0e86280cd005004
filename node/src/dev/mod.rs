//! `holdfastd dev`: a whole cluster in one process, with an upstream to try it on. For trying and
//! developing, never for keeping anything.
//!
//! ```text
//! node i: clients at port + 10·(i−1), peers at +1, admin at +2
//! ```

mod banner;
mod upstream;

use std::{
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::Duration,
};

use futures::future::{join_all, select_all};
use holdfast_raft::Clock;
use serde_json::json;

use self::{
    banner::Banner,
    upstream::{DEMO, Demo},
};
use crate::{
    config::{Config, ConfigError, Overrides, Place},
    node::{Node, StartError, memory_bytes_default},
    process::{Failure, Signals, load},
    resources,
    serve::{Bound, ListenError},
};

const PORTS_PER_NODE: u16 = 10;
const NODES_MAX: u16 = 9;
/// The share of the file system that the nodes may fill together.
const DISK_SHARE_PERCENT: u64 = 80;
/// How often it is looked whether the cluster has formed.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=i64::from(NODES_MAX)))]
    nodes: u16,
    /// Client port of the first node; node i has port + 10·(i−1), its peers +1, its admin +2
    #[arg(long, default_value_t = 7400, value_parser = clap::value_parser!(u16).range(1..=i64::from(u16::MAX - NODES_MAX * PORTS_PER_NODE)))]
    port: u16,
    /// Where the nodes keep their data; without it in a temporary directory, removed at the end
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Configuration of all nodes (YAML); names, addresses and directories are set here
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Keys that match get their values from there: 'user/*=http://127.0.0.1:8000/users/{1}'
    #[arg(long, value_name = "GLOB=URL", value_parser = parse_upstream)]
    upstream: Vec<UpstreamArgument>,
}

/// Why there is nothing to try.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    #[error("the demo upstream does not start: {0}")]
    Upstream(io::Error),
    #[error("the temporary directory {} cannot be made: {error}", dir.display())]
    Directory { dir: PathBuf, error: io::Error },
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct UpstreamArgument {
    glob: String,
    url: String,
}

/// The nodes' data: somebody's directory, or one of ours that goes when this does.
struct DataDir {
    path: PathBuf,
    is_ours: bool,
}

impl From<DemoError> for Failure {
    fn from(error: DemoError) -> Self {
        Self::Ended(error.to_string())
    }
}

pub(crate) async fn run(arguments: Arguments) -> Result<(), Failure> {
    resources::raise_descriptors();
    let mut signals = Signals::new()?;
    arguments.check_ports().map_err(StartError::from)?;
    let clock = Clock::system();
    let demo = Demo::start(clock.clone())
        .await
        .map_err(DemoError::Upstream)?;
    let data_dir = DataDir::open(arguments.data_dir.as_deref())?;
    let overrides = arguments.upstreams(demo.address());
    let configs: Result<Vec<Config>, ConfigError> = (1..=arguments.nodes)
        .map(|number| arguments.config_of(number, &data_dir.path, &overrides))
        .collect();

    let mut nodes = Vec::new();
    let outcome = tokio::select! {
        outcome = live(configs.map_err(StartError::from)?, &clock, &mut nodes, &arguments) => outcome,
        () = signals.received() => Ok(()),
    };
    tokio::select! {
        _ = join_all(nodes.into_iter().map(Node::stop_with_its_cluster)) => {}
        () = signals.received() => {}
    }
    demo.stop().await;
    outcome
}

/// Starts the nodes and says how to use them; ends when one of them cannot go on.
async fn live(
    configs: Vec<Config>,
    clock: &Clock,
    nodes: &mut Vec<Node>,
    arguments: &Arguments,
) -> Result<(), Failure> {
    for config in configs {
        nodes.push(Node::start(config, clock.clone()).await?);
    }
    let nodes = &*nodes;
    let failed = select_all(nodes.iter().map(|node| Box::pin(node.failed())));
    let formed = async {
        while !nodes
            .iter()
            .all(|node| node.readiness().to_write().all_hold())
        {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        // Whoever read it may have gone: the cluster stays.
        let _ = writeln!(io::stdout(), "{}", Banner::new(nodes, arguments));
        std::future::pending::<()>().await;
    };
    tokio::select! {
        (why, ..) = failed => Err(Failure::Ended(why)),
        () = formed => Ok(()),
    }
}

impl Arguments {
    fn client(&self, number: u16) -> SocketAddr {
        SocketAddr::from((
            Ipv4Addr::LOCALHOST,
            self.port + PORTS_PER_NODE * (number - 1),
        ))
    }

    /// A port in use is said before anything starts, whichever node's it is. Each node takes its
    /// own again.
    fn check_ports(&self) -> Result<(), ListenError> {
        for client in (1..=self.nodes).map(|number| self.client(number)) {
            for (purpose, offset) in [("clients", 0), ("peers", 1), ("probes and metrics", 2)] {
                Bound::bind(
                    purpose,
                    SocketAddr::new(client.ip(), client.port() + offset),
                )?;
            }
        }
        Ok(())
    }

    fn config_of(
        &self,
        number: u16,
        data_dir: &Path,
        upstreams: &Overrides,
    ) -> Result<Config, ConfigError> {
        let client = self.client(number);
        let at = |offset: u16| SocketAddr::new(client.ip(), client.port() + offset).to_string();
        let peers: Vec<String> = (1..=self.nodes)
            .map(|number| self.client(number))
            .map(|client| format!("{}:{}", client.ip(), client.port() + 1))
            .collect();
        let name = format!("holdfast-{number}");
        let overrides = upstreams
            .clone()
            .text(
                "--data-dir",
                "node.data_dir",
                data_dir.join(&name).to_string_lossy(),
            )
            .text("--nodes", "node.name", name)
            .text("--port", "listen.client", at(0))
            .text("--port", "listen.peer", at(1))
            .text("--port", "listen.admin", at(2))
            .yaml(
                "--port",
                "advertise",
                json!({ "client": at(0), "peer": at(1) }).to_string(),
            )
            .yaml("--nodes", "cluster.expect", self.nodes.to_string())
            .yaml("--nodes", "cluster.discover", json!(peers).to_string());
        let mut config = load(self.config.as_deref(), &overrides)?;
        self.share(&mut config, data_dir);
        Ok(config)
    }

    /// What one node would take of the machine, the nodes of this process take together.
    fn share(&self, config: &mut Config, data_dir: &Path) {
        let nodes = u64::from(self.nodes);
        config
            .memory
            .max_bytes
            .get_or_insert_with(|| memory_bytes_default() / nodes);
        if config.storage.max_bytes.is_none() {
            config.storage.max_bytes = resources::disk_bytes(data_dir)
                .ok()
                .map(|bytes| bytes / 100 * DISK_SHARE_PERCENT / nodes);
        }
    }

    /// The upstreams of the command line and the demo's, whose policies match before those of the
    /// file.
    fn upstreams(&self, demo: SocketAddr) -> Overrides {
        let demo_url = format!("http://{demo}/{{1:path}}");
        let mut overrides = Overrides::default().yaml(
            "the demo",
            &format!("upstreams.{DEMO}"),
            json!({ "http": { "url": demo_url } }).to_string(),
        );
        let mut policies = Vec::new();
        for (number, argument) in self.upstream.iter().enumerate() {
            let name = format!("dev-{}", number + 1);
            let http = json!({ "http": { "url": argument.url } });
            overrides =
                overrides.yaml("--upstream", &format!("upstreams.{name}"), http.to_string());
            policies.push(json!({ "match": argument.glob, "upstream": name, "ttl": "10s" }));
        }
        if !policies.is_empty() {
            overrides = overrides.prepend("--upstream", "policies", json!(policies).to_string());
        }
        // Prepended last, and so matched first: what the banner says of it holds.
        let policy = json!([{ "match": format!("{DEMO}/*"), "upstream": DEMO, "ttl": "10s", "ttl_jitter": 0 }]);
        overrides.prepend("the demo", "policies", policy.to_string())
    }
}

impl DataDir {
    fn open(named: Option<&Path>) -> Result<Self, Failure> {
        let (path, is_ours) = match named {
            Some(path) => (path.to_owned(), false),
            None => (
                std::env::temp_dir().join(format!("holdfast-dev-{:016x}", rand::random::<u64>())),
                true,
            ),
        };
        let made = std::fs::DirBuilder::new()
            .recursive(!is_ours)
            .mode(0o700)
            .create(&path);
        match made {
            Ok(()) => Ok(Self { path, is_ours }),
            Err(error) if is_ours => Err(DemoError::Directory { dir: path, error }.into()),
            Err(error) => {
                let reason = format!(
                    "data directory `{}` cannot be made: {error}",
                    path.display()
                );
                Err(
                    StartError::from(ConfigError::at(Place::Flag("--data-dir".into()), reason))
                        .into(),
                )
            }
        }
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if self.is_ours
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(%error, dir = %self.path.display(), "the temporary directory could not be removed");
        }
    }
}

/// The URL begins at the first `=http`: both sides may have other equals signs.
fn parse_upstream(text: &str) -> Result<UpstreamArgument, String> {
    let at = ["=http://", "=https://"]
        .into_iter()
        .filter_map(|sign| text.find(sign))
        .min();
    let (glob, url) = at
        .map(|at| text.split_at(at))
        .filter(|(glob, _)| !glob.is_empty())
        .ok_or("write it like 'user/*=http://127.0.0.1:8000/users/{1}'")?;
    Ok(UpstreamArgument {
        glob: glob.into(),
        url: url[1..].into(),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        dev: Arguments,
    }

    fn arguments(line: &[&str]) -> Arguments {
        Line::try_parse_from([&["dev"], line].concat()).unwrap().dev
    }

    #[test]
    fn each_node_has_its_ports_and_knows_the_others() {
        let arguments = arguments(&["--nodes", "3", "--port", "9000"]);
        let dir = tempfile::tempdir().unwrap();
        let config = arguments
            .config_of(3, dir.path(), &Overrides::default())
            .unwrap();
        assert_eq!(config.node.name, "holdfast-3");
        let ports = [
            config.listen.client.port(),
            config.listen.peer.port(),
            config.listen.admin.port(),
        ];
        assert_eq!(ports, [9020, 9021, 9022]);
        let discover: Vec<String> = config
            .cluster
            .discover
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            discover,
            ["127.0.0.1:9001", "127.0.0.1:9011", "127.0.0.1:9021"]
        );
        assert_eq!(
            (config.cluster.expect, config.node.data_dir),
            (3, dir.path().join("holdfast-3"))
        );
    }

    #[test]
    fn an_upstream_of_the_command_line_has_a_policy() {
        let arguments = arguments(&[
            "--upstream",
            "user/*=http://127.0.0.1:8000/users/{1}?a=b",
            "--upstream",
            "*=http://127.0.0.1:8000/{key}",
        ]);
        let dir = tempfile::tempdir().unwrap();
        let overrides = arguments.upstreams(SocketAddr::from(([127, 0, 0, 1], 1)));
        let config = arguments.config_of(1, dir.path(), &overrides).unwrap();
        let found = |key: &[u8]| {
            config
                .policies
                .find(key)
                .map(|matched| matched.policy.upstream.to_string())
        };
        assert_eq!(found(b"user/7").as_deref(), Some("dev-1"));
        assert_eq!(
            found(b"demo/7").as_deref(),
            Some(DEMO),
            "what the banner says holds"
        );
        assert_eq!(found(b"else").as_deref(), Some("dev-2"));
    }

    #[test]
    fn an_upstream_needs_a_glob_and_a_url() {
        assert_eq!(
            parse_upstream("a=b/*=http://h/{1}?x=http://y").unwrap(),
            UpstreamArgument {
                glob: "a=b/*".into(),
                url: "http://h/{1}?x=http://y".into()
            }
        );
        for bad in ["user/*", "=http://h/", "user/*=ftp://h/"] {
            assert!(parse_upstream(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_temporary_directory_is_removed_and_a_named_one_kept() {
        let ours = DataDir::open(None).unwrap();
        let path = ours.path.clone();
        assert!(path.is_dir());
        drop(ours);
        assert!(!path.exists());
        let named = tempfile::tempdir().unwrap();
        drop(DataDir::open(Some(named.path())).unwrap());
        assert!(named.path().is_dir());
    }
}
