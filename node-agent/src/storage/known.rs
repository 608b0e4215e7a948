//! Which pools this node shares with others, by the ids of its flags: kept on disk, so that an
//! agent that starts while a pool's filesystem is not mounted still says which pool it is, and
//! that another filesystem in its place is not taken for it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use drover_storage::record;

use crate::error::Error;

const FOLDER: &str = "shared-pools";
const VERSION: u32 = 1;

/// What is known of one pool.
#[derive(Debug)]
pub(super) struct Known {
    path: PathBuf,
    uid: OnceLock<String>,
}

impl Known {
    /// What was known when the agent ended.
    pub(super) fn read(state_dir: &Path, id: &str) -> Result<Self, Error> {
        let path = state_dir.join(FOLDER).join(id);
        let uid = OnceLock::new();
        if let Some(held) = record::read(&path)? {
            // A newer agent may have written more; what it means is the first line.
            let text = String::from_utf8_lossy(&held.payload).into_owned();
            let _ = uid.set(text.lines().next().unwrap_or_default().to_owned());
        }
        Ok(Self { path, uid })
    }

    /// Empty while it was never seen.
    pub(super) fn uid(&self) -> &str {
        self.uid.get().map_or("", String::as_str)
    }

    /// The pool `id` is there, and is `uid`. Blocks.
    ///
    /// # Errors
    /// This node has known another one by that id.
    pub(super) fn meet(&self, id: &str, uid: &str) -> Result<(), Error> {
        match self.uid.get() {
            Some(known) if known == uid => return Ok(()),
            Some(known) => {
                return Err(Error::Domain(format!(
                    "pool {id}: is the shared pool {uid} now, and was {known}: mount the right \
                     filesystem, or give the new pool an id of its own (or, if nothing of the old \
                     one is needed, remove {})",
                    self.path.display()
                )));
            }
            None => {}
        }
        if let Some(folder) = self.path.parent() {
            record::create_dir(folder)?;
        }
        record::write(&self.path, VERSION, format!("{uid}\n").as_bytes())?;
        let _ = self.uid.set(uid.to_owned());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was seen once is known at the next start, and another pool is not taken for it.
    #[test]
    fn another_pool_is_not_taken_for_the_one_that_was_known() {
        let dir = tempfile::tempdir().unwrap();
        let known = Known::read(dir.path(), "nfs").unwrap();
        assert_eq!(known.uid(), "");
        known.meet("nfs", "one").unwrap();
        known.meet("nfs", "one").unwrap();
        let known = Known::read(dir.path(), "nfs").unwrap();
        assert_eq!(known.uid(), "one");
        let error = known.meet("nfs", "two").unwrap_err().to_string();
        assert!(error.contains("was one: mount the right"), "{error}");
        assert_eq!(Known::read(dir.path(), "nfs").unwrap().uid(), "one");
        assert_eq!(Known::read(dir.path(), "main").unwrap().uid(), "");
    }
}
