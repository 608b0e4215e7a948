//! The transport as a guest's driver uses it, and as a hostile guest abuses it. `TestDriver` is
//! the driver: it negotiates through the registers, and builds rings in plain memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::machine::migratable::MachineState;
use crate::memory::{self, GuestMemory};
use crate::pci::tests::TestWiring;
use crate::pci::{PciFunction, WINDOW_BYTES, Wiring};

/// Memory of the test machines.
pub(crate) const MEMORY_BYTES: u64 = 4 << 20;
/// Rings of queue n begin here + n * 64 KiB; buffers behind them.
const RINGS: u64 = 0x10_0000;
pub(crate) const BUFFERS: u64 = 0x20_0000;
const WAIT: Duration = Duration::from_secs(10);

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) struct TestDriver {
    pub(crate) memory: GuestMemory,
    pub(crate) wiring: Arc<TestWiring>,
    pub(crate) device: VirtioPci,
    sizes: Vec<u16>,
    pub(crate) next: Vec<u16>,
    pub(crate) seen: Vec<u16>,
}

/// Waits for a condition, with a deadline.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::yield_now();
    }
}

impl TestDriver {
    pub(crate) fn new(device: Box<dyn VirtioDevice>) -> Self {
        Self::with_memory(device, memory::create(MEMORY_BYTES).unwrap())
    }

    pub(crate) fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Self {
        let wiring = Arc::new(TestWiring::default());
        let sizes = device.queue_sizes().to_vec();
        let lines: Arc<dyn Wiring> = wiring.clone();
        let device = VirtioPci::new(device, 1, memory.clone(), lines).unwrap();
        let queues = sizes.len();
        // Memory decoding and MSI-X on, every vector unmasked.
        device.write_config(4, &6u16.to_le_bytes());
        let msix = find_msix(&device);
        device.write_config(msix + 2, &0x8000_u16.to_le_bytes());
        for vector in 0..=queues as u64 {
            device.write_window(0x4000 + vector * 16, &0xfee0_0000_u64.to_le_bytes());
            device.write_window(0x4000 + vector * 16 + 8, &0u64.to_le_bytes());
        }
        Self { memory, wiring, device, sizes, next: vec![0; queues], seen: vec![0; queues] }
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        self.device.write_window(offset, data);
    }

    pub(crate) fn status(&self) -> u8 {
        let mut status = [0];
        self.device.read_window(0x14, &mut status);
        status[0]
    }

    pub(crate) fn offered(&self) -> u64 {
        let mut features = 0;
        for select in 0..2u32 {
            self.write(0, &select.to_le_bytes());
            let mut word = [0; 4];
            self.device.read_window(4, &mut word);
            features |= u64::from(u32::from_le_bytes(word)) << (32 * select);
        }
        features
    }

    /// Reset, negotiate these features, set up every queue, DRIVER_OK. Answers the status.
    pub(crate) fn start(&mut self, features: u64) -> u8 {
        self.write(0x14, &[0]);
        self.write(0x14, &[1]);
        self.write(0x14, &[3]);
        for select in 0..2u32 {
            self.write(8, &select.to_le_bytes());
            self.write(12, &((features >> (32 * select)) as u32).to_le_bytes());
        }
        self.write(0x14, &[11]);
        if self.status() & 8 == 0 {
            return self.status();
        }
        self.write(0x10, &0u16.to_le_bytes());
        for queue in 0..self.sizes.len() {
            self.next[queue] = 0;
            self.seen[queue] = 0;
            let [table, available, used] = self.rings(queue);
            for ring in [available, used] {
                self.memory.write_slice(&[0; 0x1000], GuestAddress(ring)).unwrap();
            }
            self.write(0x16, &(queue as u16).to_le_bytes());
            self.write(0x1a, &(queue as u16 + 1).to_le_bytes());
            self.write(0x20, &table.to_le_bytes());
            self.write(0x28, &available.to_le_bytes());
            self.write(0x30, &used.to_le_bytes());
            self.write(0x1c, &1u16.to_le_bytes());
        }
        self.write(0x14, &[15]);
        self.status()
    }

    pub(crate) fn rings(&self, queue: usize) -> [u64; 3] {
        let base = RINGS + queue as u64 * 0x1_0000;
        [base, base + 0x4000, base + 0x8000]
    }

