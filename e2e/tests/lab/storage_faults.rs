//! Disks and pools that fail under running guests: power lost during writes, a volume group that is
//! missing at the agent's start, a disk that returns errors, a thin pool that is really full.
//! No flushed write is lost, guests get errors and no silence, neighbours and agent go on.

use std::time::{Duration, Instant};

use drover_e2e::guests::{DiskFigures, Guest};
use drover_e2e::{Error, Result};

use crate::fragile::{
    Disk, POOL, attach, break_disk, has_event, lost_nothing, repair_disk, wait_disk, wait_full,
    wait_pool, with_pool,
};
use crate::world::World;
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] = &[
    ("storage_faults::power_is_lost_during_writes", power_is_lost_during_writes),
    ("storage_faults::a_disk_returns_errors", a_disk_returns_errors),
    ("storage_faults::a_thin_pool_is_full", a_thin_pool_is_full),
];

const HOST: &str = "host3";
/// vpsctl's exit code when no node has the room.
const NO_ROOM: i32 = 5;
/// A write for which there is no room fails within this; LVM's default would hold it back for 60 s.
const FULL_PATIENCE: Duration = Duration::from_secs(30);
const KERNEL: &str = "/var/lib/drover/boot/vmlinuz";

fn guest(name: &str, number: u8, mib: u32, kib_per_second: u32) -> Guest {
    Guest {
        disk: Some(format!("size={mib}MiB,pool={POOL}")),
        disk_kib: kib_per_second,
        ..Guest::new(name, number)
    }
}

fn create(world: &World, guest: &Guest) -> Result<()> {
    world.succeeds(&guest.create(&world.vpsctl(), Some(HOST))?).map(drop)
}

/// Two sectors at the end of the disk, where no volume is: one that is flushed and one that is not.
const MARK: &str = "disk=$(losetup -nO NAME -j /dev/vdc); set -e; at() { echo \
                    $(($(blockdev --getsize64 $disk) / 4096 - $1)); }; ";

/// The host's power goes while a guest writes. All that the guest was told is flushed is there
/// afterwards; and the disk is one that does lose what is not.
fn power_is_lost_during_writes(world: &mut World) -> Result<()> {
    with_pool(world, HOST, Disk::Volatile, 256, |world| {
        let guest = guest("web1", 11, 64, 2048);
        create(world, &guest)?;
        let before = wait_disk(world, &guest, "two hundred writes", |d| d.flushed > 200)?;
        ensure!(before.wrong == 0, "its disk fails already: {before:?}");
        let ssh = world.lab().ssh(HOST)?;
        let write = |what: &str, place: u32, sync: &str| {
            format!(
                "yes {what} | head -c 4096 | dd of=$disk bs=4096 count=1 iflag=fullblock \
                 oflag=direct seek=$(at {place}) conv=notrunc{sync} status=none; "
            )
        };
        // A guest that flushes would flush the mark too: it stands still for the last moment.
        let (kept, lost) = (write("kept", 1, ",fsync"), write("lost", 2, ""));
        ssh.run(&format!("{MARK}{kept}pkill -STOP -x drover-vmm; {lost}"))?;
        world.lab().kill(HOST)?;
        world.revive(HOST)?;

        // Without its disk the host has no such volume group. Its agent runs, and so do domains.
        let pool = wait_pool(world, HOST, "failed")?;
        let why = pool["state_reason"].as_str().unwrap_or_default();
        ensure!(why.contains(POOL), "the reason should name the volume group: {pool}");
        let agent = world.cluster.agent_pid(HOST)?;
        create(world, &Guest::new("web2", 12))?;

        attach(world, HOST, Disk::Volatile)?;
        let read = |place: u32| {
            format!(
                "dd if=$disk bs=4096 count=1 skip=$(at {place}) status=none | head -c 4; echo; "
            )
        };
        let marks = world.lab().ssh(HOST)?.run(&format!("{MARK}{}{}", read(1), read(2)))?;
        ensure!(
            marks.starts_with("kept\n") && !marks.contains("lost"),
            "the lab's disk is none with a volatile cache: {marks:?}"
        );
        wait_pool(world, HOST, "ready")?;
        ensure!(world.cluster.agent_pid(HOST)? == agent, "the agent was started again");
        let rests = |state: &str| matches!(state, "failed" | "stopped");
        let at_rest = world.wait_domain("web1", "at rest or running", |d| {
            d.is_running() || d.state.as_deref().is_some_and(rests)
        })?;
        if !at_rest.is_running() {
            world.succeeds(&world.vpsctl().start(&["domain", "start", "web1"])?)?;
        }
        let after =
            wait_disk(world, &guest, "flushes again", |d| d.flushed > d.kept && d.writes > 0)?;
        println!("  flushed up to {}; {} is there after the power cut", before.flushed, after.kept);
        ensure!(after.kept >= before.flushed, "a flushed write is lost: {before:?}, {after:?}");
        ensure!(after.wrong == 0, "its disk is damaged: {after:?}");
        delete(world, &["web1", "web2"])
    })
}

