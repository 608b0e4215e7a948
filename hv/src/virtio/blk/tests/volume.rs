//! Volumes: what may be opened, the lock, and what the system may refuse.

use super::*;

/// Two VMMs with one volume would destroy it: the second is refused, until the first lets go.
#[test]
fn a_volume_is_locked_while_it_is_open() {
    let file = file(2);
    for (first, second) in [(false, false), (true, true), (false, true), (true, false)] {
        let held = Volume::open(file.path(), first).unwrap();
        let error = Volume::open(file.path(), second).unwrap_err();
        assert!(matches!(error, VolumeError::Busy { .. }), "{error}");
        let expected = format!(
            "{}: is in use: locked by another VMM or disk, or mounted",
            file.path().display()
        );
        assert_eq!(error.to_string(), expected);
        drop(held);
    }
    // The device lets go too, with each backend.
    for which in backends() {
        let mut bench = Bench::new(which);
        bench.read(0, 1);
        let Bench { driver, file } = bench;
        drop(driver);
        Volume::open(file.path(), false).unwrap();
    }
}

#[test]
fn volumes_are_files_or_devices_of_whole_sectors() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::write(path("odd"), [0; 513]).unwrap();
    std::fs::write(path("empty"), []).unwrap();
    let refused = |path: &Path| {
        let error = Volume::open(path, true).unwrap_err();
        (error.to_string().replace(&path.display().to_string(), "it"), error.accepted())
    };
    let (text, accepted) = refused(&path("odd"));
    assert_eq!(text, "it: has 513 bytes");
    assert_eq!(accepted, "a multiple of 512 bytes, at least 512");
    assert_eq!(refused(&path("empty")).0, "it: has 0 bytes");
    assert_eq!(refused(directory.path()).0, "it: is no regular file and no block device");
    assert_eq!(refused(Path::new("/dev/null")).0, "it: is no regular file and no block device");
    assert!(refused(&path("none")).0.contains("No such file"));
}

/// Where the system has no way to zero a range, zeros are written.
#[test]
fn zeros_can_be_written_by_hand() {
    let file = file(400);
    let volume = open(&file, false);
    volume.write_zeros(Span { offset: 512, bytes: 300 * 512, unmap: false }).unwrap();
    let mut expected = contents(400);
    expected[512..301 * 512].fill(0);
    assert_eq!(std::fs::read(file.path()).unwrap(), expected);
}

/// A volume that shrinks under the guest gives errors, not old memory.
#[test]
fn what_is_not_there_any_more_is_an_error() {
    for which in backends() {
        let mut bench = Bench::new(which);
        bench.file.as_file().set_len(3 * 512).unwrap();
        let read = |sector, room| Ask { kind: IN, sector, room, ..Ask::default() };
        assert_eq!(bench.ask(read(10, 512)), (IOERR, 0), "{which:?}");
        assert_eq!(bench.ask(read(2, 1024)), (IOERR, 0), "cut in the middle, {which:?}");
        assert_eq!(bench.ask(read(2, 512)), (OK, 513));
    }
}

/// A system without io_uring (here: one that refuses a ring of this size) has the thread.
#[test]
fn where_io_uring_is_refused_a_thread_works() {
    let jobs_max = 1 << 20;
    let volume = open(&file(1), false);
    assert!(Uring::new(&volume, jobs_max).is_err());
    let mut bench =
        Bench::with(file(SECTORS), false, |volume| backend::best(volume, jobs_max).unwrap());
    assert_eq!(bench.read(4, 4), contents(8)[4 * 512..]);
}
