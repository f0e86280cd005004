//! The gRPC door: proto to rules and back, nothing more. The rules are in `cache`, the table of
//! errors in `error`.

mod cache;
mod cluster;
mod codec;
mod status;
#[cfg(test)]
mod tests;

use std::time::Duration;

use holdfast_proto::limits::DEADLINE_DEFAULT;
use holdfast_raft::{Clock, deadline};
use tonic::Request;

use crate::{cache::answered_within, layers::Deadline};

pub(crate) use self::status::error_of;
pub use self::{
    cache::{CacheServer, cache_service},
    cluster::{ClusterServer, cluster_service},
    codec::CodecTold,
};

/// How long a request may take here: until the deadline that the layers gave it, else by what its
/// caller says.
pub fn deadline_of<T>(request: &Request<T>, clock: &Clock) -> Duration {
    match request.extensions().get::<Deadline>() {
        Some(deadline) => deadline.left(clock),
        None => deadline::remaining(request.metadata()).map_or(DEADLINE_DEFAULT, answered_within),
    }
}
