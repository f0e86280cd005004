//! What a follower tells the leader of what is read here: once a second, and sooner what is past
//! its refresh point; and to a new leader everything it knows of what was read before. Outside the
//! log: a report that is lost with its leader's node costs a refresh that the next reader asks for.
//!
//! Promises bounded messages and one on its way per shard; and that a key which was read on any
//! node stays refreshed when another node leads, for as long as one lives that knows of the read.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use holdfast_proto::{Key, ShardId, peer::ReportReadsRequest, timeline::Millis};
use holdfast_raft::{Leader, Replica};
use tokio::time::MissedTickBehavior;

use super::{
    Refresher, Told,
    marks::{Hashed, Report},
    queue::Priority,
};

/// How long a due key waits for others to go with it.
const DUE_EVERY: Duration = Duration::from_millis(40);
/// What was read goes with every so many of these: about once a second.
const READ_EVERY: u32 = 25;
const TIMEOUT: Duration = Duration::from_millis(500);
/// Marks of one message: some 800 KiB.
const MARKS_MAX: usize = 50_000;
/// Keys of one message: even of the longest a few MiB.
const KEYS_MAX: usize = 4_000;

impl Refresher {
    pub(super) async fn report_reads(self: Arc<Self>) {
        let mut every = tokio::time::interval(DUE_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut round = 0u32;
        loop {
            every.tick().await;
            self.marks.tick();
            self.tell_leaders_what_was_read().await;
            round = round.wrapping_add(1);
            let report = self.marks.take_report(round.is_multiple_of(READ_EVERY));
            let by_shard = self.by_shard(report);
            futures::future::join_all(
                by_shard
                    .into_iter()
                    .map(|(shard, report)| self.report(shard, report)),
            )
            .await;
        }
    }

    /// What a follower's readers used, and of that what is due; no more of it than one report has.
    pub(crate) fn reads_reported(self: &Arc<Self>, mut read: Vec<Key>, mut due: Vec<Key>) {
        read.truncate(KEYS_MAX);
        due.truncate(KEYS_MAX);
        self.hear_report(Report { read, due });
    }

    /// Takes in what readers of another node used.
    pub(super) fn hear_report(self: &Arc<Self>, report: Report) {
        for key in report.read.iter().chain(&report.due) {
            let Some(replica) = self.replicas.of_key(key).filter(|_| self.has_upstream(key)) else {
                continue;
            };
            self.marks.mark(Hashed::of(key), replica.now());
            // Also what was read before its refresh point and came to be due on the way here.
            self.ask(key, Priority::Asked);
        }
    }

    /// What was read on other nodes before this one led.
    pub(crate) fn hear_marks(&self, hashes: &[u64], read_at: &[Millis]) {
        let marks = hashes.iter().zip(read_at).take(MARKS_MAX);
        marks.for_each(|(&hash, &at)| self.marks.mark(Hashed(hash), at));
    }

    pub(crate) fn policy_hash(&self) -> u64 {
        self.rules.load().hash()
    }

    /// To each shard's leader once, if it is another node: what was read here, and elsewhere as far
    /// as this node was told while it led.
    pub(super) async fn tell_leaders_what_was_read(&self) {
        for replica in self.replicas.replicas() {
            let leader = replica.leader().filter(|leader| !leader.is_self);
            let Some(leader) = leader else { continue };
            let known = self.told.lock().get(&replica.shard()).copied();
            if known.is_none_or(|told| told.leader != leader) {
                self.tell_what_was_read(replica, leader).await;
            }
        }
    }

    async fn tell_what_was_read(&self, replica: &Replica, leader: Leader) {
        let mut marks: Vec<(Hashed, Millis)> = Vec::new();
        for part in self.marks.all() {
            let own = |(key, _): &(Hashed, Millis)| {
                self.replicas.shard_of_hash(key.0) == Some(replica.shard())
            };
            marks.extend(part.into_iter().filter(own));
        }
        // One at least: its answer says by which policies the leader judges.
        let parts = marks.len().div_ceil(MARKS_MAX).max(1);
        let mut heard = None;
        for part in 0..parts {
            let marks = marks.chunks(MARKS_MAX).nth(part).unwrap_or_default();
            let message = ReportReadsRequest {
                read_before: marks.iter().map(|(key, _)| key.0).collect(),
                read_before_at_ms: marks.iter().map(|&(_, at)| at).collect(),
                ..Default::default()
            };
            heard = self.tell(replica, leader, message).await;
            if heard.is_none() {
                return;
            }
        }
        if let Some(policy_hash) = heard {
            let told = Told {
                leader,
                policy_hash,
            };
            self.told.lock().insert(replica.shard(), told);
        }
    }

    fn by_shard(&self, report: Report) -> BTreeMap<ShardId, Report> {
        let mut by_shard: BTreeMap<ShardId, Report> = BTreeMap::new();
        let shard_of = |key: &Key| self.replicas.of_key(key).map(|replica| replica.shard());
        for key in report.read {
            by_shard
                .entry(shard_of(&key).unwrap_or_default())
                .or_default()
                .read
                .push(key);
        }
        for key in report.due {
            by_shard
                .entry(shard_of(&key).unwrap_or_default())
                .or_default()
                .due
                .push(key);
        }
        by_shard
    }

    pub(super) async fn report(self: &Arc<Self>, shard: ShardId, report: Report) {
        let Some(replica) = self.replicas.replica(shard) else {
            return;
        };
        match replica.leader() {
            Some(leader) if leader.is_self && replica.leads().is_some() => self.hear_report(report),
            Some(leader) if !leader.is_self => {
                let mut is_heard = true;
                for message in messages(report) {
                    // Who did not hear one would hold up the others: they wait for the next round,
                    // or for the next leader.
                    is_heard = is_heard
                        && self
                            .tell(&replica, leader, message.request())
                            .await
                            .is_some();
                    if !is_heard {
                        self.marks.put_back(message);
                    }
                }
            }
            // For the next leader.
            _ => self.marks.put_back(report),
        }
    }

    /// The hash of the leader's policies, if it heard.
    async fn tell(
        &self,
        replica: &Replica,
        leader: Leader,
        report: ReportReadsRequest,
    ) -> Option<u64> {
        let peers = self.replicas.peers()?;
        let header = replica.header(leader.id);
        let deadline = self.clock.deadline(TIMEOUT);
        let response = peers.call(header, &deadline, report).await.ok()?;
        if let Some(told) = self.told.lock().get_mut(&replica.shard())
            && told.leader == leader
        {
            told.policy_hash = response.policy_hash;
        }
        Some(response.policy_hash)
    }
}

impl Report {
    fn request(&self) -> ReportReadsRequest {
        let bytes = |keys: &[Key]| keys.iter().map(|key| key.as_bytes().clone()).collect();
        ReportReadsRequest {
            read: bytes(&self.read),
            due: bytes(&self.due),
            ..Default::default()
        }
    }
}

/// Cut so that each is bounded; what is due first.
fn messages(report: Report) -> impl Iterator<Item = Report> {
    let cut = |keys: Vec<Key>| {
        keys.chunks(KEYS_MAX)
            .map(<[Key]>::to_vec)
            .collect::<Vec<_>>()
    };
    let due = cut(report.due).into_iter().map(|due| Report {
        read: Vec::new(),
        due,
    });
    due.chain(cut(report.read).into_iter().map(|read| Report {
        read,
        due: Vec::new(),
    }))
}
