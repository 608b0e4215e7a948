//! The replicated controller of a Drover cluster.
//!
//! Three members (one works too) keep one table store equal among themselves with Raft; the
//! one that leads runs the cluster from it. Data flows like this:
//!
//! ```text
//!  gRPC call ──► api ──► store::Txn (guards, writes)
//!                             │  Store::commit
//!                             ▼
//!              raft::node  one thread, owns Raft, log and tables
//!                             │  entry on a majority's disks
//!                             ▼
//!              store::State  applies it: same entry, same result, on every member
//!                             │
//!                             ├──► the caller's answer
//!                             └──► store::View, Store::watch ──► workflows, scheduler
//! ```
//!
//! Start reading at [`store`] (what is kept, and how it changes), then [`raft`] (how it is
//! replicated). Nothing here knows the hypervisor or an agent's inside: only their protos.

pub mod api;
pub mod config;
pub mod model;
pub mod raft;
pub mod scheduler;
pub mod session;
pub mod store;
pub mod workflows;
