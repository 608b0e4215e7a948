//! Members, clients and faults in one seeded queue of events. Here are the queue and the members.

mod checks;
mod clients;
mod faults;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::AddAssign;
use std::sync::Arc;

use drover_controller::raft::{
    Claim, Core, Identity, Input, Limits, Options, Output, SnapshotJob, Waiter,
};
use drover_controller::store::{Record, Table, Versioned};
use raft::eraftpb::{Message, MessageType, Snapshot};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Settings;
use super::disk::SimDisk;
use super::linearizable::Action;
use super::network::Network;

const CLIENTS: usize = 5;
const KEYS: u64 = 4;
/// A client gives an operation up after this.
const PATIENCE_MS: u64 = 3_000;

/// Small, so that compaction and snapshots happen all the time.
const LIMITS: Limits = Limits {
    log_entries_keep: 10,
    log_entries_max: 25,
    log_bytes_max: 1 << 20,
    history_revisions: 40,
    history_stride: 5,
    reads_waiting_max: 1000,
};

/// The rows that the clients write.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Register {
    #[prost(string, tag = "1")]
    pub(crate) key: String,
    #[prost(uint64, tag = "2")]
    pub(crate) value: u64,
}

impl Record for Register {
    const TABLE: Table = Table::Events;
    fn key(&self) -> String {
        self.key.clone()
    }
}

/// The client's operation that waits for an answer.
pub(crate) struct Waits(usize);

impl Waiter for Waits {
    fn is_abandoned(&self) -> bool {
        false
    }
}

type SimCore = Core<Waits, Waits>;

enum Event {
    Tick { member: u64, life: u64 },
    Turn { member: u64, life: u64 },
    Deliver { from: u64, to: u64, connection: u64, message: Box<Message> },
    SnapshotArrives { from: u64, life: u64, to: u64, message: Box<Message> },
    SnapshotBuilt { member: u64, life: u64, snapshot: Box<Snapshot> },
    Client { client: usize },
    Send { operation: usize },
    GiveUp { operation: usize },
    Fault,
    Restart { member: u64 },
}

struct Member {
    disk: Arc<SimDisk>,
    core: Option<SimCore>,
    /// Counts its processes.
    life: u64,
    turn_due: bool,
    tick_ms: u64,
}

#[derive(Default)]
struct Client {
    /// What it read last, for the next swap.
    seen: BTreeMap<u64, Option<Versioned<Register>>>,
}

/// An operation as it goes.
struct Live {
    key: u64,
    client: usize,
    start: u64,
    end: Option<u64>,
    action: Action,
    swap_from: Option<Versioned<Register>>,
    /// Sent to a member that may have proposed it.
    sent: bool,
    /// Nobody knows what became of it, or it never happened at all.
    over: bool,
    never: bool,
}

/// What happened, in numbers.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Summary {
    pub(crate) acknowledged: u64,
    pub(crate) refused: u64,
    pub(crate) unknown: u64,
    pub(crate) reads: u64,
    pub(crate) leaders: u64,
    pub(crate) crashes: u64,
    pub(crate) crashes_in_writes: u64,
    pub(crate) snapshots: u64,
    pub(crate) applied: u64,
    pub(crate) events: u64,
    /// Of everything that happened, in order.
    pub(crate) trace_hash: u64,
}

impl AddAssign for Summary {
    fn add_assign(&mut self, other: Self) {
        self.acknowledged += other.acknowledged;
        self.refused += other.refused;
        self.unknown += other.unknown;
        self.reads += other.reads;
        self.leaders += other.leaders;
        self.crashes += other.crashes;
        self.crashes_in_writes += other.crashes_in_writes;
        self.snapshots += other.snapshots;
        self.applied += other.applied;
        self.events += other.events;
        self.trace_hash ^= other.trace_hash;
    }
}

/// One run.
pub(crate) struct World {
    settings: Settings,
    rng: SmallRng,
    now: u64,
    calm: bool,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    sequence: u64,
    members: BTreeMap<u64, Member>,
    network: Network,
    clients: Vec<Client>,
    history: Vec<Live>,
    next_value: u64,
    /// What was found at each index, by whoever came first.
    applied: BTreeMap<u64, (u64, u64)>,
    leaders: BTreeMap<u64, u64>,
    summary: Summary,
}

