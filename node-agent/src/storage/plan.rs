//! What is to be done about volumes, snapshots and images, and what is reported of them: one pure function
//! of what the controller wants, what is in the pools, what is being done and what failed. All
//! rules stand here; [`super::task`] does what comes out, looks again, and asks again.
//!
//! - Before the first `Desired` nothing is made and nothing removed.
//! - A volume is made only where `create` says so: otherwise one that is missing is data lost,
//!   and a blank one in its place would hide that.
//! - A volume is removed only when `garbage` names it, and neither `volumes` nor an assigned
//!   domain does. One that is open is not removed either; the pool sees to that.
//! - An image is fetched once a pool, however many volumes wait for it.
//! - A snapshot's parts are taken together, and only when none of them is there. One that could
//!   not be taken is not tried again.
//! - A copy that is not wanted any more is given up at once: it keeps its source from being used.
//! - Nothing that is there is missing from the report: the controller takes that for "is gone".
//!   What lies in a pool that cannot be read is reported as FAILED instead.
//! - In a pool that several nodes share, a node speaks only of what it was told of, and looks
//!   again before it says that something of it is missing. Nothing is made in or removed from
//!   another pool than the controller means, whatever its id.
//!
//! No record is kept of the volumes that were made here. The pool is the record: an unfinished
//! volume bears another name until it is whole, so that one that is there is one that was made,
//! and whether one that is missing ever was there is known to the controller (`create`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use drover_proto::agent::v1::{
    Garbage, ObservedImage, ObservedSnapshot, ObservedVolume, VolumeSource, WantedSnapshot,
    WantedVolume,
};
use drover_proto::v1::VolumeState;
use drover_storage::pool::{ImageId, ImageInfo, SnapshotId, SnapshotInfo, VolumeId, VolumeInfo};

use super::Progress;
pub(super) use seen::PoolSeen;

/// How often in a row something is tried before it is called failed. It is tried on after that,
/// with the longest pause: what was wrong may be put right, and the controller says when to stop.
pub(super) const TRIES_MAX: u32 = 5;
/// First and longest pause before what failed is tried again.
const RETRY_MS_MIN: u64 = 1_000;
const RETRY_MS_MAX: u64 = 60_000;
/// And before those who were busy are asked again.
const BUSY_MS: u64 = 2_000;

/// What the controller wants of this node's pools.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct WantedStorage {
    /// What shall be there.
    pub volumes: Vec<WantedVolume>,
    /// What shall be gone.
    pub garbage: Vec<Garbage>,
    /// Snapshots that shall be there.
    pub snapshots: Vec<WantedSnapshot>,
    /// The uids of volumes that domains assigned to this node have.
    pub used: BTreeSet<String>,
}

impl WantedStorage {
    fn about<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a WantedVolume> {
        self.volumes.iter().filter(move |v| v.uid == name || v.image_digest == name)
    }

    /// Whether it says anything of the volume, image or snapshot's part of this name.
    pub(super) fn names(&self, name: &str) -> bool {
        let mut garbage = self.garbage.iter();
        self.about(name).next().is_some()
            || self.wants_part(name)
            || garbage.any(|garbage| {
                [&garbage.volume_uid, &garbage.image_digest, &garbage.snapshot_uid]
                    .into_iter()
                    .any(|named| named == name)
            })
    }

    /// Whether it says something of the pool of which `before` says nothing.
    pub(super) fn speaks_of_more(&self, before: &Self, pool: &str) -> bool {
        let volumes = self.volumes.iter().filter(|volume| volume.pool == pool);
        let parts = self.snapshots.iter().flat_map(|snapshot| &snapshot.parts);
        let parts = parts.filter(|part| part.pool == pool);
        let garbage = self.garbage.iter().filter(|garbage| garbage.pool == pool);
        // Its image may be here by now as well.
        volumes.map(|volume| &volume.uid).any(|uid| before.about(uid).next().is_none())
            || parts.map(|part| &part.uid).any(|uid| !before.wants_part(uid))
            || garbage.into_iter().any(|garbage| !before.garbage.contains(garbage))
    }

