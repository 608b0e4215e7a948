//! The lab's domains: stock kernel, our init, an address each.

use std::net::Ipv4Addr;

use crate::vpsctl::Vpsctl;
use crate::{Error, Result};

const KERNEL: &str = "/var/lib/drover/boot/vmlinuz";
const INITRAMFS: &str = "/var/lib/drover/boot/initramfs.img";

/// One domain to be.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// The last part of its address 10.78.0.x, and of its MAC.
    pub number: u8,
    /// 1 to 8.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u32,
    /// Memory that a process of the guest keeps dirtying, MiB.
    pub dirty_mib: u32,
    /// Its rest between two passes over it.
    pub dirty_interval_ms: u32,
    /// Memory filled with noise that must stay as it is, MiB.
    pub fill_mib: u32,
    /// A disk, as `--disk` takes it, which a process of the guest keeps writing to.
    pub disk: Option<String>,
    /// So much a second, KiB.
    pub disk_kib: u32,
    /// The kernel tells of its boot on the console: each letter costs an emulated host dearly.
    pub kernel_messages: bool,
}

impl Guest {
    /// 128 MiB and one vCPU, 1 MiB of it dirtied twice a second, 8 MiB of noise.
    pub fn new(name: impl Into<String>, number: u8) -> Self {
        Self {
            name: name.into(),
            number,
            vcpus: 1,
            memory_mib: 128,
            dirty_mib: 1,
            dirty_interval_ms: 500,
            fill_mib: 8,
            disk: None,
            disk_kib: 2048,
            kernel_messages: false,
        }
    }

    /// Its address on the guests' network.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 78, 0, self.number)
    }

    /// Its interface's address.
    pub fn mac(&self) -> String {
        format!("52:54:00:78:00:{:02x}", self.number)
    }

    /// Its kernel's command line.
    pub fn command_line(&self) -> String {
        let disk = match self.disk {
            Some(_) => {
                format!(
                    " drover.disk=/dev/vda drover.disk_kib={} drover.disk_check=1",
                    self.disk_kib
                )
            }
            None => String::new(),
        };
        format!(
            "console=ttyS0{} panic=-1 drover.ip={}/24 drover.dirty_mib={} \
             drover.dirty_interval_ms={} drover.fill_mib={}{disk}",
            if self.kernel_messages { "" } else { " quiet" },
            self.address(),
            self.dirty_mib,
            self.dirty_interval_ms,
            self.fill_mib
        )
    }

    /// Asks for it, on a node or wherever the scheduler likes; the operation's name.
    pub fn create(&self, vpsctl: &Vpsctl, node: Option<&str>) -> Result<String> {
        let memory = format!("{}MiB", self.memory_mib);
        let vcpus = self.vcpus.to_string();
        let net = format!("mac={},address={}", self.mac(), self.address());
        let line = self.command_line();
        let mut arguments = vec!["domain", "create", &self.name, "--memory", &memory];
        arguments.extend(["--vcpus", &vcpus, "--kernel", KERNEL, "--initramfs", INITRAMFS]);
        arguments.extend(["--command-line", &line, "--net", &net]);
        if let Some(disk) = &self.disk {
            arguments.extend(["--disk", disk]);
        }
        if let Some(node) = node {
            arguments.extend(["--node", node]);
        }
        vpsctl.start(&arguments)
    }

    /// What its memory's noise looks like, asked by HTTP from a thread in the namespace.
    pub fn check_memory(&self) -> Result<()> {
        let body = crate::client::fetch_path(self.address(), "/check")?;
        let good = format!("filled_mib {}\nwrong_words 0\n", self.fill_mib);
        if body == good {
            return Ok(());
        }
        Err(Error::other(format!("{}: memory is not as it was filled: {body:?}", self.name)))
    }
}

/// What a guest says of the disk that it writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskFigures {
    /// Blocks that were written and flushed.
    pub writes: u64,
    /// Blocks that could not be written, or were not as written.
    pub wrong: u64,
    /// Of those, the times that the disk gave an error.
    pub failed: u64,
    /// The number of the newest write that was flushed.
    pub flushed: u64,
    /// Up to which write the disk had all of them at this boot.
    pub kept: u64,
}

impl DiskFigures {
    /// Asked by HTTP from a thread in the namespace.
    pub fn of(guest: &Guest) -> Result<Self> {
        let body = crate::client::fetch_path(guest.address(), "/")?;
        Self::parse(&body)
            .ok_or_else(|| Error::other(format!("{}: no figures of a disk: {body:?}", guest.name)))
    }

    fn parse(body: &str) -> Option<Self> {
        let figure =
            |key: &str| body.lines().find_map(|line| line.strip_prefix(key)?.trim().parse().ok());
        Some(Self {
            writes: figure("disk_writes ")?,
            wrong: figure("disk_wrong ")?,
            failed: figure("disk_failed ")?,
            flushed: figure("disk_flushed ")?,
            kept: figure("disk_kept ")?,
        })
    }
}
