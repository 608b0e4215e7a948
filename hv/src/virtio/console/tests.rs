//! The device as a guest's driver uses it, and as a hostile guest abuses it.

use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::{self, GuestMemory};
use crate::pci::PciFunction;
use crate::state;
use crate::state::{Encoder, kind};
use crate::virtio::VirtioDevice;
use crate::virtio::tests::{
    BUFFERS, EVENT_IDX, MEMORY_BYTES, NEXT, TestDriver, VERSION_1, WRITE, wait_until,
};

const MULTIPORT: u64 = 1 << 1;
const NOBODY_SAYS: usize = 1;
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;
const RECEIVE: usize = 4;
const TRANSMIT: usize = 5;
/// Each queue's buffers lie here + queue * 256 KiB, so far apart.
const QUEUE_BYTES: u64 = 0x4_0000;
const BUFFER_BYTES: u64 = 0x8000;
/// Buffers that the driver keeps in each queue to the guest.
const POSTED: u16 = 4;

/// A guest's driver, which knows one port.
pub(crate) struct Guest {
    pub(crate) driver: TestDriver,
    port: Arc<Port>,
}

impl Guest {
    /// A driver that is ready, with room for what the device says, and knows of no port yet.
    pub(crate) fn new() -> Self {
        let mut guest = Self::unstarted(memory::create(MEMORY_BYTES).unwrap());
        assert_eq!(guest.driver.start(VERSION_1 | EVENT_IDX | MULTIPORT), 15);
        for queue in [CONTROL_IN, RECEIVE] {
            for index in 0..POSTED {
                guest.driver.descriptor(queue, index, (buffer(queue, index), 0x1000, WRITE, 0));
                guest.driver.offer(queue, index);
            }
            guest.driver.kick(queue);
        }
        guest
    }

    fn unstarted(memory: GuestMemory) -> Self {
        let port = Port::new().unwrap();
        let device = VirtioConsole::new(Arc::clone(&port));
        Self { driver: TestDriver::with_memory(Box::new(device), memory), port }
    }

    /// The host's end.
    pub(crate) fn port(&self) -> Arc<Port> {
        Arc::clone(&self.port)
    }

    /// Sends bytes, and waits until they are taken.
    fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.offer(queue, bytes);
        assert_eq!(self.driver.wait_used(queue), (0, 0));
    }

    fn offer(&mut self, queue: usize, bytes: &[u8]) {
        let at = buffer(queue, 0);
        self.driver.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.driver.descriptor(queue, 0, (at, bytes.len() as u32, 0, 0));
        self.driver.offer(queue, 0);
        self.driver.kick(queue);
    }

    fn control(&mut self, id: u32, event: u16, value: u16) {
        self.send(CONTROL_OUT, &message(id, event, value));
    }

    /// What has come in a queue to the guest, if something has; its buffer goes back.
    fn received(&mut self, queue: usize) -> Option<Vec<u8>> {
        let (head, length) = self.driver.used(queue)?;
        let mut bytes = vec![0; length as usize];
        let at = GuestAddress(buffer(queue, head as u16));
        self.driver.memory.read_slice(&mut bytes, at).unwrap();
        self.driver.offer(queue, head as u16);
        self.driver.kick(queue);
        Some(bytes)
    }

    fn wait_received(&mut self, queue: usize) -> Vec<u8> {
        let mut bytes = None;
        wait_until("something is received", || {
            bytes = self.received(queue);
            bytes.is_some()
        });
        bytes.unwrap()
    }

    /// As Linux does: finds the port, and a program opens it.
    pub(crate) fn open_port(&mut self) {
        self.control(0xffff_ffff, 0, 1);
        assert_eq!(self.wait_received(CONTROL_IN), message(1, 1, 1));
        self.control(1, 3, 1);
        let name = [&message(1, 7, 1)[..], b"org.qemu.guest_agent.0"].concat();
        assert_eq!(self.wait_received(CONTROL_IN), name);
        assert_eq!(self.wait_received(CONTROL_IN), message(1, 6, 1));
        self.control(1, 6, 1);
    }

    /// The program closes it.
    pub(crate) fn close_port(&mut self) {
        self.control(1, 6, 0);
    }

    /// What the host has said.
    pub(crate) fn hear(&mut self) -> Vec<u8> {
        self.received(RECEIVE).unwrap_or_default()
    }

    /// Says something to the host; waits until it is taken.
    pub(crate) fn say(&mut self, bytes: &[u8]) {
        self.send(TRANSMIT, bytes);
    }

    fn needs_reset(&self) -> bool {
        self.driver.status() & 64 != 0
    }
}

fn buffer(queue: usize, index: u16) -> u64 {
    BUFFERS + queue as u64 * QUEUE_BYTES + u64::from(index) * BUFFER_BYTES
}

