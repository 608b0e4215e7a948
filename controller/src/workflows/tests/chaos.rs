//! Random faults over the real workflows, in three hosts that keep an agent's rules.
//!
//! A seed decides everything: which message is lost, which host crashes, when leadership moves,
//! where the switch-over of a migration breaks. After each step no domain runs twice (I1), and
//! what runs has every write of its disk that any node has acknowledged (since the snapshot that it
//! was put back to), and a guest that was saved is not lost; when the faults end, every operation
//! ends (I3), every domain that should run does, and no node holds a volume or a snapshot that is
//! not its own.
//!
//! In every other world hosts `a` and `b` share their pool: what one of them writes, takes or
//! removes is so for both.

mod operator;
mod shared;

use std::collections::{BTreeMap, BTreeSet};

use drover_proto::agent::v1::{MigrationProgress as P, MigrationRole, ObservedPool};
use drover_proto::v1::{
    Disk, DomainState, ExitReason, OperationKind, OperationState, PoolState, PowerState,
};

use super::agents::{Host, Vmm, VmmState};
use super::lab::{Lab, MIB, hello, new_domain, split};
use crate::model::{
    ImageRecord, NodeId, NodeObservation, OperationRecord, VolumeRecord, is_at_rest,
};
use crate::store::Txn;
use crate::workflows::{begin, nodes, plan};

const NODES: [&str; 3] = ["a", "b", "c"];
const SNAPSHOTS: [&str; 3] = ["s1", "s2", "s3"];
const DOMAINS: [&str; 3] = ["one", "two", "three"];
/// Each takes some 20 ms; DROVER_CHAOS_SEEDS=n runs more, DROVER_CHAOS_SEED=n that one.
const SEEDS: u64 = 100;
const STEPS: usize = 400;

/// SplitMix64: a few lines, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }
    /// Once in `n`.
    fn once_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

struct Chaos {
    seed: u64,
    /// No domain is made or deleted: these are all, in the order of `DOMAINS`.
    uids: [String; 3],
    lab: Lab,
    hosts: Vec<Host>,
    /// Whether the agent's session is open, and the revision it has taken in.
    sessions: Vec<Option<u64>>,
    /// No packets between the controller and the host until then.
    cut_until: [u64; 3],
    /// No packets between hosts until then.
    wire_until: u64,
    dice: Dice,
    faults: bool,
    log: Vec<String>,
    /// How many writes each disk has seen, by the volume's uid.
    writes: BTreeMap<String, u64>,
    /// Saved guests that somebody did not want any more, by the volume's uid.
    unwanted: BTreeSet<String>,
    /// The rows as they were noted last.
    last: BTreeMap<String, String>,
}

impl Chaos {
    fn new(seed: u64) -> Self {
        let mut lab = Lab::new();
        let shared = seed.is_multiple_of(2);
        let hosts = NODES.map(|name| {
            let mut host = Host::booted();
            host.is_shared = shared && name != "c";
            host
        });
        for name in NODES {
            let (id, size_bytes) = ("ssd".to_owned(), 4096 * MIB);
            let state = PoolState::Ready.into();
            let shared_uid = if shared && name != "c" { "one pool" } else { "" }.to_owned();
            let pool = ObservedPool {
                id,
                state,
                size_bytes,
                overcommit: 1.0,
                shared_uid,
                ..Default::default()
            };
            lab.pools.insert(name.into(), vec![pool]);
            lab.hello(name, "boot-1");
        }
        lab.settle();
        let image = ImageRecord {
            id: "image".into(),
            digest: "digest".into(),
            size_bytes: MIB,
            ..ImageRecord::default()
        };
        assert!(lab.commit(&Txn::new().put(&image)));
        for (domain, node) in DOMAINS.iter().zip(NODES) {
            let mut new = new_domain(domain, Some(node));
            new.spec.disks = vec![Disk { size_bytes: MIB, ..Disk::default() }];
            lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap();
        }
        let uids = DOMAINS.map(|id| lab.domain(id).uid);
        Self {
            seed,
            uids,
            lab,
            hosts: hosts.into_iter().collect(),
            sessions: vec![None; 3],
            cut_until: [0; 3],
            wire_until: 0,
            dice: Dice(seed),
            faults: true,
            log: Vec::new(),
            writes: BTreeMap::new(),
            unwanted: BTreeSet::new(),
            last: BTreeMap::new(),
        }
    }

