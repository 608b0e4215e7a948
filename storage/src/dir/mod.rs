//! A pool in a directory: raw sparse files.
//!
//! ```text
//! volumes/<volume>              what VMMs open
//! snapshots/<volume>@<snapshot>
//! images/<image>                read-only
//! new/<random>                  unfinished; removed by clean_up unless locked
//! ```
//!
//! In a pool that several nodes share there is more: see [`shared`].
//!
//! What is made is made in `new/` under a lock, synced, and then linked to its name, which
//! fails when the name is taken. So a name always has something whole behind it. Copies share
//! blocks where the filesystem has reflinks (XFS, Btrfs); elsewhere they take time and room.

mod shared;
#[cfg(test)]
mod tests;

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use rustix::fs::{FileType, FlockOperation};
use rustix::io::Errno;
use uuid::Uuid;

use shared::Shared;

use crate::lock::{Claim, open_locked};
use crate::pool::{
    Contents, ImageClaim, ImageDraft, ImageId, ImageInfo, Opened, Pool, PoolSpec, PoolUsage,
    SnapshotDraft, SnapshotId, SnapshotInfo, VolumeDraft, VolumeId, VolumeInfo, grows,
    holds_source, round_up, same_size,
};
use crate::{PoolError, Result, sparse};

/// As LVM's usual extent, so that a volume keeps its size when it moves between pools.
const GRAIN_BYTES: u64 = 4 << 20;
/// Files in one directory of the pool: far more than a node has, and a bound.
const FILES_MAX: usize = 1 << 20;
/// How often a draft is begun again that was taken for a dead one.
const DRAFT_TRIES_MAX: usize = 3;

/// A pool in a directory. See [`Pool`] for what it does.
#[derive(Debug)]
pub(crate) struct DirPool {
    spec: PoolSpec,
    root: PathBuf,
    has_reflinks: bool,
    /// Of a pool that other nodes have mounted, too.
    shared: Option<Shared>,
}

impl DirPool {
    /// Opens the node's own pool in an existing directory.
    pub(crate) fn open(root: &Path) -> Result<Self> {
        Self::open_as(PoolSpec::Dir { path: root.to_owned() }, root, None)
    }

    /// Opens the pool in a directory that several nodes have mounted; `maker` is this one's name.
    pub(crate) fn open_among_nodes(root: &Path, maker: &str) -> Result<Self> {
        let spec = PoolSpec::Shared { path: root.to_owned() };
        let unfit = |reason| PoolError::Unfit { pool: spec.to_string(), reason };
        let shared = Shared::read(root, maker).map_err(unfit)?;
        Self::open_as(spec, root, Some(shared))
    }

