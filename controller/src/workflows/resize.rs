//! More (or less) for a domain: disks grow and get other limits at once, vCPUs and memory change
//! with the next start.
//!
//! Room is promised with the greater of what it has and what it shall have, as both may be used.

use drover_proto::v1::{DiskResize, DomainState, OperationKind, OperationState, VolumeState};

use super::begin::{Begun, free_domain, hold, known_node, operation, reserve, wrong_state};
use super::content::not_saved;
use super::refusal::Refusal;
use super::reinstall::volume_at;
use super::step::{Context, Work, end, error};
use crate::model::{DomainId, DomainRecord, NodeId, VolumeRecord, is_at_rest, needs};
use crate::scheduler::{PoolNeeds, Resources, shortage};
use crate::store::{Txn, Versioned};

/// Growing a volume takes no time; its agent may be busy.
const GROW_WAIT_MS: i64 = 5 * 60_000;

/// What shall be; 0 leaves a figure as it is.
#[derive(Clone, Debug, Default)]
pub struct Resize {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes.
    pub memory_bytes: u64,
    /// Each disk at most once.
    pub disks: Vec<DiskResize>,
}

/// Changes what a domain is given.
///
/// # Errors
/// There is no such domain or disk; it is held, saved or between two states; a disk would shrink;
/// its node has no room.
pub fn resize_domain(cx: &Context<'_>, id: &DomainId, resize: &Resize) -> Result<Begun, Refusal> {
    let row = free_domain(cx, id)?;
    not_saved(&row.value)?;
    let rests = is_at_rest(&row.value);
    let runs = row.value.state() == DomainState::Running && row.value.migration.is_none();
    if !rests && !runs {
        let accepted = "only a domain that is RUNNING, STOPPED or FAILED is resized";
        return Err(wrong_state(id, &row.value, accepted));
    }
    let mut domain = row.value.clone();
    let spec = domain.spec.get_or_insert_default();
    // What it has already needs no next start.
    if resize.vcpus != 0 {
        domain.next_vcpus = if resize.vcpus == spec.vcpus { 0 } else { resize.vcpus };
    }
    if resize.memory_bytes != 0 {
        let same = resize.memory_bytes == spec.memory_bytes;
        domain.next_memory_bytes = if same { 0 } else { resize.memory_bytes };
    }
    if rests {
        take_next(&mut domain);
    }
    let (grown, more) = disks(cx, &mut domain, &resize.disks)?;

    let mut operation = operation(cx, OperationKind::ResizeDomain, id.name(), GROW_WAIT_MS);
    let mut txn = Txn::new();
    for (held, volume) in &grown {
        txn = txn.unchanged(held).put(volume);
    }
    let before = needs(&row.value);
    let after = needs(&domain);
    let grows = after.less(before);
    if grows != Resources::default() || !more.is_empty() {
        txn = room(cx, txn, &row.value, grows, &more)?;
    }
    if grown.is_empty() {
        end(&mut operation, OperationState::Succeeded, None, cx.now);
        let txn = txn.term_is(cx.term).unchanged(row).put(&domain).put(&operation);
        return Ok(Begun { txn, operation });
    }
    operation.status_message = format!("waits for nodes/{}", domain.node);
    Ok(hold(cx, txn, row, domain, operation))
}

/// The next start is now.
pub(super) fn take_next(domain: &mut DomainRecord) {
    let Some(spec) = &mut domain.spec else { return };
    if domain.next_vcpus != 0 {
        spec.vcpus = std::mem::take(&mut domain.next_vcpus);
    }
    if domain.next_memory_bytes != 0 {
        spec.memory_bytes = std::mem::take(&mut domain.next_memory_bytes);
    }
}

type Grown<'a> = Vec<(&'a Versioned<VolumeRecord>, VolumeRecord)>;

