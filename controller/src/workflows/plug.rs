//! Volumes that a running domain's guest gets, or lets go of.
//!
//! The row says what shall be at once: one that is attached is among the domain's disks, one that
//! is detached is marked, and no more in what the agent is told. The operation waits until the
//! domain's VMM has it, or has it no more; otherwise the rows are put back as they were. Whatever
//! the guest does after that, the agent makes what the VMM has equal to the rows again.

use drover_proto::v1::{DomainState, EventSeverity, OperationKind, OperationState, PowerState};

use super::begin::{free_domain, hold, operation, wrong_state};
use super::content::not_saved;
use super::refusal::Refusal;
use super::step::{Context, Work, error};
use crate::model::{DomainId, DomainRecord, VolumeRecord, is_at_rest, serial};
use crate::store::{Txn, Versioned};

/// PCI slots for disks; the machine's own devices lie below, the seed above.
const SLOTS: std::ops::RangeInclusive<u32> = 16..=30;
/// The seed's.
pub(super) const SEED_SLOT: u32 = 31;
/// A guest may be busy, or its agent away for a moment.
const PLUG_WAIT_MS: i64 = 60_000;

/// The slot of a new domain's disk.
pub(super) fn slot_at(index: usize) -> u32 {
    SLOTS.clone().nth(index).unwrap_or(0)
}

/// A slot in which the domain's guest has no disk: behind the others, so that it is the last one,
/// or else wherever one was detached.
pub(super) fn free_slot(cx: &Context<'_>, domain: &DomainRecord) -> u32 {
    let taken: Vec<u32> = cx.world.volumes_of(domain).map(|row| row.value.slot).collect();
    let last = taken.iter().copied().max().unwrap_or(0);
    let behind = SLOTS.filter(|slot| *slot > last);
    behind.chain(SLOTS).find(|slot| !taken.contains(slot)).unwrap_or(0)
}

/// A domain whose disks may come and go, and whether it runs.
///
/// # Errors
/// There is none; it is held, saved, or between two states.
pub(super) fn owner<'a>(
    cx: &Context<'a>,
    id: &DomainId,
) -> Result<(&'a Versioned<DomainRecord>, bool), Refusal> {
    let row = free_domain(cx, id)?;
    let domain = &row.value;
    not_saved(domain)?;
    if is_at_rest(domain) {
        return Ok((row, false));
    }
    let runs = domain.state() == DomainState::Running
        && domain.migration.is_none()
        && domain.desired_power() == PowerState::Running;
    if !runs {
        return Err(wrong_state(id, domain, "accepted: RUNNING, or stop it first"));
    }
    Ok((row, true))
}

/// Whether a disk may leave a guest that runs.
///
/// # Errors
/// It may not.
pub(super) fn may_go(
    domain: &DomainRecord,
    volume: &VolumeRecord,
    place: usize,
) -> Result<(), Refusal> {
    let boot = domain.spec.as_ref().and_then(|spec| spec.boot.as_ref());
    let boots_from_disk = boot.is_none_or(|boot| boot.kernel.is_empty());
    let (subject, name) = (format!("volumes/{}", volume.id), format!("domains/{}", domain.id));
    let refuse = |reason, why: String| {
        Err(Refusal::Precondition { subject: subject.clone(), reason, message: why })
    };
    if place == 0 && boots_from_disk {
        return refuse("BOOT_DISK", format!("{name} runs from {subject}: stop it first"));
    }
    if volume.slot == 0 {
        let why = "was given to it before disks could leave a running guest";
        return refuse("NO_SLOT", format!("{subject} {why}: stop {name} first"));
    }
    Ok(())
}

/// Writes what shall be, and the operation that waits for it.
pub(super) fn begin(
    cx: &Context<'_>,
    kind: OperationKind,
    (row, volume): (&Versioned<VolumeRecord>, VolumeRecord),
    owner: &Versioned<DomainRecord>,
    domain: DomainRecord,
) -> Txn {
    let target = format!("domains/{}", domain.id);
    let mut operation = operation(cx, kind, target, PLUG_WAIT_MS);
    operation.volume.clone_from(&volume.id);
    operation.status_message = format!("waits for nodes/{}", domain.node);
    hold(cx, Txn::new().unchanged(row).put(&volume), owner, domain, operation).txn
}

