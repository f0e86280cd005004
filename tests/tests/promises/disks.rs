//! What disks do to a cluster: they fill up, also by somebody else's files, and what is on them is
//! cut or changed.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, ensure};
use holdfast_client::{Client, Consistency};
use holdfast_tests::cluster::{Cluster, until};
use tracing::info;

use crate::{
    durability::{is_disk_full, settable},
    processes,
};

const KEYS: usize = 30;
const DISK_MIB: u32 = 64;

/// Each node on a small file system of its own, which goes with the process.
async fn on_small_disks() -> anyhow::Result<Cluster> {
    let mut cluster = processes().configure()?;
    for node in 0..cluster.len() {
        let data_dir = cluster.data_dir(node).to_owned();
        fs::create_dir_all(&data_dir)?;
        let mount = format!(
            "mount -t tmpfs -o size={DISK_MIB}m holdfast '{}' && exec \"$0\" \"$@\"",
            data_dir.display()
        );
        let wrapper = [
            "unshare",
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            &mount,
        ];
        cluster.start_with(node, &wrapper).await?;
    }
    for node in 0..cluster.len() {
        cluster.ready(node).await?;
    }
    Ok(cluster)
}

/// A file beside the node's own, on its file system.
fn neighbour(cluster: &Cluster, node: usize) -> anyhow::Result<PathBuf> {
    let pid = cluster.pid(node).context("the node runs")?;
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let data_dir = cluster.data_dir(node).strip_prefix("/")?;
    ensure!(
        root.join(data_dir).join("log").is_dir(),
        "this test needs user namespaces with mounts: sysctl kernel.unprivileged_userns_clone, or root"
    );
    Ok(root.join(data_dir).join("neighbour"))
}

/// Somebody else takes all that is left, again and again until there is nothing.
fn fill(cluster: &Cluster, node: usize) -> anyhow::Result<()> {
    let mut file = fs::File::options()
        .create(true)
        .append(true)
        .open(neighbour(cluster, node)?)?;
    let mut written = 0;
    for size in [1 << 20, 4096] {
        let block = vec![7; size];
        while file.write_all(&block).is_ok() {
            written += size;
            ensure!(written <= (DISK_MIB as usize) << 20, "it is no small disk");
        }
    }
    Ok(())
}

fn make_room(cluster: &Cluster, node: usize) -> anyhow::Result<()> {
    Ok(fs::remove_file(neighbour(cluster, node)?)?)
}

async fn set_keys(client: &Client) -> anyhow::Result<()> {
    for key in 0..KEYS {
        client.set(format!("k{key}"), vec![7; 1000]).await?;
    }
    Ok(())
}

async fn is_refused(client: &Client) -> bool {
    let refused = client.set("refused", vec![7; 1000]).await.err();
    refused.is_some_and(|error| is_disk_full(&error).is_ok())
}

/// P10: all disks are full to the last byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn full_disks_refuse_values_in_words_and_all_else_goes_on() -> anyhow::Result<()> {
    let mut cluster = on_small_disks().await?;
    let client = cluster.client_of_all();
    set_keys(&client).await?;

    info!("--- all disks are full");
    for node in 0..cluster.len() {
        fill(&cluster, node)?;
    }
    for node in 0..cluster.len() {
        let client = cluster.client(node);
        until("values are refused in words", async || {
            is_refused(&client).await
        })
        .await?;
    }
    for key in 0..KEYS {
        let client = cluster.client(key % cluster.len());
        let read = client
            .get(format!("k{key}"))
            .consistency(Consistency::Linearizable);
        ensure!(read.await?.answer.is_hit(), "k{key} is lost");
        client.set("refused", "v").await.expect_err("a value");
        if key % 2 == 0 {
            ensure!(client.delete(format!("k{key}")).await?.existed);
        }
    }

    info!("--- there is space again");
    for node in 0..cluster.len() {
        make_room(&cluster, node)?;
    }
    settable(&client).await?;
    client.set("k0", "new").await?;
    for key in 1..KEYS {
        let found = client.get(format!("k{key}")).await?.answer.is_hit();
        ensure!(found == (key % 2 == 1), "k{key}: {found}");
    }
    for node in 0..cluster.len() {
        ensure!(cluster.pid(node).is_some());
        ensure!(cluster.stop_node(node).await? == Some(0), "it ended well");
    }
    Ok(())
}

