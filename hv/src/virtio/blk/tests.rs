//! Disks as a guest's driver uses them, and as a hostile guest abuses them: on both backends, and
//! on one that answers only when the test says so.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{self, Backend, Done, Job, Threads, Uring, Work};
use super::requests::{DISCARD_SECTORS_MAX, REQUEST_BYTES_MAX, Span, ZERO_SECTORS_MAX};
use super::*;
use crate::memory::{self, GuestMemory};
use crate::pci::PciFunction;
use crate::virtio::tests::{
    BUFFERS, EVENT_IDX, MEMORY_BYTES, NEXT, TestDriver, VERSION_1, WRITE, wait_until,
};

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
const ALL: u64 = VERSION_1
    | EVENT_IDX
    | FLUSH
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    | 1 << VIRTIO_BLK_F_MQ;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_KIND: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// Sectors of most tests' volumes.
const SECTORS: usize = 64;
const QUEUES: usize = 2;
/// Guest memory of one request: header, status, what is read, what is written.
const SLOT_BYTES: u64 = 0x2_0000;
const STATUS: u64 = 0x100;
const OUTPUT: u64 = 0x1000;
const ROOM: u64 = 0x1_0000;

/// A file with something else in each sector.
fn file(sectors: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&contents(sectors)).unwrap();
    file
}

fn contents(sectors: usize) -> Vec<u8> {
    (0..sectors * 512).map(|at| (at / 512) as u8 ^ (at as u8).wrapping_mul(7)).collect()
}

fn open(file: &NamedTempFile, read_only: bool) -> Arc<Volume> {
    Arc::new(Volume::open(file.path(), read_only).unwrap())
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Uring,
    Threads,
}

/// Both backends, or the one that there is.
fn backends() -> Vec<Which> {
    let file = file(1);
    match Uring::new(&open(&file, false), 8) {
        Ok(_) => vec![Which::Uring, Which::Threads],
        Err(error) => {
            println!("io_uring is not tested here: {error}");
            vec![Which::Threads]
        }
    }
}

fn make(which: Which, volume: &Arc<Volume>) -> Box<dyn Backend> {
    match which {
        Which::Uring => Box::new(Uring::new(volume, 512).unwrap()),
        Which::Threads => {
            let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            Box::new(Threads::new(volume, Arc::new(event)))
        }
    }
}

/// A request: its type, sector, what it brings and how much room it has.
#[derive(Debug, Clone, Copy, Default)]
struct Ask<'a> {
    kind: u32,
    sector: u64,
    output: &'a [u8],
    room: u32,
}

struct Bench {
    driver: TestDriver,
    file: NamedTempFile,
}

impl Bench {
    fn new(which: Which) -> Self {
        Self::with(file(SECTORS), false, |volume| make(which, volume))
    }

    fn with(
        file: NamedTempFile,
        read_only: bool,
        backend: impl FnOnce(&Arc<Volume>) -> Box<dyn Backend>,
    ) -> Self {
        let mut bench = Self::unstarted(file, read_only, backend, None);
        let features = if read_only { VERSION_1 | FLUSH } else { ALL };
        assert_eq!(bench.driver.start(features), 15);
        bench
    }

    fn unstarted(
        file: NamedTempFile,
        read_only: bool,
        backend: impl FnOnce(&Arc<Volume>) -> Box<dyn Backend>,
        memory: Option<GuestMemory>,
    ) -> Self {
        let memory = memory.unwrap_or_else(|| memory::create(MEMORY_BYTES).unwrap());
        let volume = open(&file, read_only);
        let backend = backend(&volume);
        let blk = Blk::with_backend(backend, volume, "root-1", QUEUES, memory.clone());
        Self { driver: TestDriver::with_memory(Box::new(blk), memory), file }
    }

