//! What a new user does first.

use std::{
    fs::{self, File},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail, ensure};
use holdfast_tests::{
    cluster::{http_get, until},
    origin::{Behaviour, Origin},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tracing::info;

use crate::{
    PROGRAMS,
    command_line::{Ran, Running, run},
    in_process, processes,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_answer_the_command_line() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let set = cluster.holdfast(0, &["set", "greeting", "hello"])?;
    assert!(
        set.status.success(),
        "{}",
        String::from_utf8_lossy(&set.stderr)
    );
    let get = cluster.holdfast(
        1,
        &["get", "greeting", "--raw", "--consistency", "linearizable"],
    )?;
    assert_eq!(get.stdout, b"hello");

    let status = cluster.holdfast(2, &["cluster", "status", "-o", "json"])?;
    let status: Value = serde_json::from_slice(&status.stdout)?;
    let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
    assert_eq!(nodes.len(), 3);
    assert_eq!(
        nodes.iter().filter(|node| node["role"] == "leader").count(),
        1
    );
    assert!(
        nodes
            .iter()
            .all(|node| node["lag"].is_u64() && node["healthy"] == true)
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_told_to_stop_exits_with_0() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    let leader = cluster.leader().await?;
    assert_eq!(cluster.stop_node(leader).await?, Some(0));
    cluster.leader().await?;
    Ok(())
}

/// Where programs are found that are not ours.
const PATH: &str = "/usr/bin:/bin";
const BANNER_ENDS: &str = "Stop: Ctrl-C";

/// Both programs under their own names in one directory, as `make install` lays them out, and room
/// for what they leave behind.
struct Installed {
    dir: TempDir,
}

/// `holdfastd dev`.
struct Dev {
    running: Running,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Installed {
    fn new() -> anyhow::Result<Self> {
        let built = Path::new(PROGRAMS.holdfastd)
            .parent()
            .context("a directory")?;
        // Beside what is built, where links can be made: a copy just written can be busy when it is
        // to be run.
        let installed = Self {
            dir: tempfile::tempdir_in(built)?,
        };
        fs::create_dir(installed.bin())?;
        fs::create_dir(installed.temporary())?;
        for (name, program) in [
            ("holdfast", PROGRAMS.holdfast),
            ("holdfastd", PROGRAMS.holdfastd),
        ] {
            fs::hard_link(program, installed.bin().join(name))?;
        }
        Ok(installed)
    }

    /// A shell needs quotes for it.
    fn bin(&self) -> PathBuf {
        self.dir.path().join("it's here")
    }

    /// What takes the place of `/tmp`.
    fn temporary(&self) -> PathBuf {
        self.dir.path().join("tmp")
    }

    fn left_behind(&self) -> anyhow::Result<Vec<PathBuf>> {
        Ok(fs::read_dir(self.temporary())?
            .map(|entry| Ok(entry?.path()))
            .collect::<std::io::Result<_>>()?)
    }

    fn dev(&self, path: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin().join("holdfastd"));
        for (name, _) in std::env::vars()
            .filter(|(name, _)| name.starts_with("HOLDFAST") || name.starts_with("OTEL"))
        {
            command.env_remove(name);
        }
        command
            .env_remove("RUST_LOG")
            .env("PATH", path)
            .env("TMPDIR", self.temporary())
            .current_dir(self.dir.path());
        command.arg("dev").args(arguments);
        command
    }

    /// Starts it and waits for its banner.
    async fn started(&self, path: &str, arguments: &[&str]) -> anyhow::Result<(Dev, String)> {
        let (stdout, stderr) = (
            self.dir.path().join("stdout"),
            self.dir.path().join("stderr"),
        );
        let mut command = self.dev(path, arguments);
        command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?);
        let mut dev = Dev {
            running: Running(command.spawn()?),
            stdout,
            stderr,
        };
        let mut banner = String::new();
        until("the banner, or the end", async || {
            banner = fs::read_to_string(&dev.stdout).unwrap_or_default();
            banner.contains(BANNER_ENDS)
                || dev.running.0.try_wait().is_ok_and(|ended| ended.is_some())
        })
        .await?;
        ensure!(
            banner.contains(BANNER_ENDS),
            "no banner: {banner}{}",
            fs::read_to_string(&dev.stderr)?
        );
        Ok((dev, banner))
    }

    /// As somebody pastes it into another shell.
    async fn pasted(&self, path: &str, line: &str) -> anyhow::Result<Ran> {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", line])
            .env("PATH", path)
            .env_remove("HOLDFAST_ENDPOINTS")
            .current_dir("/");
        run(&mut shell, b"").await
    }
}

impl Dev {
    /// Ctrl-C, and how it ended.
    async fn interrupted(mut self) -> anyhow::Result<Option<i32>> {
        let pid = i32::try_from(self.running.0.id())
            .ok()
            .and_then(Pid::from_raw)
            .context("a pid")?;
        kill_process(pid, Signal::INT)?;
        self.running.ended().await
    }
}

/// The lines of a banner that are for another shell.
fn for_a_shell(banner: &str) -> Vec<&str> {
    banner
        .lines()
        .filter_map(|line| line.strip_prefix("  "))
        .collect()
}

/// The first of the ports that `dev` takes, below those that the system hands out.
fn free_port(nodes: u16) -> anyhow::Result<u16> {
    for _ in 0..100 {
        let first = rand::random_range(10_000..30_000);
        let mut wanted =
            (0..nodes).flat_map(|node| (0..3).map(move |offset| first + 10 * node + offset));
        if wanted.all(|port| TcpListener::bind(("127.0.0.1", port)).is_ok()) {
            return Ok(first);
        }
    }
    bail!("no ports are free")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_line_that_dev_prints_works_as_pasted_and_nothing_is_left_behind()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text("Ada"));
    let installed = Installed::new()?;
    let port = free_port(3)?;
    let upstream = format!("user/*={}", origin.url("/users/{1}"));
    let (dev, banner) = installed
        .started(
            PATH,
            &[
                "--nodes",
                "3",
                "--port",
                &port.to_string(),
                "--upstream",
                &upstream,
            ],
        )
        .await?;
    // The memory engine has a place for snapshots per node instead of a directory that holds all of
    // them.
    let places = if cfg!(feature = "rocksdb") { 1 } else { 4 };
    ensure!(
        installed.left_behind()?.len() == places,
        "its data is somewhere else: {:?}",
        installed.left_behind()?
    );

    info!("--- each line, where `holdfast` is not on PATH");
    let lines = for_a_shell(&banner);
    ensure!(lines.len() >= 5, "{banner}");
    let mut answers = Vec::new();
    for line in &lines {
        let ran = installed.pasted(PATH, line).await?;
        ensure!(
            ran.code == Some(0) && ran.stderr.is_empty() && !ran.stdout.is_empty(),
            "{line}: {ran:?}"
        );
        answers.push(ran.text());
    }
    let answer_of = |words: &str| {
        let at = lines
            .iter()
            .position(|line| line.contains(words))
            .with_context(|| format!("no line has {words}: {banner}"))?;
        anyhow::Ok((lines[at], answers[at].as_str()))
    };
    let (get, hello) = answer_of("get greeting --raw")?;
    ensure!(
        hello == "hello" && get.contains(&format!("-e 127.0.0.1:{}", port + 10)),
        "{get} printed {hello}"
    );
    let (_, status) = answer_of("cluster status")?;
    let roles = |role: &str| {
        status
            .lines()
            .filter(|line| line.starts_with("holdfast-") && line.contains(role))
            .count()
    };
    ensure!(
        (roles(" leader "), roles(" voter ")) == (1, 2) && status.contains("LAG"),
        "{status}"
    );
    ensure!(
        answer_of("get demo/1")?.1.contains("\"key\":\"1\""),
        "{answers:?}"
    );
    ensure!(
        answer_of("inspect demo/1")?
            .1
            .contains("policy `demo/*` takes it from upstream `demo`"),
        "{answers:?}"
    );
    for path in ["/metrics", "/readyz"] {
        let address: SocketAddr = format!("127.0.0.1:{}", port + 2).parse()?;
        ensure!(
            banner.contains(&format!("http://{address}{path}"))
                && http_get(address, path).await?.0 == 200,
            "{banner}"
        );
    }

    info!("--- its own upstream, once for all nodes");
    ensure!(
        banner.contains(&format!("user/* come from {}", origin.url("/users/{1}"))),
        "{banner}"
    );
    let client = lines[0].split(" -e ").next().context("a program")?;
    for node in [2, 0, 1] {
        let got = installed
            .pasted(
                PATH,
                &format!(
                    "{client} -e 127.0.0.1:{} get user/7 --raw",
                    port + 10 * node
                ),
            )
            .await?;
        ensure!(got.code == Some(0) && got.text() == "Ada", "{got:?}");
    }
    assert_eq!((origin.calls(), origin.calls_of("/users/7")), (1, 1));

    info!("--- Ctrl-C");
    let (stdout, stderr) = (dev.stdout.clone(), dev.stderr.clone());
    assert_eq!(dev.interrupted().await?, Some(0));
    ensure!(
        installed.left_behind()?.is_empty(),
        "{:?}",
        installed.left_behind()?
    );
    assert_eq!(
        fs::read_to_string(stdout)?.trim_end(),
        banner.trim_end(),
        "the banner is all there is on stdout"
    );
    for line in fs::read_to_string(stderr)?.lines() {
        ensure!(
            serde_json::from_str::<Value>(line).is_ok_and(|log| log["level"].is_string()),
            "no log: {line}"
        );
    }
    Ok(())
}

