//! The virtio-pci transport, modern only (virtio 1.2, 4.1).

use std::any::Any;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::core::{Core, Inner, status};
use super::notifications::{NOTIFY, NOTIFY_STRIDE, Notifications};
use super::{Interrupt, Unsettled, VirtioDevice, worker};
use crate::machine::migratable::{MachineState, StateSection};
use crate::memory::GuestMemory;
use crate::pci::{ConfigSpace, Identity, Msix, PciFunction, WINDOW_BYTES, Wiring, window_start};
use crate::state::{self, Encoder, StateError, kind};

/// Where things lie in the window.
mod window {
    use std::ops::Range;
    pub(super) const COMMON: Range<u64> = 0..0x40;
    pub(super) const ISR: Range<u64> = 0x1000..0x1004;
    pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
    pub(super) const MSIX_TABLE: Range<u64> = 0x4000..0x5000;
    pub(super) const MSIX_PENDING: Range<u64> = 0x5000..0x6000;
}
const PCI_VENDOR: u16 = 0x1af4;
const CAPABILITY_VENDOR: u8 = 0x09;
/// Rings and transport; offered for every device.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Longest wait for what a device has begun, when it is paused: a disk of the node may hang.
const SETTLE_MAX: Duration = Duration::from_secs(20);

/// Kinds of the vendor capability.
mod cfg_type {
    pub(super) const COMMON: u8 = 1;
    pub(super) const NOTIFY: u8 = 2;
    pub(super) const ISR: u8 = 3;
    pub(super) const DEVICE: u8 = 4;
    pub(super) const PCI: u8 = 5;
}

