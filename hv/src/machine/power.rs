//! How a guest ends itself, and how it is asked to: ACPI's fixed registers, pvpanic, reset.
//!
//! All of it is written to rarely and by one vCPU at a time, so that one lock serves.

use std::sync::{Mutex, PoisonError};

use super::exit::GuestExit;
use super::ports;
use crate::machine::migratable::{MachineState, StateSection};
use crate::state::{self, StateError, kind};

/// PM1 status and enable: the power button's bit.
const POWER_BUTTON: u16 = 1 << 8;
/// PM1 control: ACPI mode. Always on, as there is no other.
const SCI_ENABLED: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_TYPE_MASK: u16 = 0x7;
const SLEEP_ENABLE: u16 = 1 << 13;

/// pvpanic: the guest has panicked, and (second) goes on to a crash kernel.
const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 2;

/// An interrupt line that stays up until its cause is gone.
pub trait LevelLine: Send + Sync {
    /// Raises or lowers the line.
    fn set(&self, active: bool);
}

/// The device.
pub struct Power {
    line: Box<dyn LevelLine>,
    registers: Mutex<Registers>,
}

impl std::fmt::Debug for Power {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Power").finish_non_exhaustive()
    }
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Registers {
    status: u16,
    enable: u16,
    control: u16,
}

impl Registers {
    fn level(self) -> bool {
        self.status & self.enable != 0
    }
}

/// The ports that belong to this device.
pub fn owns(port: u16, length: usize) -> bool {
    let pm1 = ports::PM1_EVENT..ports::PM1_CONTROL + u16::from(ports::PM1_CONTROL_BYTES);
    pm1.contains(&port)
        || port == ports::PANIC
        || port == ports::KEYBOARD_COMMAND
        // Longer accesses there are PCI's.
        || (port == ports::RESET && length == 1)
}

impl Power {
    /// As after power-on, with the SCI's line.
    pub fn new(line: Box<dyn LevelLine>) -> Self {
        Self { line, registers: Mutex::default() }
    }

    fn with<T>(&self, run: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = registers.level();
        let answer = run(&mut registers);
        // Under the lock: lines must not change in another order than registers.
        if registers.level() != before {
            self.line.set(registers.level());
        }
        answer
    }

    /// Presses the power button; the guest decides what that means.
    pub fn press_button(&self) {
        self.with(|registers| registers.status |= POWER_BUTTON);
    }

    /// The guest reads a port that is [owned](owns).
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0);
        if port == ports::PANIC {
            data[0] = PANICKED | CRASH_LOADED;
            return;
        }
        let registers = self.with(|registers| *registers);
        let mut bytes = [0; 6];
        bytes[..2].copy_from_slice(&registers.status.to_le_bytes());
        bytes[2..4].copy_from_slice(&registers.enable.to_le_bytes());
        bytes[4..].copy_from_slice(&(registers.control | SCI_ENABLED).to_le_bytes());
        let offset = usize::from(port.wrapping_sub(ports::PM1_EVENT));
        for (to, from) in data.iter_mut().zip(bytes.get(offset..).unwrap_or_default()) {
            *to = *from;
        }
    }

    /// The guest writes a port that is [owned](owns). Answers how that ends the guest, if so.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<GuestExit> {
        let first = *data.first()?;
        match port {
            ports::PANIC if first & PANICKED != 0 => {
                Some(GuestExit::Crash("the guest's kernel panicked".into()))
            }
            ports::RESET if first & ports::RESET_BIT != 0 => Some(GuestExit::Reboot),
            ports::KEYBOARD_COMMAND if first == ports::KEYBOARD_RESET => Some(GuestExit::Reboot),
            ports::PM1_EVENT..=ports::PM1_CONTROL => self.with(|registers| {
                // Registers are words; a longer access goes on in the next.
                for (word, port) in data.chunks(2).zip((port..).step_by(2)) {
                    let value = u16::from_le_bytes([word[0], word.get(1).copied().unwrap_or(0)]);
                    if let Some(exit) = write_word(registers, port, value) {
                        return Some(exit);
                    }
                }
                None
            }),
            _ => None,
        }
    }

    /// As after power-on.
    pub fn reset(&self) {
        self.with(|registers| *registers = Registers::default());
    }

    /// Its state.
    pub fn save(&self) -> StateSection {
        let registers = self.with(|registers| *registers);
        state::section(kind::ACPI, 0, 1, |out| {
            out.u16(registers.status);
            out.u16(registers.enable);
            out.u16(registers.control);
        })
    }

    /// Takes over a state. The line's level is the I/O APIC's to restore.
    ///
    /// # Errors
    /// When the section is missing or malformed.
    pub fn restore(&self, state: &MachineState) -> Result<(), StateError> {
        let mut fields = state::fields(state::find(state, kind::ACPI, 0)?, 1)?;
        let restored = Registers {
            status: fields.u16("acpi status")?,
            enable: fields.u16("acpi enable")?,
            control: fields.u16("acpi control")?,
        };
        fields.finish("acpi")?;
        *self.registers.lock().unwrap_or_else(PoisonError::into_inner) = restored;
        Ok(())
    }
}

