//! What is acknowledged is on the disks of a quorum, and what the disks cannot take is refused.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, ensure};
use futures::future::try_join_all;
use holdfast_client::{Applied, Client, Code, Consistency, Error};
use holdfast_tests::cluster::Cluster;
use tracing::info;

use crate::{PROGRAMS, processes};

const SETS: u64 = 100;
const CALLERS: u64 = 64;
const SETS_PER_CALLER: u64 = 25;
/// Sets per sync at least, when many wait.
const GROUPED: u64 = 4;

const DISK_BYTES_MAX: usize = 64 << 20;
const VALUE_BYTES: usize = 1_000_000;
/// A full disk clears by itself within that time.
const CLEARS_WITHIN: Duration = Duration::from_secs(60);

/// P1, as the kernel sees it: of three nodes one is gone, so each of the other two must have synced
/// every write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledged_write_was_synced_by_a_quorum_first() -> anyhow::Result<()> {
    ensure!(
        Command::new("strace").arg("-V").output().is_ok(),
        "this test needs strace: apt-get install strace"
    );
    let mut cluster = processes().configure()?;
    let traces: Vec<PathBuf> = (0..cluster.len())
        .map(|node| cluster.dir().join(format!("{node}.strace")))
        .collect();
    for (node, trace) in traces.iter().enumerate() {
        // -D: the node stays our child. -y: with the names of files.
        let strace = [
            "strace",
            "-D",
            "-f",
            "-tt",
            "-y",
            "-e",
            "trace=fsync,fdatasync,sync_file_range",
            "-o",
        ];
        let wrapper: Vec<&str> = strace.into_iter().chain(trace.to_str()).collect();
        cluster.start_with(node, &wrapper).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }
    let gone = cluster.follower().await?;
    cluster.kill(gone)?;
    let quorum: Vec<&Path> = traces
        .iter()
        .enumerate()
        .filter(|(node, _)| *node != gone)
        .map(|(_, trace)| trace.as_path())
        .collect();
    let syncs = || {
        quorum
            .iter()
            .map(|trace| log_syncs(trace))
            .collect::<anyhow::Result<Vec<u64>>>()
    };
    let client = cluster.client_of_all();
    client.set("warm", "up").await?;

    info!("--- one after another");
    let first = syncs()?;
    for set in 0..SETS {
        let before = syncs()?;
        client.set(format!("k{set}"), "v").await?;
        let after = syncs()?;
        let synced = before
            .iter()
            .zip(&after)
            .all(|(before, after)| after > before);
        ensure!(
            synced,
            "Set {set} was acknowledged before a quorum had synced it: syncs {before:?}, then {after:?}"
        );
    }
    let alone: Vec<u64> = first
        .iter()
        .zip(syncs()?)
        .map(|(before, after)| after - before)
        .collect();
    ensure!(
        alone.iter().all(|&syncs| syncs >= SETS),
        "{SETS} Sets, and syncs {alone:?}"
    );

    info!("--- many at once");
    let before = syncs()?;
    try_join_all((0..CALLERS).map(|caller| set_many(client.clone(), caller))).await?;
    let grouped: Vec<u64> = before
        .iter()
        .zip(syncs()?)
        .map(|(before, after)| after - before)
        .collect();
    let sets = CALLERS * SETS_PER_CALLER;
    println!(
        "{SETS} Sets one after another: syncs {alone:?}; {sets} Sets of {CALLERS} callers: syncs {grouped:?}"
    );
    ensure!(
        grouped.iter().all(|&syncs| syncs < sets / GROUPED),
        "{sets} Sets of {CALLERS} callers, and syncs {grouped:?}"
    );
    Ok(())
}

async fn set_many(client: Client, caller: u64) -> anyhow::Result<()> {
    for set in 0..SETS_PER_CALLER {
        client.set(format!("c{caller}/{set}"), "v").await?;
    }
    Ok(())
}

