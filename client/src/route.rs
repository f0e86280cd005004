//! Which node to ask: the endpoints in order beginning with the last good one, and for mutations
//! the leader first, once a node has named it. Knows connections and nothing of requests.
//!
//! ```text
//! read     last good ─► the next ─► … (round over)
//! write    leader ─► last good ─► the next ─► … (round over)
//! ```
//! A node that could not be connected to rests for a while: it is asked only if no other is left.
//! After that, as a leader that was only heard of, it is dialled in the background: no call waits
//! for a connection that may not come while another node could take it.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

use crate::{deadline::now, retry::Kind};

/// A node rests this long after its first failed connection, twice as long after each further one.
const REST_FIRST: Duration = Duration::from_millis(250);
const REST_MAX: Duration = Duration::from_secs(10);
/// Leaders named by nodes that are not among the endpoints; shards may have different ones.
const LEARNED_MAX: usize = 8;
/// While a call waits, its connection is probed this often and given up when a probe stays
/// unanswered for so long: a frozen node must not eat a call's whole time.
const PROBE_EVERY: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) struct Routes {
    nodes: Vec<Arc<Node>>,
    connect_timeout: Duration,
    /// Whether writes go to the leader that answers name.
    follow_leader: bool,
    state: Mutex<State>,
}

struct State {
    /// Index into `nodes` of the last good one.
    preferred: usize,
    leader: Option<Arc<Node>>,
    learned: VecDeque<Arc<Node>>,
}

pub(crate) struct Node {
    address: String,
    endpoint: Endpoint,
    /// Only heard of: it may be an address that cannot be reached from here.
    learned: bool,
    link: Mutex<Link>,
    /// One connection attempt at a time; the others wait for its outcome.
    dialing: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct Link {
    channel: Option<Channel>,
    /// Counts connections, so that a loss noticed late does not drop a newer one.
    generation: u64,
    failures: u32,
    rests_until: Option<Instant>,
}

/// What a call can expect of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// Connected, or an endpoint that has never failed.
    AtHand,
    /// It failed before, or was only heard of.
    Doubtful,
    /// It failed just now.
    Resting,
}

/// A connection in use.
pub(crate) struct Connected {
    pub(crate) channel: Channel,
    pub(crate) generation: u64,
}

/// Not `host:port` or `http://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("endpoint `{0}` is not host:port or http://host:port")]
pub struct InvalidEndpoint(pub String);

