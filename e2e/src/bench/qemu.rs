//! The peer: QEMU as a normal user starts it.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::child::Owned;
use super::migration::{DOWNTIME, Moved, Mover};
use super::stage::{GUEST_MEMORY_MIB, Stage, Who};
use crate::process::run;
use crate::qmp::Qmp;
use crate::{Error, Result};

const PROGRAM: &str = "qemu-system-x86_64";
const WHO: Who = Who::Qemu;
const MOVE_PATIENCE: Duration = Duration::from_secs(300);
const MIGRATION_ADDRESS: &str = "tcp:127.0.0.1:47910";
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
        .args(["-m", &format!("{GUEST_MEMORY_MIB}M")])
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
    command
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

impl Mover for Qemu<'_> {
    fn who(&self) -> Who {
        WHO
    }

    fn migrate(&mut self) -> Result<Moved> {
        let end = 1 - self.end;
        let (process, mut qmp) = start(self.stage, self.vhost, end, true)?;
        for side in [&mut self.qmp, &mut qmp] {
            let events = json!({"capabilities": [{"capability": "events", "state": true}]});
            side.execute("migrate-set-capabilities", events)?;
        }
        qmp.execute("migrate-incoming", json!({ "uri": MIGRATION_ADDRESS }))?;
        let limits = json!({ "downtime-limit": DOWNTIME.as_millis() as u64 });
        self.qmp.execute("migrate-set-parameters", limits)?;
        self.qmp.execute("migrate", json!({ "uri": MIGRATION_ADDRESS }))?;
        self.qmp.wait_event(MOVE_PATIENCE, |event| match status(event) {
            Some("completed") => Ok(Some(())),
            Some("failed" | "cancelled") => Err(Error::other(format!("QEMU's migration: {event}"))),
            _ => Ok(None),
        })?;
        qmp.wait_event(MOVE_PATIENCE, |event| Ok((event["event"] == "RESUME").then_some(())))?;
        let info = self.qmp.execute("query-migrate", Value::Null)?;
        let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
        let moved = Moved {
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
