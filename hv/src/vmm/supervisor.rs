//! The thread that owns the machine.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use drover_proto::vmm::v1::VmmState;
use tokio::sync::oneshot;

use super::migrate::{DestinationTask, Ended, SourceTask};
use super::plug::REMINDERS_MAX;
use super::save::SaveTask;
use super::{Answer, Options, Reply, Request, Shared, Vmm, VmmError};
use crate::config::{FieldError, OnReboot};
use crate::machine::exit::{self, ExitReason, ExitRecord, GuestExit};
use crate::machine::migratable::MigratableVm;
use crate::machine::vcpu::{self, OnExit};
use crate::machine::{Machine, MachineError, Purpose};
use crate::migration::{DestinationOutcome, SourceOutcome, remove_handover};

/// Requests that may wait.
const EVENTS_MAX: usize = 32;
/// Loading a kernel needs little; ELF headers and such are on the heap.
const STACK_BYTES: usize = 256 << 10;

/// What the supervisor is told.
pub(super) enum Event {
    Request(Request, oneshot::Sender<Answer>),
    /// Look whether the guest has ended, or said that it panicked.
    Guest,
    /// A migration or a saving has ended and gives the machine back.
    Ended(Ended),
}

/// Where the machine is.
pub(super) enum Place {
    /// Here; the guest is ours to run.
    Owned(Box<Machine>),
    /// Here; no migration has come yet.
    Waiting(Box<Machine>),
    /// With a migration that sends it.
    Source(SourceTask),
    /// With a migration that receives it.
    Destination(DestinationTask),
    /// With a saving that writes it to a file.
    Saving(SaveTask),
    /// Here, paused: the destination runs it, or the controller must decide.
    HandedOver { machine: Box<Machine>, to_epoch: u64, succeeded: bool },
    /// A migration left it in no usable state.
    Lost,
}

impl Place {
    /// For messages: "not possible while …".
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Owned(machine) if machine.is_paused() => "paused",
            Self::Owned(_) => "running",
            Self::Waiting(_) => "waiting for a migration",
            Self::Source(_) => "migrating away",
            Self::Destination(_) => "migrating here",
            Self::Saving(_) => "being saved",
            Self::HandedOver { succeeded: false, .. } => "handed over",
            Self::HandedOver { succeeded: true, .. } => "running elsewhere",
            Self::Lost => "the migration has failed",
        }
    }
}

pub(super) struct Supervisor {
    pub(super) options: Options,
    pub(super) shared: Arc<Shared>,
    pub(super) events: SyncSender<Event>,
    pub(super) place: Place,
    pub(super) epoch: u64,
    /// The first that a guest said of its end, until it is dealt with.
    exit: Arc<Mutex<Option<GuestExit>>>,
    /// How often a guest that does not read the hot-plug registers is still told to.
    pub(super) reminders: u32,
    /// Whoever asked for what ends the VMM, and hears when the end is on disk.
    pub(super) farewell: Vec<oneshot::Sender<Answer>>,
}

/// Makes the machine, starts the thread, and waits until the guest runs.
pub(super) fn start(options: Options) -> Result<(Vmm, oneshot::Receiver<ExitRecord>), ExitRecord> {
    let shared = Arc::new(Shared::new(&options.config));
    let (events, receiver) = sync_channel(EVENTS_MAX);
    let vmm = Vmm { shared: Arc::clone(&shared), events: events.clone() };
    let (started, start) = sync_channel(1);
    let (end, ended) = oneshot::channel();
    let state_dir = options.state_dir.clone();
    let thread = std::thread::Builder::new().name("machine".into()).stack_size(STACK_BYTES);
    let spawned = thread.spawn(move || {
        let outcome = Supervisor::make(options, shared, events);
        let mut supervisor = match outcome {
            Ok(supervisor) => {
                let _ = started.send(Ok(()));
                supervisor
            }
            Err(record) => {
                let _ = started.send(Err(record));
                return;
            }
        };
        let record = supervisor.run(&receiver);
        supervisor.note_end(&record);
        supervisor.say_farewell();
        // The one who waits for it may be gone.
        let _ = end.send(record);
        // The machine's threads end with the process: taking them down in order would only
        // take time.
        std::mem::forget(supervisor);
    });
    let answer = match spawned {
        Ok(_) => start.recv().unwrap_or_else(|_| {
            Err(ExitRecord::new(ExitReason::Error, "the machine's thread has panicked"))
        }),
        Err(error) => Err(ExitRecord::new(ExitReason::Error, format!("no thread: {error}"))),
    };
    match answer {
        Ok(()) => Ok((vmm, ended)),
        Err(record) => {
            write_record(&record, &state_dir);
            Err(record)
        }
    }
}

