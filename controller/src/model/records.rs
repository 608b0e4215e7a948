//! The rows, and the little that they know about themselves.

pub use drover_proto::store::v1::{
    ClusterRecord, DomainRecord, EventRecord, GarbageRecord, ImageRecord, Migration,
    MigrationStage, MoveRecord, NetworkRecord, NodeRecord, OperationRecord, RequestRecord,
    SnapshotPart, SnapshotRecord, VolumeRecord,
};
use drover_proto::v1::{DomainState, OperationState, PowerState, VolumeState};

use super::{DomainId, NodeId, OperationId};
use crate::scheduler::Resources;
use crate::store::{Record, Table};

/// The key of the only [`ClusterRecord`].
pub const CLUSTER_KEY: &str = "cluster";

macro_rules! record {
    ($($record:ident => $table:ident),* $(,)?) => {
        $(impl Record for $record {
            const TABLE: Table = Table::$table;
            fn key(&self) -> String {
                self.id.clone()
            }
        })*
    };
}

record! {
    NodeRecord => Nodes,
    DomainRecord => Domains,
    OperationRecord => Operations,
    RequestRecord => Requests,
    EventRecord => Events,
    VolumeRecord => Volumes,
    ImageRecord => Images,
    GarbageRecord => Garbage,
    NetworkRecord => Networks,
    SnapshotRecord => Snapshots,
}

impl Record for ClusterRecord {
    const TABLE: Table = Table::Cluster;
    fn key(&self) -> String {
        CLUSTER_KEY.into()
    }
}

/// A node row's id, typed.
#[must_use]
pub fn node_id(record: &NodeRecord) -> NodeId {
    NodeId::trusted(&record.id)
}

/// A domain row's id, typed.
#[must_use]
pub fn domain_id(record: &DomainRecord) -> DomainId {
    DomainId::trusted(&record.id)
}

/// An operation row's id, typed.
#[must_use]
pub fn operation_id(record: &OperationRecord) -> OperationId {
    OperationId::trusted(&record.id)
}

/// Whether the operation has not ended.
#[must_use]
pub fn is_active(record: &OperationRecord) -> bool {
    matches!(record.state(), OperationState::Pending | OperationState::Running)
}

/// What a domain was promised: what it has, or what its next start gives it where that is more.
#[must_use]
pub fn needs(record: &DomainRecord) -> Resources {
    record.spec.as_ref().map_or_else(Resources::default, |spec| Resources {
        vcpus: spec.vcpus.max(record.next_vcpus),
        memory_bytes: spec.memory_bytes.max(record.next_memory_bytes),
    })
}

/// Whether it boots a rescue disk.
#[must_use]
pub fn is_rescued(record: &DomainRecord) -> bool {
    !record.rescue_image.is_empty()
}

/// The bare id of the volume that it is rescued with.
#[must_use]
pub fn rescue_volume(domain: &str) -> String {
    format!("{domain}-rescue")
}

/// Whether its state is on a volume, or about to be, or was until just now.
#[must_use]
pub fn has_memory(record: &DomainRecord) -> bool {
    !record.memory_volume.is_empty()
}

/// How a guest sees a volume of this uid: as long as virtio has it.
#[must_use]
pub fn serial(uid: &str) -> String {
    const SERIAL_CHARS: usize = 20;
    uid.chars().filter(|c| *c != '-').take(SERIAL_CHARS).collect()
}

/// Why a volume cannot be read, for people.
#[must_use]
pub fn unready(volume: &VolumeRecord) -> String {
    match volume.state() {
        VolumeState::Failed => format!(
            "volumes/{} has failed ({}): restore or reinstall it, or delete the domain",
            volume.id, volume.state_reason
        ),
        _ => format!("volumes/{} is being made: wait for it", volume.id),
    }
}

/// What `node` shall remove from its pool: a volume or an image, whichever is not empty.
/// `shared_uid` is which pool that is, where others share it.
#[must_use]
pub fn garbage(
    node: &str,
    (pool, shared_uid): (&str, &str),
    volume_uid: &str,
    image_digest: &str,
) -> GarbageRecord {
    GarbageRecord {
        id: format!("{node}/{volume_uid}{image_digest}"),
        node: node.to_owned(),
        pool: pool.to_owned(),
        volume_uid: volume_uid.to_owned(),
        image_digest: image_digest.to_owned(),
        shared_uid: shared_uid.to_owned(),
        ..GarbageRecord::default()
    }
}

/// What `node` shall remove: a snapshot's part.
#[must_use]
pub fn snapshot_garbage(node: &str, shared_uid: &str, part: &SnapshotPart) -> GarbageRecord {
    GarbageRecord {
        id: format!("{node}/{}", part.uid),
        node: node.to_owned(),
        pool: part.pool.clone(),
        snapshot_uid: part.uid.clone(),
        shared_uid: shared_uid.to_owned(),
        ..GarbageRecord::default()
    }
}

/// Whether no VMM of this domain is anywhere, and none is to be: its row may move freely.
#[must_use]
pub fn is_at_rest(record: &DomainRecord) -> bool {
    record.migration.is_none()
        && record.desired_power() != PowerState::Running
        && matches!(record.state(), DomainState::Stopped | DomainState::Failed | DomainState::Saved)
}
