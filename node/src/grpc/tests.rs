//! The door held to its promises, with real nodes in memory and a real upstream.

mod node;

use std::{collections::BTreeMap, time::Duration};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, future::join_all};
use holdfast_proto::{
    Token, reason,
    v1::{
        self, Consistency, FailureClass, State, batch_get_result::Result as Told, delete_request,
        invalidate_request,
    },
};
use tonic::{Code, Request, Status, body::Body};
use tonic_types::StatusExt as _;
use tower::ServiceExt as _;

use self::node::{Cluster, Node, Origin, PATIENCE, policy};
use crate::policy::Policy;

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn set(key: &str, value: &str) -> v1::SetRequest {
    v1::SetRequest {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        ..Default::default()
    }
}

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

async fn get(node: &Node, key: &str) -> v1::Answer {
    node.get(key, Consistency::Unspecified, &[])
        .await
        .unwrap()
        .answer
        .unwrap()
}

async fn get_token(node: &Node) -> Bytes {
    node.get("k", Consistency::Local, &[]).await.unwrap().token
}

async fn delete(node: &Node, key: &str) -> v1::DeleteResponse {
    let target = Some(delete_request::Target::Key(key.to_owned().into()));
    node.client()
        .delete(v1::DeleteRequest {
            target,
            request_id: None,
        })
        .await
        .unwrap()
        .into_inner()
}

async fn invalidate(node: &Node, key: &str) -> v1::InvalidateResponse {
    let target = Some(invalidate_request::Target::Key(key.to_owned().into()));
    node.client()
        .invalidate(v1::InvalidateRequest {
            target,
            request_id: None,
        })
        .await
        .unwrap()
        .into_inner()
}

fn text(answer: &v1::Answer) -> &str {
    std::str::from_utf8(answer.value.as_deref().unwrap()).unwrap()
}

