//! Who has a volume open. A VMM holds an exclusive `flock` on the file or device node, and
//! claims a device with `O_EXCL`, as a mounted filesystem does; so do we before we take one away.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

use crate::{PoolError, Result};

/// How long to wait for the lock: udev holds it for a moment when it looks at a device.
const LOCK_WAIT_MAX: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// How much of a claim is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// Nobody else may have it open.
    Exclusive,
    /// Other readers may.
    Shared,
}

/// Opens and locks what is at `path`; `None` when nothing is there.
///
/// # Errors
/// [`PoolError::Busy`] when it is in use, `what` says by which name.
pub(crate) fn open_locked(
    path: &Path,
    write: bool,
    claim: Claim,
    what: &str,
) -> Result<Option<File>> {
    let metadata = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(PoolError::io("look at", path))?,
    };
    let is_claimed = metadata.file_type().is_block_device() && claim == Claim::Exclusive;
    let flags = if is_claimed { libc::O_EXCL } else { 0 };
    let operation = match claim {
        Claim::Exclusive => FlockOperation::NonBlockingLockExclusive,
        Claim::Shared => FlockOperation::NonBlockingLockShared,
    };
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    loop {
        let opened = OpenOptions::new().read(true).write(write).custom_flags(flags).open(path);
        let locked = opened.and_then(|file| {
            rustix::fs::flock(&file, operation)?;
            Ok(file)
        });
        match locked {
            Ok(file) => return Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if !is_busy(&error) => {
                return Err(PoolError::io("open and lock", path)(error));
            }
            Err(_) if Instant::now() >= deadline => {
                return Err(PoolError::Busy { what: what.to_owned() });
            }
            Err(_) => std::thread::sleep(LOCK_RETRY),
        }
    }
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EWOULDBLOCK | libc::EBUSY))
}
