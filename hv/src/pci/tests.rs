//! The bus as a guest's firmware sees it: probing, sizing, capabilities, MSI-X.

use std::sync::Mutex;

use super::*;
use crate::machine::migratable::{MachineState, StateSection};
use crate::state::{self, Decoder, Encoder, StateError, kind};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Lines are eventfds that a test can look at.
#[derive(Default)]
pub(crate) struct TestWiring {
    pub(crate) lines: Mutex<Vec<EventFd>>,
    pub(crate) staged: Mutex<Vec<(u32, MsiMessage)>>,
    pub(crate) commits: Mutex<u32>,
    pub(crate) io_events: Mutex<Vec<(EventFd, u64)>>,
}

impl Wiring for TestWiring {
    fn add_irqfd(&self, fd: &EventFd) -> std::io::Result<u32> {
        let mut lines = self.lines.lock().unwrap();
        lines.push(fd.try_clone()?);
        Ok(lines.len() as u32 - 1)
    }
    fn remove_irqfd(&self, _: &EventFd, _: u32) -> std::io::Result<()> {
        Ok(())
    }
    fn stage_msi(&self, line: u32, message: MsiMessage) {
        self.staged.lock().unwrap().push((line, message));
    }
    fn commit_msi(&self) -> std::io::Result<()> {
        *self.commits.lock().unwrap() += 1;
        Ok(())
    }
    fn add_ioeventfd(&self, fd: &EventFd, address: u64) -> std::io::Result<()> {
        let mut wired = self.io_events.lock().unwrap();
        if wired.iter().any(|(_, taken)| *taken == address) {
            return Err(std::io::ErrorKind::AlreadyExists.into());
        }
        wired.push((fd.try_clone()?, address));
        Ok(())
    }
    fn remove_ioeventfd(&self, _: &EventFd, address: u64) -> std::io::Result<()> {
        self.io_events.lock().unwrap().retain(|(_, wired)| *wired != address);
        Ok(())
    }
}

impl TestWiring {
    /// How often the line was raised since the last look.
    pub(crate) fn raised(&self, line: usize) -> u64 {
        self.lines.lock().unwrap()[line].read().unwrap_or(0)
    }
}

fn config_read(bus: &PciBus, slot: u32, register: u32) -> u32 {
    let address = 1 << 31 | slot << 11 | register;
    assert!(bus.write_port(0xcf8, &address.to_le_bytes()));
    let mut data = [0; 4];
    assert!(bus.read_port(0xcfc, &mut data));
    u32::from_le_bytes(data)
}

#[test]
fn a_guest_finds_the_host_bridge_and_nothing_else() {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let bus = PciBus::new(Arc::new(TestWiring::default()), HotPlug::new(event, Box::new(|| ())));
    assert_eq!(config_read(&bus, 0, 0), 0x0008_1b36);
    assert_eq!(config_read(&bus, 0, 8) >> 8, 0x06_0000);
    for slot in 1..32 {
        assert_eq!(config_read(&bus, slot, 0), u32::MAX);
    }
    assert!(!bus.read_port(0xd00, &mut [0]));
    assert!(!bus.read_memory(MMIO_START, &mut [0; 4]));
}

/// A function that has a state of its own and nothing else.
struct Simple;

impl PciFunction for Simple {
    fn window(&self) -> Option<(u64, u64)> {
        None
    }
    fn read_config(&self, _: usize, data: &mut [u8]) {
        data.fill(0x11);
    }
    fn write_config(&self, _: usize, _: &[u8]) {}
    fn read_window(&self, _: u64, _: &mut [u8]) {}
    fn write_window(&self, _: u64, _: &[u8]) {}
    fn reset(&self) {}
    fn save(&self, slot: u32) -> Vec<StateSection> {
        vec![state::section(kind::PCI_FUNCTION, slot, 1, |_| ())]
    }
    fn restore(&self, slot: u32, state: &MachineState) -> Result<(), StateError> {
        state::find(state, kind::PCI_FUNCTION, slot).map(drop)
    }
}

