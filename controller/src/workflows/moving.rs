//! Domains that begin to move: alone, or many in one transaction.

use std::collections::BTreeMap;

use drover_proto::v1::{
    DomainState, EventSeverity, MigrationLimits, MigrationPhase, MigrationReport, OperationKind,
    OperationState,
};
use prost::Message;

use super::begin::{duration_ms, known_node, operation, placement, reserve};
use super::desired::duration;
use super::refusal::Refusal;
use super::step::{Context, end, timestamp};
use super::storage;
use crate::model::{
    DomainId, DomainRecord, EventRecord, Migration, MigrationStage, NodeId, NodeRecord,
    OperationRecord, is_at_rest, needs,
};
use crate::scheduler::{ClusterView, PlaceOptions, PoolNeeds, place};
use crate::store::{Txn, Versioned};

/// What copying a domain without disks may take.
const TOTAL_TIME_MS: u64 = 10 * 60_000;
/// Disks are copied at this rate at least, bytes a second.
const DISK_RATE_MIN: u64 = 10 << 20;
const TOTAL_TIME_MS_MAX: u64 = 24 * 3_600_000;
/// Beyond the time that the copying may take: preparing and switching over.
const MIGRATE_WAIT_MS: i64 = 60_000;

/// Several domains that begin to move in one transaction, each taking room that the next one
/// does not have.
pub(super) struct Moving<'a> {
    cx: Context<'a>,
    view: ClusterView,
    domains: Vec<(&'a Versioned<DomainRecord>, DomainRecord)>,
    operations: Vec<OperationRecord>,
    events: Vec<EventRecord>,
    destinations: BTreeMap<NodeId, &'a Versioned<NodeRecord>>,
    bytes: usize,
}

impl<'a> Moving<'a> {
    pub(super) fn new(cx: &Context<'a>, view: &ClusterView) -> Self {
        Self {
            cx: *cx,
            view: view.clone(),
            domains: Vec::new(),
            operations: Vec::new(),
            events: Vec::new(),
            destinations: BTreeMap::new(),
            bytes: 0,
        }
    }

    /// The picture with everything added so far.
    pub(super) fn view(&self) -> &ClusterView {
        &self.view
    }

    /// Places one more. The row must be free and movable. It ends at `latest_ms` whatever its
    /// limits allow.
    pub(super) fn add(
        &mut self,
        row: &'a Versioned<DomainRecord>,
        options: &PlaceOptions,
        limits: &MigrationLimits,
        latest_ms: i64,
        parent: &str,
    ) -> Result<OperationRecord, Refusal> {
        let cx = self.cx;
        let needs = needs(&row.value);
        let mut options = options.clone();
        options.disks = cx.world.pool_needs(&row.value);
        let origin = cx.world.origin(&row.value);
        options.origin = Some(origin.clone());
        options.excluded.extend(storage::unclean(&cx, &row.value));
        let decision = place(&self.view, needs, &options)
            .map_err(|no_room| Refusal::NoRoom { needs, no_room })?;
        let node = known_node(&cx, &decision.node)?;
        let to = decision.node.clone();
        self.view.promise(&to, needs, &options.disks, &origin);
        let mut copied = options.disks.clone();
        if let Some(target) = self.view.nodes.get_mut(&to) {
            copied = target.copied(&options.disks, &origin);
            target.migrations += 1;
        }
        let limits = with_total_time(limits, &copied);
        let wait = duration_ms(limits.total_time.as_ref()).saturating_add(MIGRATE_WAIT_MS);
        let deadline_ms = latest_ms.min(cx.now.wall_ms.saturating_add(wait));
        self.destinations.insert(to.clone(), node);

        let id = DomainId::trusted(&row.value.id);
        let mut operation = operation(&cx, OperationKind::MigrateDomain, id.name(), 0);
        operation.deadline = Some(timestamp(deadline_ms));
        operation.parent = parent.to_owned();
        operation.migration = Some(MigrationReport {
            from_node: format!("nodes/{}", row.value.node),
            to_node: to.name(),
            ..MigrationReport::default()
        });
        let mut domain = row.value.clone();
        domain.placement = Some(placement(&cx, &decision));
        domain.epoch_max += 1;
        let stays = cx.world.stays_behind(&row.value, &row.value.node, to.as_str());
        let disk_bytes = copied.values().sum::<u64>();
        // What is shared must be seen at the other node before that is the owner.
        if is_at_rest(&row.value) && !options.disks.is_empty() {
            let what = if disk_bytes > 0 { "copies its volumes" } else { "looks for its volumes" };
            operation.status_message = format!("{} {what}{stays}", to.name());
            if let Some(report) = &mut operation.migration {
                report.set_phase(MigrationPhase::CopyingDisks);
                report.disk_bytes_total = disk_bytes;
                report.disk_remaining_bytes = disk_bytes;
            }
            domain.operation.clone_from(&operation.id);
            domain.migration = Some(Migration {
                stage: MigrationStage::CopyingStopped.into(),
                ..begun(&cx, row, &operation, &to, limits)
            });
            self.started(row, &to);
        } else if is_at_rest(&row.value) {
            domain.node = to.as_str().to_owned();
            domain.epoch = domain.epoch_max;
            end(&mut operation, OperationState::Succeeded, None, cx.now);
            let message = format!("not running: from nodes/{} to {}", row.value.node, to.name());
            self.events.push(cx.event(EventSeverity::Info, id.name(), "DOMAIN_MIGRATED", message));
        } else {
            operation.status_message = format!("{} prepares{stays}", to.name());
            domain.operation.clone_from(&operation.id);
            domain.migration = Some(Migration {
                token: cx.ids.token(),
                stage: MigrationStage::Preparing.into(),
                ..begun(&cx, row, &operation, &to, limits)
            });
            domain.set_state(DomainState::Migrating);
            domain.state_reason = format!("to {}", to.name());
            self.started(row, &to);
        }
        // An event and the destination's row are small.
        self.bytes += domain.encoded_len() + operation.encoded_len() + 1024;
        self.domains.push((row, domain));
        self.operations.push(operation.clone());
        Ok(operation)
    }