fn message(id: u32, event: u16, value: u16) -> Vec<u8> {
    [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// What the port's listener hears, when there is something.
fn heard(listener: &Listener<'_>) -> Vec<u8> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let wait = async { tokio::time::timeout(Duration::from_secs(10), listener.hear()).await };
    runtime.block_on(wait).expect("something is heard").expect("the port is open")
}

#[test]
fn a_driver_finds_the_port_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.offered() & 0xff, MULTIPORT);
    let mut config = [0; 8];
    guest.driver.device.read_window(0x2000, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 2, 0, 0, 0]);
    let port = guest.port();
    assert_eq!(port.listen().unwrap_err(), Closed);
    guest.open_port();
    let listener = port.listen().unwrap();
    listener.say(b"to the guest");
    assert_eq!(guest.wait_received(RECEIVE), b"to the guest");
    guest.say(b"from the guest");
    assert_eq!(heard(&listener), b"from the guest");
    // More than a buffer holds goes over several.
    let long: Vec<u8> = (0..30_000u32).map(|i| i as u8).collect();
    listener.say(&long);
    let mut got = Vec::new();
    while got.len() < long.len() {
        got.extend(guest.wait_received(RECEIVE));
    }
    assert_eq!(got, long);
}

/// What is said while nobody listens does not wait for somebody.
#[test]
fn what_nobody_hears_is_thrown_away() {
    let mut guest = Guest::new();
    guest.open_port();
    guest.say(b"is there anybody?");
    guest.send(NOBODY_SAYS, b"a console's words");
    let port = guest.port();
    let listener = port.listen().unwrap();
    guest.say(b"new");
    assert_eq!(heard(&listener), b"new");
    listener.say(b"never read");
    guest.close_port();
    drop(listener);
    guest.control(1, 6, 1);
    let listener = port.listen().unwrap();
    listener.say(b"x");
    // It may have come before the port was closed; then it comes first.
    let first = guest.wait_received(RECEIVE);
    if first != b"x" {
        assert_eq!((first, guest.wait_received(RECEIVE)), (b"never read".to_vec(), b"x".to_vec()));
    }
}

/// A listener that does not read: the guest's words stay in its own memory.
#[test]
fn a_guest_cannot_fill_the_host() {
    let mut guest = Guest::new();
    guest.open_port();
    let port = guest.port();
    let listener = port.listen().unwrap();
    let buffer_bytes = 0x8000;
    let mut said = 0;
    while said < port::UNHEARD_BYTES_MAX {
        guest.say(&vec![b'a'; buffer_bytes]);
        said += buffer_bytes;
    }
    guest.offer(TRANSMIT, &vec![b'b'; buffer_bytes]);
    // The device has looked at the kick when it has answered to a later one.
    guest.control(1, 99, 0);
    assert_eq!(guest.driver.used(TRANSMIT), None);
    assert_eq!(heard(&listener).len(), said);
    guest.driver.wait_used(TRANSMIT);
    assert_eq!(heard(&listener), vec![b'b'; buffer_bytes]);
    // And all of it goes when the listener does, without a kick.
    for _ in 0..2 {
        guest.say(&vec![b'c'; buffer_bytes]);
    }
    guest.offer(TRANSMIT, b"d");
    drop(listener);
    guest.driver.wait_used(TRANSMIT);
}

/// However often a guest asks, it is told once; and only when it has room to be told.
#[test]
fn a_guest_that_asks_a_thousand_times_is_told_once() {
    let mut guest = Guest::unstarted(memory::create(MEMORY_BYTES).unwrap());
    guest.driver.start(VERSION_1 | MULTIPORT);
    for _ in 0..1000 {
        guest.control(0xffff_ffff, 0, 1);
        guest.control(1, 3, 1);
    }
    // What is no message, of no port, or a failure, changes nothing.
    guest.send(CONTROL_OUT, b"short");
    guest.control(0, 3, 1);
    guest.control(7, 6, 1);
    guest.control(1, 3, 0);
    for index in 0..5 {
        guest.driver.descriptor(CONTROL_IN, index, (buffer(CONTROL_IN, index), 64, WRITE, 0));
        guest.driver.offer(CONTROL_IN, index);
    }
    guest.driver.kick(CONTROL_IN);
    for bytes in [8, 30, 8] {
        assert_eq!(guest.driver.wait_used(CONTROL_IN).1, bytes);
    }
    guest.control(1, 99, 0);
    assert_eq!(guest.driver.used(CONTROL_IN), None);
}

