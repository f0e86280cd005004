//! Staying in touch: a node says hello to every member that does not know its process yet, at its
//! start and whenever somebody starts again, and tells those that say hello where they stand.
//!
//! ```text
//! hello ─► is it a member? ─► is another process of it alive where it was? ─► did its log lose what it
//!          removed             a copy of it, else it has moved                  had acknowledged?
//! ```
//! Addresses that changed travel with the hello; while there is no leader, `discover` is asked again
//! and again, so that nodes find each other though none is where it was. A verdict that this node
//! must not take part ends its part for good: it answers no data any more and says why.

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, future::join_all, stream::FuturesUnordered};
use holdfast_proto::peer::{self, HelloRequest, HelloResponse, Member, Standing};

use crate::{
    forming::meet::{self, HELLO_TIMEOUT},
    local::{Local, Opened},
    peer::Peers,
    replica::Replica,
    task::every,
};

/// How often somebody may be due to be greeted.
const GREET_EVERY: Duration = Duration::from_millis(50);
/// A greeting's own time: who is greeted looks at an address that may not answer first.
const GREETING_TIMEOUT: Duration = Duration::from_millis(2500);
/// Between two greetings of a member that does not answer, or not yet as wished.
const RETRY_FIRST: Duration = Duration::from_millis(50);
const RETRY_LAST: Duration = Duration::from_secs(1);
const SEARCH_EVERY: Duration = Duration::from_millis(500);
const NOTE_EVERY: Duration = Duration::from_millis(50);
const WRITE_EVERY: Duration = Duration::from_secs(1);

pub(crate) struct Contact {
    local: Arc<Local>,
}

/// What a node that said hello is told.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) standing: Standing,
    /// In words, unless it is a member.
    pub(crate) reason: String,
}

impl Verdict {
    fn new(standing: Standing, reason: impl Into<String>) -> Self {
        Self {
            standing,
            reason: reason.into(),
        }
    }

    fn member() -> Self {
        Self::new(Standing::Member, "")
    }
}

// ---- saying hello ----

impl Contact {
    pub(crate) fn new(local: Arc<Local>) -> Self {
        Self { local }
    }

    /// Greets whoever is to be greeted, for ever.
    pub(crate) async fn greet(&self) {
        let mut every = every(GREET_EVERY);
        let mut asked = FuturesUnordered::new();
        let mut busy = HashSet::new();
        let mut retries: HashMap<u64, Retry> = HashMap::new();
        loop {
            let Some(opened) = self.local.opened() else {
                every.tick().await;
                continue;
            };
            let now = self.local.clock().monotonic();
            let roster = opened.peers.roster();
            for member in roster.to_greet(opened.peers.identity().node_id) {
                let is_due = retries.get(&member.id).is_none_or(|retry| retry.at <= now);
                if is_due && busy.insert(member.id) {
                    asked.push(self.greet_one(member));
                }
            }
            tokio::select! {
                Some((id, is_met)) = asked.next() => {
                    busy.remove(&id);
                    match is_met {
                        true => _ = retries.remove(&id),
                        false => retries.entry(id).or_default().later(now),
                    }
                }
                _ = every.tick() => {}
                () = roster.greeting_is_due() => {}
            }
        }
    }

    /// Whether both know each other then.
    async fn greet_one(&self, member: Member) -> (u64, bool) {
        let address = &member.peer_address;
        let answer = meet::greet(&self.local, address, GREETING_TIMEOUT).await;
        let is_met = match answer {
            Some(answer) => self.take_answer(address, answer).await,
            None => false,
        };
        (member.id, is_met)
    }

    /// Asks all members and `discover` again while this node knows of no leader: nobody may be where
    /// it was, and it may have been removed since it was judged.
    pub(crate) async fn search(&self) {
        let mut every = every(SEARCH_EVERY);
        loop {
            every.tick().await;
            let (Some(opened), Some(first)) = (self.local.opened(), self.local.replica(0)) else {
                continue;
            };
            if first.leader().is_some() || opened.peers.is_closed() {
                continue;
            }
            let me = opened.peers.identity().node_id;
            let members = opened.peers.members().into_iter();
            let others = members.filter(|member| member.id != me);
            join_all(others.map(|member| self.greet_one(member))).await;
            let names = self.local.options().discover.clone();
            for met in meet::all(&self.local, names).await {
                self.take_answer(&met.address.to_string(), met.hello).await;
            }
        }
    }

    /// What a node that was said hello to answered, at the address that was dialled.
    async fn take_answer(&self, dialled: &str, answer: HelloResponse) -> bool {
        let (Some(opened), Some(member)) = (self.local.opened(), answer.self_.clone()) else {
            return false;
        };
        let (peers, roster) = (&opened.peers, opened.peers.roster());
        if answer.cluster_id != peers.identity().cluster_id {
            return false;
        }
        if let Some(newer) = &answer.roster {
            roster.learn(newer);
        }
        let Some(known) = roster
            .member(member.id)
            .filter(|known| known.incarnation == member.incarnation)
        else {
            return false;
        };
        if known.peer_address == dialled {
            roster.meet(&member, answer.session);
        } else {
            let found = self.locate(peers, &known, &member, answer.session).await;
            if found.standing == Standing::Member {
                roster.meet(&member, answer.session);
            }
        }
        match answer.standing() {
            Standing::Member => roster.was_judged_by(member.id, answer.session),
            Standing::Unspecified => return false,
            standing => {
                let reason = format!("{} (says `{}`)", answer.standing_reason, member.name);
                self.local.retire(standing, reason);
            }
        }
        roster.session(member.id) == Some(answer.session)
    }
}

