//! ext2, ext3 and ext4, through the crate `ext4-view`, which also reads what a guest that was
//! switched off has left in the journal.
//!
//! The crate trusts a few numbers that a guest can choose: it would panic or ask for absurd
//! amounts of memory. These are checked here first, and symbolic links are followed here, where
//! their number and length are bounded.

use ext4_view::{Ext4 as View, Ext4Error, Ext4Read, Metadata};

use super::filesystem::{FsError, LINKS_MAX, NAMES_MAX, PATH_BYTES_MAX, PATH_STEPS_MAX};
use super::read::{Fields, Window};

const SUPERBLOCK_START: u64 = 1024;
const MAGIC_OFFSET: usize = 0x38;
const MAGIC: u16 = 0xef53;
/// Blocks are at most 64 KiB (2^(10+6)).
const LOG_BLOCK_BYTES_MAX: u32 = 6;
/// Most block groups: 64 TiB in groups of 128 MiB.
const GROUPS_MAX: u64 = 1 << 19;
const INODE_BYTES_MIN: u16 = 128;
const FEATURES_INCOMPATIBLE: usize = 0x60;
const FEATURE_64_BIT: u32 = 0x80;
/// The journal has what the filesystem has not.
const FEATURE_RECOVER: u8 = 4;
const FEATURES_READ_ONLY: usize = 0x64;
const FEATURE_CHECKSUMS: u32 = 0x400;
const DESCRIPTOR_BYTES_64_BIT_MIN: u16 = 64;

/// A mounted filesystem.
pub(super) struct Ext4 {
    view: View,
    bytes: u64,
}

/// The filesystem as the crate reads it.
struct Reader {
    volume: Window,
    /// Says that there is nothing in the journal.
    without_journal: bool,
}

impl Ext4Read for Reader {
    fn read(
        &mut self,
        start_byte: u64,
        target: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        self.volume.read(start_byte, target)?;
        let flags = SUPERBLOCK_START + FEATURES_INCOMPATIBLE as u64;
        let flags = flags.checked_sub(start_byte).and_then(|at| target.get_mut(at as usize));
        if let Some(flags) = flags.filter(|_| self.without_journal) {
            *flags &= !FEATURE_RECOVER;
        }
        Ok(())
    }
}

/// Whether the superblock's magic is there.
pub(super) fn is_ext4(volume: &Window) -> bool {
    let magic = volume.array(SUPERBLOCK_START + MAGIC_OFFSET as u64);
    magic.is_ok_and(|magic: [u8; 2]| u16::from_le_bytes(magic) == MAGIC)
}

impl Ext4 {
    pub(super) fn open(volume: &Window) -> Result<Self, FsError> {
        let superblock = volume.array(SUPERBLOCK_START)?;
        check_superblock(&superblock)?;
        let load = |without_journal: bool| {
            View::load(Box::new(Reader { volume: volume.clone(), without_journal }))
        };
        let has_checksums = Fields(&superblock).u32(FEATURES_READ_ONLY) & FEATURE_CHECKSUMS != 0;
        let view = match load(false) {
            // Filesystems of long ago have journals that the crate does not know. Boot loaders
            // read none at all, and neither is it read here then.
            Err(Ext4Error::Incompatible(_)) if !has_checksums => load(true)?,
            loaded => loaded?,
        };
        Ok(Self { view, bytes: volume.size() })
    }

    pub(super) fn uuid(&self) -> String {
        self.view.uuid().to_string()
    }

    pub(super) fn label(&self) -> &str {
        self.view.label().to_str().unwrap_or_default()
    }

    pub(super) fn list(&self, components: &[&str]) -> Result<Vec<String>, FsError> {
        let (path, metadata) = self.resolve(components)?;
        if !metadata.is_dir() {
            return Err(FsError::NotFound);
        }
        let mut names = Vec::new();
        for entry in self.view.read_dir(path.as_str())? {
            let entry = entry?;
            // Whatever is no UTF-8 is nothing that we look for.
            let Ok(name) = entry.file_name().as_str().map(str::to_owned) else { continue };
            if names.len() == NAMES_MAX {
                return Err(FsError::TooMany);
            }
            names.push(name);
        }
        Ok(names)
    }

    pub(super) fn read(&self, components: &[&str], bytes_max: u64) -> Result<Vec<u8>, FsError> {
        let (path, metadata) = self.resolve(components)?;
        if !metadata.file_type().is_regular_file() {
            return Err(FsError::NoFile);
        }
        let bytes = metadata.len();
        if bytes > bytes_max {
            return Err(FsError::TooLarge { bytes, bytes_max });
        }
        // A file with holes could be, but none that a machine boots from.
        if bytes > self.bytes {
            return Err(FsError::Damaged("a file is larger than the filesystem".into()));
        }
        let mut file = self.view.open(path.as_str())?;
        let mut content = vec![0; bytes as usize];
        let mut done = 0;
        while done < content.len() {
            match file.read_bytes(&mut content[done..])? {
                0 => return Err(FsError::Damaged("a file ends early".into())),
                read => done += read,
            }
        }
        Ok(content)
    }

