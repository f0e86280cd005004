//! Log time goes on by one second per second whatever wall clocks say: a clock that is wrong alone is
//! not believed, and what all of them had wrong is made up for little by little.

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use holdfast_client::{Consistency, State};
use holdfast_tests::cluster::Cluster;
use tracing::info;

use crate::in_process;

const HOUR_MS: i64 = 3_600_000;
const YEAR_MS: i64 = 365 * 24 * HOUR_MS;
const HOUR: Duration = Duration::from_secs(3_600);
const TTL: Duration = Duration::from_secs(2);
/// What log time may be off the true time: the clocks of a quorum are heard of within seconds.
const SLACK_MS: i64 = 5_000;

/// How far each node judges ahead of the true time.
async fn ahead_ms(cluster: &Cluster) -> anyhow::Result<Vec<i64>> {
    let mut ahead = Vec::new();
    for node in 0..cluster.len() {
        let seen = cluster
            .client(node)
            .inspect("hour")
            .consistency(Consistency::Local)
            .await?;
        let now = seen.now.context("a node says by what time it judges")?;
        let now = now.duration_since(SystemTime::UNIX_EPOCH)?.as_millis() as i64;
        ahead.push(now - cluster.clock.wall_ms() as i64);
    }
    Ok(ahead)
}

async fn state_of(cluster: &Cluster, node: usize, key: &str) -> Option<State> {
    let read = cluster
        .client(node)
        .get(key)
        .consistency(Consistency::Linearizable)
        .await
        .ok()?;
    read.answer.value.as_ref()?;
    Some(read.answer.state)
}

/// What was set for an hour is fresh, and a short life is as long as it says, on each node.
async fn time_goes_on(cluster: &Cluster, name: &str) -> anyhow::Result<()> {
    for node in 0..cluster.len() {
        let state = state_of(cluster, node, "hour").await;
        ensure!(state == Some(State::Fresh), "{name}: {state:?} on {node}");
        let key = format!("{name} {node}");
        let began = cluster.clock.monotonic();
        cluster.client(node).set(&key, "short").ttl(TTL).await?;
        let state = state_of(cluster, node, &key).await;
        let asked_after = cluster.clock.monotonic() - began;
        ensure!(
            state == Some(State::Fresh) || asked_after > TTL / 2,
            "{name}: {state:?} after {asked_after:?} on {node}"
        );
        cluster
            .until("a short life is over", async || {
                state_of(cluster, node, &key).await != Some(State::Fresh)
            })
            .await?;
        let lived = cluster.clock.monotonic() - began;
        // A tenth slower at most, and time for a busy machine.
        ensure!(
            lived >= TTL * 8 / 10 && lived < TTL * 3,
            "{name}: lived {lived:?} on {node}"
        );
    }
    Ok(())
}

#[cfg(feature = "rocksdb")]
async fn restart_all(cluster: &mut Cluster, order: &[usize]) -> anyhow::Result<()> {
    for &node in order {
        cluster.stop_node(node).await?;
    }
    for &node in order {
        cluster.start_node(node).await?;
    }
    for &node in order {
        cluster.ready(node).await?;
    }
    cluster.leader().await?;
    Ok(())
}

/// Whichever it is, started first, over a restart of all, and while it leads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_wrong_clock_of_three_expires_nothing_and_stops_nothing() -> anyhow::Result<()> {
    for off in [YEAR_MS, -YEAR_MS] {
        let mut cluster = in_process().configure()?;
        let wrong = 1;
        cluster.skew_clock(wrong, off);
        let order = [wrong, 0, 2];
        for node in order {
            cluster.start_node(node).await?;
        }
        for node in order {
            cluster.ready(node).await?;
        }
        cluster.client_of_all().set("hour", "v").ttl(HOUR).await?;
        time_goes_on(&cluster, "formed").await?;

        info!("--- cold, the wrong one first");
        #[cfg(feature = "rocksdb")]
        {
            restart_all(&mut cluster, &order).await?;
            time_goes_on(&cluster, "restarted").await?;
        }

        info!("--- and it leads");
        let leader = cluster.leader().await?;
        if leader != wrong {
            let name = cluster.name(wrong).to_owned();
            let client = cluster.client(leader);
            client.cluster().transfer_leader(Some(&name)).await?;
        }
        time_goes_on(&cluster, "led by it").await?;
        let ahead = ahead_ms(&cluster).await?;
        ensure!(
            ahead.iter().all(|ahead| ahead.abs() <= SLACK_MS),
            "ahead by {ahead:?} ms with {off}"
        );
        cluster.stop().await?;
    }
    Ok(())
}

/// Put right, time does not stand still until the true time has caught up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_all_clocks_were_ahead_and_were_put_right_time_goes_on() -> anyhow::Result<()> {
    for off in [YEAR_MS, HOUR_MS] {
        let mut cluster = in_process().configure()?;
        let all = [0, 1, 2];
        for node in all {
            cluster.skew_clock(node, off);
            cluster.start_node(node).await?;
        }
        for node in all {
            cluster.ready(node).await?;
        }
        cluster.client_of_all().set("hour", "v").ttl(HOUR).await?;
        let ahead = ahead_ms(&cluster).await?;
        ensure!(ahead.iter().all(|ahead| (ahead - off).abs() <= SLACK_MS));

        info!("--- put right by {off} ms");
        for node in all {
            cluster.skew_clock(node, -off);
        }
        time_goes_on(&cluster, "put right").await?;
        #[cfg(feature = "rocksdb")]
        {
            restart_all(&mut cluster, &all).await?;
            time_goes_on(&cluster, "restarted").await?;
        }
        let before = cluster.terms().await?;
        let client = cluster.client(cluster.leader().await?);
        client.cluster().transfer_leader(None).await?;
        cluster
            .until("another leader", async || {
                cluster.terms().await.is_ok_and(|now| now > before)
            })
            .await?;
        time_goes_on(&cluster, "under another leader").await?;

        let status = cluster.client_of_all().cluster().status().await?;
        let shard = status.per_shard.first().context("a shard")?;
        ensure!(
            (shard.log_time_ahead_ms - off).abs() < HOUR_MS / 2,
            "status says {} ms",
            shard.log_time_ahead_ms
        );
        let leader = cluster.leader().await?;
        let seconds = cluster
            .metric(leader, "holdfast_log_time_ahead_seconds", &[])
            .await?;
        ensure!(
            (seconds * 1000.0 - off as f64).abs() < HOUR_MS as f64 / 2.0,
            "the metric says {seconds} s"
        );
        cluster.stop().await?;
    }
    Ok(())
}
