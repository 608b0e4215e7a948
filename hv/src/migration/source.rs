//! The source's shell: does what [`SourceMachine`] says, with the machine, the network, the disk.
//! [`disks`] are the guest's; [`report`] is what is told of it all. [`sending`] spreads what the
//! passes find over the connections, which are the [`senders`]'.

mod disks;
mod report;
mod senders;
mod sending;

use std::path::PathBuf;
use std::time::Instant;

use drover_proto::v1::{MigrationPhase, MigrationReport};

use super::courtesy::Courtesy;
use super::features::Shape;
use super::handover::{Handover, Prepared, remove_handover};
use super::link::{Link, protocol};
use super::pages;
use super::policy::{self, Decision, Limits, Progress};
use super::source_machine::{SourceAction, SourceEvent, SourceMachine, SourceState};
use super::wire::{self, CONNECTIONS_MAX, Hello, Kind, Sent};
use super::{
    CONNECT_TIMEOUT, IDLE_TIMEOUT, MigrationError, Observer, READY_TIMEOUT, RUNNING_TIMEOUT,
    SourceControl,
};
use crate::machine::migratable::MigratableVm;
use crate::memory::{DirtyPages, PAGE_BYTES};
use crate::state;
use disks::Disks;
use report::gave_up;
use senders::{Parcel, Senders, Spares};
use sending::Pacer;

/// What a source is told.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// Unique in the cluster.
    pub migration_id: String,
    /// The destination's.
    pub token: String,
    /// The destination's, host:port.
    pub address: String,
    /// The epoch under which the destination will run the domain.
    pub to_epoch: u64,
    /// Bounds.
    pub limits: Limits,
    /// Most connections; the destination may want fewer. [`super::connections`] is what it costs.
    pub connections: u16,
    /// Where the hand-over is written down.
    pub state_dir: PathBuf,
    /// Of the machine that is sent.
    pub shape: Shape,
}

/// How it ended.
#[derive(Debug)]
pub enum SourceOutcome {
    /// The destination runs the guest. The machine here stays paused for ever.
    Succeeded,
    /// The guest runs here as if nothing had happened.
    Failed(MigrationError),
    /// The guest should run here and could not be resumed: the machine is of no use. (The
    /// destination does not run it either.)
    Broken(MigrationError),
    /// Handed over, and the destination was not heard: the machine stays paused until the
    /// controller has decided ([`remove_handover`], then resume).
    HandedOver(MigrationError),
}

/// Sends a machine away. Returns when it is over, one way or another; the outcome says in which
/// state the machine is.
pub fn run(
    vm: &mut dyn MigratableVm,
    config: &SourceConfig,
    control: &SourceControl,
    observer: Observer<'_>,
) -> SourceOutcome {
    let disks = Disks::of(vm);
    let mut source = Source {
        vm,
        disks,
        config,
        control,
        observer,
        link: None,
        allowed: 1,
        senders: None,
        held: None,
        spares: Spares::default(),
        unacked: 0,
        asked: None,
        report: MigrationReport {
            memory_bytes: config.shape.memory_bytes,
            disk_bytes_total: config.shape.disk_bytes(),
            phase: MigrationPhase::Copying as i32,
            ..Default::default()
        },
        reported: None,
        started: Instant::now(),
        copied: Copied::default(),
        dirty: None,
        logging: false,
        pause: None,
        courtesy: Courtesy::begin(),
        error: None,
        broken: false,
    };
    source.run()
}

struct Source<'a, 'o> {
    vm: &'a mut dyn MigratableVm,
    disks: Disks,
    config: &'a SourceConfig,
    control: &'a SourceControl,
    observer: Observer<'o>,
    /// The first connection: all that is said, and its part of what is sent.
    link: Option<Link>,
    /// How many connections the destination takes.
    allowed: u16,
    /// The other connections, if any.
    senders: Option<Senders>,
    /// Not given away yet: the last one of a pass is the mover's own.
    held: Option<Parcel>,
    spares: Spares,
    /// Bytes of disks told of since the destination was last asked.
    unacked: u64,
    /// A ROUND whose answer is still to come.
    asked: Option<Vec<u8>>,
    report: MigrationReport,
    reported: Option<Instant>,
    started: Instant,
    copied: Copied,
    /// What the next pass sends; `None` before the first.
    dirty: Option<DirtyPages>,
    logging: bool,
    pause: Option<Pause>,
    courtesy: Courtesy,
    error: Option<MigrationError>,
    broken: bool,
}

