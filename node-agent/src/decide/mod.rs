//! What to do next about one domain: a pure function of what is recorded, what runs, and what
//! the controller wants. All rules of the agent stand here; the executor ([`crate::domain`])
//! does what comes out, looks again, and asks again, until the answer is [`Action::Nothing`].
//!
//! The rules that keep a domain from running twice (I1):
//!
//! - an assignment with an epoch below the record's is refused, whatever it says;
//! - a VMM that handed over is resumed, and a domain that was handed over is started, only under
//!   an epoch greater than the one that it was handed over *to*;
//! - nothing is started while a VMM's process exists, answering or not;
//! - without an assignment nothing is started, and before the first `Desired` nothing is ended.
//!
//! A VMM is started, to boot a guest or to wait for one, only when all of the domain's disks are
//! here ([`Disks`]). Until then its record says that it is to be started, so that what is
//! reported of the wait counts for this epoch and start.
//!
//! ```text
//!                          Start            StartMigration
//!            nothing  ───────────►  RUNNING ──────────────► HANDED_OVER
//!               │  ▲                  ▲  ▲                       │
//! StartIncoming │  └── Settle ─ ended │  └─────── TakeOver ──────┘ greater epoch
//!               ▼                     │
//!           INCOMING ─ COMMIT / TakeOver
//! ```

mod plug;
mod saving;
#[cfg(test)]
mod tests;

use std::time::Duration;

use drover_proto::agent::v1::{MigrationProgress, MigrationRole};
use drover_proto::v1::RestartPolicy;
use drover_proto::vmm::v1::{DiskStatus, VmmState};

use crate::records::{DomainRecord, End, EndReason};
use crate::wanted::{Assigned, Outgoing, Owner, Power, Role, Wanted};
pub use plug::{LiveDisk, SEED_SERIAL, plug};
use saving::decide_saving;
pub use saving::{restores, save_failed};

/// How often in a row a domain is restarted after crashes.
pub const CRASH_RESTARTS_MAX: u32 = 5;
/// A VMM that lived this long has not crashed "in a row".
pub const CRASH_FORGIVEN_AFTER: Duration = Duration::from_secs(600);
/// The first wait before a restart after a crash; each further one is twice as long.
pub const CRASH_BACKOFF: Duration = Duration::from_secs(1);
/// How long a new VMM may take to answer on its socket.
pub const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VMM may take to end after Quit, or after its guest has gone.
pub const QUIT_TIMEOUT: Duration = Duration::from_secs(10);

/// The VMM, as it can be seen now. Times are milliseconds of the agent's monotonic clock.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vmm {
    /// No process.
    Gone,
    /// There is a process, and its socket does not answer.
    Silent {
        /// Since when.
        since_ms: u64,
        /// The epoch that it has handed the guest over to; 0 if it has not.
        handed_to: u64,
    },
    /// It answers.
    Live {
        /// What it says of itself.
        state: VmmState,
        /// The migration that it takes part in.
        migration: Option<Migration>,
        /// The epoch that it has handed the guest over to; 0 if it has not.
        handed_to: u64,
    },
}

impl Vmm {
    /// The epoch that it has handed the guest over to; 0 if it has not.
    pub fn handed_to(&self) -> u64 {
        match self {
            Self::Gone => 0,
            Self::Silent { handed_to, .. } | Self::Live { handed_to, .. } => *handed_to,
        }
    }
}

/// A migration, as a VMM reports it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Migration {
    /// The operation's UUID.
    pub id: String,
    /// Which end this VMM is.
    pub role: MigrationRole,
    /// How far it is.
    pub progress: MigrationProgress,
}

/// A domain's disks on this node. One without disks has all that it needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Disks {
    /// All of them can be opened.
    #[default]
    Ready,
    /// They are being made; for people, how far.
    Waiting(String),
    /// One of them cannot be had, and why. It may be there later all the same.
    Failed(String),
}

