//! One host: a Debian machine in QEMU.

use std::path::PathBuf;
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::process::{self, Process, run};
use crate::{Error, Result, paths, switch};

/// Most hosts in a lab.
pub const HOSTS_MAX: usize = 8;

/// Size of a host's disk for volumes, bytes. It is sparse: what guests trim is given back to this
/// machine.
const DATA_DISK_BYTES: u64 = 16 << 30;

/// What a host is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostSpec {
    /// 1 for host1.
    pub number: usize,
    /// Emulated cores.
    pub vcpus: usize,
    /// Memory, in MiB.
    pub memory_mib: usize,
}

impl HostSpec {
    /// Its name: host1.
    pub fn name(&self) -> String {
        format!("host{}", self.number)
    }
    /// Its management address, without the prefix length.
    pub fn address(&self) -> String {
        format!("10.77.0.{}", 100 + self.number)
    }
}

/// The files of one host in the lab of a given name.
#[derive(Debug, Clone)]
pub struct HostFiles {
    /// What it writes, over the common root disk.
    pub overlay: PathBuf,
    /// The disk of its volumes.
    pub data: PathBuf,
    /// Its serial console, from the first start on.
    pub console: PathBuf,
    /// What QEMU itself says.
    pub qemu_log: PathBuf,
    /// QEMU's control socket.
    pub qmp: PathBuf,
    /// The socket of the open SSH connection.
    pub ssh_control: PathBuf,
}

impl HostFiles {
    /// Where they are; nothing is made.
    pub fn of(lab: &str, host: &str) -> Self {
        let run = paths::run_dir(lab);
        Self {
            overlay: paths::disk_dir(lab).join(format!("{host}.qcow2")),
            data: paths::disk_dir(lab).join(format!("{host}-data.qcow2")),
            console: run.join(format!("{host}.console")),
            qemu_log: run.join(format!("{host}.qemu.log")),
            qmp: run.join(format!("{host}.qmp")),
            ssh_control: run.join(format!("{host}.ssh")),
        }
    }
}

/// What all hosts of a lab share.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CommonDisks {
    /// The stock kernel.
    pub kernel: PathBuf,
    /// The initramfs of hosts and guests.
    pub initramfs: PathBuf,
    /// The root disk under every overlay.
    pub root: PathBuf,
    /// Our programs and the guests' kernel.
    pub payload: PathBuf,
}

/// Whether the machine's CPU can run the hosts itself. The presence of `/dev/kvm` would say
/// nothing: some sandboxes have one that cannot run a stock kernel.
pub fn has_hardware_virtualization() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    cpuinfo
        .lines()
        .filter(|l| l.starts_with("flags"))
        .any(|l| l.split_whitespace().any(|f| f == "svm" || f == "vmx"))
        && std::path::Path::new("/dev/kvm").exists()
}

/// Makes its disks: an empty overlay over the root disk, and an empty disk for volumes, on which
/// the host makes its pool at its first boot.
pub fn make_disks(lab: &str, spec: &HostSpec, common: &CommonDisks) -> Result<()> {
    let files = HostFiles::of(lab, &spec.name());
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&common.root)
        .arg(&files.overlay))?;
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&files.data)
        .arg(DATA_DISK_BYTES.to_string()))
    .map(|_| ())
}

/// Starts its QEMU, from this saved state or by booting.
pub fn start(
    lab: &str,
    spec: &HostSpec,
    common: &CommonDisks,
    state: Option<&std::path::Path>,
) -> Result<Process> {
    let files = HostFiles::of(lab, &spec.name());
    let name = spec.name();
    let run_dir = paths::run_dir(lab);
    let append = format!(
        "console=ttyS0 quiet loglevel=4 panic=5 net.ifnames=0 mitigations=off tsc=reliable \
         no_timer_check kvm.halt_poll_ns=0 drover.root=/dev/vda drover.address={}/24 systemd.hostname={name}",
        spec.address()
    );
    let mut command = Command::new("qemu-system-x86_64");
    // The emulator's tables in large pages: it looks into them all the time.
    command.env("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1");
    command.args([
        "-name",
        &format!("drover-{lab}-{name}"),
        "-machine",
        "q35,sata=off,hpet=off,vmport=off",
    ]);
    if has_hardware_virtualization() {
        command.args(["-accel", "kvm", "-cpu", "host"]);
    } else {
        // Without what costs an emulated CPU much: page tables of five levels; string instructions
        // that kernels take for the fastest way to copy, where each byte is a step of its own;
        // a second set of translations for accesses to user memory.
        command.args(["-accel", "tcg,thread=multi,tb-size=512"]);
        command
            .args(["-cpu", "max,la57=off,erms=off,fsrm=off,fzrm=off,fsrs=off,fsrc=off,smap=off"]);
    }
    command
        .args(["-smp", &spec.vcpus.to_string(), "-m", &format!("{}M", spec.memory_mib)])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-kernel")
        .arg(&common.kernel)
        .arg("-initrd")
        .arg(&common.initramfs)
        .args(["-append", &append])
        .args([
            "-drive",
            &format!(
                "if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file={}",
                files.overlay.display()
            ),
        ])
        .args(["-device", "virtio-blk-pci,drive=root"])
        .args([
            "-drive",
            &format!("if=none,id=payload,format=raw,readonly=on,file={}", common.payload.display()),
        ])
        .args(["-device", "virtio-blk-pci,drive=payload"])
        .args([
            "-drive",
            &format!(
                "if=none,id=data,format=qcow2,cache=unsafe,discard=unmap,file={}",
                files.data.display()
            ),
        ])
        .args(["-device", "virtio-blk-pci,drive=data"])
        .args(["-device", "virtio-rng-pci"])
        .args(["-chardev", &format!("file,id=serial,append=on,path={}", files.console.display())])
        .args(["-serial", "chardev:serial"])
        .args(["-qmp", &format!("unix:{},server=on,wait=off", files.qmp.display())]);
    for (nic, segment) in switch::Segment::ALL.into_iter().enumerate() {
        let socket = switch::Port::Host(spec.number, segment).socket(&run_dir);
        command
            .args([
                "-netdev",
                &format!(
                    "stream,id=net{nic},server=off,addr.type=unix,addr.path={},reconnect-ms=500",
                    socket.display()
                ),
            ])
            .args([
                "-device",
                &format!(
                    "virtio-net-pci,netdev=net{nic},romfile=,mac=52:54:00:77:{nic:02x}:{:02x}",
                    spec.number
                ),
            ]);
    }
    if let Some(state) = state {
        command.args(["-incoming", &format!("file:{}", state.display())]);
    }
    let process = process::start_detached(command, &files.qemu_log)?;
    // A wrong option ends QEMU at once: better said now than as a host that never answers.
    process::wait_for(&format!("QEMU of {name}"), std::time::Duration::from_secs(20), || {
        if !process.is_alive() {
            let log = std::fs::read_to_string(&files.qemu_log).unwrap_or_default();
            return Err(Error::other(format!("QEMU of {name} ended at once: {}", log.trim_end())));
        }
        Ok(files.qmp.exists().then_some(()))
    })?;
    Ok(process)
}
