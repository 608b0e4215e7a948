//! Rows and reports as callers see them.

use drover_proto::v1::{
    Domain, DomainState, Event, MigrationPhase, MigrationReport, MoveState, Node, NodeCapacity,
    Operation, OperationKind, OperationState, PlannedMove,
};

use crate::model::{
    DomainId, DomainRecord, EventRecord, MigrationStage, MoveRecord, NodeId, NodeRecord, Observed,
    OperationId, OperationRecord, VolumeRecord, World,
};
use crate::store::{Versioned, View};
use crate::workflows::begin::etag;
use crate::workflows::copy;
use crate::workflows::migration::{figures, merge_report};

/// Shares of a migration's bar: the first pass is nearly all of it.
const COPIED_PERCENT: u64 = 90;

pub(super) fn node(row: &Versioned<NodeRecord>, world: &World, observed: &Observed) -> Node {
    let record = &row.value;
    let id = NodeId::trusted(&record.id);
    let reserved = world.reserved(&id);
    let seen = observed.nodes.get(&id);
    Node {
        name: id.name(),
        uid: record.uid.clone(),
        state: record.state,
        state_reason: record.state_reason.clone(),
        cordoned: record.cordoned,
        drain_state: record.drain_state,
        address: record.address.clone(),
        capacity: record.capacity,
        reserved: Some(NodeCapacity { vcpus: reserved.vcpus, memory_bytes: reserved.memory_bytes }),
        usage: seen.filter(|seen| seen.reported).map(|seen| seen.usage),
        domain_count: u32::try_from(world.owned(&id).count()).unwrap_or(u32::MAX),
        register_time: record.register_time,
        state_time: record.state_time,
        agent_version: record.agent_version.clone(),
        kernel_version: record.kernel_version.clone(),
        etag: etag(row.mod_revision),
    }
}

pub(super) fn domain(row: &Versioned<DomainRecord>, observed: &Observed) -> Domain {
    let record = &row.value;
    let seen = observed.domain(&record.node, &record.uid);
    let spec = record.spec.clone().unwrap_or_default();
    let addresses = spec.interfaces.iter().flat_map(|nic| nic.addresses.iter().cloned());
    Domain {
        name: format!("domains/{}", record.id),
        uid: record.uid.clone(),
        state: record.state,
        state_reason: record.state_reason.clone(),
        node: full("nodes", &record.node),
        epoch: record.epoch,
        desired_power: record.desired_power,
        operation: full("operations", &record.operation),
        create_time: record.create_time,
        etag: etag(row.mod_revision),
        placement: record.placement.clone(),
        usage: seen.filter(|_| record.state() != DomainState::Lost).and_then(|seen| seen.usage),
        last_exit: record.last_exit,
        addresses: addresses.collect(),
        spec: Some(spec),
        rescue_image: full("images", &record.rescue_image),
        next_vcpus: record.next_vcpus,
        next_memory_bytes: record.next_memory_bytes,
        generation_id: record.generation_id.clone(),
    }
}

/// With the figures of what is under way, as the agents said last.
pub(super) fn operation(
    row: &Versioned<OperationRecord>,
    view: &View,
    observed: &Observed,
) -> Operation {
    let record = &row.value;
    let migration = live_report(record, view, observed);
    let moves: Vec<PlannedMove> =
        record.moves.iter().filter_map(|row| live_move(row, view, observed)).collect();
    Operation {
        name: full("operations", &record.id),
        kind: record.kind,
        target: record.target.clone(),
        state: record.state,
        status_message: status(record, view, observed),
        progress_percent: progress(record, migration.as_ref(), &moves),
        error: record.error.clone(),
        create_time: record.create_time,
        update_time: record.update_time,
        finish_time: record.finish_time,
        deadline: record.deadline,
        cancel_requested: record.cancel_requested,
        parent: full("operations", &record.parent),
        migration,
        moves,
        etag: etag(row.mod_revision),
        resumed_count: record.resumed_count,
    }
}

pub(super) fn event(row: &Versioned<EventRecord>) -> Event {
    let record = &row.value;
    Event {
        revision: row.create_revision,
        time: record.time,
        severity: record.severity,
        subject: record.subject.clone(),
        reason: record.reason.clone(),
        message: record.message.clone(),
    }
}