    pub(crate) fn descriptor(&self, queue: usize, index: u16, fields: (u64, u32, u16, u16)) {
        let at = GuestAddress(self.rings(queue)[0] + u64::from(index) * 16);
        let (addr, len, flags, next) = fields;
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend_from_slice(&len.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
        bytes.extend_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, at).unwrap();
    }

    /// Makes the chain at `head` available, without a kick.
    pub(crate) fn offer(&mut self, queue: usize, head: u16) {
        let available = self.rings(queue)[1];
        let slot = self.next[queue] % self.sizes[queue];
        self.memory.write_obj(head, GuestAddress(available + 4 + 2 * u64::from(slot))).unwrap();
        self.next[queue] = self.next[queue].wrapping_add(1);
        self.memory.write_obj(self.next[queue], GuestAddress(available + 2)).unwrap();
    }

    pub(crate) fn kick(&self, queue: usize) {
        let io_events = self.wiring.io_events.lock().unwrap();
        io_events[queue].0.write(1).unwrap();
    }

    /// The next used chain, if there is one: its head, and how much was written.
    pub(crate) fn used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = self.rings(queue)[2];
        let index: u16 = self.memory.read_obj(GuestAddress(ring + 2)).unwrap();
        if index == self.seen[queue] {
            return None;
        }
        let slot = self.seen[queue] % self.sizes[queue];
        self.seen[queue] = self.seen[queue].wrapping_add(1);
        let at = ring + 4 + 8 * u64::from(slot);
        let head = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((head, self.memory.read_obj(GuestAddress(at + 4)).unwrap()))
    }

    pub(crate) fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let mut used = None;
        wait_until("a used chain", || {
            used = self.used(queue);
            used.is_some()
        });
        used.unwrap()
    }

    /// Interrupts of a queue since the last look.
    pub(crate) fn interrupts(&self, queue: usize) -> u64 {
        self.wiring.raised(queue + 1)
    }

    pub(crate) fn state(&self) -> MachineState {
        MachineState { sections: self.device.save(1) }
    }
}

fn find_msix(device: &VirtioPci) -> usize {
    let mut at = [0];
    device.read_config(0x34, &mut at);
    loop {
        let mut cap = [0; 2];
        device.read_config(usize::from(at[0]), &mut cap);
        if cap[0] == 0x11 {
            return usize::from(at[0]);
        }
        assert_ne!(cap[1], 0, "no MSI-X capability");
        at[0] = cap[1];
    }
}

/// A device with one queue that answers each chain with its own head.
struct Echo;

impl VirtioDevice for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            number: 42,
            name: "echo",
            class: crate::pci::ClassCode(0xff, 0, 0),
            section: crate::state::kind::VIRTIO_RNG,
            section_version: 1,
        }
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[16]
    }
    fn features(&self) -> u64 {
        1 << 5
    }
    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0x77);
    }
    fn activate(&mut self, _: u64) {}
    fn reset(&mut self) {}
    fn run(&mut self, turn: &mut Turn<'_>, _: Event) -> Result<Progress, Violation> {
        let mut segments = Vec::new();
        for _ in 0..4 {
            let Some(head) = turn.queues[0].pop(turn.memory, &mut segments)? else {
                if turn.queues[0].enable_kicks(turn.memory)? {
                    continue;
                }
                turn.queues[0].notify(turn.memory, turn.interrupt)?;
                return Ok(Progress::Done);
            };
            let length = segments.iter().map(|segment| segment.len).sum();
            turn.queues[0].complete(turn.memory, head, length)?;
        }
        turn.queues[0].notify(turn.memory, turn.interrupt)?;
        Ok(Progress::More)
    }
    fn save(&self, out: &mut Encoder) {
        out.u8(9);
    }
    fn restore(
        &mut self,
        _: u32,
        fields: &mut Decoder<'_>,
        _: Option<u64>,
    ) -> Result<(), StateError> {
        fields.u8("echo").map(drop)
    }
}

#[test]
fn a_driver_negotiates_and_gets_answers() {
    let mut driver = TestDriver::new(Box::new(Echo));
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | 1 << 28 | 1 << 5);
    assert_eq!(driver.start(VERSION_1 | 1 << 5), 15);
    for index in 0..10u16 {
        driver.descriptor(0, index, (BUFFERS, 100 + u32::from(index), 0, 0));
        driver.offer(0, index);
    }
    driver.kick(0);
    for index in 0..10 {
        assert_eq!(driver.wait_used(0), (index, 100 + index));
    }
    wait_until("an interrupt", || driver.interrupts(0) > 0);
    let mut isr = [0; 4];
    driver.device.read_window(0x1000, &mut isr);
    assert_eq!(isr[0], 1);
    driver.device.read_window(0x1000, &mut isr);
    assert_eq!(isr[0], 0, "reading acknowledges");
    let mut config = [0; 2];
    driver.device.read_window(0x2000, &mut config);
    assert_eq!(config, [0x77; 2]);
}

