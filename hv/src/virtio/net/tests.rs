//! Frames through a device whose tap is a socket pair.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::device::HEADER_BYTES;
use super::tap::{Backend, Offloads, vectored};
use super::*;
use crate::memory::{GuestMemory, PAGE_BYTES};
use crate::pci::PciFunction;
use crate::virtio::tests::{
    BUFFERS, EVENT_IDX, MEMORY_BYTES, NEXT, TestDriver, VERSION_1, WRITE, wait_until,
};

const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const ANNOUNCE: u64 =
    1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE | 1 << VIRTIO_NET_F_STATUS;
const RX: usize = 0;
const TX: usize = 1;
const CTRL: usize = 2;

struct SocketTap {
    socket: UnixDatagram,
    offloads: Arc<Mutex<Offloads>>,
}

impl Backend for SocketTap {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
    unsafe fn read(&mut self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the buffers.
        unsafe { vectored(libc::readv, self.fd(), buffers) }
    }
    unsafe fn write(&mut self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the buffers.
        unsafe { vectored(libc::writev, self.fd(), buffers) }
    }
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        *self.offloads.lock().unwrap() = offloads;
        Ok(())
    }
}

struct Bench {
    driver: TestDriver,
    wire: UnixDatagram,
    offloads: Arc<Mutex<Offloads>>,
    counters: Arc<NetCounters>,
}

fn bench(features: u64) -> Bench {
    let mut bench = unstarted(crate::memory::create(MEMORY_BYTES).unwrap());
    assert_eq!(bench.driver.start(VERSION_1 | features), 15);
    bench
}

fn unstarted(memory: GuestMemory) -> Bench {
    let (wire, socket) = UnixDatagram::pair().unwrap();
    for end in [&wire, &socket] {
        end.set_nonblocking(true).unwrap();
    }
    wire.set_write_timeout(None).unwrap();
    let offloads = Arc::default();
    let tap = SocketTap { socket, offloads: Arc::clone(&offloads) };
    let addresses = vec!["10.78.0.11".parse().unwrap(), "fd00::1".parse().unwrap()];
    let net = Net::new(Box::new(tap), MAC, addresses);
    let counters = net.counters();
    Bench { driver: TestDriver::with_memory(Box::new(net), memory), wire, offloads, counters }
}

/// A frame with its header, of this many bytes behind the header.
fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.extend((0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)));
    bytes
}

impl Bench {
    /// Gives the guest's device this many receive buffers of this size.
    fn post(&mut self, count: u16, bytes: u32) {
        for index in 0..count {
            let at = BUFFERS + u64::from(index) * 0x1000;
            self.driver.descriptor(RX, index, (at, bytes, WRITE, 0));
            self.driver.offer(RX, index);
        }
        self.driver.kick(RX);
    }

    /// Collects one frame from the used buffers: its bytes, and over how many buffers it went.
    fn received(&mut self) -> (Vec<u8>, u16) {
        let (mut bytes, mut wanted, mut buffers) = (Vec::new(), 1, 0);
        while buffers < wanted {
            let (head, length) = self.driver.wait_used(RX);
            let mut part = vec![0; length as usize];
            let at = BUFFERS + u64::from(head) * 0x1000;
            self.driver.memory.read_slice(&mut part, GuestAddress(at)).unwrap();
            if buffers == 0 {
                wanted = u16::from_le_bytes([part[10], part[11]]);
            }
            bytes.extend(part);
            buffers += 1;
        }
        (bytes, buffers)
    }

    fn sent(&self) -> Vec<u8> {
        let mut bytes = vec![0; 70_000];
        let mut length = 0;
        wait_until("a frame on the wire", || {
            length = self.wire.recv(&mut bytes).unwrap_or(0);
            length > 0
        });
        bytes.truncate(length);
        bytes
    }

    fn dropped(&self) -> u64 {
        self.counters.dropped.load(Ordering::SeqCst)
    }

    fn command(&mut self, bytes: &[u8]) -> u8 {
        let (at, answer) = (BUFFERS + 0x10_0000, BUFFERS + 0x10_1000);
        self.driver.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        self.driver.memory.write_obj(0xffu8, GuestAddress(answer)).unwrap();
        self.driver.descriptor(CTRL, 0, (at, bytes.len() as u32, NEXT, 1));
        self.driver.descriptor(CTRL, 1, (answer, 1, WRITE, 0));
        self.driver.offer(CTRL, 0);
        self.driver.kick(CTRL);
        self.driver.wait_used(CTRL);
        self.driver.memory.read_obj(GuestAddress(answer)).unwrap()
    }

    fn config(&self) -> [u8; 8] {
        let mut config = [0; 8];
        self.driver.device.read_window(0x2000, &mut config);
        config
    }
}

