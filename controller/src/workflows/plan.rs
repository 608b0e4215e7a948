//! One pass over everything: from the world to the transactions that it calls for.

use std::collections::BTreeSet;

use drover_proto::v1::{OperationKind, OperationState};
use prost::Message;

use super::begin::orphaned;
use super::step::{Context, Step, Work, end, timestamp};
use super::{copy, drain, migration, nodes, operation, power, snapshot, storage, volumes};
use crate::model::{DomainId, DomainRecord, OperationRecord};
use crate::store::{TXN_BYTES_ENOUGH, Txn, Versioned};

/// Operations taken up in one transaction by a new leader.
const TAKE_UP_MAX: usize = 200;

/// Everything that can be done now. Each step is guarded by the rows it rests on, and no two
/// steps write the same row, so they can be committed in any order or at once; what fails its
/// guard is decided anew in the next pass.
#[must_use]
pub fn plan(cx: &Context<'_>) -> Vec<Step> {
    if let Some(step) = take_up(cx) {
        return vec![step];
    }
    let node = |(id, row)| nodes::step(cx, id, row).or_else(|| storage::pools(cx, id, row));
    let mut steps: Vec<Step> = cx.world.nodes.iter().filter_map(node).collect();
    if !steps.is_empty() {
        // Whether a node is lost is what most else depends on.
        return steps;
    }
    let claimed = drains(cx, &mut steps);
    // A step may write rows of its domain's volumes, too.
    let mut busy = BTreeSet::new();
    for (id, row) in cx.world.domains.iter().filter(|(id, _)| !claimed.contains(id)) {
        if let Some(step) = domain(cx, row) {
            busy.insert(id);
            steps.push(step);
        }
    }
    steps.extend(storage::steps(cx, &busy));
    steps.extend(snapshot::steps(cx, &busy));
    steps.extend(volumes::steps(cx));
    let lost = cx.world.operations.values().filter(|row| is_orphan(cx, &row.value));
    steps.extend(lost.map(|row| end_orphan(cx, row)));
    steps
}

/// Drains and balances; the domains whose rows they write.
///
/// Only one of them begins moves in a pass: two may want the same room. It is the one whose turn
/// was longest ago, so that none is starved by another that always has something to do. The
/// others write their own rows.
fn drains(cx: &Context<'_>, steps: &mut Vec<Step>) -> BTreeSet<DomainId> {
    let mut rows: Vec<_> =
        cx.world.operations.values().filter(|row| moves_many(&row.value)).collect();
    rows.sort_by_key(|row| row.mod_revision);
    let mut claimed = BTreeSet::new();
    for pass in rows.into_iter().filter_map(|row| drain::step(cx, row)) {
        if pass.claimed.is_empty() {
            steps.push(pass.step);
        } else if claimed.is_empty() {
            claimed = pass.claimed;
            steps.push(pass.step);
        }
    }
    claimed
}

fn domain(cx: &Context<'_>, row: &Versioned<DomainRecord>) -> Option<Step> {
    let mut work = Work::new(*cx, row);
    let deleting = row.value.state() == drover_proto::v1::DomainState::Deleting;
    if copy::is_copying(&row.value) && !deleting {
        copy::step(&mut work);
    } else if row.value.migration.is_some() && !deleting {
        migration::step(&mut work);
    } else {
        power::step(&mut work);
    }
    let removed = work.is_removed();
    operation::step(&mut work, removed);
    work.finish()
}

/// What an earlier leader began is this one's now, and that is written down.
fn take_up(cx: &Context<'_>) -> Option<Step> {
    let others = cx.world.operations.values().filter(|row| row.value.term != cx.term);
    let mut txn = Txn::new().term_is(cx.term);
    for row in others.take(TAKE_UP_MAX) {
        let mut operation = row.value.clone();
        operation.term = cx.term;
        operation.resumed_count += 1;
        operation.update_time = Some(timestamp(cx.now.wall_ms));
        if !txn.is_empty() && txn.bytes() + operation.encoded_len() > TXN_BYTES_ENOUGH {
            break;
        }
        txn = txn.unchanged(row).put(&operation);
    }
    (!txn.is_empty()).then(|| Step { subject: "operations".into(), txn })
}

fn moves_many(operation: &OperationRecord) -> bool {
    matches!(operation.kind(), OperationKind::DrainNode | OperationKind::BalanceCluster)
}

/// What it works on does not know of it: it would never end.
fn is_orphan(cx: &Context<'_>, operation: &OperationRecord) -> bool {
    if moves_many(operation) {
        return false;
    }
    if operation.kind() == OperationKind::CreateVolume {
        return volumes::made_by(cx, operation).is_none();
    }
    let domain =
        DomainId::from_name(&operation.target).ok().and_then(|id| cx.world.domains.get(&id));
    domain.is_none_or(|row| row.value.operation != operation.id)
}

fn end_orphan(cx: &Context<'_>, row: &Versioned<OperationRecord>) -> Step {
    let mut operation = row.value.clone();
    end(&mut operation, OperationState::Failed, Some(orphaned()), cx.now);
    let subject = format!("operations/{}", operation.id);
    Step { subject, txn: Txn::new().term_is(cx.term).unchanged(row).put(&operation) }
}
