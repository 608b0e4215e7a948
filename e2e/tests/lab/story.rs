//! What a provider does each day.

use std::net::Ipv4Addr;
use std::time::Duration;

use drover_e2e::client::{Watch, fetch_path};
use drover_e2e::cluster::list;
use drover_e2e::guests::Guest;
use drover_e2e::process::wait_for;
use drover_e2e::{Error, Result};

use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] = &[
    ("story::a_domain_moves_unnoticed", a_domain_moves_unnoticed),
    ("story::four_vcpus_move_there_and_back", four_vcpus_move_there_and_back),
    ("story::ends_are_told_apart", ends_are_told_apart),
    ("story::the_console_has_a_history", the_console_has_a_history),
    ("story::a_node_is_drained_while_the_leader_dies", a_node_is_drained_while_the_leader_dies),
    ("story::an_agent_is_killed_and_comes_back", an_agent_is_killed_and_comes_back),
    ("story::the_balancer_evens_out", the_balancer_evens_out),
    ("story::a_migration_is_cancelled", a_migration_is_cancelled),
];

/// A running domain is moved; its client sees nothing, its memory is intact, and the report
/// explains the pause.
fn a_domain_moves_unnoticed(world: &mut World) -> Result<()> {
    let guest = Guest::new("web1", 11);
    let watch = world.domain_with_client(&guest, "host1")?;
    let operation = world.vpsctl().start(&["domain", "migrate", "web1", "--to", "host2"])?;
    let report = world.succeeds(&operation)?["migration"].clone();
    world.wait_domain("web1", "runs on host2", |d| d.is_running() && d.host() == "host2")?;
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host1", "host2"])?;

    let number = |key: &str| report[key].as_u64().unwrap_or(0);
    let parts: u64 = ["pause_stop_us", "pause_memory_us", "pause_state_us", "pause_commit_us"]
        .map(number)
        .iter()
        .sum();
    ensure!(number("pause_us") > 0 && parts == number("pause_us"), "the parts: {report:#}");
    ensure!(number("rounds") >= 2, "it was not moved in passes: {report:#}");
    ensure!(number("zero_pages") > 0, "zero pages were sent: {report:#}");
    ensure!(
        number("bytes_sent") >= u64::from(guest.fill_mib) << 20
            && number("bytes_sent") < number("memory_bytes") * 8,
        "bytes sent: {report:#}"
    );
    Ok(())
}

fn four_vcpus_move_there_and_back(world: &mut World) -> Result<()> {
    let guest = Guest { vcpus: 4, ..Guest::new("web4", 14) };
    let watch = world.domain_with_client(&guest, "host1")?;
    for to in ["host3", "host1"] {
        let operation = world.vpsctl().start(&["domain", "migrate", "web4", "--to", to])?;
        world.succeeds(&operation)?;
    }
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host1", "host3", "host1"])
}

/// Power-off, reboot and panic of a guest, and a VMM killed from outside, each reach the
/// operator under their own name.
fn ends_are_told_apart(world: &mut World) -> Result<()> {
    let guest = Guest::new("web1", 11);
    let watch = world.domain_with_client(&guest, "host1")?;

    press(world, guest.address(), "/reboot")?;
    let boot = |watch: &Watch| watch.seen().first().map_or(0, |s| s.pages.reboots);
    wait_for("a page from the next boot", PATIENCE, || Ok((boot(&watch) == 1).then_some(())))?;
    world.wait_domain("web1", "runs again", |d| d.is_running())?;
    drop(watch);

    press(world, guest.address(), "/poweroff")?;
    world.wait_domain("web1", "stopped", |d| d.state.as_deref() == Some("stopped"))?;
    ensure_last_exit(world, "shutdown")?;
    start_again(world, &guest)?;

    press(world, guest.address(), "/panic")?;
    world.wait_domain("web1", "failed", |d| d.state.as_deref() == Some("failed"))?;
    ensure_last_exit(world, "crash")?;
    start_again(world, &guest)?;

    world.lab().ssh("host1")?.run("pkill -KILL -x drover-vmm")?;
    world.wait_domain("web1", "failed", |d| d.state.as_deref() == Some("failed"))?;
    ensure_last_exit(world, "killed")?;
    start_again(world, &guest)?;

    // The power button, which the guest obeys.
    let operation = world.vpsctl().start(&["domain", "stop", "web1"])?;
    world.succeeds(&operation)?;
    world.wait_domain("web1", "stopped", |d| d.state.as_deref() == Some("stopped"))?;
    ensure_last_exit(world, "shutdown")
}

