//! What a VMM is told about its domain: the JSON file behind `drover-vmm run --config`.
//!
//! The agent writes this file from the domain's specification, and the VMM checks it again:
//! [`DomainConfig::validate`] names the first field that is wrong, its value, and what would
//! have been accepted.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

mod disk;
#[cfg(test)]
mod tests;

pub use disk::{DISKS_MAX, DiskConfig, DiskLimits, SERIAL_BYTES_MAX, validate_limits};

/// Most vCPUs a domain may have.
pub const VCPUS_MAX: u32 = 8;
/// Least memory, bytes: a stock kernel and a small initramfs need about this much.
pub const MEMORY_BYTES_MIN: u64 = 32 << 20;
/// Most memory, bytes: guest-physical addresses stay below 2^40, which every CPU can address.
pub const MEMORY_BYTES_MAX: u64 = 1 << 39;
/// Memory is given in steps of this many bytes.
pub const MEMORY_BYTES_STEP: u64 = 1 << 20;
/// Most network interfaces.
pub const INTERFACES_MAX: usize = 4;
/// Most addresses that are announced for one interface.
pub const ADDRESSES_MAX: usize = 16;
/// Longest kernel command line, bytes: x86's COMMAND_LINE_SIZE without the final zero.
pub const COMMAND_LINE_BYTES_MAX: usize = 2047;
/// Longest interface name, bytes: Linux' IFNAMSIZ without the final zero.
const TAP_NAME_BYTES_MAX: usize = 15;
/// A larger configuration file is none.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// One field that was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {value}; accepted: {accepted}")]
pub struct FieldError {
    /// Path of the field, as in `interfaces[0].mac`.
    pub field: String,
    /// The value that was given (shortened), or what is wrong with it.
    pub value: String,
    /// What would have been accepted.
    pub accepted: String,
}

impl FieldError {
    /// An error for `field` with the value it had and the text of what it may be.
    pub fn new(
        field: impl Into<String>,
        value: impl fmt::Display,
        accepted: impl Into<String>,
    ) -> Self {
        const VALUE_CHARS_MAX: usize = 200;
        let mut value = value.to_string();
        if value.is_empty() {
            value.push_str("(empty)");
        }
        if let Some((end, _)) = value.char_indices().nth(VALUE_CHARS_MAX) {
            value.truncate(end);
            value.push('…');
        }
        Self { field: field.into(), value, accepted: accepted.into() }
    }
}

/// Why a configuration file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("config: {path} cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no JSON of this shape.
    #[error("config: {path} is no domain configuration: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field has a value that is not accepted.
    #[error(transparent)]
    Field(#[from] FieldError),
}

/// What the machine does when the guest reboots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// Start again in the same process.
    #[default]
    Restart,
    /// End the VMM with the exit reason `reboot`.
    Stop,
}

/// One domain, as its VMM sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DomainConfig {
    /// The domain's UUID.
    pub uid: String,
    /// `domains/{id}`, for people.
    pub name: String,
    /// The epoch under which this VMM runs it (for `--incoming`: will run it).
    pub epoch: u64,
    /// 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// A multiple of [`MEMORY_BYTES_STEP`], at least [`MEMORY_BYTES_MIN`].
    pub memory_bytes: u64,
    /// The kernel: a bzImage or an ELF `vmlinux`. This or `boot_disk`, not both. Not read with
    /// `--incoming`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The initramfs for `kernel`, if any. Not read with `--incoming`.
    #[serde(default)]
    pub initramfs: Option<PathBuf>,
    /// A disk whose own boot loader entries say which of its kernels boots. It is read again each
    /// time the domain starts. Not read with `--incoming`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_disk: Option<BootDiskConfig>,
    /// The kernel's command line, at most [`COMMAND_LINE_BYTES_MAX`] bytes; with `boot_disk`,
    /// what goes behind the entry's own.
    #[serde(default)]
    pub command_line: String,
    /// At most [`INTERFACES_MAX`], in the order in which the guest finds them.
    #[serde(default)]
    pub interfaces: Vec<InterfaceConfig>,
    /// At most [`DISKS_MAX`], in the order in which the guest finds them: those without a slot,
    /// then by slot (a file may have them in any order).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// There is a port for the guest's agent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// A UUID that is another one for a clone, or for an earlier state that goes on: the guest is
    /// shown it. None: the guest has no such device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation_id: Option<String>,
    /// Go on from the state that was saved there instead of booting, once: when a guest has done
    /// so before, boot. Without `--incoming`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<PathBuf>,
    /// What a reboot by the guest does.
    #[serde(default)]
    pub on_reboot: OnReboot,
}

