//! The migration's shells over real TCP, with machines of plain memory: whatever happens to the
//! link, the guest runs in one place at most, and its memory is whole.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::cable::{Cables, End, Fate, cables, proxy};
use common::{FakeVm, Habits, Runners, shape};
use drover_hv::machine::migratable::MigratableVm;
use drover_hv::migration::{
    ControlError, DestinationConfig, DestinationControl, DestinationOutcome, Handover, Incoming,
    Limits, MigrationError, SourceConfig, SourceControl, SourceOutcome, remove_handover, source,
};
use drover_proto::agent::v1::{MigrationProgress, ObservedMigration};
use tempfile::TempDir;

const EPOCH: u64 = 5;
/// Most connections here, unless a test says otherwise.
const CONNECTIONS: u16 = 3;
/// Longest time that anything here may take.
const PATIENCE: Duration = Duration::from_secs(40);
const CALM: Habits = Habits { hot_pages: 64, rest: Duration::from_micros(50) };
/// It writes everywhere, and still converges.
const BUSY: Habits = Habits { hot_pages: common::PAGES, rest: Duration::from_micros(50) };
/// More than goes over: never converges with a tight limit.
const WILD: Habits = Habits { hot_pages: common::PAGES, rest: Duration::ZERO };

fn limits() -> Limits {
    Limits::from_request(None, shape().memory_bytes, 0).unwrap()
}

/// A destination on a thread of its own.
struct Destination {
    address: String,
    control: DestinationControl,
    thread: std::thread::JoinHandle<(FakeVm, DestinationOutcome, Vec<MigrationProgress>)>,
}

fn destination(runners: &Runners, change: impl FnOnce(&mut FakeVm)) -> Destination {
    destination_with(runners, CONNECTIONS, change)
}

fn destination_with(
    runners: &Runners,
    connections: u16,
    change: impl FnOnce(&mut FakeVm),
) -> Destination {
    let incoming = Incoming::bind("127.0.0.1:0").unwrap();
    let address = incoming.address().to_owned();
    let control = DestinationControl::new(EPOCH).unwrap();
    let mut vm = FakeVm::new(runners, CALM);
    change(&mut vm);
    let its_control = control.clone();
    let thread = std::thread::spawn(move || {
        let (migration_id, token) = ("m".into(), "secret".into());
        let config = DestinationConfig { migration_id, token, shape: shape(), connections };
        let mut seen = Vec::new();
        let mut observer = |observed: &ObservedMigration| seen.push(observed.progress());
        let outcome = incoming.run(&mut vm, &config, &its_control, &mut observer);
        (vm, outcome, seen)
    });
    Destination { address, control, thread }
}

fn config(address: &str, dir: &TempDir) -> SourceConfig {
    SourceConfig {
        migration_id: "m".into(),
        token: "secret".into(),
        address: address.into(),
        to_epoch: EPOCH,
        limits: limits(),
        connections: CONNECTIONS,
        state_dir: dir.path().into(),
        shape: shape(),
    }
}

fn send(vm: &mut FakeVm, config: &SourceConfig) -> (SourceOutcome, ObservedMigration) {
    let mut last = ObservedMigration::default();
    let mut observer = |observed: &ObservedMigration| last = observed.clone();
    let outcome = source::run(vm, config, &SourceControl::new(), &mut observer);
    (outcome, last)
}

#[test]
fn a_running_machine_moves_whole() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, CALM);
    let there = destination(&runners, |_| {});
    let (outcome, last) = send(&mut vm, &config(&there.address, &dir));
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    let (mut moved, outcome, seen) = there.thread.join().unwrap();
    assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
    assert!(moved.is_running() && !vm.is_running());
    assert_eq!((moved.announced, moved.restores), (1, 2), "a rehearsal, then the state");
    assert_eq!((moved.attracted, vm.announced), (1, 0));

    moved.pause().unwrap();
    assert!(moved.writes() >= vm.writes(), "the guest's own count went back");
    // What it wrote there since is in its hot pages.
    let hot = (CALM.hot_pages * 4096) as usize;
    assert_eq!(moved.contents()[hot..], vm.contents()[hot..]);
    assert!(moved.memory_then == vm.memory_then, "a page was lost");

    let handover = Handover { migration_id: "m".into(), to_epoch: EPOCH };
    assert_eq!(Handover::read(dir.path()).unwrap(), Some(handover));
    assert_eq!(last.progress(), MigrationProgress::Succeeded);
    let report = last.report.unwrap();
    assert_eq!(report.stop_reason, "CONVERGED");
    assert!(report.pause_us > 0 && report.pause_us <= report.total_us, "{report:?}");
    assert!(report.rounds >= 2 && report.zero_pages > common::PAGES / 2, "{report:?}");
    use MigrationProgress::{Copying, Listening, Ready, Succeeded};
    assert_eq!(seen, [Listening, Listening, Copying, Ready, Succeeded]);
}

