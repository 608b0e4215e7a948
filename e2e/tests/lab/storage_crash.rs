//! A host loses power in the middle of all that copies disks: an image comes to it, one volume
//! leaves it and another one arrives, a backup of a third has begun. Each ends with a reason or goes
//! on when the host is back; nothing half made is left, and no flushed write is lost.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::time::Duration;

use drover_e2e::cluster::{DomainView, list};
use drover_e2e::guests::Guest;
use drover_e2e::process::wait_for;
use drover_e2e::switch::Segment;
use drover_e2e::{Error, Result, paths};
use serde_json::Value;

use crate::fragile::wait_disk;
use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] =
    &[("storage_crash::a_host_dies_amid_its_copies", a_host_dies_amid_its_copies)];

/// The one that dies.
const HOST: &str = "host3";
const IMAGE: &str = "noise";
const IMAGE_BYTES: usize = 96 << 20;
/// With this on its cables every copy has a middle.
const DELAY_MS: u32 = 150;
const COPY_PATIENCE: Duration = Duration::from_secs(300);

fn guest(name: &str, number: u8) -> Guest {
    Guest {
        disk: Some("size=96MiB,pool=ssd".to_owned()),
        disk_kib: 8192,
        ..Guest::new(name, number)
    }
}

fn a_host_dies_amid_its_copies(world: &mut World) -> Result<()> {
    let vpsctl = world.vpsctl();
    import_noise(world)?;
    // One that leaves, one that comes, one that runs.
    let (leaves, comes, runs) = (guest("web1", 11), guest("web2", 12), guest("web3", 13));
    for (guest, host) in [(&leaves, HOST), (&comes, "host2"), (&runs, HOST)] {
        world.succeeds(&guest.create(&vpsctl, Some(host))?)?;
    }
    let mut flushed = Vec::new();
    for guest in [&leaves, &comes, &runs] {
        let figures = wait_disk(world, guest, "four hundred writes", |d| d.flushed > 400)?;
        flushed.push((guest, figures.flushed));
    }
    for guest in [&leaves, &comes] {
        world.succeeds(&vpsctl.start(&["domain", "stop", &guest.name])?)?;
    }

    world.lab().set_link(HOST, &[Segment::Mgmt], |link| link.delay_ms = DELAY_MS)?;
    let backups = paths::disk_dir(world.lab().name()).join("backups");
    let folder = backups.to_string_lossy().into_owned();
    let mut backup = vpsctl
        .command(&["backup", "create", "web3", &folder])?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| Error::other(format!("cannot run vpsctl: {e}")))?;
    let cloned = format!("image={IMAGE},size=96MiB,pool=ssd");
    let clone = [
        "domain",
        "create",
        "web4",
        "--memory",
        "128MiB",
        "--kernel",
        "/var/lib/drover/boot/vmlinuz",
        "--disk",
        &cloned,
        "--node",
        HOST,
    ];
    let lines: [&[&str]; 3] = [
        &["domain", "migrate", "web1", "--to", "host2"],
        &["domain", "migrate", "web2", "--to", HOST],
        &clone,
    ];
    let mut operations = Vec::new();
    for line in lines {
        operations.push(vpsctl.start(line)?);
    }
    wait_for("drafts of an image and of two volumes", PATIENCE, || {
        let drafts = |host: &str| -> Result<usize> {
            let volumes = world.volumes_on(host)?;
            Ok(volumes.iter().filter(|name| name.starts_with("drover_new_")).count())
        };
        Ok((drafts(HOST)? >= 2 && drafts("host2")? >= 1).then_some(()))
    })?;
    world.lab().kill(HOST)?;
    world.lab().set_link(HOST, &[Segment::Mgmt], |link| link.delay_ms = 0)?;
    wait_for("the end of the backup", COPY_PATIENCE, || Ok(backup.try_wait().unwrap_or_default()))?;
    let output = backup.wait_with_output().map_err(|e| Error::other(format!("vpsctl: {e}")))?;
    let said = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
    println!("  the backup: {}: {said}", output.status);
    ensure!(!output.status.success(), "a backup of a host that is dead");
    ensure!(said.lines().any(|line| line.starts_with("error")), "no reason: {said:?}");

    world.revive(HOST)?;
    for (operation, line) in operations.iter().zip(lines) {
        let ended = world.cluster.wait_operation(operation, COPY_PATIENCE)?;
        let why = ended["error"]["message"].as_str().unwrap_or_default();
        println!("  {}: {} {why}", line[..3].join(" "), ended["state"]);
        ensure!(ended["state"] == "succeeded" || !why.is_empty(), "no reason: {ended:#}");
    }
    nothing_half_made_is_left(world)?;
    for (guest, flushed) in flushed {
        if !world.cluster.domain(&guest.name)?.is_running() {
            let at_rest = |d: &DomainView| matches!(d.state.as_deref(), Some("failed" | "stopped"));
            world.wait_domain(&guest.name, "at rest", at_rest)?;
            world.succeeds(&vpsctl.start(&["domain", "start", &guest.name])?)?;
        }
        let after = wait_disk(world, guest, "writes again", |d| d.flushed > d.kept)?;
        println!("  {}: flushed up to {flushed}; {} is there", guest.name, after.kept);
        ensure!(after.kept >= flushed && after.wrong == 0, "{}: {after:?}", guest.name);
    }

    // What was read of it is no backup; the next one is whole.
    vpsctl.run(&["backup", "create", "web3", &folder])?;
    vpsctl.run(&["backup", "verify", &folder])?;
    for domain in ["web1", "web2", "web3", "web4"] {
        if vpsctl.call(&["domain", "show", domain])?.code == 0 {
            world.succeeds(&vpsctl.start(&["domain", "delete", domain, "--force"])?)?;
        }
    }
    vpsctl.run(&["image", "delete", IMAGE]).map(drop)
}

