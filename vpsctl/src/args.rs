//! Every command and flag, each defined once, with the text of its help.

use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use drover_proto::v1::{MigrationLimits, NetworkInterface};

use crate::parse;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    any other error
  2    wrong usage, or an argument that the controller refused
  3    what was named does not exist
  4    conflict: it exists already, is busy, or its state forbids this
  5    no node has the room
  6    --timeout has passed; what was started goes on
  7    the plan has blockers, or the drain left domains where they were
  8    unavailable: no controller answers, or none leads
  130  interrupted by Ctrl-C; what was started goes on

Examples:
  vpsctl cluster status
  vpsctl domain create web1 --memory 256MiB --kernel /var/lib/drover/boot/vmlinuz --net
  vpsctl node drain host1 --dry-run
  vpsctl -o json domain list | jq -r '.[] | select(.state == \"running\").name'";

/// Drives a Drover cluster: nodes, the domains (virtual machines) on them, and the operations
/// that change them.
///
/// Commands that change something wait until it is done and show how it goes on stderr;
/// --detach prints the operation's name instead. What a command answers is on stdout.
#[derive(Debug, Parser)]
#[command(version, name = "vpsctl", after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Controllers, HOST:PORT each; the next one is asked when one does not answer
    #[arg(
        long,
        global = true,
        env = "DROVER_SERVER",
        value_name = "ADDR[,ADDR…]",
        value_delimiter = ',',
        default_value = "127.0.0.1:7400",
        value_parser = parse::server
    )]
    pub(crate) server: Vec<String>,

    /// A table for people, or JSON for programs
    #[arg(short, long, global = true, value_name = "FORMAT", default_value = "table")]
    pub(crate) output: Output,

    /// Give up after this long, such as 30s [default: when the operation ends]
    #[arg(long, global = true, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) timeout: Option<Duration>,
}

/// How answers are written to stdout.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Hosts that run domains: look, cordon, drain
    #[command(subcommand)]
    Node(NodeCommand),
    /// Virtual machines: create, look, start, stop, move, attach
    #[command(subcommand)]
    Domain(DomainCommand),
    /// Work that was accepted: look, wait, cancel
    #[command(subcommand)]
    Operation(OperationCommand),
    /// The cluster as a whole: members, balance
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// What happened, in the order it was committed
    Events(EventsArgs),
    /// Print the completions of a shell, for its completion directory
    #[command(after_help = "Example:\n  vpsctl completions bash > /etc/bash_completion.d/vpsctl")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

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

