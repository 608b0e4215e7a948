//! Booted hosts, kept in the cache: an emulated host takes 20 s of CPU to boot and one to go on
//! from where it was.
//!
//! A snapshot is what QEMU sends in a migration to a file, and the host's disks at that moment,
//! taken when the host has booted and before it has mounted the disk with our programs. Its key
//! is all that must not differ: kernel, initramfs, root disk, QEMU, the machine's shape.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::host::{CommonDisks, HostFiles, HostSpec};
use crate::image::{Fnv, keep_newest, touch};
use crate::process::{run, wait_for};
use crate::qmp::Qmp;
use crate::{Error, Result, paths};

/// Older ones beyond this are removed; a lab of three has three.
const SNAPSHOTS_MAX: usize = 12;
const SAVE_PATIENCE: Duration = Duration::from_secs(120);
/// QEMU limits the rate of a migration unless told otherwise.
const BANDWIDTH_BYTES: u64 = 8 << 30;

/// A booted host in the cache, or the place for one.
pub(crate) struct Snapshot {
    dir: PathBuf,
}

impl Snapshot {
    /// Where the snapshot of this host is, or will be.
    pub(crate) fn of(spec: &HostSpec, common: &CommonDisks) -> Result<Self> {
        let mut hash = Fnv::default();
        let read = |path: &Path| fs::read(path).map_err(Error::io("cannot read", path));
        hash.add(&read(&common.initramfs)?);
        hash.add(common.root.as_os_str().as_encoded_bytes());
        hash.add(run(Command::new("qemu-system-x86_64").arg("--version"))?.as_bytes());
        hash.add(format!("{spec:?}").as_bytes());
        // The machine as this source starts it.
        hash.add(include_bytes!("host.rs"));
        Ok(Self { dir: folder().join(format!("{}-{:016x}", spec.name(), hash.value())) })
    }

    /// The state to start from, once there is one.
    pub(crate) fn state(&self) -> Option<PathBuf> {
        let state = self.dir.join("state");
        state.exists().then_some(state)
    }

    /// Copies the disks as they were to where this lab's host has them.
    pub(crate) fn restore_disks(&self, files: &HostFiles) -> Result<()> {
        for (name, disk) in disks(files) {
            let kept = self.dir.join(name);
            fs::copy(&kept, disk).map_err(Error::io("cannot copy", &kept))?;
        }
        touch(&self.dir)
    }

    /// Lets a host go on whose QEMU was started with the state: it was saved while stopped, and so
    /// it is when all is read.
    pub(crate) fn go_on(files: &HostFiles) -> Result<()> {
        let mut qmp = Qmp::connect(&files.qmp, || Ok(()))?;
        wait_for("a host's saved state", SAVE_PATIENCE, || {
            let status = qmp.execute("query-status", Value::Null)?;
            Ok((status["status"] != "inmigrate").then_some(()))
        })?;
        qmp.execute("cont", Value::Null).map(|_| ())
    }

    /// Saves a host that has booted; it goes on afterwards.
    pub(crate) fn save(&self, files: &HostFiles) -> Result<()> {
        let new = self.dir.with_extension(format!("new{}", std::process::id()));
        fs::create_dir_all(&new).map_err(Error::io("cannot create", &new))?;
        let saved = save_into(&new, files);
        if saved.is_err() || self.state().is_some() {
            let _ = fs::remove_dir_all(&new);
            return saved;
        }
        fs::rename(&new, &self.dir).map_err(Error::io("cannot rename", &new))?;
        keep_newest(&folder(), "", SNAPSHOTS_MAX)
    }
}

fn save_into(folder: &Path, files: &HostFiles) -> Result<()> {
    let mut qmp = Qmp::connect(&files.qmp, || Ok(()))?;
    qmp.execute("stop", Value::Null)?;
    qmp.execute("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH_BYTES }))?;
    let uri = format!("file:{}", folder.join("state").display());
    qmp.execute("migrate", json!({ "uri": uri }))?;
    qmp.wait_migration(SAVE_PATIENCE)?;
    // QEMU has flushed the disks and let go of them.
    let copied = disks(files).into_iter().try_for_each(|(name, disk)| {
        fs::copy(disk, folder.join(name)).map(|_| ()).map_err(Error::io("cannot copy", disk))
    });
    qmp.execute("cont", Value::Null)?;
    copied
}

/// What a host writes to, and its name in a snapshot.
fn disks(files: &HostFiles) -> [(&'static str, &Path); 2] {
    [("disk.qcow2", &files.overlay), ("data.qcow2", &files.data)]
}

fn folder() -> PathBuf {
    paths::cache_dir().join("lab/booted")
}
