//! The operators' verbs on domains, volumes and snapshots: what the controller is asked, what an
//! operator reads, and what is refused before anything is asked.

use drover_proto::v1::{
    DiskLimits, DiskResize, Domain, DomainState, Guest, GuestInterface, MigrationReport,
    OperationKind, OperationState, Volume,
};

use crate::{
    UUID,
    common::{Ended, Running, run, run_with_input},
    disks::Content,
    member::{Member, Script},
    operation,
};

const NOBODY: &str = "127.0.0.1:1";

fn member_that(does: OperationKind) -> Member {
    let accepted = operation(does, OperationState::Succeeded, "");
    Member::start(Script { accepted, ..Script::default() })
}

/// What one command answers, and what the member was asked to do.
fn done(does: OperationKind, args: &[&str]) -> (String, Vec<String>) {
    let member = member_that(does);
    let ended = run(member.address(), args);
    assert_eq!(ended.code, 0, "{ended:#?}");
    (ended.stdout, member.asked().did)
}

/// Each verb asks for one thing and says in one sentence what has become of it.
#[test]
fn a_verb_is_one_request() {
    for (kind, args, said, did) in [
        (
            OperationKind::ReinstallDomain,
            &["domain", "reinstall", "web1", "--yes"][..],
            "web1 has a new disk, and is stopped\n",
            "reinstall disk 0 of domains/web1 from \"\"",
        ),
        (
            OperationKind::ReinstallDomain,
            &["domain", "reinstall", "web1", "--disk=1", "--image=debian13", "--yes"],
            "web1 has a new disk, and is stopped\n",
            "reinstall disk 1 of domains/web1 from \"images/debian13\"",
        ),
        (
            OperationKind::RescueDomain,
            &["domain", "rescue", "web1", "--image", "rescue"],
            "web1 runs from its rescue disk\n",
            "rescue domains/web1 with images/rescue",
        ),
        (
            OperationKind::EndRescue,
            &["domain", "rescue", "web1", "--end"],
            "web1 starts from its own disks again\n",
            "end rescue of domains/web1",
        ),
        (
            OperationKind::SaveDomain,
            &["domain", "save", "web1"],
            "web1 is saved\n",
            "save domains/web1",
        ),
        (
            OperationKind::StartDomain,
            &["domain", "start", "web1"],
            "web1 is started\n",
            "start domains/web1",
        ),
        (
            OperationKind::StartDomain,
            &["domain", "start", "web1", "--discard-saved"],
            "web1 is started\n",
            "start domains/web1, discarding what was saved",
        ),
        (
            OperationKind::CreateSnapshot,
            &["snapshot", "create", "web1", "before"],
            "the snapshot of web1 is taken\n",
            "snapshot domains/web1 as snapshots/before",
        ),
        (
            OperationKind::CreateVolume,
            &["volume", "create", "data", "--size=5GiB", "--pool=ssd", "--node=host1"],
            "web1 is created\n",
            "create volumes/data of 5368709120 bytes from \"\" in \"ssd\" on \"nodes/host1\"",
        ),
        (
            OperationKind::CreateVolume,
            &["volume", "create", "data", "--image=debian13"],
            "web1 is created\n",
            "create volumes/data of 0 bytes from \"images/debian13\" in \"\" on \"\"",
        ),
    ] {
        assert_eq!(done(kind, args), (said.to_owned(), vec![did.to_owned()]), "{args:?}");
        let detached = done(kind, &[args, &["--detach"]].concat()).0;
        assert_eq!(detached, format!("operations/{UUID}\n"), "{args:?}");
        let json = done(kind, &[args, &["-o=json"]].concat()).0;
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["state"], "succeeded", "{args:?}");
    }
}

/// Sizes and limits of one disk are one change; what is not named is not changed.
#[test]
fn a_resize_changes_what_it_names() {
    let resize = |flags: &[&str]| {
        let member = member_that(OperationKind::ResizeDomain);
        let ended = run(member.address(), &[&["domain", "resize", "web1"], flags].concat());
        assert_eq!((ended.code, &*ended.stdout), (0, "web1 is resized\n"), "{ended:#?}");
        member.asked().resizes.remove(0)
    };
    let disks = resize(&["--disk=1=20GiB", "--limit=1=iops=500,bps=1MiB", "--limit=0=none"]);
    let limits =
        DiskLimits { requests_per_second: 500, bytes_per_second: 1 << 20, ..DiskLimits::default() };
    let lifted = DiskResize { disk: 0, size_bytes: 0, limits: Some(DiskLimits::default()) };
    let grown = DiskResize { disk: 1, size_bytes: 20 << 30, limits: Some(limits) };
    assert_eq!((disks.disks, disks.vcpus, disks.memory_bytes), (vec![lifted, grown], 0, 0));
    let both = resize(&["--vcpus=4", "--memory=8GiB"]);
    assert_eq!((both.disks.len(), both.vcpus, both.memory_bytes), (0, 4, 8 << 30));
    assert_eq!(both.name, "domains/web1");
    assert!(!both.request_id.is_empty());
}