fn write_word(registers: &mut Registers, port: u16, value: u16) -> Option<GuestExit> {
    const ENABLE: u16 = ports::PM1_EVENT + 2;
    match port {
        // Writing a one clears.
        ports::PM1_EVENT => registers.status &= !value,
        ENABLE => registers.enable = value,
        ports::PM1_CONTROL => {
            registers.control = value & !SLEEP_ENABLE;
            let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
            if value & SLEEP_ENABLE != 0 && sleep_type == ports::SLEEP_TYPE_OFF {
                return Some(GuestExit::Shutdown);
            }
        }
        _ => {}
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    struct Line(Arc<AtomicBool>);
    impl LevelLine for Line {
        fn set(&self, active: bool) {
            self.0.store(active, Ordering::SeqCst);
        }
    }

    fn device() -> (Power, Arc<AtomicBool>) {
        let line = Arc::new(AtomicBool::new(false));
        (Power::new(Box::new(Line(Arc::clone(&line)))), line)
    }

    /// The line is up exactly while the button was pressed, is enabled, and not acknowledged.
    #[test]
    fn button_raises_the_line_until_acknowledged() {
        let (power, line) = device();
        power.press_button();
        assert!(!line.load(Ordering::SeqCst), "not enabled");
        assert!(power.write(0x602, &0x0120u16.to_le_bytes()).is_none());
        assert!(line.load(Ordering::SeqCst));
        let mut status = [0; 2];
        power.read(0x600, &mut status);
        assert_eq!(u16::from_le_bytes(status), 0x100);
        assert!(power.write(0x600, &0x100u16.to_le_bytes()).is_none());
        assert!(!line.load(Ordering::SeqCst));
    }

    #[test]
    fn each_way_to_end_is_told_apart() {
        let (power, _) = device();
        let off = 5u16 << 10 | 1 << 13;
        assert_eq!(power.write(0x604, &off.to_le_bytes()), Some(GuestExit::Shutdown));
        let sleep = 1u16 << 10 | 1 << 13;
        assert_eq!(power.write(0x604, &sleep.to_le_bytes()), None);
        assert_eq!(power.write(0x604, &(5u16 << 10).to_le_bytes()), None, "not enabled");
        assert_eq!(power.write(0xcf9, &[6]), Some(GuestExit::Reboot));
        assert_eq!(power.write(0xcf9, &[2]), None);
        assert_eq!(power.write(0x64, &[0xfe]), Some(GuestExit::Reboot));
        assert_eq!(power.write(0x64, &[0x20]), None);
        assert!(matches!(power.write(0x505, &[1]), Some(GuestExit::Crash(_))));
        assert_eq!(power.write(0x505, &[2]), None, "its crash kernel takes over");
        let mut answer = [0];
        power.read(0x505, &mut answer);
        assert_eq!(answer, [3]);
    }

    #[test]
    fn state_goes_over() {
        let (source, _) = device();
        source.write(0x602, &[0, 1]);
        source.press_button();
        source.write(0x604, &[0xff, 0x03]);
        let (destination, _) = device();
        let state = MachineState { sections: vec![source.save()] };
        destination.restore(&state).unwrap();
        let (mut before, mut after) = ([0; 4], [0; 4]);
        for (port, length) in [(0x600, 4), (0x604, 2)] {
            source.read(port, &mut before[..length]);
            destination.read(port, &mut after[..length]);
            assert_eq!(before, after);
        }
    }
}
