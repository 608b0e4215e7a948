//! Disks that come and go while the guest runs.

use std::time::Duration;

use drover_proto::v1::DiskLimits;
use drover_proto::vmm::v1::{DiskStatus, VmmState};

use super::{Action, Disks, Facts, Vmm, millis};

/// A guest that has not let go of a disk is asked again so much later.
const DETACH_AGAIN: Duration = Duration::from_secs(10);
/// The serial number of the seed, which is no volume.
pub const SEED_SERIAL: &str = "cidata";

/// What a VMM that runs is told of one of its disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveDisk {
    /// As the VMM knows it.
    pub serial: String,
    /// Its PCI slot, if it has one of its own: then it may come while the guest runs.
    pub slot: Option<u8>,
    /// What the guest may ask of it.
    pub limits: DiskLimits,
    /// Its volume's size; 0 when that is not known.
    pub size_bytes: u64,
}

/// Disks that come and go while the guest runs: what the VMM has is made equal to the assignment.
/// One without a slot of its own is there from the start to the end. `None`: they are equal.
pub fn plug(facts: Facts<'_>) -> Option<Action> {
    let Vmm::Live { state: VmmState::Running, .. } = facts.vmm else { return None };
    let is_wanted = |there: &&DiskStatus| {
        let is_it = |disk: &LiveDisk| {
            disk.serial == there.serial && disk.slot.map(u32::from) == Some(there.slot)
        };
        there.serial == SEED_SERIAL || facts.live_disks.iter().any(is_it)
    };
    let goes = facts.plugged.iter().find(|there| there.slot != 0 && !is_wanted(there));
    if let Some(there) = goes {
        let asked = facts.progress.detach_ms.filter(|_| there.detaching);
        let again = asked.map_or(0, |asked| asked + millis(DETACH_AGAIN));
        return Some(match facts.now_ms < again {
            true => Action::WaitUntil(again),
            false => Action::DetachDisk(there.serial.clone()),
        });
    }
    let is_there =
        |disk: &LiveDisk| facts.plugged.iter().any(|d| d.serial == disk.serial && !d.detaching);
    let comes = facts.live_disks.iter().position(|disk| disk.slot.is_some() && !is_there(disk))?;
    // Not before all are here; nothing else is said of disks till then.
    Some(if *facts.disks == Disks::Ready { Action::AttachDisk(comes) } else { Action::Nothing })
}
