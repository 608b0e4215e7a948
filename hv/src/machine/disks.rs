//! The machine's disks: their volumes, opened as what the machine is made for demands.

use crate::config::{DiskConfig, FieldError};
use crate::machine::MachineError;
use crate::machine::migratable::MigratableDisk;
use crate::memory::GuestMemory;
use crate::virtio::blk::{Blk, Volume};

/// What a machine is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To run here from the start.
    Boot,
    /// To take in a migration: disks that it shares with its source are opened when that has let
    /// go of them.
    Incoming,
}

/// The device of one disk, and what a migration needs to know of it.
pub(super) fn make(
    index: usize,
    disk: &DiskConfig,
    purpose: Purpose,
    vcpus: u32,
    memory: &GuestMemory,
) -> Result<(Blk, MigratableDisk), MachineError> {
    let volume = if disk.shared && purpose == Purpose::Incoming {
        Volume::unopened(&disk.path, disk.read_only)
    } else {
        Volume::open(&disk.path, disk.read_only)
    };
    let volume = volume.map_err(|error| {
        FieldError::new(format!("disks[{index}].path"), &error, error.accepted())
    })?;
    let blk = Blk::new(volume, &disk.serial, vcpus, memory.clone())
        .map_err(|source| MachineError::Device { device: format!("disks[{index}]"), source })?;
    let disk = MigratableDisk {
        volume: blk.volume().clone(),
        serial: disk.serial.clone(),
        shared: disk.shared,
        zeroed: disk.zeroed,
    };
    Ok((blk, disk))
}
