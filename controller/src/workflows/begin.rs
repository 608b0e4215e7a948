//! Beginning an operation: what is checked, and the one transaction that accepts it.
//!
//! Each function looks at a [`Context`] and answers with a transaction or a [`Refusal`]. The
//! transaction is guarded by every row that the decision rests on, so two callers at once
//! cannot both be accepted; whoever loses looks again.

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::v1::{
    DomainSpec, DomainState, EventSeverity, MigrationLimits, NodeRejection, OperationError,
    OperationKind, OperationState, Placement, PowerState, VolumeState,
};

use super::moving::Moving;
use super::power::starts;
use super::refusal::Refusal;
use super::step::{Context, end, error, millis, timestamp};
use super::{content, network, plug, save, storage};
use crate::model::{
    DomainId, DomainRecord, ImageRecord, MigrationStage, NetworkId, NodeId, NodeRecord,
    OperationId, OperationRecord, VolumeRecord, has_memory, is_at_rest, unready,
};
use crate::scheduler::{Decision, OTHER_NODE, PlaceOptions, Resources, Strategy, place};
use crate::store::{Txn, Versioned};

/// Creating or starting: the VMM is up in seconds, a busy host needs longer.
pub(super) const START_WAIT_MS: i64 = 5 * 60_000;
/// The same where volumes are made first: an image may have to come from another node.
pub(super) const FILL_WAIT_MS: i64 = 60 * 60_000;
/// Beyond the grace period.
const STOP_WAIT_MS: i64 = 60_000;
/// Deleting.
const DELETE_WAIT_MS: i64 = 5 * 60_000;

/// So many of the nodes that were passed over are kept with a domain's placement.
const REJECTIONS_MAX: usize = 32;

/// What was accepted.
#[derive(Clone, Debug)]
pub struct Begun {
    /// To be committed.
    pub txn: Txn,
    /// The operation as it will be then.
    pub operation: OperationRecord,
}

/// A domain to be made.
#[derive(Clone, Debug)]
pub struct NewDomain {
    /// Its id.
    pub id: DomainId,
    /// Checked and completed.
    pub spec: DomainSpec,
    /// Its interfaces were given addresses of these.
    pub networks: BTreeSet<NetworkId>,
    /// This node or none.
    pub only: Option<NodeId>,
    /// It is not started.
    pub leave_stopped: bool,
    /// How nodes are ranked.
    pub strategy: Strategy,
}

