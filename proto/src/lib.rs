//! The Drover API: the protobuf packages below `proto/drover/` and their generated Rust.
//!
//! `v1` is what billing systems, operators and `vpsctl` call. `agent::v1` joins agents and
//! controllers, `vmm::v1` is the API of one VMM on its unix socket, and `raft::v1` carries
//! opaque Raft messages between controllers. This crate depends on nothing else of ours.

#![allow(missing_docs, clippy::pedantic)]

/// `drover.v1`: the public API.
pub mod v1 {
    tonic::include_proto!("drover.v1");
}
/// `drover.agent.v1`: the session between an agent and the leading controller.
pub mod agent {
    pub mod v1 {
        tonic::include_proto!("drover.agent.v1");
    }
}
/// `drover.vmm.v1`: the API of one VMM process.
pub mod vmm {
    pub mod v1 {
        tonic::include_proto!("drover.vmm.v1");
    }
}
/// `drover.raft.v1`: Raft messages between controllers.
pub mod raft {
    pub mod v1 {
        tonic::include_proto!("drover.raft.v1");
    }
}
/// `drover.store.v1`: the rows that the controllers replicate; no service speaks it.
pub mod store {
    pub mod v1 {
        tonic::include_proto!("drover.store.v1");
    }
}

/// Largest message that a client takes: a page of large objects, or all that one node should run.
/// (gRPC's default, 4 MiB, would let a tenant's long labels cut off a node.)
pub const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// The encoded `FileDescriptorSet` of all packages, for the reflection service.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/drover.fds"));
