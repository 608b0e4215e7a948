//! The destination's shell: does what [`DestinationMachine`] says. [`disks`] are the guest's;
//! [`inbox`] is where all goes that comes in, on the first connection and on those of the
//! [`receivers`].

mod disks;
mod inbox;
mod receivers;

use std::io;
use std::net::{TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use drover_proto::agent::v1::{MigrationProgress, MigrationRole, ObservedMigration};

use super::courtesy::Courtesy;
use super::destination_machine::{
    DestinationAction, DestinationEvent, DestinationMachine, DestinationState,
};
use super::features::Shape;
use super::link::{Link, Received, protocol, reason, wait_for};
use super::wire::{self, CONNECTIONS_MAX, Hello, Kind, Sent};
use super::{
    CONNECT_TIMEOUT, DestinationControl, IDLE_TIMEOUT, LISTEN_TIMEOUT, MigrationError, Observer,
    pages,
};
use crate::machine::migratable::MigratableVm;
use crate::state;
use disks::Disks;
use inbox::Inbox;
use receivers::Receivers;

/// Connections that were not the source's, before it is called an attack.
const STRANGERS_MAX: u32 = 64;
/// A stranger may be silent for this long.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// What a destination is told.
#[derive(Debug, Clone)]
pub struct DestinationConfig {
    /// Unique in the cluster.
    pub migration_id: String,
    /// What the source must know.
    pub token: String,
    /// Of the machine that waits here.
    pub shape: Shape,
    /// Most connections; the source may offer fewer. [`super::connections`] is what it costs.
    pub connections: u16,
}

/// How it ended.
#[derive(Debug)]
pub enum DestinationOutcome {
    /// The guest runs here.
    Running,
    /// It never ran here; the machine is of no use.
    Failed(MigrationError),
}

/// A destination that listens.
#[derive(Debug)]
pub struct Incoming {
    listener: TcpListener,
    address: String,
}

impl Incoming {
    /// Listens at host:port; port 0 chooses one.
    ///
    /// # Errors
    /// When the address is none of this host's, or the port is taken.
    pub fn bind(address: &str) -> io::Result<Self> {
        let addresses: Vec<_> = address.to_socket_addrs()?.collect();
        let listener = TcpListener::bind(&addresses[..])?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?.to_string();
        Ok(Self { listener, address })
    }

    /// Where it listens, host:port.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Takes in a machine. Returns when the guest runs here, or never will.
    pub fn run(
        self,
        vm: &mut dyn MigratableVm,
        config: &DestinationConfig,
        control: &DestinationControl,
        observer: Observer<'_>,
    ) -> DestinationOutcome {
        let deadline = Instant::now() + LISTEN_TIMEOUT;
        let mut destination = Destination {
            incoming: self,
            vm,
            config,
            control,
            observer,
            deadline,
            strangers: 0,
            link: None,
            receivers: None,
            inbox: None,
            buffer: Vec::new(),
            image: Vec::new(),
            times: Times::default(),
            courtesy: Courtesy::begin(),
            error: None,
        };
        destination.run()
    }
}

struct Destination<'a, 'o> {
    incoming: Incoming,
    vm: &'a mut dyn MigratableVm,
    config: &'a DestinationConfig,
    control: &'a DestinationControl,
    observer: Observer<'o>,
    deadline: Instant,
    strangers: u32,
    link: Option<Link>,
    /// From WELCOME on.
    receivers: Option<Receivers>,
    inbox: Option<Arc<Inbox>>,
    /// Of what comes on the first connection.
    buffer: Vec<u8>,
    image: Vec<u8>,
    times: Times,
    courtesy: Courtesy,
    error: Option<MigrationError>,
}

/// Where this side's part of the pause went.
#[derive(Debug, Default)]
struct Times {
    restore: Duration,
    sync: Duration,
    commit_wait: Duration,
    resume: Duration,
    announce: Duration,
}

/// Runs, and answers how long it took.
fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = run();
    (result, start.elapsed())
}

