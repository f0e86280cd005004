//! What an upstream sends with a status that says all is well, and is no value all the same: it
//! replaces nothing, and whoever asks is told why.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, ensure};
use holdfast_client::State;
use holdfast_tests::origin::{Answer, Behaviour, Origin};
use tracing::info;

use crate::in_process;

/// Keys `any/*` by the defaults; `strict/*` take JSON only, and keep what they have over nothing.
fn rules(origin: &Origin) -> String {
    let url = origin.url("/{1}");
    let times = "ttl: 1min, ttl_jitter: 0, stale_while_revalidate: 1d, retry_cap: 30s";
    format!(
        "upstreams: {{u: {{http: {{url: \"{url}\"}}}}}}\npolicies:\n- {{match: \"any/*\", upstream: u, {times}}}\n- {{match: \"strict/*\", upstream: u, {times}, accept: [application/json], on_empty: keep_old}}\n"
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_value_though_the_status_is_fine_replaces_nothing() -> anyhow::Result<()> {
    let origin = Origin::start().await?;
    origin.respond(Behaviour::json(r#"{"good": 1}"#));
    let cluster = in_process().extra(rules(&origin)).start().await?;
    let client = cluster.client(0);

    let status = |status| Behaviour::Answer(Answer::new(status, "application/json", "{}"));
    let raw = |text: &str| Behaviour::Raw(text.to_owned().into());
    let login = || Behaviour::Answer(Answer::new(200, "text/html", "<h1>please log in first"));
    let ways: BTreeMap<&str, (Behaviour, &str)> = BTreeMap::from([
        ("any/accepted", (status(202), "STATUS")),
        ("any/no-content", (status(204), "STATUS")),
        ("any/reset-content", (status(205), "STATUS")),
        ("any/login-page", (login(), "CONTENT_TYPE")),
        ("any/no-json", (Behaviour::json(""), "MALFORMED")),
        (
            "any/http-1.0",
            (raw("HTTP/1.0 200 OK\r\n\r\n{\"good\""), "INCOMPLETE"),
        ),
        (
            "any/closed",
            (
                raw("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}"),
                "INCOMPLETE",
            ),
        ),
        (
            "any/elsewhere",
            (
                Behaviour::redirect(302, "http://elsewhere.invalid/"),
                "REDIRECT",
            ),
        ),
        (
            "any/brotli",
            (
                Behaviour::Answer(Answer::json("{}").header("content-encoding", "br")),
                "MALFORMED",
            ),
        ),
        ("strict/text", (Behaviour::text("{}"), "CONTENT_TYPE")),
        ("strict/empty", (Behaviour::text(""), "EMPTY")),
    ]);
    let mut stored = BTreeMap::new();
    for key in ways.keys() {
        client.get(*key).await?;
        let entry = client.inspect(*key).await?.entry.context("an entry")?;
        stored.insert(*key, entry);
    }

    info!("--- from here on nothing that comes is wanted");
    for (key, (behaviour, _)) in &ways {
        let (_, path) = key.split_once('/').context("a path")?;
        origin.respond_at(&format!("/{path}"), behaviour.clone());
    }
    cluster.advance(Duration::from_secs(90)).await?;
    for (key, (_, class)) in &ways {
        let mut seen = None;
        cluster
            .until(&format!("{key} failed as {class}"), async || {
                let answer = client.get(*key).await.ok().map(|found| found.answer);
                let class_seen = answer.as_ref().and_then(|answer| {
                    let error = answer.last_error.as_ref()?;
                    Some(error.class.clone())
                });
                seen = answer;
                class_seen.is_some_and(|seen| seen == *class)
            })
            .await?;
        let answer = seen.context("an answer")?;
        ensure!(
            answer.value.as_deref() == Some(&br#"{"good": 1}"#[..]) && answer.state == State::Stale,
            "{key}: {answer:?}"
        );
        let entry = client.inspect(*key).await?.entry.context("an entry")?;
        assert_eq!(entry, stored[key], "{key}: something stored has changed");
    }

    info!("--- and what is new is a value where it may be one");
    origin.respond_at("/login", login());
    let page = client.get("any/login").await?;
    assert_eq!(page.answer.content_type.as_deref(), Some("text/html"));
    origin.respond_at("/nothing", Behaviour::text(""));
    let nothing = client.get("any/nothing").await?;
    assert_eq!(
        (nothing.answer.state, nothing.answer.value.as_deref()),
        (State::Fresh, Some(&b""[..]))
    );
    cluster.stop().await
}
