//! What is kept for people is bounded: events, finished operations, request ids.

use drover_proto::v1::OperationState;

use super::step::{Now, millis};
use crate::model::{
    CLUSTER_KEY, ClusterRecord, EventRecord, OperationRecord, RequestRecord, is_active,
};
use crate::store::{Txn, Versioned, View};

/// So many events are kept.
pub const EVENTS_MAX: usize = 10_000;
/// So many finished operations are kept.
pub const FINISHED_OPERATIONS_MAX: usize = 2_000;
/// A request id is remembered this long.
pub const REQUEST_ID_MS: i64 = 24 * 3_600_000;
/// Rows removed in one transaction.
const BATCH_MAX: usize = 500;

/// Removes what is over the bounds; None when nothing is.
#[must_use]
pub fn tidy(view: &View, term: u64, now: Now) -> Option<Txn> {
    let txn = Txn::new().term_is(term);
    let txn = operations(view, requests(view, now, events(view, txn)));
    (!txn.is_empty()).then_some(txn)
}

fn events(view: &View, mut txn: Txn) -> Txn {
    let mut rows: Vec<Versioned<EventRecord>> = view.all().collect();
    let over = rows.len().saturating_sub(EVENTS_MAX).min(BATCH_MAX);
    if over == 0 {
        return txn;
    }
    rows.sort_by_key(|row| row.create_revision);
    let held = view.get::<ClusterRecord>(CLUSTER_KEY);
    let mut cluster = held.as_ref().map(|row| row.value.clone()).unwrap_or_default();
    txn = match &held {
        Some(row) => txn.unchanged(row),
        None => txn.absent::<ClusterRecord>(CLUSTER_KEY),
    };
    for row in &rows[..over] {
        cluster.events_dropped_revision = row.create_revision;
        txn = txn.delete::<EventRecord>(row.value.id.clone());
    }
    txn.put(&cluster)
}

fn requests(view: &View, now: Now, txn: Txn) -> Txn {
    let old = |row: &Versioned<RequestRecord>| {
        row.value.time.as_ref().is_none_or(|time| now.wall_ms - millis(time) > REQUEST_ID_MS)
    };
    view.all::<RequestRecord>()
        .filter(old)
        .take(BATCH_MAX)
        .fold(txn, |txn, row| txn.delete::<RequestRecord>(row.value.id))
}

fn operations(view: &View, txn: Txn) -> Txn {
    let mut rows: Vec<_> =
        view.all::<OperationRecord>().filter(|row| !is_active(&row.value)).collect();
    let over = rows.len().saturating_sub(FINISHED_OPERATIONS_MAX).min(BATCH_MAX);
    rows.sort_by_key(|row| row.mod_revision);
    debug_assert!(rows.iter().all(|row| row.value.state() != OperationState::Running));
    rows.into_iter().take(over).fold(txn, |txn, row| txn.delete::<OperationRecord>(row.value.id))
}
