//! The task that owns the pools: asks [`plan`](super::plan) what to do, does it on threads that
//! may block, and shows the others how things stand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use drover_proto::agent::v1::ObservedPool;
use drover_proto::v1::{PoolKind, PoolState};
use drover_storage::pool::{
    Contents, ImageInfo, Level, PoolSpec, PoolUsage, Thresholds, VolumeInfo,
};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::plan::{
    Busy, Facts, Failure, Id, Inventory, PoolSeen, Thing, WantedStorage, Work, plan,
};
use super::{Command, NodePool, NodePools, PoolFlag, Progress, StorageHandle, View, by_id, fetch};
use crate::error::{Error, blocking};

/// Calls that may be running on one pool, without the looks and without the fetches: the tools
/// of LVM take turns anyway.
const JOBS_A_POOL_MAX: usize = 4;
/// Images that may be on their way into one pool: two, so that a small one is not behind a large.
const FETCHES_A_POOL_MAX: usize = 2;
/// How often a pool is looked at, if all is well and if not.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// A pool that takes longer to be looked at is not usable.
const LOOK_TIMEOUT: Duration = Duration::from_secs(60);
/// So many looks in a row must fail before the pool is called failed: a tool may have its moment.
const LOOKS_FAILED_MAX: u32 = 2;
/// How long the agent's start waits for the first look.
const FIRST_LOOK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the progress of fetches is shown.
const SHOW_INTERVAL: Duration = Duration::from_secs(1);
const COMMANDS_MAX: usize = 16;

