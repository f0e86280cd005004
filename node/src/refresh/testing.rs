//! What the tests of this folder share: an upstream under their command, and nodes with real
//! replicas in memory.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, http::Uri};
use futures::future::join_all;
use holdfast_proto::{
    Key, Revision,
    peer::{Outcome, command::Op, outcome},
};
use holdfast_raft::{
    Clock, InMemory, LogKept, Membership, Options, Replica, Replicas, Stores, View,
};
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;

use super::{FetchOutcome, Need, Refresher};
use crate::{
    cache::{self, Cache},
    glob::Glob,
    metrics::Metrics,
    peers::peer_service,
    policy::{Policies, Policy, Window},
    rules::Rules,
    template::UrlTemplate,
    upstream::{
        Shared, Upstream, Upstreams,
        http::{Http, HttpSpec},
    },
};

/// Longer than anything here takes: a test that waits so long fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// For every key, from upstream `u`: delays from 3 s to a minute without chance, values for a
/// minute.
pub(super) fn policy() -> Policy {
    Policy {
        ttl_jitter: 0.0,
        stale_if_error: Window::Forever,
        ..Policy::new(Glob::parse("*").unwrap(), "u")
    }
}

pub(super) fn key(text: &str) -> Key {
    Key::new(text.to_owned()).unwrap()
}

/// Answers `{path}#{call}`, where calls are counted by path, with the status it was told, once it
/// is let.
#[derive(Clone)]
pub(super) struct Origin {
    pub(super) url: String,
    /// All calls so far.
    calls: watch::Sender<usize>,
    by_path: Arc<Mutex<HashMap<String, usize>>>,
    status: Arc<Mutex<StatusCode>>,
    /// Calls up to this one are answered.
    let_through: watch::Sender<usize>,
}

impl Origin {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let origin = Self {
            url: format!("http://{}/{{key}}", listener.local_addr().unwrap()),
            calls: watch::Sender::new(0),
            by_path: Arc::default(),
            status: Arc::new(Mutex::new(StatusCode::OK)),
            let_through: watch::Sender::new(usize::MAX),
        };
        let router = Router::new()
            .fallback(Self::answer)
            .with_state(origin.clone());
        drop(tokio::spawn(
            async move { axum::serve(listener, router).await },
        ));
        origin
    }

    async fn answer(State(origin): State<Self>, uri: Uri) -> (StatusCode, String) {
        let path = uri.path().trim_start_matches('/').to_owned();
        let call = {
            let mut by_path = origin.by_path.lock().unwrap();
            let call = by_path.entry(path.clone()).or_default();
            *call += 1;
            *call
        };
        let mut number = 0;
        origin.calls.send_modify(|calls| {
            *calls += 1;
            number = *calls;
        });
        let _ = origin
            .let_through
            .subscribe()
            .wait_for(|let_through| number <= *let_through)
            .await;
        let status = *origin.status.lock().unwrap();
        (status, format!("{path}#{call}"))
    }

    pub(super) fn answers(&self, status: u16) {
        *self.status.lock().unwrap() = StatusCode::from_u16(status).unwrap();
    }

    /// Calls up to this number are answered, later ones hang.
    pub(super) fn lets_through(&self, calls: usize) {
        self.let_through.send_replace(calls);
    }

    pub(super) fn calls(&self) -> usize {
        *self.calls.borrow()
    }

    pub(super) fn calls_of(&self, path: &str) -> usize {
        self.by_path.lock().unwrap().get(path).copied().unwrap_or(0)
    }

    pub(super) async fn called(&self, calls: usize) {
        let mut watched = self.calls.subscribe();
        let reached = watched.wait_for(|now| *now >= calls);
        tokio::time::timeout(PATIENCE, reached)
            .await
            .expect("the origin is called in time")
            .unwrap();
    }
}

/// A node as far as the refresh needs one.
pub(super) struct Node {
    pub(super) replicas: Arc<Replicas>,
    pub(super) refresher: Arc<Refresher>,
    pub(super) policy: Policy,
    listener: JoinHandle<()>,
}

impl Node {
    /// One that forms a cluster of its own.
    pub(super) async fn alone(origin: &Origin, policy: Policy, clock: Clock) -> Self {
        let mut nodes = Self::cluster(1, origin, policy, clock).await;
        nodes.pop().unwrap()
    }

