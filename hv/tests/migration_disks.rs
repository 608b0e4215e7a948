//! Disks that travel with their machine, over real TCP: real files, a guest that writes them all
//! the time. Whatever happens, one side has the disk as the guest left it, and only that side can
//! write it.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::disk::{self, DISK_BYTES, content, file};
use common::{FakeVm, Habits, Runners};
use drover_hv::machine::migratable::{MigratableDisk, MigratableVm};
use drover_hv::migration::{
    DestinationConfig, DestinationControl, DestinationOutcome, Handover, Incoming, Limits,
    MigrationError, Shape, SourceConfig, SourceControl, SourceOutcome, source,
};
use drover_hv::virtio::blk::{Volume, VolumeError};
use drover_proto::agent::v1::ObservedMigration;
use drover_proto::v1::{MigrationPhase, MigrationReport};
use tempfile::TempDir;

const EPOCH: u64 = 5;
/// Most connections here. (One, where a test's own words are the other side.)
const CONNECTIONS: u16 = 3;
const BUSY: Habits = Habits { hot_pages: 64, rest: Duration::from_micros(300) };
/// Longest time that anything here may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two nodes: a directory each, and one that both see.
struct Nodes {
    dir: TempDir,
    runners: Runners,
}

impl Nodes {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        for name in ["here", "there", "both", "state"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        Self { dir, runners: Runners::default() }
    }

    fn path(&self, node: &str, name: &str) -> PathBuf {
        self.dir.path().join(node).join(name)
    }

    /// A root disk with content, and a seed that the guest only reads. The destination's have
    /// content of before.
    fn local(&self, node: &str) -> Vec<MigratableDisk> {
        let old = if node == "here" { 0x11 } else { 0xee };
        let (root, seed) = (self.path(node, "root"), self.path(node, "seed"));
        file(&root, old);
        file(&seed, old ^ 1);
        let incoming = node != "here";
        vec![disk::disk(&root, false, false, incoming), disk::disk(&seed, true, false, incoming)]
    }

    fn shared(&self, incoming: bool) -> Vec<MigratableDisk> {
        vec![disk::disk(&self.path("both", "root"), false, true, incoming)]
    }

    fn source(&self, disks: Vec<MigratableDisk>) -> FakeVm {
        FakeVm::running_with_disks(&self.runners, BUSY, disks)
    }

    fn destination(&self, disks: Vec<MigratableDisk>) -> Destination {
        let incoming = Incoming::bind("127.0.0.1:0").unwrap();
        let address = incoming.address().to_owned();
        let control = DestinationControl::new(EPOCH).unwrap();
        let mut vm = FakeVm::with_disks(&self.runners, BUSY, disks);
        let its_control = control.clone();
        let thread = std::thread::spawn(move || {
            let (migration_id, token) = ("m".into(), "secret".into());
            let (shape, connections) = (vm.shape(), CONNECTIONS);
            let config = DestinationConfig { migration_id, token, shape, connections };
            let outcome = incoming.run(&mut vm, &config, &its_control, &mut |_| {});
            (vm, outcome)
        });
        Destination { address, control, thread }
    }

    fn config(&self, address: &str, shape: Shape) -> SourceConfig {
        SourceConfig {
            migration_id: "m".into(),
            token: "secret".into(),
            address: address.into(),
            to_epoch: EPOCH,
            limits: Limits::from_request(None, shape.memory_bytes, shape.disk_bytes()).unwrap(),
            connections: CONNECTIONS,
            state_dir: self.dir.path().join("state"),
            shape,
        }
    }

    fn send(&self, vm: &mut FakeVm, address: &str) -> (SourceOutcome, MigrationReport) {
        let config = self.config(address, vm.shape());
        send(vm, &config)
    }

    fn handed_over(&self) -> bool {
        Handover::read(&self.dir.path().join("state")).unwrap().is_some()
    }
}

