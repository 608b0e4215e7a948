//! Hosts for the simulator: an agent's rules and a VMM's switch-over, in memory.
//!
//! The rules are those that drover-agent and drover-vmm keep: epochs below the record's are
//! refused; who has handed over resumes only under an epoch greater than the one handed over
//! to; a destination without COMMIT runs only as `owner` under a greater epoch; what is not
//! listed is ended; nothing is started while something is there. A save takes a while in which an
//! agent hears nothing; what was saved is used once.

use std::collections::{BTreeMap, BTreeSet};

use crate::workflows::desired::Level;
use drover_proto::agent::v1::assignment::Role;
use drover_proto::agent::v1::{
    Assignment, MigrationProgress as P, MigrationRole, ObservedDomain, ObservedMigration,
    ObservedSnapshot, ObservedState as S, ObservedVolume,
};
use drover_proto::v1::{ExitReason, PowerState, SnapshotState, VolumeState};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum VmmState {
    Running,
    /// Paused, and being written down. Until its agent has looked it seems to run.
    Saving {
        seen: bool,
    },
    Incoming,
    HandedOver,
}

#[derive(Clone, Debug)]
pub(super) struct Migration {
    pub(super) id: String,
    pub(super) role: MigrationRole,
    pub(super) progress: P,
    pub(super) to_epoch: u64,
}

/// A process.
#[derive(Clone, Debug)]
pub(super) struct Vmm {
    pub(super) state: VmmState,
    pub(super) epoch: u64,
    pub(super) migration: Option<Migration>,
    /// Which life of the guest is in there.
    pub(super) life: u64,
    /// The uid of its own disk, and what else it has open.
    pub(super) volume: String,
    opens: Vec<String>,
}

impl Vmm {
    /// The guest is in there.
    pub(super) fn is_alive(&self) -> bool {
        matches!(self.state, VmmState::Running | VmmState::Saving { .. })
    }

    fn has_open(&self, uid: &str) -> bool {
        self.volume == uid || self.opens.iter().any(|open| open == uid)
    }
}

/// A guest on a volume.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    life: u64,
    /// Its disk, and how many writes that had seen.
    disk: (String, u64),
    used: bool,
}

/// On disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    pub(super) name: String,
    pub(super) epoch: u64,
    start_generation: u64,
    /// The hand-over that the last VMM wrote down.
    pub(super) handover: Option<(String, u64)>,
    begun: Option<String>,
    save_failed: bool,
    /// How the last VMM ended: exit, its epoch, the migration it waited for, whether it ran.
    pub(super) end: Option<(ExitReason, u64, Option<String>, bool)>,
}

#[derive(Default)]
pub(super) struct Host {
    pub(super) boot: u64,
    pub(super) up: bool,
    pub(super) records: BTreeMap<String, Record>,
    pub(super) vmms: BTreeMap<String, Vmm>,
    pub(super) level: Level,
    /// On disk, by uid: how many writes each has seen. One that comes in has seen none.
    pub(super) volumes: BTreeMap<String, u64>,
    /// The same of snapshots' parts: how many writes their volume had seen.
    pub(super) parts: BTreeMap<String, u64>,
    sizes: BTreeMap<String, u64>,
    saved: BTreeMap<String, Saved>,
    /// Volumes whose guests have gone on here.
    spent: BTreeSet<String>,
    /// Its pool is another host's, too: it speaks only of what it was told of, and what guests of
    /// the other one have open is locked.
    pub(super) is_shared: bool,
    pub(super) locked: BTreeSet<String>,
    /// Decides what the next save comes to.
    pub(super) luck: usize,
    /// What should never have happened.
    pub(super) wrong: Vec<String>,
    /// The volumes of guests that were removed before they went on.
    pub(super) lost: Vec<String>,
    /// A level has come since the agent started: before that, nothing is ended or begun.
    told: bool,
    /// It has looked at its domains since it started: before that, it only names them.
    looked: bool,
    /// The greatest term whose word was heard.
    term: u64,
    lives: u64,
}

impl Host {
    pub(super) fn booted() -> Self {
        Self { up: true, boot: 1, ..Self::default() }
    }

    pub(super) fn take(&mut self, term: u64, level: Level) -> bool {
        if term < self.term {
            return false;
        }
        self.term = term;
        self.level = level;
        self.told = true;
        true
    }