/// The final content, page for page, when the guest stops writing with the pause.
#[test]
fn memory_at_the_destination_is_that_of_the_pause() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    for _ in 0..5 {
        let mut vm = FakeVm::running(&runners, CALM);
        let there = destination(&runners, |vm| vm.fail_restore = true);
        let (outcome, _) = send(&mut vm, &config(&there.address, &dir));
        // The restore fails behind the last page: the source goes on, the pages are all there.
        assert!(
            matches!(outcome, SourceOutcome::Failed(MigrationError::Aborted(_))),
            "{outcome:?}"
        );
        let (copy, outcome, _) = there.thread.join().unwrap();
        assert!(matches!(outcome, DestinationOutcome::Failed(_)));
        assert!(vm.is_running() && !copy.is_running());
        vm.pause().unwrap();
        let hot = (CALM.hot_pages * 4096) as usize;
        assert_eq!(copy.contents()[hot..], vm.contents()[hot..]);
        assert_eq!(Handover::read(dir.path()).unwrap(), None);
    }
}

#[test]
fn a_stranger_is_refused_and_the_source_still_gets_in() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, CALM);
    let there = destination(&runners, |_| {});
    let wrong = SourceConfig { token: "guess".into(), ..config(&there.address, &dir) };
    let (outcome, _) = send(&mut vm, &wrong);
    let SourceOutcome::Failed(error) = outcome else { panic!("{outcome:?}") };
    assert_eq!(error.to_string(), "the destination refused: this migration is not expected here");
    let mut garbage = TcpStream::connect(&there.address).unwrap();
    garbage.write_all(&[0xee; 5000]).unwrap();
    let _ = garbage.read_to_end(&mut Vec::new());
    assert!(vm.is_running());
    let (outcome, _) = send(&mut vm, &config(&there.address, &dir));
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    assert!(matches!(there.thread.join().unwrap().1, DestinationOutcome::Running));
}

#[test]
fn another_shape_is_refused_before_anything_is_copied() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, CALM);
    let there = destination(&runners, |_| {});
    let mut wrong = config(&there.address, &dir);
    wrong.shape.cpu_features[0].bits = 7;
    let (outcome, last) = send(&mut vm, &wrong);
    let SourceOutcome::Failed(error) = outcome else { panic!("{outcome:?}") };
    assert!(error.to_string().contains("CPUID 0x7.0 ebx lacks bits 0x00000004"), "{error}");
    assert_eq!(last.report.unwrap().pages_sent, 0);
    assert!(vm.is_running());
    assert!(matches!(there.thread.join().unwrap().1, DestinationOutcome::Failed(_)));
}

#[test]
fn a_guest_that_writes_too_fast_stays_where_it_is() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, WILD);
    let there = destination(&runners, |_| {});
    let mut tight = config(&there.address, &dir);
    tight.limits.downtime = Duration::from_millis(10);
    tight.limits.rounds_max = 3;
    tight.limits.bandwidth_max = 20 << 20;
    let (outcome, last) = send(&mut vm, &tight);
    let SourceOutcome::Failed(MigrationError::Limits(why)) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("3 passes (limits.rounds_max)"), "{why}");
    let report = last.report.unwrap();
    assert_eq!((report.stop_reason.as_str(), report.pause_us), ("ROUNDS", 0));
    assert!(vm.is_running());
    let (_, outcome, _) = there.thread.join().unwrap();
    assert!(
        matches!(outcome, DestinationOutcome::Failed(MigrationError::Aborted(_))),
        "{outcome:?}"
    );
}