    /// Makes the request available, without a kick. Its chain's head is `slot * 4`.
    fn put(&mut self, queue: usize, slot: u16, ask: Ask<'_>) {
        let (base, first) = (BUFFERS + u64::from(slot) * SLOT_BYTES, slot * 4);
        let mut header = u64::from(ask.kind).to_le_bytes().to_vec();
        header.extend(ask.sector.to_le_bytes());
        let memory = self.driver.memory.clone();
        memory.write_slice(&header, GuestAddress(base)).unwrap();
        memory.write_slice(ask.output, GuestAddress(base + OUTPUT)).unwrap();
        memory.write_obj(0xffu8, GuestAddress(base + STATUS)).unwrap();
        let mut parts = vec![(base, 16, 0)];
        if !ask.output.is_empty() {
            parts.push((base + OUTPUT, ask.output.len() as u32, 0));
        }
        if ask.room > 0 {
            parts.push((base + ROOM, ask.room, WRITE));
        }
        parts.push((base + STATUS, 1, WRITE));
        let last = parts.len() as u16 - 1;
        for ((address, length, flags), index) in parts.into_iter().zip(0..) {
            let next = if index < last { NEXT } else { 0 };
            self.driver.descriptor(
                queue,
                first + index,
                (address, length, flags | next, first + index + 1),
            );
        }
        self.driver.offer(queue, first);
    }

    fn status(&self, slot: u16) -> u8 {
        let at = BUFFERS + u64::from(slot) * SLOT_BYTES + STATUS;
        self.driver.memory.read_obj(GuestAddress(at)).unwrap()
    }

    fn room(&self, slot: u16, bytes: usize) -> Vec<u8> {
        let mut room = vec![0; bytes];
        let at = BUFFERS + u64::from(slot) * SLOT_BYTES + ROOM;
        self.driver.memory.read_slice(&mut room, GuestAddress(at)).unwrap();
        room
    }

    /// One request from start to end: its status and how much was written.
    fn ask(&mut self, ask: Ask<'_>) -> (u8, u32) {
        self.put(0, 0, ask);
        self.driver.kick(0);
        let (head, written) = self.driver.wait_used(0);
        assert_eq!(head, 0);
        (self.status(0), written)
    }

    fn read(&mut self, sector: u64, sectors: u32) -> Vec<u8> {
        let ask = Ask { kind: IN, sector, room: sectors * 512, ..Ask::default() };
        assert_eq!(self.ask(ask), (OK, sectors * 512 + 1));
        self.room(0, sectors as usize * 512)
    }

    fn on_disk(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut file = self.file.reopen().unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        self.driver.device.read_window(0x2000, &mut config);
        config
    }

    fn needs_reset(&self) -> bool {
        self.driver.status() & 64 != 0
    }
}

/// One range of a discard or of zeros.
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// Jobs wait until the test lets them go.
#[derive(Clone)]
struct Gate {
    state: Arc<Mutex<GateState>>,
    event: Arc<EventFd>,
}

#[derive(Default)]
struct GateState {
    held: Vec<Job>,
    done: Vec<Done>,
    /// Calls of `submit` that find no room.
    refusals: u32,
    submitted: usize,
    /// Calls of `submit`; each round of waiting for all begins with one.
    calls: usize,
}

impl Gate {
    fn new() -> Self {
        let event = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        Self { state: Arc::default(), event }
    }

    fn held(&self) -> usize {
        self.state.lock().unwrap().held.len()
    }

    fn submitted(&self) -> usize {
        self.state.lock().unwrap().submitted
    }

    fn calls(&self) -> usize {
        self.state.lock().unwrap().calls
    }

    /// Whether the held job at `index` is this.
    fn is(&self, index: usize, what: fn(&Work) -> bool) -> bool {
        self.state.lock().unwrap().held.get(index).is_some_and(|job| what(&job.work))
    }

    fn release(&self, index: usize, result: std::io::Result<()>) {
        let mut state = self.state.lock().unwrap();
        let job = state.held.remove(index);
        state.done.push(Done { job, result });
        self.event.write(1).unwrap();
    }

    fn release_all(&self) {
        while self.held() > 0 {
            self.release(0, Ok(()));
        }
    }
}

impl Backend for Gate {
    fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
    fn in_flight(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.held.len() + state.done.len()
    }
    unsafe fn start(&mut self, job: Job) {
        self.state.lock().unwrap().held.push(job);
    }
    fn submit(&mut self) -> bool {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        if state.refusals > 0 {
            state.refusals -= 1;
            return false;
        }
        state.submitted = state.held.len();
        true
    }
    fn finished(&mut self, done: &mut Vec<Done>) {
        let _ = self.event.read();
        done.append(&mut self.state.lock().unwrap().done);
    }
}

fn gated() -> (Bench, Gate) {
    let gate = Gate::new();
    let backend = gate.clone();
    (Bench::with(file(SECTORS), false, |_| Box::new(backend)), gate)
}

