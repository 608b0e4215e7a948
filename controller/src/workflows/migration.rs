//! A live migration, as the controller sees it.
//!
//! The two VMMs copy and switch over among themselves; the controller says who may begin, and
//! decides where they cannot know. It decides from rows and from what the two agents report,
//! never from time alone, and a report only counts for what it says about *this* migration
//! (its id, its epoch). The rules below are what keeps a domain from running twice (I1):
//!
//! - a source that has reported `HANDED_OVER` never resumes by itself, and a destination that
//!   has not heard COMMIT never runs by itself; both go on only as `owner` under an epoch
//!   greater than any given before, which is given to **one** of them, once the other is known
//!   not to run;
//! - who was granted a domain keeps it: its agent may start the guest anew at any moment;
//! - a destination is let go of only when the source has said that it stays (`FAILED`), or the
//!   destination has said that it never ran and is gone;
//! - a volume in a pool that both share (`shared_volumes`) is nobody's copy: it is open at the one
//!   that runs, and neither end's failure removes it;
//! - whenever it cannot be known, nothing is granted: the domain is LOST with the reason, both
//!   ends stay as they are, and the report that comes later decides.
//!
//! ```text
//!            source                    controller                      destination
//!               │           begin: room on `to`, to_epoch = epoch_max+1     │
//!  owner(e)     │                     PREPARING  ── incoming(to_epoch) ───► │ VMM that waits
//!               │                         │ ◄── LISTENING, address ──────── │
//!  owner(e)+    │ ◄── outgoing(address) ── COPYING                          │
//!  outgoing     │ ═══════════════ memory, pass by pass ═══════════════════► │
//!               │ ═══ pause, last pass, device state ═════════════════════► │ READY
//!               │ hand-over on disk ── COMMIT ────────────────────────────► │ runs under to_epoch
//!               │ ── HANDED_OVER ──► HANDED_OVER ◄────── RUNNING ────────── │
//!               │           owner = to, epoch = to_epoch: SETTLING          │
//!               │ ── SUCCEEDED, figures ──► done; the source is not listed  │
//!               ▼ ends                                       any more       ▼
//! ```
//!
//! What else can happen, by stage. "gone" is the destination saying that it never ran; "stays"
//! is the source saying FAILED (or that it runs and has begun nothing, when asked to cancel).
//!
//! | stage | ran at `to` | source handed over | source stays | destination gone or its node lost, cancel, deadline |
//! | --- | --- | --- | --- | --- |
//! | PREPARING | | | | over at once: the source has not been told of anything |
//! | COPYING | forward | HANDED_OVER | over | CANCELLING: `outgoing.cancel`, the destination is kept |
//! | CANCELLING | forward | HANDED_OVER | over | waits for the source; over when it is lost *and* the destination is gone |
//! | HANDED_OVER | forward | READY for [`COMMIT_WAIT_MS`]: GRANTED, owner = to under a new epoch | (no more) | gone: owner = from under a new epoch; lost: LOST, wait |
//! | GRANTED | forward | | | gone: forward, its agent starts the guest anew; lost: LOST, wait |
//! | SETTLING | | over | over | over after [`SETTLE_WAIT_MS`] |
//!
//! The stage lives in the domain's row, not in the operation: an operation ends at its deadline
//! whatever happens (I3), and the migration goes on to be settled by the reports.

use drover_proto::agent::v1::{
    MigrationProgress, MigrationRole, ObservedDomain, ObservedMigration, ObservedState,
};
use drover_proto::v1::{
    DomainState, EventSeverity, MigrationPhase, MigrationReport, OperationError, OperationState,
};

use super::snapshot;
use super::step::{Work, error, millis, timestamp};
use crate::model::{Migration, MigrationStage, NodeId, Side};

/// The destination must listen within this.
pub const PREPARE_WAIT_MS: i64 = 60_000;
/// COMMIT is taken to be lost after this.
pub const COMMIT_WAIT_MS: i64 = 3_000;
/// The source's last figures are awaited this long.
pub const SETTLE_WAIT_MS: i64 = 3_000;
/// Past its deadline, a migration's operation waits this long for the source to stay.
pub const CANCEL_WAIT_MS: i64 = 30_000;

/// What the source says of this migration.
enum Source {
    /// Nothing that decides.
    Silent,
    /// The guest is not its any more. `settled`: it has heard that the destination runs.
    HandedOver { settled: bool },
    /// It stays the owner, for this reason.
    Stays(String),
}

