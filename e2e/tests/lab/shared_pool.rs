//! A pool that all hosts share: a domain moves between them without its disk.

use drover_e2e::client::fetch_path;
use drover_e2e::guests::Guest;
use drover_e2e::process::wait_for;
use drover_e2e::{Result, nfs};

use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] =
    &[("disks::a_shared_pool_moves_no_data", a_shared_pool_moves_no_data)];

fn a_shared_pool_moves_no_data(world: &mut World) -> Result<()> {
    nfs::start(&world.cluster)?;
    let result = its_domain_moves(world);
    let ended = nfs::end(&world.cluster);
    result.and(ended)
}

fn its_domain_moves(world: &World) -> Result<()> {
    let row = nfs::wait_pool(&world.cluster, "host1", "ready")?;
    let others = row["shared_with"].as_array().map_or(0, Vec::len);
    ensure!(others == 2, "all three should share it: {row:#}");

    let disk = format!("size=64MiB,pool={}", nfs::POOL);
    let guest = Guest { fill_mib: 48, disk: Some(disk), disk_kib: 512, ..Guest::new("web1", 11) };
    let watch = world.domain_with_client(&guest, "host1")?;
    let begin = wait_for("the guest's writer", PATIENCE, || {
        Ok(Some(look(world, &guest)?).filter(|page| page.writes > 0))
    })?;
    let volumes = files(world, "host3")?;
    ensure!(volumes.len() == 1, "one volume should be there: {volumes:?}");
    // What one host has open no other one can lock.
    let lock = format!("flock -x -n {}/{} true || echo refused", nfs::MOUNT, volumes[0]);
    let said = world.lab().ssh("host3")?.run(&lock)?;
    ensure!(said.trim() == "refused", "another host could lock its disk: {said:?}");

    let mut before = begin.clone();
    for to in ["host2", "host1"] {
        let operation = world.vpsctl().start(&["domain", "migrate", "web1", "--to", to])?;
        let moved = world.succeeds(&operation)?;
        let report = &moved["migration"];
        ensure!(report["disk_bytes_sent"].as_u64().unwrap_or(0) == 0, "disk was sent: {moved:#}");
        println!("  moved: {} bytes, pause {} us", report["bytes_sent"], report["pause_us"]);
        let now = wait_for("more writes", PATIENCE, || {
            Ok(Some(look(world, &guest)?).filter(|page| page.writes > before.writes + 8))
        })?;
        ensure!(now.boot_id == begin.boot_id, "it has booted anew on {to}");
        ensure!(now.wrong == 0, "{} writes were lost on the way to {to}", now.wrong);
        ensure!(files(world, "host3")? == volumes, "its volume is another one");
        before = now;
    }

    // The destination dies on the way: nothing has happened, and nothing was removed.
    let slow = ["domain", "migrate", "web1", "--to", "host3", "--bandwidth-max", "4MiB"];
    let operation = world.vpsctl().start(&slow)?;
    world.wait_shown(&operation, "copying", |o| {
        (o["migration"]["bytes_sent"].as_u64() > Some(0)).then_some(())
    })?;
    world.lab().kill("host3")?;
    world.fails(&operation)?;
    world.wait_domain("web1", "runs on host1", |d| d.is_running() && d.host() == "host1")?;
    let now = wait_for("more writes", PATIENCE, || {
        Ok(Some(look(world, &guest)?).filter(|page| page.writes > before.writes + 8))
    })?;
    ensure!(now.wrong == 0 && now.boot_id == begin.boot_id, "its disk or boot: {now:?}");
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host1", "host2", "host1"])?;

    // Its host comes back without the mount: that is no empty pool.
    world.revive("host3")?;
    let row = nfs::wait_pool(&world.cluster, "host3", "failed")?;
    let why = row["state_reason"].as_str().unwrap_or_default();
    ensure!(why.contains("drover-pool: is not there"), "the reason should say so: {row:#}");
    nfs::mount(world.lab(), "host3")?;
    nfs::wait_pool(&world.cluster, "host3", "ready")?;

    // Stopped, it moves when it is seen there, and is deleted from there.
    for arguments in
        [["domain", "stop", "web1"].as_slice(), &["domain", "migrate", "web1", "--to", "host3"]]
    {
        let operation = world.vpsctl().start(arguments)?;
        world.succeeds(&operation)?;
    }
    let now = world.cluster.domain("web1")?;
    ensure!(now.host() == "host3", "it should be on host3: {now:?}");
    ensure!(files(world, "host1")? == volumes, "its volume is gone");
    let operation = world.vpsctl().start(&["domain", "delete", "web1"])?;
    world.succeeds(&operation)?;
    wait_for("an empty pool", PATIENCE, || Ok(files(world, "host1")?.is_empty().then_some(())))
}

/// Everything that is in the pool, as a host sees it.
fn files(world: &World, host: &str) -> Result<Vec<String>> {
    let find = format!("cd {}; find volumes snapshots images new -type f", nfs::MOUNT);
    let said = world.lab().ssh(host)?.run(&find)?;
    Ok(said.split_whitespace().map(str::to_owned).collect())
}

/// What the guest says of itself.
#[derive(Debug, Clone)]
struct Page {
    boot_id: String,
    writes: u64,
    wrong: u64,
}

fn look(world: &World, guest: &Guest) -> Result<Page> {
    let text = world.lab().netns().run(|| fetch_path(guest.address(), "/"))?;
    let value = |key: &str| {
        let found = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        found.unwrap_or_default().to_owned()
    };
    Ok(Page {
        boot_id: value("boot_id"),
        writes: value("disk_writes").parse().unwrap_or_default(),
        wrong: value("disk_wrong").parse().unwrap_or(u64::MAX),
    })
}