/// An image that no compression makes small.
fn import_noise(world: &World) -> Result<()> {
    let file = paths::disk_dir(world.lab().name()).join("noise.raw");
    let mut noise = Vec::with_capacity(IMAGE_BYTES);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    while noise.len() < IMAGE_BYTES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        noise.extend_from_slice(&random.to_ne_bytes());
    }
    std::fs::write(&file, noise).map_err(Error::io("cannot write", &file))?;
    let file = file.to_string_lossy().into_owned();
    let from = ["image", "import", IMAGE, "--file", &file, "--format", "raw", "--node", "host1"];
    world.vpsctl().run(&from).map(drop)
}

/// On each host there is what the controllers list, and nothing else.
fn nothing_half_made_is_left(world: &World) -> Result<()> {
    for host in world.lab().hosts()? {
        let node = format!("nodes/{host}");
        let mut seen = String::new();
        wait_for(&format!("{host} without leftovers"), COPY_PATIENCE, || {
            let here = |what: &str| -> Result<Vec<Value>> {
                let rows = world.vpsctl().json(&[what, "list"])?;
                Ok(list(&rows).filter(|row| row["node"] == *node).cloned().collect())
            };
            let (volumes, snapshots) = (here("volume")?, here("snapshot")?);
            let name =
                |row: &Value| format!("drover_volume_{}", row["uid"].as_str().unwrap_or("?"));
            let wanted: BTreeSet<String> = volumes.iter().map(name).collect();
            let there = world.volumes_on(&host)?;
            let (parts, rest): (BTreeSet<&String>, BTreeSet<&String>) =
                there.iter().partition(|name| name.starts_with("drover_snapshot_"));
            let ready = snapshots.iter().filter(|row| row["state"] == "ready").count();
            seen = format!("there are {there:?}, listed {volumes:?} and {snapshots:?}");
            let is_known = (ready..=snapshots.len()).contains(&parts.len());
            Ok((is_known && rest.into_iter().eq(&wanted)).then_some(()))
        })
        .map_err(|e| Error::other(format!("{e}: {seen}")))?;
    }
    Ok(())
}