#[test]
fn frames_go_out_as_the_guest_wrote_them() {
    let mut bench = bench(EVENT_IDX);
    let bytes = frame(1000, 7);
    bench.driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    // Header and frame cut anywhere.
    bench.driver.descriptor(TX, 0, (BUFFERS, 5, NEXT, 1));
    bench.driver.descriptor(TX, 1, (BUFFERS + 5, 500, NEXT, 2));
    bench.driver.descriptor(TX, 2, (BUFFERS + 505, 507, 0, 0));
    bench.driver.offer(TX, 0);
    bench.driver.kick(TX);
    assert_eq!(bench.sent(), bytes);
    assert_eq!(bench.driver.wait_used(TX), (0, 0));
    assert_eq!(bench.counters.tx_bytes.load(Ordering::SeqCst), 1000);
}

#[test]
fn frames_come_in_over_as_many_buffers_as_they_need() {
    let mut bench = bench(MERGE);
    bench.post(60, 1536);
    for (length, buffers) in [(60, 1), (1524, 1), (1525, 2), (64_000, 42)] {
        let sent = frame(length, length as u8);
        bench.wire.send(&sent).unwrap();
        let (received, count) = bench.received();
        assert_eq!(count, buffers, "{length}");
        assert_eq!(received[HEADER_BYTES..], sent[HEADER_BYTES..], "{length}");
        bench.post(60, 1536);
    }
    wait_until("an interrupt", || bench.driver.interrupts(RX) > 0);
}

#[test]
fn without_merging_each_frame_has_one_buffer_or_is_dropped() {
    let mut bench = bench(0);
    bench.post(4, 1600);
    bench.wire.send(&frame(3000, 1)).unwrap();
    bench.wire.send(&frame(100, 2)).unwrap();
    let (received, count) = bench.received();
    assert_eq!(
        (received, count),
        (
            {
                let mut expected = frame(100, 2);
                expected[10] = 1;
                expected
            },
            1
        )
    );
    assert_eq!(bench.dropped(), 1);
}

/// Frames wait in the tap while the guest has no buffers, and nothing spins meanwhile.
#[test]
fn frames_wait_for_buffers() {
    let mut bench = bench(MERGE);
    bench.wire.send(&frame(80, 3)).unwrap();
    bench.post(50, 2048);
    assert_eq!(bench.received().0[HEADER_BYTES..], frame(80, 3)[HEADER_BYTES..]);
}

/// The kernel writes past `vm-memory`; live migration must see it all the same.
#[test]
fn pages_that_a_frame_went_into_are_dirty() {
    let mut bench = bench(MERGE);
    bench.post(60, 2048);
    // The worker has taken them up when this frame is through.
    bench.wire.send(&frame(60, 0)).unwrap();
    bench.received();
    let memory = bench.driver.memory.clone();
    let region = memory.iter().next().unwrap();
    std::ops::Deref::deref(region).bitmap().reset();
    bench.wire.send(&frame(5000, 4)).unwrap();
    bench.received();
    let dirty = |buffer: u64| {
        let offset = BUFFERS + buffer * 0x1000;
        std::ops::Deref::deref(region).bitmap().dirty_at(offset as usize)
    };
    let pages: Vec<bool> = (0..6).map(dirty).collect();
    assert_eq!(pages, [false, true, true, true, false, false]);
    assert_eq!(PAGE_BYTES, 0x1000);
}

#[test]
fn offloads_follow_what_was_negotiated() {
    let bench = bench(1 << VIRTIO_NET_F_GUEST_CSUM);
    let expected = Offloads { checksum: true, ..Offloads::default() };
    assert_eq!(*bench.offloads.lock().unwrap(), expected);
}

#[test]
fn the_guest_can_change_its_address_and_nothing_unknown() {
    let mut bench = bench(ANNOUNCE);
    assert_eq!(bench.config()[..6], MAC.0);
    assert_eq!(bench.command(&[1, 1, 0x52, 0x54, 0, 9, 9, 9]), 0);
    assert_eq!(bench.config()[..6], [0x52, 0x54, 0, 9, 9, 9]);
    assert_eq!(bench.command(&[1, 1, 1, 0, 0, 9, 9, 9]), 1, "a multicast address");
    assert_eq!(bench.command(&[0, 0, 1]), 0, "promiscuous");
    assert_eq!(bench.command(&[77, 0, 1]), 1);
    assert_eq!(bench.config()[..6], [0x52, 0x54, 0, 9, 9, 9]);
}