    fn note(&mut self, text: String) {
        self.log.push(format!("{:>8} {text}", self.lab.now.mono_ms - 1_000_000));
    }

    fn reached(&self, host: usize) -> bool {
        self.hosts[host].up && self.lab.now.mono_ms >= self.cut_until[host]
    }

    fn step(&mut self) {
        let ms = if self.faults { 50 + self.dice.below(800) } else { 1000 } as u64;
        self.lab.pass_time(ms);
        if self.faults {
            self.fault();
            self.operator();
        }
        for host in 0..3 {
            self.session(host);
        }
        self.switch_over();
        self.copy();
        for host in 0..3 {
            if self.hosts[host].up && !self.dice.once_in(4) {
                self.hosts[host].luck = self.dice.below(4);
                self.see(host);
                self.hosts[host].work();
                self.seen(host);
                self.forgive(host);
                self.check();
            }
        }
        self.leader();
        self.check();
        self.guests_write();
    }

    fn guests_write(&mut self) {
        for host in 0..3 {
            self.see(host);
            let host = &mut self.hosts[host];
            for vmm in host.vmms.values().filter(|vmm| vmm.state == VmmState::Running) {
                let writes = self.writes.entry(vmm.volume.clone()).or_default();
                *writes += 1;
                host.volumes.insert(vmm.volume.clone(), *writes);
            }
        }
        self.seen(1);
    }

    /// The leader plans once; what it decided may be outdated or come too late.
    fn leader(&mut self) {
        let world = self.lab.world();
        for row in world.domains.values() {
            let d = &row.value;
            let m = d.migration.as_ref();
            let text = format!(
                "  {}: {} on {} epoch {} {}",
                d.id,
                d.state().as_str_name(),
                d.node,
                d.epoch,
                m.map(|m| format!(
                    "{} {}→{} {}",
                    m.stage().as_str_name(),
                    m.from,
                    m.to,
                    m.to_epoch
                ))
                .unwrap_or_default()
            );
            if self.last.insert(d.id.clone(), text.clone()).as_ref() != Some(&text) {
                self.note(text);
            }
        }
        let steps = plan(&self.lab.context(&world));
        for step in steps {
            if self.faults && self.dice.once_in(12) {
                continue;
            }
            self.lab.commit(&step.txn);
        }
    }

    fn session(&mut self, host: usize) {
        let name = NODES[host];
        if !self.reached(host) {
            if self.sessions[host].take().is_some() {
                self.disconnect(host);
            }
            return;
        }
        if self.sessions[host].is_none() {
            if self.faults && self.dice.once_in(3) {
                return;
            }
            let boot = format!("boot-{}", self.hosts[host].boot);
            let (id, hello) = (NodeId::trusted(name), hello(name, &boot));
            let registered =
                self.lab.with(|cx| Ok((nodes::register(cx, &id, &hello)?.unwrap_or_default(), ())));
            registered.unwrap();
            let heard_ms = self.lab.now.mono_ms;
            let fresh = NodeObservation { connected: true, heard_ms, ..Default::default() };
            self.lab.observed.nodes.insert(id, fresh.into());
            self.sessions[host] = Some(0);
        }
        // The level arrives, and a report leaves; either may be late.
        if !self.faults || !self.dice.once_in(3) {
            let level = self.lab.level(name);
            if self.hosts[host].take(self.lab.term, level) {
                self.sessions[host] = Some(self.lab.state.revision());
            }
        }
        if !self.faults || !self.dice.once_in(3) {
            let taken_in = self.sessions[host].unwrap_or(0);
            let report = self.hosts[host].report();
            self.lab.volumes.insert(name.into(), self.hosts[host].report_volumes());
            self.lab.snapshots.insert(name.into(), self.hosts[host].report_snapshots());
            self.lab.report_knowing(name, taken_in, report);
        }
    }

    fn disconnect(&mut self, host: usize) {
        let id = NodeId::trusted(NODES[host]);
        if let Some(seen) = self.lab.observed.nodes.get_mut(&id) {
            std::sync::Arc::make_mut(seen).connected = false;
        }
    }

