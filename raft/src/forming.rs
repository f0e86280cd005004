//! How empty nodes form one cluster, ever, and later ones join it.
//!
//! ```text
//! EMPTY ──(all `expect` empty nodes see each other; the least incarnation proposes F)──► ACCEPTED F, durably
//!   │                                                                                      │
//!   └──(sees a formed cluster: joins)──► member      FORMED ◄──(every member of F accepted F)┘
//! ```
//!
//! Why there is at most one: a node accepts one formation for ever, a formation has exactly
//! `expect` members, and nobody initialises before all of its members accepted it. Two formations
//! would need two disjoint sets of `expect` nodes that do not see each other; nodes that see more
//! than `expect` empty ones propose none, and say so.

use std::{collections::BTreeSet, io, net::SocketAddr, sync::Arc, time::Duration};

use futures::future::join_all;
use holdfast_proto::peer::{
    AcceptRequest, AcceptResponse, ChangeMemberRequest, ChangeMemberResponse, ClusterRecord,
    Formation, HelloRequest, HelloResponse, JoinRequest, JoinResponse, Joined, Member, NodeState,
    ReportRequest, ReportResponse, ShardReport, join_response,
    membership_service_client::MembershipServiceClient,
    membership_service_server::MembershipService,
};
use parking_lot::Mutex;
use tonic::{Request, Response, Status};

use crate::{
    membership::{self, Change, change_here},
    peer::connect_lazy,
    replicas::{Membership, Replicas},
};

const HELLO_EVERY: Duration = Duration::from_millis(150);
const HELLO_TIMEOUT: Duration = Duration::from_millis(700);
const JOIN_TIMEOUT: Duration = Duration::from_secs(5);
/// Words about what stands in the way are repeated no sooner.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// What a node that belongs to no cluster knows of the others.
#[derive(Default)]
pub(crate) struct Forming {
    /// Incarnations of the empty nodes that answered in the last round, this node among them.
    sees: Mutex<BTreeSet<u64>>,
    /// A formed cluster that wants this node: its address, from an operator's AddMember.
    invited_by: Mutex<Option<String>>,
    /// Members of the cluster this node joins, before its own log tells it.
    known_members: Mutex<Vec<Member>>,
    said: Mutex<Option<(Duration, String)>>,
}

impl Forming {
    pub(crate) fn known_members(&self) -> Vec<Member> {
        self.known_members.lock().clone()
    }
}

/// One answer of one address.
struct Met {
    address: SocketAddr,
    hello: HelloResponse,
}

impl Met {
    /// An empty node that votes: a learner founds no cluster and keeps nobody from it.
    fn may_found(&self) -> bool {
        self.hello.state() != NodeState::Formed
            && self
                .hello
                .self_
                .as_ref()
                .is_some_and(|member| !member.learner_only)
    }
}

impl Replicas {
    /// Ends once this node belongs to a cluster.
    pub(crate) async fn form_or_join(self: Arc<Self>) -> io::Result<()> {
        if self.peers().is_some() {
            return Ok(());
        }
        let mut every = tokio::time::interval(HELLO_EVERY);
        loop {
            every.tick().await;
            let met = self.meet_others().await;
            if let Some(formed) = met
                .iter()
                .find(|met| met.hello.state() == NodeState::Formed && !self.is_mine(&met.hello))
            {
                if self.identity.record().accepted.is_none() && self.join(formed).await? {
                    return Ok(());
                }
                continue;
            }
            if self.form(&met).await? {
                return Ok(());
            }
        }
    }

    /// Whether a formed node runs the formation that this node accepted: then this node is a
    /// founder, not a guest.
    fn is_mine(&self, hello: &HelloResponse) -> bool {
        self.identity
            .record()
            .accepted
            .is_some_and(|accepted| accepted.cluster_id == hello.cluster_id)
    }

    /// Whether a node has accepted a formation that this node is a member of.
    fn is_wanted_by(&self, hello: &HelloResponse) -> bool {
        let mine = self.identity.incarnation();
        hello.formation.as_ref().is_some_and(|formation| {
            formation
                .members
                .iter()
                .any(|member| member.incarnation == mine)
        })
    }

