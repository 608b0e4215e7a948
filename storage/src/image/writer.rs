//! The one way by which an image comes into a pool.

use std::sync::Arc;

use super::{Digester, ImageLimits};
use crate::bulk::Bulk;
use crate::pool::{ImageDraft, ImageId, ImageInfo, Pool, SECTOR_BYTES, VOLUME_BYTES_MAX};
use crate::room::Room;
use crate::{PoolError, Result, sparse};

/// Writes an image into a pool, in order, and computes its identity on the way. Whatever is
/// skipped is zeros. Dropped before [`finish`](Self::finish), it leaves nothing behind.
///
/// A receiver of an image from another node pushes each [`Chunk`](super::Chunk) that comes, and
/// ends with the id that it was promised.
#[derive(Debug)]
pub struct ImageWriter {
    draft: Box<dyn ImageDraft>,
    digester: Digester,
    limits: ImageLimits,
    bytes: u64,
    next: u64,
    written: u64,
    room: Room,
    bulk: Bulk,
}

impl ImageWriter {
    /// Begins an image of `bytes`, a multiple of 512.
    ///
    /// # Errors
    /// [`PoolError::Invalid`] for a size that cannot be, [`PoolError::NoRoom`] for a full pool.
    pub fn new(pool: &Arc<dyn Pool>, bytes: u64, limits: ImageLimits) -> Result<Self> {
        let bytes_max = limits.bytes_max.min(VOLUME_BYTES_MAX);
        if bytes == 0 || bytes > bytes_max || !bytes.is_multiple_of(SECTOR_BYTES) {
            let accepted =
                format!("a multiple of {SECTOR_BYTES} from {SECTOR_BYTES} to {bytes_max}");
            return Err(PoolError::invalid("image size", bytes, accepted));
        }
        let room = Room::of(pool)?;
        let draft = pool.draft_image(bytes)?;
        let bulk = Bulk::new(draft.file());
        Ok(Self {
            draft,
            digester: Digester::new(bytes),
            limits,
            bytes,
            next: 0,
            written: 0,
            room,
            bulk,
        })
    }

    /// The image's size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes content at `offset`, behind what was written before.
    ///
    /// # Errors
    /// [`PoolError::Invalid`] for an offset that goes back or beyond the end, or more data than
    /// the limit; [`PoolError::NoRoom`] before the pool is full; [`PoolError::Io`].
    pub fn write(&mut self, offset: u64, content: &[u8]) -> Result<()> {
        let end = offset.checked_add(content.len() as u64);
        let Some(end) = end.filter(|end| offset >= self.next && *end <= self.bytes) else {
            let value = format!("{offset} with {} bytes", content.len());
            let accepted = format!("content between {} and {}", self.next, self.bytes);
            return Err(PoolError::invalid("offset", value, accepted));
        };
        self.digester.zeros(offset - self.next);
        self.digester.data(content);
        self.next = end;
        for run in sparse::data_runs(content) {
            self.reserve(run.len() as u64)?;
            let at = offset + run.start as u64;
            self.bulk
                .write(self.draft.file(), &content[run], at)
                .map_err(PoolError::io("write", self.draft.path()))?;
        }
        Ok(())
    }

    /// Counts what is about to be written, and refuses what would fill the pool.
    fn reserve(&mut self, bytes: u64) -> Result<()> {
        self.written += bytes;
        if self.written > self.limits.data_bytes_max {
            let value = format!("more than {} bytes", self.limits.data_bytes_max);
            return Err(PoolError::invalid("image data", value, "less data than that"));
        }
        self.room.take(bytes, self.draft.file(), self.draft.path())
    }

    /// Makes the image visible, when it is the one that was expected.
    ///
    /// # Errors
    /// [`PoolError::Digest`] when it is another.
    pub fn finish(self, expected: Option<ImageId>) -> Result<ImageInfo> {
        let id = self.digester.finish();
        if let Some(expected) = expected.filter(|expected| *expected != id) {
            return Err(PoolError::Digest {
                field: "image",
                expected: expected.to_string(),
                found: id.to_string(),
            });
        }
        self.draft.publish(id)
    }
}
