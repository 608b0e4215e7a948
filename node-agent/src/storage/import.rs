//! One import, from a stream of bytes to an image in a pool. A raw file whose size is known is
//! written straight into the pool. Others wait in a nameless file of the state directory until
//! all of them is here: qcow2 is read back and forth. Whatever breaks off leaves nothing.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use drover_storage::PoolError;
use drover_storage::image::{Format, ImageLimits, Import, Source, Watch, import};
use drover_storage::pool::{ImageInfo, Pool, PoolUsage, Thresholds};

use super::feed::Feed;
use crate::error::Error;

/// The state directory's filesystem keeps so much: the domains' records must be written there.
const SPOOL_FREE_BYTES_MIN: u64 = 512 << 20;
/// After how much the filesystem is asked again whether it has room.
const SPOOL_CHECK_BYTES: u64 = 32 << 20;
const PIECE_BYTES: usize = 1 << 20;

/// What is imported.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) pool: Arc<dyn Pool>,
    pub(super) what: Import,
    /// The file's size, where it is known.
    pub(super) bytes: Option<u64>,
    /// Where a file may wait.
    pub(super) spool: PathBuf,
    /// Ends it when set.
    pub(super) cancel: Arc<AtomicBool>,
}

impl Job {
    /// For `what`, with the default limits.
    pub(super) fn import(format: Format, sha256: Option<drover_storage::pool::Sha256>) -> Import {
        Import { format, sha256, limits: ImageLimits::default() }
    }

    /// Reads the whole stream and makes the image. Blocks.
    pub(super) fn run(self, mut feed: Feed) -> Result<ImageInfo, Error> {
        let mut watch = Watch { progress: &mut |_| {}, cancel: &self.cancel };
        if let (Format::Raw, Some(bytes)) = (self.what.format, self.bytes) {
            let source = Source::Stream { reader: &mut feed, bytes };
            return Ok(import(&self.pool, source, &self.what, &mut watch)?);
        }
        let file = self.spool(&mut feed)?;
        // It has no other name, so nothing of it is left when this process ends.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let source = Source::File(Path::new(&path));
        Ok(import(&self.pool, source, &self.what, &mut watch)?)
    }

    fn spool(&self, feed: &mut Feed) -> Result<File, Error> {
        let failed = |action| move |err| Error::io(action, &self.spool, err);
        let bytes_max = self.bytes.unwrap_or(self.what.limits.bytes_max);
        let mut file =
            tempfile::tempfile_in(&self.spool).map_err(failed("make a temporary file in"))?;
        self.check_spool(&file, self.bytes.unwrap_or_default())?;
        let mut piece = vec![0; PIECE_BYTES];
        let (mut total, mut check_at) = (0_u64, SPOOL_CHECK_BYTES);
        loop {
            if self.cancel.load(Ordering::Relaxed) {
                return Err(PoolError::Cancelled.into());
            }
            let count = feed.read(&mut piece).map_err(failed("read the stream into"))?;
            if count == 0 {
                break;
            }
            total += count as u64;
            if total > bytes_max {
                return Err(Error::Domain(format!(
                    "file_bytes: {bytes_max}: more than that came; accepted is the file's size"
                )));
            }
            if total > check_at {
                self.check_spool(&file, 0)?;
                check_at = total + SPOOL_CHECK_BYTES;
            }
            file.write_all(&piece[..count]).map_err(failed("write a temporary file in"))?;
        }
        if let Some(bytes) = self.bytes.filter(|bytes| *bytes != total) {
            return Err(Error::Domain(format!(
                "file_bytes: {bytes}: only {total} came; accepted is the file's size"
            )));
        }
        Ok(file)
    }

    fn check_spool(&self, file: &File, bytes: u64) -> Result<(), Error> {
        let stat = rustix::fs::fstatvfs(file)
            .map_err(|err| Error::io("look for room in", &self.spool, err.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free >= bytes.saturating_add(SPOOL_FREE_BYTES_MIN) {
            return Ok(());
        }
        Err(Error::NoRoom(format!(
            "the node has {free} bytes free in its state directory, where a file waits until all \
             of it has come, and keeps {SPOOL_FREE_BYTES_MIN}; make room, or import a raw file \
             of a stated size, which goes straight into its pool"
        )))
    }
}

/// Refuses what would carry a pool past its threshold. `bytes` is the least that will come.
pub(super) fn check_room(pool: &str, usage: &PoolUsage, bytes: u64) -> Result<(), Error> {
    let limit = usage.bytes as f64 * Thresholds::default().filling;
    let after = usage.used_bytes.saturating_add(bytes) as f64;
    if usage.fault.is_none() && after <= limit {
        return Ok(());
    }
    Err(Error::NoRoom(format!(
        "pool {pool}: has no room for {bytes} bytes more: {usage}, and it is to stay below \
         {:.0} %; choose another pool, or make room",
        Thresholds::default().filling * 100.0
    )))
}