    async fn meet_others(&self) -> Vec<Met> {
        let invited = self.forming.invited_by.lock().clone();
        let names: Vec<String> = self
            .options
            .discover
            .iter()
            .cloned()
            .chain(invited)
            .collect();
        let resolved = join_all(
            names
                .iter()
                .map(|name| tokio::net::lookup_host(name.clone())),
        )
        .await;
        let addresses: BTreeSet<SocketAddr> = resolved.into_iter().flatten().flatten().collect();
        let asked = addresses.into_iter().map(|address| async move {
            self.say_hello(address)
                .await
                .map(|hello| Met { address, hello })
        });
        let mine = self.identity.incarnation();
        let mut met: Vec<Met> = join_all(asked).await.into_iter().flatten().collect();
        met.retain(|met| {
            met.hello
                .self_
                .as_ref()
                .is_some_and(|member| member.incarnation != mine)
        });
        // A node with several addresses answers once.
        let mut seen = BTreeSet::new();
        met.retain(|met| {
            seen.insert(
                met.hello
                    .self_
                    .as_ref()
                    .map_or(0, |member| member.incarnation),
            )
        });

        let mut sees: BTreeSet<u64> = met
            .iter()
            .filter(|met| met.may_found())
            .filter_map(|met| met.hello.self_.as_ref())
            .map(|member| member.incarnation)
            .collect();
        if !self.options.learner_only {
            sees.insert(mine);
        }
        *self.forming.sees.lock() = sees;
        met
    }

