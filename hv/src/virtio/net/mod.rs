//! The network device: frames go between the guest's queues and a tap, without a copy.
//!
//! [`device`] is the virtio side, [`tap`] the host's, [`announce`] what is sent when the guest
//! has moved. Both sides speak the same 12-byte header (checksum and segmentation offloads),
//! so that a frame and its header go through in one `readv` or `writev`.

pub mod announce;
mod control;
mod device;
mod receive;
pub mod tap;
#[cfg(test)]
mod tests;

pub use announce::MacAddress;
pub use device::{Net, NetCounters};
pub use tap::{Tap, TapError};
