//! Volumes, images, pools and what is to be removed: rows follow what agents report.
//!
//! A volume's data is on the node of the domain that has it, or on the one that its row names. Its row says `CREATING` until the
//! agent has made it, and only until then may the agent make it: a volume that is missing later
//! has lost its data, and must not come back blank. What shall be gone from a node is a row of
//! its own ([`GarbageRecord`]), written together with what made it garbage, and it stays until
//! a report comes without it: nothing is ever removed because something else forgot it.
//!
//! A pool that several nodes share is one pool: which ones are is in the nodes' rows
//! (`shared_pools`), as their agents read it from the pools themselves. What lies in it is there
//! for all of them, so no node's having it makes it a copy, and whoever is there may remove it.

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::agent::v1::ObservedPool;
use drover_proto::v1::{Disk, DomainState, EventSeverity, PoolState, VolumeState};

use super::plug;
use super::refusal::Refusal;
use super::step::{Context, Step, millis, timestamp};
use crate::model::{
    DomainId, DomainRecord, GarbageRecord, ImageId, ImageRecord, NodeId, NodeRecord, VolumeId,
    VolumeRecord, garbage, serial,
};
use crate::scheduler::{NodeView, PoolNeeds};
use crate::store::{Txn, Versioned};

/// Sizes of volumes are multiples of it.
const MIB: u64 = 1 << 20;

/// Everything that the last reports change. The volumes of domains that are `busy` in this pass are
/// looked at in the next one.
pub(super) fn steps(cx: &Context<'_>, busy: &BTreeSet<&DomainId>) -> Vec<Step> {
    let mut steps = Vec::new();
    // The volumes of one that is being deleted go with its own step.
    let stay = |row: &Versioned<DomainRecord>| row.value.state() != DomainState::Deleting;
    let domains = cx.world.domains.iter().filter(|(id, row)| !busy.contains(id) && stay(row));
    for (_, row) in domains {
        let (node, subject) = (&row.value.node, format!("domains/{}", row.value.id));
        let volumes = cx.world.volumes_of(&row.value);
        steps.extend(volumes.filter_map(|v| volume(cx, node, &subject, v)));
    }
    for row in cx.world.nodes.keys().flat_map(|node| cx.world.left_on(node)) {
        let subject = format!("volumes/{}", row.value.id);
        steps.extend(volume(cx, &row.value.node, &subject, row));
    }
    steps.extend(strays(cx));
    let garbage = cx.world.garbage.values();
    steps.extend(garbage.filter_map(|row| removed(cx, row).or_else(|| passed_on(cx, row))));
    steps.extend(cx.world.images.values().filter_map(|row| image(cx, row)));
    steps
}

/// What the node on which it lies says of a volume; events are about `subject`.
fn volume(
    cx: &Context<'_>,
    node: &str,
    subject: &str,
    row: &Versioned<VolumeRecord>,
) -> Option<Step> {
    let said = cx.observed.volume(node, &row.value.uid)?;
    let mut volume = row.value.clone();
    match (said.state(), volume.state()) {
        (VolumeState::Ready, VolumeState::Ready) => return None,
        (VolumeState::Ready, _) => {
            volume.set_state(VolumeState::Ready);
            volume.state_reason.clear();
        }
        // What is being made stays so: its agent may be told to try again.
        (VolumeState::Failed, VolumeState::Ready | VolumeState::Failed) => {
            volume.set_state(VolumeState::Failed);
            volume.state_reason.clone_from(&said.state_reason);
        }
        _ => return None,
    }
    if volume == row.value {
        return None;
    }
    let mut txn = Txn::new().term_is(cx.term).unchanged(row).put(&volume);
    if volume.state() == VolumeState::Failed {
        let message = format!("volumes/{}: {}", volume.id, volume.state_reason);
        let subject = subject.to_owned();
        txn = txn.put(&cx.event(EventSeverity::Error, subject, "VOLUME_FAILED", message));
    }
    Some(Step { subject: format!("volumes/{}", volume.id), txn })
}

