//! Bad input through the real command line: one clear error each, that names the field and what
//! is accepted, and nothing changed.

use std::time::Duration;

use drover_e2e::Result;
use drover_e2e::cluster::{CLUSTER_ID, controller_address, list};
use drover_e2e::guests::Guest;
use drover_e2e::process::{start_detached, wait_for};
use drover_e2e::{Error, paths};

use crate::world::{PATIENCE, World};
use crate::{Test, ensure};

/// vpsctl's exit codes.
const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const CONFLICT: i32 = 4;
const NO_ROOM: i32 = 5;

pub(crate) const TESTS: &[Test] = &[
    ("bad_input::what_no_domain_can_be", what_no_domain_can_be),
    ("bad_input::kernels_that_are_none", kernels_that_are_none),
    ("bad_input::what_does_not_exist", what_does_not_exist),
    ("bad_input::what_the_state_forbids", what_the_state_forbids),
    ("bad_input::a_second_controller_with_the_same_id", a_second_controller_with_the_same_id),
    ("bad_input::an_agent_of_another_cluster", an_agent_of_another_cluster),
];

const KERNEL: [&str; 2] = ["--kernel", "/var/lib/drover/boot/vmlinuz"];

fn no_domain_is_there(world: &World) -> Result<()> {
    let domains = world.cluster.domains()?;
    ensure!(domains.is_empty(), "something was made after all: {domains:?}");
    Ok(())
}

fn create<'a>(name: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut line = vec!["domain", "create", name];
    line.extend(KERNEL);
    line.extend(more);
    line
}

fn what_no_domain_can_be(world: &mut World) -> Result<()> {
    let memory = ["--memory", "128MiB"];
    world.refuses(&create("big", &["--memory", "64GiB"]), NO_ROOM, &["host1"])?;
    let zero = create("zero", &[memory[0], memory[1], "--vcpus", "0"]);
    world.refuses(&zero, USAGE, &["vcpus", "1", "8"])?;
    let slashes = create("a/b", &memory);
    world.refuses(&slashes, USAGE, &["a/b", "domains/"])?;
    world.refuses(&create("tiny", &["--memory", "3MiB"]), USAGE, &["memory", "32"])?;
    no_domain_is_there(world)
}

/// The start fails on the node, the reason names the file, and the domain says so too.
fn kernels_that_are_none(world: &mut World) -> Result<()> {
    let ssh = world.lab().ssh("host1")?;
    ssh.run("head -c 100000 /var/lib/drover/boot/vmlinuz > /root/short; echo text > /root/text")?;
    for kernel in ["/root/short", "/root/text", "/root/missing"] {
        let line = ["domain", "create", "odd", "--memory", "128MiB", "--kernel", kernel];
        let mut line = line.to_vec();
        line.extend(["--node", "host1"]);
        let operation = world.vpsctl().start(&line)?;
        let ended = world.fails(&operation)?;
        let message = ended["error"]["message"].as_str().unwrap_or_default();
        ensure!(message.contains(kernel), "the reason should name {kernel}: {ended:#}");
        if let Ok(domain) = world.cluster.domain("odd") {
            ensure!(!domain.is_running(), "it runs: {domain:?}");
            let delete = world.vpsctl().start(&["domain", "delete", "odd", "--force"])?;
            world.succeeds(&delete)?;
        }
        ensure!(world.cluster.vmm_pids("host1")?.is_empty(), "a VMM is left");
    }
    no_domain_is_there(world)
}

fn what_does_not_exist(world: &mut World) -> Result<()> {
    world.refuses(&["node", "show", "nosuch"], NOT_FOUND, &["nosuch"])?;
    world.refuses(&["node", "drain", "nosuch"], NOT_FOUND, &["nosuch"])?;
    world.refuses(&["domain", "show", "nosuch"], NOT_FOUND, &["nosuch"])?;
    let elsewhere = create("web1", &["--memory", "128MiB", "--node", "nosuch"]);
    world.refuses(&elsewhere, NOT_FOUND, &["nosuch"])?;
    let uuid = "6f1c7b0e-8f3c-4c59-9d5e-0d6a3f0c1f1a";
    world.refuses(&["operation", "show", uuid], NOT_FOUND, &[uuid])?;
    // An id of another kind is no operation's.
    world.refuses(&["operation", "show", "domains/web1"], USAGE, &["domains/web1"])?;
    world.refuses(&["operation", "cancel", "nodes/host1"], USAGE, &["nodes/host1"])?;
    no_domain_is_there(world)
}

