//! How much may still be written into a pool, for those who fill it: it must be noticed before it
//! is full, as its guests would get errors then.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use crate::pool::{Pool, Thresholds};
use crate::{PoolError, Result};

/// After how much that was written the pool is asked again, at the latest: others fill it too.
const ROOM_CHECK_BYTES: u64 = 256 << 20;
/// What is written is counted in blocks of this size, as a thin pool gives room.
const ROOM_BLOCK_BYTES: u64 = 64 << 10;

/// The room in a pool, as it was when it was last asked.
#[derive(Debug)]
pub(crate) struct Room {
    pool: Arc<dyn Pool>,
    /// What may be written before the pool is asked again.
    left: u64,
}

impl Room {
    /// # Errors
    /// [`PoolError::NoRoom`] for a full pool.
    pub(crate) fn of(pool: &Arc<dyn Pool>) -> Result<Self> {
        Ok(Self { pool: Arc::clone(pool), left: ask(pool.as_ref())? })
    }

    /// Counts what is about to be written into `file`, and refuses what would fill the pool.
    pub(crate) fn take(&mut self, bytes: u64, file: &File, path: &Path) -> Result<()> {
        let taken = bytes.next_multiple_of(ROOM_BLOCK_BYTES);
        if taken > self.left {
            // What waits in the page cache takes no room yet.
            file.sync_data().map_err(PoolError::io("sync", path))?;
            self.left = ask(self.pool.as_ref())?;
        }
        self.left = self.left.saturating_sub(taken);
        Ok(())
    }
}

fn ask(pool: &dyn Pool) -> Result<u64> {
    let usage = pool.usage()?;
    let room = usage.room_bytes(Thresholds::default());
    if room == 0 {
        return Err(PoolError::NoRoom { pool: pool.spec().to_string(), detail: usage.to_string() });
    }
    Ok(room.min(ROOM_CHECK_BYTES))
}
