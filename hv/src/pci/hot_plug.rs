//! What tells the guest of functions that come and go, and hears of it when one may go.
//!
//! Three registers of four bytes, one bit a slot, which the ACPI tables' methods use when the
//! event's line is raised:
//!
//! | offset | read | written |
//! | --- | --- | --- |
//! | 0 | slots that were filled since the last read | |
//! | 4 | slots that the guest is asked to let go of, since the last read | |
//! | 8 | 0 | the guest has let go of these |
//!
//! Only what was asked for is ejected: a guest that plays with the registers loses what was to go,
//! at most. From that moment on the guest does not find the function; whoever owns the machine
//! takes it out of the bus when it can. A guest that lets go of what it need not (it was asked, and
//! then no more) is told of it as of something that has come.
//!
//! The line has edges, and an edge is lost while the guest has masked it: before its driver is
//! there, or as it moves. So what is [unread](HotPlug::unread) is told [again](HotPlug::remind).

use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::HOT_PLUG_SLOTS;
use crate::state::{Decoder, Encoder, StateError};

/// Bytes of the registers.
pub const REGISTER_BYTES: u16 = 12;
const UP: u16 = 0;
const DOWN: u16 = 4;
const EJECT: u16 = 8;

/// The device.
pub struct HotPlug {
    /// Raises the event's line.
    event: EventFd,
    /// Says that [`ejected`](Self::ejected) has more.
    on_eject: Box<dyn Fn() + Send + Sync>,
    registers: Mutex<Registers>,
}

/// One bit a slot each.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Registers {
    up: u32,
    down: u32,
    asked: u32,
    ejected: u32,
}

impl std::fmt::Debug for HotPlug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HotPlug").field("registers", &*self.registers()).finish_non_exhaustive()
    }
}

impl HotPlug {
    /// `event` raises the line of the tables' event; `on_eject` is called when the guest has let
    /// go of something, from a vCPU's thread.
    pub fn new(event: EventFd, on_eject: Box<dyn Fn() + Send + Sync>) -> Self {
        Self { event, on_eject, registers: Mutex::default() }
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self) {
        // Fails only when the counter is full, and then the interrupt is on its way anyway.
        let _ = self.event.write(1);
    }

    /// A function has come into this slot: the guest is told.
    pub fn plugged(&self, slot: u8) {
        self.registers().up |= bit(slot);
        self.raise();
    }

    /// Asks the guest to let go of what is in this slot. May be asked again.
    pub fn ask(&self, slot: u8) {
        let mut registers = self.registers();
        if registers.ejected & bit(slot) == 0 {
            registers.asked |= bit(slot);
            registers.down |= bit(slot);
        }
        drop(registers);
        self.raise();
    }

    /// It may stay, if the guest has not let go of it. Answers whether it does.
    pub fn keep(&self, slot: u8) -> bool {
        let mut registers = self.registers();
        registers.asked &= !bit(slot);
        registers.down &= !bit(slot);
        registers.ejected & bit(slot) == 0
    }

    /// Slots of which the guest was told, and has not read so, one bit each.
    pub fn unread(&self) -> u32 {
        let registers = self.registers();
        registers.up | registers.down
    }

    /// Tells the guest again of what it has not read.
    pub fn remind(&self) {
        if self.unread() != 0 {
            self.raise();
        }
    }

    /// Slots that the guest was asked to let go of and has not, one bit each.
    pub fn asked(&self) -> u32 {
        self.registers().asked
    }

    /// Slots that it has let go of, and whose functions are still on the bus.
    pub fn ejected(&self) -> u32 {
        self.registers().ejected
    }

    /// This slot's function has left the bus.
    pub fn gone(&self, slot: u8) {
        let mut registers = self.registers();
        let Registers { up, down, asked, ejected } = &mut *registers;
        for register in [up, down, asked, ejected] {
            *register &= !bit(slot);
        }
    }

    /// The machine goes on, perhaps elsewhere: what the guest has not read it is told again.
    pub fn resume(&self) {
        self.remind();
        if self.ejected() != 0 {
            (self.on_eject)();
        }
    }

    /// The guest reads; only whole registers.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let mut registers = self.registers();
        let value = match (offset, data.len()) {
            (UP, 4) => std::mem::take(&mut registers.up),
            (DOWN, 4) => std::mem::take(&mut registers.down),
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes().into_iter().chain([0; 4])) {
            *to = from;
        }
    }

    /// The guest writes; only whole registers.
    pub fn write(&self, offset: u16, data: &[u8]) {
        let (EJECT, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) else { return };
        let mut registers = self.registers();
        let value = u32::from_le_bytes(value) & ALL & !registers.ejected;
        let ejected = value & registers.asked;
        registers.asked &= !ejected;
        registers.ejected |= ejected;
        let stays = value & !ejected;
        registers.up |= stays;
        drop(registers);
        if stays != 0 {
            self.raise();
        }
        if ejected != 0 {
            (self.on_eject)();
        }
    }

    /// Writes its state.
    pub fn save(&self, out: &mut Encoder) {
        let Registers { up, down, asked, ejected } = *self.registers();
        for register in [up, down, asked, ejected] {
            out.u32(register);
        }
    }

    /// Takes over a state; none is that of a machine that could not do this.
    ///
    /// # Errors
    /// When it names slots from which nothing goes.
    pub fn restore(&self, fields: Option<&mut Decoder<'_>>) -> Result<(), StateError> {
        let mut restored = Registers::default();
        if let Some(fields) = fields {
            restored = Registers {
                up: slots(fields, "pci slots up")?,
                down: slots(fields, "pci slots down")?,
                asked: slots(fields, "pci slots asked")?,
                ejected: slots(fields, "pci slots ejected")?,
            };
        }
        *self.registers() = restored;
        Ok(())
    }
}