    fn fault(&mut self) {
        let host = self.dice.below(3);
        let now = self.lab.now.mono_ms;
        match self.dice.below(60) {
            0 if self.hosts[host].up => {
                self.note(format!("host {} crashes", NODES[host]));
                self.hosts[host].crash();
            }
            1..=6 if !self.hosts[host].up => {
                self.note(format!("host {} boots", NODES[host]));
                self.hosts[host].up = true;
                self.hosts[host].boot += 1;
                self.hosts[host].restart();
                self.sessions[host] = None;
            }
            7 => {
                self.note(format!("agent {} restarts", NODES[host]));
                self.hosts[host].restart();
                self.sessions[host] = None;
                self.disconnect(host);
            }
            8 => {
                self.note(format!("no packets to {}", NODES[host]));
                self.cut_until[host] = now + 1000 * self.dice.below(40) as u64;
            }
            9 | 10 => self.wire_until = now + 500 * self.dice.below(30) as u64,
            11 => {
                self.note("another leader".into());
                self.lab.term += 1;
                self.lab.leader_since_ms = now;
                self.lab.observed = Default::default();
                self.sessions = vec![None; 3];
            }
            12 => {
                let uids: Vec<String> = self.hosts[host].vmms.keys().cloned().collect();
                if !uids.is_empty() {
                    let uid = uids[self.dice.below(uids.len())].clone();
                    self.note(format!("a VMM on {} is killed", NODES[host]));
                    self.hosts[host].end(&uid, ExitReason::Killed);
                }
            }
            _ => {}
        }
    }

    /// Volumes of domains that do not run go from agent to agent, each at once or not at all.
    fn copy(&mut self) {
        for to in 0..3 {
            for (uid, from) in self.hosts[to].copies() {
                let wire = self.hosts[to].up && self.lab.now.mono_ms >= self.wire_until;
                let from = NODES.iter().position(|name| from == format!("{name}:7401"));
                let read = from.and_then(|from| self.hosts[from].read(&uid));
                if let Some(read) = read.filter(|_| wire)
                    && !self.dice.once_in(3)
                {
                    self.hosts[to].copied(uid, read);
                    self.seen(to);
                }
            }
        }
    }

    /// What was removed from a host is not lost while another one has it.
    fn forgive(&mut self, host: usize) {
        let lost = std::mem::take(&mut self.hosts[host].lost);
        let nowhere = |uid: &String| !self.hosts.iter().any(|host| host.has_saved(uid));
        let lost = lost.into_iter().filter(nowhere).collect();
        self.hosts[host].lost = lost;
    }

    /// What goes on between two VMMs, a step at a time; each may be the last.
    fn switch_over(&mut self) {
        for from in 0..3 {
            let uids: Vec<String> = self.hosts[from].vmms.keys().cloned().collect();
            for uid in uids {
                self.send(from, &uid);
            }
        }
    }

