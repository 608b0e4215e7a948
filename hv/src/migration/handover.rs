//! The hand-over on disk: the line behind which a source never resumes by itself.
//!
//! `handover.json` is there, or it is not. Its content is written and synced before the pause
//! under another name; what is left for the pause is a rename and one sync of the directory.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

const NAME: &str = "handover.json";
const NAME_PREPARED: &str = "handover.json.prepared";

/// What `handover.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handover {
    /// The migration.
    pub migration_id: String,
    /// The epoch under which the destination runs the domain.
    pub to_epoch: u64,
}

/// A hand-over whose content is on disk, but which does not hold yet.
pub(super) struct Prepared {
    directory: File,
    path: PathBuf,
}

impl Handover {
    /// Puts the content on disk under its other name.
    pub(super) fn prepare(&self, state_dir: &Path) -> io::Result<Prepared> {
        let mut file = File::create(state_dir.join(NAME_PREPARED))?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_all()?;
        let directory = File::open(state_dir)?;
        directory.sync_all()?;
        Ok(Prepared { directory, path: state_dir.to_owned() })
    }

    /// The hand-over that is on disk, if any.
    pub fn read(state_dir: &Path) -> io::Result<Option<Self>> {
        match fs::read(state_dir.join(NAME)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Prepared {
    /// Makes it hold, durably.
    pub(super) fn commit(&self) -> io::Result<()> {
        fs::rename(self.path.join(NAME_PREPARED), self.path.join(NAME))?;
        self.directory.sync_all()
    }
}

/// Removes the hand-over, durably: the controller has decided that the guest runs here, or it
/// could not be written whole.
pub fn remove_handover(state_dir: &Path) -> io::Result<()> {
    for name in [NAME, NAME_PREPARED] {
        match fs::remove_file(state_dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    File::open(state_dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_from_the_commit_on() {
        let dir = tempfile::tempdir().unwrap();
        let handover = Handover { migration_id: "m".into(), to_epoch: 3 };
        let prepared = handover.prepare(dir.path()).unwrap();
        assert_eq!(Handover::read(dir.path()).unwrap(), None);
        prepared.commit().unwrap();
        assert_eq!(Handover::read(dir.path()).unwrap(), Some(handover));
        let json = fs::read_to_string(dir.path().join(NAME)).unwrap();
        assert_eq!(json, r#"{"migration_id":"m","to_epoch":3}"#);
        remove_handover(dir.path()).unwrap();
        remove_handover(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(prepared.commit().is_err());
    }
}