/// P10: not a byte is left, nor of what was put aside: the engine itself finds no space.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_survive_disks_without_a_byte_and_go_on() -> anyhow::Result<()> {
    let mut cluster = on_small_disks().await?;
    let client = cluster.client_of_all();
    set_keys(&client).await?;

    info!("--- what was put aside is taken too");
    for node in 0..cluster.len() {
        fill(&cluster, node)?;
        until("space is given up", async || {
            cluster.log_of(node).contains("the disk is full")
        })
        .await?;
        fill(&cluster, node)?;
    }
    for node in 0..cluster.len() {
        until("the engine finds no space", async || {
            cluster.log_of(node).contains("waits for space")
        })
        .await?;
        let read = cluster
            .client(node)
            .get("k1")
            .consistency(Consistency::Local);
        ensure!(read.await?.answer.is_hit(), "reads go on");
    }

    info!("--- there is space again");
    for node in 0..cluster.len() {
        make_room(&cluster, node)?;
    }
    settable(&client).await?;
    for key in 0..KEYS {
        ensure!(
            client.get(format!("k{key}")).await?.answer.is_hit(),
            "k{key} is lost"
        );
    }
    for node in 0..cluster.len() {
        ensure!(cluster.stop_node(node).await? == Some(0), "it ended well");
    }
    Ok(())
}

/// One full disk is one node's trouble.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_whose_disk_is_full_hands_over_and_values_go_on() -> anyhow::Result<()> {
    let cluster = on_small_disks().await?;
    let client = cluster.client_of_all();
    set_keys(&client).await?;
    let full = cluster.leader().await?;

    info!("--- the leader's disk is full");
    fill(&cluster, full)?;
    until("another one leads", async || {
        cluster.leader().await.is_ok_and(|leader| leader != full)
    })
    .await?;
    let others: Vec<usize> = (0..cluster.len()).filter(|node| *node != full).collect();
    let others = cluster.client_of(&others);
    settable(&others).await?;
    for key in 0..KEYS {
        others.set(format!("more{key}"), vec![7; 20_000]).await?;
    }
    let read = cluster
        .client(full)
        .get("k1")
        .consistency(Consistency::Local);
    ensure!(read.await?.answer.is_hit(), "the full node answers reads");

    info!("--- there is space again");
    make_room(&cluster, full)?;
    let last = format!("more{}", KEYS - 1);
    until("the full node has all", async || {
        let read = cluster
            .client(full)
            .get(last.clone())
            .consistency(Consistency::Local);
        read.await.is_ok_and(|read| read.answer.is_hit())
    })
    .await
}

/// The newest write-ahead file of a node's log.
fn log_file(cluster: &Cluster, node: usize) -> anyhow::Result<PathBuf> {
    let files = fs::read_dir(cluster.data_dir(node).join("log"))?
        .map(|file| Ok(file?.path()))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let logs = files.into_iter().filter(|path| {
        path.extension().is_some_and(|extension| extension == "log")
            && path.metadata().is_ok_and(|file| file.len() > 0)
    });
    logs.max().context("a log")
}

fn cut(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let file = fs::File::options().write(true).open(path)?;
    Ok(file.set_len(file.metadata()?.len() - bytes)?)
}

