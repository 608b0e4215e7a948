//! Where things are.

use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Files that are slow to make, kept outside the source tree: `$DROVER_CACHE`, or
/// `~/.cache/drover`.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("DROVER_CACHE") {
        return dir.into();
    }
    let home = std::env::var_os("HOME").map_or_else(|| PathBuf::from("/root"), PathBuf::from);
    home.join(".cache/drover")
}

/// Where cargo puts what it builds: `$CARGO_TARGET_DIR`, or `target` in the cache.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| cache_dir().join("target"), PathBuf::from)
}

/// The same for the guests' own program. A clone with a folder of its own shares no guest either.
pub fn guest_target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(
        || cache_dir().join("target-guest"),
        |target| PathBuf::from(target).join("guest"),
    )
}

/// A program of the workspace, as the dev profile builds it.
pub fn program(name: &str) -> PathBuf {
    target_dir().join("debug").join(name)
}

/// Sockets, logs and state of the lab of that name.
pub fn run_dir(lab: &str) -> PathBuf {
    Path::new("/run/drover-lab").join(lab)
}

/// The disks of the lab of that name.
pub fn disk_dir(lab: &str) -> PathBuf {
    cache_dir().join("lab/disks").join(lab)
}

/// The source tree: the one that cargo is at work in, or else the one around the current folder.
/// (Not where this program was compiled: clones may share what cargo builds.)
pub fn source_dir() -> Result<PathBuf> {
    let start = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let start = match start {
        Some(dir) => dir,
        None => std::env::current_dir().map_err(Error::io("cannot find", "the current folder"))?,
    };
    let found = start.ancestors().find(|dir| dir.join("e2e/image/build-root").is_file());
    found.map(Path::to_owned).ok_or_else(|| {
        Error::other(format!("{}: expected to be run inside Drover's source tree", start.display()))
    })
}