#[cfg(feature = "rocksdb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_keeps_its_data_where_it_is_told_to() -> anyhow::Result<()> {
    let installed = Installed::new()?;
    let path = format!("{}:{PATH}", installed.bin().display());
    let port = free_port(3)?.to_string();
    let arguments = ["--nodes", "3", "--port", &port, "--data-dir", "kept/here"];

    let (dev, banner) = installed.started(&path, &arguments).await?;
    let lines: Vec<String> = for_a_shell(&banner)
        .into_iter()
        .map(str::to_owned)
        .collect();
    for line in &lines[..2] {
        ensure!(line.starts_with("holdfast -e "), "it is on PATH: {line}");
        assert_eq!(installed.pasted(&path, line).await?.code, Some(0), "{line}");
    }
    assert_eq!(dev.interrupted().await?, Some(0));

    info!("--- again");
    let (dev, banner) = installed.started(&path, &arguments).await?;
    assert_eq!(for_a_shell(&banner), lines);
    assert_eq!(installed.pasted(&path, &lines[1]).await?.text(), "hello");
    assert_eq!(dev.interrupted().await?, Some(0));
    ensure!(
        installed.dir.path().join("kept/here/holdfast-3").is_dir()
            && installed.left_behind()?.is_empty()
    );
    Ok(())
}

