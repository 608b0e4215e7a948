//! Partition tables: GPT (UEFI specification, chapter 5) and MBR with extended partitions.

use std::io;

use super::read::{Fields, Window};
use super::root;

/// Most partitions that are looked at.
pub(super) const PARTITIONS_MAX: usize = 128;
/// Most entries of a GPT; 128 are usual.
const GPT_ENTRIES_MAX: u32 = 1024;
/// Largest entry of a GPT, bytes; 128 are usual.
const GPT_ENTRY_BYTES_MAX: u32 = 1024;
const GPT_ENTRY_BYTES_MIN: u32 = 128;
const GPT_HEADER_BYTES_MIN: u32 = 92;
const GPT_MAGIC: &[u8] = b"EFI PART";
/// Sector sizes for which a GPT is looked for.
const SECTORS_BYTES: [u64; 2] = [512, 4096];

const MBR_SECTOR_BYTES: u64 = 512;
const MBR_MAGIC: [u8; 2] = [0x55, 0xaa];
const MBR_SIGNATURE: usize = 440;
const MBR_TABLE: usize = 446;
const MBR_ENTRY_BYTES: usize = 16;
const MBR_GPT: u8 = 0xee;
const MBR_EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
/// The first logical partition's number.
const LOGICAL_FIRST: u32 = 5;
/// Most links of the chain of logical partitions.
const LOGICAL_MAX: u32 = 64;

/// A part of the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Partition {
    /// As Linux numbers it, from 1 on.
    pub(super) number: u32,
    pub(super) start: u64,
    pub(super) length: u64,
    /// As in `/dev/disk/by-partuuid`.
    pub(super) uuid: String,
    /// Only a GPT has them.
    pub(super) label: String,
}

/// Why a partition table was not understood.
#[derive(Debug, thiserror::Error)]
pub(super) enum TableError {
    #[error("the partition table (GPT) is damaged, and so is its copy at the end of the disk")]
    Gpt,
    #[error("the disk cannot be read: {0}")]
    Read(#[from] io::Error),
}

/// The partitions, in the table's order; `None` without a table.
pub(super) fn partitions(disk: &Window) -> Result<Option<Vec<Partition>>, TableError> {
    if disk.size() < MBR_SECTOR_BYTES {
        return Ok(None);
    }
    let mbr = Mbr::read(disk, 0)?;
    let mut gpt_seen =
        mbr.as_ref().is_some_and(|mbr| mbr.entries.iter().any(|e| e.kind == MBR_GPT));
    for sector in SECTORS_BYTES {
        let Some(last) = (disk.size() / sector).checked_sub(1) else { continue };
        let mut headers = vec![1, last];
        // A disk that has grown has its copy where its end was.
        if let Some(header) = gpt_header(disk, sector, 1) {
            gpt_seen = true;
            headers.push(Fields(&header).u64(32));
        }
        for lba in headers {
            if let Some(partitions) = gpt(disk, sector, lba) {
                return Ok(Some(partitions));
            }
        }
    }
    if gpt_seen {
        return Err(TableError::Gpt);
    }
    match mbr {
        Some(mbr) => Ok(mbr.partitions(disk)?),
        None => Ok(None),
    }
}

/// The sector, when it begins as a header does.
fn gpt_header(disk: &Window, sector: u64, lba: u64) -> Option<[u8; 512]> {
    let header: [u8; 512] = disk.array(lba.checked_mul(sector)?).ok()?;
    header.starts_with(GPT_MAGIC).then_some(header)
}

/// The partitions of a header and entries that are whole; `None` when anything is amiss.
fn gpt(disk: &Window, sector: u64, lba: u64) -> Option<Vec<Partition>> {
    let mut header = gpt_header(disk, sector, lba)?;
    let fields = Fields(&header);
    let (length, crc) = (fields.u32(12), fields.u32(16));
    let (own, entries_lba) = (fields.u64(24), fields.u64(72));
    let (count, entry_bytes, entries_crc) = (fields.u32(80), fields.u32(84), fields.u32(88));
    if !(GPT_HEADER_BYTES_MIN..=512).contains(&length)
        || own != lba
        || count > GPT_ENTRIES_MAX
        || !(GPT_ENTRY_BYTES_MIN..=GPT_ENTRY_BYTES_MAX).contains(&entry_bytes)
    {
        return None;
    }
    header[16..20].fill(0);
    if crc32fast::hash(&header[..length as usize]) != crc {
        return None;
    }
    let mut entries = vec![0; count as usize * entry_bytes as usize];
    disk.read(entries_lba.checked_mul(sector)?, &mut entries).ok()?;
    if crc32fast::hash(&entries) != entries_crc {
        return None;
    }
    let mut partitions = Vec::new();
    for (index, entry) in entries.chunks_exact(entry_bytes as usize).enumerate() {
        let (first, last) = (Fields(entry).u64(32), Fields(entry).u64(40));
        let unused = entry[..16].iter().all(|byte| *byte == 0);
        if unused || last < first || partitions.len() == PARTITIONS_MAX {
            continue;
        }
        let Some(start) = first.checked_mul(sector).filter(|start| *start < disk.size()) else {
            continue;
        };
        let length = (last - first).saturating_add(1).saturating_mul(sector);
        let length = length.min(disk.size() - start);
        let (uuid, label) = root::gpt_names(entry);
        partitions.push(Partition { number: index as u32 + 1, start, length, uuid, label });
    }
    Some(partitions)
}

/// An MBR, or one of the sectors of the same form that list logical partitions.
struct Mbr {
    entries: [MbrEntry; 4],
    /// Of the disk; the other sectors have none.
    signature: u32,
}

#[derive(Clone, Copy)]
struct MbrEntry {
    active: u8,
    kind: u8,
    /// Sectors; from where depends.
    start: u32,
    sectors: u32,
}

impl MbrEntry {
    fn is_used(self) -> bool {
        self.kind != 0 && self.sectors != 0
    }

