//! A follower's questions for the leader's flights: one per key however many readers wait, all
//! about one upstream on one stream.
//!
//! ```text
//! readers of a key ─► question ─┐                          ┌─► called, outcome ─► all its readers
//! readers of a key ─► question ─┴─► stream to the leader ──┘      (by id, in any order)
//! ```
//! Promises that an upstream that hangs fills its own stream and no other's; that a question ends
//! with its last reader unless it is a refresh, and with its leader. Must never know how the leader
//! comes to an answer.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use holdfast_proto::{
    Key, Revision, ShardId,
    peer::{FetchQuestion, FetchRequest, FetchResponse},
};
use holdfast_raft::{Deadline, InMemory, Leader, Replica};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tracing::Instrument;

use super::{
    Refresher,
    marks::own_key,
    outcome::{FetchOutcome, Need},
    waiter::{Reporter, Waiter},
};
use crate::telemetry;

/// Questions of one upstream: as many as a leader has flights for.
pub(super) const QUESTIONS_MAX: usize = 10_024;
/// Questions of one message.
const QUESTIONS_A_MESSAGE: usize = 500;
/// How long a leader may take to open a stream.
const OPENED_WITHIN: Duration = Duration::from_secs(2);
/// How long a refresh that nobody waits for any more is remembered, so that not every reader of a
/// slow upstream waits anew. By then the leader has logged the failure, or is gone.
const REFRESH_KEPT: Duration = Duration::from_secs(10);
/// Between two looks at what is over.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A stream without questions for so many looks is closed.
const IDLE_LOOKS: u32 = 30;

/// The streams of this node, by shard and upstream.
pub(super) type Links = Mutex<HashMap<(ShardId, String), Arc<Link>>>;

/// What this node asks one leader about one upstream.
pub(super) struct Link {
    leader: Leader,
    /// The leader takes questions: who is told nothing in time waits for a fetch, not for it.
    is_open: AtomicBool,
    asked: Mutex<Asked>,
    wake: Notify,
}

#[derive(Default)]
struct Asked {
    by_key: HashMap<Want, Arc<Question>>,
    by_id: BTreeMap<u64, Want>,
    last_id: u64,
    unsent: Vec<FetchQuestion>,
    withdrawn: Vec<u64>,
    is_closed: bool,
}

/// Who wants to know what the upstream says is not helped by an answer to who does not.
type Want = (Key, Need);

struct Question {
    id: u64,
    /// On the monotonic clock.
    since: Duration,
    /// What this replica had applied: an answer may be from before a change after it.
    asked_at: Revision,
    /// Some reader has no value: nobody misses the answer when all have left.
    is_missed: AtomicBool,
    reporter: Reporter,
}

impl Refresher {
    /// Asks the leader, with all others here who want this key.
    pub(super) async fn ask_leader(
        self: &Arc<Self>,
        key: &Key,
        need: Need,
        upstream: &str,
        replica: &Arc<Replica>,
        leader: Leader,
        deadline: &Deadline,
    ) -> FetchOutcome {
        let link = self.link(upstream, replica, leader);
        let now = replica.now();
        let is_missed =
            !matches!(replica.in_memory(key), InMemory::Found(view) if view.is_live(now));
        let asked_at = replica.applied().revision;
        let since = self.clock.monotonic();
        let (mut waiter, asked_at) = match link.ask(key, need, is_missed, asked_at, since) {
            Ok(asked) => asked,
            Err(refused) => {
                self.metrics.flight_refused(upstream);
                return refused;
            }
        };
        let reported = async {
            loop {
                if let Some(outcome) = waiter.reported() {
                    return outcome;
                }
                if !waiter.another().await {
                    return FetchOutcome::NotLeading;
                }
            }
        };
        match deadline.limit(reported).await {
            // For an earlier reader of this question it may have been the newest.
            Ok(FetchOutcome::Unstored { .. }) if replica.changed_since(key, asked_at).await => {
                FetchOutcome::NotLeading
            }
            Ok(outcome) => outcome,
            Err(_) if waiter.is_called() => FetchOutcome::TimedOut,
            Err(_) if link.is_open.load(Ordering::Relaxed) => FetchOutcome::Overloaded,
            Err(_) => FetchOutcome::NotLeading,
        }
    }

