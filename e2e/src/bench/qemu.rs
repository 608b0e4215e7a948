//! The peer: QEMU as a normal user starts it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::child::Owned;
use super::migration::{DOWNTIME, Moved, Mover};
use super::stage::{Stage, Who};
use crate::process::run;
use crate::qmp::Qmp;
use crate::{Error, Result};

const PROGRAM: &str = "qemu-system-x86_64";
const WHO: Who = Who::Qemu;
const MOVE_PATIENCE: Duration = Duration::from_secs(300);
const MIGRATION_ADDRESS: &str = "tcp:127.0.0.1:47910";
const NBD_HOST: &str = "127.0.0.1";
const NBD_PORT: &str = "47911";
const DISK_NODE: &str = "disk0";
const MIRROR: &str = "mirror0";
/// More than any link here has: QEMU's own default is 128 MiB a second.
const BANDWIDTH_BYTES: u64 = 8 << 30;
/// The machine of the migration benchmark.
pub(super) const MACHINE: &str = "q35";
/// The machine of the boot benchmark. The option ROMs stay on: without them its firmware copies
/// a bzImage byte by byte, which takes several times as long.
pub(super) const MICROVM: &str = "microvm,pcie=on,pit=off,pic=off,rtc=off,isa-serial=on";

/// The first line of `--version`.
pub(super) fn version() -> Result<String> {
    let text = run(Command::new(PROGRAM).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

/// A QEMU with this machine; `serial` is what `-serial` takes.
pub(super) fn command(
    stage: &Stage,
    machine: &str,
    end: usize,
    vhost: bool,
    serial: &str,
) -> Command {
    let mut command = Command::new(PROGRAM);
    let vhost = if vhost { "on" } else { "off" };
    command
        .args(["-machine", machine, "-enable-kvm", "-cpu", "host", "-smp", "1"])
        .args(["-m", &format!("{}M", stage.guest.memory_mib)])
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-kernel")
        .arg(&stage.kernel)
        .arg("-initrd")
        .arg(&stage.initramfs)
        .args(["-append", &stage.command_line(WHO)])
        .args(["-serial", serial])
        .args([
            "-netdev",
            &format!("tap,id=net0,ifname={},script=no,downscript=no,vhost={vhost}", WHO.tap(end)),
        ])
        .args(["-device", &format!("virtio-net-pci,netdev=net0,romfile=,mac={}", WHO.mac())])
        .args(["-device", "virtio-rng-pci"]);
    if let Some(disk) = stage.guest.disk(WHO, end) {
        add_disk(&mut command, &disk, stage.guest.is_qemu_direct);
    }
    command
}

/// As virtualization managers give a raw volume to a fast guest: io_uring, a thread of its own.
/// `is_direct`: past the host's page cache, which is QEMU's `cache=none`; else `cache=writeback`.
fn add_disk(command: &mut Command, disk: &Path, is_direct: bool) {
    let cache = json!({ "direct": is_direct, "no-flush": false });
    let file = json!({
        "node-name": "file0", "driver": "host_device", "filename": disk, "aio": "io_uring",
        "cache": cache, "discard": "unmap",
    });
    let disk = json!({
        "node-name": DISK_NODE, "driver": "raw", "file": "file0", "cache": cache, "discard": "unmap",
    });
    let device = format!("virtio-blk-pci,drive={DISK_NODE},iothread=io0,write-cache=on");
    command
        .args(["-object", "iothread,id=io0"])
        .args(["-blockdev", &file.to_string()])
        .args(["-blockdev", &disk.to_string()])
        .args(["-device", &device]);
}

/// A guest under QEMU that can be moved.
pub(super) struct Qemu<'a> {
    stage: &'a Stage,
    vhost: bool,
    end: usize,
    process: Owned,
    qmp: Qmp,
}

impl<'a> Qemu<'a> {
    /// Boots it.
    pub(super) fn boot(stage: &'a Stage, vhost: bool) -> Result<Self> {
        let (process, qmp) = start(stage, vhost, 0, false)?;
        Ok(Self { stage, vhost, end: 0, process, qmp })
    }
}

fn start(stage: &Stage, vhost: bool, end: usize, incoming: bool) -> Result<(Owned, Qmp)> {
    let socket = stage.path(&format!("qemu{end}.qmp"));
    let serial = format!("file:{}", file(stage, end, "console").display());
    let mut command = command(stage, MACHINE, end, vhost, &serial);
    command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
    if incoming {
        command.args(["-incoming", "defer"]);
    }
    command.stdout(Stdio::null());
    let mut process = Owned::start(command, &file(stage, end, "log"))?;
    let qmp = Qmp::connect(&socket, || process.still_runs())?;
    Ok((process, qmp))
}

fn file(stage: &Stage, end: usize, kind: &str) -> PathBuf {
    stage.path(&format!("qemu{end}.{kind}"))
}

/// A local disk goes over as virtualization managers do it: the destination exports its blank
/// volume by NBD, the source mirrors to it while the guest runs and then copies memory; when the
/// guest stands still the mirror is ended, which brings over what was written last.
impl Qemu<'_> {
    fn mirror_disk(&mut self, destination: &mut Qmp) -> Result<()> {
        let address = json!({ "type": "inet", "data": { "host": NBD_HOST, "port": NBD_PORT } });
        destination.execute("nbd-server-start", json!({ "addr": address }))?;
        let export = json!({
            "type": "nbd", "id": "export0", "node-name": DISK_NODE, "name": DISK_NODE,
            "writable": true,
        });
        destination.execute("block-export-add", export)?;
        // Zeros go over as a word, not as bytes: a thin volume stays thin.
        let target = json!({
            "driver": "nbd", "node-name": MIRROR, "export": DISK_NODE, "discard": "unmap",
            "detect-zeroes": if self.stage.guest.is_qemu_zero_blind { "off" } else { "unmap" },
            "server": { "type": "inet", "host": NBD_HOST, "port": NBD_PORT },
        });
        self.qmp.execute("blockdev-add", target)?;
        let mirror = json!({
            "job-id": MIRROR, "device": DISK_NODE, "target": MIRROR, "sync": "full",
            "copy-mode": "background",
        });
        self.qmp.execute("blockdev-mirror", mirror)?;
        self.qmp.wait_event(MOVE_PATIENCE, |event| match event["event"].as_str() {
            Some("BLOCK_JOB_READY") => Ok(Some(())),
            Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_ERROR" | "BLOCK_JOB_CANCELLED") => {
                Err(Error::other(format!("QEMU's mirror: {event}")))
            }
            _ => Ok(None),
        })
    }

    /// The guest stands still.
    fn finish_disk(&mut self, destination: &mut Qmp) -> Result<()> {
        // A mirror that is ready is ended so: its target then has all that the disk has.
        self.qmp.execute("block-job-cancel", json!({ "device": MIRROR }))?;
        self.qmp.wait_event(MOVE_PATIENCE, |event| match event["event"].as_str() {
            Some("BLOCK_JOB_COMPLETED") if event["data"]["error"].is_null() => Ok(Some(())),
            Some("BLOCK_JOB_COMPLETED" | "BLOCK_JOB_ERROR" | "BLOCK_JOB_CANCELLED") => {
                Err(Error::other(format!("QEMU's mirror: {event}")))
            }
            _ => Ok(None),
        })?;
        // The guest's device does not share its volume.
        destination.execute("nbd-server-stop", Value::Null).map(|_| ())
    }

    fn wait_status(&mut self, wanted: &str) -> Result<()> {
        self.qmp.wait_event(MOVE_PATIENCE, |event| match status(event) {
            Some(now) if now == wanted => Ok(Some(())),
            Some("failed" | "cancelled") => Err(Error::other(format!("QEMU's migration: {event}"))),
            _ => Ok(None),
        })
    }
}

