//! ClusterService over gRPC.

use std::sync::Arc;

use holdfast_proto::v1::{
    self,
    cluster_service_server::{ClusterService, ClusterServiceServer},
};
use holdfast_raft::{ChangeError, Clock, Deadline, Replicas};
use tonic::{Request, Response, Status};

use super::CodecTold;
use crate::{
    error::{Code, Error},
    layers::deadline_of,
    metrics::Metrics,
};

/// What the client listener serves of the cluster.
pub fn cluster_service(
    replicas: Arc<Replicas>,
    metrics: Arc<Metrics>,
    clock: Clock,
) -> CodecTold<ClusterServiceServer<ClusterServer>> {
    CodecTold(ClusterServiceServer::new(ClusterServer {
        replicas,
        metrics,
        clock,
    }))
}

pub struct ClusterServer {
    replicas: Arc<Replicas>,
    metrics: Arc<Metrics>,
    clock: Clock,
}

impl ClusterServer {
    /// Runs a change until its caller stops waiting; what it came to by then nobody knows, and
    /// repeating it is safe.
    async fn change<T>(
        &self,
        method: &'static str,
        deadline: &Deadline,
        change: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Status> {
        let began = self.clock.monotonic();
        let ended = deadline.limit(change).await;
        let result = ended.unwrap_or_else(|_| Err(Error::deadline().maybe_applied()));
        let code = result.as_ref().err().map_or(Code::Ok, Error::code);
        let state = if result.is_ok() { "" } else { "ERROR" };
        self.metrics.request(
            method,
            state,
            code,
            self.clock.monotonic().saturating_sub(began),
        );
        result.map_err(|error| self.sent_to_leader(error).into())
    }

    fn sent_to_leader(&self, error: Error) -> Error {
        if error.code() != Code::Unavailable {
            return error;
        }
        let leader = self
            .replicas
            .replica(0)
            .and_then(|first| first.leader())
            .filter(|leader| !leader.is_self);
        let member = leader.and_then(|leader| self.replicas.peers()?.member(leader.id));
        error.with_leader(member.map(|member| member.client_address))
    }
}

#[tonic::async_trait]
impl ClusterService for ClusterServer {
    async fn status(
        &self,
        _: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let began = self.clock.monotonic();
        let status = self.replicas.status().await;
        self.metrics.request(
            "Status",
            "",
            Code::Ok,
            self.clock.monotonic().saturating_sub(began),
        );
        Ok(Response::new(status))
    }

    async fn add_member(
        &self,
        request: Request<v1::AddMemberRequest>,
    ) -> Result<Response<v1::AddMemberResponse>, Status> {
        let deadline = deadline_of(&request, &self.clock);
        let v1::AddMemberRequest { name, peer_address } = request.into_inner();
        let id = self.change("AddMember", &deadline, async {
            let (name, peer_address) =
                (named("name", &name)?, named("peer_address", &peer_address)?);
            self.replicas
                .add_member(name, peer_address)
                .await
                .map_err(failed)
        });
        Ok(Response::new(v1::AddMemberResponse { id: id.await? }))
    }

    async fn promote(
        &self,
        request: Request<v1::PromoteRequest>,
    ) -> Result<Response<v1::PromoteResponse>, Status> {
        let deadline = deadline_of(&request, &self.clock);
        let v1::PromoteRequest { name } = request.into_inner();
        self.change("Promote", &deadline, async {
            self.replicas
                .promote(named("name", &name)?)
                .await
                .map_err(failed)
        })
        .await?;
        Ok(Response::new(v1::PromoteResponse {}))
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        let deadline = deadline_of(&request, &self.clock);
        let v1::RemoveRequest { name } = request.into_inner();
        self.change("Remove", &deadline, async {
            self.replicas
                .remove(named("name", &name)?)
                .await
                .map_err(failed)
        })
        .await?;
        Ok(Response::new(v1::RemoveResponse {}))
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let deadline = deadline_of(&request, &self.clock);
        let v1::TransferLeaderRequest { to } = request.into_inner();
        let leader = self.change("TransferLeader", &deadline, async {
            self.replicas.transfer_leader(&to).await.map_err(failed)
        });
        Ok(Response::new(v1::TransferLeaderResponse {
            leader: leader.await?,
        }))
    }
}

fn named<'a>(field: &'static str, text: &'a str) -> Result<&'a str, Error> {
    match text.is_empty() {
        true => Err(Error::field(field, "it is empty").not_applied()),
        false => Ok(text),
    }
}

/// A change goes through several steps; only one that could not begin is certain to have done
/// nothing.
fn failed(error: ChangeError) -> Error {
    let error = match error {
        ChangeError::Write(error) => return error.into(),
        other => other,
    };
    let told = Error::new(error.reason().to_owned(), error.to_string());
    match error {
        ChangeError::NoMember(_) => told.not_applied(),
        _ => told.maybe_applied(),
    }
}
