//! The public API, `drover.v1`, and what all its calls share.
//!
//! Any member answers any call: what needs the leader is sent on to it, as it came
//! ([`forward`]), so a call below runs on the leader. There it is checked ([`validate`]),
//! decided on the rows as they are ([`Service::decide`]) and answered from them
//! ([`present`]). Reads wait until this member's rows are vouched for ([`Service::read`]).
//!
//! - [`nodes`], [`domains`], [`volumes`], [`snapshots`], [`images`], [`networks`],
//!   [`operations`], [`events`], [`cluster`], [`console`], [`guest`]: the calls
//! - [`errors`]: every refusal and fault as one gRPC status with details
//! - [`requests`]: request ids

mod agents;
mod cluster;
mod console;
mod domains;
pub mod errors;
mod events;
mod forward;
mod guest;
mod images;
mod networks;
mod nodes;
mod operations;
mod page;
mod present;
mod requests;
mod service;
mod snapshots;
mod validate;
mod volumes;

pub use service::{Service, ServiceOptions, routes};
