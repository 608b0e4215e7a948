//! `vpsctl domain`.

use std::{path::PathBuf, time::Duration};

use clap::{ArgMatches, Args, FromArgMatches, Subcommand, ValueEnum};
use drover_proto::v1::{Disk, DiskResize, NetworkInterface};

use super::{Detach, Limits, Yes};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum DomainCommand {
    /// Place a new domain on a node and start it
    #[command(after_help = "\
Examples:
  vpsctl domain create web1 --memory 1GiB --disk image=debian13,size=10GiB --network lan \\
      --ssh-key ~/.ssh/id_ed25519.pub
  vpsctl domain create db1 --memory 4GiB --disk image=debian13,size=10GiB,pool=ssd \\
      --disk size=100GiB,iops=2000,bps=200MiB --user-data db.yaml
  vpsctl domain create tiny --memory 256MiB --kernel /var/lib/drover/boot/vmlinuz \\
      --initramfs /var/lib/drover/boot/initramfs.img --net address=10.78.0.11
  vpsctl domain create big --memory 64GiB --vcpus 8 --disk image=debian13 --dry-run")]
    Create(Box<CreateArgs>),
    /// List the domains and where they run
    List {
        /// Only those on this node
        #[arg(long, value_name = "NODE", value_parser = parse::node)]
        node: Option<String>,
    },
    /// Show one domain, and how its node was chosen
    Show(DomainName),
    /// Start a stopped or failed domain; a saved one goes on where it was
    Start {
        #[command(flatten)]
        name: DomainName,
        /// Delete what was saved, and boot
        #[arg(long)]
        discard_saved: bool,
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
    /// Move a domain to another node, a running one live, and report what it took
    Migrate(MigrateArgs),
    /// Give a domain larger disks, other limits, vCPUs or memory
    ///
    /// Disks grow and get their limits at once, also while it runs; they never shrink. vCPUs and
    /// memory change with its next start.
    #[command(after_help = "\
Examples:
  vpsctl domain resize web1 --disk 0=20GiB
  vpsctl domain resize web1 --vcpus 4 --memory 8GiB
  vpsctl domain resize web1 --limit 0=iops=500,bps=100MiB --limit 1=none")]
    Resize(ResizeArgs),
    /// Put an image's content in place of a disk's; what the disk holds is lost
    ///
    /// The domain must be stopped, and stays so.
    Reinstall(ReinstallArgs),
    /// Boot a stopped domain from a rescue image, with its own disks behind it
    #[command(after_help = "\
Examples:
  vpsctl domain rescue web1 --image rescue    start it from the image
  vpsctl domain stop web1
  vpsctl domain rescue web1 --end             its own disks boot again")]
    Rescue(RescueArgs),
    /// Write a running domain's memory to its node's disk, and end it
    Save {
        #[command(flatten)]
        name: DomainName,
        #[command(flatten)]
        detach: Detach,
    },
    /// Go on with a saved domain where it was
    Restore {
        #[command(flatten)]
        name: DomainName,
        #[command(flatten)]
        detach: Detach,
    },
    /// Show what the agent inside the guest says: its system, its addresses
    Guest(DomainName),
    /// Set a user's password inside the guest, through the agent there
    ///
    /// The password is asked for on a terminal, and otherwise read from the standard input, where
    /// one line is expected. It is kept nowhere.
    #[command(after_help = "Example:\n  vpsctl domain set-password web1 --user debian < password")]
    SetPassword {
        #[command(flatten)]
        name: DomainName,
        /// The user inside the guest
        #[arg(long, value_name = "USER", default_value = "root", value_parser = parse::user)]
        user: String,
    },
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
#[command(group = clap::ArgGroup::new("boots")
    .args(["disk", "kernel"]).required(true).multiple(true))]
pub(crate) struct CreateArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// Memory, a multiple of 1 MiB, at least 32MiB
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) memory: u64,
    /// Virtual CPUs, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// Add a disk, up to 7: image=…, size=…, pool=…, read-only, iops=…, bps=… by commas
    ///
    /// image= fills it, and says its size where size= does not; without image= it is blank. pool=
    /// is the node's first when left out. iops= and bps= limit its requests and its bytes a second.
    /// The guest finds the disks in the order given.
    #[arg(long, value_name = "SETTINGS", value_parser = parse::disk)]
    pub(crate) disk: Vec<Disk>,
    /// The kernel's path on the node: a bzImage or an ELF vmlinux
    /// [default: the one that lies in the first disk]
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: Option<String>,
    /// The initramfs's path on the node
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub(crate) initramfs: Option<String>,
    /// The kernel's command line; without --kernel it goes behind the disk's own
    /// [default: console=ttyS0 with --kernel]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) command_line: Option<String>,
    #[command(flatten)]
    pub(crate) interfaces: Interfaces,
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
    #[command(flatten)]
    pub(crate) seed: SeedArgs,
}