fn press(world: &World, address: Ipv4Addr, path: &str) -> Result<()> {
    world.lab().netns().run(|| fetch_path(address, path)).map(|_| ())
}

fn ensure_last_exit(world: &World, expected: &str) -> Result<()> {
    let domain = world.vpsctl().json(&["domain", "show", "web1"])?;
    ensure!(domain["last_exit"] == expected, "last_exit should be {expected}: {domain:#}");
    Ok(())
}

fn start_again(world: &World, guest: &Guest) -> Result<()> {
    let operation = world.vpsctl().start(&["domain", "start", &guest.name])?;
    world.succeeds(&operation)?;
    let watch = Watch::start(&world.lab().netns(), &[(guest.name.clone(), guest.address())])?;
    watch.wait_all_answer(PATIENCE)
}

/// Who attaches late still reads what was said at boot, and what is typed reaches the guest.
fn the_console_has_a_history(world: &mut World) -> Result<()> {
    let guest = Guest { kernel_messages: true, ..Guest::new("web1", 11) };
    world.domain_with_client(&guest, "host1")?.stop()?;
    let history = world.vpsctl().run(&["domain", "console", "web1", "--history-only"])?;
    ensure!(history.contains("Linux version"), "no boot in the history: {history}");
    ensure!(history.contains("drover-guest: ready"), "no init in the history: {history}");

    let mut command = world.vpsctl().command(&["domain", "console", "web1", "--linger", "3s"])?;
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let io = |e: std::io::Error| Error::other(format!("vpsctl domain console: {e}"));
    let mut child = command.spawn().map_err(io)?;
    if let Some(mut stdin) = child.stdin.take() {
        std::io::Write::write_all(&mut stdin, b"echo typed-by-hand\n").map_err(io)?;
    }
    let output = child.wait_with_output().map_err(io)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    // Once typed (the terminal's echo), once said by the guest.
    let count = text.matches("typed-by-hand").count();
    ensure!(count >= 2, "the guest did not answer: {text}");
    Ok(())
}

/// The demo's story in short.
fn a_node_is_drained_while_the_leader_dies(world: &mut World) -> Result<()> {
    let guests: Vec<Guest> = (1..=3).map(|n| Guest::new(format!("web{n}"), 10 + n)).collect();
    let vpsctl = world.vpsctl();
    let operations: Vec<String> =
        guests.iter().map(|g| g.create(&vpsctl, Some("host1"))).collect::<Result<_>>()?;
    for operation in &operations {
        world.succeeds(operation)?;
    }
    let targets: Vec<_> = guests.iter().map(|g| (g.name.clone(), g.address())).collect();
    let watch = Watch::start(&world.lab().netns(), &targets)?;
    watch.wait_all_answer(PATIENCE)?;
    watch.forget();

    let leader = world.cluster.wait_leader(PATIENCE)?;
    let drain = vpsctl.start(&["node", "drain", "host1"])?;
    world.wait_shown(&drain, "a domain that moves", |operation| {
        list(&operation["moves"]).any(|m| m["state"] == "moving").then_some(())
    })?;
    world.cluster.kill_controller(leader)?;
    let operation = world.succeeds(&drain)?;
    world.cluster.start_controller(leader)?;

    ensure!(list(&operation["moves"]).count() == 3, "three should have moved: {operation:#}");
    ensure!(
        operation["resumed_count"].as_u64() >= Some(1),
        "the next leader should have gone on with it: {operation:#}"
    );
    ensure!(world.cluster.vmm_pids("host1")?.is_empty(), "VMMs are left on host1");
    let seen = watch.stop()?;
    let faults: Vec<String> = seen.iter().flat_map(|s| s.faults(crate::world::GAP_MAX)).collect();
    ensure!(faults.is_empty(), "a customer would have noticed: {}", faults.join("; "));
    for guest in &guests {
        let host = world.cluster.domain(&guest.name)?.host().to_owned();
        world.ran_only_on(guest, &["host1", &host])?;
    }
    let node = vpsctl.json(&["node", "show", "host1"])?;
    ensure!(node["cordoned"] == true && node["drain_state"] == "drained", "host1: {node:#}");
    Ok(())
}

