//! One node, put together: the composition root. Builds in order, stops in reverse.
//!
//! ```text
//! start   ports taken ─► storage, replicas ─► refresh, cache ─► ports open, served ─► replicas and refresh run
//! stop    not ready ─► leadership handed on ─► clients drained, refresh ended meanwhile ─► state flushed ─► peers closed
//! ```
//! Promises that a wrong configuration is said before any port opens, and that a stop is bounded.
//! Knows every part; no part knows it. Nothing here is of the process: many nodes share one.

mod raft_threads;
#[cfg(test)]
mod tests;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use holdfast_raft::{
    Budget, Clock, IdentityError, LogKept, Membership, OpenError, Options, Replicas, Stores,
    task::Tasks,
};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tokio::net::TcpListener;
use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::{HealthReporter, health_reporter};
use tower::Layer as _;
use tracing::Span;

use self::raft_threads::{Elsewhere, RaftThreads};
use crate::{
    admin,
    cache::{self, Cache},
    config::{self, Address, Config, ConfigError, Engine, Place, Role},
    grpc,
    metrics::Metrics,
    operation::{Limits, Operations},
    peers,
    ready::{self, Readiness},
    refresh::Refresher,
    resources,
    rules::Rules,
    serve::{self, Bound, ListenError, Listeners, Protocol, Serving, Windows},
    upstream::{Shared, Upstream, Upstreams},
};

/// A client's requests are small or one value.
const CLIENT_WINDOWS: Windows = Windows {
    stream: 2 << 20,
    connection: 16 << 20,
};
/// The product of a fast link and a far region's round trip.
const PEER_WINDOWS: Windows = Windows {
    stream: 16 << 20,
    connection: 32 << 20,
};
/// Of the file system, unless `storage.max_bytes` says otherwise.
const DISK_SHARE_PERCENT: u64 = 80;

/// Of the contract, the part that is for peers.
const PEER_PACKAGE: &str = "holdfast.peer.v1";

/// How long each step of a stop may take; together, with what the process does afterwards, less
/// than the 10 s that a stop is promised to take: 1.5 + 2 + 0.5 (connections closed) + 3 + 0.5 s
/// here, 1.5 s there.
const HAND_OVER_TIMEOUT: Duration = Duration::from_millis(1500);
const CLIENTS_TIMEOUT: Duration = Duration::from_millis(2000);
/// So long into the clients' time fetches go on; then who waits for one is told that there is none,
/// while it can be told.
const FETCHES_GO_ON: Duration = Duration::from_millis(1000);
const REFRESH_TIMEOUT: Duration = Duration::from_millis(500);
const CLOSE_TIMEOUT: Duration = Duration::from_millis(3000);
/// All of it, whatever a step does.
const STOP_TIMEOUT: Duration = Duration::from_millis(8000);

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Nothing was opened.
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error("{0}")]
    Storage(io::Error),
    #[error("threads cannot be started: {0}")]
    Threads(io::Error),
    #[error("gRPC reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// A running node.
pub struct Node {
    replicas: Arc<Replicas>,
    refresher: Arc<Refresher>,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    health: HealthReporter,
    /// What the node does besides its parts.
    tasks: Tasks,
    client: Serving,
    peer: Serving,
    admin: Serving,
    addresses: Addresses,
    /// Last: everything else has ended when they do.
    _raft_threads: RaftThreads,
}

/// Where a node listens.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    client: SocketAddr,
    peer: SocketAddr,
    admin: SocketAddr,
}

/// The ports of a node, taken and not yet open.
struct Ports {
    client: Bound,
    peer: Bound,
    admin: Bound,
}

/// The parts that answer, before anybody can ask.
struct Parts {
    replicas: Arc<Replicas>,
    refresher: Arc<Refresher>,
    cache: Arc<Cache>,
    readiness: Arc<Readiness>,
    metrics: Arc<Metrics>,
    listeners: Arc<Listeners>,
    operations: Arc<Operations>,
    is_insecure: bool,
    raft_threads: RaftThreads,
}

