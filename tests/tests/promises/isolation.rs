//! A node that is left alone answers with what it has, and says so.

use std::time::Duration;

use anyhow::{Context, ensure};
use holdfast_client::{Answer, Applied, Client, Consistency, Error, State};
use holdfast_tests::{
    cluster::Cluster,
    origin::{Behaviour, Origin},
};
use tracing::info;

use crate::processes;

const DEADLINE: Duration = Duration::from_secs(1);
/// For the way there and back on a busy machine.
const SLACK: Duration = Duration::from_millis(500);

/// Everything is killed, the upstream is away, one node of three comes back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p6_a_lone_node_answers_with_the_last_values_and_their_age() -> anyhow::Result<()> {
    let mut origin = Origin::start().await?;
    origin.respond(Behaviour::text("fetched"));
    let upstream = format!(
        "upstreams: {{users: {{http: {{url: \"{}\"}}}}}}",
        origin.url("/{1}")
    );
    let policy = "policies: [{match: \"user/*\", upstream: users, ttl: 1s, stale_while_revalidate: 0s, stale_if_error: forever}]";
    let mut cluster = processes()
        .extra(format!("{upstream}\n{policy}"))
        .start()
        .await?;
    let client = cluster.client_of_all();
    client.set("plain", "old").await?;
    client.set("plain", "set").await?;
    ensure!(client.get("user/1").await?.answer.value.as_deref() == Some(&b"fetched"[..]));
    known_everywhere(&cluster).await?;

    let lone = crate::seeded_below(cluster.len());
    let term = cluster.metric(lone, "holdfast_term", &[]).await?;

    info!("--- kill all, take the upstream away, start one");
    for node in 0..cluster.len() {
        cluster.kill(node)?;
    }
    origin.stop().await?;
    cluster.start_node(lone).await?;
    cluster.ready(lone).await?;
    ensure!(
        cluster.admin(lone, "/readyz/write").await?.0 == 503,
        "it can write alone"
    );

    info!("--- read");
    let alone = cluster.client(lone);
    for consistency in [Consistency::Local, Consistency::Session] {
        let plain = read(&alone, "plain", consistency).await?;
        ensure!(
            plain.value.as_deref() == Some(b"set") && plain.state == State::Fresh,
            "plain is {plain:?}"
        );
        let fetched = read(&alone, "user/1", consistency).await?;
        ensure!(
            fetched.value.as_deref() == Some(b"fetched"),
            "user/1 is {fetched:?}"
        );
        grows_older(&alone, "plain", &plain).await?;
        grows_older(&alone, "user/1", &fetched).await?;
    }
    // Its lifetime is over by now or soon: nobody refreshes it, and it is served all the same.
    let stale = async || {
        read(&alone, "user/1", Consistency::Local)
            .await
            .is_ok_and(|answer| answer.state == State::StaleOnError)
    };
    cluster.until("user/1 is STALE_ON_ERROR", stale).await?;
    let shown = cluster.holdfast(lone, &["get", "user/1", "--raw"])?;
    ensure!(
        shown.status.success() && shown.stdout == b"fetched",
        "the command line said {}",
        String::from_utf8_lossy(&shown.stderr)
    );

    info!("--- write");
    for _ in 0..3 {
        let began = cluster.clock.monotonic();
        let refused = alone
            .set("plain", "new")
            .timeout(DEADLINE)
            .await
            .err()
            .context("a write without quorum")?;
        let took = cluster.clock.monotonic().saturating_sub(began);
        ensure!(took < DEADLINE + SLACK, "it took {took:?}");
        ensure!(
            matches!(refused, Error::Unavailable { .. }) && refused.applied() == Applied::No,
            "it failed with {refused:?}"
        );
    }
    let cli = cluster.holdfast(
        lone,
        &["--timeout", "1s", "set", "plain", "new", "-o", "json"],
    )?;
    let said: serde_json::Value = serde_json::from_slice(&cli.stderr)?;
    ensure!(
        cli.status.code() == Some(4),
        "exit {:?}: {said}",
        cli.status.code()
    );
    ensure!(
        said["code"] == "UNAVAILABLE" && said["applied"] == "no",
        "the command line said {said}"
    );
    ensure!(
        read(&alone, "plain", Consistency::Local)
            .await?
            .value
            .as_deref()
            == Some(b"set"),
        "a refused write is there"
    );

    // Seconds without a leader, and it stood for none that it could not become: its return will
    // depose nobody.
    ensure!(
        cluster.metric(lone, "holdfast_term", &[]).await? == term,
        "a node without quorum raised the term"
    );

    info!("--- the others return");
    for node in (0..cluster.len()).filter(|&node| node != lone) {
        cluster.start_node(node).await?;
        cluster.ready(node).await?;
    }
    ensure!(
        read(&alone, "plain", Consistency::Linearizable)
            .await?
            .value
            .as_deref()
            == Some(b"set"),
        "a refused write is there"
    );
    alone.set("plain", "new").await?;
    Ok(())
}

/// Waits until each node has on its disk that everything up to now is committed: with the second
/// entry that follows it.
async fn known_everywhere(cluster: &Cluster) -> anyhow::Result<()> {
    let leader = cluster.leader().await?;
    let now = cluster
        .metric(leader, "holdfast_applied_index", &[])
        .await?;
    for node in 0..cluster.len() {
        let known = async || {
            cluster
                .metric(node, "holdfast_applied_index", &[])
                .await
                .is_ok_and(|index| index >= now + 2.0)
        };
        cluster.until("log time goes on", known).await?;
    }
    Ok(())
}

async fn read(client: &Client, key: &str, consistency: Consistency) -> anyhow::Result<Answer> {
    Ok(client
        .get(key)
        .consistency(consistency)
        .await
        .with_context(|| format!("{consistency:?} of {key}"))?
        .answer)
}

async fn grows_older(client: &Client, key: &str, than: &Answer) -> anyhow::Result<()> {
    let older = async || {
        read(client, key, Consistency::Local)
            .await
            .is_ok_and(|answer| answer.age > than.age)
    };
    holdfast_tests::cluster::until(&format!("{key} grows older than {:?}", than.age), older).await
}
