//! Machines, processes and cables that fail in the middle of a migration. Afterwards the guest
//! lives in one place, or is reported as lost with the reason; never two, never stuck.

use std::time::Duration;

use drover_e2e::Result;
use drover_e2e::guests::Guest;
use drover_e2e::process::wait_for;
use drover_e2e::switch::Segment;

use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

pub(crate) const TESTS: &[Test] = &[
    ("faults::the_destination_is_killed", the_destination_is_killed),
    ("faults::the_sources_agent_is_killed", the_sources_agent_is_killed),
    ("faults::the_network_is_cut_for_ten_seconds", the_network_is_cut_for_ten_seconds),
    ("faults::the_source_is_killed_after_the_hand_over", the_source_is_killed_after_the_hand_over),
];

/// Slow enough to have a middle: 48 MiB of noise at 4 MiB a second.
fn guest() -> Guest {
    Guest { fill_mib: 48, ..Guest::new("web1", 11) }
}

/// Starts a slow migration of web1 and waits until it copies.
fn start_slowly(world: &World, to: &str) -> Result<String> {
    let arguments = ["domain", "migrate", "web1", "--to", to, "--bandwidth-max", "4MiB"];
    let operation = world.vpsctl().start(&arguments)?;
    world.wait_shown(&operation, "copying", |o| {
        (o["migration"]["phase"] == "copying" && o["migration"]["bytes_sent"].as_u64() > Some(0))
            .then_some(())
    })?;
    Ok(operation)
}

fn the_destination_is_killed(world: &mut World) -> Result<()> {
    let guest = guest();
    let watch = world.domain_with_client(&guest, "host1")?;
    let operation = start_slowly(world, "host3")?;
    world.lab().kill("host3")?;
    let ended = world.fails(&operation)?;
    ensure!(
        ended["error"]["message"].as_str().is_some_and(|m| m.contains("host3")),
        "the reason should name host3: {ended:#}"
    );
    world.wait_domain("web1", "runs on host1", |d| d.is_running() && d.host() == "host1")?;
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host1"])?;
    world.revive("host3")
}

fn the_sources_agent_is_killed(world: &mut World) -> Result<()> {
    let guest = guest();
    let watch = world.domain_with_client(&guest, "host1")?;
    let operation = start_slowly(world, "host2")?;
    let agent = world.cluster.agent_pid("host1")?;
    world.cluster.kill_agent("host1")?;
    world.cluster.wait_agent("host1", agent)?;
    let ended = world.ends(&operation)?;
    let domain = world.wait_domain("web1", "runs", |d| d.is_running())?;
    let moved = ended["state"] == "succeeded";
    let expected = if moved { "host2" } else { "host1" };
    ensure!(domain.host() == expected, "{domain:?} after {ended:#}");
    world.unnoticed(watch)?;
    let hosts: &[&str] = if moved { &["host1", "host2"] } else { &["host1"] };
    world.ran_only_on(&guest, hosts)
}

fn the_network_is_cut_for_ten_seconds(world: &mut World) -> Result<()> {
    let guest = guest();
    let watch = world.domain_with_client(&guest, "host1")?;
    let operation = start_slowly(world, "host2")?;
    world.lab().set_cut("host2", &[Segment::Mgmt], true)?;
    // Not a wait for anything: the length of the cut is the test.
    std::thread::sleep(Duration::from_secs(10));
    world.lab().set_cut("host2", &[Segment::Mgmt], false)?;
    let ended = world.ends(&operation)?;
    let domain = world.wait_domain("web1", "runs", |d| d.is_running())?;
    let moved = ended["state"] == "succeeded";
    ensure!(domain.host() == if moved { "host2" } else { "host1" }, "{domain:?} after {ended:#}");
    world.unnoticed(watch)?;
    let hosts: &[&str] = if moved { &["host1", "host2"] } else { &["host1"] };
    world.ran_only_on(&guest, hosts)?;
    world.cluster.wait_nodes_ready(3, PATIENCE)
}

/// The destination's first frame tells that it runs; in that moment the source loses power,
/// before it can tell anybody how it ended.
fn the_source_is_killed_after_the_hand_over(world: &mut World) -> Result<()> {
    let guest = Guest::new("web1", 11);
    let watch = world.domain_with_client(&guest, "host1")?;
    let operation = world.vpsctl().start(&["domain", "migrate", "web1", "--to", "host2"])?;
    let mac = guest.mac();
    wait_for("the destination's first frame", PATIENCE, || {
        let hosts = world.lab().hosts_of_address(&mac)?;
        Ok((hosts.last().is_some_and(|h| h == "host2")).then_some(()))
    })?;
    world.lab().kill("host1")?;
    let ended = world.ends(&operation)?;
    let domain =
        world.wait_domain("web1", "runs on host2", |d| d.is_running() && d.host() == "host2")?;
    ensure!(ended["state"] == "succeeded", "the guest moved: {ended:#}, {domain:?}");
    // The host comes back with the domain in its records, and must not run it.
    world.revive("host1")?;
    ensure!(world.cluster.vmm_pids("host1")?.is_empty(), "host1 runs a domain that it handed over");
    world.unnoticed(watch)?;
    world.ran_only_on(&guest, &["host1", "host2"])
}
