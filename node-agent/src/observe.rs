//! What is reported of one domain: a pure function of the same facts that decisions rest on.

use drover_proto::agent::v1::{
    MigrationProgress, MigrationRole, ObservedDisk, ObservedDomain, ObservedMigration,
    ObservedState,
};
use drover_proto::v1::{ExitReason, RestartPolicy};
use drover_proto::vmm::v1::{DiskStatus, VmmState, VmmStatus};

use crate::decide::{CRASH_RESTARTS_MAX, Disks, Facts, Vmm, plug, restart_at, save_failed};
use crate::records::{DomainRecord, End, EndReason, Handover};
use crate::wanted::{Outgoing, Owner, Power, Role};

/// Text from a VMM or a guest is cut here: a report is not a log.
const REASON_CHARS_MAX: usize = 500;

/// What the controller is told, without usage. `status` is the VMM's own word while it answers,
/// `trouble` what the agent failed to do last, `refused` why it does not do as it was told.
/// `None` when there is nothing to say yet.
pub fn observe(
    facts: Facts<'_>,
    status: Option<&VmmStatus>,
    trouble: Option<&str>,
    refused: Option<&str>,
) -> Option<ObservedDomain> {
    let record = facts.record?;
    let (state, reason) = state(facts, record, status);
    let reason = trouble.or(refused).map_or(reason, str::to_owned);
    let epoch = record.run.as_ref().map_or(record.epoch, |run| run.epoch);
    let mut observed = ObservedDomain {
        uid: record.uid.clone(),
        name: record.name.clone(),
        epoch,
        state: state.into(),
        state_reason: shorten(reason),
        migration: migration(facts, record, status),
        reboot_count: status.map_or(0, |status| status.reboot_count),
        disks: status.map(disks).unwrap_or_default(),
        disks_known: matches!(facts.vmm, Vmm::Live { state: VmmState::Running, .. }),
        ..ObservedDomain::default()
    };
    if record.run.is_none()
        && let Some(end) = &record.end
    {
        observed.exit_reason = exit_reason(end.reason).into();
    }
    if record.run.is_some() {
        observed.save_error = shorten(save_error(facts, record).unwrap_or_default());
        if plug(facts).is_some() {
            observed.disk_error = shorten(facts.progress.disk_error.clone());
        }
    }
    Some(observed)
}

fn disks(status: &VmmStatus) -> Vec<ObservedDisk> {
    let disk =
        |disk: &DiskStatus| ObservedDisk { serial: disk.serial.clone(), detaching: disk.detaching };
    status.disks.iter().map(disk).collect()
}

/// Why a guest that shall be saved runs on.
fn save_error(facts: Facts<'_>, record: &DomainRecord) -> Option<String> {
    let assigned = facts.wanted.assigned()?;
    if facts.wanted.owner()?.power != Power::Saved {
        return None;
    }
    if let Some(error) = save_failed(record, assigned) {
        return Some(error.to_owned());
    }
    match facts.memory {
        Disks::Failed(reason) => Some(reason.clone()),
        _ if assigned.memory.is_none() => Some("no volume was given for its memory".into()),
        _ => None,
    }
}