/// Cancelled in the middle of a slow copy: at once, and the next attempt moves it whole.
#[test]
fn a_cancelled_migration_leaves_no_trace() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, CALM);
    let there = destination(&runners, |_| {});
    let mut slow = config(&there.address, &dir);
    slow.limits.bandwidth_max = 1 << 20;
    let control = SourceControl::new();
    let canceller = control.clone();
    let mut cancelled_at = None;
    let mut observer = |observed: &ObservedMigration| {
        if observed.report.as_ref().is_some_and(|r| r.pages_sent > 0) && cancelled_at.is_none() {
            canceller.cancel().unwrap();
            cancelled_at = Some(std::time::Instant::now());
        }
    };
    let outcome = source::run(&mut vm, &slow, &control, &mut observer);
    assert!(matches!(outcome, SourceOutcome::Failed(MigrationError::Cancelled)), "{outcome:?}");
    assert!(cancelled_at.unwrap().elapsed() < Duration::from_secs(1));
    assert!(vm.is_running());
    assert!(matches!(there.thread.join().unwrap().1, DestinationOutcome::Failed(_)));

    let there = destination(&runners, |_| {});
    let (outcome, _) = send(&mut vm, &config(&there.address, &dir));
    assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
    let (mut moved, _, _) = there.thread.join().unwrap();
    moved.pause().unwrap();
    let hot = (CALM.hot_pages * 4096) as usize;
    assert_eq!(moved.contents()[hot..], vm.contents()[hot..]);
}

/// The cable is cut after every possible answer of the destination, and in the middle of pages:
/// either the source runs, or it has handed over; never both.
#[test]
fn a_cut_link_leaves_the_guest_in_one_place() {
    let dir = TempDir::new().unwrap();
    // Answers: WELCOME 13, REHEARSED 12, ROUND_ACK 32 each, READY 12, RUNNING 12.
    let mut endings = std::collections::BTreeSet::new();
    let mut attracted = 0;
    let cuts = (0..15).map(|n| (u64::MAX, 12 * n + 1));
    let middles = [100, 5000, 300_000, 900_000].map(|bytes| (bytes, u64::MAX));
    for (there_max, back_max) in cuts.chain(middles) {
        let runners = Runners::default();
        let mut vm = FakeVm::running(&runners, CALM);
        let there = destination(&runners, |_| {});
        let cables = proxy(&there.address, there_max, back_max);
        let (outcome, _) = send(&mut vm, &config(&cables.address, &dir));
        match outcome {
            SourceOutcome::Succeeded => {
                endings.insert("moved");
                assert!(matches!(there.thread.join().unwrap().1, DestinationOutcome::Running));
            }
            SourceOutcome::Failed(_) => {
                endings.insert("stayed");
                assert!(vm.is_running());
                assert_eq!(Handover::read(dir.path()).unwrap(), None);
                // One that is READY waits for the controller, which knows better.
                there.control.end();
                let (never, outcome, _) = there.thread.join().unwrap();
                assert!(matches!(outcome, DestinationOutcome::Failed(_)));
                assert!(vm.announced >= never.attracted, "the guest's frames go elsewhere");
                attracted += never.attracted;
            }
            SourceOutcome::HandedOver(_) => {
                endings.insert("handed over");
                assert!(!vm.is_running());
                assert!(Handover::read(dir.path()).unwrap().is_some());
                // The controller decides for the destination, which may run already.
                match there.control.take_over(EPOCH + 1) {
                    Ok(()) | Err(ControlError::NotReady) => {}
                    Err(other) => panic!("{other}"),
                }
                let (moved, outcome, _) = there.thread.join().unwrap();
                assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
                assert!(moved.is_running());
            }
            SourceOutcome::Broken(error) => panic!("{error}"),
        }
        remove_handover(dir.path()).unwrap();
    }
    assert!(attracted > 0, "none was cut inside the pause");
    assert!(endings.contains("stayed") && endings.contains("handed over"), "{endings:?}");
}

#[test]
fn a_destination_that_is_not_ready_does_not_take_over() {
    let control = DestinationControl::new(EPOCH).unwrap();
    assert_eq!(control.take_over(EPOCH + 1), Err(ControlError::NotReady));
}

#[test]
fn a_state_directory_that_cannot_be_written_fails_before_the_pause() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, CALM);
    let there = destination(&runners, |_| {});
    let mut wrong = config(&there.address, &dir);
    wrong.state_dir = dir.path().join("is/not/there");
    let (outcome, last) = send(&mut vm, &wrong);
    assert!(matches!(outcome, SourceOutcome::Failed(MigrationError::Handover(_))), "{outcome:?}");
    assert_eq!(last.report.unwrap().pause_us, 0);
    assert!(vm.is_running());
    there.thread.join().unwrap();
}