    /// Makes what is there equal to the level, one step a domain.
    pub(super) fn work(&mut self) {
        if !self.told {
            return;
        }
        self.looked = true;
        let listed: Vec<String> = self.level.domains.iter().map(|a| a.uid.clone()).collect();
        self.vmms.retain(|uid, _| listed.contains(uid));
        self.records.retain(|uid, _| listed.contains(uid));
        self.work_on_volumes();
        for assignment in self.level.domains.clone() {
            self.work_on(&assignment);
        }
    }

    /// What is listed is made, once; what is garbage goes, unless it is listed or a VMM has it.
    fn work_on_volumes(&mut self) {
        for wanted in &self.level.volumes {
            if wanted.create && wanted.copy_from.is_empty() {
                let part = wanted.snapshot.as_ref().map(|source| &source.snapshot_uid);
                let writes = part.map_or(Some(0), |uid| self.parts.get(uid).copied());
                if let Some(writes) = writes {
                    self.volumes.entry(wanted.uid.clone()).or_insert(writes);
                }
            }
            if self.volumes.contains_key(&wanted.uid) {
                self.sizes.insert(wanted.uid.clone(), wanted.size_bytes);
            }
        }
        for part in self.level.snapshots.iter().filter(|s| s.create).flat_map(|s| &s.parts) {
            if let Some(writes) = self.volumes.get(&part.volume_uid) {
                self.parts.entry(part.uid.clone()).or_insert(*writes);
            }
        }
        for garbage in &self.level.garbage {
            self.parts.remove(&garbage.snapshot_uid);
            let uid = &garbage.volume_uid;
            let listed = self.level.volumes.iter().any(|wanted| wanted.uid == *uid);
            let open = self.vmms.values().any(|vmm| vmm.has_open(uid));
            if !listed && !open && !self.locked.contains(uid) {
                self.volumes.remove(uid);
                match self.saved.remove(uid) {
                    Some(saved) if saved.used => drop(self.spent.insert(uid.clone())),
                    Some(_) => self.lost.push(uid.clone()),
                    None => {}
                }
            }
        }
    }

    /// What it is to copy, and from which agent.
    pub(super) fn copies(&self) -> Vec<(String, String)> {
        let open = self.level.volumes.iter().filter(|wanted| {
            self.told && !wanted.copy_from.is_empty() && !self.volumes.contains_key(&wanted.uid)
        });
        open.map(|wanted| (wanted.uid.clone(), wanted.copy_from.clone())).collect()
    }

    /// What another agent reads of a volume: nothing while somebody has it open.
    pub(super) fn read(&self, uid: &str) -> Option<(u64, Option<Saved>)> {
        let open = self.vmms.values().any(|vmm| vmm.has_open(uid)) || self.locked.contains(uid);
        let writes = self.volumes.get(uid).copied().filter(|_| self.up && !open)?;
        Some((writes, self.saved.get(uid).cloned()))
    }

    /// A volume is here, whole.
    pub(super) fn copied(&mut self, uid: String, (writes, saved): (u64, Option<Saved>)) {
        self.saved.extend(saved.map(|saved| (uid.clone(), saved)));
        self.volumes.insert(uid, writes);
    }

    /// The guest on that volume can go on here, or has.
    pub(super) fn has_saved(&self, uid: &str) -> bool {
        self.saved.contains_key(uid) || self.spent.contains(uid)
    }

    /// The volume of the domain's only own disk, behind a rescue disk if any; None while not all are
    /// there.
    fn volume(&self, a: &Assignment) -> Option<String> {
        let all = a.disks.iter().chain(&a.memory);
        let here = all.map(|disk| &disk.volume_uid).all(|uid| self.volumes.contains_key(uid));
        let own = a.disks.last().filter(|_| here && a.disks.len() == 1 + usize::from(a.rescue))?;
        Some(own.volume_uid.clone())
    }

    /// Which life a start begins, or goes on with.
    fn life(&mut self, a: &Assignment, own: &str) -> u64 {
        self.lives += 1;
        let held = a.memory.as_ref().and_then(|memory| self.saved.get_mut(&memory.volume_uid));
        let Some(saved) = held.filter(|saved| !saved.used) else {
            return self.boot * 1000 + self.lives;
        };
        saved.used = true;
        let disk = (own.to_owned(), self.volumes.get(own).copied().unwrap_or_default());
        if saved.disk != disk {
            self.wrong.push(format!("{} was saved with {:?}, has {disk:?}", a.name, saved.disk));
        }
        saved.life
    }

    fn work_on(&mut self, a: &Assignment) {
        let seen = self.records.get(&a.uid).map_or(0, |record| record.epoch);
        if a.epoch < seen {
            return;
        }
        match &a.role {
            Some(Role::Owner(owner)) => {
                self.own(a, owner.power(), owner.start_generation);
            }
            Some(Role::Incoming(incoming)) => self.come_in(a, &incoming.migration_id),
            None => {}
        }
    }