/// What the destination says of this migration.
enum Destination {
    /// Nothing that decides.
    Silent,
    /// It waits for the source, here.
    Listens(String),
    /// Everything is there but COMMIT.
    Ready,
    /// The guest runs there, or has.
    Ran,
    /// It never ran there, and cannot.
    Gone(String),
}

/// Takes the domain's migration as far as the reports allow.
pub(super) fn step(work: &mut Work<'_>) {
    let Some(migration) = work.domain.migration.clone() else { return };
    let source = source_says(work, &migration);
    let destination = destination_says(work, &migration);
    match migration.stage() {
        MigrationStage::Preparing => preparing(work, migration, &source, &destination),
        MigrationStage::Copying | MigrationStage::Cancelling => {
            copying(work, migration, source, destination);
        }
        MigrationStage::HandedOver | MigrationStage::Granted => {
            handed_over(work, migration, &source, &destination);
        }
        MigrationStage::Settling => settling(work, &migration, &source),
        MigrationStage::CopyingStopped | MigrationStage::Unspecified => {}
    }
    if work.domain.migration.is_some() {
        say_where_it_stands(work);
    }
}

fn preparing(work: &mut Work<'_>, mut m: Migration, source: &Source, destination: &Destination) {
    let Migration { from, to, .. } = &m;
    if let Destination::Listens(address) = destination {
        m.address.clone_from(address);
        return enter(work, m, MigrationStage::Copying);
    }
    let why = match destination {
        Destination::Gone(why) => Some(error("DESTINATION_FAILED", format!("nodes/{to}: {why}"))),
        _ if work.is_cancelled() => return over(work, &m, None, true),
        _ if work.operation.is_none() || work.is_overdue(0) => Some(deadline()),
        _ if work.cx.is_lost(to) => {
            Some(error("DESTINATION_LOST", format!("nodes/{to} is lost before anything was sent")))
        }
        _ if work.cx.is_lost(from) => {
            Some(error("SOURCE_LOST", format!("nodes/{from} is lost before anything was sent")))
        }
        _ if since(work, &m) > PREPARE_WAIT_MS => Some(error(
            "DESTINATION_FAILED",
            format!("nodes/{to} did not get ready within {} s", PREPARE_WAIT_MS / 1000),
        )),
        _ => match source {
            Source::Stays(why) => Some(error("SOURCE_FAILED", format!("nodes/{from}: {why}"))),
            _ => None,
        },
    };
    if why.is_some() {
        over(work, &m, why, false);
    }
}

fn copying(work: &mut Work<'_>, m: Migration, source: Source, destination: Destination) {
    let (from, to) = (m.from.clone(), m.to.clone());
    if let Destination::Ran = destination {
        return forward(work, m, &source);
    }
    match source {
        Source::HandedOver { .. } => return enter(work, m, MigrationStage::HandedOver),
        Source::Stays(why) => {
            let failed = error("MIGRATION_FAILED", format!("nodes/{from}: {why}"));
            let why = if m.cancelled { None } else { m.error.clone().or(Some(failed)) };
            return over(work, &m, why, m.cancelled);
        }
        Source::Silent => {}
    }
    if work.cx.is_lost(&from)
        && let Destination::Gone(why) = &destination
    {
        let message = format!("nodes/{from} is lost, and nodes/{to} gave up: {why}");
        return over(work, &m, Some(error("SOURCE_LOST", message)), false);
    }
    if m.stage() == MigrationStage::Copying {
        let why = match destination {
            Destination::Gone(why) => {
                Some(error("DESTINATION_FAILED", format!("nodes/{to}: {why}")))
            }
            _ if work.is_cancelled() => None,
            _ if work.operation.is_none() || work.is_overdue(0) => Some(deadline()),
            _ if work.cx.is_lost(&to) => {
                Some(error("DESTINATION_LOST", format!("nodes/{to} is lost")))
            }
            _ => return,
        };
        let cancelled = why.is_none();
        return enter(work, Migration { error: why, cancelled, ..m }, MigrationStage::Cancelling);
    }
    if work.is_overdue(CANCEL_WAIT_MS) {
        let message = format!(
            "nodes/{from} does not say whether it still runs the domain; it is settled when its \
             agent reports"
        );
        work.end(
            OperationState::Failed,
            Some(m.error.unwrap_or_else(|| error("SOURCE_LOST", message))),
        );
    }
}

