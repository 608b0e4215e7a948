//! One face for the filesystems that a machine boots from, chosen by their magic.

use std::io;

use super::ext4::{self, Ext4};
use super::fat::Fat;
use super::read::Window;

/// Most names in a directory that is listed or searched.
pub(super) const NAMES_MAX: usize = 4096;
/// Most components of a path, with those of the symbolic links on it.
pub(super) const PATH_STEPS_MAX: usize = 64;
/// Longest path or symbolic link, bytes.
pub(super) const PATH_BYTES_MAX: usize = 4096;
/// Most symbolic links on the way to a file.
pub(super) const LINKS_MAX: usize = 16;

/// What cannot be read but can be named: offset, magic, name.
const OTHERS: &[(u64, &[u8], &str)] = &[
    (0, b"XFSB", "XFS"),
    (0x1_0040, b"_BHRfS_M", "Btrfs"),
    (0, b"LUKS\xba\xbe", "LUKS (encrypted)"),
    (512, b"LABELONE", "LVM"),
    (3, b"NTFS    ", "NTFS"),
    (0, b"hsqs", "SquashFS"),
    (4086, b"SWAPSPACE2", "swap"),
];

/// Why a file was not read.
#[derive(Debug, thiserror::Error)]
pub(super) enum FsError {
    #[error("is not there")]
    NotFound,
    #[error("is no regular file")]
    NoFile,
    #[error("has {bytes} bytes, more than {bytes_max}")]
    TooLarge { bytes: u64, bytes_max: u64 },
    #[error("lies too deep: too many directories or symbolic links")]
    TooDeep,
    #[error("lies in a directory of more than {NAMES_MAX} names")]
    TooMany,
    #[error("the filesystem is damaged: {0}")]
    Damaged(String),
    #[error("the filesystem cannot be read here: {0}")]
    Unsupported(String),
}

impl From<io::Error> for FsError {
    fn from(error: io::Error) -> Self {
        Self::Damaged(error.to_string())
    }
}

/// A mounted filesystem, to read only.
pub(super) enum Filesystem {
    Ext4(Box<Ext4>),
    Fat(Fat),
}

/// What lies in a part of a disk.
pub(super) enum Content {
    Readable(Filesystem),
    /// Known by name, but nothing that can be read here.
    Other(&'static str),
    Unknown,
}

impl Filesystem {
    /// Looks what lies there.
    ///
    /// # Errors
    /// When the magic is right and the rest is not.
    pub(super) fn open(volume: &Window) -> Result<Content, FsError> {
        if ext4::is_ext4(volume) {
            return Ok(Content::Readable(Self::Ext4(Box::new(Ext4::open(volume)?))));
        }
        for (offset, magic, name) in OTHERS {
            let mut bytes = vec![0; magic.len()];
            if volume.read(*offset, &mut bytes).is_ok() && bytes == *magic {
                return Ok(Content::Other(name));
            }
        }
        match Fat::open(volume)? {
            Some(fat) => Ok(Content::Readable(Self::Fat(fat))),
            None => Ok(Content::Unknown),
        }
    }

    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Ext4(_) => "ext4",
            Self::Fat(_) => "vfat",
        }
    }

    /// As `blkid` prints it.
    pub(super) fn uuid(&self) -> String {
        match self {
            Self::Ext4(ext4) => ext4.uuid(),
            Self::Fat(fat) => fat.uuid(),
        }
    }

    pub(super) fn label(&self) -> &str {
        match self {
            Self::Ext4(ext4) => ext4.label(),
            Self::Fat(fat) => fat.label(),
        }
    }

    /// The names in a directory; none when it is not there.
    pub(super) fn list(&self, path: &str) -> Result<Vec<String>, FsError> {
        let components = components(path)?;
        let names = match self {
            Self::Ext4(ext4) => ext4.list(&components),
            Self::Fat(fat) => {
                fat.list(&components).map(|e| e.into_iter().map(|e| e.name).collect())
            }
        };
        match names {
            Err(FsError::NotFound) => Ok(Vec::new()),
            names => names,
        }
    }

    /// A file's bytes.
    pub(super) fn read(&self, path: &str, bytes_max: u64) -> Result<Vec<u8>, FsError> {
        let components = components(path)?;
        match self {
            Self::Ext4(ext4) => ext4.read(&components, bytes_max),
            Self::Fat(fat) => fat.read(&components, bytes_max),
        }
    }

    /// A file's bytes, if it is there.
    pub(super) fn read_if_there(
        &self,
        path: &str,
        bytes_max: u64,
    ) -> Result<Option<Vec<u8>>, FsError> {
        match self.read(path, bytes_max) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(FsError::NotFound | FsError::NoFile) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) fn exists(&self, path: &str) -> Result<bool, FsError> {
        let components = components(path)?;
        match self {
            Self::Ext4(ext4) => ext4.exists(&components),
            Self::Fat(fat) => fat.exists(&components),
        }
    }
}

/// The names of an absolute path; `..` is resolved by the words alone.
fn components(path: &str) -> Result<Vec<&str>, FsError> {
    if path.len() > PATH_BYTES_MAX || path.contains('\0') {
        return Err(FsError::TooDeep);
    }
    let mut components = Vec::new();
    for name in path.split('/').filter(|name| !name.is_empty() && *name != ".") {
        if name == ".." {
            components.pop();
        } else if components.len() == PATH_STEPS_MAX || name.len() > 255 {
            return Err(FsError::TooDeep);
        } else {
            components.push(name);
        }
    }
    Ok(components)
}