fn bus(slots: &[u8]) -> PciBus {
    let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let bus = PciBus::new(Arc::new(TestWiring::default()), HotPlug::new(event, Box::new(|| ())));
    slots.iter().for_each(|slot| bus.add(*slot, Arc::new(Simple)));
    bus
}

/// A disk that was attached has its slot where the guest goes on, with the hole before it; another
/// slot is another machine. What the guest has let go of it does not find there either.
#[test]
fn functions_keep_their_slots_and_holes_stay() {
    let source = bus(&[1, 16, 18]);
    source.hot_plug().ask(18);
    source.write_port(0xcf8, &(1u32 << 31 | 18 << 11).to_le_bytes());
    let state = MachineState { sections: source.save() };
    let destination = bus(&[1, 16, 18]);
    destination.restore(&state).unwrap();
    assert_eq!(destination.hot_plug().asked(), 1 << 18);
    let mut data = [0; 4];
    assert!(destination.read_port(0xcfc, &mut data) && data == [0x11; 4]);
    destination.hot_plug().write(8, &(1u32 << 18).to_le_bytes());
    assert_eq!(config_read(&destination, 18, 0), u32::MAX);
    assert_eq!(config_read(&destination, 16, 0), 0x1111_1111);

    let error = bus(&[1, 16, 17]).restore(&state).unwrap_err().to_string();
    assert!(error.contains("0x50003") && error.contains("0x30003"), "{error}");
}

/// A machine whose functions could not come or go said how many it had.
#[test]
fn a_state_of_the_first_version_is_read() {
    let mut sections = bus(&[1, 2]).save();
    sections[0] = state::section(kind::PCI, 0, 1, |out| {
        out.u32(0);
        out.u8(3);
    });
    let state = MachineState { sections };
    bus(&[1, 2]).restore(&state).unwrap();
    assert!(bus(&[1, 3]).restore(&state).is_err());
    assert!(bus(&[1]).restore(&state).is_err());
}

fn space() -> ConfigSpace {
    let identity = Identity {
        vendor: 1,
        device: 2,
        revision: 3,
        class: ClassCode(2, 0, 0),
        subsystem: (4, 5),
    };
    let mut space = ConfigSpace::new(identity, Some((0xe010_0000, 0x8000)));
    space.add_capability(9, &[1, 2, 3]);
    let msix = space.add_msix(3, 0x4000, 0x5000);
    assert_eq!(msix, 0x48);
    space.seal();
    space
}

