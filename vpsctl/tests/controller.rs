//! Good and bad input against a real controller: one member on loopback, no nodes.
//!
//! Needs the binary `drover-controller` next to `vpsctl`: `cargo build -p drover-controller`.

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::{
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::Instant,
};

use common::{Ended, WAIT_MAX, run, signal};

const NOBODY: &str = "6f1c7b0e-8f3c-4c59-9d5e-0d6a3f0c1f1a";

/// A cluster of one; ended when dropped.
struct Controller {
    child: Child,
    address: String,
    _data: tempfile::TempDir,
}

fn controller_binary() -> PathBuf {
    let path = PathBuf::from(env!("CARGO_BIN_EXE_vpsctl")).with_file_name("drover-controller");
    assert!(path.exists(), "{} is missing: cargo build -p drover-controller", path.display());
    path
}

impl Controller {
    fn start() -> Self {
        let started = Self::spawn(&[]);
        started.wait_for_leader();
        started
    }

    /// Member 1 of a cluster with these others.
    fn spawn(others: &[&str]) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let data = tempfile::tempdir().unwrap();
        let child = Command::new(controller_binary())
            .args(["--id", "1", "--cluster-id", "test", "--listen", &address])
            .args(["--member", &format!("1={address}"), "--data-dir"])
            .arg(data.path().join("controller"))
            .args(others.iter().flat_map(|other| ["--member", other]))
            .env("DROVER_LOG", "error")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child, address, _data: data }
    }

    fn run(&self, args: &[&str]) -> Ended {
        run(&self.address, args)
    }

    fn wait_for_leader(&self) {
        let deadline = Instant::now() + WAIT_MAX;
        let mut last = None;
        while Instant::now() < deadline {
            let ended = run(&self.address, &["--timeout", "1s", "cluster", "status"]);
            if ended.code == 0 {
                return;
            }
            last = Some(ended);
        }
        panic!("no leader: {last:#?}");
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        signal(self.child.id(), "TERM");
        let _ = self.child.wait();
    }
}

/// The arguments of a domain that would be accepted, if there were a node.
const CREATE: [&str; 7] =
    ["domain", "create", "web1", "--memory=128MiB", "--kernel=/boot/vmlinuz", "--vcpus=1", "--net"];

/// What is there at the beginning, for people and for programs.
#[test]
fn an_empty_cluster_answers_everything() {
    let cluster = Controller::start();
    let status = cluster.run(&["cluster", "status"]);
    assert_eq!(status.code, 0, "{status:#?}");
    assert!(
        status.stdout.starts_with("cluster       test\nleader        member 1, term "),
        "{status:#?}"
    );
    assert!(status.stdout.contains("1 (answered)"), "{status:#?}");
    let json = cluster.run(&["cluster", "status", "-o", "json"]).json();
    assert_eq!(json["leader_id"], 1);
    assert_eq!(json["members"][0]["address"], cluster.address);
    assert_eq!(json["members"][0]["reachable"], true);

    for (noun, header) in [
        ("node", "NAME   STATE"),
        ("domain", "NAME   STATE"),
        ("operation", "ID"),
        ("pool", "NODE   POOL"),
        ("volume", "NAME   STATE"),
        ("image", "NAME   SIZE"),
        ("network", "NAME   SUBNET"),
    ] {
        let table = cluster.run(&[noun, "list"]);
        assert!(table.code == 0 && table.stdout.starts_with(header), "{table:#?}");
        assert_eq!(table.stdout.lines().count(), 1, "{table:#?}");
        let json = cluster.run(&[noun, "list", "-o", "json"]);
        assert_eq!((json.code, json.stdout.as_str()), (0, "[]\n"));
    }
    let plan = cluster.run(&["cluster", "balance", "--dry-run"]);
    assert!(plan.code == 0 && plan.stdout.starts_with("Nothing to move"), "{plan:#?}");
    for events in
        [cluster.run(&["events", "-o", "json"]), cluster.run(&["events", "--since=1", "-o=json"])]
    {
        assert_eq!(events.code, 0, "{events:#?}");
        for line in events.stdout.lines() {
            let event: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(event["revision"].as_u64() > Some(0), "{event}");
        }
    }
}