fn what_the_state_forbids(world: &mut World) -> Result<()> {
    let guest = Guest { fill_mib: 48, ..Guest::new("web1", 11) };
    world.domain_with_client(&guest, "host1")?.stop()?;
    let before = world.cluster.domain("web1")?;

    world.refuses(&["domain", "migrate", "web1", "--to", "host1"], CONFLICT, &["host1"])?;
    world.refuses(&create("web1", &["--memory", "128MiB"]), CONFLICT, &["web1"])?;
    world.refuses(&["domain", "delete", "web1"], CONFLICT, &["web1"])?;
    world.refuses(&["node", "delete", "host1"], CONFLICT, &["host1"])?;
    let after = world.cluster.domain("web1")?;
    ensure!(
        after.is_running() && (&after.node, after.epoch) == (&before.node, before.epoch),
        "something changed: {before:?}, {after:?}"
    );

    // Two drains at once: the second is refused, the first goes on.
    let vpsctl = world.vpsctl();
    let drain = vpsctl.start(&["node", "drain", "host1", "--bandwidth-max", "8MiB"])?;
    world.refuses(&["node", "drain", "host1"], CONFLICT, &["host1"])?;
    let ended = world.succeeds(&drain)?;
    world.refuses(&["operation", "cancel", &drain], CONFLICT, &[])?;
    ensure!(list(&ended["moves"]).count() == 1, "{ended:#}");
    Ok(())
}

/// It cannot have the first one's address; from another address the others refuse it, and the
/// cluster goes on.
fn a_second_controller_with_the_same_id(world: &mut World) -> Result<()> {
    let folder = paths::disk_dir(world.lab().name()).join("second");
    let log = paths::run_dir(world.lab().name()).join("second.log");
    std::fs::create_dir_all(&folder).map_err(Error::io("cannot create", &folder))?;
    let command = world.cluster.controller_command(1, &folder)?;
    let process = start_detached(command, &log)?;
    process.wait_gone(Duration::from_secs(20))?;
    let said = std::fs::read_to_string(&log).map_err(Error::io("cannot read", &log))?;
    ensure!(said.contains(&controller_address(1)), "it should name its address: {said}");

    // The same data folder: the first one holds it.
    let data = paths::disk_dir(world.lab().name()).join("controller1");
    let mut command = world.lab().netns().command(paths::program("drover-controller"))?;
    command.args(["--id", "1", "--cluster-id", CLUSTER_ID, "--listen", "10.77.0.1:7400"]);
    command.args(["--member", "1=10.77.0.1:7400"]).arg("--data-dir").arg(&data);
    let log = log.with_extension("2.log");
    let process = start_detached(command, &log)?;
    process.wait_gone(Duration::from_secs(20))?;
    let said = std::fs::read_to_string(&log).map_err(Error::io("cannot read", &log))?;
    let names_it = said.contains("--member") || said.contains(&*data.to_string_lossy());
    ensure!(names_it, "it should say what is wrong with its data or members: {said}");

    world.cluster.wait_leader(PATIENCE)?;
    world.cluster.wait_nodes_ready(3, PATIENCE)
}

fn an_agent_of_another_cluster(world: &mut World) -> Result<()> {
    let ssh = world.lab().ssh("host1")?;
    let controller = controller_address(1);
    // It may end or try again later; either way it says so and is never a node.
    let script = format!(
        "timeout 15 /usr/local/bin/drover-agent --node stranger --cluster-id other \
         --controller {controller} --listen {0}:7499 --migration-address {0} --bridge br0 \
         --state-dir /root/other --run-dir /run/other > /root/other.log 2>&1; cat /root/other.log",
        ssh.address
    );
    let said = ssh.run(&script)?;
    ensure!(
        said.contains("other") && said.contains(CLUSTER_ID),
        "it should name both clusters: {said}"
    );
    let nodes = world.vpsctl().json(&["node", "list"])?;
    let names: Vec<&str> = list(&nodes).filter_map(|n| n["name"].as_str()).collect();
    ensure!(!names.contains(&"nodes/stranger"), "it was taken in: {names:?}");
    wait_for("three ready nodes", PATIENCE, || {
        let nodes = world.vpsctl().json(&["node", "list"])?;
        Ok((list(&nodes).filter(|n| n["state"] == "ready").count() == 3).then_some(()))
    })
}
