//! Raft's log and hard state: in memory whole, on disk in the engine.
//!
//! Compaction bounds the log (see [`Limits`](super::Limits)), so all of it fits in memory and
//! Raft never waits for a read. [`Log`] only says what must go into the next batch; writing it
//! is the core's business.

use std::cell::RefCell;
use std::collections::VecDeque;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;
use prost_raft::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

use crate::store::{Batch, Engine, EngineError, Family};

/// Entries read at a time when the log is opened.
const READ_ENTRIES: usize = 1024;

const KEY_HARD_STATE: &[u8] = b"hard_state";
const KEY_TRUNCATED: &[u8] = b"truncated";

/// The log, as Raft reads it.
pub(crate) struct Log {
    /// From the one behind `truncated`, without a gap.
    entries: VecDeque<Entry>,
    bytes: usize,
    truncated: Position,
    hard_state: HardState,
    /// As of the applied index when the log was opened: read once, by Raft's start.
    conf_state: ConfState,
    snapshot: RefCell<SnapshotSlot>,
}

/// A place in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    pub(crate) index: u64,
    pub(crate) term: u64,
}

/// Raft asks for a snapshot and is told "not yet"; one is built aside and waits here for it
/// to ask again.
#[derive(Default)]
struct SnapshotSlot {
    /// It was asked for, at this index or later.
    wanted: Option<u64>,
    built: Option<Snapshot>,
}

impl Log {
    /// What the very first batch of a data directory holds: a log that begins behind entry 1
    /// of term 1, so that a member that comes later always gets a snapshot, and so that no
    /// term is ever 0.
    pub(crate) fn bootstrap(batch: &mut Batch) -> Position {
        let first = Position { index: 1, term: 1 };
        let hard_state = HardState { term: first.term, vote: 0, commit: first.index };
        batch.put(Family::State, KEY_HARD_STATE, hard_state.encode_to_vec());
        put_truncated(batch, first);
        first
    }

    pub(crate) fn open(engine: &dyn Engine, conf_state: ConfState) -> Result<Self, EngineError> {
        let missing = |what: &str| EngineError(format!("{what} is missing"));
        let hard_state =
            engine.get(Family::State, KEY_HARD_STATE)?.ok_or_else(|| missing("the hard state"))?;
        let hard_state = HardState::decode(hard_state.as_slice())
            .map_err(|e| EngineError(format!("the hard state is damaged: {e}")))?;
        let truncated = engine
            .get(Family::State, KEY_TRUNCATED)?
            .ok_or_else(|| missing("the log's beginning"))?;
        let truncated = pb::Truncated::decode(Bytes::from(truncated))
            .map_err(|e| EngineError(format!("the log's beginning is damaged: {e}")))?;
        let mut log = Self {
            entries: VecDeque::new(),
            bytes: 0,
            truncated: Position { index: truncated.index, term: truncated.term },
            hard_state,
            conf_state,
            snapshot: RefCell::default(),
        };
        loop {
            let next = log.last() + 1;
            let rows = engine.scan(Family::Log, &next.to_be_bytes(), READ_ENTRIES)?;
            let full = rows.len() == READ_ENTRIES;
            for (_, value) in rows {
                let entry = Entry::decode(value.as_slice())
                    .map_err(|e| EngineError(format!("log entry {}: {e}", log.last() + 1)))?;
                if entry.index != log.last() + 1 {
                    return Err(EngineError(format!("log entry {} is missing", log.last() + 1)));
                }
                log.push(entry);
            }
            if !full {
                return Ok(log);
            }
        }
    }

