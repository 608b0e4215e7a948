//! Every command and flag, each defined once, with the text of its help; one module for the nouns
//! that belong together.

mod backup;
mod cluster;
mod domain;
mod network;
mod node;
mod storage;

use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use drover_proto::v1::MigrationLimits;

pub(crate) use self::{
    backup::{BackupCommand, CreateBackupArgs, RestoreBackupArgs},
    cluster::{BalanceArgs, ClusterCommand, EventsArgs, OperationCommand},
    domain::{
        ConsoleArgs, CreateArgs, DomainCommand, OnDrain, ReinstallArgs, RescueArgs, ResizeArgs,
        Restart, SeedArgs,
    },
    network::{CreateNetworkArgs, NetworkCommand},
    node::{DrainArgs, NodeCommand},
    storage::{
        CreateVolumeArgs, Format, ImageCommand, ImportArgs, PoolCommand, SnapshotCommand,
        VolumeCommand,
    },
};
use crate::parse;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    any other error
  2    wrong usage, or an argument that the controller refused
  3    what was named does not exist
  4    conflict: it exists already, is busy, or its state forbids this
  5    no node has the room
  6    --timeout has passed; what was started goes on, but for imports and backups
  7    the plan has blockers, or the drain left domains where they were
  8    unavailable: no controller answers, or none leads
  130  interrupted by Ctrl-C; what was started goes on, but for imports and backups

Examples:
  vpsctl cluster status
  vpsctl image import debian13 --file debian13.qcow2 --format qcow2
  vpsctl domain create web1 --memory 1GiB --disk image=debian13,size=10GiB --network lan
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
    /// Virtual machines: create, look, start, stop, move, resize, rescue, save
    #[command(subcommand)]
    Domain(DomainCommand),
    /// What volumes are made of: import, look, delete
    #[command(subcommand)]
    Image(ImageCommand),
    /// The disks of domains: create, look, attach, detach
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// What a domain's disks held at one moment: create, look, restore
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Domains' disks in a directory here: create, list, restore, verify
    #[command(subcommand)]
    Backup(BackupCommand),
    /// Where nodes keep volumes: look
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Which addresses domains are given: create, look, delete
    #[command(subcommand)]
    Network(NetworkCommand),
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

#[derive(Args, Debug)]
pub(crate) struct Detach {
    /// Do not wait: print the operation's name
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Yes {
    /// Do not ask; needed where there is no terminal
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Migration limits")]
pub(crate) struct Limits {
    /// Longest pause of the guest to aim at [default: 100ms]
    #[arg(long, value_name = "DURATION", value_parser = parse::duration)]
    pub(crate) downtime: Option<Duration>,
    /// Passes over memory and disks; then it moves within 4 times --downtime, or fails and stays
    /// [default: 30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds_max: Option<u32>,
    /// Bytes to send; then as with --rounds-max [default: 8 times its memory and disks]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) bytes_max: Option<u64>,
    /// Time to copy; then as with --rounds-max [default: 10m, and what its disks take at 10MiB a
    /// second]
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

    fn create(more: &[&str]) -> CreateArgs {
        let line = ["vpsctl", "domain", "create", "a", "--memory=1GiB"];
        let cli = Cli::try_parse_from(line.iter().chain(more)).unwrap();
        let Command::Domain(DomainCommand::Create(create)) = cli.command else { panic!() };
        *create
    }

    #[test]
    fn interfaces_stand_alone_or_have_settings() {
        let create =
            create(&["--kernel=/k", "--net", "--net", "address=10.0.0.1", "--label", "a=b"]);
        assert_eq!(create.interfaces.0.len(), 2);
        assert_eq!(create.interfaces.0[1].addresses, ["10.0.0.1"]);
        assert_eq!(create.memory, 1 << 30);
    }

    /// The guest's first interface is the one that was typed first.
    #[test]
    fn interfaces_keep_the_order_of_both_flags() {
        let typed = ["--network=lan", "--net", "--net=bridge=br1", "--network", "dmz"];
        let create = create(&[&["--kernel=/k"], &typed[..]].concat());
        let seen: Vec<_> = create.interfaces.0.iter().map(|i| (&*i.network, &*i.bridge)).collect();
        assert_eq!(seen, [("networks/lan", ""), ("", ""), ("", "br1"), ("networks/dmz", "")]);
    }

    #[test]
    fn something_must_boot() {
        assert_eq!(create(&["--disk=image=debian13"]).kernel, None);
        for missing in [&[][..], &["--initramfs=/i"], &["--disk=size=1GiB", "--initramfs=/i"]] {
            let line = ["vpsctl", "domain", "create", "a", "--memory=1GiB"];
            let refused = Cli::try_parse_from(line.iter().chain(missing)).unwrap_err().to_string();
            assert!(refused.contains("--kernel <PATH>"), "{missing:?}: {refused}");
        }
    }

    #[test]
    fn servers_are_split_and_checked() {
        let cli = Cli::try_parse_from(["vpsctl", "--server", "a,b:1", "node", "list"]).unwrap();
        assert_eq!(cli.global.server, ["a:7400", "b:1"]);
        assert!(Cli::try_parse_from(["vpsctl", "--server", "http://a", "node", "list"]).is_err());
    }
}
