//! Taking logical volumes away: first out of sight, then in steps, then for good.
//!
//! `lvremove` of a thin volume with terabytes in it keeps the thin pool and the volume group's
//! lock busy for as long as it takes, and gives nothing back to the disks below. So a volume is
//! renamed first, which is quick and cannot half succeed; then its blocks are discarded step by
//! step, each of which is short and passed down; and what is removed at last is empty. When the
//! deadline passes in between, clean_up goes on.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::command::lvm;
use super::names::{self, Kind};
use super::{Inner, report::Lv};
use crate::lock::{Claim, open_locked};
use crate::{PoolError, Result};

/// How long one volume may take.
const DISCARD_TIME_MAX: Duration = Duration::from_secs(600);
/// One discard: at the usual 64 KiB a block, some ten thousand blocks.
const DISCARD_STEP_BYTES: u64 = 1 << 30;
/// From `linux/fs.h`; takes `[start, length]` in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;

impl Inner {
    /// Deletes a logical volume by its name, when nobody has it open.
    pub(super) fn delete_named(&self, lvs: &[Lv], name: &str, what: &str) -> Result<()> {
        let Some(lv) = self.find(lvs, name)? else {
            return Ok(());
        };
        if !lv.is_active {
            // Or somebody could open it for reading before it has its other name.
            self.set_active(&lv.name, true)?;
        }
        let lock = open_locked(&self.device(&lv.name), false, Claim::Exclusive, what)?;
        self.delete(&lv, lock, what)
    }

    /// Deletes a logical volume that is claimed.
    fn delete(&self, lv: &Lv, lock: Option<File>, what: &str) -> Result<()> {
        let gone = names::random_gone();
        self.busy().insert(gone.clone());
        let deleted = self.rename(&lv.name, &gone).and_then(|()| {
            drop(lock);
            self.remove(&gone, lv, what)
        });
        self.busy().remove(&gone);
        deleted
    }

    /// Removes what is out of sight already.
    pub(super) fn remove_by_name(&self, name: &str) -> Result<()> {
        match self.find(&self.report()?, name)? {
            Some(lv) => self.remove(name, &lv, name),
            None => Ok(()),
        }
    }

    /// `name` is what `lv` is called by now.
    fn remove(&self, name: &str, lv: &Lv, what: &str) -> Result<()> {
        if lv.tag(names::TAG_BYTES).is_some() {
            // An image is read-only, and discarding is writing. A draft of one may not be yet.
            let _ = self.set_permission(name, "rw");
        }
        self.set_active(name, true)?;
        discard(&self.device(name), lv.bytes, what)?;
        lvm(&["lvremove", "--quiet", "--yes", "--force", &self.full(name)]).map(drop)
    }

    /// See [`Pool::clean_up`](crate::Pool::clean_up).
    pub(super) fn clean_up(&self) -> Result<Vec<String>> {
        let lvs = self.report()?;
        let (mut removed, mut failed) = (Vec::new(), None);
        for lv in lvs.iter().filter(|lv| !self.busy().contains(&lv.name)) {
            let is_removed = match self.kind(lv) {
                Kind::Leftover => self.remove(&lv.name, lv, &lv.name).map(|()| true),
                _ => Ok(false),
            };
            // One that fails does not keep the others.
            match is_removed {
                Ok(true) => removed.push(lv.name.clone()),
                Ok(false) | Err(PoolError::Busy { .. }) => {}
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(removed), Err)
    }
}

/// Gives back all blocks. A device that cannot discard is left as it is: removal frees them too.
fn discard(path: &Path, bytes: u64, what: &str) -> Result<()> {
    let opened = OpenOptions::new().write(true).custom_flags(libc::O_EXCL).open(path);
    let file = match opened {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(PoolError::Busy { what: what.to_owned() });
        }
        other => other.map_err(PoolError::io("open", path))?,
    };
    let deadline = Instant::now() + DISCARD_TIME_MAX;
    let mut at = 0;
    while at < bytes {
        if Instant::now() >= deadline {
            let seconds = DISCARD_TIME_MAX.as_secs();
            return Err(PoolError::Timeout { what: format!("giving back {what}"), seconds });
        }
        let here = DISCARD_STEP_BYTES.min(bytes - at);
        if discard_range(&file, at, here).is_err() {
            break;
        }
        at += here;
    }
    Ok(())
}

fn discard_range(file: &File, start: u64, length: u64) -> io::Result<()> {
    let range = [start, length];
    // SAFETY: the request reads two 64-bit words, which live until the call returns.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
