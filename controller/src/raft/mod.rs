//! Replication: one Raft group, on one thread that owns it.
//!
//! ```text
//!   Store::commit ─┐                          ┌─► published state, leadership, status
//!   Store::barrier ┼─► inbox ─► node ─► Core ─┼─► answers to those who wait
//!   peers' streams ┘  (bounded)  (thread)  │  └─► transport: a queue and a stream a peer
//!                                          ▼
//!                                  Engine: one batch, at most one fsync a turn
//! ```
//!
//! [`Core`] is everything that decides: Raft itself, log, state machine, who waits for what.
//! It does no I/O but through the [`Engine`](crate::store::Engine), knows no clock but ticks
//! and no chance but its seed, so that the simulator in `tests/` drives the very code that
//! runs. The node feeds it: it drains its inbox before each turn, so that proposals which
//! arrive together share a batch and an fsync (group commit).
//!
//! One turn, in an order that is the whole point:
//! 1. A leader's messages go out: followers write while it writes.
//! 2. What is committed is applied to the state in memory, and joins the batch.
//! 3. One batch (log entries, hard state, rows, change sets, applied position) is written,
//!    with a sync if Raft asks for one.
//! 4. Only now: the new state is published, waiters are answered, and the messages that
//!    promise what was just written (votes, acknowledgements) go out.
//!
//! A failing disk, or an entry that cannot be read, ends the process: a member that goes on
//! in doubt is worse than one that is gone.
//!
//! raft-rs 0.7.0 has traps; where each is met is said next to the code: a joint change's
//! closing entry is empty and must be applied ([`Core`]), read questions vanish (`reads`),
//! flow control breaks when messages are reordered (`transport`: one ordered stream a peer).
//!
//! Start reading at [`Core::turn`], then [`start`].

mod core;
mod identity;
mod log;
mod logger;
mod node;
mod peers;
mod reads;
mod service;
mod snapshot;
mod transport;

pub use core::{Core, Fatal, Input, Limits, Options, Output, Waiter};
pub use identity::{Claim, Identity, IdentityError, member_key};
pub use node::{Failure, Running, StartError, StartOptions, TICK, start, start_alone};
pub use peers::Refused;
pub use service::{Incoming, RaftServer};
pub use snapshot::{SnapshotError, SnapshotJob};