/// What the passes have done so far.
#[derive(Default)]
struct Copied {
    /// Over disks and memory.
    passes: u32,
    /// Over memory.
    rounds: u32,
    sent: Sent,
    remaining_before: Option<u64>,
    rate: u64,
}

/// The pause, as it goes on.
struct Pause {
    start: Instant,
    part: Instant,
    prepared: Prepared,
    image: Vec<u8>,
    last: DirtyPages,
    /// Of the state's part: saving it.
    save_us: u64,
    /// Of the last pages.
    last_bytes: u64,
    /// Of the commit's part: the disk.
    handover_us: u64,
}

impl Pause {
    /// The time since the last call, in microseconds: each moment belongs to one part.
    fn lap_us(&mut self) -> u64 {
        let now = Instant::now();
        let lap = now - std::mem::replace(&mut self.part, now);
        lap.as_micros() as u64
    }
}

impl Source<'_, '_> {
    fn run(&mut self) -> SourceOutcome {
        let mut machine = SourceMachine::new();
        let mut event = SourceEvent::Start;
        loop {
            let action = match machine.step(event) {
                Ok(action) => action,
                Err(illegal) => unreachable!("{illegal}"),
            };
            self.report(machine.state(), true);
            if action == SourceAction::Finish {
                return self.finish(machine.state());
            }
            event = match self.act(action) {
                Ok(event) => event,
                Err(error) => {
                    self.note(error);
                    SourceEvent::Failed
                }
            };
        }
    }

    fn act(&mut self, action: SourceAction) -> Result<SourceEvent, MigrationError> {
        Ok(match action {
            SourceAction::Connect => {
                let wanted = || !self.control.is_cancelled();
                let link = Link::connect(&self.config.address, CONNECT_TIMEOUT, wanted)?;
                self.control.add_socket(link.handle()?);
                self.link = Some(link);
                SourceEvent::Connected
            }
            SourceAction::Greet => {
                let hello = Hello {
                    migration_id: self.config.migration_id.clone(),
                    token: self.config.token.clone(),
                    to_epoch: self.config.to_epoch,
                    shape: self.config.shape.clone(),
                };
                let offered = self.config.connections.clamp(1, CONNECTIONS_MAX);
                self.link()?.greet(Kind::Hello, &hello.encode(), offered)?;
                let welcome = self.link()?.answer(Kind::Welcome, IDLE_TIMEOUT)?;
                self.disks.welcome(&welcome.payload).map_err(protocol)?;
                self.allowed = welcome.connections.min(offered);
                SourceEvent::Welcomed
            }
            SourceAction::Join => self.join()?,
            SourceAction::CopyDisks => self.copy_disks()?,
            SourceAction::CopyRound => self.copy_round()?,
            SourceAction::Stop => self.stop()?,
            SourceAction::SendLast => self.send_last()?,
            SourceAction::AwaitReady => {
                let start = self.pause()?.start;
                self.hear_answer(READY_TIMEOUT.saturating_sub(start.elapsed()))?;
                self.hear(Kind::Ready, READY_TIMEOUT.saturating_sub(start.elapsed()))?;
                self.report.pause_state_us += self.pause()?.lap_us();
                SourceEvent::ReadyHeard
            }
            SourceAction::WriteHandover => self.write_handover()?,
            SourceAction::ReleaseDisks => {
                self.disks.release()?;
                SourceEvent::DisksReleased
            }
            SourceAction::Commit => {
                self.link()?.send(Kind::Commit, &[])?;
                self.link()?.expect(Kind::Running, RUNNING_TIMEOUT)?;
                self.report.pause_commit_us += self.pause()?.lap_us();
                SourceEvent::RunningHeard
            }
            SourceAction::Resume => {
                if let Err(error) = self.vm.resume() {
                    self.broken = true;
                    self.note(error.into());
                } else {
                    // The destination may have drawn its frames to itself.
                    self.vm.announce();
                }
                SourceEvent::Resumed
            }
            SourceAction::LockDisks => unreachable!("whoever has the machine then does it"),
            SourceAction::Finish => unreachable!("handled by the caller"),
        })
    }

