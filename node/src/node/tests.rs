//! Whole nodes on the memory engine, in this process.

mod untaken;

use std::path::Path;

use holdfast_proto::peer::{FetchRequest, refresh_service_client::RefreshServiceClient};
use holdfast_proto::v1::{
    Consistency, GetRequest, SetRequest, State, cache_service_client::CacheServiceClient,
    cluster_service_client::ClusterServiceClient,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, transport::Channel};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, health_client::HealthClient},
};

use super::*;
use crate::config::Overrides;

/// One that forms a cluster of its own on any ports.
fn config(dir: &Path, overrides: Overrides) -> Config {
    let overrides = overrides
        .text("test", "node.name", "alone")
        .text("test", "node.data_dir", dir.join("data").to_string_lossy())
        .text("test", "storage.engine", "memory")
        .yaml(
            "test",
            "listen",
            "{client: '127.0.0.1:0', peer: '127.0.0.1:0', admin: '127.0.0.1:0'}",
        );
    Config::load(None, [], &overrides).unwrap()
}

async fn alone(dir: &Path) -> Node {
    let node = Node::start(config(dir, Overrides::default()), Clock::system())
        .await
        .unwrap();
    until(async || node.readiness().to_write().all_hold()).await;
    node
}

/// Looks again and again, for a while.
async fn until(mut holds: impl AsyncFnMut() -> bool) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), wait)
        .await
        .expect("it should hold by now");
}

async fn channel(node: &Node) -> Channel {
    Channel::from_shared(format!("http://{}", node.client_address()))
        .unwrap()
        .connect()
        .await
        .unwrap()
}

/// Status and body of one request of the admin listener.
async fn probe(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(
            format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n").as_bytes(),
        )
        .await
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (
        head.split(' ').nth(1).unwrap().parse().unwrap(),
        body.to_owned(),
    )
}

async fn health(channel: &Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.into(),
    };
    let status = HealthClient::new(channel.clone())
        .check(request)
        .await
        .unwrap()
        .into_inner()
        .status;
    if status == 1 {
        ServingStatus::Serving
    } else {
        ServingStatus::NotServing
    }
}

#[test]
fn an_advertised_port_is_the_one_that_was_bound() {
    let bound = SocketAddr::from(([127, 0, 0, 1], 4711));
    assert_eq!(
        advertised(
            &Address {
                host: "127.0.0.1".into(),
                port: 0
            },
            bound
        ),
        "127.0.0.1:4711"
    );
    assert_eq!(
        advertised(
            &Address {
                host: "holdfast-0.holdfast".into(),
                port: 7401
            },
            bound
        ),
        "holdfast-0.holdfast:7401"
    );
}