impl World {
    pub(crate) fn new(settings: Settings) -> Self {
        let mut rng = SmallRng::seed_from_u64(settings.seed);
        let network = Network::new(&mut rng);
        let members = (1..=settings.members).map(|id| {
            let disk = Arc::new(SimDisk::lying(settings.disks_lie));
            let tick_ms = rng.random_range(95..105);
            (id, Member { disk, core: None, life: 0, turn_due: false, tick_ms })
        });
        let members = members.collect();
        let clients = (0..CLIENTS).map(|_| Client::default()).collect();
        Self {
            settings,
            rng,
            now: 0,
            calm: false,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            sequence: 0,
            members,
            network,
            clients,
            history: Vec::new(),
            next_value: 0,
            applied: BTreeMap::new(),
            leaders: BTreeMap::new(),
            summary: Summary::default(),
        }
    }

    /// Runs the faults, then the calm, and checks.
    pub(crate) fn run(mut self) -> Result<Summary, String> {
        for id in 1..=self.settings.members {
            self.start(id)?;
        }
        for client in 0..CLIENTS {
            self.at(self.now + 1, Event::Client { client });
        }
        self.at(2_000, Event::Fault);
        self.run_until(self.settings.faults_ms)?;
        self.end_faults()?;
        let calm = self.now;
        let acknowledged = self.summary.acknowledged;
        self.run_until(calm + self.settings.calm_ms)?;
        if self.summary.acknowledged < acknowledged + 10 {
            return Err(format!("the faults are over since {calm} ms, and nothing is written"));
        }
        self.settle()?;
        self.check_equal()?;
        self.check_history()?;
        Ok(self.summary)
    }

    fn run_until(&mut self, end: u64) -> Result<(), String> {
        while let Some(Reverse((at, sequence))) = self.queue.peek().copied() {
            if at > end {
                break;
            }
            self.queue.pop();
            self.now = at;
            let event = self.events.remove(&sequence).unwrap();
            self.summary.events += 1;
            self.happen(event)?;
        }
        self.now = end;
        Ok(())
    }

    /// The clients stop; what is under way ends.
    fn settle(&mut self) -> Result<(), String> {
        self.clients.clear();
        self.run_until(self.now + 2 * PATIENCE_MS)
    }

    fn at(&mut self, time: u64, event: Event) {
        self.sequence += 1;
        self.queue.push(Reverse((time, self.sequence)));
        self.events.insert(self.sequence, event);
    }