#[derive(Args, Debug)]
pub(crate) struct Detach {
    /// Do not wait: print the operation's name
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Migration limits")]
pub(crate) struct Limits {
    /// Longest pause of the guest to aim at [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) downtime: Option<Duration>,
    /// Passes over memory; then it moves within 4 times --downtime, or fails and stays
    /// [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds_max: Option<u32>,
    /// Memory to send; then as with --rounds-max [default: 8 times its memory]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) bytes_max: Option<u64>,
    /// Time to copy; then as with --rounds-max [default: 10m]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) time_max: Option<Duration>,
    /// Bytes a second, such as 100MiB [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) bandwidth_max: Option<u64>,
}

impl Limits {
    /// As the API has them; `None` when the defaults are wanted.
    pub(crate) fn message(&self) -> Option<MigrationLimits> {
        let limits = MigrationLimits {
            downtime: self.downtime.map(proto_duration),
            rounds_max: self.rounds_max.unwrap_or_default(),
            bytes_max: self.bytes_max.unwrap_or_default(),
            total_time: self.time_max.map(proto_duration),
            bandwidth_max: self.bandwidth_max.unwrap_or_default(),
        };
        (limits != MigrationLimits::default()).then_some(limits)
    }
}

/// A duration as the API has it; far below its limit of 10,000 years.
pub(crate) fn proto_duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_nanos().cast_signed(),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum DomainCommand {
    /// Place a new domain on a node and start it
    #[command(after_help = "\
Examples:
  vpsctl domain create web1 --memory 256MiB --kernel /var/lib/drover/boot/vmlinuz \\
      --initramfs /var/lib/drover/boot/initramfs.img --command-line 'console=ttyS0' \\
      --net address=10.78.0.11
  vpsctl domain create big --memory 64GiB --vcpus 8 --kernel /boot/vmlinuz --dry-run")]
    Create(Box<CreateArgs>),
    /// List the domains and where they run
    List {
        /// Only those on this node
        #[arg(long, value_name = "NODE", value_parser = parse::node)]
        node: Option<String>,
    },
    /// Show one domain, and how its node was chosen
    Show(DomainName),
    /// Start a stopped or failed domain
    Start {
        #[command(flatten)]
        name: DomainName,
        #[command(flatten)]
        detach: Detach,
    },
    /// Press the power button, and pull the plug when the guest has not obeyed in time
    Stop(StopArgs),
    /// Delete a domain for ever; a running one only with --force
    Delete {
        #[command(flatten)]
        name: DomainName,
        /// Also when it runs: its plug is pulled
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        detach: Detach,
    },
    /// Move a running domain to another node, live, and report what it took
    Migrate(MigrateArgs),
    /// Attach to the serial console: what was said before, then what comes
    ///
    /// On a terminal every key goes to the guest; Ctrl-] leaves. When the input is not a terminal
    /// it is typed into the console, and at its end the command leaves once the console has been
    /// silent for --linger.
    #[command(after_help = "\
Examples:
  vpsctl domain console web1                   attach; Ctrl-] leaves
  vpsctl domain console web1 --history-only    what it said so far
  echo reboot | vpsctl domain console web1     type a line and see what comes")]
    Console(ConsoleArgs),
}

#[derive(Args, Debug)]
pub(crate) struct DomainName {
    /// The domain, such as web1 or domains/web1
    #[arg(value_name = "DOMAIN", value_parser = parse::domain)]
    pub(crate) domain: String,
}

#[derive(Args, Debug)]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// Memory, a multiple of 1 MiB, at least 32MiB
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) memory: u64,
    /// Virtual CPUs, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// The kernel's path on the node: a bzImage or an ELF vmlinux
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: String,
    /// The initramfs's path on the node
    #[arg(long, value_name = "PATH", default_value = "", hide_default_value = true)]
    pub(crate) initramfs: String,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0", allow_hyphen_values = true)]
    pub(crate) command_line: String,
    /// Add a network interface, up to 4: alone, or with mac=…, bridge=…, address=… by commas
    #[arg(
        long,
        value_name = "SETTINGS",
        num_args = 0..=1,
        default_missing_value = "default",
        value_parser = parse::interface
    )]
    pub(crate) net: Vec<NetworkInterface>,
    /// When the guest reboots [default: restart]
    #[arg(long, value_name = "POLICY")]
    pub(crate) on_reboot: Option<Restart>,
    /// When the guest crashes [default: stop, as failed]
    #[arg(long, value_name = "POLICY")]
    pub(crate) on_crash: Option<Restart>,
    /// When its node is drained [default: migrate]
    #[arg(long, value_name = "POLICY")]
    pub(crate) drain_policy: Option<OnDrain>,
    /// A label, KEY=VALUE; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse::label)]
    pub(crate) label: Vec<(String, String)>,
    /// Only on this node [default: the scheduler chooses]
    #[arg(long, value_name = "NODE", value_parser = parse::node)]
    pub(crate) node: Option<String>,
    /// Create it stopped
    #[arg(long)]
    pub(crate) stopped: bool,
    /// Check and place it, and change nothing
    #[arg(long, conflicts_with = "detach")]
    pub(crate) dry_run: bool,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

/// What happens to a domain whose guest has rebooted or crashed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Restart {
    Restart,
    Stop,
}

