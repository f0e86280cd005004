//! ClusterService over gRPC.

use std::sync::Arc;

use holdfast_proto::v1::{
    self,
    cluster_service_server::{ClusterService, ClusterServiceServer},
};
use holdfast_raft::{ChangeError, Replicas};
use tonic::{Request, Response, Status};

use super::operation_of;
use crate::{
    error::{Code, Error},
    operation::{Answered, Operation},
};

/// What the client listener serves of the cluster.
pub fn cluster_service(replicas: Arc<Replicas>) -> ClusterServiceServer<ClusterServer> {
    ClusterServiceServer::new(ClusterServer { replicas })
}

pub struct ClusterServer {
    replicas: Arc<Replicas>,
}

impl ClusterServer {
    /// Runs a change until its caller stops waiting; what it came to by then nobody knows, and
    /// repeating it is safe.
    async fn change<T: Answered>(
        &self,
        operation: &Operation,
        change: impl Future<Output = Result<T, Error>>,
    ) -> Result<Response<T>, Status> {
        let change = async { change.await.map_err(|error| self.sent_to_leader(error)) };
        Ok(Response::new(operation.run(change).await?))
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
        request: Request<v1::StatusRequest>,
    ) -> Result<Response<v1::StatusResponse>, Status> {
        let status = Box::pin(async { Ok(self.replicas.status().await) });
        Ok(Response::new(operation_of(&request)?.run(status).await?))
    }

    async fn add_member(
        &self,
        request: Request<v1::AddMemberRequest>,
    ) -> Result<Response<v1::AddMemberResponse>, Status> {
        let operation = operation_of(&request)?;
        let v1::AddMemberRequest { name, peer_address } = request.into_inner();
        let change = Box::pin(async {
            let (name, peer_address) =
                (named("name", &name)?, named("peer_address", &peer_address)?);
            let added = self.replicas.add_member(name, peer_address).await;
            Ok(v1::AddMemberResponse {
                id: added.map_err(failed)?,
            })
        });
        self.change(&operation, change).await
    }

    async fn promote(
        &self,
        request: Request<v1::PromoteRequest>,
    ) -> Result<Response<v1::PromoteResponse>, Status> {
        let operation = operation_of(&request)?;
        let v1::PromoteRequest { name } = request.into_inner();
        let change = Box::pin(async {
            let promoted = self.replicas.promote(named("name", &name)?).await;
            promoted.map_err(failed)?;
            Ok(v1::PromoteResponse {})
        });
        self.change(&operation, change).await
    }

    async fn remove(
        &self,
        request: Request<v1::RemoveRequest>,
    ) -> Result<Response<v1::RemoveResponse>, Status> {
        let operation = operation_of(&request)?;
        let v1::RemoveRequest { name } = request.into_inner();
        let change = Box::pin(async {
            let removed = self.replicas.remove(named("name", &name)?).await;
            removed.map_err(failed)?;
            Ok(v1::RemoveResponse {})
        });
        self.change(&operation, change).await
    }

    async fn transfer_leader(
        &self,
        request: Request<v1::TransferLeaderRequest>,
    ) -> Result<Response<v1::TransferLeaderResponse>, Status> {
        let operation = operation_of(&request)?;
        let v1::TransferLeaderRequest { to } = request.into_inner();
        let change = Box::pin(async {
            let leader = self.replicas.transfer_leader(&to).await.map_err(failed)?;
            Ok(v1::TransferLeaderResponse { leader })
        });
        self.change(&operation, change).await
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