/// Only a saved domain is restored; the sentence says what it is.
#[test]
fn a_restore_needs_a_saved_domain() {
    let member = |state| {
        let mut domain = Domain { name: "domains/web1".to_owned(), ..Domain::default() };
        domain.set_state(state);
        let accepted = operation(OperationKind::StartDomain, OperationState::Succeeded, "");
        Member::start(Script { accepted, domain, ..Script::default() })
    };
    let saved = member(DomainState::Saved);
    let ended = run(saved.address(), &["domain", "restore", "web1"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "web1 is started\n"), "{ended:#?}");
    assert_eq!(saved.asked().did, ["start domains/web1"]);
    let show = run(saved.address(), &["domain", "show", "web1"]).stdout;
    assert!(show.contains("state         saved\n"), "{show}");
    let stopped = member(DomainState::Stopped);
    run(stopped.address(), &["domain", "restore", "web1"])
        .says(4, "error: web1 is stopped: only a saved domain can be restored");
    assert!(stopped.asked().did.is_empty());
}

#[test]
fn a_guest_is_shown() {
    let interface = GuestInterface {
        name: "ens3".to_owned(),
        mac: "52:54:00:00:00:01".to_owned(),
        addresses: vec!["10.0.0.5/24".to_owned()],
    };
    let guest = Guest {
        host_name: "www".to_owned(),
        operating_system: "Debian GNU/Linux 13 (trixie)".to_owned(),
        interfaces: vec![interface],
        ..Guest::default()
    };
    let member = Member::start(Script { guest, ..Script::default() });
    let page = run(member.address(), &["domain", "guest", "web1"]);
    for line in [
        "host name     www",
        "system        Debian GNU/Linux 13 (trixie)",
        "interface     ens3 52:54:00:00:00:01: 10.0.0.5/24",
    ] {
        assert!(page.stdout.lines().any(|l| l == line), "no \"{line}\": {page:#?}");
    }
    let json = run(member.address(), &["domain", "guest", "web1", "-o=json"]).json();
    assert_eq!(json["interfaces"][0]["addresses"][0], "10.0.0.5/24");
}

/// A password comes from the standard input, is never an argument and never repeated.
#[test]
fn a_password_is_one_line_of_the_input() {
    let set = |input: &[u8]| -> (Ended, Vec<String>) {
        let member = Member::start(Script::default());
        let args = ["domain", "set-password", "web1", "--user=debian"];
        let ended = run_with_input(member.address(), &args, input);
        assert!(!format!("{ended:?}").contains("s3cret"), "{ended:#?}");
        (ended, member.asked().did)
    };
    let (ended, did) = set(b"s3cret word\n");
    assert_eq!((ended.code, &*ended.stdout), (0, "debian has a new password in web1\n"));
    assert_eq!(did, ["password of debian in domains/web1: s3cret word"]);
    for (input, expected) in [
        (&b""[..], "error: password: is empty"),
        (b"s3cret\ns3cret\n", "error: password: has more than one line"),
        (b"s3cret\xff", "error: password: is no text"),
        (&[b'a'; 5000], "error: password: is too long: at most 1 KiB"),
    ] {
        let (ended, did) = set(input);
        ended.says(2, expected);
        assert!(did.is_empty());
    }
    let odd = ["domain", "set-password", "web1", "s3cret"];
    run(NOBODY, &odd).says(2, "unexpected argument");
    run(NOBODY, &["domain", "set-password", "web1", "--user=a:b"]).says(2, "a user's name is");
}