/// After a migration: frames from the guest's address at once and again, and the guest is asked
/// to announce itself until it says that it did.
#[test]
fn a_machine_that_moved_announces_itself() {
    let mut bench = bench(ANNOUNCE);
    bench.driver.device.announce();
    let mut kinds = BTreeSet::new();
    for _ in 0..6 {
        let frame = bench.sent();
        assert_eq!(frame[..HEADER_BYTES], [0; HEADER_BYTES]);
        assert_eq!(frame[HEADER_BYTES + 6..HEADER_BYTES + 12], MAC.0);
        kinds.insert([frame[HEADER_BYTES + 12], frame[HEADER_BYTES + 13]]);
    }
    assert_eq!(kinds, BTreeSet::from([[0x80, 0x35], [0x08, 0x06], [0x86, 0xdd]]));
    assert_eq!(bench.config()[6], 3);
    assert!(bench.driver.wiring.raised(0) > 0, "a configuration interrupt");
    assert_eq!(bench.command(&[3, 0]), 0);
    assert_eq!(bench.config()[6], 1);
}

#[test]
fn state_travels_and_stale_frames_do_not() {
    let mut bench = bench(ANNOUNCE | MERGE);
    bench.command(&[1, 1, 0x52, 0x54, 0, 9, 9, 9]);
    bench.driver.device.pause().unwrap();
    let state = bench.driver.state();

    let mut moved = unstarted(bench.driver.memory.clone());
    moved.driver.next = bench.driver.next.clone();
    moved.driver.seen = bench.driver.seen.clone();
    moved.driver.device.pause().unwrap();
    moved.wire.send(&frame(60, 1)).unwrap();
    moved.driver.device.restore(1, &state).unwrap();
    assert_eq!(moved.driver.state(), state);
    assert_eq!(moved.config()[..6], [0x52, 0x54, 0, 9, 9, 9]);
    moved.driver.device.resume();
    // The frame from before is gone; the next one comes.
    moved.wire.send(&frame(61, 2)).unwrap();
    moved.post(60, 2048);
    assert_eq!(moved.received().0.len(), HEADER_BYTES + 61);
}

/// Frames that come while the guest stands still at the source: those from before the tap was
/// announced are nobody's, those after it are the guest's.
#[test]
fn frames_that_were_attracted_wait_for_the_guest() {
    let bench = bench(ANNOUNCE | MERGE);
    bench.driver.device.pause().unwrap();
    let state = bench.driver.state();

    let mut moved = unstarted(bench.driver.memory.clone());
    moved.driver.next = bench.driver.next;
    moved.driver.seen = bench.driver.seen;
    moved.driver.device.pause().unwrap();
    moved.wire.send(&frame(60, 1)).unwrap();
    moved.driver.device.attract();
    for _ in 0..3 {
        let announced = moved.sent();
        assert_eq!(announced[HEADER_BYTES + 6..HEADER_BYTES + 12], MAC.0);
    }
    moved.wire.send(&frame(61, 2)).unwrap();
    moved.driver.device.restore(1, &state).unwrap();
    moved.driver.device.resume();
    moved.driver.device.announce();
    moved.post(60, 2048);
    assert_eq!(moved.received().0.len(), HEADER_BYTES + 61);
}

#[test]
fn a_tap_must_exist() {
    let error = Tap::open("no-such-tap0").unwrap_err().to_string();
    assert!(error.starts_with("tap: no-such-tap0: no such network interface"), "{error}");
    assert!(Tap::open("").is_err() && Tap::open("../lo").is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever the guest puts into any queue, with frames coming in: no panic, no spinning, and
    /// a reset makes it work again.
    #[test]
    fn a_hostile_guest_harms_only_its_own_device(
        descriptors in prop::collection::vec(
            (0u64..0x60_0000, 0u32..0x2_0000, 0u16..8, 0u16..12), 3 * 12),
        heads in prop::collection::vec(0u16..14, 3 * 8),
        merge in any::<bool>(),
    ) {
        let mut bench = bench(ANNOUNCE | if merge { MERGE } else { 0 });
        for (i, fields) in descriptors.into_iter().enumerate() {
            bench.driver.descriptor(i / 12, (i % 12) as u16, fields);
        }
        for (i, head) in heads.into_iter().enumerate() {
            bench.driver.offer(i / 8, head);
        }
        for length in [60, 1500, 60_000] {
            let _ = bench.wire.send(&frame(length, 1));
        }
        for queue in [RX, TX, CTRL] {
            bench.driver.kick(queue);
        }
        // The worker is alive: a reset goes through it, and frames do afterwards.
        prop_assert_eq!(bench.driver.start(VERSION_1 | MERGE), 15);
        while bench.wire.recv(&mut [0; 10]).is_ok() {}
        bench.post(60, 2048);
        let mark = frame(333, 9);
        let mut tries = 0;
        loop {
            let _ = bench.wire.send(&mark);
            let (received, _) = bench.received();
            if received[HEADER_BYTES..] == mark[HEADER_BYTES..] {
                break;
            }
            tries += 1;
            prop_assert!(tries < 10, "the device does not come back");
        }
    }
}
