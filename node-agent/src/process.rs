//! Processes: who is who, who is alive, and how to wait for one that is no child of ours.
//!
//! A VMM outlives the agent that started it, so its pid alone says nothing: it may be another
//! process's by now. Each VMM therefore has its domain's lock file, locked, as its standard
//! input. The lock lives as long as the process does, whatever happens to the agent: no second
//! VMM can be started beside it, and a pid is believed only if that file is its standard input.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;

/// Another boot of the host has another one (`/proc/sys/kernel/random/boot_id`).
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Takes the lock, if nobody has it. It is let go when the last copy of the file is closed.
pub fn try_lock(path: &Path) -> io::Result<Option<File>> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

/// A process that is followed by a pidfd: it cannot be mistaken for a later one of its pid.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: AsyncFd<OwnedFd>,
}

impl Process {
    /// Follows `pid` if it has `lock` as its standard input; `None` if it is another process, or
    /// gone. Needs a tokio runtime.
    pub fn follow(pid: u32, lock: &Path) -> io::Result<Option<Self>> {
        let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
        let fd = match pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL) => return Ok(None),
            Err(err) => return Err(err.into()),
        };
        // Looked at after the pidfd was opened: if it is right now, the pidfd is right for ever.
        if !has_as_stdin(pid, lock) {
            return Ok(None);
        }
        // SAFETY: an OwnedFd is open and the same for as long as it lives, which is as long as
        // the AsyncFd that takes it.
        let fd = unsafe { AsyncFd::register(fd) }.map_err(|err| err.into_parts().1)?;
        Ok(Some(Self { pid, fd }))
    }

    /// The process that has `lock` as its standard input, looked for among all there are.
    pub fn find(lock: &Path) -> io::Result<Option<Self>> {
        for entry in fs::read_dir("/proc")? {
            let Ok(entry) = entry else { continue };
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if pid != std::process::id()
                && has_as_stdin(pid, lock)
                && let Some(found) = Self::follow(pid, lock)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns when it has ended.
    pub async fn ended(&self) {
        // The descriptor becomes readable once, for ever; an error means that it cannot be
        // watched, and then it must not look as if the process had ended.
        if self.fd.readable().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// SIGKILL. A process that has ended already is no error.
    pub fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.fd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(err) => Err(err.into()),
        }
    }
}

fn has_as_stdin(pid: u32, lock: &Path) -> bool {
    let (Ok(theirs), Ok(ours)) = (fs::metadata(format!("/proc/{pid}/fd/0")), fs::metadata(lock))
    else {
        return false;
    };
    (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// The lock follows the child, not the one that took it; the child is found by it without
    /// its pid, and its end is noticed; another process is never taken for it.
    #[tokio::test]
    async fn a_process_is_known_by_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let lock = try_lock(&path).unwrap().unwrap();
        assert!(try_lock(&path).unwrap().is_none());
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::from(lock)).spawn().unwrap();
        assert!(try_lock(&path).unwrap().is_none(), "the child holds it");

        let found = Process::find(&path).unwrap().unwrap();
        assert_eq!(found.pid(), child.id());
        assert!(Process::follow(1, &path).unwrap().is_none());
        assert!(Process::follow(u32::MAX, &path).unwrap().is_none());

        found.kill().unwrap();
        tokio::time::timeout(std::time::Duration::from_secs(10), found.ended()).await.unwrap();
        child.wait().unwrap();
        assert!(try_lock(&path).unwrap().is_some(), "nobody holds it");
        assert!(Process::find(&path).unwrap().is_none());
        found.kill().unwrap();
    }
}
