//! What an origin says of its values: how long they are good, and that they are still the same.

use std::time::Duration;

use anyhow::{Context, ensure};
use holdfast_client::{Answer as Found, Client, State, Ttl};
use holdfast_tests::{
    cluster::Cluster,
    origin::{Answer, Behaviour, Origin},
};

use crate::in_process;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// Upstream `users` behind the keys `user/*`, with this of their policy.
fn users(origin: &Origin, policy: &str) -> String {
    let url = origin.url("/{1}");
    format!(
        "upstreams: {{users: {{http: {{url: \"{url}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl_jitter: 0, {policy}}}]"
    )
}

async fn cluster(extra: String) -> anyhow::Result<Cluster> {
    let cluster = in_process().extra(extra).start().await?;
    cluster.until_level(2).await?;
    Ok(cluster)
}

async fn read(client: &Client, key: &str) -> anyhow::Result<Found> {
    Ok(client
        .get(key)
        .await
        .with_context(|| key.to_owned())?
        .answer)
}

/// Within what a test takes.
fn is_about(found: Option<Duration>, wanted: Duration) -> bool {
    found.is_some_and(|found| found <= wanted && found + 10 * SECOND >= wanted)
}

fn ttl(answer: &Found) -> Option<Duration> {
    match answer.ttl? {
        Ttl::Left(left) => Some(left),
        Ttl::Past(_) => Some(Duration::ZERO),
    }
}