fn bit(slot: u8) -> u32 {
    assert!(HOT_PLUG_SLOTS.contains(&slot), "nothing comes or goes in PCI slot {slot}");
    1 << slot
}

/// Every slot from which something may go.
const ALL: u32 = u32::MAX << *HOT_PLUG_SLOTS.start();

fn slots(fields: &mut Decoder<'_>, field: &'static str) -> Result<u32, StateError> {
    let value = fields.u32(field)?;
    if value & !ALL != 0 {
        let accepted = format!("bits of {ALL:#x}");
        return Err(StateError::value(field, format!("{value:#x}"), accepted));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn device() -> (HotPlug, EventFd, Arc<AtomicU32>) {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let line = event.try_clone().unwrap();
        let ejects = Arc::new(AtomicU32::new(0));
        let counted = Arc::clone(&ejects);
        let count = move || {
            counted.fetch_add(1, Ordering::SeqCst);
        };
        (HotPlug::new(event, Box::new(count)), line, ejects)
    }

    fn read(device: &HotPlug, offset: u16) -> u32 {
        let mut data = [0xff; 4];
        device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// What the tables' methods do: a slot that was filled is read once; one that is to go is
    /// read, let go of, and hidden until the machine has taken it out.
    #[test]
    fn a_guest_hears_of_what_comes_and_lets_go_of_what_goes() {
        let (device, line, ejects) = device();
        device.plugged(17);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!((read(&device, UP), read(&device, UP)), (1 << 17, 0));

        device.ask(17);
        assert_eq!(line.read().unwrap(), 1);
        assert_eq!((read(&device, DOWN), read(&device, DOWN)), (1 << 17, 0));
        assert_eq!((device.asked(), device.ejected()), (1 << 17, 0));
        // Asked again, told again.
        device.ask(17);
        assert_eq!(read(&device, DOWN), 1 << 17);
        device.write(EJECT, &(1u32 << 17).to_le_bytes());
        assert_eq!((device.asked(), device.ejected()), (0, 1 << 17));
        assert_eq!(ejects.load(Ordering::SeqCst), 1);
        // Too late to ask.
        device.ask(17);
        assert_eq!((device.asked(), read(&device, DOWN)), (0, 0));
        device.gone(17);
        assert_eq!(device.ejected(), 0);
    }

    /// A guest that was asked in vain, and lets go of it when it may stay, finds it again.
    #[test]
    fn what_may_stay_after_all_is_found_again() {
        let (device, line, ejects) = device();
        device.ask(17);
        assert_eq!((line.read().unwrap(), read(&device, DOWN)), (1, 1 << 17));
        assert!(device.keep(17));
        assert_eq!((device.asked(), device.unread()), (0, 0));
        device.write(EJECT, &(1u32 << 17).to_le_bytes());
        assert_eq!((device.ejected(), ejects.load(Ordering::SeqCst)), (0, 0));
        assert_eq!((line.read().unwrap(), read(&device, UP)), (1, 1 << 17));

        device.ask(17);
        device.write(EJECT, &(1u32 << 17).to_le_bytes());
        assert!(!device.keep(17), "too late");
    }

    /// An edge that came before the guest's driver is lost: there is another one until the guest
    /// has read what there is, and none then.
    #[test]
    fn what_is_not_read_is_told_again() {
        let (device, line, _) = device();
        device.plugged(17);
        device.ask(18);
        line.read().unwrap();
        for _ in 0..2 {
            device.remind();
            assert_eq!(line.read().unwrap(), 1);
        }
        read(&device, UP);
        assert_eq!(device.unread(), 1 << 18);
        read(&device, DOWN);
        device.remind();
        assert!(line.read().is_err(), "all is read");
    }

    /// What the guest had not read is told again where it goes on, and what it has let go of is
    /// not forgotten.
    #[test]
    fn state_goes_over() {
        let (source, ..) = device();
        source.plugged(16);
        source.ask(31);
        source.ask(20);
        source.write(EJECT, &(1u32 << 20).to_le_bytes());
        let mut out = Encoder::new();
        source.save(&mut out);
        let bytes = out.into_bytes();
        let (destination, line, ejects) = device();
        destination.restore(Some(&mut Decoder::new(&bytes))).unwrap();
        destination.resume();
        assert_eq!((line.read().unwrap(), ejects.load(Ordering::SeqCst)), (1, 1));
        assert_eq!((destination.asked(), destination.ejected()), (1 << 31, 1 << 20));
        assert_eq!(read(&destination, UP), 1 << 16);

        let error = destination.restore(Some(&mut Decoder::new(&[1; 16]))).unwrap_err();
        assert!(error.to_string().contains("accepted: bits of 0xffff0000"), "{error}");
        destination.restore(None).unwrap();
        assert_eq!((destination.asked(), destination.ejected()), (0, 0));
    }

    proptest! {
        /// Whatever a guest does, only what was asked for goes, and nothing twice.
        #[test]
        fn registers_take_anything(
            asked in prop::collection::vec(16u8..32, 0..4),
            accesses in prop::collection::vec(
                (0u16..16, prop::collection::vec(any::<u8>(), 0..9), any::<bool>()), 0..40,
            ),
        ) {
            let (device, ..) = device();
            asked.iter().for_each(|slot| device.ask(*slot));
            let wanted = asked.iter().fold(0, |all, slot| all | 1u32 << slot);
            for (offset, mut data, write) in accesses {
                if write {
                    device.write(offset, &data);
                } else {
                    device.read(offset, &mut data);
                }
                prop_assert_eq!(device.asked() | device.ejected(), wanted);
                prop_assert_eq!(device.asked() & device.ejected(), 0);
            }
        }
    }
}
