//! Disks, and how much a guest may ask of them.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{FieldError, validate_path};
use crate::pci::HOT_PLUG_SLOTS;
pub use crate::virtio::blk::Limits as DiskLimits;

/// Most disks.
pub const DISKS_MAX: usize = 8;
/// Longest serial number of a disk, bytes: VIRTIO_BLK_ID_BYTES.
pub const SERIAL_BYTES_MAX: usize = 20;
/// Requests a second that may be sold.
const IOPS: RangeInclusive<u64> = 1..=100_000_000;
const IOPS_BURST: RangeInclusive<u64> = 1..=1 << 30;
/// With less, a guest's kernel takes its disk for dead: the largest request would take hours.
const BYTES_PER_SECOND: RangeInclusive<u64> = 64 << 10..=1 << 40;
const BYTES_BURST: RangeInclusive<u64> = 1..=1 << 50;

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw file (a multiple of 512 bytes long) or a block device. It is locked while the domain
    /// has it open.
    pub path: PathBuf,
    /// The guest can read it only.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest finds as the disk's serial number; empty for none.
    #[serde(default)]
    pub serial: String,
    /// Its PCI slot, one of [`HOT_PLUG_SLOTS`]: such a disk may be taken from a running guest, and
    /// has the same slot wherever the guest moves. None: the next one behind the network
    /// interfaces, for as long as the guest runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<u8>,
    /// A migration finds the same volume at the other node: its content is not copied. With
    /// `--incoming` it is opened and locked when the source has let go of it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub shared: bool,
    /// With `--incoming`: it was just made and reads as zeros, so that zeros need not be written.
    #[serde(default, skip_serializing_if = "is_false")]
    pub zeroed: bool,
    /// How much the guest may ask of it.
    #[serde(default, skip_serializing_if = "DiskLimits::is_none")]
    pub limits: DiskLimits,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde wants it
fn is_false(value: &bool) -> bool {
    !value
}

/// Checks disks by themselves and against each other.
pub(super) fn validate(disks: &[DiskConfig]) -> Result<(), FieldError> {
    if disks.len() > DISKS_MAX {
        let accepted = format!("at most {DISKS_MAX}");
        return Err(FieldError::new("disks", disks.len(), accepted));
    }
    for (index, disk) in disks.iter().enumerate() {
        let at = format!("disks[{index}]");
        disk.validate(&at)?;
        let others = &disks[..index];
        let accepted = "one that no other disk of the domain has";
        if others.iter().any(|other| other.path == disk.path) {
            return Err(FieldError::new(format!("{at}.path"), disk.path.display(), accepted));
        }
        if !disk.serial.is_empty() && others.iter().any(|other| other.serial == disk.serial) {
            return Err(FieldError::new(format!("{at}.serial"), &disk.serial, accepted));
        }
        if let Some(slot) = disk.slot
            && others.iter().any(|other| other.slot == disk.slot)
        {
            return Err(FieldError::new(format!("{at}.slot"), slot, accepted));
        }
    }
    Ok(())
}

/// Checks the limits of one disk; `at` is the path of the field that has them.
///
/// # Errors
/// The first field whose value is not accepted.
pub fn validate_limits(at: &str, limits: &DiskLimits) -> Result<(), FieldError> {
    let pairs = [
        ("iops", limits.iops, IOPS, "iops_burst", limits.iops_burst, IOPS_BURST),
        (
            "bytes_per_second",
            limits.bytes_per_second,
            BYTES_PER_SECOND,
            "bytes_burst",
            limits.bytes_burst,
            BYTES_BURST,
        ),
    ];
    for (rate_name, rate, rates, burst_name, burst, bursts) in pairs {
        let refuse = |name: &str, value: u64, accepted: String| {
            Err(FieldError::new(format!("{at}.{name}"), value, accepted))
        };
        let range = |range: &RangeInclusive<u64>| format!("{} to {}", range.start(), range.end());
        if rate != 0 && !rates.contains(&rate) {
            return refuse(rate_name, rate, format!("0 (none), or {}", range(&rates)));
        }
        if rate == 0 && burst != 0 {
            return refuse(burst_name, burst, format!("0 without {rate_name}"));
        }
        if burst != 0 && !bursts.contains(&burst) {
            let accepted = format!("0 (a tenth of a second's), or {}", range(&bursts));
            return refuse(burst_name, burst, accepted);
        }
    }
    Ok(())
}

impl DiskConfig {
    fn validate(&self, at: &str) -> Result<(), FieldError> {
        validate_path(&format!("{at}.path"), &self.path)?;
        let fine = self.serial.len() <= SERIAL_BYTES_MAX
            && self.serial.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !fine {
            return Err(FieldError::new(
                format!("{at}.serial"),
                &self.serial,
                format!("at most {SERIAL_BYTES_MAX} of a-z, A-Z, 0-9, '-', '_' and '.'"),
            ));
        }
        if let Some(slot) = self.slot.filter(|slot| !HOT_PLUG_SLOTS.contains(slot)) {
            let (first, last) = (HOT_PLUG_SLOTS.start(), HOT_PLUG_SLOTS.end());
            return Err(FieldError::new(format!("{at}.slot"), slot, format!("{first} to {last}")));
        }
        validate_limits(&format!("{at}.limits"), &self.limits)
    }
}
