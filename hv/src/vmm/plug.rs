//! Disks that come and go while the guest runs.
//!
//! A disk that is attached is there when the call returns. One that is detached is asked of the
//! guest, which lets go of it when it likes: a vCPU writes that into the hot-plug registers, the
//! supervisor is told and takes the disk out, and whoever waits sees it in the status. While a
//! migration or a saving has the machine, nothing is taken out: what the guest has let go of is
//! part of the state, and goes where the guest goes on. One that is attached while the guest is
//! asked for it stays: so a guest that never answers leaves nothing half done.

use std::path::PathBuf;
use std::time::Duration;

use drover_proto::vmm::v1::{AttachDiskRequest, DetachDiskRequest, DiskStatus};

use super::VmmError;
use super::adjust::limits;
use super::supervisor::{Place, Supervisor};
use crate::config::{DiskConfig, FieldError};
use crate::machine::MachineError;
use crate::pci::HOT_PLUG_SLOTS;

/// A guest that has not read what came or goes is told again after so long, so many times: it may
/// be booting, and one that never looks costs nothing for ever.
const REMIND: Duration = Duration::from_secs(1);
pub(super) const REMINDERS_MAX: u32 = 120;

impl Supervisor {
    pub(super) fn attach_disk(&mut self, request: AttachDiskRequest) -> Result<(), VmmError> {
        const ASKED: &str = "attach a disk";
        let disk = DiskConfig {
            path: PathBuf::from(request.path),
            read_only: request.read_only,
            serial: request.serial,
            slot: Some(slot(request.slot)?),
            shared: request.shared,
            zeroed: false,
            limits: limits(request.limits.unwrap_or_default())?,
        };
        if disk.serial.is_empty() {
            return Err(FieldError::new("serial", "", "a serial number of its own").into());
        }
        let Place::Owned(machine) = &mut self.place else { return Err(self.refuse(ASKED)) };
        let disks = &self.options.config.disks;
        if let Some(there) = disks.iter().find(|there| there.serial == disk.serial)
            && (&there.path, there.slot) == (&disk.path, disk.slot)
        {
            // Asked again, or it may stay after all.
            if there.slot.is_some_and(|slot| !machine.devices().pci.hot_plug().keep(slot)) {
                let state = "the guest has just let go of it".to_owned();
                return Err(VmmError::State { asked: ASKED, state });
            }
            self.tell_disks();
            return Ok(());
        }
        let mut config = self.options.config.clone();
        config.insert_disk(disk.clone());
        config.validate()?;
        machine.attach_disk(disk).map_err(|error| match error {
            MachineError::Field(error) => VmmError::Field(error),
            other => VmmError::Failed(other.to_string()),
        })?;
        // The machine after a reboot is made from it.
        self.options.config = config;
        self.reminders = REMINDERS_MAX;
        self.tell_disks();
        Ok(())
    }

    /// Asks the guest, unless there is no such disk any more.
    pub(super) fn detach_disk(&mut self, request: &DetachDiskRequest) -> Result<(), VmmError> {
        const ASKED: &str = "detach a disk";
        if request.serial.is_empty() {
            return Err(FieldError::new("serial", "", "the serial number of a disk").into());
        }
        let Place::Owned(machine) = &self.place else { return Err(self.refuse(ASKED)) };
        let mut disks = self.options.config.disks.iter();
        let Some(disk) = disks.find(|disk| disk.serial == request.serial) else { return Ok(()) };
        let Some(slot) = disk.slot else {
            let state = "the guest runs: this disk has no slot of its own until the domain is \
                         stopped and started again";
            return Err(VmmError::State { asked: ASKED, state: state.into() });
        };
        if machine.is_paused() {
            return Err(self.refuse(ASKED));
        }
        machine.devices().pci.hot_plug().ask(slot);
        self.reminders = REMINDERS_MAX;
        self.tell_disks();
        Ok(())
    }

    /// When the guest is to be told again of what it has not read, if it is.
    pub(super) fn remind_in(&self) -> Option<Duration> {
        let Place::Owned(machine) = &self.place else { return None };
        let unread = machine.devices().pci.hot_plug().unread() != 0 && !machine.is_paused();
        (unread && self.reminders > 0).then_some(REMIND)
    }

    /// Tells it again.
    pub(super) fn remind(&mut self) {
        let Place::Owned(machine) = &self.place else { return };
        machine.devices().pci.hot_plug().remind();
        self.reminders = self.reminders.saturating_sub(1);
    }

    /// Takes out what the guest has let go of, when the machine is here.
    pub(super) fn remove_ejected(&mut self) {
        let Place::Owned(machine) = &mut self.place else { return };
        if machine.devices().pci.hot_plug().ejected() == 0 {
            return;
        }
        let gone = machine.remove_ejected();
        self.options.config.disks.retain(|disk| !gone.contains(&disk.serial));
        tracing::info!(?gone, "the guest has let go of disks");
        self.tell_disks();
    }

    /// A new machine begins: what the old one's guest was asked for is gone with it.
    pub(super) fn forget_detaching(&mut self) {
        let detaching = self.detaching();
        self.options.config.disks.retain(|disk| !is_detaching(disk, detaching));
    }

    /// Slots of disks that are to go, one bit each.
    fn detaching(&self) -> u32 {
        match &self.place {
            Place::Owned(machine) => machine.detaching(),
            _ => 0,
        }
    }

    /// Puts the disks into the status, as they are now.
    pub(super) fn tell_disks(&self) {
        let detaching = self.detaching();
        let disks = self.options.config.disks.iter().map(|disk| DiskStatus {
            serial: disk.serial.clone(),
            slot: disk.slot.map_or(0, u32::from),
            detaching: is_detaching(disk, detaching),
        });
        self.shared.set_disks(disks.collect());
    }
}

fn is_detaching(disk: &DiskConfig, detaching: u32) -> bool {
    disk.slot.is_some_and(|slot| detaching & 1 << slot != 0)
}

fn slot(value: u32) -> Result<u8, FieldError> {
    let slot = u8::try_from(value).ok().filter(|slot| HOT_PLUG_SLOTS.contains(slot));
    slot.ok_or_else(|| {
        let (first, last) = (HOT_PLUG_SLOTS.start(), HOT_PLUG_SLOTS.end());
        FieldError::new("slot", value, format!("{first} to {last}"))
    })
}
