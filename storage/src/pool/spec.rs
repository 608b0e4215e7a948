//! A pool's specification, as an agent's flag gives it.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::PoolError;

/// The longest name of a volume group or thin pool, a hyphen counted as two characters as the
/// device mapper writes it. That allows 127 for a device, of which an image's name takes 77.
const LVM_NAME_CHARS_MAX: usize = 48;
const ACCEPTED: &str = "lvm:VG/THINPOOL, dir:/absolute/path or shared:/absolute/path";

/// Where a pool is, and of what kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PoolSpec {
    /// A thin pool of LVM's: `lvm:VG/THINPOOL`.
    Lvm {
        /// The volume group.
        vg: String,
        /// The thin pool in it.
        thin_pool: String,
    },
    /// A directory with raw files: `dir:/path`.
    Dir {
        /// The directory; it must exist.
        path: PathBuf,
    },
    /// The same on a filesystem that several nodes have mounted: `shared:/path`.
    Shared {
        /// The directory; it must exist, and hold the pool's identity.
        path: PathBuf,
    },
}

impl FromStr for PoolSpec {
    type Err = PoolError;

    fn from_str(text: &str) -> Result<Self, PoolError> {
        let invalid = || PoolError::invalid("pool", format!("{text:?}"), ACCEPTED);
        match text.split_once(':').ok_or_else(invalid)? {
            ("lvm", rest) => {
                let (vg, thin_pool) = rest.split_once('/').ok_or_else(invalid)?;
                if !is_lvm_name(vg) || !is_lvm_name(thin_pool) {
                    let accepted = format!(
                        "lvm:VG/THINPOOL, names of 1 to {LVM_NAME_CHARS_MAX} letters, digits or \
                         any of +_.- (no hyphen first; each counts as two)"
                    );
                    return Err(PoolError::invalid("pool", format!("{text:?}"), accepted));
                }
                Ok(Self::Lvm { vg: vg.into(), thin_pool: thin_pool.into() })
            }
            ("dir", path) if Path::new(path).is_absolute() => Ok(Self::Dir { path: path.into() }),
            ("shared", path) if Path::new(path).is_absolute() => {
                Ok(Self::Shared { path: path.into() })
            }
            _ => Err(invalid()),
        }
    }
}

impl fmt::Display for PoolSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lvm { vg, thin_pool } => write!(f, "lvm:{vg}/{thin_pool}"),
            Self::Dir { path } => write!(f, "dir:{}", path.display()),
            Self::Shared { path } => write!(f, "shared:{}", path.display()),
        }
    }
}

/// What LVM takes as a name; in particular nothing that could be an option.
fn is_lvm_name(name: &str) -> bool {
    let is_char = |c: char| c.is_ascii_alphanumeric() || "+_.-".contains(c);
    let length = name.len() + name.matches('-').count();
    (1..=LVM_NAME_CHARS_MAX).contains(&length)
        && name.chars().all(is_char)
        && !name.starts_with('-')
        && ![".", ".."].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn good_ones_are_read_and_shown_alike() {
        for text in
            ["lvm:vg0/thin", "lvm:a.b_c-d+1/POOL", "dir:/var/lib/drover/pool", "shared:/mnt/a"]
        {
            assert_eq!(text.parse::<PoolSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_ones_are_refused_with_what_is_accepted() {
        let hyphens = format!("lvm:a{}/thin", "-".repeat(LVM_NAME_CHARS_MAX / 2));
        let long = format!("lvm:{}/thin", "x".repeat(LVM_NAME_CHARS_MAX + 1));
        for text in [
            "",
            "lvm",
            "lvm:",
            "lvm:vg",
            "lvm:vg/",
            "lvm:/thin",
            "lvm:-a/thin",
            "lvm:vg/--yes",
            "lvm:vg/a/b",
            "lvm:vg/a b",
            "lvm:../x",
            "lvm:vg/\u{e9}",
            "dir:",
            "dir:relative",
            "shared:relative",
            "zfs:x",
            "LVM:vg/thin",
            &long,
            &hyphens,
        ] {
            let error = text.parse::<PoolSpec>().unwrap_err().to_string();
            assert!(error.starts_with("pool: ") && error.contains("accepted is"), "{error}");
        }
    }
}
