//! What a read may ask for beside its key: how old, from whom, whether to wait.

use std::{future::IntoFuture, time::Duration};

use anyhow::ensure;
use futures::future::{join_all, try_join_all};
use holdfast_client::{Answer as Found, Client, FetchOnMiss, State};
use holdfast_proto::reason;
use holdfast_tests::{
    cluster::Cluster,
    origin::{Answer, Behaviour, Gate, Origin},
};

use crate::in_process;

const SECOND: Duration = Duration::from_secs(1);

async fn cluster(origin: &Origin, policy: &str) -> anyhow::Result<Cluster> {
    let url = origin.url("/{1}");
    let extra = format!(
        "upstreams: {{users: {{http: {{url: \"{url}\"}}, fetch_timeout: 60s}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl_jitter: 0, {policy}}}]"
    );
    in_process().extra(extra).start().await
}

/// Each call brings another value: `1`, `2`, …
fn counted() -> Behaviour {
    Behaviour::compute(|_, call| Answer::text(call.to_string()))
}

fn text(answer: &Found) -> &str {
    std::str::from_utf8(answer.value.as_deref().unwrap_or_default()).unwrap_or("?")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_if_cached_asks_nobody_and_waits_for_nothing() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(counted());
    let cluster = cluster(&origin, "ttl: 1min, stale_while_revalidate: 1min").await?;
    for node in 0..3 {
        let client = cluster.client(node);
        let missed = client.get("user/7").only_if_cached().await?.answer;
        assert_eq!((missed.state, missed.value), (State::Miss, None));
    }
    assert_eq!(origin.calls(), 0);
    let client = cluster.client(1);
    client.get("user/7").await?;
    let found = client.get("user/7").only_if_cached().await?.answer;
    assert_eq!((found.state, text(&found)), (State::Fresh, "1"));

    // Where others give a better value a moment.
    origin.respond(Behaviour::Hang);
    cluster.advance(150 * SECOND).await?;
    let waited = async || {
        let mut waited = 0.0;
        for node in 0..3 {
            waited += cluster
                .metric(node, "holdfast_reads_waited_total", &[])
                .await?;
        }
        anyhow::Ok(waited)
    };
    let before = waited().await?;
    let stale = client.get("user/7").only_if_cached().await?.answer;
    assert_eq!((stale.state, text(&stale)), (State::StaleOnError, "1"));
    assert_eq!(waited().await?, before);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_cache_asks_the_upstream_once_for_all_who_ask_together() -> anyhow::Result<()> {
    let mut origin = Origin::start().await?;
    origin.respond(counted());
    let cluster = cluster(&origin, "ttl: 1h").await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();
    for client in &clients {
        assert_eq!(text(&client.get("user/7").await?.answer), "1");
    }
    let gate = Gate::closed();
    origin.respond(counted().after(&gate));
    let reads = (0..90).map(|n| {
        let client = clients[n % 3].clone();
        tokio::spawn(async move { client.get("user/7").no_cache().timeout(30 * SECOND).await })
    });
    let reads: Vec<_> = reads.collect();
    origin.reached(2).await;
    // Others are answered meanwhile; those who ask come to the same call.
    assert_eq!(text(&clients[0].get("user/7").await?.answer), "1");
    cluster
        .until("all of them wait", async || {
            let mut waiting = 0.0;
            for node in 0..3 {
                let readers = cluster.metric(node, "holdfast_flight_readers", &[]).await;
                waiting += readers.unwrap_or_default();
            }
            waiting >= 90.0
        })
        .await?;
    gate.open();
    for read in try_join_all(reads).await? {
        let answer = read?.answer;
        ensure!(
            answer.state == State::Fresh && text(&answer) == "2",
            "{answer:?}"
        );
    }
    assert_eq!(origin.calls(), 2);

    // What is stored is not what was asked for.
    origin.stop().await?;
    let error = clients[2].get("user/7").no_cache().await.unwrap_err();
    assert_eq!(error.reason(), reason::UPSTREAM_FAILED);
    assert_eq!(text(&clients[2].get("user/7").await?.answer), "2");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_beyond_max_age_is_fetched_anew_or_not_served() -> anyhow::Result<()> {
    let mut origin = Origin::start().await?;
    origin.respond(counted());
    let cluster = cluster(&origin, "ttl: 1h").await?;
    let client = cluster.client(2);
    client.get("user/7").await?;
    client.set("plain", "mine").await?;
    cluster.advance(60 * SECOND).await?;
    let young = client.get("user/7").max_age(120 * SECOND).await?.answer;
    assert_eq!((text(&young), origin.calls()), ("1", 1));
    let cached = client.get("user/7").max_age(30 * SECOND).only_if_cached();
    assert_eq!(cached.await?.answer.state, State::Miss);
    let anew = client.get("user/7").max_age(30 * SECOND).await?.answer;
    ensure!(text(&anew) == "2" && anew.age < 30 * SECOND, "{anew:?}");

    let plain = client.get("plain").max_age(30 * SECOND).await?.answer;
    assert_eq!((plain.state, plain.value), (State::Miss, None));
    let plain = client.get("plain").max_age(120 * SECOND).await?.answer;
    assert_eq!(text(&plain), "mine");

    origin.stop().await?;
    cluster.advance(60 * SECOND).await?;
    let error = client.get("user/7").max_age(30 * SECOND).await.unwrap_err();
    assert_eq!(error.reason(), reason::UPSTREAM_FAILED);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_this_version_is_not_sent_it_again() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let client = cluster.client(0);
    let version = client.set("k", "v").await?.version;
    let same = client.get("k").if_version_not(version).await?.answer;
    ensure!(
        same.value.is_none() && same.version == version && same.state == State::Fresh,
        "{same:?}"
    );
    let other = client.get("k").if_version_not(version + 1).await?.answer;
    assert_eq!(text(&other), "v");
    client.set("k", "w").await?;
    let newer = client.get("k").if_version_not(version).await?.answer;
    assert_eq!(text(&newer), "w");
    let miss = client.get("absent").if_version_not(0).await?.answer;
    assert_eq!(miss.state, State::Miss);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_miss_that_does_not_wait_is_given_a_placeholder_and_starts_the_fetch()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let gate = Gate::closed();
    origin.respond(counted().after(&gate));
    let policy = "ttl: 1h, fetch_on_miss: async, placeholder: \"soon\"";
    let cluster = cluster(&origin, policy).await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();
    let reads = (0..60).map(|n| clients[n % 3].get("user/7").into_future());
    for read in join_all(reads).await {
        let answer = read?.answer;
        ensure!(
            answer.state == State::Placeholder && text(&answer) == "soon" && !answer.stored,
            "{answer:?}"
        );
    }
    origin.reached(1).await;
    gate.open();
    for client in &clients {
        cluster
            .until("the value is there", async || {
                let found = client.get("user/7").await;
                found.is_ok_and(|found| text(&found.answer) == "1")
            })
            .await?;
    }
    assert_eq!(origin.calls(), 1);

    let waits = clients[1].get("user/8").fetch_on_miss(FetchOnMiss::Sync);
    assert_eq!(text(&waits.await?.answer), "1");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn network_first_asks_on_every_read_and_falls_back_on_what_is_stored() -> anyhow::Result<()> {
    let mut origin = Origin::start().await?;
    origin.respond(counted());
    let policy = "ttl: 1h, read: network_first, hard_timeout: 500ms";
    let cluster = cluster(&origin, policy).await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();
    for calls in 1..=6 {
        let answer = clients[calls % 3].get("user/7").await?.answer;
        ensure!(text(&answer) == calls.to_string(), "{calls}: {answer:?}");
    }
    assert_eq!(origin.calls(), 6);
    origin.respond(Behaviour::Hang);
    let answer = clients[0].get("user/7").await?.answer;
    ensure!(
        answer.state == State::Fresh && text(&answer) == "6",
        "{answer:?}"
    );
    origin.stop().await?;
    for client in &clients {
        assert_eq!(text(&client.get("user/7").await?.answer), "6");
    }
    let error = clients[0].get("user/8").await.unwrap_err();
    assert_eq!(error.reason(), reason::UPSTREAM_FAILED);
    cluster.stop().await
}