impl Node {
    /// Returns once its ports are open; then it looks for its cluster.
    pub async fn start(config: Config, clock: Clock) -> Result<Self, StartError> {
        let engine = engine(&config)?;
        let shared = Shared::new(clock.clone());
        let upstreams = upstreams(&config, &shared)?;
        if engine == holdfast_raft::Engine::Rocksdb
            || !matches!(config.places.data_dir, Place::Default(_))
        {
            config.check_data_dir()?;
        }
        let ports = Ports::take(&config)?;
        let addresses = ports.addresses();
        let Addresses {
            client,
            peer,
            admin,
        } = addresses;
        shared.own_listeners().set([client, peer, admin]);

        let metrics = Arc::new(Metrics::new());
        metrics.begin(
            u32::from(config.cluster.shards),
            config
                .upstreams
                .iter()
                .map(|upstream| upstream.name.as_str()),
        );
        let options = options(&config, engine, addresses).map_err(StartError::Storage)?;
        let stores = Stores::open(engine, &config.node.data_dir, Budget::default())
            .map_err(StartError::Storage)?;
        let raft_threads = RaftThreads::start().map_err(StartError::Threads)?;
        let opening = Replicas::open(options, stores, clock.clone(), metrics.clone());
        let opened = raft_threads.run(opening).await;
        let replicas = opened.map_err(|error| not_opened(&config, error))?;

        let rules = Rules::new(config.policies.clone(), upstreams).current();
        let refresher = Refresher::new(
            replicas.clone(),
            rules.clone(),
            metrics.clone(),
            clock.clone(),
        );
        let settings = cache::Settings {
            session_wait: config.reads.session_wait,
        };
        let cache = Cache::new(
            replicas.clone(),
            rules,
            refresher.clone(),
            settings,
            metrics.clone(),
        );

        let operations = Operations::new(Limits::default(), metrics.clone(), clock.clone());
        let readiness = Readiness::new(replicas.clone());
        let is_insecure = warn_of_risks(&config, engine);
        let parts = Parts {
            replicas,
            refresher,
            cache,
            readiness,
            metrics,
            listeners: Listeners::new(&clock),
            operations,
            is_insecure,
            raft_threads,
        };
        match ports.open(&parts.raft_threads) {
            Ok(listeners) => parts.serve(listeners, addresses).await,
            Err(error) => {
                parts.replicas.close().await;
                Err(error.into())
            }
        }
    }

    /// Bounded, whatever hangs.
    pub async fn stop(self) {
        let stop = async {
            self.refuse_to_be_ready().await;
            within(
                HAND_OVER_TIMEOUT,
                "handing leadership on",
                self.replicas.hand_over(),
            )
            .await;
            self.end().await;
        };
        within(STOP_TIMEOUT, "the stop", Box::pin(stop)).await;
    }

    /// As the last of its cluster, or with all of it: there is nobody to hand leadership to.
    pub(crate) async fn stop_with_its_cluster(self) {
        self.refuse_to_be_ready().await;
        self.end().await;
    }

    async fn refuse_to_be_ready(&self) {
        tracing::info!("stopping");
        self.readiness.stop();
        self.tasks.stop().await;
        ready::tell(&self.health, false).await;
    }

    async fn end(self) {
        let mut clients = Box::pin(self.client.stop(CLIENTS_TIMEOUT));
        let refresh = within(REFRESH_TIMEOUT, "ending the refresh", self.refresher.stop());
        match tokio::time::timeout(FETCHES_GO_ON, &mut clients).await {
            Ok(()) => refresh.await,
            Err(_) => _ = tokio::join!(clients, refresh),
        }
        within(CLOSE_TIMEOUT, "flushing the state", self.replicas.close()).await;
        // Streams between peers have no end of their own.
        tokio::join!(
            self.peer.stop(Duration::ZERO),
            self.admin.stop(Duration::ZERO)
        );
        tracing::info!("stopped");
    }

    /// Why the node can go on no more; does not return while it can.
    pub async fn failed(&self) -> String {
        let mut membership = self.replicas.membership();
        let failed = membership.wait_for(|now| matches!(now, Membership::Failed(_)));
        tokio::select! {
            why = self.client.failed() => why,
            why = self.peer.failed() => why,
            why = self.admin.failed() => why,
            failed = failed => match failed.as_deref() {
                Ok(Membership::Failed(why)) => why.clone(),
                Ok(_) | Err(_) => "the replicas are gone".to_owned(),
            },
        }
    }

    pub fn client_address(&self) -> SocketAddr {
        self.addresses.client
    }

    pub fn peer_address(&self) -> SocketAddr {
        self.addresses.peer
    }

    pub fn admin_address(&self) -> SocketAddr {
        self.addresses.admin
    }

    pub fn replicas(&self) -> &Arc<Replicas> {
        &self.replicas
    }

    pub fn readiness(&self) -> &Arc<Readiness> {
        &self.readiness
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }
}