#[test]
fn every_kind_of_request_does_what_it_says() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let before = contents(SECTORS);
        assert_eq!(bench.read(0, 1), before[..512], "{which:?}");
        assert_eq!(bench.read(60, 4), before[60 * 512..]);

        let data: Vec<u8> = (0..1024u32).map(|at| (at * 3) as u8).collect();
        let write = Ask { kind: OUT, sector: 5, output: &data, room: 0 };
        assert_eq!(bench.ask(write), (OK, 1));
        assert_eq!(bench.read(5, 2), data);
        assert_eq!(bench.ask(Ask { kind: FLUSH_KIND, ..Ask::default() }), (OK, 1));
        assert_eq!(bench.on_disk()[5 * 512..7 * 512], data);

        let zeroes = [range(0, 2, 0), range(8, 1, 1), range(9, 0, 0)].concat();
        let ask = Ask { kind: WRITE_ZEROES, output: &zeroes, ..Ask::default() };
        assert_eq!(bench.ask(ask), (OK, 1));
        assert_eq!(bench.read(0, 2), [0; 1024]);
        assert_eq!(bench.read(8, 1), [0; 512]);
        assert_eq!(bench.read(9, 1), before[9 * 512..10 * 512]);

        let discard = range(32, 16, 0);
        let ask = Ask { kind: DISCARD, output: &discard, ..Ask::default() };
        assert_eq!(bench.ask(ask).0, OK);
        assert_eq!(bench.on_disk()[32 * 512..48 * 512], [0; 16 * 512]);
        assert_eq!(bench.on_disk().len(), SECTORS * 512, "the file keeps its length");

        let id = Ask { kind: GET_ID, room: 20, ..Ask::default() };
        assert_eq!(bench.ask(id), (OK, 21));
        assert_eq!(bench.room(0, 20), b"root-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(bench.ask(Ask { room: 3, ..id }), (OK, 4));
        assert_eq!(bench.room(0, 3), b"roo");
        assert_eq!(bench.ask(Ask { room: 64, ..id }), (OK, 20));
        wait_until("an interrupt", || bench.driver.interrupts(0) > 0);
    }
}

#[test]
fn the_configuration_says_what_the_volume_is() {
    let bench = Bench::new(Which::Threads);
    let config = bench.config();
    let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4)), (SECTORS as u32, 0));
    assert_eq!((word(12), word(20)), (254, 512), "seg_max, blk_size");
    assert_eq!(config[34..36], [QUEUES as u8, 0]);
    assert_eq!((word(36), word(40), word(44)), (DISCARD_SECTORS_MAX, 16, 1));
    assert_eq!((word(48), word(52), config[56]), (ZERO_SECTORS_MAX, 16, 1));
    let offered = 1 << 2 | 1 << 6 | FLUSH | 1 << 12 | 1 << 13 | 1 << 14;
    assert_eq!(bench.driver.offered() & 0xff_ffff, offered);

    for (vcpus, queues) in [(1, 1), (3, 3), (8, 4)] {
        let (file, memory) = (file(1), memory::create(MEMORY_BYTES).unwrap());
        let volume = Volume::open(file.path(), false).unwrap();
        let blk = Blk::new(volume, "", vcpus, memory).unwrap();
        assert_eq!(crate::virtio::VirtioDevice::queue_sizes(&blk).len(), queues);
    }
}

/// Header, data and status may be cut into descriptors anywhere.
#[test]
fn chains_may_be_cut_anywhere() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let data: Vec<u8> = (0..512u32).map(|at| (at * 5) as u8).collect();
        bench.put(0, 0, Ask { kind: OUT, sector: 3, output: &data, room: 0 });
        let driver = &mut bench.driver;
        // Header in three parts, the last of which runs on into the data.
        let mut header = [0; 16];
        driver.memory.read_slice(&mut header, GuestAddress(BUFFERS)).unwrap();
        driver.memory.write_slice(&header[9..], GuestAddress(BUFFERS + OUTPUT - 7)).unwrap();
        driver.descriptor(0, 0, (BUFFERS, 4, NEXT, 1));
        driver.descriptor(0, 1, (BUFFERS + 4, 5, NEXT, 2));
        driver.descriptor(0, 2, (BUFFERS + OUTPUT - 7, 7 + 100, NEXT, 3));
        driver.descriptor(0, 3, (BUFFERS + OUTPUT + 100, 412, NEXT, 4));
        driver.descriptor(0, 4, (BUFFERS + STATUS, 1, WRITE, 0));
        driver.kick(0);
        driver.wait_used(0);
        assert_eq!(bench.status(0), OK);
        assert_eq!(bench.on_disk()[3 * 512..4 * 512], data);

        // The status behind the data, in one buffer.
        bench.put(0, 0, Ask { kind: IN, sector: 3, ..Ask::default() });
        bench.driver.descriptor(0, 1, (BUFFERS + ROOM, 513, WRITE, 0));
        bench.driver.kick(0);
        assert_eq!(bench.driver.wait_used(0), (0, 513));
        let room = bench.room(0, 513);
        assert_eq!((&room[..512], room[512]), (&data[..], OK));
    }
}

