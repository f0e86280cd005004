//! The crate held to its promises: openraft's storage suite on both engines, and whole groups of
//! nodes in one process.

mod divergence;
mod group;
mod leadership;
mod membership;
mod quiet;
mod suite;
mod unreachable;
