//! What a VMM that runs is told of its disks and its memory, and how a guest is saved and goes on.

use super::*;
use crate::records::SaveRecord;

fn ask_about(
    live_disks: &[LiveDisk],
    memory: &Disks,
    record: DomainRecord,
    vmm: &Vmm,
    wanted: &Wanted,
    progress: &Progress,
) -> Action {
    decide(Facts { live_disks, memory, ..facts(Some(&record), vmm, wanted, progress) })
}

#[test]
fn a_vmm_hears_what_it_does_not_know_of_its_disks() {
    use Action::*;
    let disk = |bytes| LiveDisk {
        serial: "root".into(),
        slot: None,
        limits: DiskLimits::default(),
        size_bytes: bytes,
    };
    let told = |disks: &[LiveDisk]| Progress { told_disks: Some(disks.to_vec()), ..progress() };
    let sends = migrating(VmmState::Running, MigrationRole::Source, MigrationProgress::Copying);
    let came =
        migrating(VmmState::Running, MigrationRole::Destination, MigrationProgress::Succeeded);
    let runs = live(VmmState::Running);
    for (what, vmm, wanted, progress, expected) in [
        ("told nothing yet", &runs, run(5), progress(), UpdateDisks),
        ("told all", &runs, run(5), told(&[disk(2)]), Nothing),
        ("it has grown", &runs, run(5), told(&[disk(1)]), UpdateDisks),
        ("came in", &came, run(5), told(&[disk(1)]), UpdateDisks),
        ("is leaving", &sends, run(5), told(&[disk(1)]), Nothing),
        ("is to leave", &runs, send(false), told(&[disk(1)]), StartMigration),
        ("is to stop", &runs, stop(5), told(&[disk(1)]), PowerButton),
        ("is another's", &live(VmmState::HandedOver), run(5), told(&[disk(1)]), Nothing),
        ("has ended", &live(VmmState::Exited), run(5), told(&[disk(1)]), Nothing),
    ] {
        let action = ask_about(&[disk(2)], &Disks::Ready, ran(), vmm, &wanted, &progress);
        assert_eq!(action, expected, "{what}");
    }
    assert_eq!(ask(ran(), live(VmmState::Running), run(5), progress()), Nothing, "it has none");
}

/// The VMM has what is assigned, in the end: first goes what is too much, then comes what is
/// missing, when it is here.
#[test]
fn disks_come_and_go() {
    use Action::*;
    let (record, runs, wanted) = (ran(), live(VmmState::Running), run(5));
    let disk = |serial: &str, slot| LiveDisk {
        serial: serial.into(),
        slot,
        limits: DiskLimits::default(),
        size_bytes: 1,
    };
    let has = |serial: &str, slot, detaching| DiskStatus { serial: serial.into(), slot, detaching };
    let own = [disk("root", Some(16)), disk("data", Some(17))];
    let (root, data) = (has("root", 16, false), has("data", 17, false));
    let going = || has("old", 18, true);
    let seed = has(SEED_SERIAL, 31, false);
    let told = Progress { told_disks: Some(own.to_vec()), ..progress() };
    let asked = |ms| Progress { detach_ms: Some(ms), ..told.clone() };
    let again = NOW + 1;
    let waits = Disks::Waiting("w".into());
    for (what, plugged, disks, progress, expected) in [
        ("all", vec![&root, &data, &seed], &Disks::Ready, told.clone(), Nothing),
        ("one is missing", vec![&root, &seed], &Disks::Ready, told.clone(), AttachDisk(1)),
        ("it is not here", vec![&root, &seed], &waits, told.clone(), Nothing),
        ("too much", vec![&has("old", 18, false)], &Disks::Ready, told.clone(), {
            DetachDisk("old".into())
        }),
        ("asked by another", vec![&going()], &Disks::Ready, told.clone(), {
            DetachDisk("old".into())
        }),
        ("asked", vec![&going()], &Disks::Ready, asked(again - 10_000), WaitUntil(again)),
        ("asked long ago", vec![&going()], &Disks::Ready, asked(NOW - 10_000), {
            DetachDisk("old".into())
        }),
        ("it may stay", vec![&root, &has("data", 17, true)], &Disks::Ready, told.clone(), {
            AttachDisk(1)
        }),
        ("from the start", vec![&root, &data, &has("old", 0, false)], &Disks::Ready, told, Nothing),
    ] {
        let plugged: Vec<_> = plugged.into_iter().cloned().collect();
        let action = decide(Facts {
            record: Some(&record),
            vmm: &runs,
            wanted: &wanted,
            progress: &progress,
            disks,
            memory: &Disks::Ready,
            live_disks: &own,
            plugged: &plugged,
            now_ms: NOW,
        });
        assert_eq!(action, expected, "{what}");
    }
    // One without a slot was there from the start, and an old VMM does not say so.
    let old = [disk("root", None)];
    let told = Progress { told_disks: Some(old.to_vec()), ..progress() };
    let action = ask_about(&old, &Disks::Ready, ran(), &runs, &run(5), &told);
    assert_eq!(action, Nothing);
}

fn failed(memory: &str, epoch: u64, start_generation: u64) -> DomainRecord {
    let (memory, error) = (memory.into(), "too small".into());
    DomainRecord { save: Some(SaveRecord { memory, epoch, start_generation, error }), ..ran() }
}