/// Opens the pools, removes what a crash left unfinished in them, and begins. When this returns
/// and no pool hangs, [`StorageHandle::view`] is true. `changed` counts up when something worth
/// a report has changed. The second part is the task, which ends when it fails.
///
/// # Errors
/// When a pool cannot be opened.
pub async fn start(
    flags: &[PoolFlag],
    changed: watch::Sender<u64>,
) -> Result<(StorageHandle, tokio::task::JoinHandle<()>), Error> {
    let flags = flags.to_owned();
    let pools: NodePools = blocking(move || open(&flags).map(Arc::new)).await?;
    let (view_sink, view) = watch::channel(Arc::default());
    let (commands_sink, commands) = mpsc::channel(COMMANDS_MAX);
    let handle = StorageHandle { commands: commands_sink, view, pools: Arc::clone(&pools) };
    let seen = pools.iter().map(|pool| (pool.id.clone(), PoolSeen::default())).collect();
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

fn open(flags: &[PoolFlag]) -> Result<Vec<Arc<NodePool>>, Error> {
    let mut pools: Vec<Arc<NodePool>> = Vec::with_capacity(flags.len());
    for flag in flags {
        let id = flag.id.clone();
        if pools.iter().any(|pool| pool.id == id) {
            let reason = format!("{id}: is given twice; give each pool an id of its own");
            return Err(Error::Flag { flag: "--pool", reason });
        }
        if pools.iter().any(|pool| *pool.pool.spec() == flag.spec) {
            let reason = format!("{id}={}: is given twice; a pool has one id", flag.spec);
            return Err(Error::Flag { flag: "--pool", reason });
        }
        let fails = |source| Error::Pool { id: id.clone(), source };
        let pool = drover_storage::pool::open(&flag.spec).map_err(fails)?;
        for leftover in pool.clean_up().map_err(fails)? {
            tracing::info!(pool = id, leftover, "removed what a crash had left unfinished");
        }
        pools.push(Arc::new(NodePool { id, overcommit: flag.overcommit, pool }));
    }
    Ok(pools)
}

/// How a job ended.
enum Ended {
    Job { thing: Thing, result: Result<Made, Error> },
    Look { pool: String, result: Result<(Contents, PoolUsage), String> },
}

/// What a job has made of its thing.
enum Made {
    Volume(VolumeInfo),
    Image(ImageInfo),
    Gone,
}

/// The looks at one pool.
struct Look {
    /// When the one that goes on began.
    since: Option<Instant>,
    due: Instant,
    failed: u32,
    usage: Option<PoolUsage>,
    /// What jobs have changed since it began: they know better.
    touched: BTreeSet<Thing>,
}

impl Look {
    fn new() -> Self {
        Self { since: None, due: Instant::now(), failed: 0, usage: None, touched: BTreeSet::new() }
    }
}

struct Task {
    pools: BTreeMap<String, Arc<NodePool>>,
    order: Vec<String>,
    wanted: Option<WantedStorage>,
    seen: BTreeMap<String, PoolSeen>,
    looks: BTreeMap<String, Look>,
    busy: BTreeMap<Thing, Busy>,
    failed: BTreeMap<Thing, Failure>,
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
        for (thing, failure) in &mut self.failed {
            if !wanted.asks_the_same(&before, &thing.id.name()) {
                failure.retry_ms = failure.retry_ms.min(now_ms);
            }
        }
    }

    /// Begins what is to be begun, and shows how things stand; answers when to come back.
    fn pass(&mut self) -> Instant {
        let now = Instant::now();
        let mut wake = self.look(now);
        let plan = plan(Facts {
            wanted: self.wanted.as_ref(),
            pools: &self.seen,
            busy: &self.busy,
            failed: &self.failed,
            now_ms: self.now_ms(),
        });
        for (thing, work) in plan.begin {
            self.begin(thing, work);
        }
        if let Some(at) = plan.wake_ms {
            wake = wake.min(self.clock + Duration::from_millis(at));
        }
        if self.busy.values().any(|busy| matches!(busy.work, Work::Fetch { .. })) {
            wake = wake.min(now + SHOW_INTERVAL);
        }
        let pools = self.order.iter().map(|id| self.observed(id)).collect();
        self.publish(View { pools, volumes: plan.volumes, images: plan.images });
        wake
    }

    fn publish(&mut self, view: View) {
        let mut news = false;
        self.view.send_if_modified(|before| {
            if before.pools == view.pools
                && before.volumes == view.volumes
                && before.images == view.images
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
        let is_fetch = |work: &Work| matches!(work, Work::Fetch { .. });
        let same = |(other, busy): &(&Thing, &Busy)| {
            other.pool == thing.pool && is_fetch(&busy.work) == is_fetch(&work)
        };
        let limit = if is_fetch(&work) { FETCHES_A_POOL_MAX } else { JOBS_A_POOL_MAX };
        if self.busy.iter().filter(same).count() >= limit {
            // The next pass comes when one of them ends.
            return;
        }
        tracing::info!(pool = thing.pool, thing = %thing.id, ?work, "begins");
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
                (work, id) => on_thread(move || call(&pool, id, work)).await,
            };
            Ended::Job { thing, result }
        });
    }

    /// Begins the looks that are due, and says when the next one is.
    fn look(&mut self, now: Instant) -> Instant {
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
                let result = on_thread(move || Ok((pool.pool.list()?, pool.pool.usage()?))).await;
                Ended::Look { pool: id, result: result.map_err(|err| err.to_string()) }
            });
        }
        wake
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
            Ended::Look { pool, result } => {
                self.take_look(&pool, result);
                if self.looks.values().all(|look| look.usage.is_some() || look.failed > 0) {
                    self.looked.send_replace(true);
                }
            }
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
        // Whatever came of it: the pool knows.
        if let Some(look) = self.looks.get_mut(&thing.pool) {
            look.due = look.due.min(Instant::now() + LOOK_AGAIN);
        }
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
            (Made::Gone, Id::Volume(id)) => {
                inventory.volumes.remove(&id);
            }
            (Made::Gone, Id::Image(id)) => {
                inventory.images.remove(&id);
            }
        }
    }

    fn take_look(&mut self, pool: &str, result: Result<(Contents, PoolUsage), String>) {
        let (Some(look), Some(seen)) = (self.looks.get_mut(pool), self.seen.get_mut(pool)) else {
            return;
        };
        look.since = None;
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
        let volumes = before.volumes.into_iter().filter(|(id, _)| touched(Id::Volume(*id)));
        found.volumes.extend(volumes);
        let images = before.images.into_iter().filter(|(id, _)| touched(Id::Image(*id)));
        found.images.extend(images);
        seen.inventory = Some(found);
        self.forget_failures(pool);
    }

    /// Of things that are neither here nor wanted any more.
    fn forget_failures(&mut self, pool: &str) {
        let wanted = self.wanted.as_ref();
        let inventory = self.seen.get(pool).and_then(|seen| seen.inventory.as_ref());
        self.failed.retain(|thing, _| {
            let here = inventory.is_some_and(|inventory| match thing.id {
                Id::Volume(id) => inventory.volumes.contains_key(&id),
                Id::Image(id) => inventory.images.contains_key(&id),
            });
            let asked = wanted.is_some_and(|wanted| wanted.names(&thing.id.name()));
            thing.pool != pool || here || asked
        });
    }

    fn observed(&self, id: &str) -> ObservedPool {
        let usage = self.looks.get(id).and_then(|look| look.usage.as_ref());
        let fault = self.seen.get(id).and_then(|seen| seen.fault.clone());
        let pool = self.pools.get(id);
        let kind = match pool.map(|pool| pool.pool.spec()) {
            Some(PoolSpec::Lvm { .. }) => PoolKind::Lvm,
            Some(PoolSpec::Dir { .. }) => PoolKind::Dir,
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
    let pool = &pool.pool;
    Ok(match (work, id) {
        (Work::Create { bytes }, Id::Volume(id)) => Made::Volume(pool.create_volume(id, bytes)?),
        (Work::Clone { image, bytes }, Id::Volume(id)) => {
            Made::Volume(pool.clone_image(id, image, bytes)?)
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

/// As [`blocking`]; a panic is the error of this call alone.
async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    blocking(work).await
}

/// Whether two views differ in more than their counters.
fn differs(a: &View, b: &View) -> bool {
    let pools = |view: &View| -> Vec<_> {
        let state = |pool: &ObservedPool| (pool.id.clone(), pool.state, pool.size_bytes);
        view.pools.iter().map(state).collect()
    };
    let volumes = |view: &View| -> Vec<_> {
        let volumes = view.volumes.iter();
        volumes.map(|v| (v.uid.clone(), v.state, v.state_reason.clone(), v.size_bytes)).collect()
    };
    a.images != b.images || pools(a) != pools(b) || volumes(a) != volumes(b)
}
