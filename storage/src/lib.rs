//! Durable storage on a node. This crate knows nothing of domains, nodes or the controller; the
//! agent joins it with them. It has two parts.
//!
//! **Small records** that survive a crash at any moment, which the agent uses for its own
//! identity and for what it knows about each domain.
//! A record is a file: one line of text that says what follows, then the payload, so that an
//! operator can read it with `cat`:
//!
//! ```text
//! drover-record 1 length=27 crc32=8a5c0d1e
//! {"the":"payload", "json":1}
//! ```
//!
//! The number after the word is the *payload's* version, chosen by the caller. [`write()`]
//! replaces a record in whole: temporary file, fsync, rename, fsync of the directory; after a
//! crash the old or the new one is there, never a mixture. [`read`] verifies length and
//! checksum and tells a damaged record from a missing one, because the two must not be
//! treated alike: a missing record means "never seen", a damaged one means "was seen, and I
//! do not know what it said".
//!
//! **Pools** with volumes, snapshots and images. A pool is opened from a specification
//! (`lvm:VG/THINPOOL`, `dir:/path`) by [`pool::open`] and used through the trait [`Pool`].
//! Data flows like this:
//!
//! ```text
//! raw or qcow2 file, stream ──import──▶ ImageWriter ──▶ ImageDraft ──publish──▶ image
//! another node's chunks ────────────────▲                                        │
//! another node ◀── Opened::chunks ◀──────────────────────────────────────────────┤
//!                         volume, as a VMM opens it ◀── clone_image ─────────────┘
//!                         │    ▲    ▲
//! another node ◀── chunks ┤    │    └── VolumeWriter ◀── another node's chunks
//!                         ▼    │ clone_snapshot
//! another node ◀── chunks snapshot
//! ```
//!
//! Inside a pool everything is raw; other formats end at [`image::import`].
//!
//! Start reading at [`pool`] for what a pool promises, at [`image`] for identity and import;
//! then `dir`, the simpler of the two back ends, and `lvm`. [`record`](mod@record) stands by itself.

mod bulk;
mod dir;
mod error;
pub mod image;
mod lock;
mod lvm;
pub mod pool;
pub mod record;
mod room;
mod sparse;
pub mod volume;

pub use error::PoolError;
pub use pool::{Pool, PoolSpec};
pub use record::{Error, RECORD_BYTES_MAX, Record, create_dir, read, remove, sync_dir, write};

/// What pools and images answer.
pub type Result<T> = std::result::Result<T, PoolError>;
