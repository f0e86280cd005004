//! Answers that their callers do not take: they are bounded in bytes, and do not stay for ever.

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::client::SendRequest;
use holdfast_proto::{limits::CLIENT_MESSAGE_BYTES_MAX, v1::BatchGetRequest};
use prost::Message as _;

use super::*;

const KEYS: usize = 8;
const VALUE_BYTES: usize = 1 << 20;
/// Together 480 MiB, were they all made.
const CALLS: usize = 60;
/// What the node makes of it: its bound, twice while messages are encoded, and some.
const GROWTH_MAX: usize = (2 * 128 + 64) << 20;

fn keys() -> Vec<Bytes> {
    (0..KEYS).map(|n| format!("large/{n}").into()).collect()
}

/// A caller with a window of one byte a stream.
async fn windowless(address: SocketAddr) -> SendRequest<Bytes> {
    let stream = TcpStream::connect(address).await.unwrap();
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(1)
        .handshake(stream)
        .await
        .unwrap();
    drop(tokio::spawn(connection));
    client
}

/// Asks for all keys and takes nothing of the answer, for as long as the connection lasts.
async fn ask(client: &SendRequest<Bytes>) {
    let request = http::Request::post("http://node/holdfast.v1.CacheService/BatchGet")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "3S")
        .body(())
        .unwrap();
    let mut message = BytesMut::new();
    let asked = BatchGetRequest {
        keys: keys(),
        ..Default::default()
    };
    message.put_u8(0);
    message.put_u32(u32::try_from(asked.encoded_len()).unwrap());
    asked.encode(&mut message).unwrap();
    let mut client = client.clone().ready().await.unwrap();
    let (answer, mut body) = client.send_request(request, false).unwrap();
    body.send_data(message.freeze(), true).unwrap();
    drop(tokio::spawn(async move {
        let _untaken = answer.await;
        std::future::pending::<()>().await;
    }));
}

async fn metric(node: &Node, line: &str) -> usize {
    let (_, text) = probe(node.admin_address(), "/metrics").await;
    let value = text.lines().find_map(|found| found.strip_prefix(line));
    value.unwrap_or("0").trim().parse().unwrap()
}

/// Resident bytes of this process.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches(" kB").trim();
    kib.parse::<usize>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_nobody_takes_are_bounded_and_end_when_their_room_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let node = alone(dir.path()).await;
    let mut caller = CacheServiceClient::new(channel(&node).await)
        .max_decoding_message_size(CLIENT_MESSAGE_BYTES_MAX);
    for key in keys() {
        let value = Bytes::from(vec![7; VALUE_BYTES]);
        let set = SetRequest {
            key,
            value,
            ..Default::default()
        };
        caller.set(set).await.unwrap();
    }
    let before = resident();

    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(windowless(node.client_address()).await);
    }
    for call in 0..CALLS {
        ask(&clients[call % clients.len()]).await;
    }
    let untaken = "holdfast_answer_in_flight_bytes";
    until(async || metric(&node, untaken).await > 100 << 20).await;
    let shed = "holdfast_requests_shed_total{kind=\"answer_bytes\"}";
    until(async || {
        assert!(metric(&node, untaken).await <= 128 << 20);
        metric(&node, shed).await > 0
    })
    .await;
    let grown = resident().saturating_sub(before);
    assert!(grown < GROWTH_MAX, "{} MiB", grown >> 20);

    // Nobody who takes its answer waits for them much longer than they were asked for.
    let batch = BatchGetRequest {
        keys: keys(),
        ..Default::default()
    };
    until(async || {
        let answer = caller.batch_get(batch.clone()).await;
        answer.is_ok_and(|answer| answer.into_inner().results.len() == KEYS)
    })
    .await;
    node.stop().await;
}