/// What does not exist is exit code 3, whatever one wants of it, and is named.
#[test]
fn what_does_not_exist_is_not_found() {
    let cluster = Controller::start();
    for args in [
        ["node", "show", "nope"],
        ["node", "cordon", "nope"],
        ["node", "uncordon", "nodes/nope"],
        ["node", "drain", "nope"],
        ["node", "delete", "nope"],
    ] {
        cluster.run(&args).says(3, "error: there is no nodes/nope\nhint: vpsctl node list");
    }
    cluster.run(&["node", "drain", "nope", "--dry-run"]).says(3, "error: there is no nodes/nope");
    for args in [
        ["domain", "show", "nope"],
        ["domain", "start", "nope"],
        ["domain", "stop", "nope"],
        ["domain", "delete", "domains/nope"],
        ["domain", "migrate", "nope"],
        ["domain", "console", "nope"],
    ] {
        cluster.run(&args).says(3, "error: there is no domains/nope\nhint: vpsctl domain list");
    }
    for args in [
        ["volume", "show", "nope"],
        ["image", "show", "nope"],
        ["image", "delete", "nope"],
        ["network", "show", "nope"],
        ["network", "delete", "nope"],
    ] {
        let noun = args[0];
        let expected = format!("error: there is no {noun}s/nope\nhint: vpsctl {noun} list");
        cluster.run(&args).says(3, &expected);
    }
    cluster.run(&["pool", "list", "--node=nope"]).says(3, "error: there is no nodes/nope");
    let fetched = ["image", "import", "a", "--format=raw", "--url=http://127.0.0.1/a"];
    let at_nowhere = [&fetched[..], &["--node=nope"]].concat();
    cluster.run(&at_nowhere).says(3, "error: there is no nodes/nope");
    let in_nothing = [&CREATE[..], &["--network=nope"]].concat();
    cluster.run(&in_nothing).says(3, "error: there is no networks/nope");
    for verb in ["show", "wait", "cancel"] {
        let text = format!("error: there is no operations/{NOBODY}");
        cluster.run(&["operation", verb, NOBODY]).says(3, &text);
    }
    let with_node = [&CREATE[..], &["--node=nope"]].concat();
    cluster.run(&with_node).says(3, "nodes/nope");
}

/// Bad input is exit code 2 and one line that names the field, the value and what is accepted;
/// nothing is done.
#[test]
fn bad_input_names_the_field_and_changes_nothing() {
    let cluster = Controller::start();
    for (args, expected) in [
        (&["--vcpus=0"][..], "domain.spec.vcpus: \"0\" is not accepted: 1 to 8"),
        (&["--vcpus=9"], "domain.spec.vcpus: \"9\" is not accepted: 1 to 8"),
        (&["--memory=16MiB"], "domain.spec.memory_bytes: \"16777216\" is not accepted: a multiple"),
        (&["--memory=33554433"], "domain.spec.memory_bytes: \"33554433\""),
        (
            &["--kernel=vmlinuz"],
            "domain.spec.boot.kernel: \"vmlinuz\" is not accepted: an absolute",
        ),
        (&["--net=address=here"], "domain.spec.interfaces[1].addresses[0]: \"here\""),
        (&["--net=mac=01:00:00:00:00:00"], "domain.spec.interfaces[1].mac:"),
        (&["--disk=size=1000"], "domain.spec.disks[0].size_bytes: \"1000\" is not accepted"),
        (&["--host-name=bad host"], "domain.spec.cloud_init.host_name: \"bad host\""),
    ] {
        let kept = CREATE.iter().filter(|a| !same_flag(a, args[0])).copied();
        let args: Vec<_> = kept.chain(args.iter().copied()).collect();
        cluster.run(&args).says(2, &format!("error: {expected}"));
    }
    for name in ["Web_1", "-web", "web-", &"x".repeat(64)] {
        let args = [&["domain", "create", "--"], &[name][..]].concat();
        let flags = ["--memory=128MiB", "--kernel=/boot/vmlinuz"];
        let args: Vec<_> =
            ["domain", "create"].iter().chain(&flags).chain(&args[2..]).copied().collect();
        cluster
            .run(&args)
            .says(2, &format!("error: domain.name: \"domains/{name}\" is not accepted"));
    }
    cluster.run(&["domain", "stop", "web1", "--grace=2h"]).says(2, "error: grace_period: ");
    cluster.run(&["node", "drain", "host1", "--downtime=20s"]).says(2, "error: limits.downtime: ");
    for noun in ["domain", "operation"] {
        assert_eq!(cluster.run(&[noun, "list", "-o", "json"]).stdout, "[]\n");
    }
}

/// `--net` may be given again; any other flag replaces the one that would be accepted.
fn same_flag(a: &str, b: &str) -> bool {
    let name = |flag: &str| flag.split('=').next().unwrap().to_owned();
    name(a) == name(b) && name(a) != "--net"
}

