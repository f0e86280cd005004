//! Fetching values from upstreams: one flight per key in the cluster, on the leader of the key's
//! shard, for readers that wait and ahead of readers that need not.
//!
//! ```text
//! reader ─ fetch ──────► join ─► ask ─► (leader's) answer ─► queue: slots ─► flight ─► upstream, commit
//! reader ─ note_read ─► marks ─► reports ─► (leader's) marks, asks ──┘      ▲
//!                                          due index ─► due ─► marked? ─────┘
//! ```
//! Promises: at most one fetch of a key per term (P5); a fetch that fails, or that anything newer
//! overtook, changes nothing (P3, P4); all of it bounded (P10). Must never know how reads are
//! answered or who may read.

mod answer;
mod ask;
mod backlog;
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
mod waiter;

use std::{collections::HashMap, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use holdfast_proto::{
    Key, ShardId,
    timeline::{Millis, after},
    v1::Origin,
};
use holdfast_raft::{Clock, Leader, Membership, Replica, Replicas, View, task::Tasks};
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

pub(crate) use self::answer::Answers;
use self::{
    ask::Links,
    backlog::DueBacklog,
    marks::{Hashed, Marks, own_key},
    queue::{Priority, Queue},
};
pub use self::{
    failures::Failure,
    outcome::{FetchOutcome, Need},
};
use crate::{
    metrics::Metrics,
    policy::Policy,
    rules::{CurrentRules, Rules},
};

/// Due keys of this node's own readers on their way to a flight; more are dropped, and asked for
/// again by the next reader.
const HINTS: usize = 16_384;
/// Two instants that are rounded down may differ by so much more than they do.
const ROUNDING_MS: Millis = 2;

/// How long a node that stops takes to tell the leader what was read.
const LAST_REPORT: Duration = Duration::from_millis(300);

/// The refresh engine of one node.
pub struct Refresher {
    replicas: Arc<Replicas>,
    rules: CurrentRules,
    /// By upstream, from the first use on.
    queues: ArcSwap<HashMap<String, Arc<Queue>>>,
    metrics: Arc<Metrics>,
    clock: Clock,
    marks: Marks,
    links: Links,
    hints: mpsc::Sender<Key>,
    hinted: Mutex<mpsc::Receiver<Key>>,
    /// Whom all that was read before was told to, by shard.
    told: parking_lot::Mutex<HashMap<ShardId, Told>>,
    /// By shard this node leads.
    due_backlogs: parking_lot::Mutex<HashMap<ShardId, DueBacklog>>,
    stop: CancellationToken,
    tasks: Tasks,
}

/// Whom this node told all that was read, and what it heard then.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Told {
    leader: Leader,
    /// Of the leader's policies.
    policy_hash: u64,
}

/// Whether a value is past its refresh point by the policy that holds for its key. What a client
/// stored through a node that had no policy for the key is plain and would never be refreshed; as
/// the key has an upstream, it is due when a fetched one would be.
pub(crate) fn is_due(view: &View, policy: &Policy, now: Millis) -> bool {
    let set_at = view.timeline().fetched_at;
    let is_plain = view.origin() == Origin::Plain;
    view.is_due(now) || is_plain && now >= after(set_at, policy.refresh_after_plain())
}

impl Refresher {
    pub fn new(
        replicas: Arc<Replicas>,
        rules: CurrentRules,
        metrics: Arc<Metrics>,
        clock: Clock,
    ) -> Arc<Self> {
        replicas.set_policy_hash(rules.load().hash());
        let (hints, hinted) = mpsc::channel(HINTS);
        let tasks = Tasks::new(metrics.clone());
        Arc::new(Self {
            replicas,
            rules,
            queues: ArcSwap::default(),
            metrics,
            clock,
            marks: Marks::default(),
            links: Links::default(),
            hints,
            hinted: Mutex::new(hinted),
            told: Default::default(),
            due_backlogs: Default::default(),
            stop: tasks.stopping().clone(),
            tasks,
        })
    }

