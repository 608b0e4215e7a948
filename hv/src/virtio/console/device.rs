//! The virtio side: the control messages by which a guest finds the port, and the port's bytes.

use std::os::fd::RawFd;
use std::sync::Arc;

use vm_memory::Bytes;

use super::port::Port;
use crate::memory::GuestMemory;
use crate::pci::ClassCode;
use crate::state::{Decoder, Encoder, StateError, kind};
use crate::virtio::{DeviceKind, Event, Progress, Segment, Turn, Violation, VirtioDevice};

/// The name by which the stock agents find their port: `/dev/virtio-ports/…`.
pub const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// Port 0 is what a driver that knows no ports takes for a console: it is not there.
const PORT: u32 = 1;
const PORTS: u32 = 2;
const F_MULTIPORT: u32 = 1;

/// Port 0's two queues are there by the specification. Nothing is sent to it, and what it says is
/// thrown away.
const NOBODY_SAYS: usize = 1;
/// Control messages to the guest, and from it.
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
/// The port's bytes to the guest, and from it.
const RECEIVE: usize = 4;
const TRANSMIT: usize = 5;
const QUEUE_SIZE: u16 = 32;
const QUEUE_SIZES: [u16; 6] = [QUEUE_SIZE; 6];

/// Chains of one queue in one turn.
const TURN_CHAINS_MAX: usize = 32;
/// Bytes of one chain that are looked at; what comes behind them is thrown away. Linux' driver
/// makes chains of at most 32 KiB, others make one of a whole answer.
const CHAIN_BYTES_MAX: usize = 1 << 20;

/// Control messages (5.3.6.2): id u32, event u16, value u16; a name behind them.
const MESSAGE_BYTES: usize = 8;
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// Messages that the guest is still to be told, as bits: however often it asks, it is told once.
mod owed {
    pub(super) const ADD: u8 = 1;
    pub(super) const NAME: u8 = 2;
    pub(super) const OPEN: u8 = 4;
    pub(super) const ALL: u8 = ADD | NAME | OPEN;
}

/// The device.
#[derive(Debug)]
pub struct VirtioConsole {
    port: Arc<Port>,
    owed: u8,
    segments: Vec<Segment>,
}

impl VirtioConsole {
    /// A device with this port.
    pub fn new(port: Arc<Port>) -> Self {
        Self { port, owed: 0, segments: Vec::new() }
    }