/// What the agent has done so far and need not remember after its own death.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// When the power button was pressed.
    pub button_ms: Option<u64>,
    /// When the VMM was told to quit.
    pub quit_ms: Option<u64>,
    /// When the VMM said that its guest is gone.
    pub exited_ms: Option<u64>,
    /// The process was killed; its end is to come.
    pub killed: bool,
    /// When the last VMM ended, or was found ended.
    pub ended_ms: u64,
    /// The epoch under which the VMM was told to run the guest; its status will say so.
    pub taken_over: Option<u64>,
    /// The outgoing migration that was told to stop.
    pub cancelled: Option<String>,
    /// The incoming migration for which the VMM was told to listen; its status will say so.
    pub prepared: Option<String>,
    /// The incoming migration for which the VMM could not listen, and why.
    pub prepare_failed: Option<(String, String)>,
    /// What the VMM was told of its disks; `None` when this agent has told it nothing.
    pub told_disks: Option<Vec<LiveDisk>>,
    /// When the guest was last asked to let go of a disk.
    pub detach_ms: Option<u64>,
    /// Why the VMM does not attach or detach a disk.
    pub disk_error: String,
    /// The VMM is saving the guest, or has: its end is to come.
    pub saving: bool,
    /// It did not say what became of that; it is asked again then.
    pub save_again_ms: u64,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// All is as it should be, or will be without us.
    Nothing,
    /// Ask again at this time (or when something changes).
    WaitUntil(u64),
    /// Do nothing, and report why.
    Refuse(String),
    /// Write the assignment's epoch and start generation into the record.
    Adopt,
    /// Write down how the VMM ended.
    Settle,
    /// Write down that the domain is to be started when its disks are here.
    AwaitDisks,
    /// Start a VMM that boots the guest.
    Start,
    /// Start a VMM that waits for the guest.
    StartIncoming,
    /// Tell the waiting VMM to listen.
    PrepareIncoming,
    /// Send the guest away.
    StartMigration,
    /// Give the migration up.
    CancelMigration,
    /// Run the guest here, under the assignment's epoch.
    TakeOver,
    /// Tell the VMM what its disks have become.
    UpdateDisks,
    /// Give the VMM a disk that it has not; the number is its place in the assignment.
    AttachDisk(usize),
    /// Have the guest let go of the disk of this serial number.
    DetachDisk(String),
    /// Write the guest to its memory volume.
    Save,
    /// Press the power button.
    PowerButton,
    /// End the VMM.
    Quit,
    /// End its process.
    Kill,
    /// Remove all that is left of the domain: taps, files, record.
    Remove,
}

/// Everything that a decision rests on.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// What is on disk.
    pub record: Option<&'a DomainRecord>,
    /// What runs.
    pub vmm: &'a Vmm,
    /// What shall be.
    pub wanted: &'a Wanted,
    /// What was done.
    pub progress: &'a Progress,
    /// The disks of the assignment.
    pub disks: &'a Disks,
    /// The volume of its memory.
    pub memory: &'a Disks,
    /// What its VMM is told of its disks.
    pub live_disks: &'a [LiveDisk],
    /// The disks that its VMM has, as it says.
    pub plugged: &'a [DiskStatus],
    /// Now.
    pub now_ms: u64,
}

/// What to do next.
pub fn decide(facts: Facts<'_>) -> Action {
    if *facts.vmm == Vmm::Gone && facts.record.is_some_and(|record| record.run.is_some()) {
        return Action::Settle;
    }
    match facts.wanted {
        Wanted::Unknown => Action::Nothing,
        Wanted::Unclear(reason) => Action::Refuse(reason.clone()),
        Wanted::Absent if *facts.vmm == Vmm::Gone => Action::Remove,
        Wanted::Absent => end_vmm(facts),
        Wanted::Assigned(assigned) => {
            let seen = facts.record.map_or(0, |record| record.epoch);
            if assigned.epoch < seen {
                return Action::Refuse(format!(
                    "epoch {} is refused: this node has seen {seen}",
                    assigned.epoch
                ));
            }
            match &assigned.role {
                Role::Owner(owner) => decide_owner(facts, assigned, owner),
                Role::Incoming { migration_id, .. } => {
                    decide_incoming(facts, assigned, migration_id)
                }
            }
        }
    }
}