/// The guest sees errors, is not stopped, and others do not notice; nothing half made is left; after
/// the repair what was flushed is there.
fn a_disk_returns_errors(world: &mut World) -> Result<()> {
    with_pool(world, HOST, Disk::Breakable, 256, |world| {
        let watch = world.domain_with_client(&Guest::new("web2", 12), HOST)?;
        let guest = guest("web1", 11, 64, 2048);
        create(world, &guest)?;
        wait_disk(world, &guest, "forty writes", |d| d.flushed > 40)?;
        let vmms = world.cluster.vmm_pids(HOST)?;
        let agent = world.cluster.agent_pid(HOST)?;

        break_disk(world, HOST)?;
        let broken = wait_disk(world, &guest, "errors", |d| d.failed > 2)?;
        lost_nothing(&broken)?;
        let pool = wait_pool(world, HOST, "failed")?;
        println!("  the pool: {}", pool["state_reason"]);
        has_event(world, HOST, "POOL_TROUBLED")?;
        let vpsctl = world.vpsctl();
        let disk = format!("size=8MiB,pool={POOL}");
        let line = ["domain", "create", "web3", "--memory", "128MiB", "--kernel", KERNEL];
        world.refuses(&[&line[..], &["--disk", &disk]].concat(), NO_ROOM, &[POOL])?;
        let refused = vpsctl.call(&["snapshot", "create", "web1", "of-broken"])?;
        println!("  a snapshot: exit code {}: {}", refused.code, refused.err.trim_end());
        ensure!(refused.code != 0, "a snapshot of a broken disk: {}", refused.out);
        ensure!(refused.err.contains(POOL), "it should name the pool: {}", refused.err);
        ensure!(world.cluster.vmm_pids(HOST)? == vmms, "a VMM has ended");
        ensure!(world.cluster.agent_pid(HOST)? == agent, "the agent has ended");
        world.unnoticed(watch)?;

        // A thin pool that could not write its metadata stays read-only until its operator does as
        // its reason says.
        repair_disk(world, HOST)?;
        world.succeeds(&vpsctl.start(&["domain", "stop", "web1"])?)?;
        let why = pool["state_reason"].as_str().unwrap_or_default();
        let way = why.split_once(" are stopped, by: ").and_then(|(_, ways)| ways.split(';').next());
        let Some(way) = way else {
            return Err(Error::other(format!("it should say what puts it right: {pool}")));
        };
        world.lab().ssh(HOST)?.run(way)?;
        wait_pool(world, HOST, "ready")?;
        has_event(world, HOST, "POOL_READY")?;
        world.succeeds(&vpsctl.start(&["domain", "start", "web1"])?)?;
        let after = wait_disk(world, &guest, "flushes again", |d| d.writes > 20)?;
        println!("  flushed up to {}; {} is there", broken.flushed, after.kept);
        ensure!(after.kept >= broken.flushed, "a flushed write is lost: {broken:?}, {after:?}");
        ensure!(after.wrong == 0, "its disk is damaged: {after:?}");
        let left = world.volumes_in(HOST, POOL)?;
        ensure!(left.len() == 1, "more than its volume is there: {left:?}");
        world.succeeds(&vpsctl.start(&["snapshot", "create", "web1", "of-whole"])?)?;
        vpsctl.run(&["snapshot", "delete", "of-whole", "--yes"])?;
        delete(world, &["web1", "web2"])
    })
}