    /// Since when this node waits for the leader's answer.
    pub(super) fn asked_since(
        &self,
        shard: ShardId,
        upstream: &str,
        key: &Key,
    ) -> Option<Duration> {
        let links = self.links.lock();
        if links.is_empty() {
            return None;
        }
        let link = links.get(&(shard, upstream.to_owned()))?.clone();
        drop(links);
        let asked = link.asked.lock();
        let since = |need| asked.by_key.get(&(key.clone(), need));
        since(Need::IfDue)
            .or_else(|| since(Need::Anew))
            .map(|question| question.since)
    }

    fn link(self: &Arc<Self>, upstream: &str, replica: &Arc<Replica>, leader: Leader) -> Arc<Link> {
        let place = (replica.shard(), upstream.to_owned());
        let mut links = self.links.lock();
        if let Some(link) = links.get(&place).filter(|link| link.leader == leader) {
            return link.clone();
        }
        let link = Arc::new(Link {
            leader,
            is_open: AtomicBool::new(false),
            asked: Mutex::default(),
            wake: Notify::new(),
        });
        links.insert(place.clone(), link.clone());
        drop(links);
        let run = self.clone().run_link(place, replica.clone(), link.clone());
        self.tasks.spawn(
            "ask leader",
            run.instrument(tracing::info_span!(parent: None, "refresh.ask")),
        );
        link
    }

    async fn run_link(
        self: Arc<Self>,
        place: (ShardId, String),
        replica: Arc<Replica>,
        link: Arc<Link>,
    ) {
        tokio::select! {
            _ = self.converse(&replica, &link) => {}
            // A leader that hangs is left as soon as there is another.
            () = replica.another_leader(link.leader) => {}
            () = self.stop.cancelled() => {}
        }
        let mut links = self.links.lock();
        if links
            .get(&place)
            .is_some_and(|known| Arc::ptr_eq(known, &link))
        {
            links.remove(&place);
        }
        drop(links);
        link.close();
    }

    /// Until the stream ends, for whatever reason, or is not needed.
    async fn converse(&self, replica: &Replica, link: &Link) -> Option<()> {
        let peers = self.replicas.peers()?;
        let (questions, stream) = mpsc::channel(4);
        let first = FetchRequest {
            header: Some(replica.header(link.leader.id)),
            ..Default::default()
        };
        questions.send(first).await.ok()?;
        let deadline = self.clock.deadline(OPENED_WITHIN);
        let opened = peers.open_fetch(link.leader.id, &deadline, ReceiverStream::new(stream));
        let mut answers = match opened.await {
            Ok(answers) => answers,
            Err(error) => {
                tracing::debug!(leader = link.leader.id, %error, "the leader takes no questions");
                return None;
            }
        };
        link.is_open.store(true, Ordering::Relaxed);
        let mut every = tokio::time::interval(LOOK_EVERY);
        let mut idle = 0;
        while idle < IDLE_LOOKS {
            let has_unsent = link.has_unsent();
            tokio::select! {
                answer = answers.message() => {
                    let answer = answer.ok()??;
                    peers.heard(replica.shard(), link.leader.id, answer.header.as_ref());
                    link.answered(answer);
                }
                place = questions.reserve(), if has_unsent => place.ok()?.send(link.unsent()),
                () = link.wake.notified(), if !has_unsent => {}
                _ = every.tick() => {
                    idle = if link.forget_old(self.clock.monotonic()) { 0 } else { idle + 1 };
                }
            }
        }
        Some(())
    }
}

