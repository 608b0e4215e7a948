//! Members, clients and faults in one seeded queue of events.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::AddAssign;
use std::sync::Arc;

use drover_controller::raft::{
    Claim, Core, Identity, Input, Limits, Options, Output, SnapshotJob, Waiter,
};
use drover_controller::store::{CommitError, Engine, Family, Record, Table, Txn, Versioned, View};
use raft::eraftpb::{Message, MessageType, Snapshot};
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};

use super::Settings;
use super::disk::SimDisk;
use super::linearizable::{self, Action, Operation};
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

    // Faults

    fn fault(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        let id = self.rng.random_range(1..=self.settings.members);
        match self.rng.random_range(0..12) {
            0..=2 => self.crash(id),
            3 => {
                for id in 1..=self.settings.members {
                    self.crash(id);
                }
            }
            4..=6 => {
                let writes = self.rng.random_range(0..6);
                self.members[&id].disk.fail_in(writes);
            }
            7..=10 => {
                self.network.change(self.settings.members, &mut self.rng);
                self.trace(|| "the network changes".into());
            }
            _ => self.input(id, Input::TransferLeadership)?,
        }
        let next = self.now + self.rng.random_range(200..2_500);
        self.at(next, Event::Fault);
        Ok(())
    }

    fn end_faults(&mut self) -> Result<(), String> {
        self.calm = true;
        self.network.calm();
        for id in 1..=self.settings.members {
            self.members[&id].disk.fail_in(u32::MAX);
            if self.members[&id].core.is_none() {
                self.start(id)?;
            }
        }
        self.trace(|| "the faults are over".into());
        Ok(())
    }

    // Clients

    fn client(&mut self, client: usize) -> Result<(), String> {
        if client >= self.clients.len() {
            return Ok(());
        }
        let operation = self.begin(client);
        self.send_operation(operation)
    }

    fn send_operation(&mut self, operation: usize) -> Result<(), String> {
        let live = &self.history[operation];
        if live.over {
            return Ok(());
        }
        let key = live.key.to_string();
        let id = self.rng.random_range(1..=self.settings.members);
        let put = |value| Txn::new().put(&Register { key: key.clone(), value });
        let input = match live.action {
            Action::Read(_) => Input::Read { waiter: Waits(operation) },
            Action::Write(value) => {
                Input::Propose { command: put(value).encode(), waiter: Waits(operation) }
            }
            Action::Swap { new, .. } => {
                let guard = match &live.swap_from {
                    Some(row) => Txn::new().unchanged(row),
                    None => Txn::new().absent::<Register>(&key),
                };
                let command = guard.and(put(new)).encode();
                Input::Propose { command, waiter: Waits(operation) }
            }
        };
        if self.members[&id].core.is_none() {
            let again = self.now + 50;
            self.at(again, Event::Send { operation });
            return Ok(());
        }
        self.history[operation].sent = true;
        self.input(id, input)
    }

    fn begin(&mut self, client: usize) -> usize {
        let key = self.rng.random_range(0..KEYS);
        let kind = self.rng.random_range(0..10);
        self.next_value += 1;
        let seen = self.clients[client].seen.get(&key).cloned();
        let (action, swap_from) = match (kind, seen) {
            (0..=3, _) => (Action::Write(self.next_value), None),
            (4..=5, Some(row)) => {
                let old = row.as_ref().map(|row| row.value.value);
                (Action::Swap { old, new: self.next_value, done: false }, row)
            }
            _ => (Action::Read(None), None),
        };
        let operation = self.history.len();
        self.history.push(Live {
            key,
            client,
            start: self.now,
            end: None,
            action,
            swap_from,
            sent: false,
            over: false,
            never: false,
        });
        self.at(self.now + PATIENCE_MS, Event::GiveUp { operation });
        operation
    }

    fn committed(
        &mut self,
        operation: usize,
        result: Result<u64, CommitError>,
    ) -> Result<(), String> {
        if self.history[operation].over {
            return Ok(());
        }
        let done = match result {
            Ok(_) => true,
            Err(CommitError::Guard { .. }) => false,
            Err(CommitError::NotLeader { .. } | CommitError::Busy) => {
                // Surely not written: the client asks elsewhere.
                self.history[operation].sent = false;
                let again = self.now + self.rng.random_range(1..60);
                self.at(again, Event::Send { operation });
                return Ok(());
            }
            Err(error) => return Err(format!("operation {operation}: {error}")),
        };
        match &mut self.history[operation].action {
            Action::Swap { done: was_done, .. } => *was_done = done,
            Action::Write(_) if done => {}
            action => return Err(format!("{action:?} ended as done: {done}")),
        }
        if done {
            self.summary.acknowledged += 1;
        } else {
            self.summary.refused += 1;
        }
        self.end(operation);
        Ok(())
    }

    fn read(&mut self, id: u64, operation: usize) {
        if self.history[operation].over {
            return;
        }
        let Some(core) = &self.members[&id].core else { return };
        let view = View::from(core.state().clone());
        let (key, client) = (self.history[operation].key, self.history[operation].client);
        let row = view.get::<Register>(&key.to_string());
        self.history[operation].action = Action::Read(row.as_ref().map(|row| row.value.value));
        if let Some(client) = self.clients.get_mut(client) {
            client.seen.insert(key, row);
        }
        self.summary.reads += 1;
        self.end(operation);
    }

    fn end(&mut self, operation: usize) {
        let live = &mut self.history[operation];
        live.end = Some(self.now);
        live.over = true;
        let (client, what) =
            (live.client, format!("{operation} on {}: {:?}", live.key, live.action));
        self.next(client);
        self.trace(|| what);
    }

    fn give_up(&mut self, operation: usize) {
        let live = &mut self.history[operation];
        if live.over {
            return;
        }
        live.over = true;
        // A read that was not answered, or a write that nobody took, is nothing at all.
        live.never = !live.sent || matches!(live.action, Action::Read(_));
        let client = live.client;
        self.summary.unknown += 1;
        self.next(client);
    }

    fn next(&mut self, client: usize) {
        if client < self.clients.len() {
            let next = self.now + self.rng.random_range(1..400);
            self.at(next, Event::Client { client });
        }
    }

    // Checks

    fn check_applied(&mut self, id: u64, index: u64, found: (u64, u64)) -> Result<(), String> {
        self.summary.applied += 1;
        let known = *self.applied.entry(index).or_insert(found);
        if known != found {
            return Err(format!(
                "member {id} applied index {index} as (term, hash) {found:x?}, another {known:x?}"
            ));
        }
        Ok(())
    }

    fn check_leader(&mut self, id: u64, term: u64) -> Result<(), String> {
        let known = *self.leaders.entry(term).or_insert_with(|| {
            self.summary.leaders += 1;
            id
        });
        if known != id {
            return Err(format!("members {known} and {id} lead term {term}"));
        }
        self.trace(|| format!("member {id} leads term {term}"));
        Ok(())
    }

    /// All members have applied the same, and their change histories have no gap.
    fn check_equal(&self) -> Result<(), String> {
        let mut found = Vec::new();
        for (id, member) in &self.members {
            let core = member.core.as_ref().ok_or_else(|| format!("member {id} is down"))?;
            found.push((core.applied().0, core.state().revision(), core.state().content_hash()));
            let (first, last) = core.log_range();
            if last + 1 - first > LIMITS.log_entries_max + 5 {
                return Err(format!("member {id} keeps the log from {first} to {last}"));
            }
            self.check_changes(*id, core.state().revision())?;
        }
        found.dedup();
        if found.len() != 1 {
            return Err(format!("members differ (index, revision, hash): {found:x?}"));
        }
        Ok(())
    }

    fn check_changes(&self, id: u64, revision: u64) -> Result<(), String> {
        let rows = self.members[&id]
            .disk
            .scan(Family::Events, &[], usize::MAX)
            .map_err(|e| e.to_string())?;
        let revisions: Vec<_> =
            rows.iter().map(|(key, _)| u64::from_be_bytes(key[..].try_into().unwrap())).collect();
        let expected: Vec<_> = (revision + 1 - revisions.len() as u64..=revision).collect();
        if revisions != expected {
            return Err(format!("member {id} at {revision} keeps changes {revisions:?}"));
        }
        let most = LIMITS.history_revisions + LIMITS.history_stride;
        if revisions.len() as u64 > most {
            return Err(format!("member {id} keeps {} revisions", revisions.len()));
        }
        Ok(())
    }

    fn check_history(&self) -> Result<(), String> {
        for key in 0..KEYS {
            let operations: Vec<_> = self
                .history
                .iter()
                .filter(|live| live.key == key && !live.never)
                .filter(|live| live.end.is_some() || !matches!(live.action, Action::Read(_)))
                .map(|live| Operation { start: live.start, end: live.end, action: live.action })
                .collect();
            if !linearizable::check(&operations) {
                return Err(format!("key {key} is not linearizable: {operations:#?}"));
            }
        }
        Ok(())
    }
}
