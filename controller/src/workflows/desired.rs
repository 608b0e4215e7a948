//! What a node shall run: derived from the rows each time, so that it cannot drift from them.

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::agent::v1::assignment::Role;
use drover_proto::agent::v1::{
    AssignedDisk, Assignment, Garbage, Incoming, Outgoing, Owner, VolumeSource, WantedSnapshot,
    WantedSnapshotPart, WantedVolume,
};
use drover_proto::v1::{Disk, DomainSpec, DomainState, SnapshotState, VolumeState};

use crate::model::{
    DomainRecord, Migration, MigrationStage, NodeId, SnapshotPart, SnapshotRecord, VolumeRecord,
    World, serial,
};

/// What shall be on a node, as far as the rows say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Level {
    /// By the domains' ids. What is not listed is ended there.
    pub domains: Vec<Assignment>,
    /// Their volumes, and those that no domain has.
    pub volumes: Vec<WantedVolume>,
    /// Taken, or to be taken.
    pub snapshots: Vec<WantedSnapshot>,
    /// What shall be gone.
    pub garbage: Vec<Garbage>,
}

/// Everything that shall be on the node.
#[must_use]
pub fn desired(world: &World, node: &NodeId) -> Level {
    let mut level = Level::default();
    for row in world.concerning(node) {
        if let Some(source) = copied_from(world, &row.value, node) {
            let copies = world.volumes_of(&row.value).map(|volume| {
                let here = wanted(world, node, &volume.value);
                match stays(&row.value, &volume.value) {
                    true => here,
                    false => WantedVolume { create: true, copy_from: source.clone(), ..here },
                }
            });
            level.volumes.extend(copies);
            continue;
        }
        let Some(mut assignment) = assignment(&row.value, node.as_str()) else { continue };
        let comes = matches!(assignment.role, Some(Role::Incoming(_)));
        // One that the guest is asked to let go of is the domain's until it has.
        let (stay, go): (Vec<_>, Vec<_>) =
            world.disks_of(&row.value).partition(|(_, volume)| !volume.value.detaching);
        assignment.disks.extend(stay.into_iter().map(|(disk, row)| assigned(disk, &row.value)));
        let goes = |disk: &Disk| go.iter().any(|(other, _)| *other == Some(disk));
        assignment.spec.iter_mut().for_each(|spec| spec.disks.retain(|disk| !goes(disk)));
        assignment.rescue = world.rescue_of(&row.value).is_some();
        let memory = world.memory_of(&row.value).filter(|_| !comes);
        assignment.memory = memory.map(|volume| assigned(None, &volume.value));
        level.volumes.extend(world.volumes_of(&row.value).map(|volume| match comes {
            true => arriving(world, node, &row.value, &volume.value),
            false => owned(world, node, &volume.value),
        }));
        level.domains.push(assignment);
    }
    level.volumes.extend(world.left_on(node).map(|volume| owned(world, node, &volume.value)));
    level.snapshots.extend(world.snapshots_on(node).map(|row| snapshot(&row.value)));
    let of_node = format!("{node}/");
    let garbage = world.garbage.range(of_node.clone()..);
    for (_, row) in garbage.take_while(|(id, _)| id.starts_with(&of_node)) {
        level.garbage.push(Garbage {
            pool: row.value.pool.clone(),
            volume_uid: row.value.volume_uid.clone(),
            image_digest: row.value.image_digest.clone(),
            snapshot_uid: row.value.snapshot_uid.clone(),
            shared_uid: row.value.shared_uid.clone(),
        });
    }
    level
}

/// Where the volumes of a domain that comes to the node without running are copied from: nothing
/// else of it is there yet.
fn copied_from(world: &World, domain: &DomainRecord, node: &NodeId) -> Option<String> {
    let m = domain.migration.as_ref().filter(|m| m.to == node.as_str())?;
    if m.stage() != MigrationStage::CopyingStopped || domain.state() == DomainState::Deleting {
        return None;
    }
    let source = world.nodes.get(&NodeId::trusted(&m.from));
    Some(source.map(|row| row.value.address.clone()).unwrap_or_default())
}

fn snapshot(snapshot: &SnapshotRecord) -> WantedSnapshot {
    let part = |part: &SnapshotPart| WantedSnapshotPart {
        uid: part.uid.clone(),
        volume_uid: part.volume_uid.clone(),
        pool: part.pool.clone(),
    };
    WantedSnapshot {
        domain_uid: snapshot.domain_uid.clone(),
        parts: snapshot.parts.iter().map(part).collect(),
        create: snapshot.state() == SnapshotState::Creating,
    }
}

fn assigned(disk: Option<&Disk>, volume: &VolumeRecord) -> AssignedDisk {
    AssignedDisk {
        volume_uid: volume.uid.clone(),
        pool: volume.pool.clone(),
        read_only: disk.is_some_and(|disk| disk.read_only),
        limits: disk.and_then(|disk| disk.limits),
        serial: match volume.serial.as_str() {
            // Made before volumes had serials of their own.
            "" => serial(&volume.uid),
            held => held.to_owned(),
        },
        slot: volume.slot,
    }
}

