//! The NoCloud seed: the small read-only disk from which cloud-init in a domain learns who it is.
//!
//! A pure function from a [`Seed`] to the bytes of a vfat disk called `CIDATA`; the same seed makes
//! the same bytes on every node. cloud-init finds the disk by its label and reads three files:
//!
//! | file | what |
//! | --- | --- |
//! | `meta-data` | instance id, host name, SSH keys |
//! | `user-data` | the tenant's text, as it is |
//! | `network-config` | addresses, as netplan has them (version 2) |
//!
//! The first and the last are JSON, which is YAML too, so that no name or key can say more than
//! itself. Keys are in `meta-data` because `user-data` is the tenant's and need not be YAML at all.

use std::io::{Cursor, Write as _};
use std::net::IpAddr;

use drover_hv::config::{FieldError, MacAddress};
use serde_json::{Value, json};

/// Size of the disk: what all bounds below allow fits.
pub const DISK_BYTES: usize = 1 << 20;
/// Longest instance id, bytes.
pub const INSTANCE_ID_BYTES_MAX: usize = 64;
/// Longest host name, bytes: what Linux takes.
pub const HOST_NAME_BYTES_MAX: usize = 64;
/// Longest part of a host name, bytes.
const LABEL_BYTES_MAX: usize = 63;
/// Most SSH keys.
pub const SSH_KEYS_MAX: usize = 64;
/// Longest SSH key with its comment, bytes: RSA with 16384 bits has 2800.
pub const SSH_KEY_BYTES_MAX: usize = 4096;
/// Largest user data, bytes.
pub const USER_DATA_BYTES_MAX: usize = 64 << 10;
/// Most interfaces.
pub const INTERFACES_MAX: usize = 8;
/// Most addresses of an interface.
pub const ADDRESSES_MAX: usize = 16;
/// Most name servers of an interface.
pub const NAME_SERVERS_MAX: usize = 8;

/// By which cloud-init knows the disk; eleven bytes, as FAT has it.
const LABEL: [u8; 11] = *b"CIDATA     ";
/// FAT wants a number; it means nothing here and must not change.
const VOLUME_ID: u32 = 0xd20e_0001;

/// What a domain is told about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// When it changes, cloud-init takes the domain for a new one and configures it again: letters,
    /// digits, `.`, `_` and `-`.
    pub instance_id: String,
    /// A host name, with or without a domain.
    pub host_name: String,
    /// Lines as in `authorized_keys`, without options: who logs in as the image's default user.
    pub ssh_keys: Vec<String>,
    /// Handed to cloud-init as it is; may be empty.
    pub user_data: String,
    /// Interfaces that are not named here stay without addresses.
    pub interfaces: Vec<Interface>,
}

/// One interface of the domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// By which the domain finds it.
    pub mac: MacAddress,
    /// How it gets its addresses.
    pub addressing: Addressing,
}

/// How an interface gets its addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Addressing {
    /// Asks for an IPv4 address; IPv6 comes from routers' advertisements.
    Dhcp,
    /// They are given here.
    Static {
        /// At least one.
        addresses: Vec<Prefix>,
        /// The way out: at most one of IPv4 and one of IPv6. It may lie outside of the addresses'
        /// networks, as where each domain has a single address.
        gateways: Vec<IpAddr>,
        /// Who resolves names.
        name_servers: Vec<IpAddr>,
    },
}

/// An address and how many of its bits are its network's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// The interface's own.
    pub address: IpAddr,
    /// At most 32 for IPv4, 128 for IPv6.
    pub bits: u8,
}

impl Seed {
    /// The disk.
    ///
    /// # Errors
    /// The first field that is not accepted.
    pub fn disk(&self) -> Result<Vec<u8>, FieldError> {
        self.validate()?;
        let meta_data = json!({
            "instance-id": self.instance_id,
            "local-hostname": self.host_name,
            "public-keys": self.ssh_keys,
        });
        // An empty file would be taken for one that could not be read.
        let user_data = match self.user_data.is_empty() {
            true => "#cloud-config\n{}\n",
            false => &self.user_data,
        };
        let files = [
            ("meta-data", text(&meta_data)),
            ("user-data", user_data.to_owned()),
            ("network-config", text(&network_config(&self.interfaces))),
        ];
        vfat(&files).map_err(|error| {
            FieldError::new("seed", error, format!("what fits on a disk of {DISK_BYTES} bytes"))
        })
    }

    fn validate(&self) -> Result<(), FieldError> {
        let is_id = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=INSTANCE_ID_BYTES_MAX).contains(&self.instance_id.len())
            || !self.instance_id.bytes().all(is_id)
        {
            let accepted =
                format!("1 to {INSTANCE_ID_BYTES_MAX} of letters, digits, '.', '_' and '-'");
            return Err(FieldError::new("instance_id", &self.instance_id, accepted));
        }
        validate_host_name(&self.host_name)?;
        at_most("ssh_keys", self.ssh_keys.len(), SSH_KEYS_MAX)?;
        for (index, key) in self.ssh_keys.iter().enumerate() {
            validate_ssh_key(&format!("ssh_keys[{index}]"), key)?;
        }
        if self.user_data.len() > USER_DATA_BYTES_MAX {
            return Err(FieldError::new(
                "user_data",
                format!("{} bytes", self.user_data.len()),
                format!("at most {USER_DATA_BYTES_MAX} bytes"),
            ));
        }
        at_most("interfaces", self.interfaces.len(), INTERFACES_MAX)?;
        for (index, interface) in self.interfaces.iter().enumerate() {
            let field = format!("interfaces[{index}]");
            if self.interfaces[..index].iter().any(|other| other.mac == interface.mac) {
                let accepted = "one that no other interface of the domain has";
                return Err(FieldError::new(format!("{field}.mac"), interface.mac, accepted));
            }
            interface.validate(&field)?;
        }
        Ok(())
    }
}