    async fn say_hello(&self, address: SocketAddr) -> Option<HelloResponse> {
        let record = self.identity.record();
        let request = HelloRequest {
            self_: Some(self.myself()),
            state: state_of(&record).into(),
            cluster_id: record
                .cluster
                .map(|cluster| cluster.cluster_id)
                .unwrap_or_default(),
            expect: self.options.expect,
        };
        let mut client = MembershipServiceClient::new(connect_lazy(&address.to_string()));
        let answer = tokio::time::timeout(HELLO_TIMEOUT, client.hello(Request::new(request))).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    /// One round of forming among empty nodes.
    async fn form(self: &Arc<Self>, met: &[Met]) -> io::Result<bool> {
        let record = self.identity.record();
        if let Some(formation) = record.accepted {
            return self.finish(formation, met).await;
        }
        if self.options.learner_only {
            self.say("a learner waits for a cluster to join");
            return Ok(false);
        }
        let expect = self.options.expect;
        let sees = self.forming.sees.lock().clone();
        let others: Vec<&Met> = met.iter().filter(|met| met.may_found()).collect();
        if others
            .iter()
            .any(|met| met.hello.state() == NodeState::Accepted)
        {
            self.say(match others.iter().any(|met| self.is_wanted_by(&met.hello)) {
                true => "others have accepted to form a cluster with this node: it waits to be asked",
                false => "others have accepted a formation without this node: it waits for their cluster, to join it",
            });
            return Ok(false);
        }
        if sees.len() > expect as usize {
            self.say(&format!(
                "{} empty nodes see each other and `cluster.expect` is {expect}: none of them forms a cluster; stop {} of them, or start them after it",
                sees.len(),
                sees.len() - expect as usize
            ));
            return Ok(false);
        }
        if sees.len() < expect as usize {
            self.say(&format!("{} of {expect} nodes are here", sees.len()));
            return Ok(false);
        }
        let agree = |met: &&&Met| {
            met.hello.expect == expect
                && met.hello.sees.iter().copied().collect::<BTreeSet<_>>() == sees
        };
        if others.iter().filter(agree).count() + 1 != expect as usize {
            self.say(&format!(
                "{expect} nodes are here, and do not all see each other"
            ));
            return Ok(false);
        }
        let names: BTreeSet<&str> = others
            .iter()
            .filter_map(|met| met.hello.self_.as_ref())
            .map(|member| member.name.as_str())
            .collect();
        if names.len() != others.len() || names.contains(self.options.name.as_str()) {
            self.say("two of the nodes have the same `node.name`");
            return Ok(false);
        }
        if sees.first() != Some(&self.identity.incarnation()) {
            return Ok(false);
        }
        let formation = self.propose(&others);
        if !self.identity.accept(&formation)? {
            return Ok(false);
        }
        tracing::info!(
            cluster = formation.cluster_id,
            "proposing to form a cluster of {expect}"
        );
        self.finish(formation, met).await
    }

    /// Members in the order of their names, so that ids are what people expect.
    fn propose(&self, others: &[&Met]) -> Formation {
        let members = others
            .iter()
            .filter_map(|met| met.hello.self_.clone())
            .chain([self.myself()]);
        let mut members: Vec<Member> = members.collect();
        members.sort_by(|a, b| a.name.cmp(&b.name));
        for (member, id) in members.iter_mut().zip(1..) {
            member.id = id;
        }
        let cluster_id = format!(
            "{:016x}{:016x}",
            rand::random::<u64>(),
            rand::random::<u64>()
        );
        Formation {
            cluster_id,
            members,
            shards: self.options.shards,
        }
    }

    /// Brings an accepted formation to its end: asks those that have not accepted, and starts once
    /// all have.
    async fn finish(self: &Arc<Self>, formation: Formation, met: &[Met]) -> io::Result<bool> {
        let mine = self.identity.incarnation();
        let mut accepted: BTreeSet<u64> = BTreeSet::from([mine]);
        for met in met {
            let Some(member) = met.hello.self_.as_ref() else {
                continue;
            };
            if !formation
                .members
                .iter()
                .any(|known| known.incarnation == member.incarnation)
            {
                continue;
            }
            let same = met
                .hello
                .formation
                .as_ref()
                .is_some_and(|theirs| theirs.cluster_id == formation.cluster_id);
            if same
                || (met.hello.state() == NodeState::Empty
                    && self.ask_to_accept(met.address, &formation).await)
            {
                accepted.insert(member.incarnation);
            }
            // Formed with it: then all had accepted.
            if same && met.hello.state() == NodeState::Formed {
                accepted.extend(formation.members.iter().map(|member| member.incarnation));
            }
        }
        let all = formation
            .members
            .iter()
            .all(|member| accepted.contains(&member.incarnation));
        if !all {
            self.say(&format!(
                "{} of {} nodes have accepted to form the cluster",
                accepted.len(),
                formation.members.len()
            ));
            return Ok(false);
        }
        let Some(me) = formation
            .members
            .iter()
            .find(|member| member.incarnation == mine)
        else {
            return Err(io::Error::other(
                "the accepted formation does not have this node",
            ));
        };
        let cluster = ClusterRecord {
            cluster_id: formation.cluster_id.clone(),
            epoch: 1,
            shards: formation.shards.max(1),
            node_id: me.id,
            founder: true,
            caught_up: true,
        };
        self.identity.belong(cluster.clone())?;
        self.enter(cluster).await?;
        Ok(true)
    }

    async fn ask_to_accept(&self, address: SocketAddr, formation: &Formation) -> bool {
        let request = AcceptRequest {
            formation: Some(formation.clone()),
            proposer: self.identity.incarnation(),
        };
        let mut client = MembershipServiceClient::new(connect_lazy(&address.to_string()));
        match tokio::time::timeout(HELLO_TIMEOUT, client.accept(Request::new(request))).await {
            Ok(Ok(response)) => {
                let response = response.into_inner();
                if !response.accepted {
                    tracing::info!(%address, refusal = response.refusal, "a node did not accept the formation yet");
                }
                response.accepted
            }
            _ => false,
        }
    }

    /// Asks a formed cluster to take this node in.
    async fn join(self: &Arc<Self>, formed: &Met) -> io::Result<bool> {
        if !formed.hello.refusal.is_empty() {
            self.say(&format!(
                "the cluster refuses this node: {}",
                formed.hello.refusal
            ));
            return Ok(false);
        }
        *self.forming.known_members.lock() = formed.hello.members.clone();
        let mut address = formed.address.to_string();
        // The first answer may name the leader; once more is enough.
        for _ in 0..2 {
            let mut client = MembershipServiceClient::new(connect_lazy(&address));
            let asked = tokio::time::timeout(
                JOIN_TIMEOUT,
                client.join(Request::new(JoinRequest {
                    member: Some(self.myself()),
                })),
            )
            .await;
            let Ok(Ok(response)) = asked else {
                self.say(
                    "a cluster is there and does not take this node in yet: it does not answer",
                );
                return Ok(false);
            };
            match response.into_inner().result {
                Some(join_response::Result::Joined(joined)) => {
                    return self.joined(joined).await.map(|()| true);
                }
                Some(join_response::Result::LeaderPeerAddress(leader)) => address = leader,
                Some(join_response::Result::Refusal(refusal)) => {
                    self.say(&format!("the cluster refuses this node: {refusal}"));
                    return Ok(false);
                }
                None => return Ok(false),
            }
        }
        Ok(false)
    }

    async fn joined(self: &Arc<Self>, joined: Joined) -> io::Result<()> {
        let cluster = ClusterRecord {
            cluster_id: joined.cluster_id,
            epoch: joined.epoch,
            shards: joined.shards,
            node_id: joined.node_id,
            founder: false,
            caught_up: false,
        };
        self.identity.belong(cluster.clone())?;
        self.enter(cluster).await
    }

    /// Tells people what this node waits for, when it changes or has been so for a while.
    fn say(&self, what: &str) {
        self.membership.send_if_modified(|membership| {
            let new = Membership::Forming(what.into());
            let changed = *membership != new;
            *membership = new;
            changed
        });
        let now = self.clock.monotonic();
        let mut said = self.forming.said.lock();
        let again = said
            .as_ref()
            .is_none_or(|(at, last)| last != what || now.saturating_sub(*at) > SAY_EVERY);
        if again {
            tracing::warn!("{what}");
            *said = Some((now, what.into()));
        }
    }
}

fn state_of(record: &holdfast_proto::peer::IdentityRecord) -> NodeState {
    match (&record.cluster, &record.accepted) {
        (Some(_), _) => NodeState::Formed,
        (None, Some(_)) => NodeState::Accepted,
        (None, None) => NodeState::Empty,
    }
}

/// The same protocol inwards.
#[derive(Clone)]
pub struct MembershipServer {
    replicas: Arc<Replicas>,
}

impl MembershipServer {
    pub(crate) fn new(replicas: Arc<Replicas>) -> Self {
        Self { replicas }
    }

