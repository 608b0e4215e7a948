//! Volumes that no domain has: made on a node, given to a domain of that node and taken back,
//! deleted by name only. [`plug`](super::plug) waits for the guest of a domain that runs.
//!
//! A domain's volume lies where the domain is, and its row names no node. One that no domain has
//! lies on the node that its row names, is in what that node is told, and counts as promised
//! there.

use drover_proto::v1::{
    Disk, DiskLimits, EventSeverity, OperationKind, OperationState, VolumeState,
};

use super::begin::{
    Begun, FILL_WAIT_MS, busy, check_etag, known_domain, known_node, operation, reserve,
};
use super::content::discard;
use super::refusal::Refusal;
use super::step::{Context, Step, end, error, is_overdue, timestamp};
use super::{plug, storage};
use crate::model::{
    DomainId, DomainRecord, ImageRecord, NodeId, OperationRecord, VolumeId, VolumeRecord,
    is_rescued, serial,
};
use crate::scheduler::{ClusterView, PlaceOptions, PoolNeeds, Resources, place};
use crate::store::{Txn, Versioned};

/// A guest has eight, and one is the seed.
const DISKS_MAX: usize = 7;

/// A volume to be made.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// Its id.
    pub id: VolumeId,
    /// A pool's id; the node's first when empty.
    pub pool: String,
    /// The image's size when 0.
    pub size_bytes: u64,
    /// An image's name; blank when empty.
    pub image: String,
    /// This node or none.
    pub only: Option<NodeId>,
}

/// Places a volume and makes its row.
///
/// # Errors
/// The name is taken, the image is not known or larger, no node has room, the node asked for does
/// not exist.
pub fn create_volume(cx: &Context<'_>, new: &NewVolume) -> Result<Begun, Refusal> {
    let NewVolume { id, pool, only, .. } = new;
    if cx.world.volumes.contains_key(id.as_str()) {
        return Err(Refusal::AlreadyExists { name: id.name() });
    }
    if let Some(only) = only {
        known_node(cx, only)?;
    }
    let field = |name: &str| format!("volume.{name}");
    let (image, size_bytes) = storage::source(cx, field, &new.image, new.size_bytes)?;
    let disks = PoolNeeds::from([(pool.clone(), size_bytes)]);
    let view = cx.world.cluster_view(cx.observed);
    let only = roomiest(&view, only.as_ref(), pool, &disks).or_else(|| only.clone());
    let options = PlaceOptions { only, disks, ..PlaceOptions::default() };
    let needs = Resources::default();
    let decision =
        place(&view, needs, &options).map_err(|no_room| Refusal::NoRoom { needs, no_room })?;
    let node = known_node(cx, &decision.node)?;
    let pool = view.nodes.get(&decision.node).and_then(|node| node.pool_id(pool));

    let uid = cx.ids.uuid();
    let volume = VolumeRecord {
        id: id.as_str().to_owned(),
        serial: serial(&uid),
        uid,
        state: VolumeState::Creating.into(),
        pool: pool.unwrap_or_default(),
        size_bytes,
        image: image.map(|image| image.id.clone()).unwrap_or_default(),
        image_digest: image.map(|image| image.digest.clone()).unwrap_or_default(),
        image_size_bytes: image.map_or(0, |image| image.size_bytes),
        create_time: Some(timestamp(cx.now.wall_ms)),
        node: decision.node.as_str().to_owned(),
        ..VolumeRecord::default()
    };
    let mut operation = operation(cx, OperationKind::CreateVolume, id.name(), FILL_WAIT_MS);
    operation.status_message = format!("{} makes it in pool {}", decision.node.name(), volume.pool);
    let message = format!("on {}, pool {}", decision.node.name(), volume.pool);
    let event = cx.event(EventSeverity::Info, id.name(), "VOLUME_CREATED", message);
    let mut txn = Txn::new().term_is(cx.term).absent::<VolumeRecord>(id.as_str());
    if let Some(image) = image {
        txn = txn.present::<ImageRecord>(image.id.clone());
    }
    let txn = reserve(txn.put(&volume).put(&operation).put(&event), node);
    Ok(Begun { txn, operation })
}

/// The node with most room in the pool, of those that can take it.
fn roomiest(
    view: &ClusterView,
    only: Option<&NodeId>,
    pool: &str,
    disks: &PoolNeeds,
) -> Option<NodeId> {
    let asked = view.nodes.keys().filter(|id| only.is_none_or(|only| only == *id));
    let fits = asked.filter_map(|id| {
        let this = PlaceOptions {
            only: Some(id.clone()),
            disks: disks.clone(),
            ..PlaceOptions::default()
        };
        place(view, Resources::default(), &this).ok()?;
        let node = view.nodes.get(id)?;
        let pool = node.pools.get(&node.pool_id(pool)?)?;
        Some((pool.capacity_bytes.saturating_sub(pool.promised_bytes), id))
    });
    // Of equal ones the first, as everywhere.
    let best = fits.max_by(|(a, a_id), (b, b_id)| a.cmp(b).then_with(|| b_id.cmp(a_id)));
    best.map(|(_, id)| id.clone())
}