    fn own(&mut self, a: &Assignment, power: PowerState, generation: u64) {
        let on = power == PowerState::Running;
        let volume = self.volume(a);
        let memory = a.memory.as_ref().map(|memory| memory.volume_uid.clone());
        let saving = |vmm: &&mut Vmm| matches!(vmm.state, VmmState::Saving { .. });
        if let Some(vmm) = self.vmms.get_mut(&a.uid).filter(saving) {
            if self.luck != 1 {
                return self.save(&a.uid);
            }
            vmm.state = VmmState::Saving { seen: true };
            vmm.epoch = vmm.epoch.max(a.epoch);
            return;
        }
        let life = match &volume {
            Some(own) if on && self.starts(a, generation) => self.life(a, own),
            _ => 0,
        };
        let starts = life != 0;
        let record = self.records.entry(a.uid.clone()).or_default();
        record.name.clone_from(&a.name);
        let handed_to = record.handover.as_ref().map_or(0, |(_, epoch)| *epoch);
        let Some(vmm) = self.vmms.get_mut(&a.uid) else {
            if handed_to != 0 && a.epoch <= handed_to {
                return;
            }
            if starts {
                *record = Record {
                    name: a.name.clone(),
                    epoch: a.epoch,
                    start_generation: generation,
                    ..Record::default()
                };
                let vmm = Vmm {
                    state: VmmState::Running,
                    epoch: a.epoch,
                    migration: None,
                    life,
                    volume: volume.unwrap_or_default(),
                    opens: a.disks.iter().map(|disk| disk.volume_uid.clone()).collect(),
                };
                self.vmms.insert(a.uid.clone(), vmm);
            } else if !on {
                record.epoch = a.epoch;
                record.start_generation = generation;
            }
            return;
        };
        let later = a.epoch > vmm.epoch.max(handed_to);
        match vmm.state {
            VmmState::HandedOver if later && on => {
                (vmm.state, vmm.epoch, vmm.migration) = (VmmState::Running, a.epoch, None);
                (record.epoch, record.handover) = (a.epoch, None);
            }
            VmmState::HandedOver => {}
            VmmState::Incoming if later => {
                let ready = vmm.migration.as_ref().is_some_and(|m| m.progress == P::Ready);
                record.epoch = a.epoch;
                if on && ready {
                    (vmm.state, vmm.epoch) = (VmmState::Running, a.epoch);
                    if let Some(m) = &mut vmm.migration {
                        m.progress = P::Succeeded;
                    }
                } else {
                    let of = vmm.migration.as_ref().map(|m| m.id.clone());
                    record.end = Some((ExitReason::Killed, vmm.epoch, of, false));
                    self.vmms.remove(&a.uid);
                }
            }
            VmmState::Incoming | VmmState::Saving { .. } => {}
            VmmState::Running => {
                vmm.epoch = vmm.epoch.max(a.epoch);
                record.epoch = record.epoch.max(a.epoch);
                record.start_generation = generation;
                if power == PowerState::Saved {
                    let memory = memory.filter(|uid| self.volumes.contains_key(uid));
                    match memory {
                        Some(_) if self.luck == 0 => record.save_failed = true,
                        Some(uid) if !record.save_failed => {
                            vmm.state = VmmState::Saving { seen: false };
                            vmm.opens.push(uid);
                        }
                        _ => {}
                    }
                    return;
                }
                record.save_failed = false;
                if !on {
                    record.end = Some((ExitReason::Killed, vmm.epoch, None, true));
                    self.vmms.remove(&a.uid);
                    return;
                }
                let Some(outgoing) = &a.outgoing else { return };
                let its = vmm.migration.as_mut().filter(|m| m.id == outgoing.migration_id);
                match (its, outgoing.cancel) {
                    (Some(m), true) => m.progress = P::Failed,
                    (None, false) if record.begun.as_ref() != Some(&outgoing.migration_id) => {
                        record.begun = Some(outgoing.migration_id.clone());
                        vmm.migration = Some(Migration {
                            id: outgoing.migration_id.clone(),
                            role: MigrationRole::Source,
                            progress: P::Copying,
                            to_epoch: outgoing.to_epoch,
                        });
                    }
                    _ => {}
                }
            }
        }
    }

