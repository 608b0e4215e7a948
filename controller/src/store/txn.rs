//! The replicated unit: guards and writes.

use bytes::Bytes;
use drover_proto::raft::v1 as pb;
use prost::Message as _;

use super::{Record, Versioned};

/// A condition on the state that the writes of a transaction are applied to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Guard {
    /// There is no such row.
    Absent {
        /// The table's number.
        table: u8,
        /// The row's key.
        key: String,
    },
    /// There is such a row.
    Present {
        /// The table's number.
        table: u8,
        /// The row's key.
        key: String,
    },
    /// The row was last written at this revision.
    Revision {
        /// The table's number.
        table: u8,
        /// The row's key.
        key: String,
        /// The revision it must still have.
        mod_revision: u64,
    },
    /// The transaction is applied in this Raft term: what a leader decided is not carried out
    /// under a later one.
    TermIs(u64),
}

/// One change of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Creates or replaces the row.
    Put {
        /// The table's number.
        table: u8,
        /// The row's key.
        key: String,
        /// The encoded record.
        value: Bytes,
    },
    /// Removes the row; no such row is no error.
    Delete {
        /// The table's number.
        table: u8,
        /// The row's key.
        key: String,
    },
}

/// A transaction: when all guards hold, all writes are made, under one revision.
///
/// The writes are made in their order; of two writes of one row the later one stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[must_use]
pub struct Txn {
    guards: Vec<Guard>,
    writes: Vec<Write>,
}

impl Txn {
    /// Nothing guarded, nothing written.
    pub fn new() -> Self {
        Self::default()
    }

    /// Only if there is no row `key`.
    pub fn absent<T: Record>(self, key: impl Into<String>) -> Self {
        self.guard(Guard::Absent { table: T::TABLE.number(), key: key.into() })
    }

    /// Only if there is a row `key`.
    pub fn present<T: Record>(self, key: impl Into<String>) -> Self {
        self.guard(Guard::Present { table: T::TABLE.number(), key: key.into() })
    }

    /// Only if the row has not been written since it was read.
    pub fn unchanged<T: Record>(self, row: &Versioned<T>) -> Self {
        self.guard(Guard::Revision {
            table: T::TABLE.number(),
            key: row.value.key(),
            mod_revision: row.mod_revision,
        })
    }

    /// Only if it is applied in this Raft term.
    pub fn term_is(self, term: u64) -> Self {
        self.guard(Guard::TermIs(term))
    }

    /// Creates or replaces the record's row.
    pub fn put<T: Record>(self, record: &T) -> Self {
        self.write(Write::Put {
            table: T::TABLE.number(),
            key: record.key(),
            value: record.encode_to_vec().into(),
        })
    }

    /// Removes a row.
    pub fn delete<T: Record>(self, key: impl Into<String>) -> Self {
        self.write(Write::Delete { table: T::TABLE.number(), key: key.into() })
    }