fn write_record(record: &ExitRecord, state_dir: &std::path::Path) {
    if let Err(error) = record.write(state_dir) {
        tracing::error!(%error, ?record, "the exit record cannot be written");
    }
}

impl Supervisor {
    fn make(
        options: Options,
        shared: Arc<Shared>,
        events: SyncSender<Event>,
    ) -> Result<Self, ExitRecord> {
        let failed = |error: String| ExitRecord::new(ExitReason::Error, error);
        vcpu::install_kick_handler().map_err(|error| failed(error.to_string()))?;
        exit::forget(&options.state_dir).map_err(|error| {
            let directory = options.state_dir.display();
            failed(
                FieldError::new(
                    "state-dir",
                    format!("{directory}: {error}"),
                    "a directory that can be written",
                )
                .to_string(),
            )
        })?;
        let tell = events.clone();
        shared.console.on_panic(move || {
            // When the queue is full, the supervisor has something better to do.
            let _ = tell.try_send(Event::Guest);
        });
        let epoch = options.config.epoch;
        let exit = Arc::default();
        let place = Place::Lost;
        let mut supervisor =
            Self { options, shared, events, place, epoch, exit, reminders: 0, farewell: vec![] };
        // Once: the guest's own reboots begin anew.
        let restore = supervisor.options.config.restore.take();
        let made = if let Some(path) = restore {
            match supervisor.options.incoming {
                true => {
                    Err(FieldError::new("restore", path.display(), "none with --incoming").into())
                }
                false => supervisor.restore(&path),
            }
        } else if supervisor.options.incoming {
            supervisor.machine(Purpose::Incoming).map(|machine| {
                supervisor.shared.set_state(VmmState::Incoming, "");
                supervisor.place = Place::Waiting(machine);
            })
        } else {
            supervisor.boot()
        };
        made.map_err(|error| failed(error.to_string()))?;
        Ok(supervisor)
    }

    /// A machine that stands still.
    pub(super) fn machine(&self, purpose: Purpose) -> Result<Box<Machine>, MachineError> {
        let exit = Arc::clone(&self.exit);
        let events = self.events.clone();
        let on_exit: OnExit = Arc::new(move |reason| {
            exit.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
            // When the queue is full, the exit is seen after the next event.
            let _ = events.try_send(Event::Guest);
        });
        let console = Arc::clone(&self.shared.console);
        let events = self.events.clone();
        // When the queue is full, it is seen after the next event.
        let on_eject = Box::new(move || drop(events.try_send(Event::Guest)));
        let machine = Machine::new(&self.options.config, purpose, console, on_exit, on_eject)?;
        self.shared.set_machine(&machine);
        self.tell_disks();
        Ok(Box::new(machine))
    }

    /// A fresh machine that runs the domain's kernel.
    fn boot(&mut self) -> Result<(), MachineError> {
        self.shared.console.forget_panic();
        let machine = self.machine(Purpose::Boot)?;
        self.boot_machine(machine)
    }

    /// The same with a machine that is there.
    pub(super) fn boot_machine(&mut self, mut machine: Box<Machine>) -> Result<(), MachineError> {
        machine.boot()?;
        // SAFETY: gives free heap back to the system, and touches nothing in use. The kernel's
        // decompression is what this VMM will ever need most memory for.
        unsafe { libc::malloc_trim(0) };
        machine.resume().map_err(MachineError::Start)?;
        self.place = Place::Owned(machine);
        self.shared.set_state(VmmState::Running, "");
        Ok(())
    }

    /// Deals with events until the VMM is to end; answers why.
    fn run(&mut self, events: &Receiver<Event>) -> ExitRecord {
        loop {
            let event = match self.remind_in() {
                None => events.recv().map_err(RecvTimeoutError::from),
                Some(wait) => events.recv_timeout(wait),
            };
            let event = match event {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => {
                    self.remind();
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return ExitRecord::new(ExitReason::Error, "the API is gone");
                }
            };
            match event {
                Event::Request(Request::Quit(why), reply) => {
                    let record = self.quit(why);
                    let _ = reply.send(Ok(Reply::Done));
                    return record;
                }
                Event::Request(Request::Save(request), reply) => self.save(request, reply),
                Event::Request(request, reply) => {
                    let answer = match self.obey(request) {
                        Ok(answer) => Ok(answer),
                        Err(Trouble::Refused(error)) => Err(error),
                        Err(Trouble::Fatal(record)) => {
                            let _ = reply.send(Err(VmmError::Failed(record.detail.clone())));
                            return record;
                        }
                    };
                    // The caller may have given up.
                    let _ = reply.send(answer);
                }
                Event::Guest => self.shared.touch(),
                Event::Ended(ended) => {
                    if let Err(record) = self.machine_back(ended) {
                        return record;
                    }
                    self.tell_disks();
                }
            }
            self.remove_ejected();
            if let Some(record) = self.guest_ended() {
                return record;
            }
        }
    }