    pub(super) fn exists(&self, components: &[&str]) -> Result<bool, FsError> {
        match self.resolve(components) {
            Ok(_) => Ok(true),
            Err(FsError::NotFound) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Follows symbolic links. Answers a path without any, and what lies there.
    fn resolve(&self, components: &[&str]) -> Result<(String, Metadata), FsError> {
        let mut ahead: Vec<String> = components.iter().rev().map(|c| (*c).to_owned()).collect();
        let mut path = String::from("/");
        let mut metadata = self.view.symlink_metadata("/")?;
        let (mut steps, mut links) = (0, 0);
        while let Some(component) = ahead.pop() {
            steps += 1;
            if steps > PATH_STEPS_MAX || path.len() + component.len() > PATH_BYTES_MAX {
                return Err(FsError::TooDeep);
            }
            if !metadata.is_dir() {
                return Err(FsError::NotFound);
            }
            if component == ".." {
                path.truncate(path.rfind('/').unwrap_or_default().max(1));
                metadata = self.view.symlink_metadata(path.as_str())?;
                continue;
            }
            let there = format!("{}/{component}", path.trim_end_matches('/'));
            let found = self.view.symlink_metadata(there.as_str())?;
            if !found.is_symlink() {
                (path, metadata) = (there, found);
                continue;
            }
            links += 1;
            if links > LINKS_MAX {
                return Err(FsError::TooDeep);
            }
            // Asked before the crate makes room for all of it.
            if found.len() > PATH_BYTES_MAX as u64 {
                return Err(FsError::Damaged("a symbolic link is too long".into()));
            }
            let target = self.view.read_link(there.as_str())?;
            let Ok(target) = target.to_str() else { return Err(FsError::NotFound) };
            if target.starts_with('/') {
                "/".clone_into(&mut path);
                metadata = self.view.symlink_metadata("/")?;
            }
            let names = target.split('/').rev().filter(|name| !name.is_empty() && *name != ".");
            ahead.extend(names.map(str::to_owned));
            if ahead.len() > PATH_STEPS_MAX {
                return Err(FsError::TooDeep);
            }
        }
        Ok((path, metadata))
    }
}

fn check_superblock(superblock: &[u8; 1024]) -> Result<(), FsError> {
    let fields = Fields(superblock);
    let check = |is_fine: bool, what: &str| match is_fine {
        true => Ok(()),
        false => Err(FsError::Damaged(format!("its superblock has an impossible {what}"))),
    };
    let log_block_bytes = fields.u32(0x18);
    check(log_block_bytes <= LOG_BLOCK_BYTES_MAX, "block size")?;
    let block_bytes = 1024u32 << log_block_bytes;
    let group_blocks = fields.u32(0x20);
    check((1..=block_bytes * 8).contains(&group_blocks), "size of block groups")?;
    let is_64_bit = fields.u32(FEATURES_INCOMPATIBLE) & FEATURE_64_BIT != 0;
    // The crate takes the upper half whether or not the filesystem has 64 bits.
    let blocks = u64::from(fields.u32(0x150)) << 32 | u64::from(fields.u32(4));
    check(blocks.div_ceil(group_blocks.into()) <= GROUPS_MAX, "size")?;
    let inode_bytes = fields.u16(0x58);
    let inode_fits = inode_bytes >= INODE_BYTES_MIN && u32::from(inode_bytes) <= block_bytes;
    check(inode_fits, "size of inodes")?;
    let descriptor_bytes = fields.u16(0xfe);
    let descriptor_fits = !is_64_bit
        || (descriptor_bytes >= DESCRIPTOR_BYTES_64_BIT_MIN
            && u32::from(descriptor_bytes) <= block_bytes);
    check(descriptor_fits, "size of group descriptors")
}

impl From<Ext4Error> for FsError {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::NotFound | Ext4Error::NotADirectory => Self::NotFound,
            Ext4Error::IsADirectory | Ext4Error::IsASpecialFile => Self::NoFile,
            Ext4Error::PathTooLong | Ext4Error::TooManySymlinks => Self::TooDeep,
            Ext4Error::Incompatible(features) => Self::Unsupported(features.to_string()),
            Ext4Error::Encrypted => Self::Unsupported("an encrypted directory".into()),
            other => Self::Damaged(other.to_string()),
        }
    }
}
