//! Looking at pools: opening them, reading what they hold, and removing what was left unfinished.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use drover_storage::pool::{Contents, PoolUsage, SnapshotInfo, VolumeInfo};
use tokio::time::Instant;

use super::super::NodePool;
use super::super::plan::{Id, Inventory, Thing};
use super::{Ended, Task, on_thread};
use crate::error::Error;

/// How often a pool is looked at, if all is well and if not.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A pool that takes longer to be looked at is not usable.
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// So many looks in a row must fail before the pool is called failed: a tool may have its moment.
const LOOKS_FAILED_MAX: u32 = 2;
/// When what a crash or a failure has left could not be removed, it is tried again after this.
const CLEAN_AGAIN: Duration = Duration::from_secs(60);

/// The looks at one pool.
pub(super) struct Look {
    /// When the one that goes on began.
    pub(super) since: Option<Instant>,
    pub(super) due: Instant,
    /// One that began before knows too little of what other nodes did.
    pub(super) fresh_from: Instant,
    pub(super) failed: u32,
    pub(super) usage: Option<PoolUsage>,
    /// What jobs have changed since it began: they know better.
    pub(super) touched: BTreeSet<Thing>,
    /// When what is left unfinished is to be removed, if anything may be.
    pub(super) clean_due: Option<Instant>,
    pub(super) is_cleaning: bool,
}

impl Look {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            since: None,
            due: now,
            fresh_from: now,
            failed: 0,
            usage: None,
            touched: BTreeSet::new(),
            clean_due: Some(now),
            is_cleaning: false,
        }
    }
}

impl Task {
    /// Begins the looks that are due, and says when the next one is.
    pub(super) fn look(&mut self, now: Instant) -> Instant {
        let mut wake = now + LOOK_INTERVAL;
        for (id, look) in &mut self.looks {
            if let Some(since) = look.since {
                let deadline = since + LOOK_TIMEOUT;
                if now < deadline {
                    wake = wake.min(deadline);
                } else if let Some(seen) = self.seen.get_mut(id) {
                    seen.fault = Some(format!(
                        "it has not answered for {} s; look at the node's disks",
                        LOOK_TIMEOUT.as_secs()
                    ));
                }
                continue;
            }
            if now < look.due {
                wake = wake.min(look.due);
                continue;
            }
            let Some(pool) = self.pools.get(id).cloned() else { continue };
            look.since = Some(now);
            look.touched.clear();
            let id = id.clone();
            self.jobs.spawn(async move {
                let result = on_thread(move || look_at(&pool)).await;
                Ended::Look { pool: id, result: result.map_err(|err| err.to_string()) }
            });
        }
        wake
    }