/// Syncs of the log's own file that have ended. Lines of strace are `<thread> <time> <call>`, and a
/// call that another thread's interrupts is in two: `fdatasync(7</data/log/000004.log> <unfinished
/// ...>` and `<... fdatasync resumed>) = 0`.
fn log_syncs(trace: &Path) -> anyhow::Result<u64> {
    let text = std::fs::read_to_string(trace)
        .with_context(|| format!("strace wrote no {}", trace.display()))?;
    let mut under_way: HashMap<&str, bool> = HashMap::new();
    let mut ended = 0;
    for line in text.lines() {
        let mut words = line.splitn(3, ' ').filter(|word| !word.is_empty());
        let (Some(thread), Some(_), Some(call)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let of_log = call.contains("/log/")
            && call.contains(".log>")
            && (call.starts_with("fdatasync(") || call.starts_with("fsync("));
        if call.contains("<unfinished") {
            under_way.insert(thread, of_log);
        } else if call.ends_with("= 0")
            && (of_log || call.contains("resumed>") && under_way.remove(thread).unwrap_or(false))
        {
            ended += 1;
        }
    }
    Ok(ended)
}

/// Values are refused, everything else goes on, and space that was freed is found by the cluster
/// itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_values_only_and_clears_by_itself() -> anyhow::Result<()> {
    let cluster = processes()
        .extra(format!(
            "storage: {{max_bytes: {}MiB}}",
            DISK_BYTES_MAX >> 20
        ))
        .start()
        .await?;
    let client = cluster.client_of_all();

    info!("--- fill");
    let mut stored = 0;
    let refused = loop {
        match client
            .set(format!("k{stored}"), incompressible(stored))
            .await
        {
            Ok(_) => stored += 1,
            // Log that nobody needs gives way to values: only they fill a disk for good.
            Err(Error::DiskFull { .. }) if stored * VALUE_BYTES < DISK_BYTES_MAX => {
                settable(&client).await?
            }
            Err(error) => break error,
        }
        ensure!(
            stored * VALUE_BYTES < 3 * DISK_BYTES_MAX,
            "{stored} values are three times the limit, and none was refused"
        );
    };
    is_disk_full(&refused)?;

    info!("--- full");
    for node in 0..cluster.len() {
        let client = cluster.client(node);
        is_disk_full(
            &client
                .set("k0", incompressible(0))
                .await
                .err()
                .context("a Set on a full disk")?,
        )?;
        let read = client
            .get("k1")
            .consistency(Consistency::Linearizable)
            .await?;
        ensure!(
            read.answer.value == Some(incompressible(1).into()),
            "a read on a full disk found {:?}",
            read.answer.state
        );
    }
    let cli = cluster.holdfast(0, &["set", "k", "v", "-o", "json"])?;
    let said: serde_json::Value = serde_json::from_slice(&cli.stderr)?;
    ensure!(
        cli.status.code() == Some(4) && said["reason"] == "DISK_FULL" && said["applied"] == "no",
        "the command line said {said}"
    );

    info!("--- delete");
    for key in 0..stored {
        ensure!(
            client.delete(format!("k{key}")).await?.existed,
            "k{key} is lost"
        );
    }
    settable(&client).await?;
    client.set("k1", "new").await?;
    ensure!(client.get("k1").await?.answer.value.as_deref() == Some(&b"new"[..]));
    Ok(())
}

async fn settable(client: &Client) -> anyhow::Result<()> {
    let tried = async {
        while client.set("probe", "v").await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(CLEARS_WITHIN, tried)
        .await
        .with_context(|| format!("Sets are refused for {} s", CLEARS_WITHIN.as_secs()))
}

fn is_disk_full(error: &Error) -> anyhow::Result<()> {
    let full = matches!(error, Error::DiskFull { .. })
        && error.code() == Code::ResourceExhausted
        && error.reason() == "DISK_FULL";
    ensure!(
        full && error.applied() == Applied::No,
        "a full disk was answered with {error:?}"
    );
    Ok(())
}

/// Bytes of xorshift64: the engine's compression must not make them fit.
fn incompressible(seed: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15 ^ (seed as u64 + 1);
    let next = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    next.flatten().take(VALUE_BYTES).collect()
}

/// Two processes on one directory would destroy it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_data_directory_in_use_is_refused_before_any_port_opens() -> anyhow::Result<()> {
    let cluster = processes().nodes(1, 1).start().await?;
    cluster.client(0).set("k", "v").await?;
    let second = second_process(&cluster)?;
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    ensure!(
        second.status.code() == Some(2),
        "it ended with {:?}: {said}",
        second.status.code()
    );
    ensure!(
        said.contains("in use by another process") && said.contains("node-1.yaml:1"),
        "it said: {said}"
    );
    ensure!(!said.contains("listening"), "it opened its ports: {said}");
    ensure!(cluster.client(0).get("k").await?.answer.is_hit());
    cluster.client(0).set("k", "w").await?;
    Ok(())
}

/// The same configuration on other ports.
fn second_process(cluster: &Cluster) -> anyhow::Result<std::process::Output> {
    let mut command = Command::new(PROGRAMS.holdfastd);
    command.arg("--config").arg(cluster.config_file(0));
    for listen in ["--listen-client", "--listen-peer", "--listen-admin"] {
        command.args([listen, "127.0.0.1:0"]);
    }
    Ok(command.output()?)
}
