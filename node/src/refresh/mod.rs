//! Fetching values from upstreams: one flight per key in the cluster, on the leader of the key's
//! shard, for readers that wait and ahead of readers that need not.
//!
//! ```text
//! reader ─ fetch ──────► join ─► ask ─► (leader's peers) ─► queue: slots ─► flight ─► upstream, commit
//! reader ─ note_read ─► marks ─► reports ─► (leader's) marks, asks ──┘      ▲
//!                                          due index ─► due ─► marked? ─────┘
//! ```
//! Promises: at most one fetch of a key per term (P5); a fetch that fails, or that anything newer
//! overtook, changes nothing (P3, P4); all of it bounded (P10). Must never know how reads are
//! answered or who may read.

mod ask;
mod asking;
mod due;
mod failures;
mod flight;
mod gate;
mod join;
mod marks;
mod outcome;
mod queue;
mod reports;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use holdfast_proto::{Key, Revision, ShardId};
use holdfast_raft::{Clock, InMemory, Membership, Replica, Replicas, View};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use self::{
    asking::Asking,
    marks::{Hashed, Marks, own_key},
    queue::{Priority, Queue},
};
pub use self::{failures::Failure, outcome::FetchOutcome};
use crate::{metrics::Metrics, policy::Policy, rules::CurrentRules};

/// Due keys of this node's own readers on their way to a flight; more are dropped, and asked for
/// again by the next reader.
const HINTS: usize = 16_384;
/// Readers of this node that wait for a fetch at another one; each holds a stream of the connection
/// that all of them share.
const ASKS_MAX: usize = 1_024;

