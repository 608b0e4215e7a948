//! `vpsctl operation`, `vpsctl cluster` and `vpsctl events`.

use clap::{Args, Subcommand};

use super::{Detach, Limits};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations, newest first
    List {
        /// Only those that are not done
        #[arg(long)]
        active: bool,
        /// Only those on this resource: domains/NAME, nodes/NAME, volumes/NAME or cluster
        #[arg(long, value_name = "RESOURCE", value_parser = parse::subject)]
        target: Option<String>,
    },
    /// Show one operation
    Show(OperationName),
    /// Wait until an operation is done, and show how it goes
    #[command(after_help = "\
Example:
  vpsctl operation wait 6f1c7b0e-8f3c-4c59-9d5e-0d6a3f0c1f1a --timeout 5m

The exit code is that of the operation: 0 when it succeeded, 6 when it is not done in time.")]
    Wait(OperationName),
    /// Ask an operation to end, and wait until it has
    ///
    /// A drain starts no more moves and waits for those under way; what has moved stays where it
    /// is. Stopping and deleting cannot be cancelled, nor an operation past its point of no return
    /// (exit code 4).
    Cancel {
        #[command(flatten)]
        name: OperationName,
        #[command(flatten)]
        detach: Detach,
    },
}

#[derive(Args, Debug)]
pub(crate) struct OperationName {
    /// The operation: its UUID or operations/UUID
    #[arg(value_name = "OPERATION", value_parser = parse::operation)]
    pub(crate) operation: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ClusterCommand {
    /// Who leads, who is reachable, and how much there is; works without a leader too
    Status,
    /// Even out the nodes' measured load by migrations
    #[command(after_help = "\
Examples:
  vpsctl cluster balance --dry-run                 the moves it proposes, best first
  vpsctl cluster balance --apply --moves-max 2     make the best two")]
    Balance(BalanceArgs),
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").args(["dry_run", "apply"]).required(true))]
pub(crate) struct BalanceArgs {
    /// Print the moves and change nothing
    #[arg(long, conflicts_with_all = ["detach", "Limits"])]
    pub(crate) dry_run: bool,
    /// Make the moves
    #[arg(long)]
    pub(crate) apply: bool,
    /// At most so many moves [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) moves_max: Option<u32>,
    #[command(flatten)]
    pub(crate) detach: Detach,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  vpsctl events --subject domains/web1
  vpsctl events --follow                  the newest, then what comes, until Ctrl-C
  vpsctl events --since 1200 -o json      one JSON object a line")]
pub(crate) struct EventsArgs {
    /// Go on with what comes, until Ctrl-C or --timeout
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Begin after this revision instead of with the newest events
    #[arg(long, value_name = "REVISION", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) since: Option<u64>,
    /// Only events about this: domains/NAME, nodes/NAME, volumes/NAME, operations/UUID or cluster
    #[arg(long, value_name = "RESOURCE", value_parser = parse::subject)]
    pub(crate) subject: Option<String>,
    /// How many of the newest, 1 to 1000
    #[arg(
        long,
        value_name = "N",
        default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=1000),
        conflicts_with = "since"
    )]
    pub(crate) limit: u32,
}
