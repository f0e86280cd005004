//! The server: listeners, rules, refresh, upstreams, telemetry.
//!
//! ```text
//! main ─► cli ─► node (composition root) ─► serve ─► grpc ─► operation, cache ─► refresh ─► upstream
//!          └► dev (many nodes)               └► ready, admin          └──────────┴─► raft
//!                                            └► peers ─► cache, refresh
//! ```

pub mod cache;
pub mod config;
pub mod dev;
pub mod error;
pub mod glob;
pub mod grpc;
pub mod methods;
pub mod metrics;
pub mod node;
pub mod operation;
pub mod peers;
pub mod policy;
pub mod ready;
pub mod refresh;
pub mod rules;
pub mod secret;
pub mod serve;
pub mod telemetry;
pub mod template;
pub mod upstream;
pub mod wanted;

mod admin;
mod cli;
mod process;
mod resources;

pub use cli::main;
pub use node::{Node, StartError};