fn told(status: &Status) -> (Code, String, BTreeMap<String, String>) {
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.domain, reason::DOMAIN);
    (
        status.code(),
        info.reason,
        info.metadata.into_iter().collect(),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_plain_value_is_there_and_fresh_a_year_later_until_it_is_deleted() {
    let cluster = Cluster::of(1).start().await;
    let node = &cluster.nodes[0];
    assert_eq!(get(node, "k").await.state(), State::Miss);
    let version = node
        .client()
        .set(set("k", "v"))
        .await
        .unwrap()
        .into_inner()
        .version;
    cluster.clock.advance(YEAR);
    let answer = get(node, "k").await;
    assert_eq!(
        (text(&answer), answer.state(), answer.version),
        ("v", State::Fresh, version)
    );
    assert_eq!(
        (
            answer.ttl_ms,
            answer.expires_in_ms,
            answer.stored,
            answer.upstream.as_str()
        ),
        (None, None, true, "")
    );
    assert!(answer.age_ms >= 365 * 24 * 3600 * 1000, "{}", answer.age_ms);
    assert!(delete(node, "k").await.existed);
    assert!(!delete(node, "k").await.existed);
    assert_eq!(get(node, "k").await.state(), State::Miss);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_goes_through_the_states_its_set_names_and_is_hidden_afterwards() {
    let cluster = Cluster::of(1).start().await;
    let node = &cluster.nodes[0];
    let request = v1::SetRequest {
        ttl: seconds(10),
        stale_while_revalidate: seconds(10),
        stale_if_error: seconds(30),
        ..set("k", "v")
    };
    node.client().set(request).await.unwrap();
    for state in [
        State::Fresh,
        State::Stale,
        State::StaleOnError,
        State::StaleOnError,
        State::Miss,
    ] {
        assert_eq!(get(node, "k").await.state(), state);
        cluster.clock.advance(Duration::from_secs(10));
    }
    node.client()
        .set(v1::SetRequest {
            stale_if_error: seconds(30),
            ..set("k", "v")
        })
        .await
        .unwrap();
    assert!(invalidate(node, "k").await.existed);
    assert_eq!(get(node, "k").await.state(), State::StaleOnError);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_hold_or_nothing_changes_and_a_retry_happens_once() {
    let cluster = Cluster::of(1).start().await;
    let node = &cluster.nodes[0];
    let absent = v1::SetRequest {
        if_absent: true,
        ..set("k", "first")
    };
    let version = node
        .client()
        .set(absent.clone())
        .await
        .unwrap()
        .into_inner()
        .version;
    for lost in [
        absent,
        v1::SetRequest {
            if_version: Some(version + 7),
            ..set("k", "second")
        },
    ] {
        let (code, reason, metadata) = told(&node.client().set(lost).await.unwrap_err());
        assert_eq!(
            (code, reason.as_str()),
            (Code::FailedPrecondition, reason::VERSION_CONFLICT)
        );
        assert_eq!(
            (metadata["version"].as_str(), metadata["applied"].as_str()),
            (version.to_string().as_str(), "no")
        );
    }
    assert_eq!(text(&get(node, "k").await), "first");
    let request_id = Some(v1::RequestId {
        client: vec![7; 16].into(),
        seq: 1,
        done_below: 0,
    });
    let once = v1::SetRequest {
        if_version: Some(version),
        request_id,
        ..set("k", "second")
    };
    let first = node.client().set(once.clone()).await.unwrap().into_inner();
    let again = node.client().set(once).await.unwrap().into_inner();
    assert_eq!((first.version, &first.token), (again.version, &again.token));
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mistake_is_named_and_changes_nothing() {
    let cluster = Cluster::of(1).start().await;
    let node = &cluster.nodes[0];
    let both = v1::SetRequest {
        ttl: seconds(1),
        expires_at: Some(Default::default()),
        ..set("k", "v")
    };
    let large = v1::SetRequest {
        value: vec![0; (1 << 20) + 1].into(),
        ..set("k", "")
    };
    let mistakes = [
        (set("", "v"), Code::InvalidArgument, "key"),
        (
            v1::SetRequest {
                ttl: seconds(-1),
                ..set("k", "v")
            },
            Code::InvalidArgument,
            "ttl",
        ),
        (both, Code::InvalidArgument, "expires_at"),
        (large, Code::ResourceExhausted, "value"),
    ];
    for (request, code, field) in mistakes {
        let (got, _, metadata) = told(&node.client().set(request).await.unwrap_err());
        assert_eq!(
            (
                got,
                metadata["field"].as_str(),
                metadata["applied"].as_str()
            ),
            (code, field, "no")
        );
    }
    let scan = v1::ScanRequest {
        limit: 1001,
        ..Default::default()
    };
    assert_eq!(
        told(&node.client().scan(scan).await.unwrap_err()).2["field"],
        "limit"
    );
    let lease = v1::GetRequest {
        key: "k".into(),
        lease: true,
        ..Default::default()
    };
    let (code, reason, metadata) = told(&node.client().get(lease).await.unwrap_err());
    assert_eq!(
        (code, reason.as_str(), metadata["field"].as_str()),
        (Code::Unimplemented, reason::NOT_BUILT, "lease")
    );
    let (code, reason, _) = told(
        &node
            .get("k", Consistency::Session, &Token::new(99).encode())
            .await
            .unwrap_err(),
    );
    assert_eq!(
        (code, reason.as_str()),
        (Code::FailedPrecondition, reason::TOKEN_EPOCH)
    );
    assert_eq!(get(node, "k").await.state(), State::Miss);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_without_a_message_is_the_callers_mistake_on_every_service() {
    let cluster = Cluster::of(1).start().await;
    for path in [
        "/holdfast.v1.CacheService/Get",
        "/holdfast.v1.ClusterService/Remove",
    ] {
        let request = http::Request::post(path)
            .header("content-type", "application/grpc")
            .body(Body::empty())
            .unwrap();
        let response = cluster.nodes[0].channel().oneshot(request).await.unwrap();
        let (code, reason, _) = told(&Status::from_header_map(response.headers()).unwrap());
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, reason::INVALID_FIELD),
            "{path}"
        );
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_shows_every_live_key_once_in_order_over_all_shards() {
    let cluster = Cluster {
        shards: 3,
        ..Cluster::of(1)
    }
    .start()
    .await;
    let node = &cluster.nodes[0];
    let keys: Vec<String> = (0..57).map(|n| format!("s/{n:03}")).collect();
    join_all(keys.iter().map(|key| async move {
        node.client()
            .set(set(key, &"v".repeat(40_000)))
            .await
            .unwrap()
    }))
    .await;
    node.client().set(set("t", "another prefix")).await.unwrap();
    node.client()
        .set(v1::SetRequest {
            ttl: seconds(5),
            ..set("s/0001", "expires")
        })
        .await
        .unwrap();
    cluster.clock.advance(Duration::from_secs(5));

    let (mut seen, mut cursor, mut pages) = (Vec::new(), Default::default(), 0);
    loop {
        let request = v1::ScanRequest {
            prefix: "s/".into(),
            limit: 20,
            cursor,
            ..Default::default()
        };
        let messages: Vec<_> = node
            .client()
            .scan(request)
            .await
            .unwrap()
            .into_inner()
            .try_collect()
            .await
            .unwrap();
        assert!(messages.len() > 1, "20 × 40 kB do not fit one message");
        let (last, others) = messages.split_last().unwrap();
        assert!(
            others
                .iter()
                .all(|message| message.replica.is_none() && message.next_cursor.is_empty())
        );
        assert!(last.replica.is_some() && !last.token.is_empty());
        cursor = last.next_cursor.clone();
        let page: Vec<_> = messages
            .into_iter()
            .flat_map(|message| message.entries)
            .collect();
        assert!(page.len() <= 20);
        seen.extend(
            page.into_iter()
                .map(|entry| String::from_utf8(entry.key.to_vec()).unwrap()),
        );
        pages += 1;
        if cursor.is_empty() {
            break;
        }
    }
    assert_eq!((seen, pages), (keys, 3));

    let request = v1::ScanRequest {
        prefix: "s/".into(),
        limit: 57,
        keys_only: true,
        ..Default::default()
    };
    let messages: Vec<_> = node
        .client()
        .scan(request)
        .await
        .unwrap()
        .into_inner()
        .map(Result::unwrap)
        .collect()
        .await;
    assert_eq!(
        messages
            .iter()
            .map(|message| message.entries.len())
            .sum::<usize>(),
        57
    );
    assert!(
        messages
            .iter()
            .flat_map(|message| &message.entries)
            .all(|entry| entry.answer.as_ref().unwrap().value.is_none())
    );
    assert!(
        messages.last().unwrap().next_cursor.is_empty(),
        "a full page that is the last one says so"
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_answers_each_key_for_itself() {
    let cluster = Cluster {
        shards: 3,
        ..Cluster::of(1)
    }
    .start()
    .await;
    let node = &cluster.nodes[0];
    for n in 0..20 {
        node.client()
            .set(set(&format!("k{n}"), &format!("v{n}")))
            .await
            .unwrap();
    }
    let keys = (0..20)
        .map(|n| format!("k{n}"))
        .chain(["none".into(), String::new()])
        .map(Into::into)
        .collect();
    let response = node
        .client()
        .batch_get(v1::BatchGetRequest {
            keys,
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    for (n, result) in response.results.iter().enumerate() {
        match (n, result.result.as_ref().unwrap()) {
            (0..20, Told::Answer(answer)) => assert_eq!(text(answer), format!("v{n}")),
            (20, Told::Answer(answer)) => assert_eq!(answer.state(), State::Miss),
            (21, Told::Error(error)) => assert_eq!(
                (error.code, error.reason.as_str()),
                (3, reason::INVALID_FIELD)
            ),
            (n, other) => panic!("{n}: {other:?}"),
        }
    }
    let token = Token::decode(&response.token).unwrap().unwrap();
    assert!((0..3).all(|shard| token.revision(shard) > 0), "{token:?}");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_miss_waits_for_its_upstream_and_a_failure_serves_what_was_good() {
    let origin = Origin::start().await;
    let cluster = Cluster {
        origin: Some(&origin),
        ..Cluster::of(1)
    }
    .start()
    .await;
    let node = &cluster.nodes[0];
    let answer = get(node, "u/a").await;
    assert_eq!(
        (
            text(&answer),
            answer.state(),
            answer.stored,
            answer.upstream.as_str()
        ),
        ("u/a#1", State::Fresh, true, "u")
    );
    assert_eq!(get(node, "u/a").await.version, answer.version);
    assert_eq!(origin.calls(), 1);

    origin.answers(503);
    // Past its lifetime, inside stale_while_revalidate: at once, and refreshed behind the reader's
    // back.
    cluster.clock.advance(Duration::from_secs(70));
    assert_eq!(get(node, "u/a").await.state(), State::Stale);
    node.until(|node| async { get(node, "u/a").await.last_error.is_some() })
        .await;
    cluster.clock.advance(Duration::from_secs(600));
    let answer = get(node, "u/a").await;
    assert_eq!(
        (text(&answer), answer.state(), answer.refresh_due),
        ("u/a#1", State::StaleOnError, true)
    );
    let failure = answer.last_error.unwrap();
    assert_eq!(
        (failure.class(), failure.status),
        (FailureClass::Status, 503)
    );
    assert!(answer.age_ms >= 670_000);

    let (code, reason, metadata) = told(
        &node
            .get("u/new", Consistency::Local, &[])
            .await
            .unwrap_err(),
    );
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unavailable, reason::UPSTREAM_FAILED)
    );
    assert_eq!(
        (
            metadata["upstream"].as_str(),
            metadata["class"].as_str(),
            metadata["status"].as_str()
        ),
        ("u", "STATUS", "503")
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_refreshed_ahead_is_refreshed_once_it_is_stale() {
    let origin = Origin::start().await;
    let policy = Policy {
        eager_refresh_threshold: 0.0,
        ..policy()
    };
    let cluster = Cluster {
        origin: Some(&origin),
        policy,
        ..Cluster::of(1)
    }
    .start()
    .await;
    let node = &cluster.nodes[0];
    assert!(!get(node, "u/a").await.refresh_due);
    cluster.clock.advance(Duration::from_secs(59));
    assert!(!get(node, "u/a").await.refresh_due);
    cluster.clock.advance(Duration::from_secs(11));
    let answer = get(node, "u/a").await;
    assert_eq!((answer.state(), answer.refresh_due), (State::Stale, true));
    node.until(|node| async { get(node, "u/a").await.state() == State::Fresh })
        .await;
    assert_eq!(
        (text(&get(node, "u/a").await), origin.calls()),
        ("u/a#2", 2)
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_hangs_costs_a_miss_its_hard_timeout_and_a_stale_reader_the_soft_one() {
    let origin = Origin::start().await;
    let cluster = Cluster {
        origin: Some(&origin),
        ..Cluster::of(3)
    }
    .start()
    .await;
    let node = &cluster.nodes[0];
    assert_eq!(get(node, "u/a").await.state(), State::Fresh);
    origin.hangs();
    cluster.clock.advance(Duration::from_secs(60 + 600));
    // A heartbeat from before the clock was moved may still be on its way.
    node.until(|node| async { get(node, "u/a").await.state() == State::StaleOnError })
        .await;

    let (code, reason, metadata) = told(
        &node
            .get("u/new", Consistency::Local, &[])
            .await
            .unwrap_err(),
    );
    assert_eq!(
        (code, reason.as_str(), metadata["class"].as_str()),
        (Code::Unavailable, reason::UPSTREAM_FAILED, "TIMEOUT")
    );
    let mut hurried = Request::new(v1::GetRequest {
        key: "u/other".into(),
        ..Default::default()
    });
    hurried.set_timeout(Duration::from_millis(200));
    let (code, reason, _) = told(&node.client().get(hurried).await.unwrap_err());
    assert_eq!(
        (code, reason.as_str()),
        (Code::DeadlineExceeded, reason::DEADLINE)
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspect_tells_all_and_does_nothing() {
    let origin = Origin::start().await;
    let cluster = Cluster {
        origin: Some(&origin),
        ..Cluster::of(1)
    }
    .start()
    .await;
    let node = &cluster.nodes[0];
    let inspect = |key: &str| {
        let request = v1::InspectRequest {
            key: key.to_owned().into(),
            ..Default::default()
        };
        async move { node.client().inspect(request).await.unwrap().into_inner() }
    };
    let nothing = inspect("u/a").await;
    assert_eq!(
        (
            nothing.answer.unwrap().state(),
            nothing.entry,
            nothing.policy.unwrap().captures
        ),
        (State::Miss, None, vec!["a".to_owned()])
    );
    assert_eq!(origin.calls(), 0);

    let tags = vec!["blue".to_owned()];
    node.client()
        .set(v1::SetRequest {
            tags: tags.clone(),
            ..set("u/a", "value")
        })
        .await
        .unwrap();
    let there = inspect("u/a").await;
    let entry = there.entry.unwrap();
    assert_eq!(
        (
            entry.origin(),
            entry.size_bytes,
            entry.tags,
            entry.in_memory
        ),
        (v1::Origin::Set, 5, tags, true)
    );
    assert!(entry.refresh_at.is_some() && there.answer.unwrap().value.is_none());
    delete(node, "u/a").await;
    assert!(inspect("u/a").await.tombstone_revision.is_some());
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_node_takes_any_request_and_names_the_leader() {
    let cluster = Cluster::of(3).start().await;
    let leader = cluster.leader().await;
    let leader_address = &cluster.nodes[leader].address;
    for n in 0..30 {
        let (writer, reader) = (&cluster.nodes[n % 3], &cluster.nodes[(n + 1) % 3]);
        let written = writer.client().set(set("k", &n.to_string())).await.unwrap();
        let named = written
            .metadata()
            .get(reason::LEADER_HEADER)
            .map(|leader| leader.to_str().unwrap().to_owned());
        assert_eq!(named.as_ref(), (n % 3 != leader).then_some(leader_address));
        // It saw the write, on any node, by its token and without.
        let written_token = written.into_inner().token;
        for (consistency, token) in [
            (Consistency::Session, &written_token[..]),
            (Consistency::Linearizable, &[][..]),
        ] {
            let read = reader.get("k", consistency, token).await.unwrap();
            assert_eq!(text(&read.answer.unwrap()), n.to_string());
            assert!(
                Token::decode(&read.token).unwrap().unwrap().revision(0)
                    >= Token::decode(&written_token).unwrap().unwrap().revision(0)
            );
        }
    }
    // What nobody has seen nobody can show, not even the leader that a follower asks.
    let follower = &cluster.nodes[(leader + 1) % 3];
    let mut ahead = Token::decode(&get_token(follower).await).unwrap().unwrap();
    ahead.see(0, u64::MAX);
    let (code, reason, metadata) = told(
        &follower
            .get("k", Consistency::Session, &ahead.encode())
            .await
            .unwrap_err(),
    );
    assert_eq!((code, reason.as_str()), (Code::Unavailable, reason::BEHIND));
    assert_eq!(metadata.get("leader"), None, "the leader itself said so");
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_on_a_follower_has_seen_its_session_over_all_shards() {
    let cluster = Cluster {
        shards: 3,
        ..Cluster::of(3)
    }
    .start()
    .await;
    for round in 0..10 {
        let mut session = Token::default();
        let keys: Vec<String> = (0..12).map(|n| format!("k{n}")).collect();
        let value = round.to_string();
        for written in join_all(keys.iter().map(|key| async {
            cluster.nodes[0]
                .client()
                .set(set(key, &value))
                .await
                .unwrap()
        }))
        .await
        {
            session.merge(&Token::decode(&written.into_inner().token).unwrap().unwrap());
        }
        let request = v1::BatchGetRequest {
            keys: keys.iter().map(|key| key.clone().into()).collect(),
            token: session.encode(),
            ..Default::default()
        };
        for node in &cluster.nodes {
            let read = node
                .client()
                .batch_get(request.clone())
                .await
                .unwrap()
                .into_inner();
            for result in &read.results {
                let Some(Told::Answer(answer)) = &result.result else {
                    panic!("{result:?}")
                };
                assert_eq!(text(answer), value);
            }
            let token = Token::decode(&read.token).unwrap().unwrap();
            assert!(
                (0..3).all(|shard| token.revision(shard) >= session.revision(shard)),
                "{token:?} {session:?}"
            );
        }
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_local_reads_go_on_and_writes_say_they_were_not_applied() {
    let mut cluster = Cluster::of(3).start().await;
    let written = cluster.nodes[0]
        .client()
        .set(set("k", "v"))
        .await
        .unwrap()
        .into_inner();
    for node in &cluster.nodes {
        node.get("k", Consistency::Session, &written.token)
            .await
            .unwrap();
    }
    let leader = cluster.leader().await;
    cluster.nodes.swap(0, leader);
    for node in cluster.nodes.drain(..2) {
        node.stop().await;
    }
    let left = &cluster.nodes[0];
    let replica = left.replicas.replica(0).unwrap();
    // Who stops hands over, and the last to stop may just have acknowledged the one that is left as
    // leader: no leader at this instant may be one elected at the next.
    tokio::time::sleep(replica.pace().heard_for()).await;
    let mut watched = replica.watch_leader();
    tokio::time::timeout(PATIENCE, watched.wait_for(Option::is_none))
        .await
        .unwrap()
        .unwrap();

    assert_eq!(
        text(
            &left
                .get("k", Consistency::Local, &[])
                .await
                .unwrap()
                .answer
                .unwrap()
        ),
        "v"
    );
    assert_eq!(
        text(
            &left
                .get("k", Consistency::Session, &written.token)
                .await
                .unwrap()
                .answer
                .unwrap()
        ),
        "v"
    );
    let hurried = |mut request: Request<_>| {
        request.set_timeout(Duration::from_millis(400));
        request
    };
    let (code, _, metadata) = told(
        &left
            .client()
            .set(hurried(Request::new(set("k", "w"))))
            .await
            .unwrap_err(),
    );
    assert_eq!(
        (code, metadata["applied"].as_str()),
        (Code::Unavailable, "no")
    );
    let strict = v1::GetRequest {
        key: "k".into(),
        consistency: Consistency::Linearizable.into(),
        ..Default::default()
    };
    let mut strict = Request::new(strict);
    strict.set_timeout(Duration::from_millis(400));
    assert_eq!(
        told(&left.client().get(strict).await.unwrap_err()).0,
        Code::Unavailable
    );
    let mut ahead = Token::decode(&written.token).unwrap().unwrap();
    ahead.see(0, u64::MAX);
    let status = left
        .get("k", Consistency::Session, &ahead.encode())
        .await
        .unwrap_err();
    assert_eq!(told(&status).0, Code::Unavailable);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_miss_on_any_node_is_one_call_and_a_failure_keeps_its_class_over_the_hop() {
    let origin = Origin::start().await;
    let cluster = Cluster {
        origin: Some(&origin),
        ..Cluster::of(3)
    }
    .start()
    .await;
    let readers = (0..60).map(|n| get(&cluster.nodes[n % 3], "u/a"));
    for answer in join_all(readers).await {
        assert_eq!((text(&answer), answer.state()), ("u/a#1", State::Fresh));
    }
    assert_eq!(origin.calls(), 1);
    origin.answers(403);
    for node in &cluster.nodes {
        let (code, _, metadata) = told(
            &node
                .get("u/new", Consistency::Unspecified, &[])
                .await
                .unwrap_err(),
        );
        assert_eq!(
            (
                code,
                metadata["class"].as_str(),
                metadata["status"].as_str()
            ),
            (Code::Unavailable, "STATUS", "403")
        );
    }
    cluster.stop().await;
}