fn decide_owner(facts: Facts<'_>, assigned: &Assigned, owner: &Owner) -> Action {
    let run_epoch = facts.run_epoch();
    let later = assigned.epoch > run_epoch.max(facts.handed_to());
    match facts.vmm {
        Vmm::Gone => decide_owner_without_vmm(facts, assigned, owner),
        Vmm::Silent { .. } if owner.power == Power::Stopped => end_vmm(facts),
        Vmm::Silent { since_ms, .. } => wait_for_start(facts, *since_ms),
        Vmm::Live { state, migration, .. } => match state {
            // The guest is this node's only by a later decision than the hand-over.
            VmmState::HandedOver if !later => Action::Nothing,
            VmmState::HandedOver if owner.power != Power::Stopped => take_over(facts, assigned),
            VmmState::HandedOver => end_vmm(facts),
            // COMMIT is on its way, or the controller will decide.
            VmmState::Incoming if !later => Action::Nothing,
            VmmState::Incoming if owner.power != Power::Stopped && is_ready(migration.as_ref()) => {
                take_over(facts, assigned)
            }
            // The guest is not in there: begin anew without it.
            VmmState::Incoming => end_vmm(facts),
            VmmState::Exited => wait_for_end(facts),
            // Whether it is saved or runs on is known when the saving has ended. Till then nothing
            // is said under a later epoch: by that the controller drops what is saved.
            VmmState::Running | VmmState::Paused
                if facts.progress.saving && owner.power == Power::Running =>
            {
                Action::Nothing
            }
            VmmState::Running | VmmState::Paused => {
                if facts.record.is_none_or(|record| assigned.epoch > record.epoch) {
                    return Action::Adopt;
                }
                if assigned.epoch > run_epoch {
                    return take_over(facts, assigned);
                }
                match owner.power {
                    Power::Running => decide_running(facts, owner, migration.as_ref()),
                    Power::Saved => decide_saving(facts, assigned, owner, migration.as_ref()),
                    Power::Stopped => decide_stopping(facts, owner, migration.as_ref()),
                }
            }
            VmmState::Unspecified => Action::Nothing,
        },
    }
}

/// The guest runs here and shall go on running, here or elsewhere.
fn decide_running(facts: Facts<'_>, owner: &Owner, migration: Option<&Migration>) -> Action {
    if is_new_start(facts, owner) {
        return Action::Adopt;
    }
    let Some(outgoing) = &owner.outgoing else {
        return match migration.is_some_and(is_leaving) {
            true => Action::Nothing,
            false => plug(facts).unwrap_or_else(|| update_disks(facts)),
        };
    };
    let begun =
        facts.has_begun(outgoing) || migration.is_some_and(|m| m.id == outgoing.migration_id);
    if outgoing.cancel {
        return if in_flight(migration, outgoing) {
            cancel(facts, outgoing)
        } else {
            Action::Nothing
        };
    }
    if begun { Action::Nothing } else { Action::StartMigration }
}

/// A guest that was told to stop will; what is asked then is a new start.
fn is_new_start(facts: Facts<'_>, owner: &Owner) -> bool {
    let seen = facts.record.and_then(|record| record.start_generation);
    facts.progress.button_ms.is_none() && seen != Some(owner.start_generation)
}

/// A volume that has grown, other limits. Nothing is missed: what was told is forgotten with the
/// agent, and to be told twice changes nothing.
fn update_disks(facts: Facts<'_>) -> Action {
    let told = facts.progress.told_disks.as_deref();
    let known = told == Some(facts.live_disks) || told.is_none() && facts.live_disks.is_empty();
    if known { Action::Nothing } else { Action::UpdateDisks }
}

/// The guest runs here and shall end.
fn decide_stopping(facts: Facts<'_>, owner: &Owner, migration: Option<&Migration>) -> Action {
    if let Some(outgoing) = &owner.outgoing
        && in_flight(migration, outgoing)
        && facts.progress.cancelled.as_ref() != Some(&outgoing.migration_id)
    {
        return Action::CancelMigration;
    }
    if owner.grace.is_zero() || facts.progress.quit_ms.is_some() {
        return end_vmm(facts);
    }
    let Some(pressed) = facts.progress.button_ms else { return Action::PowerButton };
    let until = pressed + millis(owner.grace);
    if facts.now_ms < until { Action::WaitUntil(until) } else { end_vmm(facts) }
}

fn decide_owner_without_vmm(facts: Facts<'_>, assigned: &Assigned, owner: &Owner) -> Action {
    let Some(record) = facts.record else {
        return if owner.runs() { start(facts, assigned, Action::Start) } else { Action::Adopt };
    };
    let Some(end) = &record.end else {
        return match owner.runs() {
            true => start(facts, assigned, Action::Start),
            false => adopt_if_new(record, assigned),
        };
    };
    if assigned.epoch <= facts.handed_to() {
        return Action::Nothing;
    }
    if !owner.runs() {
        return adopt_if_new(record, assigned);
    }
    // What the guest has decided stands, whatever else was under way: an epoch alone is no start.
    let stays_off = match end.reason {
        EndReason::Shutdown => true,
        EndReason::Reboot => assigned.spec.on_reboot() == RestartPolicy::Stop,
        _ => false,
    };
    let not_asked = record.start_generation == Some(owner.start_generation);
    if stays_off && not_asked && !end.ordered && end.handover.is_none() {
        return adopt_if_new(record, assigned);
    }
    let decided_anew = assigned.epoch > end.epoch;
    let asked_again = record.start_generation.is_some_and(|seen| owner.start_generation > seen);
    if decided_anew || end.ordered || asked_again {
        return start(facts, assigned, Action::Start);
    }
    if record.start_generation.is_none() {
        return Action::Adopt;
    }
    match end.reason {
        // It was saved, and is wanted back before the controller has heard of it.
        EndReason::HostRebooted | EndReason::Interrupted | EndReason::Saved => {
            start(facts, assigned, Action::Start)
        }
        EndReason::Shutdown => Action::Nothing,
        EndReason::Reboot => match assigned.spec.on_reboot() {
            RestartPolicy::Stop => Action::Nothing,
            RestartPolicy::Restart | RestartPolicy::Unspecified => {
                start(facts, assigned, Action::Start)
            }
        },
        EndReason::Crash | EndReason::Killed | EndReason::Error => {
            match restart_at(record, end, assigned, facts.progress) {
                None => Action::Nothing,
                Some(at) if facts.now_ms < at => Action::WaitUntil(at),
                Some(_) => start(facts, assigned, Action::Start),
            }
        }
    }
}

