//! What a pool is: the trait, what it answers, and how one is opened.

mod ids;
mod spec;
mod usage;

use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

pub use ids::{ImageId, Sha256, SnapshotId, VolumeId};
pub use spec::PoolSpec;
pub use usage::{Level, PoolUsage, Thresholds};

use crate::bulk::Bulk;
use crate::dir::DirPool;
use crate::lvm::LvmPool;
use crate::{PoolError, Result};

/// The smallest unit of any disk.
pub const SECTOR_BYTES: u64 = 512;
/// The largest volume: what ext4 with 4 KiB blocks can hold as one file is 16 TiB.
pub const VOLUME_BYTES_MAX: u64 = 16 << 40;

/// Opens a pool and checks that it is fit for use. `node` is this node's name: it tells apart who
/// works on what in a pool that several nodes share.
///
/// # Errors
/// [`PoolError::Unfit`] with what is wrong and what would put it right.
pub fn open(spec: &PoolSpec, node: &str) -> Result<Arc<dyn Pool>> {
    Ok(match spec {
        PoolSpec::Dir { path } => Arc::new(DirPool::open(path)?),
        PoolSpec::Shared { path } => Arc::new(DirPool::open_among_nodes(path, node)?),
        PoolSpec::Lvm { vg, thin_pool } => Arc::new(LvmPool::open(vg, thin_pool)?),
    })
}

/// Where a node's volumes live.
///
/// All calls block; some for minutes, where a filesystem has no reflinks. Each of them may be
/// repeated: to create what is there already answers it, to delete what is missing succeeds.
/// None leaves anything half done that could be taken for whole: what a crash interrupts is
/// found and removed by [`clean_up`](Pool::clean_up). One process of a node drives a pool (its
/// agent), from as many threads as it likes; calls for *one* volume must take turns. A pool that
/// several nodes share is driven by each of them.
///
/// A volume is **in use** while somebody holds an exclusive `flock` on its file or device
/// node, as a VMM does. Such a one is neither deleted nor read ([`PoolError::Busy`]); nor is one
/// deleted that somebody reads.
pub trait Pool: Send + Sync + fmt::Debug {
    /// What it was opened from.
    fn spec(&self) -> &PoolSpec;

    /// Volumes have a multiple of this many bytes; what is asked for is rounded up.
    fn grain_bytes(&self) -> u64;

    /// Whether [`draft_snapshot`](Pool::draft_snapshot) takes one moment of a volume that is
    /// being written. Where not, it copies, and the caller must stop the writer meanwhile.
    fn has_live_snapshots(&self) -> bool;

    /// Makes an empty volume: all of it reads as zeros. One that is there with that size is
    /// answered as it is, whatever it holds.
    ///
    /// # Errors
    /// [`PoolError::Conflict`] when it is there with another size.
    fn create_volume(&self, id: VolumeId, bytes: u64) -> Result<VolumeInfo>;

    /// Makes a volume that begins with the image's content and goes on with zeros. One that is
    /// there with that size is answered as it is, whatever it holds.
    ///
    /// # Errors
    /// [`PoolError::NotFound`] without the image, [`PoolError::Invalid`] when `bytes` is less
    /// than it has, [`PoolError::Conflict`] as above.
    fn clone_image(&self, id: VolumeId, image: ImageId, bytes: u64) -> Result<VolumeInfo>;

    /// Makes a volume that begins with what a snapshot of `volume` holds and goes on with zeros;
    /// `volume` itself need not be there any more. One that is there with that size is answered
    /// as it is, whatever it holds.
    ///
    /// # Errors
    /// [`PoolError::NotFound`] without the snapshot, [`PoolError::Invalid`] when `bytes` is less
    /// than it has, [`PoolError::Conflict`] as above.
    fn clone_snapshot(
        &self,
        id: VolumeId,
        volume: VolumeId,
        snapshot: SnapshotId,
        bytes: u64,
    ) -> Result<VolumeInfo>;

    /// Begins a volume of this many bytes, all zeros so far, that is to be filled before it can
    /// be seen. [`VolumeWriter`](crate::volume::VolumeWriter) is the way to use this.
    fn draft_volume(&self, bytes: u64) -> Result<Box<dyn VolumeDraft>>;

    /// What is known of a volume; `None` when it is not there.
    fn volume(&self, id: VolumeId) -> Result<Option<VolumeInfo>>;

    /// Makes a volume larger, in use or not. What is new reads as zeros. A VMM that has it open
    /// must be told by the caller.
    ///
    /// # Errors
    /// [`PoolError::Invalid`] when it is larger already: volumes never shrink.
    fn grow_volume(&self, id: VolumeId, bytes: u64) -> Result<VolumeInfo>;

    /// Deletes a volume. Its snapshots stay.
    fn delete_volume(&self, id: VolumeId) -> Result<()>;