fn handed_over(work: &mut Work<'_>, mut m: Migration, source: &Source, destination: &Destination) {
    match destination {
        Destination::Ran => forward(work, m, source),
        Destination::Gone(why) if m.stage() == MigrationStage::Granted => {
            start_anew(work, &m, why);
        }
        Destination::Gone(why) => grant_back(work, &m, why),
        Destination::Ready
            if m.stage() == MigrationStage::HandedOver
                && since(work, &m) >= COMMIT_WAIT_MS
                && is_heard(work, &m.to) =>
        {
            // The source cannot run it any more, the destination holds all of it.
            m.granted_epoch = work.next_epoch();
            let message = format!("nodes/{} takes over: COMMIT did not reach it", m.to);
            work.event(EventSeverity::Warning, "DOMAIN_TAKE_OVER", message);
            enter(work, m, MigrationStage::Granted);
        }
        _ if work.is_overdue(CANCEL_WAIT_MS) => {
            let message = format!(
                "nodes/{} has handed the domain over and nodes/{} does not say whether it runs; \
                 it is settled when its agent reports",
                m.from, m.to
            );
            work.end(OperationState::Failed, Some(error("DESTINATION_LOST", message)));
        }
        _ => {}
    }
}

fn settling(work: &mut Work<'_>, m: &Migration, source: &Source) {
    let told = matches!(source, Source::HandedOver { settled: true } | Source::Stays(_));
    if told || since(work, m) >= SETTLE_WAIT_MS || work.cx.is_lost(&m.from) {
        keep_report(work, m);
        succeed(work);
    }
}

/// The guest runs at the destination: that is what is so, whatever was wanted meanwhile.
fn forward(work: &mut Work<'_>, m: Migration, source: &Source) {
    let epoch = if m.granted_epoch == 0 { m.to_epoch } else { m.granted_epoch };
    work.domain.node.clone_from(&m.to);
    work.domain.epoch = epoch;
    work.domain.boot_id = work.cx.boot_id(&m.to);
    work.set_state(DomainState::Running, "");
    let message = format!("from nodes/{} to nodes/{}, epoch {epoch}", m.from, m.to);
    work.event(EventSeverity::Info, "DOMAIN_MIGRATED", message);
    keep_report(work, &m);
    if matches!(source, Source::HandedOver { settled: true }) || work.cx.is_lost(&m.from) {
        succeed(work);
    } else {
        enter(work, m, MigrationStage::Settling);
    }
}

fn succeed(work: &mut Work<'_>) {
    if let Some(m) = work.domain.migration.take() {
        work.discard_volumes(&m.from);
        snapshot::follow_domain(work, &m.from, &m.to);
    }
    if let Some(report) = work.operation.as_mut().and_then(|op| op.migration.as_mut()) {
        report.set_phase(MigrationPhase::Done);
        report.remaining_bytes = 0;
    }
    work.end(OperationState::Succeeded, None);
}

/// The destination is gone without having run: the source, which waits, gets the guest back.
fn grant_back(work: &mut Work<'_>, m: &Migration, why: &str) {
    work.domain.node.clone_from(&m.from);
    work.domain.epoch = work.next_epoch();
    let message = format!("nodes/{} is gone after the hand-over ({why})", m.to);
    let failed = error("DESTINATION_FAILED", format!("{message}; nodes/{} goes on", m.from));
    over(work, m, m.error.clone().or(Some(failed)), false);
    work.set_state(DomainState::Starting, format!("nodes/{} takes it back: {message}", m.from));
}

/// The destination was granted the domain and is gone all the same. The grant stands.
fn start_anew(work: &mut Work<'_>, m: &Migration, why: &str) {
    work.domain.node.clone_from(&m.to);
    work.domain.epoch = m.granted_epoch;
    work.domain.boot_id = work.cx.boot_id(&m.to);
    work.domain.migration = None;
    // Both have what was written before the hand-over; only one may have what comes after it.
    work.discard_volumes(&m.from);
    snapshot::follow_domain(work, &m.from, &m.to);
    let message = format!("nodes/{} failed as it took over ({why}); it starts anew there", m.to);
    work.event(EventSeverity::Error, "MIGRATION_FAILED", message.clone());
    work.set_state(DomainState::Starting, message.clone());
    work.end(OperationState::Failed, Some(error("DESTINATION_FAILED", message)));
}