/// Places a domain and makes its row.
///
/// # Errors
/// The name is taken, no node has room, the node asked for does not exist.
pub fn create_domain(cx: &Context<'_>, new: &NewDomain) -> Result<Begun, Refusal> {
    if let Some(row) = cx.world.domains.get(&new.id) {
        let name = new.id.name();
        // A create that is being taken back still holds the name.
        let held = row.value.operation.clone();
        return Err(match row.value.state() {
            DomainState::Deleting if !held.is_empty() => busy(cx, name, &held),
            _ => Refusal::AlreadyExists { name },
        });
    }
    if let Some(only) = &new.only {
        known_node(cx, only)?;
    }
    let mut spec = new.spec.clone();
    let mut volumes = storage::new_volumes(cx, &new.id, &spec.disks)?;
    let needs = Resources { vcpus: spec.vcpus, memory_bytes: spec.memory_bytes };
    let view = cx.world.cluster_view(cx.observed);
    let options = PlaceOptions {
        strategy: new.strategy,
        only: new.only.clone(),
        disks: storage::needs(&volumes),
        ..PlaceOptions::default()
    };
    let decision =
        place(&view, needs, &options).map_err(|no_room| Refusal::NoRoom { needs, no_room })?;
    let node = known_node(cx, &decision.node)?;
    if let Some(chosen) = view.nodes.get(&decision.node) {
        storage::settle(&mut volumes, &mut spec.disks, chosen);
    }

    let wait_ms = if volumes.is_empty() { START_WAIT_MS } else { FILL_WAIT_MS };
    let mut operation = operation(cx, OperationKind::CreateDomain, new.id.name(), wait_ms);
    let message = format!("placed on {}", decision.node.name());
    operation.status_message.clone_from(&message);
    let mut domain = DomainRecord {
        id: new.id.as_str().to_owned(),
        uid: cx.ids.uuid(),
        generation_id: cx.ids.uuid(),
        spec: Some(spec),
        node: decision.node.as_str().to_owned(),
        epoch: 1,
        epoch_max: 1,
        start_generation: 1,
        placement: Some(placement(cx, &decision)),
        create_time: Some(timestamp(cx.now.wall_ms)),
        boot_id: node.value.boot_id.clone(),
        seed_slot: plug::SEED_SLOT,
        ..DomainRecord::default()
    };
    if new.leave_stopped {
        domain.set_state(DomainState::Stopped);
        domain.set_desired_power(PowerState::Stopped);
        end(&mut operation, OperationState::Succeeded, None, cx.now);
    } else {
        domain.set_state(DomainState::Pending);
        domain.set_desired_power(PowerState::Running);
        domain.operation.clone_from(&operation.id);
    }
    let event = cx.event(EventSeverity::Info, new.id.name(), "DOMAIN_CREATED", message);
    let mut txn = Txn::new()
        .term_is(cx.term)
        .absent::<DomainRecord>(new.id.as_str())
        .put(&domain)
        .put(&operation)
        .put(&event);
    for volume in &volumes {
        txn = txn.absent::<VolumeRecord>(volume.id.clone()).put(volume);
        if !volume.image.is_empty() {
            txn = txn.present::<ImageRecord>(volume.image.clone());
        }
    }
    for network in &new.networks {
        txn = network::give(cx, network, txn)?;
    }
    Ok(Begun { txn: reserve(txn, node), operation })
}

/// Starts a domain that is at rest. One that is saved goes on where it was, unless that is to be
/// discarded.
///
/// # Errors
/// There is none, it is held, it runs, or its node is lost.
pub fn start_domain(
    cx: &Context<'_>,
    id: &DomainId,
    discard_saved: bool,
) -> Result<Begun, Refusal> {
    let row = free_domain(cx, id)?;
    if !is_at_rest(&row.value) {
        let accepted = "only a domain that is STOPPED, SAVED or FAILED starts";
        return Err(wrong_state(id, &row.value, accepted));
    }
    if cx.is_lost(&row.value.node) {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "NODE_LOST",
            message: format!(
                "{} is on nodes/{}, which is lost: it starts when the node is back",
                id.name(),
                row.value.node
            ),
        });
    }
    let mut domain = row.value.clone();
    let mut txn = Txn::new();
    if discard_saved && let Some(volume) = cx.world.memory_of(&row.value) {
        txn = content::discard(cx, txn, &domain.node, volume);
        domain.memory_volume.clear();
    }
    let filled = |volume: &Versioned<VolumeRecord>| volume.value.state() != VolumeState::Creating;
    let wait_ms = match cx.world.volumes_of(&row.value).all(filled) {
        true => save::wait_ms(&domain),
        false => FILL_WAIT_MS,
    };
    let operation = operation(cx, OperationKind::StartDomain, id.name(), wait_ms);
    starts(cx, &mut domain);
    Ok(hold(cx, txn, row, domain, operation))
}

/// Stops a running domain. A stop that is under way is hurried on by one without grace.
///
/// # Errors
/// There is none, it is held, or it is not known to run.
pub fn stop_domain(cx: &Context<'_>, id: &DomainId, grace_ms: u64) -> Result<Begun, Refusal> {
    if grace_ms == 0
        && let Some(begun) = hurry_stop(cx, known_domain(cx, id)?)
    {
        return Ok(begun);
    }
    let row = free_domain(cx, id)?;
    if !matches!(
        row.value.state(),
        DomainState::Running | DomainState::Starting | DomainState::Stopping
    ) || row.value.migration.is_some()
    {
        return Err(wrong_state(id, &row.value, "only a domain that runs is stopped"));
    }
    let wait = STOP_WAIT_MS.saturating_add_unsigned(grace_ms);
    let operation = operation(cx, OperationKind::StopDomain, id.name(), wait);
    let mut domain = row.value.clone();
    domain.set_desired_power(PowerState::Stopped);
    domain.grace_ms = grace_ms;
    domain.set_state(DomainState::Stopping);
    domain.state_reason.clear();
    let mut txn = Txn::new();
    // Who stops it does not want it to go on from there.
    if let Some(volume) = cx.world.memory_of(&row.value) {
        txn = content::discard(cx, txn, &domain.node, volume);
        domain.memory_volume.clear();
    }
    Ok(hold(cx, txn, row, domain, operation))
}

