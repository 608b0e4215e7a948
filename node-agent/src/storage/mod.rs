//! The node's pools, and what is in them: makes volumes and snapshots equal what the controller
//! wants, fetches the images that volumes are made of, and tells what is there.
//!
//! ```text
//!  node ──WantedStorage──► task ◄─── progress, results ─── jobs (blocking calls, bounded)
//!  reports, domains ◄─View── │                                │
//!                          plan(): what next?               Pool (drover_storage)
//!  ImportImage, ReadImage, ReadVolume ── import, serve ───────┘
//! ```
//!
//! The task never blocks: each call of a pool runs on a thread of its own, of which there are so
//! many a pool, and one that hangs makes nothing wait but its own pool. Start reading at [`plan`],
//! the pure function that holds every rule.

mod copy;
mod feed;
mod fetch;
mod flag;
mod http;
mod images;
mod import;
mod known;
mod plan;
mod serve;
mod take;
mod task;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use drover_proto::agent::v1::{ObservedImage, ObservedPool, ObservedSnapshot, ObservedVolume};
use drover_proto::v1::VolumeState;
use drover_storage::PoolSpec;
use drover_storage::pool::{ImageInfo, Pool};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::decide::Disks;
use crate::error::Error;
use crate::wanted::Disk;
pub use flag::PoolFlag;
pub use images::{Images, ImportAnswers, ReadAnswers};
use known::Known;
pub use plan::WantedStorage;
pub use serve::{VolumeAnswers, Volumes};
pub use task::start;

/// A pool of this node.
#[derive(Debug)]
struct NodePool {
    id: String,
    overcommit: f64,
    spec: PoolSpec,
    /// Empty until it could be opened.
    opened: OnceLock<Arc<dyn Pool>>,
    /// The node's name.
    node: String,
    /// Of a pool that several nodes share: which one this node knows by its id.
    known: Known,
}

impl NodePool {
    fn is_shared(&self) -> bool {
        matches!(self.spec, PoolSpec::Shared { .. })
    }

    /// Which pool it is, where several nodes share it; empty for the node's own, and until it was
    /// seen.
    fn shared_uid(&self) -> &str {
        if self.is_shared() { self.known.uid() } else { "" }
    }

    fn pool(&self) -> Result<&Arc<dyn Pool>, Error> {
        self.opened.get().ok_or_else(|| {
            let reason = format!("pool {}: {} is not open yet", self.id, self.spec);
            Error::Domain(reason)
        })
    }
}

/// The pools, in the order of their flags.
type NodePools = Arc<Vec<Arc<NodePool>>>;

/// What is in the node's pools, for reports and for domains.
#[derive(Debug, Clone, Default)]
pub struct View {
    /// Each pool of the flags.
    pub pools: Vec<ObservedPool>,
    /// Each volume that is here or shall be.
    pub volumes: Vec<ObservedVolume>,
    /// Each image that is here.
    pub images: Vec<ObservedImage>,
    /// Each part of a snapshot that is here or shall be.
    pub snapshots: Vec<ObservedSnapshot>,
}

/// The node's pools, as the rest of the agent sees them.
#[derive(Debug, Clone)]
pub struct StorageHandle {
    commands: mpsc::Sender<Command>,
    view: watch::Receiver<Arc<View>>,
    pools: NodePools,
}

#[derive(Debug)]
enum Command {
    Desire { wanted: WantedStorage, reply: oneshot::Sender<()> },
    Imported { pool: String, image: ImageInfo },
}

impl StorageHandle {
    /// Takes in what shall be in the pools; when this returns, [`view`](Self::view) speaks of it.
    pub(crate) async fn desire(&self, wanted: WantedStorage) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.send(Command::Desire { wanted, reply }).await;
        sent.map_err(|_| Error::Ended("storage task"))?;
        answer.await.map_err(|_| Error::Ended("storage task"))
    }

    /// What is there now.
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// Returns when the view has changed since it was looked at by [`disks`](Self::disks) of this
    /// very handle.
    pub(crate) async fn changed(&mut self) {
        if self.view.changed().await.is_err() {
            // The agent is ending.
            std::future::pending::<()>().await;
        }
    }

    /// How a domain's disks stand.
    pub(crate) fn disks(&mut self, disks: &[Disk]) -> Disks {
        disks_in(&self.view.borrow_and_update(), disks)
    }

    /// Makes a volume ready to be opened, and answers its path. Blocks.
    pub(crate) fn activate(&self, pool: &str, volume: &str) -> Result<PathBuf, Error> {
        let found = self.pool(pool).ok_or_else(|| {
            Error::Domain(format!("pool {pool:?}: is not on this node; it has {}", self.names()))
        })?;
        Ok(found.pool()?.activate(volume.parse()?)?)
    }

    /// Whether the volumes of this pool are found by other nodes, too, in the same place.
    pub(crate) fn is_shared(&self, pool: &str) -> bool {
        self.pool(pool).is_some_and(|pool| pool.is_shared())
    }

    fn pool(&self, id: &str) -> Option<&Arc<NodePool>> {
        self.pools.iter().find(|pool| pool.id == id)
    }

    fn names(&self) -> String {
        let names: Vec<_> = self.pools.iter().map(|pool| pool.id.as_str()).collect();
        if names.is_empty() { "none".into() } else { names.join(", ") }
    }
}

/// How the disks of a domain stand, in the order of what matters: one that failed, then the
/// first that is not here yet.
fn disks_in(view: &View, disks: &[Disk]) -> Disks {
    let mut waits = None;
    for (index, disk) in disks.iter().enumerate() {
        let found = view.volumes.iter().find(|v| v.uid == disk.volume && v.pool == disk.pool);
        let (state, reason) = match found {
            Some(volume) => (volume.state(), volume.state_reason.as_str()),
            None => (VolumeState::Unspecified, ""),
        };
        match state {
            VolumeState::Ready => {}
            VolumeState::Failed => {
                return Disks::Failed(format!("disk {}: {reason}", index + 1));
            }
            VolumeState::Creating | VolumeState::Unspecified if waits.is_some() => {}
            VolumeState::Creating | VolumeState::Unspecified => {
                let which = match disks.len() {
                    1 => "its disk".to_owned(),
                    _ => format!("disk {}", index + 1),
                };
                let colon = if reason.is_empty() { "" } else { ": " };
                waits = Some(format!("waits for {which}{colon}{reason}"));
            }
        }
    }
    waits.map_or(Disks::Ready, Disks::Waiting)
}

/// How far a job is, shared between it and whoever speaks of it.
#[derive(Debug, Default)]
struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    /// Told when the job shall end before its time.
    given_up: Notify,
}

impl Progress {
    fn set(&self, done: u64, total: u64) {
        self.done.store(done, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// "copying the image, 40 %"; without a number for a job that does not count.
    fn say(&self, what: &str) -> String {
        match (self.done(), self.total()) {
            (_, 0) => what.to_owned(),
            (done, total) => {
                let percent = u128::from(done) * 100 / u128::from(total);
                format!("{what}, {} %", percent.min(100))
            }
        }
    }
}

/// Finds pools by id.
fn by_id(pools: &NodePools) -> BTreeMap<String, Arc<NodePool>> {
    pools.iter().map(|pool| (pool.id.clone(), Arc::clone(pool))).collect()
}

#[cfg(test)]
mod tests;