/// `action` when the domain's disks are here. Otherwise the record is made to say that it is to
/// be started: under this epoch, for this order, and that the last VMM's end is history.
fn start(facts: Facts<'_>, assigned: &Assigned, action: Action) -> Action {
    if *facts.to_start(assigned) == Disks::Ready {
        return action;
    }
    let written = facts.record.is_some_and(|record| {
        let ordered = match &assigned.role {
            Role::Owner(owner) => record.start_generation == Some(owner.start_generation),
            Role::Incoming { .. } => true,
        };
        record.end.is_none() && record.epoch == assigned.epoch && ordered
    });
    if written { Action::Nothing } else { Action::AwaitDisks }
}

/// When a domain that crashed is to be restarted, if it is at all. One that never ran is not:
/// what kept it from starting would again.
pub fn restart_at(
    record: &DomainRecord,
    end: &End,
    assigned: &Assigned,
    progress: &Progress,
) -> Option<u64> {
    let wanted = assigned.spec.on_crash() == RestartPolicy::Restart;
    if !wanted || !end.ran || record.crash_restarts >= CRASH_RESTARTS_MAX {
        return None;
    }
    Some(progress.ended_ms + (millis(CRASH_BACKOFF) << record.crash_restarts))
}

fn decide_incoming(facts: Facts<'_>, assigned: &Assigned, migration_id: &str) -> Action {
    let run = facts.record.and_then(|record| record.run.as_ref());
    let is_its_vmm = run.is_some_and(|run| {
        run.incoming.as_deref() == Some(migration_id) && run.epoch == assigned.epoch
    });
    match facts.vmm {
        Vmm::Gone => {
            let end = facts.record.and_then(|record| record.end.as_ref());
            if assigned.epoch <= facts.handed_to() {
                return Action::Refuse(format!(
                    "epoch {} is refused: the domain was handed over to {}",
                    assigned.epoch,
                    facts.handed_to()
                ));
            }
            let tried = end.is_some_and(|end| {
                end.incoming.as_deref() == Some(migration_id)
                    && end.epoch == assigned.epoch
                    && end.reason != EndReason::Interrupted
            });
            // Each migration has one waiting VMM: the controller hears how it ended.
            match tried {
                true => Action::Nothing,
                false => start(facts, assigned, Action::StartIncoming),
            }
        }
        Vmm::Silent { since_ms, .. } if is_its_vmm => wait_for_start(facts, *since_ms),
        Vmm::Silent { .. } => end_vmm(facts),
        Vmm::Live { state, migration, .. } => match state {
            VmmState::Exited => wait_for_end(facts),
            VmmState::Incoming if !is_its_vmm => end_vmm(facts),
            VmmState::Incoming => {
                let failed = facts.progress.prepare_failed.as_ref();
                let done = failed.is_some_and(|(id, _)| id == migration_id)
                    || facts.progress.prepared.as_deref() == Some(migration_id)
                    || migration.as_ref().is_some_and(|m| m.id == migration_id);
                if done { Action::Nothing } else { Action::PrepareIncoming }
            }
            // COMMIT has come; the assignment as owner will.
            VmmState::Running | VmmState::Paused if is_its_vmm => Action::Nothing,
            VmmState::Running | VmmState::Paused => Action::Refuse(format!(
                "the domain runs here under epoch {}: it cannot come in",
                facts.run_epoch()
            )),
            // It left for elsewhere under an earlier epoch, and comes back.
            VmmState::HandedOver if assigned.epoch > facts.handed_to().max(facts.run_epoch()) => {
                end_vmm(facts)
            }
            VmmState::HandedOver | VmmState::Unspecified => Action::Nothing,
        },
    }
}

