//! The world of one migration: two sides, a cable, a disk or two, and what goes wrong.

mod rules;

use std::collections::VecDeque;

use drover_hv::migration::destination_machine::{
    DestinationAction as DA, DestinationEvent as DE, DestinationMachine, DestinationState as DS,
};
use drover_hv::migration::source_machine::{
    SourceAction as SA, SourceEvent as SE, SourceMachine, SourceState as SS,
};

use super::Chance;
use super::disk::{Disk, Version};

#[derive(Debug, Clone, PartialEq, Eq)]
enum Message {
    Hello,
    Welcome,
    Pages,
    Blocks(Vec<(usize, Version)>),
    State,
    Ready,
    Commit,
    Running,
    Abort,
}

/// What may go wrong in a run; `0` never, else once in so many steps.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    pub(crate) cut: usize,
    pub(crate) kill_source: usize,
    pub(crate) kill_destination: usize,
    pub(crate) cancel: usize,
    pub(crate) disk: usize,
    pub(crate) restore: usize,
    /// Fires exactly at this step: for going through all of them.
    pub(crate) at: Option<(usize, Fault)>,
    /// The disk is shared.
    pub(crate) shared: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Cut,
    KillSource,
    KillDestination,
    Cancel,
}

pub(crate) struct Source {
    pub(crate) machine: SourceMachine,
    action: Option<SA>,
    /// Half done: the message of a two-part action is out.
    sent: bool,
    runs: bool,
    rounds: usize,
}

pub(crate) struct Destination {
    pub(crate) machine: DestinationMachine,
    action: Option<DA>,
    said_ready: bool,
    runs: bool,
}