/// P1: where there is no copy, what is damaged is never taken for what was never acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lone_node_does_not_start_on_a_damaged_log() -> anyhow::Result<()> {
    let mut cluster = processes().nodes(1, 1).start().await?;
    set_keys(&cluster.client(0)).await?;
    cluster.kill(0)?;
    let log = log_file(&cluster, 0)?;
    let good = fs::read(&log)?;
    let last = good.len() - 1;
    let value = good
        .windows(900)
        .rposition(|part| part.iter().all(|byte| *byte == 7))
        .context("the last value")?;
    // The length of the last record is in the header before its payload.
    let key = format!("k{}", KEYS - 1);
    let key = good
        .windows(key.len())
        .rposition(|part| part == key.as_bytes())
        .context("its key")?;
    for at in (key - 60..key + 3).chain([value + 10, last]) {
        let mut damaged = good.clone();
        damaged[at] ^= 4;
        fs::write(&log, damaged)?;
        cluster.start_node(0).await?;
        let ended = cluster.ended(0).await?;
        let said = cluster.log_of(0);
        ensure!(
            ended == Some(1),
            "byte {at}: it ended with {ended:?}: {said}"
        );
        ensure!(
            said.contains("is damaged at byte"),
            "byte {at}: it said {said}"
        );
    }

    info!("--- acknowledged entries are cut off");
    fs::write(&log, &good)?;
    cut(&log, 1)?;
    cluster.start_node(0).await?;
    ensure!(cluster.ended(0).await? == Some(1));
    let said = cluster.log_of(0);
    ensure!(
        said.contains("its last writes are gone from this disk"),
        "{said}"
    );
    Ok(())
}

/// C7: a vote of a node that forgot what it acknowledged could elect a leader without it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_whose_log_lost_its_end_does_not_vote_until_it_has_it_again() -> anyhow::Result<()>
{
    let mut cluster = processes().start().await?;
    set_keys(&cluster.client_of_all()).await?;
    let leader = cluster.leader().await?;
    let [lost, other] = [(leader + 1) % 3, (leader + 2) % 3];
    for node in [leader, lost, other] {
        cluster.kill(node)?;
    }
    cut(&log_file(&cluster, lost)?, 300)?;

    info!("--- with the other one it elects nobody");
    for node in [lost, other] {
        cluster.start_node(node).await?;
    }
    until("it says so", async || {
        cluster.log_of(lost).contains("does not vote until")
    })
    .await?;
    let other_client = cluster.client(other);
    // Ten elections' time: nobody leads, so a write is refused.
    let refused = other_client
        .set("early", "v")
        .timeout(Duration::from_secs(3))
        .await;
    ensure!(refused.is_err(), "somebody was elected");

    info!("--- the third one is back");
    cluster.start_node(leader).await?;
    cluster.ready(lost).await?;
    let client = cluster.client(lost);
    for key in 0..KEYS {
        let read = client
            .get(format!("k{key}"))
            .consistency(Consistency::Local);
        ensure!(read.await?.answer.is_hit(), "k{key} is lost");
    }
    info!("--- and votes");
    cluster.kill(leader)?;
    settable(&client).await
}

/// A log and a state say whose they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_clusters_log_or_state_is_refused() -> anyhow::Result<()> {
    let mut here = processes().nodes(1, 1).start().await?;
    let mut there = processes().nodes(1, 1).start().await?;
    for cluster in [&mut here, &mut there] {
        cluster.client(0).set("k", "v").await?;
        cluster.stop_node(0).await?;
    }
    let (mine, theirs) = (here.data_dir(0).to_owned(), there.data_dir(0).to_owned());
    for part in ["log", "state"] {
        let aside = here.dir().join("aside");
        fs::rename(mine.join(part), &aside)?;
        fs::rename(theirs.join(part), mine.join(part))?;
        here.start_node(0).await?;
        ensure!(here.ended(0).await?.is_some_and(|code| code != 0));
        let said = here.log_of(0);
        ensure!(
            said.contains("is it the right"),
            "with another's {part} it said {said}"
        );
        fs::rename(mine.join(part), theirs.join(part))?;
        fs::rename(&aside, mine.join(part))?;
    }

    info!("--- the log is gone");
    fs::remove_dir_all(mine.join("log"))?;
    here.start_node(0).await?;
    ensure!(here.ended(0).await?.is_some_and(|code| code != 0));
    let said = here.log_of(0);
    ensure!(said.contains("a state and an empty log"), "{said}");
    Ok(())
}
