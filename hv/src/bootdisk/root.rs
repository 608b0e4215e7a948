//! A disk as the root of the machine that it boots, whatever else the machine has.
//!
//! An entry names its root by what is written in a filesystem or a partition table: the UUID or
//! label. A domain that boots a rescue disk has its own disks beside it, which may say the same,
//! as they were made from the same image; the guest would take either. So the name is looked up on
//! this disk alone, and replaced by the device that only this disk is.

use super::fat::Fat;
use super::partitions::Partition;
use super::read::{Fields, Window};
use super::{BootDiskError, place, short};

/// What names a filesystem from within; each may be empty.
#[derive(Debug, Default, PartialEq, Eq)]
struct Identity {
    uuid: String,
    label: String,
}

/// Where a superblock has what: the magic and its place, UUID, label and the label's length.
struct Superblock {
    magic_at: u64,
    magic: &'static [u8],
    uuid_at: u64,
    label_at: u64,
    label_bytes: usize,
}

const UUID_BYTES: usize = 16;
const LABEL_BYTES_MAX: usize = 256;

const SUPERBLOCKS: [Superblock; 3] = [
    // ext2, ext3, ext4.
    Superblock {
        magic_at: 1024 + 0x38,
        magic: &[0x53, 0xef],
        uuid_at: 1024 + 0x68,
        label_at: 1024 + 0x78,
        label_bytes: 16,
    },
    // XFS.
    Superblock { magic_at: 0, magic: b"XFSB", uuid_at: 32, label_at: 108, label_bytes: 12 },
    // Btrfs.
    Superblock {
        magic_at: 0x1_0040,
        magic: b"_BHRfS_M",
        uuid_at: 0x1_0020,
        label_at: 0x1_012b,
        label_bytes: LABEL_BYTES_MAX,
    },
];

/// Replaces in an entry's command line each `root=` that names a filesystem or partition by
/// `/dev/{device}` and the number of the partition. Other roots stay.
pub(super) fn replace(
    entry: &str,
    command_line: &str,
    disk: &Window,
    table: Option<&[Partition]>,
    device: &str,
) -> Result<String, BootDiskError> {
    let mut words = Vec::new();
    for word in words_of(command_line) {
        // The kernel takes quotes around the value or around all of it.
        let bare = word.replace('"', "");
        let named = bare.strip_prefix("root=").and_then(|root| root.split_once('='));
        let Some((kind @ ("UUID" | "LABEL" | "PARTUUID" | "PARTLABEL"), name)) = named else {
            words.push(word.to_owned());
            continue;
        };
        let Some(number) = find(kind, name, disk, table) else {
            return Err(BootDiskError::Root {
                entry: short(entry),
                root: short(&format!("{kind}={name}")),
            });
        };
        tracing::info!(root = bare, at = place(number), "the root is this disk's own");
        let number = number.map_or_else(String::new, |number| number.to_string());
        words.push(format!("root=/dev/{device}{number}"));
    }
    Ok(words.join(" "))
}

/// The words of a command line as the kernel splits it: a quoted space is none.
fn words_of(line: &str) -> impl Iterator<Item = &str> {
    let mut quoted = false;
    line.split(move |c: char| {
        quoted ^= c == '"';
        !quoted && c.is_ascii_whitespace()
    })
    .filter(|word| !word.is_empty())
}

/// The partition of that name; the inner `None` is the whole disk.
fn find(kind: &str, name: &str, disk: &Window, table: Option<&[Partition]>) -> Option<Option<u32>> {
    let partitions = table.unwrap_or_default();
    let found = |wanted: &dyn Fn(&&Partition) -> bool| {
        partitions.iter().find(wanted).map(|partition| Some(partition.number))
    };
    let same_uuid = |uuid: &str| !name.is_empty() && uuid.eq_ignore_ascii_case(name);
    let same_label = |label: &str| !name.is_empty() && label == name;
    let same = |window: &Window| {
        let identity = identity(window);
        if kind == "UUID" { same_uuid(&identity.uuid) } else { same_label(&identity.label) }
    };
    match kind {
        "PARTUUID" => found(&|partition| same_uuid(&partition.uuid)),
        "PARTLABEL" => found(&|partition| same_label(&partition.label)),
        _ if table.is_none() => same(disk).then_some(None),
        _ => found(&|partition| same(&disk.part(partition.start, partition.length))),
    }
}

/// What a filesystem says of itself; nothing where none is known.
fn identity(volume: &Window) -> Identity {
    for superblock in &SUPERBLOCKS {
        let mut magic = vec![0; superblock.magic.len()];
        if volume.read(superblock.magic_at, &mut magic).is_err() || magic != superblock.magic {
            continue;
        }
        let mut label = vec![0; superblock.label_bytes];
        let Ok(uuid) = volume.array::<UUID_BYTES>(superblock.uuid_at) else { continue };
        if volume.read(superblock.label_at, &mut label).is_err() {
            continue;
        }
        let label = label.split(|byte| *byte == 0).next().unwrap_or_default();
        let label = String::from_utf8_lossy(label).into_owned();
        return Identity { uuid: uuid::Uuid::from_bytes(uuid).to_string(), label };
    }
    match Fat::open(volume) {
        Ok(Some(fat)) => Identity { uuid: fat.uuid(), label: fat.label().to_owned() },
        _ => Identity::default(),
    }
}

/// A GPT entry's own UUID and name.
pub(super) fn gpt_names(entry: &[u8]) -> (String, String) {
    let uuid = entry.get(16..32).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
    let units = (56..128).step_by(2).map(|at| Fields(entry).u16(at));
    let name: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    (uuid::Uuid::from_bytes_le(uuid).to_string(), String::from_utf16_lossy(&name))
}

/// What Linux takes for the UUID of a partition in an MBR.
pub(super) fn mbr_uuid(signature: u32, number: u32) -> String {
    format!("{signature:08x}-{number:02x}")
}
