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
use holdfast_tests::cluster::{Cluster, until};
use tracing::info;

use crate::{PROGRAMS, processes};

const SETS: u64 = 100;
const CALLERS: u64 = 64;
const SETS_PER_CALLER: u64 = 25;
/// Sets per sync at least, when many wait.
const GROUPED: u64 = 4;

const DISK_BYTES_MAX: usize = 64 << 20;
const VALUE_BYTES: usize = 1_000_000;
/// Values that what the engine writes besides may take the room of.
const SLACK: usize = 8;
/// A full disk clears by itself within that time.
const CLEARS_WITHIN: Duration = Duration::from_secs(60);

/// P1, as the kernel sees it: of three nodes one is gone, so each of the other two must have synced
/// every write.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p1_an_acknowledged_write_was_synced_by_a_quorum_first() -> anyhow::Result<()> {
    ensure!(
        Command::new("strace").arg("-V").output().is_ok(),
        "this test needs strace: apt-get install strace"
    );
    let mut cluster = processes().configure()?;
    let traces: Vec<PathBuf> = (0..cluster.len())
        .map(|node| cluster.dir().join(format!("{node}.strace")))
        .collect();
    for (node, trace) in traces.iter().enumerate() {
        // -D: the node stays our child. -y: with the names of files. -ttt, -T: when, how long.
        let strace = [
            "strace",
            "-D",
            "-f",
            "-ttt",
            "-T",
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
    let client = cluster.client_of_all();

    info!("--- the tool measures: a sync that this test causes is seen on each node");
    let caused_us = cluster.clock.wall_ms() * 1000;
    client.set("warm", "up").await?;
    for trace in &traces {
        until("strace shows a sync", async || {
            log_syncs(trace).is_ok_and(|syncs| syncs.iter().any(|sync| sync.began_us >= caused_us))
        })
        .await
        .with_context(|| format!("strace measures nothing: {}", head_of(trace)))?;
    }
    let gone = cluster.follower().await?;
    cluster.kill(gone)?;
    let quorum: Vec<&Path> = traces
        .iter()
        .enumerate()
        .filter(|(node, _)| *node != gone)
        .map(|(_, trace)| trace.as_path())
        .collect();
    client.set("warm", "again").await?;

    info!("--- one after another");
    let first_us = cluster.clock.wall_ms() * 1000;
    for set in 0..SETS {
        let sent_us = cluster.clock.wall_ms() * 1000;
        client.set(format!("k{set}"), "v").await?;
        let acknowledged_us = (cluster.clock.wall_ms() + 1) * 1000;
        for trace in &quorum {
            let synced = synced_between(trace, sent_us, acknowledged_us).await?;
            ensure!(
                synced,
                "Set {set} was acknowledged before {} had synced it",
                trace.display()
            );
        }
    }
    let syncs_since = |since_us: u64| {
        let count = |trace: &&Path| -> anyhow::Result<u64> {
            let syncs = log_syncs(trace)?;
            Ok(syncs
                .iter()
                .filter(|sync| sync.began_us >= since_us)
                .count() as u64)
        };
        quorum
            .iter()
            .map(count)
            .collect::<anyhow::Result<Vec<u64>>>()
    };
    let alone = syncs_since(first_us)?;
    ensure!(
        alone.iter().all(|&syncs| syncs >= SETS),
        "{SETS} Sets, and syncs {alone:?}"
    );

    info!("--- many at once");
    let many_us = cluster.clock.wall_ms() * 1000;
    try_join_all((0..CALLERS).map(|caller| set_many(client.clone(), caller))).await?;
    let grouped = syncs_since(many_us)?;
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

/// A sync of the log's own file that has ended well, in microseconds of the wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sync {
    began_us: u64,
    ended_us: u64,
}

/// Whether a sync lies between the two instants. What strace writes late is waited for: it is there
/// once a later sync is, and an idle leader's ticks see to one.
async fn synced_between(trace: &Path, from_us: u64, to_us: u64) -> anyhow::Result<bool> {
    let within = |sync: &Sync| sync.began_us >= from_us && sync.ended_us <= to_us;
    let mut seen = Vec::new();
    until("strace is past the Set", async || {
        seen = log_syncs(trace).unwrap_or_default();
        seen.iter()
            .any(|sync| within(sync) || sync.began_us > to_us)
    })
    .await?;
    Ok(seen.iter().any(within))
}

fn head_of(trace: &Path) -> String {
    let text = std::fs::read_to_string(trace).unwrap_or_default();
    text.lines().take(5).collect::<Vec<_>>().join("\n")
}

fn log_syncs(trace: &Path) -> anyhow::Result<Vec<Sync>> {
    let text = std::fs::read_to_string(trace)
        .with_context(|| format!("strace wrote no {}", trace.display()))?;
    Ok(syncs_of(&text))
}

/// Lines of strace are `<thread> <time> <call>`, the thread padded to five places, and a call that
/// another thread's interrupts is in two: `fdatasync(7</data/log/000004.log> <unfinished ...>` and
/// `<... fdatasync resumed>) = 0 <0.000100>`.
fn syncs_of(text: &str) -> Vec<Sync> {
    let mut under_way: HashMap<&str, u64> = HashMap::new();
    let mut ended = Vec::new();
    for line in text.lines() {
        let Some((thread, rest)) = line.trim_start().split_once(' ') else {
            continue;
        };
        let Some((time, call)) = rest.trim_start().split_once(' ') else {
            continue;
        };
        let Some(at_us) = micros(time) else { continue };
        let of_log = call.contains("/log/")
            && call.contains(".log>")
            && (call.starts_with("fdatasync(") || call.starts_with("fsync("));
        if call.contains("<unfinished") {
            under_way.remove(thread);
            if of_log {
                under_way.insert(thread, at_us);
            }
            continue;
        }
        let Some(took_us) = took(call) else { continue };
        let began_us = match call.contains("resumed>") {
            true => under_way.remove(thread),
            false => of_log.then_some(at_us),
        };
        if let Some(began_us) = began_us {
            ended.push(Sync {
                began_us,
                ended_us: began_us + took_us,
            });
        }
    }
    ended
}

/// How long a call took that succeeded: it ends with `= 0 <0.000100>`.
fn took(call: &str) -> Option<u64> {
    let (_, took) = call.split_once("= 0 <")?;
    micros(took.strip_suffix('>')?)
}

/// Of seconds with six places.
fn micros(seconds: &str) -> Option<u64> {
    let (whole, parts) = seconds.split_once('.')?;
    Some(whole.parse::<u64>().ok()? * 1_000_000 + parts.parse::<u64>().ok()?)
}

#[test]
fn a_trace_is_read_whatever_the_width_of_its_thread_numbers() {
    let text = "\
812   10.000100 fdatasync(7</data/log/000004.log>) = 0 <0.000050>
12345 10.000200 fdatasync(7</data/log/000004.log> <unfinished ...>
812   10.000210 fdatasync(9</data/state/0/1/000009.sst>) = 0 <0.000020>
12345 10.000300 <... fdatasync resumed>) = 0 <0.000100>
812   10.000400 fdatasync(7</data/log/000004.log>) = -1 EIO (Input/output error) <0.000050>
";
    let sync = |began_us, ended_us| Sync { began_us, ended_us };
    assert_eq!(
        syncs_of(text),
        [sync(10_000_100, 10_000_150), sync(10_000_200, 10_000_300)]
    );
}

/// Values are refused, everything else goes on, and space that was freed is found by the cluster
/// itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p10_a_full_disk_refuses_values_only_and_clears_by_itself() -> anyhow::Result<()> {
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
            Err(Error::DiskFull { .. }) if (stored + SLACK) * VALUE_BYTES < DISK_BYTES_MAX => {
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

pub(crate) async fn settable(client: &Client) -> anyhow::Result<()> {
    let mut last = None;
    let tried = async {
        while let Err(error) = client.set("probe", "v").await {
            last = Some(error);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let set = tokio::time::timeout(CLEARS_WITHIN, tried).await;
    set.with_context(|| {
        format!(
            "Sets are refused for {} s, at last with {last:?}",
            CLEARS_WITHIN.as_secs()
        )
    })
}

pub(crate) fn is_disk_full(error: &Error) -> anyhow::Result<()> {
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