struct Destination {
    address: String,
    control: DestinationControl,
    thread: std::thread::JoinHandle<(FakeVm, DestinationOutcome)>,
}

fn send(vm: &mut FakeVm, config: &SourceConfig) -> (SourceOutcome, MigrationReport) {
    let mut last = MigrationReport::default();
    let mut observer = |seen: &ObservedMigration| last = seen.report.clone().unwrap_or_default();
    let outcome = source::run(vm, config, &SourceControl::new(), &mut observer);
    (outcome, last)
}

fn is_locked(path: &Path) -> bool {
    matches!(Volume::open(path, true), Err(VolumeError::Busy { .. }))
}

/// The guest goes on where it was, with its disks, and nobody notes what it writes.
fn goes_on(vm: &mut FakeVm) {
    assert!(vm.is_running());
    for disk in vm.disks() {
        assert!(disk.volume.is_open() && !disk.volume.tracker().is_on());
    }
    let (before, deadline) = (vm.writes(), Instant::now() + PATIENCE);
    while vm.writes() == before {
        assert!(Instant::now() < deadline, "the guest stands still");
        std::thread::yield_now();
    }
}

#[test]
fn a_machine_moves_with_its_disks_while_it_writes_them() {
    let nodes = Nodes::new();
    let mut vm = nodes.source(nodes.local("here"));
    let there = nodes.destination(nodes.local("there"));
    let (outcome, report) = nodes.send(&mut vm, &there.address);
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    let (mut moved, outcome) = there.thread.join().unwrap();
    assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
    assert!(moved.is_running() && !vm.is_running());
    // The source's right to write is gone, the destination's is not.
    let writes = moved.writes();
    goes_on(&mut moved);
    assert!(moved.writes() > writes);
    for name in ["root", "seed"] {
        assert!(!is_locked(&nodes.path("here", name)) && is_locked(&nodes.path("there", name)));
    }
    assert!(vm.disks().iter().all(|disk| disk.volume.write_at(&[0; 512], 0).is_err()));
    assert_eq!(content(&nodes.path("here", "seed")), content(&nodes.path("there", "seed")));

    assert_eq!(report.disk_bytes_total, 2 * DISK_BYTES);
    assert!(report.disk_bytes_sent > 0 && report.disk_zero_bytes > DISK_BYTES, "{report:?}");
    assert!(report.disk_rounds >= 2 && report.bytes_sent > report.disk_bytes_sent, "{report:?}");
}

/// Byte for byte what the disks held in the pause. Many times, as it is a race between the copy
/// and the guest's writes.
#[test]
fn the_copy_is_the_disk_of_the_pause() {
    for _ in 0..8 {
        let nodes = Nodes::new();
        let mut vm = nodes.source(nodes.local("here"));
        let there = nodes.destination(nodes.local("there"));
        let (outcome, _) = nodes.send(&mut vm, &there.address);
        assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
        let (moved, _) = there.thread.join().unwrap();
        assert_eq!(vm.disks_then.len(), 2);
        assert!(vm.disks_then == moved.disks_then, "a block was lost");
        assert!(vm.memory_then == moved.memory_then, "a page was lost");
        assert!(vm.disks_then[0].len() as u64 == DISK_BYTES);
    }
}

/// Both nodes see the volume: nothing is copied, and it is open at one side at a time.
#[test]
fn a_shared_disk_changes_hands_and_is_not_copied() {
    let nodes = Nodes::new();
    let path = nodes.path("both", "root");
    file(&path, 0x11);
    let mut vm = nodes.source(nodes.shared(false));
    let there = nodes.destination(nodes.shared(true));
    let (outcome, report) = nodes.send(&mut vm, &there.address);
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    let (mut moved, outcome) = there.thread.join().unwrap();
    assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
    goes_on(&mut moved);
    assert!(is_locked(&path) && !vm.disks()[0].volume.is_open());
    assert_eq!((report.disk_bytes_total, report.disk_bytes_sent, report.disk_rounds), (0, 0, 0));
    drop(vm);
    assert!(is_locked(&path), "the source took the destination's lock along");
}