/// Removes a volume that no domain has.
///
/// # Errors
/// There is none, it has changed, it is being made, or a domain has it.
pub fn delete_volume(cx: &Context<'_>, id: &VolumeId, etag: &str) -> Result<Txn, Refusal> {
    let row = known(cx, id)?;
    check_etag(&id.name(), etag, row.mod_revision)?;
    free(cx, id, row)?;
    let event = cx.event(EventSeverity::Info, id.name(), "VOLUME_DELETED", String::new());
    let txn = Txn::new().term_is(cx.term).put(&event);
    let node = &row.value.node;
    if cx.node(node).is_none() {
        return Ok(txn.unchanged(row).delete::<VolumeRecord>(id.as_str()));
    }
    Ok(discard(cx, txn, node, row))
}

/// What a disk is to the domain that gets it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attached {
    /// The guest may not write to it.
    pub read_only: bool,
    /// What the guest may ask of it, checked.
    pub limits: Option<DiskLimits>,
}

/// Gives a volume to a domain of its node that is at rest or runs, as its last disk.
///
/// # Errors
/// There is no such volume or domain; it has changed, is not READY, or a domain has it; the domain
/// is held, between two states, on another node, or has all the disks that it can have.
pub fn attach_volume(
    cx: &Context<'_>,
    id: &VolumeId,
    domain: &DomainId,
    how: &Attached,
    etag: &str,
) -> Result<Txn, Refusal> {
    let row = known(cx, id)?;
    check_etag(&id.name(), etag, row.mod_revision)?;
    let refuse =
        |reason, message| Err(Refusal::Precondition { subject: id.name(), reason, message });
    known_domain(cx, domain)?;
    free(cx, id, row)?;
    if row.value.state() != VolumeState::Ready {
        let message = format!("{} has failed: {}", id.name(), row.value.state_reason);
        return refuse("VOLUME_NOT_READY", message);
    }
    let (owner, runs) = plug::owner(cx, domain)?;
    let (here, there) = (&row.value.node, &owner.value.node);
    if here != there && !cx.world.is_shared(&row.value.pool, here, there) {
        let message = format!(
            "{} lies on nodes/{here}, and {} on nodes/{there}: migrate the {}domain to \
             nodes/{here} first",
            id.name(),
            domain.name(),
            if runs { "" } else { "stopped " }
        );
        return refuse("OTHER_NODE", message);
    }
    let most = DISKS_MAX - usize::from(is_rescued(&owner.value));
    let mut record = owner.value.clone();
    let disks = &mut record.spec.get_or_insert_default().disks;
    if disks.len() >= most {
        let message = format!("{} has {} disks: no more fit", domain.name(), disks.len());
        return refuse("TOO_MANY_DISKS", message);
    }
    let mut volume = row.value.clone();
    disks.push(Disk {
        volume: id.name(),
        pool: volume.pool.clone(),
        size_bytes: volume.size_bytes,
        image: match volume.image.as_str() {
            "" => String::new(),
            image => format!("images/{image}"),
        },
        read_only: how.read_only,
        limits: how.limits,
    });
    domain.as_str().clone_into(&mut volume.domain);
    volume.node.clear();
    volume.slot = plug::free_slot(cx, &owner.value);
    if runs {
        return Ok(plug::begin(cx, OperationKind::AttachVolume, (row, volume), owner, record));
    }
    Ok(written(cx, row, &volume, owner, &record, "VOLUME_ATTACHED"))
}

/// Takes a volume from its domain, which is at rest or runs; it stays on the node.
///
/// # Errors
/// There is none, it has changed, no domain has it, the domain is held or between two states, or it
/// is the disk that the others are counted from, or one that stays while the guest runs.
pub fn detach_volume(cx: &Context<'_>, id: &VolumeId, etag: &str) -> Result<Txn, Refusal> {
    let row = known(cx, id)?;
    check_etag(&id.name(), etag, row.mod_revision)?;
    let refuse =
        |reason, message| Err(Refusal::Precondition { subject: id.name(), reason, message });
    if row.value.domain.is_empty() {
        return refuse("NOT_ATTACHED", format!("no domain has {}", id.name()));
    }
    let domain = DomainId::trusted(&row.value.domain);
    let (owner, runs) = plug::owner(cx, &domain)?;
    let mut record = owner.value.clone();
    let disks = &mut record.spec.get_or_insert_default().disks;
    let name = id.name();
    let Some(place) = disks.iter().position(|disk| disk.volume == name) else {
        let message =
            format!("{name} is not one of {}'s own disks: end the rescue instead", domain.name());
        return refuse("NOT_A_DISK", message);
    };
    if runs {
        plug::may_go(&owner.value, &row.value, place)?;
    }
    if place == 0 && disks.len() > 1 {
        let message =
            format!("{name} is the first disk of {}: detach the others first", domain.name());
        return refuse("FIRST_DISK", message);
    }
    let mut volume = row.value.clone();
    if runs {
        volume.detaching = true;
        return Ok(plug::begin(cx, OperationKind::DetachVolume, (row, volume), owner, record));
    }
    disks.remove(place);
    volume.slot = 0;
    volume.domain.clear();
    volume.node.clone_from(&owner.value.node);
    Ok(written(cx, row, &volume, owner, &record, "VOLUME_DETACHED"))
}