#[test]
fn features_that_were_not_offered_are_not_taken() {
    let mut driver = TestDriver::new(Box::new(Echo));
    for wrong in [VERSION_1 | 1 << 6, 1 << 5, 0] {
        assert_eq!(driver.start(wrong), 3, "{wrong:#x}");
    }
    // And without them the device does not start.
    driver.write(0x14, &[15]);
    assert_eq!(driver.status() & 4, 0);
}

#[test]
fn interrupts_come_as_the_driver_asks_with_event_idx() {
    let mut driver = TestDriver::new(Box::new(Echo));
    driver.start(VERSION_1 | EVENT_IDX);
    // used_event: only after the third chain.
    let available = driver.rings(0)[1];
    driver.memory.write_obj(2u16, GuestAddress(available + 4 + 2 * 16)).unwrap();
    driver.descriptor(0, 0, (BUFFERS, 8, 0, 0));
    for _ in 0..2 {
        driver.offer(0, 0);
        driver.kick(0);
        driver.wait_used(0);
    }
    driver.offer(0, 0);
    driver.kick(0);
    driver.wait_used(0);
    wait_until("the interrupt", || driver.interrupts(0) == 1);
}

/// While it is paused nothing moves, however loud the guest knocks; afterwards all is answered.
#[test]
fn a_paused_device_touches_nothing() {
    let mut driver = TestDriver::new(Box::new(Echo));
    driver.start(VERSION_1);
    driver.device.pause().unwrap();
    driver.descriptor(0, 3, (BUFFERS, 8, 0, 0));
    driver.offer(0, 3);
    let before = driver.memory.read_obj::<u32>(GuestAddress(driver.rings(0)[2])).unwrap();
    for _ in 0..50 {
        driver.kick(0);
        std::thread::yield_now();
    }
    let after = driver.memory.read_obj::<u32>(GuestAddress(driver.rings(0)[2])).unwrap();
    assert_eq!((before, driver.used(0)), (after, None));
    driver.device.resume();
    assert_eq!(driver.wait_used(0), (3, 8));
}

/// The address at which a guest has put one function's window is where another one's begins when it
/// comes: the notifications stay those of the first, until the guest puts the second there.
#[test]
fn one_that_comes_takes_no_notifications_from_another() {
    const SLOT: u8 = 17;
    let driver = TestDriver::new(Box::new(Echo));
    let (wiring, memory) = (driver.wiring.clone(), driver.memory.clone());
    let come = |slot| VirtioPci::new(Box::new(Echo), slot, memory.clone(), wiring.clone()).unwrap();
    let wired = || -> Vec<u64> {
        wiring.io_events.lock().unwrap().iter().map(|(_, address)| *address).collect()
    };
    let (there, notify) = (crate::pci::window_start(SLOT), 0x3000);
    let second = come(SLOT);
    // Decoding off, the window moved, and on again.
    driver.device.write_config(4, &0u16.to_le_bytes());
    assert!(wired().is_empty(), "nobody answers anywhere");
    driver.device.write_config(0x10, &(there as u32).to_le_bytes());
    driver.device.write_config(4, &6u16.to_le_bytes());
    assert_eq!(wired(), [there + notify]);
    driver.kick(0);
    assert_eq!(driver.device.window(), Some((there, WINDOW_BYTES)));
    // The guest puts the second elsewhere.
    let elsewhere = crate::pci::MMIO_START;
    second.write_config(0x10, &(elsewhere as u32).to_le_bytes());
    second.write_config(4, &6u16.to_le_bytes());
    assert_eq!(wired(), [there + notify, elsewhere + notify]);
    // A machine that a guest is about to come to has them where most windows are.
    let third = come(SLOT + 1);
    third.expect();
    assert_eq!(wired().last(), Some(&(crate::pci::window_start(SLOT + 1) + notify)));

    // One that has left wires nothing, even if a vCPU still holds it.
    second.release();
    second.write_config(4, &0u16.to_le_bytes());
    second.write_config(4, &6u16.to_le_bytes());
    assert_eq!(wired().len(), 2);
}

