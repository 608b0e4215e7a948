//! What the cluster remembers: typed tables that change by guarded transactions.
//!
//! What is replicated is not business logic but a transaction ([`Txn`]): guards ("this row
//! still has this revision") and writes. Applying one is trivial and the same in every
//! version, so members of different versions stay equal. All decisions are made before, by
//! the leader, from a [`View`]; when the world has moved on meanwhile, a guard fails, nothing
//! is written, and the caller decides again.
//!
//! Each transaction that writes gets the next **revision**. A row knows the revisions of its
//! creation and of its last write ([`Versioned`]). The change sets of the newest revisions are
//! kept, so that a [`ChangeStream`] can start at any of them; a stream that is slow reads from
//! disk at its own pace and never holds up an apply.
//!
//! - [`Table`], [`Record`]: the tables and their rows
//! - [`Txn`], [`Guard`], [`Write`]: what is replicated
//! - [`Store`]: the handle that everyone clones: commit, barrier, view, watch, leadership
//! - [`State`]: all rows, in memory, as a persistent map: a view is a clone of its root
//! - [`Engine`]: what the disk must do; [`RocksEngine`] does it

mod engine;
mod handle;
mod rocks;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod txn;
mod watch;

pub use engine::{Batch, Engine, EngineError, Family, KEY_END, KeyValue, Op};
pub use handle::{
    CommitError, Leadership, MemberId, MemberStatus, ReadError, Request, Revision, Role, Shared,
    Status, Store, TXN_BYTES_ENOUGH, TXN_BYTES_MAX,
};
pub use rocks::{OpenError, RocksEngine};
pub use state::{Outcome, Row, State, View};
pub(crate) use state::{RowKey, data_key, parse_data_key};
pub use table::{Record, Table, Versioned};
pub use txn::{Guard, MalformedCommand, Txn, Write};
pub use watch::{Change, ChangeSet, ChangeStream, Compacted, WatchError};
