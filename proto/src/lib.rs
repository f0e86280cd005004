//! The contract: every byte that is sent or stored, and the types, limits and time arithmetic that
//! all crates share. Knows nothing of its users: no openraft, no storage, no network but the
//! generated stubs.
//!
//! `v1` is what applications and operators see, `peer` what nodes say to each other and write down.
//! The `.proto` files are the source; fields are never renumbered or reused.

pub mod limits;
pub mod reason;
pub mod timeline;
pub mod timeout;

mod generated;
mod key;
mod shard;
mod token;

pub use generated::holdfast::{peer::v1 as peer, v1};
pub use key::{InvalidKey, Key};
pub use shard::{SLOTS, ShardId, Slot, SlotTable};
pub use token::{InvalidToken, Token};

/// Counts the commands of one shard that changed a key. 0 is before the first.
pub type Revision = u64;

/// Every service and message of this crate, for gRPC reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

impl From<peer::outcome::Result> for peer::Outcome {
    fn from(result: peer::outcome::Result) -> Self {
        Self {
            result: Some(result),
        }
    }
}

/// XXH3 of a value: tells equal bodies without keeping or comparing them.
pub fn content_hash(value: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(value)
}