    fn is_extended(self) -> bool {
        MBR_EXTENDED.contains(&self.kind)
    }

    fn partition(self, number: u32, base: u64, disk: &Window, signature: u32) -> Option<Partition> {
        let start = base.checked_add(u64::from(self.start) * MBR_SECTOR_BYTES)?;
        let room = disk.size().checked_sub(start).filter(|room| *room > 0)?;
        let length = (u64::from(self.sectors) * MBR_SECTOR_BYTES).min(room);
        let (uuid, label) = (root::mbr_uuid(signature, number), String::new());
        (start > 0).then_some(Partition { number, start, length, uuid, label })
    }
}

impl Mbr {
    fn read(disk: &Window, offset: u64) -> io::Result<Option<Self>> {
        let sector: [u8; 512] = disk.array(offset)?;
        if sector[510..] != MBR_MAGIC {
            return Ok(None);
        }
        let entry = |index: usize| {
            let fields = Fields(&sector[MBR_TABLE + index * MBR_ENTRY_BYTES..]);
            let (active, kind) = (fields.u8(0), fields.u8(4));
            MbrEntry { active, kind, start: fields.u32(8), sectors: fields.u32(12) }
        };
        let signature = Fields(&sector).u32(MBR_SIGNATURE);
        Ok(Some(Self { entries: [entry(0), entry(1), entry(2), entry(3)], signature }))
    }

    /// `None` when this is no partition table but, say, the first sector of a filesystem.
    fn partitions(&self, disk: &Window) -> io::Result<Option<Vec<Partition>>> {
        if self.entries.iter().any(|entry| entry.active & 0x7f != 0) {
            return Ok(None);
        }
        let mut partitions = Vec::new();
        let mut logical_number = LOGICAL_FIRST;
        for (index, entry) in self.entries.iter().enumerate().filter(|(_, e)| e.is_used()) {
            let signature = self.signature;
            let partition = entry.partition(index as u32 + 1, 0, disk, signature);
            let Some(partition) = partition else { continue };
            if entry.is_extended() {
                let number = &mut logical_number;
                logical(disk, partition.start, signature, number, &mut partitions);
            } else {
                partitions.push(partition);
            }
        }
        partitions.sort_by_key(|partition| partition.number);
        Ok((!partitions.is_empty()).then_some(partitions))
    }
}

/// Follows the chain of an extended partition. A damaged link ends it: what came before counts.
fn logical(
    disk: &Window,
    base: u64,
    signature: u32,
    number: &mut u32,
    partitions: &mut Vec<Partition>,
) {
    let mut at = base;
    while *number < LOGICAL_FIRST + LOGICAL_MAX {
        let Ok(Some(link)) = Mbr::read(disk, at) else { return };
        let [own, next, ..] = link.entries;
        if own.is_used() && !own.is_extended() {
            partitions.extend(own.partition(*number, at, disk, signature));
            *number += 1;
        }
        if !next.is_used() || !next.is_extended() || next.start == 0 {
            return;
        }
        let next = base + u64::from(next.start) * MBR_SECTOR_BYTES;
        // The chain goes forward; one that goes back would be a circle.
        if next <= at {
            return;
        }
        at = next;
    }
}
