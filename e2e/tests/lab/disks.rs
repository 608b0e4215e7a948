//! A VPS with a disk: made from an image, booted from its own kernel, moved with its data, and what
//! its owner and its operators do with it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use drover_e2e::cluster::list;
use drover_e2e::process::wait_for;
use drover_e2e::vps::{self, BOOT_PATIENCE, Vps};
use drover_e2e::{Error, Result, image, paths};

use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] = &[
    ("disks::a_vps_lives_on_its_disk", a_vps_lives_on_its_disk),
    ("disks::its_operators_repair_it", its_operators_repair_it),
];

/// For copying an image and disks on emulated cores.
const COPY_PATIENCE: Duration = Duration::from_secs(900);

fn a_vps_lives_on_its_disk(world: &mut World) -> Result<()> {
    vps::prepare(&world.cluster, "host1", |line| println!("  {line}"))?;
    let mut vps = Vps::new(&world.cluster, "vps1");
    // More than its image has.
    vps.disk_gib = 2;
    let vpsctl = world.vpsctl();

    // On a node that has no copy of the image: it travels there.
    let operation = vps.create(&vpsctl, Some("host2"))?;
    let created = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
    ensure!(created["state"] == "succeeded", "it should be made: {created:#}");
    ten_from_one_image(world)?;
    vps.wait_ssh(&world.cluster)?;
    let said =
        vps.run(&world.cluster, "hostname; df --output=size -BM / | tail -1; cat /proc/cmdline")?;
    ensure!(said.starts_with("vps1\n"), "host name: {said}");
    let size = said.lines().nth(1).and_then(|line| line.trim().trim_end_matches('M').parse().ok());
    ensure!(size.is_some_and(|mib: u32| mib > 1800), "the filesystem did not grow: {said}");
    ensure!(said.contains("root=UUID="), "it did not boot as its own menu says: {said}");

    // What was flushed is there after the VMM was killed; so are the keys of its first boot.
    let write = "sync; dd if=/dev/urandom of=data bs=1M count=32 conv=fsync status=none; \
                 sha256sum data";
    let sum = vps.run(&world.cluster, write)?;
    world.lab().ssh("host2")?.run("pkill -KILL -x drover-vmm")?;
    world.wait_domain("vps1", "failed", |d| d.state.as_deref() == Some("failed"))?;
    let operation = vpsctl.start(&["domain", "start", "vps1"])?;
    world.succeeds(&operation)?;
    vps.wait_ssh(&world.cluster)?;
    let after = vps.run(&world.cluster, "sha256sum data")?;
    ensure!(after == sum, "what was flushed has changed: {sum} {after}");

    // It moves with its disk while it writes, and nobody's session breaks.
    let boot = vps.run(&world.cluster, "cat /proc/sys/kernel/random/boot_id")?;
    let script = "i=0; while [ ! -e stop ]; do i=$((i+1)); \
                  dd if=/dev/urandom of=f$((i%8)) bs=64k count=4 conv=fsync status=none; \
                  sha256sum f$((i%8)) > sum$((i%8)); sync; sleep 0.5; done; echo wrote $i; sha256sum -c sum*";
    let writer = vps
        .command(&world.cluster, script)?
        .stdout(std::process::Stdio::piped())
        .spawn()
        .map_err(|e| Error::other(format!("cannot run ssh: {e}")))?;
    wait_for("the writer", PATIENCE, || Ok(vps.run(&world.cluster, "test -s sum7").ok()))?;

    // The destination dies in the middle of the disk: nothing has happened.
    let slow = ["domain", "migrate", "vps1", "--to", "host3", "--bandwidth-max", "4MiB"];
    let operation = vpsctl.start(&slow)?;
    world.wait_shown(&operation, "the middle of its disk", |o| {
        (o["migration"]["disk_bytes_sent"].as_u64() > Some(0)).then_some(())
    })?;
    world.lab().kill("host3")?;
    let ended = world.fails(&operation)?;
    let why = ended["error"]["message"].as_str().unwrap_or_default();
    ensure!(why.contains("host3"), "the reason should name host3: {ended:#}");
    world.wait_domain("vps1", "runs on host2", |d| d.is_running() && d.host() == "host2")?;
    world.revive("host3")?;
    wait_for("host3 without half a volume", PATIENCE, || {
        Ok(world.volumes_on("host3")?.is_empty().then_some(()))
    })?;

    let operation = vpsctl.start(&["node", "drain", "host2"])?;
    let drained = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
    ensure!(drained["state"] == "succeeded", "host2 should be drained: {drained:#}");
    ensure!(drained["moves"][0]["state"] == "moved", "it should move: {drained:#}");
    vps.run(&world.cluster, "touch stop")?;
    let output = writer.wait_with_output().map_err(|e| Error::other(format!("ssh: {e}")))?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("f7: OK"), "the session: {said}");
    let same = vps.run(&world.cluster, "cat /proc/sys/kernel/random/boot_id; sha256sum data")?;
    ensure!(same == format!("{boot}{sum}"), "another boot or other data: {same}");
    println!("  moved: {}", drained["moves"][0]);

    // And leaves nothing behind.
    wait_for("host2 without its volume", PATIENCE, || {
        Ok(world.volumes_on("host2")?.is_empty().then_some(()))
    })?;
    Ok(())
}

