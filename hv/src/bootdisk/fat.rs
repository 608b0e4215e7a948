//! FAT12, FAT16 and FAT32, to read only.
//!
//! Written here because what lies on the disk is hostile: the crate `fatfs` computes with the
//! fields of the boot sector unchecked (an overflow panics), follows chains of clusters in
//! circles, and wants to write. Its role here is to make the images of the tests.
//!
//! Source: Microsoft's "FAT File System Specification" of 2000-12-06.

use std::io;

use super::filesystem::{FsError, NAMES_MAX};
use super::read::{Fields, Window};

const ENTRY_BYTES: usize = 32;
const ATTRIBUTE_VOLUME: u8 = 0x08;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
const ATTRIBUTES_LONG_NAME: u8 = 0x0f;
/// UTF-16 units in one entry of a long name, and most entries of one.
const LONG_NAME_UNITS: usize = 13;
const LONG_NAME_ENTRIES_MAX: u8 = 20;
/// Largest directory, bytes: 2^16 entries, as the specification has it.
const DIRECTORY_BYTES_MAX: usize = (1 << 16) * ENTRY_BYTES;
/// A volume with fewer clusters has entries of 12 bits; one with fewer than the second, 16 bits.
const CLUSTERS_12_BITS: u32 = 4085;
const CLUSTERS_16_BITS: u32 = 65525;

/// A mounted volume.
pub(super) struct Fat {
    volume: Window,
    bits: u32,
    fat_start: u64,
    fat_bytes: u64,
    /// The first byte of cluster 2.
    data_start: u64,
    cluster_bytes: u32,
    clusters: u32,
    root: Root,
    serial: u32,
    label: String,
}

#[derive(Clone, Copy)]
enum Root {
    Fixed { start: u64, bytes: usize },
    Cluster(u32),
}

/// A name in a directory.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: String,
    short: String,
    pub(super) is_directory: bool,
    cluster: u32,
    pub(super) bytes: u32,
}

impl Fat {
    /// `None` when the boot sector is no FAT volume's.
    pub(super) fn open(volume: &Window) -> io::Result<Option<Self>> {
        if volume.size() < 512 {
            return Ok(None);
        }
        let sector: [u8; 512] = volume.array(0)?;
        Ok(Self::from_boot_sector(&sector, volume))
    }

    fn from_boot_sector(sector: &[u8; 512], volume: &Window) -> Option<Self> {
        let fields = Fields(sector);
        let sector_bytes = u32::from(fields.u16(11));
        let cluster_sectors = u32::from(fields.u8(13));
        let reserved = u32::from(fields.u16(14));
        let fats = u32::from(fields.u8(16));
        let root_entries = u32::from(fields.u16(17));
        let jump = sector[0] == 0xeb || sector[0] == 0xe9;
        if !jump
            || sector[510..] != [0x55, 0xaa]
            || !matches!(sector_bytes, 512 | 1024 | 2048 | 4096)
            || !cluster_sectors.is_power_of_two()
            || reserved == 0
            || !(1..=4).contains(&fats)
        {
            return None;
        }
        let either = |short: u16, long: u32| if short == 0 { long } else { short.into() };
        let total = u64::from(either(fields.u16(19), fields.u32(32)));
        let fat_sectors = u64::from(either(fields.u16(22), fields.u32(36)));
        let root_bytes = u64::from(root_entries) * ENTRY_BYTES as u64;
        let root_sectors = root_bytes.div_ceil(sector_bytes.into());
        let root_start = u64::from(reserved) + u64::from(fats) * fat_sectors;
        let data = root_start + root_sectors;
        let clusters = total.checked_sub(data)? / u64::from(cluster_sectors);
        let clusters = u32::try_from(clusters).ok().filter(|n| *n > 0 && *n < 0x0fff_fff5)?;
        // FAT32 has no count of 16 bits; a volume is told to be one by its number of clusters.
        let bits = match clusters {
            0..CLUSTERS_12_BITS => 12,
            CLUSTERS_12_BITS..CLUSTERS_16_BITS => 16,
            CLUSTERS_16_BITS.. => 32,
        };
        if fat_sectors == 0 || (bits == 32) != (fields.u16(22) == 0 && root_entries == 0) {
            return None;
        }
        let bytes = |sectors: u64| sectors * u64::from(sector_bytes);
        let root = match bits {
            32 => Root::Cluster(fields.u32(44)),
            _ => Root::Fixed { start: bytes(root_start), bytes: root_bytes as usize },
        };
        let extended = if bits == 32 { 66 } else { 38 };
        let label = sector.get(extended + 5..extended + 16)?;
        Some(Self {
            volume: volume.clone(),
            bits,
            fat_start: bytes(reserved.into()),
            fat_bytes: bytes(fat_sectors),
            data_start: bytes(data),
            cluster_bytes: sector_bytes * cluster_sectors,
            clusters,
            root,
            serial: fields.u32(extended + 1),
            label: String::from_utf8_lossy(label).trim_end().to_owned(),
        })
    }

