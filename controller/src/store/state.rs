//! All rows, in memory, and the one way they change.
//!
//! Pure: no clock, no randomness, no map whose order depends on anything but its keys. The
//! same entries give the same state on every member, and [`State::content_hash`] shows it.
//! The map is persistent (a copy shares its nodes), so a view costs a pointer and never holds
//! up an apply.

use std::ops::Bound;
use std::sync::Arc;

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use rpds::RedBlackTreeMapSync;

use super::{Guard, Record, Txn, Versioned, Write};

/// A row's key: the table's number, and the key in the table.
pub(crate) type RowKey = (u8, Arc<str>);

/// A row as it is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The revision that created it.
    pub create_revision: u64,
    /// The revision that last wrote it.
    pub mod_revision: u64,
    /// The encoded record.
    pub value: Bytes,
}

/// Every row at one revision.
#[derive(Clone, Default)]
pub struct State {
    rows: RedBlackTreeMapSync<RowKey, Row>,
    revision: u64,
    content_hash: u64,
}

/// What applying a transaction did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The writes were made. Without writes, the revision is the one it was.
    Committed {
        /// The state's revision now.
        revision: u64,
    },
    /// A guard did not hold; nothing was written.
    Rejected {
        /// Which guard, counted from 0.
        guard: usize,
        /// The guarded row's last write; 0 when there is no such row.
        mod_revision: u64,
    },
}

impl State {
    /// Rebuilds a state from its rows.
    pub(crate) fn restore(revision: u64, rows: impl IntoIterator<Item = (RowKey, Row)>) -> Self {
        let mut state = Self { revision, ..Self::default() };
        for (key, row) in rows {
            state.content_hash = state.content_hash.wrapping_add(row_hash(&key, &row));
            state.rows.insert_mut(key, row);
        }
        state
    }

    /// The revision of the last transaction that wrote.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// A digest of all rows with their revisions, whatever the order they came in.
    #[must_use]
    pub fn content_hash(&self) -> u64 {
        self.content_hash
    }

    /// All rows, ascending by table and key.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (&RowKey, &Row)> {
        self.rows.iter()
    }

    pub(crate) fn row(&self, table: u8, key: &str) -> Option<&Row> {
        self.rows.get(&(table, Arc::from(key)))
    }

    /// Applies a transaction from an entry of `term`. Every row changed is told to `changed`,
    /// in the order of the writes, with what it is now.
    pub(crate) fn apply(
        &mut self,
        term: u64,
        txn: &Txn,
        mut changed: impl FnMut(&RowKey, Option<&Row>),
    ) -> Outcome {
        for (guard, condition) in txn.guards().iter().enumerate() {
            if let Err(mod_revision) = self.check(term, condition) {
                return Outcome::Rejected { guard, mod_revision };
            }
        }
        if !txn.is_empty() {
            self.revision += 1;
        }
        for write in txn.writes() {
            match write {
                Write::Put { table, key, value } => {
                    let key: RowKey = (*table, Arc::from(key.as_str()));
                    let row = self.put(&key, value.clone());
                    changed(&key, Some(&row));
                }
                Write::Delete { table, key } => {
                    let key: RowKey = (*table, Arc::from(key.as_str()));
                    if self.remove(&key) {
                        changed(&key, None);
                    }
                }
            }
        }
        Outcome::Committed { revision: self.revision }
    }

    /// Err is the guarded row's last write.
    fn check(&self, term: u64, guard: &Guard) -> Result<(), u64> {
        let written = |table: u8, key: &str| self.row(table, key).map_or(0, |r| r.mod_revision);
        let (holds, mod_revision) = match guard {
            Guard::Absent { table, key } => {
                let now = written(*table, key);
                (now == 0, now)
            }
            Guard::Present { table, key } => {
                let now = written(*table, key);
                (now != 0, now)
            }
            Guard::Revision { table, key, mod_revision } => {
                let now = written(*table, key);
                (now == *mod_revision && now != 0, now)
            }
            Guard::TermIs(wanted) => (term == *wanted, 0),
        };
        if holds { Ok(()) } else { Err(mod_revision) }
    }

    fn put(&mut self, key: &RowKey, value: Bytes) -> Row {
        let old = self.rows.get(key);
        let row = Row {
            create_revision: old.map_or(self.revision, |r| r.create_revision),
            mod_revision: self.revision,
            value,
        };
        if let Some(old) = old {
            self.content_hash = self.content_hash.wrapping_sub(row_hash(key, old));
        }
        self.content_hash = self.content_hash.wrapping_add(row_hash(key, &row));
        self.rows.insert_mut(key.clone(), row.clone());
        row
    }

    fn remove(&mut self, key: &RowKey) -> bool {
        let Some(old) = self.rows.get(key) else { return false };
        self.content_hash = self.content_hash.wrapping_sub(row_hash(key, old));
        self.rows.remove_mut(key)
    }
}

