//! Other content for a disk of a domain that is at rest: an image's.
//!
//! The transaction that begins it is the replacement itself ([`content`](super::content)): what
//! was on the disk is garbage from then on. The operation only waits until the node has made what
//! is new.

use drover_proto::v1::{EventSeverity, OperationKind, OperationState, VolumeState};

use super::begin::{Begun, FILL_WAIT_MS, hold, operation, wrong_state};
use super::content::{MIB, Source, replace_content, resting};
use super::refusal::Refusal;
use super::step::{Context, Work, error};
use crate::model::{DomainId, ImageId, ImageRecord, VolumeRecord};
use crate::store::{Txn, Versioned};

/// Puts an image's content on a disk: the one that it was made of when `image` is empty. The disk
/// is said to be made of it from then on, unless `keep_image` says that it only brings content.
///
/// # Errors
/// There is no such domain, disk or image; the domain is held, or not at rest; its node is lost;
/// the image is larger than the disk.
pub fn reinstall_domain(
    cx: &Context<'_>,
    id: &DomainId,
    disk: u32,
    image: Option<&ImageId>,
    keep_image: bool,
) -> Result<Begun, Refusal> {
    let row = resting(cx, id)?;
    if cx.is_lost(&row.value.node) {
        return Err(wrong_state(id, &row.value, "its node is lost: wait until it is back"));
    }
    let mut domain = row.value.clone();
    let disks = domain.spec.as_mut().map(|spec| &mut spec.disks);
    let volume = volume_at(cx, disks.as_ref().map_or(&[], |disks| disks), "disk", disk)?;
    let image = source(cx, &volume.value, image)?;
    if image.size_bytes > volume.value.size_bytes {
        return Err(Refusal::Invalid {
            field: "image".into(),
            value: format!("images/{}", image.id),
            expected: format!(
                "an image of at most {} bytes, the size of volumes/{}: this one has {} (resize the \
                 disk to {} or more first)",
                volume.value.size_bytes,
                volume.value.id,
                image.size_bytes,
                image.size_bytes.next_multiple_of(MIB)
            ),
        });
    }
    let source = if keep_image { Source::Carrier(image) } else { Source::Image(image) };
    if let Some(disk) = disks.and_then(|disks| disks.get_mut(disk as usize))
        && !keep_image
    {
        disk.image = format!("images/{}", image.id);
    }
    let (txn, new) = replace_content(cx, Txn::new(), &mut domain, volume, source);
    let mut operation = operation(cx, OperationKind::ReinstallDomain, id.name(), FILL_WAIT_MS);
    let message = format!("volumes/{} becomes images/{}", new.id, image.id);
    operation.status_message.clone_from(&message);
    let event = cx.event(EventSeverity::Info, id.name(), "DISK_REINSTALLED", message);
    Ok(hold(cx, txn.put(&event), row, domain, operation))
}

/// The volume of a disk, by its place.
pub(super) fn volume_at<'a>(
    cx: &Context<'a>,
    disks: &[drover_proto::v1::Disk],
    field: &str,
    index: u32,
) -> Result<&'a Versioned<VolumeRecord>, Refusal> {
    let Some(disk) = disks.get(index as usize) else {
        return Err(Refusal::Invalid {
            field: field.into(),
            value: index.to_string(),
            expected: match disks.len() {
                0 => "nothing: the domain has no disks".into(),
                count => format!("0 to {}: its place among the domain's disks", count - 1),
            },
        });
    };
    let id = disk.volume.strip_prefix("volumes/").unwrap_or_default();
    cx.world.volumes.get(id).ok_or_else(|| Refusal::NotFound { name: disk.volume.clone() })
}

fn source<'a>(
    cx: &Context<'a>,
    volume: &VolumeRecord,
    given: Option<&ImageId>,
) -> Result<&'a ImageRecord, Refusal> {
    if let Some(given) = given {
        let row = cx.world.images.get(given.as_str());
        return Ok(&row.ok_or_else(|| Refusal::NotFound { name: given.name() })?.value);
    }
    let expected = match volume.image.as_str() {
        "" => format!("an image's name: volumes/{} was not made of one", volume.id),
        image => match cx.world.images.get(image) {
            Some(row) => return Ok(&row.value),
            None => format!(
                "another image's name: images/{image}, of which volumes/{} was made, is not there \
                 any more",
                volume.id
            ),
        },
    };
    Err(Refusal::Invalid { field: "image".into(), value: String::new(), expected })
}

/// Done when the node has made all of the domain's volumes that are to be made.
pub(super) fn step(work: &mut Work<'_>) {
    let node = work.domain.node.clone();
    let (world, row) = (work.cx.world, work.row);
    let mut rest =
        world.volumes_of(&row.value).filter(|volume| volume.value.state() == VolumeState::Creating);
    let Some(volume) = rest.next() else {
        return work.end(OperationState::Succeeded, None);
    };
    let name = format!("volumes/{}", volume.value.id);
    let said = work.cx.observed.volume(&node, &volume.value.uid);
    let reason = said.map_or("", |said| said.state_reason.as_str());
    if said.is_some_and(|said| said.state() == VolumeState::Failed) {
        let message = format!("nodes/{node}: {name}: {reason} (its agent goes on trying)");
        return work.end(OperationState::Failed, Some(error("VOLUME_FAILED", message)));
    }
    if work.is_overdue(0) {
        let message = format!(
            "nodes/{node} has not made {name} in time: {} (its agent goes on trying)",
            if reason.is_empty() { "it says nothing of it" } else { reason }
        );
        return work.end(OperationState::Failed, Some(error("DEADLINE_EXCEEDED", message)));
    }
    let lost = if work.cx.is_lost(&node) { " (lost)" } else { "" };
    let how = if reason.is_empty() { "is being made" } else { reason };
    work.status(format!("nodes/{node}{lost}: {name}: {how}"));
}
