//! When the upstream fails: the last good value goes on being served and is never touched, a
//! failure is told by its class, tried again only when it is time, and shows no credential
//! anywhere.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_client::{Client, State};
use holdfast_proto::{reason, v1::Consistency};
use holdfast_raft::Clock;
use holdfast_tests::{
    cluster::Cluster,
    origin::{Answer, Behaviour, Origin},
    wire::{Told, Wire},
};
use tokio::task::JoinSet;
use tonic::Code;
use tracing::info;

use crate::{in_process, processes};

const SECRET: &str = "hunter2-is-a-planted-secret";

/// Upstream `users` behind the keys `user/*`. `http` is further fields of the upstream, `policy` of
/// its policy.
fn users(origin: &Origin, http: &str, policy: &str) -> String {
    let url = origin.url("/users/{1}");
    format!(
        "upstreams: {{users: {{http: {{url: \"{url}\", {http}}}, fetch_timeout: 4s}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl_jitter: 0, {policy}}}]"
    )
}

async fn reads_waited(cluster: &Cluster) -> anyhow::Result<f64> {
    let mut waited = 0.0;
    for node in 0..cluster.len() {
        waited += cluster
            .metric(node, "holdfast_reads_waited_total", &[])
            .await?;
    }
    Ok(waited)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_go_on_with_the_last_value_while_the_upstream_is_gone_and_get_its_next_one()
-> anyhow::Result<()> {
    const MINUTE: Duration = Duration::from_secs(60);
    let mut origin = Origin::start().await?;
    origin.respond(Behaviour::text("good"));
    let policy = "ttl: 1min, stale_while_revalidate: 10min, stale_if_error: 1h";
    let cluster = in_process()
        .extra(users(&origin, "", policy))
        .start()
        .await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();
    let real = Clock::system();
    let good = clients[0].get("user/7").await?;
    assert_eq!(
        (good.answer.state, good.answer.value.as_deref()),
        (State::Fresh, Some(&b"good"[..]))
    );
    let version = good.answer.version;
    for client in &clients {
        client.see(&good.token);
        assert_eq!(client.get("user/7").await?.answer.state, State::Fresh);
    }

    info!("--- the upstream dies; the value gets stale");
    origin.stop().await?;
    let waited = reads_waited(&cluster).await?;
    let mut moved = 2 * MINUTE;
    cluster.advance(moved).await?;
    let is_last = |answer: &holdfast_client::Answer, state: State, moved: Duration| {
        let elapsed = real.monotonic();
        ensure!(
            (answer.state, answer.value.as_deref()) == (state, Some(&b"good"[..])),
            "{answer:?}"
        );
        ensure!(answer.version == version, "the version changed: {answer:?}");
        ensure!(
            answer.age >= moved && answer.age <= moved + elapsed + Duration::from_secs(1),
            "{moved:?} and {elapsed:?} on: {answer:?}"
        );
        ensure!(
            matches!(answer.ttl, Some(holdfast_client::Ttl::Past(past)) if past + MINUTE <= answer.age),
            "{answer:?}"
        );
        anyhow::Ok(())
    };
    for client in &clients {
        is_last(&client.get("user/7").await?.answer, State::Stale, moved)?;
        cluster
            .until("a reader learns of the failure", async || {
                client.get("user/7").await.is_ok_and(|found| {
                    found
                        .answer
                        .last_error
                        .is_some_and(|error| error.class == "CONNECT")
                })
            })
            .await?;
        let found = client.get("user/7").await?;
        is_last(&found.answer, State::Stale, moved)?;
        let error = found
            .answer
            .last_error
            .context("the failure goes on being told")?;
        ensure!(
            error.count >= 1 && error.next_attempt > error.at,
            "{error:?}"
        );
    }
    assert_eq!(
        reads_waited(&cluster).await?,
        waited,
        "nobody waits for a value inside its stale window"
    );

    info!("--- and past stale-while-revalidate it is better than nothing");
    cluster.advance(10 * MINUTE).await?;
    moved += 10 * MINUTE;
    for _ in 0..10 {
        for client in &clients {
            is_last(
                &client.get("user/7").await?.answer,
                State::StaleOnError,
                moved,
            )?;
        }
    }

    info!("--- the upstream is back");
    origin.restart()?;
    origin.respond(Behaviour::text("better"));
    // Past the longest delay between two tries.
    cluster.advance(MINUTE).await?;
    for client in &clients {
        let mut last = None;
        cluster
            .until("a reader gets the next value", async || {
                last = client.get("user/7").await.ok().map(|found| found.answer);
                last.as_ref()
                    .is_some_and(|answer| answer.state == State::Fresh)
            })
            .await?;
        let answer = last.context("an answer")?;
        ensure!(
            answer.value.as_deref() == Some(&b"better"[..])
                && answer.version > version
                && answer.last_error.is_none(),
            "{answer:?}"
        );
    }
    cluster.stop().await
}

/// Past stale-while-revalidate a reader gives a better value a moment, and only a moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p2_a_hanging_upstream_holds_no_reader_up_for_longer_than_soft_timeout()
-> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text("good"));
    let policy = "ttl: 1min, stale_while_revalidate: 1min, stale_if_error: 1h, soft_timeout: 50ms, hard_timeout: 60s";
    let upstream = users(&origin, "", policy).replace("fetch_timeout: 4s", "fetch_timeout: 60s");
    let mut cluster = in_process().extra(upstream).start().await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();
    let quiet = clients[0].get("user/quiet").await?;
    let good = clients[0].get("user/7").await?;
    for client in &clients {
        client.see(&quiet.token);
        client.see(&good.token);
        client.get("user/7").await?;
    }
    origin.respond(Behaviour::Hang);
    cluster.advance(Duration::from_secs(240)).await?;
    let (waited, before) = (reads_waited(&cluster).await?, cluster.terms().await?);
    for client in &clients {
        for _ in 0..100 {
            // The fetch takes a minute, a miss would wait as long.
            let found = tokio::time::timeout(Duration::from_secs(4), client.get("user/7"))
                .await
                .context("a reader is held up")??;
            ensure!(
                found.answer.state == State::StaleOnError
                    && found.answer.version == good.answer.version,
                "{:?}",
                found.answer
            );
        }
    }
    // Those who came in the first 50 ms, on each node.
    let waited = reads_waited(&cluster).await? - waited;
    ensure!(
        (1.0..=30.0).contains(&waited),
        "{waited} of 300 readers waited"
    );
    ensure!(
        (2..=2 + cluster.terms().await? - before).contains(&origin.calls_of("/users/7")),
        "{} calls",
        origin.calls()
    );

    info!("--- without a leader nobody waits: nobody fetches");
    let survivor = cluster.follower().await?;
    for node in (0..3).filter(|&node| node != survivor) {
        cluster.stop_node(node).await?;
    }
    cluster
        .until("nobody leads", async || {
            matches!(cluster.admin(survivor, "/readyz/write").await, Ok((503, _)))
        })
        .await?;
    // Set at the last moment, the others never heard of a failure or a flight of it.
    let waited = cluster
        .metric(survivor, "holdfast_reads_waited_total", &[])
        .await?;
    for _ in 0..20 {
        let found = clients[survivor].get("user/quiet").await?;
        ensure!(
            found.answer.state == State::StaleOnError,
            "{:?}",
            found.answer
        );
    }
    ensure!(
        cluster
            .metric(survivor, "holdfast_reads_waited_total", &[])
            .await?
            == waited,
        "a reader waited for nobody"
    );
    drop(origin);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p3_no_failed_or_partial_fetch_touches_what_is_stored() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::json(r#"{"name": "good", "plan": "gold"}"#));
    let upstream = users(
        &origin,
        "select: [name]",
        "ttl: 1min, stale_while_revalidate: 1d, retry_cap: 30s",
    );
    let cluster = in_process().extra(upstream).start().await?;
    let clients: Vec<Client> = (0..3).map(|node| cluster.client(node)).collect();

    let bad = || Answer::json(r#"{"name": "bad"}"#);
    let ways: BTreeMap<&str, (Behaviour, &str)> = BTreeMap::from([
        ("hanging", (Behaviour::Hang, "TIMEOUT")),
        (
            "500",
            (
                Behaviour::Answer(Answer {
                    status: 500,
                    ..bad()
                }),
                "STATUS",
            ),
        ),
        (
            "404",
            (
                Behaviour::Answer(Answer {
                    status: 404,
                    ..bad()
                }),
                "STATUS",
            ),
        ),
        (
            "206",
            (
                Behaviour::Answer(Answer {
                    status: 206,
                    ..bad()
                }),
                "STATUS",
            ),
        ),
        (
            "broken",
            (Behaviour::json(r#"{"name": "bad""#), "MALFORMED"),
        ),
        (
            "missing",
            (Behaviour::json(r#"{"plan": "bad"}"#), "MISSING_FIELD"),
        ),
        // What came of it is whole JSON.
        (
            "cut-short",
            (
                Behaviour::CutShort {
                    content_length: 1_000,
                    answer: bad(),
                },
                "INCOMPLETE",
            ),
        ),
        (
            "endless",
            (
                Behaviour::Stream {
                    content_type: "application/json".to_owned(),
                    bytes: 100 << 20,
                },
                "TOO_LARGE",
            ),
        ),
        (
            "too-large",
            (
                Behaviour::json(format!(r#"{{"name": "{}"}}"#, "x".repeat(2 << 20))),
                "TOO_LARGE",
            ),
        ),
        ("closed", (Behaviour::Close, "INCOMPLETE")),
    ]);
    let mut stored = BTreeMap::new();
    for way in ways.keys() {
        let good = clients[0].get(format!("user/{way}")).await?;
        ensure!(
            good.answer.value.as_deref() == Some(&br#"{"name":"good"}"#[..]),
            "{way}: {:?}",
            good.answer
        );
        stored.insert(
            *way,
            clients[0]
                .inspect(format!("user/{way}"))
                .await?
                .entry
                .context("an entry")?,
        );
        clients.iter().for_each(|client| client.see(&good.token));
    }

    info!("--- from here on the upstream fails, each key in its way, twice");
    for (way, (behaviour, _)) in &ways {
        origin.respond_at(&format!("/users/{way}"), behaviour.clone());
    }
    for round in 1..=2u64 {
        cluster.advance(Duration::from_secs(90)).await?;
        for (way, (_, class)) in &ways {
            let key = format!("user/{way}");
            for client in &clients {
                let still_good = |answer: &holdfast_client::Answer| {
                    answer.value.as_deref() == Some(&br#"{"name":"good"}"#[..])
                        && answer.version == stored[way].version
                        && answer.state == State::Stale
                };
                let mut last = None;
                cluster
                    .until(&format!("{way}: failure {round} is {class}"), async || {
                        last = client.get(&key).await.ok().map(|found| found.answer);
                        let Some(answer) = &last else { return true };
                        !still_good(answer)
                            || answer.last_error.as_ref().is_some_and(|error| {
                                error.class == *class && u64::from(error.count) >= round
                            })
                    })
                    .await?;
                let answer = last.with_context(|| format!("{way}: a reader got an error"))?;
                ensure!(still_good(&answer), "{way}: {answer:?}");
            }
        }
    }
    for (way, before) in &stored {
        let after = clients[1]
            .inspect(format!("user/{way}"))
            .await?
            .entry
            .context("an entry")?;
        assert_eq!(&after, before, "{way}: something stored has changed");
    }
    cluster.stop().await
}

/// What a Get of a key says that cannot be had.
async fn refused(wire: &Wire, key: &str) -> anyhow::Result<Told> {
    let status = wire
        .get(key, Consistency::Session, &Bytes::new())
        .await
        .err()
        .with_context(|| format!("`{key}` was answered"))?;
    ensure!(
        !format!("{status:?}").contains(SECRET),
        "an answer shows the credential"
    );
    let told = Told::of(&status);
    ensure!(
        !format!("{told:?}").contains(SECRET),
        "an answer shows the credential"
    );
    ensure!(
        (told.code, &*told.reason) == (Code::Unavailable, reason::UPSTREAM_FAILED),
        "`{key}`: {told:?}"
    );
    ensure!(
        told.metadata(reason::UPSTREAM) == "users",
        "`{key}`: {told:?}"
    );
    Ok(told)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_miss_that_failed_is_told_from_memory_until_error_ttl_is_over() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::status(503));
    let cluster = in_process()
        .extra(users(
            &origin,
            "",
            "ttl: 1min, error_ttl: 10min, hard_timeout: 60s",
        ))
        .start()
        .await?;
    // A thousand at once take their time on a busy machine; none of it is the upstream's.
    let wires: Vec<Wire> = cluster
        .wires()?
        .into_iter()
        .map(|wire| wire.within(Duration::from_secs(60)))
        .collect();
    let before = cluster.terms().await?;
    let told = refused(&wires[1], "user/7").await?;
    assert_eq!(
        (told.metadata(reason::CLASS), told.metadata(reason::STATUS)),
        ("STATUS", "503")
    );
    let mut readers = JoinSet::new();
    for wire in wires.iter().cloned().cycle().take(1_000) {
        readers.spawn(async move { refused(&wire, "user/7").await });
    }
    while let Some(told) = readers.join_next().await {
        assert_eq!(told??.metadata(reason::CLASS), "STATUS");
    }
    let calls = origin.calls();
    ensure!(
        calls <= 1 + cluster.terms().await? - before,
        "{calls} calls for a thousand reads"
    );

    info!("--- once error_ttl is over it is tried again, once");
    cluster.advance(Duration::from_secs(601)).await?;
    refused(&wires[2], "user/7").await?;
    refused(&wires[0], "user/7").await?;
    ensure!(
        origin.calls() > calls && origin.calls() <= 2 + cluster.terms().await? - before,
        "{} calls",
        origin.calls()
    );

    info!("--- and a client's own value is not kept from anybody by it");
    origin.respond(Behaviour::text("fetched"));
    let set = wires[0].set("user/7", "set", None).await?;
    let found = wires[1]
        .get("user/7", Consistency::Session, &set.token)
        .await?;
    assert_eq!(holdfast_tests::wire::text(&found), "set");
    cluster.stop().await
}

/// Files that hold the words, whatever else is in them.
fn files_with(directory: &Path, words: &str, found: &mut Vec<String>) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            files_with(&path, words, found)?;
        } else if std::fs::read(&path)?
            .windows(words.len())
            .any(|window| window == words.as_bytes())
        {
            found.push(path.display().to_string());
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p8_an_upstreams_credential_is_in_no_answer_log_metric_or_file() -> anyhow::Result<()> {
    const MARK: &str = "a-value-that-is-stored";
    let origin = Origin::start().await?;
    let secrets = tempfile::tempdir()?;
    let file = secrets.path().join("token");
    std::fs::write(&file, SECRET)?;
    let header = "headers: {authorization: \"Bearer ${secret:token}\"}";
    let upstream = users(&origin, header, "ttl: 1s, error_ttl: 10min");
    let extra = format!(
        "secrets: {{token: {{file: \"{}\"}}}}\n{upstream}",
        file.display()
    );
    let mut cluster = processes().extra(extra).configure()?;
    for node in 0..3 {
        // As talkative as they can be made, but for the agreement, which knows no upstream.
        cluster
            .start_with(
                node,
                &["env", "RUST_LOG=trace,openraft=info,h2=info,rustls=info"],
            )
            .await?;
    }
    for node in 0..3 {
        cluster.ready(node).await?;
    }
    cluster.leader().await?;

    info!("--- an upstream that tells everybody what it was sent, and fails in every way");
    let telling = format!("you sent Bearer {SECRET}");
    let with_user = origin
        .url("/elsewhere")
        .replace("http://", &format!("http://me:{SECRET}@"));
    let ways = [
        (
            "500",
            Behaviour::Answer(
                Answer::new(500, "text/plain", telling.clone()).header("x-sent", telling.clone()),
            ),
            "STATUS",
        ),
        (
            "broken",
            Behaviour::json(format!("{{\"sent\": \"{SECRET}")),
            "MALFORMED",
        ),
        (
            "cut-short",
            Behaviour::CutShort {
                content_length: 9_999,
                answer: Answer::text(telling.clone()),
            },
            "INCOMPLETE",
        ),
        ("redirect", Behaviour::redirect(302, with_user), "REDIRECT"),
        (
            "nonsense",
            Behaviour::Raw(telling.clone().into()),
            "INCOMPLETE",
        ),
    ];
    for (way, behaviour, _) in &ways {
        origin.respond_at(&format!("/users/{way}"), behaviour.clone());
    }
    let mut shown = Vec::new();
    for node in 0..3 {
        for (way, _, class) in &ways {
            let key = format!("user/{way}");
            assert_eq!(
                refused(&cluster.wire(node)?, &key)
                    .await?
                    .metadata(reason::CLASS),
                *class,
                "{way}"
            );
            for output in ["table", "json"] {
                let asked = cluster.holdfast(node, &["get", &key, "-o", output])?;
                assert_eq!(
                    asked.status.code(),
                    Some(4),
                    "{}",
                    String::from_utf8_lossy(&asked.stderr)
                );
                shown.extend([asked.stdout, asked.stderr]);
                shown.push(
                    cluster
                        .holdfast(node, &["inspect", &key, "-o", output])?
                        .stdout,
                );
            }
        }
    }
    assert_eq!(
        origin.last_request().context("a call")?.headers["authorization"],
        format!("Bearer {SECRET}")
    );

    info!("--- a value that is stored, and whose refresh fails");
    origin.respond_at("/users/good", Behaviour::text(MARK));
    assert_eq!(
        cluster
            .client(0)
            .get("user/good")
            .await?
            .answer
            .value
            .as_deref(),
        Some(MARK.as_bytes())
    );
    origin.respond_at("/users/good", ways[0].1.clone());
    let client = cluster.client(0);
    let has_failed = async || {
        client
            .get("user/good")
            .await
            .is_ok_and(|found| found.answer.last_error.is_some())
    };
    cluster.until("the refresh fails", has_failed).await?;
    for node in 0..3 {
        shown.push(
            cluster
                .holdfast(node, &["inspect", "user/good", "-o", "json"])?
                .stdout,
        );
        shown.push(
            cluster
                .holdfast(node, &["cluster", "status", "-o", "json"])?
                .stdout,
        );
        shown.push(cluster.admin(node, "/metrics").await?.1.into());
        assert!(
            cluster
                .metric(node, "holdfast_upstream_calls_total", &[])
                .await?
                >= 0.0
        );
    }
    for shown in shown {
        let shown = String::from_utf8_lossy(&shown);
        ensure!(!shown.contains(SECRET), "the credential is in: {shown}");
    }

    info!("--- the files: logs, data, everything");
    for node in 0..3 {
        assert_eq!(cluster.stop_node(node).await?, Some(0));
        ensure!(
            cluster.log_of(node).contains("TRACE"),
            "{} logged nothing of detail",
            cluster.name(node)
        );
    }
    let (mut with_secret, mut with_value) = (Vec::new(), Vec::new());
    files_with(cluster.dir(), SECRET, &mut with_secret)?;
    files_with(cluster.dir(), MARK, &mut with_value)?;
    ensure!(
        with_secret.is_empty(),
        "the credential is in {with_secret:?}"
    );
    ensure!(
        !with_value.is_empty() || cfg!(not(feature = "rocksdb")),
        "not even the value was found: the search finds nothing"
    );
    Ok(())
}
