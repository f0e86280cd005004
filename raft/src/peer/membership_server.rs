//! Forming, joining and membership inwards: what nodes ask of this one. The node mounts it on its
//! peer listener.

use std::sync::Arc;

use holdfast_proto::peer::{
    AcceptRequest, AcceptResponse, ChangeMemberRequest, ChangeMemberResponse, HelloRequest,
    HelloResponse, JoinRequest, JoinResponse, Member, NodeState, ReportRequest, ReportResponse,
    join_response, membership_service_server::MembershipService,
};
use tonic::{Request, Response, Status};

use super::Peers;
use crate::{
    forming::{Forming, meet::state_of},
    local::Local,
    membership::{self, Admission, Change, Changes, Contact},
};

#[derive(Clone)]
pub struct MembershipServer {
    local: Arc<Local>,
    forming: Arc<Forming>,
    changes: Arc<Changes>,
    contact: Arc<Contact>,
}

impl MembershipServer {
    pub(crate) fn new(
        local: Arc<Local>,
        forming: Arc<Forming>,
        changes: Arc<Changes>,
        contact: Arc<Contact>,
    ) -> Self {
        Self {
            local,
            forming,
            changes,
            contact,
        }
    }

    fn peers(&self) -> Result<Arc<Peers>, Status> {
        let not_formed = || Status::unavailable("this node does not belong to a cluster yet");
        self.local.peers().ok_or_else(not_formed)
    }

    /// Why a node with this identity cannot be one of ours; empty if nothing stands in the way.
    fn refusal(&self, caller: &Member) -> String {
        let Some(peers) = self.local.peers() else {
            return String::new();
        };
        let members = peers.members();
        let taken = members.iter().find(|member| {
            member.incarnation != caller.incarnation
                && (member.name == caller.name || member.peer_address == caller.peer_address)
                && !is_replaced(member, caller)
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

    /// Why the caller of a hello is not taken in.
    fn hello_refusal(&self, caller: &HelloRequest, cluster_id: &str) -> String {
        let member = caller.self_.clone().unwrap_or_default();
        if caller.state() != NodeState::Formed {
            return self.refusal(&member);
        }
        if caller.cluster_id == cluster_id {
            return String::new();
        }
        let refusal = format!(
            "this node belongs to cluster {cluster_id}, the caller to {}",
            caller.cluster_id
        );
        if self
            .local
            .peers()
            .is_some_and(|peers| peers.is_news(&refusal))
        {
            tracing::warn!(name = member.name, address = member.peer_address, %refusal, "a node was refused");
        }
        refusal
    }
}

/// A member of which nothing survives a restart comes back as another one under its name.
fn is_replaced(member: &Member, caller: &Member) -> bool {
    member.volatile && caller.volatile && member.name == caller.name
}

#[tonic::async_trait]
impl MembershipService for MembershipServer {
    async fn hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloResponse>, Status> {
        let caller = request.into_inner();
        if self.local.is_closing() || self.local.is_retired() {
            return Err(Status::unavailable("this node takes part in no cluster"));
        }
        self.forming.invite(&caller);
        let record = self.local.identity().record();
        let state = state_of(&record);
        let (cluster_id, refusal) = match record.cluster {
            Some(cluster) => {
                let refusal = self.hello_refusal(&caller, &cluster.cluster_id);
                (cluster.cluster_id, refusal)
            }
            None => Default::default(),
        };
        let is_colleague = caller.state() == NodeState::Formed && state == NodeState::Formed;
        let verdict = match is_colleague && refusal.is_empty() && !caller.is_probe {
            true => Some(self.contact.judge(&caller).await),
            false => None,
        };
        let peers = self.local.peers();
        Ok(Response::new(HelloResponse {
            self_: Some(self.local.myself()),
            state: state.into(),
            cluster_id,
            expect: self.local.options().expect,
            sees: self.forming.sees(),
            formation: record.accepted,
            refusal,
            session: self.local.session(),
            roster: peers.map(|peers| peers.roster().snapshot()),
            standing: verdict
                .as_ref()
                .map_or(0, |verdict| verdict.standing.into()),
            standing_reason: verdict.map(|verdict| verdict.reason).unwrap_or_default(),
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
        let accepted = self.forming.accept(&formation, request.proposer);
        let accepted = accepted.map_err(|error| {
            Status::unavailable(format!("accepting could not be made durable: {error}"))
        })?;
        Ok(Response::new(AcceptResponse {
            accepted: accepted.is_ok(),
            refusal: accepted.err().unwrap_or_default().into(),
        }))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let member = request
            .into_inner()
            .member
            .ok_or_else(|| Status::invalid_argument("the member is missing"))?;
        let refusal = self.refusal(&member);
        let result = if !refusal.is_empty() {
            join_response::Result::Refusal(refusal)
        } else {
            match self.changes.admit(member).await {
                Ok(Admission::Here(joined)) => join_response::Result::Joined(joined),
                Ok(Admission::AskLeader(address)) => {
                    join_response::Result::LeaderPeerAddress(address)
                }
                Err(error) => join_response::Result::Refusal(error.to_string()),
            }
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
        let peers = self.peers()?;
        let shard = peers.check(request.header.as_ref())?.shard;
        let change = Change::try_from(request.change).map_err(Status::invalid_argument)?;
        let answer = self.changes.run_here(shard, change).await;
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
        self.peers()?.check(request.into_inner().header.as_ref())?;
        Ok(Response::new(membership::report(&self.local)))
    }
}
