//! A second pool of a host, on a disk that can be broken: the last GiB of the host's data disk,
//! which the first pool's volume group leaves free. An operator's own steps: a volume group, a thin
//! pool, one more flag of the agent.

use std::time::Duration;

use drover_e2e::cluster::list;
use drover_e2e::guests::{DiskFigures, Guest};
use drover_e2e::process::wait_for;
use drover_e2e::{Error, Result};
use serde_json::Value;

use crate::ensure;
use crate::world::{PATIENCE, World};

/// The pool, and its volume group.
pub(crate) const POOL: &str = "fragile";
/// So many times its size is promised: thin volumes.
const FLAG: &str = "fragile=lvm:fragile/thin,overcommit=50";
/// Where the disk is, in 512-byte sectors.
const PLACE: &str = "set -e; size=2097152; start=$(($(blockdev --getsz /dev/vdc) - size)); ";
/// All that the disk is called by.
const FIND: &str =
    "disk=$(losetup -nO NAME -j /dev/vdc || true); disk=${disk:-/dev/mapper/lab_disk}; ";
/// The kernel notices that a thin pool's disk is broken when it writes metadata the next time, which
/// failing writes of a guest bring about by chance only: 60 to 100 s were seen.
const POOL_PATIENCE: Duration = Duration::from_secs(300);
const SETTINGS: &str = "/etc/drover/agent.env";

/// What the pool stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disk {
    /// One with a write cache that a power cut empties: the host's memory. What was not flushed
    /// stays there for ever, as the host's own write-back is put off.
    Volatile,
    /// One whose writes fail when [`break_disk`] says so.
    Breakable,
}

impl Disk {
    fn attach(self) -> String {
        let how = match self {
            Self::Volatile => {
                "echo 0 > /proc/sys/vm/dirty_writeback_centisecs; \
                 echo 360000 > /proc/sys/vm/dirty_expire_centisecs; modprobe loop; \
                 losetup --find --offset $((start * 512)) --sizelimit $((size * 512)) /dev/vdc"
            }
            Self::Breakable => "dmsetup create lab_disk --table \"0 $size linear /dev/vdc $start\"",
        };
        format!("{PLACE}{how}; udevadm settle; ")
    }
}

/// Does this with the pool on a host, and takes the pool away again, also when it fails.
pub(crate) fn with_pool(
    world: &mut World,
    host: &str,
    disk: Disk,
    mib: u32,
    work: impl FnOnce(&mut World) -> Result<()>,
) -> Result<()> {
    make(world, host, disk, mib)?;
    let worked = work(world);
    if worked.is_err() {
        // A last attempt to leave nothing behind: the error is the one that was there first.
        let _ = force_away(world, host);
        return worked;
    }
    take_away(world, host)
}

fn make(world: &World, host: &str, disk: Disk, mib: u32) -> Result<()> {
    let script = format!(
        "{}{FIND}vgcreate --quiet --yes {POOL} $disk; lvcreate --quiet --yes --type thin-pool \
         --size {mib}M --poolmetadatasize 4M --chunksize 64K --name thin {POOL}; \
         sed -i 's|^DROVER_POOLS=.*|&;{FLAG}|' {SETTINGS}; sync",
        disk.attach()
    );
    world.lab().ssh(host)?.run(&script)?;
    restart_agent(world, host)?;
    wait_pool(world, host, "ready").map(drop)
}

/// The disk is there again after the host's boot.
pub(crate) fn attach(world: &World, host: &str, disk: Disk) -> Result<()> {
    world.lab().ssh(host)?.run(&format!("{}:", disk.attach())).map(drop)
}

fn take_away(world: &World, host: &str) -> Result<()> {
    wait_for("a pool without volumes", PATIENCE, || {
        Ok(world.volumes_in(host, POOL)?.is_empty().then_some(()))
    })
    .map_err(|e| Error::other(format!("{e}: {:?}", world.volumes_in(host, POOL))))?;
    let ssh = world.lab().ssh(host)?;
    ssh.run(&format!("sed -i 's|;{FLAG}||' {SETTINGS}"))?;
    restart_agent(world, host)?;
    let script = format!(
        "{PLACE}{FIND}vgremove --quiet --force --force --yes {POOL}; \
         pvremove --quiet --force --force --yes $disk; udevadm settle; \
         case $disk in /dev/loop*) losetup -d $disk;; *) dmsetup remove --retry lab_disk;; esac; \
         echo 500 > /proc/sys/vm/dirty_writeback_centisecs; \
         echo 3000 > /proc/sys/vm/dirty_expire_centisecs"
    );
    ssh.run(&script).map(drop)
}