/// A virtio device as a PCI function, with its worker.
pub struct VirtioPci {
    core: Arc<Core>,
    msix: Arc<Msix>,
    config: Mutex<ConfigSpace>,
    slot: u8,
    notifications: Notifications,
    /// Offset of the capability through which the window is reached without mapping it.
    pci_cap: usize,
    msix_cap: usize,
    features: u64,
    worker: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci").field("slot", &self.slot).finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts a transport around a device that will be in this slot, and starts its worker.
    ///
    /// # Errors
    /// When the system has no eventfds, interrupt lines or threads left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        slot: u8,
        memory: GuestMemory,
        wiring: Arc<dyn Wiring>,
    ) -> io::Result<Self> {
        let device_kind = device.kind();
        let queues = device.queue_sizes().len();
        let features = device.features() | RING_FEATURES;
        // One vector for each queue, one for configuration changes.
        let msix = Arc::new(Msix::new(Arc::clone(&wiring), queues as u16 + 1)?);
        let core = Arc::new(Core::new(memory, Interrupt::new(Arc::clone(&msix)), device)?);
        let identity = Identity {
            vendor: PCI_VENDOR,
            device: 0x1040 + device_kind.number,
            revision: 1,
            class: device_kind.class,
            subsystem: (PCI_VENDOR, 0x1100),
        };
        let window = (window_start(slot) as u32, WINDOW_BYTES as u32);
        let mut config = ConfigSpace::new(identity, Some(window));
        let (pci_cap, msix_cap) = add_capabilities(&mut config, msix.vectors());
        let name = format!("{}-{slot}", device_kind.name);
        let worker = Some(worker::spawn(Arc::clone(&core), name)?);
        let config = Mutex::new(config);
        let notifications = Notifications::new(slot, wiring);
        Ok(Self { core, msix, config, slot, notifications, pci_cap, msix_cap, features, worker })
    }

    /// Its slot on the bus.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// A guest is about to come here. Most windows stay where they were made: it need not wait for
    /// their wiring in its pause. No other machine does this: until the guest has put the window
    /// there, the address may be another function's, whose notifications would be lost.
    pub fn expect(&self) {
        self.notifications.wire(&self.core.kicks, Some(window_start(self.slot)));
    }

    /// The queues' notifications come from where the window is now.
    fn wire(&self, config: &ConfigSpace) {
        self.notifications.wire(&self.core.kicks, config.window().map(|(start, _)| start));
    }

    /// The function leaves the bus for good: the guest reaches it no more, nor it the guest.
    pub fn release(&self) {
        self.notifications.release(&self.core.kicks);
        self.msix.release();
    }

    /// When this returns well, the device touches neither guest memory nor its host side.
    ///
    /// # Errors
    /// When the host does not get done what the device has begun; it runs as before then.
    pub fn pause(&self) -> Result<(), Unsettled> {
        self.pause_within(SETTLE_MAX)
    }

    /// As [`pause`](Self::pause), with a wait of the caller's.
    ///
    /// # Errors
    /// The same.
    pub fn pause_within(&self, wait_max: Duration) -> Result<(), Unsettled> {
        self.core.pause(wait_max)
    }

    /// Lets the device run again, from where it stopped.
    pub fn resume(&self) {
        self.core.resume();
    }

    /// The machine is about to move here and is paused: what is sent to it may come already.
    pub fn attract(&self) {
        self.core.lock().device.attract();
    }

    /// The machine has moved here and runs: the device tells whoever needs to know.
    pub fn announce(&self) {
        let mut inner = self.core.lock();
        if inner.is_live() {
            let (device, mut turn) = inner.split(&self.core, Instant::now());
            device.announce(&mut turn);
        }
        drop(inner);
        self.core.wake();
    }

    /// Asks the device something between two of its turns, if it is one of this type.
    pub fn with<D: VirtioDevice, T>(&self, ask: impl FnOnce(&mut D, &Interrupt) -> T) -> Option<T> {
        let mut inner = self.core.lock();
        let device: &mut dyn Any = inner.device.as_mut();
        let answer = ask(device.downcast_mut()?, &self.core.interrupt);
        drop(inner);
        // What it waits for may have changed.
        self.core.wake();
        Some(answer)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) {
        let within = |range: &std::ops::Range<u64>| range.contains(&offset);
        if within(&window::COMMON) {
            let registers = self.common(&self.core.lock());
            copy_out(&registers, offset, data);
        } else if within(&window::ISR) {
            // Reading acknowledges.
            data.fill(0);
            if offset == window::ISR.start
                && let Some(first) = data.first_mut()
            {
                *first = self.core.interrupt.isr.swap(0, Ordering::SeqCst);
            }
        } else if within(&window::DEVICE) {
            data.fill(0);
            self.core.lock().device.read_config(offset - window::DEVICE.start, data);
        } else if within(&window::MSIX_TABLE) {
            self.msix.read_table(offset - window::MSIX_TABLE.start, data);
        } else if within(&window::MSIX_PENDING) {
            self.msix.read_pending(offset - window::MSIX_PENDING.start, data);
        } else {
            data.fill(0);
        }
    }

    fn write_at(&self, offset: u64, data: &[u8]) {
        if window::COMMON.contains(&offset) {
            self.write_common(offset, data);
        } else if NOTIFY.contains(&offset) {
            // KVM takes these; here come only those written through configuration space.
            self.core.kick(((offset - NOTIFY.start) / NOTIFY_STRIDE) as usize);
        } else if window::MSIX_TABLE.contains(&offset) {
            self.msix.write_table(offset - window::MSIX_TABLE.start, data);
        }
    }

    /// The common configuration as the driver sees it now.
    fn common(&self, inner: &Inner) -> [u8; window::COMMON.end as usize] {
        let word = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let interrupt = &self.core.interrupt;
        let mut out = Encoder::new();
        out.u32(inner.device_features_select);
        out.u32(word(self.features, inner.device_features_select));
        out.u32(inner.driver_features_select);
        out.u32(word(inner.driver_features, inner.driver_features_select));
        out.u16(interrupt.config_vector.load(Ordering::SeqCst));
        out.u16(inner.queues.len() as u16);
        out.u8(inner.status);
        out.u8(interrupt.generation.load(Ordering::SeqCst));
        out.u16(inner.queue_select);
        if let Some(queue) = inner.queues.get(usize::from(inner.queue_select)) {
            let state = queue.state();
            out.u16(state.size);
            out.u16(queue.vector);
            out.u16(u16::from(state.ready));
            out.u16(inner.queue_select);
            out.u64(state.desc_table);
            out.u64(state.avail_ring);
            out.u64(state.used_ring);
        }
        let mut registers = [0; window::COMMON.end as usize];
        let bytes = out.into_bytes();
        registers[..bytes.len()].copy_from_slice(&bytes);
        registers
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        let Some(value) = bytes.get_mut(..data.len()) else { return };
        value.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let (byte, half, word) = (value as u8, value as u16, value as u32);
        let mut inner = self.core.lock();
        match (offset, data.len()) {
            (0x00, 4) => inner.device_features_select = word,
            (0x08, 4) => inner.driver_features_select = word,
            (0x0c, 4) => inner.take_features(word),
            (0x10, 2) => {
                let vector = self.vector(half);
                self.core.interrupt.config_vector.store(vector, Ordering::SeqCst);
            }
            (0x14, 1) => self.write_status(&mut inner, byte),
            (0x16, 2) => inner.queue_select = half,
            (0x18.., _) => self.write_queue(&mut inner, offset, data.len(), value),
            _ => {}
        }
    }

    fn write_queue(&self, inner: &mut Inner, offset: u64, length: usize, value: u64) {
        let half = value as u16;
        let select = usize::from(inner.queue_select);
        let Some(queue) = inner.queues.get_mut(select) else { return };
        if (offset, length) == (0x1a, 2) {
            queue.vector = self.vector(half);
            return;
        }
        let registers = queue.registers();
        if registers.ready() {
            // An enabled queue stays as it is until the device is reset.
            return;
        }
        match (offset, length) {
            (0x18, 2) => {
                // One that is no power of two or too large leaves the size as it was.
                let _ = registers.try_set_size(half);
            }
            (0x1c, 2) if half == 1 => {
                let event_idx = inner.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
                registers.set_event_idx(event_idx);
                registers.set_ready(true);
            }
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(length as u64) => {
                set_ring(registers, offset, length, value);
            }
            _ => {}
        }
    }

    /// A vector that does not exist reads back as none.
    fn vector(&self, wanted: u16) -> u16 {
        if wanted < self.msix.vectors() { wanted } else { super::queue::NO_VECTOR }
    }

    fn write_status(&self, inner: &mut Inner, new: u8) {
        if inner.resetting {
            // The driver is to wait until it reads 0.
            return;
        }
        if new == 0 {
            inner.reset(&self.core);
            self.core.wake();
            return;
        }
        // The driver adds bits and takes none away; NEEDS_RESET is ours.
        let mut added = new & !inner.status & !status::NEEDS_RESET;
        if added & status::FEATURES_OK != 0 && !self.accepts(inner.driver_features) {
            added &= !status::FEATURES_OK;
        }
        let negotiated = (inner.status | added) & status::FEATURES_OK != 0;
        if !negotiated {
            added &= !status::DRIVER_OK;
        }
        inner.status |= added;
        if added & status::DRIVER_OK != 0 {
            self.activate(inner);
        }
    }

    /// A modern driver that took no more than was offered.
    fn accepts(&self, driver_features: u64) -> bool {
        driver_features & !self.features == 0 && driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&self, inner: &mut Inner) {
        let broken = inner
            .queues
            .iter()
            .filter(|queue| queue.ready())
            .find_map(|queue| queue.check(&self.core.memory).err());
        if let Some(violation) = broken {
            inner.needs_reset(&self.core, &violation);
            return;
        }
        inner.device.activate(inner.driver_features);
        // The driver may have filled queues before it was ready.
        inner.look_at_all = true;
        self.core.wake();
    }

    /// The window's access that the capability describes: BAR 0, an offset, 1, 2 or 4 bytes.
    fn indirect_access(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let cap = self.pci_cap;
        let bar = config.u16_at(cap + 4) as u8;
        let (offset, length) = (config.u32_at(cap + 8), config.u32_at(cap + 12) as usize);
        let fits = u64::from(offset) + length as u64 <= WINDOW_BYTES;
        let aligned = matches!(length, 1 | 2 | 4) && offset.is_multiple_of(length as u32);
        (bar == 0 && fits && aligned).then_some((u64::from(offset), length))
    }
}

