//! What is to be done about volumes and images, and what is reported of them: one pure function
//! of what the controller wants, what is in the pools, what is being done and what failed. All
//! rules stand here; [`super::task`] does what comes out, looks again, and asks again.
//!
//! - Before the first `Desired` nothing is made and nothing removed.
//! - A volume is made only where `create` says so: otherwise one that is missing is data lost,
//!   and a blank one in its place would hide that.
//! - A volume is removed only when `garbage` names it, and neither `volumes` nor an assigned
//!   domain does. One that is open is not removed either; the pool sees to that.
//! - An image is fetched once a pool, however many volumes wait for it.
//! - Nothing that is there is missing from the report: the controller takes that for "is gone".
//!   What lies in a pool that cannot be read is reported as FAILED instead.
//!
//! No record is kept of the volumes that were made here. The pool is the record: an unfinished
//! volume bears another name until it is whole, so that one that is there is one that was made,
//! and whether one that is missing ever was there is known to the controller (`create`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use drover_proto::agent::v1::{Garbage, ObservedImage, ObservedVolume, WantedVolume};
use drover_proto::v1::VolumeState;
use drover_storage::pool::{ImageId, ImageInfo, VolumeId, VolumeInfo};

use super::Progress;

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
    /// The uids of volumes that domains assigned to this node have.
    pub used: BTreeSet<String>,
}

impl WantedStorage {
    fn about<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a WantedVolume> {
        self.volumes.iter().filter(move |v| v.uid == name || v.image_digest == name)
    }

    /// Whether it says anything of the volume or image of this name.
    pub(super) fn names(&self, name: &str) -> bool {
        let mut garbage = self.garbage.iter();
        self.about(name).next().is_some()
            || garbage.any(|garbage| garbage.volume_uid == name || garbage.image_digest == name)
    }

    /// Whether it asks for the volume or image of this name in the same words.
    pub(super) fn asks_the_same(&self, before: &Self, name: &str) -> bool {
        self.about(name).eq(before.about(name))
    }
}

/// A volume or an image in a pool.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Thing {
    pub(super) pool: String,
    pub(super) id: Id,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Id {
    Volume(VolumeId),
    Image(ImageId),
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Image(id) => write!(f, "image {id}"),
        }
    }
}

impl Id {
    /// As the controller calls it.
    pub(super) fn name(self) -> String {
        match self {
            Self::Volume(id) => id.to_string(),
            Self::Image(id) => id.to_string(),
        }
    }
}

/// What is in a pool.
#[derive(Debug, Clone, Default)]
pub(super) struct Inventory {
    pub(super) volumes: BTreeMap<VolumeId, VolumeInfo>,
    pub(super) images: BTreeMap<ImageId, ImageInfo>,
}

/// A pool, as it was seen last.
#[derive(Debug, Clone, Default)]
pub(super) struct PoolSeen {
    /// `None` until it could be read.
    pub(super) inventory: Option<Inventory>,
    /// Why it cannot be used.
    pub(super) fault: Option<String>,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Work {
    /// An empty volume.
    Create { bytes: u64 },
    /// A volume with an image's content.
    Clone { image: ImageId, bytes: u64 },
    /// A larger volume.
    Grow { bytes: u64 },
    /// An image of this size (0: not known), from one of these agents.
    Fetch { sources: Vec<String>, bytes: u64 },
    /// No more of it.
    Delete,
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

/// Everything that a plan rests on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts<'a> {
    /// `None` before the first `Desired`.
    pub(super) wanted: Option<&'a WantedStorage>,
    pub(super) pools: &'a BTreeMap<String, PoolSeen>,
    pub(super) busy: &'a BTreeMap<Thing, Busy>,
    pub(super) failed: &'a BTreeMap<Thing, Failure>,
    pub(super) now_ms: u64,
}

/// What comes of it.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// To be begun, each thing at most once, in this order as far as the limits allow.
    pub(super) begin: Vec<(Thing, Work)>,
    /// Every volume that is here or shall be.
    pub(super) volumes: Vec<ObservedVolume>,
    /// Every image that is here, or may be.
    pub(super) images: Vec<ObservedImage>,
    /// When to ask again, if nothing changes before.
    pub(super) wake_ms: Option<u64>,
}

/// What to do, and what to say.
pub(super) fn plan(facts: Facts<'_>) -> Plan {
    let mut planner = Planner { facts, plan: Plan::default(), said: BTreeSet::new() };
    if let Some(wanted) = facts.wanted {
        // Before the volumes: what is to go is not taken for a mere stranger.
        let fetches = planner.wanted(wanted);
        planner.garbage(wanted, &fetches);
    }
    planner.others();
    planner.plan
}

/// Images that volumes wait for: whence, and how large.
type Fetches = BTreeMap<Thing, (Vec<String>, u64)>;

struct Planner<'a> {
    facts: Facts<'a>,
    plan: Plan,
    /// Volumes that are in the report already.
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
            return (VolumeState::Creating, "its pool has not been looked at yet".into());
        };
        if let Some(busy) = self.facts.busy.get(&thing) {
            return match busy.work {
                Work::Grow { .. } => (VolumeState::Ready, String::new()),
                Work::Delete => (VolumeState::Creating, "is being removed first".into()),
                _ => (VolumeState::Creating, busy.progress.say("copying the image")),
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
        if !wanted.create {
            return failed("its data is not there".into());
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
            let Some(seen) = self.facts.pools.get(&pool) else { continue };
            let fault = seen.fault.as_deref();
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
                }
            } else if let Ok(id) = garbage.image_digest.parse::<ImageId>() {
                let thing = Thing { pool, id: Id::Image(id) };
                let digest = garbage.image_digest.as_str();
                let needed = wanted.volumes.iter().any(|volume| {
                    volume.pool == thing.pool && volume.create && volume.image_digest == digest
                });
                if fault.is_some() || inventory.is_none() {
                    // Nor that this is.
                    let observed = ObservedImage {
                        digest: digest.to_owned(),
                        pool: thing.pool.clone(),
                        size_bytes: 0,
                    };
                    self.plan.images.push(observed);
                }
                let here = inventory.is_some_and(|inventory| inventory.images.contains_key(&id));
                if here && fault.is_none() && !needed && !fetches.contains_key(&thing) {
                    self.begin(&thing, Work::Delete);
                }
            }
        }
    }

    /// What is here, and nobody said that it shall be.
    fn others(&mut self) {
        for (pool, seen) in self.facts.pools {
            for (id, info) in seen.inventory.iter().flat_map(|inventory| &inventory.volumes) {
                let thing = Thing { pool: pool.clone(), id: Id::Volume(*id) };
                if self.said.contains(&thing) {
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

    fn info(&self, pool: &str, id: VolumeId) -> Option<&VolumeInfo> {
        self.facts.pools.get(pool)?.inventory.as_ref()?.volumes.get(&id)
    }

    /// Begins it, unless something is being done to it or its pause is not over.
    fn begin(&mut self, thing: &Thing, work: Work) {
        if self.facts.busy.contains_key(thing) || self.plan.begin.iter().any(|(t, _)| t == thing) {
            return;
        }
        match self.facts.failed.get(thing) {
            Some(failure) if self.facts.now_ms < failure.retry_ms => {
                let wake = self.plan.wake_ms.get_or_insert(failure.retry_ms);
                *wake = (*wake).min(failure.retry_ms);
            }
            _ => self.plan.begin.push((thing.clone(), work)),
        }
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

#[cfg(test)]
mod tests;