/// What has no place for an answer stops the device; a reset brings it back.
#[test]
fn chains_that_cannot_be_answered_stop_the_device() {
    let mut bench = Bench::new(Which::Threads);
    type Crime = fn(&mut TestDriver);
    let crimes: [Crime; 5] = [
        // No byte for the status.
        |d| d.descriptor(0, 0, (BUFFERS, 16, 0, 0)),
        // Half a header.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 8, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS + 64, 1, WRITE, 0));
        },
        // To be read behind what is to be written.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS + 64, 1, WRITE | NEXT, 2));
            d.descriptor(0, 2, (BUFFERS + 128, 512, 0, 0));
        },
        // A loop.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS + 64, 8, WRITE | NEXT, 0));
        },
        // A buffer that is longer than memory.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 16, NEXT, 1));
            d.descriptor(0, 1, (BUFFERS, u32::MAX, WRITE, 0));
        },
    ];
    for (number, crime) in crimes.into_iter().enumerate() {
        assert_eq!(bench.driver.start(ALL), 15);
        crime(&mut bench.driver);
        bench.driver.offer(0, 0);
        bench.driver.kick(0);
        wait_until(&format!("crime {number} is noticed"), || bench.needs_reset());
        assert_eq!(bench.driver.used(0), None);
    }
    assert_eq!(bench.driver.start(ALL), 15);
    assert_eq!(bench.read(1, 1), contents(2)[512..]);
    assert_eq!(bench.on_disk(), contents(SECTORS));
}

#[test]
fn what_cannot_be_done_is_answered_and_not_done() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let sectors = SECTORS as u64;
        let data = [9; 1024];
        let read = |sector, room| Ask { kind: IN, sector, room, ..Ask::default() };
        let write = |sector, output| Ask { kind: OUT, sector, output, room: 0 };
        let cases = [
            (IOERR, read(sectors, 512)),
            (IOERR, read(sectors - 1, 1024)),
            (IOERR, read(u64::MAX, 512)),
            (IOERR, read(1 << 55, 512)),
            (IOERR, read(0, 511)),
            (IOERR, Ask { output: &data, ..read(0, 512) }),
            (IOERR, write(sectors - 1, &data)),
            (IOERR, write(0, &data[..100])),
            (IOERR, Ask { room: 512, ..write(0, &data) }),
            (IOERR, Ask { kind: GET_ID, ..Ask::default() }),
            (UNSUPP, Ask { kind: 2, ..Ask::default() }),
            (UNSUPP, Ask { kind: 0xffff_ffff, output: &data, room: 512, ..Ask::default() }),
        ];
        for (status, ask) in cases {
            let written = u32::from(ask.room == 0);
            assert_eq!(bench.ask(ask), (status, written), "{which:?} {ask:?}");
        }
        let ranges = [
            (DISCARD, IOERR, range(sectors, 1, 0)),
            (DISCARD, IOERR, range(u64::MAX, 2, 0)),
            (DISCARD, IOERR, range(0, u32::MAX, 0)),
            (DISCARD, UNSUPP, range(0, 1, 1)),
            (DISCARD, IOERR, range(0, 1, 0)[..15].to_vec()),
            (DISCARD, IOERR, Vec::new()),
            (DISCARD, IOERR, range(0, 1, 0).repeat(17)),
            (DISCARD, IOERR, [range(0, 1, 0), range(sectors, 1, 0)].concat()),
            (WRITE_ZEROES, UNSUPP, range(0, 1, 2)),
            (WRITE_ZEROES, IOERR, range(1, SECTORS as u32, 0)),
        ];
        for (kind, status, output) in ranges {
            let ask = Ask { kind, output: &output, ..Ask::default() };
            assert_eq!(bench.ask(ask), (status, 1), "{which:?} {ask:?}");
        }
        // Nothing to move, at the very end: fine.
        assert_eq!(bench.ask(read(sectors, 0)), (OK, 1));
        assert_eq!(bench.on_disk(), contents(SECTORS));
        assert!(!bench.needs_reset());
    }
}

