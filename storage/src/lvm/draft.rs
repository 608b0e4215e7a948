//! Logical volumes that are not whole yet: a copy or an image that is being written, a snapshot
//! that waits for others of the same moment.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Inner, names};
use crate::pool::{
    ImageDraft, ImageId, ImageInfo, SnapshotDraft, SnapshotId, SnapshotInfo, VolumeDraft, VolumeId,
    VolumeInfo,
};
use crate::{PoolError, Result};

/// A logical volume that this process is making; removed when dropped.
#[derive(Debug)]
pub(super) struct Unfinished {
    pool: Arc<Inner>,
    pub(super) name: String,
    is_finished: bool,
}

impl Unfinished {
    pub(super) fn new(pool: &Arc<Inner>, name: String) -> Self {
        pool.busy().insert(name.clone());
        Self { pool: Arc::clone(pool), name, is_finished: false }
    }

    pub(super) fn rename(mut self, to: &str) -> Result<()> {
        self.pool.rename(&self.name, to)?;
        self.is_finished = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_finished {
            // Nothing to be done about an error: clean_up tries again.
            let _ = self.pool.remove_by_name(&self.name);
        }
        self.pool.busy().remove(&self.name);
    }
}

/// An image or a volume that is being written.
#[derive(Debug)]
pub(super) struct LvmDraft {
    // Closed before what it is open on is removed: fields are dropped in order.
    pub(super) file: File,
    pub(super) path: PathBuf,
    pub(super) unfinished: Unfinished,
}

impl ImageDraft for LvmDraft {
    fn file(&self) -> &File {
        &self.file
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn publish(self: Box<Self>, id: ImageId) -> Result<ImageInfo> {
        let Self { file, path, unfinished } = *self;
        file.sync_all().map_err(PoolError::io("sync", &path))?;
        drop(file);
        let pool = Arc::clone(&unfinished.pool);
        pool.set_active(&unfinished.name, false)?;
        pool.set_permission(&unfinished.name, "r")?;
        let renamed = unfinished.rename(&names::image(id));
        match (renamed, pool.image(id)?) {
            (_, Some(image)) => Ok(image),
            (Err(error), None) => Err(error),
            (Ok(()), None) => Err(pool.not_found(format!("image {id}"))),
        }
    }
}

impl VolumeDraft for LvmDraft {
    fn file(&self) -> &File {
        &self.file
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn publish(self: Box<Self>, id: VolumeId) -> Result<VolumeInfo> {
        let Self { file, path, unfinished } = *self;
        file.sync_all().map_err(PoolError::io("sync", &path))?;
        drop(file);
        let pool = Arc::clone(&unfinished.pool);
        let bytes = pool.wanted(&unfinished.name)?.bytes;
        pool.publish_volume(id, unfinished, bytes)
    }
}

/// A snapshot under a name for what is unfinished.
#[derive(Debug)]
pub(super) struct LvmSnapshotDraft {
    pub(super) unfinished: Unfinished,
    pub(super) volume: VolumeId,
    pub(super) id: SnapshotId,
}

impl SnapshotDraft for LvmSnapshotDraft {
    fn publish(self: Box<Self>) -> Result<SnapshotInfo> {
        let Self { unfinished, volume, id } = *self;
        let pool = Arc::clone(&unfinished.pool);
        let renamed = unfinished.rename(&names::snapshot(id));
        match (renamed, pool.find_snapshot(&pool.report()?, volume, id)?) {
            (_, Some(have)) => Ok(have),
            (Err(error), None) => Err(error),
            (Ok(()), None) => Err(pool.not_found(format!("snapshot {id}"))),
        }
    }
}