impl Destination<'_, '_> {
    fn run(&mut self) -> DestinationOutcome {
        let mut machine = DestinationMachine::new();
        let mut event = DestinationEvent::Start;
        loop {
            let action = match machine.step(event) {
                Ok(action) => action,
                Err(illegal) => unreachable!("{illegal}"),
            };
            if action == DestinationAction::Finish {
                self.report(machine.state());
                return self.finish(machine.state());
            }
            // READY is told to the source first: somebody else's wait is part of the pause.
            if machine.state() != DestinationState::Ready {
                self.report(machine.state());
            }
            event = match self.act(action) {
                Ok(event) => event,
                Err(error) => self.failed(error),
            };
        }
    }

    fn act(&mut self, action: DestinationAction) -> Result<DestinationEvent, MigrationError> {
        match action {
            DestinationAction::Listen => self.listen(),
            DestinationAction::Greet => self.greet(),
            DestinationAction::Join => self.join(),
            DestinationAction::Receive => self.receive(),
            DestinationAction::Restore => {
                let state = state::decode(&std::mem::take(&mut self.image))?;
                let (restored, time) = timed(|| self.vm.restore_state(state));
                self.times.restore = time;
                restored?;
                Ok(DestinationEvent::Restored)
            }
            DestinationAction::SyncDisks => {
                let disks = &self.inbox()?.disks;
                let (synced, time) = timed(|| disks.sync());
                synced?;
                // Whoever fills a disk that the guest can only read has it open twice.
                disks.close();
                self.times.sync = time;
                Ok(DestinationEvent::Synced)
            }
            DestinationAction::AwaitCommit => {
                self.control.set_ready(true);
                let said = self.link()?.send(Kind::Ready, &[]);
                self.report(DestinationState::Ready);
                said?;
                let (heard, time) = timed(|| self.await_commit());
                self.times.commit_wait = time;
                heard
            }
            DestinationAction::AwaitController => self.await_controller(),
            DestinationAction::LockDisks => {
                self.control.set_ready(false);
                disks::lock_shared(self.vm)?;
                Ok(DestinationEvent::DisksLocked)
            }
            DestinationAction::Resume => {
                let (resumed, time) = timed(|| self.vm.resume());
                self.times.resume = time;
                resumed?;
                self.times.announce = timed(|| self.vm.announce()).1;
                if let Some(link) = &mut self.link
                    && let Err(error) = link.send(Kind::Running, &[])
                {
                    tracing::warn!(%error, "the source does not hear that the guest runs here");
                }
                self.vm.catch_up();
                Ok(DestinationEvent::Resumed)
            }
            DestinationAction::Finish => unreachable!("handled by the caller"),
        }
    }

    /// The event that an error is. Behind READY only the source's word or the VMM's end is one
    /// that ends it; the loss of the link is not.
    fn failed(&mut self, error: MigrationError) -> DestinationEvent {
        let event = match error {
            MigrationError::Aborted(_) | MigrationError::Cancelled => DestinationEvent::Aborted,
            MigrationError::Link { .. } => DestinationEvent::LinkLost,
            _ => DestinationEvent::Failed,
        };
        tracing::warn!(%error, "the incoming migration");
        self.error = Some(error);
        event
    }

    fn listen(&mut self) -> Result<DestinationEvent, MigrationError> {
        let failed = MigrationError::link("waiting for the source");
        self.link = None;
        loop {
            if self.control.is_ended() {
                return Ok(self.ended());
            }
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.strangers > STRANGERS_MAX {
                self.error = Some(failed(io::ErrorKind::TimedOut.into()));
                return Ok(DestinationEvent::Failed);
            }
            match self.incoming.listener.accept() {
                Ok((stream, peer)) => {
                    tracing::info!(%peer, "a source has connected");
                    self.link = Some(Link::new(stream)?);
                    return Ok(DestinationEvent::Connected);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    self.error = Some(failed(error));
                    return Ok(DestinationEvent::Failed);
                }
            }
            let listener = self.incoming.listener.as_fd();
            if let Err(error) = wait_for(&[listener, self.wake()], Some(left)) {
                self.error = Some(failed(error));
                return Ok(DestinationEvent::Failed);
            }
        }
    }

