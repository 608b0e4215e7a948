//! Makes disks.

use std::collections::BTreeMap;
use std::io::{Cursor, Write};
use std::os::unix::fs::symlink;
use std::process::Command;

pub(super) const ROOT_UUID: &str = "11111111-2222-4333-8444-555555555555";
pub(super) const BOOT_UUID: &str = "99999999-2222-4333-8444-555555555555";
const SECTOR: usize = 512;
/// Partitions begin at a multiple of this many sectors, from the first on.
const ALIGNMENT: usize = 64;

/// What is to be in an ext4 filesystem.
#[derive(Clone)]
pub(super) struct Ext4Image {
    uuid: String,
    options: String,
    files: BTreeMap<String, Vec<u8>>,
    links: BTreeMap<String, String>,
}

impl Ext4Image {
    pub(super) fn new() -> Self {
        let (uuid, options) = (ROOT_UUID.into(), "^has_journal".into());
        Self { uuid, options, files: BTreeMap::new(), links: BTreeMap::new() }
    }

    pub(super) fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = uuid.into();
        self
    }

    /// `mke2fs -O`.
    pub(super) fn options(mut self, options: &str) -> Self {
        self.options = options.into();
        self
    }

    pub(super) fn file(mut self, path: &str, content: &[u8]) -> Self {
        self.files.insert(path.into(), content.into());
        self
    }

    pub(super) fn link(mut self, path: &str, target: &str) -> Self {
        self.links.insert(path.into(), target.into());
        self
    }

    pub(super) fn without(mut self, path: &str) -> Self {
        self.files.remove(path).unwrap();
        self
    }
}

pub(super) fn ext4(image: &Ext4Image) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (tree, file) = (dir.path().join("tree"), dir.path().join("image"));
    std::fs::create_dir(&tree).unwrap();
    for (path, content) in &image.files {
        std::fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        std::fs::write(tree.join(path), content).unwrap();
    }
    for (path, target) in &image.links {
        symlink(target, tree.join(path)).unwrap();
    }
    let mut mke2fs = e2fsprogs("mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-b", "1024", "-U", &image.uuid, "-O", &image.options]);
    said(mke2fs.arg("-d").args([&tree, &file]).arg("4M"));
    std::fs::read(file).unwrap()
}

/// Puts a transaction into the journal, as a guest leaves it that was switched off: the first
/// block of a file has new content there, and only there.
pub(super) fn with_journalled_write(image: &[u8], path: &str, content: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (file, block) = (dir.path().join("image"), dir.path().join("block"));
    std::fs::write(&file, image).unwrap();
    let mut bytes = content.to_vec();
    bytes.resize(1024, 0);
    std::fs::write(&block, bytes).unwrap();
    let number = said(e2fsprogs("debugfs").args(["-R", &format!("bmap {path} 0")]).arg(&file));
    let commands = dir.path().join("commands");
    let text = format!(
        "journal_open -c -v 3\njournal_write -b {} {}\njournal_close\n",
        number.trim(),
        block.display()
    );
    std::fs::write(&commands, text).unwrap();
    said(e2fsprogs("debugfs").args(["-w", "-f"]).args([&commands, &file]));
    std::fs::read(file).unwrap()
}

fn e2fsprogs(program: &str) -> Command {
    let mut command = Command::new(program);
    // Not in everyone's PATH.
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    command.env("PATH", path);
    command
}

/// Runs a program; answers what it says.
fn said(command: &mut Command) -> String {
    let output = command.output().expect("e2fsprogs, which scripts/setup installs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

pub(super) fn vfat(mebibytes: usize, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; mebibytes << 20]);
    let mut options = fatfs::FormatVolumeOptions::new().volume_id(0x1234_abcd);
    if mebibytes >= 64 {
        options = options.bytes_per_cluster(512).fat_type(fatfs::FatType::Fat32);
    }
    fatfs::format_volume(&mut image, options).unwrap();
    image.set_position(0);
    {
        let filesystem = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
        for (path, content) in files {
            let mut directory = filesystem.root_dir();
            let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
            for parent in parents.split('/').filter(|parent| !parent.is_empty()) {
                directory = directory.create_dir(parent).unwrap();
            }
            directory.create_file(name).unwrap().write_all(content).unwrap();
        }
    }
    image.into_inner()
}

fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Where each part goes, in sectors, and the sectors of the whole.
fn places(parts: &[Vec<u8>]) -> (Vec<(usize, usize)>, usize) {
    let mut next = ALIGNMENT;
    let places = parts.iter().map(|part| {
        let place = (next, part.len().div_ceil(SECTOR));
        // One more, for the link of a logical partition in front of the next.
        next = (place.0 + place.1 + 1).next_multiple_of(ALIGNMENT);
        place
    });
    (places.collect(), next + ALIGNMENT)
}

pub(super) fn gpt(parts: &[Vec<u8>]) -> Vec<u8> {
    let (places, sectors) = places(parts);
    let mut disk = vec![0; sectors * SECTOR];
    let mut entries = vec![0; 128 * 128];
    for (index, ((start, length), part)) in places.iter().zip(parts).enumerate() {
        put(&mut disk, start * SECTOR, part);
        let at = index * 128;
        put(&mut entries, at, &[0xaf; 16]);
        put(&mut entries, at + 32, &(*start as u64).to_le_bytes());
        put(&mut entries, at + 40, &((start + length - 1) as u64).to_le_bytes());
    }
    put(&mut disk, 446, &[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    put(&mut disk, 510, &[0x55, 0xaa]);
    let last = sectors - 1;
    for (own, other, entries_at) in [(1, last, 2), (last, 1, last - 32)] {
        let mut header = [0; 92];
        put(&mut header, 0, b"EFI PART\0\0\x01\0\x5c\0\0\0");
        put(&mut header, 24, &(own as u64).to_le_bytes());
        put(&mut header, 32, &(other as u64).to_le_bytes());
        put(&mut header, 72, &(entries_at as u64).to_le_bytes());
        put(&mut header, 80, &128u32.to_le_bytes());
        put(&mut header, 84, &128u32.to_le_bytes());
        put(&mut header, 88, &crc32fast::hash(&entries).to_le_bytes());
        let crc = crc32fast::hash(&header);
        put(&mut header, 16, &crc.to_le_bytes());
        put(&mut disk, own * SECTOR, &header);
        put(&mut disk, entries_at * SECTOR, &entries);
    }
    disk
}

/// The first table's checksums, after a change of its entries.
pub(super) fn mend_gpt(disk: &mut [u8]) {
    let entries = crc32fast::hash(&disk[2 * SECTOR..2 * SECTOR + 128 * 128]);
    put(disk, SECTOR + 88, &entries.to_le_bytes());
    put(disk, SECTOR + 16, &[0; 4]);
    let header = crc32fast::hash(&disk[SECTOR..SECTOR + 92]);
    put(disk, SECTOR + 16, &header.to_le_bytes());
}

/// The fourth and later ones are logical when there are more than four.
pub(super) fn mbr(parts: &[Vec<u8>]) -> Vec<u8> {
    let (places, sectors) = places(parts);
    let mut disk = vec![0; sectors * SECTOR];
    let entry =
        |disk: &mut [u8], at: usize, index: usize, kind: u8, start: usize, length: usize| {
            let at = at * SECTOR + 446 + index * 16;
            put(disk, at, &[0, 0, 0, 0, kind]);
            put(disk, at + 8, &(start as u32).to_le_bytes());
            put(disk, at + 12, &(length as u32).to_le_bytes());
        };
    put(&mut disk, 510, &[0x55, 0xaa]);
    let primary = if parts.len() > 4 { 3 } else { parts.len() };
    for (index, ((start, length), part)) in places.iter().zip(parts).enumerate() {
        put(&mut disk, start * SECTOR, part);
        if index < primary {
            entry(&mut disk, 0, index, 0x83, *start, *length);
            continue;
        }
        // The link lies in the sector in front.
        let base = places[primary].0 - 1;
        put(&mut disk, (start - 1) * SECTOR + 510, &[0x55, 0xaa]);
        entry(&mut disk, start - 1, 0, 0x83, 1, *length);
        if let Some((next, length)) = places.get(index + 1) {
            entry(&mut disk, start - 1, 1, 0x05, next - 1 - base, length + 1);
        }
        if index == primary {
            entry(&mut disk, 0, 3, 0x05, base, sectors - base);
        }
    }
    disk
}