impl Routes {
    /// `endpoints` must not be empty.
    pub(crate) fn new(
        endpoints: &[String],
        connect_timeout: Duration,
        follow_leader: bool,
    ) -> Result<Self, InvalidEndpoint> {
        let mut nodes: Vec<Arc<Node>> = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            let node = Node::new(endpoint, connect_timeout, false)?;
            if nodes.iter().all(|known| known.address != node.address) {
                nodes.push(Arc::new(node));
            }
        }
        assert!(!nodes.is_empty(), "the builder refuses an empty list");
        Ok(Self {
            nodes,
            connect_timeout,
            follow_leader,
            state: Mutex::new(State {
                preferred: 0,
                leader: None,
                learned: VecDeque::new(),
            }),
        })
    }

    /// The next node to ask in this round, or none if the round is over. A resting node is asked
    /// only while no other has been (`asked`).
    pub(crate) fn pick(&self, kind: Kind, tried: &[Arc<Node>], asked: bool) -> Option<Arc<Node>> {
        let candidates = self.candidates(kind);
        let mut untried = candidates.iter().filter(|node| !contains(tried, node));
        let at_hand = untried.clone().find(|node| match node.reach() {
            Reach::AtHand => true,
            Reach::Doubtful => {
                node.dial_in_background(self.connect_timeout);
                false
            }
            Reach::Resting => false,
        });
        at_hand
            .or_else(|| untried.clone().find(|node| !node.rests()))
            .or_else(|| if asked { None } else { untried.next() })
            .cloned()
    }

    /// Whether a further node would be asked after those tried.
    pub(crate) fn has_other(&self, kind: Kind, tried: &[Arc<Node>]) -> bool {
        self.candidates(kind)
            .iter()
            .any(|node| !contains(tried, node) && !node.rests())
    }

    pub(crate) fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }

    /// The node has answered. Reads stay with it; a write to the leader says nothing of where to
    /// read.
    pub(crate) fn answered(&self, kind: Kind, node: &Arc<Node>) {
        let mut state = self.state.lock();
        let led = state
            .leader
            .as_ref()
            .is_some_and(|leader| Arc::ptr_eq(leader, node));
        if kind.is_mutation() && led {
            return;
        }
        if let Some(index) = self.nodes.iter().position(|known| Arc::ptr_eq(known, node)) {
            state.preferred = index;
        }
    }

    /// The node took too long: others are asked first from now on.
    pub(crate) fn doubt(&self, node: &Arc<Node>) {
        self.not_leader(node);
        let mut state = self.state.lock();
        if Arc::ptr_eq(&self.nodes[state.preferred], node) {
            state.preferred = (state.preferred + 1) % self.nodes.len();
        }
    }

    pub(crate) fn not_leader(&self, node: &Arc<Node>) {
        self.state
            .lock()
            .leader
            .take_if(|leader| Arc::ptr_eq(leader, node));
    }

    /// A node has named the leader by its client address. An address that cannot be one is ignored:
    /// it is advice.
    pub(crate) fn learn_leader(&self, address: &str) {
        if !self.follow_leader {
            return;
        }
        let mut state = self.state.lock();
        if state
            .leader
            .as_ref()
            .is_some_and(|leader| leader.address == address)
        {
            return;
        }
        let known = self
            .nodes
            .iter()
            .chain(&state.learned)
            .find(|node| node.address == address)
            .cloned();
        let Some(leader) = known.or_else(|| {
            Node::new(address, self.connect_timeout, true)
                .ok()
                .map(Arc::new)
        }) else {
            return;
        };
        let listed = self
            .nodes
            .iter()
            .chain(&state.learned)
            .any(|node| Arc::ptr_eq(node, &leader));
        if !listed {
            if state.learned.len() == LEARNED_MAX {
                state.learned.pop_front();
            }
            state.learned.push_back(leader.clone());
        }
        state.leader = Some(leader);
    }

    fn candidates(&self, kind: Kind) -> Vec<Arc<Node>> {
        let state = self.state.lock();
        let leader = state.leader.iter().filter(|_| kind.is_mutation());
        let (before, from) = self.nodes.split_at(state.preferred);
        let mut candidates: Vec<Arc<Node>> = Vec::with_capacity(self.nodes.len() + 1);
        for node in leader.chain(from).chain(before) {
            if !contains(&candidates, node) {
                candidates.push(node.clone());
            }
        }
        candidates
    }
}

impl Node {
    fn new(text: &str, connect_timeout: Duration, learned: bool) -> Result<Self, InvalidEndpoint> {
        let invalid = || InvalidEndpoint(text.to_owned());
        let address = text
            .strip_prefix("http://")
            .unwrap_or(text)
            .trim_end_matches('/');
        let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|_| invalid())?;
        let uri = endpoint.uri();
        // The whole of it is host and port: no path, no user, no other scheme hidden in the host.
        let plain = uri
            .authority()
            .is_some_and(|authority| authority.as_str() == address && !address.contains('@'));
        if !plain
            || uri.port_u16().is_none_or(|port| port == 0)
            || uri.host().is_none_or(str::is_empty)
        {
            return Err(invalid());
        }
        let endpoint = endpoint
            .user_agent(concat!("holdfast-client/", env!("CARGO_PKG_VERSION")))
            .map_err(|_| invalid())?
            // For the connection that tonic makes anew by itself when an idle one was lost; ours is
            // bounded by the call too.
            .connect_timeout(connect_timeout)
            .http2_keep_alive_interval(PROBE_EVERY)
            .keep_alive_timeout(PROBE_TIMEOUT);
        let address = address.to_owned();
        Ok(Self {
            address,
            endpoint,
            learned,
            link: Mutex::new(Link::default()),
            dialing: tokio::sync::Mutex::new(()),
        })
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// The connection, made if there is none. The error is in words.
    pub(crate) async fn connected(&self, limit: Duration) -> Result<Connected, String> {
        if let Some(connected) = self.current() {
            return Ok(connected);
        }
        let failures = self.link.lock().failures;
        match tokio::time::timeout(limit, self.dial(failures)).await {
            Ok(outcome) => outcome,
            Err(_) => {
                self.rest();
                Err(format!("no connection within {limit:?}"))
            }
        }
    }

