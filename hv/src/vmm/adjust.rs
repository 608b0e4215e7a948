//! Requests that change something about a machine while it runs.

use drover_proto::vmm;
use drover_proto::vmm::v1::{
    Disk, GrowDiskRequest, SetDiskLimitsRequest, SetGenerationRequest, disk,
};

use super::supervisor::{Place, Supervisor};
use super::{Reply, VmmError};
use crate::config::{DiskConfig, DiskLimits, FieldError, parse_generation, validate_limits};

impl Supervisor {
    pub(super) fn set_disk_limits(
        &mut self,
        request: SetDiskLimitsRequest,
    ) -> Result<(), VmmError> {
        let index = find(&self.options.config.disks, request.disk)?;
        let limits = limits(request.limits.unwrap_or_default())?;
        let Place::Owned(machine) = &mut self.place else {
            return Err(self.refuse("set a disk's limits"));
        };
        machine.set_disk_limits(index, limits);
        // The machine after a reboot is made from it.
        self.options.config.disks[index].limits = limits;
        Ok(())
    }

    pub(super) fn set_generation(
        &mut self,
        request: &SetGenerationRequest,
    ) -> Result<(), VmmError> {
        const ASKED: &str = "change the generation";
        let id = parse_generation(&request.generation_id)?;
        let Place::Owned(machine) = &mut self.place else { return Err(self.refuse(ASKED)) };
        let changed = machine.set_generation(id);
        if !changed.map_err(|error| VmmError::Failed(error.to_string()))? {
            let state = "the domain has none (generation_id in its configuration)".to_owned();
            return Err(VmmError::State { asked: ASKED, state });
        }
        self.options.config.generation_id = Some(id.to_string());
        Ok(())
    }

    pub(super) fn grow_disk(&mut self, request: GrowDiskRequest) -> Result<Reply, VmmError> {
        let index = find(&self.options.config.disks, request.disk)?;
        let Place::Owned(machine) = &mut self.place else {
            return Err(self.refuse("grow a disk"));
        };
        let (bytes_before, bytes) = machine.grow_disk(index).map_err(|error| {
            let state = format!("{error}; accepted: {}", error.accepted());
            VmmError::State { asked: "grow a disk", state }
        })?;
        Ok(Reply::Grown { bytes_before, bytes })
    }
}

/// What a request says of a disk's limits, checked.
pub(super) fn limits(wanted: vmm::v1::DiskLimits) -> Result<DiskLimits, FieldError> {
    let limits = DiskLimits {
        iops: wanted.iops,
        iops_burst: wanted.iops_burst,
        bytes_per_second: wanted.bytes_per_second,
        bytes_burst: wanted.bytes_burst,
    };
    validate_limits("limits", &limits)?;
    Ok(limits)
}

/// The place of a disk in the configuration.
fn find(disks: &[DiskConfig], wanted: Option<Disk>) -> Result<usize, FieldError> {
    match wanted.and_then(|disk| disk.which) {
        Some(disk::Which::Index(index)) if (index as usize) < disks.len() => Ok(index as usize),
        Some(disk::Which::Index(index)) => {
            let accepted = match disks.len() {
                0 => "none, the domain has no disks".to_owned(),
                count => format!("0 to {}", count - 1),
            };
            Err(FieldError::new("disk.index", index, accepted))
        }
        Some(disk::Which::Serial(serial)) => {
            let same = |disk: &DiskConfig| !serial.is_empty() && disk.serial == serial;
            disks.iter().position(same).ok_or_else(|| {
                let serials = disks.iter().map(|disk| disk.serial.as_str());
                let known: Vec<_> = serials.filter(|serial| !serial.is_empty()).collect();
                let accepted = if known.is_empty() {
                    "none, no disk has a serial number".to_owned()
                } else {
                    known.join(", ")
                };
                FieldError::new("disk.serial", &serial, accepted)
            })
        }
        None => Err(FieldError::new("disk", "", "a disk's index or serial number")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_index_or_serial_number() {
        let disks: Vec<DiskConfig> =
            serde_json::from_str(r#"[{"path":"/a","serial":"root"},{"path":"/b"}]"#).unwrap();
        let index = |index| Some(Disk { which: Some(disk::Which::Index(index)) });
        let serial = |text: &str| Some(Disk { which: Some(disk::Which::Serial(text.into())) });
        assert_eq!(find(&disks, index(1)), Ok(1));
        assert_eq!(find(&disks, serial("root")), Ok(0));
        let refused = |disks: &[DiskConfig], wanted| find(disks, wanted).unwrap_err().to_string();
        assert_eq!(refused(&disks, index(2)), "disk.index: 2; accepted: 0 to 1");
        assert_eq!(refused(&disks, serial("x")), "disk.serial: x; accepted: root");
        // Not the disk that has none.
        assert_eq!(refused(&disks, serial("")), "disk.serial: (empty); accepted: root");
        assert!(refused(&disks, None).starts_with("disk: (empty)"));
        let none = "disk.index: 0; accepted: none, the domain has no disks";
        assert_eq!(refused(&[], index(0)), none);
    }
}