/// The domain stays where it is.
fn over(work: &mut Work<'_>, m: &Migration, why: Option<OperationError>, cancelled: bool) {
    keep_report(work, m);
    work.domain.migration = None;
    work.discard_volumes(&m.to);
    let what = why.as_ref().map_or("cancelled", |why| why.message.as_str());
    let message = format!("to nodes/{}, stays on nodes/{}: {what}", m.to, m.from);
    if cancelled {
        work.event(EventSeverity::Info, "MIGRATION_CANCELLED", message);
        work.end(OperationState::Cancelled, Some(error("CANCELLED", "cancelled on request")));
    } else {
        work.event(EventSeverity::Warning, "MIGRATION_FAILED", message);
        work.end(OperationState::Failed, why);
    }
    if work.cx.is_lost(&m.from) {
        work.set_state(DomainState::Lost, format!("nodes/{} is lost", m.from));
    } else {
        work.set_state(DomainState::Running, "");
    }
}

fn enter(work: &mut Work<'_>, mut m: Migration, stage: MigrationStage) {
    m.set_stage(stage);
    m.stage_time = Some(timestamp(work.cx.now.wall_ms));
    keep_report(work, &m);
    work.domain.migration = Some(m);
}

/// What people see while it goes on.
fn say_where_it_stands(work: &mut Work<'_>) {
    let Some(m) = work.domain.migration.clone() else { return };
    let (from_lost, to_lost) = (work.cx.is_lost(&m.from), work.cx.is_lost(&m.to));
    let mut disks = work.cx.world.disks_of(&work.row.value);
    let copies_disks = disks.any(|(_, disk)| !m.shared_volumes.contains(&disk.value.uid));
    let words = match m.stage() {
        MigrationStage::Preparing => format!("nodes/{} prepares", m.to),
        MigrationStage::Copying if copies_disks => "disks and memory are copied".into(),
        MigrationStage::Copying => "memory is copied".into(),
        MigrationStage::Cancelling => format!("nodes/{} is asked to stay the owner", m.from),
        MigrationStage::HandedOver => format!("handed over; waits for nodes/{} to run it", m.to),
        MigrationStage::Granted => format!("nodes/{} takes over", m.to),
        MigrationStage::Settling => "runs there; waits for the last figures".into(),
        MigrationStage::CopyingStopped => "its volumes are copied".into(),
        MigrationStage::Unspecified => String::new(),
    };
    let stays = work.cx.world.stays_behind(&work.row.value, &m.from, &m.to);
    work.status(format!("{words}{stays}"));
    if m.stage() == MigrationStage::Settling {
        return;
    }
    let after = matches!(m.stage(), MigrationStage::HandedOver | MigrationStage::Granted);
    let lost = match (after, from_lost, to_lost) {
        (true, _, true) => Some(format!(
            "handed over to nodes/{}, which is lost before it said that it runs",
            m.to
        )),
        (false, true, _) => Some(format!(
            "nodes/{} is lost in the middle of the migration to nodes/{}",
            m.from, m.to
        )),
        _ => None,
    };
    match lost {
        Some(reason) => {
            if work.domain.state() != DomainState::Lost {
                work.event(EventSeverity::Error, "DOMAIN_LOST", reason.clone());
            }
            work.set_state(DomainState::Lost, reason);
        }
        None => {
            let reason = format!("to nodes/{}", m.to);
            work.set_state(DomainState::Migrating, reason);
        }
    }
}

/// Copies the figures into the operation. Only transitions are written, so this costs nothing;
/// reads in between take them from the leader's memory.
fn keep_report(work: &mut Work<'_>, m: &Migration) {
    let said = figures(work.cx.observed, m, &work.domain.uid);
    let Some(operation) = &mut work.operation else { return };
    let held = operation.migration.take().unwrap_or_default();
    operation.migration = Some(merge_report(held, said, m));
}

/// The figures that an agent holds for a migration; the source's, who sees the whole of it.
#[must_use]
pub fn figures(
    observed: &crate::model::Observed,
    m: &Migration,
    uid: &str,
) -> Option<MigrationReport> {
    let side = |node: &str, role| {
        let migration = observed.domain(node, uid)?.migration.as_ref()?;
        (migration.id == m.id && migration.role() == role).then_some(migration)?.report.clone()
    };
    side(&m.from, MigrationRole::Source).or_else(|| side(&m.to, MigrationRole::Destination))
}

