//! When a guest is written to its memory volume, and when it goes on from there.
//!
//! Each order to save is tried once; it has a volume of its own. A start goes on from the volume
//! that the assignment names, until the guest has been seen to run: then nothing is left in it.

use super::{Action, Disks, Facts, Migration, is_leaving, is_new_start};
use crate::records::{DomainRecord, SaveRecord};
use crate::wanted::{Assigned, Disk, Owner, Role};

/// The guest runs here and shall be saved: once, when there is room for it. When that fails it
/// runs on until another thing is wanted.
pub(super) fn decide_saving(
    facts: Facts<'_>,
    assigned: &Assigned,
    owner: &Owner,
    migration: Option<&Migration>,
) -> Action {
    if is_new_start(facts, owner) {
        return Action::Adopt;
    }
    let failed = facts.record.is_some_and(|record| save_failed(record, assigned).is_some());
    let may = assigned.memory.is_some() && *facts.memory == Disks::Ready;
    if failed || !may || facts.progress.saving || migration.is_some_and(is_leaving) {
        return Action::Nothing;
    }
    let at = facts.progress.save_again_ms;
    if facts.now_ms < at { Action::WaitUntil(at) } else { Action::Save }
}

/// Why this order to save the guest could not be obeyed.
pub fn save_failed<'a>(record: &'a DomainRecord, assigned: &Assigned) -> Option<&'a str> {
    let (Role::Owner(owner), Some(memory)) = (&assigned.role, &assigned.memory) else {
        return None;
    };
    let is_this = |save: &&SaveRecord| {
        save.memory == memory.volume
            && save.epoch == assigned.epoch
            && save.start_generation == owner.start_generation
    };
    record.save.as_ref().filter(is_this).map(|save| save.error.as_str())
}

/// The volume that a start goes on from: the assignment's, unless the guest has done so already or
/// could not be saved to it. (A VMM that is started with one that is used up boots; but that one
/// may be gone by then.)
pub fn restores<'a>(record: Option<&DomainRecord>, assigned: &'a Assigned) -> Option<&'a Disk> {
    let Role::Owner(_) = &assigned.role else { return None };
    let used = record.and_then(|record| record.restored.as_ref());
    let unsaved = record.and_then(|record| record.save.as_ref()).map(|save| &save.memory);
    let holds = |volume| used != Some(volume) && unsaved != Some(volume);
    assigned.memory.as_ref().filter(|memory| holds(&memory.volume))
}