/// Whichever node's it is: nobody wants two of three nodes and then an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_says_what_is_in_its_way_before_anything_starts() -> anyhow::Result<()> {
    let installed = Installed::new()?;
    let first = free_port(3)?;
    let port = first.to_string();
    for taken in [first, first + 11, first + 22] {
        info!(taken, "--- a port in use");
        let _listener = TcpListener::bind(("127.0.0.1", taken))?;
        let ran = run(
            &mut installed.dev(
                PATH,
                &["--nodes", "3", "--port", &port, "--data-dir", "never"],
            ),
            b"",
        )
        .await?;
        ensure!(ran.code == Some(1) && ran.stdout.is_empty(), "{ran:?}");
        ensure!(
            ran.stderr
                .contains(&format!("127.0.0.1:{taken}: Address already in use")),
            "{ran:?}"
        );
        ensure!(
            ran.stderr.lines().count() == 1,
            "more than that was done: {ran:?}"
        );
    }
    info!("--- a command line that makes no sense");
    for (arguments, names) in [
        (["--upstream", "user/*"], "--upstream"),
        (["--upstream", "user/*=http://127.0.0.1:1/{2}"], "`{2}`"),
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "10"], "--nodes"),
        (["--config", "/no/such/file"], "/no/such/file"),
    ] {
        let ran = run(
            &mut installed.dev(
                PATH,
                &[&["--port", port.as_str()][..], &arguments[..]].concat(),
            ),
            b"",
        )
        .await?;
        ensure!(
            ran.code == Some(2) && ran.stdout.is_empty() && ran.stderr.contains(names),
            "{arguments:?}: {ran:?}"
        );
    }
    ensure!(
        !installed.dir.path().join("never").exists() && installed.left_behind()?.is_empty(),
        "{:?}",
        installed.left_behind()?
    );
    Ok(())
}