/// Newer figures over older ones, with what only the controller knows.
#[must_use]
pub fn merge_report(
    held: MigrationReport,
    said: Option<MigrationReport>,
    m: &Migration,
) -> MigrationReport {
    let phase = match m.stage() {
        MigrationStage::Unspecified => MigrationPhase::Unspecified,
        MigrationStage::Preparing => MigrationPhase::Preparing,
        // Of the two that this is, only the VMM knows which.
        MigrationStage::Copying
            if said.as_ref().is_some_and(|s| s.phase() == MigrationPhase::CopyingDisks) =>
        {
            MigrationPhase::CopyingDisks
        }
        MigrationStage::Copying => MigrationPhase::Copying,
        MigrationStage::Cancelling => MigrationPhase::Aborting,
        MigrationStage::HandedOver | MigrationStage::Granted => MigrationPhase::HandedOver,
        MigrationStage::CopyingStopped => MigrationPhase::CopyingDisks,
        MigrationStage::Settling => MigrationPhase::Done,
    };
    let mut report = said.unwrap_or(held);
    report.from_node = format!("nodes/{}", m.from);
    report.to_node = format!("nodes/{}", m.to);
    report.set_phase(phase);
    report
}

fn source_says(work: &Work<'_>, m: &Migration) -> Source {
    let row = work.row;
    let observed = work.cx.observed;
    // Nothing of it on its owner, while the row says that it is there: its agent has lost its
    // records. It cannot vouch for anything.
    let Side::Present(domain) = observed.side(&m.from, &work.domain.uid, row.mod_revision) else {
        return Source::Silent;
    };
    let its = this_migration(domain, m, MigrationRole::Source);
    match its.map(ObservedMigration::progress) {
        Some(MigrationProgress::Succeeded) => return Source::HandedOver { settled: true },
        Some(MigrationProgress::HandedOver) => return Source::HandedOver { settled: false },
        Some(MigrationProgress::Failed) => {
            return Source::Stays(its.map_or("", |m| m.error.as_str()).to_owned());
        }
        Some(_) => return Source::Silent,
        None => {}
    }
    if domain.state() == ObservedState::HandedOver {
        return Source::HandedOver { settled: false };
    }
    // A domain that its agent has not looked at yet (epoch 0), or whose record is damaged, vouches
    // for nothing, whatever the agent was told.
    if domain.epoch < m.from_epoch || !observed.knows(&m.from, row.mod_revision) {
        return Source::Silent;
    }
    match domain.state() {
        // It knows that it shall not begin, and it has not begun.
        _ if m.stage() == MigrationStage::Cancelling => {
            Source::Stays("cancelled before it began".into())
        }
        ObservedState::Stopped | ObservedState::Failed => {
            Source::Stays(format!("the guest has ended: {}", domain.state_reason))
        }
        _ => Source::Silent,
    }
}

fn destination_says(work: &Work<'_>, m: &Migration) -> Destination {
    let observed = work.cx.observed;
    let domain = match observed.side(&m.to, &work.domain.uid, work.row.mod_revision) {
        Side::Unknown => return Destination::Silent,
        // It may not have begun yet.
        Side::Absent if m.stage() == MigrationStage::Preparing => return Destination::Silent,
        Side::Absent => return Destination::Gone("its agent has nothing of it".into()),
        Side::Present(domain) => domain,
    };
    let its = this_migration(domain, m, MigrationRole::Destination);
    let progress = its.map_or(MigrationProgress::Unspecified, ObservedMigration::progress);
    let runs = matches!(
        domain.state(),
        ObservedState::Running | ObservedState::Paused | ObservedState::Stopping
    );
    if progress == MigrationProgress::Succeeded || (runs && domain.epoch >= m.to_epoch) {
        return Destination::Ran;
    }
    match (progress, its) {
        (MigrationProgress::Failed, Some(its)) => Destination::Gone(its.error.clone()),
        (MigrationProgress::Ready, _) => Destination::Ready,
        (_, Some(its)) if !its.listen_address.is_empty() => {
            Destination::Listens(its.listen_address.clone())
        }
        _ => Destination::Silent,
    }
}

fn this_migration<'a>(
    domain: &'a ObservedDomain,
    m: &Migration,
    role: MigrationRole,
) -> Option<&'a ObservedMigration> {
    domain.migration.as_ref().filter(|its| its.id == m.id && its.role() == role)
}

/// What it said last is from just now: READY from before a silence says little.
fn is_heard(work: &Work<'_>, node: &str) -> bool {
    let seen = work.cx.observed.nodes.get(&NodeId::trusted(node));
    seen.is_some_and(|seen| {
        let silent_ms = work.cx.now.mono_ms.saturating_sub(seen.heard_ms);
        seen.connected && seen.reported && silent_ms < COMMIT_WAIT_MS.unsigned_abs()
    })
}

fn since(work: &Work<'_>, m: &Migration) -> i64 {
    m.stage_time.as_ref().map_or(0, |time| work.cx.now.wall_ms - millis(time))
}

fn deadline() -> OperationError {
    error("DEADLINE_EXCEEDED", "it was not done by its deadline")
}