/// Each order is tried once, and nothing that is under way is disturbed by it.
#[test]
fn a_guest_is_saved_once() {
    use Action::*;
    use VmmState::*;
    let sends = migrating(Running, MigrationRole::Source, MigrationProgress::Copying);
    let mut without = save(5);
    if let Wanted::Assigned(assigned) = &mut without {
        assigned.memory = None;
    }
    check(vec![
        ("runs", Some(ran()), live(Running), save(5), Save),
        // By an agent before us: the VMM knows that it is the same saving.
        ("is being saved", Some(ran()), live(Paused), save(5), Save),
        ("later epoch", Some(ran()), live(Running), save(6), Adopt),
        (
            "started again",
            Some(DomainRecord { start_generation: None, ..ran() }),
            live(Running),
            save(5),
            Adopt,
        ),
        ("could not be", Some(failed(MEMORY, 5, 1)), live(Running), save(5), Nothing),
        ("another could not be", Some(failed("volume-0", 5, 1)), live(Running), save(5), Save),
        ("an earlier start could not be", Some(failed(MEMORY, 5, 0)), live(Running), save(5), Save),
        ("an earlier epoch could not be", Some(failed(MEMORY, 4, 1)), live(Running), save(5), Save),
        ("given no room", Some(ran()), live(Running), without, Nothing),
        ("is leaving", Some(ran()), sends, save(5), Nothing),
        ("hangs", Some(ran()), silent(), save(5), Nothing),
        ("is ending", Some(ran()), live(Exited), save(5), Nothing),
        ("has ended", Some(ran()), Vmm::Gone, save(5), Settle),
        ("is saved", Some(ended(EndReason::Saved)), Vmm::Gone, save(5), Nothing),
        ("shut itself down", Some(ended(EndReason::Shutdown)), Vmm::Gone, save(5), Nothing),
        (
            "crashed",
            Some(ended(EndReason::Crash)),
            Vmm::Gone,
            on_crash(save(5), RestartPolicy::Restart),
            Nothing,
        ),
        ("host rebooted", Some(ended(EndReason::HostRebooted)), Vmm::Gone, save(5), Nothing),
        ("never ran", None, Vmm::Gone, save(5), Adopt),
        ("given back", Some(ran()), live(HandedOver), save(7), TakeOver),
    ]);
    let runs = live(Running);
    let saving = Progress { saving: true, ..progress() };
    let again = Progress { save_again_ms: NOW + 1, ..progress() };
    for (what, memory, progress, expected) in [
        ("no room yet", Disks::Waiting("w".into()), progress(), Nothing),
        ("no room", Disks::Failed("f".into()), progress(), Nothing),
        ("at it", Disks::Ready, saving.clone(), Nothing),
        ("not heard of", Disks::Ready, again, WaitUntil(NOW + 1)),
    ] {
        let action = ask_about(&[], &memory, ran(), &runs, &save(5), &progress);
        assert_eq!(action, expected, "{what}");
    }
    // Wanted back in the middle: what was sent is not undone.
    assert_eq!(ask(ran(), live(Running), run(5), saving.clone()), Nothing);
    // Given up, under a later epoch: that waits for the saving's end.
    assert_eq!(ask(ran(), live(Running), run(6), saving), Nothing);
    assert_eq!(ask(ran(), live(Running), run(6), progress()), Adopt);
}

/// A saved guest goes on from its memory when that is here; once it has, it needs it no more.
#[test]
fn a_saved_guest_goes_on_once() {
    use Action::*;
    let start = |record: DomainRecord, memory: &Disks, wanted: Wanted| {
        ask_about(&[], memory, record, &Vmm::Gone, &with_memory(wanted), &progress())
    };
    let saved = || ended(EndReason::Saved);
    let waits = Disks::Waiting("w".into());
    let gone = Disks::Failed("f".into());
    let to_start = || DomainRecord { epoch: 6, ..record() };
    assert_eq!(start(saved(), &Disks::Ready, run(6)), Start);
    assert_eq!(start(saved(), &waits, run(6)), AwaitDisks);
    assert_eq!(start(to_start(), &waits, run(6)), Nothing);
    assert_eq!(start(to_start(), &gone, run(6)), Nothing);
    // Saved although it is wanted again by now.
    assert_eq!(start(saved(), &Disks::Ready, run(5)), Start);
    assert_eq!(ask(saved(), Vmm::Gone, run(5), progress()), Start);
    // It crashed later: what it went on from is used up, and may be removed any moment.
    let restored =
        || DomainRecord { restored: Some(MEMORY.into()), ..ended(EndReason::HostRebooted) };
    assert_eq!(start(restored(), &waits, run(5)), Start);
    assert_eq!(
        start(DomainRecord { restored: Some("volume-0".into()), ..saved() }, &waits, run(6)),
        AwaitDisks
    );
    // It could not be saved, and its host went down: there is nothing on that volume.
    let unsaved = DomainRecord { run: None, end: restored().end, ..failed(MEMORY, 5, 1) };
    assert_eq!(start(unsaved, &waits, run(5)), Start);
    // A destination takes nothing from it.
    assert_eq!(start(record(), &waits, receive(6)), StartIncoming);
    // What could not go on is not tried again by itself.
    let damaged = with_end(ended(EndReason::Error), |end| end.ran = false);
    assert_eq!(start(damaged, &Disks::Ready, on_crash(run(5), RestartPolicy::Restart)), Nothing);
}