/// It fills up, which is said; nothing new comes; at its end a guest's writes fail, at once, and
/// those who have their room go on. With more room all go on.
fn a_thin_pool_is_full(world: &mut World) -> Result<()> {
    with_pool(world, HOST, Disk::Breakable, 64, |world| {
        // Somebody's own volume takes the most of it.
        let others = format!(
            "set -e; lvcreate -q -y -V 48M --thinpool thin -n others {POOL}; \
             dd if=/dev/zero of=/dev/{POOL}/others bs=1M count=46 oflag=direct status=none"
        );
        world.lab().ssh(HOST)?.run(&others)?;
        // It has all its blocks after some hundred writes to 32 of them.
        let settled = guest("web1", 11, 8, 4096);
        create(world, &settled)?;
        wait_disk(world, &settled, "all its blocks", |d| d.flushed > 450)?;
        // Its first block too, as any disk with a partition table: in a full pool the kernel fails
        // the flushes of a volume that has none.
        let first = format!(
            "dd if=/dev/zero of=$(ls /dev/{POOL}/drover_volume_*) bs=64K count=1 oflag=direct \
             status=none"
        );
        world.lab().ssh(HOST)?.run(&first)?;
        // Slow enough to be seen on its way.
        let greedy = guest("web2", 12, 512, 512);
        create(world, &greedy)?;

        wait_pool(world, HOST, "filling")?;
        has_event(world, HOST, "POOL_TROUBLED")?;
        let disk = format!("size=8MiB,pool={POOL}");
        let line = ["domain", "create", "web3", "--memory", "128MiB", "--kernel", KERNEL];
        world.refuses(&[&line[..], &["--disk", &disk]].concat(), NO_ROOM, &[POOL])?;

        wait_full(world, HOST)?;
        let begin = Instant::now();
        let full = wait_disk(world, &greedy, "errors", |d| d.failed > 0)?;
        let seconds = begin.elapsed().as_secs_f64();
        println!("  errors {seconds:.1} s after it was full: {full:?}");
        ensure!(begin.elapsed() < FULL_PATIENCE, "its writes were held back: {full:?}");
        lost_nothing(&full)?;
        let pool = wait_pool(world, HOST, "failed")?;
        println!("  the pool: {}", pool["state_reason"]);
        let before = wait_disk(world, &settled, "an answer", |_| true)?;
        let goes_on = |d: &DiskFigures| d.writes > before.writes + 64;
        let after = wait_disk(world, &settled, "writes to the room it has", goes_on)?;
        ensure!(after.wrong == 0, "its neighbour took its room: {after:?}");

        let extend = format!("lvextend -q -L +96M {POOL}/thin");
        world.lab().ssh(HOST)?.run(&extend)?;
        wait_pool(world, HOST, "ready")?;
        has_event(world, HOST, "POOL_READY")?;
        let before = wait_disk(world, &greedy, "an answer", |_| true)?;
        let after = wait_disk(world, &greedy, "writes again", |d| d.flushed > before.flushed + 16)?;
        lost_nothing(&after)?;
        delete(world, &["web1", "web2"])?;
        world.lab().ssh(HOST)?.run(&format!("lvremove -q -y {POOL}/others")).map(drop)
    })
}

fn delete(world: &World, names: &[&str]) -> Result<()> {
    for name in names {
        world.succeeds(&world.vpsctl().start(&["domain", "delete", name, "--force"])?)?;
    }
    Ok(())
}
