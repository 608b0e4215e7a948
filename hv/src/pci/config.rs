//! A function's configuration space: 256 bytes, of which the guest may write some bits.

use super::{MMIO_END, MMIO_START, MSIX_CAPABILITY_BYTES};
use crate::state::{Decoder, Encoder, StateError};

/// Bytes in a conventional configuration space.
const BYTES: usize = 256;
/// Where capabilities begin.
const CAPABILITIES_START: u8 = 0x40;

/// Bits of the command register.
pub mod command {
    /// The function answers in its memory windows.
    pub const MEMORY: u16 = 1 << 1;
    /// The function may write memory and raise messages.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// No legacy interrupts (there are none anyway).
    pub const INTX_DISABLE: u16 = 1 << 10;
}

/// Offsets of the registers that are used here.
mod register {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x09;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
}
/// Status: there is a list of capabilities.
const STATUS_CAPABILITIES: u16 = 1 << 4;

/// Base class, subclass and programming interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClassCode(pub u8, pub u8, pub u8);

/// Who a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device, in the vendor's numbering.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// What kind of device.
    pub class: ClassCode,
    /// Vendor and device of the board.
    pub subsystem: (u16, u16),
}

/// The configuration space of one function with at most one memory window, in BAR 0.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    /// As built; a reset goes back to it.
    initial: Option<Box<[u8; BYTES]>>,
    next_capability: u8,
    last_capability: Option<u8>,
    /// Length of the window.
    window_bytes: Option<u32>,
}

impl ConfigSpace {
    /// A function of this identity. With a window: `(start, bytes)`, a power of two, aligned to
    /// itself, below 4 GiB.
    pub fn new(identity: Identity, window: Option<(u32, u32)>) -> Self {
        let mut space = Self {
            bytes: [0; BYTES],
            writable: [0; BYTES],
            initial: None,
            next_capability: CAPABILITIES_START,
            last_capability: None,
            window_bytes: None,
        };
        space.put(register::VENDOR, &identity.vendor.to_le_bytes());
        space.put(register::DEVICE, &identity.device.to_le_bytes());
        space.put(register::REVISION, &[identity.revision]);
        let ClassCode(base, sub, interface) = identity.class;
        space.put(register::CLASS, &[interface, sub, base]);
        space.put(register::SUBSYSTEM_VENDOR, &identity.subsystem.0.to_le_bytes());
        space.put(register::SUBSYSTEM, &identity.subsystem.1.to_le_bytes());
        let command = command::MEMORY | command::BUS_MASTER | command::INTX_DISABLE;
        space.allow(register::COMMAND, &command.to_le_bytes());
        space.allow(register::CACHE_LINE, &[0xff]);
        space.allow(register::INTERRUPT_LINE, &[0xff]);
        if let Some((start, bytes)) = window {
            assert!(bytes.is_power_of_two() && bytes >= 16 && start.is_multiple_of(bytes));
            space.put(register::BAR0, &start.to_le_bytes());
            // Sizing comes of itself: of ones, the lower bits do not stick.
            space.allow(register::BAR0, &(!(bytes - 1)).to_le_bytes());
            space.window_bytes = Some(bytes);
        }
        space
    }

    /// Appends a capability: its id, then what follows the link to the next one. Answers its
    /// offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> u8 {
        let at = self.next_capability;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= BYTES, "capabilities are longer than the configuration space");
        self.put(usize::from(at), &[id, 0]);
        self.put(usize::from(at) + 2, body);
        match self.last_capability {
            Some(last) => self.put(usize::from(last) + 1, &[at]),
            None => {
                self.put(register::CAPABILITIES, &[at]);
                self.put(register::STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            }
        }
        self.last_capability = Some(at);
        // Capabilities begin at multiples of 4.
        self.next_capability = end.next_multiple_of(4).min(BYTES - 4) as u8;
        at
    }

    /// Lets the guest write the bits that are set in `mask`.
    pub fn allow(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// What is here now is what a reset goes back to.
    pub fn seal(&mut self) {
        self.initial = Some(Box::new(self.bytes));
    }

    /// Back to what [`seal`](Self::seal) saw.
    pub fn reset(&mut self) {
        if let Some(initial) = &self.initial {
            self.bytes = **initial;
        }
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        self.u16_at(register::COMMAND)
    }

    /// Two bytes of the space.
    pub fn u16_at(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.bytes[offset], self.bytes[offset + 1]])
    }

    /// Four bytes of the space.
    pub fn u32_at(&self, offset: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.bytes[offset + i]))
    }

    /// The guest reads; what lies behind the space reads as ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data.iter_mut()) {
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// The guest writes; bits that are not writable stay.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        for (at, byte) in (offset..).zip(data) {
            if let (Some(mask), Some(old)) = (self.writable.get(at), self.bytes.get_mut(at)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// Writes the space's state.
    pub fn save(&self, out: &mut Encoder) {
        out.raw(&self.bytes);
        // Once: the guest is sizing the window. Now its register says so.
        out.bool(false);
    }

    /// Takes over a state of the same function: bits that the guest could not have written must
    /// be as they are here.
    ///
    /// # Errors
    /// When it is another function's.
    pub fn restore(&mut self, fields: &mut Decoder<'_>) -> Result<(), StateError> {
        let bytes = fields.array::<BYTES>("pci configuration space")?;
        let sizing = fields.bool("pci bar sizing")?;
        for (at, (new, mine)) in bytes.iter().zip(&self.bytes).enumerate() {
            if (new ^ mine) & !self.writable[at] != 0 {
                return Err(StateError::value(
                    "pci configuration space",
                    format_args!("{new:#04x} at {at:#04x}"),
                    format!("{mine:#04x}: the same function in the same slot"),
                ));
            }
        }
        self.bytes = bytes;
        if let (true, Some(window_bytes)) = (sizing, self.window_bytes) {
            self.put(register::BAR0, &(!(window_bytes - 1)).to_le_bytes());
        }
        Ok(())
    }

    /// Adds the MSI-X capability; its table and pending bits lie at these offsets of BAR 0.
    pub fn add_msix(&mut self, vectors: u16, table_offset: u32, pending_offset: u32) -> u8 {
        let mut body = Vec::with_capacity(MSIX_CAPABILITY_BYTES - 2);
        body.extend_from_slice(&(vectors - 1).to_le_bytes());
        body.extend_from_slice(&table_offset.to_le_bytes());
        body.extend_from_slice(&pending_offset.to_le_bytes());
        let at = self.add_capability(0x11, &body);
        // Enable, and mask all.
        self.allow(usize::from(at) + 2, &0xc000_u16.to_le_bytes());
        at
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Where the window lies now, `(start, bytes)`: where the guest has put it, if that is among
    /// the addresses for windows and the function answers there.
    pub fn window(&self) -> Option<(u64, u64)> {
        let bytes = u64::from(self.window_bytes?);
        let start = u64::from(self.u32_at(register::BAR0));
        let fits = (MMIO_START..=MMIO_END - bytes).contains(&start);
        (fits && self.command() & command::MEMORY != 0).then_some((start, bytes))
    }
}
