//! What the disk must do: ordered key families, atomic batches, a sync that is one.
//!
//! Two things implement it: [`RocksEngine`](super::RocksEngine), and the simulator's, which
//! loses what was not synced when its process "crashes". The same conformance tests run on
//! both.

/// The families of keys. One batch may touch several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// Raft's log: index → entry.
    Log,
    /// Small records by name: identity, hard state, what is applied, what is truncated.
    State,
    /// The rows: table and key → row.
    Data,
    /// The change history: revision → change set.
    Events,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 4] = [Family::Log, Family::State, Family::Data, Family::Events];

    /// Its name on disk.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Family::Log => "log",
            Family::State => "state",
            Family::Data => "data",
            Family::Events => "events",
        }
    }
}

/// Sorts behind every key that is ever written.
pub const KEY_END: &[u8] = &[0xff; 9];

/// One change of a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// Writes a key.
    Put {
        /// Where.
        family: Family,
        /// The key.
        key: Vec<u8>,
        /// What.
        value: Vec<u8>,
    },
    /// Removes a key.
    Delete {
        /// Where.
        family: Family,
        /// The key.
        key: Vec<u8>,
    },
    /// Removes the keys `from <= key < to`.
    DeleteRange {
        /// Where.
        family: Family,
        /// First key removed.
        from: Vec<u8>,
        /// First key kept.
        to: Vec<u8>,
    },
}

/// Changes that become readable, and survive a crash, all together or not at all. They are
/// made in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The changes.
    pub ops: Vec<Op>,
}

impl Batch {
    /// Adds a write.
    pub fn put(&mut self, family: Family, key: impl Into<Vec<u8>>, value: Vec<u8>) {
        self.ops.push(Op::Put { family, key: key.into(), value });
    }

    /// Adds a removal.
    pub fn delete(&mut self, family: Family, key: impl Into<Vec<u8>>) {
        self.ops.push(Op::Delete { family, key: key.into() });
    }

    /// Adds the removal of `from <= key < to`.
    pub fn delete_range(
        &mut self,
        family: Family,
        from: impl Into<Vec<u8>>,
        to: impl Into<Vec<u8>>,
    ) {
        self.ops.push(Op::DeleteRange { family, from: from.into(), to: to.into() });
    }

    /// Adds the removal of everything in the family.
    pub fn clear(&mut self, family: Family) {
        self.delete_range(family, Vec::new(), KEY_END);
    }

    /// True when there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// A key and its value.
pub type KeyValue = (Vec<u8>, Vec<u8>);

/// An ordered key-value store with families.
pub trait Engine: Send + Sync + 'static {
    /// The value of a key.
    ///
    /// # Errors
    /// The disk failed, or what it holds is damaged.
    fn get(&self, family: Family, key: &[u8]) -> Result<Option<Vec<u8>>, EngineError>;

    /// The first `limit` keys that are not below `from`, ascending.
    ///
    /// # Errors
    /// The disk failed, or what it holds is damaged.
    fn scan(&self, family: Family, from: &[u8], limit: usize)
    -> Result<Vec<KeyValue>, EngineError>;

    /// Writes the batch atomically. With `sync`, it and all before it survive a crash when
    /// this returns; without, a crash keeps some prefix of the unsynced batches.
    ///
    /// # Errors
    /// Nothing may be assumed of what is on disk: the process must end.
    fn write(&self, batch: Batch, sync: bool) -> Result<(), EngineError>;
}

/// The disk failed. The process must end and start again from what is there.
#[derive(Debug, thiserror::Error)]
#[error("the data directory failed: {0}")]
pub struct EngineError(pub String);
