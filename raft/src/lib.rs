//! Replicas of shards: the log, the state, and agreement with peers.
//!
//! ```text
//! Replicas ── one per node: opens, enters a cluster, closes
//!   ├─ forming/ membership/ upkeep   what the node does for its cluster, over what it is (local)
//!   └─ Replica ── one per shard: write, wait, read
//!        ├─ agreement/   openraft around it: proposer, log, state machine, read rounds, the leader's clock
//!        ├─ state/       what the log came to: apply, memory tier, due index
//!        ├─ store/       what is on disk: two traits, two engines
//!        └─ peer/        both ends of the protocol between nodes
//! ```
//!
//! Positions in a shard's log, on any replica:
//! ```text
//! purged ≤ flushed ≤ applied ≤ committed ≤ last       synced ≤ last
//! ```
//!
//! Must never know: HTTP, upstreams, policies, configuration files, a metrics registry. Nothing of
//! openraft's types is on disk or in the public API.

mod agreement;
mod clock;
mod error;
mod events;
mod forming;
mod identity;
mod local;
mod membership;
mod peer;
mod progress;
mod replica;
mod replicas;
mod state;
#[allow(
    unreachable_pub,
    reason = "its traits are the engines' face, within this crate"
)]
mod store;
pub mod task;
#[cfg(test)]
mod tests;
mod upkeep;

pub use agreement::{leadership::Leader, log::LogKept};
pub use clock::{Clock, Deadline};
pub use error::{ChangeError, ReadError, ReadManyError, WriteError};
pub use events::Events;
pub use identity::IdentityError;
pub use local::{Membership, Options};
pub use peer::{
    CallError, Identity, PeerView, Peers, membership_server::MembershipServer,
    server::ReplicaServer,
};
pub use replica::{InMemory, Inspected, Replica, Seen, Standing};
pub use replicas::{OpenError, Replicas};
pub use state::{Applied, Change, Changes, MemoryUse, Scanned, Shown, View};
pub use store::{Budget, Engine, Family, StateBatch, StateStore, Stores};
