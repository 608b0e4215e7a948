//! Volumes that are made for a domain that is there already, and content that takes the place of
//! other content.
//!
//! A volume's uid is one content. To put another one in its place, its row gets a new uid and is
//! CREATING again, and the old uid is garbage, in one transaction: whatever dies in the middle,
//! there is the old content or the new, and never a mixture. The volume's name, place and serial
//! stay, so that the guest finds the same disk.

use drover_proto::v1::VolumeState;

use super::begin::{free_domain, wrong_state};
use super::refusal::Refusal;
use super::step::{Context, timestamp};
use crate::model::{
    DomainId, DomainRecord, ImageRecord, SnapshotPart, VolumeId, VolumeRecord, garbage, has_memory,
    is_at_rest, serial,
};
use crate::store::{Txn, Versioned};

/// Sizes of volumes are multiples of it.
pub(super) const MIB: u64 = 1 << 20;

/// What a volume is filled with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Source<'a> {
    /// It must be no larger than the volume.
    Image(&'a ImageRecord),
    /// The same, but the volume goes on saying what it was made of before.
    Carrier(&'a ImageRecord),
    /// It must lie on the volume's node, in its pool, and be no larger.
    Snapshot(&'a SnapshotPart),
    /// Zeros.
    Blank,
}

/// Puts other content in the place of a volume's, and gives the domain, which must be at rest, a
/// new generation id. The transaction is guarded by the volume's row; the domain's is the
/// caller's to write.
pub(super) fn replace_content(
    cx: &Context<'_>,
    txn: Txn,
    domain: &mut DomainRecord,
    volume: &Versioned<VolumeRecord>,
    source: Source<'_>,
) -> (Txn, VolumeRecord) {
    let mut new = volume.value.clone();
    if new.serial.is_empty() {
        new.serial = serial(&new.uid);
    }
    new.uid = cx.ids.uuid();
    new.set_state(VolumeState::Creating);
    new.state_reason.clear();
    fill(&mut new, source);
    domain.generation_id = cx.ids.uuid();
    let pool = (volume.value.pool.as_str(), cx.world.shared_uid(&domain.node, &volume.value.pool));
    let old = garbage(&domain.node, pool, &volume.value.uid, "");
    let mut txn = txn.unchanged(volume).put(&new).put(&old);
    if let Source::Image(image) | Source::Carrier(image) = source {
        txn = txn.present::<ImageRecord>(image.id.clone());
    }
    (txn, new)
}

fn fill(volume: &mut VolumeRecord, source: Source<'_>) {
    volume.image_digest.clear();
    volume.image_size_bytes = 0;
    volume.snapshot_part.clear();
    volume.snapshot_volume_uid.clear();
    if let Source::Image(image) | Source::Carrier(image) = source {
        volume.image_digest.clone_from(&image.digest);
        volume.image_size_bytes = image.size_bytes;
    }
    match source {
        Source::Image(image) => volume.image.clone_from(&image.id),
        Source::Carrier(_) => {}
        // The image's name stays: it is what the disk was first made of.
        Source::Snapshot(part) => {
            volume.snapshot_part.clone_from(&part.uid);
            volume.snapshot_volume_uid.clone_from(&part.volume_uid);
        }
        Source::Blank => volume.image.clear(),
    }
}

/// A volume beside a domain's own disks, and the transaction with its row.
///
/// # Errors
/// Its name is taken, or too long.
pub(super) fn new_volume(
    cx: &Context<'_>,
    txn: Txn,
    domain: &DomainRecord,
    id: &str,
    (pool, size_bytes): (&str, u64),
    source: Source<'_>,
) -> Result<(Txn, VolumeRecord), Refusal> {
    if VolumeId::parse(id).is_err() {
        return Err(Refusal::Invalid {
            field: "name".into(),
            value: format!("domains/{}", domain.id),
            expected: format!("a shorter id: volumes/{id} would be too long a name"),
        });
    }
    if cx.world.volumes.contains_key(id) {
        return Err(Refusal::AlreadyExists { name: format!("volumes/{id}") });
    }
    let uid = cx.ids.uuid();
    let mut volume = VolumeRecord {
        id: id.to_owned(),
        serial: serial(&uid),
        uid,
        state: VolumeState::Creating.into(),
        domain: domain.id.clone(),
        pool: pool.to_owned(),
        size_bytes,
        create_time: Some(timestamp(cx.now.wall_ms)),
        ..VolumeRecord::default()
    };
    fill(&mut volume, source);
    let mut txn = txn.absent::<VolumeRecord>(id).put(&volume);
    if let Source::Image(image) | Source::Carrier(image) = source {
        txn = txn.present::<ImageRecord>(image.id.clone());
    }
    Ok((txn, volume))
}

/// A domain's volume goes: its row, and its data from the domain's node.
pub(super) fn discard(
    cx: &Context<'_>,
    txn: Txn,
    node: &str,
    volume: &Versioned<VolumeRecord>,
) -> Txn {
    let VolumeRecord { id, pool, uid, .. } = &volume.value;
    let pool = (pool.as_str(), cx.world.shared_uid(node, pool));
    txn.unchanged(volume).delete::<VolumeRecord>(id.clone()).put(&garbage(node, pool, uid, ""))
}

/// A domain whose disks may be changed: at rest, held by nobody, and not saved.
///
/// # Errors
/// There is none, or it is not so.
pub(super) fn resting<'a>(
    cx: &Context<'a>,
    id: &DomainId,
) -> Result<&'a Versioned<DomainRecord>, Refusal> {
    let row = free_domain(cx, id)?;
    not_saved(&row.value)?;
    if !is_at_rest(&row.value) {
        return Err(wrong_state(id, &row.value, "stop it first"));
    }
    Ok(row)
}

/// What a saved state expects to find must not change under it.
///
/// # Errors
/// The domain's state is on a volume.
pub(super) fn not_saved(domain: &DomainRecord) -> Result<(), Refusal> {
    if !has_memory(domain) {
        return Ok(());
    }
    let name = format!("domains/{}", domain.id);
    Err(Refusal::Precondition {
        reason: "SAVED",
        message: format!(
            "{name} is saved (volumes/{}), and what was saved fits only what it has now: start it \
             (with discard_saved to boot it anew), then stop it",
            domain.memory_volume
        ),
        subject: name,
    })
}
