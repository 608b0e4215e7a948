//! What every lab starts from: a root disk, a kernel, an initramfs, and a disk with our programs;
//! and the image that domains with disks are made from.
//!
//! The root disk and the image take minutes and are kept in the cache under a hash of their recipe;
//! the rest takes a second and is made again for each lab.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::run;
use crate::{Error, Result, initramfs, paths};

/// What other recipes made is kept for labs that still run from it: so many of each kind.
const BUILT_MAX: usize = 3;

/// Debian for the hosts, made by `e2e/image/build-root`.
#[derive(Debug, Clone)]
pub struct RootImage {
    dir: PathBuf,
}

impl RootImage {
    /// The image of the present recipe; built first when the cache has none.
    pub fn ensure() -> Result<Self> {
        let dir = ensure_built("root", "build-root", &["build-root", "files"], "root.ext4")?;
        Ok(Self { dir })
    }

    /// The whole root filesystem, never written to.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("root.ext4")
    }
    /// The stock kernel of hosts and guests.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }
    /// Logs in as root on every host.
    pub fn ssh_key(&self) -> PathBuf {
        self.dir.join("ssh_key")
    }
    /// The hosts' own key.
    pub fn known_hosts(&self) -> PathBuf {
        self.dir.join("known_hosts")
    }
    fn modules(&self) -> PathBuf {
        self.dir.join("modules")
    }
}

/// A stock Debian 13 for domains with disks, made by `e2e/image/build-debian`.
#[derive(Debug, Clone)]
pub struct GuestImage {
    dir: PathBuf,
}

impl GuestImage {
    /// The image of the present recipe; built first when the cache has none.
    pub fn ensure() -> Result<Self> {
        let recipe = ["build-debian", "debian"];
        let dir = ensure_built("debian13", "build-debian", &recipe, "debian13.raw")?;
        Ok(Self { dir })
    }

    /// The disk: sparse, never written to.
    pub fn raw(&self) -> PathBuf {
        self.dir.join("debian13.raw")
    }
    /// The same, as qcow2.
    pub fn qcow2(&self) -> PathBuf {
        self.dir.join("debian13.qcow2")
    }
}

/// Debian's fio with its libraries as an archive that goes over an initramfs, made by
/// `e2e/image/build-fio`.
pub fn ensure_fio() -> Result<PathBuf> {
    let file = "fio.cpio";
    Ok(ensure_built("fio", "build-fio", &["build-fio"], file)?.join(file))
}

/// The packages of a kernel that is newer than the guest image's, as an archive, made by
/// `e2e/image/build-kernel`.
pub fn ensure_kernel() -> Result<PathBuf> {
    let file = "kernel.tar";
    Ok(ensure_built("kernel", "build-kernel", &["build-kernel"], file)?.join(file))
}

/// The folder of what `e2e/image/{program}` builds, in the cache under a hash of its recipe. The
/// file `last` is there when it is complete.
fn ensure_built(name: &str, program: &str, recipe: &[&str], last: &str) -> Result<PathBuf> {
    let source = paths::source_dir()?;
    let cache = paths::cache_dir().join("lab");
    fs::create_dir_all(&cache).map_err(Error::io("cannot create", &cache))?;
    let hash = hash_of_recipe(&source, recipe)?;
    let dir = cache.join(format!("{name}-{hash:016x}"));
    let _only_one = lock(&cache.join(format!("{name}.lock")))?;
    if !dir.join(last).exists() {
        fs::create_dir_all(&dir).map_err(Error::io("cannot create", &dir))?;
        let program = source.join("e2e/image").join(program);
        let status =
            Command::new(&program).arg(&dir).status().map_err(Error::io("cannot run", &program))?;
        if !status.success() {
            return Err(Error::other(format!(
                "{} could not be built ({}: {status})",
                dir.display(),
                program.display()
            )));
        }
    }
    touch(&dir)?;
    keep_newest(&cache, &format!("{name}-"), BUILT_MAX)?;
    Ok(dir)
}

/// Used lately: not the next to be removed.
pub(crate) fn touch(dir: &Path) -> Result<()> {
    let now = std::time::SystemTime::now();
    let touched = fs::File::open(dir).and_then(|dir| dir.set_modified(now));
    touched.map_err(Error::io("cannot touch", dir))
}

