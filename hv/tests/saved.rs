//! A guest that is saved to a file, and goes on from it: with a machine of plain memory.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use common::{FakeVm, Habits, PAGES, Runners, shape};
use drover_hv::machine::migratable::MigratableVm;
use drover_hv::memory::PAGE_BYTES;
use drover_hv::saved::{
    ROOM_BYTES, RestoreError, Restored, SaveControl, SaveError, SaveOutcome, restore, save,
};
use drover_hv::virtio::blk::Volume;

const HABITS: Habits = Habits { hot_pages: PAGES, rest: Duration::from_micros(50) };
const PATIENCE: Duration = Duration::from_secs(20);

fn place(directory: &tempfile::TempDir, bytes: u64) -> std::path::PathBuf {
    let path = directory.path().join("memory.raw");
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

fn try_save(vm: &mut FakeVm, path: &Path) -> SaveOutcome {
    let shape = vm.shape();
    save(vm, &shape, path, &SaveControl::new())
}

fn try_restore(vm: &mut FakeVm, path: &Path) -> Result<Restored, RestoreError> {
    let shape = vm.shape();
    restore(vm, &shape, path)
}

/// It writes on, for as long as anybody looks.
fn is_alive(vm: &FakeVm) -> bool {
    let (before, deadline) = (vm.writes(), Instant::now() + PATIENCE);
    while vm.writes() < before + 10 {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::yield_now();
    }
    vm.is_running()
}

/// All memory and the state come back, once; a second VMM is told to boot.
#[test]
fn a_guest_goes_on_where_it_was_saved_and_only_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = place(&directory, PAGES * PAGE_BYTES + ROOM_BYTES);
    let runners = Runners::default();
    let mut source = FakeVm::running(&runners, HABITS);
    assert!(is_alive(&source));
    let SaveOutcome::Saved(saved) = try_save(&mut source, &path) else { panic!("not saved") };
    assert!(!source.is_running());
    assert!(saved.pages > 0 && saved.pages < PAGES, "{saved:?}");

    let mut next = FakeVm::new(&runners, HABITS);
    let Ok(Restored::Whole(restored)) = try_restore(&mut next, &path) else { panic!("not whole") };
    assert_eq!((restored.pages, restored.bytes), (saved.pages, saved.bytes));
    assert!(next.contents() == source.contents());
    assert_eq!(next.writes(), source.writes());
    next.resume().unwrap();
    assert!(is_alive(&next));

    let mut third = FakeVm::new(&Runners::default(), HABITS);
    assert_eq!(try_restore(&mut third, &path).unwrap(), Restored::UsedUp);
    assert_eq!(third.restores, 0);
    assert!(third.contents().iter().all(|byte| *byte == 0));
}

/// Whatever fails: the guest goes on, and nothing is there to go on from.
#[test]
fn a_guest_that_cannot_be_saved_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let path = place(&directory, 1 << 20);
    let mut vm = FakeVm::running(&Runners::default(), HABITS);
    let SaveOutcome::Failed(error) = try_save(&mut vm, &path) else { panic!("saved") };
    assert!(matches!(error, SaveError::TooSmall { .. }), "{error}");
    assert!(is_alive(&vm));
    let mut next = FakeVm::new(&Runners::default(), HABITS);
    let error = try_restore(&mut next, &path).unwrap_err();
    assert!(matches!(error, RestoreError::Unfinished), "{error}");

    // Somebody has it open; it is not there; it is a directory.
    let path = place(&directory, PAGES * PAGE_BYTES + ROOM_BYTES);
    let held = Volume::open(&path, false).unwrap();
    for path in [&path, &directory.path().join("nothing"), &directory.path().to_owned()] {
        let SaveOutcome::Failed(error) = try_save(&mut vm, path) else { panic!("saved") };
        assert!(error.to_string().starts_with("path: "), "{error}");
        assert!(is_alive(&vm));
    }
    drop(held);

    // Told to end before it began.
    let control = SaveControl::new();
    assert!(control.cancel());
    let shape = vm.shape();
    let SaveOutcome::Failed(error) = save(&mut vm, &shape, &path, &control) else {
        panic!("saved")
    };
    assert!(matches!(error, SaveError::Cancelled), "{error}");
    assert!(is_alive(&vm));
}

/// A state that a machine does not take is still there for the one that does.
#[test]
fn a_state_that_is_refused_stays_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = place(&directory, PAGES * PAGE_BYTES + ROOM_BYTES);
    let mut source = FakeVm::running(&Runners::default(), HABITS);
    assert!(matches!(try_save(&mut source, &path), SaveOutcome::Saved(_)));

    let mut other = FakeVm::new(&Runners::default(), HABITS);
    let larger = drover_hv::migration::Shape { vcpus: 2, ..shape() };
    let error = restore(&mut other, &larger, &path).unwrap_err();
    assert!(matches!(error, RestoreError::Mismatch(_)), "{error}");

    let mut refuses = FakeVm::new(&Runners::default(), HABITS);
    (refuses.fail_restore, refuses.restores) = (true, 1);
    let error = try_restore(&mut refuses, &path).unwrap_err();
    assert!(matches!(error, RestoreError::Machine(_)), "{error}");

    let mut next = FakeVm::new(&Runners::default(), HABITS);
    assert!(matches!(try_restore(&mut next, &path), Ok(Restored::Whole(_))));
    assert!(next.contents() == source.contents());
}

/// Nothing is written to its disks behind the state, and without them it does not go on.
#[test]
fn disks_stay_as_they_were_saved() {
    let directory = tempfile::tempdir().unwrap();
    let path = place(&directory, PAGES * PAGE_BYTES + ROOM_BYTES);
    let disk_path = directory.path().join("root");
    common::disk::file(&disk_path, 7);
    let disk = common::disk::disk(&disk_path, false, false, false);
    let runners = Runners::default();
    let mut vm = FakeVm::running_with_disks(&runners, HABITS, vec![disk]);
    assert!(is_alive(&vm));
    assert!(matches!(try_save(&mut vm, &path), SaveOutcome::Saved(_)));
    assert!(vm.disks_then == [common::disk::content(&disk_path)]);

    let mut next = FakeVm::new(&runners, HABITS);
    let error = try_restore(&mut next, &path).unwrap_err().to_string();
    assert!(error.contains("disks: 1; accepted: 0"), "{error}");
}