/// A driver that did not take a feature does not get it, and one request has its limit.
#[test]
fn limits_hold_on_a_large_volume() {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 30).unwrap();
    let mut bench = Bench::with(file, false, |volume| make(Which::Threads, volume));
    for (kind, sectors, expected) in [
        (DISCARD, DISCARD_SECTORS_MAX, OK),
        (DISCARD, DISCARD_SECTORS_MAX + 1, IOERR),
        (WRITE_ZEROES, ZERO_SECTORS_MAX + 1, IOERR),
    ] {
        let output = range(0, sectors, 0);
        let ask = Ask { kind, output: &output, ..Ask::default() };
        assert_eq!(bench.ask(ask).0, expected, "{ask:?}");
    }
    // The same buffer again and again.
    let part = 1 << 20;
    let parts = (REQUEST_BYTES_MAX / part) as u16;
    bench.put(0, 0, Ask { kind: IN, ..Ask::default() });
    for index in 1..=parts + 1 {
        let buffer = (BUFFERS + 0x10_0000, part as u32, WRITE | NEXT, index + 1);
        bench.driver.descriptor(0, index, buffer);
    }
    bench.driver.descriptor(0, parts + 2, (BUFFERS + STATUS, 1, WRITE, 0));
    bench.driver.kick(0);
    assert_eq!(bench.driver.wait_used(0), (0, 0));
    assert_eq!(bench.status(0), IOERR);

    assert_eq!(bench.driver.start(VERSION_1), 15);
    for kind in [DISCARD, WRITE_ZEROES] {
        let output = range(0, 1, 0);
        let ask = Ask { kind, output: &output, ..Ask::default() };
        assert_eq!(bench.ask(ask), (UNSUPP, 1));
    }
}

