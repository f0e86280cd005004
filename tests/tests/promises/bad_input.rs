//! What a client gets wrong is told by its field, changes nothing and hurts nobody.

use std::net::SocketAddr;

use bytes::{Buf, BufMut, Bytes};
use holdfast_proto::{
    Token,
    limits::{
        BATCH_KEYS_MAX, CLIENT_MESSAGE_BYTES_MAX, KEY_BYTES_MAX, SCAN_LIMIT_MAX,
        VALUE_BYTES_DEFAULT,
    },
    reason,
    v1::{
        self, Consistency, cache_service_client::CacheServiceClient,
        cluster_service_client::ClusterServiceClient, delete_request, invalidate_request,
    },
};
use holdfast_tests::cluster::{Cluster, http_get};
use rand::{Rng as _, RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::{
    Code, Request, Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};
use tonic_types::StatusExt as _;
use tracing::info;

use crate::{in_process, seed};

type Cache = CacheServiceClient<Channel>;

/// Code, reason and field.
type Told = (Code, String, String);

fn cache(cluster: &Cluster, node: usize) -> Cache {
    CacheServiceClient::new(cluster.channel(node)).max_encoding_message_size(usize::MAX)
}

fn told<T>(answer: Result<tonic::Response<T>, Status>) -> Told {
    let Err(status) = answer else {
        return (Code::Ok, String::new(), String::new());
    };
    let Some(info) = status.get_details_error_info() else {
        return (status.code(), String::new(), String::new());
    };
    (
        status.code(),
        info.reason,
        info.metadata
            .get(reason::FIELD)
            .cloned()
            .unwrap_or_default(),
    )
}

fn mistake(field: &str) -> Told {
    (
        Code::InvalidArgument,
        reason::INVALID_FIELD.into(),
        field.into(),
    )
}

fn too_large(field: &str) -> Told {
    (
        Code::ResourceExhausted,
        reason::TOO_LARGE.into(),
        field.into(),
    )
}

fn not_built(field: &str) -> Told {
    (Code::Unimplemented, reason::NOT_BUILT.into(), field.into())
}

fn long_key() -> Bytes {
    vec![b'k'; KEY_BYTES_MAX + 1].into()
}

async fn get(cache: &mut Cache, change: impl FnOnce(&mut v1::GetRequest)) -> Told {
    let mut request = v1::GetRequest {
        key: "k".into(),
        ..Default::default()
    };
    change(&mut request);
    told(cache.get(request).await)
}

async fn set(cache: &mut Cache, change: impl FnOnce(&mut v1::SetRequest)) -> Told {
    let mut request = v1::SetRequest {
        key: "k".into(),
        value: "changed".into(),
        ..Default::default()
    };
    change(&mut request);
    let answer = cache.set(request).await;
    if let Err(status) = &answer {
        let info = status.get_details_error_info();
        let applied = info
            .as_ref()
            .and_then(|info| info.metadata.get(reason::APPLIED))
            .map(String::as_str);
        assert_eq!(applied, Some(reason::APPLIED_NO), "{status}");
    }
    told(answer)
}

async fn batch_get(cache: &mut Cache, change: impl FnOnce(&mut v1::BatchGetRequest)) -> Told {
    let mut request = v1::BatchGetRequest {
        keys: vec!["k".into()],
        ..Default::default()
    };
    change(&mut request);
    told(cache.batch_get(request).await)
}

async fn scan(cache: &mut Cache, change: impl FnOnce(&mut v1::ScanRequest)) -> Told {
    let mut request = v1::ScanRequest::default();
    change(&mut request);
    told(cache.scan(request).await)
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// The revision up to which everything is visible everywhere, and what the key holds.
async fn position(cluster: &Cluster, node: usize) -> anyhow::Result<(u64, Option<Bytes>)> {
    let request = v1::GetRequest {
        key: "k".into(),
        consistency: Consistency::Linearizable.into(),
        ..Default::default()
    };
    let answer = cache(cluster, node).get(request).await?.into_inner();
    Ok((
        answer.replica.map_or(0, |replica| replica.revision),
        answer.answer.and_then(|answer| answer.value),
    ))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mistake_is_told_by_its_field_and_changes_nothing() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let (leader, follower) = (cluster.leader().await?, cluster.follower().await?);
    cluster.client(leader).set("k", "kept").await?;
    for node in [leader, follower] {
        let before = position(&cluster, node).await?;
        assert_eq!(before.1.as_deref(), Some(b"kept".as_slice()));
        let cache = &mut cache(&cluster, node);

        info!("--- a key that is none");
        for key in [Bytes::new(), long_key()] {
            let (deletion, invalidation) = (
                delete_request::Target::Key(key.clone()),
                invalidate_request::Target::Key(key.clone()),
            );
            assert_eq!(
                get(cache, |get| get.key = key.clone()).await,
                mistake("key")
            );
            assert_eq!(
                set(cache, |set| set.key = key.clone()).await,
                mistake("key")
            );
            assert_eq!(
                told(
                    cache
                        .delete(v1::DeleteRequest {
                            target: Some(deletion),
                            request_id: None
                        })
                        .await
                ),
                mistake("key")
            );
            assert_eq!(
                told(
                    cache
                        .invalidate(v1::InvalidateRequest {
                            target: Some(invalidation),
                            request_id: None
                        })
                        .await
                ),
                mistake("key")
            );
            assert_eq!(
                told(
                    cache
                        .inspect(v1::InspectRequest {
                            key: key.clone(),
                            ..Default::default()
                        })
                        .await
                ),
                mistake("key")
            );
            let batch = v1::BatchGetRequest {
                keys: vec!["k".into(), key],
                ..Default::default()
            };
            let results = cache.batch_get(batch).await?.into_inner().results;
            assert!(
                matches!(
                    &results[0].result,
                    Some(v1::batch_get_result::Result::Answer(_))
                ),
                "each key is answered for itself"
            );
            let Some(v1::batch_get_result::Result::Error(error)) = &results[1].result else {
                panic!("{:?}", results[1])
            };
            assert_eq!(error.code, i32::from(Code::InvalidArgument));
        }
        assert_eq!(
            told(cache.delete(v1::DeleteRequest::default()).await),
            mistake("key")
        );
        assert_eq!(
            told(cache.invalidate(v1::InvalidateRequest::default()).await),
            mistake("key")
        );

        info!("--- times");
        assert_eq!(
            set(cache, |set| set.ttl = seconds(-1)).await,
            mistake("ttl")
        );
        assert_eq!(set(cache, |set| set.ttl = seconds(0)).await, mistake("ttl"));
        let both = set(cache, |set| {
            (set.ttl, set.expires_at) = (seconds(1), Some(prost_types::Timestamp::default()))
        });
        assert_eq!(both.await, mistake("expires_at"));
        assert_eq!(
            set(cache, |set| set.stale_if_error = seconds(-1)).await,
            mistake("stale_if_error")
        );

        info!("--- what excludes each other, and a request id that is none");
        assert_eq!(
            set(cache, |set| (set.if_version, set.if_absent) =
                (Some(1), true))
            .await,
            mistake("if_absent")
        );
        assert_eq!(
            set(cache, |set| set.request_id = Some(v1::RequestId::default())).await,
            mistake("request_id.client")
        );
        assert_eq!(
            set(cache, |set| set.tags = vec![String::new()]).await,
            mistake("tags")
        );

        info!("--- sizes");
        assert_eq!(
            set(cache, |set| set.value =
                vec![0; VALUE_BYTES_DEFAULT + 1].into())
            .await,
            too_large("value")
        );
        assert_eq!(
            set(cache, |set| set.value =
                vec![0; CLIENT_MESSAGE_BYTES_MAX + 1].into())
            .await,
            too_large("value")
        );
        assert_eq!(
            scan(cache, |scan| scan.limit = SCAN_LIMIT_MAX + 1).await,
            mistake("limit")
        );
        assert_eq!(
            scan(cache, |scan| scan.prefix = long_key()).await,
            mistake("prefix")
        );
        assert_eq!(
            batch_get(cache, |batch| batch.keys =
                vec!["k".into(); BATCH_KEYS_MAX + 1])
            .await,
            mistake("keys")
        );

        info!("--- a consistency, a token, a cursor that are none");
        for consistency in [99, -1] {
            assert_eq!(
                get(cache, |get| get.consistency = consistency).await,
                mistake("consistency")
            );
            assert_eq!(
                batch_get(cache, |batch| batch.consistency = consistency).await,
                mistake("consistency")
            );
            assert_eq!(
                scan(cache, |scan| scan.consistency = consistency).await,
                mistake("consistency")
            );
        }
        for token in [b"nonsense".as_slice(), b"\x01", b"\x01\x01\xff", &[1; 5000]] {
            assert_eq!(
                get(cache, |get| get.token = Bytes::copy_from_slice(token)).await,
                mistake("token")
            );
            assert_eq!(
                scan(cache, |scan| scan.token = Bytes::copy_from_slice(token)).await,
                mistake("token")
            );
        }
        for cursor in [b"nonsense".as_slice(), b"\x01", b"\x00k", &[1; 5000]] {
            assert_eq!(
                scan(cache, |scan| scan.cursor = Bytes::copy_from_slice(cursor)).await,
                mistake("cursor")
            );
        }
        let elsewhere = scan(cache, |scan| {
            (scan.prefix, scan.cursor) = ("user/".into(), b"\x01k".as_slice().into())
        });
        assert_eq!(
            elsewhere.await,
            mistake("cursor"),
            "of a scan with another prefix"
        );

        assert_eq!(position(&cluster, node).await?, before, "nothing changed");
    }
    cluster.stop().await
}

/// A token that could be ours and is not of this cluster's past waits or is refused, and is no
/// fault of the node's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_token_is_not_believed() -> anyhow::Result<()> {
    let cluster = in_process().start().await?;
    let node = cluster.follower().await?;
    let forged = |epoch, shard, revision| {
        let mut token = Token::new(epoch);
        token.see(shard, revision);
        let mut request = Request::new(v1::GetRequest {
            key: "k".into(),
            token: token.encode(),
            ..Default::default()
        });
        request.set_timeout(std::time::Duration::from_secs(2));
        request
    };
    let cache = &mut cache(&cluster, node);
    assert_eq!(
        told(cache.get(forged(77, 0, 1)).await),
        (
            Code::FailedPrecondition,
            reason::TOKEN_EPOCH.into(),
            "token".into()
        )
    );
    let (code, ..) = told(cache.get(forged(1, 0, u64::MAX)).await);
    assert!(
        [Code::Unavailable, Code::DeadlineExceeded].contains(&code),
        "{code:?}"
    );
    // Of a shard that this cluster does not have: it says nothing of the key's.
    assert_eq!(told(cache.get(forged(1, 4000, 9)).await).0, Code::Ok);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_built_is_refused_by_its_name() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    let cache = &mut cache(&cluster, 0);
    cache
        .set(v1::SetRequest {
            key: "k".into(),
            value: "kept".into(),
            ..Default::default()
        })
        .await?;
    let before = position(&cluster, 0).await?;

    assert_eq!(
        get(cache, |get| get.max_staleness = seconds(1)).await,
        not_built("max_staleness")
    );
    assert_eq!(get(cache, |get| get.lease = true).await, not_built("lease"));
    let bounded = Consistency::Bounded.into();
    assert_eq!(
        get(cache, |get| get.consistency = bounded).await,
        not_built("consistency")
    );
    assert_eq!(
        batch_get(cache, |batch| batch.consistency = bounded).await,
        not_built("consistency")
    );
    assert_eq!(
        scan(cache, |scan| scan.consistency = bounded).await,
        not_built("consistency")
    );
    let inspect = v1::InspectRequest {
        key: "k".into(),
        consistency: bounded,
        ..Default::default()
    };
    assert_eq!(told(cache.inspect(inspect).await), not_built("consistency"));

    // A method of the design that this version does not have.
    let (code, ..) = told(
        call(
            cluster.channel(0),
            "/holdfast.v1.CacheService/Watch",
            Bytes::new(),
        )
        .await,
    );
    assert_eq!(code, Code::Unimplemented);
    assert_eq!(position(&cluster, 0).await?, before);
    cluster.stop().await
}

const METHODS: [&str; 12] = [
    "/holdfast.v1.CacheService/Get",
    "/holdfast.v1.CacheService/BatchGet",
    "/holdfast.v1.CacheService/Set",
    "/holdfast.v1.CacheService/Delete",
    "/holdfast.v1.CacheService/Invalidate",
    "/holdfast.v1.CacheService/Inspect",
    "/holdfast.v1.CacheService/Scan",
    "/holdfast.v1.ClusterService/Status",
    "/holdfast.v1.ClusterService/AddMember",
    "/holdfast.v1.ClusterService/Promote",
    "/holdfast.v1.ClusterService/Remove",
    "/holdfast.v1.ClusterService/TransferLeader",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clients_mistake_is_never_internal() -> anyhow::Result<()> {
    let cluster = in_process().nodes(1, 1).start().await?;
    cluster.client(0).set("k", "kept").await?;
    let before = position(&cluster, 0).await?;

    info!("--- what is no message at all");
    for method in METHODS {
        for bytes in [
            b"\x0a\xff\xff\xff\x7f".as_slice(),
            b"\x07",
            b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"\x0a",
        ] {
            let (code, word, _) =
                told(call(cluster.channel(0), method, Bytes::from_static(bytes)).await);
            assert_eq!(
                (code, word.as_str()),
                (Code::InvalidArgument, reason::INVALID_FIELD),
                "{method} {bytes:?}"
            );
        }
    }
    info!("--- a tag that is no text");
    let tag = call(
        cluster.channel(0),
        METHODS[2],
        Bytes::from_static(b"\x0a\x01k\x3a\x02\xc3\x28"),
    );
    let status = tag.await.unwrap_err();
    assert!(status.message().contains("tags"), "{status}");
    let (code, word, _) = told::<()>(Err(status));
    assert_eq!(
        (code, word.as_str()),
        (Code::InvalidArgument, reason::INVALID_FIELD)
    );

    info!("--- any bytes, where nothing can be changed");
    let seed = seed();
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    for round in 0..200 {
        let mut bytes = vec![0; random.random_range(0..40)];
        random.fill_bytes(&mut bytes);
        for method in [METHODS[0], METHODS[1], METHODS[5], METHODS[6]] {
            let (code, ..) = told(call(cluster.channel(0), method, bytes.clone().into()).await);
            assert!(
                ![Code::Internal, Code::Unknown].contains(&code),
                "seed {seed} round {round}: {method} {bytes:?}: {code:?}"
            );
        }
    }
    info!("--- members that are none");
    let members = &mut ClusterServiceClient::new(cluster.channel(0));
    assert_eq!(
        told(members.promote(v1::PromoteRequest::default()).await),
        mistake("name")
    );
    assert_eq!(
        told(members.remove(v1::RemoveRequest::default()).await),
        mistake("name")
    );
    assert_eq!(
        told(
            members
                .add_member(v1::AddMemberRequest {
                    name: "x".into(),
                    ..Default::default()
                })
                .await
        ),
        mistake("peer_address")
    );
    let (code, word, _) = told(
        members
            .remove(v1::RemoveRequest {
                name: "nobody".into(),
            })
            .await,
    );
    assert_eq!(
        (code, word.as_str()),
        (Code::FailedPrecondition, reason::NO_MEMBER)
    );
    for peer_address in ["nonsense", "127.0.0.1:1", "http://[::", "\n:7401"] {
        let request = v1::AddMemberRequest {
            name: "x".into(),
            peer_address: peer_address.into(),
        };
        let (code, ..) = told(members.add_member(request).await);
        assert_eq!(code, Code::FailedPrecondition, "{peer_address}");
    }
    assert_eq!(position(&cluster, 0).await?, before);
    cluster.stop().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_any_port_hurts_nobody() -> anyhow::Result<()> {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let cluster = in_process().start().await?;
    let node = cluster.leader().await?;
    let addresses = cluster.addresses(node);
    let seed = seed();
    let mut random = rand::rngs::StdRng::seed_from_u64(seed);
    let mut noise = || {
        let mut bytes = vec![0; 4096];
        random.fill_bytes(&mut bytes);
        bytes
    };
    let mut inputs = vec![
        noise(),
        [PREFACE, &noise()].concat(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        // SETTINGS, then a HEADERS frame of 16 MiB, a DATA frame on no stream, a frame of no known
        // type.
        [
            PREFACE,
            b"\0\0\0\x04\0\0\0\0\0",
            b"\xff\xff\xff\x01\x04\0\0\0\x01",
            &noise(),
        ]
        .concat(),
        [
            PREFACE,
            b"\0\0\0\x04\0\0\0\0\0",
            b"\0\0\x04\x00\x00\0\0\0\0",
            b"junk",
        ]
        .concat(),
        [
            PREFACE,
            b"\0\0\0\x04\0\0\0\0\0",
            b"\0\0\x04\xee\x00\0\0\0\x01",
            b"junk",
        ]
        .concat(),
        PREFACE[..10].to_vec(),
        Vec::new(),
    ];
    inputs.push(inputs.concat());

    info!("--- garbage, while writes go on");
    let client = cluster.client(node);
    for (round, input) in inputs.iter().enumerate() {
        for address in [addresses.client, addresses.peer, addresses.admin] {
            send(address, input).await?;
        }
        client.set("k", round.to_string()).await?;
    }
    info!("--- connections that say nothing, left open");
    let mut silent = Vec::new();
    for address in [addresses.client, addresses.peer, addresses.admin].repeat(50) {
        silent.push(tokio::net::TcpStream::connect(address).await?);
    }
    client.set("k", "last").await?;
    for other in 0..cluster.len() {
        let answer = cluster
            .client(other)
            .get("k")
            .consistency(holdfast_client::Consistency::Linearizable)
            .await?;
        assert_eq!(answer.answer.value.as_deref(), Some(b"last".as_slice()));
        assert_eq!(
            http_get(cluster.addresses(other).admin, "/readyz").await?.0,
            200
        );
    }
    info!("--- they are ended: nobody waits for ever for who says nothing");
    for mut connection in silent {
        let mut nothing = Vec::new();
        let ended = connection.read_to_end(&mut nothing);
        let ended = tokio::time::timeout(std::time::Duration::from_secs(30), ended).await;
        assert!(ended.is_ok(), "a silent connection is still open");
    }
    cluster.stop().await
}

/// Sends all that is taken, and reads what comes until the other side has enough.
async fn send(address: SocketAddr, bytes: &[u8]) -> anyhow::Result<()> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    // The node may hang up in the middle.
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut sink = Vec::new();
    let reading = stream.read_to_end(&mut sink);
    let _ = tokio::time::timeout(std::time::Duration::from_millis(200), reading).await;
    Ok(())
}

/// A unary call with these bytes for its message.
async fn call(
    channel: Channel,
    method: &'static str,
    message: Bytes,
) -> Result<tonic::Response<Bytes>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let answer = grpc
        .server_streaming(
            Request::new(message),
            http::uri::PathAndQuery::from_static(method),
            AsItIs,
        )
        .await?;
    let mut stream = answer.into_inner();
    let mut last = Bytes::new();
    while let Some(message) = stream.message().await? {
        last = message;
    }
    Ok(tonic::Response::new(last))
}

/// Bytes for messages.
#[derive(Debug, Clone, Copy, Default)]
struct AsItIs;

impl Codec for AsItIs {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for AsItIs {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        into.put(item);
        Ok(())
    }
}

impl Decoder for AsItIs {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let size = from.remaining();
        Ok(Some(from.copy_to_bytes(size)))
    }
}
