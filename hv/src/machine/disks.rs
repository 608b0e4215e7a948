//! The machine's disks: their volumes, opened as what the machine is made for demands; and how
//! they come and go while the guest runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::config::{DiskConfig, FieldError};
use crate::machine::migratable::MigratableDisk;
use crate::machine::{Machine, MachineError};
use crate::memory::GuestMemory;
use crate::virtio::blk::{Blk, Volume};
use crate::virtio::{Unsettled, VirtioPci};

/// Longest wait for what a disk that the guest has let go of has begun. The guest has reset it,
/// so that there is something only when the node's disk hangs; then it is tried again.
const SETTLE_MAX: Duration = Duration::from_secs(2);

/// What a machine is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To run here from the start.
    Boot,
    /// To take in a migration: disks that it shares with its source are opened when that has let
    /// go of them.
    Incoming,
}

/// The device of one disk, and what a migration needs to know of it. `at` is the path of the
/// field that has the disk.
pub(super) fn make(
    at: &str,
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
    let volume =
        volume.map_err(|error| FieldError::new(format!("{at}.path"), &error, error.accepted()))?;
    let blk = Blk::new(volume, &disk.serial, vcpus, memory.clone())
        .map_err(|source| MachineError::Device { device: at.to_owned(), source })?;
    let disk = MigratableDisk {
        volume: blk.volume().clone(),
        serial: disk.serial.clone(),
        shared: disk.shared,
        zeroed: disk.zeroed,
    };
    Ok((blk, disk))
}

impl Machine {
    /// Puts a disk into its slot and tells the guest.
    ///
    /// # Errors
    /// When its volume is not to be had; then nothing has changed.
    ///
    /// # Panics
    /// When it has no slot, or one that is taken.
    pub fn attach_disk(&mut self, disk: DiskConfig) -> Result<(), MachineError> {
        let device = |source| MachineError::Device { device: "disk".into(), source };
        let Some(slot) = disk.slot else { panic!("a disk that comes later has a slot") };
        let (mut blk, migratable) =
            make("disk", &disk, Purpose::Boot, self.config.vcpus, &self.memory)?;
        blk.set_limits(disk.limits, Instant::now());
        let wiring = Arc::clone(&self.wiring);
        let function = VirtioPci::new(Box::new(blk), slot, self.memory.clone(), wiring);
        let function = Arc::new(function.map_err(device)?);
        if self.paused
            && let Err(error) = function.pause()
        {
            function.release();
            return Err(device(std::io::Error::other(error)));
        }
        let index = self.config.insert_disk(disk);
        self.volumes.insert(index, migratable);
        self.disks.insert(index, Arc::clone(&function));
        self.virtio.push(Arc::clone(&function));
        self.devices.pci.add(slot, function);
        self.devices.pci.hot_plug().plugged(slot);
        Ok(())
    }

    /// Takes out the disks that the guest has let go of, and closes their volumes. Answers the
    /// serial numbers of those that are gone.
    pub fn remove_ejected(&mut self) -> Vec<String> {
        let ejected = self.devices.pci.hot_plug().ejected();
        let mut gone = Vec::new();
        for slot in (0..u32::BITS as u8).filter(|slot| ejected & 1 << slot != 0) {
            match self.remove_disk(slot) {
                Ok(serial) => gone.extend(serial),
                // The volume stays open: something of the guest's may still be written to it.
                Err(error) => tracing::warn!(%error, slot, "a disk that is to go is kept"),
            }
        }
        gone
    }

    fn remove_disk(&mut self, slot: u8) -> Result<Option<String>, Unsettled> {
        let serial = match self.disks.iter().position(|function| function.slot() == slot) {
            Some(index) => {
                self.disks[index].pause_within(SETTLE_MAX)?;
                let function = self.disks.remove(index);
                self.devices.pci.remove(slot);
                function.release();
                self.virtio.retain(|other| !Arc::ptr_eq(other, &function));
                self.volumes.remove(index);
                Some(self.config.disks.remove(index).serial)
            }
            // The guest was asked to let go of an empty slot: that is what it has done.
            None => None,
        };
        self.devices.pci.hot_plug().gone(slot);
        Ok(serial)
    }

    /// The slots of the disks that the guest is asked to let go of, or has let go of, one bit each.
    pub fn detaching(&self) -> u32 {
        let hot_plug = self.devices.pci.hot_plug();
        hot_plug.asked() | hot_plug.ejected()
    }
}
