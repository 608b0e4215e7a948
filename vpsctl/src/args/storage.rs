//! `vpsctl pool`, `vpsctl volume`, `vpsctl snapshot` and `vpsctl image`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use drover_proto::v1::DiskLimits;

use super::{Detach, Yes, domain::DomainName};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum PoolCommand {
    /// List every node's pools with their room; one that is full or broken says why
    List {
        /// Only those of this node
        #[arg(long, value_name = "NODE", value_parser = parse::node)]
        node: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List the volumes, whose they are and where they lie
    List {
        /// Only those of this domain
        #[arg(long, value_name = "DOMAIN", value_parser = parse::domain)]
        domain: Option<String>,
    },
    /// Show one volume
    Show(VolumeName),
    /// Make a volume that no domain has
    #[command(after_help = "\
Examples:
  vpsctl volume create archive --size 100GiB --node host1
  vpsctl volume attach archive web1")]
    Create(CreateVolumeArgs),
    /// Delete a volume that no domain has, for ever
    Delete(VolumeName),
    /// Give a volume to a domain of its node, as its last disk; it may run
    Attach {
        #[command(flatten)]
        name: VolumeName,
        #[command(flatten)]
        domain: DomainName,
        /// The guest may not write to it
        #[arg(long)]
        read_only: bool,
        /// What the guest may ask of it: iops=…,bps=… with one or both [default: no limit]
        #[arg(long, value_name = "LIMITS", value_parser = parse::limits)]
        limits: Option<DiskLimits>,
    },
    /// Take a volume from its domain; it stays on the node
    ///
    /// The guest of a running domain is asked to let go of it: unmount it there first. One that
    /// does not within a minute keeps it.
    Detach(VolumeName),
}

#[derive(Args, Debug)]
pub(crate) struct VolumeName {
    /// The volume, such as web1-0 or volumes/web1-0
    #[arg(value_name = "VOLUME", value_parser = parse::volume)]
    pub(crate) volume: String,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("content")
    .args(["size", "image"]).required(true).multiple(true))]
pub(crate) struct CreateVolumeArgs {
    #[command(flatten)]
    pub(crate) name: VolumeName,
    /// Its size, a multiple of 1 MiB [default: the image's]
    #[arg(long, value_name = "SIZE", value_parser = parse::size)]
    pub(crate) size: Option<u64>,
    /// The image that fills it [default: it is blank]
    #[arg(long, value_name = "IMAGE", value_parser = parse::image)]
    pub(crate) image: Option<String>,
    /// On this node [default: the one with most room]
    #[arg(long, value_name = "NODE", value_parser = parse::node)]
    pub(crate) node: Option<String>,
    /// In this pool of the node [default: its first]
    #[arg(long, value_name = "POOL", value_parser = parse::pool)]
    pub(crate) pool: Option<String>,
    #[command(flatten)]
    pub(crate) detach: Detach,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// Keep what all of a domain's disks hold now
    ///
    /// A running guest's filesystems are frozen meanwhile, if its agent answers; the disks are as
    /// after a power cut otherwise, and the snapshot says so. A snapshot lies on the domain's node,
    /// does not move with it, and goes when the domain is deleted.
    Create {
        #[command(flatten)]
        domain: DomainName,
        #[command(flatten)]
        name: SnapshotName,
        #[command(flatten)]
        detach: Detach,
    },
    /// List the snapshots, whose they are and where they lie
    List {
        /// Only those of this domain
        #[arg(long, value_name = "DOMAIN", value_parser = parse::domain)]
        domain: Option<String>,
    },
    /// Show one snapshot
    Show(SnapshotName),
    /// Put a stopped domain's disks back; what they hold now is lost, the snapshot stays
    Restore {
        #[command(flatten)]
        name: SnapshotName,
        #[command(flatten)]
        yes: Yes,
        #[command(flatten)]
        detach: Detach,
    },
    /// Delete a snapshot; the domain's disks stay as they are
    Delete {
        #[command(flatten)]
        name: SnapshotName,
        #[command(flatten)]
        yes: Yes,
    },
}

#[derive(Args, Debug)]
pub(crate) struct SnapshotName {
    /// The snapshot, such as before-upgrade or snapshots/before-upgrade
    #[arg(value_name = "SNAPSHOT", value_parser = parse::snapshot)]
    pub(crate) snapshot: String,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Make an image of a file here, or of one that a node fetches
    ///
    /// It goes into a pool of one node; other nodes get it from there when they need it. Ctrl-C or
    /// --timeout ends the import, and nothing of it is kept.
    #[command(after_help = "\
Examples:
  vpsctl image import debian13 --file debian13.qcow2 --format qcow2
  vpsctl image import debian13 --url https://images.example/debian13.raw --format raw \\
      --sha256 \"$(cut -d' ' -f1 debian13.raw.sha256)\"")]
    Import(Box<ImportArgs>),
    /// List the images and where copies of them lie
    List,
    /// Show one image
    Show(ImageName),
    /// Delete an image; volumes made of it stay as they are
    Delete(ImageName),
}

#[derive(Args, Debug)]
pub(crate) struct ImageName {
    /// The image, such as debian13 or images/debian13
    #[arg(value_name = "IMAGE", value_parser = parse::image)]
    pub(crate) image: String,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("source").args(["file", "url"]).required(true))]
pub(crate) struct ImportArgs {
    #[command(flatten)]
    pub(crate) name: ImageName,
    /// The file here
    #[arg(long, value_name = "PATH", value_parser = parse::image_file)]
    pub(crate) file: Option<PathBuf>,
    /// Where the node fetches it, http:// or https://
    #[arg(long, value_name = "URL", value_parser = parse::url)]
    pub(crate) url: Option<String>,
    /// What the file is: never guessed
    #[arg(long, value_name = "FORMAT")]
    pub(crate) format: Format,
    /// The file's SHA-256 in hexadecimal, to be checked [default: not checked]
    #[arg(long, value_name = "HEX", value_parser = parse::sha256)]
    pub(crate) sha256: Option<String>,
    /// Onto this node [default: the one with most room]
    #[arg(long, value_name = "NODE", value_parser = parse::node)]
    pub(crate) node: Option<String>,
    /// Into this pool of the node [default: its first]
    #[arg(long, value_name = "POOL", value_parser = parse::pool)]
    pub(crate) pool: Option<String>,
}

/// What an image's file is.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Format {
    /// The disk's bytes as they are
    Raw,
    /// QEMU's qcow2, without backing file, external data file and encryption
    Qcow2,
}