/// The refresh engine of one node.
pub struct Refresher {
    replicas: Arc<Replicas>,
    rules: CurrentRules,
    /// By upstream, from the first use on.
    queues: ArcSwap<HashMap<String, Arc<Queue>>>,
    metrics: Arc<Metrics>,
    clock: Clock,
    marks: Marks,
    asking: Asking,
    /// One permit for each reader that waits at the leader.
    asks: Semaphore,
    hints: mpsc::Sender<Key>,
    hinted: Mutex<mpsc::Receiver<Key>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Refresher {
    pub fn new(
        replicas: Arc<Replicas>,
        rules: CurrentRules,
        metrics: Arc<Metrics>,
        clock: Clock,
    ) -> Arc<Self> {
        let (hints, hinted) = mpsc::channel(HINTS);
        Arc::new(Self {
            replicas,
            rules,
            queues: ArcSwap::default(),
            metrics,
            clock,
            marks: Marks::default(),
            asking: Asking::default(),
            asks: Semaphore::new(ASKS_MAX),
            hints,
            hinted: Mutex::new(hinted),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        })
    }

    /// Refreshes what is due and tells the leader what is read, as soon as this node belongs to a
    /// cluster.
    pub fn start(self: &Arc<Self>) {
        self.duty("refresh.hints", Self::follow_hints);
        self.duty("refresh.report", Self::report_reads);
        let this = self.clone();
        self.duty("refresh.start", move |_| async move {
            let mut membership = this.replicas.membership();
            if membership
                .wait_for(|membership| *membership == Membership::Member)
                .await
                .is_err()
            {
                return;
            }
            for replica in this.replicas.replicas() {
                let (scanned, watched) = (replica.clone(), replica.clone());
                this.duty("refresh.due", move |this| this.refresh_due(scanned));
                this.duty("refresh.claims", move |this| this.end_lost_claims(watched));
            }
        });
    }

    /// Ends every flight; whoever waits is told that nobody leads here.
    pub async fn stop(&self) {
        self.stop.cancel();
        for replica in self.replicas.replicas() {
            self.end_flights(replica.shard(), None);
        }
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Joins the cluster's flight of a key, here if this node leads the key's shard, else through
    /// the leader. Waits at most `timeout`; a fetch that runs goes on and is stored later.
    pub async fn fetch(
        self: &Arc<Self>,
        key: &Key,
        policy: &Policy,
        timeout: Duration,
    ) -> FetchOutcome {
        let (now, deadline) = (self.clock.monotonic(), self.clock.deadline(timeout));
        let asked = self.asking.asks(key, self.version(key), now);
        let fetch = Box::pin(self.fetch_from_leader(key, &policy.upstream, &deadline));
        let outcome = tokio::select! {
            outcome = fetch => outcome,
            () = self.stop.cancelled() => FetchOutcome::NotLeading,
        };
        let unanswered = [FetchOutcome::TimedOut, FetchOutcome::NotLeading];
        if asked && !unanswered.contains(&outcome) {
            self.asking.answered(key);
        }
        outcome
    }

    /// A reader used this key, which has an upstream; `due`: it is past its refresh point. Never
    /// blocks, bounded, deduplicated.
    pub fn note_read(&self, key: &Key, due: bool) {
        let hashed = Hashed::of(key);
        if self.marks.is_repeated(hashed, due) {
            return;
        }
        let Some(replica) = self.replicas.of_key(key) else {
            return;
        };
        if replica.leads().is_none() {
            self.marks.try_report(hashed, key, due);
            return;
        }
        self.marks.try_mark(hashed);
        if due && let Some(key) = own_key(key) {
            let _ = self.hints.try_send(key);
        }
    }

    /// As far as this node knows: flights are on the leader.
    pub fn is_refreshing(&self, key: &Key, policy: &Policy) -> bool {
        self.in_flight_since(key, policy).is_some()
    }

    /// Whether a reader whose value is past stale-while-revalidate must not wait: nobody leads, the
    /// key is known to fail, or its fetch is older than a reader waits.
    pub fn should_not_wait(&self, key: &Key, view: &View, policy: &Policy) -> bool {
        let Some(replica) = self.replicas.of_key(key) else {
            return true;
        };
        let now = self.clock.monotonic();
        let is_slow = |since: Duration| now.saturating_sub(since) >= policy.soft_timeout;
        policy.soft_timeout.is_zero()
            || replica.leader().is_none()
            || self
                .queue(&policy.upstream)
                .gate
                .closed_by(key, Some(view), replica.now())
                .is_some()
            || self.in_flight_since(key, policy).is_some_and(is_slow)
            || self
                .asking
                .since(key, view.version(), now)
                .is_some_and(is_slow)
    }

    fn in_flight_since(&self, key: &Key, policy: &Policy) -> Option<Duration> {
        self.queues
            .load()
            .get(&*policy.upstream)?
            .in_flight_since(key)
    }

    fn queue(&self, upstream: &str) -> Arc<Queue> {
        if let Some(queue) = self.queues.load().get(upstream) {
            return queue.clone();
        }
        let new = Queue::new(upstream, self.clock.clone());
        self.queues.rcu(|queues| {
            let mut queues = HashMap::clone(queues);
            queues
                .entry(upstream.to_owned())
                .or_insert_with(|| new.clone());
            queues
        });
        self.queues.load().get(upstream).cloned().unwrap_or(new)
    }

    fn has_upstream(&self, key: &[u8]) -> bool {
        self.rules.load().policy(key).is_some()
    }

    /// Of the value in memory, 0 if there is none.
    fn version(&self, key: &Key) -> Revision {
        let replica = self.replicas.of_key(key);
        match replica.map(|replica| replica.in_memory(key)) {
            Some(InMemory::Found(view)) => view.version(),
            _ => 0,
        }
    }

    fn end_flights(&self, shard: ShardId, but: Option<u64>) {
        for queue in self.queues.load().values() {
            queue.end_all_but(shard, but);
        }
    }

    /// Runs until the refresher stops, which awaits it.
    fn duty<F>(self: &Arc<Self>, name: &'static str, run: impl FnOnce(Arc<Self>) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, work) = (self.stop.clone(), run(self.clone()));
        let until_stopped = async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = work => {}
            }
        };
        self.tasks
            .spawn(until_stopped.instrument(tracing::info_span!(parent: None, "duty", name)));
    }

    async fn follow_hints(self: Arc<Self>) {
        let mut hinted = self.hinted.lock().await;
        while let Some(key) = hinted.recv().await {
            self.ask(&key, Priority::Asked);
        }
    }

    /// A flight keeps its claim for as long as this node may lead in its term, not a moment longer:
    /// in another term, or under another leader, somebody else may fetch.
    async fn end_lost_claims(self: Arc<Self>, replica: Arc<Replica>) {
        let mut leader = replica.watch_leader();
        loop {
            let known = *leader.borrow_and_update();
            match known {
                Some(leader) if leader.is_self => {
                    self.end_flights(replica.shard(), Some(leader.term))
                }
                Some(_) => self.end_flights(replica.shard(), None),
                None => {}
            }
            if leader.changed().await.is_err() {
                return;
            }
        }
    }
}
