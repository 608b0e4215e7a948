//! The world of one migration: two sides, their cables, a disk or two, and what goes wrong.

mod cables;
mod destination;
mod rules;

use drover_hv::migration::destination_machine::{
    DestinationAction as DA, DestinationEvent as DE, DestinationMachine, DestinationState as DS,
};
use drover_hv::migration::source_machine::{
    SourceAction as SA, SourceEvent as SE, SourceMachine, SourceState as SS,
};

use drover_hv::migration::wire::Sent;

use super::Chance;
use super::disk::Disk;
use cables::{Cables, Message, Read};

/// What may go wrong in a run; `0` never, else once in so many steps.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    pub(crate) cut: usize,
    /// One cable of several.
    pub(crate) cut_one: usize,
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
    CutOne,
    KillSource,
    KillDestination,
    Cancel,
}

pub(crate) struct Source {
    pub(crate) machine: SourceMachine,
    action: Option<SA>,
    /// Half done: the message of a two-part action is out.
    asked: bool,
    /// Connections that have joined, the first included.
    joined: usize,
    /// All that was given to the cables.
    sent: Sent,
    /// A ROUND is out, whose answer is still to come.
    round: bool,
    /// All of the pass is out; and whether it was asked for.
    passed: bool,
    passed_asked: bool,
    runs: bool,
    rounds: usize,
}