/// The guest goes on without its agent, and the agent finds its VMM again.
fn an_agent_is_killed_and_comes_back(world: &mut World) -> Result<()> {
    let guest = Guest::new("web1", 11);
    let watch = world.domain_with_client(&guest, "host2")?;
    let before = world.cluster.vmm_pids("host2")?;
    let agent = world.cluster.agent_pid("host2")?;
    world.cluster.kill_agent("host2")?;
    ensure!(world.cluster.vmm_pids("host2")? == before, "the VMM went with its agent");
    world.cluster.wait_agent("host2", agent)?;
    // It is in charge again when it moves the domain.
    let vpsctl = world.vpsctl();
    let operation = wait_for("a migration by the agent", Duration::from_secs(60), || {
        Ok(vpsctl.start(&["domain", "migrate", "web1", "--to", "host3"]).ok())
    })?;
    world.succeeds(&operation)?;
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host2", "host3"])
}

/// The balancer proposes moves when one node is busy, and makes them when asked to.
fn the_balancer_evens_out(world: &mut World) -> Result<()> {
    // Guests that never rest, all on one host.
    let guests: Vec<Guest> = (1..=3)
        .map(|n| Guest { dirty_interval_ms: 1, ..Guest::new(format!("busy{n}"), 20 + n) })
        .collect();
    let vpsctl = world.vpsctl();
    for guest in &guests {
        let operation = guest.create(&vpsctl, Some("host1"))?;
        world.succeeds(&operation)?;
    }
    let plan = wait_for("a proposal of the balancer", PATIENCE, || {
        let plan = vpsctl.json(&["cluster", "balance", "--dry-run"])?;
        Ok((list(&plan["moves"]).count() > 0).then_some(plan))
    })?;
    let imbalance = |key: &str| plan[key].as_f64().unwrap_or(f64::NAN);
    let better = imbalance("imbalance_after") < imbalance("imbalance_before");
    ensure!(better, "it should get better: {plan:#}");
    let hosts = |world: &World| -> Result<Vec<String>> {
        Ok(world.cluster.domains()?.iter().map(|d| d.host().to_owned()).collect())
    };
    ensure!(hosts(world)?.iter().all(|h| h == "host1"), "a dry run moved something");
    let operation = vpsctl.start(&["cluster", "balance", "--apply", "--moves-max", "1"])?;
    world.succeeds(&operation)?;
    let left = hosts(world)?.iter().filter(|h| *h == "host1").count();
    ensure!(left == 2, "one of three should have moved, {left} are left on host1");
    Ok(())
}

/// Cancelled before its hand-over, a migration leaves the domain as it was.
fn a_migration_is_cancelled(world: &mut World) -> Result<()> {
    let guest = Guest { fill_mib: 48, ..Guest::new("web1", 11) };
    let watch = world.domain_with_client(&guest, "host1")?;
    let vpsctl = world.vpsctl();
    let operation =
        vpsctl.start(&["domain", "migrate", "web1", "--to", "host2", "--bandwidth-max", "2MiB"])?;
    world.wait_shown(&operation, "copying", |o| {
        (o["migration"]["phase"] == "copying" && o["migration"]["bytes_sent"].as_u64() > Some(0))
            .then_some(())
    })?;
    vpsctl.start(&["operation", "cancel", &operation])?;
    let ended = world.ends(&operation)?;
    ensure!(ended["state"] == "cancelled", "it should be cancelled: {ended:#}");
    let domain =
        world.wait_domain("web1", "runs on host1", |d| d.is_running() && d.host() == "host1")?;
    ensure!(domain.epoch >= 1, "{domain:?}");
    // The destination is clean.
    wait_for("host2 without VMMs", PATIENCE, || {
        Ok(world.cluster.vmm_pids("host2")?.is_empty().then_some(()))
    })?;
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host1"])?;

    // And it can be moved afterwards: the dirty bits of the first attempt were put back.
    let operation = vpsctl.start(&["domain", "migrate", "web1", "--to", "host2"])?;
    world.succeeds(&operation)?;
    world.ran_only_on(&guest, &["host1", "host2"])
}
