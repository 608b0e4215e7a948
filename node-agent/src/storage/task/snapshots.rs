//! Snapshots are taken beside the other work: one job for all parts, which may lie in several
//! pools.

use std::sync::Arc;

use drover_storage::pool::{SnapshotId, SnapshotInfo, VolumeId};

use super::super::plan::{Busy, Failure, Id, Take, Work};
use super::super::take::{Taken, take};
use super::{Ended, Made, Task};
use crate::error::Error;

/// While so many parts are being taken on the node, no further snapshot is begun.
const TAKES_MAX: usize = 4;

impl Task {
    pub(super) fn take_snapshot(&mut self, what: Take) {
        let takes = self
            .busy
            .iter()
            .filter(|(thing, busy)| busy.work == Work::Take && matches!(thing.id, Id::Snapshot(_)));
        if takes.count() >= TAKES_MAX {
            return;
        }
        let parts = what.parts.iter().map(|part| {
            let pool = self.pools.get(&part.pool)?;
            Some((Arc::clone(pool), part.clone()))
        });
        let Some(parts) = parts.collect::<Option<Vec<_>>>() else { return };
        for part in &what.parts {
            for thing in [part.thing(), part.volume_thing()] {
                let busy = Busy { work: Work::Take, progress: Arc::default() };
                self.busy.insert(thing, busy);
            }
        }
        tracing::info!(domain = what.domain, parts = parts.len(), "takes a snapshot");
        let quiescer = self.quiescer.clone();
        self.jobs.spawn(async move {
            let result = take(&quiescer, &what.domain, parts).await;
            Ended::Taken { take: what, result }
        });
    }

    pub(super) fn taken(&mut self, what: Take, result: Result<Taken, Error>) {
        for part in &what.parts {
            self.busy.remove(&part.thing());
            self.busy.remove(&part.volume_thing());
        }
        let error = match result {
            Ok(Taken { parts, quiesced }) => {
                tracing::info!(domain = what.domain, quiesced, "has taken the snapshot");
                for (part, info) in what.parts.iter().zip(parts) {
                    if quiesced {
                        self.quiesced.insert(info.id);
                    }
                    self.failed.remove(&part.thing());
                    // It shares all of it with its volume, which an inactive one does not say.
                    let volume = self.seen.get(&part.pool).and_then(|seen| {
                        seen.inventory.as_ref()?.volumes.get(&part.volume)?.allocated_bytes
                    });
                    let allocated_bytes = info.allocated_bytes.or(volume);
                    let info = SnapshotInfo { allocated_bytes, ..info };
                    self.made(&part.thing(), Made::Snapshot(info));
                }
                return;
            }
            Err(error) => error,
        };
        tracing::warn!(domain = what.domain, %error, "cannot take the snapshot");
        for part in &what.parts {
            let reason = error.to_string();
            if matches!(error, Error::Busy(_)) {
                let before = self.failed.get(&part.thing());
                let failure = Failure::not_yet(before, reason, self.now_ms());
                self.failed.insert(part.thing(), failure);
            } else {
                self.untaken.insert(part.snapshot, reason);
            }
            self.look_soon(&part.pool);
        }
    }

    /// The volume of a snapshot's part.
    pub(super) fn snapshot_of(&self, pool: &str, id: SnapshotId) -> Option<VolumeId> {
        Some(self.seen.get(pool)?.inventory.as_ref()?.snapshots.get(&id)?.volume)
    }
}