/// With what is not worth writing: how far a stopped domain's volumes are.
fn status(record: &OperationRecord, view: &View, observed: &Observed) -> String {
    let held = record.status_message.clone();
    if record.kind() != OperationKind::MigrateDomain || !is_running(record) {
        return held;
    }
    let domain = DomainId::from_name(&record.target)
        .ok()
        .and_then(|id| view.get::<DomainRecord>(id.as_str()));
    let Some(domain) = domain.map(|row| row.value) else { return held };
    let copied = domain
        .migration
        .as_ref()
        .filter(|m| m.id == record.id && m.stage() == MigrationStage::CopyingStopped);
    let Some(migration) = copied else { return held };
    let volumes: Vec<VolumeRecord> = domain
        .spec
        .iter()
        .flat_map(|spec| &spec.disks)
        .filter_map(|disk| disk.volume.strip_prefix("volumes/"))
        .filter_map(|id| view.get::<VolumeRecord>(id).map(|row| row.value))
        .collect();
    match copy::progress(observed, migration, volumes.iter()) {
        Some(text) => format!("{held}; {text}"),
        None => held,
    }
}

fn live_report(
    record: &OperationRecord,
    view: &View,
    observed: &Observed,
) -> Option<MigrationReport> {
    let held = record.migration.clone();
    if record.kind() != OperationKind::MigrateDomain || !is_running(record) {
        return held;
    }
    let domain = DomainId::from_name(&record.target)
        .ok()
        .and_then(|id| view.get::<DomainRecord>(id.as_str()));
    let Some(domain) = domain else { return held };
    let Some(migration) = domain.value.migration.filter(|m| m.id == record.id) else {
        return held;
    };
    let said = figures(observed, &migration, &domain.value.uid);
    Some(merge_report(held.unwrap_or_default(), said, &migration))
}

fn live_move(row: &MoveRecord, view: &View, observed: &Observed) -> Option<PlannedMove> {
    let mut line = row.r#move.clone()?;
    if line.state() == MoveState::Moving
        && let Ok(id) = OperationId::from_name(&line.operation)
        && let Some(child) = view.get::<OperationRecord>(id.as_str())
    {
        let report = live_report(&child.value, view, observed);
        line.progress_percent = progress(&child.value, report.as_ref(), &[]);
        if let Some(report) = report {
            line.pause_us = report.pause_us;
            line.total_us = report.total_us;
        }
    }
    Some(line)
}

fn progress(
    record: &OperationRecord,
    migration: Option<&MigrationReport>,
    moves: &[PlannedMove],
) -> u32 {
    let percent = match record.state() {
        OperationState::Succeeded => 100,
        _ if !moves.is_empty() => {
            let done = |line: &PlannedMove| match line.state() {
                MoveState::Moved | MoveState::Skipped => 100,
                _ => u64::from(line.progress_percent),
            };
            moves.iter().map(done).sum::<u64>() / moves.len() as u64
        }
        _ => migration.map_or(0, copied),
    };
    u32::try_from(percent.min(100)).unwrap_or(100)
}

fn copied(report: &MigrationReport) -> u64 {
    match report.phase() {
        MigrationPhase::Unspecified | MigrationPhase::Preparing => 0,
        MigrationPhase::HandedOver => 95,
        MigrationPhase::Done => 100,
        MigrationPhase::CopyingDisks => {
            let left = report.disk_remaining_bytes.min(report.disk_bytes_total);
            let done = report.disk_bytes_total - left;
            done.saturating_mul(COPIED_PERCENT) / report.disk_bytes_total.max(1)
        }
        MigrationPhase::Copying | MigrationPhase::Aborting => {
            if report.memory_bytes == 0 {
                return 0;
            }
            if report.rounds > 1 {
                return COPIED_PERCENT;
            }
            let left = report.remaining_bytes.min(report.memory_bytes);
            (report.memory_bytes - left).saturating_mul(COPIED_PERCENT) / report.memory_bytes
        }
    }
}

fn is_running(record: &OperationRecord) -> bool {
    crate::model::is_active(record)
}

fn full(collection: &str, id: &str) -> String {
    if id.is_empty() { String::new() } else { format!("{collection}/{id}") }
}
