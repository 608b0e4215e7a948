//! Drains and balances: operations that move several domains, each by a migration of its own.
//!
//! The rows of the plan are in the operation. Each pass looks at what has become of the moves
//! under way, plans what is left anew from the cluster as it is now (a drain; a balance keeps
//! its plan), and starts as many as the links carry. A move that failed is tried elsewhere, at
//! most [`ATTEMPTS_MAX`] times. `DRAINED` is said when the node's agent reports that nothing is
//! left on it.
//!
//! Ends: cancel and the deadline stop the issuing of moves and let those under way finish;
//! nothing is ever stopped. What cannot move is given [`STALL_WAIT_MS`] for the cluster to
//! change, then the drain ends as INCOMPLETE and says what is left and what would help.

mod lines;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use drover_proto::v1::{
    DrainState, EventSeverity, MigrationLimits, MoveState, OperationError, OperationKind,
    OperationState, PlannedMove,
};
use prost::Message;

pub use lines::{balance_move, planned_move};
use lines::{balance_rows, domain_of, fits, is, ms, planned, rows, settle, summary};

use super::begin::{Begun, busy, known_node, operation};
use super::desired::duration;
use super::moving::Moving;
use super::refusal::Refusal;
use super::step::{Context, Step, end, error, is_overdue, millis, timestamp};
use crate::model::{
    CLUSTER_KEY, ClusterRecord, DomainId, MoveRecord, NodeId, NodeObservation, NodeRecord,
    OperationId, OperationRecord, is_active,
};
use crate::scheduler::{
    BalanceOptions, BalanceProposal, ClusterView, DrainOptions, DrainProposal, Mobility,
    PlaceOptions, Strategy, listed, parallel_moves, plan_balance, plan_drain,
};
use crate::store::{TXN_BYTES_ENOUGH, Txn, Versioned};

/// A domain is tried so often before its move counts as failed.
pub const ATTEMPTS_MAX: u32 = 3;
/// What fits nowhere is given this long for the cluster to change.
pub const STALL_WAIT_MS: i64 = 20_000;
/// Past its deadline a drain waits this long for the moves under way.
const LAST_MOVES_WAIT_MS: i64 = 60_000;
/// A drain's end names so many of the domains that are left.
const LEFT_NAMED_MAX: usize = 20;
/// A balance moves a bounded number of domains.
const BALANCE_WAIT_MS: i64 = 60 * 60_000;

/// The plan of a drain, as the cluster is now.
///
/// # Errors
/// No such node.
pub fn propose_drain(
    cx: &Context<'_>,
    node: &NodeId,
    limits: &MigrationLimits,
    strategy: Strategy,
) -> Result<DrainProposal, Refusal> {
    known_node(cx, node)?;
    let options =
        DrainOptions { strategy, bandwidth_max: limits.bandwidth_max, ..DrainOptions::default() };
    Ok(plan_drain(&cx.world.cluster_view(cx.observed), node, &options))
}

/// Cordons the node and begins to empty it.
///
/// # Errors
/// No such node, or a drain works on it already.
pub fn begin_drain(
    cx: &Context<'_>,
    id: &NodeId,
    limits: &MigrationLimits,
    wait_ms: i64,
    strategy: Strategy,
) -> Result<Begun, Refusal> {
    let row = known_node(cx, id)?;
    if !row.value.drain_operation.is_empty() {
        return Err(busy(cx, id.name(), &row.value.drain_operation));
    }
    let proposal = propose_drain(cx, id, limits, strategy)?;
    let mut operation = operation(cx, OperationKind::DrainNode, id.name(), wait_ms);
    operation.limits = Some(*limits);
    operation.moves = rows(&proposal, id);
    operation.status_message = summary(&operation.moves);
    if !fits(&mut operation) {
        return Err(Refusal::Precondition {
            subject: id.name(),
            reason: "TOO_MANY_DOMAINS",
            message: format!(
                "{} holds {} domains, more than one drain can hold: move some of them first",
                id.name(),
                operation.moves.len()
            ),
        });
    }
    let mut node = row.value.clone();
    node.cordoned = true;
    node.set_drain_state(DrainState::Draining);
    node.drain_operation.clone_from(&operation.id);
    let message = format!("{} domains to move", operation.moves.len());
    let event = cx.event(EventSeverity::Info, id.name(), "DRAIN_STARTED", message);
    let txn = Txn::new().term_is(cx.term).unchanged(row).put(&node).put(&operation).put(&event);
    Ok(Begun { txn, operation })
}