/// Copies on nodes where the domain neither is nor goes: of a node that was forgotten and is known
/// again, for one.
fn strays(cx: &Context<'_>) -> Vec<Step> {
    let mut volumes = BTreeMap::new();
    for row in cx.world.domains.values().filter(|row| row.value.migration.is_none()) {
        let of_domain = cx.world.volumes_of(&row.value);
        volumes.extend(of_domain.map(|volume| (volume.value.uid.as_str(), (row, &volume.value))));
    }
    let mut steps = Vec::new();
    for (node, seen) in &cx.observed.nodes {
        if !seen.reported || !cx.world.nodes.contains_key(node) {
            continue;
        }
        for uid in seen.volumes.keys() {
            let Some((row, volume)) = volumes.get(uid.as_str()) else { continue };
            let pool = (volume.pool.as_str(), cx.world.shared_uid(node.as_str(), &volume.pool));
            let listed = garbage(node.as_str(), pool, uid, "");
            let stray = node.as_str() != row.value.node
                && !cx.world.is_shared(&volume.pool, node.as_str(), &row.value.node)
                && seen.taken_in >= row.mod_revision
                && !cx.world.garbage.contains_key(&listed.id);
            if stray {
                // The row need not stay as it is: nobody is sent to a node that reports a copy.
                let txn = Txn::new().term_is(cx.term).put(&listed);
                steps.push(Step { subject: node.name(), txn });
            }
        }
    }
    steps
}

/// What lies in a shared pool is removed by another node when the one that was told is away. The
/// row stays nevertheless: whoever is away may be about to make it, and must not be forgotten.
fn passed_on(cx: &Context<'_>, row: &Versioned<GarbageRecord>) -> Option<Step> {
    let GarbageRecord { id, node, shared_uid, passed_on, .. } = &row.value;
    if *passed_on || shared_uid.is_empty() || !cx.is_lost(node) {
        return None;
    }
    let mut ready = cx.world.sharers(shared_uid).filter(|node| !cx.is_lost(node.as_str()));
    let to = cx.node(ready.next()?.as_str())?;
    // There it may have another id.
    let pool = to.value.shared_pools.iter().find(|(_, uid)| *uid == shared_uid)?.0;
    let what = id.strip_prefix(&format!("{node}/"))?;
    let mut other = row.value.clone();
    other.id = format!("{}/{what}", to.value.id);
    other.node.clone_from(&to.value.id);
    other.pool.clone_from(pool);
    let txn = Txn::new().term_is(cx.term).unchanged(row);
    let told = GarbageRecord { passed_on: true, ..row.value.clone() };
    let txn = txn.put(&told).put(&other);
    Some(Step { subject: NodeId::trusted(&other.node).name(), txn })
}

/// It is gone, or there is no such node any more (and nobody else who could remove it).
fn removed(cx: &Context<'_>, row: &Versioned<GarbageRecord>) -> Option<Step> {
    let garbage = &row.value;
    let node = NodeId::trusted(&garbage.node);
    let may_come = garbage.keep_until.as_ref().is_some_and(|until| cx.now.wall_ms < millis(until));
    let seen = cx.observed.nodes.get(&node);
    let forgotten = !cx.world.nodes.contains_key(&node)
        && (garbage.passed_on || cx.world.sharers(&garbage.shared_uid).next().is_none());
    let gone = forgotten
        || !may_come && seen.is_some_and(|seen| seen.is_without(garbage, row.mod_revision));
    let txn = || Txn::new().term_is(cx.term).unchanged(row);
    gone.then(|| Step {
        subject: node.name(),
        txn: txn().delete::<GarbageRecord>(garbage.id.clone()),
    })
}