pub(crate) struct Destination {
    pub(crate) machine: DestinationMachine,
    action: Option<DA>,
    joined: usize,
    /// What came, over all cables.
    came: Sent,
    /// A ROUND or STATE that waits for what other cables bring.
    waits: Option<Message>,
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
    cables: Cables,
    /// handover.json is on the source's disk.
    handed_over: bool,
    commit_sent: bool,
    cancelled: bool,
    moved: bool,
    pub(crate) trace: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64, faults: Faults) -> Self {
        let mut chance = Chance(seed);
        let cables = Cables::new(1 + chance.below(3));
        Self {
            chance,
            faults,
            steps: 0,
            source: Some(Source {
                machine: SourceMachine::new(),
                action: None,
                asked: false,
                joined: 1,
                sent: Sent::default(),
                round: false,
                passed: false,
                passed_asked: false,
                runs: true,
                rounds: 0,
            }),
            destination: Some(Destination {
                machine: DestinationMachine::new(),
                action: None,
                joined: 1,
                came: Sent::default(),
                waits: None,
                said_ready: false,
                runs: false,
            }),
            disk: Disk::new(faults.shared),
            cables,
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
        source.asked = false;
        if action == SA::Finish {
            self.disk.stop_tracking();
        }
        if action == SA::Finish && source.machine.state() == SS::Failed {
            self.cables.last_words(true);
        }
    }

    fn destination_event(&mut self, event: DE) {
        self.note(format!("destination {event:?}"));
        let Some(destination) = &mut self.destination else { return };
        let action = destination.machine.step(event).unwrap_or_else(|error| panic!("{error}"));
        destination.action = Some(action);
        if destination.machine.state() == DS::Failed {
            self.disk.open_there = false;
            self.cables.last_words(false);
        }
    }

    /// What the source reads on the first connection. Up to READY the end of any is the end of all.
    fn source_reads(&mut self, all: bool) -> Read {
        self.cables.read(0, false, all, &mut self.chance)
    }

    /// The source says something on a connection.
    fn say(&mut self, cable: usize, message: Message) -> bool {
        self.cables.send(cable, true, message, &mut self.chance)
    }

    /// The source gives something to whatever connection is free.
    fn give(&mut self, message: Message) -> bool {
        if let Some(source) = &mut self.source {
            source.sent.add(message.counts());
        }
        let cable = self.chance.below(self.cables.count());
        self.say(cable, message)
    }

    fn sent(&self) -> Sent {
        self.source.as_ref().map_or_else(Sent::default, |source| source.sent)
    }

    /// The destination says something.
    fn answer(&mut self, cable: usize, message: Message) -> bool {
        self.cables.send(cable, false, message, &mut self.chance)
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
            self.cables.connected = false;
            self.source_event(SE::Failed);
            return true;
        }
        match action {
            SA::Connect => {
                let listening =
                    self.destination.as_ref().is_some_and(|d| d.machine.state() == DS::Listening);
                if self.cables.up && listening {
                    self.cables.connected = true;
                    self.source_event(SE::Connected);
                    self.destination_event(DE::Connected);
                } else if !self.cables.up || self.destination.is_none() {
                    self.source_event(SE::Failed);
                } else {
                    return false;
                }
            }
            SA::Greet => return self.ask(0, Message::Hello, Message::Welcome),
            SA::Join => {
                let next = self.source.as_ref().map_or(0, |source| source.joined);
                if next < self.cables.count() {
                    return self.ask(next, Message::Join, Message::Joined);
                }
                self.source_event(SE::Joined);
            }
            SA::CopyDisks => {
                if let Some(moved) = self.pass(false) {
                    return moved;
                }
                let another = self.chance.one_in(2);
                self.source_event(if another { SE::RoundDone } else { SE::DisksCopied });
            }
            SA::CopyRound => {
                if let Some(moved) = self.pass(true) {
                    return moved;
                }
                let enough = self.chance.one_in(3);
                let rounds = self.source.as_mut().map_or(0, |s| {
                    s.rounds += 1;
                    s.rounds
                });
                let event = match rounds {
                    _ if enough => SE::Converged,
                    // The policy gives up.
                    9.. => SE::Failed,
                    _ => SE::RoundDone,
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
                let ok = blocks.into_iter().all(|block| self.give(Message::Blocks(vec![block])))
                    && (self.chance.one_in(2) || self.ask_round())
                    && self.give(Message::Pages)
                    && self.say(0, Message::State(self.sent()));
                self.source_event(if ok { SE::LastSent } else { SE::Failed });
            }
            SA::AwaitReady => match self.source_reads(true) {
                Some(Some(Message::RoundAck)) => self.round_answered(),
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

    /// Some of a pass; `None` when it is done, and the destination has it all. Before that nothing
    /// of the next pass goes out: on another cable it could overtake what is older.
    fn pass(&mut self, memory: bool) -> Option<bool> {
        let (passed, asked, round) =
            self.source.as_ref().map(|s| (s.passed, s.passed_asked, s.round))?;
        if !passed {
            let blocks = self.disk.read(1 + self.chance.below(3));
            let done = blocks.is_empty();
            let out = match done {
                false => {
                    let out = self.give(Message::Blocks(blocks));
                    // In the middle of a pass it goes on before the answer is there.
                    out && (round || !self.chance.one_in(3) || self.ask_round())
                }
                true => !memory || self.give(Message::Pages),
            };
            if let Some(source) = &mut self.source {
                source.passed = done;
            }
            if !out {
                self.source_event(SE::Failed);
            }
            return Some(true);
        }
        if round {
            match self.source_reads(true) {
                Some(Some(Message::RoundAck)) => self.round_answered(),
                Some(_) => self.source_event(SE::Failed),
                None => return Some(false),
            }
            return Some(true);
        }
        let source = self.source.as_mut()?;
        if asked {
            (source.passed, source.passed_asked) = (false, false);
            return None;
        }
        source.passed_asked = true;
        if !self.ask_round() {
            self.source_event(SE::Failed);
        }
        Some(true)
    }

    fn ask_round(&mut self) -> bool {
        if let Some(source) = &mut self.source {
            assert!(!source.round, "asked twice");
            source.round = true;
        }
        self.say(0, Message::Round(self.sent()))
    }

    fn round_answered(&mut self) {
        if let Some(source) = &mut self.source {
            assert!(std::mem::take(&mut source.round), "an answer to nothing");
        }
    }

    /// A question on a new connection, and its answer.
    fn ask(&mut self, cable: usize, question: Message, answer: Message) -> bool {
        let asked = self.source.as_ref().is_some_and(|source| source.asked);
        if !asked {
            if self.say(cable, question) {
                if let Some(source) = &mut self.source {
                    source.asked = true;
                }
            } else {
                self.source_event(SE::Failed);
            }
            return true;
        }
        match self.cables.read(cable, false, false, &mut self.chance) {
            Some(Some(message)) if message == answer => {
                if cable == 0 {
                    self.source_event(SE::Welcomed);
                } else if let Some(source) = &mut self.source {
                    (source.joined, source.asked) = (cable + 1, false);
                }
            }
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
        let asked = self.source.as_ref().is_some_and(|source| source.asked);
        if !asked {
            assert!(self.handed_over, "COMMIT before the hand-over is on disk");
            assert!(!self.disk.open_here, "COMMIT with the disks open");
            self.commit_sent = true;
            if self.say(0, Message::Commit) {
                if let Some(source) = &mut self.source {
                    source.asked = true;
                }
            } else {
                self.source_event(SE::Failed);
            }
            return true;
        }
        match self.source_reads(false) {
            Some(Some(Message::Running)) => self.source_event(SE::RunningHeard),
            Some(_) => self.source_event(SE::Failed),
            None if self.chance.one_in(40) => self.source_event(SE::Failed),
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
        let (cut, one, source, destination, cancel) = (
            now(Fault::Cut),
            now(Fault::CutOne),
            now(Fault::KillSource),
            now(Fault::KillDestination),
            now(Fault::Cancel),
        );
        if (cut || self.chance.one_in(faults.cut)) && self.cables.up {
            self.note("the network is cut");
            self.cables.cut(None, &mut self.chance);
        }
        if one || self.chance.one_in(faults.cut_one) {
            let cable = self.chance.below(self.cables.count());
            self.note(format!("cable {cable} is cut"));
            self.cables.cut(Some(cable), &mut self.chance);
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
            self.cables.connected = false;
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
        self.cables.connected = false;
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
