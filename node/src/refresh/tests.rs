//! The engine with real replicas, in memory, and a real upstream.

use std::time::Duration;

use bytes::Bytes;
use futures::future::join_all;
use holdfast_proto::{
    Key,
    peer::{self, Lifetime, command::Op},
    timeline::FOREVER,
    v1::{FailureClass, Origin as From},
};
use holdfast_raft::Clock;
use tokio::task::JoinHandle;

use super::{
    FetchOutcome, Need,
    marks::Hashed,
    queue::Priority,
    testing::{Node, Origin, PATIENCE, key, leading, policy, upstream},
};
use crate::{
    glob::Glob,
    policy::{Policies, Policy},
    rules::Rules,
    upstream::Upstreams,
};

fn set(text: &str, value: &str) -> Op {
    let lifetime = Lifetime {
        fresh_ms: 60_000,
        refresh_after_ms: 48_000,
        stale_while_revalidate_ms: 0,
        stale_if_error_ms: FOREVER,
        min_refresh_interval_ms: 0,
        keep_ms: 0,
    };
    Op::Set(peer::Set {
        key: text.to_owned().into(),
        value: value.to_owned().into(),
        lifetime: Some(lifetime),
        origin: From::Set.into(),
        ..Default::default()
    })
}

fn is_fetched(outcome: &FetchOutcome) -> bool {
    matches!(
        outcome,
        FetchOutcome::Committed { .. } | FetchOutcome::Unstored { .. }
    )
}

fn delete(text: &str) -> Op {
    Op::Delete(peer::Delete {
        key: text.to_owned().into(),
    })
}

fn invalidate(text: &str) -> Op {
    Op::Invalidate(peer::Invalidate {
        key: text.to_owned().into(),
    })
}

