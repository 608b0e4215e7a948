//! The block device (VIRTIO 1.2, 5.2): a volume of the node, a raw file or a block device.
//!
//! [`device`] is the virtio side, [`requests`] tells what a chain asks for, [`limits`] when it may
//! begin, [`backend`] does it, [`volume`] is the file: opened, measured and locked. [`tracker`]
//! notes for a migration what is written.
//!
//! ```text
//!   queue ─► requests::parse ─► Job ─► Backend ─► io_uring, or a thread with preadv and pwritev
//!                                        │        or the worker itself, for cached reads
//!   used ◄─ status, dirty marks ◄─ Done ◄┘  at once, or a descriptor wakes the worker
//! ```
//!
//! What is begun in a turn is handed over together, but no more than some pages of it: whoever
//! waits for the first request need not wait until the last one is copied.
//!
//! Data goes between the volume and guest memory through the host's page cache (there is no
//! O_DIRECT), as a disk with a volatile write cache: a write that is completed is durable after
//! the guest's next FLUSH, which is an fdatasync. For a driver that does not know FLUSH each
//! write is made durable before it is completed.
//!
//! A job owns pointers into guest memory from its start until it comes back. Nothing drops a job
//! that the kernel may still work on. A reset is done when all of them have come back: until then the
//! driver reads a status that is not 0, and nobody else waits. Pausing waits for a while and then
//! fails. Dropping the device waits as long as it takes, so that a machine settles its devices
//! before it is dropped. How long all that takes depends on the host's disk alone, as the bytes
//! under way are bounded.

mod backend;
mod device;
mod limits;
mod requests;
#[cfg(test)]
mod tests;
pub mod tracker;
mod volume;

pub use device::Blk;
pub use limits::Limits;
pub(crate) use volume::{Closed, Straight, is_zero};
pub use volume::{Volume, VolumeError};
