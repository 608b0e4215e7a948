//! The files that the agent and a VMM leave for each other.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use drover_hv::config::{
    BootDiskConfig, DiskConfig, DiskLimits, DomainConfig, InterfaceConfig, OnReboot,
};
use drover_proto::v1::RestartPolicy;
use serde::Deserialize;

use crate::decide::SEED_SERIAL;
use crate::error::Error;
use crate::records::{DomainFiles, EndReason, Handover};
use crate::wanted::{Assigned, Role};

/// A VMM's log is cut when it is longer; so much is kept.
const LOG_BYTES_MAX: u64 = 1 << 20;
const LOG_BYTES_KEPT: u64 = 128 << 10;
/// No honest file of a VMM is longer.
const JSON_BYTES_MAX: u64 = 64 << 10;

/// `exit.json`: the VMM's last words.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct ExitFile {
    reason: String,
    #[serde(default)]
    pub(crate) detail: String,
}

impl ExitFile {
    /// Reads it; `None` when there is none, or none that can be read: then the process ended
    /// before it could say why.
    pub(crate) fn read(path: &Path) -> Option<Self> {
        read_json(path)
    }

    pub(crate) fn reason(&self) -> EndReason {
        match self.reason.as_str() {
            "shutdown" => EndReason::Shutdown,
            "reboot" => EndReason::Reboot,
            "crash" => EndReason::Crash,
            "killed" => EndReason::Killed,
            "saved" => EndReason::Saved,
            _ => EndReason::Error,
        }
    }
}

/// Reads `handover.json`. One that is there but cannot be read stops everything: it must not be
/// taken for "has not handed over".
pub(crate) fn read_handover(path: &Path) -> Result<Option<Handover>, Error> {
    match fs::read(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(Error::io("read", path, err)),
        Ok(bytes) => match serde_json::from_slice(&bytes) {
            Ok(handover) => Ok(Some(handover)),
            Err(err) => Err(Error::Record { path: path.to_owned(), reason: err.to_string() }),
        },
    }
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(JSON_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Some(value),
        Err(err) => {
            tracing::warn!(path = %path.display(), %err, "cannot be read");
            None
        }
    }
}

/// Where a domain's volumes can be opened.
#[derive(Debug)]
pub(crate) struct Opened {
    /// Its disks, in their order.
    pub(crate) disks: Vec<PathBuf>,
    /// The saved memory that it goes on from.
    pub(crate) memory: Option<PathBuf>,
    /// Pools whose volumes other nodes find in the same place.
    pub(crate) shared_pools: BTreeSet<String>,
}

/// What the VMM is started with. `seed` is what cloud-init in the guest reads: the last disk.
pub(crate) fn domain_config(
    uid: &str,
    assigned: &Assigned,
    taps: &[String],
    opened: &Opened,
    seed: Option<&Path>,
) -> Result<DomainConfig, Error> {
    let disks = &opened.disks;
    let spec = &assigned.spec;
    // A rescue disk is booted as it is: what the domain asks for may be what keeps it from booting.
    let boot = spec.boot.clone().filter(|_| !assigned.rescue).unwrap_or_default();
    let interfaces = spec.interfaces.iter().zip(taps).map(|(interface, tap)| InterfaceConfig {
        mac: interface.mac.clone(),
        tap: tap.clone(),
        addresses: interface.addresses.clone(),
    });
    let volumes = assigned.disks.iter().zip(disks).map(|(disk, path)| DiskConfig {
        path: path.clone(),
        read_only: disk.read_only,
        serial: disk.serial.clone(),
        slot: disk.slot,
        shared: opened.shared_pools.contains(&disk.pool),
        // Made for this very migration: nobody is sent to a node that has a copy. One that is
        // shared is not made, and is full.
        zeroed: matches!(assigned.role, Role::Incoming { .. })
            && !opened.shared_pools.contains(&disk.pool),
        limits: DiskLimits {
            iops: disk.limits.requests_per_second,
            iops_burst: disk.limits.requests_burst,
            bytes_per_second: disk.limits.bytes_per_second,
            bytes_burst: disk.limits.bytes_burst,
        },
    });
    let seed = seed.map(|path| DiskConfig {
        path: path.to_owned(),
        read_only: true,
        serial: SEED_SERIAL.to_owned(),
        slot: assigned.seed_slot,
        shared: false,
        zeroed: false,
        limits: DiskLimits::default(),
    });
    // Without a kernel of the node's, the first disk brings its own.
    let boot_disk = match (boot.kernel.is_empty(), disks.first()) {
        (true, Some(path)) => {
            Some(BootDiskConfig { path: path.clone(), own_root: assigned.rescue })
        }
        (true, None) => {
            return Err(Error::Domain(
                "boot.kernel: is empty, and the domain has no disk to boot from; give it a \
                 disk, or the path of a kernel on the node"
                    .into(),
            ));
        }
        (false, _) => None,
    };
    let boots_from_disk = boot_disk.is_some();
    let config = DomainConfig {
        uid: uid.to_owned(),
        name: assigned.name.clone(),
        epoch: assigned.epoch,
        vcpus: spec.vcpus,
        memory_bytes: spec.memory_bytes,
        kernel: (!boot.kernel.is_empty()).then(|| boot.kernel.clone().into()),
        initramfs: (!boot.initramfs.is_empty()).then(|| boot.initramfs.into()),
        boot_disk,
        command_line: boot.command_line,
        interfaces: interfaces.collect(),
        disks: volumes.chain(seed).collect(),
        // A guest that brings its own system may bring the agent for it, too.
        guest_agent: boots_from_disk,
        generation_id: assigned.generation_id.clone(),
        restore: opened.memory.clone(),
        on_reboot: match spec.on_reboot() {
            RestartPolicy::Stop => OnReboot::Stop,
            RestartPolicy::Restart | RestartPolicy::Unspecified => OnReboot::Restart,
        },
    };
    config.validate().map_err(|err| Error::Domain(err.to_string()))?;
    Ok(config)
}

