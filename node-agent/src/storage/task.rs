//! The task that owns the pools: asks [`plan`](super::plan) what to do, does it on threads that
//! may block, and shows the others how things stand.

mod look;
mod snapshots;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use drover_proto::agent::v1::ObservedPool;
use drover_proto::v1::{PoolKind, PoolState};
use drover_storage::pool::{
    Contents, ImageInfo, Level, PoolSpec, PoolUsage, SnapshotId, SnapshotInfo, Thresholds,
    VolumeId, VolumeInfo,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::known::Known;
use super::plan::{Busy, Facts, Failure, Id, PoolSeen, Take, Thing, WantedStorage, Work, plan};
use super::take::Taken;
use super::{
    Command, NodePool, NodePools, PoolFlag, Progress, StorageHandle, View, by_id, copy, fetch,
};
use crate::domain::quiesce::Quiescer;
use crate::error::{Error, blocking};
use look::Look;

/// Calls that may be running on one pool, without the looks and without the fetches: the tools
/// of LVM take turns anyway.
const JOBS_A_POOL_MAX: usize = 4;
/// Images and copies of volumes that may be on their way into one pool: two, so that a small one
/// is not behind a large.
const FETCHES_A_POOL_MAX: usize = 2;
/// How long the agent's start waits for the first look.
const FIRST_LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the progress of fetches is shown.
const SHOW_INTERVAL: Duration = Duration::from_secs(1);
const COMMANDS_MAX: usize = 16;

/// Opens the pools, removes what a crash left unfinished in them, and begins. When this returns
/// and no pool hangs, [`StorageHandle::view`] is true. A pool that cannot be opened is FAILED, and
/// tried again. `quiescer` makes guests stand still while snapshots are taken; `changed` counts up
/// when something worth a report has changed. `node` is this node's name; which shared pools it
/// knows is kept in `state_dir`. The second part is the task, which ends when it fails.
///
/// # Errors
/// When the flags contradict each other.
pub async fn start(
    flags: &[PoolFlag],
    node: &str,
    state_dir: &Path,
    quiescer: Quiescer,
    changed: watch::Sender<u64>,
) -> Result<(StorageHandle, tokio::task::JoinHandle<()>), Error> {
    let pools: NodePools = Arc::new(pools(flags, node, state_dir)?);
    let (view_sink, view) = watch::channel(Arc::default());
    let (commands_sink, commands) = mpsc::channel(COMMANDS_MAX);
    let handle = StorageHandle { commands: commands_sink, view, pools: Arc::clone(&pools) };
    let unseen = |pool: &Arc<NodePool>| {
        let shared_uid = pool.shared_uid().to_owned();
        (pool.id.clone(), PoolSeen { shared_uid, ..PoolSeen::default() })
    };
    let seen = pools.iter().map(unseen).collect();
    let looks = pools.iter().map(|pool| (pool.id.clone(), Look::new())).collect();
    let (looked_sink, mut looked) = watch::channel(pools.is_empty());
    let task = Task {
        pools: by_id(&pools),
        order: pools.iter().map(|pool| pool.id.clone()).collect(),
        wanted: None,
        seen,
        looks,
        busy: BTreeMap::new(),
        failed: BTreeMap::new(),
        untaken: BTreeMap::new(),
        quiesced: BTreeSet::new(),
        quiescer,
        jobs: JoinSet::new(),
        clock: Instant::now(),
        view: view_sink,
        changed,
        looked: looked_sink,
    };
    let task = tokio::spawn(task.run(commands));
    let first = looked.wait_for(|looked| *looked);
    if tokio::time::timeout(FIRST_LOOK_TIMEOUT, first).await.is_err() {
        tracing::warn!("a pool has not been looked at within 10 s");
    }
    Ok((handle, task))
}

fn pools(flags: &[PoolFlag], node: &str, state_dir: &Path) -> Result<Vec<Arc<NodePool>>, Error> {
    let mut pools: Vec<Arc<NodePool>> = Vec::with_capacity(flags.len());
    for flag in flags {
        let id = flag.id.clone();
        if pools.iter().any(|pool| pool.id == id) {
            let reason = format!("{id}: is given twice; give each pool an id of its own");
            return Err(Error::Flag { flag: "--pool", reason });
        }
        if pools.iter().any(|pool| pool.spec == flag.spec) {
            let reason = format!("{id}={}: is given twice; a pool has one id", flag.spec);
            return Err(Error::Flag { flag: "--pool", reason });
        }
        let (overcommit, spec) = (flag.overcommit, flag.spec.clone());
        let (opened, node) = (OnceLock::new(), node.to_owned());
        let known = Known::read(state_dir, &id)?;
        pools.push(Arc::new(NodePool { id, overcommit, spec, opened, node, known }));
    }
    Ok(pools)
}

/// How a job ended.
enum Ended {
    Job { thing: Thing, result: Result<Made, Error> },
    Look { pool: String, result: Result<(Contents, PoolUsage), String> },
    Taken { take: Take, result: Result<Taken, Error> },
    Cleaned { pool: String, result: Result<(), Error> },
}

/// What a job has made of its thing.
enum Made {
    Volume(VolumeInfo),
    Image(ImageInfo),
    Snapshot(SnapshotInfo),
    Gone,
}

struct Task {
    pools: BTreeMap<String, Arc<NodePool>>,
    order: Vec<String>,
    wanted: Option<WantedStorage>,
    seen: BTreeMap<String, PoolSeen>,
    looks: BTreeMap<String, Look>,
    busy: BTreeMap<Thing, Busy>,
    failed: BTreeMap<Thing, Failure>,
    untaken: BTreeMap<SnapshotId, String>,
    quiesced: BTreeSet<SnapshotId>,
    quiescer: Quiescer,
    jobs: JoinSet<Ended>,
    clock: Instant,
    view: watch::Sender<Arc<View>>,
    changed: watch::Sender<u64>,
    looked: watch::Sender<bool>,
}

impl Task {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        loop {
            let wake = self.pass();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Desire { wanted, reply }) => {
                        self.take_wanted(wanted);
                        self.pass();
                        // Nobody waiting for the answer is no reason not to do it.
                        let _ = reply.send(());
                    }
                    Some(Command::Imported { pool, image }) => {
                        let thing = Thing { pool, id: Id::Image(image.id) };
                        self.made(&thing, Made::Image(image));
                    }
                    None => return,
                },
                Some(ended) = self.jobs.join_next() => match ended {
                    Ok(ended) => self.take(ended),
                    // A job catches the panic of its work; this is the runtime's end.
                    Err(err) => tracing::error!(%err, "a job of the storage task failed"),
                },
                () = tokio::time::sleep_until(wake) => {}
            }
        }
    }

    fn take_wanted(&mut self, wanted: WantedStorage) {
        // What is asked for in other words (more sources, another size) is tried at once.
        let now_ms = self.now_ms();
        let before = self.wanted.replace(wanted).unwrap_or_default();
        let Some(wanted) = &self.wanted else { return };
        for (id, seen) in &mut self.seen {
            let is_shared = self.pools.get(id).is_some_and(|pool| pool.is_shared());
            if is_shared && wanted.speaks_of_more(&before, id) {
                // Another node may have made it since.
                seen.is_stale = true;
                if let Some(look) = self.looks.get_mut(id) {
                    (look.fresh_from, look.due) = (Instant::now(), Instant::now());
                }
            }
        }
        for (thing, failure) in &mut self.failed {
            if !wanted.asks_the_same(&before, &thing.id.name()) {
                failure.retry_ms = failure.retry_ms.min(now_ms);
            }
        }
        self.untaken.retain(|id, _| wanted.wants_part(&id.to_string()));
    }

    /// Begins what is to be begun, and shows how things stand; answers when to come back.
    fn pass(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = self.look(now);
        if let Some(due) = self.clean(now) {
            wake = wake.min(due);
        }
        let plan = plan(Facts {
            wanted: self.wanted.as_ref(),
            pools: &self.seen,
            busy: &self.busy,
            failed: &self.failed,
            untaken: &self.untaken,
            quiesced: &self.quiesced,
            now_ms: self.now_ms(),
        });
        for (thing, work) in plan.begin {
            self.begin(thing, work);
        }
        for take in plan.takes {
            self.take_snapshot(take);
        }
        for thing in plan.cancel {
            if let Some(busy) = self.busy.get(&thing) {
                busy.progress.given_up.notify_one();
            }
        }
        if let Some(at) = plan.wake_ms {
            wake = wake.min(self.clock + Duration::from_millis(at));
        }
        if self.busy.values().any(|busy| is_transfer(&busy.work)) {
            wake = wake.min(now + SHOW_INTERVAL);
        }
        let pools = self.order.iter().map(|id| self.observed(id)).collect();
        let (volumes, images, snapshots) = (plan.volumes, plan.images, plan.snapshots);
        self.publish(View { pools, volumes, images, snapshots });
        wake
    }

    fn publish(&mut self, view: View) {
        let mut news = false;
        self.view.send_if_modified(|before| {
            if before.pools == view.pools
                && before.volumes == view.volumes
                && before.images == view.images
                && before.snapshots == view.snapshots
            {
                return false;
            }
            news = differs(before, &view);
            *before = Arc::new(view);
            true
        });
        if news {
            self.changed.send_modify(|count| *count += 1);
        }
    }

    fn begin(&mut self, thing: Thing, work: Work) {
        let Some(pool) = self.pools.get(&thing.pool).cloned() else { return };
        let same = |(other, busy): &(&Thing, &Busy)| {
            other.pool == thing.pool
                && busy.work != Work::Take
                && is_transfer(&busy.work) == is_transfer(&work)
        };
        let limit = if is_transfer(&work) { FETCHES_A_POOL_MAX } else { JOBS_A_POOL_MAX };
        if self.busy.iter().filter(same).count() >= limit {
            // The next pass comes when one of them ends.
            return;
        }
        tracing::info!(pool = thing.pool, thing = %thing.id, ?work, "begins");
        let of = match thing.id {
            Id::Snapshot(id) => self.snapshot_of(&thing.pool, id),
            _ => None,
        };
        let progress = Arc::new(Progress::default());
        let busy = Busy { work: work.clone(), progress: Arc::clone(&progress) };
        self.busy.insert(thing.clone(), busy);
        let others: Vec<_> =
            self.pools.values().filter(|other| other.id != pool.id).cloned().collect();
        self.jobs.spawn(async move {
            let result = match (work, thing.id) {
                (Work::Fetch { sources, bytes }, Id::Image(image)) => {
                    fetch::fetch(&pool, &others, image, bytes, &sources, &progress)
                        .await
                        .map(Made::Image)
                }
                (Work::Copy { source, bytes }, Id::Volume(volume)) => {
                    copy::copy(&pool, volume, bytes, &source, &progress).await.map(Made::Volume)
                }
                (Work::Delete, Id::Snapshot(id)) => {
                    on_thread(move || delete_snapshot(&pool, id, of)).await
                }
                (work, id) => on_thread(move || call(&pool, id, work)).await,
            };
            Ended::Job { thing, result }
        });
    }

    fn take(&mut self, ended: Ended) {
        match ended {
            Ended::Job { thing, result } => {
                let work = self.busy.remove(&thing).map(|busy| busy.work);
                match result {
                    Ok(made) => {
                        tracing::info!(pool = thing.pool, thing = %thing.id, ?work, "is done");
                        self.failed.remove(&thing);
                        self.made(&thing, made);
                    }
                    Err(error) => self.note_failure(thing, work, &error),
                }
            }
            Ended::Look { pool, result } => self.take_look(&pool, result),
            Ended::Taken { take, result } => self.taken(take, result),
            Ended::Cleaned { pool, result } => self.cleaned(&pool, result),
        }
        let is_known = |look: &Look| {
            let is_clean = look.clean_due.is_none() && !look.is_cleaning;
            look.failed > 0 || (look.usage.is_some() && is_clean)
        };
        if !*self.looked.borrow() && self.looks.values().all(is_known) {
            self.pass();
            self.looked.send_replace(true);
        }
    }

    fn note_failure(&mut self, thing: Thing, work: Option<Work>, error: &Error) {
        let before = self.failed.get(&thing);
        let reason = error.to_string();
        if before.is_none_or(|before| before.reason != reason) {
            tracing::warn!(pool = thing.pool, thing = %thing.id, ?work, reason, "will try again");
        }
        let failure = match error {
            Error::Busy(_) => Failure::not_yet(before, reason, self.now_ms()),
            _ => Failure::again(before, reason, self.now_ms()),
        };
        self.look_soon(&thing.pool);
        self.failed.insert(thing, failure);
    }

    fn made(&mut self, thing: &Thing, made: Made) {
        if let Some(look) = self.looks.get_mut(&thing.pool) {
            look.touched.insert(thing.clone());
        }
        let seen = self.seen.get_mut(&thing.pool);
        let Some(inventory) = seen.and_then(|seen| seen.inventory.as_mut()) else { return };
        match (made, thing.id) {
            (Made::Volume(info), _) => {
                inventory.volumes.insert(info.id, info);
            }
            (Made::Image(info), _) => {
                inventory.images.insert(info.id, info);
            }
            (Made::Snapshot(info), _) => {
                inventory.snapshots.insert(info.id, info);
            }
            (Made::Gone, Id::Snapshot(id)) => {
                inventory.snapshots.remove(&id);
                self.quiesced.remove(&id);
            }
            (Made::Gone, Id::Volume(id)) => {
                inventory.volumes.remove(&id);
            }
            (Made::Gone, Id::Image(id)) => {
                inventory.images.remove(&id);
            }
        }
    }

    /// Of things that are neither here nor wanted any more.
    fn forget_failures(&mut self, pool: &str) {
        let wanted = self.wanted.as_ref();
        let inventory = self.seen.get(pool).and_then(|seen| seen.inventory.as_ref());
        self.failed.retain(|thing, _| {
            let here = inventory.is_some_and(|inventory| match thing.id {
                Id::Volume(id) => inventory.volumes.contains_key(&id),
                Id::Image(id) => inventory.images.contains_key(&id),
                Id::Snapshot(id) => inventory.snapshots.contains_key(&id),
            });
            let asked = wanted.is_some_and(|wanted| wanted.names(&thing.id.name()));
            thing.pool != pool || here || asked
        });
    }

    fn observed(&self, id: &str) -> ObservedPool {
        let usage = self.looks.get(id).and_then(|look| look.usage.as_ref());
        let fault = self.seen.get(id).and_then(|seen| seen.fault.clone());
        let pool = self.pools.get(id);
        let kind = match pool.map(|pool| &pool.spec) {
            Some(PoolSpec::Lvm { .. }) => PoolKind::Lvm,
            Some(PoolSpec::Dir { .. } | PoolSpec::Shared { .. }) => PoolKind::Dir,
            None => PoolKind::Unspecified,
        };
        let (state, state_reason) = state_of(usage, fault);
        ObservedPool {
            id: id.to_owned(),
            kind: kind.into(),
            state: state.into(),
            state_reason: crate::observe::shorten(state_reason),
            size_bytes: usage.map_or(0, |usage| usage.bytes),
            used_bytes: usage.map_or(0, |usage| usage.used_bytes),
            overcommit: pool.map_or(1.0, |pool| pool.overcommit),
            shared_uid: pool.map_or_else(String::new, |pool| pool.shared_uid().to_owned()),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

pub(super) fn state_of(usage: Option<&PoolUsage>, fault: Option<String>) -> (PoolState, String) {
    if let Some(fault) = fault {
        return (PoolState::Failed, fault);
    }
    let Some(usage) = usage else {
        return (PoolState::Unspecified, "has not been looked at yet".into());
    };
    if usage.fault.is_some() {
        return (PoolState::Failed, usage.to_string());
    }
    match usage.level(Thresholds::default()) {
        Level::Fine => (PoolState::Ready, String::new()),
        Level::Filling | Level::Full => (PoolState::Filling, usage.to_string()),
    }
}

/// Runs one call of a pool.
fn call(pool: &NodePool, id: Id, work: Work) -> Result<Made, Error> {
    let pool = pool.pool()?;
    Ok(match (work, id) {
        (Work::Create { bytes }, Id::Volume(id)) => Made::Volume(pool.create_volume(id, bytes)?),
        (Work::Clone { image, bytes }, Id::Volume(id)) => {
            Made::Volume(pool.clone_image(id, image, bytes)?)
        }
        (Work::CloneSnapshot { volume, snapshot, bytes }, Id::Volume(id)) => {
            Made::Volume(pool.clone_snapshot(id, volume, snapshot, bytes)?)
        }
        (Work::Grow { bytes }, Id::Volume(id)) => Made::Volume(pool.grow_volume(id, bytes)?),
        (Work::Delete, Id::Volume(id)) => {
            pool.delete_volume(id)?;
            Made::Gone
        }
        (Work::Delete, Id::Image(id)) => {
            pool.delete_image(id)?;
            Made::Gone
        }
        // plan() asks for nothing else.
        (work, id) => return Err(Error::Domain(format!("{work:?} of {id}: is not possible"))),
    })
}

/// Deletes a part of a snapshot of the volume `of`.
fn delete_snapshot(pool: &NodePool, id: SnapshotId, of: Option<VolumeId>) -> Result<Made, Error> {
    // Without a volume it is not there any more.
    if let Some(volume) = of {
        pool.pool()?.delete_snapshot(volume, id)?;
    }
    Ok(Made::Gone)
}

/// Whether it brings something from elsewhere, and says how far it is.
fn is_transfer(work: &Work) -> bool {
    matches!(work, Work::Fetch { .. } | Work::Copy { .. })
}

/// As [`blocking`]; a panic is the error of this call alone.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    blocking(work).await
}

/// Whether two views differ in more than their counters.
fn differs(a: &View, b: &View) -> bool {
    let pools = |view: &View| -> Vec<_> {
        let state = |pool: &ObservedPool| {
            (pool.id.clone(), pool.state, pool.size_bytes, pool.shared_uid.clone())
        };
        view.pools.iter().map(state).collect()
    };
    let volumes = |view: &View| -> Vec<_> {
        let volumes = view.volumes.iter();
        volumes.map(|v| (v.uid.clone(), v.state, v.state_reason.clone(), v.size_bytes)).collect()
    };
    let snapshots = |view: &View| -> Vec<_> {
        let snapshots = view.snapshots.iter();
        snapshots.map(|s| (s.uid.clone(), s.state, s.state_reason.clone(), s.quiesced)).collect()
    };
    a.images != b.images
        || pools(a) != pools(b)
        || volumes(a) != volumes(b)
        || snapshots(a) != snapshots(b)
}