fn owned(world: &World, node: &NodeId, volume: &VolumeRecord) -> WantedVolume {
    let create = volume.state() == VolumeState::Creating;
    // By its digest: what the volume is said to be made of may be another one's name.
    let images =
        world.images.values().filter(|row| create && row.value.digest == volume.image_digest);
    let holders: BTreeSet<&String> = images.flat_map(|row| &row.value.nodes).collect();
    let addresses = holders.into_iter().filter_map(|node| world.nodes.get(&NodeId::trusted(node)));
    WantedVolume {
        create,
        image_digest: volume.image_digest.clone(),
        image_size_bytes: volume.image_size_bytes,
        image_sources: addresses.map(|row| row.value.address.clone()).collect(),
        snapshot: (create && !volume.snapshot_part.is_empty()).then(|| VolumeSource {
            pool: volume.pool.clone(),
            volume_uid: volume.snapshot_volume_uid.clone(),
            snapshot_uid: volume.snapshot_part.clone(),
        }),
        ..wanted(world, node, volume)
    }
}

/// Blank, and filled by the migration; or there already, and to be opened when the source has let
/// go of it.
fn arriving(
    world: &World,
    node: &NodeId,
    domain: &DomainRecord,
    volume: &VolumeRecord,
) -> WantedVolume {
    let stage = domain.migration.as_ref().map(Migration::stage);
    let create = stage == Some(MigrationStage::Preparing) && !stays(domain, volume);
    WantedVolume { create, ..wanted(world, node, volume) }
}

/// Whether a migration leaves the volume in its place, in a pool that both nodes share.
fn stays(domain: &DomainRecord, volume: &VolumeRecord) -> bool {
    let migration = domain.migration.iter();
    migration.flat_map(|m| &m.shared_volumes).any(|uid| *uid == volume.uid)
}

fn wanted(world: &World, node: &NodeId, volume: &VolumeRecord) -> WantedVolume {
    WantedVolume {
        uid: volume.uid.clone(),
        pool: volume.pool.clone(),
        size_bytes: volume.size_bytes,
        shared_uid: world.shared_uid(node.as_str(), &volume.pool).to_owned(),
        ..WantedVolume::default()
    }
}

/// What one node shall do about a domain, but for its disks; None when it shall have nothing of
/// it.
#[must_use]
pub fn assignment(domain: &DomainRecord, node: &str) -> Option<Assignment> {
    if domain.state() == DomainState::Deleting {
        return None;
    }
    let Some(m) = &domain.migration else {
        return (domain.node == node).then(|| assign(domain, domain.epoch, owner(domain), None));
    };
    if m.stage() == MigrationStage::CopyingStopped {
        let stays = domain.node == node;
        return stays.then(|| assign(domain, domain.epoch, owner(domain), None));
    }
    if m.from == node {
        return Some(assign(domain, m.from_epoch, owner(domain), outgoing(m)));
    }
    if m.to != node {
        return None;
    }
    Some(match m.stage() {
        MigrationStage::Granted => assign(domain, m.granted_epoch, owner(domain), None),
        MigrationStage::Settling => assign(domain, domain.epoch, owner(domain), None),
        _ => {
            let incoming = Incoming { migration_id: m.id.clone(), token: m.token.clone() };
            assign(domain, m.to_epoch, Role::Incoming(incoming), None)
        }
    })
}

fn owner(domain: &DomainRecord) -> Role {
    Role::Owner(Owner {
        power: domain.desired_power,
        grace_period: Some(duration(domain.grace_ms)),
        start_generation: domain.start_generation,
    })
}

/// Not before the destination listens; from then on the same until the end, so that an agent
/// that comes late knows what its VMM was told.
fn outgoing(m: &Migration) -> Option<Outgoing> {
    (m.stage() != MigrationStage::Preparing).then(|| Outgoing {
        migration_id: m.id.clone(),
        address: m.address.clone(),
        token: m.token.clone(),
        to_epoch: m.to_epoch,
        limits: m.limits,
        cancel: m.stage() == MigrationStage::Cancelling,
    })
}

fn assign(domain: &DomainRecord, epoch: u64, role: Role, outgoing: Option<Outgoing>) -> Assignment {
    // Labels are for people and billing: no node needs them.
    let spec = domain.spec.clone().map(|spec| DomainSpec { labels: BTreeMap::new(), ..spec });
    Assignment {
        uid: domain.uid.clone(),
        name: format!("domains/{}", domain.id),
        epoch,
        spec,
        outgoing,
        role: Some(role),
        disks: Vec::new(),
        rescue: false,
        memory: None,
        seed_slot: domain.seed_slot,
        generation_id: domain.generation_id.clone(),
    }
}

/// Milliseconds as protobuf has them.
#[must_use]
pub fn duration(ms: u64) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(ms / 1000).unwrap_or(i64::MAX),
        nanos: i32::try_from(ms % 1000 * 1_000_000).unwrap_or(0),
    }
}
