//! What whole clusters are tested with.

pub mod cluster;
pub mod history;
pub mod links;
pub mod origin;
pub mod reads;
pub mod wire;
pub mod writes;