    fn trace(&mut self, what: impl FnOnce() -> String) {
        let text = what();
        for byte in text.bytes().chain(self.now.to_be_bytes()) {
            self.summary.trace_hash =
                (self.summary.trace_hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
        if self.settings.trace {
            println!("{:>7} {text}", self.now);
        }
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Tick { member, life } => {
                if self.lives(member, life) {
                    self.input(member, Input::Tick)?;
                    let tick_ms = self.members[&member].tick_ms;
                    self.at(self.now + tick_ms, Event::Tick { member, life });
                }
            }
            Event::Turn { member, life } => {
                if self.lives(member, life) {
                    self.turn(member)?;
                }
            }
            Event::Deliver { from, to, connection, message } => {
                if self.network.arrives((from, to), connection) {
                    self.input(to, Input::Message(*message))?;
                }
            }
            Event::SnapshotArrives { from, life, to, message } => {
                let arrived = self.members[&to].core.is_some() && self.rng.random_bool(0.8);
                if arrived {
                    self.summary.snapshots += 1;
                    self.input(to, Input::Message(*message))?;
                }
                if self.lives(from, life) {
                    self.input(from, Input::SnapshotSent { to, arrived })?;
                }
            }
            Event::SnapshotBuilt { member, life, snapshot } => {
                if self.lives(member, life) {
                    self.input(member, Input::SnapshotBuilt(*snapshot))?;
                }
            }
            Event::Client { client } => self.client(client)?,
            Event::Send { operation } => self.send_operation(operation)?,
            Event::GiveUp { operation } => self.give_up(operation),
            Event::Fault => self.fault()?,
            Event::Restart { member } => {
                if self.members[&member].core.is_none() {
                    self.start(member)?;
                }
            }
        }
        Ok(())
    }

    // Members

    fn lives(&self, member: u64, life: u64) -> bool {
        let member = &self.members[&member];
        member.core.is_some() && member.life == life
    }

    fn start(&mut self, id: u64) -> Result<(), String> {
        let (nonce, seed) = (self.rng.random(), self.rng.random());
        let members: BTreeMap<u64, String> =
            (1..=self.settings.members).map(|id| (id, format!("member-{id}"))).collect();
        let claim = Claim { cluster_id: "sim".into(), member: id, members: members.clone() };
        let member = self.members.get_mut(&id).unwrap();
        let identity = Identity::establish(member.disk.as_ref(), &claim, &format!("disk-{id}"))
            .map_err(|e| format!("member {id}: {e}"))?;
        let options = Options { identity, members, nonce, seed, limits: LIMITS };
        let core = Core::open(member.disk.clone(), options)
            .map_err(|e| format!("member {id} does not start: {e}"))?;
        let (index, _) = core.applied();
        member.core = Some(core);
        member.life += 1;
        member.turn_due = false;
        let life = member.life;
        for other in 1..=self.settings.members {
            self.network.reset((id, other));
        }
        self.at(self.now + 1, Event::Tick { member: id, life });
        self.trace(|| format!("member {id} starts at index {index}"));
        Ok(())
    }

    fn crash(&mut self, id: u64) {
        let member = self.members.get_mut(&id).unwrap();
        if member.core.take().is_none() {
            return;
        }
        let keep = self.rng.random_range(0..=member.disk.unsynced());
        member.disk.crash(keep);
        self.summary.crashes += 1;
        for other in 1..=self.settings.members {
            self.network.reset((other, id));
            // What it had sent may still be in the wires.
            if self.rng.random_bool(0.5) {
                self.network.reset((id, other));
            }
        }
        let back = self.now + self.rng.random_range(10..4_000);
        self.at(back, Event::Restart { member: id });
        self.trace(|| format!("member {id} dies"));
        // Whoever waits for it learns nothing.
    }

    fn input(&mut self, id: u64, input: Input<Waits, Waits>) -> Result<(), String> {
        let member = self.members.get_mut(&id).unwrap();
        let Some(core) = &mut member.core else { return Ok(()) };
        let mut outputs = Vec::new();
        core.step(input, &mut |output| outputs.push(output))
            .map_err(|e| format!("member {id}: {e}"))?;
        if !member.turn_due {
            // What arrives until then shares the turn.
            member.turn_due = true;
            let life = member.life;
            let due = self.now + self.rng.random_range(0..3);
            self.at(due, Event::Turn { member: id, life });
        }
        self.outputs(id, outputs)
    }

    fn turn(&mut self, id: u64) -> Result<(), String> {
        let member = self.members.get_mut(&id).unwrap();
        member.turn_due = false;
        let Some(core) = &mut member.core else { return Ok(()) };
        let mut outputs = Vec::new();
        let result = core.turn(&mut |output| outputs.push(output));
        self.outputs(id, outputs)?;
        if let Err(error) = result {
            if !error.to_string().contains("simulated") {
                return Err(format!("member {id}: {error}"));
            }
            self.summary.crashes_in_writes += 1;
            self.crash(id);
        }
        Ok(())
    }

    fn outputs(&mut self, id: u64, outputs: Vec<Output<Waits, Waits>>) -> Result<(), String> {
        for output in outputs {
            match output {
                Output::Send(message) => self.send(id, message)?,
                Output::Applied { index, term, content_hash } => {
                    self.check_applied(id, index, (term, content_hash))?;
                }
                Output::Publish(_) => {}
                Output::Committed { waiter, result } => self.committed(waiter.0, result)?,
                Output::Read { waiter, result } => {
                    if result.is_ok() {
                        self.read(id, waiter.0);
                    }
                }
                Output::Leadership(now) => {
                    if now.leader == Some(id) {
                        self.check_leader(id, now.term)?;
                    }
                }
                Output::Build(job) => self.build(id, job),
            }
        }
        Ok(())
    }

    fn send(&mut self, from: u64, message: Message) -> Result<(), String> {
        let to = message.to;
        let life = self.members[&from].life;
        if message.msg_type() == MessageType::MsgSnapshot {
            let at = self.now + self.rng.random_range(1..300);
            let message = Box::new(message);
            self.at(at, Event::SnapshotArrives { from, life, to, message });
            return Ok(());
        }
        let Some(ticket) = self.network.send(self.now, (from, to), &mut self.rng) else {
            // Not within the turn that sends: the core is told afterwards.
            let member = self.members.get_mut(&from).unwrap();
            if let Some(core) = &mut member.core {
                core.step(Input::Unreachable(to), &mut |_| {})
                    .map_err(|e| format!("member {from}: {e}"))?;
            }
            return Ok(());
        };
        let connection = ticket.connection;
        for _ in 0..=usize::from(ticket.twice) {
            let message = Box::new(message.clone());
            self.at(ticket.at, Event::Deliver { from, to, connection, message });
        }
        Ok(())
    }

    fn build(&mut self, member: u64, job: SnapshotJob) {
        let life = self.members[&member].life;
        let at = self.now + self.rng.random_range(0..200);
        let snapshot = Box::new(job.run());
        self.at(at, Event::SnapshotBuilt { member, life, snapshot });
    }
}