/// In the middle of the first pass, which may take hours: at once, and the guest writes on. The
/// next attempt begins anew and moves it whole.
#[test]
fn a_cancelled_disk_migration_leaves_no_trace() {
    let nodes = Nodes::new();
    let mut vm = nodes.source(nodes.local("here"));
    let there = nodes.destination(nodes.local("there"));
    let mut slow = nodes.config(&there.address, vm.shape());
    slow.limits.bandwidth_max = 200 << 10;
    let control = SourceControl::new();
    let canceller = control.clone();
    let (mut cancelled_at, mut phases) = (None, Vec::new());
    let mut observer = |observed: &ObservedMigration| {
        let report = observed.report.clone().unwrap_or_default();
        phases.push(report.phase());
        if report.disk_bytes_sent > 0 && cancelled_at.is_none() {
            canceller.cancel().unwrap();
            cancelled_at = Some(Instant::now());
        }
    };
    let outcome = source::run(&mut vm, &slow, &control, &mut observer);
    assert!(matches!(outcome, SourceOutcome::Failed(MigrationError::Cancelled)), "{outcome:?}");
    assert!(cancelled_at.unwrap().elapsed() < Duration::from_secs(1));
    assert!(phases.contains(&MigrationPhase::CopyingDisks), "{phases:?}");
    goes_on(&mut vm);
    let (never, outcome) = there.thread.join().unwrap();
    assert!(matches!(outcome, DestinationOutcome::Failed(_)), "{outcome:?}");
    drop(never);
    assert!(!is_locked(&nodes.path("there", "root")), "its agent cannot delete it");

    let there = nodes.destination(nodes.local("there"));
    let (outcome, _) = nodes.send(&mut vm, &there.address);
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    let (moved, _) = there.thread.join().unwrap();
    assert!(vm.disks_then == moved.disks_then, "a block was lost");
}

/// The cable is cut, or the other side killed, after each answer and in the middle of blocks.
#[test]
fn a_cut_link_leaves_the_disks_in_one_place() {
    let mut endings = std::collections::BTreeSet::new();
    // Answers: WELCOME 15, ROUND_ACK 32 each, REHEARSED, READY and RUNNING 12.
    let cuts = (0..18).map(|n| (u64::MAX, 12 * n + 1));
    let middles = [100, 5000, 200_000, 1_500_000].map(|bytes| (bytes, u64::MAX));
    for (there_max, back_max) in cuts.chain(middles) {
        for shared in [false, true] {
            let nodes = Nodes::new();
            file(&nodes.path("both", "root"), 0x11);
            let disks = |node: &str| match shared {
                true => nodes.shared(node != "here"),
                false => nodes.local(node),
            };
            let mut vm = nodes.source(disks("here"));
            let there = nodes.destination(disks("there"));
            let cables = common::cable::proxy(&there.address, there_max, back_max);
            let (outcome, _) = nodes.send(&mut vm, &cables.address);
            match outcome {
                SourceOutcome::Succeeded => {
                    endings.insert("moved");
                    let (mut moved, outcome) = there.thread.join().unwrap();
                    assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
                    goes_on(&mut moved);
                }
                SourceOutcome::Failed(_) => {
                    endings.insert("stayed");
                    goes_on(&mut vm);
                    assert!(!nodes.handed_over());
                    there.control.end();
                    let (never, outcome) = there.thread.join().unwrap();
                    assert!(matches!(outcome, DestinationOutcome::Failed(_)));
                    let closed = never.disks().iter().all(|disk| !disk.volume.is_open());
                    assert!(!shared || closed, "the destination opened what the source has");
                }
                SourceOutcome::HandedOver(_) => {
                    assert!(!vm.is_running() && nodes.handed_over());
                    assert!(vm.disks().iter().all(|disk| !disk.volume.is_open()));
                    // The controller decides for the destination, which may run already.
                    let _ = there.control.take_over(EPOCH + 1);
                    let (mut moved, outcome) = there.thread.join().unwrap();
                    assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
                    goes_on(&mut moved);
                    assert!(shared || vm.disks_then == moved.disks_then, "a block was lost");
                    // Had it decided otherwise, the source would have had to take the locks first.
                    let locked = vm.disks()[0].volume.reopen();
                    assert_eq!(locked.is_err(), shared, "two VMMs can write the volume");
                    endings.insert("handed over");
                }
                SourceOutcome::Broken(error) => panic!("{error}"),
            }
        }
    }
    assert!(endings.len() == 3, "{endings:?}");
}

