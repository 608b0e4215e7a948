//! Durable storage on a node. Today this is one thing: **small records** that survive a crash
//! at any moment, which the agent uses for its own identity and for what it knows about each
//! domain. Pools, volumes and images come to live here later; this crate knows nothing of
//! domains.
//!
//! A record is a file: one line of text that says what follows, then the payload, so that an
//! operator can read it with `cat`:
//!
//! ```text
//! drover-record 1 length=27 crc32=8a5c0d1e
//! {"the":"payload", "json":1}
//! ```
//!
//! The number after the word is the *payload's* version, chosen by the caller. [`write`]
//! replaces a record in whole: temporary file, fsync, rename, fsync of the directory; after a
//! crash the old or the new one is there, never a mixture. [`read`] verifies length and
//! checksum and tells a damaged record from a missing one, because the two must not be
//! treated alike: a missing record means "never seen", a damaged one means "was seen, and I
//! do not know what it said".
//!
//! Start reading at [`record`](mod@record).

pub mod record;

pub use record::{Error, RECORD_BYTES_MAX, Record, create_dir, read, remove, sync_dir, write};
