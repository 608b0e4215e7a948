//! Disks as a guest's driver uses them, and as a hostile guest abuses them: on both backends, and
//! on one that answers only when the test says so.

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::backend::{self, Backend, Done, Job, Threads, Uring, Work};
use super::device::UNDER_WAY_BYTES_MAX;
use super::requests::{DISCARD_SECTORS_MAX, REQUEST_BYTES_MAX, Span, ZERO_SECTORS_MAX};
use super::*;
use crate::memory::{self, GuestMemory};
use crate::pci::PciFunction;
use crate::virtio::tests::{
    BUFFERS, EVENT_IDX, MEMORY_BYTES, NEXT, TestDriver, VERSION_1, WRITE, wait_until,
};

mod at_once;
mod copy;
mod life;
mod limits;
mod property;
mod request;
mod volume;

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
    /// io_uring, with the worker doing what is cached.
    AtOnce,
    Threads,
}

/// All backends, or the one that there is.
fn backends() -> Vec<Which> {
    let file = file(1);
    match Uring::new(&open(&file, false), 8) {
        Ok(_) => vec![Which::Uring, Which::AtOnce, Which::Threads],
        Err(error) => {
            println!("io_uring is not tested here: {error}");
            vec![Which::Threads]
        }
    }
}

fn make(which: Which, volume: &Arc<Volume>) -> Box<dyn Backend> {
    match which {
        Which::Uring => Box::new(Uring::new(volume, 512).unwrap()),
        Which::AtOnce => Box::new(Uring::new(volume, 512).unwrap().with_reads_at_once()),
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
    held_max: usize,
    /// What is submitted is done at once, without a word.
    is_open: bool,
    /// The most that came back at once.
    done_max: usize,
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
        self.release_untold(index, result);
        self.event.write(1).unwrap();
    }

    /// It is done, and nothing tells of it.
    fn release_untold(&self, index: usize, result: std::io::Result<()>) {
        let mut state = self.state.lock().unwrap();
        let job = state.held.remove(index);
        state.done.push(Done { job, result });
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
        let mut state = self.state.lock().unwrap();
        state.held.push(job);
        state.held_max = state.held_max.max(state.held.len());
    }
    fn submit(&mut self) -> bool {
        let mut state = self.state.lock().unwrap();
        state.calls += 1;
        if state.refusals > 0 {
            state.refusals -= 1;
            return false;
        }
        state.submitted = state.held.len();
        if state.is_open {
            let done: Vec<Done> =
                state.held.drain(..).map(|job| Done { job, result: Ok(()) }).collect();
            state.done.extend(done);
        }
        true
    }
    fn finished(&mut self, done: &mut Vec<Done>) {
        let _ = self.event.read();
        let mut state = self.state.lock().unwrap();
        state.done_max = state.done_max.max(state.done.len());
        done.append(&mut state.done);
    }
}

fn gated() -> (Bench, Gate) {
    let gate = Gate::new();
    let backend = gate.clone();
    (Bench::with(file(SECTORS), false, |_| Box::new(backend)), gate)
}