/// The volumes that grow, and by how much their pools are promised more.
fn disks<'a>(
    cx: &Context<'a>,
    domain: &mut DomainRecord,
    wanted: &[DiskResize],
) -> Result<(Grown<'a>, PoolNeeds), Refusal> {
    let (mut grown, mut more) = (Vec::new(), PoolNeeds::new());
    let Some(spec) = &mut domain.spec else { return Ok((grown, more)) };
    for (index, resize) in wanted.iter().enumerate() {
        let held = volume_at(cx, &spec.disks, &format!("disks[{index}].disk"), resize.disk)?;
        let Some(disk) = spec.disks.get_mut(resize.disk as usize) else { continue };
        if let Some(limits) = resize.limits {
            disk.limits = (limits != Default::default()).then_some(limits);
        }
        let has = held.value.size_bytes;
        if resize.size_bytes == 0 || resize.size_bytes == has {
            continue;
        }
        if resize.size_bytes < has {
            return Err(Refusal::Invalid {
                field: format!("disks[{index}].size_bytes"),
                value: resize.size_bytes.to_string(),
                expected: format!(
                    "at least {has}, which volumes/{} has: a volume never shrinks",
                    held.value.id
                ),
            });
        }
        if held.value.state() == VolumeState::Failed {
            let name = format!("volumes/{}", held.value.id);
            return Err(Refusal::Precondition {
                message: format!(
                    "{name} is FAILED ({}): it cannot grow; ReinstallDomain makes it anew",
                    held.value.state_reason
                ),
                subject: name,
                reason: "WRONG_STATE",
            });
        }
        disk.size_bytes = resize.size_bytes;
        *more.entry(held.value.pool.clone()).or_default() += resize.size_bytes - has;
        grown.push((held, VolumeRecord { size_bytes: resize.size_bytes, ..held.value.clone() }));
    }
    Ok((grown, more))
}

/// Promises more on the node that the domain is on.
///
/// # Errors
/// It has no room.
pub(super) fn room(
    cx: &Context<'_>,
    txn: Txn,
    domain: &DomainRecord,
    needs: Resources,
    disks: &PoolNeeds,
) -> Result<Txn, Refusal> {
    let id = NodeId::trusted(&domain.node);
    let node = known_node(cx, &id)?;
    let name = format!("domains/{}", domain.id);
    if cx.is_lost(&domain.node) {
        return Err(Refusal::Precondition {
            message: format!("{name} is on {}, which is lost: wait until it is back", id.name()),
            subject: name,
            reason: "NODE_LOST",
        });
    }
    let view = cx.world.cluster_view(cx.observed);
    let lacks = view.nodes.get(&id).and_then(|node| shortage(node, needs, disks, None));
    match lacks {
        Some(reason) => Err(Refusal::NoRoomThere { name, node: id.name(), reason }),
        None => Ok(reserve(txn, node)),
    }
}

/// Done when the node says that the volumes have grown.
pub(super) fn step(work: &mut Work<'_>) {
    let node = work.domain.node.clone();
    let (world, row, observed) = (work.cx.world, work.row, work.cx.observed);
    // One that is not there does not grow, and was not asked to.
    let there = |volume: &&Versioned<VolumeRecord>| volume.value.state() != VolumeState::Failed;
    let mut waits = world.volumes_of(&row.value).filter(there).filter_map(|volume| {
        let said = observed.volume(&node, &volume.value.uid);
        let has = said.map_or(0, |said| said.size_bytes);
        (has < volume.value.size_bytes).then_some((volume, said))
    });
    let Some((volume, said)) = waits.next() else {
        return work.end(OperationState::Succeeded, None);
    };
    let name = format!("volumes/{}", volume.value.id);
    let reason = said.map_or("", |said| said.state_reason.as_str());
    if !reason.is_empty() && volume.value.state() == VolumeState::Ready {
        let message = format!("nodes/{node}: {name}: {reason} (its agent goes on trying)");
        return work.end(OperationState::Failed, Some(error("VOLUME_FAILED", message)));
    }
    if work.is_overdue(0) {
        let message = format!(
            "nodes/{node} did not say that {name} has grown; it grows when its agent is back"
        );
        return work.end(OperationState::Failed, Some(error("DEADLINE_EXCEEDED", message)));
    }
    let lost = if work.cx.is_lost(&node) { " (lost)" } else { "" };
    work.status(format!("nodes/{node}{lost} grows {name}"));
}