/// A guest that writes all of its memory, and passes that are spread over connections: each page
/// at the destination is that of the pause, however many there are; and with a side that wants
/// fewer, or an older one that knows of one, there are fewer.
#[test]
fn memory_is_whole_over_any_number_of_connections() {
    let dir = TempDir::new().unwrap();
    for (here, there_max, made) in [(1, 1, 1), (4, 1, 1), (1, 4, 1), (4, 2, 2), (4, 4, 4)] {
        for _ in 0..3 {
            let runners = Runners::default();
            let mut vm = FakeVm::running(&runners, BUSY);
            let there = destination_with(&runners, there_max, |_| {});
            let cables = uncut(&there.address);
            let mut config = config(&cables.address, &dir);
            config.connections = here;
            config.limits.downtime = Duration::from_secs(1);
            let (outcome, _) = send(&mut vm, &config);
            assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
            let (moved, outcome, _) = there.thread.join().unwrap();
            assert!(matches!(outcome, DestinationOutcome::Running), "{outcome:?}");
            assert!(moved.memory_then == vm.memory_then, "a page was lost");
            assert_eq!(cables.made.load(Ordering::SeqCst), made, "{here} and {there_max}");
            remove_handover(dir.path()).unwrap();
        }
    }
}

fn uncut(to: &str) -> Cables {
    proxy(to, u64::MAX, u64::MAX)
}

/// Any one connection's end is the end of the attempt, before it has begun, in its middle, and on
/// the way back: the guest goes on here, and the next attempt moves it.
#[test]
fn the_end_of_any_connection_fails_the_attempt() {
    let dir = TempDir::new().unwrap();
    // JOIN is 29 bytes, its answer 12; behind them it is chance how much each is given.
    let there = [1, 28, 30, 5000, 300_000].map(|bytes| (bytes, u64::MAX));
    let back = [1, 11].map(|bytes| (u64::MAX, bytes));
    let mut in_the_middle = 0;
    for (there_max, back_max) in there.into_iter().chain(back) {
        for connection in 1..usize::from(CONNECTIONS) {
            let runners = Runners::default();
            let mut vm = FakeVm::running(&runners, BUSY);
            let there = destination(&runners, |_| {});
            let fate = Fate { connection, there_max, back_max, end: End::Cut };
            let cables = cables(&there.address, fate);
            let began = Instant::now();
            let (outcome, _) = send(&mut vm, &config(&cables.address, &dir));
            let there = there.thread.join().unwrap();
            let late = there_max >= 30 && back_max == u64::MAX;
            if late && matches!(outcome, SourceOutcome::Succeeded) {
                assert!(matches!(there.1, DestinationOutcome::Running));
                assert!(there.0.memory_then == vm.memory_then, "a page was lost");
            } else {
                assert!(matches!(outcome, SourceOutcome::Failed(_)), "{fate:?}: {outcome:?}");
                in_the_middle += u32::from(late);
                assert!(began.elapsed() < PATIENCE / 4, "{fate:?}: it was not noticed");
                assert!(vm.is_running());
                assert!(matches!(there.1, DestinationOutcome::Failed(_)), "{:?}", there.1);
                let again = destination(&runners, |_| {});
                let (outcome, _) = send(&mut vm, &config(&again.address, &dir));
                assert!(matches!(outcome, SourceOutcome::Succeeded), "{outcome:?}");
                let (moved, _, _) = again.thread.join().unwrap();
                assert!(moved.memory_then == vm.memory_then, "a page was lost");
            }
            remove_handover(dir.path()).unwrap();
        }
    }
    assert!(in_the_middle > 0, "none was cut in the middle of pages");
}

/// One connection goes silent in the middle of what it carries, and the others go on: it is
/// noticed when its time is over, and the guest goes on.
#[test]
fn a_connection_that_goes_silent_is_noticed() {
    let (runners, dir) = (Runners::default(), TempDir::new().unwrap());
    let mut vm = FakeVm::running(&runners, BUSY);
    let there = destination(&runners, |_| {});
    let (connection, end) = (1, End::Silent);
    let fate = Fate { connection, there_max: 5000, back_max: u64::MAX, end };
    let cables = cables(&there.address, fate);
    let began = Instant::now();
    let (outcome, _) = send(&mut vm, &config(&cables.address, &dir));
    assert!(matches!(outcome, SourceOutcome::Failed(_)), "{outcome:?}");
    assert!(began.elapsed() < PATIENCE && vm.is_running());
    let (_, outcome, _) = there.thread.join().unwrap();
    assert!(matches!(outcome, DestinationOutcome::Failed(_)), "{outcome:?}");
}

