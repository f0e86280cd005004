//! The gRPC door: proto to rules and back, nothing more. The rules are in `cache`, the table of
//! errors in `error`.

mod cache;
mod cluster;
mod codec;
mod status;
#[cfg(test)]
mod tests;

pub(crate) use self::status::error_of;
pub use self::{
    cache::{CacheServer, cache_service},
    cluster::{ClusterServer, cluster_service},
    codec::CodecTold,
};