fn force_away(world: &World, host: &str) -> Result<()> {
    if !world.lab().is_running(host)? {
        world.lab().start(host)?;
        world.cluster.wait_agent(host, None)?;
    }
    let _ = repair_disk(world, host);
    for domain in world.cluster.domains()? {
        let delete = ["domain", "delete", &domain.name, "--force"];
        world.ends(&world.vpsctl().start(&delete)?)?;
    }
    take_away(world, host)
}

/// As after an upgrade: guests do not notice.
fn restart_agent(world: &World, host: &str) -> Result<()> {
    let before = world.cluster.agent_pid(host)?;
    world.lab().ssh(host)?.run("systemctl restart drover-agent")?;
    world.cluster.wait_agent(host, before).map(drop)
}

/// Each write to the disk fails from now on; it can still be read.
pub(crate) fn break_disk(world: &World, host: &str) -> Result<()> {
    table(world, host, "flakey /dev/vdc $start 0 3600 1 error_writes")
}

/// It is as it was.
pub(crate) fn repair_disk(world: &World, host: &str) -> Result<()> {
    table(world, host, "linear /dev/vdc $start")
}

fn table(world: &World, host: &str, table: &str) -> Result<()> {
    let script = format!(
        "{PLACE}dmsetup reload lab_disk --table \"0 $size {table}\"; \
         dmsetup suspend --nolockfs lab_disk; dmsetup resume lab_disk"
    );
    world.lab().ssh(host)?.run(&script).map(drop)
}

/// Waits until the controllers show the pool so; how it is shown.
pub(crate) fn wait_pool(world: &World, host: &str, state: &str) -> Result<Value> {
    let name = format!("nodes/{host}/pools/{POOL}");
    let mut last = Value::Null;
    wait_for(&format!("{name}: {state}"), POOL_PATIENCE, || {
        let pools = world.vpsctl().json(&["pool", "list"])?;
        last = list(&pools).find(|pool| pool["name"] == *name).cloned().unwrap_or_default();
        Ok((last["state"] == *state).then(|| last.clone()))
    })
    .map_err(|e| Error::other(format!("{e}; it is {last}")))
}

/// Waits until the kernel says that the thin pool has no room left.
pub(crate) fn wait_full(world: &World, host: &str) -> Result<()> {
    let status = format!("dmsetup status {POOL}-thin-tpool");
    wait_for("a full thin pool", PATIENCE, || {
        let status = world.lab().ssh(host)?.run(&status)?;
        Ok(status.contains("out_of_data_space").then_some(()))
    })
}

/// There is an event of this kind about the host's pool.
pub(crate) fn has_event(world: &World, host: &str, kind: &str) -> Result<()> {
    let subject = format!("nodes/{host}");
    wait_for(&format!("an event {kind}"), PATIENCE, || {
        let events = world.vpsctl().run(&["events", "--subject", &subject])?;
        let found = events.lines().any(|line| line.contains(kind) && line.contains(POOL));
        Ok(found.then_some(()))
    })
}

/// Waits until the guest says so of its disk.
pub(crate) fn wait_disk(
    world: &World,
    guest: &Guest,
    what: &str,
    good: impl Fn(&DiskFigures) -> bool,
) -> Result<DiskFigures> {
    let mut last = None;
    wait_for(&format!("{}: {what}", guest.name), PATIENCE, || {
        let now = world.lab().netns().run(|| Ok(DiskFigures::of(guest).ok()))?;
        last = now.or(last);
        Ok(now.filter(|figures| good(figures)))
    })
    .map_err(|e| Error::other(format!("{e}; it said {last:?}")))
}

/// All its errors were the disk's own: nothing that it could read was wrong.
pub(crate) fn lost_nothing(figures: &DiskFigures) -> Result<()> {
    ensure!(figures.wrong == figures.failed, "blocks are not as written: {figures:?}");
    Ok(())
}
