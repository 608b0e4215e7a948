//! A domain that does not run moves: its volumes are copied, and then its row says where it is.
//!
//! ```text
//!            source                    controller                      destination
//!               │        begin: room on `to`: COPYING_STOPPED               │
//!    owner(e),  │                         ── volumes: create, copy_from ──► │
//!    stopped    │ ◄═══════════════════ AgentService.ReadVolume ════════════ │
//!               │                         ◄── all volumes READY ─────────── │
//!               │     owner = to, epoch = to_epoch, source's copies garbage │
//! ```
//!
//! Nothing runs, so nothing is handed over: until the one transaction that changes the owner the
//! source has the domain, and giving up costs the destination's copies and nothing else. The
//! operation holds the domain meanwhile, so nobody starts it. The domain's state stays what it
//! was (STOPPED, FAILED, SAVED).
//!
//! What lies in a pool that both nodes share is not copied: the destination says that it is there,
//! and it stays where it is, whatever becomes of the move.
//!
//! An agent copies again what broke off, some times (its own restart, its peer's); it is over when
//! it says FAILED, when either node is lost, on a cancel and at the deadline.

use drover_proto::v1::{
    EventSeverity, MigrationPhase, OperationError, OperationState, VolumeState,
};

use super::snapshot;
use super::step::{Work, error};
use crate::model::{DomainRecord, Migration, MigrationStage, Observed, VolumeRecord};

/// Whether it is such a move.
pub(super) fn is_copying(domain: &DomainRecord) -> bool {
    domain.migration.as_ref().is_some_and(|m| m.stage() == MigrationStage::CopyingStopped)
}

/// Takes the move as far as the destination's report allows.
pub(super) fn step(work: &mut Work<'_>) {
    let Some(m) = work.domain.migration.clone() else { return };
    let cx = work.cx;
    if work.is_cancelled() {
        return over(work, &m, None);
    }
    let why = match &work.operation {
        None => Some(error("INTERNAL", "its operation is not there any more")),
        _ if cx.is_lost(&m.to) => {
            Some(error("DESTINATION_LOST", format!("nodes/{} is lost", m.to)))
        }
        _ if cx.is_lost(&m.from) => Some(error("SOURCE_LOST", format!("nodes/{} is lost", m.from))),
        _ if work.is_overdue(0) => {
            let left = left(work, &m);
            let message = format!("it was not done by its deadline; {}", words(&m, &left));
            Some(error("DEADLINE_EXCEEDED", message))
        }
        _ => None,
    };
    if why.is_some() {
        return over(work, &m, why);
    }
    // What it said before it was told of this is about nothing of this.
    if !cx.observed.knows(&m.to, work.row.mod_revision) {
        return;
    }
    let left = left(work, &m);
    if let Some((volume, why)) = left.failed {
        let message = format!("nodes/{}: volumes/{volume}: {why}", m.to);
        return over(work, &m, Some(error("DESTINATION_FAILED", message)));
    }
    if left.volumes == 0 {
        return arrive(work, &m);
    }
    let stays = cx.world.stays_behind(&work.row.value, &m.from, &m.to);
    work.status(format!("{}{stays}", words(&m, &left)));
    if let Some(report) = work.operation.as_mut().and_then(|op| op.migration.as_mut()) {
        report.set_phase(MigrationPhase::CopyingDisks);
        report.disk_remaining_bytes = left.bytes;
    }
}

/// What is not at the destination yet.
#[derive(Default)]
struct Left {
    volumes: usize,
    of: usize,
    bytes: u64,
    /// A volume that could not be copied, and why.
    failed: Option<(String, String)>,
}

fn left(work: &Work<'_>, m: &Migration) -> Left {
    let mut left = Left::default();
    for row in work.cx.world.volumes_of(&work.row.value) {
        left.of += 1;
        let said = work.cx.observed.volume(&m.to, &row.value.uid);
        match said.map(|said| said.state()) {
            Some(VolumeState::Ready) => continue,
            Some(VolumeState::Failed) => {
                let why = said.map(|said| said.state_reason.clone()).unwrap_or_default();
                left.failed = Some((row.value.id.clone(), why));
            }
            _ => {}
        }
        left.volumes += 1;
        if !m.shared_volumes.contains(&row.value.uid) {
            left.bytes += row.value.size_bytes;
        }
    }
    left
}

fn words(m: &Migration, left: &Left) -> String {
    let there = left.of - left.volumes;
    format!("nodes/{} copies its volumes: {there} of {} are there", m.to, left.of)
}

/// How far the copies are, as the destination says: more than is ever written. `None` when there
/// is nothing to add.
#[must_use]
pub fn progress<'a>(
    observed: &Observed,
    m: &Migration,
    volumes: impl Iterator<Item = &'a VolumeRecord>,
) -> Option<String> {
    let lines = volumes.filter_map(|volume| {
        let said = observed.volume(&m.to, &volume.uid)?;
        let open = said.state() == VolumeState::Creating && !said.state_reason.is_empty();
        open.then(|| format!("volumes/{}: {}", volume.id, said.state_reason))
    });
    let text = lines.collect::<Vec<_>>().join("; ");
    (!text.is_empty()).then_some(text)
}

/// All of it is at the destination.
fn arrive(work: &mut Work<'_>, m: &Migration) {
    work.domain.node.clone_from(&m.to);
    work.domain.epoch = m.to_epoch;
    work.domain.boot_id = work.cx.boot_id(&m.to);
    work.domain.migration = None;
    work.discard_volumes(&m.from);
    snapshot::follow_domain(work, &m.from, &m.to);
    let message = format!("not running: from nodes/{} to nodes/{}", m.from, m.to);
    work.event(EventSeverity::Info, "DOMAIN_MIGRATED", message);
    if let Some(report) = work.operation.as_mut().and_then(|op| op.migration.as_mut()) {
        report.set_phase(MigrationPhase::Done);
        report.disk_remaining_bytes = 0;
    }
    work.end(OperationState::Succeeded, None);
}

/// The domain stays where it is. Without a reason it was cancelled.
fn over(work: &mut Work<'_>, m: &Migration, why: Option<OperationError>) {
    work.domain.migration = None;
    work.discard_volumes(&m.to);
    let what = why.as_ref().map_or("cancelled", |why| why.message.as_str());
    let message = format!("to nodes/{}, stays on nodes/{}: {what}", m.to, m.from);
    if why.is_some() {
        work.event(EventSeverity::Warning, "MIGRATION_FAILED", message);
        work.end(OperationState::Failed, why);
    } else {
        work.event(EventSeverity::Info, "MIGRATION_CANCELLED", message);
        work.end(OperationState::Cancelled, Some(error("CANCELLED", "cancelled on request")));
    }
}
