//! A VPS with a disk: made from an image, booted from its own kernel, moved with its data.

use std::time::Duration;

use drover_e2e::process::wait_for;
use drover_e2e::vps::{self, Vps};
use drover_e2e::{Error, Result};

use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] = &[("disks::a_vps_lives_on_its_disk", a_vps_lives_on_its_disk)];

/// For copying an image and disks on emulated cores.
const COPY_PATIENCE: Duration = Duration::from_secs(900);

fn a_vps_lives_on_its_disk(world: &mut World) -> Result<()> {
    vps::prepare(&world.cluster, "host1", |line| println!("  {line}"))?;
    let vps = Vps::new(&world.cluster, "vps1");
    let vpsctl = world.vpsctl();

    // On a node that has no copy of the image: it travels there.
    let operation = vps.create(&vpsctl, Some("host2"))?;
    let created = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
    ensure!(created["state"] == "succeeded", "it should be made: {created:#}");
    vps.wait_ssh(&world.cluster)?;
    let said =
        vps.run(&world.cluster, "hostname; df --output=size -BM / | tail -1; cat /proc/cmdline")?;
    ensure!(said.starts_with("vps1\n"), "host name: {said}");
    let size = said.lines().nth(1).and_then(|line| line.trim().trim_end_matches('M').parse().ok());
    ensure!(size.is_some_and(|mib: u32| mib > 3500), "the filesystem did not grow: {said}");
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
    let operation = vpsctl.start(&["domain", "migrate", "vps1", "--to", "host3"])?;
    let moved = world.cluster.wait_operation(&operation, COPY_PATIENCE)?;
    ensure!(moved["state"] == "succeeded", "it should move: {moved:#}");
    vps.run(&world.cluster, "touch stop")?;
    let output = writer.wait_with_output().map_err(|e| Error::other(format!("ssh: {e}")))?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("f7: OK"), "the session: {said}");
    let same = vps.run(&world.cluster, "cat /proc/sys/kernel/random/boot_id; sha256sum data")?;
    ensure!(same == format!("{boot}{sum}"), "another boot or other data: {same}");
    println!("  moved: {}", moved["migration"]);

    // And leaves nothing behind.
    wait_for("host2 without its volume", PATIENCE, || {
        Ok(world.volumes_on("host2")?.is_empty().then_some(()))
    })?;
    Ok(())
}