    /// Index of the last entry.
    pub(crate) fn last(&self) -> u64 {
        self.truncated.index + self.entries.len() as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn hard_state(&self) -> &HardState {
        &self.hard_state
    }

    pub(crate) fn set_hard_state(&mut self, hard_state: HardState, batch: &mut Batch) {
        batch.put(Family::State, KEY_HARD_STATE, hard_state.encode_to_vec());
        self.hard_state = hard_state;
    }

    /// Adds entries; those that they conflict with go.
    pub(crate) fn append(&mut self, entries: &[Entry], batch: &mut Batch) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.truncated.index, "entry {} was compacted", first.index);
        assert!(first.index <= self.last() + 1, "a gap before entry {}", first.index);
        if first.index <= self.last() {
            batch.delete_range(
                Family::Log,
                first.index.to_be_bytes(),
                (self.last() + 1).to_be_bytes(),
            );
            while self.last() >= first.index {
                let gone = self.entries.pop_back().map_or(0, |e| size(&e));
                self.bytes -= gone;
            }
        }
        for entry in entries {
            batch.put(Family::Log, entry.index.to_be_bytes(), entry.encode_to_vec());
            self.push(entry.clone());
        }
    }

    /// Forgets the entries up to and including `index`.
    pub(crate) fn compact(&mut self, index: u64, batch: &mut Batch) {
        while self.truncated.index < index {
            let Some(entry) = self.entries.pop_front() else { break };
            self.bytes -= size(&entry);
            self.truncated = Position { index: entry.index, term: entry.term };
        }
        batch.delete_range(
            Family::Log,
            0_u64.to_be_bytes(),
            (self.truncated.index + 1).to_be_bytes(),
        );
        put_truncated(batch, self.truncated);
    }

    /// Index of the last entry to forget, so that the newest ones of at most `bytes_keep`
    /// stay.
    pub(crate) fn index_above(&self, bytes_keep: usize) -> u64 {
        let mut kept = 0;
        let behind = self.entries.iter().rev().take_while(|entry| {
            kept += size(entry);
            kept <= bytes_keep
        });
        self.last() - behind.count() as u64
    }

    /// Forgets everything: a snapshot of this position took its place.
    pub(crate) fn restart(&mut self, at: Position, batch: &mut Batch) {
        self.entries.clear();
        self.bytes = 0;
        self.truncated = at;
        *self.snapshot.borrow_mut() = SnapshotSlot::default();
        batch.clear(Family::Log);
        put_truncated(batch, at);
    }

    /// Takes the wish for a snapshot, if there is one.
    pub(crate) fn take_wanted_snapshot(&self) -> Option<u64> {
        self.snapshot.borrow_mut().wanted.take()
    }

    pub(crate) fn offer_snapshot(&self, snapshot: Snapshot) {
        self.snapshot.borrow_mut().built = Some(snapshot);
    }

    pub(crate) fn drop_snapshot(&self) {
        self.snapshot.borrow_mut().built = None;
    }

    fn push(&mut self, entry: Entry) {
        self.bytes += size(&entry);
        self.entries.push_back(entry);
    }

    /// Where the entry of `index` is in `entries`.
    fn offset(&self, index: u64) -> usize {
        usize::try_from(index - self.truncated.index - 1).unwrap_or(usize::MAX)
    }
}

fn size(entry: &Entry) -> usize {
    // The message's fixed parts are small; what matters is that empty entries count too.
    entry.data.len() + entry.context.len() + 32
}

fn put_truncated(batch: &mut Batch, at: Position) {
    let record = pb::Truncated { index: at.index, term: at.term };
    batch.put(Family::State, KEY_TRUNCATED, record.encode_to_vec());
}

impl Storage for Log {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState { hard_state: self.hard_state.clone(), conf_state: self.conf_state.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.truncated.index {
            return Err(StorageError::Compacted.into());
        }
        assert!(high <= self.last() + 1, "entries up to {high}, last is {}", self.last());
        let max_size = max_size.into().unwrap_or(u64::MAX);
        let mut bytes = 0;
        let range = self.offset(low)..self.offset(high);
        let fitting = self.entries.range(range).take_while(|entry| {
            let first = bytes == 0;
            bytes += size(entry) as u64;
            first || bytes <= max_size
        });
        Ok(fitting.cloned().collect())
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.truncated.index {
            return Ok(self.truncated.term);
        }
        if index < self.truncated.index {
            return Err(StorageError::Compacted.into());
        }
        self.entries
            .get(self.offset(index))
            .map(|entry| entry.term)
            .ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.truncated.index + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let mut slot = self.snapshot.borrow_mut();
        // It must reach what is asked for, and the entries behind it must still be here.
        let at_least = request_index.max(self.truncated.index);
        if let Some(built) = &slot.built
            && built.get_metadata().index >= at_least
        {
            return Ok(built.clone());
        }
        slot.wanted = Some(at_least);
        Err(StorageError::SnapshotTemporarilyUnavailable.into())
    }
}