#[tokio::test]
async fn a_node_alone_takes_writes_and_answers_reads() {
    let dir = tempfile::tempdir().unwrap();
    let node = alone(dir.path()).await;
    let mut cache = CacheServiceClient::new(channel(&node).await);
    cache
        .set(SetRequest {
            key: "greeting".into(),
            value: "hello".into(),
            ..Default::default()
        })
        .await
        .unwrap();
    let get = GetRequest {
        key: "greeting".into(),
        consistency: Consistency::Linearizable.into(),
        ..Default::default()
    };
    let answer = cache.get(get).await.unwrap().into_inner();
    let answer = answer.answer.unwrap();
    assert_eq!(
        (answer.value.as_deref(), answer.state()),
        (Some(b"hello".as_slice()), State::Fresh)
    );

    let status = ClusterServiceClient::new(channel(&node).await)
        .status(holdfast_proto::v1::StatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        (
            status.leader.as_str(),
            status.nodes[0].client_address.as_str()
        ),
        ("alone", node.client_address().to_string().as_str())
    );

    let (code, metrics) = probe(node.admin_address(), "/metrics").await;
    assert_eq!(code, 200);
    for line in [
        r#"holdfast_requests_total{method="Get",state="FRESH",code="OK"} 1"#,
        r#"holdfast_requests_total{method="Set",state="",code="OK"} 1"#,
        r#"holdfast_is_leader{shard="0"} 1"#,
        r#"holdfast_applied_revision{shard="0"} 1"#,
        "holdfast_insecure 0",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    assert!(metrics.ends_with("# EOF\n") && !metrics.contains("greeting"));
    node.stop().await;
}

#[tokio::test]
async fn a_method_that_clients_do_not_have_is_unimplemented_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let node = alone(dir.path()).await;
    // What peers may ask, clients may not.
    let mut client = RefreshServiceClient::new(channel(&node).await);
    let status = client
        .fetch(tokio_stream::once(FetchRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    assert_eq!(
        node.metrics()
            .requests_counted("other", "ERROR", crate::error::Code::Unimplemented),
        1
    );
    node.stop().await;
}

#[tokio::test]
async fn probes_and_health_say_that_a_node_is_ready_and_that_it_stops() {
    let dir = tempfile::tempdir().unwrap();
    let node = alone(dir.path()).await;
    let channel = channel(&node).await;
    let admin = node.admin_address();
    for path in ["/livez", "/readyz", "/readyz/write", "/version"] {
        assert_eq!(probe(admin, path).await.0, 200, "{path}");
    }
    for service in ["", "holdfast.v1.CacheService", "holdfast.v1.ClusterService"] {
        until(async || health(&channel, service).await == ServingStatus::Serving).await;
    }

    node.refuse_to_be_ready().await;
    assert_eq!(health(&channel, "").await, ServingStatus::NotServing);
    assert_eq!(
        health(&channel, "holdfast.v1.CacheService").await,
        ServingStatus::NotServing
    );
    let (code, why) = probe(admin, "/readyz").await;
    assert!(
        code == 503 && why.contains("[-]running failed: the node is stopping"),
        "{code} {why}"
    );
    assert_eq!(probe(admin, "/livez").await.0, 200);
    node.stop().await;
    assert!(TcpStream::connect(admin).await.is_err());
}

#[tokio::test]
async fn a_stop_ends_streams_that_have_no_end() {
    let dir = tempfile::tempdir().unwrap();
    let node = alone(dir.path()).await;
    let (client, peer) = (node.client_address(), node.peer_address());
    let mut watch = HealthClient::new(channel(&node).await)
        .watch(HealthCheckRequest::default())
        .await
        .unwrap()
        .into_inner();
    let watching = tokio::spawn(async move { while let Ok(Some(_)) = watch.message().await {} });
    tokio::time::timeout(Duration::from_secs(9), node.stop())
        .await
        .expect("a stop is bounded");
    watching.await.unwrap();
    assert!(TcpStream::connect(client).await.is_err() && TcpStream::connect(peer).await.is_err());
}

#[tokio::test]
async fn who_waits_for_a_fetch_is_answered_before_a_stop_ends_its_connection() {
    let dir = tempfile::tempdir().unwrap();
    // Takes calls and answers none.
    let upstream = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let overrides = Overrides::default()
        .yaml(
            "test",
            "upstreams",
            format!(
                "{{u: {{http: {{url: 'http://{}/{{key}}'}}, fetch_timeout: 60s}}}}",
                upstream.local_addr().unwrap()
            ),
        )
        .yaml(
            "test",
            "policies",
            "[{match: 'u/*', upstream: u, hard_timeout: 60s}]",
        );
    let node = Node::start(config(dir.path(), overrides), Clock::system())
        .await
        .unwrap();
    until(async || node.readiness().to_write().all_hold()).await;
    let mut cache = CacheServiceClient::new(channel(&node).await);
    let mut get = tonic::Request::new(GetRequest {
        key: "u/a".into(),
        ..Default::default()
    });
    get.set_timeout(Duration::from_secs(60));
    let waits = tokio::spawn(async move { cache.get(get).await.unwrap_err() });
    let _called = upstream.accept().await.unwrap();
    node.stop().await;
    let status = waits.await.unwrap();
    assert_eq!(
        grpc::error_of(&status).unwrap().reason(),
        holdfast_proto::reason::NO_LEADER,
        "{status}"
    );
}

#[tokio::test]
async fn a_port_in_use_is_named_and_no_mistake_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let mut config = config(dir.path(), Overrides::default());
    config.listen.peer = address;
    let error = Node::start(config, Clock::system()).await.err().unwrap();
    assert!(matches!(error, StartError::Listen(_)), "{error}");
    assert!(
        error
            .to_string()
            .starts_with(&format!("cannot listen for peers on {address}: ")),
        "{error}"
    );
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_used_is_a_mistake_of_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("data"), "a file").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = config(dir.path(), Overrides::default());
    // A port in use is not even noticed: nothing is opened before.
    config.listen.client = taken.local_addr().unwrap();
    let error = Node::start(config, Clock::system()).await.err().unwrap();
    let StartError::Config(error) = error else {
        panic!("{error}")
    };
    assert_eq!(error.problems[0].place, Place::Flag("test".into()));
}