/// A disk that the domain boots from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootDiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// The entry's root is on this disk, whatever other disks hold: a `root=` by UUID or label is
    /// looked up here and becomes the disk's device. It must be one of `disks`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub own_root: bool,
}

/// One network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceConfig {
    /// `aa:bb:cc:dd:ee:ff`, unicast.
    pub mac: String,
    /// The tap device on the node that carries its frames; it must exist.
    pub tap: String,
    /// IP addresses that are announced after a migration.
    #[serde(default)]
    pub addresses: Vec<String>,
}

impl DomainConfig {
    /// Reads and checks a configuration file.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let length = std::fs::metadata(path).map_err(read)?.len();
        if length > FILE_BYTES_MAX {
            return Err(FieldError::new(
                "config",
                format!("{} has {length} bytes", path.display()),
                format!("a JSON file of at most {FILE_BYTES_MAX} bytes"),
            )
            .into());
        }
        let text = std::fs::read(path).map_err(read)?;
        let mut config: Self = serde_json::from_slice(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        config.validate()?;
        config.disks.sort_by_key(|disk| disk.slot);
        Ok(config)
    }

    /// Checks every field by itself; the files and taps it names are not touched.
    ///
    /// # Errors
    /// The first field whose value is not accepted.
    pub fn validate(&self) -> Result<(), FieldError> {
        validate_uid(&self.uid)?;
        validate_name(&self.name)?;
        if self.epoch == 0 {
            return Err(FieldError::new("epoch", 0, "1 or more"));
        }
        if !(1..=VCPUS_MAX).contains(&self.vcpus) {
            return Err(FieldError::new("vcpus", self.vcpus, format!("1 to {VCPUS_MAX}")));
        }
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&self.memory_bytes)
            || !self.memory_bytes.is_multiple_of(MEMORY_BYTES_STEP)
        {
            return Err(FieldError::new(
                "memory_bytes",
                self.memory_bytes,
                format!(
                    "a multiple of {MEMORY_BYTES_STEP} (1 MiB) from {MEMORY_BYTES_MIN} (32 MiB) \
                     to {MEMORY_BYTES_MAX} (512 GiB)"
                ),
            ));
        }
        self.validate_boot()?;
        if self.command_line.len() > COMMAND_LINE_BYTES_MAX {
            return Err(FieldError::new(
                "command_line",
                format!("{} bytes", self.command_line.len()),
                format!("at most {COMMAND_LINE_BYTES_MAX} bytes"),
            ));
        }
        if self.command_line.contains(['\0', '\n']) {
            return Err(FieldError::new(
                "command_line",
                "contains a zero or a line feed",
                "one line of text",
            ));
        }
        if self.interfaces.len() > INTERFACES_MAX {
            return Err(FieldError::new(
                "interfaces",
                self.interfaces.len(),
                format!("at most {INTERFACES_MAX}"),
            ));
        }
        for (index, interface) in self.interfaces.iter().enumerate() {
            interface.validate(&format!("interfaces[{index}]"))?;
            let same = |other: &&InterfaceConfig| {
                other.mac.eq_ignore_ascii_case(&interface.mac) || other.tap == interface.tap
            };
            if let Some(other) = self.interfaces[..index].iter().find(same) {
                let (part, value) = if other.tap == interface.tap {
                    ("tap", &interface.tap)
                } else {
                    ("mac", &interface.mac)
                };
                return Err(FieldError::new(
                    format!("interfaces[{index}].{part}"),
                    value,
                    "one that no other interface of the domain has",
                ));
            }
        }
        disk::validate(&self.disks)?;
        self.restore.iter().try_for_each(|path| validate_path("restore", path))?;
        self.generation().map(drop)
    }

    /// The generation, if the domain has one.
    ///
    /// # Errors
    /// When it is no UUID.
    pub fn generation(&self) -> Result<Option<Uuid>, FieldError> {
        self.generation_id.as_deref().map(parse_generation).transpose()
    }

    /// Puts a disk where the guest finds it. Answers its index.
    pub fn insert_disk(&mut self, disk: DiskConfig) -> usize {
        let index = self.disks.partition_point(|other| other.slot <= disk.slot);
        self.disks.insert(index, disk);
        index
    }

    /// What the guest calls the disk that its root must be on (`vda` is the first), if it must.
    pub fn own_root(&self) -> Option<String> {
        let disk = self.boot_disk.as_ref().filter(|disk| disk.own_root)?;
        let names = ('a'..='z').map(|letter| format!("vd{letter}"));
        let mut named = self.disks.iter().zip(names);
        named.find(|(other, _)| other.path == disk.path).map(|(_, name)| name)
    }

    /// Exactly one source of the kernel.
    fn validate_boot(&self) -> Result<(), FieldError> {
        match (&self.kernel, &self.boot_disk) {
            (Some(kernel), None) => {
                validate_path("kernel", kernel)?;
                self.initramfs.iter().try_for_each(|path| validate_path("initramfs", path))
            }
            (None, Some(disk)) => {
                if let Some(initramfs) = &self.initramfs {
                    return Err(FieldError::new(
                        "initramfs",
                        initramfs.display(),
                        "none with boot_disk: the disk has its own",
                    ));
                }
                validate_path("boot_disk.path", &disk.path)?;
                if disk.own_root && self.own_root().is_none() {
                    let accepted = "true when boot_disk.path is one of disks";
                    return Err(FieldError::new("boot_disk.own_root", true, accepted));
                }
                Ok(())
            }
            (Some(_), Some(_)) => Err(FieldError::new(
                "boot_disk",
                "given together with kernel",
                "one of the two: kernel, or boot_disk",
            )),
            (None, None) => Err(FieldError::new(
                "kernel",
                "neither kernel nor boot_disk is given",
                "one of the two: kernel, or boot_disk",
            )),
        }
    }
}