/// The stop that holds the domain, without grace from now on; None when none does.
fn hurry_stop(cx: &Context<'_>, row: &Versioned<DomainRecord>) -> Option<Begun> {
    let held = cx.world.operations.get(&OperationId::trusted(&row.value.operation))?;
    if held.value.kind() != OperationKind::StopDomain {
        return None;
    }
    let mut operation = held.value.clone();
    let mut txn = Txn::new();
    if row.value.grace_ms > 0 {
        let deadline = cx.now.wall_ms.saturating_add(STOP_WAIT_MS);
        let sooner = operation.deadline.as_ref().is_none_or(|held| millis(held) > deadline);
        if sooner {
            operation.deadline = Some(timestamp(deadline));
        }
        operation.update_time = Some(timestamp(cx.now.wall_ms));
        let mut domain = row.value.clone();
        domain.grace_ms = 0;
        txn = txn.term_is(cx.term).unchanged(row).put(&domain).unchanged(held).put(&operation);
    }
    Some(Begun { txn, operation })
}

/// Removes a domain from its node and then its row.
///
/// # Errors
/// There is none, it is held, it has changed, or it runs and `force` is false.
pub fn delete_domain(
    cx: &Context<'_>,
    id: &DomainId,
    etag: &str,
    force: bool,
) -> Result<Begun, Refusal> {
    let row = free_domain(cx, id)?;
    check_etag(&id.name(), etag, row.mod_revision)?;
    if !is_at_rest(&row.value) && row.value.state() != DomainState::Deleting && !force {
        let accepted = "stop it first, or delete it with force";
        return Err(wrong_state(id, &row.value, accepted));
    }
    let operation = operation(cx, OperationKind::DeleteDomain, id.name(), DELETE_WAIT_MS);
    let mut domain = row.value.clone();
    domain.set_state(DomainState::Deleting);
    domain.state_reason.clear();
    Ok(hold(cx, Txn::new(), row, domain, operation))
}

/// Moves a domain: live when it runs, by copying its volumes when it does not.
///
/// # Errors
/// There is none, it is held, it is lost, it is there already, a volume is not there to be copied,
/// or nothing has room.
pub fn migrate_domain(
    cx: &Context<'_>,
    id: &DomainId,
    to: Option<&NodeId>,
    limits: &MigrationLimits,
) -> Result<Begun, Refusal> {
    let row = free_domain(cx, id)?;
    if let Some(to) = to {
        known_node(cx, to)?;
        if to.as_str() == row.value.node {
            return Err(Refusal::Precondition {
                subject: id.name(),
                reason: "ALREADY_THERE",
                message: format!(
                    "to_node: {} is on {} already: name another node, or none to let the \
                     scheduler choose",
                    id.name(),
                    to.name()
                ),
            });
        }
    }
    let movable = is_at_rest(&row.value)
        || (row.value.state() == DomainState::Running
            && row.value.migration.is_none()
            && !has_memory(&row.value));
    if !movable {
        let accepted = match row.value.state() {
            DomainState::Running => "what it was saved to is about to be removed: try again",
            _ => "only a domain that is RUNNING, STOPPED, SAVED or FAILED moves",
        };
        return Err(wrong_state(id, &row.value, accepted));
    }
    if is_at_rest(&row.value)
        && let Some(volume) = cx.world.unready(&row.value)
    {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "VOLUME_NOT_READY",
            message: format!("{} cannot be copied: {}", id.name(), unready(volume)),
        });
    }
    let options = PlaceOptions {
        only: to.cloned(),
        excluded: BTreeMap::from([(
            NodeId::trusted(&row.value.node),
            "it is there now".to_owned(),
        )]),
        ..PlaceOptions::default()
    };
    let view = cx.world.cluster_view(cx.observed);
    let mut moving = Moving::new(cx, &view);
    let operation = moving.add(row, &options, limits, i64::MAX, "")?;
    Ok(Begun { txn: moving.finish(Txn::new().term_is(cx.term)), operation })
}