/// Replaces the paths of the domain's disks by words that mean something without the node.
pub(crate) fn name_disks(text: String, config: &Path) -> String {
    if !text.contains('/') {
        return text;
    }
    let Some(config) = read_json::<DomainConfig>(config) else { return text };
    let rescue = config.boot_disk.as_ref().filter(|disk| disk.own_root);
    let is_rescue = |disk: &DiskConfig| rescue.is_some_and(|rescue| rescue.path == disk.path);
    // Its own are counted as ever.
    let first = if rescue.is_some() { 0 } else { 1 };
    let mut disks: Vec<_> = config.disks.iter().enumerate().collect();
    // A path may be the beginning of another.
    disks.sort_by_key(|(_, disk)| std::cmp::Reverse(disk.path.as_os_str().len()));
    let text = match &config.restore {
        Some(memory) => text.replace(&memory.display().to_string(), "the saved memory"),
        None => text,
    };
    disks.into_iter().fold(text, |text, (index, disk)| {
        let name = match disk.serial.as_str() {
            SEED_SERIAL => "the seed".to_owned(),
            _ if is_rescue(disk) => "the rescue disk".to_owned(),
            _ => format!("disk {}", index + first),
        };
        text.replace(&disk.path.display().to_string(), &name)
    })
}

/// The files that a domain boots from, looked at early for a clear message.
pub(crate) fn check_boot_files(config: &DomainConfig, node: &str) -> Result<(), Error> {
    if let Some(kernel) = &config.kernel {
        check_boot_file("boot.kernel", kernel, node)?;
    }
    match &config.initramfs {
        Some(initramfs) => check_boot_file("boot.initramfs", initramfs, node),
        None => Ok(()),
    }
}

fn check_boot_file(field: &str, path: &Path, node: &str) -> Result<(), Error> {
    let say = |what: String| {
        Err(Error::Domain(format!("{field}: {}: {what} on node {node}", path.display())))
    };
    match fs::metadata(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => say("no such file".into()),
        Err(err) => say(format!("{err},")),
        Ok(meta) if !meta.is_file() => say("is no regular file".into()),
        Ok(meta) if meta.len() == 0 => say("is an empty file".into()),
        Ok(_) => match File::open(path) {
            Ok(_) => Ok(()),
            Err(err) => say(format!("{err},")),
        },
    }
}

/// Writes the configuration; a VMM reads it whole or not at all.
pub(crate) fn write_config(path: &Path, config: &DomainConfig) -> Result<(), Error> {
    let json = serde_json::to_vec_pretty(config)
        .map_err(|err| Error::Record { path: path.to_owned(), reason: err.to_string() })?;
    let temporary = path.with_extension("json.new");
    fs::write(&temporary, json).map_err(|err| Error::io("write", &temporary, err))?;
    fs::rename(&temporary, path).map_err(|err| Error::io("rename to", path, err))
}

/// Opens a VMM's log to append: so it can be cut while the VMM has it open.
pub(crate) fn open_log(path: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|err| Error::io("open", path, err))
}

/// Cuts a log that has grown too long; its last part goes to `vmm.log.1`.
pub(crate) fn bound_log(path: &Path) -> Result<(), Error> {
    let Ok(mut log) = OpenOptions::new().read(true).write(true).open(path) else { return Ok(()) };
    let length = log.metadata().map_or(0, |meta| meta.len());
    if length <= LOG_BYTES_MAX {
        return Ok(());
    }
    let mut cut = || -> io::Result<()> {
        let mut kept = Vec::new();
        log.seek(SeekFrom::Start(length - LOG_BYTES_KEPT))?;
        Read::by_ref(&mut log).take(LOG_BYTES_KEPT).read_to_end(&mut kept)?;
        File::create(path.with_extension("log.1"))?.write_all(&kept)?;
        log.set_len(0)
    };
    cut().map_err(|err| Error::io("cut", path, err))
}