impl Parts {
    async fn serve(
        self,
        listeners: [TcpListener; 3],
        addresses: Addresses,
    ) -> Result<Node, StartError> {
        let [client, peer, admin] = listeners;
        let (health, health_service) = health_reporter();
        ready::tell(&health, false).await;
        let client = self.serve_clients(client, health_service)?;
        let peer = self.serve_peers(peer);
        let admin = self.serve_admin(admin);
        self.raft_threads.enter(|| self.replicas.start());
        self.refresher.start();
        tracing::info!(client = %addresses.client, peer = %addresses.peer, admin = %addresses.admin, "listening");
        let tasks = Tasks::new(self.metrics.clone());
        let (readiness, reporter) = (self.readiness.clone(), health.clone());
        tasks.duty("health", Span::current(), move || {
            readiness.clone().report(reporter.clone())
        });
        let Self {
            replicas,
            refresher,
            readiness,
            metrics,
            raft_threads,
            ..
        } = self;
        Ok(Node {
            replicas,
            refresher,
            readiness,
            metrics,
            health,
            tasks,
            client,
            peer,
            admin,
            addresses,
            _raft_threads: raft_threads,
        })
    }

    fn serve_clients<H: Health>(
        &self,
        listener: TcpListener,
        health: HealthServer<H>,
    ) -> Result<Serving, StartError> {
        let described = || {
            tonic_reflection::server::Builder::configure()
                .register_file_descriptor_set(public_descriptors())
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let routes = Routes::new(grpc::cache_service(self.cache.clone()))
            .add_service(grpc::cluster_service(self.replicas.clone()))
            .add_service(health)
            .add_service(described().build_v1()?)
            .add_service(described().build_v1alpha()?);
        let layer = grpc::OperationLayer::new(self.operations.clone());
        let service = layer.layer(routes.prepare());
        let known = self.listeners.client.clone();
        Ok(Serving::start(self.metrics.clone(), |drain, close| {
            serve::serve(
                listener,
                Protocol::Http2(CLIENT_WINDOWS),
                known,
                service,
                (drain, close),
            )
        }))
    }

    fn serve_peers(&self, listener: TcpListener) -> Serving {
        let for_clients = peers::peer_service(
            self.replicas.clone(),
            self.cache.clone(),
            self.refresher.clone(),
        );
        let routes = Routes::new(self.replicas.replica_service())
            .add_service(self.replicas.membership_service())
            .add_service(Elsewhere::here(for_clients));
        let service = grpc::TraceLayer.layer(routes.prepare());
        let known = self.listeners.peer.clone();
        let serve = |drain, close| {
            serve::serve(
                listener,
                Protocol::Http2(PEER_WINDOWS),
                known,
                service,
                (drain, close),
            )
        };
        self.raft_threads
            .enter(|| Serving::start(self.metrics.clone(), serve))
    }

    fn serve_admin(&self, listener: TcpListener) -> Serving {
        let router = admin::router(admin::Shown {
            refresher: self.refresher.clone(),
            metrics: self.metrics.clone(),
            replicas: self.replicas.clone(),
            readiness: self.readiness.clone(),
            listeners: self.listeners.clone(),
            operations: self.operations.clone(),
            is_insecure: self.is_insecure,
        });
        let known = self.listeners.admin.clone();
        Serving::start(self.metrics.clone(), |drain, close| {
            serve::serve(listener, Protocol::Http1, known, router, (drain, close))
        })
    }
}

impl Ports {
    fn take(config: &Config) -> Result<Self, ListenError> {
        Ok(Self {
            client: Bound::bind("clients", config.listen.client)?,
            peer: Bound::bind("peers", config.listen.peer)?,
            admin: Bound::bind("probes and metrics", config.listen.admin)?,
        })
    }

    fn addresses(&self) -> Addresses {
        Addresses {
            client: self.client.address(),
            peer: self.peer.address(),
            admin: self.admin.address(),
        }
    }