/// Refused before anything is copied: what lies at the destination is untouched.
#[test]
fn disks_that_do_not_fit_are_refused() {
    type Change = fn(&mut Shape);
    let cases: [(Change, &str); 4] = [
        (|s| s.disks[0].bytes += 512, "disks[0].bytes: 6291968; accepted: 6291456"),
        (|s| s.disks[1].serial = "x".into(), "disks[1].serial: \"x\"; accepted: \"seed\""),
        (|s| s.disks[1].shared = true, "disks[1].shared: true; accepted: false"),
        (|s| drop(s.disks.pop()), "disks: 1; accepted: 2"),
    ];
    for (change, why) in cases {
        let nodes = Nodes::new();
        let mut vm = nodes.source(nodes.local("here"));
        let there = nodes.destination(nodes.local("there"));
        let before = content(&nodes.path("there", "root"));
        let mut config = nodes.config(&there.address, vm.shape());
        change(&mut config.shape);
        let (outcome, report) = send(&mut vm, &config);
        let SourceOutcome::Failed(error) = outcome else { panic!("{outcome:?}") };
        assert_eq!(error.to_string(), format!("the destination refused: {why}"));
        assert_eq!((report.disk_bytes_sent, report.pages_sent), (0, 0));
        goes_on(&mut vm);
        there.thread.join().unwrap();
        assert!(content(&nodes.path("there", "root")) == before, "half done");
    }
}

/// A guest that writes its disk faster than it goes over stays where it is, within the limits.
#[test]
fn a_disk_that_is_written_too_fast_stays() {
    let nodes = Nodes::new();
    let mut vm = nodes.source(nodes.local("here"));
    let there = nodes.destination(nodes.local("there"));
    let mut tight = nodes.config(&there.address, vm.shape());
    tight.limits.downtime = Duration::from_millis(10);
    tight.limits.rounds_max = 4;
    tight.limits.bandwidth_max = 10 << 20;
    let (outcome, report) = send(&mut vm, &tight);
    let SourceOutcome::Failed(MigrationError::Limits(why)) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("4 passes (limits.rounds_max)"), "{why}");
    assert_eq!((report.stop_reason.as_str(), report.pause_us), ("ROUNDS", 0));
    goes_on(&mut vm);
    assert!(matches!(there.thread.join().unwrap().1, DestinationOutcome::Failed(_)));
}

/// The first pass ends with the time that was given, not with the disk.
#[test]
fn time_runs_out_in_the_middle_of_a_disk() {
    let nodes = Nodes::new();
    let mut vm = nodes.source(nodes.local("here"));
    let there = nodes.destination(nodes.local("there"));
    let mut slow = nodes.config(&there.address, vm.shape());
    slow.limits.bandwidth_max = 1 << 20;
    slow.limits.total_time = Duration::from_millis(300);
    let began = Instant::now();
    let (outcome, report) = send(&mut vm, &slow);
    let SourceOutcome::Failed(MigrationError::Limits(why)) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("300ms (limits.total_time)"), "{why}");
    assert_eq!(report.stop_reason, "TIME");
    assert!(began.elapsed() < PATIENCE / 3);
    goes_on(&mut vm);
    there.thread.join().unwrap();
}

