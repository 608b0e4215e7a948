//! Streams of committed changes.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;
use tokio::sync::watch;

use super::{Engine, EngineError, Family, Record, State};

/// Revisions read from disk at a time.
const READ_REVISIONS: usize = 256;

/// What one revision changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChangeSet {
    /// The revision.
    pub revision: u64,
    /// The changes, in the order of the writes.
    pub changes: Vec<Change>,
}

/// One row, changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The table's number.
    pub table: u8,
    /// The row's key.
    pub key: String,
    /// The encoded record; None when the row was removed.
    pub value: Option<Bytes>,
}

impl Change {
    /// Whether it is a row of `T`'s table.
    #[must_use]
    pub fn is<T: Record>(&self) -> bool {
        self.table == T::TABLE.number()
    }

    /// The record, when this is a write of a `T`; None for a removal or another table.
    #[must_use]
    pub fn record<T: Record>(&self) -> Option<T> {
        let value = self.value.clone().filter(|_| self.is::<T>())?;
        T::decode(value).ok()
    }
}

/// The history does not reach back that far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("changes before revision {oldest} are no longer kept")]
pub struct Compacted {
    /// The oldest revision whose changes are still kept: watch from one below it, or read a
    /// view and watch from the view's revision.
    pub oldest: u64,
}

/// Why a stream ended.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The reader was so slow that the history went past it.
    #[error(transparent)]
    Compacted(#[from] Compacted),
    /// The disk failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The store has been closed.
    #[error("this controller is stopping")]
    Closed,
}

/// Committed changes in order, without a gap, from some revision on.
pub struct ChangeStream {
    engine: Arc<dyn Engine>,
    state: watch::Receiver<State>,
    /// The last revision read from disk.
    position: u64,
    read: VecDeque<ChangeSet>,
}

impl ChangeStream {
    pub(crate) fn open(
        engine: Arc<dyn Engine>,
        state: watch::Receiver<State>,
        from: u64,
    ) -> Result<Self, Compacted> {
        let revision = state.borrow().revision();
        let mut stream = Self { engine, state, position: from, read: VecDeque::new() };
        match stream.fill(revision) {
            Err(WatchError::Compacted(compacted)) => Err(compacted),
            // A failing disk ends the process; the stream's reader learns it from `next`.
            _ => Ok(stream),
        }
    }

    /// The next change set; waits for one. Cancel-safe.
    ///
    /// # Errors
    /// After an error the stream is of no more use.
    pub async fn next(&mut self) -> Result<ChangeSet, WatchError> {
        loop {
            if let Some(set) = self.read.pop_front() {
                return Ok(set);
            }
            let revision = self.state.borrow_and_update().revision();
            if revision > self.position {
                self.fill(revision)?;
            } else {
                self.state.changed().await.map_err(|_| WatchError::Closed)?;
            }
        }
    }

    /// Reads on from `position`, up to `revision`.
    fn fill(&mut self, revision: u64) -> Result<(), WatchError> {
        if revision <= self.position {
            return Ok(());
        }
        let from = (self.position + 1).to_be_bytes();
        let rows = self.engine.scan(Family::Events, &from, READ_REVISIONS)?;
        let oldest = match rows.first() {
            Some((key, _)) => parse_revision(key)?,
            None => revision + 1,
        };
        if oldest != self.position + 1 {
            return Err(Compacted { oldest }.into());
        }
        for (key, value) in rows {
            let set = parse(&key, value)?;
            // What is on disk but not published yet is for the next time: whoever is told a
            // change finds it in a view.
            if set.revision > revision {
                break;
            }
            self.position = set.revision;
            self.read.push_back(set);
        }
        Ok(())
    }
}

fn parse_revision(key: &[u8]) -> Result<u64, EngineError> {
    let bytes =
        key.try_into().map_err(|_| EngineError("a key of the change history is damaged".into()))?;
    Ok(u64::from_be_bytes(bytes))
}

fn parse(key: &[u8], value: Vec<u8>) -> Result<ChangeSet, EngineError> {
    let revision = parse_revision(key)?;
    let set = pb::ChangeSet::decode(Bytes::from(value))
        .map_err(|e| EngineError(format!("change set {revision}: {e}")))?;
    let changes = set.changes.into_iter().map(|change| {
        let value = match change.action {
            Some(pb::change::Action::Put(value)) => Some(value),
            Some(pb::change::Action::Delete(_)) | None => None,
        };
        let table = u8::try_from(change.table)
            .map_err(|_| EngineError(format!("change set {revision}: table {}", change.table)))?;
        Ok(Change { table, key: change.key, value })
    });
    Ok(ChangeSet { revision, changes: changes.collect::<Result<_, EngineError>>()? })
}