    fn open_as(spec: PoolSpec, root: &Path, shared: Option<Shared>) -> Result<Self> {
        let unfit = |reason: String| PoolError::Unfit { pool: spec.to_string(), reason };
        match fs::metadata(root) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(unfit("is no directory".into())),
            Err(error) => return Err(unfit(format!("{error}; it must be an existing directory"))),
        }
        for name in ["volumes", "snapshots", "images", "new"] {
            let path = root.join(name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
                other => other.map_err(PoolError::io("create directory", &path))?,
            }
        }
        sync_dir(root)?;
        if let Some(shared) = &shared {
            shared::make_drafts(&shared.drafts(root))?;
        }
        let mut pool = Self { spec, root: root.to_owned(), has_reflinks: false, shared };
        pool.has_reflinks = pool.try_reflink()?;
        Ok(pool)
    }

    fn try_reflink(&self) -> Result<bool> {
        let (from, to) = (self.draft()?, self.draft()?);
        from.file.set_len(GRAIN_BYTES).map_err(PoolError::io("write", &from.path))?;
        Ok(rustix::fs::ioctl_ficlone(&to.file, &from.file).is_ok())
    }

    /// Where drafts are made.
    fn drafts(&self) -> PathBuf {
        match &self.shared {
            Some(shared) => shared.drafts(&self.root),
            None => self.root.join("new"),
        }
    }

    /// Checks, before anything counts as missing, that the pool itself is there.
    fn check_present(&self) -> Result<()> {
        let Some(shared) = &self.shared else { return Ok(()) };
        let unfit = |reason| PoolError::Unfit { pool: self.spec.to_string(), reason };
        shared.check(&self.root).map_err(unfit)
    }

    /// What is there, or that it is truly missing.
    fn or_missing<T>(&self, found: Option<T>) -> Result<Option<T>> {
        if found.is_none() {
            self.check_present()?;
        }
        Ok(found)
    }

    fn volume_path(&self, id: VolumeId) -> PathBuf {
        self.root.join("volumes").join(id.to_string())
    }

    fn snapshot_path(&self, volume: VolumeId, id: SnapshotId) -> PathBuf {
        self.root.join("snapshots").join(snapshot_name(volume, id))
    }

    fn image_path(&self, id: ImageId) -> PathBuf {
        self.root.join("images").join(id.to_string())
    }

    fn not_found(&self, what: String) -> PoolError {
        PoolError::NotFound { what, pool: self.spec.to_string() }
    }

    fn wanted_volume(&self, id: VolumeId) -> Result<VolumeInfo> {
        self.volume(id)?.ok_or_else(|| self.not_found(format!("volume {id}")))
    }

    /// An empty file in `new/`, locked.
    fn draft(&self) -> Result<Draft> {
        for _ in 0..DRAFT_TRIES_MAX {
            if let Some(draft) = self.try_draft()? {
                return Ok(draft);
            }
        }
        let path = self.drafts();
        Err(PoolError::io("lock a file in", &path)(io::ErrorKind::WouldBlock.into()))
    }

    /// `None` when [`Pool::clean_up`] came between the file and its lock.
    fn try_draft(&self) -> Result<Option<Draft>> {
        let path = self.drafts().join(Uuid::new_v4().to_string());
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(PoolError::io("create", &path))?;
        let draft = Draft { file, path, root: self.root.clone() };
        match rustix::fs::flock(&draft.file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(None),
            other => other.map_err(|error| PoolError::io("lock", &draft.path)(error.into()))?,
        }
        let metadata = draft.file.metadata().map_err(PoolError::io("look at", &draft.path))?;
        Ok((metadata.nlink() > 0).then_some(draft))
    }

    /// A draft with a file's content.
    fn draft_of(
        &self,
        from: &Path,
        missing: impl FnOnce() -> PoolError,
        cancel: &AtomicBool,
    ) -> Result<Draft> {
        let source = match File::open(from) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
            other => other.map_err(PoolError::io("open", from))?,
        };
        let draft = self.draft()?;
        match sparse::copy(&source, &draft.file, cancel) {
            Ok(true) => Ok(draft),
            Ok(false) => Err(PoolError::Cancelled),
            Err(error) => Err(PoolError::io("copy to", &draft.path)(error)),
        }
    }

    /// Opens a file for reading.
    fn open_shared(&self, path: PathBuf, what: String) -> Result<Opened> {
        let Some(file) = open_locked(&path, false, Claim::Shared, &what)? else {
            return Err(self.not_found(what));
        };
        let bytes = file.metadata().map_err(PoolError::io("look at", &path))?.len();
        Ok(Opened::new(file, path, bytes))
    }

    /// Ends the making of a volume.
    fn publish_volume(&self, id: VolumeId, draft: &Draft, bytes: u64) -> Result<VolumeInfo> {
        draft.file.set_len(bytes).map_err(PoolError::io("write", &draft.path))?;
        // Who comes second is answered like one who comes later.
        draft.publish(&self.volume_path(id))?;
        same_size(self.wanted_volume(id)?, bytes)
    }

    /// Removes a file that nobody has open; one that is missing is fine.
    fn remove(&self, path: &Path, what: &str) -> Result<()> {
        let Some(_lock) = open_locked(path, self.locks_writing(), Claim::Exclusive, what)? else {
            return self.check_present();
        };
        unlink(path)
    }

    /// A network filesystem gives an exclusive lock only to those who may write.
    fn locks_writing(&self) -> bool {
        self.shared.is_some()
    }

    fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> Result<Option<SnapshotInfo>> {
        self.or_missing(measure_snapshot(&self.snapshot_path(volume, id), volume, id)?)
    }
}

impl Pool for DirPool {
    fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    fn grain_bytes(&self) -> u64 {
        GRAIN_BYTES
    }

