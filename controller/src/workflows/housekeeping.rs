//! What is kept for people is bounded: events, finished operations, request ids.

use drover_proto::v1::OperationState;

use super::step::{Now, millis};
use crate::model::{
    CLUSTER_KEY, ClusterRecord, EventRecord, OperationRecord, RequestRecord, is_active,
};
use crate::store::{Record, Txn, Versioned, View};

/// So many events are kept.
pub const EVENTS_MAX: usize = 10_000;
/// So many finished operations are kept.
pub const FINISHED_OPERATIONS_MAX: usize = 2_000;
/// A request id is remembered this long,
pub const REQUEST_ID_MS: i64 = 24 * 3_600_000;
/// and so many of them.
pub const REQUESTS_MAX: usize = 10_000;
/// Rows of a kind that are removed in one transaction.
pub const BATCH_MAX: usize = 500;

/// What is over the bounds.
#[derive(Clone, Debug)]
pub struct Tidy {
    /// Removes it, or the oldest of it.
    pub txn: Txn,
    /// There is more than one transaction removes.
    pub more: bool,
}

/// Removes what is over the bounds; None when nothing is.
#[must_use]
pub fn tidy(view: &View, term: u64, now: Now) -> Option<Tidy> {
    let mut tidy = Tidy { txn: Txn::new().term_is(term), more: false };
    events(view, &mut tidy);
    requests(view, now, &mut tidy);
    operations(view, &mut tidy);
    (!tidy.txn.is_empty()).then_some(tidy)
}

impl Tidy {
    /// How many of those that are over the bounds go now.
    fn batch(&mut self, over: usize) -> usize {
        self.more |= over > BATCH_MAX;
        over.min(BATCH_MAX)
    }

    fn delete<T: Record>(&mut self, row: &Versioned<T>) {
        self.txn = std::mem::take(&mut self.txn).delete::<T>(row.value.key());
    }
}

fn events(view: &View, tidy: &mut Tidy) {
    let mut rows: Vec<Versioned<EventRecord>> = view.all().collect();
    let over = tidy.batch(rows.len().saturating_sub(EVENTS_MAX));
    if over == 0 {
        return;
    }
    rows.sort_by_key(|row| row.create_revision);
    let held = view.get::<ClusterRecord>(CLUSTER_KEY);
    let mut cluster = held.as_ref().map(|row| row.value.clone()).unwrap_or_default();
    let txn = std::mem::take(&mut tidy.txn);
    tidy.txn = match &held {
        Some(row) => txn.unchanged(row),
        None => txn.absent::<ClusterRecord>(CLUSTER_KEY),
    };
    for row in &rows[..over] {
        cluster.events_dropped_revision = row.create_revision;
        tidy.delete(row);
    }
    tidy.txn = std::mem::take(&mut tidy.txn).put(&cluster);
}

fn requests(view: &View, now: Now, tidy: &mut Tidy) {
    let old = |row: &Versioned<RequestRecord>| {
        row.value.time.as_ref().is_none_or(|time| now.wall_ms - millis(time) > REQUEST_ID_MS)
    };
    let mut rows: Vec<Versioned<RequestRecord>> = view.all().collect();
    rows.sort_by_key(|row| row.create_revision);
    let over = rows.len().saturating_sub(REQUESTS_MAX);
    let aged = rows.iter().skip(over).filter(|row| old(row)).count();
    let batch = tidy.batch(over + aged);
    let gone = rows.iter().enumerate().filter(|(index, row)| *index < over || old(row));
    for (_, row) in gone.take(batch) {
        tidy.delete(row);
    }
}

fn operations(view: &View, tidy: &mut Tidy) {
    let mut rows: Vec<_> =
        view.all::<OperationRecord>().filter(|row| !is_active(&row.value)).collect();
    let over = tidy.batch(rows.len().saturating_sub(FINISHED_OPERATIONS_MAX));
    rows.sort_by_key(|row| row.mod_revision);
    debug_assert!(rows.iter().all(|row| row.value.state() != OperationState::Running));
    for row in rows.iter().take(over) {
        tidy.delete(row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::State;
    use crate::workflows::timestamp;

    /// So much at once that it takes several transactions; each knows whether it is the last.
    #[test]
    fn everything_over_the_bounds_goes_the_oldest_first() {
        let now = Now { wall_ms: 1_700_000_000_000, mono_ms: 0 };
        let mut state = State::default();
        let over = BATCH_MAX + 1;
        let put = |state: &mut State, txn: Txn| {
            state.apply(1, &txn, |_, _| {});
        };
        // Older ids sort behind newer ones: it must not be the key that decides.
        for n in (0..REQUESTS_MAX + over).rev() {
            let time = Some(timestamp(now.wall_ms));
            let row = RequestRecord { id: format!("{n:06}"), time, ..RequestRecord::default() };
            put(&mut state, Txn::new().put(&row));
        }
        for n in 0..EVENTS_MAX + 1 {
            let row = EventRecord { id: format!("{n:06}"), ..EventRecord::default() };
            put(&mut state, Txn::new().put(&row));
        }
        for n in 0..FINISHED_OPERATIONS_MAX + 2 * BATCH_MAX {
            let mut row = OperationRecord { id: format!("{n:06}"), ..OperationRecord::default() };
            row.set_state(OperationState::Succeeded);
            put(&mut state, Txn::new().put(&row));
        }
        let mut more = Vec::new();
        while let Some(tidy) = tidy(&View::from(state.clone()), 1, now) {
            more.push(tidy.more);
            put(&mut state, tidy.txn);
        }
        assert_eq!(more, [true, false]);
        let view = View::from(state.clone());
        let left: Vec<_> = view.all::<RequestRecord>().map(|row| row.value.id).collect();
        assert_eq!(left.len(), REQUESTS_MAX);
        assert_eq!(left.last().unwrap(), &format!("{:06}", REQUESTS_MAX - 1));
        assert_eq!(view.all::<EventRecord>().count(), EVENTS_MAX);
        assert_eq!(view.all::<OperationRecord>().count(), FINISHED_OPERATIONS_MAX);

        // A day later none of the request ids is remembered.
        let later = Now { wall_ms: now.wall_ms + REQUEST_ID_MS + 1, mono_ms: 0 };
        let mut rounds = 0;
        while let Some(tidy) = tidy(&View::from(state.clone()), 1, later) {
            rounds += 1;
            put(&mut state, tidy.txn);
        }
        assert_eq!(rounds, REQUESTS_MAX / BATCH_MAX);
        assert_eq!(View::from(state).all::<RequestRecord>().count(), 0);
    }
}