/// The last line of the log that says something, for a VMM that ended without a word.
pub(crate) fn last_log_line(path: &Path) -> Option<String> {
    let mut log = File::open(path).ok()?;
    let length = log.metadata().ok()?.len();
    log.seek(SeekFrom::Start(length.saturating_sub(4096))).ok()?;
    let mut tail = Vec::new();
    log.take(4096).read_to_end(&mut tail).ok()?;
    let text = String::from_utf8_lossy(&tail).into_owned();
    let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
    Some(line.to_owned())
}

/// Why a VMM ended that was gone before it could be followed: its own words, or `otherwise`.
pub(crate) fn last_words(files: &DomainFiles, otherwise: &str) -> String {
    let exit = ExitFile::read(&files.exit).map(|exit| exit.detail).filter(|d| !d.is_empty());
    exit.or_else(|| last_log_line(&files.log)).unwrap_or_else(|| otherwise.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_file_is_read_and_nonsense_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("exit.json");
        assert_eq!(ExitFile::read(&path), None);
        for (word, reason) in [
            ("shutdown", EndReason::Shutdown),
            ("reboot", EndReason::Reboot),
            ("crash", EndReason::Crash),
            ("killed", EndReason::Killed),
            ("saved", EndReason::Saved),
            ("error", EndReason::Error),
        ] {
            fs::write(&path, format!("{{\"reason\":\"{word}\",\"detail\":\"why\"}}")).unwrap();
            let exit = ExitFile::read(&path).unwrap();
            assert_eq!((exit.reason(), exit.detail.as_str()), (reason, "why"));
        }
        fs::write(&path, "{\"reason\":").unwrap();
        assert_eq!(ExitFile::read(&path), None);
    }

    #[test]
    fn paths_of_disks_become_words() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        let say = |text: &str| name_disks(text.to_owned(), &path);
        assert_eq!(say("boot_disk: /dev/vg/a: is empty"), "boot_disk: /dev/vg/a: is empty");
        let json = r#"{"uid":"u","name":"domains/a","epoch":1,"vcpus":1,"memory_bytes":67108864,
            "boot_disk":{"path":"/dev/vg/a"},"disks":[{"path":"/dev/vg/a"},
            {"path":"/dev/vg/ab"},{"path":"/state/seed.img","serial":"cidata"}]}"#;
        fs::write(&path, json).unwrap();
        assert_eq!(say("boot_disk: /dev/vg/a: is empty"), "boot_disk: disk 1: is empty");
        assert_eq!(say("/dev/vg/ab: is locked"), "disk 2: is locked");
        assert_eq!(say("/state/seed.img: is short"), "the seed: is short");
        fs::write(
            &path,
            json.replace(r#""path":"/dev/vg/a"},"d"#, r#""path":"/dev/vg/a","own_root":true},"d"#),
        )
        .unwrap();
        assert_eq!(say("boot_disk: /dev/vg/a: is empty"), "boot_disk: the rescue disk: is empty");
        assert_eq!(say("/dev/vg/ab: is locked"), "disk 1: is locked");
    }

    /// "Cannot be read" is not "has not handed over".
    #[test]
    fn a_damaged_handover_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("handover.json");
        assert_eq!(read_handover(&path).unwrap(), None);
        fs::write(&path, "{\"migration_id\":\"m\",\"to_epoch\":4}").unwrap();
        assert_eq!(read_handover(&path).unwrap().unwrap().to_epoch, 4);
        fs::write(&path, "{\"migration_id\"").unwrap();
        assert!(read_handover(&path).is_err());
    }

    #[test]
    fn boot_files_are_named_with_their_field_and_node() {
        let dir = tempfile::tempdir().unwrap();
        let check = |path: &Path| check_boot_file("boot.kernel", path, "host1");
        let missing = dir.path().join("vmlinuz");
        let text = check(&missing).unwrap_err().to_string();
        assert_eq!(text, format!("boot.kernel: {}: no such file on node host1", missing.display()));
        assert!(check(dir.path()).unwrap_err().to_string().contains("no regular file"));
        fs::write(&missing, "").unwrap();
        assert!(check(&missing).unwrap_err().to_string().contains("empty"));
        fs::write(&missing, "x").unwrap();
        check(&missing).unwrap();
    }

    /// The log stays bounded while its writer has it open, and the last words are kept.
    #[test]
    fn a_log_is_cut_under_its_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.log");
        let mut writer = open_log(&path).unwrap();
        let line = format!("{}\n", "x".repeat(1023));
        for _ in 0..1025 {
            writer.write_all(line.as_bytes()).unwrap();
        }
        writer.write_all(b"the last words\n\n").unwrap();
        assert_eq!(last_log_line(&path).as_deref(), Some("the last words"));
        bound_log(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        let kept = fs::read_to_string(dir.path().join("vmm.log.1")).unwrap();
        assert_eq!(kept.len() as u64, LOG_BYTES_KEPT);
        assert!(kept.ends_with("the last words\n\n"));
        writer.write_all(b"goes on\n").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "goes on\n");
    }
}
