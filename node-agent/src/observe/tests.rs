//! What must not be said: the controller takes each of these words for a promise.

use super::*;
use crate::decide::{Migration, Progress};
use crate::records::{OutgoingRecord, Run};
use crate::wanted::{Assigned, Owner, Wanted};
use drover_proto::v1::DomainSpec;
use std::time::Duration;

const M: &str = "migration-1";

fn record(ran: bool, incoming: Option<&str>) -> DomainRecord {
    let incoming = incoming.map(str::to_owned);
    let run = Run { epoch: 6, incoming, pid: Some(9), ran, ..Run::default() };
    DomainRecord { epoch: 6, start_generation: Some(1), run: Some(run), ..DomainRecord::default() }
}

fn ended(ran: bool, reason: EndReason) -> End {
    let detail = "why".into();
    End { epoch: 6, incoming: None, ran, reason, detail, ordered: false, handover: None }
}

fn owner(outgoing: Option<Outgoing>) -> Wanted {
    let power = Power::Running;
    let owner = Owner { power, grace: Duration::ZERO, start_generation: 1, outgoing };
    assigned(Role::Owner(owner))
}

fn assigned(role: Role) -> Wanted {
    let spec = DomainSpec::default();
    let (name, disks) = ("domains/web".into(), Vec::new());
    Wanted::Assigned(Box::new(Assigned {
        name,
        epoch: 6,
        spec,
        role,
        disks,
        rescue: false,
        generation_id: None,
        memory: None,
        seed_slot: None,
    }))
}

fn send(cancel: bool) -> Wanted {
    owner(Some(Outgoing {
        migration_id: M.into(),
        address: String::new(),
        token: String::new(),
        to_epoch: 7,
        limits: None,
        cancel,
    }))
}

fn receive() -> Wanted {
    assigned(Role::Incoming { migration_id: M.into(), token: String::new() })
}

fn said(
    record: &DomainRecord,
    vmm: Vmm,
    status: Option<VmmStatus>,
    wanted: &Wanted,
) -> ObservedDomain {
    with_disks(&Disks::Ready, record, vmm, status, wanted)
}

fn with_disks(
    disks: &Disks,
    record: &DomainRecord,
    vmm: Vmm,
    status: Option<VmmStatus>,
    wanted: &Wanted,
) -> ObservedDomain {
    let progress = &Progress::default();
    let (record, vmm) = (Some(record), &vmm);
    let (memory, live_disks) = (disks, &[]);
    let facts =
        Facts { record, vmm, wanted, progress, disks, memory, live_disks, plugged: &[], now_ms: 0 };
    observe(facts, status.as_ref(), None, None).unwrap()
}

/// A domain that waits for its disks says so, under the epoch that it waits for.
#[test]
fn disks_that_are_not_here_are_told() {
    let to_start = DomainRecord { run: None, ..record(false, None) };
    let waits = Disks::Waiting("waits for its disk: copying the image, 40 %".into());
    let fails = Disks::Failed("disk 1: its data is not there".into());
    let say =
        |disks: &Disks, wanted: &Wanted| with_disks(disks, &to_start, Vmm::Gone, None, wanted);
    let told = say(&waits, &owner(None));
    assert_eq!((told.state(), told.epoch), (ObservedState::Starting, 6));
    assert!(told.state_reason.ends_with("copying the image, 40 %"));
    let told = say(&fails, &owner(None));
    assert_eq!(told.state(), ObservedState::Failed);
    assert_eq!(told.state_reason, "disk 1: its data is not there");
    // A destination: the migration has not failed before a disk has.
    let told = say(&waits, &receive());
    assert_eq!((told.state(), told.migration), (ObservedState::Incoming, None));
    let told = say(&fails, &receive());
    assert_eq!(told.state(), ObservedState::Incoming);
    let migration = told.migration.unwrap();
    assert_eq!(migration.progress(), MigrationProgress::Failed);
    assert!(migration.error.contains("its data is not there"));
    // Those of a VMM that runs are its own business.
    let (vmm, status) = running();
    let told = with_disks(&fails, &record(true, None), vmm, status, &owner(None));
    assert_eq!(told.state(), ObservedState::Running);
}

fn running() -> (Vmm, Option<VmmStatus>) {
    let vmm = Vmm::Live { state: VmmState::Running, migration: None::<Migration>, handed_to: 0 };
    (vmm, Some(VmmStatus { state: VmmState::Running.into(), ..VmmStatus::default() }))
}

fn progress(observed: &ObservedDomain) -> Option<MigrationProgress> {
    observed.migration.as_ref().map(ObservedMigration::progress)
}

