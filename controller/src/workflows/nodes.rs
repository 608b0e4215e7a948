//! Nodes: registration, whether they are heard, cordons, and forgetting them.
//!
//! Heartbeats stay in the leader's memory; only a change is written. A new leader has heard
//! nobody, so it waits a full lease before it calls any node lost.

use drover_proto::agent::v1::Hello;
use drover_proto::v1::{DomainState, DrainState, EventSeverity, NodeState, PowerState};

use super::begin::{busy, check_etag, known_node};
use super::refusal::Refusal;
use super::step::{Context, Step, timestamp};
use crate::model::{NodeId, NodeRecord};
use crate::scheduler::listed;
use crate::store::{TXN_BYTES_ENOUGH, Txn, Versioned};

/// A refusal names so many of the domains that are in the way.
const NAMED_MAX: usize = 20;

/// READY ↔ LOST, as the node is heard.
pub(super) fn step(cx: &Context<'_>, id: &NodeId, row: &Versioned<NodeRecord>) -> Option<Step> {
    let observation = cx.observed.nodes.get(id);
    let heard = observation.map_or(0, |o| o.heard_ms).max(cx.leader_since_ms);
    let silent_ms = cx.now.mono_ms.saturating_sub(heard);
    let reports = observation.is_some_and(|o| o.connected && o.reported);
    let mut node = row.value.clone();
    let event = match node.state() {
        NodeState::Ready if silent_ms > cx.settings.lease_ms => {
            let message = format!("its agent has not been heard for {} s", silent_ms / 1000);
            node.set_state(NodeState::Lost);
            node.state_reason.clone_from(&message);
            cx.event(EventSeverity::Error, id.name(), "NODE_LOST", message)
        }
        NodeState::Lost if reports && silent_ms <= cx.settings.lease_ms => {
            node.set_state(NodeState::Ready);
            node.state_reason.clear();
            cx.event(
                EventSeverity::Info,
                id.name(),
                "NODE_READY",
                "its agent is heard again".into(),
            )
        }
        _ => return None,
    };
    node.state_time = Some(timestamp(cx.now.wall_ms));
    let txn = Txn::new().term_is(cx.term).unchanged(row).put(&node).put(&event);
    Some(Step { subject: id.name(), txn })
}

/// What an agent's first message changes: None when all is known already.
///
/// A new boot means that whatever ran on the host is gone. Domains that shall run are started
/// there again, under a new epoch, with this very transaction: the first thing that the agent
/// is told is the new level.
///
/// # Errors
/// The node's name belongs to another machine.
pub fn register(cx: &Context<'_>, id: &NodeId, hello: &Hello) -> Result<Option<Txn>, Refusal> {
    let row = cx.world.nodes.get(id);
    if let Some(row) = row.filter(|row| row.value.uid != hello.node_uid) {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "NODE_UID_MISMATCH",
            message: format!(
                "{} is registered with node_uid {}, this agent has {}: another machine uses the \
                 name, or the agent's state directory was removed. Give this machine another \
                 name, or forget the old one: vpsctl node delete {id}",
                id.name(),
                row.value.uid,
                hello.node_uid
            ),
        });
    }
    let now = Some(timestamp(cx.now.wall_ms));
    let held = row.map(|row| row.value.clone()).unwrap_or_default();
    let mut node = NodeRecord {
        id: id.as_str().to_owned(),
        uid: hello.node_uid.clone(),
        address: hello.address.clone(),
        capacity: hello.capacity,
        boot_id: hello.boot_id.clone(),
        agent_version: hello.agent_version.clone(),
        kernel_version: hello.kernel_version.clone(),
        state: NodeState::Ready.into(),
        state_reason: String::new(),
        ..held.clone()
    };
    if node == held {
        return Ok(None);
    }
    let mut txn = Txn::new().term_is(cx.term);
    let rebooted = row.is_some() && held.boot_id != node.boot_id;
    match row {
        None => {
            node.register_time = now;
            node.state_time = now;
            let message = format!("at {}", node.address);
            let event = cx.event(EventSeverity::Info, id.name(), "NODE_REGISTERED", message);
            txn = txn.absent::<NodeRecord>(id.as_str()).put(&event);
        }
        Some(row) => {
            txn = txn.unchanged(row);
            if held.state() != NodeState::Ready {
                node.state_time = now;
                let message = "its agent is heard again".into();
                txn = txn.put(&cx.event(EventSeverity::Info, id.name(), "NODE_READY", message));
            }
            if rebooted {
                let message = "its host has rebooted".into();
                txn =
                    txn.put(&cx.event(EventSeverity::Warning, id.name(), "NODE_REBOOTED", message));
            }
        }
    }
    txn = txn.put(&node);
    Ok(Some(if rebooted { restart_all(cx, id, &node.boot_id, txn) } else { txn }))
}