#[test]
fn a_read_only_disk_is_read_only() {
    for which in backends() {
        let mut bench = Bench::with(file(SECTORS), true, |volume| make(which, volume));
        let offered = bench.driver.offered();
        assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
        assert_eq!(offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        let data = [1; 512];
        let ask = Ask { kind: OUT, sector: 0, output: &data, room: 0 };
        assert_eq!(bench.ask(ask), (IOERR, 1));
        let zero = range(0, 1, 0);
        let ask = Ask { kind: WRITE_ZEROES, output: &zero, ..Ask::default() };
        assert_eq!(bench.ask(ask), (UNSUPP, 1));
        assert_eq!(bench.ask(Ask { kind: FLUSH_KIND, ..Ask::default() }), (OK, 1));
        assert_eq!(bench.read(0, SECTORS as u32), contents(SECTORS));
    }
}

/// A flush is answered when the volume has done it, and not by what else is under way.
#[test]
fn a_flush_is_answered_by_the_volume_alone() {
    let (mut bench, gate) = gated();
    let data = [1; 512];
    bench.put(0, 0, Ask { kind: OUT, sector: 0, output: &data, room: 0 });
    bench.put(0, 1, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("both are under way", || gate.submitted() == 2);
    assert!(gate.is(0, |work| matches!(work, Work::Write { durable: false, .. })));
    assert!(gate.is(1, |work| matches!(work, Work::Flush)));
    gate.release(0, Ok(()));
    assert_eq!(bench.driver.wait_used(0).0, 0);
    assert_eq!((bench.driver.used(0), bench.status(1)), (None, 0xff), "not flushed yet");
    gate.release(0, Ok(()));
    assert_eq!((bench.driver.wait_used(0).0, bench.status(1)), (4, OK));

    // A flush that fails says so.
    bench.put(0, 1, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.submitted() == 1 && gate.held() == 1);
    gate.release(0, Err(std::io::Error::from_raw_os_error(libc::EIO)));
    assert_eq!((bench.driver.wait_used(0), bench.status(1)), ((4, 1), IOERR));
}

/// A driver that does not know FLUSH gets writes that are durable when they are completed.
#[test]
fn without_flush_writes_are_durable_at_once() {
    let (mut bench, gate) = gated();
    let discard_only = VERSION_1 | 1 << VIRTIO_BLK_F_DISCARD;
    assert_eq!(bench.driver.start(discard_only), 15);
    let data = [1; 512];
    let discard = range(0, 1, 0);
    bench.put(0, 0, Ask { kind: OUT, sector: 0, output: &data, room: 0 });
    bench.put(0, 1, Ask { kind: DISCARD, output: &discard, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("both are under way", || gate.held() == 2);
    assert!(gate.is(0, |work| matches!(work, Work::Write { durable: true, .. })));
    assert!(gate.is(1, |work| matches!(work, Work::Discard { durable: true, .. })));
    gate.release_all();

    for which in backends() {
        let mut bench = Bench::new(which);
        assert_eq!(bench.driver.start(discard_only), 15);
        bench.put(0, 0, Ask { kind: OUT, sector: 0, output: &data, room: 0 });
        bench.put(0, 1, Ask { kind: DISCARD, sector: 0, output: &range(1, 1, 0), room: 0 });
        bench.driver.kick(0);
        bench.driver.wait_used(0);
        bench.driver.wait_used(0);
        assert_eq!((bench.status(0), bench.status(1)), (OK, OK));
        assert_eq!(bench.on_disk()[..1024], [[1; 512], [0; 512]].concat());
    }
}

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

/// The kernel writes past `vm-memory`; live migration must see it all the same.
#[test]
fn pages_that_were_read_into_are_dirty() {
    for which in backends() {
        let mut bench = Bench::new(which);
        let memory = bench.driver.memory.clone();
        let region = memory.iter().next().unwrap();
        bench.put(0, 0, Ask { kind: IN, sector: 0, room: 9 * 512, ..Ask::default() });
        std::ops::Deref::deref(region).bitmap().reset();
        bench.driver.kick(0);
        bench.driver.wait_used(0);
        let dirty =
            |at: u64| std::ops::Deref::deref(region).bitmap().dirty_at((BUFFERS + at) as usize);
        assert!(dirty(STATUS), "{which:?}");
        assert_eq!([dirty(OUTPUT), dirty(ROOM - 1)], [false, false]);
        assert_eq!([0, 0x1000, 0x2000].map(|at| dirty(ROOM + at)), [true, true, false]);
    }
}

/// Pausing waits for what is under way; afterwards it is in the rings, and nothing moves.
#[test]
fn a_pause_waits_for_what_is_under_way() {
    let (mut bench, gate) = gated();
    for slot in 0..3 {
        bench.put(0, slot, Ask { kind: IN, room: 512, ..Ask::default() });
    }
    bench.driver.kick(0);
    wait_until("all are under way", || gate.submitted() == 3);
    let done = Mutex::new(false);
    let mut calls = gate.calls();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            bench.driver.device.pause().unwrap();
            *done.lock().unwrap() = true;
        });
        for _ in 0..3 {
            wait_until("somebody waits for them", || gate.calls() > calls);
            assert!(!*done.lock().unwrap(), "paused with requests under way");
            calls = gate.calls();
            gate.release(0, Ok(()));
        }
    });
    assert_eq!(gate.held(), 0);
    for slot in 0..3 {
        assert_eq!(bench.driver.used(0), Some((slot * 4, 513)));
    }
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    assert_eq!((gate.held(), bench.driver.used(0)), (0, None));
    bench.driver.device.resume();
    wait_until("it goes on", || gate.held() == 1);
    gate.release_all();
    bench.driver.wait_used(0);
}

/// A disk of the node that hangs does not hang the pause: it fails, and the device goes on.
#[test]
fn a_pause_does_not_wait_for_ever() {
    let (mut bench, gate) = gated();
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.submitted() == 1);
    let error = bench.driver.device.pause_within(Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.to_string(), "virtio-blk: 1 requests are still under way after 20ms");
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 513));
    bench.driver.device.pause().unwrap();
}

