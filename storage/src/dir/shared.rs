//! What a directory needs beyond a node's own to be a pool that several nodes have mounted: an
//! identity, and news of what the others did.
//!
//! ```text
//! drover-pool         the pool's identity, a UUID: which pool this is, wherever it is mounted
//! new/<node>/<random> unfinished; removed by that node's clean_up alone
//! new/<image>         locked by the node that brings the image
//! ```
//!
//! The identity is made by the operator, once, and never here: an empty directory may be the mount
//! point of a filesystem that is not mounted, and whoever took it for a new pool would find that
//! all volumes are gone. That is also why nothing counts as missing before the identity was seen
//! again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Statx, StatxFlags};
use rustix::io::Errno;
use uuid::Uuid;

use crate::pool::{ImageClaim, ImageId};
use crate::{PoolError, Result};

/// The file with the identity.
const FILE: &str = "drover-pool";
/// A UUID and its line's end; one byte more is one too many.
const FILE_BYTES_MAX: u64 = 64;
/// What a network filesystem calls files that are removed while they are open.
const REMOVED: &str = ".nfs";

/// Which pool it is, and who asks.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) uid: String,
    /// The node: drafts bear its name.
    pub(super) maker: String,
}

impl Shared {
    /// Reads the identity of the pool in `root`. `Err` says what is wrong.
    pub(super) fn read(root: &Path, maker: &str) -> std::result::Result<Self, String> {
        let path = root.join(FILE);
        let file = File::open(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => format!(
                "{}: is not there: mount the filesystem; or, if this is to be a new pool: \
                 cp /proc/sys/kernel/random/uuid {}",
                path.display(),
                path.display()
            ),
            _ => format!("{}: {error}", path.display()),
        })?;
        let mut text = String::new();
        let read = file.take(FILE_BYTES_MAX).read_to_string(&mut text);
        read.map_err(|error| format!("{}: {error}", path.display()))?;
        match Uuid::try_parse(text.trim()) {
            Ok(uuid) if !uuid.is_nil() => {
                Ok(Self { uid: uuid.as_hyphenated().to_string(), maker: maker.to_owned() })
            }
            _ => Err(format!("{}: {:?}: is no UUID", path.display(), text.trim())),
        }
    }

    /// Checks that the pool is still there, and still this one.
    pub(super) fn check(&self, root: &Path) -> std::result::Result<(), String> {
        let found = Self::read(root, &self.maker)?;
        if found.uid == self.uid {
            return Ok(());
        }
        Err(format!(
            "another pool is there now, {}; this was {}: mount the right one",
            found.uid, self.uid
        ))
    }

    /// Where this node's drafts are.
    pub(super) fn drafts(&self, root: &Path) -> PathBuf {
        root.join("new").join(&self.maker)
    }

    /// See [`crate::pool::Pool::claim_image`].
    pub(super) fn claim(&self, root: &Path, image: ImageId) -> Result<ImageClaim> {
        let path = root.join("new").join(image.to_string());
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(&path).map_err(PoolError::io("create", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(ImageClaim::new(file, path)),
            Err(Errno::WOULDBLOCK) => {
                Err(PoolError::Busy { what: format!("image {image}, which another node brings") })
            }
            Err(error) => Err(PoolError::io("lock", &path)(error.into())),
        }
    }
}

/// Whether it is only the name of what is removed already.
pub(super) fn is_removed(name: &str) -> bool {
    name.starts_with(REMOVED)
}

/// What the server says of a file now, and not what this node has kept in mind: of its directory
/// first, by which a network filesystem knows whether names have come or gone. Elsewhere this is
/// a plain look.
pub(super) fn look(path: &Path) -> io::Result<Statx> {
    if let Some(parent) = path.parent() {
        refresh(parent)?;
    }
    Ok(rustix::fs::statx(
        CWD,
        path,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_FORCE_SYNC,
        StatxFlags::BASIC_STATS,
    )?)
}

/// See [`look`].
pub(super) fn refresh(dir: &Path) -> io::Result<()> {
    rustix::fs::statx(CWD, dir, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)?;
    Ok(())
}

/// Makes the directory for this node's drafts.
pub(super) fn make_drafts(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(PoolError::io("create directory", path)),
    }
}
