//! `vpsctl backup`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{Yes, domain::DomainName};
use crate::parse;

#[derive(Debug, Subcommand)]
pub(crate) enum BackupCommand {
    /// Copy what all of a domain's disks hold now into a directory of this machine
    ///
    /// A snapshot is taken, read and deleted. Only blocks that the directory does not have come
    /// over: the second backup of a domain is an incremental one, and still whole by itself.
    #[command(after_help = "\
Examples:
  vpsctl backup create web1 /backup/web1
  vpsctl backup list /backup/web1
  vpsctl backup restore /backup/web1 web1-20261123-020000 web1")]
    Create(CreateBackupArgs),
    /// List the backups of a directory, oldest first
    List(Directory),
    /// Put a backup in place of a stopped domain's disks; what they hold is lost
    Restore(RestoreBackupArgs),
    /// Delete a backup, and the blocks that no other one needs
    Delete {
        #[command(flatten)]
        directory: Directory,
        #[command(flatten)]
        name: BackupName,
    },
    /// Read every block of a backup, or of all, and compare it with its digest
    ///
    /// Asks no controller. Exit code 1 when a block is damaged or missing.
    Verify {
        #[command(flatten)]
        directory: Directory,
        /// Only this one
        #[arg(value_name = "BACKUP", value_parser = parse::backup)]
        backup: Option<String>,
        /// Delete damaged blocks, so that the next backup brings those that are still the same
        #[arg(long)]
        remove_damaged: bool,
    },
}

#[derive(Args, Debug)]
pub(crate) struct Directory {
    /// The directory
    #[arg(value_name = "DIR", value_parser = parse::directory)]
    pub(crate) directory: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct BackupName {
    /// The backup, as 'vpsctl backup list' shows it
    #[arg(value_name = "BACKUP", value_parser = parse::backup)]
    pub(crate) backup: String,
}

#[derive(Args, Debug)]
pub(crate) struct CreateBackupArgs {
    #[command(flatten)]
    pub(crate) domain: DomainName,
    #[command(flatten)]
    pub(crate) directory: Directory,
    /// The backup's name [default: the domain's, and the time in UTC]
    #[arg(long, value_name = "NAME", value_parser = parse::backup)]
    pub(crate) name: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct RestoreBackupArgs {
    #[command(flatten)]
    pub(crate) directory: Directory,
    #[command(flatten)]
    pub(crate) name: BackupName,
    #[command(flatten)]
    pub(crate) domain: DomainName,
    /// Only this disk, counted from 0 [default: all that the backup has]
    #[arg(long, value_name = "N")]
    pub(crate) disk: Option<u32>,
    #[command(flatten)]
    pub(crate) yes: Yes,
}
