//! Requests about migrations, and the threads that have the machine meanwhile.

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};

use drover_proto::agent::v1::{MigrationProgress, MigrationRole, ObservedMigration};
use drover_proto::vmm::v1::{
    CancelMigrationRequest, PrepareIncomingRequest, StartMigrationRequest,
};

use super::VmmError;
use super::supervisor::{Event, Place, Supervisor};
use crate::config::FieldError;
use crate::machine::Machine;
use crate::migration::{
    DestinationConfig, DestinationControl, DestinationOutcome, Incoming, Limits, SourceConfig,
    SourceControl, SourceOutcome, connections, source,
};
use crate::saved::SaveOutcome;

/// Pages are sent from guest memory, state from the heap.
const STACK_BYTES: usize = 256 << 10;
/// Longest identifier and token, bytes.
const TEXT_BYTES_MAX: usize = 256;

/// A migration that sends the machine.
pub(super) struct SourceTask {
    pub(super) id: String,
    pub(super) control: SourceControl,
}

/// A migration that receives the machine.
pub(super) struct DestinationTask {
    pub(super) id: String,
    pub(super) address: String,
    pub(super) control: DestinationControl,
}

/// How a migration or a saving ended, with the machine.
pub(super) enum Ended {
    Source { machine: Box<Machine>, to_epoch: u64, outcome: SourceOutcome },
    Destination { machine: Box<Machine>, epoch: u64, outcome: DestinationOutcome },
    Saving { machine: Box<Machine>, outcome: SaveOutcome },
}

impl Supervisor {
    pub(super) fn start_migration(
        &mut self,
        request: StartMigrationRequest,
    ) -> Result<(), VmmError> {
        if matches!(&self.place, Place::Source(task) if task.id == request.migration_id) {
            // Asked again.
            return Ok(());
        }
        text("migration_id", &request.migration_id)?;
        text("token", &request.token)?;
        text("address", &request.address)?;
        if request.to_epoch <= self.epoch {
            let accepted = format!("greater than {}", self.epoch);
            return Err(FieldError::new("to_epoch", request.to_epoch, accepted).into());
        }
        let shape = match &self.place {
            Place::Owned(machine) if !machine.is_paused() => machine.shape(),
            place => {
                let state = place.name().to_owned();
                return Err(VmmError::State { asked: "start a migration", state });
            }
        };
        let (memory_bytes, disk_bytes) = (shape.memory_bytes, shape.disk_bytes());
        let limits = Limits::from_request(request.limits.as_ref(), memory_bytes, disk_bytes)
            .map_err(|error| {
                let (field, rest) = error.split_once(": ").unwrap_or(("limits", &error));
                let (value, accepted) = rest.split_once("; accepted: ").unwrap_or((rest, ""));
                FieldError::new(field, value, accepted)
            })?;
        let control = SourceControl::new();
        let worker = {
            let control = control.clone();
            let shared = Arc::clone(&self.shared);
            let id = request.migration_id.clone();
            let state_dir = self.options.state_dir.clone();
            let to_epoch = request.to_epoch;
            self.worker(move |mut machine| {
                let config = SourceConfig {
                    migration_id: id,
                    token: request.token,
                    address: request.address,
                    to_epoch,
                    limits,
                    connections: connections(),
                    state_dir,
                    shape,
                };
                let mut observer = |observed: &ObservedMigration| shared.set_migration(observed);
                let outcome = source::run(&mut *machine, &config, &control, &mut observer);
                Ended::Source { machine, to_epoch, outcome }
            })?
        };
        // What was observed of an earlier one is over.
        self.shared.set_migration(&ObservedMigration {
            id: request.migration_id.clone(),
            role: MigrationRole::Source as i32,
            progress: MigrationProgress::Copying as i32,
            ..Default::default()
        });
        let task = SourceTask { id: request.migration_id, control };
        self.give(&worker, Place::Source(task));
        Ok(())
    }

