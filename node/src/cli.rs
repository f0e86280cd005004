//! The commands of `holdfastd`, and the life of its process: telemetry, the node, the end.
//!
//! | exit code | why |
//! |--|--|
//! | 0 | stopped by SIGTERM or SIGINT |
//! | 1 | a port in use, storage that does not open, a node that can go on no more |
//! | 2 | the configuration or the command line is wrong; no port was opened |

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use holdfast_raft::Clock;

use crate::{
    config::{Config, ConfigError, DEFAULT_YAML, Overrides},
    dev,
    node::{self, Node, StartError},
    process::{Failure, Signals, load},
    resources,
    telemetry::Telemetry,
    upstream::Shared,
};

/// For tasks that still run when everything is stopped.
const RUNTIME_TIMEOUT: Duration = Duration::from_millis(500);

/// Holdfast, a replicated durable cache: one node. Without a command it runs, on loopback from
/// ./holdfast-data unless told otherwise.
#[derive(Debug, Parser)]
#[command(name = "holdfastd", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what is wrong with a configuration file, each mistake with its line
    CheckConfig { file: PathBuf },
    /// Print every option with its default
    DefaultConfig,
    /// Run a whole cluster in this process, with a demo upstream
    Dev(dev::Arguments),
}

/// A node. Flags go over variables `HOLDFAST__SECTION__KEY`, and those over the file.
#[derive(Debug, Args)]
struct Run {
    /// Configuration file (YAML); `holdfastd default-config` prints one
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// node.name: unique in the cluster
    #[arg(long)]
    name: Option<String>,
    /// node.data_dir: this node's own directory
    #[arg(long, value_name = "DIR")]
    data_dir: Option<String>,
    /// listen.client: where applications connect
    #[arg(long, value_name = "IP:PORT")]
    listen_client: Option<String>,
    /// listen.peer: where the other nodes connect
    #[arg(long, value_name = "IP:PORT")]
    listen_peer: Option<String>,
    /// listen.admin: probes and metrics
    #[arg(long, value_name = "IP:PORT")]
    listen_admin: Option<String>,
}

/// The process `holdfastd`.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let ended = match arguments.command {
        None => arguments
            .run
            .config()
            .map_err(StartError::from)
            .map_err(Failure::from)
            .and_then(|config| running(run(config))),
        Some(Command::CheckConfig { file }) => check(&file),
        Some(Command::DefaultConfig) => {
            print!("{DEFAULT_YAML}");
            Ok(())
        }
        Some(Command::Dev(arguments)) => running(dev::run(arguments)),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(failure.exit_code())
        }
    }
}

async fn run(config: Config) -> Result<(), Failure> {
    resources::raise_descriptors();
    let mut signals = Signals::new()?;
    let node = tokio::select! {
        node = Node::start(config, Clock::system()) => node?,
        () = signals.received() => return Ok(()),
    };
    let why = tokio::select! {
        why = node.failed() => Some(why),
        () = signals.received() => None,
    };
    // A second signal does not wait for anything.
    tokio::select! {
        () = node.stop() => {}
        () = signals.received() => {}
    }
    why.map_or(Ok(()), |why| Err(Failure::Ended(why)))
}

fn check(file: &Path) -> Result<(), Failure> {
    let config = load(Some(file), &Overrides::default()).map_err(StartError::from)?;
    node::upstreams(&config, &Shared::new(Clock::system())).map_err(StartError::from)?;
    println!("{}: ok", file.display());
    Ok(())
}

/// Everything from here on happens inside a runtime, with telemetry set up before and flushed
/// after.
fn running(work: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?;
    let ended = runtime.block_on(async {
        let telemetry = Telemetry::init()?;
        let ended = work.await;
        telemetry.flush().await;
        ended
    });
    runtime.shutdown_timeout(RUNTIME_TIMEOUT);
    ended
}

impl Run {
    fn config(&self) -> Result<Config, ConfigError> {
        let flags = [
            ("--name", "node.name", &self.name),
            ("--data-dir", "node.data_dir", &self.data_dir),
            ("--listen-client", "listen.client", &self.listen_client),
            ("--listen-peer", "listen.peer", &self.listen_peer),
            ("--listen-admin", "listen.admin", &self.listen_admin),
        ];
        let set = flags
            .into_iter()
            .filter_map(|(flag, path, value)| Some((flag, path, value.as_ref()?)));
        let overrides = set.fold(Overrides::default(), |overrides, (flag, path, value)| {
            overrides.text(flag, path, value)
        });
        load(self.config.as_deref(), &overrides)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        <Arguments as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn flags_go_over_everything_and_errors_name_them() {
        let run = |arguments: &[&str]| {
            Arguments::parse_from([&["holdfastd"], arguments].concat())
                .run
                .config()
        };
        let config = run(&["--name", "a", "--listen-client", "127.0.0.1:0"]).unwrap();
        assert_eq!(
            (config.node.name.as_str(), config.listen.client.port()),
            ("a", 0)
        );
        let error = run(&["--listen-client", "nowhere"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("--listen-client"), "{error}");
    }
}