/// What cloud-init in the guest is told; any of these asks for the seed.
#[derive(Args, Debug)]
#[command(next_help_heading = "cloud-init")]
pub(crate) struct SeedArgs {
    /// Give the guest a seed disk even if nothing below is given
    #[arg(long)]
    pub(crate) cloud_init: bool,
    /// A file of public SSH keys, one a line; may be repeated, up to 32 keys
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_key: Vec<PathBuf>,
    /// A file of user data (#cloud-config, #!/bin/sh …), at most 64 KiB
    #[arg(long, value_name = "FILE")]
    pub(crate) user_data: Option<PathBuf>,
    /// The guest's host name [default: the domain's name]
    #[arg(long, value_name = "NAME", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(crate) host_name: Option<String>,
}

/// The two flags that add an interface, as clap sees them.
#[derive(Args, Debug)]
struct InterfaceFlags {
    /// Add a network interface, up to 4: alone, or with network=…, mac=…, bridge=…, address=… by
    /// commas
    #[arg(
        long,
        value_name = "SETTINGS",
        num_args = 0..=1,
        default_missing_value = "default",
        value_parser = parse::interface
    )]
    net: Vec<NetworkInterface>,
    /// Add an interface in this network, which gives it an address; as --net network=NETWORK
    #[arg(long, value_name = "NETWORK", value_parser = parse::interface_in)]
    network: Vec<NetworkInterface>,
}

/// The interfaces in the order in which they were typed, whichever flag added them: the guest
/// finds them in that order.
#[derive(Debug)]
pub(crate) struct Interfaces(pub(crate) Vec<NetworkInterface>);

impl Args for Interfaces {
    fn augment_args(command: clap::Command) -> clap::Command {
        InterfaceFlags::augment_args(command)
    }
    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        InterfaceFlags::augment_args_for_update(command)
    }
}

impl FromArgMatches for Interfaces {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut placed = Vec::new();
        for flag in ["net", "network"] {
            let places = matches.indices_of(flag).into_iter().flatten();
            let given = matches.get_many::<NetworkInterface>(flag).into_iter().flatten();
            placed.extend(places.zip(given.cloned()));
        }
        placed.sort_by_key(|(place, _)| *place);
        Ok(Self(placed.into_iter().map(|(_, interface)| interface).collect()))
    }
    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
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
#[command(group = clap::ArgGroup::new("change")
    .args(["vcpus", "memory", "disk", "limit"]).required(true).multiple(true))]
pub(crate) struct ResizeArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// Virtual CPUs, 1 to 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) vcpus: Option<u32>,
    /// Memory, a multiple of 1 MiB, at least 32MiB
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) memory: Option<u64>,
    /// A disk's new size; the disks are counted from 0
    #[arg(long, value_name = "N=SIZE", value_parser = parse::disk_size)]
    pub(crate) disk: Vec<DiskResize>,
    /// A disk's new limits: N=iops=…,bps=… with one or both, or N=none
    #[arg(long, value_name = "N=LIMITS", value_parser = parse::disk_limits)]
    pub(crate) limit: Vec<DiskResize>,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Args, Debug)]
pub(crate) struct ReinstallArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// Which disk, counted from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) disk: u32,
    /// The image [default: the one that the disk was made of]
    #[arg(long, value_name = "IMAGE", value_parser = parse::image)]
    pub(crate) image: Option<String>,
    #[command(flatten)]
    pub(crate) yes: Yes,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("what").args(["image", "end"]).required(true))]
pub(crate) struct RescueArgs {
    #[command(flatten)]
    pub(crate) name: DomainName,
    /// The rescue image
    #[arg(long, value_name = "IMAGE", value_parser = parse::image)]
    pub(crate) image: Option<String>,
    /// Remove the rescue disk of a stopped domain: its own disks boot again
    #[arg(long)]
    pub(crate) end: bool,
    #[command(flatten)]
    pub(crate) detach: Detach,
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
