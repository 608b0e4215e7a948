//! A running domain's memory and devices on a volume, and back.
//!
//! ```text
//!            begin: volume {id}-memory                     agent: exit reason SAVED
//!  RUNNING ─────────────────────────► RUNNING, power SAVED ────────────────────────► SAVED
//!     ▲ the volume goes                  │ cannot, cancel, deadline: power RUNNING,    │
//!     │ when it runs under               │ a new epoch                                │ start:
//!     └──────────── STARTING or RUNNING ◄┴────────────────────────────────────────────┘ a new epoch
//! ```
//!
//! One who gives a save up cannot know whether it is over already. So the volume stays, under a new
//! epoch, until the owner says that it RUNS under that: a guest that is being saved is PAUSED
//! to an agent that has taken the epoch on. Had the guest been saved by then, it goes on from the
//! volume, as with any start. What was saved is used once: its VMM sees to that, and boots otherwise.

use drover_proto::v1::{
    DomainState, EventSeverity, OperationError, OperationKind, OperationState, PowerState,
    VolumeState,
};

use super::begin::{Begun, START_WAIT_MS, free_domain, hold, operation, wrong_state};
use super::content::{MIB, Source, new_volume};
use super::refusal::Refusal;
use super::resize::room;
use super::step::{Context, Work, error};
use crate::model::{DomainId, DomainRecord, NodeId, has_memory};
use crate::scheduler::{PoolNeeds, Resources};
use crate::store::Txn;

/// Beyond the memory: devices, and the format's own.
const STATE_BYTES: u64 = 64 * MIB;
/// Memory is written and read at this rate at least, bytes a second.
const RATE_MIN: u64 = 10 << 20;

/// Writes a running domain's state to a volume and ends it.
///
/// # Errors
/// There is no such domain; it is held, or does not run; its node has no pool or no room.
pub fn save_domain(cx: &Context<'_>, id: &DomainId) -> Result<Begun, Refusal> {
    let row = free_domain(cx, id)?;
    let domain = &row.value;
    let runs = domain.state() == DomainState::Running
        && domain.migration.is_none()
        && domain.desired_power() == PowerState::Running;
    if !runs {
        return Err(wrong_state(id, domain, "only a domain that is RUNNING is saved"));
    }
    if has_memory(domain) {
        let accepted = "what it was saved to before is about to be removed: try again";
        return Err(wrong_state(id, domain, accepted));
    }
    let pool = match cx.world.disks_of(domain).next() {
        Some((_, first)) => Some(first.value.pool.clone()),
        None => {
            let view = cx.world.cluster_view(cx.observed);
            view.nodes.get(&NodeId::trusted(&domain.node)).and_then(|node| node.pool_id(""))
        }
    };
    let Some(pool) = pool else {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "NO_POOL",
            message: format!(
                "nodes/{} has no pool that {} could be saved to: vpsctl pool list",
                domain.node,
                id.name()
            ),
        });
    };
    let size_bytes = memory_bytes(domain).next_multiple_of(MIB) + STATE_BYTES;
    let more = PoolNeeds::from([(pool.clone(), size_bytes)]);
    let txn = room(cx, Txn::new(), domain, Resources::default(), &more)?;
    let volume = format!("{id}-memory");
    let place = (pool.as_str(), size_bytes);
    let (txn, volume) = new_volume(cx, txn, domain, &volume, place, Source::Blank)?;
    let mut domain = domain.clone();
    domain.memory_volume.clone_from(&volume.id);
    domain.set_desired_power(PowerState::Saved);
    let wait_ms = wait_ms(&domain);
    let mut operation = operation(cx, OperationKind::SaveDomain, id.name(), wait_ms);
    operation.status_message = format!("to volumes/{}", volume.id);
    Ok(hold(cx, txn, row, domain, operation))
}

/// What a start takes that may have to read a saved state first, or a save.
pub(super) fn wait_ms(domain: &DomainRecord) -> i64 {
    let copy_ms = memory_bytes(domain) / (RATE_MIN / 1000);
    START_WAIT_MS.saturating_add_unsigned(if has_memory(domain) { copy_ms } else { 0 })
}

fn memory_bytes(domain: &DomainRecord) -> u64 {
    domain.spec.as_ref().map_or(0, |spec| spec.memory_bytes)
}

/// Done when the domain is SAVED; where it ended otherwise, [`cannot_be`] has ended the operation.
pub(super) fn step(work: &mut Work<'_>) {
    if work.domain.state() == DomainState::Saved {
        return work.end(OperationState::Succeeded, None);
    }
    let node = work.domain.node.clone();
    let (world, row) = (work.cx.world, work.row);
    let volume = world.memory_of(&row.value).map(|volume| &volume.value);
    let name = format!("volumes/{}", row.value.memory_volume);
    let said = volume.and_then(|volume| work.cx.observed.volume(&node, &volume.uid));
    if let Some(said) = said.filter(|said| said.state() == VolumeState::Failed) {
        let message = format!("nodes/{node}: {name}: {}", said.state_reason);
        return give_up(work, error("VOLUME_FAILED", message));
    }
    if work.is_cancelled() {
        return give_up(work, error("CANCELLED", "cancelled on request"));
    }
    if work.is_overdue(0) {
        let message = format!("nodes/{node} did not save it to {name} in time");
        return give_up(work, error("DEADLINE_EXCEEDED", message));
    }
    let lost = if work.cx.is_lost(&node) { " (lost)" } else { "" };
    let made = volume.is_some_and(|volume| volume.state() == VolumeState::Ready);
    work.status(match made {
        true => format!("nodes/{node}{lost} saves it to {name}"),
        false => format!("nodes/{node}{lost} makes {name}"),
    });
}

/// It shall run on; whether it does is not known.
pub(super) fn give_up(work: &mut Work<'_>, why: OperationError) {
    work.domain.set_desired_power(PowerState::Running);
    work.domain.epoch = work.next_epoch();
    fail(work, why);
}

/// The guest has ended in another way: there is nothing to be saved.
pub(super) fn cannot_be(work: &mut Work<'_>, why: &str) {
    work.domain.set_desired_power(PowerState::Running);
    work.drop_memory();
    fail(work, error("NOT_RUNNING", format!("it ended before it was saved: {why}")));
}

fn fail(work: &mut Work<'_>, why: OperationError) {
    work.event(EventSeverity::Warning, "SAVE_FAILED", why.message.clone());
    let state = match why.reason.as_str() {
        "CANCELLED" => OperationState::Cancelled,
        _ => OperationState::Failed,
    };
    work.end(state, Some(why));
}