/// The moves that would even out the load.
#[must_use]
pub fn propose_balance(cx: &Context<'_>, moves_max: usize) -> BalanceProposal {
    let options = BalanceOptions { moves_max, ..BalanceOptions::default() };
    plan_balance(&cx.world.cluster_view(cx.observed), &options)
}

/// Begins to make those moves.
///
/// # Errors
/// A balance runs already.
pub fn begin_balance(
    cx: &Context<'_>,
    moves_max: usize,
    limits: &MigrationLimits,
) -> Result<Begun, Refusal> {
    let held = cx.world.cluster.as_ref();
    let running = held.map(|row| row.value.balance_operation.clone()).unwrap_or_default();
    if !running.is_empty() {
        return Err(busy(cx, CLUSTER_KEY.into(), &running));
    }
    let proposal = propose_balance(cx, moves_max);
    let mut operation =
        operation(cx, OperationKind::BalanceCluster, CLUSTER_KEY.into(), BALANCE_WAIT_MS);
    operation.limits = Some(*limits);
    operation.moves = balance_rows(&proposal);
    operation.status_message = summary(&operation.moves);
    let mut cluster = held.map(|row| row.value.clone()).unwrap_or_default();
    cluster.balance_operation.clone_from(&operation.id);
    let txn = Txn::new().term_is(cx.term);
    let txn = match held {
        Some(row) => txn.unchanged(row),
        None => txn.absent::<ClusterRecord>(CLUSTER_KEY),
    };
    Ok(Begun { txn: txn.put(&cluster).put(&operation), operation })
}

/// What a pass has done.
pub(super) struct Pass {
    pub(super) step: Step,
    /// Domains whose rows the step writes.
    pub(super) claimed: BTreeSet<DomainId>,
}

/// One pass over a drain or a balance; None when there is nothing to write.
pub(super) fn step<'a>(cx: &Context<'a>, row: &'a Versioned<OperationRecord>) -> Option<Pass> {
    let mut run = Run::new(cx, row);
    run.take_in();
    if run.operation.kind() == OperationKind::DrainNode {
        run.plan_again();
    }
    run.start_moves();
    run.conclude();
    run.finish()
}

struct Run<'a> {
    cx: Context<'a>,
    row: &'a Versioned<OperationRecord>,
    operation: OperationRecord,
    /// The node that is drained; None for a balance.
    node: Option<NodeId>,
    moving: Moving<'a>,
    claimed: BTreeSet<DomainId>,
    /// Of the domains that wait for something that will end.
    waiting: BTreeSet<String>,
    outcome: Option<(DrainState, NodeRecord)>,
    done: bool,
}

impl<'a> Run<'a> {
    fn new(cx: &Context<'a>, row: &'a Versioned<OperationRecord>) -> Self {
        Self {
            cx: *cx,
            row,
            operation: row.value.clone(),
            node: NodeId::from_name(&row.value.target).ok(),
            moving: Moving::new(cx, &cx.world.cluster_view(cx.observed)),
            claimed: BTreeSet::new(),
            waiting: BTreeSet::new(),
            outcome: None,
            done: false,
        }
    }

    fn view(&self) -> &ClusterView {
        self.moving.view()
    }

    fn is_ending(&self) -> bool {
        self.operation.cancel_requested || is_overdue(&self.operation, self.cx.now, 0)
    }

    fn in_flight(&self) -> usize {
        self.operation.moves.iter().filter(|row| is(row, MoveState::Moving)).count()
    }

