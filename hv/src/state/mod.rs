//! The saved state of a machine: a versioned, bounded, checksummed container of sections.
//!
//! `docs/migration-format.md` is the specification; this module follows it. Each part of a
//! machine saves itself as a [`section`]; [`encode`] makes one image of them all, and [`decode`]
//! checks an image as a whole before anything is restored from it. Nothing here does I/O, and
//! nothing here panics on what another side sent.
//!
//! [`Encoder`] and [`Decoder`] are the little-endian alphabet in which every payload is written.

mod codec;
mod image;
pub mod kind;
#[cfg(test)]
mod tests;

pub use codec::{Decoder, Encoder};
pub use image::{FORMAT_MAJOR, FORMAT_MINOR, decode, encode, fields, find, section};
pub use kind::SectionKind;

/// Longest state image, bytes. Eight vCPUs and a dozen devices need less than 200 KiB.
pub const STATE_BYTES_MAX: usize = 16 << 20;
/// Longest payload of a section, bytes.
pub const SECTION_BYTES_MAX: usize = 4 << 20;
/// Most sections in an image.
pub const SECTIONS_MAX: usize = 1024;

/// Why a state image, or a section of it, was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The bytes end in the middle of something.
    #[error("state: {field} needs {needed} bytes, {left} are left")]
    Truncated {
        /// What was being read.
        field: &'static str,
        /// Its length.
        needed: usize,
        /// What there is.
        left: usize,
    },
    /// It does not begin as a state image does.
    #[error("state: magic is {found:02x?}; accepted: \"DROVSTAT\"")]
    Magic {
        /// The first eight bytes.
        found: [u8; 8],
    },
    /// Written in a format that is not ours.
    #[error("state: format {major}.{minor}; accepted: {accepted}.x")]
    Format {
        /// Format's major number.
        major: u16,
        /// Format's minor number.
        minor: u16,
        /// The major number that is read here.
        accepted: u16,
    },
    /// A length or a count is over its limit.
    #[error("state: {field} is {value}; accepted: at most {limit}")]
    TooLarge {
        /// What is too large.
        field: &'static str,
        /// How large it is.
        value: usize,
        /// Its limit.
        limit: usize,
    },
    /// The bytes were damaged on the way.
    #[error("state: crc of section {kind}/{instance} is {found:#010x}; accepted: {expected:#010x}")]
    Crc {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u32,
        /// As computed over what came.
        expected: u32,
        /// As written in the section.
        found: u32,
    },
    /// A section that must be understood is not known here.
    #[error("state: section kind {kind} (instance {instance}) is mandatory and unknown here")]
    UnknownMandatory {
        /// Its kind.
        kind: u16,
        /// Its instance.
        instance: u32,
    },
    /// The same section twice.
    #[error("state: section {kind}/{instance} appears twice")]
    Duplicate {
        /// Its kind.
        kind: &'static str,
        /// Its instance.
        instance: u32,
    },
    /// A section that is needed is not there.
    #[error("state: section {kind}/{instance} is missing")]
    Missing {
        /// Its kind.
        kind: &'static str,
        /// Its instance.
        instance: u32,
    },
    /// A section is newer than this program, or older than it can read.
    #[error("state: section {kind}/{instance} has version {version}; accepted: 1 to {newest}")]
    SectionVersion {
        /// Its kind.
        kind: String,
        /// Its instance.
        instance: u32,
        /// Its version.
        version: u32,
        /// The newest that is read here.
        newest: u32,
    },
    /// More bytes than the section's version has fields for.
    #[error("state: {left} bytes after the last field of {field}")]
    Trailing {
        /// What was read.
        field: &'static str,
        /// How many bytes follow.
        left: usize,
    },
    /// A field has a value that cannot be.
    #[error("state: {field} is {value}; accepted: {accepted}")]
    Value {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What it may be.
        accepted: String,
    },
}

impl StateError {
    /// A field whose value is not acceptable.
    pub fn value(
        field: &'static str,
        value: impl std::fmt::Display,
        accepted: impl Into<String>,
    ) -> Self {
        Self::Value { field, value: value.to_string(), accepted: accepted.into() }
    }
}