/// On a terminal it is typed twice, and not seen.
#[test]
fn a_password_is_typed_unseen() {
    let member = Member::start(Script::default());
    let typed = |first: &str, again: &str| {
        let args = ["domain", "set-password", "web1"];
        let mut command = Running::on_a_terminal(member.address(), &args);
        command.wait_for("what is typed is not shown");
        command.type_in(&format!("{first}\n{again}\n"));
        command
    };
    let mut set = typed("s3cret", "s3cret");
    set.wait_for("root has a new password in web1");
    let (code, lines) = set.end();
    assert_eq!(code, 0, "{lines:#?}");
    assert!(!lines.concat().contains("s3cret"), "{lines:#?}");
    assert_eq!(member.asked().did, ["password of root in domains/web1: s3cret"]);
    let mut differ = typed("one", "two");
    differ.wait_for("error: password: the two are not the same");
    assert_eq!(differ.end().0, 2);
}

/// What loses content asks; who cannot be asked must have said --yes.
#[test]
fn what_is_lost_is_asked_first() {
    let member = member_that(OperationKind::ReinstallDomain);
    for (args, expected) in [
        (&["domain", "reinstall", "web1"][..], "what disk 0 of web1 holds is lost"),
        (&["snapshot", "restore", "before"], "what the disks of before's domain hold now is lost"),
        (&["snapshot", "delete", "before"], "snapshot before is lost"),
    ] {
        run(member.address(), args).says(2, "error: --yes: is missing: ").says(2, expected);
        let mut asked = Running::on_a_terminal(member.address(), args);
        asked.type_in("n\n");
        asked.wait_for("error: not confirmed: nothing was changed");
        assert_eq!(asked.end().0, 1);
    }
    assert!(member.asked().did.is_empty());
    let mut asked = Running::on_a_terminal(member.address(), &["domain", "reinstall", "web1"]);
    asked.type_in("yes\n");
    asked.wait_for("web1 has a new disk, and is stopped");
    assert_eq!(asked.end().0, 0);
    assert_eq!(member.asked().did.len(), 1);
}

/// From its creation to its end, as a table, a page and JSON.
#[test]
fn a_snapshot_is_seen_restored_and_deleted() {
    let node = Content { disks: vec![vec![1; 1 << 20], vec![2; 2 << 20]], ..Content::default() };
    let accepted = operation(OperationKind::RestoreSnapshot, OperationState::Succeeded, "");
    let member = Member::start(Script { accepted, node, ..Script::default() });
    let vpsctl = |args: &[&str]| run(member.address(), &[&["snapshot"], args].concat());
    assert_eq!(vpsctl(&["create", "web1", "before"]).code, 0);
    let table = vpsctl(&["list", "--domain=web1"]);
    let lines: Vec<_> = table.stdout.lines().collect();
    assert!(lines[0].starts_with("NAME     STATE   DOMAIN   NODE"), "{table:#?}");
    let row = "before   ready   web1     host1   2       3 MiB   1.5 MiB   yes";
    assert!(lines[1].starts_with(row), "{table:#?}");
    let page = vpsctl(&["show", "before"]).stdout;
    for line in [
        "filesystems   frozen by the guest's agent while it was taken",
        "disk          web1-1: 2 MiB in ssd, takes 1 MiB",
    ] {
        assert!(page.lines().any(|l| l == line), "no \"{line}\" in\n{page}");
    }
    assert_eq!(vpsctl(&["list", "-o=json"]).json()[0]["quiesced"], true);
    member.node().disks[0] = vec![9; 1 << 20];
    let restored = vpsctl(&["restore", "before", "--yes"]);
    assert_eq!((restored.code, &*restored.stdout), (0, "the disks of web1 are put back\n"));
    assert!(member.node().disks[0] == vec![1; 1 << 20]);
    let gone = vpsctl(&["delete", "snapshots/before", "--yes"]);
    assert_eq!((gone.code, gone.stdout.as_str()), (0, "before is deleted\n"));
    vpsctl(&["show", "before"])
        .says(3, "error: there is no snapshots/before")
        .says(3, "hint: vpsctl snapshot list shows those that exist");
    assert!(member.asked().did.contains(&"list snapshots of \"domains/web1\"".to_owned()));
}

