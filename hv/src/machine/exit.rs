//! How a guest's run ends, and the record of it that outlives the VMM.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Name of the record in the domain's state directory.
pub const EXIT_FILE: &str = "exit.json";

/// What a guest did to end its run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestExit {
    /// It turned itself off.
    Shutdown,
    /// It reset itself.
    Reboot,
    /// It panicked or triple-faulted; the text is for the operator.
    Crash(String),
    /// KVM could not run it further.
    Error(String),
}

/// Why a VMM ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitReason {
    /// The guest turned itself off.
    Shutdown,
    /// The guest rebooted, and was not to be started again.
    Reboot,
    /// The guest panicked or triple-faulted.
    Crash,
    /// It was told to end, or a signal did.
    Killed,
    /// Its memory and state are on disk, and it can go on from there.
    Saved,
    /// The machine could not be made, or could not go on.
    Error,
}

/// The record: `{"reason": "crash", "detail": "…"}`. No record after the process is gone means
/// that it was killed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// Why.
    pub reason: ExitReason,
    /// More, for people.
    pub detail: String,
}

impl ExitRecord {
    /// A record.
    pub fn new(reason: ExitReason, detail: impl Into<String>) -> Self {
        Self { reason, detail: detail.into() }
    }

    /// Writes the record durably: when this returns, it survives a crash of the host.
    pub fn write(&self, state_dir: &Path) -> io::Result<()> {
        let json = serde_json::to_vec(self).map_err(io::Error::other)?;
        write_durably(state_dir, EXIT_FILE, &json)
    }
}

impl From<GuestExit> for ExitRecord {
    fn from(exit: GuestExit) -> Self {
        match exit {
            GuestExit::Shutdown => Self::new(ExitReason::Shutdown, "the guest powered off"),
            GuestExit::Reboot => Self::new(ExitReason::Reboot, "the guest rebooted"),
            GuestExit::Crash(text) => Self::new(ExitReason::Crash, text),
            GuestExit::Error(text) => Self::new(ExitReason::Error, text),
        }
    }
}

/// Replaces a file in a directory so that, after a crash at any moment, it has either its old or
/// its new content; and when this returns, the new one.
pub fn write_durably(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let temporary = directory.join(format!(".{name}.new"));
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    std::fs::rename(&temporary, directory.join(name))?;
    std::fs::File::open(directory)?.sync_all()
}

/// Removes the record of an earlier run, durably; does nothing when there is none.
pub fn forget(state_dir: &Path) -> io::Result<()> {
    match std::fs::remove_file(state_dir.join(EXIT_FILE)) {
        Ok(()) => std::fs::File::open(state_dir)?.sync_all(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The agent reads this text; it must stay as it is.
    #[test]
    fn record_is_written_whole() {
        let directory = tempfile::tempdir().unwrap();
        ExitRecord::new(ExitReason::Crash, "triple fault").write(directory.path()).unwrap();
        ExitRecord::from(GuestExit::Shutdown).write(directory.path()).unwrap();
        let text = std::fs::read_to_string(directory.path().join(EXIT_FILE)).unwrap();
        assert_eq!(text, r#"{"reason":"shutdown","detail":"the guest powered off"}"#);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        let saved = serde_json::to_string(&ExitReason::Saved).unwrap();
        assert_eq!(saved, r#""saved""#);
        forget(directory.path()).unwrap();
        forget(directory.path()).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