    fn obey(&mut self, request: Request) -> Result<Reply, Trouble> {
        match request {
            Request::Pause => self.pause()?,
            Request::Resume => self.resume()?,
            Request::PowerButton => self.power_button()?,
            Request::Reset => self.reset()?,
            Request::SetDiskLimits(request) => self.set_disk_limits(request)?,
            Request::AttachDisk(request) => self.attach_disk(request)?,
            Request::DetachDisk(request) => self.detach_disk(&request)?,
            Request::SetGeneration(request) => self.set_generation(&request)?,
            Request::GrowDisk(request) => return Ok(self.grow_disk(request)?),
            Request::PrepareIncoming(request) => {
                return Ok(Reply::Listening(self.prepare_incoming(request)?));
            }
            Request::StartMigration(request) => self.start_migration(request)?,
            Request::CancelMigration(request) => self.cancel_migration(&request)?,
            Request::TakeOver(request) => self.take_over(request.epoch)?,
            Request::Quit(_) | Request::Save(_) => unreachable!("handled by the caller"),
        }
        Ok(Reply::Done)
    }

    pub(super) fn refuse(&self, asked: &'static str) -> VmmError {
        VmmError::State { asked, state: self.place.name().to_owned() }
    }

    fn pause(&mut self) -> Result<(), VmmError> {
        let Place::Owned(machine) = &mut self.place else { return Err(self.refuse("pause")) };
        machine.pause().map_err(|error| VmmError::Failed(error.to_string()))?;
        self.shared.set_state(VmmState::Paused, "");
        Ok(())
    }

    fn resume(&mut self) -> Result<(), VmmError> {
        let Place::Owned(machine) = &mut self.place else { return Err(self.refuse("resume")) };
        machine.resume().map_err(|error| VmmError::Failed(error.to_string()))?;
        self.shared.set_state(VmmState::Running, "");
        Ok(())
    }

    fn power_button(&mut self) -> Result<(), VmmError> {
        match &self.place {
            Place::Owned(machine) => machine.devices().power.press_button(),
            _ => return Err(self.refuse("power button")),
        }
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Trouble> {
        if !matches!(self.place, Place::Owned(_)) {
            return Err(self.refuse("reset").into());
        }
        self.restart().map_err(Trouble::Fatal)
    }

    /// A new machine in place of the present one.
    fn restart(&mut self) -> Result<(), ExitRecord> {
        self.forget_detaching();
        // The old one first: it has the taps and the memory.
        self.shared.forget_machine();
        let failed = |error: &dyn std::fmt::Display| {
            ExitRecord::new(ExitReason::Error, format!("starting again: {error}"))
        };
        if let Place::Owned(machine) = std::mem::replace(&mut self.place, Place::Lost) {
            machine.end().map_err(|error| failed(&error))?;
        }
        self.exit.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.shared.count_reboot();
        self.boot().map_err(|error| failed(&error))
    }

    fn quit(&mut self, why: String) -> ExitRecord {
        match &self.place {
            // It may be too late; then the destination has what it needs, or the controller
            // decides.
            Place::Source(task) => drop(task.control.cancel()),
            Place::Destination(task) => task.control.end(),
            // When it is too late the state is whole, and of a guest that was killed.
            Place::Saving(task) => drop(task.control.cancel()),
            _ => {}
        }
        ExitRecord::new(ExitReason::Killed, why)
    }

    fn take_over(&mut self, epoch: u64) -> Result<(), VmmError> {
        match &mut self.place {
            // It runs here already: said again, or under a newer epoch.
            Place::Owned(_) => {
                if epoch < self.epoch {
                    let accepted = format!("{} or greater", self.epoch);
                    return Err(FieldError::new("epoch", epoch, accepted).into());
                }
                self.set_epoch(epoch);
                Ok(())
            }
            Place::Destination(task) => Ok(task.control.take_over(epoch)?),
            Place::HandedOver { machine, to_epoch, succeeded: false } => {
                if epoch <= *to_epoch {
                    let accepted = format!("greater than {to_epoch}");
                    return Err(FieldError::new("epoch", epoch, accepted).into());
                }
                let failed = |error: String| VmmError::Failed(format!("taking over: {error}"));
                // No guest without the locks of its disks; until then nothing has changed.
                for disk in machine.disks() {
                    disk.volume.reopen().map_err(|error| failed(error.to_string()))?;
                }
                remove_handover(&self.options.state_dir).map_err(|e| failed(e.to_string()))?;
                machine.resume().map_err(|e| failed(e.to_string()))?;
                // Switches may have learned otherwise.
                machine.announce();
                if let Err(error) = machine.stop_dirty_log() {
                    tracing::warn!(%error, "the log of dirty pages stays on");
                }
                if let Place::HandedOver { machine, .. } =
                    std::mem::replace(&mut self.place, Place::Lost)
                {
                    self.place = Place::Owned(machine);
                }
                self.set_epoch(epoch);
                self.shared.set_state(VmmState::Running, "");
                Ok(())
            }
            _ => Err(self.refuse("take over")),
        }
    }

    fn set_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.shared.set_epoch(epoch);
    }

