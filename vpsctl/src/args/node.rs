//! `vpsctl node`.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Detach, Limits};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// List the nodes with their state and room
    List,
    /// Show one node
    Show(NodeName),
    /// Place no new domains on a node; those on it stay
    Cordon(NodeName),
    /// Let a node take domains again; also ends a drain's effect
    Uncordon(NodeName),
    /// Move every domain off a node, live, to empty it
    ///
    /// The node is cordoned first. Ctrl-C stops watching: the drain goes on, and the message says
    /// how to look again or cancel. Exit code 7 when domains are left.
    #[command(after_help = "\
Examples:
  vpsctl node drain host1 --dry-run    which domain would go where, why, and what cannot move
  vpsctl node drain host1              do it, and watch
  vpsctl node drain host1 --detach     do it, and print the operation's name")]
    Drain(DrainArgs),
    /// Forget a node that holds no domain
    Delete(NodeName),
}

#[derive(Args, Debug)]
pub(crate) struct NodeName {
    /// The node, such as host1 or nodes/host1
    #[arg(value_name = "NODE", value_parser = parse::node)]
    pub(crate) node: String,
}

#[derive(Args, Debug)]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    pub(crate) name: NodeName,
    /// Print the whole plan and change nothing
    #[arg(long, conflicts_with_all = ["detach", "deadline", "Limits"])]
    pub(crate) dry_run: bool,
    /// The drain ends then, with what is left where it is [default: 1h]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) deadline: Option<Duration>,
    #[command(flatten)]
    pub(crate) detach: Detach,
    #[command(flatten)]
    pub(crate) limits: Limits,
}