    /// Whether nothing is there and something shall be.
    fn starts(&self, a: &Assignment, generation: u64) -> bool {
        if self.vmms.contains_key(&a.uid) {
            return false;
        }
        let Some(record) = self.records.get(&a.uid) else { return true };
        let handed_to = record.handover.as_ref().map_or(0, |(_, epoch)| *epoch);
        let again = match &record.end {
            None => true,
            Some((exit, epoch, ..)) => {
                a.epoch > *epoch
                    || generation > record.start_generation
                    || matches!(exit, ExitReason::Unspecified | ExitReason::Saved)
            }
        };
        again && (handed_to == 0 || a.epoch > handed_to)
    }

    /// The guest is on its volume now, and nowhere else.
    fn save(&mut self, uid: &str) {
        let Some(vmm) = self.vmms.get(uid) else { return };
        let writes = self.volumes.get(&vmm.volume).copied().unwrap_or_default();
        let disk = (vmm.volume.clone(), writes);
        let saved = Saved { life: vmm.life, disk, used: false };
        self.saved.insert(vmm.opens.last().cloned().unwrap_or_default(), saved);
        self.end(uid, ExitReason::Saved);
    }

    fn come_in(&mut self, a: &Assignment, migration: &str) {
        let volume = self.volume(a);
        let record = self.records.entry(a.uid.clone()).or_default();
        record.name.clone_from(&a.name);
        let handed_to = record.handover.as_ref().map_or(0, |(_, epoch)| *epoch);
        if let Some(vmm) = self.vmms.get(&a.uid) {
            let its = vmm.migration.as_ref().is_some_and(|m| m.id == migration);
            let leftover = match vmm.state {
                VmmState::HandedOver => a.epoch > handed_to.max(vmm.epoch),
                VmmState::Incoming => !its,
                VmmState::Running | VmmState::Saving { .. } => false,
            };
            if leftover {
                self.vmms.remove(&a.uid);
            }
            return;
        }
        let tried = record.end.as_ref().is_some_and(|(.., of, _)| of.as_deref() == Some(migration));
        if tried || (handed_to != 0 && a.epoch <= handed_to) {
            return;
        }
        let Some(volume) = volume else { return };
        *record = Record { name: a.name.clone(), epoch: a.epoch, ..Record::default() };
        let migration = Migration {
            id: migration.to_owned(),
            role: MigrationRole::Destination,
            progress: P::Listening,
            to_epoch: a.epoch,
        };
        let vmm = Vmm {
            state: VmmState::Incoming,
            epoch: a.epoch,
            migration: Some(migration),
            life: 0,
            volume,
            opens: a.disks.iter().map(|disk| disk.volume_uid.clone()).collect(),
        };
        self.vmms.insert(a.uid.clone(), vmm);
    }

    /// A VMM's process is gone; what it wrote down stays.
    pub(super) fn end(&mut self, uid: &str, exit: ExitReason) {
        let Some(vmm) = self.vmms.remove(uid) else { return };
        let record = self.records.entry(uid.to_owned()).or_default();
        let of = vmm
            .migration
            .as_ref()
            .filter(|m| m.role == MigrationRole::Destination)
            .map(|m| m.id.clone());
        let ran = vmm.is_alive();
        record.end = Some((exit, vmm.epoch, of, ran));
    }

    pub(super) fn crash(&mut self) {
        for uid in self.vmms.keys().cloned().collect::<Vec<_>>() {
            // Unspecified stands for "the host went down": started again when still owned.
            self.end(&uid, ExitReason::Unspecified);
        }
        self.up = false;
    }

    /// The agent starts (again): what it was told is forgotten, what is on disk is not.
    pub(super) fn restart(&mut self) {
        self.level = Level::default();
        self.told = false;
        self.looked = false;
    }

    /// What is on the disks that both hosts have: as this one has left it.
    pub(super) fn see_disks_of(&mut self, other: &Self) {
        self.volumes.clone_from(&other.volumes);
        self.parts.clone_from(&other.parts);
        self.sizes.clone_from(&other.sizes);
        self.saved.clone_from(&other.saved);
        self.spent.clone_from(&other.spent);
        let open = other.vmms.values().filter(|vmm| vmm.is_alive());
        let open = open.flat_map(|vmm| vmm.opens.iter().chain([&vmm.volume]));
        self.locked = open.cloned().collect();
    }

    fn speaks_of(&self, uid: &str) -> bool {
        let volumes = self.level.volumes.iter().map(|wanted| &wanted.uid);
        let parts = self.level.snapshots.iter().flat_map(|wanted| &wanted.parts);
        let garbage = self.level.garbage.iter().flat_map(|g| [&g.volume_uid, &g.snapshot_uid]);
        let mut told = volumes.chain(parts.map(|part| &part.uid)).chain(garbage);
        !self.is_shared || told.any(|named| named == uid)
    }