    fn send(&mut self, from: usize, uid: &str) {
        let Some(source) = self.hosts[from].vmms.get(uid) else { return };
        let Some(m) = source.migration.clone().filter(|m| m.role == MigrationRole::Source) else {
            return;
        };
        let ends = matches!(m.progress, P::Failed | P::Succeeded);
        if ends || self.dice.once_in(3) {
            return;
        }
        let wire = self.hosts[from].up && self.lab.now.mono_ms >= self.wire_until;
        let to = (0..3).find(|to| {
            self.hosts[*to].up
                && self.hosts[*to].vmms.get(uid).is_some_and(|vmm| {
                    vmm.migration
                        .as_ref()
                        .is_some_and(|d| d.id == m.id && d.role == MigrationRole::Destination)
                })
        });
        let life = source.life;
        let broken = !wire || to.is_none() || (self.faults && self.dice.once_in(15));
        let set_source = |hosts: &mut Vec<Host>, state: Option<VmmState>, progress: P| {
            if let Some(vmm) = hosts[from].vmms.get_mut(uid) {
                vmm.state = state.unwrap_or(vmm.state);
                if let Some(m) = &mut vmm.migration {
                    m.progress = progress;
                }
            }
        };
        if source.state == VmmState::HandedOver {
            return;
        }
        let Some(to) = to.filter(|_| !broken) else {
            // Before the hand-over: the guest goes on here, and the destination knows nothing
            // more (one that is READY waits).
            set_source(&mut self.hosts, None, P::Failed);
            return;
        };
        let Some(destination) = self.hosts[to].vmms.get_mut(uid) else { return };
        let Some(d) = destination.migration.as_mut() else { return };
        match d.progress {
            P::Listening => d.progress = P::Copying,
            P::Copying => {
                d.progress = P::Ready;
                destination.life = life;
            }
            P::Ready => {
                // The line: written down first, then COMMIT, which may be lost.
                let lost = self.faults && self.dice.once_in(3);
                set_source(&mut self.hosts, Some(VmmState::HandedOver), P::HandedOver);
                let record = self.hosts[from].records.entry(uid.to_owned()).or_default();
                record.handover = Some((m.id.clone(), m.to_epoch));
                // READY said that the disk is all there, too.
                let volume = self.hosts[to].vmms.get(uid).map(|vmm| vmm.volume.clone());
                let volume = volume.unwrap_or_default();
                let writes = self.writes.get(&volume).copied().unwrap_or_default();
                self.hosts[to].volumes.insert(volume, writes);
                self.seen(to);
                if lost {
                    self.note(format!("COMMIT of {} is lost", m.id));
                    return;
                }
                let Some(destination) = self.hosts[to].vmms.get_mut(uid) else { return };
                // Granted meanwhile, it runs already.
                if destination.state == VmmState::Incoming {
                    destination.state = VmmState::Running;
                }
                if let Some(d) = &mut destination.migration {
                    d.progress = P::Succeeded;
                }
                if !self.faults || !self.dice.once_in(4) {
                    set_source(&mut self.hosts, None, P::Succeeded);
                }
            }
            _ => set_source(&mut self.hosts, None, P::Failed),
        }
    }

    /// I1.
    fn check(&self) {
        for host in &self.hosts {
            let lost = host.lost.iter().find(|uid| !self.unwanted.contains(*uid));
            if let Some(lost) = lost.or_else(|| host.wrong.first()) {
                self.fail(&format!("a saved guest: {lost}"));
            }
        }
        for (id, uid) in DOMAINS.iter().zip(&self.uids) {
            let runs: Vec<&str> = (0..3)
                .filter(|host| {
                    let vmm: Option<&Vmm> = self.hosts[*host].vmms.get(uid);
                    vmm.is_some_and(Vmm::is_alive)
                })
                .map(|host| NODES[host])
                .collect();
            if runs.len() > 1 {
                self.fail(&format!("{id} runs on {runs:?}"));
            }
            for host in &self.hosts {
                let Some(vmm) = host.vmms.get(uid) else { continue };
                let written = self.writes.get(&vmm.volume).copied().unwrap_or_default();
                let held = host.volumes.get(&vmm.volume);
                if vmm.is_alive() && held != Some(&written) {
                    self.fail(&format!("{id} runs with {held:?} of {written} writes"));
                }
                let row = self.lab.view().get::<VolumeRecord>(&format!("{id}-0"));
                if vmm.is_alive() && row.is_none_or(|row| row.value.uid != vmm.volume) {
                    self.fail(&format!("{id} runs with a disk that was replaced"));
                }
            }
        }
    }

