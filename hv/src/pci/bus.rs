//! The bus: finds the function behind a port or an address.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::config::{ClassCode, ConfigSpace, Identity};
use super::{CONFIG_PORT_END, CONFIG_PORT_START, HotPlug, SLOTS, Wiring};
use crate::machine::migratable::{MachineState, StateSection};
use crate::state::{self, StateError, kind};

/// Mechanism #1: the address register's enable bit.
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Red Hat's generic host bridge, for which no guest has quirks.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: ClassCode(0x06, 0x00, 0x00),
    subsystem: (0x1af4, 0x1100),
};

/// A function on the bus. Calls come from any vCPU's thread.
pub trait PciFunction: Send + Sync {
    /// Its memory window, `(start, bytes)`, where it answers now.
    fn window(&self) -> Option<(u64, u64)>;
    /// The guest reads configuration space; 1, 2 or 4 bytes within a word.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// The guest writes configuration space; 1, 2 or 4 bytes within a word.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// The guest reads the window.
    fn read_window(&self, offset: u64, data: &mut [u8]);
    /// The guest writes the window.
    fn write_window(&self, offset: u64, data: &[u8]);
    /// As after power-on.
    fn reset(&self);
    /// Its state, as sections whose instance is `slot`. The machine is paused.
    fn save(&self, slot: u32) -> Vec<StateSection>;
    /// Takes over a state. The machine is paused, and routes are committed by the bus.
    fn restore(&self, slot: u32, state: &MachineState) -> Result<(), StateError>;
}

/// The one bus of a machine.
pub struct PciBus {
    wiring: Arc<dyn Wiring>,
    address: AtomicU32,
    /// By slot. Whoever calls a function holds no lock here: it may come and go meanwhile.
    functions: RwLock<Functions>,
    hot_plug: HotPlug,
}

type Functions = [Option<Arc<dyn PciFunction>>; SLOTS as usize];

impl std::fmt::Debug for PciBus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciBus").field("slots", &self.slots()).finish_non_exhaustive()
    }
}

impl PciBus {
    /// A bus with the host bridge in slot 0.
    pub fn new(wiring: Arc<dyn Wiring>, hot_plug: HotPlug) -> Self {
        let mut functions = Functions::default();
        functions[0] = Some(Arc::new(HostBridge::new()));
        Self { wiring, address: AtomicU32::new(0), functions: RwLock::new(functions), hot_plug }
    }

    /// What tells the guest of functions that come and go.
    pub fn hot_plug(&self) -> &HotPlug {
        &self.hot_plug
    }

    /// The first slot that is free.
    pub fn next_slot(&self) -> u8 {
        (!self.slots()).trailing_zeros() as u8
    }

    /// Puts a function into a slot.
    ///
    /// # Panics
    /// When it is taken: the configuration's checks keep that away.
    pub fn add(&self, slot: u8, function: Arc<dyn PciFunction>) {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        let before = functions[usize::from(slot)].replace(function);
        assert!(before.is_none(), "PCI slot {slot} is taken");
    }

    /// Takes the function out of a slot.
    pub fn remove(&self, slot: u8) {
        let mut functions = self.functions.write().unwrap_or_else(PoisonError::into_inner);
        let gone = functions[usize::from(slot)].take();
        drop(functions);
        // Its end may take a moment.
        drop(gone);
    }

    /// The slots that are taken, one bit each.
    fn slots(&self) -> u32 {
        self.each().fold(0, |slots, (slot, _)| slots | 1 << slot)
    }