    pub(super) fn take_look(&mut self, pool: &str, result: Result<(Contents, PoolUsage), String>) {
        let (Some(look), Some(seen)) = (self.looks.get_mut(pool), self.seen.get_mut(pool)) else {
            return;
        };
        let began = look.since.take();
        let (contents, usage) = match result {
            Ok(found) => found,
            Err(reason) => {
                look.failed += 1;
                look.due = Instant::now() + LOOK_AGAIN.saturating_mul(look.failed.min(10));
                tracing::warn!(pool, reason, "cannot look at the pool");
                if look.failed >= LOOKS_FAILED_MAX || seen.inventory.is_none() {
                    seen.fault = Some(reason);
                }
                return;
            }
        };
        look.failed = 0;
        look.due = Instant::now() + LOOK_INTERVAL;
        look.usage = Some(usage);
        seen.fault = None;
        if let Some(opened) = self.pools.get(pool) {
            opened.shared_uid().clone_into(&mut seen.shared_uid);
        }
        seen.is_stale &= began.is_none_or(|began| began < look.fresh_from);
        if seen.is_stale {
            look.due = Instant::now();
        }
        let before = seen.inventory.take().unwrap_or_default();
        let touched = |id: Id| look.touched.contains(&Thing { pool: pool.to_owned(), id });
        let mut found = Inventory::default();
        for info in contents.volumes {
            if !touched(Id::Volume(info.id)) {
                // One that is not active does not say what it takes: then what it took before.
                let known = before.volumes.get(&info.id).and_then(|known| known.allocated_bytes);
                let allocated_bytes = info.allocated_bytes.or(known);
                found.volumes.insert(info.id, VolumeInfo { allocated_bytes, ..info });
            }
        }
        for info in contents.images {
            if !touched(Id::Image(info.id)) {
                found.images.insert(info.id, info);
            }
        }
        for info in contents.snapshots {
            if !touched(Id::Snapshot(info.id)) {
                let known = before.snapshots.get(&info.id).and_then(|known| known.allocated_bytes);
                let allocated_bytes = info.allocated_bytes.or(known);
                found.snapshots.insert(info.id, SnapshotInfo { allocated_bytes, ..info });
            }
        }
        let snapshots = before.snapshots.into_iter().filter(|(id, _)| touched(Id::Snapshot(*id)));
        found.snapshots.extend(snapshots);
        let volumes = before.volumes.into_iter().filter(|(id, _)| touched(Id::Volume(*id)));
        found.volumes.extend(volumes);
        let images = before.images.into_iter().filter(|(id, _)| touched(Id::Image(*id)));
        found.images.extend(images);
        seen.inventory = Some(found);
        self.forget_failures(pool);
    }

    /// Whatever came of a failure: the pool knows.
    pub(super) fn look_soon(&mut self, pool: &str) {
        if let Some(look) = self.looks.get_mut(pool) {
            let soon = Instant::now() + LOOK_AGAIN;
            look.due = look.due.min(soon);
            look.clean_due = Some(look.clean_due.map_or(soon, |due| due.min(soon)));
        }
    }

    /// Begins the clean-ups that are due, and says when the next one is.
    pub(super) fn clean(&mut self, now: Instant) -> Option<Instant> {
        let mut wake = None;
        for (id, look) in &mut self.looks {
            let Some(due) = look.clean_due.filter(|_| !look.is_cleaning) else { continue };
            let Some(pool) = self.pools.get(id).filter(|pool| pool.opened.get().is_some()) else {
                continue;
            };
            if now < due {
                wake = Some(wake.map_or(due, |wake: Instant| wake.min(due)));
                continue;
            }
            (look.clean_due, look.is_cleaning) = (None, true);
            let (pool, id) = (Arc::clone(pool), id.clone());
            self.jobs.spawn(async move {
                Ended::Cleaned { pool: id, result: on_thread(move || clean_up(&pool)).await }
            });
        }
        wake
    }

    pub(super) fn cleaned(&mut self, pool: &str, result: Result<(), Error>) {
        let Some(look) = self.looks.get_mut(pool) else { return };
        look.is_cleaning = false;
        if let Err(error) = result {
            tracing::warn!(pool, %error, "cannot remove what was left unfinished");
            look.clean_due.get_or_insert_with(|| Instant::now() + CLEAN_AGAIN);
        }
    }
}

/// Looks at a pool, which is opened first when it could not be before.
fn look_at(pool: &NodePool) -> Result<(Contents, PoolUsage), Error> {
    if pool.opened.get().is_none() {
        let opened = drover_storage::pool::open(&pool.spec, &pool.node)?;
        if let Some(uid) = opened.shared_uid() {
            pool.known.meet(&pool.id, uid)?;
        }
        // Only one look at a pool goes on at a time.
        let _ = pool.opened.set(opened);
    }
    let pool = pool.pool()?;
    Ok((pool.list()?, pool.usage()?))
}

fn clean_up(pool: &NodePool) -> Result<(), Error> {
    for leftover in pool.pool()?.clean_up()? {
        tracing::info!(pool = pool.id, leftover, "removed what was left unfinished");
    }
    Ok(())
}
