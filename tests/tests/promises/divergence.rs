//! A voter whose state is another one than the majority's serves nothing until it has the majority's,
//! be it the leader.

use std::path::Path;

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::{
    ShardId,
    peer::AppliedRecord,
    v1::{Consistency, Role},
};
use holdfast_raft::{Budget, Engine, Family, StateBatch, StateStore, Stores};
use holdfast_tests::{cluster::Cluster, wire::text};
use prost::Message as _;
use tracing::info;

use crate::processes;

/// Names of records of a state, and the format they are in.
const APPLIED: &[u8] = b"applied";
const DIVERGED: &[u8] = b"diverged";
const FORMAT: u8 = 1;

/// Changes what a stopped node has stored about its state.
fn change(
    data_dir: &Path,
    change: impl FnOnce(&dyn StateStore, &mut StateBatch) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    const SHARD: ShardId = 0;
    let stores = Stores::open(Engine::Rocksdb, data_dir, Budget::default())?;
    ensure!(stores.has_state(SHARD)?, "no state in {data_dir:?}");
    let state = stores.open_state(SHARD)?;
    let mut batch = StateBatch::default();
    change(state.as_ref(), &mut batch)?;
    state.write(batch)?;
    state.flush()?;
    Ok(())
}

/// What it holds comes to another sum than its peers', as after a bug in one version's apply.
fn spoil(data_dir: &Path) -> anyhow::Result<()> {
    change(data_dir, |state, batch| {
        let stored = state
            .get(Family::System, APPLIED)?
            .context("the applied record")?;
        let (format, record) = stored.split_first().context("a format")?;
        let mut applied = AppliedRecord::decode(record)?;
        applied.hash_sum ^= 42;
        let spoiled = [&[*format], applied.encode_to_vec().as_slice()].concat();
        batch.put(Family::System, APPLIED, spoiled);
        Ok(())
    })
}

/// Past the next index at which states are compared.
async fn write_on(cluster: &Cluster) -> anyhow::Result<()> {
    let client = cluster.client_of_all();
    for n in 0..300 {
        client.set("k", n.to_string()).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_state_that_is_not_the_majoritys_is_replaced_whoever_has_it() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    write_on(&cluster).await?;
    for leads in [false, true] {
        let odd = cluster.follower().await?;
        info!("--- node {odd} is spoiled; it leads: {leads}");
        let before = cluster.log_of(odd).len();
        cluster.stop_node(odd).await?;
        spoil(cluster.data_dir(odd))?;
        cluster.start_node(odd).await?;
        cluster.ready(odd).await?;
        let leader = cluster.leader().await?;
        if leads {
            let client = cluster.client(leader);
            let to = Some(cluster.name(odd));
            client.cluster().transfer_leader(to).await?;
        }
        write_on(&cluster).await?;
        let said = |what: &str| cluster.log_of(odd)[before..].contains(what);
        cluster
            .until("it finds out and is given another", async || {
                said("is not the majority's") && said("took the place of the diverged one")
            })
            .await?;
        write_on(&cluster).await?;
        cluster
            .until("all is well again", async || {
                cluster.health(odd).is_ok_and(|(code, _)| code == Some(0))
            })
            .await?;
        let wire = cluster.wire(odd)?;
        let read = wire.get("k", Consistency::Local, &Bytes::new()).await?;
        ensure!(text(&read) == "299", "{read:?}");
    }
    cluster.stop().await
}

/// It was found out and stopped before it had another: too few writes later for states to be
/// compared again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_does_not_make_a_diverged_state_right() -> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    cluster.client_of_all().set("k", "v").await?;
    let odd = cluster.follower().await?;
    cluster.stop_node(odd).await?;
    change(cluster.data_dir(odd), |_, batch| {
        batch.put(Family::System, DIVERGED, &[FORMAT][..]);
        Ok(())
    })?;
    cluster.start_node(odd).await?;
    cluster
        .until("it says what is wrong", async || {
            cluster
                .health(odd)
                .is_ok_and(|(code, said)| code == Some(8) && said.contains("is not the majority's"))
        })
        .await?;
    ensure!(cluster.admin(odd, "/readyz").await?.0 == 503);
    let metric = cluster
        .metric(odd, "holdfast_state_is_diverged", &[])
        .await?;
    ensure!(metric == 1.0, "{metric}");
    let wire = cluster.wire(odd)?;
    let read = wire.get("k", Consistency::Local, &Bytes::new()).await?;
    let role = read.replica.as_ref().map(|replica| replica.role());
    ensure!(role == Some(Role::Leader), "{read:?}");

    write_on(&cluster).await?;
    cluster.ready(odd).await?;
    cluster
        .until("all is well", async || {
            cluster.health(odd).is_ok_and(|(code, _)| code == Some(0))
        })
        .await?;
    cluster.stop().await
}
