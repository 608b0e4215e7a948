//! A machine of plain memory and of files, whose guest is a thread that writes.

#![allow(dead_code)] // each test takes its part

pub(crate) mod cable;
pub(crate) mod disk;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use drover_hv::machine::migratable::{MachineState, MigratableDisk, MigratableError, MigratableVm};
use drover_hv::memory::{self, DirtyLog, DirtyPages, DirtyTracker, GuestMemory, PAGE_BYTES};
use drover_hv::migration::{FeatureWord, Shape};
use drover_hv::state::{self, kind};
use vm_memory::{Bytes, GuestAddress};

/// All writes of the fake guest go through `vm-memory`: there is nothing for KVM to log.
struct NoLog;

impl DirtyLog for NoLog {
    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn read(&mut self, _: usize, _: bool) -> io::Result<Vec<u64>> {
        Ok(Vec::new())
    }
    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many machines of a test run; never more than one (I1).
#[derive(Debug, Clone, Default)]
pub(crate) struct Runners(Arc<AtomicI32>);

impl Runners {
    fn enter(&self) {
        let others = self.0.fetch_add(1, Ordering::SeqCst);
        assert_eq!(others, 0, "I1: the guest runs twice");
    }
    fn leave(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What the guest does all day.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Habits {
    /// It writes pages below this one.
    pub(crate) hot_pages: u64,
    /// Between two writes.
    pub(crate) rest: std::time::Duration,
}

pub(crate) struct FakeVm {
    memory: GuestMemory,
    tracker: DirtyTracker,
    disks: Vec<MigratableDisk>,
    runners: Runners,
    /// Held by the guest for each write; pausing is taking it.
    gate: Arc<Mutex<bool>>,
    running: bool,
    writes: Arc<AtomicU64>,
    ended: Arc<AtomicBool>,
    guest: Option<JoinHandle<()>>,
    pub(crate) attracted: u32,
    pub(crate) announced: u32,
    /// The state after the rehearsal's is refused.
    pub(crate) fail_restore: bool,
    pub(crate) restores: u32,
    /// What the disks held when the state was saved here, or restored, the last time.
    pub(crate) disks_then: Vec<Vec<u8>>,
    /// What memory held then.
    pub(crate) memory_then: Vec<u8>,
}

pub(crate) const PAGES: u64 = 2048;

pub(crate) fn shape() -> Shape {
    Shape {
        uid: "fake".into(),
        vcpus: 1,
        memory_bytes: PAGES * PAGE_BYTES,
        interfaces: vec![[0x52, 0x54, 0, 0, 0, 1]],
        disks: vec![],
        cpu_features: vec![FeatureWord { leaf: 7, subleaf: 0, register: 1, bits: 3 }],
    }
}

impl FakeVm {
    /// A machine that stands still, with zeroed memory.
    pub(crate) fn new(runners: &Runners, habits: Habits) -> Self {
        Self::with_disks(runners, habits, Vec::new())
    }

    /// The same with disks.
    pub(crate) fn with_disks(
        runners: &Runners,
        habits: Habits,
        disks: Vec<MigratableDisk>,
    ) -> Self {
        let memory = memory::create(PAGES * PAGE_BYTES).unwrap();
        let tracker = DirtyTracker::new(memory.clone(), Box::new(NoLog));
        let (gate, writes) = (Arc::new(Mutex::new(false)), Arc::new(AtomicU64::new(0)));
        let ended = Arc::new(AtomicBool::new(false));
        let guest = {
            let (memory, gate) = (memory.clone(), Arc::clone(&gate));
            let (writes, ended) = (Arc::clone(&writes), Arc::clone(&ended));
            let disks = disks.clone();
            std::thread::spawn(move || guest(&memory, &disks, &gate, &writes, &ended, habits))
        };
        Self {
            memory,
            tracker,
            disks,
            runners: runners.clone(),
            gate,
            running: false,
            writes,
            ended,
            guest: Some(guest),
            attracted: 0,
            announced: 0,
            fail_restore: false,
            restores: 0,
            disks_then: Vec::new(),
            memory_then: Vec::new(),
        }
    }

    /// A machine that has run for a while: some pages hold something, some zeros, some nothing.
    pub(crate) fn running(runners: &Runners, habits: Habits) -> Self {
        Self::running_with_disks(runners, habits, Vec::new())
    }

    pub(crate) fn running_with_disks(
        runners: &Runners,
        habits: Habits,
        disks: Vec<MigratableDisk>,
    ) -> Self {
        let mut vm = Self::with_disks(runners, habits, disks);
        for page in (0..PAGES).step_by(3) {
            let value = if page % 2 == 0 { page } else { 0 };
            vm.memory.write_obj(value, GuestAddress(page * PAGE_BYTES + 8)).unwrap();
        }
        vm.resume().unwrap();
        vm
    }

    /// What the disks hold that can be read.
    fn look_at_disks(&mut self) {
        let open = self.disks.iter().filter(|disk| disk.volume.is_open());
        let read = open.map(|disk| {
            let mut bytes = vec![0; disk.volume.bytes() as usize];
            disk.volume.read_at(&mut bytes, 0).unwrap();
            bytes
        });
        self.disks_then = read.collect();
    }

    pub(crate) fn is_running(&self) -> bool {
        self.running
    }

    pub(crate) fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// What this machine has to be like elsewhere.
    pub(crate) fn shape(&self) -> Shape {
        Shape { disks: self.disks.iter().map(MigratableDisk::shape).collect(), ..shape() }
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; (PAGES * PAGE_BYTES) as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

fn guest(
    memory: &GuestMemory,
    disks: &[MigratableDisk],
    gate: &Mutex<bool>,
    writes: &AtomicU64,
    ended: &AtomicBool,
    habits: Habits,
) {
    let mut seed = 1u64;
    while !ended.load(Ordering::SeqCst) {
        if *gate.lock().unwrap() {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let page = (seed >> 33) % habits.hot_pages;
            // Now and then a page becomes zero again.
            let value = if seed >> 60 == 0 { 0 } else { seed };
            memory.write_obj(value, GuestAddress(page * PAGE_BYTES)).unwrap();
            writes.fetch_add(1, Ordering::SeqCst);
            disks.iter().for_each(|disk| disk::guest_writes(disk, seed));
        }
        std::thread::sleep(habits.rest);
    }
}

impl Drop for FakeVm {
    fn drop(&mut self) {
        self.pause().unwrap();
        self.ended.store(true, Ordering::SeqCst);
        if let Some(guest) = self.guest.take() {
            guest.join().unwrap();
        }
    }
}

impl MigratableVm for FakeVm {
    fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn disks(&self) -> &[MigratableDisk] {
        &self.disks
    }

    fn pause(&mut self) -> Result<(), MigratableError> {
        *self.gate.lock().unwrap() = false;
        if std::mem::take(&mut self.running) {
            self.runners.leave();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), MigratableError> {
        if !self.running {
            assert!(self.disks.iter().all(|disk| disk.volume.is_open()), "runs without its disks");
            self.runners.enter();
            self.running = true;
            *self.gate.lock().unwrap() = true;
        }
        Ok(())
    }

    fn save_state(&mut self) -> Result<MachineState, MigratableError> {
        assert!(!self.running);
        // Saving may write memory, and that write must travel.
        self.memory.write_obj(0x5a5a_5a5a_u32, GuestAddress(77 * PAGE_BYTES)).unwrap();
        let writes = self.writes();
        self.look_at_disks();
        self.memory_then = self.contents();
        Ok(MachineState { sections: vec![state::section(kind::VM, 0, 1, |e| e.u64(writes))] })
    }

    fn rehearsal_state(&mut self) -> Result<Option<MachineState>, MigratableError> {
        assert!(self.running);
        Ok(Some(MachineState { sections: vec![state::section(kind::VM, 0, 1, |e| e.u64(0))] }))
    }

    fn restore_state(&mut self, state: MachineState) -> Result<(), MigratableError> {
        assert!(!self.running);
        self.restores += 1;
        self.look_at_disks();
        self.memory_then = self.contents();
        if self.fail_restore && self.restores > 1 {
            return Err(MigratableError::Mismatch("as the test wanted".into()));
        }
        let section = state::find(&state, kind::VM, 0).unwrap();
        let writes = state::fields(section, 1).unwrap().u64("writes").unwrap();
        self.writes.store(writes, Ordering::SeqCst);
        Ok(())
    }

    fn start_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(self.tracker.start()?)
    }

    fn take_dirty(&mut self) -> Result<DirtyPages, MigratableError> {
        Ok(self.tracker.take()?)
    }

    fn take_last_dirty(&mut self) -> Result<DirtyPages, MigratableError> {
        Ok(self.tracker.take_last()?)
    }

    fn put_back_dirty(&mut self, pages: &DirtyPages) {
        self.tracker.put_back(pages);
    }

    fn stop_dirty_log(&mut self) -> Result<(), MigratableError> {
        Ok(self.tracker.stop()?)
    }

    fn attract(&mut self) {
        assert!(!self.running, "a running machine has its frames");
        self.attracted += 1;
    }

    fn announce(&mut self) {
        assert!(self.running, "announced before it runs");
        self.announced += 1;
    }
}