/// Where copies lie. A node that has not reported is taken at its last word.
fn image(cx: &Context<'_>, row: &Versioned<ImageRecord>) -> Option<Step> {
    let mut image = row.value.clone();
    image.nodes.retain(|node| cx.world.nodes.contains_key(&NodeId::trusted(node)));
    for (id, seen) in cx.observed.nodes.iter().filter(|(_, seen)| seen.reported) {
        let has = seen.images.iter().any(|held| held.digest == image.digest);
        let listed = image.nodes.iter().any(|node| node == id.as_str());
        match (has, listed) {
            (true, false) if cx.world.nodes.contains_key(id) => {
                image.nodes.push(id.as_str().to_owned());
            }
            (false, true) => image.nodes.retain(|node| node != id.as_str()),
            _ => {}
        }
    }
    image.nodes.sort();
    (image != row.value).then(|| Step {
        subject: format!("images/{}", image.id),
        txn: Txn::new().term_is(cx.term).unchanged(row).put(&image),
    })
}

/// A pool that becomes full or fails, or is well again, is an event.
pub(super) fn pools(cx: &Context<'_>, id: &NodeId, row: &Versioned<NodeRecord>) -> Option<Step> {
    let seen = cx.observed.nodes.get(id).filter(|seen| seen.reported)?;
    let troubled: Vec<String> = seen
        .pools
        .values()
        .filter(|pool| pool.state() != PoolState::Ready)
        .map(|pool| pool.id.clone())
        .collect();
    let held = &row.value.troubled_pools;
    let uids = seen.pools.values().filter(|pool| !pool.shared_uid.is_empty());
    let uids: BTreeMap<_, _> =
        uids.map(|pool| (pool.id.clone(), pool.shared_uid.clone())).collect();
    // Before the first look at them a node has none.
    let known = seen.pools.is_empty() || uids == row.value.shared_pools;
    if *held == troubled && known {
        return None;
    }
    let mut node = row.value.clone();
    node.troubled_pools.clone_from(&troubled);
    if !known {
        node.shared_pools = uids;
    }
    let mut txn = Txn::new().term_is(cx.term).unchanged(row).put(&node);
    for pool in troubled.iter().filter(|pool| !held.contains(pool)) {
        let message = seen.pools.get(pool).map(trouble).unwrap_or_default();
        txn = txn.put(&cx.event(EventSeverity::Warning, id.name(), "POOL_TROUBLED", message));
    }
    for pool in held.iter().filter(|pool| !troubled.contains(pool)) {
        let message = format!("pool {pool} takes volumes again");
        txn = txn.put(&cx.event(EventSeverity::Info, id.name(), "POOL_READY", message));
    }
    Some(Step { subject: id.name(), txn })
}

fn trouble(pool: &ObservedPool) -> String {
    match pool.state() {
        PoolState::Filling => {
            let percent = 100.0 * pool.used_bytes as f64 / (pool.size_bytes as f64).max(1.0);
            format!("pool {} is {percent:.0} % full: nothing new is placed in it", pool.id)
        }
        _ => format!("pool {}: {}", pool.id, pool.state_reason),
    }
}

/// The volumes of a domain that is to be made; their pools are as they were asked for.
///
/// # Errors
/// An image is not known, or does not fit the size; the names are taken or too long.
pub(super) fn new_volumes(
    cx: &Context<'_>,
    domain: &DomainId,
    disks: &[Disk],
) -> Result<Vec<VolumeRecord>, Refusal> {
    let make = |(index, disk): (usize, &Disk)| {
        let field = |name: &str| format!("domain.spec.disks[{index}].{name}");
        let (image, size_bytes) = source(cx, field, &disk.image, disk.size_bytes)?;
        let id = format!("{domain}-{index}");
        if VolumeId::parse(&id).is_err() {
            return Err(Refusal::Invalid {
                field: "domain.name".into(),
                value: domain.name(),
                expected: "an id of at most 61 characters for a domain with disks".into(),
            });
        }
        if cx.world.volumes.contains_key(&id) {
            return Err(Refusal::AlreadyExists { name: format!("volumes/{id}") });
        }
        let uid = cx.ids.uuid();
        Ok(VolumeRecord {
            id,
            serial: serial(&uid),
            uid,
            state: VolumeState::Creating.into(),
            domain: domain.as_str().to_owned(),
            pool: disk.pool.clone(),
            size_bytes,
            image: image.map(|image| image.id.clone()).unwrap_or_default(),
            image_digest: image.map(|image| image.digest.clone()).unwrap_or_default(),
            image_size_bytes: image.map_or(0, |image| image.size_bytes),
            create_time: Some(timestamp(cx.now.wall_ms)),
            slot: plug::slot_at(index),
            ..VolumeRecord::default()
        })
    };
    disks.iter().enumerate().map(make).collect()
}