fn state(
    facts: Facts<'_>,
    record: &DomainRecord,
    status: Option<&VmmStatus>,
) -> (ObservedState, String) {
    let stopping = facts.progress.button_ms.is_some() || facts.progress.quit_ms.is_some();
    let said = status.map(|status| status.state_reason.clone()).unwrap_or_default();
    match facts.vmm {
        Vmm::Live { state, .. } => match state {
            VmmState::Running if stopping && facts.wanted.wants_end() => {
                (ObservedState::Stopping, said)
            }
            VmmState::Running => (ObservedState::Running, said),
            VmmState::Paused => (ObservedState::Paused, said),
            VmmState::Incoming => (ObservedState::Incoming, said),
            VmmState::HandedOver => (ObservedState::HandedOver, said),
            VmmState::Exited => (unsettled(record, ObservedState::Stopping), said),
            VmmState::Unspecified => (ObservedState::Starting, said),
        },
        // Not to be taken for one that runs, whatever it is doing now.
        Vmm::Silent { handed_to, .. } if *handed_to > 0 => {
            (ObservedState::HandedOver, String::new())
        }
        Vmm::Silent { .. } if facts.progress.exited_ms.is_some() || stopping => {
            (unsettled(record, ObservedState::Stopping), String::new())
        }
        Vmm::Silent { .. } => match &record.run {
            // It may have been saved in this moment: what it was saved to must stay.
            Some(run) if run.ran && facts.has_memory() => {
                (ObservedState::Paused, "its VMM does not answer on its socket".into())
            }
            Some(run) if run.ran => {
                (ObservedState::Running, "its VMM does not answer on its socket".into())
            }
            _ => (unsettled(record, ObservedState::Starting), String::new()),
        },
        Vmm::Gone if record.run.is_some() => {
            (unsettled(record, ObservedState::Stopping), String::new())
        }
        Vmm::Gone => match &record.end {
            Some(end) => ended(facts, record, end),
            None if facts.wanted.owner().is_some_and(Owner::runs) => {
                match facts.wanted.assigned().map_or(facts.disks, |a| facts.to_start(a)) {
                    Disks::Ready => (ObservedState::Starting, String::new()),
                    Disks::Waiting(reason) => (ObservedState::Starting, reason.clone()),
                    Disks::Failed(reason) => (ObservedState::Failed, reason.clone()),
                }
            }
            None if is_incoming(facts) => match facts.disks {
                Disks::Ready => (ObservedState::Incoming, String::new()),
                Disks::Waiting(reason) | Disks::Failed(reason) => {
                    (ObservedState::Incoming, reason.clone())
                }
            },
            None => (ObservedState::Stopped, String::new()),
        },
    }
}

/// A VMM that says nothing of itself. A destination in which the guest never ran must not look as
/// if it had: the controller would take the migration for done.
fn unsettled(record: &DomainRecord, otherwise: ObservedState) -> ObservedState {
    match &record.run {
        Some(run) if !run.ran && run.incoming.is_some() => ObservedState::Incoming,
        Some(run) if !run.ran => ObservedState::Starting,
        _ => otherwise,
    }
}

fn is_incoming(facts: Facts<'_>) -> bool {
    matches!(facts.wanted.assigned().map(|a| &a.role), Some(Role::Incoming { .. }))
}

fn ended(facts: Facts<'_>, record: &DomainRecord, end: &End) -> (ObservedState, String) {
    let handed_to = end.handover.as_ref().map_or(0, |handover| handover.to_epoch);
    let decided_anew = record.epoch > end.epoch.max(handed_to);
    if end.handover.is_some() && !decided_anew {
        return (ObservedState::HandedOver, end.detail.clone());
    }
    let owner = facts.wanted.owner();
    if owner.is_some_and(|owner| !owner.runs()) {
        return (ObservedState::Stopped, end.detail.clone());
    }
    match end.reason {
        EndReason::Shutdown | EndReason::Reboot => (ObservedState::Stopped, end.detail.clone()),
        EndReason::Killed if end.ordered => (ObservedState::Stopped, end.detail.clone()),
        // A host that came back starts what it owned, when it hears that it still does.
        EndReason::HostRebooted | EndReason::Interrupted | EndReason::Saved => {
            (ObservedState::Stopped, end.detail.clone())
        }
        EndReason::Crash | EndReason::Killed | EndReason::Error => {
            let assigned = facts.wanted.assigned().filter(|_| owner.is_some());
            let Some(assigned) = assigned else {
                return (ObservedState::Failed, end.detail.clone());
            };
            match restart_at(record, end, assigned, facts.progress) {
                Some(_) => (ObservedState::Starting, format!("restarts after: {}", end.detail)),
                None if end.ran && assigned.spec.on_crash() == RestartPolicy::Restart => (
                    ObservedState::Failed,
                    format!("{} (and {CRASH_RESTARTS_MAX} restarts before)", end.detail),
                ),
                None => (ObservedState::Failed, end.detail.clone()),
            }
        }
    }
}

