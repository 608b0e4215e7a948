//! The handle that everyone clones.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};

use super::{ChangeStream, Compacted, Engine, State, Txn, View};

/// A controller's number, 1 or more.
pub type MemberId = u64;
/// Counts transactions that wrote.
pub type Revision = u64;

/// The largest transaction, encoded.
pub const TXN_BYTES_MAX: usize = 1 << 20;
/// Where many rows may be put into one transaction, no more are added from here on: one row more
/// and the operation's own still fit.
pub const TXN_BYTES_ENOUGH: usize = TXN_BYTES_MAX / 2;

/// Who leads, as this member knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leadership {
    /// The leader; None while there is none that this member knows.
    pub leader: Option<MemberId>,
    /// Its `host:port`.
    pub leader_address: Option<String>,
    /// The Raft term.
    pub term: u64,
    /// This member leads `term` and has applied everything from the terms before: a view shows
    /// all that was ever acknowledged, and work may begin.
    pub is_leader: bool,
}

/// What a member does in the group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Role {
    /// Not known to the member that answers.
    #[default]
    Unknown,
    /// Leads.
    Leader,
    /// Follows a leader.
    Follower,
    /// Asks for votes.
    Candidate,
}

impl Role {
    /// `leader`, `follower`, `candidate`, or nothing when unknown.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Unknown => "",
            Role::Leader => "leader",
            Role::Follower => "follower",
            Role::Candidate => "candidate",
        }
    }
}

/// The group, as this member knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    /// The member that answers.
    pub member: MemberId,
    /// The leader, if known.
    pub leader: Option<MemberId>,
    /// The Raft term.
    pub term: u64,
    /// The revision applied here.
    pub revision: Revision,
    /// The log index applied here.
    pub applied_index: u64,
    /// All members, ascending by id.
    pub members: Vec<MemberStatus>,
}

/// One member, as the answering one knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemberStatus {
    /// Its number.
    pub id: MemberId,
    /// Its `host:port`.
    pub address: String,
    /// It can be reached now (itself always).
    pub reachable: bool,
    /// The log index that it holds, where known: the leader knows everyone's, others only
    /// their own (which is the applied one).
    pub index: Option<u64>,
    /// What it does, where known.
    pub role: Role,
}

/// Why a transaction was not committed, or is not known to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// A guard did not hold: nothing was written.
    #[error("the row was changed meanwhile (guard {index})")]
    Guard {
        /// Which guard, counted from 0 in the order they were added.
        index: usize,
        /// The guarded row's last write; 0 when there is none.
        mod_revision: Revision,
    },
    /// Nothing was written: this member does not lead.
    #[error("this controller does not lead")]
    NotLeader {
        /// Who does, if known.
        leader_address: Option<String>,
    },
    /// The deadline passed, or leadership was lost, before the end was known: it may be
    /// written, now or later, or not.
    #[error("it is not known whether the write was made")]
    Unknown,
    /// Nothing was written: it is larger than allowed.
    #[error("the transaction has {bytes} bytes, {TXN_BYTES_MAX} are allowed")]
    TooLarge {
        /// Its encoded size.
        bytes: usize,
    },
    /// Nothing was written: too much is under way.
    #[error("this controller is overloaded")]
    Busy,
    /// Nothing was written: the store is closed.
    #[error("this controller is stopping")]
    Closed,
}

/// Why a read cannot be vouched for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader confirmed in time that this member's picture is the newest.
    #[error("no leader could be reached in time")]
    NoLeader,
    /// Too many reads are waiting.
    #[error("this controller is overloaded")]
    Busy,
    /// The store is closed.
    #[error("this controller is stopping")]
    Closed,
}

/// What the handle asks of the Raft thread.
pub enum Request {
    /// Commit an encoded transaction.
    Commit {
        /// [`Txn::encode`].
        command: Vec<u8>,
        /// Where to answer. Dropped unanswered, the end is unknown.
        reply: oneshot::Sender<Result<Revision, CommitError>>,
    },
    /// Vouch for this member's state.
    Barrier {
        /// Where to answer.
        reply: oneshot::Sender<Result<(), ReadError>>,
    },
    /// Give leadership to the member that is furthest, if this one leads.
    TransferLeadership,
}

/// What the Raft thread publishes, and where it listens.
#[derive(Clone)]
pub struct Shared {
    /// The disk, for the change history.
    pub engine: Arc<dyn Engine>,
    /// The newest state applied and written.
    pub state: watch::Receiver<State>,
    /// Who leads.
    pub leadership: watch::Receiver<Leadership>,
    /// The group.
    pub status: watch::Receiver<Status>,
    /// To the Raft thread.
    pub requests: mpsc::Sender<Request>,
}

/// The replicated store. Clones are the same store.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

impl Store {
    /// A handle upon a running Raft thread; see [`raft::start`](crate::raft::start).
    #[must_use]
    pub fn new(shared: Shared) -> Self {
        Self { shared: Arc::new(shared) }
    }

    /// Commits a transaction. When this returns, it is applied here: [`Store::view`] shows it.
    ///
    /// # Errors
    /// See [`CommitError`]; only `Unknown` leaves open whether it is written.
    pub async fn commit(
        &self,
        txn: Txn,
        deadline: impl Into<Instant>,
    ) -> Result<Revision, CommitError> {
        let deadline = deadline.into();
        let command = txn.encode();
        if command.len() > TXN_BYTES_MAX {
            return Err(CommitError::TooLarge { bytes: command.len() });
        }
        let (reply, answer) = oneshot::channel();
        let request = Request::Commit { command, reply };
        match timeout_at(deadline, self.shared.requests.send(request)).await {
            Err(_) => return Err(CommitError::Busy),
            Ok(Err(_)) => return Err(CommitError::Closed),
            Ok(Ok(())) => {}
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(CommitError::Unknown),
        }
    }

    /// Makes sure that a [`Store::view`] taken afterwards shows every write that anyone was
    /// told of before this call, on whatever member. Concurrent calls share one round trip.
    ///
    /// # Errors
    /// See [`ReadError`]; views can still be taken, and may be old.
    pub async fn barrier(&self, deadline: impl Into<Instant>) -> Result<(), ReadError> {
        let deadline = deadline.into();
        let (reply, answer) = oneshot::channel();
        match timeout_at(deadline, self.shared.requests.send(Request::Barrier { reply })).await {
            Err(_) => return Err(ReadError::Busy),
            Ok(Err(_)) => return Err(ReadError::Closed),
            Ok(Ok(())) => {}
        }
        match timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(ReadError::Closed),
            Err(_) => Err(ReadError::NoLeader),
        }
    }

    /// The newest state applied here.
    #[must_use]
    pub fn view(&self) -> View {
        self.shared.state.borrow().clone().into()
    }

    /// The changes of all revisions greater than `from`, in order, then what comes.
    ///
    /// # Errors
    /// The history does not reach back that far.
    pub fn watch(&self, from: Revision) -> Result<ChangeStream, Compacted> {
        ChangeStream::open(self.shared.engine.clone(), self.shared.state.clone(), from)
    }

    /// Who leads, now and later.
    #[must_use]
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.shared.leadership.clone()
    }

    /// The group as this member knows it, now and later.
    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status.borrow().clone()
    }

    /// Gives leadership to another member, if this one leads: watch [`Store::leadership`] for
    /// the end.
    pub async fn transfer_leadership(&self) {
        // A closed store leads nothing.
        let _ = self.shared.requests.send(Request::TransferLeadership).await;
    }
}
