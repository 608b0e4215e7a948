//! Sessions with the agents: one ordered stream each, to the leader.
//!
//! The agent says what is on its node, the controller says what should be. Both are levels:
//! each message is a full picture, so a lost connection costs nothing but time.
//!
//! - [`Hub`]: what the leader knows of all agents, and the world that sessions read from
//! - [`Sessions`]: the gRPC service
//! - `run`: one session's life

mod hello;
mod hub;
mod run;

pub use hub::{Hub, Lead};
pub use run::Sessions;