    /// The faults end: everything comes to rest.
    fn heal(&mut self) {
        self.faults = false;
        self.cut_until = [0; 3];
        self.wire_until = 0;
        for host in 0..3 {
            if !self.hosts[host].up {
                self.hosts[host].up = true;
                self.hosts[host].boot += 1;
                self.hosts[host].restart();
                self.sessions[host] = None;
            }
        }
        // Longer than any deadline that is set here.
        let until = self.lab.now.mono_ms + 900_000;
        loop {
            for _ in 0..60 {
                self.step();
            }
            if self.is_calm() || self.lab.now.mono_ms > until {
                break;
            }
        }
        if let Some(row) = self.lab.world().operations.values().next() {
            self.fail(&format!("an operation hangs: {:?}", row.value));
        }
        for (host, node) in self.hosts.iter().zip(NODES) {
            let held: Vec<&String> = host.volumes.keys().collect();
            let mut level = self.lab.level(node);
            if host.is_shared {
                // What is in the pool is the one's or the other's.
                let other = self.lab.level(if node == "a" { "b" } else { "a" });
                level.volumes.extend(other.volumes);
                level.snapshots.extend(other.snapshots);
                level.garbage.extend(other.garbage);
            }
            let own: BTreeSet<&String> = level.volumes.iter().map(|wanted| &wanted.uid).collect();
            if held != own.into_iter().collect::<Vec<_>>() || !level.garbage.is_empty() {
                self.fail(&format!("{node} holds {held:?}, should {level:?}"));
            }
            let parts = level.snapshots.iter().flat_map(|wanted| &wanted.parts);
            let parts: BTreeSet<&String> = parts.map(|part| &part.uid).collect();
            if host.parts.keys().collect::<BTreeSet<_>>() != parts {
                self.fail(&format!("{node} holds {:?}, should {level:?}", host.parts));
            }
        }
        for row in self.lab.world().domains.values() {
            let domain = &row.value;
            let state = domain.state();
            let runs = self
                .hosts
                .iter()
                .zip(NODES)
                .filter(|(host, _)| host.vmms.contains_key(&domain.uid))
                .map(|(_, node)| node)
                .collect::<Vec<_>>();
            let fine = match domain.desired_power() {
                PowerState::Running => {
                    state == DomainState::Running && runs == [domain.node.as_str()]
                }
                _ => is_at_rest(domain) && runs.is_empty(),
            };
            if !fine || domain.migration.is_some() || !domain.operation.is_empty() {
                self.fail(&format!("VMMs on {runs:?}, row {domain:?}"));
            }
        }
    }

    /// Nothing is under way; what is wrong now stays wrong.
    fn is_calm(&self) -> bool {
        let world = self.lab.world();
        world.operations.is_empty()
            && world.garbage.is_empty()
            && world.domains.values().all(|row| row.value.migration.is_none())
            && plan(&self.lab.context(&world)).is_empty()
    }

    fn fail(&self, what: &str) -> ! {
        let hosts = self.hosts.iter().zip(NODES).map(|(host, name)| {
            format!("{name} up {}: {:#?} {:#?}", host.up, host.records, host.vmms)
        });
        let hosts = hosts.collect::<Vec<_>>().join("\n");
        panic!("seed {}: {what}\n{}\n{hosts}", self.seed, self.log.join("\n"));
    }

    /// How many operations of each kind ended well, and how many did not. Moves of what does not
    /// run are counted by themselves (true).
    fn count(&self, sums: &mut BTreeMap<(OperationKind, bool), (usize, usize)>) {
        for row in self.lab.view().all::<OperationRecord>() {
            let stopped = row.value.migration.as_ref().is_some_and(|m| m.disk_bytes_total > 0);
            let (good, bad) = sums.entry((row.value.kind(), stopped)).or_default();
            match row.value.state() {
                OperationState::Succeeded => *good += 1,
                _ => *bad += 1,
            }
        }
    }
}

#[test]
fn whatever_happens_a_domain_runs_once_and_every_operation_ends() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let only = number("DROVER_CHAOS_SEED");
    let many = number("DROVER_CHAOS_SEEDS").unwrap_or(SEEDS);
    let seeds = only.map_or(1..=many, |seed| seed..=seed);
    let mut sums = BTreeMap::new();
    for seed in seeds {
        let mut chaos = Chaos::new(seed);
        for _ in 0..STEPS {
            chaos.step();
        }
        chaos.heal();
        chaos.count(&mut sums);
    }
    println!("succeeded, did not: {sums:?}");
    // A simulation in which nothing is done, or nothing breaks, shows nothing.
    for (kind, good_min, bad_min) in [
        ((OperationKind::MigrateDomain, false), 100, 100),
        ((OperationKind::MigrateDomain, true), 50, 50),
        ((OperationKind::ResizeDomain, false), 100, 0),
        ((OperationKind::ReinstallDomain, false), 100, 0),
        ((OperationKind::RescueDomain, false), 50, 10),
        ((OperationKind::SaveDomain, false), 50, 50),
        ((OperationKind::CreateSnapshot, false), 100, 10),
        ((OperationKind::RestoreSnapshot, false), 20, 0),
        ((OperationKind::CreateVolume, false), 20, 0),
    ] {
        let (good, bad) = sums.get(&kind).copied().unwrap_or_default();
        assert!(only.is_some() || (good >= good_min && bad >= bad_min), "{kind:?}: {good}, {bad}");
    }
}
