//! One virtqueue as a device uses it: chains come out whole and checked, or the guest has broken
//! the rules.

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::Interrupt;
use crate::memory::GuestMemory;
use crate::state::{Decoder, Encoder, StateError};

/// No vector: the queue raises no interrupt.
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// How a guest broke the rules. Its device stops until the guest resets it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The queue's rings are not in memory.
    #[error("queue {queue}: its rings do not lie in guest memory")]
    Rings {
        /// Which queue.
        queue: usize,
    },
    /// The available index is further ahead than the queue is long.
    #[error("queue {queue}: available ring cannot be read: {reason}")]
    Available {
        /// Which queue.
        queue: usize,
        /// What the queue said.
        reason: String,
    },
    /// A chain loops, is too long, or a descriptor of it cannot be read.
    #[error("queue {queue}: the chain at {head} does not end within {limit} descriptors")]
    Chain {
        /// Which queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
        /// Longest chain, the queue's size.
        limit: u16,
    },
    /// A buffer lies outside of memory.
    #[error(
        "queue {queue}: the chain at {head} has a buffer of {len} bytes at {addr:#x}, outside of memory"
    )]
    Buffer {
        /// Which queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
        /// Where the buffer is said to lie.
        addr: u64,
        /// Its length.
        len: u32,
    },
    /// A chain is not of the shape that this queue needs.
    #[error("queue {queue}: the chain at {head} {what}")]
    Shape {
        /// Which queue.
        queue: usize,
        /// The chain's first descriptor.
        head: u16,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The used ring could not be written.
    #[error("queue {queue}: used ring cannot be written: {reason}")]
    Used {
        /// Which queue.
        queue: usize,
        /// What the queue said.
        reason: String,
    },
}

/// One buffer of a chain; it lies in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where.
    pub addr: GuestAddress,
    /// How long, bytes.
    pub len: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

/// A queue, its number and its interrupt vector.
#[derive(Debug)]
pub struct GuestQueue {
    queue: Queue,
    index: usize,
    /// Chains were completed since the last interrupt was considered.
    completed: bool,
    /// MSI-X vector, or 0xffff.
    pub vector: u16,
}

impl GuestQueue {
    /// A queue that is not set up yet, of at most `size_max` (a power of two) entries.
    pub fn new(index: usize, size_max: u16) -> Self {
        assert!(size_max.is_power_of_two());
        let queue = Queue::new(size_max).unwrap_or_else(|_| unreachable!("a power of two"));
        Self { queue, index, completed: false, vector: NO_VECTOR }
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.completed = false;
        self.vector = NO_VECTOR;
    }