    /// The functions, with their slots.
    fn each(&self) -> impl Iterator<Item = (u32, Arc<dyn PciFunction>)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner).clone();
        (0..).zip(functions).filter_map(|(slot, function)| Some((slot, function?)))
    }

    /// The guest reads a port; false when it is none of ours.
    pub fn read_port(&self, port: u16, data: &mut [u8]) -> bool {
        if !(CONFIG_PORT_START..CONFIG_PORT_END).contains(&port) {
            return false;
        }
        data.fill(0xff);
        let offset = usize::from(port - CONFIG_PORT_START);
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.address.load(Ordering::SeqCst).to_le_bytes()),
            (4..8, 1 | 2 | 4) if offset % 4 + data.len() <= 4 => {
                if let Some((function, register)) = self.selected() {
                    function.read_config(register + offset % 4, data);
                }
            }
            _ => {}
        }
        true
    }

    /// The guest writes a port; false when it is none of ours.
    pub fn write_port(&self, port: u16, data: &[u8]) -> bool {
        if !(CONFIG_PORT_START..CONFIG_PORT_END).contains(&port) {
            return false;
        }
        let offset = usize::from(port - CONFIG_PORT_START);
        match (offset, data) {
            (0, &[a, b, c, d]) => {
                self.address.store(u32::from_le_bytes([a, b, c, d]), Ordering::SeqCst);
            }
            (4..8, _) if offset % 4 + data.len() <= 4 => {
                if let Some((function, register)) = self.selected() {
                    function.write_config(register + offset % 4, data);
                }
            }
            _ => {}
        }
        true
    }

    /// The function and register that the address register names.
    fn selected(&self) -> Option<(Arc<dyn PciFunction>, usize)> {
        let address = self.address.load(Ordering::SeqCst);
        let (bus, slot, function) =
            (address >> 16 & 0xff, address >> 11 & 0x1f, address >> 8 & 0x7);
        let ejected = self.hot_plug.ejected() & 1 << slot != 0;
        if address & ADDRESS_ENABLE == 0 || bus != 0 || function != 0 || ejected {
            return None;
        }
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        Some((functions.get(slot as usize)?.clone()?, (address & 0xfc) as usize))
    }

    /// The guest reads an address; false when it is none of ours.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) -> bool {
        match self.at(address, data.len()) {
            Some((function, offset)) => function.read_window(offset, data),
            None => return false,
        }
        true
    }

    /// The guest writes an address; false when it is none of ours.
    pub fn write_memory(&self, address: u64, data: &[u8]) -> bool {
        match self.at(address, data.len()) {
            Some((function, offset)) => function.write_window(offset, data),
            None => return false,
        }
        true
    }

    fn at(&self, address: u64, length: usize) -> Option<(Arc<dyn PciFunction>, u64)> {
        let functions = self.functions.read().unwrap_or_else(PoisonError::into_inner);
        functions.iter().flatten().find_map(|function| {
            let (start, bytes) = function.window()?;
            let offset = address.checked_sub(start)?;
            let within = offset.checked_add(length as u64)? <= bytes;
            within.then(|| (Arc::clone(function), offset))
        })
    }

    /// Every function as after power-on.
    pub fn reset(&self) {
        self.address.store(0, Ordering::SeqCst);
        for (_, function) in self.each() {
            function.reset();
        }
    }

    /// The state of the bus and of every function on it.
    pub fn save(&self) -> Vec<StateSection> {
        let mut sections = vec![state::section(kind::PCI, 0, 2, |out| {
            out.u32(self.address.load(Ordering::SeqCst));
            out.u32(self.slots());
            self.hot_plug.save(out);
        })];
        for (slot, function) in self.each() {
            sections.extend(function.save(slot));
        }
        sections
    }

    /// Takes over the state of a bus with the same functions in the same slots.
    ///
    /// # Errors
    /// When it is another machine's, or KVM refuses its interrupt routes.
    pub fn restore(&self, state: &MachineState) -> Result<(), RestoreError> {
        let section = state::find(state, kind::PCI, 0)?;
        let mut fields = state::fields(section, 2)?;
        let address = fields.u32("pci address")?;
        let slots = match section.version {
            // How many, from 0 on without a hole.
            1 => 1u32.checked_shl(fields.u8("pci slots")?.into()).unwrap_or(0).wrapping_sub(1),
            _ => fields.u32("pci slots")?,
        };
        if slots != self.slots() {
            let accepted = format!("{:#x}", self.slots());
            return Err(StateError::value("pci slots", format!("{slots:#x}"), accepted).into());
        }
        self.hot_plug.restore((section.version > 1).then_some(&mut fields))?;
        fields.finish("pci")?;
        self.address.store(address, Ordering::SeqCst);
        for (slot, function) in self.each() {
            function.restore(slot, state)?;
        }
        self.wiring.commit_msi().map_err(RestoreError::Routes)
    }
}

/// Why a bus could not take over a state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The state is not one of this machine.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM refused the interrupt routes.
    #[error("pci: interrupt routes were refused: {0}")]
    Routes(io::Error),
}

/// The bridge between the CPUs and the bus: an identity, and nothing to do.
struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    fn new() -> Self {
        let mut config = ConfigSpace::new(HOST_BRIDGE, None);
        config.seal();
        Self { config: Mutex::new(config) }
    }

    fn with<T>(&self, run: impl FnOnce(&mut ConfigSpace) -> T) -> T {
        run(&mut self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl PciFunction for HostBridge {
    fn window(&self) -> Option<(u64, u64)> {
        None
    }
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.with(|config| config.read(offset, data));
    }
    fn write_config(&self, offset: usize, data: &[u8]) {
        self.with(|config| config.write(offset, data));
    }
    fn read_window(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_window(&self, _: u64, _: &[u8]) {}
    fn reset(&self) {
        self.with(ConfigSpace::reset);
    }
    fn save(&self, slot: u32) -> Vec<StateSection> {
        vec![state::section(kind::PCI_FUNCTION, slot, 1, |out| self.with(|c| c.save(out)))]
    }
    fn restore(&self, slot: u32, state: &MachineState) -> Result<(), StateError> {
        let mut fields = state::fields(state::find(state, kind::PCI_FUNCTION, slot)?, 1)?;
        self.with(|config| config.restore(&mut fields))?;
        fields.finish("pci function")
    }
}
