//! What the controller wants of one domain: an `Assignment`, checked and taken apart.

use std::time::Duration;

use drover_hv::config::SERIAL_BYTES_MAX;
use drover_proto::agent::v1 as pb;
use drover_proto::v1::{DiskLimits, DomainSpec, MigrationLimits, PowerState};

/// Longest grace period that is waited for after the power button.
const GRACE_MAX: Duration = Duration::from_secs(3600);

/// What shall be on this node for one domain.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Wanted {
    /// No `Desired` has come since the agent started: leave all as it is.
    #[default]
    Unknown,
    /// Not listed: nothing of it shall be here.
    Absent,
    /// Listed, but not in words that this agent understands: leave all as it is, and say so.
    Unclear(String),
    /// Listed.
    Assigned(Box<Assigned>),
}

/// An assignment.
#[derive(Debug, Clone, PartialEq)]
pub struct Assigned {
    /// `domains/{id}`.
    pub name: String,
    /// The epoch to run under.
    pub epoch: u64,
    /// The domain's specification.
    pub spec: DomainSpec,
    /// What this node is to it.
    pub role: Role,
    /// Its disks, in the order in which the guest finds them: the rescue disk, if any, and the
    /// specification's.
    pub disks: Vec<Disk>,
    /// The first disk is a rescue disk, and is booted.
    pub rescue: bool,
    /// What the guest sees as its generation, a UUID.
    pub generation_id: Option<String>,
    /// Where its memory is to be saved, or has been.
    pub memory: Option<Disk>,
    /// The seed's PCI slot, if it has one of its own.
    pub seed_slot: Option<u8>,
}

/// A disk of a domain: a volume of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    /// The volume's UUID.
    pub volume: String,
    /// The pool's id.
    pub pool: String,
    /// The guest can read it only.
    pub read_only: bool,
    /// What the guest may ask of it.
    pub limits: DiskLimits,
    /// What the guest finds as its serial number, whatever its content.
    pub serial: String,
    /// Its PCI slot, if it has one of its own.
    pub slot: Option<u8>,
}

/// What the node is to a domain.
#[derive(Debug, Clone, PartialEq)]
pub enum Role {
    /// It owns the domain.
    Owner(Owner),
    /// The domain is coming.
    Incoming {
        /// The migration, an operation's UUID.
        migration_id: String,
        /// What the source must show.
        token: String,
    },
}

/// What shall become of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Power {
    /// It runs.
    Running,
    /// It is written to its memory volume, and ends by that.
    Saved,
    /// It ends.
    Stopped,
}

/// The owner's part.
#[derive(Debug, Clone, PartialEq)]
pub struct Owner {
    /// What shall become of it.
    pub power: Power,
    /// How long the guest may take after the power button.
    pub grace: Duration,
    /// The operator's count of starts.
    pub start_generation: u64,
    /// The migration that shall take it away.
    pub outgoing: Option<Outgoing>,
}

/// A migration away.
#[derive(Debug, Clone, PartialEq)]
pub struct Outgoing {
    /// The operation's UUID.
    pub migration_id: String,
    /// Where the destination listens, host:port.
    pub address: String,
    /// What to show there.
    pub token: String,
    /// The epoch that the destination will run under.
    pub to_epoch: u64,
    /// Bounds.
    pub limits: Option<MigrationLimits>,
    /// Give up, unless handed over.
    pub cancel: bool,
}

/// Whether `uid` is a UUID as it is written, and so safe as the name of a directory.
pub fn is_uid(uid: &str) -> bool {
    uid.len() == 36 && uuid::Uuid::try_parse(uid).is_ok()
}

impl Owner {
    /// It shall run.
    pub fn runs(&self) -> bool {
        self.power == Power::Running
    }
}

impl Wanted {
    /// Takes an assignment apart; one that makes no sense becomes [`Wanted::Unclear`].
    pub fn from_assignment(assignment: pb::Assignment) -> Self {
        match parse(assignment) {
            Ok(assigned) => Self::Assigned(Box::new(assigned)),
            Err(reason) => Self::Unclear(reason),
        }
    }

    /// The assignment, if there is one.
    pub fn assigned(&self) -> Option<&Assigned> {
        match self {
            Self::Assigned(assigned) => Some(assigned),
            _ => None,
        }
    }

    /// The owner's part, if the node owns the domain.
    pub fn owner(&self) -> Option<&Owner> {
        match self.assigned().map(|assigned| &assigned.role) {
            Some(Role::Owner(owner)) => Some(owner),
            _ => None,
        }
    }

    /// Nothing of the guest shall run here: it is not listed, or it is to be stopped.
    pub fn wants_end(&self) -> bool {
        *self == Self::Absent || self.owner().is_some_and(|owner| owner.power == Power::Stopped)
    }
}

