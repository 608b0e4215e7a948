//! Thin volumes in the lab host's own pool, as its agent would make them, and what they hold.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::run;
use crate::{Error, Result};

const GROUP: &str = "drover";
const POOL: &str = "drover/thin";
const UDEV_PATIENCE: &str = "--timeout=60";
const CHUNK_BYTES: usize = 1 << 20;

/// A thin volume; removed when dropped.
pub(super) struct Volume {
    name: String,
}

impl Volume {
    /// A blank one. What a run that was killed has left behind under its name is removed first.
    pub(super) fn make(name: &str, bytes: u64) -> Result<Self> {
        remove(name);
        let size = format!("{bytes}b");
        let mut command = Command::new("lvcreate");
        command.args(["--type", "thin", "--thinpool", POOL, "--name", name]);
        command.args(["--virtualsize", &size, "--yes"]);
        run(&mut command)?;
        settle()?;
        Ok(Self { name: name.to_owned() })
    }

    pub(super) fn path(&self) -> PathBuf {
        path_of(&self.name)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        remove(&self.name);
    }
}

/// Where a volume of that name is.
pub(super) fn path_of(name: &str) -> PathBuf {
    Path::new("/dev").join(GROUP).join(name)
}

fn remove(name: &str) {
    if path_of(name).exists() {
        // Nothing else to be done about it: the next run tries again.
        let _ = run(Command::new("lvremove").args(["--yes"]).arg(path_of(name)));
    }
}

/// Fills a volume's first bytes with noise that can be computed again, durably.
pub(super) fn fill(path: &Path, bytes: u64) -> Result<()> {
    write_noise(path, bytes)?;
    settle()
}

fn write_noise(path: &Path, bytes: u64) -> Result<()> {
    let fill = || {
        let file = File::options().write(true).open(path)?;
        for_each_chunk(bytes, |chunk, offset| file.write_all_at(chunk, offset))?;
        file.sync_all()
    };
    fill().map_err(Error::io("cannot fill", path))
}

/// Whenever a volume has been made, or closed by one who wrote, udev looks at it, and locks it
/// meanwhile: a VMM would find it in use.
fn settle() -> Result<()> {
    run(Command::new("udevadm").args(["settle", UDEV_PATIENCE])).map(|_| ())
}

/// Checks that it still holds that noise.
pub(super) fn check(path: &Path, bytes: u64) -> Result<()> {
    let mut wrong = None;
    let mut check = || {
        let file = File::open(path)?;
        let mut held = vec![0; CHUNK_BYTES];
        for_each_chunk(bytes, |chunk, offset| {
            file.read_exact_at(&mut held, offset)?;
            if held != chunk {
                wrong = wrong.or(Some(offset));
            }
            Ok(())
        })
    };
    check().map_err(Error::io("cannot read", path))?;
    match wrong {
        None => Ok(()),
        Some(offset) => {
            let path = path.display();
            Err(Error::other(format!("{path}: the MiB at {offset} is not what was written")))
        }
    }
}

fn for_each_chunk(
    bytes: u64,
    mut work: impl FnMut(&[u8], u64) -> std::io::Result<()>,
) -> std::io::Result<()> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for offset in (0..bytes).step_by(CHUNK_BYTES) {
        for word in chunk.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_ne_bytes());
        }
        work(&chunk, offset)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What was filled is found again, and one byte that differs is noticed.
    #[test]
    fn a_byte_that_differs_is_noticed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let bytes = 3 * CHUNK_BYTES as u64;
        write_noise(file.path(), bytes).unwrap();
        check(file.path(), bytes).unwrap();
        let open = File::options().read(true).write(true).open(file.path()).unwrap();
        let mut byte = [0];
        open.read_exact_at(&mut byte, bytes - 1).unwrap();
        open.write_all_at(&[!byte[0]], bytes - 1).unwrap();
        let error = check(file.path(), bytes).unwrap_err();
        assert!(error.to_string().contains("the MiB at 2097152"), "{error}");
    }
}
