//! What whole clusters are tested with.

pub mod cluster;
pub mod distance;
pub mod history;
pub mod links;
pub mod origin;
pub mod reads;
pub mod slow_disk;
pub mod wire;
pub mod writes;
