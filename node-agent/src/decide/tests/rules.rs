//! The rules that no combination of facts may break.

use super::*;

/// Every combination of record, VMM and assignment, against the rules that keep a domain in one
/// place (I1) and alive (I4).
#[test]
fn no_combination_breaks_the_rules() {
    use MigrationProgress as P;
    use MigrationRole::{Destination, Source};
    use VmmState::*;
    let mut records = vec![None, Some(record()), Some(ran()), Some(waits(M)), Some(waits("old"))];
    for reason in [
        EndReason::Shutdown,
        EndReason::Reboot,
        EndReason::Crash,
        EndReason::Killed,
        EndReason::Error,
        EndReason::HostRebooted,
        EndReason::Interrupted,
        EndReason::Saved,
    ] {
        records.push(Some(ended(reason)));
        records.push(Some(with_end(ended(reason), |end| end.ordered = true)));
        records.push(Some(with_end(ended(reason), |end| end.incoming = Some(M.into()))));
        records.push(Some(with_end(ended(reason), |end| {
            end.handover = Some(Handover { migration_id: M.into(), to_epoch: 6 });
        })));
    }
    let mut vmms = vec![Vmm::Gone, silent(), Vmm::Silent { since_ms: 0, handed_to: 6 }];
    for state in [Unspecified, Running, Paused, Incoming, HandedOver, Exited] {
        vmms.push(live(state));
        for progress in [P::Listening, P::Copying, P::Ready, P::HandedOver, P::Succeeded, P::Failed]
        {
            for role in [Source, Destination] {
                vmms.push(migrating(state, role, progress));
            }
        }
    }
    let mut wanteds = vec![Wanted::Unknown, Wanted::Absent, Wanted::Unclear("x".into())];
    for epoch in 4..=8 {
        wanteds.extend([run(epoch), stop(epoch), receive(epoch), save(epoch)]);
        wanteds.push(on_crash(run(epoch), RestartPolicy::Restart));
    }
    wanteds.extend([send(false), send(true), start_again(2)]);
    let quit = Progress { quit_ms: Some(0), button_ms: Some(0), ..progress() };
    let progresses = [progress(), quit, Progress { killed: true, ..progress() }];

    let mut count = 0;
    for record in &records {
        for vmm in &vmms {
            for wanted in &wanteds {
                for progress in &progresses {
                    for disks in &[Disks::Ready, Disks::Waiting("w".into())] {
                        let record = record.as_ref();
                        let facts = Facts {
                            record,
                            vmm,
                            wanted,
                            progress,
                            disks,
                            memory: disks,
                            live_disks: &[],
                            plugged: &[],
                            now_ms: NOW,
                        };
                        hold_the_rules(facts, &decide(facts));
                        count += 1;
                    }
                }
            }
        }
    }
    assert!(count > 160_000, "{count}");
}

fn hold_the_rules(facts: Facts<'_>, action: &Action) {
    let context = || format!("{facts:?} -> {action:?}");
    let epoch = facts.wanted.assigned().map(|assigned| assigned.epoch);
    let handed_over = facts
        .record
        .and_then(|record| record.end.as_ref())
        .and_then(|end| end.handover.as_ref())
        .map(|handover| handover.to_epoch);
    // To write down that it is to be started takes the same right as to start it.
    let runs_guest = matches!(
        action,
        Action::Start | Action::StartIncoming | Action::TakeOver | Action::AwaitDisks
    );
    let ends = matches!(action, Action::Quit | Action::Kill | Action::Remove);
    if runs_guest {
        // Only on an assignment, and never under an epoch that was overtaken.
        let epoch = epoch.unwrap_or_else(|| panic!("{}", context()));
        assert!(facts.record.is_none_or(|record| epoch >= record.epoch), "{}", context());
        if *facts.vmm == Vmm::Gone {
            assert!(handed_over.is_none_or(|to| epoch > to), "{}", context());
        }
    }
    if matches!(action, Action::Start | Action::StartIncoming) {
        assert_eq!(*facts.disks, Disks::Ready, "{}", context());
    }
    if matches!(action, Action::Start | Action::StartIncoming | Action::AwaitDisks) {
        // Never beside another process, and never before its end is written down.
        assert_eq!(*facts.vmm, Vmm::Gone, "{}", context());
        assert!(facts.record.is_none_or(|record| record.run.is_none()), "{}", context());
    }
    if let (Action::TakeOver, Vmm::Live { state: VmmState::HandedOver, handed_to, .. }) =
        (action, facts.vmm)
    {
        assert!(epoch > Some(*handed_to), "{}", context());
    }
    if ends {
        // Nothing ends without a word from a controller, nor on an unclear or refused one.
        assert!(!matches!(facts.wanted, Wanted::Unknown | Wanted::Unclear(_)), "{}", context());
        if let (Some(epoch), Some(record)) = (epoch, facts.record) {
            assert!(epoch >= record.epoch, "{}", context());
        }
    }
    if *action == Action::Remove {
        assert_eq!((facts.wanted, facts.vmm), (&Wanted::Absent, &Vmm::Gone), "{}", context());
    }
    // A guest that runs, and shall run here, is not ended.
    let run_epoch = facts.record.and_then(|r| r.run.as_ref()).map(|run| run.epoch);
    let runs = matches!(facts.vmm, Vmm::Live { state: VmmState::Running, .. });
    if runs && facts.wanted.owner().is_some_and(Owner::runs) && epoch == run_epoch {
        assert!(!ends, "{}", context());
    }
    // The other way round: what is told to the VMM needs one that answers.
    if matches!(
        action,
        Action::Quit
            | Action::PowerButton
            | Action::UpdateDisks
            | Action::AttachDisk(_)
            | Action::DetachDisk(_)
            | Action::Save
            | Action::TakeOver
            | Action::StartMigration
            | Action::CancelMigration
            | Action::PrepareIncoming
    ) {
        assert!(matches!(facts.vmm, Vmm::Live { .. }), "{}", context());
    }
    if let Action::WaitUntil(at) = action {
        assert!(*at > NOW, "{}", context());
    }
}