    fn has_live_snapshots(&self) -> bool {
        self.has_reflinks
    }

    fn create_volume(&self, id: VolumeId, bytes: u64) -> Result<VolumeInfo> {
        let bytes = round_up(bytes, GRAIN_BYTES)?;
        if let Some(have) = self.volume(id)? {
            return same_size(have, bytes);
        }
        self.publish_volume(id, &self.draft()?, bytes)
    }

    fn clone_image(&self, id: VolumeId, image: ImageId, bytes: u64) -> Result<VolumeInfo> {
        let missing = || self.not_found(format!("image {image}"));
        let bytes = round_up(bytes, GRAIN_BYTES)?;
        if let Some(have) = self.volume(id)? {
            return same_size(have, bytes);
        }
        let info = self.image(image)?.ok_or_else(missing)?;
        holds_source(bytes, info.bytes, &format!("image {image}"))?;
        let draft = self.draft_of(&self.image_path(image), missing, &AtomicBool::new(false))?;
        self.publish_volume(id, &draft, bytes)
    }

    fn clone_snapshot(
        &self,
        id: VolumeId,
        volume: VolumeId,
        snapshot: SnapshotId,
        bytes: u64,
    ) -> Result<VolumeInfo> {
        let what = format!("snapshot {snapshot} of volume {volume}");
        let missing = || self.not_found(what.clone());
        let bytes = round_up(bytes, GRAIN_BYTES)?;
        if let Some(have) = self.volume(id)? {
            return same_size(have, bytes);
        }
        let info = self.snapshot(volume, snapshot)?.ok_or_else(missing)?;
        holds_source(bytes, info.bytes, &what)?;
        let path = self.snapshot_path(volume, snapshot);
        let draft = self.draft_of(&path, missing, &AtomicBool::new(false))?;
        self.publish_volume(id, &draft, bytes)
    }

    fn draft_volume(&self, bytes: u64) -> Result<Box<dyn VolumeDraft>> {
        let (bytes, draft) = (round_up(bytes, GRAIN_BYTES)?, self.draft()?);
        draft.file.set_len(bytes).map_err(PoolError::io("write", &draft.path))?;
        Ok(Box::new(draft))
    }

    fn volume(&self, id: VolumeId) -> Result<Option<VolumeInfo>> {
        self.or_missing(measure_volume(self.volume_path(id), id)?)
    }

    fn grow_volume(&self, id: VolumeId, bytes: u64) -> Result<VolumeInfo> {
        let bytes = round_up(bytes, GRAIN_BYTES)?;
        let have = self.wanted_volume(id)?;
        if !grows(&have, bytes)? {
            return Ok(have);
        }
        let opened = OpenOptions::new().write(true).open(&have.path);
        opened
            .and_then(|file| {
                file.set_len(bytes)?;
                file.sync_all()
            })
            .map_err(PoolError::io("grow", &have.path))?;
        self.wanted_volume(id)
    }

    fn delete_volume(&self, id: VolumeId) -> Result<()> {
        self.remove(&self.volume_path(id), &format!("volume {id}"))
    }

    fn activate(&self, id: VolumeId) -> Result<PathBuf> {
        Ok(self.wanted_volume(id)?.path)
    }

    fn deactivate(&self, id: VolumeId) -> Result<()> {
        let what = format!("volume {id}");
        let write = self.locks_writing();
        open_locked(&self.volume_path(id), write, Claim::Exclusive, &what).map(drop)
    }

    fn open_volume(&self, id: VolumeId) -> Result<Opened> {
        self.open_shared(self.volume_path(id), format!("volume {id}"))
    }

    fn draft_snapshot(
        &self,
        volume: VolumeId,
        id: SnapshotId,
        cancel: &AtomicBool,
    ) -> Result<Box<dyn SnapshotDraft>> {
        let missing = || self.not_found(format!("volume {volume}"));
        let draft = self.draft_of(&self.volume_path(volume), missing, cancel)?;
        Ok(Box::new(DraftOfSnapshot { draft, volume, id }))
    }

    fn open_snapshot(&self, volume: VolumeId, id: SnapshotId) -> Result<Opened> {
        let what = format!("snapshot {id} of volume {volume}");
        self.open_shared(self.snapshot_path(volume, id), what)
    }

