//! What the build script made of the `.proto` files, nested as their packages are.
#![allow(
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code"
)]

pub mod holdfast {
    pub mod v1 {
        tonic::include_proto!("holdfast.v1");
    }
    pub mod peer {
        pub mod v1 {
            tonic::include_proto!("holdfast.peer.v1");
        }
    }
}