impl Mover for Qemu<'_> {
    fn who(&self) -> Who {
        WHO
    }

    fn migrate(&mut self) -> Result<Moved> {
        let end = 1 - self.end;
        let (process, mut qmp) = start(self.stage, self.vhost, end, true)?;
        let begin = Instant::now();
        let has_disk = self.stage.guest.disk(WHO, end).is_some();
        if has_disk {
            self.mirror_disk(&mut qmp)?;
        }
        for side in [&mut self.qmp, &mut qmp] {
            let events = json!({"capabilities": [
                {"capability": "events", "state": true},
                {"capability": "pause-before-switchover", "state": has_disk},
            ]});
            side.execute("migrate-set-capabilities", events)?;
        }
        qmp.execute("migrate-incoming", json!({ "uri": MIGRATION_ADDRESS }))?;
        let mut limits = json!({ "downtime-limit": DOWNTIME.as_millis() as u64 });
        if has_disk {
            limits["max-bandwidth"] = BANDWIDTH_BYTES.into();
        }
        self.qmp.execute("migrate-set-parameters", limits)?;
        self.qmp.execute("migrate", json!({ "uri": MIGRATION_ADDRESS }))?;
        if has_disk {
            self.wait_status("pre-switchover")?;
            self.finish_disk(&mut qmp)?;
            self.qmp.execute("migrate-continue", json!({ "state": "pre-switchover" }))?;
        }
        self.wait_status("completed")?;
        qmp.wait_event(MOVE_PATIENCE, |event| Ok((event["event"] == "RESUME").then_some(())))?;
        let wall_ms = begin.elapsed().as_secs_f64() * 1000.0;
        let info = self.qmp.execute("query-migrate", Value::Null)?;
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let moved = Moved {
            wall_ms,
            total_ms: number(&info["total-time"]),
            pause_ms: number(&info["downtime"]),
            detail: format!(
                "{} passes, {:.1} MiB at {:.0} MB/s, setup {} ms",
                info["ram"]["dirty-sync-count"],
                number(&info["ram"]["transferred"]) / f64::from(1 << 20),
                number(&info["ram"]["mbps"]) / 8.0,
                info["setup-time"]
            ),
        };
        // The old one ends; its answer may be lost with it.
        let _ = self.qmp.execute("quit", Value::Null);
        let mut old = std::mem::replace(&mut self.process, process);
        old.wait_end()?;
        (self.qmp, self.end) = (qmp, end);
        Ok(moved)
    }

    fn pause(&mut self) -> Result<()> {
        self.qmp.execute("stop", Value::Null).map(|_| ())
    }

    fn resume(&mut self) -> Result<()> {
        self.qmp.execute("cont", Value::Null).map(|_| ())
    }
}

/// The status in a MIGRATION event.
fn status(event: &Value) -> Option<&str> {
    (event["event"] == "MIGRATION").then(|| event["data"]["status"].as_str())?
}