    /// Whether it asks for the volume or image of this name in the same words.
    pub(super) fn asks_the_same(&self, before: &Self, name: &str) -> bool {
        self.about(name).eq(before.about(name))
    }

    /// Whether a snapshot has a part of this name.
    pub(super) fn wants_part(&self, name: &str) -> bool {
        self.snapshots.iter().flat_map(|snapshot| &snapshot.parts).any(|part| part.uid == name)
    }
}

/// A volume, an image or a snapshot's part in a pool.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Thing {
    pub(super) pool: String,
    pub(super) id: Id,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Id {
    Volume(VolumeId),
    Image(ImageId),
    Snapshot(SnapshotId),
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Image(id) => write!(f, "image {id}"),
            Self::Snapshot(id) => write!(f, "snapshot {id}"),
        }
    }
}

impl Id {
    /// As the controller calls it.
    pub(super) fn name(self) -> String {
        match self {
            Self::Volume(id) => id.to_string(),
            Self::Image(id) => id.to_string(),
            Self::Snapshot(id) => id.to_string(),
        }
    }
}

/// What is in a pool.
#[derive(Debug, Clone, Default)]
pub(super) struct Inventory {
    pub(super) volumes: BTreeMap<VolumeId, VolumeInfo>,
    pub(super) images: BTreeMap<ImageId, ImageInfo>,
    pub(super) snapshots: BTreeMap<SnapshotId, SnapshotInfo>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// An empty volume.
    Create { bytes: u64 },
    /// A volume with an image's content.
    Clone { image: ImageId, bytes: u64 },
    /// A volume with the content of a snapshot of `volume`.
    CloneSnapshot { volume: VolumeId, snapshot: SnapshotId, bytes: u64 },
    /// A volume with what it holds at this agent.
    Copy { source: String, bytes: u64 },
    /// A larger volume.
    Grow { bytes: u64 },
    /// An image of this size (0: not known), from one of these agents.
    Fetch { sources: Vec<String>, bytes: u64 },
    /// No more of it.
    Delete,
    /// A snapshot is taken of the volume, or this part is. Begun by [`Plan::takes`] alone.
    Take,
}

/// What is being done to a thing.
#[derive(Debug, Clone)]
pub(super) struct Busy {
    pub(super) work: Work,
    pub(super) progress: Arc<Progress>,
}

/// What failed last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) reason: String,
    /// How often in a row.
    pub(super) count: u32,
    pub(super) retry_ms: u64,
}

impl Failure {
    /// Once more, now.
    pub(super) fn again(before: Option<&Self>, reason: String, now_ms: u64) -> Self {
        let count = before.map_or(1, |before| before.count.saturating_add(1));
        let pause = RETRY_MS_MIN << count.saturating_sub(1).min(16);
        Self { reason, count, retry_ms: now_ms + pause.min(RETRY_MS_MAX) }
    }

    /// Nothing is wrong, but it was not its turn: that is no try.
    pub(super) fn not_yet(before: Option<&Self>, reason: String, now_ms: u64) -> Self {
        let count = before.map_or(0, |before| before.count);
        Self { reason, count, retry_ms: now_ms + BUSY_MS }
    }
}

/// A snapshot that is to be taken: all parts at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Take {
    pub(super) domain: String,
    pub(super) parts: Vec<Part>,
}

/// What a snapshot has of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) pool: String,
    pub(super) volume: VolumeId,
    pub(super) snapshot: SnapshotId,
}

impl Part {
    pub(super) fn thing(&self) -> Thing {
        Thing { pool: self.pool.clone(), id: Id::Snapshot(self.snapshot) }
    }