    /// One pass: what was written since the last one, or all there is.
    fn copy_round(&mut self) -> Result<SourceEvent, MigrationError> {
        let fresh = self.dirty.is_none();
        let pages = match self.dirty.take() {
            Some(pages) => pages,
            None => {
                // From here on every write is logged; so what is a hole now, and is written
                // later, is in the log.
                self.vm.start_dirty_log()?;
                self.logging = true;
                let present = pages::present(self.vm.memory());
                let all = self.config.shape.memory_bytes / PAGE_BYTES;
                self.report.zero_pages += all.saturating_sub(present.count());
                present
            }
        };
        let began = Instant::now();
        let sent_before = self.report.bytes_sent;
        let mut pacer = Pacer::begin();
        self.send_disks(&mut pacer, SourceState::Copying)?;
        self.send_pages(&pages, fresh, &mut pacer)?;
        self.copied.rounds += 1;
        self.report.rounds = self.copied.rounds;
        self.end_pass(began, sent_before)?;
        if fresh {
            // From here on it is a race against the guest's writes, and the rate that is seen
            // must be the pause's.
            self.courtesy.end();
            if let Some(senders) = &self.senders {
                senders.hurry();
            }
            self.rehearse()?;
        }
        let dirty = self.vm.take_dirty()?;
        // So that the pause has little left of that.
        self.disks.sync_shared()?;
        let disk_bytes = self.disks.gather();
        let remaining = dirty.bytes() + disk_bytes;
        let progress = Progress {
            rounds: self.copied.passes,
            remaining,
            remaining_before: self.copied.remaining_before.replace(remaining),
            sent: self.report.bytes_sent,
            elapsed: self.started.elapsed(),
            rate: self.copied.rate,
        };
        self.report.remaining_bytes = remaining;
        self.report.disk_remaining_bytes = disk_bytes;
        self.dirty = Some(dirty);
        tracing::debug!(?progress, "a pass is done");
        match policy::decide(&progress, &self.config.limits) {
            Decision::Copy => Ok(SourceEvent::RoundDone),
            Decision::SwitchOver(stop) => {
                self.report.stop_reason = stop.name().to_owned();
                Ok(SourceEvent::Converged)
            }
            Decision::GiveUp(stop) => {
                self.report.stop_reason = stop.name().to_owned();
                Err(gave_up(stop, &progress, &self.config.limits))
            }
        }
    }

    /// The destination restores a state once while the guest still runs here: what takes long the
    /// first time, or cannot work at all, is found out before the pause.
    fn rehearse(&mut self) -> Result<(), MigrationError> {
        let Some(state) = self.vm.rehearsal_state()? else { return Ok(()) };
        let image = state::encode(&state)?;
        self.link()?.send(Kind::Rehearsal, &image)?;
        self.report.bytes_sent += image.len() as u64;
        self.hear(Kind::Rehearsed, IDLE_TIMEOUT)?;
        Ok(())
    }

    /// The pause begins: the guest stands still, and its state is saved.
    fn stop(&mut self) -> Result<SourceEvent, MigrationError> {
        let handover = Handover {
            migration_id: self.config.migration_id.clone(),
            to_epoch: self.config.to_epoch,
        };
        let prepared =
            handover.prepare(&self.config.state_dir).map_err(MigrationError::Handover)?;
        let rest = self.dirty.take().unwrap_or_else(|| DirtyPages::none(self.vm.memory()));
        let start = Instant::now();
        let pause = self.pause.insert(Pause {
            start,
            part: start,
            prepared,
            image: Vec::new(),
            last: rest,
            save_us: 0,
            last_bytes: 0,
            handover_us: 0,
        });
        self.vm.pause()?;
        self.report.pause_stop_us = pause.lap_us();
        // What is sent to the guest from now on waits for it at the destination.
        self.link()?.send(Kind::Paused, &[])?;
        let image = state::encode(&self.vm.save_state()?)?;
        let saved_us = self.pause()?.lap_us();
        self.report.pause_state_us = saved_us;
        // Nothing is under way to the disks any more: what was is noted now.
        self.disks.gather();
        self.disks.sync_shared()?;
        // After the save, which may have written memory.
        let written = self.vm.take_last_dirty()?;
        let pause = self.pause()?;
        pause.image = image;
        pause.save_us = saved_us;
        pause.last.merge(&written);
        Ok(SourceEvent::Stopped)
    }

