//! The virtio side: features, configuration, turns, the sending direction.

use std::io;
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
};

use super::announce::{self, MacAddress};
use super::tap::{Backend, Offloads};
use crate::memory::GuestMemory;
use crate::pci::ClassCode;
use crate::state::{Decoder, Encoder, StateError, kind};
use crate::virtio::buffers::gather;
use crate::virtio::{DeviceKind, Event, Progress, Segment, Turn, Violation, VirtioDevice};

/// The header before each frame: `virtio_net_hdr_v1`.
pub(super) const HEADER_BYTES: usize = 12;
/// A frame of 64 KiB with its Ethernet and VLAN headers, which is the longest a tap has.
pub(super) const FRAME_BYTES_MAX: usize = 65536 + 18;
/// Shorter ones carry no Ethernet header.
const FRAME_BYTES_MIN: usize = 14;
/// Frames in one turn and direction.
pub(super) const TURN_FRAMES_MAX: usize = 64;
/// Stale frames that are thrown away when the device has moved here.
const DISCARD_FRAMES_MAX: usize = 4096;
/// Buffers in one system call; more is the kernel's UIO_MAXIOV.
pub(super) const BUFFERS_MAX: usize = 1024;

pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

const STATUS_LINK_UP: u16 = 1;
/// The guest shall announce itself, and acknowledge that it did.
const STATUS_ANNOUNCE: u16 = 2;

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_RX
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;

/// What has gone through a device since it was made, as the guest sees it: `rx` is what the
/// guest received.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Bytes that the guest received, without headers.
    pub rx_bytes: AtomicU64,
    /// Bytes that the guest sent, without headers.
    pub tx_bytes: AtomicU64,
    /// Frames that were dropped, for want of buffers or because the tap refused them.
    pub dropped: AtomicU64,
}

impl NetCounters {
    pub(super) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }
}

/// The device.
pub struct Net {
    pub(super) backend: Box<dyn Backend>,
    pub(super) mac: MacAddress,
    initial_mac: MacAddress,
    addresses: Vec<IpAddr>,
    pub(super) features: u64,
    status: u16,
    /// The guest has receive buffers, as far as we know.
    pub(super) has_buffers: bool,
    /// The tap has failed; it is read no more.
    dead: bool,
    announcement: Option<Announcement>,
    /// What the tap holds is the guest's, though it does not run here yet.
    attracted: bool,
    pub(super) segments: Vec<Segment>,
    pub(super) buffers: Buffers,
    pub(super) bounce: Vec<u8>,
    pub(super) counters: Arc<NetCounters>,
}

/// Pointers into guest memory for one system call. Kept only to keep its allocation.
#[derive(Default)]
pub(super) struct Buffers(pub(super) Vec<libc::iovec>);

// SAFETY: the pointers are valid only during the turn that collected them; each turn clears
// them first, on whichever thread.
unsafe impl Send for Buffers {}

struct Announcement {
    start: Instant,
    round: usize,
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("mac", &self.mac).finish_non_exhaustive()
    }
}

impl Net {
    /// A device with this address, whose frames go through `backend`. `addresses` are announced
    /// after a migration.
    pub fn new(backend: Box<dyn Backend>, mac: MacAddress, addresses: Vec<IpAddr>) -> Self {
        Self {
            backend,
            mac,
            initial_mac: mac,
            addresses,
            features: 0,
            status: STATUS_LINK_UP,
            has_buffers: false,
            dead: false,
            announcement: None,
            attracted: false,
            segments: Vec::new(),
            buffers: Buffers::default(),
            bounce: Vec::new(),
            counters: Arc::default(),
        }
    }