    pub(super) fn prepare_incoming(
        &mut self,
        request: PrepareIncomingRequest,
    ) -> Result<String, VmmError> {
        if let Place::Destination(task) = &self.place
            && task.id == request.migration_id
        {
            // Asked again.
            return Ok(task.address.clone());
        }
        text("migration_id", &request.migration_id)?;
        text("token", &request.token)?;
        if request.epoch < self.epoch {
            let accepted = format!("{} or greater", self.epoch);
            return Err(FieldError::new("epoch", request.epoch, accepted).into());
        }
        let Place::Waiting(machine) = &self.place else {
            return Err(VmmError::State {
                asked: "prepare for a migration",
                state: self.place.name().to_owned(),
            });
        };
        let incoming = Incoming::bind(&request.listen_address).map_err(|error| {
            let value = format!("{}: {error}", request.listen_address);
            FieldError::new("listen_address", value, "host:port of this node, port 0 to choose")
        })?;
        let address = incoming.address().to_owned();
        let failed = |error: std::io::Error| VmmError::Failed(error.to_string());
        let control = DestinationControl::new(request.epoch).map_err(failed)?;
        let config = DestinationConfig {
            migration_id: request.migration_id.clone(),
            token: request.token,
            shape: machine.shape(),
            connections: connections(),
        };
        let worker = {
            let control = control.clone();
            let shared = Arc::clone(&self.shared);
            self.worker(move |mut machine| {
                let mut observer = |observed: &ObservedMigration| shared.set_migration(observed);
                let outcome = incoming.run(&mut *machine, &config, &control, &mut observer);
                Ended::Destination { machine, epoch: control.epoch(), outcome }
            })?
        };
        self.shared.set_migration(&ObservedMigration {
            id: request.migration_id.clone(),
            role: MigrationRole::Destination as i32,
            progress: MigrationProgress::Listening as i32,
            listen_address: address.clone(),
            ..Default::default()
        });
        let task = DestinationTask { id: request.migration_id, address: address.clone(), control };
        self.give(&worker, Place::Destination(task));
        Ok(address)
    }

    pub(super) fn cancel_migration(
        &mut self,
        request: &CancelMigrationRequest,
    ) -> Result<(), VmmError> {
        match &self.place {
            Place::Source(task) if task.id == request.migration_id => Ok(task.control.cancel()?),
            Place::Destination(task) if task.id == request.migration_id => {
                task.control.end();
                Ok(())
            }
            _ => Err(self.no_migration(&request.migration_id)),
        }
    }

    /// It is another one, or is over.
    fn no_migration(&self, asked: &str) -> VmmError {
        let last = self.shared.migration();
        let going = match &self.place {
            Place::Source(SourceTask { id, .. })
            | Place::Destination(DestinationTask { id, .. }) => Some(id),
            _ => None,
        };
        match (going, last) {
            (None, Some(last)) if last.id == asked => {
                let progress = MigrationProgress::try_from(last.progress)
                    .map_or("over", |progress| progress.as_str_name());
                VmmError::State { asked: "cancel", state: format!("the migration is {progress}") }
            }
            (going, _) => VmmError::NoMigration {
                asked: asked.to_owned(),
                accepted: going.cloned().unwrap_or_else(|| "none, no migration goes on".into()),
            },
        }
    }

    /// A thread that waits for the machine, does `work` with it, and gives it back.
    pub(super) fn worker(
        &self,
        work: impl FnOnce(Box<Machine>) -> Ended + Send + 'static,
    ) -> Result<SyncSender<Box<Machine>>, VmmError> {
        let (sender, receiver) = sync_channel::<Box<Machine>>(1);
        let events = self.events.clone();
        std::thread::Builder::new()
            .name("mover".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let Ok(machine) = receiver.recv() else { return };
                let ended = work(machine);
                // The supervisor is gone only when the process ends.
                let _ = events.send(Event::Ended(ended));
            })
            .map_err(|error| VmmError::Failed(format!("no thread for it: {error}")))?;
        Ok(sender)
    }

    /// Moves the machine to a worker; whoever asks for it meanwhile finds `place`.
    pub(super) fn give(&mut self, worker: &SyncSender<Box<Machine>>, place: Place) {
        match std::mem::replace(&mut self.place, place) {
            Place::Owned(machine) | Place::Waiting(machine) => {
                // The channel has room for one, and the worker waits for it.
                if worker.send(machine).is_err() {
                    unreachable!("the worker takes the machine before it ends");
                }
            }
            _ => unreachable!("checked by the caller"),
        }
    }
}

fn text(field: &str, value: &str) -> Result<(), FieldError> {
    if (1..=TEXT_BYTES_MAX).contains(&value.len()) {
        return Ok(());
    }
    Err(FieldError::new(field, value, format!("1 to {TEXT_BYTES_MAX} bytes of text")))
}
