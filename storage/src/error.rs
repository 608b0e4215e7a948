//! Why a pool or an image could not do what was asked.

use std::io;
use std::path::{Path, PathBuf};

/// Every way in which pools and images fail. A message names the thing, the value and what
/// would be accepted.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// A value that was given is not acceptable; nothing was done.
    #[error("{field}: {value}: accepted is {accepted}")]
    Invalid {
        /// Which value ("bytes", "pool", "header.cluster_bits").
        field: &'static str,
        /// What was given.
        value: String,
        /// What would be accepted.
        accepted: String,
    },
    /// The pool itself cannot be used: missing, not thin, does not zero …
    #[error("pool {pool}: {reason}")]
    Unfit {
        /// The pool's specification.
        pool: String,
        /// What is wrong and what would put it right.
        reason: String,
    },
    /// The volume, snapshot or image is not in the pool.
    #[error("{what}: is not in pool {pool}")]
    NotFound {
        /// What was looked for.
        what: String,
        /// The pool's specification.
        pool: String,
    },
    /// Somebody has it open.
    #[error("{what}: is in use: a VMM or a reader has it open")]
    Busy {
        /// What is open.
        what: String,
    },
    /// It is there already, and differs from what was asked for.
    #[error("{what}: is there already with {have}, and {want} was asked for")]
    Conflict {
        /// What is there.
        what: String,
        /// What it has.
        have: String,
        /// What was wanted.
        want: String,
    },
    /// Something that is not ours has the name that ours would have.
    #[error("{name}: is not Drover's (it lacks the tag {tag}); it was not touched")]
    Foreign {
        /// Its name.
        name: String,
        /// The tag that ours have.
        tag: &'static str,
    },
    /// The pool would run full.
    #[error("pool {pool}: no room: {detail}")]
    NoRoom {
        /// The pool's specification.
        pool: String,
        /// How full it is.
        detail: String,
    },
    /// The input ends before it should.
    #[error("{what}: the input ends early: {have} bytes where {want} were expected")]
    Truncated {
        /// Which part of the input.
        what: &'static str,
        /// What was there.
        have: u64,
        /// What there should be.
        want: u64,
    },
    /// What came is not what was announced.
    #[error("{field}: expected {expected}, found {found}")]
    Digest {
        /// Which digest ("sha256" of the file as given, "image" of the content).
        field: &'static str,
        /// What was announced.
        expected: String,
        /// What came.
        found: String,
    },
    /// The caller's cancel flag was set.
    #[error("cancelled")]
    Cancelled,
    /// The operating system refused.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// What was being done ("open", "write" …).
        action: &'static str,
        /// The file or device.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A tool said no.
    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// What it said on stderr, bounded.
        stderr: String,
    },
    /// Something took longer than it may; its effect is unknown, and doing it again is safe.
    #[error("{what}: took longer than {seconds} s")]
    Timeout {
        /// The command line or the step.
        what: String,
        /// The deadline.
        seconds: u64,
    },
    /// A tool's report makes no sense.
    #[error("`{command}`: its report cannot be read: {detail}")]
    Report {
        /// The command line.
        command: String,
        /// What is wrong with it.
        detail: String,
    },
}

impl PoolError {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    pub(crate) fn invalid(
        field: &'static str,
        value: impl ToString,
        accepted: impl Into<String>,
    ) -> Self {
        Self::Invalid { field, value: value.to_string(), accepted: accepted.into() }
    }

    /// Whether the system said that there is no room.
    pub fn is_no_room(&self) -> bool {
        match self {
            Self::NoRoom { .. } => true,
            Self::Io { source, .. } => {
                matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
            }
            _ => false,
        }
    }
}