fn parse(assignment: pb::Assignment) -> Result<Assigned, String> {
    let pb::Assignment { uid: _, name, epoch, spec, role, outgoing, disks, seed_slot, .. } =
        assignment;
    let (rescue, generation_id) = (assignment.rescue, assignment.generation_id);
    let memory = assignment.memory;
    let spec = spec.ok_or("the assignment has no spec")?;
    if epoch == 0 {
        return Err("the assignment's epoch is 0; epochs begin at 1".into());
    }
    let role = match role.ok_or("the assignment has neither owner nor incoming")? {
        pb::assignment::Role::Owner(owner) => Role::Owner(Owner {
            power: match owner.power() {
                PowerState::Running => Power::Running,
                PowerState::Saved => Power::Saved,
                PowerState::Stopped => Power::Stopped,
                PowerState::Unspecified => {
                    return Err("the assignment's power is none of RUNNING, SAVED, STOPPED".into());
                }
            },
            grace: duration(owner.grace_period).min(GRACE_MAX),
            start_generation: owner.start_generation,
            outgoing: outgoing.map(|out| Outgoing {
                migration_id: out.migration_id,
                address: out.address,
                token: out.token,
                to_epoch: out.to_epoch,
                limits: out.limits,
                cancel: out.cancel,
            }),
        }),
        pb::assignment::Role::Incoming(_) if outgoing.is_some() => {
            return Err("the assignment is incoming and outgoing at once".into());
        }
        pb::assignment::Role::Incoming(incoming) if incoming.migration_id.is_empty() => {
            return Err("the assignment's incoming.migration_id is empty".into());
        }
        pb::assignment::Role::Incoming(incoming) => {
            Role::Incoming { migration_id: incoming.migration_id, token: incoming.token }
        }
    };
    // The spec says what shall be, `disks` what is: the volumes that the controller chose.
    if disks.len() != spec.disks.len() + usize::from(rescue) {
        return Err(format!(
            "the assignment has {} disks{}, and its spec {}",
            disks.len(),
            if rescue { ", the rescue disk among them" } else { "" },
            spec.disks.len()
        ));
    }
    let disks = disks
        .into_iter()
        .enumerate()
        .map(|(index, disk)| parse_disk(&format!("disks[{index}]"), disk));
    let disks = disks.collect::<Result<_, _>>()?;
    let generation_id = Some(generation_id).filter(|id| !id.is_empty());
    let memory = memory.map(|memory| parse_disk("memory", memory)).transpose()?;
    let seed_slot = parse_slot("seed_slot", seed_slot)?;
    Ok(Assigned { name, epoch, spec, role, disks, rescue, generation_id, memory, seed_slot })
}

fn parse_disk(field: &str, disk: pb::AssignedDisk) -> Result<Disk, String> {
    if !is_uid(&disk.volume_uid) {
        return Err(format!(
            "the assignment's {field}.volume_uid: {:?} is no UUID",
            disk.volume_uid
        ));
    }
    let serial = match disk.serial.is_empty() {
        true => serial_of(&disk.volume_uid),
        false => disk.serial,
    };
    Ok(Disk {
        serial,
        volume: disk.volume_uid,
        pool: disk.pool,
        read_only: disk.read_only,
        limits: disk.limits.unwrap_or_default(),
        slot: parse_slot(&format!("{field}.slot"), disk.slot)?,
    })
}

/// The VMM knows which slots there are.
fn parse_slot(field: &str, slot: u32) -> Result<Option<u8>, String> {
    match u8::try_from(slot) {
        Ok(0) => Ok(None),
        Ok(slot) => Ok(Some(slot)),
        Err(_) => Err(format!("the assignment's {field}: {slot} is no PCI slot")),
    }
}

/// As much of a volume's uid as a serial number holds.
fn serial_of(volume: &str) -> String {
    volume.chars().filter(|c| *c != '-').take(SERIAL_BYTES_MAX).collect()
}

fn duration(value: Option<prost_types::Duration>) -> Duration {
    value.and_then(|value| Duration::try_from(value).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_uuids_name_directories() {
        assert!(is_uid("4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11"));
        for bad in
            ["", "..", "../../etc", "4d8e0f0e6c6f4d3b8f1e0c6f7a9b2d11", "x".repeat(36).as_str()]
        {
            assert!(!is_uid(bad), "{bad}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_unclear_and_says_why() {
        let good = pb::Assignment {
            epoch: 1,
            spec: Some(DomainSpec::default()),
            role: Some(pb::assignment::Role::Owner(pb::Owner { power: 1, ..Default::default() })),
            ..Default::default()
        };
        assert!(Wanted::from_assignment(good.clone()).owner().is_some_and(Owner::runs));
        let cases = [
            (pb::Assignment { epoch: 0, ..good.clone() }, "epoch"),
            (pb::Assignment { spec: None, ..good.clone() }, "spec"),
            (pb::Assignment { role: None, ..good.clone() }, "neither owner nor incoming"),
            (
                pb::Assignment {
                    role: Some(pb::assignment::Role::Owner(pb::Owner::default())),
                    ..good.clone()
                },
                "power",
            ),
            (
                pb::Assignment {
                    role: Some(pb::assignment::Role::Incoming(pb::Incoming::default())),
                    ..good.clone()
                },
                "migration_id",
            ),
            (
                pb::Assignment { memory: Some(pb::AssignedDisk::default()), ..good.clone() },
                "memory.volume_uid",
            ),
            (
                pb::Assignment { disks: vec![pb::AssignedDisk::default()], ..good.clone() },
                "1 disks, and its spec 0",
            ),
            (
                pb::Assignment { rescue: true, ..good.clone() },
                "0 disks, the rescue disk among them, and its spec 0",
            ),
            (
                pb::Assignment {
                    spec: Some(DomainSpec {
                        disks: vec![drover_proto::v1::Disk::default()],
                        ..DomainSpec::default()
                    }),
                    disks: vec![pb::AssignedDisk {
                        volume_uid: "../x".into(),
                        ..pb::AssignedDisk::default()
                    }],
                    ..good
                },
                "disks[0].volume_uid",
            ),
        ];
        for (assignment, word) in cases {
            match Wanted::from_assignment(assignment) {
                Wanted::Unclear(reason) => assert!(reason.contains(word), "{reason}"),
                other => panic!("{word}: {other:?}"),
            }
        }
    }
}