    /// Makes a volume's file or device node ready to be opened, and answers its path. To be
    /// called before each use: a node's restart undoes it.
    fn activate(&self, id: VolumeId) -> Result<PathBuf>;

    /// Undoes [`activate`](Pool::activate); fine when the volume is missing.
    ///
    /// # Errors
    /// [`PoolError::Busy`] when it is in use.
    fn deactivate(&self, id: VolumeId) -> Result<()>;

    /// Opens a volume for reading, under a shared lock: until it is dropped no VMM can open the
    /// volume, and nobody delete it.
    ///
    /// # Errors
    /// [`PoolError::Busy`] when it is in use.
    fn open_volume(&self, id: VolumeId) -> Result<Opened>;

    /// Hands what was written to a volume to the disk below, in use or not: a snapshot that is
    /// taken soon after has less to wait for.
    fn flush_volume(&self, id: VolumeId) -> Result<()> {
        match self.volume(id)? {
            Some(VolumeInfo { path, active: true, .. }) => {
                let synced = File::open(&path).and_then(|file| file.sync_all());
                synced.map_err(PoolError::io("sync", &path))
            }
            _ => Ok(()),
        }
    }

    /// Keeps what a volume holds now, in use or not (but see
    /// [`has_live_snapshots`](Pool::has_live_snapshots)), for one who publishes it or drops it:
    /// so several are taken at one moment, and seen only when all of them are there. What the
    /// volume's writer has not handed to the system yet is not in it.
    ///
    /// # Errors
    /// [`PoolError::Cancelled`] soon after `cancel` was set.
    fn draft_snapshot(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
        cancel: &AtomicBool,
    ) -> Result<Box<dyn SnapshotDraft>>;

    /// A snapshot in one step.
    fn create_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<SnapshotInfo> {
        match self.snapshots(volume)?.into_iter().find(|have| have.id == snapshot) {
            Some(have) => Ok(have),
            None => self.draft_snapshot(volume, snapshot, &AtomicBool::new(false))?.publish(),
        }
    }

    /// Opens a snapshot for reading, under a shared lock that keeps it from being deleted.
    fn open_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<Opened>;

    /// Deletes one snapshot. Neither its volume nor what was cloned from it needs it.
    fn delete_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<()>;

    /// The volume's snapshots, by id.
    fn snapshots(&self, volume: VolumeId) -> Result<Vec<SnapshotInfo>> {
        let mut snapshots = self.list()?.snapshots;
        snapshots.retain(|snapshot| snapshot.volume == volume);
        Ok(snapshots)
    }

    /// What is known of an image; `None` when it is not there.
    fn image(&self, id: ImageId) -> Result<Option<ImageInfo>>;

    /// Opens an image for reading, under a shared lock that keeps it from being deleted.
    fn open_image(&self, id: ImageId) -> Result<Opened>;

    /// Deletes an image. Volumes that were made from it do not need it.
    fn delete_image(&self, id: ImageId) -> Result<()>;

    /// Begins an image of this many bytes, all zeros so far. [`ImageWriter`] is the way to use
    /// this: it counts and verifies what is written.
    ///
    /// [`ImageWriter`]: crate::image::ImageWriter
    fn draft_image(&self, bytes: u64) -> Result<Box<dyn ImageDraft>>;

    /// Which pool it is, wherever it is mounted, where several nodes share it.
    fn shared_uid(&self) -> Option<&str> {
        None
    }

    /// Says that this node brings the image, so that the others that share the pool do not. It
    /// may be there by now.
    ///
    /// # Errors
    /// [`PoolError::Busy`] while another one brings it.
    fn claim_image(&self, id: ImageId) -> Result<ImageClaim> {
        let _ = id;
        Ok(ImageClaim::default())
    }

    /// How full it is.
    fn usage(&self) -> Result<PoolUsage>;

    /// Everything of ours that is there.
    fn list(&self) -> Result<Contents>;

    /// Removes what a crash left unfinished, and answers its names. Leaves alone what this
    /// process is busy with. The agent calls it when it starts, and when it likes.
    fn clean_up(&self) -> Result<Vec<String>>;
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// Its name.
    pub id: VolumeId,
    /// Its size.
    pub bytes: u64,
    /// How much room it takes, what it shares with others included; `None` where the pool
    /// cannot tell (LVM: an inactive volume).
    pub allocated_bytes: Option<u64>,
    /// Its file or device node, which is there only while it is active.
    pub path: PathBuf,
    /// Whether it can be opened.
    pub active: bool,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotInfo {
    /// Of which volume.
    pub volume: VolumeId,
    /// Its name.
    pub id: SnapshotId,
    /// The volume's size then.
    pub bytes: u64,
    /// As for volumes.
    pub allocated_bytes: Option<u64>,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its name: the digest of its content.
    pub id: ImageId,
    /// Its size: a multiple of [`SECTOR_BYTES`].
    pub bytes: u64,
    /// As for volumes.
    pub allocated_bytes: Option<u64>,
}

/// What is in a pool, each list ordered by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Whole volumes.
    pub volumes: Vec<VolumeInfo>,
    /// Whole snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Whole images.
    pub images: Vec<ImageInfo>,
    /// What is unfinished, or being deleted: [`Pool::clean_up`] removes it when nobody works on
    /// it.
    pub leftovers: Vec<String>,
    /// What lies where only ours should, under a name that is not ours. Never touched.
    pub strangers: Vec<String>,
}