    /// What has become of the moves under way, and of the domains themselves.
    fn take_in(&mut self) {
        let last_try = self.is_ending() || self.node.is_none();
        let cx = self.cx;
        for row in &mut self.operation.moves {
            let Some(line) = row.r#move.as_mut() else { continue };
            if line.state() == MoveState::Moving {
                let child = OperationId::from_name(&line.operation).ok();
                let child = child.and_then(|id| cx.world.operation(&id));
                match child {
                    Some(child) if is_active(child) => {}
                    child => settle(row, child, last_try),
                }
                continue;
            }
            let Ok(id) = DomainId::from_name(&line.domain) else { continue };
            let at = cx.world.domains.get(&id).map(|row| format!("nodes/{}", row.value.node));
            let open = matches!(line.state(), MoveState::Planned | MoveState::Blocked);
            if open && at.as_ref() != Some(&line.from_node) {
                line.set_state(MoveState::Skipped);
                line.reason = match at {
                    Some(at) => format!("it is on {at} now"),
                    None => "it was deleted".into(),
                };
            }
        }
    }

    /// The rest, from the cluster as it is now.
    fn plan_again(&mut self) {
        let Some(node) = self.node.clone() else { return };
        if self.is_ending() {
            return;
        }
        let options = DrainOptions {
            strategy: Strategy::default(),
            bandwidth_max: self.operation.limits.map_or(0, |limits| limits.bandwidth_max),
            failed: self.failed_destinations(),
        };
        let plan = plan_drain(self.view(), &node, &options);
        for line in plan.moves {
            let name = line.domain.name();
            if line.waits {
                self.waiting.insert(name.clone());
            }
            let held = self.operation.moves.iter_mut().find(|row| domain_of(row) == name);
            let Some(row) = held else {
                self.operation.moves.push(planned(&line, &node));
                continue;
            };
            let Some(held) = row.r#move.as_mut() else { continue };
            if matches!(held.state(), MoveState::Planned | MoveState::Blocked) {
                held.to_node = line.to.as_ref().map(NodeId::name).unwrap_or_default();
                held.reason = line.reason;
                held.expected_time = Some(duration(ms(line.expected_time)));
                let blocked = line.to.is_none() && !line.waits;
                held.set_state(if blocked { MoveState::Blocked } else { MoveState::Planned });
            }
        }
    }

    fn failed_destinations(&self) -> BTreeMap<DomainId, BTreeMap<NodeId, String>> {
        let mut failed = BTreeMap::new();
        for row in &self.operation.moves {
            let Ok(id) = DomainId::from_name(domain_of(row)) else { continue };
            let why = row.r#move.as_ref().map(|line| line.error.clone()).unwrap_or_default();
            let nodes: BTreeMap<_, _> = row
                .failed_nodes
                .iter()
                .map(|node| (NodeId::trusted(node), format!("the move there failed: {why}")))
                .collect();
            if !nodes.is_empty() {
                failed.insert(id, nodes);
            }
        }
        failed
    }

    fn start_moves(&mut self) {
        if self.is_ending() {
            return;
        }
        let limits = self.operation.limits.unwrap_or_default();
        let deadline = self.operation.deadline.as_ref().map_or(i64::MAX, millis);
        for index in 0..self.operation.moves.len() {
            // The rest is begun in the next pass.
            if !self.moving.is_empty()
                && self.operation.encoded_len() + self.moving.bytes() > TXN_BYTES_ENOUGH
            {
                break;
            }
            let Some(line) = self.operation.moves[index].r#move.clone() else { continue };
            let (Ok(id), Ok(to)) =
                (DomainId::from_name(&line.domain), NodeId::from_name(&line.to_node))
            else {
                continue;
            };
            if line.state() != MoveState::Planned || !self.may_start(&id, &line, &to) {
                continue;
            }
            let Some(row) = self.cx.world.domains.get(&id) else { continue };
            let options = PlaceOptions { only: Some(to), ..PlaceOptions::default() };
            let parent = self.operation.id.clone();
            let result = self.moving.add(row, &options, &limits, deadline, &parent);
            let Some(line) = self.operation.moves[index].r#move.as_mut() else { continue };
            match result {
                Ok(child) => {
                    line.operation = format!("operations/{}", child.id);
                    line.set_state(MoveState::Moving);
                    line.error.clear();
                    self.claimed.insert(id);
                }
                // A drain plans again; a balance's plan does not hold any more.
                Err(refusal) if self.node.is_none() => {
                    line.set_state(MoveState::Failed);
                    line.error = refusal.to_string();
                }
                Err(_) => {}
            }
        }
    }