impl Inner {
    fn take_features(&mut self, word: u32) {
        if self.status & status::FEATURES_OK != 0 {
            return;
        }
        let (shift, keep) = match self.driver_features_select {
            0 => (0, 0xffff_ffff_0000_0000),
            1 => (32, 0xffff_ffff),
            _ => return,
        };
        self.driver_features = self.driver_features & keep | u64::from(word) << shift;
    }
}

/// Adds the capabilities; answers the offsets of the indirect access and of MSI-X.
fn add_capabilities(config: &mut ConfigSpace, vectors: u16) -> (usize, usize) {
    let body = |kind: u8, range: &std::ops::Range<u64>, extra: Option<u32>| {
        let mut out = Encoder::new();
        out.raw(&[if extra.is_some() { 20 } else { 16 }, kind, 0, 0, 0, 0]);
        out.u32(range.start as u32);
        out.u32((range.end - range.start) as u32);
        if let Some(extra) = extra {
            out.u32(extra);
        }
        out.into_bytes()
    };
    let mut add = |body: &[u8]| usize::from(config.add_capability(CAPABILITY_VENDOR, body));
    add(&body(cfg_type::COMMON, &window::COMMON, None));
    add(&body(cfg_type::ISR, &window::ISR, None));
    add(&body(cfg_type::DEVICE, &window::DEVICE, None));
    add(&body(cfg_type::NOTIFY, &NOTIFY, Some(NOTIFY_STRIDE as u32)));
    let pci_cap = add(&body(cfg_type::PCI, &(0..0), Some(0)));
    config.allow(pci_cap + 4, &[0xff]);
    config.allow(pci_cap + 8, &[0xff; 8]);
    let table = window::MSIX_TABLE.start as u32;
    let msix_cap = config.add_msix(vectors, table, window::MSIX_PENDING.start as u32);
    config.seal();
    (pci_cap, usize::from(msix_cap))
}