    /// So many, with one leader.
    pub(super) async fn cluster(
        count: usize,
        origin: &Origin,
        policy: Policy,
        clock: Clock,
    ) -> Vec<Self> {
        let listeners = join_all((0..count).map(|_| TcpListener::bind("127.0.0.1:0"))).await;
        let listeners: Vec<_> = listeners.into_iter().map(Result::unwrap).collect();
        let addresses: Vec<String> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap().to_string())
            .collect();
        let started = listeners.into_iter().enumerate().map(|(n, listener)| {
            let options = Options {
                name: format!("node-{n}"),
                region: String::new(),
                learner_only: false,
                data_dir: std::env::temp_dir(),
                peer_address: addresses[n].clone(),
                client_address: addresses[n].clone(),
                expect: u32::try_from(count).unwrap(),
                discover: addresses.clone(),
                shards: 1,
                memory_bytes_max: 64 << 20,
                disk_bytes_max: 1 << 40,
                log_kept: LogKept {
                    entries: 10_000,
                    bytes: 64 << 20,
                },
            };
            Self::start(options, listener, origin, policy.clone(), clock.clone())
        });
        let nodes = join_all(started).await;
        for node in &nodes {
            let mut membership = node.replicas.membership();
            let member = membership.wait_for(|membership| *membership == Membership::Member);
            tokio::time::timeout(PATIENCE, member)
                .await
                .expect("the cluster forms in time")
                .unwrap();
        }
        for node in &nodes {
            let mut leader = node.replica().watch_leader();
            tokio::time::timeout(PATIENCE, leader.wait_for(Option::is_some))
                .await
                .expect("a leader in time")
                .unwrap();
        }
        leading(&nodes).await;
        nodes
    }

    async fn start(
        options: Options,
        listener: TcpListener,
        origin: &Origin,
        policy: Policy,
        clock: Clock,
    ) -> Self {
        let metrics = Arc::new(Metrics::default());
        let replicas = Replicas::open(options, Stores::memory(), clock.clone(), metrics.clone())
            .await
            .unwrap();
        let policies = Policies::from_iter([policy.clone()]);
        let upstreams = Upstreams::from_iter([upstream("u", origin)]);
        let rules = Rules::new(policies, upstreams).current();
        let refresher = Refresher::new(
            replicas.clone(),
            rules.clone(),
            metrics.clone(),
            clock.clone(),
        );
        let settings = cache::Settings {
            session_wait: Duration::ZERO,
        };
        let cache = Cache::new(
            replicas.clone(),
            rules,
            refresher.clone(),
            settings,
            metrics,
        );
        let server = tonic::transport::Server::builder()
            .add_service(replicas.replica_service())
            .add_service(replicas.membership_service())
            .add_service(peer_service(replicas.clone(), cache, refresher.clone()));
        let listener = tokio::spawn(async move {
            server
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap()
        });
        replicas.start();
        refresher.start();
        Self {
            replicas,
            refresher,
            policy,
            listener,
        }
    }

    pub(super) fn replica(&self) -> &Arc<Replica> {
        self.replicas.replicas().next().unwrap()
    }

    /// Other rules from here on, as another configuration would have.
    pub(super) fn obeys(&self, rules: Rules) {
        self.refresher.rules.store(Arc::new(rules));
    }

    pub(super) async fn fetch(&self, key: &Key, timeout: Duration) -> FetchOutcome {
        self.refresher
            .fetch(key, &self.policy, timeout, Need::IfDue)
            .await
    }

    pub(super) fn is_refreshing(&self, key: &Key) -> bool {
        self.refresher.is_refreshing(key, &self.policy)
    }

    pub(super) fn should_not_wait(&self, key: &Key, view: &View) -> bool {
        let policy = Policy {
            soft_timeout: PATIENCE,
            ..self.policy.clone()
        };
        self.refresher.should_not_wait(key, view, &policy)
    }

    pub(super) fn view(&self, key: &Key) -> Option<View> {
        match self.replica().in_memory(key) {
            InMemory::Found(view) => Some(view),
            InMemory::Absent | InMemory::Unknown => None,
        }
    }

    pub(super) fn value(&self, key: &Key) -> Option<String> {
        self.view(key)
            .map(|view| String::from_utf8(view.value().unwrap().to_vec()).unwrap())
    }

    pub(super) async fn write(&self, op: Op) -> Revision {
        let Outcome { result } = {
            let replica = self.replica();
            replica.write(op, None, &replica.deadline(PATIENCE)).await
        }
        .unwrap();
        match result {
            Some(outcome::Result::Done(done)) => done.revision,
            other => panic!("{other:?}"),
        }
    }

    /// Moves time, and waits until this node judges by it: a leader notes its wall clock and its
    /// monotonic clock one after the other, and may do so across the move; the next note, 20 ms
    /// later, is right.
    pub(super) async fn advance(&self, clock: &Clock, by: Duration) {
        let moved = self.replica().now() + u64::try_from(by.as_millis()).unwrap();
        clock.advance(by);
        let mut in_a_row = 0;
        while in_a_row < 3 {
            tokio::time::sleep(Duration::from_millis(15)).await;
            in_a_row = if self.replica().now() >= moved {
                in_a_row + 1
            } else {
                0
            };
        }
    }

    /// Waits until what is applied here makes it so.
    pub(super) async fn applied(&self, so: impl Fn(&Self) -> bool) {
        let mut applied = self.replica().watch_applied();
        let reached = applied.wait_for(|_| so(self));
        tokio::time::timeout(PATIENCE, reached)
            .await
            .expect("applied in time")
            .unwrap();
    }

    /// Gone from the network, and its flights with it.
    pub(super) async fn stop(self) {
        self.listener.abort();
        self.refresher.stop().await;
        self.replicas.close().await;
    }
}

/// The node that leads, once it may fetch.
pub(super) async fn leading(nodes: &[Node]) -> usize {
    let leads = nodes.iter().map(|node| {
        Box::pin(async move {
            let mut leads = node.replica().watch_leads();
            leads.wait_for(Option::is_some).await.map(|_| ()).unwrap();
        })
    });
    tokio::time::timeout(PATIENCE, futures::future::select_all(leads))
        .await
        .expect("a node leads in time")
        .1
}

pub(super) fn upstream(name: &str, origin: &Origin) -> Upstream {
    let spec = HttpSpec {
        fetch_timeout: Duration::from_secs(60),
        ..HttpSpec::new(UrlTemplate::parse(&origin.url).unwrap())
    };
    let shared = Shared::new(Clock::system());
    Upstream::Http(Http::new(name.to_owned(), spec, Arc::default(), &shared).unwrap())
}
