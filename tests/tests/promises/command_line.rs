//! The command line as a user types it: the program itself, against real nodes. What it prints and
//! where, and how it ends.

mod answers;
mod endings;
mod itself;
mod words;

use std::{
    ffi::OsStr,
    io::{Read as _, Seek as _, Write as _},
    net::SocketAddr,
    process::{Child, Command},
};

use anyhow::{Context as _, ensure};
use holdfast_tests::{
    cluster::{Cluster, Setup, until},
    origin::Origin,
};
use serde_json::Value;
use tokio::net::TcpSocket;

use crate::{PROGRAMS, in_process};

/// Killed with the test, whatever became of it.
pub(super) struct Running(pub(super) Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Waits for its end, and says how it ended.
    pub(super) async fn ended(&mut self) -> anyhow::Result<Option<i32>> {
        let mut status = None;
        until("a program ends", async || {
            status = self.0.try_wait().ok().flatten();
            status.is_some()
        })
        .await?;
        Ok(status.and_then(|status| status.code()))
    }
}

/// How a program ended, and all that it said.
#[derive(Debug)]
pub(super) struct Ran {
    pub(super) code: Option<i32>,
    pub(super) stdout: Vec<u8>,
    pub(super) stderr: String,
}

impl Ran {
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// What is on stdout: one JSON document and nothing else.
    fn json(&self) -> anyhow::Result<Value> {
        serde_json::from_slice(&self.stdout).with_context(|| format!("no JSON: {self:?}"))
    }

    /// The one object that a failure is, on one line of stderr; stdout has nothing.
    fn error(&self) -> anyhow::Result<Value> {
        ensure!(
            self.stdout.is_empty() && self.stderr.lines().count() == 1,
            "more than an error: {self:?}"
        );
        let error: Value =
            serde_json::from_str(&self.stderr).with_context(|| format!("no JSON: {self:?}"))?;
        for name in [
            "code",
            "reason",
            "message",
            "field",
            "applied",
            "leader",
            "version",
            "retry_after_ms",
        ] {
            ensure!(error.get(name).is_some(), "{name} is missing: {error}");
        }
        Ok(error)
    }
}

/// Runs a program to its end, which must come.
pub(super) async fn run(command: &mut Command, stdin: &[u8]) -> anyhow::Result<Ran> {
    let [mut input, mut stdout, mut stderr] = [
        tempfile::tempfile()?,
        tempfile::tempfile()?,
        tempfile::tempfile()?,
    ];
    input.write_all(stdin)?;
    input.rewind()?;
    command
        .stdin(input)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?);
    let code = Running(command.spawn().with_context(|| format!("{command:?}"))?)
        .ended()
        .await?;
    let mut ran = Ran {
        code,
        stdout: Vec::new(),
        stderr: String::new(),
    };
    stdout.rewind()?;
    stdout.read_to_end(&mut ran.stdout)?;
    stderr.rewind()?;
    stderr.read_to_string(&mut ran.stderr)?;
    ensure!(
        !ran.stderr.contains("panicked") && !ran.stderr.contains("backtrace"),
        "{ran:?}"
    );
    Ok(ran)
}

/// The program, without what the machine's environment says, and eager to show where it breaks.
fn holdfast<W: AsRef<OsStr>>(words: impl IntoIterator<Item = W>) -> Command {
    let mut command = Command::new(PROGRAMS.holdfast);
    command
        .env_remove("HOLDFAST_ENDPOINTS")
        .env("RUST_BACKTRACE", "1")
        .args(words);
    command
}

/// Without any node.
async fn typed(line: &str) -> anyhow::Result<Ran> {
    run(&mut holdfast(line.split_whitespace()), b"").await
}

/// Somebody at a terminal, who knows one node.
struct User {
    endpoint: String,
}

impl User {
    fn of(cluster: &Cluster, node: usize) -> Self {
        Self {
            endpoint: cluster.addresses(node).client.to_string(),
        }
    }

    /// Words without quotes.
    async fn types(&self, line: &str) -> anyhow::Result<Ran> {
        self.says(line.split_whitespace()).await
    }

    async fn says<W: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = W>,
    ) -> anyhow::Result<Ran> {
        run(holdfast(["-e", &self.endpoint]).args(words), b"").await
    }

    /// Succeeds, and says nothing but data.
    async fn done(&self, line: &str) -> anyhow::Result<Ran> {
        let ran = self.types(line).await?;
        ensure!(
            ran.code == Some(0) && ran.stderr.is_empty(),
            "{line}: {ran:?}"
        );
        Ok(ran)
    }

    async fn json(&self, line: &str) -> anyhow::Result<Value> {
        self.done(&format!("-o json {line}")).await?.json()
    }
}

/// Upstream `users` behind the keys `user/*`, three nodes in this process.
fn with_users(origin: &Origin) -> Setup {
    let url = origin.url("/users/{1}");
    in_process().extra(format!("upstreams: {{users: {{http: {{url: \"{url}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users}}]"))
}

/// A port at which nobody listens, nor will: it is held.
fn nobody() -> anyhow::Result<(TcpSocket, SocketAddr)> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0)))?;
    let address = socket.local_addr()?;
    Ok((socket, address))
}