/// Between WELCOME and the source's further connections strangers get in: with a wrong token, a
/// wrong index, one that is taken, other words, none at all. Each is refused, or waits by itself;
/// the attempt goes on.
#[test]
fn strangers_do_not_join() {
    use drover_hv::migration::wire::{self, Hello, Join, Kind};
    let runners = Runners::default();
    let there = destination_with(&runners, 3, |_| {});
    let mut first = Peer::connect(&there.address);
    let (migration_id, token) = ("m".to_owned(), "secret".to_owned());
    let (to_epoch, shape) = (EPOCH, shape());
    let hello = Hello { migration_id, token, to_epoch, shape }.encode();
    first.0.write_all(&wire::greeting(Kind::Hello, hello.len(), 3)).unwrap();
    first.0.write_all(&hello).unwrap();
    let (header, _) = first.read();
    assert_eq!((header[4], wire::connections(&header)), (Kind::Welcome as u8, 3));

    let silent = Peer::connect(&there.address);
    let join = |id: &str, token: &str, index| {
        let join = Join { migration_id: id.into(), token: token.into(), index }.encode();
        let mut peer = Peer::connect(&there.address);
        peer.send(Kind::Join, &join);
        let (header, payload) = peer.read();
        (peer, header[4], payload)
    };
    let refused = |id, token, index| {
        let (_, kind, payload) = join(id, token, index);
        assert_eq!(kind, Kind::Refuse as u8, "{id} {token} {index}");
        wire::decode_reason(&payload).unwrap()
    };
    let unknown = "this migration is not expected here";
    assert_eq!(refused("m", "guess", 1), unknown);
    assert_eq!(refused("another", "secret", 1), unknown);
    assert_eq!(refused("m", "secret", 0), "index: 0; accepted: one that is not taken");
    assert_eq!(refused("m", "secret", 3), "index: 3; accepted: 1 to 2");
    assert_eq!(refused("m", "secret", u16::MAX), "index: 65535; accepted: 1 to 2");
    let mut loud = Peer::connect(&there.address);
    loud.send(Kind::Hello, &hello);
    assert_eq!(loud.read().0[4], Kind::Refuse as u8);
    let mut garbage = Peer::connect(&there.address);
    garbage.0.write_all(&[0xee; 64]).unwrap();

    let (second, kind, _) = join("m", "secret", 2);
    assert_eq!(kind, Kind::Joined as u8);
    assert_eq!(refused("m", "secret", 2), "index: 2; accepted: one that is not taken");
    let (third, kind, _) = join("m", "secret", 1);
    assert_eq!(kind, Kind::Joined as u8);
    // It is complete, and goes on as ever: nothing was sent, and that is what has come.
    let round = wire::encode_round(1, wire::Sent::default());
    first.send(Kind::Round, &round);
    let (header, payload) = first.read();
    assert_eq!((header[4], payload), (Kind::RoundAck as u8, round));
    first.send(Kind::Abort, &wire::encode_reason("enough"));
    let (_, outcome, _) = there.thread.join().unwrap();
    let DestinationOutcome::Failed(error) = outcome else { panic!("{outcome:?}") };
    assert_eq!(error.to_string(), "the other side gave up: enough");
    drop((silent, second, third));
}

/// The source of a test's own words.
struct Peer(TcpStream);

impl Peer {
    fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(stream)
    }

    fn send(&mut self, kind: drover_hv::migration::wire::Kind, payload: &[u8]) {
        self.0.write_all(&drover_hv::migration::wire::header(kind, payload.len())).unwrap();
        self.0.write_all(payload).unwrap();
    }

    fn read(&mut self) -> ([u8; 12], Vec<u8>) {
        let mut header = [0; 12];
        self.0.read_exact(&mut header).unwrap();
        let (_, length) = drover_hv::migration::wire::parse_header(header).unwrap();
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload).unwrap();
        (header, payload)
    }
}