    /// The domain is free, and both links have room for one more.
    fn may_start(&mut self, id: &DomainId, line: &PlannedMove, to: &NodeId) -> bool {
        let bandwidth = self.operation.limits.map_or(0, |limits| limits.bandwidth_max);
        let domain = self.view().domains.get(id);
        let copies = domain.is_some_and(|domain| !domain.disks.is_empty());
        match domain.map(|domain| domain.mobility.clone()) {
            Some(Mobility::Cold) if !copies => return true,
            Some(Mobility::Live | Mobility::Cold) => {}
            Some(Mobility::Busy(_)) => {
                self.waiting.insert(line.domain.clone());
                return false;
            }
            Some(Mobility::Fixed(_)) | None => return false,
        }
        let room = |node: &NodeId, more: u32| {
            self.view()
                .nodes
                .get(node)
                .is_some_and(|view| view.migrations + more < parallel_moves(view, bandwidth))
        };
        // What was begun in this pass is not in the source's count yet.
        let begun = u32::try_from(self.claimed.len()).unwrap_or(u32::MAX);
        let from = NodeId::from_name(&line.from_node).is_ok_and(|from| room(&from, begun));
        let may = from && room(to, 0);
        if !may {
            self.waiting.insert(line.domain.clone());
        }
        may
    }

    fn conclude(&mut self) {
        self.operation.status_message = summary(&self.operation.moves);
        if self.in_flight() > 0 && !is_overdue(&self.operation, self.cx.now, LAST_MOVES_WAIT_MS) {
            self.operation.stalled_since = None;
            return;
        }
        match self.node.clone() {
            Some(node) => self.conclude_drain(&node),
            None => self.conclude_balance(),
        }
    }

    fn conclude_drain(&mut self, node: &NodeId) {
        let world = self.cx.world;
        let left: Vec<String> =
            world.owned(node).map(|row| format!("domains/{}", row.value.id)).collect();
        let is_free = left.is_empty();
        // Between this node and another: it may come, and what has left is still to be dropped.
        let between: Vec<String> = world
            .concerning(node)
            .filter(|row| row.value.node != node.as_str())
            .map(|row| format!("domains/{}", row.value.id))
            .collect();
        let on_its_way = !between.is_empty();
        if is_free && !on_its_way && self.is_confirmed(node) {
            return self.end_drain(node, DrainState::Drained, OperationState::Succeeded, None);
        }
        if is_free {
            let waits = if on_its_way {
                "for what is still between it and another node"
            } else {
                "for the agent to confirm"
            };
            self.operation.status_message =
                format!("{}; waits {waits}", self.operation.status_message);
        }
        let what = if is_free && on_its_way {
            let names = listed(between.into_iter(), LEFT_NAMED_MAX, ", ");
            format!("between {} and another node: {names}", node.name())
        } else if is_free {
            format!("the agent of {} has not confirmed that nothing is left", node.name())
        } else {
            let names = listed(left.into_iter(), LEFT_NAMED_MAX, ", ");
            format!("left on {}: {names}; its moves say why", node.name())
        };
        if self.operation.cancel_requested {
            let why = error("CANCELLED", format!("cancelled on request; {what}"));
            return self.end_drain(
                node,
                DrainState::Incomplete,
                OperationState::Cancelled,
                Some(why),
            );
        }
        if self.is_ending() {
            let why = error("DEADLINE_EXCEEDED", format!("the deadline has passed; {what}"));
            return self.fail_drain(node, why);
        }
        let open = |row: &MoveRecord| is(row, MoveState::Planned);
        let progress = self.operation.moves.iter().any(open) || !self.waiting.is_empty();
        if is_free || on_its_way || progress {
            self.operation.stalled_since = None;
            return;
        }
        let now = self.cx.now.wall_ms;
        let since = self.operation.stalled_since.as_ref().map_or(now, millis);
        self.operation.stalled_since = Some(timestamp(since));
        if self.nothing_can_change() || now - since >= STALL_WAIT_MS {
            self.fail_drain(node, error("BLOCKED", what));
        }
    }