/// A new operation, running.
pub(super) fn operation(
    cx: &Context<'_>,
    kind: OperationKind,
    target: String,
    wait_ms: i64,
) -> OperationRecord {
    OperationRecord {
        id: cx.ids.uuid(),
        kind: kind.into(),
        target,
        state: OperationState::Running.into(),
        create_time: Some(timestamp(cx.now.wall_ms)),
        update_time: Some(timestamp(cx.now.wall_ms)),
        deadline: Some(timestamp(cx.now.wall_ms.saturating_add(wait_ms))),
        term: cx.term,
        ..OperationRecord::default()
    }
}

/// Asks an operation to end.
///
/// # Errors
/// It is over, or past its point of no return.
pub fn cancel_operation(
    cx: &Context<'_>,
    row: &Versioned<OperationRecord>,
) -> Result<Begun, Refusal> {
    let mut operation = row.value.clone();
    let name = format!("operations/{}", operation.id);
    let refuse = |reason, message: String| Refusal::Precondition {
        subject: name.clone(),
        reason,
        message: format!("{name}: {message}"),
    };
    if !crate::model::is_active(&operation) {
        let state = operation.state().as_str_name().trim_start_matches("OPERATION_STATE_");
        return Err(refuse("ALREADY_DONE", format!("it is {state} already")));
    }
    if let Some((reason, why)) = why_not_cancelled(cx, &operation) {
        return Err(refuse(reason, why.to_owned()));
    }
    operation.cancel_requested = true;
    operation.update_time = Some(timestamp(cx.now.wall_ms));
    let txn = Txn::new().term_is(cx.term).unchanged(row).put(&operation);
    Ok(Begun { txn, operation })
}

/// Why an operation that runs cannot be cancelled, if so: a reason for programs, one for people.
fn why_not_cancelled(
    cx: &Context<'_>,
    operation: &OperationRecord,
) -> Option<(&'static str, &'static str)> {
    let domain = DomainId::from_name(&operation.target)
        .ok()
        .and_then(|id| cx.world.domains.get(&id))
        .map(|row| &row.value);
    match operation.kind() {
        OperationKind::StopDomain | OperationKind::DeleteDomain => {
            Some(("NOT_CANCELLABLE", "stopping and deleting cannot be taken back once begun"))
        }
        OperationKind::CreateDomain
            if domain.is_some_and(|domain| domain.state() == DomainState::Deleting) =>
        {
            Some(("NOT_CANCELLABLE", "it has failed already, and removes what it made"))
        }
        OperationKind::StartDomain if domain.is_some_and(has_memory) => {
            Some(("NOT_CANCELLABLE", "it may go on already, with what was saved used up"))
        }
        OperationKind::ReinstallDomain | OperationKind::RestoreSnapshot => {
            Some(("NOT_CANCELLABLE", "what was there is gone already: it can only go forward"))
        }
        OperationKind::ResizeDomain => {
            Some(("NOT_CANCELLABLE", "it is written down already, and a volume never shrinks"))
        }
        OperationKind::MigrateDomain => {
            let stage = domain.and_then(|domain| domain.migration.as_ref()).map(|m| m.stage());
            let handed_over = matches!(
                stage,
                Some(
                    MigrationStage::HandedOver | MigrationStage::Granted | MigrationStage::Settling
                )
            );
            let why = "the domain has been handed over: it can only go forward";
            handed_over.then_some(("POINT_OF_NO_RETURN", why))
        }
        _ => None,
    }
}