/// Done when the domain's VMM has the disk, or has it no more; or when nothing runs.
pub(super) fn step(work: &mut Work<'_>, kind: OperationKind) {
    let id = work.operation.as_ref().map(|operation| operation.volume.clone()).unwrap_or_default();
    let Some(row) = work.cx.world.volumes.get(id.as_str()) else {
        let why = error("INTERNAL", "the volume is not there any more");
        return work.end(OperationState::Failed, Some(why));
    };
    let attaches = kind == OperationKind::AttachVolume;
    let serial = match row.value.serial.as_str() {
        "" => serial(&row.value.uid),
        held => held.to_owned(),
    };
    let node = work.domain.node.clone();
    let observed = work.cx.observed;
    let said = observed.domain(&node, &work.domain.uid);
    let said = said.filter(|_| observed.knows(&node, work.row.mod_revision));
    let there = said.filter(|said| said.disks_known).map(|said| {
        let mut disks = said.disks.iter();
        disks.find(|disk| disk.serial == serial).map(|disk| disk.detaching)
    });
    let rests = matches!(work.domain.state(), DomainState::Stopped | DomainState::Failed);
    let done = match there {
        _ if rests => true,
        Some(disk) if attaches => disk == Some(false),
        Some(disk) => disk.is_none(),
        None => false,
    };
    if done {
        return succeed(work, row, attaches);
    }
    let trouble = said.map_or("", |said| said.disk_error.as_str());
    let why = if !trouble.is_empty() {
        error("DISK_FAILED", format!("nodes/{node}: volumes/{id}: {trouble}"))
    } else if work.is_cancelled() {
        error("CANCELLED", "cancelled on request")
    } else if work.is_overdue(0) {
        let what = match there {
            Some(Some(_)) if !attaches => {
                format!("the guest has not let go of volumes/{id}: is it in use there?")
            }
            _ => format!("nodes/{node} did not say that it has done so"),
        };
        error("DEADLINE_EXCEEDED", format!("{what}; all is as it was"))
    } else {
        let lost = if work.cx.is_lost(&node) { " (lost)" } else { "" };
        return work.status(match (attaches, there) {
            (false, Some(Some(true))) => format!("waits for the guest to let go of volumes/{id}"),
            _ => format!("waits for nodes/{node}{lost}"),
        });
    };
    fail(work, row, attaches, why);
}

fn succeed(work: &mut Work<'_>, row: &Versioned<VolumeRecord>, attaches: bool) {
    let name = format!("volumes/{}", row.value.id);
    if attaches {
        work.event(EventSeverity::Info, "VOLUME_ATTACHED", name);
    } else {
        leave(work, row);
        work.event(EventSeverity::Info, "VOLUME_DETACHED", name);
    }
    work.end(OperationState::Succeeded, None);
}

/// The domain has the volume no more; it lies where the domain is.
fn leave(work: &mut Work<'_>, row: &Versioned<VolumeRecord>) {
    let name = format!("volumes/{}", row.value.id);
    if let Some(spec) = &mut work.domain.spec {
        spec.disks.retain(|disk| disk.volume != name);
    }
    let volume = VolumeRecord {
        domain: String::new(),
        node: work.domain.node.clone(),
        slot: 0,
        detaching: false,
        ..row.value.clone()
    };
    work.write(|txn| txn.unchanged(row).put(&volume));
}

fn fail(
    work: &mut Work<'_>,
    row: &Versioned<VolumeRecord>,
    attaches: bool,
    why: drover_proto::v1::OperationError,
) {
    let (state, reason) = match (why.reason.as_str(), attaches) {
        ("CANCELLED", _) => (OperationState::Cancelled, "VOLUME_CHANGE_CANCELLED"),
        (_, true) => (OperationState::Failed, "VOLUME_ATTACH_FAILED"),
        (_, false) => (OperationState::Failed, "VOLUME_DETACH_FAILED"),
    };
    if attaches {
        leave(work, row);
    } else {
        let volume = VolumeRecord { detaching: false, ..row.value.clone() };
        work.write(|txn| txn.unchanged(row).put(&volume));
    }
    work.event(EventSeverity::Warning, reason, why.message.clone());
    work.end(state, Some(why));
}
