//! What a step of work is decided from, and what it comes to: one transaction.

use std::collections::BTreeSet;

use drover_proto::v1::{DomainState, EventSeverity, NodeState, OperationError, OperationState};
use prost_types::Timestamp;

use super::content::discard;
use super::snapshot;
use crate::model::{
    DomainRecord, EventRecord, NodeId, NodeRecord, Observed, OperationId, OperationRecord,
    VolumeRecord, World, garbage,
};
use crate::store::{Txn, Versioned};

/// Now, on both clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Unix time in milliseconds: what is written, and outlives a leader.
    pub wall_ms: i64,
    /// The leader's monotonic clock in milliseconds: leases.
    pub mono_ms: u64,
}

/// Where names that nobody can guess come from. A simulator brings its own.
pub trait Ids: Send + Sync {
    /// A new UUID.
    fn uuid(&self) -> String;
    /// A one-time token.
    fn token(&self) -> String;
}

/// The operating system's randomness.
#[derive(Clone, Copy, Debug, Default)]
pub struct RandomIds;

impl Ids for RandomIds {
    fn uuid(&self) -> String {
        uuid::Uuid::new_v4().to_string()
    }
    fn token(&self) -> String {
        format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
    }
}

/// How long an agent may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// A node is lost after so long without a report.
    pub lease_ms: u64,
    /// How often an agent reports when nothing changes.
    pub report_interval_ms: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { lease_ms: 15_000, report_interval_ms: 1_000 }
    }
}

/// Everything that a decision rests on. Nothing else is looked at.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    /// The rows.
    pub world: &'a World,
    /// What agents say.
    pub observed: &'a Observed,
    /// Now.
    pub now: Now,
    /// The term that this member leads.
    pub term: u64,
    /// Since when, on the monotonic clock.
    pub leader_since_ms: u64,
    /// How the cluster is set up.
    pub settings: &'a Settings,
    /// For new names.
    pub ids: &'a dyn Ids,
}

impl Context<'_> {
    /// A new event, as yet unwritten.
    pub fn event(
        &self,
        severity: EventSeverity,
        subject: String,
        reason: &str,
        message: String,
    ) -> EventRecord {
        EventRecord {
            // Sorts by time; the revision is what orders events for readers.
            id: format!("{:013}-{}", self.now.wall_ms, self.ids.uuid()),
            time: Some(timestamp(self.now.wall_ms)),
            severity: severity.into(),
            subject,
            reason: reason.into(),
            message,
        }
    }

    /// A node's row.
    pub fn node(&self, id: &str) -> Option<&Versioned<NodeRecord>> {
        self.world.nodes.get(&NodeId::trusted(id))
    }

    /// Whether a node is lost, or no longer known at all.
    pub fn is_lost(&self, id: &str) -> bool {
        self.node(id).is_none_or(|node| node.value.state() != NodeState::Ready)
    }

    /// The boot of a node's host.
    pub fn boot_id(&self, node: &str) -> String {
        self.node(node).map(|node| node.value.boot_id.clone()).unwrap_or_default()
    }
}

/// One transaction to commit, and what for.
#[derive(Clone, Debug)]
pub struct Step {
    /// For the log.
    pub subject: String,
    /// Guarded, the leader's term included.
    pub txn: Txn,
}

/// One domain, the operation that holds it, and what becomes of both.
pub(super) struct Work<'a> {
    pub(super) cx: Context<'a>,
    pub(super) row: &'a Versioned<DomainRecord>,
    pub(super) domain: DomainRecord,
    operation_row: Option<&'a Versioned<OperationRecord>>,
    /// None when none holds the domain, or once it has ended.
    pub(super) operation: Option<OperationRecord>,
    ended: Option<OperationRecord>,
    removed: bool,
    /// Nodes whose copies of its volumes shall go.
    discards: BTreeSet<String>,
    /// Volumes that the domain has no more.
    drops: Vec<&'a Versioned<VolumeRecord>>,
    /// Other rows that the step writes.
    rows: Txn,
    events: Vec<EventRecord>,
}

