//! The block device (VIRTIO 1.2, 5.2): a volume of the node, a raw file or a block device.
//!
//! [`device`] is the virtio side, [`requests`] tells what a chain asks for, [`backend`] does it,
//! [`volume`] is the file: opened, measured and locked. [`tracker`] notes for a migration what is
//! written.
//!
//! ```text
//!   queue ─► requests::parse ─► Job ─► Backend ─► io_uring, or a thread with preadv and pwritev
//!                                        │
//!   used ◄─ status, dirty marks ◄─ Done ◄┘  an eventfd wakes the device's worker
//! ```
//!
//! Data goes between the volume and guest memory through the host's page cache (there is no
//! O_DIRECT), as a disk with a volatile write cache: a write that is completed is durable after
//! the guest's next FLUSH, which is an fdatasync. For a driver that does not know FLUSH each
//! write is made durable before it is completed.
//!
//! A job owns pointers into guest memory from its start until it comes back. Nothing drops a job
//! that the kernel may still work on: resetting and dropping the device wait for all of them, as
//! long as it takes, and pausing waits for a while and then fails. How long depends on the host's
//! disk alone, as the bytes under way are bounded.

mod backend;
mod device;
mod requests;
#[cfg(test)]
mod tests;
pub mod tracker;
mod volume;

pub use device::Blk;
pub(crate) use volume::is_zero;
pub use volume::{Volume, VolumeError};