    pub(super) fn report_volumes(&self) -> Vec<ObservedVolume> {
        let said = |uid: &String| ObservedVolume {
            uid: uid.clone(),
            pool: "ssd".into(),
            state: VolumeState::Ready.into(),
            size_bytes: self.sizes.get(uid).copied().unwrap_or_default(),
            ..ObservedVolume::default()
        };
        self.volumes.keys().filter(|uid| self.speaks_of(uid)).map(said).collect()
    }

    /// Those that are there, and those that shall be and are not.
    pub(super) fn report_snapshots(&self) -> Vec<ObservedSnapshot> {
        let said = |uid: &String, state: SnapshotState| ObservedSnapshot {
            uid: uid.clone(),
            pool: "ssd".into(),
            state: state.into(),
            ..ObservedSnapshot::default()
        };
        let kept = self.level.snapshots.iter().filter(|wanted| !wanted.create);
        let lost = kept.flat_map(|wanted| &wanted.parts);
        let lost = lost.filter(|part| !self.parts.contains_key(&part.uid));
        let there = self.parts.keys().filter(|uid| self.speaks_of(uid));
        let there = there.map(|uid| said(uid, SnapshotState::Ready));
        there.chain(lost.map(|part| said(&part.uid, SnapshotState::Failed))).collect()
    }

    pub(super) fn report(&self) -> Vec<ObservedDomain> {
        let named = |uid: &String| ObservedDomain { uid: uid.clone(), ..ObservedDomain::default() };
        let observe = |(uid, record): (&String, &Record)| match self.looked {
            true => self.observe(uid, record),
            false => named(uid),
        };
        self.records.iter().map(observe).collect()
    }

    fn observe(&self, uid: &str, record: &Record) -> ObservedDomain {
        let mut domain = ObservedDomain {
            uid: uid.to_owned(),
            name: record.name.clone(),
            epoch: record.epoch,
            ..ObservedDomain::default()
        };
        let wanted = self.level.domains.iter().find(|a| a.uid == uid);
        let outgoing = wanted.and_then(|a| a.outgoing.as_ref());
        let told = |id: &str, role: MigrationRole, progress: P| {
            let listens = matches!(progress, P::Listening | P::Copying | P::Ready)
                && role == MigrationRole::Destination;
            ObservedMigration {
                id: id.to_owned(),
                role: role.into(),
                progress: progress.into(),
                listen_address: if listens { "there:1".into() } else { String::new() },
                ..ObservedMigration::default()
            }
        };
        if let Some(vmm) = self.vmms.get(uid) {
            domain.epoch = vmm.epoch;
            domain.set_state(match vmm.state {
                VmmState::Running | VmmState::Saving { seen: false } => S::Running,
                VmmState::Saving { seen: true } => S::Paused,
                VmmState::Incoming => S::Incoming,
                VmmState::HandedOver => S::HandedOver,
            });
            domain.migration = vmm.migration.as_ref().map(|m| told(&m.id, m.role, m.progress));
            if record.save_failed {
                domain.save_error = "no space".into();
            }
        } else {
            let Some((exit, epoch, incoming, ran)) = &record.end else {
                domain.set_state(S::Stopped);
                return domain;
            };
            let handed_to = record.handover.as_ref().map_or(0, |(_, epoch)| *epoch);
            if let Some((id, _)) = &record.handover
                && record.epoch <= handed_to.max(*epoch)
            {
                domain.set_state(S::HandedOver);
                domain.migration = Some(told(id, MigrationRole::Source, P::HandedOver));
                return domain;
            }
            domain.set_state(match exit {
                ExitReason::Unspecified | ExitReason::Shutdown | ExitReason::Saved => S::Stopped,
                _ => S::Failed,
            });
            domain.set_exit_reason(*exit);
            if let Some(id) = incoming {
                let progress = if *ran { P::Succeeded } else { P::Failed };
                domain.migration = Some(told(id, MigrationRole::Destination, progress));
            }
        }
        // As the agent does: a migration that it was told of and that is nowhere has failed.
        if let Some(outgoing) = outgoing
            && domain.migration.as_ref().is_none_or(|m| m.id != outgoing.migration_id)
        {
            let begun = record.begun.as_ref() == Some(&outgoing.migration_id);
            if begun || outgoing.cancel {
                domain.migration =
                    Some(told(&outgoing.migration_id, MigrationRole::Source, P::Failed));
            }
        }
        domain
    }
}