    /// Clients last: by then everything else answers.
    fn open(self, raft_threads: &RaftThreads) -> Result<[TcpListener; 3], ListenError> {
        let admin = self.admin.open()?;
        let peer = raft_threads.enter(|| self.peer.open())?;
        Ok([self.client.open()?, peer, admin])
    }
}

/// What clients may ask. What only nodes say to each other is nobody else's to know, and answered
/// on another port.
fn public_descriptors() -> FileDescriptorSet {
    let mut described = FileDescriptorSet::decode(holdfast_proto::DESCRIPTORS)
        .expect("the build wrote the descriptors");
    described.file.retain(|file| file.package() != PEER_PACKAGE);
    described
}

/// Builds every upstream: what is left of a configuration to be checked.
pub(crate) fn upstreams(config: &Config, shared: &Shared) -> Result<Upstreams, ConfigError> {
    let one = |upstream: &config::Upstream| {
        let config::Upstream { name, spec, place } = upstream.clone();
        Upstream::new(name, spec, config.secrets.clone(), shared).map_err(|error| {
            ConfigError::at(place, format!("upstream `{}`: {error}", upstream.name))
        })
    };
    config.upstreams.iter().map(one).collect()
}

/// The engine that was asked for, if this build has it; where nobody asked, the best that it has.
fn engine(config: &Config) -> Result<holdfast_raft::Engine, ConfigError> {
    match config.storage.engine {
        Engine::Memory => Ok(holdfast_raft::Engine::Memory),
        Engine::Rocksdb if cfg!(feature = "rocksdb") => Ok(holdfast_raft::Engine::Rocksdb),
        Engine::Rocksdb if matches!(config.places.engine, Place::Default(_)) => {
            Ok(holdfast_raft::Engine::DEFAULT)
        }
        Engine::Rocksdb => {
            let reason =
                "`storage.engine`: this build has no engine `rocksdb`, its cargo feature is off";
            Err(ConfigError::at(config.places.engine.clone(), reason))
        }
    }
}

fn options(
    config: &Config,
    engine: holdfast_raft::Engine,
    addresses: Addresses,
) -> io::Result<Options> {
    let disk_bytes_max = match (config.storage.max_bytes, engine) {
        (Some(bytes), _) => bytes,
        (None, holdfast_raft::Engine::Rocksdb) => {
            resources::disk_bytes(&config.node.data_dir)? / 100 * DISK_SHARE_PERCENT
        }
        (None, holdfast_raft::Engine::Memory) => u64::MAX,
    };
    Ok(Options {
        name: config.node.name.clone(),
        region: config.node.region.clone(),
        learner_only: config.node.role == Role::Learner,
        data_dir: config.node.data_dir.clone(),
        peer_address: advertised(&config.advertise.peer, addresses.peer),
        client_address: advertised(&config.advertise.client, addresses.client),
        expect: u32::try_from(config.cluster.expect).unwrap_or(u32::MAX),
        discover: config
            .cluster
            .discover
            .iter()
            .map(Address::to_string)
            .collect(),
        shards: u32::from(config.cluster.shards),
        memory_bytes_max: config.memory.max_bytes.unwrap_or_else(memory_bytes_default),
        disk_bytes_max,
        log_kept: LogKept {
            entries: config.storage.log_keep_entries,
            bytes: config.storage.log_keep_bytes,
        },
    })
}

/// Half of what there is: the other half is for the engine, for requests in flight and for the
/// system's page cache.
pub(crate) fn memory_bytes_default() -> u64 {
    resources::memory_bytes() / 2
}

/// An address made of a listen address that takes any port has the port that it took.
fn advertised(address: &Address, bound: SocketAddr) -> String {
    let port = if address.port == 0 {
        bound.port()
    } else {
        address.port
    };
    Address {
        port,
        ..address.clone()
    }
    .to_string()
}

/// A directory that is not this node's is a mistake of the configuration.
fn not_opened(config: &Config, error: OpenError) -> StartError {
    match error {
        OpenError::Identity(error @ IdentityError::OtherName { .. }) => {
            ConfigError::at(config.places.name.clone(), error.to_string()).into()
        }
        OpenError::Identity(error) => {
            ConfigError::at(config.places.data_dir.clone(), error.to_string()).into()
        }
        OpenError::Storage(error) => StartError::Storage(error),
    }
}

/// Says what an operator should know; true if a listener is open to others without TLS and auth.
fn warn_of_risks(config: &Config, engine: holdfast_raft::Engine) -> bool {
    if engine == holdfast_raft::Engine::Memory {
        tracing::warn!("storage.engine is memory: this node keeps nothing when it stops");
    }
    let listen = &config.listen;
    let open: Vec<String> = [listen.client, listen.peer, listen.admin]
        .iter()
        .filter(|address| !address.ip().to_canonical().is_loopback())
        .map(SocketAddr::to_string)
        .collect();
    if !open.is_empty() {
        tracing::warn!(
            listen = open.join(", "),
            "security.insecure: open beyond loopback without TLS and authentication"
        );
    }
    !open.is_empty()
}

async fn within(timeout: Duration, what: &str, step: impl Future<Output = ()>) {
    if tokio::time::timeout(timeout, step).await.is_err() {
        tracing::warn!(
            "{what} took longer than {} ms and was given up",
            timeout.as_millis()
        );
    }
}