/// What the node's disk does not give fails the migration, and not the guest.
#[test]
fn a_disk_that_cannot_be_read_stays() {
    let nodes = Nodes::new();
    let mut vm = nodes.source(nodes.local("here"));
    let there = nodes.destination(nodes.local("there"));
    let seed = std::fs::OpenOptions::new().write(true).open(nodes.path("here", "seed")).unwrap();
    seed.set_len(DISK_BYTES / 2 - 512).unwrap();
    let (outcome, _) = nodes.send(&mut vm, &there.address);
    let SourceOutcome::Failed(error) = outcome else { panic!("{outcome:?}") };
    assert!(error.to_string().starts_with("disks[1]: reading it: "), "{error}");
    goes_on(&mut vm);
    let (_, outcome) = there.thread.join().unwrap();
    let DestinationOutcome::Failed(error) = outcome else { panic!("{outcome:?}") };
    assert!(error.to_string().contains("gave up: disks[1]: reading it"), "{error}");
}

/// A destination whose disk is not known to be zero has to look at every byte of the holes that a
/// few bytes tell of: it is asked on the way whether it is still there.
#[test]
fn a_disk_of_holes_does_not_run_ahead_of_its_copy() {
    let nodes = Nodes::new();
    let (here, there) = (nodes.path("here", "root"), nodes.path("there", "root"));
    // 160 MiB of nothing.
    for path in [&here, &there] {
        std::fs::File::create(path).unwrap().set_len(160 << 20).unwrap();
    }
    let mut disk = disk::disk(&here, true, false, false);
    disk.serial = "root".into();
    let mut vm = nodes.source(vec![disk]);
    // The protocol's own words: what a source says of holes, and what it waits for.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let destination = std::thread::spawn(move || holes_until_asked(&listener));
    let (outcome, _) = nodes.send(&mut vm, &address);
    assert!(matches!(outcome, SourceOutcome::Failed(_)), "{outcome:?}");
    goes_on(&mut vm);
    let told = destination.join().unwrap();
    assert!(told.len() >= 4 && told.iter().all(|bytes| *bytes <= 64 << 20), "{told:?}");
}

/// A destination that says its disk is not zero; how much it is told of between two questions.
fn holes_until_asked(listener: &std::net::TcpListener) -> Vec<u64> {
    use drover_hv::migration::wire::{EXTENT_BYTES, header, parse_header};
    use drover_hv::migration::wire::{Kind, Sent, decode_extents, decode_round, encode_welcome};
    use std::io::{Read, Write};
    let (mut link, _) = listener.accept().unwrap();
    link.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut told, mut now, mut all) = (Vec::new(), 0, Sent::default());
    loop {
        let mut bytes = [0; 12];
        link.read_exact(&mut bytes).unwrap();
        let (kind, length) = parse_header(bytes).unwrap();
        let mut payload = vec![0; length];
        link.read_exact(&mut payload).unwrap();
        match kind {
            Kind::Hello => {
                let welcome = encode_welcome(&[false]);
                link.write_all(&header(Kind::Welcome, welcome.len())).unwrap();
                link.write_all(&welcome).unwrap();
            }
            Kind::Disk => {
                let count = u32::from_le_bytes(payload[..4].try_into().unwrap()) as usize;
                let table = &payload[4..4 + count * EXTENT_BYTES];
                let data = payload.len() - 4 - table.len();
                for extent in decode_extents(table, count, data).unwrap() {
                    now += extent.bytes;
                    all.disk_bytes += extent.bytes;
                }
            }
            Kind::Round => {
                assert_eq!(decode_round(&payload).unwrap().1, all);
                told.push(std::mem::take(&mut now));
                link.write_all(&header(Kind::RoundAck, payload.len())).unwrap();
                link.write_all(&payload).unwrap();
            }
            // Enough was seen.
            _ => return told,
        }
    }
}