/// Nine more, whose content each node fetches once.
fn ten_from_one_image(world: &World) -> Result<()> {
    let vpsctl = world.vpsctl();
    let others: Vec<Vps> = (2..=10).map(|n| Vps::new(&world.cluster, &format!("vps{n}"))).collect();
    for vps in &others {
        let operation = vps.create_stopped(&vpsctl)?;
        let created = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
        ensure!(created["state"] == "succeeded", "{} should be made: {created:#}", vps.name);
    }
    wait_for("ten volumes", COPY_PATIENCE, || {
        let volumes = vpsctl.json(&["volume", "list"])?;
        let ready = list(&volumes).filter(|volume| volume["state"] == "ready").count();
        Ok((ready == 10).then_some(()))
    })?;
    let domains = vpsctl.json(&["domain", "list"])?;
    let addresses: BTreeSet<String> =
        list(&domains).map(|domain| domain["addresses"].to_string()).collect();
    ensure!(addresses.len() == 10, "ten should have an address each: {addresses:?}");
    for vps in &others {
        let operation = vpsctl.start(&["domain", "delete", &vps.name])?;
        world.succeeds(&operation)?;
    }
    Ok(())
}

/// Its disk grows, it is frozen for a snapshot, saved and woken, breaks, is rescued, loses its data
/// and gets it back.
fn its_operators_repair_it(world: &mut World) -> Result<()> {
    vps::prepare(&world.cluster, "host1", |line| println!("  {line}"))?;
    let vps = Vps::new(&world.cluster, "vps1");
    let vpsctl = world.vpsctl();
    let ends_well = |arguments: &[&str]| -> Result<()> {
        let operation = vpsctl.start(arguments)?;
        let ended = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
        ensure!(ended["state"] == "succeeded", "{arguments:?} should succeed: {ended:#}");
        Ok(())
    };
    let operation = vps.create(&vpsctl, Some("host1"))?;
    let created = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
    ensure!(created["state"] == "succeeded", "it should be made: {created:#}");
    vps.wait_ssh(&world.cluster)?;

    // The agent inside speaks for it.
    let address = vps.address(&vpsctl)?.to_string();
    let guest = wait_for("the guest's agent", PATIENCE, || {
        Ok(vpsctl.json(&["domain", "guest", "vps1"]).ok())
    })?;
    ensure!(guest["host_name"] == "vps1", "{guest:#}");
    ensure!(guest.to_string().contains(&address), "no address {address}: {guest:#}");

    // Its disk grows while it runs.
    ends_well(&["domain", "resize", "vps1", "--disk", "0=2GiB"])?;
    let grow = "sudo growpart /dev/vda 1 >/dev/null && sudo resize2fs /dev/vda1 >/dev/null 2>&1; \
                df --output=size -BM / | tail -1";
    let size = vps.run(&world.cluster, grow)?;
    let mib = size.trim().trim_end_matches('M').parse().ok();
    ensure!(mib.is_some_and(|mib: u32| mib > 1800), "the filesystem did not grow: {size}");

    // Another disk comes while it runs, goes, and has its data when it comes again.
    another_disk(world, &vps)?;

    // Saved and woken, it is the same boot.
    let boot = vps.run(&world.cluster, "cat /proc/sys/kernel/random/boot_id")?;
    ends_well(&["domain", "save", "vps1"])?;
    world.wait_domain("vps1", "saved", |d| d.state.as_deref() == Some("saved"))?;
    ensure!(world.cluster.vmm_pids("host1")?.is_empty(), "a saved domain has a VMM");
    ends_well(&["domain", "restore", "vps1"])?;
    vps.wait_ssh(&world.cluster)?;
    let same = vps.run(&world.cluster, "cat /proc/sys/kernel/random/boot_id")?;
    ensure!(same == boot, "it booted anew: {boot} {same}");

    // A snapshot of frozen filesystems.
    let sum = vps.run(
        &world.cluster,
        "dd if=/dev/urandom of=data bs=1M count=16 status=none; sha256sum data",
    )?;
    ends_well(&["snapshot", "create", "vps1", "before"])?;
    let snapshot = vpsctl.json(&["snapshot", "show", "before"])?;
    ensure!(snapshot["quiesced"] == true, "it was not frozen: {snapshot:#}");

    // Without its kernel it does not boot, and says why.
    vps.run(
        &world.cluster,
        "sudo mkdir /boot/away; sudo mv /boot/vmlinuz-* /boot/away; rm data; sync",
    )?;
    ends_well(&["domain", "stop", "vps1"])?;
    let operation = vpsctl.start(&["domain", "start", "vps1"])?;
    let failed = world.fails(&operation)?;
    let why = failed["error"]["message"].as_str().unwrap_or_default();
    ensure!(why.contains("boot"), "the reason should say what is missing: {failed:#}");

    // Rescued, with its own disk behind the rescue disk.
    ends_well(&["domain", "rescue", "vps1", "--image", vps::IMAGE])?;
    vps.wait_ssh(&world.cluster)?;
    let repair = "sudo mount /dev/vdb1 /mnt && sudo sh -c 'mv /mnt/boot/away/* /mnt/boot' \
                  && sudo umount /mnt && findmnt -no SOURCE /";
    let root = vps.run(&world.cluster, repair)?;
    ensure!(root.trim() == "/dev/vda1", "its root is not the rescue disk: {root}");
    ends_well(&["domain", "stop", "vps1"])?;
    ends_well(&["domain", "rescue", "vps1", "--end"])?;
    ends_well(&["domain", "start", "vps1"])?;
    vps.wait_ssh(&world.cluster)?;
    ensure!(vps.run(&world.cluster, "test -e data").is_err(), "its disk is an earlier one");

    // What it lost is in the snapshot.
    ends_well(&["domain", "stop", "vps1"])?;
    ends_well(&["snapshot", "restore", "before", "--yes"])?;
    ends_well(&["domain", "start", "vps1"])?;
    vps.wait_ssh(&world.cluster)?;
    let after = vps.run(&world.cluster, "sha256sum data")?;
    ensure!(after == sum, "the snapshot holds something else: {sum} {after}");
    vpsctl.run(&["snapshot", "delete", "before", "--yes"])?;

    // Reinstalled it knows nothing of that; its kernel is as new as its owner makes it.
    let folder = paths::disk_dir(world.lab().name()).join("backups");
    let folder = folder.to_string_lossy().into_owned();
    vpsctl.run(&["backup", "create", "vps1", &folder, "--name", "whole"])?;
    ends_well(&["domain", "stop", "vps1"])?;
    ends_well(&["domain", "reinstall", "vps1", "--yes"])?;
    ends_well(&["domain", "start", "vps1"])?;
    vps.wait_ssh(&world.cluster)?;
    ensure!(vps.run(&world.cluster, "test -e data").is_err(), "its disk is the earlier one");
    upgrade_its_kernel(world, &vps)?;

    // The backup brings back what it was, and a stopped domain takes it along to another node.
    ends_well(&["domain", "stop", "vps1"])?;
    vpsctl.run(&["backup", "verify", &folder])?;
    vpsctl.run(&["backup", "restore", &folder, "whole", "vps1", "--yes"])?;
    ends_well(&["domain", "migrate", "vps1", "--to", "host2"])?;
    ends_well(&["domain", "start", "vps1"])?;
    vps.wait_ssh(&world.cluster)?;
    let after = vps.run(&world.cluster, "sha256sum data")?;
    ensure!(after == sum, "the backup holds something else: {sum} {after}");
    Ok(())
}