    /// Why a node with this identity cannot be one of ours; empty if nothing stands in the way.
    fn refusal(&self, caller: &Member) -> String {
        let Some(peers) = self.replicas.peers() else {
            return String::new();
        };
        let members = peers.members();
        let taken = members.iter().find(|member| {
            member.incarnation != caller.incarnation
                && (member.name == caller.name || member.peer_address == caller.peer_address)
        });
        let Some(member) = taken else {
            return String::new();
        };
        let refusal = format!(
            "`{}` at {} is a member with another data directory; if that one is gone for good, run `holdfast member remove {}` first",
            member.name, member.peer_address, member.name
        );
        if peers.is_news(&refusal) {
            tracing::warn!(name = caller.name, address = caller.peer_address, %refusal, "a node was refused");
        }
        refusal
    }
}

#[tonic::async_trait]
impl MembershipService for MembershipServer {
    async fn hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloResponse>, Status> {
        let caller = request.into_inner();
        let record = self.replicas.identity.record();
        let state = state_of(&record);
        let member = caller.self_.clone().unwrap_or_default();
        let caller_formed = caller.state() == NodeState::Formed;
        if state == NodeState::Empty && caller_formed && !member.peer_address.is_empty() {
            *self.replicas.forming.invited_by.lock() = Some(member.peer_address.clone());
        }
        let cluster_id = record
            .cluster
            .as_ref()
            .map(|cluster| cluster.cluster_id.clone())
            .unwrap_or_default();
        let other_cluster =
            caller_formed && state == NodeState::Formed && caller.cluster_id != cluster_id;
        let refusal = if other_cluster {
            let refusal = format!(
                "this node belongs to cluster {cluster_id}, the caller to {}",
                caller.cluster_id
            );
            tracing::warn!(name = member.name, address = member.peer_address, %refusal, "a node was refused");
            refusal
        } else if state == NodeState::Formed && !caller_formed {
            self.refusal(&member)
        } else {
            String::new()
        };
        Ok(Response::new(HelloResponse {
            self_: Some(self.replicas.myself()),
            state: state.into(),
            cluster_id,
            expect: self.replicas.options.expect,
            sees: self.replicas.forming.sees.lock().iter().copied().collect(),
            formation: record.accepted,
            members: self
                .replicas
                .peers()
                .map(|peers| peers.members())
                .unwrap_or_default(),
            refusal,
        }))
    }