    fn ended(&mut self) -> DestinationEvent {
        self.error = Some(MigrationError::Cancelled);
        DestinationEvent::Failed
    }

    fn greet(&mut self) -> Result<DestinationEvent, MigrationError> {
        let message = match self.link()?.first(Kind::Hello, HELLO_TIMEOUT) {
            Ok(message) => message,
            Err(error) => return Ok(self.stranger(&error.to_string())),
        };
        let hello = match Hello::decode(&message.payload) {
            Ok(hello) => hello,
            Err(error) => return Ok(self.stranger(&error.to_string())),
        };
        let known = hello.migration_id == self.config.migration_id
            && wire::same_secret(&hello.token, &self.config.token);
        if !known {
            return Ok(self.stranger("this migration is not expected here"));
        }
        let expected = self.control.epoch();
        let fits = match hello.to_epoch {
            epoch if epoch != expected => Err(format!("epoch: {epoch}; accepted: {expected}")),
            _ => self.config.shape.accepts(&hello.shape),
        };
        if let Err(why) = fits {
            return self.refuse(why);
        }
        // Zero pages are not sent, so memory must be zero; a machine that waits has not touched
        // it, and then this does nothing.
        pages::clear(self.vm.memory()).map_err(MigrationError::link("clearing memory"))?;
        let zeroed = match Disks::prepare(self.vm.disks()) {
            Ok((disks, zeroed)) => {
                self.inbox = Some(Arc::new(Inbox::new(self.vm.memory().clone(), disks)?));
                zeroed
            }
            Err(error) => return self.refuse(error.to_string()),
        };
        let DestinationConfig { migration_id, token, .. } = self.config;
        let allowed = message.connections.min(self.config.connections).clamp(1, CONNECTIONS_MAX);
        self.receivers = Some(Receivers::new(migration_id, token, allowed));
        self.link()?.greet(Kind::Welcome, &wire::encode_welcome(&zeroed), allowed)?;
        Ok(DestinationEvent::Accepted)
    }

