//! What both contestants stand on: a bridge of the benchmark's own, taps, the guest's files.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::volume;
use crate::process::run;
use crate::{Error, Result};

const BRIDGE: &str = "dbench0";
/// On a disk, as the agent's state is: the hand-over is synced within the pause, and a folder in
/// memory would hide what that costs.
const FOLDER: &str = "/var/tmp";
const GATEWAY: &str = "10.79.0.1/24";
/// Memory of the small guests.
pub(super) const GUEST_MEMORY_MIB: u64 = 128;
/// What a process in them keeps dirtying.
pub(super) const GUEST_DIRTY_MIB: u64 = 2;

/// The guest that is measured, the same under both.
pub(super) struct Guest {
    pub(super) memory_mib: u64,
    /// More of its command line.
    pub(super) words: String,
    /// An archive that is unpacked over its initramfs.
    pub(super) more: Option<PathBuf>,
    /// The volume that is its disk at one end of a move.
    pub(super) volume: Option<fn(Who, usize) -> String>,
    /// QEMU's disk goes past the host's page cache, which Drover's does not.
    pub(super) is_qemu_direct: bool,
    /// QEMU's mirror sends zeros as bytes.
    pub(super) is_qemu_zero_blind: bool,
}

impl Guest {
    /// One process that keeps dirtying memory, no disk.
    pub(super) fn small() -> Self {
        let words = format!("drover.dirty_mib={GUEST_DIRTY_MIB}");
        Self {
            memory_mib: GUEST_MEMORY_MIB,
            words,
            more: None,
            volume: None,
            is_qemu_direct: false,
            is_qemu_zero_blind: false,
        }
    }

    /// Its disk.
    pub(super) fn disk(&self, who: Who, end: usize) -> Option<PathBuf> {
        self.volume.map(|name| volume::path_of(&name(who, end)))
    }
}

/// Removed when dropped.
pub(super) struct Stage {
    pub(super) vmm: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    /// Sockets and logs.
    pub(super) dir: PathBuf,
    pub(super) guest: Guest,
}

/// One of the two guests.
#[derive(Debug, Clone, Copy)]
pub(super) enum Who {
    Drover,
    Qemu,
}

impl Who {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Drover => "drover",
            Self::Qemu => "qemu",
        }
    }
    pub(super) fn address(self) -> Ipv4Addr {
        match self {
            Self::Drover => Ipv4Addr::new(10, 79, 0, 11),
            Self::Qemu => Ipv4Addr::new(10, 79, 0, 12),
        }
    }
    pub(super) fn mac(self) -> &'static str {
        match self {
            Self::Drover => "52:54:00:79:00:11",
            Self::Qemu => "52:54:00:79:00:12",
        }
    }
    /// A move has two ends, each with its tap: 0 and 1.
    pub(super) fn tap(self, end: usize) -> String {
        format!("db{}{end}", &self.name()[..1])
    }
}

impl Stage {
    /// Makes it.
    pub(super) fn build(vmm: &Path, boot_dir: &Path, guest: Guest) -> Result<Self> {
        let (kernel, initramfs) = (boot_dir.join("vmlinuz"), boot_dir.join("initramfs.img"));
        for file in [vmm, &kernel, &initramfs, Path::new("/dev/kvm")] {
            if !file.exists() {
                return Err(Error::other(format!("{}: not found, and needed", file.display())));
            }
        }
        let dir = Path::new(FOLDER).join(format!("drover-bench-{}", std::process::id()));
        std::fs::create_dir_all(&dir).map_err(Error::io("cannot create", &dir))?;
        let mut stage = Self { vmm: vmm.to_owned(), kernel, initramfs, dir, guest };
        stage.add_to_initramfs()?;
        // What a run that was killed left behind.
        remove_network();
        ip(&[
            "link",
            "add",
            BRIDGE,
            "type",
            "bridge",
            "forward_delay",
            "0",
            "stp_state",
            "0",
            "mcast_snooping",
            "0",
        ])?;
        ip(&["addr", "add", GATEWAY, "dev", BRIDGE])?;
        ip(&["link", "set", BRIDGE, "up"])?;
        for tap in taps() {
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
            ip(&["link", "set", &tap, "master", BRIDGE, "up"])?;
        }
        Ok(stage)
    }

    /// The kernel unpacks one archive after the other.
    fn add_to_initramfs(&mut self) -> Result<()> {
        let Some(more) = &self.guest.more else { return Ok(()) };
        let read = |path: &Path| std::fs::read(path).map_err(Error::io("cannot read", path));
        let all = [read(&self.initramfs)?, read(more)?].concat();
        self.initramfs = self.path("initramfs.img");
        std::fs::write(&self.initramfs, all).map_err(Error::io("cannot write", &self.initramfs))
    }

    /// The kernel command line, the same for both.
    pub(super) fn command_line(&self, who: Who) -> String {
        let words = &self.guest.words;
        format!("console=ttyS0 quiet panic=-1 drover.ip={}/24 {words}", who.address())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        remove_network();
        // Nothing else to be done about it.
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn taps() -> impl Iterator<Item = String> {
    [Who::Drover, Who::Qemu].into_iter().flat_map(|who| [who.tap(0), who.tap(1)])
}

fn remove_network() {
    for link in taps().chain([BRIDGE.to_owned()]) {
        // Mostly it is not there.
        let _ = ip(&["link", "del", &link]);
    }
}

fn ip(arguments: &[&str]) -> Result<()> {
    run(Command::new("ip").args(arguments)).map(|_| ())
}