    fn delete_snapshot(&self, volume: VolumeId, id: SnapshotId) -> Result<()> {
        self.remove(&self.snapshot_path(volume, id), &format!("snapshot {id}"))
    }

    fn image(&self, id: ImageId) -> Result<Option<ImageInfo>> {
        let found = self.or_missing(measure(&self.image_path(id))?)?;
        let info = |(bytes, allocated)| ImageInfo { id, bytes, allocated_bytes: Some(allocated) };
        Ok(found.map(info))
    }

    fn open_image(&self, id: ImageId) -> Result<Opened> {
        self.open_shared(self.image_path(id), format!("image {id}"))
    }

    fn delete_image(&self, id: ImageId) -> Result<()> {
        self.remove(&self.image_path(id), &format!("image {id}"))
    }

    fn draft_image(&self, bytes: u64) -> Result<Box<dyn ImageDraft>> {
        let draft = self.draft()?;
        draft.file.set_len(bytes).map_err(PoolError::io("write", &draft.path))?;
        Ok(Box::new(draft))
    }

    fn shared_uid(&self) -> Option<&str> {
        self.shared.as_ref().map(|shared| shared.uid.as_str())
    }

    fn claim_image(&self, id: ImageId) -> Result<ImageClaim> {
        match &self.shared {
            Some(shared) => shared.claim(&self.root, id),
            None => Ok(ImageClaim::default()),
        }
    }

    fn usage(&self) -> Result<PoolUsage> {
        let stat = rustix::fs::statvfs(&self.root)
            .map_err(|error| PoolError::io("measure", &self.root)(error.into()))?;
        // What is kept for root is not room for volumes.
        let free = stat.f_bavail * stat.f_frsize;
        let used_bytes = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
        Ok(PoolUsage { bytes: used_bytes + free, used_bytes, metadata_fraction: None, fault: None })
    }

    fn list(&self) -> Result<Contents> {
        let mut all = Contents::default();
        let mut strange = |dir: &str, name: &str| all.strangers.push(format!("{dir}/{name}"));
        for name in file_names(&self.root.join("volumes"))? {
            match name.parse() {
                Ok(id) => all.volumes.extend(self.volume(id)?),
                Err(_) => strange("volumes", &name),
            }
        }
        for name in file_names(&self.root.join("snapshots"))? {
            match parse_snapshot(&name) {
                Some((volume, id)) => all.snapshots.extend(self.snapshot(volume, id)?),
                None => strange("snapshots", &name),
            }
        }
        for name in file_names(&self.root.join("images"))? {
            match name.parse() {
                Ok(id) => all.images.extend(self.image(id)?),
                Err(_) => strange("images", &name),
            }
        }
        let (drafts, is_shared) = (self.drafts(), self.shared.is_some());
        let place = drafts.strip_prefix(&self.root).unwrap_or(&drafts).display().to_string();
        for name in file_names(&drafts)? {
            match name.parse::<VolumeId>() {
                Ok(_) => all.leftovers.push(format!("{place}/{name}")),
                // A crash came between: it is one more name of what was a draft.
                Err(_) if is_shared && shared::is_removed(&name) => {
                    all.leftovers.push(format!("{place}/{name}"));
                }
                Err(_) => strange(&place, &name),
            }
        }
        all.strangers
            .retain(|name| !is_shared || !name.rsplit('/').next().is_some_and(shared::is_removed));
        // Had it gone meanwhile, all of it would be missing.
        self.check_present()?;
        Ok(all)
    }