fn written(
    cx: &Context<'_>,
    row: &Versioned<VolumeRecord>,
    volume: &VolumeRecord,
    owner: &Versioned<DomainRecord>,
    domain: &DomainRecord,
    reason: &str,
) -> Txn {
    let (subject, message) = (format!("domains/{}", domain.id), format!("volumes/{}", volume.id));
    let event = cx.event(EventSeverity::Info, subject, reason, message);
    let txn = Txn::new().term_is(cx.term).unchanged(row).put(volume);
    txn.unchanged(owner).put(domain).put(&event)
}

fn known<'a>(cx: &Context<'a>, id: &VolumeId) -> Result<&'a Versioned<VolumeRecord>, Refusal> {
    let row = cx.world.volumes.get(id.as_str());
    row.ok_or_else(|| Refusal::NotFound { name: id.name() })
}

/// No domain has it, and it is not being made.
fn free(cx: &Context<'_>, id: &VolumeId, row: &Versioned<VolumeRecord>) -> Result<(), Refusal> {
    if !row.value.domain.is_empty() {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "VOLUME_IN_USE",
            message: format!(
                "{} belongs to domains/{}: detach it first",
                id.name(),
                row.value.domain
            ),
        });
    }
    let name = id.name();
    let makes = cx.world.operations.values().map(|row| &row.value);
    let mut makes = makes.filter(|op| op.kind() == OperationKind::CreateVolume);
    match makes.find(|op| op.target == name) {
        Some(held) => Err(busy(cx, name, &held.id)),
        None => Ok(()),
    }
}

/// The volume that an operation makes, if it is such a one.
pub(super) fn made_by<'a>(
    cx: &Context<'a>,
    operation: &OperationRecord,
) -> Option<&'a Versioned<VolumeRecord>> {
    let id = VolumeId::from_name(&operation.target).ok()?;
    cx.world.volumes.get(id.as_str())
}

/// Operations that make a volume end with it, or without it.
pub(super) fn steps(cx: &Context<'_>) -> Vec<Step> {
    let rows = cx.world.operations.values();
    let makes = rows.filter(|row| row.value.kind() == OperationKind::CreateVolume);
    makes.filter_map(|row| making(cx, row)).collect()
}

fn making(cx: &Context<'_>, row: &Versioned<OperationRecord>) -> Option<Step> {
    let volume = made_by(cx, &row.value)?;
    let node = &volume.value.node;
    let mut operation = row.value.clone();
    let txn = Txn::new().term_is(cx.term).unchanged(row);
    let ends = |txn, operation: &OperationRecord| {
        Some(Step { subject: operation.target.clone(), txn: Txn::put(txn, operation) })
    };
    if volume.value.state() != VolumeState::Creating {
        end(&mut operation, OperationState::Succeeded, None, cx.now);
        return ends(txn, &operation);
    }
    let said = cx.observed.volume(node, &volume.value.uid);
    let why = match said.map(|said| said.state()) {
        // Its row is about to say so.
        Some(VolumeState::Ready) => return None,
        _ if operation.cancel_requested => error("CANCELLED", "cancelled on request"),
        Some(VolumeState::Failed) if cx.observed.knows(node, volume.mod_revision) => {
            let why = said.map_or("", |said| said.state_reason.as_str());
            error("VOLUME_FAILED", format!("nodes/{node}: {why}"))
        }
        _ if cx.is_lost(node) => error("NODE_LOST", format!("nodes/{node} is lost")),
        _ if is_overdue(&operation, cx.now, 0) => {
            error("DEADLINE_EXCEEDED", format!("nodes/{node} has not made it in time"))
        }
        _ => return None,
    };
    let state = match why.reason.as_str() {
        "CANCELLED" => OperationState::Cancelled,
        _ => OperationState::Failed,
    };
    let event = cx.event(
        EventSeverity::Warning,
        operation.target.clone(),
        "VOLUME_FAILED",
        why.message.clone(),
    );
    end(&mut operation, state, Some(why), cx.now);
    let txn = match cx.node(node) {
        Some(_) => discard(cx, txn, node, volume),
        None => txn.unchanged(volume).delete::<VolumeRecord>(volume.value.id.clone()),
    };
    ends(txn.put(&event), &operation)
}
