//! What operators touch, on whole clusters: health, probes, services and reflection, metrics, logs,
//! deadlines, and a stop.

mod deadlines;
mod exposition;
mod logs;
mod metrics;
mod probes;
mod services;

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use holdfast_proto::v1::Consistency;
use holdfast_tests::{
    cluster::{http_get, until},
    wire::text,
    writes::Writes,
};
use tokio::task::JoinHandle;
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::v1 as reflection;
use tracing::info;

use crate::{in_process, processes};

const SERVICES: [&str; 3] = ["", "holdfast.v1.CacheService", "holdfast.v1.ClusterService"];
/// For the way there and back on a busy machine.
const SLACK: Duration = Duration::from_millis(300);
const STOP_MAX: Duration = Duration::from_secs(10);

async fn health(channel: &Channel, service: &str) -> Result<ServingStatus, Status> {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    Ok(HealthClient::new(channel.clone())
        .check(request)
        .await?
        .into_inner()
        .status())
}

async fn until_serving(channel: &Channel, service: &str) -> anyhow::Result<()> {
    until("the node is serving", async || {
        health(channel, service)
            .await
            .is_ok_and(|status| status == ServingStatus::Serving)
    })
    .await
}

/// All that a health watch is told, once it has ended. It has begun when this returns, on a node
/// that is serving.
async fn watch_health(channel: &Channel) -> anyhow::Result<JoinHandle<Vec<ServingStatus>>> {
    until_serving(channel, "").await?;
    let mut watch = HealthClient::new(channel.clone())
        .watch(HealthCheckRequest::default())
        .await?
        .into_inner();
    let mut told = vec![
        watch
            .message()
            .await?
            .context("a health watch says at once how it is")?
            .status(),
    ];
    Ok(tokio::spawn(async move {
        while let Ok(Some(said)) = watch.message().await {
            told.push(said.status());
        }
        told
    }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_serving_while_nobody_leads_and_not_while_a_node_stops() -> anyhow::Result<()> {
    let mut cluster = in_process().start().await?;
    let survivor = cluster.follower().await?;
    let token = cluster.wire(survivor)?.set("k", "kept", None).await?.token;
    let wire = cluster.wire(survivor)?.once();
    ensure!(text(&wire.get("k", Consistency::Session, &token).await?) == "kept");
    let door = cluster.channel(survivor);
    for service in SERVICES {
        until_serving(&door, service).await?;
    }
    ensure!(
        health(&door, "holdfast.peer.v1.ReplicaService")
            .await
            .is_err_and(|status| status.code() == Code::NotFound)
    );
    let watched = watch_health(&door).await?;

    info!("--- two of three are gone");
    for node in (0..3).filter(|&node| node != survivor) {
        cluster.stop_node(node).await?;
    }
    cluster
        .until("nobody leads", async || {
            matches!(cluster.admin(survivor, "/readyz/write").await, Ok((503, _)))
        })
        .await?;
    for service in SERVICES {
        ensure!(
            health(&door, service).await? == ServingStatus::Serving,
            "`{service}` is not serving"
        );
    }
    for consistency in [Consistency::Local, Consistency::Session] {
        ensure!(
            text(&wire.get("k", consistency, &Bytes::new()).await?) == "kept",
            "{consistency:?}"
        );
    }

    info!("--- it stops");
    cluster.stop_node(survivor).await?;
    let told = tokio::time::timeout(SLACK, watched)
        .await
        .context("the watch outlives the node")??;
    ensure!(
        told == [ServingStatus::Serving, ServingStatus::NotServing],
        "a watch was told {told:?}"
    );
    Ok(())
}

/// Status and body of `/readyz` for as long as anybody answers. `/livez` has to be 200 as often.
async fn last_probes(admin: SocketAddr) -> anyhow::Result<Vec<(u16, String)>> {
    let mut probes = Vec::new();
    while let Ok((status, body)) = http_get(admin, "/readyz").await {
        probes.push((status, body));
        match http_get(admin, "/livez").await {
            Ok((status, _)) => ensure!(status == 200, "/livez answered {status}"),
            Err(_) => break,
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(probes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_told_to_stop_is_first_not_ready_then_hands_over_then_ends_its_streams()
-> anyhow::Result<()> {
    let mut cluster = processes().start().await?;
    let leader = cluster.leader_of(&[0, 1, 2]).await?;
    let others: Vec<usize> = (0..3).filter(|&node| node != leader).collect();
    let writes = Writes::start(
        vec![cluster.client_of(&others); 4],
        "k",
        100,
        &cluster.clock,
    );
    writes.more(50).await?;

    info!("--- streams without an end, and watches everywhere");
    let door = cluster.channel(leader);
    let watched = watch_health(&door).await?;
    let mut watched_others = Vec::new();
    for &node in &others {
        watched_others.push(watch_health(&cluster.channel(node)).await?);
    }
    let list = reflection::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = reflection::ServerReflectionRequest {
        message_request: Some(list),
        ..Default::default()
    };
    let requests = stream::iter([request]).chain(stream::pending());
    let mut client =
        reflection::server_reflection_client::ServerReflectionClient::new(door.clone());
    let mut answers = client.server_reflection_info(requests).await?.into_inner();
    answers.message().await?.context("reflection answers")?;

    info!("--- SIGTERM");
    let told_at = writes.now();
    let admin = cluster.addresses(leader).admin;
    let (stopped, probes) = tokio::join!(
        tokio::time::timeout(STOP_MAX, cluster.stop_node(leader)),
        last_probes(admin)
    );
    let code = stopped.context("it has not stopped within 10 s")??;
    ensure!(
        code == Some(0),
        "it exited with {code:?}: {}",
        cluster.log_of(leader)
    );
    writes.more(50).await?;
    let gap = writes.longest_gap_since(told_at);
    ensure!(
        gap < Duration::from_secs(2),
        "no write at the others was acknowledged for {gap:?}"
    );

    info!("--- not ready as long as it was there, and alive");
    let probes = probes?;
    let first = probes
        .iter()
        .position(|(status, _)| *status == 503)
        .with_context(|| format!("it was ready to the end: {probes:?}"))?;
    for (status, body) in &probes[first..] {
        ensure!(
            *status == 503 && body.contains("[-]running failed: the node is stopping\n"),
            "it was ready again: {status} {body}"
        );
    }
    let told = tokio::time::timeout(SLACK, watched)
        .await
        .context("a health watch outlives the node")??;
    ensure!(
        told == [ServingStatus::Serving, ServingStatus::NotServing],
        "a health watch was told {told:?}"
    );
    let rest = tokio::time::timeout(SLACK, answers.message())
        .await
        .context("a stream outlives the node")?;
    ensure!(!matches!(rest, Ok(Some(_))), "a stream went on");

    info!("--- in that order");
    let log = cluster.log_of(leader);
    let events: Vec<serde_json::Value> = log
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let at = |message: &str| {
        events
            .iter()
            .rposition(|event| event["message"] == message)
            .with_context(|| format!("it never said `{message}`:\n{log}"))
    };
    // The last leader that it knows of is another one.
    ensure!(
        at("stopping")? < at("a leader")? && at("a leader")? < at("stopped")?,
        "{log}"
    );

    info!("--- nobody else noticed");
    cluster.leader_of(&others).await?;
    let written = writes.stop().await;
    for &node in &others {
        written.check(&cluster.client(node)).await?;
    }
    for (&node, watched) in others.iter().zip(watched_others) {
        cluster.stop_node(node).await?;
        let told = tokio::time::timeout(SLACK, watched)
            .await
            .context("a health watch outlives the node")??;
        ensure!(
            told == [ServingStatus::Serving, ServingStatus::NotServing],
            "{} told a watch {told:?}",
            cluster.name(node)
        );
    }
    Ok(())
}