    /// The connection was lost. The next call makes a new one, and knows for sure whether that
    /// succeeded.
    pub(crate) fn lost(&self, generation: u64) {
        let mut link = self.link.lock();
        if link.generation == generation {
            link.channel = None;
        }
    }

    /// `failures` as they were before waiting for a neighbour's attempt: if that failed meanwhile,
    /// so has this one.
    async fn dial(&self, failures: u32) -> Result<Connected, String> {
        let _one_at_a_time = self.dialing.lock().await;
        if let Some(connected) = self.current() {
            return Ok(connected);
        }
        if self.link.lock().failures > failures {
            return Err("the connection attempt of a call beside this one failed".to_owned());
        }
        match self.endpoint.connect().await {
            Ok(channel) => Ok(self.joined(channel)),
            Err(error) => {
                self.rest();
                Err(last_cause(&error))
            }
        }
    }

    fn current(&self) -> Option<Connected> {
        let link = self.link.lock();
        link.channel.clone().map(|channel| Connected {
            channel,
            generation: link.generation,
        })
    }

    fn joined(&self, channel: Channel) -> Connected {
        let mut link = self.link.lock();
        link.generation += 1;
        link.failures = 0;
        link.rests_until = None;
        link.channel = Some(channel.clone());
        Connected {
            channel,
            generation: link.generation,
        }
    }

    fn rests(&self) -> bool {
        self.reach() == Reach::Resting
    }

    fn reach(&self) -> Reach {
        let link = self.link.lock();
        if link.rests_until.is_some_and(|until| now() < until) {
            Reach::Resting
        } else if link.channel.is_some() || (link.failures == 0 && !self.learned) {
            Reach::AtHand
        } else {
            Reach::Doubtful
        }
    }

    /// At most one at a time, and no longer than a call would wait.
    fn dial_in_background(self: &Arc<Self>, limit: Duration) {
        if self.dialing.try_lock().is_err() {
            return;
        }
        let node = self.clone();
        tokio::spawn(async move { drop(node.connected(limit).await) });
    }

    /// It could not be connected to.
    pub(crate) fn rest(&self) {
        let mut link = self.link.lock();
        // 2^6 x REST_FIRST is beyond REST_MAX.
        let rest = (REST_FIRST * (1 << link.failures.min(6))).min(REST_MAX);
        link.failures = link.failures.saturating_add(1);
        link.rests_until = Some(now() + rest);
    }
}

fn contains(nodes: &[Arc<Node>], node: &Arc<Node>) -> bool {
    nodes.iter().any(|known| Arc::ptr_eq(known, node))
}