    pub(super) fn volume_thing(&self) -> Thing {
        Thing { pool: self.pool.clone(), id: Id::Volume(self.volume) }
    }
}

/// Everything that a plan rests on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    /// `None` before the first `Desired`.
    pub(super) wanted: Option<&'a WantedStorage>,
    pub(super) pools: &'a BTreeMap<String, PoolSeen>,
    pub(super) busy: &'a BTreeMap<Thing, Busy>,
    pub(super) failed: &'a BTreeMap<Thing, Failure>,
    /// Why parts of snapshots could not be taken.
    pub(super) untaken: &'a BTreeMap<SnapshotId, String>,
    /// Parts that were taken while the guest's filesystems were frozen, or nothing ran.
    pub(super) quiesced: &'a BTreeSet<SnapshotId>,
    pub(super) now_ms: u64,
}

/// What comes of it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// To be begun, each thing at most once, in this order as far as the limits allow.
    pub(super) begin: Vec<(Thing, Work)>,
    /// As `begin`.
    pub(super) takes: Vec<Take>,
    /// Copies to be given up.
    pub(super) cancel: Vec<Thing>,
    /// Every volume that is here or shall be.
    pub(super) volumes: Vec<ObservedVolume>,
    /// Every image that is here, or may be.
    pub(super) images: Vec<ObservedImage>,
    /// Each part of a snapshot that is here or shall be.
    pub(super) snapshots: Vec<ObservedSnapshot>,
    /// When to ask again, if nothing changes before.
    pub(super) wake_ms: Option<u64>,
}

/// What to do, and what to say.
pub(super) fn plan(facts: Facts<'_>) -> Plan {
    let mut planner = Planner { facts, plan: Plan::default(), said: BTreeSet::new() };
    if let Some(wanted) = facts.wanted {
        // Before the volumes: what is to go is not taken for a mere stranger.
        let fetches = planner.wanted(wanted);
        planner.snapshots(wanted);
        planner.garbage(wanted, &fetches);
        planner.give_up(wanted);
    }
    planner.others();
    planner.plan
}

/// Images that volumes wait for: whence, and how large.
type Fetches = BTreeMap<Thing, (Vec<String>, u64)>;

struct Planner<'a> {
    facts: Facts<'a>,
    plan: Plan,
    /// Volumes and snapshots that are in the report already.
    said: BTreeSet<Thing>,
}

