//! The gRPC door: proto to rules and back, nothing more. The rules are in `cache`, what holds for
//! every operation in `operation`, the reasons of errors in `error`.

mod cache;
mod cluster;
mod layer;
mod status;
#[cfg(test)]
mod tests;
mod trace;

use std::sync::Arc;

use tonic::{Request, Status};

pub(crate) use self::status::error_of;
pub use self::{
    cache::{CacheServer, cache_service},
    cluster::{ClusterServer, cluster_service},
    layer::OperationLayer,
    trace::TraceLayer,
};
use crate::{error::Error, operation::Operation};

/// What the layer began for this request.
fn operation_of<T>(request: &Request<T>) -> Result<Arc<Operation>, Status> {
    let operation = request.extensions().get::<Arc<Operation>>().cloned();
    operation.ok_or_else(|| Error::internal("a request has no operation", "no layer").into())
}