impl InterfaceConfig {
    /// The MAC address.
    ///
    /// # Errors
    /// When it is not six hexadecimal bytes or is a multicast or the zero address.
    pub fn mac_address(&self) -> Result<MacAddress, FieldError> {
        self.mac.parse()
    }

    /// The addresses to announce; unparsable ones, which [`DomainConfig::validate`] refuses,
    /// are left out.
    pub fn ip_addresses(&self) -> Vec<IpAddr> {
        self.addresses.iter().filter_map(|text| text.parse().ok()).collect()
    }

    fn validate(&self, at: &str) -> Result<(), FieldError> {
        if let Err(error) = self.mac_address() {
            return Err(FieldError { field: format!("{at}.mac"), ..error });
        }
        let tap_is_name = (1..=TAP_NAME_BYTES_MAX).contains(&self.tap.len())
            && self.tap != "."
            && self.tap != ".."
            && self.tap.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b'%');
        if !tap_is_name {
            return Err(FieldError::new(
                format!("{at}.tap"),
                &self.tap,
                format!("the name of a tap device, 1 to {TAP_NAME_BYTES_MAX} characters"),
            ));
        }
        if self.addresses.len() > ADDRESSES_MAX {
            return Err(FieldError::new(
                format!("{at}.addresses"),
                self.addresses.len(),
                format!("at most {ADDRESSES_MAX}"),
            ));
        }
        for (index, address) in self.addresses.iter().enumerate() {
            if address.parse::<IpAddr>().is_err() {
                return Err(FieldError::new(
                    format!("{at}.addresses[{index}]"),
                    address,
                    "an IPv4 or IPv6 address without a prefix length",
                ));
            }
        }
        Ok(())
    }
}

fn validate_uid(uid: &str) -> Result<(), FieldError> {
    let fine = (1..=64).contains(&uid.len())
        && uid.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if fine {
        return Ok(());
    }
    Err(FieldError::new("uid", uid, "a UUID"))
}

/// A generation's text.
///
/// # Errors
/// When it is no UUID.
pub fn parse_generation(text: &str) -> Result<Uuid, FieldError> {
    const HYPHENATED_BYTES: usize = 36;
    match Uuid::try_parse(text) {
        Ok(id) if text.len() == HYPHENATED_BYTES && !id.is_nil() => Ok(id),
        _ => {
            let accepted = "a UUID such as 324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87, not all zeros";
            Err(FieldError::new("generation_id", text, accepted))
        }
    }
}

fn validate_name(name: &str) -> Result<(), FieldError> {
    let id = name.strip_prefix("domains/").unwrap_or_default();
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let fine = (1..=63).contains(&id.len())
        && id.bytes().all(|b| inner(b) || b == b'-')
        && id.bytes().next().is_some_and(inner)
        && id.bytes().last().is_some_and(inner);
    if fine {
        return Ok(());
    }
    Err(FieldError::new(
        "name",
        name,
        "domains/{id}, the id 1 to 63 of a-z, 0-9 and '-', beginning and ending with a letter or \
         digit",
    ))
}

fn validate_path(field: &str, path: &Path) -> Result<(), FieldError> {
    if path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0) {
        return Ok(());
    }
    Err(FieldError::new(field, path.display(), "an absolute path"))
}

/// A unicast Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The six bytes in the order in which they go over the wire.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = FieldError;

    fn from_str(text: &str) -> Result<Self, FieldError> {
        let error = || FieldError::new("mac", text, "a unicast address such as 52:54:00:12:34:56");
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        if parts.next().is_some() || bytes[0] & 1 != 0 || bytes == [0; 6] {
            return Err(error());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}