    /// As `blkid` prints it.
    pub(super) fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.serial >> 16, self.serial & 0xffff)
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    /// The names in a directory.
    pub(super) fn list(&self, components: &[&str]) -> Result<Vec<Entry>, FsError> {
        match self.find(components)? {
            None => self.directory(None),
            Some(entry) if entry.is_directory => self.directory(Some(&entry)),
            Some(_) => Err(FsError::NotFound),
        }
    }

    /// A file's bytes.
    pub(super) fn read(&self, components: &[&str], bytes_max: u64) -> Result<Vec<u8>, FsError> {
        let entry = self.find(components)?.ok_or(FsError::NoFile)?;
        if entry.is_directory {
            return Err(FsError::NoFile);
        }
        let bytes = u64::from(entry.bytes);
        if bytes > bytes_max {
            return Err(FsError::TooLarge { bytes, bytes_max });
        }
        if bytes > self.volume.size() {
            return Err(damaged("a file is larger than the filesystem"));
        }
        let mut content = vec![0; entry.bytes as usize];
        let mut cluster = entry.cluster;
        for chunk in content.chunks_mut(self.cluster_bytes as usize) {
            self.read_cluster(cluster, chunk)?;
            cluster = self.next(cluster)?.unwrap_or(0);
        }
        Ok(content)
    }

    pub(super) fn exists(&self, components: &[&str]) -> Result<bool, FsError> {
        match self.find(components) {
            Ok(_) => Ok(true),
            Err(FsError::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// `None` is the root.
    fn find(&self, components: &[&str]) -> Result<Option<Entry>, FsError> {
        let mut found: Option<Entry> = None;
        for component in components {
            if found.as_ref().is_some_and(|entry| !entry.is_directory) {
                return Err(FsError::NotFound);
            }
            let wanted = component.to_lowercase();
            let mut names = self.directory(found.as_ref())?.into_iter();
            let same =
                |e: &Entry| e.name.to_lowercase() == wanted || e.short.to_lowercase() == wanted;
            found = Some(names.find(same).ok_or(FsError::NotFound)?);
        }
        Ok(found)
    }

    fn directory(&self, entry: Option<&Entry>) -> Result<Vec<Entry>, FsError> {
        let cluster = match (entry, self.root) {
            (None, Root::Fixed { start, bytes }) => {
                let mut raw = vec![0; bytes];
                self.volume.read(start, &mut raw)?;
                return parse(&raw);
            }
            (None, Root::Cluster(cluster)) => cluster,
            (Some(entry), _) => entry.cluster,
        };
        let mut raw = Vec::new();
        let mut next = Some(cluster);
        while let Some(cluster) = next {
            let start = raw.len();
            if start >= DIRECTORY_BYTES_MAX {
                return Err(damaged("a directory is endless"));
            }
            raw.resize(start + self.cluster_bytes as usize, 0);
            self.read_cluster(cluster, &mut raw[start..])?;
            next = self.next(cluster)?;
        }
        parse(&raw)
    }

    fn check(&self, cluster: u32) -> Result<u32, FsError> {
        let index = cluster.checked_sub(2).filter(|index| *index < self.clusters);
        index.ok_or_else(|| damaged(&format!("it points to cluster {cluster}, which it has not")))
    }

    fn read_cluster(&self, cluster: u32, target: &mut [u8]) -> Result<(), FsError> {
        let index = self.check(cluster)?;
        let offset = self.data_start + u64::from(index) * u64::from(self.cluster_bytes);
        Ok(self.volume.read(offset, target)?)
    }

    /// The cluster that follows, if any.
    fn next(&self, cluster: u32) -> Result<Option<u32>, FsError> {
        self.check(cluster)?;
        let at = u64::from(cluster) * u64::from(self.bits) / 8;
        let width = if self.bits == 32 { 4 } else { 2 };
        if at + width > self.fat_bytes {
            return Err(damaged("its table of clusters is too short"));
        }
        let mut raw = [0; 4];
        self.volume.read(self.fat_start + at, &mut raw[..width as usize])?;
        let raw = u32::from_le_bytes(raw);
        let (value, end) = match self.bits {
            12 => (if cluster & 1 == 0 { raw & 0xfff } else { raw >> 4 }, 0xff8),
            16 => (raw, 0xfff8),
            _ => (raw & 0x0fff_ffff, 0x0fff_fff8),
        };
        Ok((value < end).then_some(value))
    }
}

fn damaged(what: &str) -> FsError {
    FsError::Damaged(what.to_owned())
}

/// The entries of a directory, with long names put together.
fn parse(raw: &[u8]) -> Result<Vec<Entry>, FsError> {
    let mut entries = Vec::new();
    // A long name's units, its checksum, and the number of the part that must come next.
    let mut long: Vec<u16> = Vec::new();
    let (mut long_checksum, mut long_next) = (0, 0u8);
    for raw in raw.chunks_exact(ENTRY_BYTES) {
        match raw[0] {
            0 => break,
            0xe5 => {
                long.clear();
                continue;
            }
            _ => {}
        }
        let attributes = raw[11];
        if attributes & 0x3f == ATTRIBUTES_LONG_NAME {
            let part = raw[0] & 0x3f;
            if raw[0] & 0x40 != 0 && (1..=LONG_NAME_ENTRIES_MAX).contains(&part) {
                long = vec![0xffff; usize::from(part) * LONG_NAME_UNITS];
                (long_checksum, long_next) = (raw[13], part);
            }
            if long.is_empty() || part == 0 || part != long_next || raw[13] != long_checksum {
                long.clear();
                continue;
            }
            let places = (1..11).step_by(2).chain((14..26).step_by(2)).chain([28, 30]);
            let start = usize::from(part - 1) * LONG_NAME_UNITS;
            for (unit, place) in long[start..].iter_mut().zip(places) {
                *unit = Fields(raw).u16(place);
            }
            long_next = part - 1;
            continue;
        }
        let name = std::mem::take(&mut long);
        if attributes & ATTRIBUTE_VOLUME != 0 {
            continue;
        }
        let short = short_name(raw);
        if short == "." || short == ".." {
            continue;
        }
        let is_whole = !name.is_empty() && long_next == 0 && long_checksum == checksum(&raw[..11]);
        let units = name.split(|unit| *unit == 0).next().unwrap_or_default();
        let name = if is_whole { String::from_utf16_lossy(units) } else { short.clone() };
        if entries.len() == NAMES_MAX {
            return Err(FsError::TooMany);
        }
        let fields = Fields(raw);
        entries.push(Entry {
            name,
            short,
            is_directory: attributes & ATTRIBUTE_DIRECTORY != 0,
            cluster: u32::from(fields.u16(20)) << 16 | u32::from(fields.u16(26)),
            bytes: fields.u32(28),
        });
    }
    Ok(entries)
}

fn short_name(raw: &[u8]) -> String {
    let part = |bytes: &[u8], lower: bool| {
        let text: String =
            bytes.iter().map(|b| if b.is_ascii() { char::from(*b) } else { '\u{fffd}' }).collect();
        let text = text.trim_end().to_owned();
        if lower { text.to_lowercase() } else { text }
    };
    // Windows and Linux note in this byte that base or extension are in small letters.
    let (base, extension) =
        (part(&raw[..8], raw[12] & 8 != 0), part(&raw[8..11], raw[12] & 16 != 0));
    if extension.is_empty() { base } else { format!("{base}.{extension}") }
}

fn checksum(short: &[u8]) -> u8 {
    short.iter().fold(0u8, |sum, byte| sum.rotate_right(1).wrapping_add(*byte))
}
