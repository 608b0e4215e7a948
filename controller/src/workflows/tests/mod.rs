//! The workflows without a network or a clock.
//!
//! - [`lab`]: a store, rows and reports in memory; time is a number
//! - [`migrations`]: every stage of a migration against every report
//! - [`lives`]: domains, nodes and operations through their lives
//! - [`drains`]: drains and balances
//! - [`disks`]: volumes; [`verbs`]: what operators do to a domain with disks
//! - [`copies`]: moves of what does not run; [`snapshots`], [`volumes`]: what lies on nodes
//! - [`chaos`]: agents that behave as agents do, and a seed that crashes, cuts, loses and
//!   changes leaders: a domain never runs twice, and every operation ends

mod agents;
mod chaos;
mod copies;
mod disks;
mod drains;
mod lab;
mod lives;
mod migrations;
mod networks;
mod shared;
mod snapshots;
mod verbs;
mod volumes;