/// What a drain does with a domain.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum OnDrain {
    Migrate,
    Stay,
}

#[derive(Args, Debug)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// Pull the plug at once
    #[arg(long, conflicts_with = "grace")]
    pub(crate) force: bool,
    /// How long the guest has to shut down [default: 60s]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) grace: Option<Duration>,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Args, Debug)]
pub(crate) struct MigrateArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// The destination [default: the scheduler chooses]
    #[arg(long, value_name = "NODE", value_parser = parse::node)]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) detach: Detach,
    #[command(flatten)]
    pub(crate) limits: Limits,
}

#[derive(Args, Debug)]
pub(crate) struct ConsoleArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// Print what was said before and leave
    #[arg(long)]
    pub(crate) history_only: bool,
    /// With piped input: leave when the console has been silent for this long after its end
    #[arg(long, value_name = "DURATION", default_value = "2s", value_parser = parse::duration)]
    pub(crate) linger: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum OperationCommand {
    /// List operations, newest first
    List {
        /// Only those that are not done
        #[arg(long)]
        active: bool,
        /// Only those on this resource: domains/NAME, nodes/NAME or cluster
        #[arg(long, value_name = "RESOURCE", value_parser = parse::target)]
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
    /// Only events about this: domains/NAME, nodes/NAME, operations/UUID or cluster
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    /// clap's own checks of the definitions, and a help text on everything.
    #[test]
    fn definitions_hold() {
        Cli::command().debug_assert();
        let mut missing = Vec::new();
        walk(&Cli::command(), &mut missing);
        assert!(missing.is_empty(), "without help: {missing:?}");
    }

    fn walk(command: &clap::Command, missing: &mut Vec<String>) {
        for argument in command.get_arguments().filter(|a| a.get_help().is_none()) {
            missing.push(format!("{} {}", command.get_name(), argument.get_id()));
        }
        for sub in command.get_subcommands() {
            if sub.get_about().is_none() {
                missing.push(sub.get_name().to_owned());
            }
            walk(sub, missing);
        }
    }

    #[test]
    fn defaults_are_left_to_the_controller() {
        let cli = Cli::try_parse_from(["vpsctl", "node", "drain", "host1"]).unwrap();
        let Command::Node(NodeCommand::Drain(drain)) = cli.command else { panic!("no drain") };
        assert_eq!(drain.name.node, "nodes/host1");
        assert_eq!(drain.limits.message(), None);
        let cli = Cli::try_parse_from(["vpsctl", "node", "drain", "host1", "--downtime", "50ms"]);
        let Command::Node(NodeCommand::Drain(drain)) = cli.unwrap().command else { panic!() };
        let downtime = drain.limits.message().unwrap().downtime.unwrap();
        assert_eq!((downtime.seconds, downtime.nanos), (0, 50_000_000));
    }

    #[test]
    fn interfaces_stand_alone_or_have_settings() {
        let line = ["vpsctl", "domain", "create", "a", "--memory=1GiB", "--kernel=/k", "--net"];
        let more = ["--net", "address=10.0.0.1", "--label", "a=b"];
        let cli = Cli::try_parse_from(line.iter().chain(&more)).unwrap();
        let Command::Domain(DomainCommand::Create(create)) = cli.command else { panic!() };
        assert_eq!(create.net.len(), 2);
        assert_eq!(create.net[1].addresses, ["10.0.0.1"]);
        assert_eq!(create.memory, 1 << 30);
    }

    #[test]
    fn servers_are_split_and_checked() {
        let cli = Cli::try_parse_from(["vpsctl", "--server", "a,b:1", "node", "list"]).unwrap();
        assert_eq!(cli.global.server, ["a:7400", "b:1"]);
        assert!(Cli::try_parse_from(["vpsctl", "--server", "http://a", "node", "list"]).is_err());
    }
}
