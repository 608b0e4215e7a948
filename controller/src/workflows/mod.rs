//! The work of the cluster: what makes rows and reality meet.
//!
//! Operations are rows. The leader alone works on them, and keeps nothing that the next leader
//! could not rebuild: rows come from the store, facts from the agents' reports, and both are
//! levels. So the work is one loop:
//!
//! ```text
//!   rows (World) ──┐
//!                  ├──► plan(), pure ──► transactions, guarded ──► store ──► rows
//!   reports ───────┤                                                  │
//!   (Observed)     │                                            desired(node), pure
//!   now ───────────┘                                                  ▼
//!         ▲                                                     the agents' sessions
//!         └─────────────────────────────────────────────────────── reports
//! ```
//!
//! - [`plan`]: one pass over everything; start reading here
//! - [`migration`]: the protocol of a live migration, with the reasons why it is safe
//! - [`copy`]: the same of a domain that does not run
//! - `power`: a domain that is on one node; `operation`: what each operation waits for
//! - [`drain`]: drains and balances, made of migrations
//! - [`snapshot`]: taken, kept, put back; [`volumes`]: those that no domain has
//! - [`nodes`]: registration, leases; `storage`: volumes, images and what is to be removed
//! - [`image`]: made and forgotten; [`network`]: who has which address
//! - [`begin`]: what accepts an operation, for the API; `moving`: where that is a move
//! - [`reinstall`], [`rescue`], [`resize`], [`save`]: an operator's verbs on one domain, each from its
//!   beginning to its end; `content`: volumes that get other content
//! - [`desired`]: what a node shall run
//! - [`driver`]: the thin part that waits, calls `plan` and commits
//!
//! Nothing here but the driver reads a clock or waits.

pub mod begin;
mod content;
pub mod copy;
pub mod desired;
pub mod drain;
pub mod driver;
pub mod housekeeping;
pub mod image;
pub mod migration;
mod moving;
pub mod network;
pub mod nodes;
mod operation;
mod plan;
mod plug;
mod power;
mod refusal;
pub mod reinstall;
pub mod rescue;
pub mod resize;
pub mod save;
pub mod snapshot;
mod step;
mod storage;
#[cfg(test)]
mod tests;
pub mod volumes;

pub use plan::plan;
pub use refusal::Refusal;
pub(crate) use refusal::cut;
pub use step::{Context, Ids, Now, RandomIds, Settings, Step, error, millis, timestamp};