/// Without room for a message, the rules are broken; a reset closes the port.
#[test]
fn a_control_buffer_without_room_breaks_the_rules() {
    let mut guest = Guest::unstarted(memory::create(MEMORY_BYTES).unwrap());
    guest.driver.start(VERSION_1 | MULTIPORT);
    guest.control(1, 6, 1);
    let port = guest.port();
    assert!(port.listen().is_ok());
    guest.control(0, 0, 1);
    guest.driver.descriptor(CONTROL_IN, 0, (buffer(CONTROL_IN, 0), 7, WRITE, 0));
    guest.driver.offer(CONTROL_IN, 0);
    guest.driver.kick(CONTROL_IN);
    wait_until("the guest is found out", || guest.needs_reset());
    guest.driver.start(VERSION_1 | MULTIPORT);
    assert!(port.listen().is_err());
}

/// A chain that claims gigabytes costs a megabyte.
#[test]
fn a_chain_of_gigabytes_is_cut() {
    let mut guest = Guest::new();
    guest.open_port();
    let port = guest.port();
    let listener = port.listen().unwrap();
    for index in 0..8 {
        let next = if index < 7 { NEXT } else { 0 };
        guest.driver.descriptor(TRANSMIT, index, (0, 3 << 20, next, index + 1));
    }
    guest.driver.offer(TRANSMIT, 0);
    guest.driver.kick(TRANSMIT);
    guest.driver.wait_used(TRANSMIT);
    assert_eq!(heard(&listener).len(), 1 << 20);
}

/// The port is open at the destination when it was, without a word of the guest.
#[test]
fn an_open_port_moves_with_the_guest() {
    let mut guest = Guest::new();
    guest.control(0xffff_ffff, 0, 1);
    guest.wait_received(CONTROL_IN);
    guest.control(1, 6, 1);
    guest.driver.device.pause().unwrap();
    let state = guest.driver.state();
    let mut moved = Guest::unstarted(guest.driver.memory.clone());
    moved.driver.device.pause().unwrap();
    moved.driver.device.restore(1, &state).unwrap();
    assert_eq!(moved.driver.state(), state);
    (moved.driver.seen, moved.driver.next) = (guest.driver.seen.clone(), guest.driver.next.clone());
    moved.driver.device.resume();
    let port = moved.port();
    let listener = port.listen().unwrap();
    listener.say(b"here");
    assert_eq!(moved.wait_received(RECEIVE), b"here");
    moved.say(b"there");
    assert_eq!(heard(&listener), b"there");
}

/// What a device is still to tell moves along too. The image of version 1 is kept for ever.
#[test]
fn the_state_of_version_1_is_still_read_and_written() {
    let golden: &[u8] = include_bytes!("../../../tests/fixtures/virtio-console-v1.bin");
    let image = state::decode(golden).unwrap();
    let section = state::find(&image, kind::VIRTIO_CONSOLE, 6).unwrap();
    let port = Port::new().unwrap();
    let mut device = VirtioConsole::new(Arc::clone(&port));
    let mut fields = state::fields(section, device.kind().section_version).unwrap();
    device.restore(section.version, &mut fields, None).unwrap();
    fields.finish("console").unwrap();
    assert!(port.listen().is_ok());
    let mut out = Encoder::new();
    device.save(&mut out);
    // The name and that the host has it open are owed; the port is open.
    assert_eq!(out.into_bytes(), [6, 1]);
    assert_eq!(section.data, [6, 1]);
    assert_eq!(state::encode(&image).unwrap(), golden);
    let wrong = state::section(kind::VIRTIO_CONSOLE, 6, 1, |out| out.raw(&[8, 1]));
    let error = device.restore(1, &mut state::fields(&wrong, 1).unwrap(), None).unwrap_err();
    assert_eq!(error.to_string(), "state: console owed is 8; accepted: 0 to 7");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Whatever a guest says about ports, whatever its buffers are, the device lives on, and works
    /// after a reset.
    #[test]
    fn control_messages_may_say_anything(
        messages in prop::collection::vec((0u32..3, 0u16..9, 0u16..3, 0u32..40), 1..40),
    ) {
        let mut guest = Guest::new();
        for (id, event, value, length) in messages {
            let at = buffer(CONTROL_OUT, 0);
            guest.driver.memory.write_slice(&message(id, event, value), GuestAddress(at)).unwrap();
            guest.driver.descriptor(CONTROL_OUT, 0, (at, length, 0, 0));
            guest.driver.offer(CONTROL_OUT, 0);
            guest.driver.kick(CONTROL_OUT);
            guest.driver.wait_used(CONTROL_OUT);
            while guest.received(CONTROL_IN).is_some() {}
        }
        guest.driver.device.reset();
        guest.driver.device.write_config(4, &6u16.to_le_bytes());
        prop_assert_eq!(guest.driver.start(VERSION_1 | MULTIPORT), 15);
        guest.control(1, 6, 1);
        prop_assert!(guest.port().listen().is_ok());
    }
}