/// A destination whose VMM went away before the guest ran never looks as if it had run.
#[test]
fn a_destination_that_never_ran_does_not_seem_to() {
    let waiting = record(false, Some(M));
    for vmm in [Vmm::Gone, Vmm::Silent { since_ms: 0, handed_to: 0 }] {
        assert_eq!(said(&waiting, vmm, None, &receive()).state(), ObservedState::Incoming);
    }
    let exited = Vmm::Live { state: VmmState::Exited, migration: None, handed_to: 0 };
    assert_eq!(said(&waiting, exited, None, &receive()).state(), ObservedState::Incoming);

    let mut gone = DomainRecord { run: None, ..waiting };
    gone.end = Some(End { incoming: Some(M.into()), ..ended(false, EndReason::Killed) });
    let observed = said(&gone, Vmm::Gone, None, &receive());
    assert_eq!(progress(&observed), Some(MigrationProgress::Failed));
    assert_eq!(observed.migration.unwrap().error, "why");
    gone.end = Some(End { incoming: Some(M.into()), ..ended(true, EndReason::Crash) });
    let observed = said(&gone, Vmm::Gone, None, &receive());
    assert_eq!(progress(&observed), Some(MigrationProgress::Succeeded));
}

/// FAILED promises that the guest stays: it is not said while a VMM that was told to migrate may
/// be doing it, nor before its end was looked into.
#[test]
fn a_source_promises_to_stay_only_when_it_does() {
    let told = |pid| DomainRecord {
        outgoing: Some(OutgoingRecord { migration_id: M.into(), error: None, pid: Some(pid) }),
        ..record(true, None)
    };
    for wanted in [send(false), send(true)] {
        for vmm in [Vmm::Gone, Vmm::Silent { since_ms: 0, handed_to: 0 }] {
            for record in [told(9), told(8), record(true, None)] {
                let observed = said(&record, vmm.clone(), None, &wanted);
                assert_eq!(progress(&observed), Some(MigrationProgress::Unspecified));
            }
        }
        let (vmm, status) = running();
        let observed = said(&told(9), vmm, status, &wanted);
        assert_eq!(progress(&observed), Some(MigrationProgress::Unspecified));
        let (vmm, status) = running();
        let observed = said(&told(8), vmm, status, &wanted);
        assert_eq!(progress(&observed), Some(MigrationProgress::Failed), "another VMM");
    }
    let (vmm, status) = running();
    assert_eq!(progress(&said(&record(true, None), vmm, status, &send(false))), None);
    let (vmm, status) = running();
    let observed = said(&record(true, None), vmm, status, &send(true));
    assert_eq!(progress(&observed), Some(MigrationProgress::Failed), "cancelled before it began");

    let mut gone = DomainRecord { run: None, ..told(9) };
    gone.end = Some(ended(true, EndReason::Crash));
    let observed = said(&gone, Vmm::Gone, None, &send(false));
    assert_eq!(progress(&observed), Some(MigrationProgress::Failed));
    let handover = Handover { migration_id: M.into(), to_epoch: 7 };
    gone.end = Some(End { handover: Some(handover), ..ended(true, EndReason::HostRebooted) });
    for wanted in [send(false), send(true), Wanted::Unknown] {
        let observed = said(&gone, Vmm::Gone, None, &wanted);
        assert_eq!(progress(&observed), Some(MigrationProgress::HandedOver));
        assert_eq!(observed.state(), ObservedState::HandedOver);
    }
}

/// A source that is being ended after its hand-over never looks as if it ran.
#[test]
fn a_silent_source_that_handed_over_does_not_seem_to_run() {
    let silent = Vmm::Silent { since_ms: 0, handed_to: 7 };
    for wanted in [send(false), Wanted::Absent, Wanted::Unknown] {
        let observed = said(&record(true, None), silent.clone(), None, &wanted);
        assert_eq!(observed.state(), ObservedState::HandedOver);
    }
}

/// How a domain ended reaches the operator in the state that fits.
#[test]
fn ends_are_told_apart() {
    use ObservedState::{Failed, Stopped};
    for (reason, state, exit) in [
        (EndReason::Shutdown, Stopped, ExitReason::Shutdown),
        (EndReason::Reboot, Stopped, ExitReason::Reboot),
        (EndReason::Crash, Failed, ExitReason::Crash),
        (EndReason::Killed, Failed, ExitReason::Killed),
        (EndReason::Error, Failed, ExitReason::Error),
        (EndReason::HostRebooted, Stopped, ExitReason::Killed),
    ] {
        let end = Some(ended(true, reason));
        let record = DomainRecord { run: None, end, ..record(true, None) };
        let observed = said(&record, Vmm::Gone, None, &owner(None));
        assert_eq!((observed.state(), observed.exit_reason()), (state, exit), "{reason:?}");
        assert_eq!(observed.state_reason, "why");
    }
}

#[test]
fn text_is_short_and_clean() {
    let text = shorten(format!("a\u{1b}[31m\nb{}", "x".repeat(2000)));
    assert!(text.starts_with("a [31m b") && text.chars().count() == REASON_CHARS_MAX);
}