/// A reset waits too: afterwards the guest may use its memory for something else.
#[test]
fn a_reset_waits_for_what_is_under_way_and_tells_nobody() {
    let (mut bench, gate) = gated();
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.submitted() == 1);
    let calls = gate.calls();
    std::thread::scope(|scope| {
        scope.spawn(|| bench.driver.write(0x14, &[0]));
        wait_until("the reset waits", || gate.calls() > calls);
        gate.release(0, Ok(()));
    });
    assert_eq!((bench.driver.used(0), bench.status(0)), (None, 0xff));
    assert_eq!(bench.driver.start(ALL), 15);
    bench.put(0, 0, Ask { kind: IN, room: 512, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it is under way", || gate.held() == 1);
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 513));
}

/// The same chain again and again fills the queue and no more.
#[test]
fn no_more_is_under_way_than_the_queue_holds() {
    let (mut bench, gate) = gated();
    bench.put(0, 0, Ask { kind: FLUSH_KIND, ..Ask::default() });
    for _ in 1..256 {
        bench.driver.offer(0, 0);
    }
    bench.driver.kick(0);
    wait_until("the queue is full", || gate.held() == 256);
    bench.driver.offer(0, 0);
    bench.driver.kick(0);
    wait_until("the guest is found out", || bench.needs_reset());
    assert_eq!(gate.held(), 256);
    gate.release_all();
    assert_eq!(bench.driver.start(ALL), 15);
}

/// When the system has no room for requests, they are tried again without a kick.
#[test]
fn what_the_system_had_no_room_for_is_tried_again() {
    let (mut bench, gate) = gated();
    gate.state.lock().unwrap().refusals = 3;
    bench.put(0, 0, Ask { kind: FLUSH_KIND, ..Ask::default() });
    bench.driver.kick(0);
    wait_until("it was submitted", || gate.submitted() == 1);
    assert_eq!(gate.state.lock().unwrap().refusals, 0);
    gate.release_all();
    assert_eq!(bench.driver.wait_used(0), (0, 1));
}

#[test]
fn state_travels_between_volumes_of_one_size() {
    for which in backends() {
        let mut bench = Bench::new(which);
        bench.read(0, 1);
        bench.driver.device.pause().unwrap();
        bench.put(1, 2, Ask { kind: IN, sector: 7, room: 512, ..Ask::default() });
        let state = bench.driver.state();

        let memory = bench.driver.memory.clone();
        let new = |sectors, read_only| {
            let make = |volume: &Arc<Volume>| make(which, volume);
            Bench::unstarted(file(sectors), read_only, make, Some(memory.clone()))
        };
        let mut moved = new(SECTORS, false);
        moved.driver.device.pause().unwrap();
        moved.driver.device.restore(1, &state).unwrap();
        assert_eq!(moved.driver.state(), state);
        moved.driver.seen = bench.driver.seen.clone();
        moved.driver.device.resume();
        assert_eq!(moved.driver.wait_used(1), (8, 513));
        assert_eq!(moved.room(2, 512), contents(8)[7 * 512..]);

        let error = new(SECTORS + 1, false).driver.device.restore(1, &state).unwrap_err();
        assert_eq!(error.to_string(), "state: blk sectors is 64; accepted: 65");
        assert!(new(SECTORS, true).driver.device.restore(1, &state).is_err());
    }
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

/// A device that is dropped in the middle leaves nothing behind that writes into memory.
#[test]
fn a_device_may_be_dropped_with_requests_under_way() {
    for which in backends() {
        let mut bench = Bench::new(which);
        for slot in 0..8 {
            bench.put(0, slot, Ask { kind: IN, room: 0x1_0000 / 4, ..Ask::default() });
        }
        bench.driver.kick(0);
        let Bench { driver, file } = bench;
        drop(driver);
        Volume::open(file.path(), false).unwrap();
    }
}

/// What a test asks for within its own part of the volume.
#[derive(Debug, Clone)]
struct Step {
    kind: u32,
    sector: u64,
    sectors: u32,
    byte: u8,
}

/// Sectors of each slot, so that what is under way together does not overlap.
const PART: u64 = 10;
const SLOTS: usize = 6;

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let kind = prop::sample::select(vec![IN, OUT, FLUSH_KIND, DISCARD, WRITE_ZEROES, GET_ID, 99]);
    let step = (kind, 0..PART, 0u32..6, any::<u8>())
        .prop_map(|(kind, sector, sectors, byte)| Step { kind, sector, sectors, byte });
    prop::collection::vec(prop::collection::vec(step, 1..=SLOTS), 1..12)
}

