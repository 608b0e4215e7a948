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
    /// At most [`DISKS_MAX`], in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// There is a port for the guest's agent.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub guest_agent: bool,
    /// A UUID that is another one for a clone, or for an earlier state that goes on: the guest is
    /// shown it. None: the guest has no such device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation_id: Option<String>,
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
        let config: Self = serde_json::from_slice(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source })?;
        config.validate()?;
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
        self.generation().map(drop)
    }

    /// The generation, if the domain has one.
    ///
    /// # Errors
    /// When it is no UUID.
    pub fn generation(&self) -> Result<Option<Uuid>, FieldError> {
        self.generation_id.as_deref().map(parse_generation).transpose()
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

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> DomainConfig {
        DomainConfig {
            uid: "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11".into(),
            name: "domains/web-1".into(),
            epoch: 1,
            vcpus: 1,
            memory_bytes: 128 << 20,
            kernel: Some("/boot/vmlinuz".into()),
            initramfs: Some("/boot/initramfs.img".into()),
            boot_disk: None,
            command_line: "console=ttyS0".into(),
            interfaces: vec![InterfaceConfig {
                mac: "52:54:00:12:34:56".into(),
                tap: "tap0".into(),
                addresses: vec!["10.78.0.11".into(), "fd00::11".into()],
            }],
            disks: vec![DiskConfig {
                path: "/srv/web-1/root.raw".into(),
                read_only: false,
                serial: "web-1-root".into(),
                limits: DiskLimits { iops: 500, iops_burst: 2000, ..DiskLimits::default() },
                shared: false,
                zeroed: false,
            }],
            guest_agent: true,
            generation_id: Some("324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87".into()),
            on_reboot: OnReboot::Restart,
        }
    }

    fn root_disk(path: &str) -> BootDiskConfig {
        BootDiskConfig { path: path.into(), own_root: false }
    }

    /// Each bad value is refused with the name of its field; nothing else is complained about.
    #[test]
    fn errors_name_the_field() {
        good().validate().unwrap();
        type Change = fn(&mut DomainConfig);
        let cases: &[(&str, Change)] = &[
            ("uid", |c| c.uid = "../x".into()),
            ("name", |c| c.name = "web".into()),
            ("name", |c| c.name = "domains/a/b".into()),
            ("name", |c| c.name = "domains/-a".into()),
            ("name", |c| c.name = format!("domains/{}", "a".repeat(64))),
            ("epoch", |c| c.epoch = 0),
            ("vcpus", |c| c.vcpus = 0),
            ("vcpus", |c| c.vcpus = 9),
            ("memory_bytes", |c| c.memory_bytes = 31 << 20),
            ("memory_bytes", |c| c.memory_bytes = (64 << 20) + 4096),
            ("memory_bytes", |c| c.memory_bytes = 1 << 40),
            ("kernel", |c| c.kernel = Some("vmlinuz".into())),
            ("kernel", |c| c.kernel = None),
            ("boot_disk", |c| c.boot_disk = Some(root_disk("/dev/vg/root"))),
            ("initramfs", |c| {
                c.kernel = None;
                c.boot_disk = Some(root_disk("/dev/vg/root"));
            }),
            ("boot_disk.path", |c| {
                (c.kernel, c.initramfs) = (None, None);
                c.boot_disk = Some(root_disk("root.img"));
            }),
            ("boot_disk.own_root", |c| {
                (c.kernel, c.initramfs) = (None, None);
                c.boot_disk = Some(BootDiskConfig { own_root: true, ..root_disk("/other") });
            }),
            ("initramfs", |c| c.initramfs = Some("".into())),
            ("command_line", |c| c.command_line = "x".repeat(2048)),
            ("command_line", |c| c.command_line = "a\nb".into()),
            ("interfaces", |c| c.interfaces = vec![c.interfaces[0].clone(); 5]),
            ("interfaces[0].mac", |c| c.interfaces[0].mac = "01:00:00:00:00:00".into()),
            ("interfaces[0].mac", |c| c.interfaces[0].mac = "52:54:00:12:34".into()),
            ("interfaces[0].mac", |c| c.interfaces[0].mac = "52:54:00:12:34:+6".into()),
            ("interfaces[0].tap", |c| c.interfaces[0].tap = "a/b".into()),
            ("interfaces[0].tap", |c| c.interfaces[0].tap = "x".repeat(16)),
            ("interfaces[0].addresses[1]", |c| c.interfaces[0].addresses[1] = "10/8".into()),
            ("interfaces[1].tap", |c| {
                c.interfaces.push(InterfaceConfig {
                    mac: "52:54:00:12:34:57".into(),
                    ..c.interfaces[0].clone()
                });
            }),
            ("generation_id", |c| c.generation_id = Some(String::new())),
            ("generation_id", |c| {
                c.generation_id = Some("{324e6eafd1d14bf6bf41b9bb6c91fb87}".into())
            }),
            ("generation_id", |c| c.generation_id = Some(Uuid::nil().to_string())),
            ("disks", |c| c.disks = vec![c.disks[0].clone(); 9]),
            ("disks[0].path", |c| c.disks[0].path = "root.raw".into()),
            ("disks[0].serial", |c| c.disks[0].serial = "x".repeat(21)),
            ("disks[0].serial", |c| c.disks[0].serial = "a b".into()),
            ("disks[0].limits.iops_burst", |c| c.disks[0].limits.iops = 0),
            ("disks[0].limits.iops", |c| c.disks[0].limits.iops = 1 << 40),
            ("disks[0].limits.bytes_per_second", |c| c.disks[0].limits.bytes_per_second = 512),
            ("disks[0].limits.bytes_burst", |c| {
                c.disks[0].limits.bytes_per_second = 1 << 20;
                c.disks[0].limits.bytes_burst = 1 << 60;
            }),
            ("disks[1].path", |c| {
                c.disks.push(DiskConfig { serial: String::new(), ..c.disks[0].clone() });
            }),
            ("disks[1].serial", |c| {
                c.disks.push(DiskConfig { path: "/srv/other".into(), ..c.disks[0].clone() });
            }),
        ];
        for (field, change) in cases {
            let mut config = good();
            change(&mut config);
            let error = config.validate().unwrap_err();
            assert_eq!(&error.field, field, "{error}");
        }
    }

    /// The JSON is what the agent writes: optional parts may be missing, unknown ones are refused.
    #[test]
    fn json_round_trip_and_unknown_fields() {
        let text = serde_json::to_string(&good()).unwrap();
        assert_eq!(serde_json::from_str::<DomainConfig>(&text).unwrap(), good());
        let minimal = r#"{"uid":"u","name":"domains/a","epoch":1,"vcpus":1,
            "memory_bytes":134217728,"kernel":"/k"}"#;
        let config: DomainConfig = serde_json::from_str(minimal).unwrap();
        assert_eq!(config.on_reboot, OnReboot::Restart);
        let from_disk = minimal.replace(r#""kernel":"/k""#, r#""boot_disk":{"path":"/d"}"#);
        let config: DomainConfig = serde_json::from_str(&from_disk).unwrap();
        config.validate().unwrap();
        assert_eq!(config.boot_disk, Some(root_disk("/d")));
        // A VMM from before there were disks reads what needs none.
        let text = serde_json::to_string(&config).unwrap();
        assert!(!text.contains("disks") && !text.contains("guest_agent"));
        assert!(!text.contains("generation") && !text.contains("own_root"));
        let disk = minimal.replace("\"epoch\"", "\"disks\":[{\"path\":\"/d\"}],\"epoch\"");
        let config: DomainConfig = serde_json::from_str(&disk).unwrap();
        assert_eq!((config.disks[0].read_only, config.disks[0].serial.as_str()), (false, ""));
        assert_eq!(config.disks[0].limits, DiskLimits::default());
        assert!(!serde_json::to_string(&config).unwrap().contains("limits"));
        let unknown = minimal.replace("\"epoch\"", "\"cpu\":1,\"epoch\"");
        let error = serde_json::from_str::<DomainConfig>(&unknown).unwrap_err();
        assert!(error.to_string().contains("cpu"), "{error}");
    }

    /// A rescue disk before the domain's own is `vda`; behind them it would be another one.
    #[test]
    fn the_disk_of_the_root_has_the_guests_name() {
        let disks = r#"{"uid":"u","name":"domains/a","epoch":1,"vcpus":1,"memory_bytes":134217728,
            "boot_disk":{"path":"/b","own_root":true},"disks":[{"path":"/a"},{"path":"/b"}]}"#;
        let mut config: DomainConfig = serde_json::from_str(disks).unwrap();
        config.validate().unwrap();
        assert_eq!(config.own_root().as_deref(), Some("vdb"));
        config.disks.swap(0, 1);
        assert_eq!(config.own_root().as_deref(), Some("vda"));
        config.boot_disk = Some(root_disk("/b"));
        assert_eq!(config.own_root(), None);
    }

    #[test]
    fn mac_addresses_print_as_they_were_read() {
        let mac: MacAddress = "52:54:00:Ab:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        assert_eq!(mac.bytes(), [0x52, 0x54, 0, 0xab, 0xcd, 0x0f]);
    }
}