/// The etag of a row.
#[must_use]
pub fn etag(mod_revision: u64) -> String {
    format!("{mod_revision:x}")
}

/// Accepts an empty etag.
pub(crate) fn check_etag(name: &str, given: &str, mod_revision: u64) -> Result<(), Refusal> {
    let etag = etag(mod_revision);
    if given.is_empty() || given == etag {
        return Ok(());
    }
    Err(Refusal::Changed { name: name.to_owned(), given: given.to_owned(), etag })
}

/// A node by its id.
pub(crate) fn known_node<'a>(
    cx: &Context<'a>,
    id: &NodeId,
) -> Result<&'a Versioned<NodeRecord>, Refusal> {
    cx.world.nodes.get(id).ok_or_else(|| Refusal::NotFound { name: id.name() })
}

/// A domain by its id.
pub(crate) fn known_domain<'a>(
    cx: &Context<'a>,
    id: &DomainId,
) -> Result<&'a Versioned<DomainRecord>, Refusal> {
    cx.world.domains.get(id).ok_or_else(|| Refusal::NotFound { name: id.name() })
}

pub(super) fn free_domain<'a>(
    cx: &Context<'a>,
    id: &DomainId,
) -> Result<&'a Versioned<DomainRecord>, Refusal> {
    let row = known_domain(cx, id)?;
    if row.value.operation.is_empty() {
        return Ok(row);
    }
    Err(busy(cx, id.name(), &row.value.operation))
}

/// `name` is held by an operation, with what can be done about that.
pub(super) fn busy(cx: &Context<'_>, name: String, operation: &str) -> Refusal {
    let held = cx.world.operation(&OperationId::trusted(operation));
    let cancellable = held.is_some_and(|held| why_not_cancelled(cx, held).is_none());
    Refusal::Busy { name, operation: operation.to_owned(), cancellable }
}

pub(super) fn wrong_state(id: &DomainId, domain: &DomainRecord, accepted: &str) -> Refusal {
    let state = domain.state().as_str_name().trim_start_matches("DOMAIN_STATE_");
    let why = match domain.state_reason.as_str() {
        "" => String::new(),
        reason => format!(" ({reason})"),
    };
    Refusal::Precondition {
        subject: id.name(),
        reason: "WRONG_STATE",
        message: format!("{} is {state}{why}: {accepted}", id.name()),
    }
}

/// The operation takes the domain; `txn` is what comes with it.
pub(super) fn hold(
    cx: &Context<'_>,
    txn: Txn,
    row: &Versioned<DomainRecord>,
    mut domain: DomainRecord,
    operation: OperationRecord,
) -> Begun {
    domain.operation.clone_from(&operation.id);
    let txn = txn.term_is(cx.term).unchanged(row).put(&domain).put(&operation);
    Begun { txn, operation }
}

/// Room on a node was promised: nobody else may have promised it meanwhile.
pub(super) fn reserve(txn: Txn, row: &Versioned<NodeRecord>) -> Txn {
    let mut node = row.value.clone();
    node.placement_generation += 1;
    txn.unchanged(row).put(&node)
}

pub(super) fn placement(cx: &Context<'_>, decision: &Decision) -> Placement {
    let rejected = decision.rejected.iter().filter(|r| r.reason != OTHER_NODE);
    Placement {
        node: decision.node.name(),
        score: decision.score,
        rejected: rejected
            .take(REJECTIONS_MAX)
            .map(|r| NodeRejection { node: r.node.name(), reason: r.reason.clone() })
            .collect(),
        time: Some(timestamp(cx.now.wall_ms)),
    }
}

pub(super) fn duration_ms(duration: Option<&prost_types::Duration>) -> i64 {
    duration.map_or(0, |d| {
        d.seconds.saturating_mul(1000).saturating_add(i64::from(d.nanos / 1_000_000))
    })
}

/// The error of work that lost its object: never seen unless a row was changed by hand.
pub(super) fn orphaned() -> OperationError {
    error("INTERNAL", "what it worked on is not there any more")
}