    /// Its agent is there and says that nothing is left, in knowledge of how far the drain is.
    fn is_confirmed(&self, node: &NodeId) -> bool {
        let observed = self.cx.observed;
        let empty = |seen: &Arc<NodeObservation>| seen.connected && seen.domains.is_empty();
        observed.nodes.get(node).is_some_and(empty)
            && observed.knows(node.as_str(), self.row.mod_revision)
    }

    /// Only policies and failed moves are in the way, not room.
    fn nothing_can_change(&self) -> bool {
        self.operation.moves.iter().filter(|row| is(row, MoveState::Blocked)).all(|row| {
            DomainId::from_name(domain_of(row))
                .ok()
                .and_then(|id| self.view().domains.get(&id))
                .is_none_or(|domain| matches!(domain.mobility, Mobility::Fixed(_)))
        })
    }

    fn fail_drain(&mut self, node: &NodeId, why: OperationError) {
        self.end_drain(node, DrainState::Incomplete, OperationState::Failed, Some(why));
    }

    fn end_drain(
        &mut self,
        node: &NodeId,
        drain: DrainState,
        state: OperationState,
        why: Option<OperationError>,
    ) {
        end(&mut self.operation, state, why, self.cx.now);
        if state == OperationState::Succeeded {
            self.operation.status_message = format!("{} is drained", node.name());
        }
        self.done = true;
        if let Some(row) = self.cx.world.nodes.get(node) {
            let mut record = row.value.clone();
            record.set_drain_state(drain);
            record.drain_operation.clear();
            self.outcome = Some((drain, record));
        }
    }

    fn conclude_balance(&mut self) {
        if self.is_ending() {
            let (state, why) = if self.operation.cancel_requested {
                (OperationState::Cancelled, error("CANCELLED", "cancelled on request"))
            } else {
                (OperationState::Failed, error("DEADLINE_EXCEEDED", "the deadline has passed"))
            };
            end(&mut self.operation, state, Some(why), self.cx.now);
            self.done = true;
            return;
        }
        if self.operation.moves.iter().any(|row| is(row, MoveState::Planned)) {
            return;
        }
        let failed = self.operation.moves.iter().filter(|row| is(row, MoveState::Failed)).count();
        if failed == 0 {
            end(&mut self.operation, OperationState::Succeeded, None, self.cx.now);
        } else {
            let why = error("MOVES_FAILED", format!("{failed} moves failed"));
            end(&mut self.operation, OperationState::Failed, Some(why), self.cx.now);
        }
        self.done = true;
    }

    fn finish(mut self) -> Option<Pass> {
        fits(&mut self.operation);
        if self.operation == self.row.value && self.moving.is_empty() {
            return None;
        }
        let mut operation = self.operation;
        operation.update_time = Some(timestamp(self.cx.now.wall_ms));
        let subject = operation.target.clone();
        let mut txn = Txn::new().term_is(self.cx.term).unchanged(self.row).put(&operation);
        if let Some((drain, record)) = self.outcome
            && let Some(row) = self.cx.world.nodes.get(&NodeId::trusted(&record.id))
        {
            let (severity, reason, message) = match drain {
                DrainState::Drained => {
                    (EventSeverity::Info, "DRAIN_FINISHED", "its agent confirms it".to_owned())
                }
                _ => (EventSeverity::Warning, "DRAIN_INCOMPLETE", operation.status_message),
            };
            let event = self.cx.event(severity, subject.clone(), reason, message);
            txn = txn.unchanged(row).put(&record).put(&event);
        }
        if self.done
            && self.node.is_none()
            && let Some(row) = &self.cx.world.cluster
        {
            let mut cluster = row.value.clone();
            cluster.balance_operation.clear();
            txn = txn.unchanged(row).put(&cluster);
        }
        let txn = self.moving.finish(txn);
        Some(Pass { step: Step { subject, txn }, claimed: self.claimed })
    }
}