/// Tells the VMM once; it says in its status when it has done so.
fn take_over(facts: Facts<'_>, assigned: &Assigned) -> Action {
    let told = facts.progress.taken_over == Some(assigned.epoch);
    if told { Action::Nothing } else { Action::TakeOver }
}

/// Ends the VMM: by its API where it answers, by its process when it has had its time.
fn end_vmm(facts: Facts<'_>) -> Action {
    if facts.progress.killed {
        return Action::Nothing;
    }
    let told = match facts.vmm {
        Vmm::Gone => return Action::Nothing,
        Vmm::Live { .. } => facts.progress.quit_ms,
        // It may be on its way out already, and write down why.
        Vmm::Silent { since_ms, .. } => Some(facts.progress.quit_ms.unwrap_or(*since_ms)),
    };
    let Some(told) = told else { return Action::Quit };
    let until = told + millis(QUIT_TIMEOUT);
    if facts.now_ms < until { Action::WaitUntil(until) } else { Action::Kill }
}

/// The guest has gone, and the process writes down why; it is killed if it does not end.
fn wait_for_end(facts: Facts<'_>) -> Action {
    let Some(exited) = facts.progress.exited_ms else { return Action::Nothing };
    let until = exited + millis(QUIT_TIMEOUT);
    match facts.now_ms < until {
        true => Action::WaitUntil(until),
        false if facts.progress.killed => Action::Nothing,
        false => Action::Kill,
    }
}

/// A VMM that never answered is ended; one whose guest has run is left alone (I4).
fn wait_for_start(facts: Facts<'_>, since_ms: u64) -> Action {
    let known = facts.record.and_then(|record| record.run.as_ref()).is_none_or(|run| run.ran);
    if known || facts.progress.killed {
        return Action::Nothing;
    }
    let until = since_ms + millis(START_TIMEOUT);
    if facts.now_ms < until { Action::WaitUntil(until) } else { Action::Kill }
}

fn adopt_if_new(record: &DomainRecord, assigned: &Assigned) -> Action {
    let new_epoch = assigned.epoch > record.epoch;
    let new_owner = record.start_generation.is_none();
    if new_epoch || new_owner { Action::Adopt } else { Action::Nothing }
}

fn cancel(facts: Facts<'_>, outgoing: &Outgoing) -> Action {
    let told = facts.progress.cancelled.as_ref() == Some(&outgoing.migration_id);
    if told { Action::Nothing } else { Action::CancelMigration }
}

/// The migration goes on at the source and has not reached the hand-over.
fn in_flight(migration: Option<&Migration>, outgoing: &Outgoing) -> bool {
    migration.is_some_and(|m| m.id == outgoing.migration_id && is_leaving(m))
}

fn is_leaving(migration: &Migration) -> bool {
    migration.role == MigrationRole::Source
        && !matches!(
            migration.progress,
            MigrationProgress::HandedOver
                | MigrationProgress::Succeeded
                | MigrationProgress::Failed
        )
}

fn is_ready(migration: Option<&Migration>) -> bool {
    migration.is_some_and(|m| m.progress == MigrationProgress::Ready)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl<'a> Facts<'a> {
    /// How what a start needs stands.
    pub fn to_start(&self, assigned: &Assigned) -> &'a Disks {
        let memory = restores(self.record, assigned).map(|_| self.memory);
        match self.disks {
            Disks::Ready => memory.unwrap_or(self.disks),
            _ => self.disks,
        }
    }

    /// Whether the assignment names a volume for the guest's memory.
    pub fn has_memory(&self) -> bool {
        self.wanted.assigned().is_some_and(|assigned| assigned.memory.is_some())
    }

    /// The epoch that the VMM is under.
    fn run_epoch(&self) -> u64 {
        self.record.map_or(0, |record| record.run.as_ref().map_or(record.epoch, |run| run.epoch))
    }

    /// The epoch that the domain was last handed over to from here; 0 if it was not.
    fn handed_to(&self) -> u64 {
        if *self.vmm != Vmm::Gone {
            return self.vmm.handed_to();
        }
        self.record
            .and_then(|record| record.end.as_ref())
            .and_then(|end| end.handover.as_ref())
            .map_or(0, |handover| handover.to_epoch)
    }

    fn has_begun(&self, outgoing: &Outgoing) -> bool {
        self.record
            .and_then(|record| record.outgoing.as_ref())
            .is_some_and(|last| last.migration_id == outgoing.migration_id)
    }
}