/// A notification that was lost with the old machine does not matter, nor does an interrupt.
#[test]
fn a_restored_device_goes_on_without_a_kick() {
    let mut driver = TestDriver::new(Box::new(Echo));
    driver.start(VERSION_1);
    driver.descriptor(0, 0, (BUFFERS, 8, 0, 0));
    driver.offer(0, 0);
    driver.kick(0);
    driver.wait_used(0);
    driver.device.pause().unwrap();
    driver.offer(0, 0);
    let state = driver.state();

    let mut moved = TestDriver::with_memory(Box::new(Echo), driver.memory.clone());
    moved.device.pause().unwrap();
    moved.device.restore(1, &state).unwrap();
    moved.seen = driver.seen.clone();
    assert_eq!(moved.state(), state, "what was restored saves as it came");
    moved.device.resume();
    assert_eq!(moved.wait_used(0), (0, 8));
    wait_until("an interrupt", || moved.interrupts(0) > 0);
}

#[test]
fn another_devices_state_is_refused() {
    let driver = TestDriver::new(Box::new(Echo));
    let state = driver.state();
    let rng = TestDriver::new(Box::new(rng::Rng::new()));
    assert!(rng.device.restore(1, &state).is_err());
    let mut cut = state;
    cut.sections.pop();
    let error = driver.device.restore(1, &cut).unwrap_err().to_string();
    assert_eq!(error, "state: section virtio-rng/1 is missing");
}

/// The window can be reached through configuration space, as firmware does.
#[test]
fn the_indirect_capability_reaches_the_registers() {
    let driver = TestDriver::new(Box::new(Echo));
    let mut at = [0];
    driver.device.read_config(0x34, &mut at);
    let cap = loop {
        let mut cap = [0; 4];
        driver.device.read_config(usize::from(at[0]), &mut cap);
        if cap[0] == 9 && cap[3] == 5 {
            break usize::from(at[0]);
        }
        at[0] = cap[1];
    };
    driver.device.write_config(cap + 8, &0x12u32.to_le_bytes());
    driver.device.write_config(cap + 12, &2u32.to_le_bytes());
    let mut queues = [0; 2];
    driver.device.read_config(cap + 16, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 1);
    driver.device.write_config(cap + 8, &0xffff_fff0_u32.to_le_bytes());
    driver.device.read_config(cap + 16, &mut queues);
}

fn needs_reset(driver: &TestDriver) -> bool {
    driver.status() & 64 != 0
}

/// Each way of breaking the rules stops the device, and a reset brings it back.
#[test]
fn a_guest_that_breaks_the_rules_loses_its_device_until_it_resets_it() {
    let mut driver = TestDriver::new(Box::new(Echo));
    type Crime = fn(&mut TestDriver);
    let crimes: [Crime; 7] = [
        // A chain that loops.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 8, NEXT, 0));
            d.offer(0, 0);
        },
        // A head that is no descriptor.
        |d| d.offer(0, 99),
        // A buffer outside of memory, and one that wraps around.
        |d| {
            d.descriptor(0, 0, (MEMORY_BYTES - 4, 8, 0, 0));
            d.offer(0, 0);
        },
        |d| {
            d.descriptor(0, 0, (u64::MAX - 4, 8, 0, 0));
            d.offer(0, 0);
        },
        // An index that runs ahead.
        |d| d.memory.write_obj(1000u16, GuestAddress(d.rings(0)[1] + 2)).unwrap(),
        // A next that is no descriptor.
        |d| {
            d.descriptor(0, 0, (BUFFERS, 8, NEXT, 77));
            d.offer(0, 0);
        },
        // An indirect table within an indirect table, far outside.
        |d| {
            d.descriptor(0, 0, (MEMORY_BYTES * 2, 64, INDIRECT, 0));
            d.offer(0, 0);
        },
    ];
    for (number, crime) in crimes.into_iter().enumerate() {
        assert_eq!(driver.start(VERSION_1), 15);
        let _ = driver.wiring.raised(0);
        crime(&mut driver);
        driver.kick(0);
        wait_until(&format!("crime {number} is noticed"), || needs_reset(&driver));
        assert_eq!(driver.wiring.raised(0), 1, "the driver is told");
        driver.kick(0);
        assert_eq!(driver.used(0), None);
    }
    assert_eq!(driver.start(VERSION_1), 15);
    driver.descriptor(0, 0, (BUFFERS, 8, 0, 0));
    driver.offer(0, 0);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (0, 8));
}