/// Its owner installs packages and reboots.
fn upgrade_its_kernel(world: &World, vps: &Vps) -> Result<()> {
    let cluster = &world.cluster;
    let before = vps.run(cluster, "uname -r")?;
    vps.push(cluster, &image::ensure_kernel()?)?;
    let install = "tar xf kernel.tar && rm kernel.tar && sudo DEBIAN_FRONTEND=noninteractive \
                   apt-get install -qq -y --no-install-recommends ./*.deb >apt.log 2>&1 \
                   || { tail apt.log >&2; exit 1; }; sync; cat release";
    let release = vps.run(cluster, install)?;
    ensure!(release != before, "it runs {release} already");
    let boot = vps.run(cluster, "cat /proc/sys/kernel/random/boot_id; sudo systemctl reboot")?;
    let now = wait_for("its next boot", BOOT_PATIENCE, || {
        let now = vps.run(cluster, "cat /proc/sys/kernel/random/boot_id && uname -r").ok();
        Ok(now.filter(|now| !now.starts_with(boot.trim_end())))
    })?;
    let running = now.lines().nth(1).unwrap_or_default();
    println!("  kernel {} was followed by {running}", before.trim_end());
    ensure!(running == release.trim_end(), "it runs {running} and not {release}");
    Ok(())
}