/// The migration that is asked for comes first; another one that the VMM still speaks of, last.
fn migration(
    facts: Facts<'_>,
    record: &DomainRecord,
    status: Option<&VmmStatus>,
) -> Option<ObservedMigration> {
    let live = status.and_then(|status| status.migration.as_ref());
    match facts.wanted.assigned().map(|assigned| &assigned.role) {
        Some(Role::Owner(owner)) => {
            if let Some(outgoing) = &owner.outgoing
                && live.is_none_or(|live| live.id != outgoing.migration_id)
                && let Some(said) = outgoing_unseen(record, status, outgoing)
            {
                return Some(said);
            }
        }
        Some(Role::Incoming { migration_id, .. }) => {
            if let Some((id, error)) = &facts.progress.prepare_failed
                && id == migration_id
            {
                return Some(failed(id, MigrationRole::Destination, error.clone()));
            }
            if let Disks::Failed(reason) = facts.disks
                && record.run.is_none()
                && record.end.is_none()
            {
                return Some(failed(migration_id, MigrationRole::Destination, reason.clone()));
            }
        }
        None => {}
    }
    if live.is_some() || record.run.is_some() {
        return live.cloned();
    }
    migration_of_end(record.end.as_ref()?)
}

/// What can be said of an outgoing migration that no VMM speaks of. "Failed" is a promise that
/// the guest stays here: it is made only when nothing can be handing it over any more.
fn outgoing_unseen(
    record: &DomainRecord,
    status: Option<&VmmStatus>,
    outgoing: &Outgoing,
) -> Option<ObservedMigration> {
    let id = &outgoing.migration_id;
    let source = MigrationRole::Source;
    let told = record.outgoing.as_ref().filter(|told| told.migration_id == *id);
    if let Some(error) = told.and_then(|told| told.error.clone()) {
        return Some(failed(id, source, error));
    }
    match (&record.run, status) {
        // It may be doing it, and does not say so (yet).
        (Some(_), None) => Some(of(id, source, MigrationProgress::Unspecified)),
        (Some(run), Some(_)) => match told {
            Some(told) if told.pid == run.pid => {
                Some(of(id, source, MigrationProgress::Unspecified))
            }
            Some(_) => Some(failed(id, source, "the VMM that was migrating has ended".into())),
            None if outgoing.cancel => Some(failed(id, source, "cancelled before it began".into())),
            None => None,
        },
        (None, _) => {
            let end = record.end.as_ref()?;
            // Handed over, to this or another migration: the end says it.
            if end.handover.is_some() {
                return None;
            }
            Some(failed(id, source, format!("the VMM has ended: {}", end.detail)))
        }
    }
}

fn migration_of_end(end: &End) -> Option<ObservedMigration> {
    if let Some(handover) = &end.handover {
        return Some(handed_over(handover));
    }
    let id = end.incoming.as_ref()?;
    let destination = MigrationRole::Destination;
    match end.ran {
        true => Some(of(id, destination, MigrationProgress::Succeeded)),
        false => Some(failed(id, destination, end.detail.clone())),
    }
}

/// A hand-over whose VMM is gone.
pub(crate) fn handed_over(handover: &Handover) -> ObservedMigration {
    of(&handover.migration_id, MigrationRole::Source, MigrationProgress::HandedOver)
}

fn of(id: &str, role: MigrationRole, progress: MigrationProgress) -> ObservedMigration {
    ObservedMigration {
        id: id.to_owned(),
        role: role.into(),
        progress: progress.into(),
        ..ObservedMigration::default()
    }
}

fn failed(id: &str, role: MigrationRole, error: String) -> ObservedMigration {
    ObservedMigration { error: shorten(error), ..of(id, role, MigrationProgress::Failed) }
}

fn exit_reason(reason: EndReason) -> ExitReason {
    match reason {
        EndReason::Shutdown => ExitReason::Shutdown,
        EndReason::Reboot => ExitReason::Reboot,
        EndReason::Crash => ExitReason::Crash,
        EndReason::Killed | EndReason::HostRebooted => ExitReason::Killed,
        EndReason::Error => ExitReason::Error,
        EndReason::Saved => ExitReason::Saved,
        EndReason::Interrupted => ExitReason::Unspecified,
    }
}

/// At most [`REASON_CHARS_MAX`] characters, and none that would upset a terminal.
pub(crate) fn shorten(text: String) -> String {
    let clean = |c: char| if c.is_control() { ' ' } else { c };
    text.trim().chars().take(REASON_CHARS_MAX).map(clean).collect()
}

/// Whether two observations differ in more than their counters.
pub fn differs(a: &ObservedDomain, b: &ObservedDomain) -> bool {
    fn key(observed: &ObservedDomain) -> ObservedDomain {
        let mut key = ObservedDomain { usage: None, ..observed.clone() };
        if let Some(migration) = &mut key.migration {
            migration.report = None;
        }
        key
    }
    key(a) != key(b)
}

#[cfg(test)]
mod tests;