/// "Connection refused (os error 111)" says more than "transport error".
fn last_cause(error: &dyn std::error::Error) -> String {
    std::iter::successors(Some(error), |error| error.source())
        .last()
        .map_or_else(String::new, ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(endpoints: &[&str]) -> Routes {
        let endpoints: Vec<String> = endpoints
            .iter()
            .map(|&endpoint| endpoint.to_owned())
            .collect();
        Routes::new(&endpoints, Duration::from_secs(1), true).unwrap()
    }

    fn order(routes: &Routes, kind: Kind) -> Vec<String> {
        let mut tried = Vec::new();
        while let Some(node) = routes.pick(kind, &tried, false) {
            tried.push(node);
        }
        tried.iter().map(|node| node.address().to_owned()).collect()
    }

    #[test]
    fn endpoints_are_host_and_port_with_or_without_http() {
        for good in [
            "127.0.0.1:7400",
            "http://a:1",
            "http://a:1/",
            "[::1]:7400",
            "holdfast-0.holdfast:7400",
        ] {
            assert!(Node::new(good, PROBE_EVERY, false).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            "a:",
            "a:0",
            ":7400",
            "a:70000",
            "https://a:1",
            "ftp://a:1",
            "a:1/path",
            "user@a:1",
            "http://http://a:1",
            "a b:1",
        ] {
            assert!(Node::new(bad, PROBE_EVERY, false).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_same_endpoint_twice_is_one_node() {
        assert_eq!(
            order(&routes(&["a:1", "http://a:1/", "b:1"]), Kind::Read),
            ["a:1", "b:1"]
        );
    }

    #[test]
    fn reads_begin_with_the_last_good_node_and_writes_with_the_leader() {
        let routes = routes(&["a:1", "b:1", "c:1"]);
        let b = routes.nodes[1].clone();
        routes.answered(Kind::Read, &b);
        assert_eq!(order(&routes, Kind::Read), ["b:1", "c:1", "a:1"]);
        routes.learn_leader("c:1");
        assert_eq!(order(&routes, Kind::NamedWrite), ["c:1", "b:1", "a:1"]);
        routes.answered(Kind::Write, &routes.nodes[2].clone());
        assert_eq!(order(&routes, Kind::Read), ["b:1", "c:1", "a:1"]);
    }

    #[tokio::test]
    async fn a_leader_beyond_the_endpoints_takes_writes_only_and_once_it_is_connected() {
        let routes = routes(&["a:1"]);
        routes.learn_leader("z:9");
        assert_eq!(order(&routes, Kind::Write), ["a:1", "z:9"]);
        let leader = routes.state.lock().leader.clone().unwrap();
        leader.joined(leader.endpoint.connect_lazy());
        assert_eq!(order(&routes, Kind::Write), ["z:9", "a:1"]);
        assert_eq!(order(&routes, Kind::Read), ["a:1"]);
        routes.learn_leader("not an address");
        assert_eq!(order(&routes, Kind::Write), ["z:9", "a:1"]);
    }

    #[test]
    fn a_leader_named_again_is_the_same_node_with_its_rest() {
        let routes = routes(&["a:1"]);
        routes.learn_leader("z:9");
        routes.state.lock().leader.as_ref().unwrap().rest();
        routes.learn_leader("a:1");
        routes.learn_leader("z:9");
        assert_eq!(order(&routes, Kind::Write)[0], "a:1");
    }

    #[test]
    fn leaders_learned_are_bounded() {
        let routes = routes(&["a:1"]);
        for port in 1..100 {
            routes.learn_leader(&format!("z:{port}"));
        }
        assert_eq!(routes.state.lock().learned.len(), LEARNED_MAX);
    }

    #[test]
    fn a_resting_node_is_asked_only_if_no_other_was() {
        let routes = routes(&["a:1", "b:1"]);
        routes.nodes[0].rest();
        let first = routes.pick(Kind::Read, &[], false).unwrap();
        assert_eq!(first.address(), "b:1");
        assert!(
            routes
                .pick(Kind::Read, std::slice::from_ref(&first), true)
                .is_none()
        );
        assert_eq!(
            routes.pick(Kind::Read, &[first], false).unwrap().address(),
            "a:1"
        );
        assert!(!routes.has_other(Kind::Read, &routes.nodes[1..]));
    }

    #[test]
    fn a_node_that_took_too_long_comes_last() {
        let routes = routes(&["a:1", "b:1"]);
        routes.learn_leader("a:1");
        routes.doubt(&routes.nodes[0].clone());
        assert_eq!(order(&routes, Kind::Write), ["b:1", "a:1"]);
    }
}