/// Writes one of the rings' addresses, or half of one. An address that is not aligned leaves the
/// old one, without a word: a guest must not fill a log.
fn set_ring(registers: &mut Queue, offset: u64, length: usize, value: u64) {
    let join = |old: u64| match (length, offset % 8) {
        (4, 0) => old & 0xffff_ffff_0000_0000 | value,
        (4, _) => old & 0xffff_ffff | value << 32,
        _ => value,
    };
    let _ = match offset & !7 {
        0x20 => registers.try_set_desc_table_address(GuestAddress(join(registers.desc_table()))),
        0x28 => registers.try_set_avail_ring_address(GuestAddress(join(registers.avail_ring()))),
        _ => registers.try_set_used_ring_address(GuestAddress(join(registers.used_ring()))),
    };
}

fn copy_out(registers: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset as usize..).zip(data.iter_mut()) {
        *byte = registers.get(at).copied().unwrap_or(0);
    }
}

impl PciFunction for VirtioPci {
    fn window(&self) -> Option<(u64, u64)> {
        self.config().window()
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let access = {
            let config = self.config();
            config.read(offset, data);
            (offset == self.pci_cap + 16).then(|| self.indirect_access(&config)).flatten()
        };
        if let Some((at, length)) = access
            && let Some(data) = data.get_mut(..length)
        {
            self.read_at(at, data);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let (access, control) = {
            let mut config = self.config();
            config.write(offset, data);
            self.wire(&config);
            let data_word = offset == self.pci_cap + 16;
            let control = self.msix_cap + 2;
            let touched = offset < control + 2 && offset + data.len() > control;
            (
                data_word.then(|| self.indirect_access(&config)).flatten(),
                touched.then(|| config.u16_at(control)),
            )
        };
        if let Some(control) = control {
            self.msix.set_control(control);
        }
        if let Some((at, length)) = access
            && let Some(data) = data.get(..length)
        {
            self.write_at(at, data);
        }
    }

    fn read_window(&self, offset: u64, data: &mut [u8]) {
        self.read_at(offset, data);
    }

    fn write_window(&self, offset: u64, data: &[u8]) {
        self.write_at(offset, data);
    }

    fn reset(&self) {
        let mut config = self.config();
        config.reset();
        self.wire(&config);
        drop(config);
        self.msix.reset();
        self.core.lock().reset(&self.core);
        self.core.wake();
    }

    fn save(&self, slot: u32) -> Vec<StateSection> {
        let inner = self.core.lock();
        let device_kind = inner.device.kind();
        let interrupt = &self.core.interrupt;
        let function = state::section(kind::PCI_FUNCTION, slot, 1, |out| {
            self.config().save(out);
            self.msix.save(out);
        });
        let transport = state::section(kind::VIRTIO, slot, 1, |out| {
            out.u16(device_kind.number);
            out.u8(inner.status);
            out.u64(inner.driver_features);
            out.u32(inner.device_features_select);
            out.u32(inner.driver_features_select);
            out.u16(inner.queue_select);
            out.u8(interrupt.isr.load(Ordering::SeqCst));
            out.u8(interrupt.generation.load(Ordering::SeqCst));
            out.u16(interrupt.config_vector.load(Ordering::SeqCst));
            out.u8(inner.queues.len() as u8);
            for queue in &inner.queues {
                queue.save(out);
            }
        });
        let device =
            state::section(device_kind.section, slot, device_kind.section_version, |out| {
                inner.device.save(out);
            });
        vec![function, transport, device]
    }

    fn restore(&self, slot: u32, state: &MachineState) -> Result<(), StateError> {
        let mut fields = state::fields(state::find(state, kind::PCI_FUNCTION, slot)?, 1)?;
        let mut config = self.config();
        config.restore(&mut fields)?;
        self.wire(&config);
        drop(config);
        self.msix.restore(&mut fields)?;
        fields.finish("pci function")?;

        let mut inner = self.core.lock();
        inner.reset(&self.core);
        let mut fields = state::fields(state::find(state, kind::VIRTIO, slot)?, 1)?;
        self.restore_transport(&mut inner, &mut fields)?;
        fields.finish("virtio transport")?;

        let device_kind = inner.device.kind();
        let section = state::find(state, device_kind.section, slot)?;
        let mut fields = state::fields(section, device_kind.section_version)?;
        let features = inner.is_live().then_some(inner.driver_features);
        inner.device.restore(section.version, &mut fields, features)?;
        inner.restored = true;
        fields.finish(device_kind.name)
    }
}

impl VirtioPci {
    fn restore_transport(
        &self,
        inner: &mut Inner,
        fields: &mut state::Decoder<'_>,
    ) -> Result<(), StateError> {
        let number = fields.u16("virtio device")?;
        let mine = inner.device.kind().number;
        if number != mine {
            return Err(StateError::value("virtio device", number, mine.to_string()));
        }
        inner.status = fields.u8("virtio status")?;
        inner.driver_features = fields.u64("virtio features")?;
        let negotiated = inner.status & status::FEATURES_OK != 0;
        if negotiated && !self.accepts(inner.driver_features) {
            return Err(StateError::value(
                "virtio features",
                format_args!("{:#x}", inner.driver_features),
                format!("those that are offered here, {:#x}", self.features),
            ));
        }
        inner.device_features_select = fields.u32("virtio device_features_select")?;
        inner.driver_features_select = fields.u32("virtio driver_features_select")?;
        inner.queue_select = fields.u16("virtio queue_select")?;
        let interrupt = &self.core.interrupt;
        interrupt.isr.store(fields.u8("virtio isr")?, Ordering::SeqCst);
        interrupt.generation.store(fields.u8("virtio generation")?, Ordering::SeqCst);
        interrupt.config_vector.store(fields.u16("virtio config_vector")?, Ordering::SeqCst);
        let queues = usize::from(fields.u8("virtio queues")?);
        if queues != inner.queues.len() {
            let accepted = inner.queues.len().to_string();
            return Err(StateError::value("virtio queues", queues, accepted));
        }
        for queue in &mut inner.queues {
            queue.restore(fields)?;
        }
        Ok(())
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.core.end();
        if let Some(worker) = self.worker.take()
            && worker.join().is_err()
        {
            tracing::error!("a device's worker has panicked");
        }
    }
}
