//! Virtio 1.2 devices over PCI.
//!
//! A device's behaviour is a [`VirtioDevice`]: it is given one bounded turn at a time, and knows
//! neither threads nor PCI nor KVM, so that a test can drive it with plain memory. [`VirtioPci`]
//! is the transport around it: registers, features, queues, MSI-X. Each has one worker thread,
//! woken by the guest's notifications (ioeventfd), by the device's host side (a tap), or by a
//! timer; one lock is held for each turn, and pausing a device is taking that lock.
//!
//! ```text
//!   vCPU ── MMIO ──► VirtioPci ─┐                  ┌─► VirtioDevice ──► tap, volume …
//!   vCPU ── ioeventfd ─► worker ┴─ lock ─► Inner ──┴─► queues in guest memory
//!                                                  └─► MSI-X ── irqfd ──► guest
//! ```
//!
//! A guest that breaks the rules ([`Violation`]) finds its device with DEVICE_NEEDS_RESET; the
//! host notes that a few times in a machine's life, and does nothing for the device until it is
//! reset. All that a device writes into guest memory goes through `vm-memory`, or is marked in
//! its bitmap, so that live migration sees it.

pub mod blk;
mod buffers;
pub mod console;
mod core;
mod interrupt;
pub mod net;
mod notifications;
mod queue;
pub mod rng;
#[cfg(test)]
mod tests;
mod transport;
mod worker;

use std::any::Any;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

pub use interrupt::Interrupt;
pub use queue::{GuestQueue, Segment, Violation};
pub use transport::VirtioPci;

use crate::memory::GuestMemory;
use crate::pci::ClassCode;
use crate::state::{Decoder, Encoder, SectionKind, StateError};

/// A device's number, and what PCI says of it.
#[derive(Debug, Clone, Copy)]
pub struct DeviceKind {
    /// Virtio's device number.
    pub number: u16,
    /// For threads and messages.
    pub name: &'static str,
    /// PCI's class.
    pub class: ClassCode,
    /// The section that holds its own state.
    pub section: SectionKind,
    /// The newest version of that section.
    pub section_version: u32,
}

/// Why a device gets a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The driver may have put chains into this queue.
    Queue(usize),
    /// The host side can be read.
    Source,
    /// The deadline has passed.
    Timer,
}

/// What a device has at hand during a turn.
#[derive(Debug)]
pub struct Turn<'a> {
    /// The guest's memory.
    pub memory: &'a GuestMemory,
    /// All queues of the device; those the driver did not enable must not be used.
    pub queues: &'a mut [GuestQueue],
    /// Towards the driver.
    pub interrupt: &'a Interrupt,
    /// Now.
    pub now: Instant,
}

/// A device could not be paused, and goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{device}: {under_way} requests are still under way after {waited:?}")]
pub struct Unsettled {
    /// Its name.
    pub device: &'static str,
    /// Requests that the host has not done.
    pub under_way: usize,
    /// How long they were waited for.
    pub waited: Duration,
}

/// Whether a turn ended because there was nothing more, or because it was long enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Nothing left; the driver will notify.
    Done,
    /// The same event again, after the others had theirs.
    More,
}

/// Something to do that may wait for the host, and holds all that it needs.
pub type Errand = Box<dyn FnOnce() + Send>;

/// The behaviour of a device.
pub trait VirtioDevice: Any + Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;
    /// The sizes of its queues, powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// The features that it offers, without those of the transport and the rings.
    fn features(&self) -> u64;
    /// The guest reads the device's configuration.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver is ready; `features` are those that it took.
    fn activate(&mut self, features: u64);
    /// The driver has reset the device, and nothing that it began is under way.
    fn reset(&mut self);
    /// One turn, bounded in time whatever the guest does.
    fn run(&mut self, turn: &mut Turn<'_>, event: Event) -> Result<Progress, Violation>;

    /// A descriptor of the host side that [`Event::Source`] waits for.
    fn source(&self) -> Option<RawFd> {
        None
    }
    /// Whether it would read its source now.
    fn wants_source(&self) -> bool {
        false
    }
    /// What the worker is to do between two turns, while nobody holds the device's lock;
    /// [`Event::Source`] comes right behind it.
    fn errand(&mut self) -> Option<Errand> {
        None
    }
    /// When it wants an [`Event::Timer`].
    fn deadline(&self) -> Option<Instant> {
        None
    }
    /// The machine is about to move here: what is sent to it comes here from now on, and is kept
    /// until it runs. The device is paused, and has the state of a rehearsal or none.
    fn attract(&mut self) {}
    /// The machine has moved here: tell whoever needs to know. The device is not paused.
    fn announce(&mut self, _turn: &mut Turn<'_>) {}

    /// The device is about to be paused or reset: waits until nothing that it began is under way,
    /// or until the deadline, and answers how much still is. What is finished goes to the driver;
    /// there is no `turn` when the driver has lost the device, and then it is dropped, and what
    /// has not begun is forgotten.
    fn settle(
        &mut self,
        _turn: Option<&mut Turn<'_>>,
        _deadline: Instant,
    ) -> Result<usize, Violation> {
        Ok(0)
    }

    /// Writes the device's own state, in the newest version.
    fn save(&self, out: &mut Encoder);
    /// Takes over a state of this version, on a device that was reset; `features` are those that
    /// the driver took, `None` when it is not active.
    fn restore(
        &mut self,
        version: u32,
        fields: &mut Decoder<'_>,
        features: Option<u64>,
    ) -> Result<(), StateError>;
}