/// A disk is attached to the VPS, which runs, written to, detached, and attached again.
fn another_disk(world: &World, vps: &Vps) -> Result<()> {
    let vpsctl = world.vpsctl();
    let begin = Instant::now();
    let made = vpsctl.start(&["volume", "create", "data", "--size", "1GiB", "--node", "host1"])?;
    let made = world.cluster.wait_operation(&made, COPY_PATIENCE)?;
    ensure!(made["state"] == "succeeded", "the volume should be made: {made:#}");
    vpsctl.run(&["volume", "attach", "data", "vps1"])?;
    let volume = vpsctl.json(&["volume", "show", "data"])?;
    let serial: String = volume["uid"].as_str().unwrap_or_default().replace('-', "");
    let disk = format!("/dev/disk/by-id/virtio-{}", &serial[..20]);
    let fill = format!(
        "udevadm wait --timeout=60 {disk} && sudo mkfs.ext4 -q {disk} && sudo mount {disk} /mnt \
         && sudo dd if=/dev/urandom of=/mnt/data bs=1M count=16 status=none && sync \
         && sha256sum /mnt/data && sudo umount /mnt"
    );
    let sum = vps.run(&world.cluster, &fill)?;
    vpsctl.run(&["volume", "detach", "data"])?;
    let gone = format!("udevadm wait --removed --timeout=60 {disk}");
    vps.run(&world.cluster, &gone)?;
    let volume = vpsctl.json(&["volume", "show", "data"])?;
    ensure!(volume["node"] == "nodes/host1", "it should lie on host1: {volume:#}");
    vpsctl.run(&["volume", "attach", "data", "vps1"])?;
    let look = format!(
        "udevadm wait --timeout=60 {disk} && sudo mount -o ro {disk} /mnt \
         && sha256sum /mnt/data && sudo umount /mnt"
    );
    let same = vps.run(&world.cluster, &look)?;
    ensure!(same == sum, "the disk holds something else: {sum} {same}");
    vpsctl.run(&["volume", "detach", "data"])?;
    vpsctl.run(&["volume", "delete", "data"])?;
    println!("  a disk came, went and came again: {:.0} s", begin.elapsed().as_secs_f64());
    Ok(())
}