impl Interface {
    fn validate(&self, field: &str) -> Result<(), FieldError> {
        let Addressing::Static { addresses, gateways, name_servers } = &self.addressing else {
            return Ok(());
        };
        if addresses.is_empty() {
            let accepted = "at least one, or DHCP";
            return Err(FieldError::new(format!("{field}.addresses"), "", accepted));
        }
        at_most(&format!("{field}.addresses"), addresses.len(), ADDRESSES_MAX)?;
        for (index, prefix) in addresses.iter().enumerate() {
            let bits_max = if prefix.address.is_ipv4() { 32 } else { 128 };
            if prefix.bits > bits_max {
                return Err(FieldError::new(
                    format!("{field}.addresses[{index}]"),
                    format!("{}/{}", prefix.address, prefix.bits),
                    format!("a prefix of at most {bits_max} bits"),
                ));
            }
        }
        for (index, gateway) in gateways.iter().enumerate() {
            let same = |other: &IpAddr| other.is_ipv4() == gateway.is_ipv4();
            if gateways[..index].iter().any(same) || !addresses.iter().any(|p| same(&p.address)) {
                return Err(FieldError::new(
                    format!("{field}.gateways[{index}]"),
                    gateway,
                    "one gateway of IPv4 and one of IPv6, each with an address of its kind",
                ));
            }
        }
        at_most(&format!("{field}.name_servers"), name_servers.len(), NAME_SERVERS_MAX)
    }
}

fn at_most(field: &str, count: usize, max: usize) -> Result<(), FieldError> {
    match count <= max {
        true => Ok(()),
        false => Err(FieldError::new(field, count, format!("at most {max}"))),
    }
}

fn validate_host_name(name: &str) -> Result<(), FieldError> {
    let is_label = |label: &str| {
        (1..=LABEL_BYTES_MAX).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.len() <= HOST_NAME_BYTES_MAX && name.split('.').all(is_label) {
        return Ok(());
    }
    let accepted = format!(
        "at most {HOST_NAME_BYTES_MAX} characters: letters, digits and '-' (not at an end), in \
         parts joined by '.'"
    );
    Err(FieldError::new("host_name", name, accepted))
}

/// A type, a key in base64, and perhaps a comment, on one line.
fn validate_ssh_key(field: &str, key: &str) -> Result<(), FieldError> {
    let mut words = key.split(' ');
    let kind = words.next().unwrap_or_default();
    let blob = words.next().unwrap_or_default();
    let is_kind = |b: u8| b.is_ascii_alphanumeric() || b"-@.".contains(&b);
    let is_base64 = |b: u8| b.is_ascii_alphanumeric() || b"+/=".contains(&b);
    // Neither may stand in YAML as itself.
    let is_text = |c: char| !c.is_control() && !matches!(c, '\u{fffe}' | '\u{ffff}');
    if key.len() <= SSH_KEY_BYTES_MAX
        && !kind.is_empty()
        && kind.bytes().all(is_kind)
        // Every key begins with the length of its type, of which the first bytes are zero.
        && blob.starts_with("AAAA")
        && blob.bytes().all(is_base64)
        && key.chars().all(is_text)
    {
        return Ok(());
    }
    let accepted = format!(
        "one line of at most {SSH_KEY_BYTES_MAX} bytes such as 'ssh-ed25519 AAAA… comment', \
         without options"
    );
    Err(FieldError::new(field, key, accepted))
}

fn network_config(interfaces: &[Interface]) -> Value {
    let ethernets = interfaces.iter().enumerate().map(|(index, interface)| {
        let mut ethernet = json!({ "match": { "macaddress": interface.mac.to_string() } });
        match &interface.addressing {
            Addressing::Dhcp => ethernet["dhcp4"] = true.into(),
            Addressing::Static { addresses, gateways, name_servers } => {
                ethernet["dhcp4"] = false.into();
                let cidr = |p: &Prefix| format!("{}/{}", p.address, p.bits);
                ethernet["addresses"] = addresses.iter().map(cidr).collect();
                if !gateways.is_empty() {
                    ethernet["routes"] = gateways.iter().map(|gateway| route(*gateway)).collect();
                }
                if !name_servers.is_empty() {
                    let servers: Vec<String> = name_servers.iter().map(IpAddr::to_string).collect();
                    ethernet["nameservers"] = json!({ "addresses": servers });
                }
            }
        }
        (format!("net{index}"), ethernet)
    });
    json!({ "version": 2, "ethernets": ethernets.collect::<serde_json::Map<_, _>>() })
}

fn route(gateway: IpAddr) -> Value {
    let to = if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" };
    json!({ "to": to, "via": gateway.to_string(), "on-link": true })
}

fn text(value: &Value) -> String {
    format!("{value:#}\n")
}

/// A filesystem with these files. Without the crate's clock all times are those of 1980.
fn vfat(files: &[(&str, String)]) -> std::io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0; DISK_BYTES]);
    let options = fatfs::FormatVolumeOptions::new().volume_id(VOLUME_ID).volume_label(LABEL);
    fatfs::format_volume(&mut disk, options)?;
    disk.set_position(0);
    {
        let filesystem = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for (name, content) in files {
            let mut file = filesystem.root_dir().create_file(name)?;
            file.write_all(content.as_bytes())?;
            file.flush()?;
        }
        filesystem.unmount()?;
    }
    Ok(disk.into_inner())
}

#[cfg(test)]
mod tests;