#[test]
fn rings_outside_of_memory_are_noticed_at_once() {
    let mut driver = TestDriver::new(Box::new(Echo));
    driver.start(VERSION_1);
    driver.write(0x14, &[0]);
    for status in [1u8, 3] {
        driver.write(0x14, &[status]);
    }
    driver.write(8, &1u32.to_le_bytes());
    driver.write(12, &1u32.to_le_bytes());
    driver.write(0x14, &[11]);
    driver.write(0x20, &(MEMORY_BYTES - 16).to_le_bytes());
    driver.write(0x28, &0x1000u64.to_le_bytes());
    driver.write(0x30, &0x2000u64.to_le_bytes());
    driver.write(0x1c, &1u16.to_le_bytes());
    driver.write(0x14, &[15]);
    assert!(needs_reset(&driver));
}

/// Any, and those at the edges of the window's parts more often.
fn offset_in_window() -> impl Strategy<Value = u64> {
    let edge = (0u64..7, 0u64..8).prop_map(|(part, beside)| (part * 0x1000 + beside).max(4) - 4);
    prop_oneof![0u64..0x8000, edge]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever a guest writes into its registers, nothing panics, and a reset brings the device
    /// back to work.
    #[test]
    fn registers_take_anything(
        writes in prop::collection::vec((offset_in_window(), 0usize..5, any::<u64>()), 0..200),
        configs in prop::collection::vec((0usize..256, 0usize..3, any::<u32>()), 0..50),
    ) {
        let mut driver = TestDriver::new(Box::new(Echo));
        for (offset, length, value) in configs {
            let length = [1, 2, 4][length];
            driver.device.write_config(offset, &value.to_le_bytes()[..length]);
            driver.device.read_config(offset, &mut [0; 4][..length]);
        }
        for (offset, length, value) in writes {
            let length = [1, 2, 4, 8, 0][length];
            driver.write(offset, &value.to_le_bytes()[..length]);
            driver.device.read_window(offset, &mut [0; 8][..length]);
        }
        driver.device.reset();
        driver.device.write_config(4, &6u16.to_le_bytes());
        prop_assert_eq!(driver.start(VERSION_1), 15);
        driver.descriptor(0, 0, (BUFFERS, 8, 0, 0));
        driver.offer(0, 0);
        driver.kick(0);
        prop_assert_eq!(driver.wait_used(0), (0, 8));
    }

    /// Whatever the rings hold, the device answers or stops; it never spins or panics.
    #[test]
    fn rings_may_hold_anything(
        table in prop::collection::vec(any::<u8>(), 16 * 16),
        available in prop::collection::vec(any::<u8>(), 4 + 2 * 16),
        indirect in any::<bool>(),
    ) {
        let mut driver = TestDriver::new(Box::new(Echo));
        driver.start(VERSION_1);
        driver.memory.write_slice(&table, GuestAddress(driver.rings(0)[0])).unwrap();
        if indirect {
            driver.descriptor(0, 0, (driver.rings(0)[0] + 16, 15 * 16, INDIRECT, 0));
        }
        driver.memory.write_slice(&available, GuestAddress(driver.rings(0)[1])).unwrap();
        driver.memory.write_obj(16u16, GuestAddress(driver.rings(0)[1] + 2)).unwrap();
        driver.kick(0);
        let used_index = GuestAddress(driver.rings(0)[2] + 2);
        wait_until("all are answered, or the device stops", || {
            needs_reset(&driver) || driver.memory.read_obj::<u16>(used_index).unwrap() == 16
        });
    }

    /// A damaged state is refused or taken; it never panics, and the worker survives it.
    #[test]
    fn damaged_states_never_panic(
        section in 0usize..3,
        at in any::<prop::sample::Index>(),
        value in any::<u8>(),
        cut in any::<bool>(),
    ) {
        let mut driver = TestDriver::new(Box::new(Echo));
        driver.start(VERSION_1);
        let mut state = driver.state();
        let data = &mut state.sections[section].data;
        let at = at.index(data.len());
        data[at] = value;
        if cut {
            data.truncate(at);
        }
        driver.device.pause().unwrap();
        let _ = driver.device.restore(1, &state);
        driver.device.resume();
        driver.kick(0);
        driver.device.reset();
        driver.device.write_config(4, &6u16.to_le_bytes());
        prop_assert_eq!(driver.start(VERSION_1), 15);
    }
}
