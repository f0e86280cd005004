//! The Holdfast client: one handle on a whole cluster, cheap to clone, with every call's time
//! bounded. Knows the contract (`holdfast-proto`) and nothing of how a cluster keeps it: no
//! consensus, no storage.
//!
//! ```no_run
//! use std::time::Duration;
//! use holdfast_client::{Client, Consistency};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::builder()
//!     .endpoints(["127.0.0.1:7400", "127.0.0.1:7410", "127.0.0.1:7420"])
//!     .timeout(Duration::from_secs(2))
//!     .build()?;
//!
//! client.set("greeting", "hello").ttl(Duration::from_secs(60)).tag("words").await?;
//!
//! let found = client.get("greeting").await?;
//! println!("{:?}, {:?} old, {:?}", found.answer.state, found.answer.age, found.answer.value);
//!
//! // A read that sees every write acknowledged before it, by anyone, on any node.
//! let found = client.get("greeting").consistency(Consistency::Linearizable).await?;
//!
//! // Only if nobody has changed it meanwhile.
//! client.set("greeting", "good evening").if_version(found.answer.version).await?;
//!
//! // All keys under a prefix, page by page.
//! use futures::TryStreamExt as _;
//! let mut users = client.scan().prefix("user/").stream();
//! while let Some(entry) = users.try_next().await? {
//!     println!("{:?}", entry.key);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! **What was seen stays seen.** Every answer carries a token of what the answering replica
//! reflects. The client merges them and sends the result with each [`Consistency::Session`] read, so
//! that it reads its own writes and never goes backwards, whichever node answers. A server that acts
//! for many users gives each a [`Client::session`] of its own. To carry what was seen to another
//! service, pass the token on:
//!
//! ```no_run
//! # use holdfast_client::{Client, Token};
//! # async fn example(here: Client, there: Client) -> Result<(), Box<dyn std::error::Error>> {
//! here.set("order/7", "paid").await?;
//! let bytes = here.token().encode();           // into a message, a header, a cookie
//!
//! let there = there.session();                 // this user's, not everybody's
//! there.see(&Token::decode(&bytes)?.unwrap_or_default());
//! let paid = there.get("order/7").await?;      // never older than that write
//! # Ok(())
//! # }
//! ```
//!
//! **What failed says so.** An [`Error`] answers whether the same call may succeed later, and
//! whether a mutation may have happened:
//!
//! ```no_run
//! # use holdfast_client::{Applied, Client, Error};
//! # async fn example(client: Client) {
//! match client.delete("order/7").await {
//!     Ok(done) => println!("existed: {}", done.existed),
//!     Err(Error::Conflict { version, .. }) => println!("somebody was first: {version:?}"),
//!     Err(error) if error.applied() == Applied::No => println!("nothing happened: {error}"),
//!     Err(Error::Deadline { .. }) => println!("it may have happened, or may still"),
//!     Err(error) => println!("{error} (retryable: {})", error.is_retryable()),
//! }
//! # }
//! ```
//!
//! **Tries.** A call is tried on further endpoints, and again after a pause, until its time runs out
//! or its rounds are used up. Reads are tried again when a node is unavailable or its connection is
//! lost. A mutation is tried again if the node said that it did not happen, if no connection was
//! made, or because it carries a request id, which makes it happen once however often it is sent;
//! the client gives every mutation of values one ([`Builder::request_ids`]). Writes go straight to
//! the leader that answers name, once a connection to it stands ([`Builder::follow_leader`]).

mod answer;
mod builder;
mod call;
#[cfg(feature = "cli")]
pub mod cli;
mod client;
mod cluster;
mod deadline;
mod error;
mod mutation;
mod read;
mod retry;
mod route;
mod scan;
#[cfg(test)]
mod scripted;
mod session;
mod value;
mod write;

pub use answer::{
    Answer, Batch, Consistency, Done, Inspection, KeyError, LastError, Lookup, MatchedPolicy, Page,
    Replica, Role, Scanned, State, Stored, StoredEntry, Ttl,
};
pub use builder::{BuildError, Builder};
pub use client::Client;
pub use cluster::{Cluster, ClusterStatus, NodeStatus, ShardStatus};
pub use error::{Applied, Context, Error};
pub use holdfast_proto::{InvalidToken, Revision, Token};
pub use read::{BatchGet, FetchOnMiss, Get, Inspect};
pub use route::InvalidEndpoint;
pub use scan::{Scan, ScanStream};
pub use tonic::Code;
pub use value::Value;
pub use write::{Delete, FOREVER, Invalidate, Set};