/// A consistent picture of all tables at one revision. Cheap to make and to keep.
#[derive(Clone)]
pub struct View {
    state: State,
}

impl From<State> for View {
    fn from(state: State) -> Self {
        Self { state }
    }
}

impl View {
    /// The revision it shows.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.state.revision
    }

    /// See [`State::content_hash`].
    #[must_use]
    pub fn content_hash(&self) -> u64 {
        self.state.content_hash
    }

    /// The row `key`, if there is one.
    #[must_use]
    pub fn get<T: Record>(&self, key: &str) -> Option<Versioned<T>> {
        self.state.row(T::TABLE.number(), key).map(decode)
    }

    /// At most `limit` rows whose keys begin with `prefix` and sort behind `after` (empty:
    /// from the first), ascending by key.
    #[must_use]
    pub fn list<T: Record>(&self, prefix: &str, after: &str, limit: usize) -> Vec<Versioned<T>> {
        let table = T::TABLE.number();
        let from = if !after.is_empty() && after >= prefix {
            Bound::Excluded((table, Arc::from(after)))
        } else {
            Bound::Included((table, Arc::from(prefix)))
        };
        self.state
            .rows
            .range((from, Bound::Unbounded))
            .take_while(|((t, key), _)| *t == table && key.starts_with(prefix))
            .take(limit)
            .map(|(_, row)| decode(row))
            .collect()
    }

    /// All rows of the table, ascending by key.
    pub fn all<T: Record>(&self) -> impl Iterator<Item = Versioned<T>> + '_ {
        let table = T::TABLE.number();
        self.state
            .rows
            .range((Bound::Included((table, Arc::from(""))), Bound::Unbounded))
            .take_while(move |((t, _), _)| *t == table)
            .map(|(_, row)| decode(row))
    }
}

fn decode<T: Record>(row: &Row) -> Versioned<T> {
    // One table holds one record type, and protobuf reads every version of it.
    let value = T::decode(row.value.clone())
        .unwrap_or_else(|e| panic!("a row of table {:?} is no such record: {e}", T::TABLE));
    Versioned { value, create_revision: row.create_revision, mod_revision: row.mod_revision }
}

/// FNV-1a over the row, with a finisher so that sums of hashes do not cancel.
fn row_hash(key: &RowKey, row: &Row) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut eat = |bytes: &[u8]| {
        for byte in bytes {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    };
    eat(&[key.0]);
    eat(&(key.1.len() as u64).to_be_bytes());
    eat(key.1.as_bytes());
    eat(&row.create_revision.to_be_bytes());
    eat(&row.mod_revision.to_be_bytes());
    eat(&row.value);
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// A row's key on disk: the table's number, then the key.
pub(crate) fn data_key(key: &RowKey) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + key.1.len());
    out.push(key.0);
    out.extend_from_slice(key.1.as_bytes());
    out
}

/// Reads what [`data_key`] wrote.
pub(crate) fn parse_data_key(bytes: &[u8]) -> Option<RowKey> {
    let (table, key) = bytes.split_first()?;
    Some((*table, Arc::from(std::str::from_utf8(key).ok()?)))
}

impl From<&Row> for pb::Row {
    fn from(row: &Row) -> Self {
        Self {
            create_revision: row.create_revision,
            mod_revision: row.mod_revision,
            value: row.value.clone(),
        }
    }
}

impl From<pb::Row> for Row {
    fn from(row: pb::Row) -> Self {
        Self {
            create_revision: row.create_revision,
            mod_revision: row.mod_revision,
            value: row.value,
        }
    }
}