#[test]
fn volumes_come_and_go() {
    let volume = |name: &str, domain: &str| Volume {
        name: format!("volumes/{name}"),
        domain: domain.to_owned(),
        node: "nodes/host1".to_owned(),
        ..Volume::default()
    };
    let volumes = vec![volume("data", ""), volume("web1-0", "domains/web1")];
    let member = Member::start(Script { volumes, ..Script::default() });
    let vpsctl = |args: &[&str]| run(member.address(), &[&["volume"], args].concat());
    for (args, said, did) in [
        (
            &["attach", "data", "web2", "--read-only", "--limits", "iops=500"][..],
            "data is the last disk of web2 now\n",
            "attach volumes/data to domains/web2, read-only true, iops 500",
        ),
        (
            &["detach", "web1-0"],
            "web1-0 belongs to no domain now and stays on host1\n",
            "detach volumes/web1-0",
        ),
        (&["delete", "data"], "data is deleted\n", "delete volumes/data"),
    ] {
        let ended = vpsctl(args);
        assert_eq!((ended.code, ended.stdout.as_str()), (0, said), "{ended:#?}");
        assert_eq!(member.asked().did.last().unwrap(), did);
    }
    vpsctl(&["delete", "web1-0"]).says(4, "error: volumes/web1-0 belongs to domains/web1");
    vpsctl(&["attach", "none", "web1"]).says(3, "error: there is no volumes/none");
    assert_eq!(vpsctl(&["attach", "data", "web1", "-o=json"]).json()["domain"], "domains/web1");
}

/// The move of a stopped domain is not live, but its disks went along.
#[test]
fn a_cold_move_says_what_went_along() {
    let mut moved = operation(OperationKind::MigrateDomain, OperationState::Succeeded, "");
    moved.migration = Some(MigrationReport {
        to_node: "nodes/host2".to_owned(),
        disk_bytes_total: 10 << 30,
        ..MigrationReport::default()
    });
    let member = Member::start(Script { watch: vec![moved], ..Script::default() });
    let ended = run(member.address(), &["operation", "wait", UUID]);
    let said = "web1 is on host2 now, with its disks of 10 GiB; it does not run\n";
    assert_eq!((ended.code, ended.stdout.as_str()), (0, said), "{ended:#?}");
}

/// Each mistake is named, with what would be accepted, and nobody is asked.
#[test]
fn wrong_usage_asks_nobody() {
    for (line, expected) in [
        ("domain resize web1", "<--vcpus <N>|--memory <SIZE>|--disk <N=SIZE>|--limit <N=LIMITS>>"),
        ("domain resize web1 --vcpus 0", "0 is not in 1.."),
        ("domain resize web1 --memory 1G", "use a number with KiB, MiB"),
        ("domain resize web1 --disk 20GiB", "a disk's number from 0 and '=' are expected"),
        ("domain resize web1 --disk 0=1GiB --disk 0=2GiB", "--disk: disk 0 is given twice"),
        ("domain resize web1 --limit 0=iops", "\"iops\" is not known: iops= and bps= are, or none"),
        ("domain reinstall web1 --disk one", "invalid digit"),
        ("domain reinstall web1 --image volumes/a", "is one of volumes"),
        ("domain rescue web1", "<--image <IMAGE>|--end>"),
        ("domain rescue web1 --image a --end", "cannot be used with"),
        ("domain save nodes/a", "is one of nodes: web1 or domains/web1 is expected"),
        ("domain restore a/b", "has a slash"),
        ("domain guest", "<DOMAIN>"),
        ("volume create data", "<--size <SIZE>|--image <IMAGE>>"),
        ("volume create a/b --size 1GiB", "has a slash"),
        ("volume create data --size 1G", "use a number with KiB, MiB"),
        ("volume delete domains/web1", "is one of domains"),
        ("volume attach data", "<DOMAIN>"),
        ("volume detach snapshots/a", "is one of snapshots"),
        ("snapshot create web1", "<SNAPSHOT>"),
        ("snapshot create snapshots/a web1", "is one of snapshots: web1 or"),
        ("snapshot restore volumes/a --yes", "is one of volumes: before-upgrade or"),
        ("snapshot show a/b", "has a slash"),
        ("backup create web1", "<DIR>"),
        ("backup create web1 /tmp/x --name ../x", "1 to 100 of a-z"),
        ("backup delete /tmp a/b", "1 to 100 of a-z"),
        ("backup list /no/such/directory", "error: DIR: \"/no/such/directory\" does not exist"),
        ("backup list /usr", "error: DIR: \"/usr\" holds no backups"),
        ("backup verify /no/such/directory", "does not exist"),
        ("backup restore /no/such/directory a web1", "does not exist"),
    ] {
        let args: Vec<_> = line.split(' ').collect();
        run(NOBODY, &args).says(2, expected);
    }
}