/// When a member is greeted again.
#[derive(Debug, Clone, Copy, Default)]
struct Retry {
    at: Duration,
    pause: Duration,
}

impl Retry {
    fn later(&mut self, now: Duration) {
        self.pause = (self.pause * 2).clamp(RETRY_FIRST, RETRY_LAST);
        self.at = now + self.pause;
    }
}

// ---- being said hello to ----

impl Contact {
    /// Where a node of a formed cluster stands with this one. Meets it if it is a member.
    pub(crate) async fn judge(&self, hello: &HelloRequest) -> Verdict {
        let (Some(opened), Some(member)) = (self.local.opened(), &hello.self_) else {
            return Verdict::new(Standing::Unspecified, "this node has no cluster");
        };
        let (peers, roster) = (&opened.peers, opened.peers.roster());
        let cluster_id = &peers.identity().cluster_id;
        if hello.cluster_id != *cluster_id {
            return Verdict::new(Standing::Unspecified, "it belongs to another cluster");
        }
        let Some(known) = roster.member(member.id) else {
            return match roster.is_removed(member.id) {
                true => Verdict::new(
                    Standing::Removed,
                    format!("this node was removed from cluster {cluster_id}"),
                ),
                false => Verdict::new(Standing::Unspecified, "its id is not in the roster yet"),
            };
        };
        if known.incarnation != member.incarnation {
            return Verdict::new(
                Standing::Copy,
                format!("node id {} is another node's: `{}`", member.id, known.name),
            );
        }
        let verdict = self.locate(peers, &known, member, hello.session).await;
        let lost = peers
            .acknowledged()
            .lost(member.id, hello.session, &hello.last_index);
        match (verdict.standing, lost) {
            (Standing::Member, Some((shard, index))) => {
                let lost = format!(
                    "its log of shard {shard} lost entries that it had acknowledged, up to index {index}"
                );
                roster.refuse(member.id, lost.clone());
                Verdict::new(Standing::LostLog, lost)
            }
            (Standing::Member, None) => {
                if hello.log_is_short {
                    for replica in opened.replicas() {
                        replica.expect_less_of(member.id).await;
                    }
                }
                roster.meet(member, hello.session);
                verdict
            }
            _ => verdict,
        }
    }

    /// Whether that process is the member: no other one of it is alive where it was, and it is where
    /// it says it is.
    async fn locate(
        &self,
        peers: &Peers,
        known: &Member,
        member: &Member,
        session: u64,
    ) -> Verdict {
        let roster = peers.roster();
        if roster.session(member.id) == Some(session) && known == member {
            return Verdict::member();
        }
        let there = self.session_at(&known.peer_address, member).await;
        if let Some(other) = there.filter(|&there| there != session) {
            // It is the one to talk to, wherever this node met it last.
            roster.meet(known, other);
            let reason = format!(
                "another process with the identity of `{}` is alive at {}",
                member.name, known.peer_address
            );
            return Verdict::new(Standing::Copy, reason);
        }
        if known.peer_address != member.peer_address && there.is_none() {
            let here = self.session_at(&member.peer_address, member).await;
            if here != Some(session) {
                return Verdict::new(
                    Standing::Unspecified,
                    format!("it does not answer at {}", member.peer_address),
                );
            }
            tracing::info!(
                name = member.name,
                from = known.peer_address,
                to = member.peer_address,
                "a member has moved"
            );
        }
        Verdict::member()
    }

    /// Which process of a member answers at an address.
    async fn session_at(&self, address: &str, member: &Member) -> Option<u64> {
        let answer = meet::probe(&self.local, address, HELLO_TIMEOUT).await?;
        let found = answer.self_?;
        (found.id == member.id && found.incarnation == member.incarnation).then_some(answer.session)
    }
}

// ---- what voters have acknowledged ----

impl Contact {
    /// As a leader, notes it for everybody.
    pub(crate) async fn note_acknowledged(&self) {
        let mut every = every(NOTE_EVERY);
        loop {
            every.tick().await;
            let Some(opened) = self.local.opened() else {
                continue;
            };
            for replica in opened.replicas() {
                opened
                    .peers
                    .acknowledged()
                    .note(&acknowledged(opened, replica));
            }
        }
    }

    /// Writes down what others have acknowledged, as far as it changed.
    pub(crate) async fn write_acknowledged(&self) {
        let mut every = every(WRITE_EVERY);
        let mut written = None;
        loop {
            every.tick().await;
            let (Some(opened), Some(dir)) = (self.local.opened(), self.local.durable_dir()) else {
                continue;
            };
            let record = opened.peers.acknowledged().record();
            if written.as_ref() == Some(&record) {
                continue;
            }
            let (peers, dir) = (opened.peers.clone(), dir.to_owned());
            let done = crate::task::blocking(move || peers.acknowledged().write(&dir)).await;
            match done.map_err(io::Error::other).flatten() {
                Ok(()) => written = Some(record),
                Err(error) => {
                    tracing::warn!(%error, "writing down what voters have acknowledged failed")
                }
            }
        }
    }
}

fn acknowledged(opened: &Opened, replica: &Replica) -> Vec<peer::Acknowledged> {
    let me = opened.peers.identity();
    let of = |(id, index)| {
        let session = match id == me.node_id {
            true => me.session,
            false => opened.peers.roster().session(id)?,
        };
        Some(peer::Acknowledged {
            shard: replica.shard(),
            id,
            session,
            index,
        })
    };
    replica.acknowledged().into_iter().filter_map(of).collect()
}