    fn started(&mut self, row: &Versioned<DomainRecord>, to: &NodeId) {
        let stays = self.cx.world.stays_behind(&row.value, &row.value.node, to.as_str());
        let message = format!("from nodes/{} to {}{stays}", row.value.node, to.name());
        let subject = format!("domains/{}", row.value.id);
        let event = self.cx.event(EventSeverity::Info, subject, "MIGRATION_STARTED", message);
        self.events.push(event);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.domains.is_empty()
    }

    /// About the size of what has been added.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn finish(self, mut txn: Txn) -> Txn {
        for (row, domain) in &self.domains {
            txn = txn.unchanged(row).put(domain);
        }
        for operation in &self.operations {
            txn = txn.put(operation);
        }
        for event in &self.events {
            txn = txn.put(event);
        }
        self.destinations.into_values().fold(txn, reserve)
    }
}

/// What all migrations begin with, under the epoch that the domain's next owner will have.
fn begun(
    cx: &Context<'_>,
    row: &Versioned<DomainRecord>,
    operation: &OperationRecord,
    to: &NodeId,
    limits: MigrationLimits,
) -> Migration {
    Migration {
        id: operation.id.clone(),
        from: row.value.node.clone(),
        to: to.as_str().to_owned(),
        from_epoch: row.value.epoch,
        to_epoch: row.value.epoch_max + 1,
        stage_time: Some(timestamp(cx.now.wall_ms)),
        limits: Some(limits),
        shared_volumes: shared_volumes(cx, &row.value, to),
        ..Migration::default()
    }
}

/// The volumes that lie in a pool that both nodes share.
fn shared_volumes(cx: &Context<'_>, domain: &DomainRecord, to: &NodeId) -> Vec<String> {
    let volumes = cx.world.volumes_of(domain).map(|row| &row.value);
    let stays = volumes.filter(|v| cx.world.is_shared(&v.pool, &domain.node, to.as_str()));
    stays.map(|volume| volume.uid.clone()).collect()
}

/// What a move may take, where the caller has not said: enough for the memory, and for the disks
/// at a rate that any link has.
fn with_total_time(limits: &MigrationLimits, disks: &PoolNeeds) -> MigrationLimits {
    if limits.total_time.is_some() {
        return *limits;
    }
    let disk_ms = disks.values().sum::<u64>() / (DISK_RATE_MIN / 1000);
    let total_time = duration(TOTAL_TIME_MS.saturating_add(disk_ms).min(TOTAL_TIME_MS_MAX));
    MigrationLimits { total_time: Some(total_time), ..*limits }
}
