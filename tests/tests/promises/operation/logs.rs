//! What nodes say of themselves where nobody looks at a terminal: JSON, and nobody's data.

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::v1::Consistency;
use holdfast_tests::{
    origin::{Behaviour, Origin},
    wire::text,
};
use tracing::info;

use crate::processes;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn logs_are_one_json_object_a_line_and_show_no_value_and_no_key() -> anyhow::Result<()> {
    const HIDDEN: [&str; 3] = [
        "a-value-of-nobodys-business",
        "a-fetched-value-of-nobodys-business",
        "key-of-nobodys-business",
    ];
    let [value, fetched, key] = HIDDEN;
    let origin = Origin::start().await?;
    origin.respond(Behaviour::text(fetched));
    origin.respond_at(
        &format!("/users/broken-{key}"),
        Behaviour::json(format!("{{\"{fetched}")),
    );
    origin.respond_at(&format!("/users/closed-{key}"), Behaviour::Close);
    let extra = format!(
        "upstreams: {{users: {{http: {{url: \"{}\"}}}}}}\npolicies: [{{match: \"user/*\", upstream: users, ttl: 1s}}]",
        origin.url("/users/{1}")
    );
    let mut cluster = processes().extra(extra).configure()?;
    // The first one says what nodes say by default, the others all that they can, but for the
    // agreement and the transport.
    cluster.start_node(0).await?;
    for node in 1..3 {
        cluster
            .start_with(node, &["env", "RUST_LOG=trace,openraft=info,h2=info"])
            .await?;
    }
    for node in 0..3 {
        cluster.ready(node).await?;
    }
    cluster.leader_of(&[0, 1, 2]).await?;

    info!("--- all that goes well, and much that does not");
    for (node, wire) in cluster.wires()?.into_iter().enumerate() {
        let client = cluster.client(node);
        wire.set(key, value, None).await?;
        ensure!(
            text(
                &wire
                    .get(key, Consistency::Linearizable, &Bytes::new())
                    .await?
            ) == value
        );
        ensure!(client.set(key, value).if_version(9_999).await.is_err());
        ensure!(client.scan().prefix(key).limit(10).await?.entries.len() == 1);
        client.inspect(key).await?;
        ensure!(
            text(
                &wire
                    .get(&format!("user/{key}"), Consistency::Session, &Bytes::new())
                    .await?
            ) == fetched
        );
        ensure!(
            wire.get(
                &format!("user/broken-{key}"),
                Consistency::Session,
                &Bytes::new()
            )
            .await
            .is_err()
        );
        ensure!(
            wire.get(
                &format!("user/closed-{key}"),
                Consistency::Session,
                &Bytes::new()
            )
            .await
            .is_err()
        );
        ensure!(
            wire.set(&key.repeat(100), value, None).await.is_err(),
            "too long a key"
        );
        wire.invalidate(key, None).await?;
        wire.delete(key, None).await?;
    }
    let leader = cluster.leader().await?;
    ensure!(cluster.stop_node(leader).await? == Some(0));
    for node in (0..3).filter(|&node| node != leader) {
        ensure!(cluster.stop_node(node).await? == Some(0));
    }

    info!("--- what they said");
    for node in 0..3 {
        let log = cluster.log_of(node);
        for line in log.lines() {
            checked_event(line).with_context(|| format!("{}: `{line}`", cluster.name(node)))?;
            for hidden in HIDDEN {
                ensure!(
                    !line.contains(hidden),
                    "{} shows `{hidden}`: {line}",
                    cluster.name(node)
                );
            }
        }
        for said in [
            "listening",
            "this node belongs to a cluster",
            "stopping",
            "stopped",
        ] {
            ensure!(
                log.contains(&format!("\"message\":\"{said}\"")),
                "{} does not say `{said}`",
                cluster.name(node)
            );
        }
        ensure!(
            log.contains("\"level\":\"TRACE\"") == (node != 0),
            "{} says more or less than it was told to",
            cluster.name(node)
        );
    }
    Ok(())
}

/// One line of a log: an object with an instant, a level, what it is about, and words.
fn checked_event(line: &str) -> anyhow::Result<()> {
    let event: serde_json::Value = serde_json::from_str(line).context("no JSON")?;
    let has = |name: &str| {
        event[name]
            .as_str()
            .filter(|text| !text.is_empty())
            .with_context(|| format!("no {name}"))
    };
    ensure!(
        ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&has("level")?),
        "no level"
    );
    ensure!(has("timestamp")?.ends_with('Z'), "no instant");
    // Others' crates may have fields instead of words.
    if has("target")?.starts_with("holdfast") {
        has("message")?;
    }
    Ok(())
}