async fn commits(cluster: &Cluster, outcome: &str) -> anyhow::Result<f64> {
    let mut commits = 0.0;
    for node in 0..cluster.len() {
        let label = format!("outcome=\"{outcome}\"");
        commits += cluster
            .metric(node, "holdfast_commits_total", &[&label])
            .await?;
    }
    Ok(commits)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origins_lifetime_counts_within_the_policys_bounds() -> anyhow::Result<()> {
    let hour = 60 * MINUTE;
    // By key: what the origin says, then for how long the value is fresh and for how long served.
    let said = [
        ("nothing", vec![], 10 * MINUTE, 30 * MINUTE),
        (
            "max-age",
            vec![("cache-control", "max-age=900")],
            15 * MINUTE,
            35 * MINUTE,
        ),
        (
            "shared",
            vec![("cache-control", "max-age=9, s-maxage=900")],
            15 * MINUTE,
            35 * MINUTE,
        ),
        (
            "short",
            vec![("cache-control", "max-age=1")],
            5 * MINUTE,
            25 * MINUTE,
        ),
        (
            "long",
            vec![("cache-control", "max-age=86400")],
            hour,
            hour + 20 * MINUTE,
        ),
        (
            "senseless",
            vec![("cache-control", "max-age=1w")],
            5 * MINUTE,
            25 * MINUTE,
        ),
        (
            "aged",
            vec![("cache-control", "max-age=900"), ("age", "300")],
            10 * MINUTE,
            30 * MINUTE,
        ),
        (
            "expires",
            vec![
                ("date", "Fri, 31 Dec 1999 23:00:00 GMT"),
                ("expires", "Fri, 31 Dec 1999 23:20:00 GMT"),
            ],
            20 * MINUTE,
            40 * MINUTE,
        ),
        (
            "windows",
            vec![(
                "cache-control",
                "max-age=900, stale-while-revalidate=60, stale-if-error=120",
            )],
            15 * MINUTE,
            17 * MINUTE,
        ),
        (
            "strict",
            vec![("cache-control", "max-age=900, must-revalidate")],
            15 * MINUTE,
            15 * MINUTE,
        ),
    ];
    let origin = Origin::start().await?;
    for (key, headers, ..) in &said {
        let answer = headers
            .iter()
            .fold(Answer::text("v"), |answer, (name, value)| {
                answer.header(name, *value)
            });
        origin.respond_at(&format!("/{key}"), Behaviour::Answer(answer));
    }
    let bounds = "ttl: 10min, min_ttl: 5min, max_ttl: 1h, stale_while_revalidate: 10min, stale_if_error: 20min";
    let cluster = cluster(users(&origin, bounds)).await?;
    let client = cluster.client(0);
    for (key, _, fresh, served) in &said {
        let answer = read(&client, &format!("user/{key}")).await?;
        ensure!(
            answer.state == State::Fresh
                && is_about(ttl(&answer), *fresh)
                && is_about(answer.expires_in, *served),
            "{key}: {answer:?}"
        );
    }
    let aged = read(&client, "user/aged").await?.age;
    ensure!(aged >= 300 * SECOND, "it was old when it came: {aged:?}");
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_origin_that_is_to_be_ignored_is() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let strict = Answer::text("v").header("cache-control", "no-store, must-revalidate, max-age=1");
    origin.respond(Behaviour::Answer(strict.header("age", "7")));
    let policy = "origin: ignore, ttl: 10min, stale_if_error: 20min";
    let cluster = cluster(users(&origin, policy)).await?;
    let answer = read(&cluster.client(0), "user/7").await?;
    ensure!(
        answer.stored
            && is_about(ttl(&answer), 10 * MINUTE)
            && is_about(answer.expires_in, 30 * MINUTE)
            && answer.age < 7 * SECOND,
        "{answer:?}"
    );
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_must_not_be_stored_is_for_those_who_waited_and_takes_the_place_of_nothing()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    let secret = Answer::text("not for you").header("cache-control", "no-store");
    origin.respond(Behaviour::Answer(secret.clone()));
    let policy = "ttl: 1min, soft_timeout: 0s";
    let cluster = cluster(users(&origin, policy)).await?;
    let client = cluster.client(1);
    for calls in 1..=2 {
        let answer = read(&client, "user/7").await?;
        ensure!(
            !answer.stored && answer.value.as_deref() == Some(b"not for you"),
            "{answer:?}"
        );
        assert_eq!(origin.calls(), calls);
    }
    origin.respond(Behaviour::text("for all"));
    let kept = read(&client, "user/8").await?;
    origin.respond(Behaviour::Answer(secret));
    cluster.advance(2 * MINUTE).await?;
    cluster
        .until("its reader learns why there is no other", async || {
            read(&client, "user/8").await.is_ok_and(|answer| {
                answer
                    .last_error
                    .is_some_and(|error| error.class == "NO_STORE")
            })
        })
        .await?;
    let answer = read(&client, "user/8").await?;
    ensure!(
        answer.value.as_deref() == Some(b"for all") && answer.version == kept.version,
        "{answer:?}"
    );
    cluster.stop().await
}

/// From its refresh to after its end, by a 304 and by an equal value.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_that_is_still_the_same_gets_new_times_and_no_new_version() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond_at(
        "/named",
        Behaviour::compute(|_, call| match call {
            1 => Answer::text("v").header("etag", "\"1\""),
            _ => Answer::new(304, "text/plain", "").header("etag", "\"1\""),
        }),
    );
    origin.respond_at("/plain", Behaviour::text("v"));
    let policy = "ttl: 1min, stale_while_revalidate: 1min, stale_if_error: 2min, keep: 1h";
    let cluster = cluster(users(&origin, policy)).await?;
    let client = cluster.client(2);
    let mut calls = 0;
    for key in ["named", "plain"] {
        let (path, key) = (format!("/{key}"), format!("user/{key}"));
        let first = read(&client, &key).await?;
        cluster.advance(MINUTE).await?;
        let stale = read(&client, &key).await?;
        // The refresh ahead may be sooner than this reader.
        ensure!(
            [State::Stale, State::Fresh].contains(&stale.state),
            "{stale:?}"
        );
        cluster
            .until("it is fresh again", async || {
                let answer = read(&client, &key).await;
                answer.is_ok_and(|answer| answer.state == State::Fresh)
            })
            .await?;
        let again = read(&client, &key).await?;
        ensure!(
            again.version == first.version && again.age < 10 * SECOND && again.value == first.value,
            "{again:?}"
        );
        assert_eq!(origin.calls_of(&path), 2);
        calls += 1;
        assert_eq!(commits(&cluster, "revalidated").await? as u64, calls);
    }
    let sent = origin.requests();
    let asked = sent
        .iter()
        .filter_map(|sent| sent.headers.get("if-none-match"));
    assert_eq!(asked.collect::<Vec<_>>(), ["\"1\""]);

    // After its end: what has a name is kept, and what has none is gone.
    cluster.advance(30 * MINUTE).await?;
    let swept =
        async || Ok::<_, anyhow::Error>(client.inspect("user/plain").await?.entry.is_none());
    cluster
        .until("what cannot be asked about is swept", async || {
            swept().await.unwrap_or(false)
        })
        .await?;
    let missed = read(&client, "user/named").await?;
    ensure!(
        missed.state == State::Fresh && missed.value.as_deref() == Some(b"v") && missed.stored,
        "{missed:?}"
    );
    let last = origin.last_request().context("a call")?;
    assert_eq!(last.headers["if-none-match"], "\"1\"");
    assert_eq!(commits(&cluster, "stored").await? as u64, 2);
    cluster.stop().await
}