/// A network from its creation to its end, and what it may not be.
#[test]
fn a_network_is_checked_created_and_deleted() {
    let cluster = Controller::start();
    for (flags, expected) in [
        (&["--subnet=10.0.0.7/24"][..], "error: network.subnet: \"10.0.0.7/24\" is not accepted"),
        (&["--subnet=10.0.0.0/24", "--gateway=10.9.0.1"], "error: network.gateway: \"10.9.0.1\""),
        (
            &["--subnet=10.0.0.0/24", "--first=10.0.0.9", "--last=10.0.0.3"],
            "error: network.last_address: \"10.0.0.3\"",
        ),
    ] {
        cluster.run(&[&["network", "create", "lan"], flags].concat()).says(2, expected);
    }
    assert_eq!(cluster.run(&["network", "list", "-o=json"]).stdout, "[]\n");
    let create = ["network", "create", "lan", "--subnet=10.0.0.0/24", "--gateway=10.0.0.1"];
    let created = cluster.run(&create);
    let said = "lan is created: 253 addresses to give away\n";
    assert_eq!((created.code, created.stdout.as_str()), (0, said), "{created:#?}");
    cluster.run(&create).says(4, "error: networks/lan exists already");
    let json = cluster.run(&["network", "show", "lan", "-o=json"]).json();
    assert_eq!((&json["gateway"], &json["addresses_used"]), (&"10.0.0.1".into(), &0.into()));
    let gone = cluster.run(&["network", "delete", "lan"]);
    assert_eq!((gone.code, gone.stdout.as_str()), (0, "lan is deleted\n"), "{gone:#?}");
    cluster.run(&["network", "show", "lan"]).says(3, "error: there is no networks/lan");
}

/// What the command line itself refuses is exit code 2 as well, without asking anybody.
#[test]
fn wrong_usage_asks_nobody() {
    let nobody = "127.0.0.1:1";
    for (args, expected) in [
        (&["domain", "show", "a/b"][..], "'a/b' for '<DOMAIN>': has a slash"),
        (&["domain", "show", "nodes/a"], "'nodes/a' for '<DOMAIN>': is one of nodes"),
        (&["operation", "show", "domains/a"], "'domains/a' for '<OPERATION>': is one of domains"),
        (&["operation", "show", "web1"], "a UUID is expected"),
        (&["domain", "create", "a", "--kernel=/k", "--memory=512M"], "use a number with KiB, MiB"),
        (&["domain", "create", "a", "--kernel=/k"], "--memory <SIZE>"),
        (&["node", "drain", "a", "--deadline=10"], "use a number with ms, s, m or h"),
        (&["cluster", "balance"], "<--dry-run|--apply>"),
        (&["node", "explode"], "unrecognized subcommand 'explode'"),
        (&["events", "--limit=0"], "0 is not in 1..=1000"),
    ] {
        run(nobody, args).says(2, expected);
    }
    run("http://a:1", &["node", "list"]).says(2, "is a URL: HOST:PORT is expected");
}

/// No node has the room: exit code 5, and nothing is left behind.
#[test]
fn no_room_is_said_before_anything_is_done() {
    let cluster = Controller::start();
    let dry_run = [&CREATE[..], &["--dry-run"]].concat();
    let detached = [&CREATE[..], &["--detach"]].concat();
    for args in [&CREATE[..], &dry_run, &detached] {
        cluster.run(args).says(5, "error: no node can take 1 vCPU and 128 MiB of memory");
    }
    for noun in ["domain", "operation"] {
        assert_eq!(cluster.run(&[noun, "list", "-o", "json"]).stdout, "[]\n");
    }
}

/// A member that is not there is passed over; when none is, exit code 8 within the timeout.
#[test]
fn the_next_member_is_asked() {
    let cluster = Controller::start();
    let servers = format!("127.0.0.1:1,{}", cluster.address);
    let ended = run(&servers, &["node", "list", "-o", "json"]);
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (0, "[]\n", ""));
    run("127.0.0.1:1", &["--timeout=1s", "node", "list"])
        .says(8, "error: no controller could answer: 127.0.0.1:1: ")
        .says(8, "hint: name the cluster's members with --server");
}

/// One of three alone knows no leader: its status can be read, and is exit code 8.
#[test]
fn without_a_leader_the_status_can_still_be_read() {
    let alone = Controller::spawn(&["2=127.0.0.1:1", "3=127.0.0.1:2"]);
    let deadline = Instant::now() + WAIT_MAX;
    let ended = loop {
        let ended = alone.run(&["--timeout=2s", "cluster", "status"]);
        if !ended.stdout.is_empty() || Instant::now() > deadline {
            break ended;
        }
    };
    ended.says(8, "error: member 1 knows no leader");
    assert!(ended.stdout.contains("leader        none is known"), "{ended:#?}");
    alone.run(&["--timeout=2s", "node", "list"]).says(8, "error: no controller could answer");
}

/// A reader that goes away (`| head`) is no error.
#[test]
fn a_closed_pipe_is_no_error() {
    let cluster = Controller::start();
    let mut command = common::vpsctl(&cluster.address, &["cluster", "status"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
}
