//! The migration's two state machines under a deterministic simulator.
//!
//! A seed decides the order of everything: whose step is next, when a message arrives, when the
//! cable is cut, when a side is killed, what a disk refuses, when the controller acts. After each
//! step the invariants are checked:
//!
//! - I1: never two machines that run. More strictly: never two sides that *may* resume by
//!   themselves.
//! - I5: a failure before the hand-over ends with the source running, and with a destination that
//!   will never run.
//! - Nothing is stuck: when nothing more can happen, each side is in a state that ends, or waits
//!   for the controller, and the controller's decision brings the guest back unless its only copy
//!   was killed.
//!
//! `SIM_SEED=n` replays one seed, `SIM_SEEDS=n` tries that many.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

use std::collections::VecDeque;

use drover_hv::migration::destination_machine::{
    DestinationAction as DA, DestinationEvent as DE, DestinationMachine, DestinationState as DS,
};
use drover_hv::migration::source_machine::{
    SourceAction as SA, SourceEvent as SE, SourceMachine, SourceState as SS,
};

/// A source of chance that replays.
#[derive(Clone)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
    fn one_in(&mut self, n: usize) -> bool {
        n > 0 && self.below(n) == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    Hello,
    Welcome,
    Pages,
    State,
    Ready,
    Commit,
    Running,
    Abort,
}

/// What may go wrong in a run; `0` never, else once in so many steps.
#[derive(Debug, Clone, Copy, Default)]
struct Faults {
    cut: usize,
    kill_source: usize,
    kill_destination: usize,
    cancel: usize,
    disk: usize,
    restore: usize,
    /// Fires exactly at this step: for going through all of them.
    at: Option<(usize, Fault)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Cut,
    KillSource,
    KillDestination,
    Cancel,
}

struct Source {
    machine: SourceMachine,
    action: Option<SA>,
    /// Half done: the message of a two-part action is out.
    sent: bool,
    runs: bool,
    rounds: usize,
}

struct Destination {
    machine: DestinationMachine,
    action: Option<DA>,
    said_ready: bool,
    runs: bool,
}

struct World {
    chance: Chance,
    faults: Faults,
    steps: usize,
    source: Option<Source>,
    destination: Option<Destination>,
    to_destination: VecDeque<Message>,
    to_source: VecDeque<Message>,
    connected: bool,
    link_up: bool,
    /// handover.json is on the source's disk.
    handed_over: bool,
    commit_sent: bool,
    cancelled: bool,
    moved: bool,
    trace: Vec<String>,
}

impl World {
    fn new(seed: u64, faults: Faults) -> Self {
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
        let before_line =
            !matches!(action, SA::Commit | SA::Resume | SA::Finish | SA::WriteHandover);
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
            SA::CopyRound => {
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
                let saved = !self.chance.one_in(self.faults.restore * 2);
                self.source_event(if saved { SE::Stopped } else { SE::Failed });
            }
            SA::SendLast => {
                let ok = self.send(true, Message::Pages) && self.send(true, Message::State);
                self.source_event(if ok { SE::LastSent } else { SE::Failed });
            }
            SA::AwaitReady => match self.source_reads() {
                Some(Some(Message::Ready)) => self.source_event(SE::ReadyHeard),
                Some(_) => self.source_event(SE::Failed),
                None if self.chance.one_in(40) => self.source_event(SE::Failed),
                None => return false,
            },
            SA::WriteHandover => self.write_handover(),
            SA::Commit => return self.commit(),
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
            let unclear = self.chance.one_in(2);
            // Unclear: the file may be there or not.
            self.handed_over = unclear && self.chance.one_in(2);
            self.source_event(if unclear { SE::HandoverUnclear } else { SE::HandoverWithdrawn });
        } else {
            self.handed_over = true;
            self.source_event(SE::HandoverWritten);
        }
    }

    fn commit(&mut self) -> bool {
        let sent = self.source.as_ref().is_some_and(|source| source.sent);
        if !sent {
            assert!(self.handed_over, "COMMIT before the hand-over is on disk");
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
            DA::AwaitCommit => return self.await_commit(),
            DA::AwaitController => return false,
            DA::Resume => {
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
            self.source = None;
            self.connected = false;
        }
        if (destination || self.chance.one_in(faults.kill_destination))
            && self.destination.is_some()
        {
            self.note("the destination is killed");
            self.destination = None;
            self.connected = false;
        }
        let closed = self.handed_over || self.commit_sent;
        if (cancel || self.chance.one_in(faults.cancel)) && !closed {
            self.note("cancelled");
            self.cancelled = true;
        }
    }

    /// Runs until nothing happens any more.
    fn run(&mut self) {
        let mut idle = 0;
        while idle < 200 {
            self.steps += 1;
            assert!(self.steps < 5000, "it does not end");
            self.fault();
            let source_first = self.chance.one_in(2);
            let moved = (source_first && self.step_source())
                || self.step_destination()
                || (!source_first && self.step_source());
            idle = if moved { 0 } else { idle + 1 };
            self.check();
        }
        self.check_end();
    }

    fn source_runs(&self) -> bool {
        self.source.as_ref().is_some_and(|source| source.runs)
    }

    fn destination_runs(&self) -> bool {
        self.destination.as_ref().is_some_and(|destination| destination.runs)
    }

    /// The invariants of every moment.
    fn check(&self) {
        assert!(!(self.source_runs() && self.destination_runs()), "I1: the guest runs twice");
        // Who may resume without the controller: the source before the line, the destination when
        // COMMIT was sent. Both at once would be a race for the guest.
        let source_may = self.source.as_ref().is_some_and(|source| {
            !matches!(source.machine.state(), SS::Committing | SS::HandedOver | SS::Succeeded)
        });
        let destination_may = self.commit_sent || self.moved;
        assert!(!(source_may && destination_may), "I1: both sides may resume");
    }

    /// The invariants of the end, and the controller's part.
    fn check_end(&mut self) {
        let source = self.source.as_ref().map(|source| source.machine.state());
        let destination = self.destination.as_ref().map(|d| d.machine.state());
        let ended = [SS::Succeeded, SS::Failed, SS::HandedOver];
        assert!(source.is_none_or(|state| ended.contains(&state)), "stuck: source in {source:?}");
        let ended = [DS::Running, DS::Failed, DS::Ready];
        assert!(
            destination.is_none_or(|state| ended.contains(&state)),
            "stuck: destination in {destination:?}"
        );
        match source {
            Some(SS::Failed) => {
                assert!(self.source_runs(), "I5: the source failed in time and does not run");
                assert_ne!(destination, Some(DS::Running));
            }
            Some(SS::Succeeded) => {
                let alive = self.destination.is_some();
                assert!(!alive || self.destination_runs(), "moved, and runs nowhere");
            }
            _ => {}
        }
        self.decide(source, destination);
    }

    /// The controller: ends the one side for certain, then lets the other take over.
    fn decide(&mut self, source: Option<SS>, destination: Option<DS>) {
        if destination == Some(DS::Ready) && !matches!(source, Some(SS::Failed)) {
            self.source = None;
            self.destination_event(DE::TakeOver);
            assert!(self.step_destination());
            assert!(self.destination_runs());
        } else if source == Some(SS::HandedOver) && destination != Some(DS::Running) && !self.moved
        {
            // Only when the destination is gone and never ran.
            self.destination = None;
            self.source_event(SE::TakeOver);
            assert!(self.step_source());
            assert!(self.source_runs());
        }
        assert!(!(self.source_runs() && self.destination_runs()), "I1 after the decision");
    }
}