/// An image, a volume or a snapshot that is open for reading, under a shared lock.
#[derive(Debug)]
pub struct Opened {
    pub(crate) file: File,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    bulk: Mutex<Bulk>,
}

impl Opened {
    pub(crate) fn new(file: File, path: PathBuf, bytes: u64) -> Self {
        let bulk = Mutex::new(Bulk::new(&file));
        Self { file, path, bytes, bulk }
    }

    /// Reads at most 1 MiB and gives it to `look`.
    pub(crate) fn read<T>(
        &self,
        offset: u64,
        length: usize,
        look: impl FnOnce(&[u8]) -> T,
    ) -> Result<T> {
        let mut bulk = self.bulk.lock().unwrap_or_else(PoisonError::into_inner);
        let read = bulk.read(&self.file, offset, length);
        Ok(look(read.map_err(PoolError::io("read", &self.path))?))
    }
}

/// An image is brought by this node, until this is dropped.
#[derive(Debug, Default)]
pub struct ImageClaim(Option<(File, PathBuf)>);

impl ImageClaim {
    pub(crate) fn new(lock: File, path: PathBuf) -> Self {
        Self(Some((lock, path)))
    }
}

impl Drop for ImageClaim {
    fn drop(&mut self) {
        if let Some((_lock, path)) = &self.0 {
            // One that stays is empty, and is taken again.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// An image that is not whole yet. When dropped before it is published, it is removed.
pub trait ImageDraft: Send + fmt::Debug {
    /// What to write into.
    fn file(&self) -> &File;

    /// Its place, for messages.
    fn path(&self) -> &Path;

    /// Makes it durable, read-only and visible under its name. When that image is there already
    /// the draft is dropped and the one there answered.
    fn publish(self: Box<Self>, id: ImageId) -> Result<ImageInfo>;
}

/// A volume that is not whole yet. When dropped before it is published, it is removed.
pub trait VolumeDraft: Send + fmt::Debug {
    /// What to write into.
    fn file(&self) -> &File;

    /// Its place, for messages.
    fn path(&self) -> &Path;

    /// Makes it durable, and visible under its name. When a volume of that name and size is there
    /// already the draft is dropped and the one there answered.
    ///
    /// # Errors
    /// [`PoolError::Conflict`] when one is there with another size.
    fn publish(self: Box<Self>, id: VolumeId) -> Result<VolumeInfo>;
}

/// A snapshot that nobody sees yet. When dropped before it is published, it is removed.
pub trait SnapshotDraft: Send + fmt::Debug {
    /// Makes it durable, and visible under its name. When it is there already the draft is
    /// dropped and the one there answered.
    fn publish(self: Box<Self>) -> Result<SnapshotInfo>;
}

/// What size a volume gets when `bytes` are asked for.
pub(crate) fn round_up(bytes: u64, grain_bytes: u64) -> Result<u64> {
    if bytes == 0 || bytes > VOLUME_BYTES_MAX || !bytes.is_multiple_of(SECTOR_BYTES) {
        let accepted =
            format!("a multiple of {SECTOR_BYTES} from {SECTOR_BYTES} to {VOLUME_BYTES_MAX}");
        return Err(PoolError::invalid("bytes", bytes, accepted));
    }
    Ok(bytes.next_multiple_of(grain_bytes))
}

/// A volume that is there already, for one who wants to create it.
pub(crate) fn same_size(have: VolumeInfo, bytes: u64) -> Result<VolumeInfo> {
    if have.bytes == bytes {
        return Ok(have);
    }
    Err(PoolError::Conflict {
        what: format!("volume {}", have.id),
        have: format!("{} bytes", have.bytes),
        want: format!("{bytes} bytes"),
    })
}

/// Refuses a clone of `bytes` that is smaller than its source, an image or a snapshot.
pub(crate) fn holds_source(bytes: u64, source_bytes: u64, what: &str) -> Result<()> {
    if bytes >= source_bytes {
        return Ok(());
    }
    let accepted = format!("at least {source_bytes}, which {what} has");
    Err(PoolError::invalid("bytes", bytes, accepted))
}

/// Refuses to shrink; true when there is something to do.
pub(crate) fn grows(have: &VolumeInfo, bytes: u64) -> Result<bool> {
    if bytes >= have.bytes {
        return Ok(bytes > have.bytes);
    }
    let accepted =
        format!("at least {}, which volume {} has: it cannot shrink", have.bytes, have.id);
    Err(PoolError::invalid("bytes", bytes, accepted))
}