    /// Does this with each chain of a queue, until there is none or it is enough for a turn.
    /// `each` answers how many bytes it wrote, and nothing when the chain is to stay in the queue.
    fn chains(
        &mut self,
        turn: &mut Turn<'_>,
        index: usize,
        mut each: impl FnMut(&mut Self, &GuestMemory, u16) -> Result<Option<u32>, Violation>,
    ) -> Result<Progress, Violation> {
        let memory = turn.memory;
        let queue = &mut turn.queues[index];
        if !queue.ready() {
            return Ok(Progress::Done);
        }
        queue.disable_kicks(memory)?;
        let mut progress = Progress::More;
        for _ in 0..TURN_CHAINS_MAX {
            let Some(head) = queue.pop(memory, &mut self.segments)? else {
                if queue.enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let Some(written) = each(self, memory, head)? else {
                queue.rewind(1);
                progress = Progress::Done;
                break;
            };
            queue.complete(memory, head, written)?;
        }
        queue.notify(memory, turn.interrupt)?;
        Ok(progress)
    }

    /// Reads what the guest says about the device and the port, and answers.
    fn control(&mut self, turn: &mut Turn<'_>) -> Result<Progress, Violation> {
        let progress = self.chains(turn, CONTROL_OUT, |device, memory, _| {
            let message = device.read(memory, MESSAGE_BYTES);
            let mut fields = Decoder::new(&message);
            // A shorter one says nothing.
            if let (Ok(id), Ok(event), Ok(value)) =
                (fields.u32("id"), fields.u16("event"), fields.u16("value"))
            {
                device.obey(id, event, value);
            }
            Ok(Some(0))
        })?;
        self.pay_owed(turn)?;
        Ok(progress)
    }

    fn obey(&mut self, id: u32, event: u16, value: u16) {
        match (id, event, value) {
            (_, event::DEVICE_READY, 1) => self.owed |= owed::ADD,
            (PORT, event::PORT_READY, 1) => self.owed |= owed::NAME | owed::OPEN,
            (PORT, event::PORT_OPEN, value) => self.port.set_open(value != 0),
            // A guest that could not add the port has none.
            _ => {}
        }
    }

    /// Tells the guest what it is still to be told, as far as it has room for it.
    fn pay_owed(&mut self, turn: &mut Turn<'_>) -> Result<Progress, Violation> {
        if self.owed == 0 {
            return Ok(Progress::Done);
        }
        self.chains(turn, CONTROL_IN, |device, memory, head| {
            let (bit, event, name) = match device.owed {
                0 => return Ok(None),
                owed if owed & owed::ADD != 0 => (owed::ADD, event::PORT_ADD, ""),
                owed if owed & owed::NAME != 0 => (owed::NAME, event::PORT_NAME, AGENT_PORT),
                _ => (owed::OPEN, event::PORT_OPEN, ""),
            };
            let mut message = Encoder::new();
            message.u32(PORT);
            message.u16(event);
            message.u16(1);
            message.raw(name.as_bytes());
            let message = message.into_bytes();
            if device.room() < message.len() {
                let what = "has no room for a control message";
                return Err(Violation::Shape { queue: CONTROL_IN, head, what });
            }
            device.owed &= !bit;
            Ok(Some(device.write(memory, &message)))
        })
    }

    /// Gives the guest what is said to it.
    fn deliver(&mut self, turn: &mut Turn<'_>) -> Result<Progress, Violation> {
        self.chains(turn, RECEIVE, |device, memory, _| {
            if device.port.unsaid() == 0 {
                return Ok(None);
            }
            let bytes = device.port.take(device.room());
            Ok(Some(device.write(memory, &bytes)))
        })
    }

    /// Takes what the guest says, if there is room for it.
    fn listen(&mut self, turn: &mut Turn<'_>) -> Result<Progress, Violation> {
        self.chains(turn, TRANSMIT, |device, memory, _| {
            if !device.port.has_room() {
                return Ok(None);
            }
            if device.port.is_heard() {
                let bytes = device.read(memory, CHAIN_BYTES_MAX);
                device.port.push(&bytes);
            }
            Ok(Some(0))
        })
    }

    /// Bytes that can be written into the chain that was taken.
    fn room(&self) -> usize {
        let writable = self.segments.iter().filter(|segment| segment.writable);
        writable.fold(0, |sum, segment| sum.saturating_add(segment.len as usize))
    }

    /// Writes these, which fit, into the chain that was taken. Answers how many they are.
    fn write(&self, memory: &GuestMemory, bytes: &[u8]) -> u32 {
        let mut left = bytes;
        for segment in self.segments.iter().filter(|segment| segment.writable) {
            let (now, later) = left.split_at(left.len().min(segment.len as usize));
            // The buffer was checked when it was taken.
            let _ = memory.write_slice(now, segment.addr);
            left = later;
        }
        bytes.len() as u32
    }

    /// The first bytes of the chain that was taken.
    fn read(&self, memory: &GuestMemory, bytes_max: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for segment in self.segments.iter().filter(|segment| !segment.writable) {
            let begin = bytes.len();
            bytes.resize(begin + (bytes_max - begin).min(segment.len as usize), 0);
            // The buffer was checked when it was taken.
            let _ = memory.read_slice(&mut bytes[begin..], segment.addr);
        }
        bytes
    }
}

impl Drop for VirtioConsole {
    /// Whoever waits for an answer need not wait longer.
    fn drop(&mut self) {
        self.port.set_open(false);
    }
}

impl VirtioDevice for VirtioConsole {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            number: 3,
            name: "virtio-console",
            class: ClassCode(0x07, 0x80, 0x00),
            section: kind::VIRTIO_CONSOLE,
            section_version: 1,
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << F_MULTIPORT
    }

    /// Columns and rows, which no console has here; the most ports.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[4..].copy_from_slice(&PORTS.to_le_bytes());
        for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {
        self.owed = 0;
        self.port.set_open(false);
    }

    fn run(&mut self, turn: &mut Turn<'_>, event: Event) -> Result<Progress, Violation> {
        match event {
            Event::Queue(NOBODY_SAYS) => self.chains(turn, NOBODY_SAYS, |_, _, _| Ok(Some(0))),
            Event::Queue(CONTROL_IN) => self.pay_owed(turn),
            Event::Queue(CONTROL_OUT) => self.control(turn),
            Event::Queue(RECEIVE) => self.deliver(turn),
            Event::Queue(TRANSMIT) => self.listen(turn),
            Event::Queue(_) | Event::Timer => Ok(Progress::Done),
            Event::Source => {
                self.port.awake();
                let delivered = self.deliver(turn)?;
                let listened = self.listen(turn)?;
                let done = [delivered, listened] == [Progress::Done; 2];
                Ok(if done { Progress::Done } else { Progress::More })
            }
        }
    }

    fn source(&self) -> Option<RawFd> {
        Some(self.port.fd())
    }

    fn wants_source(&self) -> bool {
        true
    }

    /// What is under way to the guest is no part of it: whoever asked will ask again, and the
    /// protocol of the agent is made for that.
    fn save(&self, out: &mut Encoder) {
        out.u8(self.owed);
        out.bool(self.port.is_open());
    }

    fn restore(
        &mut self,
        _version: u32,
        fields: &mut Decoder<'_>,
        _features: Option<u64>,
    ) -> Result<(), StateError> {
        let owed = fields.u8("console owed")?;
        if owed & !owed::ALL != 0 {
            return Err(StateError::value("console owed", owed, format!("0 to {}", owed::ALL)));
        }
        self.owed = owed;
        self.port.set_open(fields.bool("console open")?);
        Ok(())
    }
}