impl Link {
    /// Joins the question for a key, or asks it; says what was applied here when it was asked.
    fn ask(
        self: &Arc<Self>,
        key: &Key,
        need: Need,
        is_missed: bool,
        asked_at: Revision,
        now: Duration,
    ) -> Result<(Waiter, Revision), FetchOutcome> {
        let mut asked = self.asked.lock();
        if asked.is_closed {
            return Err(FetchOutcome::NotLeading);
        }
        // A slice of a whole message must not live as long as the question.
        let want = (own_key(key).unwrap_or_else(|| key.clone()), need);
        let question = match asked.by_key.get(&want) {
            Some(question) => question.clone(),
            None if asked.by_key.len() >= QUESTIONS_MAX => return Err(FetchOutcome::Overloaded),
            None => {
                let question = asked.add(want, asked_at, now);
                self.wake.notify_one();
                question
            }
        };
        if is_missed {
            question.is_missed.store(true, Ordering::Relaxed);
        }
        let (link, left) = (self.clone(), question.clone());
        let waiter = question.reporter.waiter(move || link.left(&left));
        Ok((waiter, question.asked_at))
    }

    /// One who waited is gone.
    fn left(&self, question: &Arc<Question>) {
        if !question.is_missed.load(Ordering::Relaxed) || question.reporter.has_waiters() {
            return;
        }
        let mut asked = self.asked.lock();
        // Looked at again: another may have come before the lock was taken.
        if !question.reporter.has_waiters() && asked.withdraw(question.id) {
            self.wake.notify_one();
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.asked.lock().by_key.len()
    }

    fn answered(&self, answer: FetchResponse) {
        let mut asked = self.asked.lock();
        let Some(want) = asked.by_id.get(&answer.id) else {
            return;
        };
        let Some(question) = asked.by_key.get(want).cloned() else {
            return;
        };
        match answer.result {
            None => question.reporter.called(),
            Some(result) => {
                asked.remove(answer.id);
                question.reporter.report(result.into());
            }
        }
    }

    fn has_unsent(&self) -> bool {
        let asked = self.asked.lock();
        !asked.unsent.is_empty() || !asked.withdrawn.is_empty()
    }

    fn unsent(&self) -> FetchRequest {
        let mut asked = self.asked.lock();
        let count = asked.unsent.len().min(QUESTIONS_A_MESSAGE);
        FetchRequest {
            header: None,
            questions: asked.unsent.drain(..count).collect(),
            // What is asked in a later message is withdrawn there.
            withdrawn: match asked.unsent.is_empty() {
                true => std::mem::take(&mut asked.withdrawn),
                false => Vec::new(),
            },
        }
    }

    /// Forgets refreshes that take too long. False if there are no questions at all.
    fn forget_old(&self, now: Duration) -> bool {
        let mut asked = self.asked.lock();
        let is_old = |question: &&Arc<Question>| {
            !question.reporter.has_waiters() && now.saturating_sub(question.since) >= REFRESH_KEPT
        };
        let old: Vec<u64> = asked
            .by_key
            .values()
            .filter(is_old)
            .map(|question| question.id)
            .collect();
        for id in old {
            asked.withdraw(id);
        }
        !asked.by_key.is_empty()
    }

    /// Whoever waits asks the next leader.
    fn close(&self) {
        let mut asked = self.asked.lock();
        asked.is_closed = true;
        for question in std::mem::take(&mut asked.by_key).into_values() {
            question.reporter.report(FetchOutcome::NotLeading);
        }
        asked.by_id.clear();
    }
}

impl Asked {
    /// In the caller's trace.
    fn add(&mut self, want: Want, asked_at: Revision, since: Duration) -> Arc<Question> {
        self.last_id += 1;
        let question = Arc::new(Question {
            id: self.last_id,
            since,
            asked_at,
            is_missed: AtomicBool::new(false),
            reporter: Reporter::default(),
        });
        self.unsent.push(FetchQuestion {
            id: question.id,
            key: want.0.clone().into(),
            traceparent: telemetry::traceparent(),
            anew: want.1 == Need::Anew,
        });
        self.by_id.insert(question.id, want.clone());
        self.by_key.insert(want, question.clone());
        question
    }

    fn remove(&mut self, id: u64) -> bool {
        let Some(want) = self.by_id.remove(&id) else {
            return false;
        };
        self.by_key.remove(&want).is_some()
    }

    fn withdraw(&mut self, id: u64) -> bool {
        if !self.remove(id) {
            return false;
        }
        self.withdrawn.push(id);
        true
    }
}