fn run(seed: u64, faults: Faults) -> (Option<SS>, Option<DS>, usize) {
    let mut world = World::new(seed, faults);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run()));
    if let Err(panic) = result {
        eprintln!("seed {seed} ({faults:?}); replay with SIM_SEED={seed}");
        eprintln!("{}", world.trace.join("\n"));
        std::panic::resume_unwind(panic);
    }
    let source = world.source.as_ref().map(|source| source.machine.state());
    let destination = world.destination.as_ref().map(|d| d.machine.state());
    (source, destination, world.steps)
}

fn seeds() -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    match number("SIM_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SIM_SEEDS").unwrap_or(3000)).collect(),
    }
}

#[test]
fn without_faults_every_migration_ends_well() {
    let mut moved = 0;
    for seed in seeds() {
        let (source, destination, _) = run(seed, Faults::default());
        match source {
            Some(SS::Succeeded) => {
                assert_eq!(destination, Some(DS::Running));
                moved += 1;
            }
            // The policy gave up, or an answer took too long.
            Some(SS::Failed) => assert_ne!(destination, Some(DS::Running), "seed {seed}"),
            _ => assert_eq!(destination, Some(DS::Running), "seed {seed}: {source:?}"),
        }
    }
    assert!(moved * 2 > seeds().len(), "only {moved} moved");
}

#[test]
fn any_storm_of_faults_keeps_the_invariants() {
    let mut endings = std::collections::BTreeMap::new();
    for seed in seeds() {
        let mut chance = Chance(seed ^ 0xfau64);
        let mut pick = || [0, 0, 20, 60, 200][chance.below(5)];
        let faults = Faults {
            cut: pick(),
            kill_source: pick(),
            kill_destination: pick(),
            cancel: pick(),
            disk: [0, 2, 10][(seed % 3) as usize],
            restore: [0, 3, 10][(seed / 3 % 3) as usize],
            at: None,
        };
        let (source, destination, _) = run(seed, faults);
        *endings.entry(format!("{source:?}/{destination:?}")).or_insert(0) += 1;
    }
    // The storm reaches every corner, or it shows nothing.
    if seeds().len() > 1000 {
        for corner in [
            "Some(Succeeded)/Some(Running)",
            "Some(Failed)/Some(Failed)",
            "Some(Failed)/Some(Ready)",
            "Some(Owner)/None",
            "None/Some(Running)",
            "None/None",
        ] {
            assert!(endings.contains_key(corner), "never saw {corner}: {endings:#?}");
        }
    }
}

/// Each fault at each step of a migration, in many orders.
#[test]
fn every_fault_at_every_step_keeps_the_invariants() {
    for seed in seeds().into_iter().take(100) {
        let (_, _, steps) = run(seed, Faults::default());
        for step in 1..=steps {
            for fault in [Fault::Cut, Fault::KillSource, Fault::KillDestination, Fault::Cancel] {
                run(seed, Faults { at: Some((step, fault)), ..Faults::default() });
            }
        }
    }
}
