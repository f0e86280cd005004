//! A node's memory has a bound that callers cannot pass, whatever they ask for and do not take.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, ensure};
use bytes::Bytes;
use holdfast_proto::v1::{BatchGetRequest, BatchGetResponse};
use holdfast_tests::cluster::Cluster;
use tokio::task::JoinSet;
use tonic::{Code, Request, Status, Streaming, client::Grpc, transport::Endpoint};
use tonic_prost::ProstCodec;
use tracing::info;

use crate::processes;

const KEYS: usize = 8;
const VALUE_BYTES: usize = 1 << 20;
/// Together 4.7 GiB, were they all made.
const CALLS: usize = 600;
const CONNECTIONS: usize = 20;
const CALL_DEADLINE: Duration = Duration::from_secs(20);

const MEMORY_BYTES_MAX: usize = 64 << 20;
/// What README says comes on top for requests and answers, and what the engine buffers.
const ON_TOP_BYTES_MAX: usize = 512 << 20;

type Answer = Result<Streaming<BatchGetResponse>, Status>;

/// Calls as if streams were to come: of their answers nothing is read but the head.
async fn ask(node: SocketAddr) -> anyhow::Result<JoinSet<Answer>> {
    let channel = Endpoint::new(format!("http://{node}"))?.connect().await?;
    let keys: Vec<Bytes> = (0..KEYS).map(|n| format!("large/{n}").into()).collect();
    let mut calls = JoinSet::new();
    for _ in 0..CALLS / CONNECTIONS {
        let mut grpc = Grpc::new(channel.clone());
        let mut request = Request::new(BatchGetRequest {
            keys: keys.clone(),
            ..Default::default()
        });
        request.set_timeout(CALL_DEADLINE);
        calls.spawn(async move {
            grpc.ready()
                .await
                .map_err(|error| Status::unavailable(error.to_string()))?;
            let codec = ProstCodec::<BatchGetRequest, BatchGetResponse>::default();
            let path = "/holdfast.v1.CacheService/BatchGet".parse().unwrap();
            let answer = grpc.server_streaming(request, path, codec).await?;
            Ok(answer.into_inner())
        });
    }
    Ok(calls)
}

/// The most that the node's process ever had in memory.
fn peak_bytes(cluster: &Cluster) -> anyhow::Result<usize> {
    let pid = cluster.pid(0).context("a process")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.context("VmHWM")?.trim().trim_end_matches("kB").trim();
    Ok(kib.parse::<usize>()? << 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_has_a_bound_while_six_hundred_large_answers_are_not_taken() -> anyhow::Result<()> {
    let cluster = processes()
        .nodes(1, 1)
        .extra(format!(
            "memory: {{ max_bytes: {}MiB }}",
            MEMORY_BYTES_MAX >> 20
        ))
        .start()
        .await?;
    let client = cluster.client(0);
    for n in 0..KEYS {
        client
            .set(format!("large/{n}"), vec![7; VALUE_BYTES])
            .await?;
    }
    let before = peak_bytes(&cluster)?;

    let mut asked = Vec::new();
    for _ in 0..CONNECTIONS {
        asked.push(ask(cluster.addresses(0).client).await?);
    }
    let (mut taken_up, mut refused) = (Vec::new(), 0);
    for calls in asked {
        for answer in calls.join_all().await {
            match answer {
                Ok(answer) => taken_up.push(answer),
                // The last: it waited for room until its deadline.
                Err(status)
                    if matches!(
                        status.code(),
                        Code::ResourceExhausted | Code::DeadlineExceeded | Code::Cancelled
                    ) =>
                {
                    refused += 1;
                }
                Err(status) => return Err(status.into()),
            }
        }
    }
    let peak = peak_bytes(&cluster)?;
    info!(
        "--- {} answers wait to be taken, {refused} were refused; {} MiB before, at most {} MiB since",
        taken_up.len(),
        before >> 20,
        peak >> 20
    );
    ensure!(!taken_up.is_empty() && refused > 0);
    ensure!(
        peak < MEMORY_BYTES_MAX + ON_TOP_BYTES_MAX,
        "{} MiB",
        peak >> 20
    );
    // Who takes its answer does not wait for them much longer than they were asked for.
    cluster
        .until("an answer that is taken", async || {
            let read = client.get("large/0").await;
            read.is_ok_and(|read| read.answer.is_hit())
        })
        .await?;
    drop(taken_up);
    cluster.stop().await
}
