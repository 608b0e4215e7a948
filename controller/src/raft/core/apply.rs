//! From committed entries to rows: the same on every member.

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;
use prost_raft::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType, Snapshot};

use super::super::identity::KEY_APPLIED;
use super::super::log::Position;
use super::{Core, Fatal, Limits, Waiter};
use crate::store::{Batch, CommitError, Family, Outcome, Revision, Row, RowKey, Txn, data_key};

/// What a turn's round has found out and may say only after its batch is written.
pub(super) struct Findings<C> {
    pub(super) applied: Vec<(Position, u64)>,
    pub(super) ended: Vec<(C, Result<Revision, CommitError>)>,
}

impl<C> Default for Findings<C> {
    fn default() -> Self {
        Self { applied: Vec::new(), ended: Vec::new() }
    }
}

impl<C: Waiter, R: Waiter> Core<C, R> {
    /// Applies what is committed, in memory, and adds it to the batch.
    pub(super) fn apply(
        &mut self,
        batch: &mut Batch,
        findings: &mut Findings<C>,
    ) -> Result<(), Fatal> {
        if self.committed.is_empty() {
            return Ok(());
        }
        while let Some(entry) = self.committed.pop_front() {
            let outcome = self.apply_entry(&entry, batch)?;
            self.applied = Position { index: entry.index, term: entry.term };
            findings.applied.push((self.applied, self.state.content_hash()));
            if let Some((term, waiter)) = self.proposals.remove(&entry.index) {
                // Another term's entry at the index: ours was overwritten, for good.
                let result = if term == entry.term {
                    commit_result(outcome)
                } else {
                    Err(self.not_leader())
                };
                findings.ended.push((waiter, result));
            }
        }
        self.forget_history(batch);
        self.put_applied(batch);
        // Raft's start refuses an applied index beyond the commit index: both in one batch.
        let hard_state = self.raw.raft.hard_state();
        debug_assert!(hard_state.commit >= self.applied.index);
        let mut known = self.raw.store().hard_state().clone();
        if known.commit < self.applied.index {
            known.commit = self.applied.index;
            self.raw.mut_store().set_hard_state(known, batch);
        }
        Ok(())
    }

    fn apply_entry(&mut self, entry: &Entry, batch: &mut Batch) -> Result<Outcome, Fatal> {
        // The type comes first: the entry that ends a joint change has no data, and must be
        // applied all the same.
        match entry.entry_type() {
            EntryType::EntryConfChange => {
                let change = ConfChange::decode(entry.data.as_slice()).map_err(codec)?;
                self.conf_state = self.raw.apply_conf_change(&change)?;
            }
            EntryType::EntryConfChangeV2 => {
                let change = ConfChangeV2::decode(entry.data.as_slice()).map_err(codec)?;
                self.conf_state = self.raw.apply_conf_change(&change)?;
            }
            EntryType::EntryNormal if entry.data.is_empty() => {}
            EntryType::EntryNormal => return self.apply_command(entry, batch),
        }
        Ok(Outcome::Committed { revision: self.state.revision() })
    }

    fn apply_command(&mut self, entry: &Entry, batch: &mut Batch) -> Result<Outcome, Fatal> {
        let txn = Txn::decode(Bytes::copy_from_slice(&entry.data))
            .map_err(|source| Fatal::Malformed { index: entry.index, source })?;
        let before = self.state.revision();
        let mut changes = Vec::new();
        let outcome = self.state.apply(entry.term, &txn, |key, row| {
            changes.push(change(key, row));
            match row {
                Some(row) => {
                    let row = pb::Row::from(row).encode_to_vec();
                    batch.put(Family::Data, data_key(key), row);
                }
                None => batch.delete(Family::Data, data_key(key)),
            }
        });
        if self.state.revision() != before {
            let set = pb::ChangeSet { changes }.encode_to_vec();
            batch.put(Family::Events, self.state.revision().to_be_bytes(), set);
        }
        Ok(outcome)
    }

    fn forget_history(&mut self, batch: &mut Batch) {
        let Limits { history_revisions, history_stride, .. } = self.options.limits;
        let keep_from = self.state.revision().saturating_sub(history_revisions);
        if keep_from >= self.compacted_revision + history_stride {
            let (from, to) = (0_u64.to_be_bytes(), (keep_from + 1).to_be_bytes());
            batch.delete_range(Family::Events, from, to);
            self.compacted_revision = keep_from;
        }
    }

    fn put_applied(&self, batch: &mut Batch) {
        let record = pb::Applied {
            index: self.applied.index,
            term: self.applied.term,
            revision: self.state.revision(),
            compacted_revision: self.compacted_revision,
            content_hash: self.state.content_hash(),
            conf_state: self.conf_state.encode_to_vec().into(),
        };
        batch.put(Family::State, KEY_APPLIED, record.encode_to_vec());
    }

    /// Takes a snapshot's state for the member's own.
    pub(super) fn install(&mut self, snapshot: &Snapshot, batch: &mut Batch) -> Result<(), Fatal> {
        let metadata = snapshot.get_metadata();
        let Some(state) = self.incoming.remove(&metadata.index) else {
            return Err(Fatal::Damaged(format!("snapshot {} was not read", metadata.index)));
        };
        tracing::info!(index = metadata.index, revision = state.revision(), "snapshot installed");
        batch.clear(Family::Data);
        batch.clear(Family::Events);
        for (key, row) in state.rows() {
            batch.put(Family::Data, data_key(key), pb::Row::from(row).encode_to_vec());
        }
        self.compacted_revision = state.revision();
        self.state = state;
        self.applied = Position { index: metadata.index, term: metadata.term };
        self.conf_state = metadata.get_conf_state().clone();
        self.raw.mut_store().restart(self.applied, batch);
        self.put_applied(batch);
        // What became of proposals below it is not known any more: their waiters are dropped.
        self.proposals = self.proposals.split_off(&(metadata.index + 1));
        Ok(())
    }
}

fn commit_result(outcome: Outcome) -> Result<Revision, CommitError> {
    match outcome {
        Outcome::Committed { revision } => Ok(revision),
        Outcome::Rejected { guard, mod_revision } => {
            Err(CommitError::Guard { index: guard, mod_revision })
        }
    }
}

fn change(key: &RowKey, row: Option<&Row>) -> pb::Change {
    use pb::change::Action;
    let action = row.map_or(Action::Delete(true), |row| Action::Put(row.value.clone()));
    pb::Change { table: key.0.into(), key: key.1.to_string(), action: Some(action) }
}

fn codec(error: prost_raft::DecodeError) -> Fatal {
    Fatal::Damaged(format!("a configuration change: {error}"))
}
