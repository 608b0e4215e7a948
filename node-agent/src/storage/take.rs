//! Taking a snapshot: all parts at one moment, while the guest stands still, and seen only when
//! all of them are there. The guest goes on whatever becomes of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use drover_storage::pool::{SnapshotDraft, SnapshotInfo};
use tokio::time::timeout;

use super::NodePool;
use super::plan::Part;
use crate::domain::quiesce::Quiescer;
use crate::error::{Error, blocking};

/// How long a guest that stands still waits for its disks. To freeze it takes 10 s at most.
const DRAFTS_TIME_MAX: Duration = Duration::from_secs(10);

/// What was taken.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) parts: Vec<SnapshotInfo>,
    /// The guest's filesystems were frozen, or nothing ran.
    pub(super) quiesced: bool,
}

type Drafts = Vec<Box<dyn SnapshotDraft>>;

/// Takes all parts or none.
pub(super) async fn take(
    quiescer: &Quiescer,
    domain: &str,
    parts: Vec<(Arc<NodePool>, Part)>,
) -> Result<Taken, Error> {
    let parts = Arc::new(parts);
    let mut must_stop_writes = false;
    for (pool, _) in parts.iter() {
        must_stop_writes |= !pool.pool()?.has_live_snapshots();
    }
    // What waits in the page cache now is not waited for by the guest.
    let to_flush = Arc::clone(&parts);
    blocking(move || {
        for (pool, part) in to_flush.iter() {
            pool.pool()?.flush_volume(part.volume)?;
        }
        Ok(())
    })
    .await?;

    let held = quiescer.hold(domain, must_stop_writes).await?;
    let cancel = Arc::new(AtomicBool::new(false));
    let (from, flag) = (Arc::clone(&parts), Arc::clone(&cancel));
    let mut drafting = tokio::spawn(blocking(move || draft(&from, &flag)));
    let in_time = timeout(DRAFTS_TIME_MAX, &mut drafting).await;
    cancel.store(true, Ordering::Relaxed);
    let released = held.release().await;
    let ended = || Error::Ended("snapshot");
    let drafts = match in_time {
        Ok(drafts) => drafts.map_err(|_| ended())??,
        Err(_) => {
            // Whatever comes of it is of more than one moment. It is removed on its thread.
            let late = drafting.await.map_err(|_| ended())?;
            let _ = blocking(move || {
                drop(late);
                Ok(())
            })
            .await;
            return Err(Error::Domain(format!(
                "its disks were not kept within {} s, for which a guest may stand still",
                DRAFTS_TIME_MAX.as_secs()
            )));
        }
    };
    blocking(move || {
        // One that could not go on as it should was not what it should be before.
        let quiesced = released?;
        Ok(Taken { parts: publish(drafts, &parts)?, quiesced })
    })
    .await
}

fn draft(parts: &[(Arc<NodePool>, Part)], cancel: &AtomicBool) -> Result<Drafts, Error> {
    let drafts = parts
        .iter()
        .map(|(pool, part)| Ok(pool.pool()?.draft_snapshot(part.volume, part.snapshot, cancel)?));
    drafts.collect()
}

/// All of them or, as far as it can be undone, none; the rest of a crash is seen as such.
fn publish(drafts: Drafts, parts: &[(Arc<NodePool>, Part)]) -> Result<Vec<SnapshotInfo>, Error> {
    let published: Result<Vec<_>, _> = drafts.into_iter().map(SnapshotDraft::publish).collect();
    if published.is_err() {
        for (pool, part) in parts {
            if let Err(error) = pool.pool()?.delete_snapshot(part.volume, part.snapshot) {
                tracing::warn!(snapshot = %part.snapshot, %error, "cannot remove a part");
            }
        }
    }
    Ok(published?)
}
