//! Images: how they come into a pool, what they are called, how they travel.
//!
//! ## Identity
//! An image is known by its content ([`ImageId`](crate::pool::ImageId)), not by how it is laid out or where it came
//! from. Plain SHA-256 would need to hash each zero of a disk that is mostly holes, so the
//! content is cut into chunks of 1 MiB ([`CHUNK_BYTES`]; the last one may be shorter), and the
//! identity is the SHA-256 of a small text:
//!
//! ```text
//! drover-image-1 SIZE            in bytes, decimal
//! DIGEST                         SHA-256 of each chunk in order, in hexadecimal, one a line
//! …
//! ```
//!
//! A chunk of zeros has a digest like any other, which is known beforehand. Anybody can check:
//!
//! ```sh
//! { echo "drover-image-1 $(stat -c %s disk.raw)"
//!   split -b 1M --filter='sha256sum | cut -c1-64' disk.raw; } | sha256sum
//! ```
//!
//! ## Ways in
//! [`import`] reads a raw or qcow2 file, or a raw stream; [`ImageWriter`] takes chunks as
//! another node's [`Opened::chunks`](crate::pool::Opened::chunks) gives them. Both write
//! straight into the pool, and the image becomes visible when everything has been verified.
//! A raw file of any length from one byte on is accepted; it is rounded up to 512 bytes with
//! zeros.

mod digest;
mod import;
mod qcow2;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

pub use digest::{CHUNK_BYTES, Digester, chunk_digest};
pub use import::{Format, Import, Progress, Source, Stage, Watch, import};
pub use reader::{Chunk, Chunks, Step};
pub use writer::ImageWriter;

/// How large an image may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageLimits {
    /// Its size, holes included.
    pub bytes_max: u64,
    /// What it holds that is not holes: a few kilobytes of qcow2 can say terabytes.
    pub data_bytes_max: u64,
}

impl Default for ImageLimits {
    /// Templates of operating systems have some gigabytes; moved servers have more.
    fn default() -> Self {
        Self { bytes_max: 2 << 40, data_bytes_max: 256 << 30 }
    }
}
