//! The serial port: a 16550 at COM1's place, between the guest and its [`Console`].

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;
use crate::machine::migratable::{MachineState, StateSection};
use crate::state::{self, StateError, kind};

/// What people typed and the guest has not read yet, bytes; more is dropped.
pub const INPUT_BYTES_MAX: usize = 4096;
/// Register of received and sent data, with the divisor latch closed.
const DATA: u8 = 0;
/// Bit of the interrupt identification register.
const NONE_PENDING: u8 = 1;
/// The port's own buffer, bytes (vm-superio's).
const FIFO_BYTES_MAX: usize = 0x40;
/// So much of the console's history moves with the guest, bytes.
const HISTORY_SAVED_BYTES: usize = 64 << 10;

/// The device.
pub struct SerialPort {
    console: Arc<Console>,
    interrupt: Arc<EventFd>,
    inner: Mutex<Inner>,
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

struct Inner {
    uart: Serial<Interrupt, NoEvents, Output>,
    input: VecDeque<u8>,
}

struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Output(Arc<Console>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl SerialPort {
    /// A port that speaks to `console` and interrupts by writing to `interrupt`.
    pub fn new(console: Arc<Console>, interrupt: EventFd) -> Self {
        let interrupt = Arc::new(interrupt);
        let uart = Serial::new(Interrupt(Arc::clone(&interrupt)), Output(Arc::clone(&console)));
        let inner = Mutex::new(Inner { uart, input: VecDeque::new() });
        Self { console, interrupt, inner }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads a register; more than one byte are reads one after the other.
    pub fn read(&self, register: u8, data: &mut [u8]) {
        let mut inner = self.inner();
        for byte in data {
            *byte = inner.uart.read(register);
            if register == DATA {
                inner.feed();
            }
        }
    }

    /// The guest writes a register; more than one byte are writes one after the other.
    pub fn write(&self, register: u8, data: &[u8]) {
        let mut inner = self.inner();
        for &byte in data {
            // An interrupt that cannot be raised is the eventfd's counter at its end: there is
            // one pending already.
            let _ = inner.uart.write(register, byte);
        }
    }

    /// Someone types. What does not fit is dropped; answers how much was taken.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut inner = self.inner();
        let room = INPUT_BYTES_MAX - inner.input.len();
        let taken = bytes.len().min(room);
        inner.input.extend(&bytes[..taken]);
        if !inner.feed() {
            // What came before is still there: its interrupt may have been lost.
            self.raise_pending(&inner);
        }
        taken
    }

    /// The machine goes on, perhaps elsewhere: an interrupt that is pending is raised again, as its
    /// edge may have been lost on the way, and the port raises no second one.
    pub fn resume(&self) {
        self.raise_pending(&self.inner());
    }

    fn raise_pending(&self, inner: &Inner) {
        if inner.uart.state().interrupt_identification & NONE_PENDING == 0 {
            // Fails only when the counter is full, and then the interrupt is on its way anyway.
            let _ = self.interrupt.write(1);
        }
    }

    /// Its state, with the end of the console's history.
    pub fn save(&self) -> StateSection {
        let inner = self.inner();
        let uart = inner.uart.state();
        let history = self.console.tail(HISTORY_SAVED_BYTES);
        state::section(kind::SERIAL, 0, 1, |out| {
            for register in [
                uart.baud_divisor_low,
                uart.baud_divisor_high,
                uart.interrupt_enable,
                uart.interrupt_identification,
                uart.line_control,
                uart.line_status,
                uart.modem_control,
                uart.modem_status,
                uart.scratch,
            ] {
                out.u8(register);
            }
            out.bytes(&uart.in_buffer);
            let (front, back) = inner.input.as_slices();
            out.bytes(&[front, back].concat());
            out.bytes(&history);
        })
    }

    /// Takes over a state. A pending interrupt is raised again by [`resume`](Self::resume): the
    /// interrupt controllers may get their state later.
    ///
    /// # Errors
    /// When the section is missing or malformed.
    pub fn restore(&self, state: &MachineState) -> Result<(), StateError> {
        let mut fields = state::fields(state::find(state, kind::SERIAL, 0)?, 1)?;
        let mut register = || fields.u8("serial register");
        let mut uart = SerialState {
            baud_divisor_low: register()?,
            baud_divisor_high: register()?,
            interrupt_enable: register()?,
            interrupt_identification: register()?,
            line_control: register()?,
            line_status: register()?,
            modem_control: register()?,
            modem_status: register()?,
            scratch: register()?,
            in_buffer: Vec::new(),
        };
        uart.in_buffer = fields.bytes("serial fifo", FIFO_BYTES_MAX)?.to_vec();
        let input = fields.bytes("serial input", INPUT_BYTES_MAX)?;
        let history = fields.bytes("serial history", HISTORY_SAVED_BYTES)?;
        fields.finish("serial")?;

        let interrupt = Interrupt(Arc::clone(&self.interrupt));
        let output = Output(Arc::clone(&self.console));
        let uart = Serial::from_state(&uart, interrupt, NoEvents, output)
            .map_err(|error| StateError::value("serial registers", error, "a valid state"))?;
        *self.inner() = Inner { uart, input: input.iter().copied().collect() };
        self.console.replace(history);
        Ok(())
    }
}

impl Inner {
    /// Moves what was typed into the port, as far as it fits; false when nothing does.
    fn feed(&mut self) -> bool {
        // A quarter of the FIFO: a driver that only polls sees a short burst at a time.
        const BURST_BYTES: usize = FIFO_BYTES_MAX / 4;
        let held = FIFO_BYTES_MAX - self.uart.fifo_capacity();
        let count = BURST_BYTES.saturating_sub(held).min(self.input.len());
        if count == 0 {
            return false;
        }
        let bytes: Vec<u8> = self.input.drain(..count).collect();
        // Checked against the capacity; a failed interrupt is one that is pending already.
        let _ = self.uart.enqueue_raw_bytes(&bytes);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (SerialPort, Arc<Console>, EventFd) {
        let console = Arc::new(Console::default());
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let peer = interrupt.try_clone().unwrap();
        (SerialPort::new(Arc::clone(&console), interrupt), console, peer)
    }

    fn read(port: &SerialPort, register: u8) -> u8 {
        let mut data = [0];
        port.read(register, &mut data);
        data[0]
    }

    #[test]
    fn output_reaches_the_console() {
        let (port, console, _) = port();
        port.write(DATA, b"hi");
        assert_eq!(console.read(0, 10).bytes, b"hi");
    }

    /// More than the FIFO holds is typed; the guest reads all of it, in order, by interrupt.
    #[test]
    fn typed_text_arrives_whole() {
        let (port, _, interrupt) = port();
        port.write(1, &[1]);
        let text: Vec<u8> = (0..200u8).collect();
        assert_eq!(port.type_in(&text), 200);
        assert_eq!(interrupt.read().unwrap(), 1);
        let mut got = Vec::new();
        while read(&port, 5) & 1 != 0 {
            got.push(read(&port, DATA));
        }
        assert_eq!(got, text);
        assert_eq!(port.type_in(&[b'x'; 5000]), INPUT_BYTES_MAX);
    }

    /// An edge may be lost, while the guest has the line masked or on the way to another node; the
    /// port raises none again until the guest has looked, which it does not without.
    #[test]
    fn an_interrupt_that_was_lost_is_raised_again() {
        let (port, _, interrupt) = port();
        port.write(1, &[1]);
        port.resume();
        assert!(interrupt.read().is_err(), "nothing is pending");
        port.type_in(&[b'x'; 20]);
        assert_eq!(interrupt.read().unwrap(), 1);
        for _ in 0..2 {
            port.type_in(b"x");
            assert_eq!(interrupt.read().unwrap(), 1);
            port.resume();
            assert_eq!(interrupt.read().unwrap(), 1);
        }
        read(&port, 2);
        port.resume();
        assert!(interrupt.read().is_err(), "the guest has seen it");
    }

    #[test]
    fn state_goes_over_with_history() {
        let (source, _, _) = port();
        source.write(1, &[1]);
        source.write(7, &[0x5a]);
        source.write(DATA, b"boot messages");
        source.type_in(b"abcdefghijklmnopqrstuvwxyz");
        let state = MachineState { sections: vec![source.save()] };
        let (destination, console, interrupt) = port();
        destination.restore(&state).unwrap();
        // A rehearsal has come before.
        destination.restore(&state).unwrap();
        assert_eq!(read(&destination, 7), 0x5a);
        while interrupt.read().is_ok() {}
        destination.resume();
        assert!(interrupt.read().unwrap() > 0, "the pending interrupt is raised again");
        let typed: Vec<u8> = (0..26).map(|_| read(&destination, DATA)).collect();
        assert_eq!(typed, b"abcdefghijklmnopqrstuvwxyz");
        assert_eq!(console.tail(100), b"boot messages");
    }
}
