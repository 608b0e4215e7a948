//! The generation of a domain, after Microsoft's "Virtual Machine Generation ID": 16 bytes in
//! guest memory that change when the guest has become another one, a clone or an earlier state of
//! itself. Its kernel then stirs its random numbers anew, and its programs can know that what they
//! took for unique is not.
//!
//! The number lies where [`acpi`] says, in memory that is the guest's, so that it moves with the
//! guest and is the same at the destination of a live migration. Booting writes the
//! configuration's. A change while there is a guest is told by an edge on an interrupt line of its
//! own, upon which the tables' event device notifies the guest's driver: there is no register, so
//! that there is no state.

use vm_memory::{Bytes, GuestMemoryError};
use vmm_sys_util::eventfd::EventFd;

use uuid::Uuid;

use crate::acpi;
use crate::memory::GuestMemory;

/// Changes the guest's generation.
#[derive(Debug)]
pub struct Generation {
    memory: GuestMemory,
    interrupt: EventFd,
}

impl Generation {
    /// For a guest with this memory, whose interrupt line is the eventfd.
    pub fn new(memory: GuestMemory, interrupt: EventFd) -> Self {
        Self { memory, interrupt }
    }

    /// Writes the generation of a guest that does not run yet.
    ///
    /// # Errors
    /// When memory ends before its place.
    pub fn begin(&self, id: Uuid) -> Result<(), GuestMemoryError> {
        // The first three fields are little endian.
        self.memory.write_slice(&id.to_bytes_le(), acpi::GENERATION_START)
    }

    /// The guest has become another one: tells it, unless it has this generation.
    ///
    /// # Errors
    /// When memory ends before its place.
    pub fn change(&self, id: Uuid) -> Result<(), GuestMemoryError> {
        let mut present = [0; 16];
        self.memory.read_slice(&mut present, acpi::GENERATION_START)?;
        if present != id.to_bytes_le() {
            self.begin(id)?;
            // Fails only when the counter is full, and then the guest is told anyway.
            let _ = self.interrupt.write(1);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    /// The bytes are as QEMU and Windows have them, their page is dirty for a migration, and the
    /// guest is told once for each change.
    #[test]
    fn a_change_is_written_and_told_once() {
        let memory = memory::create(32 << 20).unwrap();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let generation = Generation::new(memory.clone(), interrupt.try_clone().unwrap());
        let bytes = || {
            let mut bytes = [0; 16];
            memory.read_slice(&mut bytes, acpi::GENERATION_START).unwrap();
            bytes
        };
        let told = || interrupt.read().unwrap_or(0);
        let first = Uuid::try_parse("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87").unwrap();
        generation.begin(first).unwrap();
        let expected = [
            0xaf, 0x6e, 0x4e, 0x32, 0xd1, 0xd1, 0xf6, 0x4b, 0xbf, 0x41, 0xb9, 0xbb, 0x6c, 0x91,
            0xfb, 0x87,
        ];
        assert_eq!((bytes(), told()), (expected, 0));
        generation.change(first).unwrap();
        assert_eq!(told(), 0);
        generation.change(Uuid::new_v4()).unwrap();
        assert_ne!(bytes(), expected);
        assert_eq!(told(), 1);
    }
}