    /// What has gone through; it goes on counting when the device is in its machine.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    pub(super) fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// Sends what the guest has put into the transmit queue.
    fn transmit(&mut self, turn: &mut Turn<'_>) -> Result<Progress, Violation> {
        let memory = turn.memory;
        let queue = &mut turn.queues[TRANSMIT];
        queue.disable_kicks(memory)?;
        let mut progress = Progress::More;
        for _ in 0..TURN_FRAMES_MAX {
            let Some(head) = queue.pop(memory, &mut self.segments)? else {
                if queue.enable_kicks(memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            let readable = self.segments.iter().filter(|segment| !segment.writable);
            let length: u64 = readable.map(|segment| u64::from(segment.len)).sum();
            if length < HEADER_BYTES as u64 {
                let what = "is shorter than a frame's header";
                return Err(Violation::Shape { queue: TRANSMIT, head, what });
            }
            self.send(memory, length);
            queue.complete(memory, head, 0)?;
        }
        queue.notify(memory, turn.interrupt)?;
        Ok(progress)
    }

    /// Sends the frame whose buffers are in `segments`; drops it when the tap does not take it.
    fn send(&mut self, memory: &GuestMemory, length: u64) {
        let frame = length - HEADER_BYTES as u64;
        let sendable = (FRAME_BYTES_MIN as u64..=FRAME_BYTES_MAX as u64).contains(&frame);
        self.buffers.0.clear();
        let readable = self.segments.iter().filter(|segment| !segment.writable);
        let mut gathered = true;
        for segment in readable {
            gathered &= gather(memory, *segment, &mut self.buffers.0);
        }
        gathered &= self.buffers.0.len() <= BUFFERS_MAX;
        // SAFETY: `gather` made the buffers from slices of guest memory, which stays mapped; the
        // guest may change it meanwhile, which the kernel is used to.
        if sendable && gathered && unsafe { self.backend.write(&self.buffers.0) }.is_ok() {
            NetCounters::add(&self.counters.tx_bytes, frame);
        } else {
            // A header that the kernel refuses, a full queue, a link that is down: as on any
            // network, the frame is lost.
            NetCounters::add(&self.counters.dropped, 1);
        }
    }

    /// One round of announcements, and when the next is.
    fn announce_round(&mut self, turn: &Turn<'_>) {
        let Some(announcement) = &mut self.announcement else { return };
        announcement.round += 1;
        if announcement.round >= announce::SCHEDULE.len() {
            self.announcement = None;
        }
        self.send_announcement();
        if self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.status & STATUS_ANNOUNCE != 0 {
            turn.interrupt.raise_config();
        }
    }

    fn send_announcement(&mut self) {
        for frame in announce::frames(self.mac, &self.addresses) {
            let mut bytes = vec![0; HEADER_BYTES];
            bytes.extend_from_slice(&frame);
            let buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            // SAFETY: the buffer is `bytes`, which lives until the end of the loop's turn.
            if let Err(error) = unsafe { self.backend.write(&[buffer]) } {
                tracing::warn!(%error, mac = %self.mac, "an announcement could not be sent");
            }
        }
    }

    /// The guest has announced itself.
    pub(super) fn announced(&mut self) {
        self.status &= !STATUS_ANNOUNCE;
    }

    fn apply_offloads(&mut self) {
        let offloads = Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: self.has(VIRTIO_NET_F_GUEST_ECN),
        };
        if let Err(error) = self.backend.set_offloads(offloads) {
            tracing::warn!(%error, ?offloads, "the tap does not take these offloads");
        }
    }

    /// The tap cannot be read any more.
    pub(super) fn tap_failed(&mut self, error: &io::Error) {
        tracing::error!(%error, mac = %self.mac, "the tap has failed: the device receives no more");
        self.dead = true;
    }

    /// Throws away what came while the guest was elsewhere.
    fn discard(&mut self) {
        let mut byte = [0u8; 64];
        let buffer = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() };
        for _ in 0..DISCARD_FRAMES_MAX {
            // SAFETY: the buffer is `byte`; a tap cuts a frame that is longer.
            if unsafe { self.backend.read(&[buffer]) }.is_err() {
                return;
            }
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            number: 1,
            name: "virtio-net",
            class: ClassCode(0x02, 0x00, 0x00),
            section: kind::VIRTIO_NET,
            section_version: 1,
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    /// mac[6], status.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..].copy_from_slice(&self.status.to_le_bytes());
        for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, features: u64) {
        self.features = features;
        self.has_buffers = true;
        self.apply_offloads();
    }

    fn reset(&mut self) {
        self.features = 0;
        self.status = STATUS_LINK_UP;
        self.mac = self.initial_mac;
        self.has_buffers = false;
        self.announcement = None;
    }

    fn run(&mut self, turn: &mut Turn<'_>, event: Event) -> Result<Progress, Violation> {
        match event {
            Event::Queue(RECEIVE) => {
                // New buffers: the tap is worth a look.
                self.has_buffers = true;
                Ok(Progress::Done)
            }
            Event::Queue(TRANSMIT) => self.transmit(turn),
            Event::Queue(CONTROL) => self.control(turn, CONTROL),
            Event::Queue(_) => Ok(Progress::Done),
            Event::Source if turn.queues[RECEIVE].ready() => self.receive(turn),
            Event::Source => {
                self.has_buffers = false;
                Ok(Progress::Done)
            }
            Event::Timer => {
                self.announce_round(turn);
                Ok(Progress::Done)
            }
        }
    }

    fn source(&self) -> Option<RawFd> {
        Some(self.backend.fd())
    }

    fn wants_source(&self) -> bool {
        self.has_buffers && !self.dead
    }

    fn deadline(&self) -> Option<Instant> {
        let announcement = self.announcement.as_ref()?;
        Some(announcement.start + *announce::SCHEDULE.get(announcement.round)?)
    }

    fn attract(&mut self) {
        self.discard();
        self.attracted = true;
        self.send_announcement();
    }

    fn announce(&mut self, turn: &mut Turn<'_>) {
        if self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) && self.has(VIRTIO_NET_F_CTRL_VQ) {
            self.status |= STATUS_ANNOUNCE;
        }
        self.attracted = false;
        // The first round is due now: the worker sends it, so that nobody waits for a tap.
        self.announcement = Some(Announcement { start: turn.now, round: 0 });
    }

    fn save(&self, out: &mut Encoder) {
        out.raw(&self.mac.0);
        out.u16(self.status);
        out.bool(self.has_buffers);
    }

    fn restore(
        &mut self,
        _version: u32,
        fields: &mut Decoder<'_>,
        features: Option<u64>,
    ) -> Result<(), StateError> {
        self.mac = MacAddress(fields.array("net mac")?);
        self.status = fields.u16("net status")?;
        self.has_buffers = fields.bool("net has_buffers")?;
        if let Some(features) = features {
            self.features = features;
            self.apply_offloads();
            if !self.attracted {
                self.discard();
            }
        }
        Ok(())
    }
}