    fn clean_up(&self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for name in self.list()?.leftovers {
            // Somebody works on what is locked.
            match self.remove(&self.root.join(&name), &name) {
                Ok(()) => removed.push(name),
                Err(PoolError::Busy { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }
}

/// A file in `new/`; removed when dropped, whatever became of it.
#[derive(Debug)]
struct Draft {
    file: File,
    path: PathBuf,
    root: PathBuf,
}

impl Draft {
    /// Makes it durable and gives it its name; false when that is taken.
    fn publish(&self, path: &Path) -> Result<bool> {
        self.file.sync_all().map_err(PoolError::io("sync", &self.path))?;
        match fs::hard_link(&self.path, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(false),
            other => other.map_err(PoolError::io("create", path))?,
        }
        sync_parent(path)?;
        Ok(true)
    }

    fn gone(&self, what: String) -> PoolError {
        PoolError::NotFound { what, pool: PoolSpec::Dir { path: self.root.clone() }.to_string() }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Nothing to be done about an error: clean_up tries again.
        let _ = fs::remove_file(&self.path);
    }
}

impl ImageDraft for Draft {
    fn file(&self) -> &File {
        &self.file
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn publish(self: Box<Self>, id: ImageId) -> Result<ImageInfo> {
        let read_only = Permissions::from_mode(0o400);
        self.file.set_permissions(read_only).map_err(PoolError::io("protect", &self.path))?;
        let path = self.root.join("images").join(id.to_string());
        Draft::publish(&self, &path)?;
        let gone = || self.gone(format!("image {id}"));
        let (bytes, allocated) = measure(&path)?.ok_or_else(gone)?;
        Ok(ImageInfo { id, bytes, allocated_bytes: Some(allocated) })
    }
}

impl VolumeDraft for Draft {
    fn file(&self) -> &File {
        &self.file
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn publish(self: Box<Self>, id: VolumeId) -> Result<VolumeInfo> {
        let bytes = self.file.metadata().map_err(PoolError::io("look at", &self.path))?.len();
        let path = self.root.join("volumes").join(id.to_string());
        Draft::publish(&self, &path)?;
        let have = measure_volume(path, id)?.ok_or_else(|| self.gone(format!("volume {id}")))?;
        same_size(have, bytes)
    }
}

/// A snapshot in `new/`.
#[derive(Debug)]
struct DraftOfSnapshot {
    draft: Draft,
    volume: VolumeId,
    id: SnapshotId,
}

impl SnapshotDraft for DraftOfSnapshot {
    fn publish(self: Box<Self>) -> Result<SnapshotInfo> {
        let Self { draft, volume, id } = &*self;
        let path = draft.root.join("snapshots").join(snapshot_name(*volume, *id));
        draft.publish(&path)?;
        measure_snapshot(&path, *volume, *id)?.ok_or_else(|| draft.gone(format!("snapshot {id}")))
    }
}

fn measure_volume(path: PathBuf, id: VolumeId) -> Result<Option<VolumeInfo>> {
    let found = measure(&path)?;
    Ok(found.map(|(bytes, allocated)| VolumeInfo {
        id,
        bytes,
        allocated_bytes: Some(allocated),
        path,
        active: true,
    }))
}

fn measure_snapshot(path: &Path, volume: VolumeId, id: SnapshotId) -> Result<Option<SnapshotInfo>> {
    let found = measure(path)?;
    let info =
        |(bytes, allocated)| SnapshotInfo { volume, id, bytes, allocated_bytes: Some(allocated) };
    Ok(found.map(info))
}

/// A file's length and the room it takes.
fn measure(path: &Path) -> Result<Option<(u64, u64)>> {
    match shared::look(path) {
        Ok(found) if FileType::from_raw_mode(found.stx_mode.into()) == FileType::RegularFile => {
            Ok(Some((found.stx_size, found.stx_blocks * 512)))
        }
        Ok(_) => Err(PoolError::io("use", path)(io::Error::other("it is no regular file"))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(PoolError::io("look at", path)(error)),
    }
}

/// The names in a directory, in order.
fn file_names(path: &Path) -> Result<Vec<String>> {
    let entries = shared::refresh(path).and_then(|()| fs::read_dir(path));
    let entries = entries.map_err(PoolError::io("list", path))?;
    let mut names = Vec::new();
    for entry in entries.take(FILES_MAX) {
        let entry = entry.map_err(PoolError::io("list", path))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn unlink(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => {
            other.map_err(PoolError::io("remove", path))?;
            sync_parent(path)
        }
    }
}

fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(path: &Path) -> Result<()> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(PoolError::io("sync", path))
}

/// Says of which volume it is.
fn snapshot_name(volume: VolumeId, id: SnapshotId) -> String {
    format!("{volume}@{id}")
}

fn parse_snapshot(name: &str) -> Option<(VolumeId, SnapshotId)> {
    let (volume, id) = name.split_once('@')?;
    Some((volume.parse().ok()?, id.parse().ok()?))
}
