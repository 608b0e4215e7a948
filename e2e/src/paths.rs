//! Where things are.

use std::path::{Path, PathBuf};

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

/// The source tree.
pub fn source_dir() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}