impl Planner<'_> {
    fn wanted(&mut self, wanted: &WantedStorage) -> Fetches {
        let mut fetches = Fetches::new();
        for volume in &wanted.volumes {
            let (state, reason) = match volume.uid.parse::<VolumeId>() {
                Ok(id) => {
                    let thing = Thing { pool: volume.pool.clone(), id: Id::Volume(id) };
                    self.said.insert(thing.clone());
                    self.volume(volume, thing, id, &mut fetches)
                }
                Err(err) => (VolumeState::Failed, err.to_string()),
            };
            let info = volume.uid.parse().ok().and_then(|id| self.info(&volume.pool, id));
            let observed = observed(&volume.uid, &volume.pool, info, state, reason);
            self.plan.volumes.push(observed);
        }
        for (thing, (sources, bytes)) in &fetches {
            self.begin(thing, Work::Fetch { sources: sources.clone(), bytes: *bytes });
        }
        fetches
    }

    /// One that shall be there.
    fn volume(
        &mut self,
        wanted: &WantedVolume,
        thing: Thing,
        id: VolumeId,
        fetches: &mut Fetches,
    ) -> (VolumeState, String) {
        let failed = |reason: String| (VolumeState::Failed, reason);
        let Some(pool) = self.facts.pools.get(&wanted.pool) else {
            let pools: Vec<_> = self.facts.pools.keys().map(String::as_str).collect();
            let has = if pools.is_empty() { "none".into() } else { pools.join(", ") };
            return failed(format!("pool {:?}: is not on this node, which has {has}", wanted.pool));
        };
        if let Some(fault) = &pool.fault {
            return failed(format!("pool {}: {fault}", wanted.pool));
        }
        let Some(inventory) = &pool.inventory else {
            return (VolumeState::Creating, pool.unsure().unwrap_or_default().into());
        };
        if let Some(why) = pool.is_another(&wanted.shared_uid) {
            // Neither made nor called lost: it may be a moment between two configurations.
            return (VolumeState::Creating, format!("pool {}: {why}", wanted.pool));
        }
        if let Some(busy) = self.facts.busy.get(&thing) {
            return match busy.work {
                Work::Grow { .. } | Work::Take => (VolumeState::Ready, String::new()),
                Work::Copy { ref source, .. } => {
                    (VolumeState::Creating, busy.progress.say(&format!("copying from {source}")))
                }
                Work::Delete => (VolumeState::Creating, "is being removed first".into()),
                _ => (VolumeState::Creating, "is being made".into()),
            };
        }
        if let Some(info) = inventory.volumes.get(&id) {
            if info.bytes >= wanted.size_bytes {
                return (VolumeState::Ready, String::new());
            }
            self.begin(&thing, Work::Grow { bytes: wanted.size_bytes });
            let why = self.facts.failed.get(&thing).map(|failure| failure.reason.clone());
            return (VolumeState::Ready, why.unwrap_or_default());
        }
        if let Some(why) = pool.unsure() {
            return (VolumeState::Creating, why.into());
        }
        if !wanted.create {
            return failed("its data is not there".into());
        }
        if let Some(source) = &wanted.snapshot {
            return self.volume_of_snapshot(wanted, source, &thing);
        }
        if !wanted.copy_from.is_empty() {
            let (source, bytes) = (wanted.copy_from.clone(), wanted.size_bytes);
            let otherwise = format!("is to be copied from {source}");
            self.begin(&thing, Work::Copy { source, bytes });
            return self.unless_failed(&thing, otherwise);
        }
        if wanted.image_digest.is_empty() {
            self.begin(&thing, Work::Create { bytes: wanted.size_bytes });
            return self.unless_failed(&thing, String::new());
        }
        let image = match wanted.image_digest.parse::<ImageId>() {
            Ok(image) => image,
            Err(err) => return failed(err.to_string()),
        };
        if inventory.images.contains_key(&image) {
            self.begin(&thing, Work::Clone { image, bytes: wanted.size_bytes });
            return self.unless_failed(&thing, String::new());
        }
        let source = Thing { pool: wanted.pool.clone(), id: Id::Image(image) };
        let (sources, bytes) = fetches.entry(source.clone()).or_default();
        *bytes = (*bytes).max(wanted.image_size_bytes);
        for address in &wanted.image_sources {
            if !sources.contains(address) {
                sources.push(address.clone());
            }
        }
        match self.facts.busy.get(&source) {
            Some(busy) => (VolumeState::Creating, busy.progress.say("copying the image")),
            None => self.unless_failed(&source, "the image is to be copied".into()),
        }
    }

    /// One that is made of a snapshot in its pool.
    fn volume_of_snapshot(
        &mut self,
        wanted: &WantedVolume,
        source: &VolumeSource,
        thing: &Thing,
    ) -> (VolumeState, String) {
        let failed = |reason: String| (VolumeState::Failed, reason);
        if source.pool != wanted.pool {
            let reason = format!(
                "snapshot.pool: {:?}: a volume is made of a snapshot in its own pool, {}",
                source.pool, wanted.pool
            );
            return failed(reason);
        }
        let volume = source.volume_uid.parse::<VolumeId>();
        let (volume, snapshot) = match (volume, source.snapshot_uid.parse::<SnapshotId>()) {
            (Ok(volume), Ok(snapshot)) => (volume, snapshot),
            (Err(err), _) | (_, Err(err)) => return failed(err.to_string()),
        };
        let inventory = self.facts.pools.get(&wanted.pool).and_then(|pool| pool.inventory.as_ref());
        if !inventory.is_some_and(|inventory| inventory.snapshots.contains_key(&snapshot)) {
            return failed(format!("snapshot {snapshot}: is not in pool {}", wanted.pool));
        }
        let bytes = wanted.size_bytes;
        self.begin(thing, Work::CloneSnapshot { volume, snapshot, bytes });
        self.unless_failed(thing, String::new())
    }

    fn unless_failed(&self, thing: &Thing, otherwise: String) -> (VolumeState, String) {
        match self.facts.failed.get(thing) {
            None => (VolumeState::Creating, otherwise),
            Some(failure) if failure.count == 0 => (VolumeState::Creating, failure.reason.clone()),
            Some(failure) if failure.count < TRIES_MAX => {
                (VolumeState::Creating, format!("tries again after: {}", failure.reason))
            }
            Some(failure) => (VolumeState::Failed, failure.reason.clone()),
        }
    }

    fn garbage(&mut self, wanted: &WantedStorage, fetches: &Fetches) {
        let kept: BTreeSet<&str> = wanted.volumes.iter().map(|v| v.uid.as_str()).collect();
        for garbage in &wanted.garbage {
            let pool = garbage.pool.clone();
            if let Ok(id) = garbage.image_digest.parse::<ImageId>() {
                let pools = self.facts.pools.keys();
                let pools: Vec<String> =
                    pools.filter(|id| pool.is_empty() || pool == **id).cloned().collect();
                for pool in pools {
                    self.garbage_image(wanted, fetches, Thing { pool, id: Id::Image(id) });
                }
                continue;
            }
            let Some(seen) = self.facts.pools.get(&pool) else { continue };
            let another = seen.is_another(&garbage.shared_uid);
            let fault = seen.fault.as_deref().or(another.as_deref());
            let inventory = seen.inventory.as_ref();
            if let Ok(id) = garbage.volume_uid.parse::<VolumeId>() {
                let uid = garbage.volume_uid.as_str();
                if kept.contains(uid) || wanted.used.contains(uid) {
                    continue;
                }
                let thing = Thing { pool, id: Id::Volume(id) };
                let unread = inventory.is_none().then_some("is not read yet");
                if let Some(reason) = fault.or(unread) {
                    // Nobody can say that it is gone.
                    let reason = format!("pool {}: {reason}", thing.pool);
                    let state = VolumeState::Failed;
                    let said = observed(uid, &thing.pool, None, state, reason);
                    self.plan.volumes.push(said);
                    self.said.insert(thing);
                } else if inventory.is_some_and(|inventory| inventory.volumes.contains_key(&id)) {
                    self.begin(&thing, Work::Delete);
                } else if self.facts.busy.contains_key(&thing) || seen.is_stale {
                    // It may be there any moment: then it is removed.
                    let reason = "is given up".to_owned();
                    let said = observed(uid, &thing.pool, None, VolumeState::Creating, reason);
                    self.plan.volumes.push(said);
                    self.said.insert(thing);
                }
            } else if let Ok(id) = garbage.snapshot_uid.parse::<SnapshotId>() {
                self.garbage_snapshot(wanted, Thing { pool, id: Id::Snapshot(id) }, fault);
            }
        }
    }

    /// An image that shall be gone from one pool.
    fn garbage_image(&mut self, wanted: &WantedStorage, fetches: &Fetches, thing: Thing) {
        let Id::Image(id) = thing.id else { return };
        let Some(seen) = self.facts.pools.get(&thing.pool) else { return };
        let Some(inventory) =
            seen.inventory.as_ref().filter(|_| seen.fault.is_none() && seen.unsure().is_none())
        else {
            // Nobody can say that it is gone.
            self.plan.images.push(ObservedImage {
                digest: id.to_string(),
                pool: thing.pool,
                size_bytes: 0,
            });
            return;
        };
        let digest = id.to_string();
        let needed = wanted.volumes.iter().any(|volume| {
            volume.pool == thing.pool && volume.create && volume.image_digest == digest
        });
        if inventory.images.contains_key(&id) && !needed && !fetches.contains_key(&thing) {
            self.begin(&thing, Work::Delete);
        }
    }

    /// Copies that nobody wants any more, or not from there.
    fn give_up(&mut self, wanted: &WantedStorage) {
        for (thing, busy) in self.facts.busy {
            let Work::Copy { source, .. } = &busy.work else { continue };
            let name = thing.id.name();
            let is_wanted = wanted.about(&name).any(|volume| {
                volume.pool == thing.pool && volume.create && volume.copy_from == *source
            });
            if !is_wanted {
                self.plan.cancel.push(thing.clone());
            }
        }
    }

    /// What is here, and nobody said that it shall be.
    fn others(&mut self) {
        for (pool, seen) in self.facts.pools {
            self.other_snapshots(pool, seen);
            for (id, info) in seen.inventory.iter().flat_map(|inventory| &inventory.volumes) {
                let thing = Thing { pool: pool.clone(), id: Id::Volume(*id) };
                if self.said.contains(&thing) || self.is_others(seen, &id.to_string()) {
                    continue;
                }
                let reason = match (self.facts.busy.get(&thing), self.facts.failed.get(&thing)) {
                    (Some(busy), _) if busy.work == Work::Delete => "is being removed".into(),
                    (_, Some(failure)) => format!("cannot be removed: {}", failure.reason),
                    _ => String::new(),
                };
                let state = VolumeState::Ready;
                let said = observed(&id.to_string(), pool, Some(info), state, reason);
                self.plan.volumes.push(said);
            }
            // A pool that cannot be used has no image that could be.
            let usable = seen.inventory.as_ref().filter(|_| seen.fault.is_none());
            for (id, info) in usable.iter().flat_map(|inventory| &inventory.images) {
                self.plan.images.push(ObservedImage {
                    digest: id.to_string(),
                    pool: pool.clone(),
                    size_bytes: info.bytes,
                });
            }
        }
    }

    /// In a pool that several nodes share each speaks of what it was told of; all else is another's.
    fn is_others(&self, seen: &PoolSeen, name: &str) -> bool {
        !seen.shared_uid.is_empty() && !self.facts.wanted.is_some_and(|wanted| wanted.names(name))
    }

    fn info(&self, pool: &str, id: VolumeId) -> Option<&VolumeInfo> {
        self.facts.pools.get(pool)?.inventory.as_ref()?.volumes.get(&id)
    }

    /// Begins it, unless something is being done to it or its pause is not over.
    fn begin(&mut self, thing: &Thing, work: Work) {
        if self.facts.busy.contains_key(thing) || self.plan.begin.iter().any(|(t, _)| t == thing) {
            return;
        }
        match self.facts.failed.get(thing) {
            Some(failure) if self.facts.now_ms < failure.retry_ms => self.wake(failure.retry_ms),
            _ => self.plan.begin.push((thing.clone(), work)),
        }
    }

    fn wake(&mut self, at_ms: u64) {
        let wake = self.plan.wake_ms.get_or_insert(at_ms);
        *wake = (*wake).min(at_ms);
    }
}

fn observed(
    uid: &str,
    pool: &str,
    info: Option<&VolumeInfo>,
    state: VolumeState,
    reason: String,
) -> ObservedVolume {
    ObservedVolume {
        uid: uid.to_owned(),
        pool: pool.to_owned(),
        state: state.into(),
        state_reason: crate::observe::shorten(reason),
        size_bytes: info.map_or(0, |info| info.bytes),
        allocated_bytes: info.and_then(|info| info.allocated_bytes).unwrap_or_default(),
    }
}

mod seen;
mod snapshots;
#[cfg(test)]
mod tests;