    /// The registers of the queue, for the transport.
    pub(crate) fn registers(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// The queue's registers and indices.
    pub(crate) fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Whether the driver has enabled it.
    pub fn ready(&self) -> bool {
        self.queue.ready()
    }

    /// How many chains it holds.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Before the first use: the rings must lie in memory.
    pub(crate) fn check(&self, memory: &GuestMemory) -> Result<(), Violation> {
        let size = u64::from(self.queue.size());
        let ring = |start: u64, bytes: u64, access| {
            let end = start.checked_add(bytes);
            end.is_some() && memory.check_range(GuestAddress(start), bytes as usize, access)
        };
        let inside = ring(self.queue.desc_table(), 16 * size, Permissions::Read)
            && ring(self.queue.avail_ring(), 6 + 2 * size, Permissions::Read)
            && ring(self.queue.used_ring(), 6 + 8 * size, Permissions::Write);
        if inside { Ok(()) } else { Err(Violation::Rings { queue: self.index }) }
    }

    /// Takes the next chain: its head, and its buffers into `segments`.
    ///
    /// # Errors
    /// When the ring or the chain breaks the rules; nothing of the chain may be used then.
    pub fn pop(
        &mut self,
        memory: &GuestMemory,
        segments: &mut Vec<Segment>,
    ) -> Result<Option<u16>, Violation> {
        segments.clear();
        let (queue, limit) = (self.index, self.queue.size());
        let mut chains = self
            .queue
            .iter(memory)
            .map_err(|error| Violation::Available { queue, reason: error.to_string() })?;
        let Some(chain) = chains.next() else { return Ok(None) };
        let head = chain.head_index();
        let broken = Violation::Chain { queue, head, limit };
        // The iterator ends quietly at what it cannot read. A chain is whole only when its last
        // descriptor says so.
        let mut whole = false;
        for descriptor in chain {
            if segments.len() == usize::from(limit) {
                return Err(broken);
            }
            let (addr, len) = (descriptor.addr(), descriptor.len());
            let writable = descriptor.is_write_only();
            let access = if writable { Permissions::Write } else { Permissions::Read };
            if addr.0.checked_add(u64::from(len)).is_none()
                || !memory.check_range(addr, len as usize, access)
            {
                return Err(Violation::Buffer { queue, head, addr: addr.0, len });
            }
            whole = !descriptor.has_next();
            if len > 0 {
                segments.push(Segment { addr, len, writable });
            }
        }
        if whole { Ok(Some(head)) } else { Err(broken) }
    }

    /// Gives back the last `count` chains that were taken and not completed.
    pub fn rewind(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// The chain at `head` is used; `len` bytes were written into it.
    pub fn complete(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), Violation> {
        self.completed = true;
        self.queue.add_used(memory, head, len).map_err(|error| self.used(error))
    }

    /// Raises the queue's interrupt if the driver wants one for what was completed.
    pub fn notify(&mut self, memory: &GuestMemory, interrupt: &Interrupt) -> Result<(), Violation> {
        if std::mem::take(&mut self.completed)
            && self.queue.needs_notification(memory).map_err(|error| self.used(error))?
        {
            interrupt.raise_queue(self.vector);
        }
        Ok(())
    }

    /// The driver need not tell of new chains for now.
    pub fn disable_kicks(&mut self, memory: &GuestMemory) -> Result<(), Violation> {
        self.queue.disable_notification(memory).map_err(|error| self.used(error))
    }

    /// The driver shall tell of new chains; true when there are some already.
    pub fn enable_kicks(&mut self, memory: &GuestMemory) -> Result<bool, Violation> {
        self.queue.enable_notification(memory).map_err(|error| self.used(error))
    }

    fn used(&self, error: virtio_queue::Error) -> Violation {
        Violation::Used { queue: self.index, reason: error.to_string() }
    }

    pub(crate) fn save(&self, out: &mut Encoder) {
        let state = self.queue.state();
        out.u16(state.max_size);
        out.u16(state.size);
        out.bool(state.ready);
        out.bool(state.event_idx_enabled);
        out.u16(state.next_avail);
        out.u16(state.next_used);
        out.u64(state.desc_table);
        out.u64(state.avail_ring);
        out.u64(state.used_ring);
        out.u16(self.vector);
    }

    pub(crate) fn restore(&mut self, fields: &mut Decoder<'_>) -> Result<(), StateError> {
        let max_size = fields.u16("queue size_max")?;
        if max_size != self.queue.max_size() {
            let accepted = self.queue.max_size().to_string();
            return Err(StateError::value("queue size_max", max_size, accepted));
        }
        let state = QueueState {
            max_size,
            size: fields.u16("queue size")?,
            ready: fields.bool("queue ready")?,
            event_idx_enabled: fields.bool("queue event_idx")?,
            next_avail: fields.u16("queue next_avail")?,
            next_used: fields.u16("queue next_used")?,
            desc_table: fields.u64("queue desc_table")?,
            avail_ring: fields.u64("queue avail_ring")?,
            used_ring: fields.u64("queue used_ring")?,
        };
        self.queue = Queue::try_from(state)
            .map_err(|error| StateError::value("queue", error, "a valid queue"))?;
        self.vector = fields.u16("queue vector")?;
        Ok(())
    }
}