/// The status that the model expects, after doing the same to `model`.
fn expected(model: &mut [u8], step: &Step, sector: u64) -> u8 {
    let (start, end) = (sector as usize * 512, (sector as usize + step.sectors as usize) * 512);
    match step.kind {
        IN | OUT | DISCARD | WRITE_ZEROES if end > model.len() => return IOERR,
        OUT => model[start..end].fill(step.byte),
        DISCARD | WRITE_ZEROES => model[start..end].fill(0),
        99 => return UNSUPP,
        _ => {}
    }
    OK
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// A disk is what a vector of bytes would be, whatever runs together on its queues.
    #[test]
    fn a_disk_is_like_a_model(batches in steps()) {
        for which in backends() {
            let mut bench = Bench::new(which);
            let mut model = contents(SECTORS);
            for batch in &batches {
                let mut statuses = Vec::new();
                for (slot, step) in (0u16..).zip(batch) {
                    // The last slot reaches over the end of the volume.
                    let part = u64::from(slot) * PART + 5;
                    let sector = part + step.sector.min(PART - u64::from(step.sectors));
                    let output = match step.kind {
                        OUT => vec![step.byte; step.sectors as usize * 512],
                        DISCARD => range(sector, step.sectors, 0),
                        WRITE_ZEROES => range(sector, step.sectors, u32::from(step.byte & 1)),
                        _ => Vec::new(),
                    };
                    let room = match step.kind {
                        IN => step.sectors * 512,
                        GET_ID => 20,
                        _ => 0,
                    };
                    let before = model.clone();
                    statuses.push((expected(&mut model, step, sector), before, sector));
                    let ask = Ask { kind: step.kind, sector, output: &output, room };
                    bench.put(usize::from(slot) % QUEUES, slot, ask);
                }
                bench.driver.kick(0);
                bench.driver.kick(1);
                for slot in 0..batch.len() {
                    bench.driver.wait_used(slot % QUEUES);
                }
                for (slot, step) in (0u16..).zip(batch) {
                    let (status, before, sector) = &statuses[usize::from(slot)];
                    prop_assert_eq!(bench.status(slot), *status, "{:?} {:?}", which, step);
                    if step.kind == IN && *status == OK {
                        let (start, length) = (*sector as usize * 512, step.sectors as usize * 512);
                        prop_assert_eq!(&bench.room(slot, length), &before[start..start + length]);
                    }
                }
            }
            prop_assert!(bench.on_disk() == model, "{:?}: the file differs", which);
        }
    }

    /// Whatever the guest puts into the queues: no panic, no spinning, nothing outside of the
    /// volume, and a reset makes the device work again.
    #[test]
    fn a_hostile_guest_harms_only_its_own_device(
        descriptors in prop::collection::vec(
            (0u64..0x60_0000, 0u32..0x2_0000, 0u16..8, 0u16..12), QUEUES * 12),
        headers in prop::collection::vec((0u32..15, 0u64..80, any::<bool>()), 12),
        heads in prop::collection::vec(0u16..14, QUEUES * 8),
    ) {
        for which in backends() {
            let mut bench = Bench::new(which);
            for (i, (address, length, flags, next)) in descriptors.iter().copied().enumerate() {
                let (kind, sector, aimed) = headers[i % 12];
                // Some look like requests as far as their header goes.
                let aim = BUFFERS + (i as u64 % 12) * 0x1000;
                let mut header = u64::from(kind).to_le_bytes().to_vec();
                header.extend(sector.to_le_bytes());
                bench.driver.memory.write_slice(&header, GuestAddress(aim)).unwrap();
                let fields = if aimed { (aim, 16, NEXT, next) } else { (address, length, flags, next) };
                bench.driver.descriptor(i / 12, (i % 12) as u16, fields);
            }
            for (i, head) in heads.iter().copied().enumerate() {
                bench.driver.offer(i / 8, head);
            }
            bench.driver.kick(0);
            bench.driver.kick(1);
            prop_assert_eq!(bench.driver.start(ALL), 15);
            prop_assert_eq!(bench.on_disk().len(), SECTORS * 512);
            let data = [7; 512];
            let write = Ask { kind: OUT, sector: 63, output: &data, room: 0 };
            prop_assert_eq!(bench.ask(write), (OK, 1));
            prop_assert_eq!(bench.read(63, 1), data);
        }
    }
}
