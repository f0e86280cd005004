//! Nodes as far as the door needs them, on real listeners, and an upstream under a test's command.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, http::Uri};
use futures::future::{join_all, select_all};
use holdfast_proto::v1::{self, Consistency, cache_service_client::CacheServiceClient};
use holdfast_raft::{Clock, LogKept, Membership, Options, Replicas, Stores};
use parking_lot::Mutex;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Server},
};

use crate::{
    cache::{Cache, Settings},
    glob::Glob,
    grpc::{OperationLayer, cache_service, cluster_service},
    metrics::Metrics,
    operation::{Limits, Operations},
    peers::peer_service,
    policy::{Policies, Policy, Window},
    refresh::Refresher,
    rules::Rules,
    template::UrlTemplate,
    upstream::{
        Shared, Upstream, Upstreams,
        http::{Http, HttpSpec},
    },
};

/// Longer than anything here takes: a test that waits so long fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// What a cluster is made of.
pub(super) struct Cluster<'a> {
    pub(super) count: usize,
    pub(super) shards: u32,
    /// Behind the keys `u/*`.
    pub(super) origin: Option<&'a Origin>,
    /// Of these keys.
    pub(super) policy: Policy,
}

/// A cluster with a leader.
pub(super) struct Running {
    pub(super) nodes: Vec<Node>,
    pub(super) clock: Clock,
}

pub(super) struct Node {
    pub(super) replicas: Arc<Replicas>,
    /// For clients and for peers.
    pub(super) address: String,
    refresher: Arc<Refresher>,
    channel: Channel,
    listener: JoinHandle<()>,
}

impl Cluster<'_> {
    pub(super) fn of(count: usize) -> Self {
        Self {
            count,
            shards: 1,
            origin: None,
            policy: policy(),
        }
    }

    pub(super) async fn start(self) -> Running {
        let clock = Clock::system();
        let listeners = join_all((0..self.count).map(|_| TcpListener::bind("127.0.0.1:0"))).await;
        let listeners: Vec<_> = listeners.into_iter().map(Result::unwrap).collect();
        let addresses: Vec<String> = listeners
            .iter()
            .map(|listener| listener.local_addr().unwrap().to_string())
            .collect();
        let started = listeners.into_iter().enumerate().map(|(n, listener)| {
            let options = Options {
                name: format!("node-{n}"),
                region: "here".into(),
                learner_only: false,
                data_dir: std::env::temp_dir(),
                peer_address: addresses[n].clone(),
                client_address: addresses[n].clone(),
                expect: u32::try_from(self.count).unwrap(),
                discover: addresses.clone(),
                shards: self.shards,
                memory_bytes_max: 64 << 20,
                disk_bytes_max: 1 << 40,
                log_kept: LogKept {
                    entries: 10_000,
                    bytes: 64 << 20,
                },
            };
            Node::start(
                options,
                listener,
                self.origin,
                self.policy.clone(),
                clock.clone(),
            )
        });
        let running = Running {
            nodes: join_all(started).await,
            clock,
        };
        for node in &running.nodes {
            let mut membership = node.replicas.membership();
            let member = membership.wait_for(|membership| *membership == Membership::Member);
            tokio::time::timeout(PATIENCE, member)
                .await
                .expect("the cluster forms in time")
                .unwrap();
            for replica in node.replicas.replicas() {
                let mut leader = replica.watch_leader();
                tokio::time::timeout(PATIENCE, leader.wait_for(Option::is_some))
                    .await
                    .expect("a leader in time")
                    .unwrap();
            }
        }
        running.leader().await;
        running
    }
}

impl Running {
    /// Who leads shard 0, and knows it.
    pub(super) async fn leader(&self) -> usize {
        let leads = self.nodes.iter().map(|node| {
            Box::pin(async move {
                let mut leads = node.replicas.replica(0).unwrap().watch_leads();
                leads.wait_for(Option::is_some).await.map(|_| ()).unwrap();
            })
        });
        tokio::time::timeout(PATIENCE, select_all(leads))
            .await
            .expect("a node leads in time")
            .1
    }

    pub(super) async fn stop(self) {
        join_all(self.nodes.into_iter().map(Node::stop)).await;
    }
}