/// As many as one transaction holds. The rest needs no new epoch to start again: its agent starts
/// what its host's reboot ended, under the present one, and says so.
fn restart_all(cx: &Context<'_>, id: &NodeId, boot_id: &str, mut txn: Txn) -> Txn {
    for row in cx.world.owned(id) {
        let mut domain = row.value.clone();
        let ran = matches!(
            domain.state(),
            DomainState::Starting | DomainState::Running | DomainState::Lost
        );
        // One in the middle of a migration is the migration's to decide.
        let shall_run = domain.desired_power() == PowerState::Running;
        if !ran || !shall_run || domain.migration.is_some() {
            continue;
        }
        if txn.bytes() > TXN_BYTES_ENOUGH {
            break;
        }
        domain.epoch_max += 1;
        domain.epoch = domain.epoch_max;
        domain.start_generation += 1;
        domain.boot_id = boot_id.to_owned();
        domain.set_state(DomainState::Starting);
        domain.state_reason = "its host has rebooted".into();
        let message = format!("{} has rebooted: started again, epoch {}", id.name(), domain.epoch);
        let subject = format!("domains/{}", domain.id);
        let event = cx.event(EventSeverity::Warning, subject, "DOMAIN_RESTARTED", message);
        txn = txn.unchanged(row).put(&domain).put(&event);
    }
    txn
}

/// Ends `drained`, an incomplete drain, and the cordon.
///
/// # Errors
/// No such node, or a drain works on it.
pub fn set_cordon(
    cx: &Context<'_>,
    id: &NodeId,
    cordoned: bool,
) -> Result<(Txn, NodeRecord), Refusal> {
    let row = known_node(cx, id)?;
    let mut node = row.value.clone();
    node.cordoned = cordoned;
    if !cordoned {
        if !node.drain_operation.is_empty() {
            return Err(busy(cx, id.name(), &node.drain_operation));
        }
        node.set_drain_state(DrainState::Unspecified);
    }
    if node == row.value {
        return Ok((Txn::new(), node));
    }
    let reason = if cordoned { "NODE_CORDONED" } else { "NODE_UNCORDONED" };
    let event = cx.event(EventSeverity::Info, id.name(), reason, String::new());
    let txn = Txn::new().term_is(cx.term).unchanged(row).put(&node).put(&event);
    Ok((txn, node))
}

/// Forgets a node that holds nothing.
///
/// # Errors
/// No such node, it has changed, domains are on it or on their way, or volumes or snapshots lie
/// there.
pub fn delete_node(cx: &Context<'_>, id: &NodeId, etag: &str) -> Result<Txn, Refusal> {
    let row = known_node(cx, id)?;
    check_etag(&id.name(), etag, row.mod_revision)?;
    let refuse = |reason, message| Refusal::Precondition { subject: id.name(), reason, message };
    let held: Vec<String> =
        cx.world.concerning(id).map(|row| format!("domains/{}", row.value.id)).collect();
    if !held.is_empty() {
        let message = format!(
            "{} holds {} domains: {}. Drain it first, or delete them",
            id.name(),
            held.len(),
            listed(held.iter().cloned(), NAMED_MAX, ", ")
        );
        return Err(refuse("NODE_NOT_EMPTY", message));
    }
    let volumes = cx.world.left_on(id).map(|row| format!("volumes/{}", row.value.id));
    let snapshots = cx.world.snapshots_on(id).map(|row| format!("snapshots/{}", row.value.id));
    let left = listed(volumes.chain(snapshots), NAMED_MAX, ", ");
    if !left.is_empty() {
        let message = format!("{} holds {left}: delete them first", id.name());
        return Err(refuse("NODE_NOT_EMPTY", message));
    }
    if cx.observed.nodes.get(id).is_some_and(|node| node.connected) {
        let message = format!("{}'s agent is connected: stop drover-agent there first", id.name());
        return Err(refuse("NODE_CONNECTED", message));
    }
    if !row.value.drain_operation.is_empty() {
        return Err(busy(cx, id.name(), &row.value.drain_operation));
    }
    let event = cx.event(EventSeverity::Info, id.name(), "NODE_DELETED", String::new());
    Ok(Txn::new().term_is(cx.term).unchanged(row).delete::<NodeRecord>(id.as_str()).put(&event))
}
