//! A guest is saved, and goes on from a saved state.

use std::path::{Path, PathBuf};
use std::sync::mpsc::SyncSender;

use drover_proto::vmm::v1::{SaveRequest, VmmState};
use tokio::sync::oneshot;

use super::migrate::Ended;
use super::supervisor::{Place, Supervisor};
use super::{Answer, Reply, VmmError};
use crate::config::FieldError;
use crate::machine::exit::{ExitReason, ExitRecord};
use crate::machine::migratable::MigratableVm;
use crate::machine::{Machine, MachineError, Purpose};
use crate::saved::{self, Restored, SaveControl, SaveError, SaveOutcome};

/// A saving that has the machine.
pub(super) struct SaveTask {
    pub(super) control: SaveControl,
    path: PathBuf,
    /// Whoever asked hears when it has ended.
    replies: Vec<oneshot::Sender<Answer>>,
}

/// Most calls that wait for the same saving: an agent that was started again asks again.
const REPLIES_MAX: usize = 8;

impl Supervisor {
    /// Begins; the answer comes when it has ended.
    pub(super) fn save(&mut self, request: SaveRequest, reply: oneshot::Sender<Answer>) {
        let path = PathBuf::from(request.path);
        if let Place::Saving(task) = &mut self.place
            && task.path == path
            && task.replies.len() < REPLIES_MAX
        {
            // Asked again.
            task.replies.push(reply);
            return;
        }
        let (worker, control) = match self.prepare_save(&path) {
            Ok(prepared) => prepared,
            Err(error) => {
                // The caller may have given up.
                let _ = reply.send(Err(error));
                return;
            }
        };
        self.shared.set_state(VmmState::Paused, "it is being saved");
        self.give(&worker, Place::Saving(SaveTask { control, path, replies: vec![reply] }));
    }

    fn prepare_save(
        &self,
        path: &Path,
    ) -> Result<(SyncSender<Box<Machine>>, SaveControl), VmmError> {
        if !path.is_absolute() {
            let accepted = "an absolute path of a file or block device";
            return Err(FieldError::new("path", path.display(), accepted).into());
        }
        let shape = match &self.place {
            Place::Owned(machine) if !machine.is_paused() => machine.shape(),
            _ => return Err(self.refuse("save")),
        };
        let control = SaveControl::new();
        let worker = {
            let (control, path) = (control.clone(), path.to_owned());
            self.worker(move |mut machine| {
                let outcome = saved::save(&mut *machine, &shape, &path, &control);
                Ended::Saving { machine, outcome }
            })?
        };
        Ok((worker, control))
    }

    /// The machine is back. An error is how the VMM ends.
    pub(super) fn save_ended(
        &mut self,
        machine: Box<Machine>,
        outcome: SaveOutcome,
    ) -> Result<(), ExitRecord> {
        let Place::Saving(task) = std::mem::replace(&mut self.place, Place::Owned(machine)) else {
            unreachable!("the machine was with a saving");
        };
        let SaveTask { path, replies, .. } = task;
        match outcome {
            SaveOutcome::Saved(saved) => {
                // Told when the end is on disk.
                self.farewell = replies;
                let bytes = saved.bytes;
                let detail = format!("the guest is saved: {bytes} bytes in {}", path.display());
                Err(ExitRecord::new(ExitReason::Saved, detail))
            }
            SaveOutcome::Failed(error) => {
                self.shared.set_state(VmmState::Running, "");
                refuse(replies, error);
                Ok(())
            }
            SaveOutcome::Broken(error) => {
                let detail = format!("the guest could not go on after it was not saved: {error}");
                refuse(replies, error);
                Err(ExitRecord::new(ExitReason::Error, detail))
            }
        }
    }

    /// A machine that goes on from a saved state; one that was used up before boots.
    pub(super) fn restore(&mut self, path: &Path) -> Result<(), MachineError> {
        let mut machine = self.machine(Purpose::Boot)?;
        let shape = machine.shape();
        let restored = saved::restore(&mut *machine, &shape, path)
            .map_err(|source| MachineError::Restore { path: path.to_owned(), source })?;
        if restored == Restored::UsedUp {
            self.boot_machine(machine)?;
            let reason = format!(
                "booted: a guest has gone on from the saved state in {} before",
                path.display()
            );
            tracing::warn!("{reason}");
            self.shared.set_state(VmmState::Running, reason);
            return Ok(());
        }
        if let Some(id) = self.options.config.generation()? {
            // Another one only where it is an earlier state or a clone.
            machine.set_generation(id)?;
        }
        machine.resume().map_err(MachineError::Start)?;
        // Switches have forgotten it.
        machine.announce();
        self.place = Place::Owned(machine);
        self.shared.set_state(VmmState::Running, "");
        Ok(())
    }

    /// Tells those who asked for it that the guest is saved.
    pub(super) fn say_farewell(&mut self) {
        for reply in self.farewell.drain(..) {
            let _ = reply.send(Ok(Reply::Done));
        }
    }
}

/// The last who asked hears why by its kind, the others, who have likely gone, by its words.
fn refuse(replies: Vec<oneshot::Sender<Answer>>, error: SaveError) {
    let words = error.to_string();
    let mut error = Some(VmmError::from(error));
    for reply in replies.into_iter().rev() {
        let error = error.take().unwrap_or_else(|| VmmError::Failed(words.clone()));
        let _ = reply.send(Err(error));
    }
}