    /// A migration or a saving gave the machine back.
    fn machine_back(&mut self, ended: Ended) -> Result<(), ExitRecord> {
        self.reminders = REMINDERS_MAX;
        match ended {
            Ended::Saving { machine, outcome } => return self.save_ended(machine, outcome),
            Ended::Source { machine, to_epoch, outcome } => match outcome {
                SourceOutcome::Failed(_) => {
                    self.place = Place::Owned(machine);
                    self.shared.set_state(VmmState::Running, "");
                }
                SourceOutcome::Succeeded => {
                    self.place = Place::HandedOver { machine, to_epoch, succeeded: true };
                    self.shared.set_state(VmmState::HandedOver, "it runs at the destination");
                }
                SourceOutcome::HandedOver(error) => {
                    self.place = Place::HandedOver { machine, to_epoch, succeeded: false };
                    let reason = format!("not known whether the destination runs it: {error}");
                    self.shared.set_state(VmmState::HandedOver, reason);
                }
                SourceOutcome::Broken(error) => {
                    let reason = format!("the guest could not be resumed: {error}");
                    return Err(ExitRecord::new(ExitReason::Error, reason));
                }
            },
            Ended::Destination { machine, epoch, outcome } => match outcome {
                DestinationOutcome::Running => {
                    self.set_epoch(epoch);
                    self.place = Place::Owned(machine);
                    self.shared.set_state(VmmState::Running, "");
                }
                DestinationOutcome::Failed(error) => {
                    self.shared.forget_machine();
                    self.place = Place::Lost;
                    let reason = format!("the migration to here has failed: {error}");
                    self.shared.set_state(VmmState::Incoming, reason);
                }
            },
        }
        Ok(())
    }

    /// Deals with the guest's end, if it has come; answers how the VMM ends, if it does.
    fn guest_ended(&mut self) -> Option<ExitRecord> {
        match &self.place {
            Place::Owned(_) => {}
            // The machine comes back when the migration has ended.
            Place::Source(task) => {
                if self.exit.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                    // Too late only behind the pause, in which no guest ends.
                    let _ = task.control.cancel();
                }
                return None;
            }
            _ => return None,
        }
        let said = self.exit.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let exit = with_panic(said, self.shared.console.panic());
        tracing::info!(?exit, "the guest has ended its run");
        if exit == GuestExit::Reboot && self.options.config.on_reboot == OnReboot::Restart {
            return self.restart().err();
        }
        Some(exit.into())
    }

    /// Writes the end down, and tells it.
    fn note_end(&mut self, record: &ExitRecord) {
        write_record(record, &self.options.state_dir);
        let detail = record.detail.clone();
        self.shared.set_state(VmmState::Exited, detail);
    }
}

/// The guest's end, and what its kernel said: a panicked kernel resets the machine, which alone
/// looks like a reboot.
fn with_panic(exit: GuestExit, panic: Option<String>) -> GuestExit {
    match (exit, panic) {
        (GuestExit::Reboot | GuestExit::Crash(_), Some(text)) => GuestExit::Crash(text),
        (exit, _) => exit,
    }
}

/// Why a request was not obeyed.
enum Trouble {
    /// Nothing has changed.
    Refused(VmmError),
    /// The VMM must end.
    Fatal(ExitRecord),
}

impl From<VmmError> for Trouble {
    fn from(error: VmmError) -> Self {
        Self::Refused(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reset after a panic is a crash, with the kernel's own words; a shutdown never is.
    #[test]
    fn panics_make_crashes() {
        let text = || Some("Kernel panic - not syncing: x".to_owned());
        let crash = GuestExit::Crash("Kernel panic - not syncing: x".into());
        assert_eq!(with_panic(GuestExit::Reboot, text()), crash);
        assert_eq!(with_panic(GuestExit::Crash("triple fault".into()), text()), crash);
        assert_eq!(with_panic(GuestExit::Reboot, None), GuestExit::Reboot);
        assert_eq!(with_panic(GuestExit::Shutdown, text()), GuestExit::Shutdown);
    }
}