impl Node {
    async fn start(
        options: Options,
        listener: TcpListener,
        origin: Option<&Origin>,
        policy: Policy,
        clock: Clock,
    ) -> Self {
        let metrics = Arc::new(Metrics::default());
        let address = options.client_address.clone();
        let replicas = Replicas::open(options, Stores::memory(), clock.clone(), metrics.clone())
            .await
            .unwrap();
        let policies = Policies::from_iter(origin.map(|_| policy));
        let upstreams = Upstreams::from_iter(origin.map(Origin::upstream));
        let rules = Rules::new(policies, upstreams).current();
        let refresher = Refresher::new(
            replicas.clone(),
            rules.clone(),
            metrics.clone(),
            clock.clone(),
        );
        // No patience at all: whatever a follower lacks, it asks the leader for.
        let settings = Settings {
            session_wait: Duration::ZERO,
        };
        let cache = Cache::new(
            replicas.clone(),
            rules,
            refresher.clone(),
            settings,
            metrics.clone(),
        );
        let operations = Operations::new(Limits::default(), metrics, clock);
        let server = Server::builder()
            .layer(OperationLayer::new(operations))
            .add_service(replicas.replica_service())
            .add_service(replicas.membership_service())
            .add_service(peer_service(
                replicas.clone(),
                cache.clone(),
                refresher.clone(),
            ))
            .add_service(cluster_service(replicas.clone()))
            .add_service(cache_service(cache));
        let listener = tokio::spawn(async move {
            server
                .serve_with_incoming(TcpListenerStream::new(listener))
                .await
                .unwrap()
        });
        replicas.start();
        refresher.start();
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .unwrap()
            .connect_lazy();
        Self {
            replicas,
            address,
            refresher,
            channel,
            listener,
        }
    }

    pub(super) fn client(&self) -> CacheServiceClient<Channel> {
        CacheServiceClient::new(self.channel.clone())
    }

    pub(super) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(super) async fn get(
        &self,
        key: &str,
        consistency: Consistency,
        token: &[u8],
    ) -> Result<v1::GetResponse, Status> {
        let request = v1::GetRequest {
            key: key.to_owned().into(),
            consistency: consistency.into(),
            token: token.to_vec().into(),
            ..Default::default()
        };
        Ok(self.client().get(request).await?.into_inner())
    }

    /// Looks again after everything that is applied here.
    pub(super) async fn until<'n, F: Future<Output = bool>>(&'n self, so: impl Fn(&'n Self) -> F) {
        let mut applied = self.replicas.replica(0).unwrap().watch_applied();
        let reached = async {
            while !so(self).await {
                applied.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .expect("so in time");
    }

    /// Gone from the network, and its flights with it.
    pub(super) async fn stop(self) {
        self.listener.abort();
        self.refresher.stop().await;
        self.replicas.close().await;
    }
}

/// Values for a minute without chance, stale for ten more.
pub(super) fn policy() -> Policy {
    Policy {
        ttl_jitter: 0.0,
        stale_if_error: Window::Forever,
        hard_timeout: Duration::from_millis(500),
        ..Policy::new(Glob::parse("u/*").unwrap(), "u")
    }
}

/// Answers `{path}#{call}`, where calls are counted by path, with the status it was told.
#[derive(Clone)]
pub(super) struct Origin {
    address: String,
    /// 0 hangs.
    status: Arc<AtomicU16>,
    calls: Arc<AtomicUsize>,
    by_path: Arc<Mutex<HashMap<String, usize>>>,
}

impl Origin {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let origin = Self {
            address,
            status: Arc::new(AtomicU16::new(200)),
            calls: Arc::default(),
            by_path: Arc::default(),
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
        origin.calls.fetch_add(1, Ordering::SeqCst);
        let call = {
            let mut by_path = origin.by_path.lock();
            let call = by_path.entry(path.clone()).or_default();
            *call += 1;
            *call
        };
        match StatusCode::from_u16(origin.status.load(Ordering::SeqCst)) {
            Ok(status) => (status, format!("{path}#{call}")),
            Err(_) => std::future::pending().await,
        }
    }

    pub(super) fn answers(&self, status: u16) {
        self.status.store(status, Ordering::SeqCst);
    }

    pub(super) fn hangs(&self) {
        self.answers(0);
    }

    pub(super) fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn upstream(&self) -> Upstream {
        let spec = HttpSpec {
            fetch_timeout: Duration::from_secs(60),
            ..HttpSpec::new(
                UrlTemplate::parse(&format!("http://{}/u/{{1}}", self.address)).unwrap(),
            )
        };
        Upstream::Http(
            Http::new(
                "u".to_owned(),
                spec,
                Arc::default(),
                &Shared::new(Clock::system()),
            )
            .unwrap(),
        )
    }
}
