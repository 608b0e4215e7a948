//! MSI-X: a table of messages in the function's window, one eventfd a vector.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{MsiMessage, Wiring};
use crate::state::{Decoder, Encoder, StateError};

/// Length of the capability in configuration space.
pub const MSIX_CAPABILITY_BYTES: usize = 12;
/// Most vectors of a function: as many bits as one word of the pending array has.
const VECTORS_MAX: u16 = 64;
/// Bytes in a table entry.
const ENTRY_BYTES: usize = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
const ENTRY_MASKED: u32 = 1;
/// Guests that make KVM refuse a message are told so in the log this often.
const COMPLAINTS_MAX: u32 = 4;

/// One function's vectors. A vector that is raised while it is masked stays pending, and is
/// raised when it is unmasked.
pub struct Msix {
    wiring: Arc<dyn Wiring>,
    vectors: Vec<Vector>,
    table: Mutex<Table>,
}

struct Vector {
    line: u32,
    fd: EventFd,
}

struct Table {
    control: u16,
    entries: Vec<Entry>,
    pending: u64,
    complaints: u32,
}

#[derive(Clone, Copy)]
struct Entry {
    message: MsiMessage,
    control: u32,
}

impl Entry {
    const RESET: Self = Self { message: MsiMessage { address: 0, data: 0 }, control: ENTRY_MASKED };
}

impl Table {
    fn is_live(&self, vector: usize) -> bool {
        self.control & (CONTROL_ENABLE | CONTROL_MASK_ALL) == CONTROL_ENABLE
            && self.entries[vector].control & ENTRY_MASKED == 0
    }
}

impl std::fmt::Debug for Msix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Msix").field("vectors", &self.vectors.len()).finish_non_exhaustive()
    }
}

impl Msix {
    /// Vectors with an eventfd each, joined to the VM; disabled.
    ///
    /// # Errors
    /// When the system has no eventfds or interrupt lines left.
    pub fn new(wiring: Arc<dyn Wiring>, vectors: u16) -> io::Result<Self> {
        assert!((1..=VECTORS_MAX).contains(&vectors));
        let make = |_| {
            let fd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            Ok(Vector { line: wiring.add_irqfd(&fd)?, fd })
        };
        let entries = vec![Entry::RESET; usize::from(vectors)];
        let table = Table { control: 0, entries, pending: 0, complaints: 0 };
        let vectors = (0..vectors).map(make).collect::<io::Result<_>>()?;
        Ok(Self { wiring, vectors, table: Mutex::new(table) })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Raises a vector; one that does not exist (0xffff: none) raises nothing.
    pub fn raise(&self, vector: u16) {
        let vector = usize::from(vector);
        if vector >= self.vectors.len() {
            return;
        }
        let mut table = self.table();
        if table.is_live(vector) {
            self.fire(vector);
        } else if table.control & CONTROL_ENABLE != 0 {
            table.pending |= 1 << vector;
        }
    }

    fn fire(&self, vector: usize) {
        // Fails only when the counter is full, and then the interrupt is on its way anyway.
        let _ = self.vectors[vector].fd.write(1);
    }

    /// The guest wrote the capability's control word.
    pub fn set_control(&self, control: u16) {
        let mut table = self.table();
        table.control = control & (CONTROL_ENABLE | CONTROL_MASK_ALL);
        if control & CONTROL_ENABLE == 0 {
            table.pending = 0;
        }
        let all = 0..self.vectors.len();
        self.apply(&mut table, all);
    }

    /// The guest reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.table();
        for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
            *byte = match table.entries.get(at / ENTRY_BYTES) {
                Some(entry) => entry.bytes()[at % ENTRY_BYTES],
                None => 0,
            };
        }
    }

    /// The guest writes the table; only whole aligned words of 4 or 8 bytes count.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let vector = offset as usize / ENTRY_BYTES;
        let at = offset as usize % ENTRY_BYTES;
        if vector >= self.vectors.len() || !matches!(data.len(), 4 | 8) || !at.is_multiple_of(4) {
            return;
        }
        let mut table = self.table();
        let mut bytes = table.entries[vector].bytes();
        let end = (at + data.len()).min(ENTRY_BYTES);
        bytes[at..end].copy_from_slice(&data[..end - at]);
        table.entries[vector] = Entry::from_bytes(bytes);
        self.apply(&mut table, vector..vector + 1);
    }

    /// The guest reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let pending = self.table().pending.to_le_bytes();
        for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
            *byte = pending.get(at).copied().unwrap_or(0);
        }
    }

    /// Makes the routing table say what these vectors say, then raises what was pending.
    fn apply(&self, table: &mut Table, vectors: std::ops::Range<usize>) {
        self.stage(table, vectors.clone());
        if let Err(error) = self.wiring.commit_msi() {
            // The guest wrote an address that is no APIC's: its interrupt does not come.
            if table.complaints < COMPLAINTS_MAX {
                table.complaints += 1;
                tracing::warn!(%error, "an MSI-X message was refused");
            }
            return;
        }
        for vector in vectors {
            if table.is_live(vector) && table.pending & (1 << vector) != 0 {
                table.pending &= !(1 << vector);
                self.fire(vector);
            }
        }
    }

    fn stage(&self, table: &Table, vectors: std::ops::Range<usize>) {
        for vector in vectors.filter(|vector| table.is_live(*vector)) {
            self.wiring.stage_msi(self.vectors[vector].line, table.entries[vector].message);
        }
    }

    /// Gives the lines back: the function leaves the bus.
    pub fn release(&self) {
        for vector in &self.vectors {
            if let Err(error) = self.wiring.remove_irqfd(&vector.fd, vector.line) {
                tracing::warn!(%error, line = vector.line, "an interrupt line stays taken");
            }
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        let mut table = self.table();
        table.control = 0;
        table.pending = 0;
        table.entries.fill(Entry::RESET);
    }

    /// Writes the table's state.
    pub fn save(&self, out: &mut Encoder) {
        let table = self.table();
        out.u16(table.control);
        out.u16(self.vectors());
        for entry in &table.entries {
            out.raw(&entry.bytes());
        }
        out.u64(table.pending);
    }

    /// Takes over a state. The routes are staged only: the bus commits those of all functions
    /// at once.
    ///
    /// # Errors
    /// When the function there had another number of vectors.
    pub fn restore(&self, fields: &mut Decoder<'_>) -> Result<(), StateError> {
        let control = fields.u16("msix control")?;
        let count = fields.u16("msix vectors")?;
        if count != self.vectors() {
            return Err(StateError::value("msix vectors", count, self.vectors().to_string()));
        }
        let mut table = self.table();
        for entry in &mut table.entries {
            *entry = Entry::from_bytes(fields.array("msix entry")?);
        }
        table.control = control & (CONTROL_ENABLE | CONTROL_MASK_ALL);
        table.pending = fields.u64("msix pending")?;
        self.stage(&table, 0..self.vectors.len());
        Ok(())
    }
}

impl Entry {
    fn bytes(self) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; ENTRY_BYTES]) -> Self {
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let address = u64::from(word(0)) | u64::from(word(4)) << 32;
        let message = MsiMessage { address, data: word(8) };
        Self { message, control: word(12) & ENTRY_MASKED }
    }
}
