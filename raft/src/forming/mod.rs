//! How empty nodes form one cluster, ever, and later ones join it: what `rules` decides is done
//! here, round by round.
//!
//! ```text
//! EMPTY ──(all `expect` empty nodes see each other; the least incarnation proposes F)──► ACCEPTED F, durably
//!   │                                                                                      │
//!   └──(sees a formed cluster: joins)──► member      FORMED ◄──(every member of F accepted F)┘
//! ```
//!
//! Knows no replicas: it ends with the record of the cluster that this node belongs to from then on.

pub(crate) mod meet;
mod rules;

use std::{collections::BTreeSet, io, net::SocketAddr, sync::Arc, time::Duration};

use holdfast_proto::peer::{
    AcceptRequest, ClusterRecord, Formation, HelloRequest, JoinRequest, Joined, Member, NodeState,
    join_response,
};
use parking_lot::Mutex;

pub(crate) use self::rules::Met;
use self::{
    meet::{HELLO_TIMEOUT, state_of},
    rules::{Mine, Step},
};
use crate::{
    clock::Deadline,
    local::{Local, Membership},
    peer::ask_stranger,
};

const HELLO_EVERY: Duration = Duration::from_millis(150);
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Words about what stands in the way are repeated no sooner.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What a node that belongs to no cluster does and knows of the others.
pub(crate) struct Forming {
    local: Arc<Local>,
    /// Incarnations of the empty nodes that answered in the last round, this node among them.
    sees: Mutex<BTreeSet<u64>>,
    /// A formed cluster that wants this node: its address, from an operator's AddMember.
    invited_by: Mutex<Option<String>>,
    said: Mutex<Option<(Duration, String)>>,
}

impl Forming {
    pub(crate) fn new(local: Arc<Local>) -> Self {
        Self {
            local,
            sees: Mutex::default(),
            invited_by: Mutex::default(),
            said: Mutex::default(),
        }
    }

    /// Ends once this node belongs to a cluster, durably.
    pub(crate) async fn run(&self) -> io::Result<ClusterRecord> {
        let mut every = tokio::time::interval(HELLO_EVERY);
        loop {
            every.tick().await;
            let met = self.meet_others().await;
            if let Some(cluster) = self.take_step(&met).await? {
                self.local.identity().belong(cluster.clone())?;
                return Ok(cluster);
            }
        }
    }

    async fn meet_others(&self) -> Vec<Met> {
        let invited = self.invited_by.lock().clone();
        let names = self.local.options().discover.iter().cloned().chain(invited);
        let met = meet::all(&self.local, names.collect()).await;
        *self.sees.lock() = rules::sees(&self.mine(), &met);
        met
    }

    fn mine(&self) -> Mine {
        Mine {
            member: self.local.myself(),
            expect: self.local.options().expect,
            accepted: self.local.identity().record().accepted,
        }
    }

    async fn take_step(&self, met: &[Met]) -> io::Result<Option<ClusterRecord>> {
        let mut accepted = BTreeSet::new();
        loop {
            match rules::decide(&self.mine(), met, &accepted) {
                Step::Join(address) => return Ok(self.join(address, met).await),
                Step::Propose(members) => {
                    if !self.propose(members)? {
                        return Ok(None);
                    }
                }
                Step::Ask { nodes, so_far } => {
                    let before = accepted.len();
                    accepted.extend(self.ask_to_accept(nodes).await);
                    if accepted.len() == before {
                        self.say(&so_far);
                        return Ok(None);
                    }
                }
                Step::Found => return self.founded().map(Some),
                Step::Wait(why) => {
                    self.say(&why);
                    return Ok(None);
                }
            }
        }
    }

    fn propose(&self, members: Vec<Member>) -> io::Result<bool> {
        let (high, low) = (rand::random::<u64>(), rand::random::<u64>());
        let formation = Formation {
            cluster_id: format!("{high:016x}{low:016x}"),
            members,
            shards: self.local.options().shards,
        };
        let accepted = self.local.identity().accept(&formation)?;
        if accepted {
            tracing::info!(
                cluster = formation.cluster_id,
                "proposing to form a cluster of {}",
                formation.members.len()
            );
        }
        Ok(accepted)
    }

    /// Incarnations of those that said yes.
    async fn ask_to_accept(&self, nodes: Vec<(u64, SocketAddr)>) -> BTreeSet<u64> {
        let Some(formation) = self.local.identity().record().accepted else {
            return BTreeSet::new();
        };
        let deadline = &self.local.clock().deadline(HELLO_TIMEOUT);
        let asked = nodes.into_iter().map(|(incarnation, address)| {
            let request = AcceptRequest {
                formation: Some(formation.clone()),
                proposer: self.local.identity().incarnation(),
            };
            async move {
                accepts(address, deadline, request)
                    .await
                    .then_some(incarnation)
            }
        });
        let answers = futures::future::join_all(asked).await;
        answers.into_iter().flatten().collect()
    }

