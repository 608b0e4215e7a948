//! A volume that comes from elsewhere: written in order, and seen only when it is whole.

use std::sync::Arc;

use crate::bulk::Bulk;
use crate::pool::{Pool, VolumeDraft, VolumeId, VolumeInfo};
use crate::room::Room;
use crate::{PoolError, Result, sparse};

/// Fills a new volume. Whatever is skipped is zeros. Dropped before [`finish`](Self::finish), it
/// leaves nothing behind.
#[derive(Debug)]
pub struct VolumeWriter {
    draft: Box<dyn VolumeDraft>,
    room: Room,
    bulk: Bulk,
    bytes: u64,
    next: u64,
}

impl VolumeWriter {
    /// Begins a volume of `bytes`.
    ///
    /// # Errors
    /// [`PoolError::Invalid`] for a size that cannot be, [`PoolError::NoRoom`] for a full pool.
    pub fn new(pool: &Arc<dyn Pool>, bytes: u64) -> Result<Self> {
        let room = Room::of(pool)?;
        let draft = pool.draft_volume(bytes)?;
        let bulk = Bulk::new(draft.file());
        Ok(Self { draft, room, bulk, bytes, next: 0 })
    }

    /// Writes content at `offset`, behind what was written before.
    ///
    /// # Errors
    /// [`PoolError::Invalid`] for an offset that goes back or beyond the end;
    /// [`PoolError::NoRoom`] before the pool is full; [`PoolError::Io`].
    pub fn write(&mut self, offset: u64, content: &[u8]) -> Result<()> {
        let end = offset.checked_add(content.len() as u64);
        let Some(end) = end.filter(|end| offset >= self.next && *end <= self.bytes) else {
            let value = format!("{offset} with {} bytes", content.len());
            let accepted = format!("content between {} and {}", self.next, self.bytes);
            return Err(PoolError::invalid("offset", value, accepted));
        };
        self.next = end;
        let (file, path) = (self.draft.file(), self.draft.path());
        for run in sparse::data_runs(content) {
            self.room.take(run.len() as u64, file, path)?;
            let at = offset + run.start as u64;
            self.bulk.write(file, &content[run], at).map_err(PoolError::io("write", path))?;
        }
        Ok(())
    }

    /// Makes it visible under its name.
    ///
    /// # Errors
    /// [`PoolError::Conflict`] when one of another size is there by now.
    pub fn finish(self, id: VolumeId) -> Result<VolumeInfo> {
        self.draft.publish(id)
    }
}