    /// Refreshes what is due and tells the leader what is read, as soon as this node belongs to a
    /// cluster.
    pub fn start(self: &Arc<Self>) {
        self.duty("refresh.hints", Self::follow_hints);
        self.duty("refresh.report", Self::report_reads);
        self.duty("refresh.start", |this| async move {
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
                this.duty("refresh.due", move |this| this.refresh_due(scanned.clone()));
                this.duty("refresh.claims", move |this| {
                    this.end_lost_claims(watched.clone())
                });
            }
        });
    }

    /// Ends every flight; whoever waits is told that nobody leads here. What was read is told to
    /// whoever leads now, who may be new: nobody else knows it.
    pub async fn stop(&self) {
        let told = self.tell_leaders_what_was_read();
        if tokio::time::timeout(LAST_REPORT, told).await.is_err() {
            tracing::debug!("the leader did not hear what was read here");
        }
        self.stop.cancel();
        for replica in self.replicas.replicas() {
            self.end_flights(replica.shard(), None);
        }
        self.tasks.stop().await;
    }

    /// Joins the cluster's flight of a key, here if this node leads the key's shard, else through
    /// the leader. Waits at most `timeout`; a fetch that runs goes on and is stored later.
    pub async fn fetch(
        self: &Arc<Self>,
        key: &Key,
        policy: &Policy,
        timeout: Duration,
        need: Need,
    ) -> FetchOutcome {
        let queue = self.queue(&policy.upstream);
        let Some(_place) = queue.place() else {
            self.metrics.flight_refused(queue.upstream());
            return FetchOutcome::Overloaded;
        };
        let deadline = self.clock.deadline(timeout);
        let fetch = Box::pin(self.fetch_from_leader(key, policy, &deadline, need));
        tokio::select! {
            outcome = fetch => outcome,
            () = self.stop.cancelled() => FetchOutcome::NotLeading,
        }
    }

    /// As `fetch` of a key without a value, for which nobody waits.
    pub fn fetch_behind(self: &Arc<Self>, key: &Key, policy: &Policy) {
        // There may be two at once: they join the same flight.
        if self.is_refreshing(key, policy) {
            return;
        }
        let key = own_key(key).unwrap_or_else(|| key.clone());
        let (this, policy) = (self.clone(), policy.clone());
        self.tasks.spawn("fetch behind", async move {
            this.fetch(&key, &policy, policy.hard_timeout, Need::IfDue)
                .await;
        });
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
        // A reader who finds it due came before the refresh that it asks for, also where both round
        // to the same millisecond.
        let at = match due {
            true => replica.now().saturating_sub(ROUNDING_MS),
            false => replica.now(),
        };
        if replica.leads().is_none() {
            self.marks.try_report(hashed, key, due, at);
            return;
        }
        self.marks.try_mark(hashed, at);
        if due
            && let Some(key) = own_key(key)
            && self.hints.try_send(key).is_err()
        {
            self.marks.drop_one();
        }
    }

    /// A key that has an upstream was invalidated: it is refreshed though nobody reads it, or its
    /// next reader would be given the old value.
    pub fn refresh_invalidated(self: &Arc<Self>, key: &Key) {
        match self.replicas.of_key(key) {
            Some(replica) if replica.leads().is_some() => self.ask(key, Priority::Asked),
            Some(replica) => self.marks.report_due(key, replica.now()),
            None => {}
        }
    }

    /// The leader of a shard, if it is another node and its policies are known not to be `rules`'
    /// own: what they say of a key is for it to judge.
    pub fn judged_by(&self, replica: &Replica, rules: &Rules) -> Option<Leader> {
        let leader = replica.leader().filter(|leader| !leader.is_self)?;
        let told = self.told.lock().get(&replica.shard()).copied()?;
        let differs = told.leader == leader && told.policy_hash != rules.hash();
        differs.then_some(leader)
    }

    /// As far as this node knows.
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
    }

    /// Here, or at the leader as far as this node asked for it.
    fn in_flight_since(&self, key: &Key, policy: &Policy) -> Option<Duration> {
        let queues = self.queues.load();
        let here = queues.get(&*policy.upstream)?.in_flight_since(key);
        here.or_else(|| {
            let shard = self.replicas.of_key(key)?.shard();
            self.asked_since(shard, &policy.upstream, key)
        })
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

    fn end_flights(&self, shard: ShardId, but: Option<u64>) {
        for queue in self.queues.load().values() {
            queue.end_all_but(shard, but);
        }
    }

    /// Runs until the refresher stops, which awaits it.
    fn duty<F>(self: &Arc<Self>, name: &'static str, run: impl Fn(Arc<Self>) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let this = self.clone();
        let span = tracing::info_span!(parent: None, "duty", name);
        self.tasks.duty(name, span, move || run(this.clone()));
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