/// A reader that has asked before this returns.
async fn reader(node: &Node, text: &str) -> JoinHandle<FetchOutcome> {
    let (refresher, policy, key) = (node.refresher.clone(), node.policy.clone(), key(text));
    let (asked, asks) = tokio::sync::oneshot::channel();
    let reader = tokio::spawn(async move {
        let mut fetch = Box::pin(refresher.fetch(&key, &policy, PATIENCE, Need::IfDue));
        let now = futures::poll!(&mut fetch);
        let _ = asked.send(());
        match now {
            std::task::Poll::Ready(landed) => landed,
            std::task::Poll::Pending => fetch.await,
        }
    });
    asks.await.unwrap();
    reader
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_concurrent_first_reads_cause_one_call() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let readers = join_all((0..100).map(|_| reader(&node, "a"))).await;
    origin.called(1).await;
    origin.lets_through(usize::MAX);
    for reader in readers {
        let FetchOutcome::Committed { revision } = reader.await.unwrap() else {
            panic!("not committed")
        };
        assert!(node.replica().applied().revision >= revision);
    }
    assert_eq!(node.value(&key("a")).unwrap(), "a#1");
    // One who comes late has its value without a call.
    assert!(matches!(
        node.fetch(&key("a"), PATIENCE).await,
        FetchOutcome::Committed { .. }
    ));
    assert_eq!(origin.calls(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_what_was_fetched_before_a_delete_though_the_key_was_never_there() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let before = reader(&node, "a").await;
    origin.called(1).await;
    node.write(delete("a")).await;
    let after = reader(&node, "a").await;
    origin.lets_through(usize::MAX);
    for reader in [before, after] {
        assert!(matches!(
            reader.await.unwrap(),
            FetchOutcome::Committed { .. }
        ));
    }
    assert_eq!(node.value(&key("a")).unwrap(), "a#2");
    assert_eq!(origin.calls(), 2);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_key_that_nobody_reads_is_not_fetched_again() {
    let origin = Origin::start().await;
    let clock = Clock::system();
    let node = Node::alone(&origin, policy(), clock.clone()).await;
    node.write(set("a", "old")).await;
    node.advance(&clock, Duration::from_secs(50)).await;
    origin.lets_through(0);
    node.refresher.ask(&key("a"), Priority::Asked);
    origin.called(1).await;
    node.write(delete("a")).await;
    // A report that was on its way.
    node.refresher.ask(&key("b"), Priority::Asked);
    assert!(!node.is_refreshing(&key("b")));
    origin.lets_through(usize::MAX);
    let landed = async {
        while node.is_refreshing(&key("a")) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, landed).await.unwrap();
    assert_eq!((node.value(&key("a")), origin.calls()), (None, 1));
    // Its next reader waits for a fetch as ever.
    assert!(matches!(
        node.fetch(&key("a"), PATIENCE).await,
        FetchOutcome::Committed { .. }
    ));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalidate_during_a_fetch_causes_another() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    node.write(set("a", "old")).await;
    node.write(invalidate("a")).await;
    origin.lets_through(0);
    let before = reader(&node, "a").await;
    origin.called(1).await;
    node.write(invalidate("a")).await;
    origin.lets_through(usize::MAX);
    assert!(matches!(
        before.await.unwrap(),
        FetchOutcome::Committed { .. }
    ));
    assert_eq!(node.value(&key("a")).unwrap(), "a#2");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_during_a_fetch_wins_and_is_what_readers_are_told_of() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let before = reader(&node, "a").await;
    origin.called(1).await;
    let revision = node.write(set("a", "newer")).await;
    origin.lets_through(usize::MAX);
    assert_eq!(before.await.unwrap(), FetchOutcome::Committed { revision });
    assert_eq!(node.value(&key("a")).unwrap(), "newer");
    assert_eq!(origin.calls(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_value_too_large_to_store_goes_to_its_readers_unless_the_key_was_deleted_meanwhile() {
    let origin = Origin::start().await;
    let node = Node::alone(
        &origin,
        Policy {
            max_value_bytes: 2,
            ..policy()
        },
        Clock::system(),
    )
    .await;
    origin.lets_through(0);
    let before = reader(&node, "a").await;
    origin.called(1).await;
    node.write(delete("a")).await;
    let after = reader(&node, "a").await;
    origin.lets_through(usize::MAX);
    for reader in [before, after] {
        let FetchOutcome::Unstored { value, .. } = reader.await.unwrap() else {
            panic!("stored")
        };
        assert_eq!(value, "a#2");
    }
    assert_eq!(node.value(&key("a")), None);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_miss_is_not_tried_again_within_error_ttl() {
    let origin = Origin::start().await;
    let clock = Clock::system();
    let node = Node::alone(
        &origin,
        Policy {
            error_ttl: Duration::from_secs(100),
            ..policy()
        },
        clock.clone(),
    )
    .await;
    origin.answers(500);
    for _ in 0..1_000 {
        let FetchOutcome::Failed(failure) = node.fetch(&key("a"), PATIENCE).await else {
            panic!("no failure")
        };
        assert_eq!(
            (failure.class, failure.status, failure.count),
            (FailureClass::Status, 500, 1)
        );
    }
    assert_eq!(origin.calls(), 1);
    node.advance(&clock, Duration::from_secs(101)).await;
    origin.answers(200);
    let landed = node.fetch(&key("a"), PATIENCE).await;
    assert!(
        matches!(landed, FetchOutcome::Committed { .. }),
        "{landed:?} {}",
        origin.calls()
    );
    assert_eq!(origin.calls(), 2);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failed_refresh_changes_nothing_is_known_to_all_and_success_resets_it() {
    let origin = Origin::start().await;
    let clock = Clock::system();
    let node = Node::alone(&origin, policy(), clock.clone()).await;
    node.write(set("a", "good")).await;
    origin.answers(404);
    node.advance(&clock, Duration::from_secs(50)).await;
    node.refresher.note_read(&key("a"), true);
    node.applied(|node| node.view(&key("a")).unwrap().failure().is_some())
        .await;
    let view = node.view(&key("a")).unwrap();
    let failure = view.failure().unwrap();
    assert_eq!(
        (
            view.value().unwrap().as_ref(),
            failure.class(),
            failure.status,
            failure.count
        ),
        (b"good".as_slice(), FailureClass::Status, 404, 1)
    );
    assert!(node.should_not_wait(&key("a"), &view));
    assert!(matches!(
        node.fetch(&key("a"), PATIENCE).await,
        FetchOutcome::Failed(_)
    ));
    assert_eq!(origin.calls(), 1);

    origin.answers(200);
    node.advance(&clock, Duration::from_secs(4)).await;
    assert!(!node.should_not_wait(&key("a"), &view));
    assert!(matches!(
        node.fetch(&key("a"), PATIENCE).await,
        FetchOutcome::Committed { .. }
    ));
    let view = node.view(&key("a")).unwrap();
    assert_eq!(
        (view.value().unwrap().as_ref(), view.failure().is_none()),
        (b"a#2".as_slice(), true)
    );
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_leave_do_not_end_the_fetch() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let first = reader(&node, "a").await;
    origin.called(1).await;
    first.abort();
    assert_eq!(
        node.fetch(&key("a"), Duration::from_millis(1)).await,
        FetchOutcome::TimedOut
    );
    assert!(node.is_refreshing(&key("a")));
    origin.lets_through(usize::MAX);
    node.applied(|node| node.value(&key("a")).is_some()).await;
    assert_eq!(origin.calls(), 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_than_24_misses_in_flight_and_10_000_waiting_are_refused_at_once() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let mut readers = Vec::new();
    for n in 0..10_024 {
        readers.push(reader(&node, &format!("k{n}")).await);
    }
    assert_eq!(
        node.fetch(&key("more"), PATIENCE).await,
        FetchOutcome::Overloaded
    );
    origin.called(24).await;
    assert_eq!(origin.calls(), 24);
    // Their readers leave: what waited makes room at once, and is never fetched.
    readers.iter().for_each(JoinHandle::abort);
    for reader in readers {
        assert!(reader.await.is_err());
    }
    origin.lets_through(usize::MAX);
    assert!(is_fetched(&node.fetch(&key("more"), PATIENCE).await));
    assert!(origin.calls() <= 25, "{}", origin.calls());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fetch_that_runs_or_waits_keeps_the_key_and_not_the_message_it_came_in() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let message = Bytes::from(
        (0..80)
            .flat_map(|n| format!("k{n:09}").into_bytes())
            .collect::<Vec<_>>(),
    );
    for at in (0..message.len()).step_by(10) {
        // As it waits, for as long as the test does.
        let key = Key::new(message.slice(at..at + 10)).unwrap();
        let (refresher, policy) = (node.refresher.clone(), node.policy.clone());
        let mut fetch = Box::pin(async move {
            let owned = key;
            refresher
                .fetch(&owned, &policy, PATIENCE, Need::IfDue)
                .await
        });
        assert!(futures::poll!(&mut fetch).is_pending());
    }
    assert!(message.is_unique());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flight_without_a_slot_ends_with_its_last_reader_and_the_upstream_is_not_blamed() {
    let origin = Origin::start().await;
    let node = Node::alone(&origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let mut running = Vec::new();
    for n in 0..24 {
        running.push(reader(&node, &format!("k{n}")).await);
    }
    origin.called(24).await;
    let (one, other) = (reader(&node, "a").await, reader(&node, "a").await);
    assert_eq!(
        node.fetch(&key("a"), Duration::from_millis(1)).await,
        FetchOutcome::Overloaded
    );
    assert!(node.is_refreshing(&key("a")), "two more wait");
    one.abort();
    other.abort();
    let gone = async {
        while node.is_refreshing(&key("a")) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.unwrap();
    assert!(node.is_refreshing(&key("k0")));
    origin.lets_through(usize::MAX);
    for reader in running {
        assert!(is_fetched(&reader.await.unwrap()));
    }
    assert_eq!(origin.calls_of("a"), 0);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_read_is_refreshed_ahead_and_what_was_not_is_left_alone() {
    let origin = Origin::start().await;
    let clock = Clock::system();
    let node = Node::alone(&origin, policy(), clock.clone()).await;
    for text in ["read", "unread"] {
        node.fetch(&key(text), PATIENCE).await;
    }
    let refreshed = |text: &'static str, value: String| {
        node.applied(move |node| node.value(&key(text)).as_ref() == Some(&value))
    };
    // Its next reader finds it due, and that suffices.
    node.advance(&clock, Duration::from_secs(50)).await;
    node.refresher.note_read(&key("unread"), true);
    refreshed("unread", "unread#2".to_owned()).await;
    node.refresher.note_read(&key("read"), true);
    refreshed("read", "read#2".to_owned()).await;

    for call in 3..6 {
        node.refresher.note_read(&key("read"), false);
        node.advance(&clock, Duration::from_secs(50)).await;
        refreshed("read", format!("read#{call}")).await;
    }
    assert_eq!((origin.calls_of("read"), origin.calls_of("unread")), (5, 2));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_three_nodes_cause_one_call_and_reads_anywhere_refresh_ahead() {
    let origin = Origin::start().await;
    let clock = Clock::system();
    let nodes = Node::cluster(3, &origin, policy(), clock.clone()).await;
    origin.lets_through(0);
    let mut readers = Vec::new();
    for n in 0..90 {
        readers.push(reader(&nodes[n % 3], "a").await);
    }
    origin.called(1).await;
    origin.lets_through(usize::MAX);
    for reader in readers {
        assert!(matches!(
            reader.await.unwrap(),
            FetchOutcome::Committed { .. }
        ));
    }
    assert_eq!(origin.calls(), 1);

    let follower = &nodes[(leading(&nodes).await + 1) % 3];
    follower
        .applied(|node| node.value(&key("a")).is_some())
        .await;
    clock.advance(Duration::from_secs(49));
    // Again and again: with the clock moved, the leader and its time are lost for a heartbeat.
    let reads = async {
        let mut every = tokio::time::interval(Duration::from_millis(50));
        loop {
            every.tick().await;
            follower.refresher.note_read(&key("a"), true);
        }
    };
    tokio::select! {
        () = follower.applied(|node| node.value(&key("a")).unwrap() == "a#2") => {}
        () = reads => {}
    }
    join_all(nodes.into_iter().map(Node::stop)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_get_their_value_though_the_leader_is_lost_in_mid_fetch() {
    let origin = Origin::start().await;
    let mut nodes = Node::cluster(3, &origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let lost = nodes.remove(leading(&nodes).await);
    let readers = join_all((0..20).map(|n| reader(&nodes[n % 2], "a"))).await;
    origin.called(1).await;
    lost.stop().await;
    leading(&nodes).await;
    origin.called(2).await;
    origin.lets_through(usize::MAX);
    for reader in readers {
        assert!(matches!(
            reader.await.unwrap(),
            FetchOutcome::Committed { .. }
        ));
    }
    assert_eq!(origin.calls(), 2);
    join_all(nodes.into_iter().map(Node::stop)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_cut_off_from_its_quorum_gives_no_value_that_it_could_not_store() {
    let origin = Origin::start().await;
    let mut nodes = Node::cluster(
        3,
        &origin,
        Policy {
            max_value_bytes: 2,
            ..policy()
        },
        Clock::system(),
    )
    .await;
    let leader = nodes.remove(leading(&nodes).await);
    origin.lets_through(0);
    let waits = reader(&leader, "a").await;
    origin.called(1).await;
    // It goes on leading for as long as it cannot know: meanwhile the others may have another
    // leader, and delete the key.
    join_all(nodes.into_iter().map(Node::stop)).await;
    origin.lets_through(usize::MAX);
    assert_eq!(waits.await.unwrap(), FetchOutcome::NotLeading);
    leader.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_leader_nobody_fetches_and_readers_are_told() {
    let origin = Origin::start().await;
    let mut nodes = Node::cluster(3, &origin, policy(), Clock::system()).await;
    let left = nodes.remove(leading(&nodes).await);
    join_all(nodes.into_iter().map(Node::stop)).await;
    let mut leader = left.replica().watch_leader();
    tokio::time::timeout(PATIENCE, leader.wait_for(Option::is_none))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        left.fetch(&key("a"), Duration::from_millis(300)).await,
        FetchOutcome::NotLeading
    );
    left.refresher.note_read(&key("a"), true);
    assert_eq!(origin.calls(), 0);
    // What was read meanwhile is for the next leader to know.
    left.refresher.stop().await;
    left.refresher.note_read(&key("b"), true);
    left.refresher
        .report(0, left.refresher.marks.take_report(true))
        .await;
    assert!(
        left.refresher
            .marks
            .take_report(true)
            .due
            .contains(&key("b"))
    );
    left.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deposed_leader_lets_go_and_its_readers_get_their_value_from_the_next() {
    let origin = Origin::start().await;
    let nodes = Node::cluster(3, &origin, policy(), Clock::system()).await;
    origin.lets_through(0);
    let deposed = &nodes[leading(&nodes).await];
    let readers = join_all((0..20).map(|_| reader(deposed, "a"))).await;
    origin.called(1).await;
    deposed
        .replica()
        .hand_over(None)
        .await
        .expect("another voter takes over");
    origin.called(2).await;
    let lets_go = async {
        while !deposed.refresher.queue("u").is_idle() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, lets_go)
        .await
        .expect("the flight of the earlier term ends though its call hangs");
    origin.lets_through(usize::MAX);
    for reader in readers {
        assert!(matches!(
            reader.await.unwrap(),
            FetchOutcome::Committed { .. }
        ));
    }
    assert_eq!(origin.calls(), 2);
    join_all(nodes.into_iter().map(Node::stop)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_asks_once_for_a_key_however_many_readers_it_has() {
    let origin = Origin::start().await;
    let nodes = Node::cluster(3, &origin, policy(), Clock::system()).await;
    let follower = &nodes[(leading(&nodes).await + 1) % 3];
    origin.lets_through(0);
    let mut readers = Vec::new();
    for _ in 0..3_000 {
        readers.push(reader(follower, "a").await);
    }
    origin.called(1).await;
    assert!(follower.is_refreshing(&key("a")));
    let questions = follower
        .refresher
        .links
        .lock()
        .values()
        .map(|link| link.len())
        .sum::<usize>();
    assert_eq!(questions, 1);
    // One whose time runs out while the upstream is called says so.
    assert_eq!(
        follower.fetch(&key("a"), Duration::from_millis(1)).await,
        FetchOutcome::TimedOut
    );
    origin.lets_through(usize::MAX);
    for reader in readers {
        let outcome = reader.await.unwrap();
        assert!(is_fetched(&outcome), "{outcome:?}");
    }
    assert_eq!(origin.calls(), 1);
    assert!(!follower.is_refreshing(&key("a")));
    join_all(nodes.into_iter().map(Node::stop)).await;
}

/// On the leader and on a follower, with as many misses as one upstream may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_that_hangs_leaves_the_misses_of_another_alone() {
    let (hangs, healthy) = (Origin::start().await, Origin::start().await);
    let nodes = Node::cluster(3, &hangs, policy(), Clock::system()).await;
    let other = Policy {
        pattern: Glob::parse("healthy*").unwrap(),
        upstream: "healthy".into(),
        ..policy()
    };
    for node in &nodes {
        node.obeys(Rules::new(
            Policies::from_iter([other.clone(), policy()]),
            Upstreams::from_iter([upstream("u", &hangs), upstream("healthy", &healthy)]),
        ));
    }
    let leader = leading(&nodes).await;
    hangs.lets_through(0);
    let mut hanging = Vec::new();
    for n in 0..10_024 {
        hanging.push(reader(&nodes[(leader + n % 2) % 3], &format!("k{n}")).await);
    }
    hangs.called(24).await;
    for (n, node) in nodes.iter().enumerate() {
        for read in 0..20 {
            let key = key(&format!("healthy-{n}-{read}"));
            let outcome = node
                .refresher
                .fetch(&key, &other, PATIENCE, Need::IfDue)
                .await;
            assert!(is_fetched(&outcome), "{outcome:?} at {n}");
        }
    }
    assert_eq!((healthy.calls(), hangs.calls()), (60, 24));
    // What waits there ends with its readers, through the follower too, and makes room.
    hanging.iter().for_each(JoinHandle::abort);
    hangs.lets_through(usize::MAX);
    let follower = &nodes[(leader + 1) % 3];
    assert!(is_fetched(&follower.fetch(&key("more"), PATIENCE).await));
    assert!(hangs.calls() <= 25 + 24, "{}", hangs.calls());
    join_all(nodes.into_iter().map(Node::stop)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_leading_tells_the_next_leader_what_was_read() {
    let origin = Origin::start().await;
    let mut nodes = Node::cluster(3, &origin, policy(), Clock::system()).await;
    let leader = nodes.remove(leading(&nodes).await);
    let read = (0..200).map(|n| key(&format!("k{n}")));
    read.clone()
        .for_each(|key| leader.refresher.note_read(&key, false));
    leader
        .replica()
        .hand_over(None)
        .await
        .expect("another voter");
    leader.stop().await;
    let next = &nodes[leading(&nodes).await];
    let known = |key: &Key| next.refresher.marks.read_at(Hashed::of(key)).is_some();
    assert_eq!(read.filter(known).count(), 200);
    join_all(nodes.into_iter().map(Node::stop)).await;
}

fn plain(text: &str, value: &str) -> Op {
    let lifetime = Lifetime {
        fresh_ms: FOREVER,
        refresh_after_ms: FOREVER,
        ..Lifetime::default()
    };
    Op::Set(peer::Set {
        key: text.to_owned().into(),
        value: value.to_owned().into(),
        lifetime: Some(lifetime),
        origin: From::Plain.into(),
        ..Default::default()
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_without_the_policy_stored_is_refreshed_all_the_same() {
    let origin = Origin::start().await;
    let clock = Clock::system();
    let node = Node::alone(&origin, policy(), clock.clone()).await;
    node.write(plain("a", "set")).await;
    node.refresher.ask(&key("a"), Priority::Asked);
    assert!(!node.is_refreshing(&key("a")), "not before its time");
    node.advance(&clock, Duration::from_secs(50)).await;
    node.refresher.note_read(&key("a"), true);
    node.applied(|node| node.value(&key("a")).as_deref() == Some("a#1"))
        .await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_leaders_policies_judge_and_no_upstream_is_blamed() {
    let origin = Origin::start().await;
    let nodes = Node::cluster(3, &origin, policy(), Clock::system()).await;
    let leader = leading(&nodes).await;
    let (judge, follower) = (&nodes[leader], &nodes[(leader + 1) % 3]);
    let knows = |node: &Node, differs: bool| {
        let rules = node.refresher.rules.load_full();
        node.refresher.judged_by(node.replica(), &rules).is_some() == differs
    };
    let known = async |differs| {
        while !knows(follower, differs) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, known(false)).await.unwrap();

    // The leader was configured first, or last: it has no policy for any key.
    judge.obeys(Rules::default());
    let began = judge.refresher.clock.monotonic();
    let outcome = follower.fetch(&key("a"), PATIENCE).await;
    assert_eq!((outcome, origin.calls()), (FetchOutcome::NoPolicy, 0));
    assert!(judge.refresher.clock.monotonic() - began < PATIENCE / 2);
    // The next report tells the follower that its own rules are not what counts.
    follower.refresher.note_read(&key("b"), true);
    tokio::time::timeout(PATIENCE, known(true)).await.unwrap();
    join_all(nodes.into_iter().map(Node::stop)).await;
}