/// Builds the guests' init and the initramfs around it, in `dir`.
pub fn make_initramfs(image: &RootImage, dir: &Path) -> Result<PathBuf> {
    let target = paths::guest_target_dir();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // Static, with a target folder of its own: flags for the linker would otherwise make cargo
    // build everything else again.
    run(Command::new(cargo)
        .current_dir(paths::source_dir()?)
        .args(["rustc", "--quiet", "--package", "drover-guest", "--release"])
        .arg("--target-dir")
        .arg(&target)
        .args(["--", "-C", "target-feature=+crt-static", "-C", "strip=symbols"])
        .env_remove("RUSTFLAGS"))?;
    let bytes = initramfs::with_modules(&target.join("release/drover-guest"), &image.modules())?;
    let path = dir.join("initramfs.img");
    fs::write(&path, bytes).map_err(Error::io("cannot write", &path))?;
    Ok(path)
}

/// A disk with what changes often, mounted by each host at `/opt/drover`: `bin/` (agent and VMM,
/// when they are built) and `boot/` (the guests' kernel and initramfs).
pub fn make_payload(image: &RootImage, initramfs: &Path, dir: &Path) -> Result<PathBuf> {
    let tree = dir.join("payload");
    let _ = fs::remove_dir_all(&tree);
    for folder in ["bin", "boot"] {
        fs::create_dir_all(tree.join(folder)).map_err(Error::io("cannot create", &tree))?;
    }
    copy(&image.kernel(), &tree.join("boot/vmlinuz"))?;
    copy(initramfs, &tree.join("boot/initramfs.img"))?;
    for name in ["drover-agent", "drover-vmm"] {
        let program = paths::program(name);
        if program.exists() {
            let to = tree.join("bin").join(name);
            run(Command::new("strip").arg("--strip-debug").arg("-o").arg(to).arg(program))?;
        }
    }
    let disk = dir.join("payload.ext4");
    let _ = fs::remove_file(&disk);
    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
        .arg(&tree)
        .arg(&disk)
        .arg("256M"))?;
    Ok(disk)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(|_| ()).map_err(Error::io("cannot copy", from))
}

/// Changes with each byte of the recipe's files; `recipe` are files and folders in `e2e/image`.
fn hash_of_recipe(source: &Path, recipe: &[&str]) -> Result<u64> {
    let mut files = vec![source.join("scripts/lib.sh")];
    for name in recipe {
        let path = source.join("e2e/image").join(name);
        if path.is_dir() { collect(&path, &mut files)? } else { files.push(path) }
    }
    files.sort();
    let mut hash = Fnv::default();
    for path in files {
        let content = fs::read(&path).map_err(Error::io("cannot read", &path))?;
        hash.add(path.strip_prefix(source).unwrap_or(&path).as_os_str().as_encoded_bytes());
        hash.add(&content);
    }
    Ok(hash.value())
}

/// FNV-1a of several pieces: the names of things in the cache.
pub(crate) struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    /// One more piece; its length keeps two from running into one another.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        for byte in bytes.len().to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    pub(crate) fn value(&self) -> u64 {
        self.0
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(Error::io("cannot list", folder))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() { collect(&path, files)? } else { files.push(path) }
    }
    Ok(())
}

/// Removes the folders with this prefix but for the ones that were made or used last.
pub(crate) fn keep_newest(folder: &Path, prefix: &str, max: usize) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(Error::io("cannot list", folder))?;
    let mut all: Vec<_> = entries
        .flatten()
        .filter(|e| e.path().is_dir() && e.file_name().to_string_lossy().starts_with(prefix))
        .filter_map(|e| Some((e.metadata().ok()?.modified().ok()?, e.path())))
        .collect();
    all.sort();
    let surplus = all.len().saturating_sub(max);
    for (_, path) in all.into_iter().take(surplus) {
        fs::remove_dir_all(&path).map_err(Error::io("cannot remove", &path))?;
    }
    Ok(())
}

/// Waits for, and holds until dropped, a lock between processes.
pub(crate) fn lock(path: &Path) -> Result<fs::File> {
    let file = fs::File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .map_err(Error::io("cannot open", path))?;
    file.lock().map_err(Error::io("cannot lock", path))?;
    Ok(file)
}