/// What a new volume is made of, if of anything, and how large it is: the image's size when none
/// is given. `field` is where a name stands in the request.
///
/// # Errors
/// The image is not known, or does not fit the size; a blank one has no size.
pub(super) fn source<'a>(
    cx: &Context<'a>,
    field: impl Fn(&str) -> String,
    image: &str,
    size_bytes: u64,
) -> Result<(Option<&'a ImageRecord>, u64), Refusal> {
    let image = match image {
        "" => None,
        name => {
            let id = ImageId::from_name(name).map(|id| id.as_str().to_owned());
            let row = id.ok().and_then(|id| cx.world.images.get(&id));
            let row = row.ok_or_else(|| Refusal::NotFound { name: name.to_owned() })?;
            Some(&row.value)
        }
    };
    let least = image.map_or(0, |image| image.size_bytes.next_multiple_of(MIB));
    let size = if size_bytes == 0 { least } else { size_bytes };
    if size < least || size == 0 {
        return Err(Refusal::Invalid {
            field: field("size_bytes"),
            value: size_bytes.to_string(),
            expected: match image {
                Some(image) => format!("at least {least}, the size of images/{}", image.id),
                None => "a size: a blank disk has none of its own".into(),
            },
        });
    }
    Ok((image, size))
}

/// By pool.
pub(super) fn needs(volumes: &[VolumeRecord]) -> PoolNeeds {
    let mut needs = PoolNeeds::new();
    for volume in volumes {
        *needs.entry(volume.pool.clone()).or_default() += volume.size_bytes;
    }
    needs
}

/// On a node that was chosen, "the first pool" has a name.
pub(super) fn settle(volumes: &mut [VolumeRecord], disks: &mut [Disk], node: &NodeView) {
    for (volume, disk) in volumes.iter_mut().zip(disks) {
        volume.pool = node.pool_id(&volume.pool).unwrap_or_default();
        disk.volume = format!("volumes/{}", volume.id);
        disk.pool.clone_from(&volume.pool);
        disk.size_bytes = volume.size_bytes;
    }
}

/// Nodes that have, or have yet to remove, an earlier copy of one of the domain's volumes: a new one
/// would be removed in its place, or the old one taken for it.
pub(super) fn unclean(cx: &Context<'_>, domain: &DomainRecord) -> BTreeMap<NodeId, String> {
    let mut nodes = BTreeMap::new();
    for volume in cx.world.volumes_of(domain) {
        let rows = cx.world.garbage.values().filter(|row| row.value.volume_uid == volume.value.uid);
        for row in rows {
            let why = format!("has yet to remove an earlier copy of volumes/{}", volume.value.id);
            // From a shared pool it is removed under everybody's hands.
            let sharers = cx.world.sharers(&row.value.shared_uid).cloned();
            let others = sharers.filter(|_| !row.value.shared_uid.is_empty());
            nodes.extend(others.map(|node| (node, why.clone())));
            nodes.insert(NodeId::trusted(&row.value.node), why);
        }
        for (node, seen) in &cx.observed.nodes {
            let shared = cx.world.is_shared(&volume.value.pool, node.as_str(), &domain.node);
            if seen.volumes.contains_key(&volume.value.uid) && !shared {
                let why = format!("has an earlier copy of volumes/{}", volume.value.id);
                nodes.entry(node.clone()).or_insert(why);
            }
        }
    }
    nodes
}
