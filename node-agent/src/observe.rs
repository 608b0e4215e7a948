//! What is reported of one domain: a pure function of the same facts that decisions rest on.

use drover_proto::agent::v1::{
    MigrationProgress, MigrationRole, ObservedDomain, ObservedMigration, ObservedState,
};
use drover_proto::v1::{ExitReason, RestartPolicy};
use drover_proto::vmm::v1::{VmmState, VmmStatus};

use crate::decide::{CRASH_RESTARTS_MAX, Facts, Vmm, restart_at};
use crate::records::{DomainRecord, End, EndReason, Handover};
use crate::wanted::Role;

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
        ..ObservedDomain::default()
    };
    if record.run.is_none()
        && let Some(end) = &record.end
    {
        observed.exit_reason = exit_reason(end.reason).into();
    }
    Some(observed)
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
            VmmState::Exited => (ObservedState::Stopping, said),
            VmmState::Unspecified => (ObservedState::Starting, said),
        },
        Vmm::Silent { .. } => match &record.run {
            Some(run) if run.ran => {
                (ObservedState::Running, "its VMM does not answer on its socket".into())
            }
            Some(run) if run.incoming.is_some() => (ObservedState::Incoming, String::new()),
            _ => (ObservedState::Starting, String::new()),
        },
        Vmm::Gone if record.run.is_some() => (ObservedState::Stopping, String::new()),
        Vmm::Gone => match &record.end {
            Some(end) => ended(facts, record, end),
            None if facts.wanted.owner().is_some_and(|owner| owner.running) => {
                (ObservedState::Starting, String::new())
            }
            None if is_incoming(facts) => (ObservedState::Incoming, String::new()),
            None => (ObservedState::Stopped, String::new()),
        },
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
    if owner.is_some_and(|owner| !owner.running) {
        return (ObservedState::Stopped, end.detail.clone());
    }
    match end.reason {
        EndReason::Shutdown | EndReason::Reboot => (ObservedState::Stopped, end.detail.clone()),
        EndReason::Killed if end.ordered => (ObservedState::Stopped, end.detail.clone()),
        // A host that came back starts what it owned, when it hears that it still does.
        EndReason::HostRebooted | EndReason::Interrupted => {
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

fn migration(
    facts: Facts<'_>,
    record: &DomainRecord,
    status: Option<&VmmStatus>,
) -> Option<ObservedMigration> {
    let source = MigrationRole::Source;
    let destination = MigrationRole::Destination;
    let outgoing = facts.wanted.owner().and_then(|owner| owner.outgoing.as_ref());
    let live = status.and_then(|status| status.migration.as_ref());
    // The migration that is asked for comes first; an older one that the VMM remembers, last.
    if let Some(outgoing) = outgoing
        && live.is_none_or(|live| live.id != outgoing.migration_id)
        && !record_has_handover(record, &outgoing.migration_id)
    {
        let last = record.outgoing.as_ref().filter(|l| l.migration_id == outgoing.migration_id);
        let error = match last {
            Some(last) => last.error.clone().unwrap_or_else(|| gone(record)),
            None if outgoing.cancel => "cancelled before it began".to_owned(),
            None => return live.cloned(),
        };
        return Some(failed(&outgoing.migration_id, source, error));
    }
    if let Some(Role::Incoming { migration_id, .. }) = facts.wanted.assigned().map(|a| &a.role)
        && let Some((id, error)) = &facts.progress.prepare_failed
        && id == migration_id
    {
        return Some(failed(id, destination, error.clone()));
    }
    if live.is_some() {
        return live.cloned();
    }
    if record.run.is_some() {
        return None;
    }
    let end = record.end.as_ref()?;
    if let Some(Handover { migration_id, .. }) = &end.handover {
        return Some(ObservedMigration {
            id: migration_id.clone(),
            role: source.into(),
            progress: MigrationProgress::HandedOver.into(),
            ..ObservedMigration::default()
        });
    }
    let id = end.incoming.as_ref()?;
    if end.ran {
        return Some(ObservedMigration {
            id: id.clone(),
            role: destination.into(),
            progress: MigrationProgress::Succeeded.into(),
            ..ObservedMigration::default()
        });
    }
    Some(failed(id, destination, end.detail.clone()))
}

fn record_has_handover(record: &DomainRecord, migration_id: &str) -> bool {
    let handover = record.end.as_ref().and_then(|end| end.handover.as_ref());
    record.run.is_none() && handover.is_some_and(|handover| handover.migration_id == migration_id)
}

/// Why a migration that was begun is nowhere to be seen: its VMM is not there any more.
fn gone(record: &DomainRecord) -> String {
    match &record.end {
        Some(end) => format!("the VMM that was migrating ended: {}", end.detail),
        None => "the VMM that was migrating ended".into(),
    }
}

fn failed(id: &str, role: MigrationRole, error: String) -> ObservedMigration {
    ObservedMigration {
        id: id.to_owned(),
        role: role.into(),
        progress: MigrationProgress::Failed.into(),
        error: shorten(error),
        ..ObservedMigration::default()
    }
}

fn exit_reason(reason: EndReason) -> ExitReason {
    match reason {
        EndReason::Shutdown => ExitReason::Shutdown,
        EndReason::Reboot => ExitReason::Reboot,
        EndReason::Crash => ExitReason::Crash,
        EndReason::Killed | EndReason::HostRebooted => ExitReason::Killed,
        EndReason::Error => ExitReason::Error,
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
