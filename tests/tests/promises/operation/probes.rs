//! `/livez` says that the process turns, `/readyz` that it can answer reads, `/readyz/write` that
//! writes get through; each says why not.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use holdfast_tests::cluster::Cluster;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tracing::info;

use crate::in_process;

/// Status, head and body of one request.
async fn asked(
    address: SocketAddr,
    method: &str,
    path: &str,
) -> anyhow::Result<(u16, String, String)> {
    let asked = async {
        let mut stream = tokio::net::TcpStream::connect(address).await?;
        stream
            .write_all(
                format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
                    .as_bytes(),
            )
            .await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        anyhow::Ok(answer)
    };
    let answer = tokio::time::timeout(Duration::from_secs(5), asked)
        .await
        .with_context(|| format!("{method} {path}"))??;
    let (head, body) = answer.split_once("\r\n\r\n").context("a head")?;
    let status = head.split(' ').nth(1).context("a status")?.parse()?;
    Ok((status, head.to_lowercase(), body.to_owned()))
}

/// What a probe answers: status, and a line that has to be in its body.
async fn probed(
    cluster: &Cluster,
    node: usize,
    path: &str,
    status: u16,
    line: &str,
) -> anyhow::Result<()> {
    let (answered, body) = cluster.admin(node, path).await?;
    ensure!(
        answered == status && body.lines().any(|said| said == line),
        "{path} answered {answered}, not {status} and `{line}`:\n{body}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn probes_say_what_a_node_can_do_and_why_not() -> anyhow::Result<()> {
    let mut cluster = in_process().configure()?;

    info!("--- one node, which waits for the others");
    cluster.start_node(0).await?;
    probed(&cluster, 0, "/livez", 200, "alive").await?;
    for path in ["/readyz", "/readyz/write"] {
        probed(&cluster, 0, path, 503, "not ready").await?;
        let (_, body) = cluster.admin(0, path).await?;
        let why = body
            .lines()
            .find_map(|line| line.strip_prefix("[-]member failed: "))
            .with_context(|| format!("no reason in:\n{body}"))?;
        ensure!(!why.is_empty());
    }

    info!("--- the whole cluster");
    cluster.start_node(1).await?;
    cluster.start_node(2).await?;
    for node in 0..3 {
        cluster.ready(node).await?;
    }
    cluster.leader_of(&[0, 1, 2]).await?;
    for node in 0..3 {
        probed(&cluster, node, "/livez", 200, "alive").await?;
        for check in ["running", "member", "caught_up", "installing"] {
            probed(&cluster, node, "/readyz", 200, &format!("[+]{check} ok")).await?;
        }
        probed(&cluster, node, "/readyz", 200, "ready").await?;
        probed(&cluster, node, "/readyz/write", 200, "[+]leader ok").await?;
        probed(&cluster, node, "/readyz/write", 200, "ready").await?;
    }

    info!("--- what there is not");
    let admin = cluster.addresses(0).admin;
    for path in [
        "/",
        "/nothing",
        "/readyz/",
        "/readyz/read",
        "/livez/more",
        "/metrics/json",
    ] {
        ensure!(asked(admin, "GET", path).await?.0 == 404, "{path}");
    }
    for path in ["/livez", "/readyz", "/readyz/write", "/metrics", "/version"] {
        for method in ["POST", "PUT", "DELETE"] {
            let (status, head, _) = asked(admin, method, path).await?;
            ensure!(
                status == 405 && head.contains("\r\nallow: get,head"),
                "{method} {path}: {head}"
            );
        }
        let (status, _, body) = asked(admin, "HEAD", path).await?;
        ensure!(
            status == 200 && body.is_empty(),
            "HEAD {path} answered {status} and `{body}`"
        );
    }

    info!("--- one of three");
    for node in 1..3 {
        cluster.stop_node(node).await?;
    }
    cluster
        .until("nobody leads", async || {
            matches!(cluster.admin(0, "/readyz/write").await, Ok((503, _)))
        })
        .await?;
    probed(
        &cluster,
        0,
        "/readyz/write",
        503,
        "[-]leader failed: nobody leads: shard 0",
    )
    .await?;
    probed(&cluster, 0, "/readyz/write", 503, "not ready").await?;
    probed(&cluster, 0, "/readyz", 200, "ready").await?;
    probed(&cluster, 0, "/livez", 200, "alive").await?;
    cluster.stop().await
}