    async fn accept(
        &self,
        request: Request<AcceptRequest>,
    ) -> Result<Response<AcceptResponse>, Status> {
        let request = request.into_inner();
        let formation = request
            .formation
            .ok_or_else(|| Status::invalid_argument("the formation is missing"))?;
        let refuse = |refusal: &str| {
            Ok(Response::new(AcceptResponse {
                accepted: false,
                refusal: refusal.into(),
            }))
        };
        let members: BTreeSet<u64> = formation
            .members
            .iter()
            .map(|member| member.incarnation)
            .collect();
        let record = self.replicas.identity.record();
        if record.cluster.is_none() && record.accepted.is_none() {
            // The proposer saw exactly these nodes. One that came since joins what they form: to
            // refuse because of it would leave those that have accepted, once and for ever, with
            // nothing to form.
            if !members.contains(&self.replicas.identity.incarnation())
                || !self.replicas.forming.sees.lock().is_superset(&members)
            {
                return refuse("this node does not see all of these nodes");
            }
            if members.first() != Some(&request.proposer)
                || members.len() != self.replicas.options.expect as usize
            {
                return refuse("this formation is not for the least incarnation to propose");
            }
            if formation.members.iter().any(|member| member.learner_only) {
                return refuse("a node with `node.role: learner` founds no cluster");
            }
            if formation.shards != self.replicas.options.shards {
                return refuse("`cluster.shards` differs between the nodes");
            }
        }
        match self.replicas.identity.accept(&formation) {
            Ok(true) => Ok(Response::new(AcceptResponse {
                accepted: true,
                refusal: String::new(),
            })),
            Ok(false) => refuse("this node has accepted another formation"),
            Err(error) => Err(Status::unavailable(format!(
                "accepting could not be made durable: {error}"
            ))),
        }
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let member = request
            .into_inner()
            .member
            .ok_or_else(|| Status::invalid_argument("the member is missing"))?;
        let refusal = self.refusal(&member);
        if !refusal.is_empty() {
            return Ok(Response::new(JoinResponse {
                result: Some(join_response::Result::Refusal(refusal)),
            }));
        }
        let result = match membership::admit(&self.replicas, member).await {
            Ok(membership::Admission::Here(joined)) => join_response::Result::Joined(joined),
            Ok(membership::Admission::AskLeader(address)) => {
                join_response::Result::LeaderPeerAddress(address)
            }
            Err(error) => join_response::Result::Refusal(error.to_string()),
        };
        Ok(Response::new(JoinResponse {
            result: Some(result),
        }))
    }

    async fn change_member(
        &self,
        request: Request<ChangeMemberRequest>,
    ) -> Result<Response<ChangeMemberResponse>, Status> {
        let request = request.into_inner();
        let peers = self
            .replicas
            .peers()
            .ok_or_else(|| Status::unavailable("this node does not belong to a cluster yet"))?;
        let header = peers.check(request.header.as_ref())?;
        let shard = header.shard;
        let change = Change::try_from(request.change).map_err(Status::invalid_argument)?;
        let answer = change_here(&self.replicas, shard, change).await;
        let (reason, message, id, leader) = match answer {
            Ok(changed) => (String::new(), String::new(), changed.id, changed.leader),
            Err(error) => (
                error.reason().to_owned(),
                error.to_string(),
                0,
                String::new(),
            ),
        };
        Ok(Response::new(ChangeMemberResponse {
            header: Some(peers.reply(None)),
            reason,
            message,
            id,
            leader,
        }))
    }

    async fn report(
        &self,
        request: Request<ReportRequest>,
    ) -> Result<Response<ReportResponse>, Status> {
        let request = request.into_inner();
        let peers = self
            .replicas
            .peers()
            .ok_or_else(|| Status::unavailable("this node does not belong to a cluster yet"))?;
        peers.check(request.header.as_ref())?;
        Ok(Response::new(ReportResponse {
            header: Some(
                peers.reply(
                    self.replicas
                        .replica(0)
                        .as_ref()
                        .map(|replica| replica.state().as_ref()),
                ),
            ),
            version: env!("CARGO_PKG_VERSION").into(),
            shards: self
                .replicas
                .replicas()
                .iter()
                .map(|replica| report(replica))
                .collect(),
        }))
    }
}

pub(crate) fn report(replica: &crate::replica::Replica) -> ShardReport {
    let applied = replica.applied();
    ShardReport {
        shard: replica.shard(),
        term: replica.term(),
        applied_index: applied.index,
        revision: applied.revision,
        leader: replica.leader().map_or(0, |leader| leader.id),
        role: replica.role().into(),
    }
}