impl<'a> Work<'a> {
    pub(super) fn new(cx: Context<'a>, row: &'a Versioned<DomainRecord>) -> Self {
        let id = &row.value.operation;
        let operation_row =
            (!id.is_empty()).then(|| cx.world.operations.get(&OperationId::trusted(id))).flatten();
        let mut domain = row.value.clone();
        if operation_row.is_none() {
            domain.operation.clear();
        }
        Self {
            cx,
            row,
            domain,
            operation_row,
            operation: operation_row.map(|row| row.value.clone()),
            ended: None,
            removed: false,
            discards: BTreeSet::new(),
            drops: Vec::new(),
            rows: Txn::new(),
            events: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> String {
        format!("domains/{}", self.domain.id)
    }

    pub(super) fn event(&mut self, severity: EventSeverity, reason: &str, message: String) {
        let event = self.cx.event(severity, self.name(), reason, message);
        self.events.push(event);
    }

    pub(super) fn set_state(&mut self, state: DomainState, reason: impl Into<String>) {
        self.domain.set_state(state);
        self.domain.state_reason = reason.into();
    }

    pub(super) fn next_epoch(&mut self) -> u64 {
        self.domain.epoch_max += 1;
        self.domain.epoch_max
    }

    pub(super) fn status(&mut self, message: impl Into<String>) {
        if let Some(operation) = &mut self.operation {
            operation.status_message = message.into();
        }
    }

    /// Ends the operation, if one holds the domain; the domain is free then.
    pub(super) fn end(&mut self, state: OperationState, error: Option<OperationError>) {
        if let Some(mut operation) = self.operation.take() {
            end(&mut operation, state, error, self.cx.now);
            self.ended = Some(operation);
        }
        self.domain.operation.clear();
    }

    /// Guards and writes of other rows, in the step's transaction.
    pub(super) fn write(&mut self, write: impl FnOnce(Txn) -> Txn) {
        self.rows = write(std::mem::take(&mut self.rows));
    }

    /// The row is to go, and the volumes and snapshots with it.
    pub(super) fn remove(&mut self) {
        self.removed = true;
        let migration = self.row.value.migration.iter();
        let ends = migration.flat_map(|m| [m.from.clone(), m.to.clone()]);
        self.discards.extend(ends.chain([self.row.value.node.clone()]));
    }

    /// The node's copies of the domain's volumes are to go: the domain is not there (any more).
    pub(super) fn discard_volumes(&mut self, node: &str) {
        self.discards.insert(node.to_owned());
    }

    /// What its state was saved to is not needed any more.
    pub(super) fn drop_memory(&mut self) {
        self.drops.extend(self.cx.world.memory_of(&self.row.value));
        self.domain.memory_volume.clear();
    }

    /// Its next start is from its own disks again.
    pub(super) fn drop_rescue(&mut self) {
        self.drops.extend(self.cx.world.rescue_of(&self.row.value));
        self.domain.rescue_image.clear();
    }

    pub(super) fn is_removed(&self) -> bool {
        self.removed
    }

    /// The operation is past its deadline by `grace_ms`.
    pub(super) fn is_overdue(&self, grace_ms: i64) -> bool {
        self.operation.as_ref().is_some_and(|op| is_overdue(op, self.cx.now, grace_ms))
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.operation.as_ref().is_some_and(|op| op.cancel_requested)
    }

    /// Whether what the node has of the volume is the very volume that the domain's owner has: it
    /// is that one's to keep or to remove.
    fn is_in_place(&self, volume: &VolumeRecord, node: &str) -> bool {
        let owner = if self.removed { &self.row.value.node } else { &self.domain.node };
        let mut stays = self.row.value.migration.iter().flat_map(|m| &m.shared_volumes);
        node != owner
            && (stays.any(|uid| *uid == volume.uid)
                || self.cx.world.is_shared(&volume.pool, node, owner))
    }

    /// The transaction; None when nothing changed.
    pub(super) fn finish(self) -> Option<Step> {
        let subject = self.name();
        let mut txn = Txn::new().term_is(self.cx.term);
        let mut changed = !self.events.is_empty() || !self.rows.is_empty();
        if self.removed {
            txn = txn.unchanged(self.row).delete::<DomainRecord>(self.domain.id.clone());
            changed = true;
        } else if self.domain != self.row.value {
            txn = txn.unchanged(self.row).put(&self.domain);
            changed = true;
        } else {
            txn = txn.unchanged(self.row);
        }
        if let Some(row) = self.operation_row
            && let Some(mut operation) = self.ended.as_ref().or(self.operation.as_ref()).cloned()
            && operation != row.value
        {
            operation.update_time = Some(timestamp(self.cx.now.wall_ms));
            txn = txn.unchanged(row).put(&operation);
            changed = true;
        }
        for volume in self.cx.world.volumes_of(&self.row.value) {
            let (pool, world) = (&volume.value.pool, self.cx.world);
            for node in self.discards.iter().filter(|node| self.cx.node(node).is_some()) {
                if self.is_in_place(&volume.value, node) {
                    continue;
                }
                let pool = (pool.as_str(), world.shared_uid(node, pool));
                txn = txn.put(&garbage(node, pool, &volume.value.uid, ""));
            }
            if self.removed {
                txn = txn.delete::<VolumeRecord>(volume.value.id.clone());
            }
        }
        for volume in self.drops.iter().filter(|_| !self.removed) {
            txn = discard(&self.cx, txn, &self.row.value.node, volume);
        }
        for row in self.cx.world.snapshots_of(&self.row.value).filter(|_| self.removed) {
            txn = snapshot::discard(&self.cx, txn, row);
        }
        txn = txn.and(self.rows);
        for event in &self.events {
            txn = txn.put(event);
        }
        changed.then_some(Step { subject, txn })
    }
}

/// Ends an operation.
pub(super) fn end(
    operation: &mut OperationRecord,
    state: OperationState,
    error: Option<OperationError>,
    now: Now,
) {
    operation.set_state(state);
    operation.status_message = match (state, &error) {
        (OperationState::Succeeded, _) => "done".into(),
        (_, Some(error)) => error.message.clone(),
        (OperationState::Cancelled, None) => "cancelled".into(),
        _ => operation.status_message.clone(),
    };
    operation.error = error;
    operation.finish_time = Some(timestamp(now.wall_ms));
    operation.update_time = operation.finish_time;
}

pub(super) fn is_overdue(operation: &OperationRecord, now: Now, grace_ms: i64) -> bool {
    operation.deadline.as_ref().is_some_and(|d| now.wall_ms > millis(d) + grace_ms)
}

/// An operation's error.
#[must_use]
pub fn error(reason: &str, message: impl Into<String>) -> OperationError {
    OperationError { reason: reason.into(), message: message.into() }
}

/// Unix milliseconds as protobuf has them.
#[must_use]
pub fn timestamp(wall_ms: i64) -> Timestamp {
    let nanos = i32::try_from(wall_ms.rem_euclid(1000) * 1_000_000).unwrap_or(0);
    Timestamp { seconds: wall_ms.div_euclid(1000), nanos }
}

/// Protobuf's time in Unix milliseconds.
#[must_use]
pub fn millis(time: &Timestamp) -> i64 {
    time.seconds.saturating_mul(1000).saturating_add(i64::from(time.nanos / 1_000_000))
}