    fn founded(&self) -> io::Result<ClusterRecord> {
        let missing = || io::Error::other("the accepted formation does not have this node");
        let record = self.local.identity().record();
        let formation = record.accepted.ok_or_else(missing)?;
        let me = formation
            .members
            .iter()
            .find(|member| member.incarnation == record.incarnation)
            .ok_or_else(missing)?;
        Ok(ClusterRecord {
            cluster_id: formation.cluster_id.clone(),
            epoch: 1,
            shards: formation.shards.max(1),
            node_id: me.id,
            founder: true,
            caught_up: true,
            roster: None,
        })
    }

    /// Asks a formed cluster to take this node in.
    async fn join(&self, address: SocketAddr, met: &[Met]) -> Option<ClusterRecord> {
        let formed = met.iter().find(|met| met.address == address);
        if let Some(refusal) = formed.map(|met| &met.hello.refusal)
            && !refusal.is_empty()
        {
            self.say(&format!("the cluster refuses this node: {refusal}"));
            return None;
        }
        let mut address = address.to_string();
        // The first answer may name the leader; once more is enough.
        for _ in 0..2 {
            let Some(result) = self.ask_to_join(&address).await else {
                self.say(
                    "a cluster is there and does not take this node in yet: it does not answer",
                );
                return None;
            };
            match result {
                join_response::Result::Joined(joined) => return Some(member_of(joined)),
                join_response::Result::LeaderPeerAddress(leader) => address = leader,
                join_response::Result::Refusal(refusal) => {
                    self.say(&format!("the cluster refuses this node: {refusal}"));
                    return None;
                }
            }
        }
        None
    }

    async fn ask_to_join(&self, address: &str) -> Option<join_response::Result> {
        let request = JoinRequest {
            member: Some(self.local.myself()),
        };
        let deadline = self.local.clock().deadline(JOIN_TIMEOUT);
        let answer = ask_stranger(address, &deadline, request).await;
        answer.ok()?.result
    }

    /// Tells people what this node waits for, when it changes or has been so for a while.
    fn say(&self, what: &str) {
        self.local.set_membership(Membership::Forming(what.into()));
        let now = self.local.clock().monotonic();
        let mut said = self.said.lock();
        let again = said
            .as_ref()
            .is_none_or(|(at, last)| last != what || now.saturating_sub(*at) > SAY_EVERY);
        if again {
            tracing::warn!("{what}");
            *said = Some((now, what.into()));
        }
    }
}

// ---- what others ask ----

impl Forming {
    /// A node that belongs to a cluster says hello to one that does not: an operator wants it in.
    pub(crate) fn invite(&self, caller: &HelloRequest) {
        let address = caller.self_.as_ref().map(|member| &member.peer_address);
        let is_empty = state_of(&self.local.identity().record()) == NodeState::Empty;
        if let Some(address) = address.filter(|address| !address.is_empty())
            && is_empty
            && caller.state() == NodeState::Formed
        {
            *self.invited_by.lock() = Some(address.clone());
        }
    }

    pub(crate) fn sees(&self) -> Vec<u64> {
        self.sees.lock().iter().copied().collect()
    }

    /// Accepts a formation, durably and once for ever, or says why not.
    pub(crate) fn accept(
        &self,
        formation: &Formation,
        proposer: u64,
    ) -> io::Result<Result<(), &'static str>> {
        let mine = self.mine();
        let identity = self.local.identity();
        if mine.accepted.is_none() && identity.record().cluster.is_none() {
            let (shards, sees) = (self.local.options().shards, self.sees.lock().clone());
            if let Err(why) = rules::may_accept(&mine, shards, &sees, formation, proposer) {
                return Ok(Err(why));
            }
        }
        Ok(match identity.accept(formation)? {
            true => Ok(()),
            false => Err("this node has accepted another formation"),
        })
    }
}

async fn accepts(address: SocketAddr, deadline: &Deadline, request: AcceptRequest) -> bool {
    let Ok(answer) = ask_stranger(&address.to_string(), deadline, request).await else {
        return false;
    };
    if !answer.accepted {
        tracing::info!(%address, refusal = answer.refusal, "a node did not accept the formation yet");
    }
    answer.accepted
}

fn member_of(joined: Joined) -> ClusterRecord {
    ClusterRecord {
        cluster_id: joined.cluster_id,
        epoch: joined.epoch,
        shards: joined.shards,
        node_id: joined.node_id,
        founder: false,
        caught_up: false,
        roster: joined.roster,
    }
}