    /// Adds any guard.
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guards.push(guard);
        self
    }

    /// Adds any write.
    pub fn write(mut self, write: Write) -> Self {
        self.writes.push(write);
        self
    }

    /// Adds all guards and writes of another transaction behind its own.
    pub fn and(mut self, other: Txn) -> Self {
        self.guards.extend(other.guards);
        self.writes.extend(other.writes);
        self
    }

    /// The guards, in the order that [`CommitError::Guard`](super::CommitError) counts.
    #[must_use]
    pub fn guards(&self) -> &[Guard] {
        &self.guards
    }

    /// The writes.
    #[must_use]
    pub fn writes(&self) -> &[Write] {
        &self.writes
    }

    /// True when there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// About as many bytes as [`Txn::encode`] gives, never fewer, without encoding: for whoever
    /// fills a transaction up to a bound.
    #[must_use]
    pub fn bytes(&self) -> usize {
        // Tags, lengths, numbers.
        const OVERHEAD: usize = 48;
        let guards = self.guards.iter().map(|guard| match guard {
            Guard::Absent { key, .. }
            | Guard::Present { key, .. }
            | Guard::Revision { key, .. } => key.len() + OVERHEAD,
            Guard::TermIs(_) => OVERHEAD,
        });
        let writes = self.writes.iter().map(|write| match write {
            Write::Put { key, value, .. } => key.len() + value.len() + OVERHEAD,
            Write::Delete { key, .. } => key.len() + OVERHEAD,
        });
        guards.sum::<usize>() + writes.sum::<usize>()
    }

    /// The bytes that go into the log.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let guards = self.guards.iter().map(encode_guard).collect();
        let writes = self.writes.iter().map(encode_write).collect();
        pb::Command { guards, writes }.encode_to_vec()
    }

    /// Reads what [`Txn::encode`] wrote.
    ///
    /// # Errors
    /// The bytes are no command, or one with a guard or write of a kind not known here.
    pub fn decode(bytes: Bytes) -> Result<Self, MalformedCommand> {
        let command = pb::Command::decode(bytes)?;
        let guards = command.guards.into_iter().map(decode_guard).collect::<Result<_, _>>()?;
        let writes = command.writes.into_iter().map(decode_write).collect::<Result<_, _>>()?;
        Ok(Self { guards, writes })
    }
}

/// A log entry that this version cannot read. Skipping it would make this member differ from
/// the others, so it is the end of the process.
#[derive(Debug, thiserror::Error)]
pub enum MalformedCommand {
    /// No protobuf of this shape.
    #[error("the entry is no command")]
    Encoding(#[from] prost::DecodeError),
    /// Written by a newer version.
    #[error("the entry holds a {0} that this version does not know")]
    Unknown(&'static str),
}

fn encode_guard(guard: &Guard) -> pb::Guard {
    use pb::guard::Condition;
    let on = |table: u8, key: &str, condition| pb::Guard {
        table: table.into(),
        key: key.to_owned(),
        condition: Some(condition),
    };
    match guard {
        Guard::Absent { table, key } => on(*table, key, Condition::Absent(true)),
        Guard::Present { table, key } => on(*table, key, Condition::Present(true)),
        Guard::Revision { table, key, mod_revision } => {
            on(*table, key, Condition::ModRevision(*mod_revision))
        }
        Guard::TermIs(term) => on(0, "", Condition::Term(*term)),
    }
}

fn decode_guard(guard: pb::Guard) -> Result<Guard, MalformedCommand> {
    use pb::guard::Condition;
    let (table, key) = (table_number(guard.table)?, guard.key);
    Ok(match guard.condition {
        Some(Condition::Absent(_)) => Guard::Absent { table, key },
        Some(Condition::Present(_)) => Guard::Present { table, key },
        Some(Condition::ModRevision(mod_revision)) => Guard::Revision { table, key, mod_revision },
        Some(Condition::Term(term)) => Guard::TermIs(term),
        None => return Err(MalformedCommand::Unknown("guard")),
    })
}

fn encode_write(write: &Write) -> pb::Write {
    use pb::write::Action;
    let (table, key, action) = match write {
        Write::Put { table, key, value } => (*table, key, Action::Put(value.clone())),
        Write::Delete { table, key } => (*table, key, Action::Delete(true)),
    };
    pb::Write { table: table.into(), key: key.clone(), action: Some(action) }
}

fn decode_write(write: pb::Write) -> Result<Write, MalformedCommand> {
    use pb::write::Action;
    let (table, key) = (table_number(write.table)?, write.key);
    Ok(match write.action {
        Some(Action::Put(value)) => Write::Put { table, key, value },
        Some(Action::Delete(_)) => Write::Delete { table, key },
        None => return Err(MalformedCommand::Unknown("write")),
    })
}

fn table_number(number: u32) -> Result<u8, MalformedCommand> {
    u8::try_from(number).map_err(|_| MalformedCommand::Unknown("table"))
}
