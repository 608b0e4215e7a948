//! What each answer looks like to a person: lists as tables, one object as a page, plans and
//! reports as text around a table.

mod backup;
mod cluster;
mod domain;
mod moves;
mod network;
mod node;
mod operation;
mod snapshot;
mod storage;

use std::fmt::Write;

pub(crate) use self::{
    backup::{Verified, backed_up, backups, verified},
    cluster::{cluster, event},
    domain::{domain, domains, guest},
    moves::{balance_plan, blocked, drain_plan, left, moves_done},
    network::{network, networks},
    node::{node, nodes},
    operation::{done, migration, operation, operations},
    snapshot::{snapshot, snapshots},
    storage::{image, images, imported, pools, volume, volumes},
};

/// Lines of `label  value`; those without a value are left out.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, label: &str, value: &str) {
        if !value.is_empty() && value != "-" {
            let _ = writeln!(self.text, "{label:<13} {value}");
        }
    }
}

/// Thousandths of a core as `1.25 cores`.
fn cores(millicores: u32) -> String {
    format!("{:.2} cores", f64::from(millicores) / 1000.0)
}

fn with_reason(state: &str, reason: &str) -> String {
    if reason.is_empty() { state.to_owned() } else { format!("{state}: {reason}") }
}