#[test]
fn bars_size_and_move_among_the_windows() {
    let mut space = space();
    let read = |space: &ConfigSpace| {
        let mut data = [0; 4];
        space.read(0x10, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(read(&space), 0xe010_0000);
    space.write(0x10, &u32::MAX.to_le_bytes());
    assert_eq!(read(&space), 0xffff_8000);
    space.write(4, &command::MEMORY.to_le_bytes());
    for (written, window) in [
        (0xe000_0000_u32, Some((0xe000_0000, 0x8000))),
        (0xe230_8fff, Some((0xe230_8000, 0x8000))),
        (MMIO_END as u32 - 0x8000, Some((MMIO_END - 0x8000, 0x8000))),
        // Where guests have memory, or the interrupt controllers.
        (0xd000_0000, None),
        (MMIO_END as u32, None),
        (u32::MAX, None),
        (0, None),
    ] {
        space.write(0x10, &written.to_le_bytes());
        assert_eq!((read(&space), space.window()), (written & !0x7fff, window));
    }
    space.reset();
    assert_eq!((read(&space), space.window()), (0xe010_0000, None));
}

/// A state from before BARs could move: its guest was sizing one.
#[test]
fn an_old_state_in_the_middle_of_sizing_is_read() {
    let mut out = Encoder::new();
    space().save(&mut out);
    let mut bytes = out.into_bytes();
    *bytes.last_mut().unwrap() = 1;
    let mut space = space();
    space.restore(&mut Decoder::new(&bytes)).unwrap();
    assert_eq!(space.u32_at(0x10), 0xffff_8000);
}

#[test]
fn only_writable_bits_change_and_a_reset_undoes_them() {
    let mut space = space();
    space.write(0, &[0xff; 256]);
    assert_eq!((space.u32_at(0), space.u32_at(0x10)), (0x0002_0001, 0xffff_8000));
    assert_eq!(space.command(), command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE);
    assert_eq!(space.u16_at(0x4a), 0xc002);
    space.reset();
    assert_eq!((space.command(), space.u16_at(0x4a)), (0, 2));
}

#[test]
fn capabilities_are_a_list() {
    let space = space();
    assert_eq!(space.u16_at(6), 1 << 4);
    assert_eq!(space.u32_at(0x34) as u8, 0x40);
    assert_eq!(space.u16_at(0x40), 0x4809);
    assert_eq!(space.u16_at(0x48), 0x0011);
}

#[test]
fn another_functions_space_is_refused() {
    let mine = space();
    let mut out = Encoder::new();
    mine.save(&mut out);
    let mut bytes = out.into_bytes();
    space().restore(&mut Decoder::new(&bytes)).unwrap();
    bytes[0] = 7;
    let error = space().restore(&mut Decoder::new(&bytes)).unwrap_err().to_string();
    assert!(error.contains("0x07 at 0x00"), "{error}");
}

const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_1000, data: 0x4041 };

fn program(msix: &Msix, vector: u64) {
    msix.write_table(vector * 16, &MESSAGE.address.to_le_bytes());
    msix.write_table(vector * 16 + 8, &MESSAGE.data.to_le_bytes());
    msix.write_table(vector * 16 + 12, &0u32.to_le_bytes());
}

#[test]
fn a_masked_vector_stays_pending_until_it_is_unmasked() {
    let wiring = Arc::new(TestWiring::default());
    let msix = Msix::new(wiring.clone(), 3).unwrap();
    msix.raise(1);
    let mut pending = [0; 8];
    msix.read_pending(0, &mut pending);
    assert_eq!(pending[0], 0, "a disabled function has nothing pending");

    msix.set_control(0xc000);
    program(&msix, 1);
    msix.raise(1);
    msix.raise(9);
    msix.read_pending(0, &mut pending);
    assert_eq!((pending[0], wiring.raised(1)), (2, 0));
    msix.set_control(0x8000);
    msix.read_pending(0, &mut pending);
    assert_eq!((pending[0], wiring.raised(1)), (0, 1));
    assert_eq!(wiring.staged.lock().unwrap().last(), Some(&(1, MESSAGE)));
    msix.raise(1);
    assert_eq!(wiring.raised(1), 1);

    msix.write_table(16 + 12, &1u32.to_le_bytes());
    msix.raise(1);
    assert_eq!(wiring.raised(1), 0);
    msix.write_table(16 + 12, &0u32.to_le_bytes());
    assert_eq!(wiring.raised(1), 1);
}

#[test]
fn a_restored_table_routes_as_before_with_one_commit() {
    let msix = Msix::new(Arc::new(TestWiring::default()), 2).unwrap();
    msix.set_control(0x8000);
    program(&msix, 0);
    msix.raise(1);
    let mut out = Encoder::new();
    msix.save(&mut out);
    let bytes = out.into_bytes();

    let wiring = Arc::new(TestWiring::default());
    let restored = Msix::new(wiring.clone(), 2).unwrap();
    restored.restore(&mut Decoder::new(&bytes)).unwrap();
    assert_eq!(*wiring.staged.lock().unwrap(), [(0, MESSAGE)]);
    assert_eq!(*wiring.commits.lock().unwrap(), 0);
    restored.raise(0);
    assert_eq!(wiring.raised(0), 1);
    program(&restored, 1);
    assert_eq!(wiring.raised(1), 1, "pending bits travel");

    let other = Msix::new(Arc::new(TestWiring::default()), 3).unwrap();
    let error = other.restore(&mut Decoder::new(&bytes)).unwrap_err().to_string();
    assert_eq!(error, "state: msix vectors is 2; accepted: 3");
}
