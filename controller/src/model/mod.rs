//! What the controller speaks about: ids, rows, and the picture of the cluster made of them.
//!
//! - [`ids`](NodeId): names of the API, typed
//! - [`records`](NodeRecord): the rows, as the store keeps them
//! - [`World`]: all rows that work is decided from, with the sums that decisions need
//! - [`Observed`]: what agents report, in the leader's memory only

mod by_node;
mod ids;
mod observed;
mod records;
mod world;

pub use ids::{
    BadId, DomainId, ID_BYTES_MAX, ID_SYNTAX, ImageId, NetworkId, NodeId, OperationId, SnapshotId,
    VolumeId, is_request_id,
};
pub use observed::{NodeObservation, Observed, Side};
pub use records::*;
pub use world::World;
