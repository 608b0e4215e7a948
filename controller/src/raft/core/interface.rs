//! What goes into a core and what comes out of it.

use std::collections::BTreeMap;

use raft::eraftpb::{Message, Snapshot};

use super::super::identity::Identity;
use super::super::snapshot::SnapshotJob;
use crate::store::{
    CommitError, EngineError, Leadership, MalformedCommand, MemberId, ReadError, Revision, State,
};

/// How much is kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Entries that a compaction leaves for slow followers.
    pub log_entries_keep: u64,
    /// Entries at which the log is compacted.
    pub log_entries_max: u64,
    /// Bytes at which the log is compacted, to half of it.
    pub log_bytes_max: usize,
    /// Revisions whose changes are kept for watches.
    pub history_revisions: u64,
    /// Revisions removed at a time.
    pub history_stride: u64,
    /// Reads that may wait.
    pub reads_waiting_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            log_entries_keep: 5_000,
            log_entries_max: 10_000,
            log_bytes_max: 64 << 20,
            history_revisions: 100_000,
            history_stride: 1_000,
            reads_waiting_max: 65_536,
        }
    }
}

/// What a [`Core`] is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who it is.
    pub identity: Identity,
    /// Everyone's `host:port`.
    pub members: BTreeMap<MemberId, String>,
    /// Another one at each start: it keeps read questions apart.
    pub nonce: u64,
    /// Of the random election timeouts.
    pub seed: u64,
    /// How much is kept.
    pub limits: Limits,
}

/// Somebody who waits for an answer.
pub trait Waiter {
    /// It waits no more.
    fn is_abandoned(&self) -> bool;
}

/// What happens to a member. `C` waits for a commit, `R` for a read.
pub enum Input<C, R> {
    /// Time has passed: one tick.
    Tick,
    /// From a peer, in the order it was sent.
    Message(Message),
    /// Commit this [`Txn`], encoded.
    Propose {
        /// [`Txn::encode`].
        command: Vec<u8>,
        /// Who waits.
        waiter: C,
    },
    /// Say when a read here sees everything acknowledged until now.
    Read {
        /// Who waits.
        waiter: R,
    },
    /// A message to this peer was not sent, or is lost.
    Unreachable(MemberId),
    /// The end of a [`Output::Send`] of a snapshot; each one must be reported.
    SnapshotSent {
        /// To whom.
        to: MemberId,
        /// It arrived.
        arrived: bool,
    },
    /// The end of an [`Output::Build`].
    SnapshotBuilt(Snapshot),
    /// Give leadership away.
    TransferLeadership,
}

/// What a member does.
pub enum Output<C, R> {
    /// Send to the peer named in it; in order, or not at all.
    Send(Message),
    /// An entry was applied. (For checks: equal entries must give equal hashes.)
    Applied {
        /// Its index.
        index: u64,
        /// Its term.
        term: u64,
        /// [`State::content_hash`] after it.
        content_hash: u64,
    },
    /// The newest state; written before this was said.
    Publish(State),
    /// The end of a [`Input::Propose`]. A waiter that is dropped instead does not know.
    Committed {
        /// Who waited.
        waiter: C,
        /// What came of it.
        result: Result<Revision, CommitError>,
    },
    /// The end of a [`Input::Read`].
    Read {
        /// Who waited.
        waiter: R,
        /// It may read the state published last.
        result: Result<(), ReadError>,
    },
    /// Leadership is another one now.
    Leadership(Leadership),
    /// Run this aside and hand back the snapshot.
    Build(SnapshotJob),
}

/// The member cannot go on. Its process must end.
#[derive(Debug, thiserror::Error)]
pub enum Fatal {
    /// The disk failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An entry that this version cannot read.
    #[error("log entry {index}: {source}; run the newer version of drover-controller")]
    Malformed {
        /// The entry.
        index: u64,
        /// What is wrong with it.
        source: MalformedCommand,
    },
    /// Raft's own state is broken.
    #[error("raft: {0}")]
    Raft(#[from] raft::Error),
    /// Records that contradict each other.
    #[error("the data directory is damaged: {0}")]
    Damaged(String),
}