pub(crate) struct World {
    chance: Chance,
    faults: Faults,
    pub(crate) steps: usize,
    pub(crate) source: Option<Source>,
    pub(crate) destination: Option<Destination>,
    disk: Disk,
    to_destination: VecDeque<Message>,
    to_source: VecDeque<Message>,
    connected: bool,
    link_up: bool,
    /// handover.json is on the source's disk.
    handed_over: bool,
    commit_sent: bool,
    cancelled: bool,
    moved: bool,
    pub(crate) trace: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        Self {
            chance: Chance(seed),
            faults,
            steps: 0,
            source: Some(Source {
                machine: SourceMachine::new(),
                action: None,
                sent: false,
                runs: true,
                rounds: 0,
            }),
            destination: Some(Destination {
                machine: DestinationMachine::new(),
                action: None,
                said_ready: false,
                runs: false,
            }),
            disk: Disk::new(faults.shared),
            to_destination: VecDeque::new(),
            to_source: VecDeque::new(),
            connected: false,
            link_up: true,
            handed_over: false,
            commit_sent: false,
            cancelled: false,
            moved: false,
            trace: Vec::new(),
        }
    }

    fn note(&mut self, text: impl Into<String>) {
        self.trace.push(format!("{:3} {}", self.steps, text.into()));
    }

    /// One event of the source; a legal one, or the machine is wrong.
    fn source_event(&mut self, event: SE) {
        self.note(format!("source {event:?}"));
        let Some(source) = &mut self.source else { return };
        let action = source.machine.step(event).unwrap_or_else(|error| panic!("{error}"));
        source.action = Some(action);
        source.sent = false;
        if action == SA::Finish {
            self.disk.stop_tracking();
        }
        if action == SA::Finish && source.machine.state() == SS::Failed {
            if self.link_up {
                self.to_destination.push_back(Message::Abort);
            }
            self.connected = false;
        }
    }

    fn destination_event(&mut self, event: DE) {
        self.note(format!("destination {event:?}"));
        let Some(destination) = &mut self.destination else { return };
        let action = destination.machine.step(event).unwrap_or_else(|error| panic!("{error}"));
        destination.action = Some(action);
        if destination.machine.state() == DS::Failed {
            self.disk.open_there = false;
            if self.link_up {
                self.to_source.push_back(Message::Abort);
            }
            self.connected = false;
        }
    }

    fn link_lost(&self) -> bool {
        !self.link_up || !self.connected
    }

    /// What the source reads: a message, the loss of the link behind the last one, or nothing yet.
    fn source_reads(&mut self) -> Option<Option<Message>> {
        match self.to_source.pop_front() {
            Some(message) => Some(Some(message)),
            None if self.link_lost() => Some(None),
            None => None,
        }
    }

    fn destination_reads(&mut self) -> Option<Option<Message>> {
        match self.to_destination.pop_front() {
            Some(message) => Some(Some(message)),
            None if self.link_lost() => Some(None),
            None => None,
        }
    }

    /// Sends, unless the cable is cut: then the sender may or may not notice, and the message is
    /// gone.
    fn send(&mut self, to_destination: bool, message: Message) -> bool {
        if self.link_lost() {
            return !self.link_up && self.chance.one_in(2);
        }
        let queue = if to_destination { &mut self.to_destination } else { &mut self.to_source };
        queue.push_back(message);
        true
    }

    /// The source does a part of what it has to do; false when it can only wait.
    fn step_source(&mut self) -> bool {
        let Some(action) = self.source.as_ref().and_then(|source| source.action) else {
            if self.source.as_ref().is_some_and(|s| s.machine.state() == SS::Idle) {
                self.source_event(SE::Start);
                return true;
            }
            return false;
        };
        let before_line = !matches!(
            action,
            SA::ReleaseDisks
                | SA::Commit
                | SA::LockDisks
                | SA::Resume
                | SA::Finish
                | SA::WriteHandover
        );
        if self.cancelled && before_line {
            self.connected = false;
            self.source_event(SE::Failed);
            return true;
        }
        match action {
            SA::Connect => {
                let listening =
                    self.destination.as_ref().is_some_and(|d| d.machine.state() == DS::Listening);
                if self.link_up && listening {
                    self.connected = true;
                    self.source_event(SE::Connected);
                    self.destination_event(DE::Connected);
                } else if !self.link_up || self.destination.is_none() {
                    self.source_event(SE::Failed);
                } else {
                    return false;
                }
            }
            SA::Greet => return self.ask(Message::Hello, Message::Welcome, SE::Welcomed),
            SA::CopyDisks => {
                if let Some(sent) = self.send_blocks() {
                    return sent;
                }
                let another = self.chance.one_in(2);
                self.source_event(if another { SE::RoundDone } else { SE::DisksCopied });
            }
            SA::CopyRound => {
                if let Some(sent) = self.send_blocks() {
                    return sent;
                }
                let ok = self.send(true, Message::Pages);
                let enough = self.chance.one_in(3);
                let rounds = self.source.as_mut().map_or(0, |s| {
                    s.rounds += 1;
                    s.rounds
                });
                let event = match ok {
                    false => SE::Failed,
                    true if enough => SE::Converged,
                    // The policy gives up.
                    true if rounds > 8 => SE::Failed,
                    true => SE::RoundDone,
                };
                self.source_event(event);
            }
            SA::Stop => {
                if let Some(source) = &mut self.source {
                    source.runs = false;
                }
                self.disk.settle();
                let saved = !self.chance.one_in(self.faults.restore * 2);
                self.source_event(if saved { SE::Stopped } else { SE::Failed });
            }
            SA::SendLast => {
                let blocks = self.disk.read_last();
                let ok = (blocks.is_empty() || self.send(true, Message::Blocks(blocks)))
                    && self.send(true, Message::Pages)
                    && self.send(true, Message::State);
                self.source_event(if ok { SE::LastSent } else { SE::Failed });
            }
            SA::AwaitReady => match self.source_reads() {
                Some(Some(Message::Ready)) => self.source_event(SE::ReadyHeard),
                Some(_) => self.source_event(SE::Failed),
                None if self.chance.one_in(40) => self.source_event(SE::Failed),
                None => return false,
            },
            SA::WriteHandover => self.write_handover(),
            SA::ReleaseDisks => {
                let failed = self.chance.one_in(self.faults.disk * 4);
                self.disk.open_here = failed;
                self.source_event(if failed { SE::Failed } else { SE::DisksReleased });
            }
            SA::Commit => return self.commit(),
            SA::LockDisks => {
                self.disk.open_here = true;
                self.source_event(SE::DisksLocked);
            }
            SA::Resume => {
                if let Some(source) = &mut self.source {
                    source.runs = true;
                }
                self.handed_over = false;
                self.source_event(SE::Resumed);
            }
            SA::Finish => return false,
        }
        true
    }

    /// Some blocks of a pass; `None` when it is done.
    fn send_blocks(&mut self) -> Option<bool> {
        let most = 1 + self.chance.below(3);
        let blocks = self.disk.read(most);
        if blocks.is_empty() {
            return None;
        }
        if !self.send(true, Message::Blocks(blocks)) {
            self.source_event(SE::Failed);
        }
        Some(true)
    }

    /// A question and its answer.
    fn ask(&mut self, question: Message, answer: Message, event: SE) -> bool {
        let asked = self.source.as_ref().is_some_and(|source| source.sent);
        if !asked {
            if self.send(true, question) {
                if let Some(source) = &mut self.source {
                    source.sent = true;
                }
            } else {
                self.source_event(SE::Failed);
            }
            return true;
        }
        match self.source_reads() {
            Some(Some(message)) if message == answer => self.source_event(event),
            Some(_) => self.source_event(SE::Failed),
            None => return false,
        }
        true
    }

    fn write_handover(&mut self) {
        if self.cancelled {
            self.source_event(SE::Failed);
        } else if self.chance.one_in(self.faults.disk) {
            self.disk.check_moved();
            let unclear = self.chance.one_in(2);
            // Unclear: the file may be there or not.
            self.handed_over = unclear && self.chance.one_in(2);
            self.source_event(if unclear { SE::HandoverUnclear } else { SE::HandoverWithdrawn });
        } else {
            self.disk.check_moved();
            self.handed_over = true;
            self.source_event(SE::HandoverWritten);
        }
    }

    fn commit(&mut self) -> bool {
        let sent = self.source.as_ref().is_some_and(|source| source.sent);
        if !sent {
            assert!(self.handed_over, "COMMIT before the hand-over is on disk");
            assert!(!self.disk.open_here, "COMMIT with the disks open");
            self.commit_sent = true;
            if self.send(true, Message::Commit) {
                if let Some(source) = &mut self.source {
                    source.sent = true;
                }
            } else {
                self.source_event(SE::Failed);
            }
            return true;
        }
        match self.source_reads() {
            Some(Some(Message::Running)) => self.source_event(SE::RunningHeard),
            Some(_) => self.source_event(SE::Failed),
            None if self.chance.one_in(40) => self.source_event(SE::Failed),
            None => return false,
        }
        true
    }

    fn step_destination(&mut self) -> bool {
        let Some(action) = self.destination.as_ref().and_then(|d| d.action) else {
            if self.destination.as_ref().is_some_and(|d| d.machine.state() == DS::Idle) {
                self.destination_event(DE::Start);
                return true;
            }
            return false;
        };
        match action {
            // The source's step connects. One that never comes is given up.
            DA::Listen if self.source_is_over() => self.destination_event(DE::Failed),
            DA::Listen => return false,
            DA::Greet => match self.destination_reads() {
                Some(Some(Message::Hello)) => {
                    self.send(false, Message::Welcome);
                    self.destination_event(DE::Accepted);
                }
                Some(Some(_)) => self.destination_event(DE::Rejected),
                Some(None) => self.destination_event(DE::LinkLost),
                None => return false,
            },
            DA::Receive => match self.destination_reads() {
                Some(Some(Message::Pages)) => {}
                Some(Some(Message::Blocks(blocks))) => self.disk.receive(&blocks),
                Some(Some(Message::State)) => self.destination_event(DE::StateReceived),
                Some(Some(Message::Abort)) => self.destination_event(DE::Aborted),
                Some(Some(other)) => panic!("{other:?} among pages"),
                Some(None) => self.destination_event(DE::LinkLost),
                None => return false,
            },
            DA::Restore => {
                let failed = self.chance.one_in(self.faults.restore);
                self.destination_event(if failed { DE::Failed } else { DE::Restored });
            }
            DA::SyncDisks => {
                let failed = self.chance.one_in(self.faults.disk);
                if !failed {
                    self.disk.sync_there();
                }
                self.destination_event(if failed { DE::Failed } else { DE::Synced });
            }
            DA::LockDisks => {
                assert!(!self.disk.shared || !self.disk.open_here, "locked by two");
                let failed = self.chance.one_in(self.faults.disk * 4);
                self.disk.open_there = !failed;
                self.destination_event(if failed { DE::Failed } else { DE::DisksLocked });
            }
            DA::AwaitCommit => return self.await_commit(),
            DA::AwaitController => return false,
            DA::Resume => {
                self.disk.check_moved();
                if let Some(destination) = &mut self.destination {
                    destination.runs = true;
                }
                self.moved = true;
                self.send(false, Message::Running);
                self.destination_event(DE::Resumed);
            }
            DA::Finish => return false,
        }
        true
    }

    fn await_commit(&mut self) -> bool {
        if let Some(destination) = &mut self.destination
            && !std::mem::replace(&mut destination.said_ready, true)
        {
            if !self.send(false, Message::Ready) {
                self.destination_event(DE::LinkLost);
            }
            return true;
        }
        match self.destination_reads() {
            Some(Some(Message::Commit)) => self.destination_event(DE::CommitHeard),
            Some(Some(Message::Abort)) => self.destination_event(DE::Aborted),
            Some(Some(_)) => self.destination_event(DE::Failed),
            Some(None) => self.destination_event(DE::LinkLost),
            None => return false,
        }
        true
    }

    fn source_is_over(&self) -> bool {
        self.source.as_ref().is_none_or(|source| source.action == Some(SA::Finish))
    }

    /// The world's malice, before each step.
    fn fault(&mut self) {
        let faults = self.faults;
        let now = |fault| faults.at == Some((self.steps, fault));
        let (cut, source, destination, cancel) = (
            now(Fault::Cut),
            now(Fault::KillSource),
            now(Fault::KillDestination),
            now(Fault::Cancel),
        );
        if (cut || self.chance.one_in(faults.cut)) && self.link_up {
            self.note("the cable is cut");
            self.link_up = false;
            // What is on its way is lost, or was already there.
            if self.chance.one_in(2) {
                self.to_source.clear();
            }
            if self.chance.one_in(2) {
                self.to_destination.clear();
            }
        }
        if (source || self.chance.one_in(faults.kill_source)) && self.source.is_some() {
            self.note("the source is killed");
            self.end_source();
        }
        if (destination || self.chance.one_in(faults.kill_destination))
            && self.destination.is_some()
        {
            self.note("the destination is killed");
            self.destination = None;
            self.disk.open_there = false;
            self.connected = false;
        }
        let closed = self.handed_over || self.commit_sent;
        if (cancel || self.chance.one_in(faults.cancel)) && !closed {
            self.note("cancelled");
            self.cancelled = true;
        }
    }

    /// Its process is gone, and what it had open is not.
    fn end_source(&mut self) {
        self.source = None;
        self.disk.open_here = false;
        self.connected = false;
    }

    /// Runs until nothing happens any more.
    pub(crate) fn run(&mut self) {
        let mut idle = 0;
        while idle < 200 {
            self.steps += 1;
            assert!(self.steps < 5000, "it does not end");
            self.fault();
            if self.source_runs() && self.chance.one_in(2) {
                self.disk.guest(&mut self.chance);
            }
            let source_first = self.chance.one_in(2);
            let moved = (source_first && self.step_source())
                || self.step_destination()
                || (!source_first && self.step_source());
            idle = if moved { 0 } else { idle + 1 };
            self.check();
        }
        self.check_end();
    }
}