    /// Takes the further connections that WELCOME allowed.
    fn join(&mut self) -> Result<DestinationEvent, MigrationError> {
        let step = "waiting for the further connections";
        let failed = MigrationError::link(step);
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let inbox = Arc::clone(self.inbox()?);
        loop {
            if self.control.is_ended() {
                return Ok(self.ended());
            }
            inbox.alarm.check()?;
            let receivers = self.receivers()?;
            if receivers.are_complete() {
                return Ok(DestinationEvent::Joined);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.strangers > STRANGERS_MAX {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            match self.incoming.listener.accept() {
                Ok((stream, peer)) => {
                    tracing::debug!(%peer, "a further connection");
                    // Or none; it is the bound that counts.
                    self.strangers += 1;
                    let courtesy = self.courtesy.inherited();
                    self.receivers()?.add(stream, &inbox, courtesy)?;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(failed(error)),
            }
            let link = self.link.as_ref().map(|link| link.stream().as_fd());
            let Some(link) = link else { return Err(failed(io::ErrorKind::NotConnected.into())) };
            let listener = self.incoming.listener.as_fd();
            let fds = [listener, inbox.alarm.fd(), self.wake(), link];
            let readable = wait_for(&fds, Some(left)).map_err(MigrationError::link(step))?;
            inbox.alarm.calm();
            // Before all are there the source says nothing, or that it gives up.
            if readable[3] && !self.receivers()?.are_complete() {
                self.link()?.expect(Kind::Abort, HELLO_TIMEOUT)?;
                return Err(failed(io::ErrorKind::ConnectionAborted.into()));
            }
        }
    }

    /// It is the source, and cannot come here.
    fn refuse(&mut self, why: String) -> Result<DestinationEvent, MigrationError> {
        self.link()?.send(Kind::Refuse, &wire::encode_reason(&why))?;
        self.error = Some(MigrationError::Refused(why));
        Ok(DestinationEvent::Failed)
    }

    /// It was not the source: say so, go on listening.
    fn stranger(&mut self, why: &str) -> DestinationEvent {
        self.strangers += 1;
        tracing::warn!(why, "a connection was refused");
        if let Some(link) = &mut self.link {
            // It may be gone already.
            let _ = link.send(Kind::Refuse, &wire::encode_reason(why));
        }
        DestinationEvent::Rejected
    }

    /// Disks and pages, until the state comes.
    fn receive(&mut self) -> Result<DestinationEvent, MigrationError> {
        let inbox = Arc::clone(self.inbox()?);
        loop {
            if self.control.is_ended() {
                return Ok(self.ended());
            }
            let message = self.next_message(&inbox)?;
            match message.kind {
                Kind::Pages | Kind::Disk => {
                    let mut buffer = std::mem::take(&mut self.buffer);
                    inbox.take(self.link()?, &message, &mut buffer)?;
                    self.buffer = buffer;
                }
                Kind::Round => {
                    let (round, sent) = wire::decode_round(&message.payload).map_err(protocol)?;
                    self.await_all(&inbox, sent, false)?;
                    if sent.pages > 0 {
                        inbox.end_first_pass();
                        self.courtesy.end();
                    }
                    // So the passes' rate is that of the disks too, and the pause has little left
                    // to make durable.
                    inbox.disks.sync()?;
                    self.link()?.send(Kind::RoundAck, &wire::encode_round(round, sent))?;
                }
                Kind::Rehearsal => {
                    self.vm.restore_state(state::decode(&message.payload)?)?;
                    self.link()?.send(Kind::Rehearsed, &[])?;
                }
                Kind::Paused => {
                    self.courtesy.end();
                    self.vm.attract();
                }
                Kind::State => {
                    let (sent, image) = Sent::decode(&message.payload).map_err(protocol)?;
                    self.await_all(&inbox, sent, true)?;
                    self.image = image.to_vec();
                    return Ok(DestinationEvent::StateReceived);
                }
                Kind::Abort => return Err(MigrationError::Aborted(reason(&message.payload)?)),
                kind => return Err(MigrationError::Protocol(format!("{kind:?} among pages"))),
            }
        }
    }

    /// The next one of the first connection, unless another one fails.
    fn next_message(&mut self, inbox: &Inbox) -> Result<Received, MigrationError> {
        if self.receivers()?.are_none() {
            return self.link()?.receive(IDLE_TIMEOUT);
        }
        match self.link()?.await_word(&inbox.alarm, IDLE_TIMEOUT) {
            Ok(()) => self.link()?.receive(IDLE_TIMEOUT),
            Err(error) => Err(self.better(error)),
        }
    }

    /// Waits for what the other connections bring. Without others it is here, or was never sent.
    fn await_all(&mut self, inbox: &Inbox, said: Sent, last: bool) -> Result<(), MigrationError> {
        let alone = self.receivers()?.are_none();
        inbox.await_all(said, alone, last || alone).map_err(|error| self.better(error))
    }

    /// When a connection is gone: what the source said on the first one is why.
    fn better(&mut self, error: MigrationError) -> MigrationError {
        match error {
            MigrationError::Link { .. } => {
                self.link.as_mut().and_then(Link::last_words).unwrap_or(error)
            }
            error => error,
        }
    }

    /// READY was said: COMMIT, the loss of the link, or the controller.
    fn await_commit(&mut self) -> Result<DestinationEvent, MigrationError> {
        loop {
            if let Some(event) = self.decided() {
                return Ok(event);
            }
            let wake = self.wake();
            let link = self.link.as_ref().map(|link| link.stream().as_fd());
            let Some(link) = link else { return Ok(DestinationEvent::LinkLost) };
            let readable = wait_for(&[link, wake], Some(IDLE_TIMEOUT))
                .map_err(MigrationError::link("waiting for COMMIT"))?;
            // Keepalive ends a link whose other side is gone; silence alone does not.
            if readable[0] {
                self.link()?.expect(Kind::Commit, IDLE_TIMEOUT)?;
                return Ok(DestinationEvent::CommitHeard);
            }
        }
    }

    fn await_controller(&mut self) -> Result<DestinationEvent, MigrationError> {
        self.link = None;
        loop {
            if let Some(event) = self.decided() {
                return Ok(event);
            }
            if let Err(error) = wait_for(&[self.wake()], Some(IDLE_TIMEOUT)) {
                tracing::error!(%error, "waiting for the controller");
                std::thread::sleep(Duration::from_secs(1));
            }
        }
    }

    fn decided(&self) -> Option<DestinationEvent> {
        // Looked at below; the event is only there to wake us.
        let _ = self.control.wake_fd().read();
        if self.control.taken_over() {
            Some(DestinationEvent::TakeOver)
        } else if self.control.is_ended() {
            Some(DestinationEvent::Aborted)
        } else {
            None
        }
    }

    fn finish(&mut self, state: DestinationState) -> DestinationOutcome {
        if state == DestinationState::Running {
            tracing::info!(times = ?self.times, "the domain runs here");
            return DestinationOutcome::Running;
        }
        self.control.set_ready(false);
        let error = self.error.take().unwrap_or(MigrationError::Cancelled);
        if let Some(link) = &mut self.link {
            // It may be gone already.
            let _ = link.send(Kind::Abort, &wire::encode_reason(&error.to_string()));
            link.close();
        }
        self.receivers = None;
        DestinationOutcome::Failed(error)
    }

    fn link(&mut self) -> Result<&mut Link, MigrationError> {
        self.link.as_mut().ok_or_else(|| MigrationError::Protocol("there is no connection".into()))
    }

    fn inbox(&self) -> Result<&Arc<Inbox>, MigrationError> {
        self.inbox.as_ref().ok_or_else(|| MigrationError::Protocol("nobody was welcome".into()))
    }

    fn receivers(&mut self) -> Result<&mut Receivers, MigrationError> {
        let none = || MigrationError::Protocol("nobody was welcome".into());
        self.receivers.as_mut().ok_or_else(none)
    }

    fn wake(&self) -> BorrowedFd<'_> {
        // SAFETY: the control outlives `self`, and keeps its eventfd open as long as it lives.
        unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(self.control.wake_fd())) }
    }

    fn report(&mut self, state: DestinationState) {
        let progress = match state {
            DestinationState::Idle | DestinationState::Listening | DestinationState::Greeting => {
                MigrationProgress::Listening
            }
            DestinationState::Receiving => MigrationProgress::Copying,
            DestinationState::Ready => MigrationProgress::Ready,
            // Told when it is over, or not at all: all but the first are part of the pause.
            DestinationState::Joining
            | DestinationState::Restoring
            | DestinationState::Syncing
            | DestinationState::Locking
            | DestinationState::Resuming => return,
            DestinationState::Running => MigrationProgress::Succeeded,
            DestinationState::Failed => MigrationProgress::Failed,
        };
        let error = match state {
            DestinationState::Failed => {
                self.error.as_ref().map_or_else(String::new, ToString::to_string)
            }
            _ => String::new(),
        };
        let observed = ObservedMigration {
            id: self.config.migration_id.clone(),
            role: MigrationRole::Destination as i32,
            progress: progress as i32,
            listen_address: self.incoming.address.clone(),
            report: None,
            error,
        };
        (self.observer)(&observed);
    }
}