    fn send_last(&mut self) -> Result<SourceEvent, MigrationError> {
        let none = DirtyPages::none(self.vm.memory());
        let last = std::mem::replace(&mut self.pause()?.last, none);
        let before = self.report.bytes_sent;
        let mut pacer = Pacer::begin();
        self.send_disks(&mut pacer, SourceState::Sending)?;
        self.send_pages(&last, false, &mut pacer)?;
        self.flush()?;
        self.pause()?.last_bytes = self.report.bytes_sent - before;
        self.report.rounds = self.copied.rounds + 1;
        self.report.pause_memory_us = self.pause()?.lap_us();
        let mut payload = self.copied.sent.encode().to_vec();
        payload.append(&mut self.pause()?.image);
        self.link()?.send(Kind::State, &payload)?;
        self.report.bytes_sent += payload.len() as u64;
        Ok(SourceEvent::LastSent)
    }

    fn write_handover(&mut self) -> Result<SourceEvent, MigrationError> {
        if !self.control.close() {
            return Err(MigrationError::Cancelled);
        }
        let pause = self.pause()?;
        let Err(error) = pause.prepared.commit() else {
            let handover_us = pause.lap_us();
            pause.handover_us = handover_us;
            self.report.pause_commit_us = handover_us;
            return Ok(SourceEvent::HandoverWritten);
        };
        self.note(MigrationError::Handover(error));
        match remove_handover(&self.config.state_dir) {
            Ok(()) => Ok(SourceEvent::HandoverWithdrawn),
            Err(error) => {
                tracing::error!(%error, "the hand-over may be on disk: the guest stays paused");
                Ok(SourceEvent::HandoverUnclear)
            }
        }
    }

    fn finish(&mut self, state: SourceState) -> SourceOutcome {
        self.disks.stop_tracking();
        match state {
            SourceState::Succeeded => {
                let report = &self.report;
                tracing::info!(
                    total_us = report.total_us,
                    pause_us = report.pause_us,
                    stop_us = report.pause_stop_us,
                    memory_us = report.pause_memory_us,
                    state_us = report.pause_state_us,
                    save_us = self.pause.as_ref().map_or(0, |pause| pause.save_us),
                    commit_us = report.pause_commit_us,
                    handover_us = self.pause.as_ref().map_or(0, |pause| pause.handover_us),
                    rounds = report.rounds,
                    last_bytes = self.pause.as_ref().map_or(0, |pause| pause.last_bytes),
                    "the domain has moved"
                );
                return SourceOutcome::Succeeded;
            }
            SourceState::HandedOver => return SourceOutcome::HandedOver(self.take_error()),
            _ => {}
        }
        // The guest runs here; what follows costs it nothing.
        if let Some(link) = &mut self.link {
            let reason = self.error.as_ref().map_or_else(String::new, ToString::to_string);
            let _ = link.send(Kind::Abort, &wire::encode_reason(&reason));
            link.close();
        }
        self.senders = None;
        if self.logging
            && let Err(error) = self.vm.stop_dirty_log()
        {
            tracing::warn!(%error, "the log of dirty pages stays on");
        }
        if self.pause.is_some()
            && let Err(error) = remove_handover(&self.config.state_dir)
        {
            tracing::warn!(%error, "the prepared hand-over stays on disk");
        }
        let error = self.take_error();
        if self.broken { SourceOutcome::Broken(error) } else { SourceOutcome::Failed(error) }
    }

    fn link(&mut self) -> Result<&mut Link, MigrationError> {
        self.link.as_mut().ok_or_else(|| MigrationError::Protocol("there is no connection".into()))
    }

    fn pause(&mut self) -> Result<&mut Pause, MigrationError> {
        self.pause.as_mut().ok_or_else(|| MigrationError::Protocol("the guest runs".into()))
    }

    /// Keeps the first error, and the better reason where the other side gave one.
    fn note(&mut self, error: MigrationError) {
        let error = match error {
            MigrationError::Link { .. } if self.control.is_cancelled() => MigrationError::Cancelled,
            MigrationError::Link { .. } => {
                self.link.as_mut().and_then(Link::last_words).unwrap_or(error)
            }
            error => error,
        };
        tracing::warn!(%error, "the migration has failed");
        self.error.get_or_insert(error);
    }

    fn take_error(&mut self) -> MigrationError {
        self.error.take().unwrap_or(MigrationError::Cancelled)
    }
}
