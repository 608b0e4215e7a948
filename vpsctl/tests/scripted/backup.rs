//! Backups into a real directory, of a node that really keeps blocks: what comes over, what comes
//! back, and what is left when it is broken off in the middle.

use std::path::{Path, PathBuf};

use drover_proto::v1::{Disk, Domain, DomainSpec, DomainState, OperationKind, OperationState};

use crate::{
    common::{Ended, Running, run},
    disks::{BLOCK, Content},
    member::{Member, Script},
    operation,
    stored::End,
};

/// A member with a stopped domain, and a directory for its backups.
struct World {
    member: Member,
    folder: tempfile::TempDir,
}

/// A disk whose blocks differ from each other; those whose value is 0 are zeros.
fn disk(values: &[u8], tail: usize) -> Vec<u8> {
    let mut disk: Vec<u8> = Vec::new();
    for value in values {
        let byte = |n: usize| if *value == 0 { 0 } else { value.wrapping_add((n % 7) as u8) };
        disk.extend((0..BLOCK).map(byte));
    }
    disk.extend(vec![200; tail]);
    disk
}

fn domain(state: DomainState, disks: &[Vec<u8>]) -> Domain {
    let disk = |content: &Vec<u8>| Disk {
        size_bytes: content.len() as u64,
        pool: "ssd".to_owned(),
        ..Disk::default()
    };
    let spec = DomainSpec { disks: disks.iter().map(disk).collect(), ..DomainSpec::default() };
    let mut domain = Domain {
        name: "domains/web1".to_owned(),
        uid: "0b1c".to_owned(),
        node: "nodes/host1".to_owned(),
        spec: Some(spec),
        ..Domain::default()
    };
    domain.set_state(state);
    domain
}

impl World {
    fn new(disks: Vec<Vec<u8>>) -> Self {
        let domain = domain(DomainState::Stopped, &disks);
        Self::with(domain, Content { disks, ..Content::default() })
    }

    fn with(domain: Domain, node: Content) -> Self {
        let accepted = operation(OperationKind::ReinstallDomain, OperationState::Succeeded, "");
        let member = Member::start(Script { accepted, domain, node, ..Script::default() });
        Self { member, folder: tempfile::tempdir().unwrap() }
    }

    /// A second member with the same directory.
    fn another(&self, domain: Domain, node: Content) -> (Member, PathBuf) {
        let accepted = operation(OperationKind::ReinstallDomain, OperationState::Succeeded, "");
        let member = Member::start(Script { accepted, domain, node, ..Script::default() });
        (member, self.path())
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("backups of web1")
    }

    fn backup(&self, args: &[&str]) -> Ended {
        run(self.member.address(), &[&["backup"], args].concat())
    }

    fn create(&self, name: &str) -> Ended {
        self.backup(&["create", "web1", self.path().to_str().unwrap(), "--name", name, "-o=json"])
    }

    fn restore(&self, name: &str, more: &[&str]) -> Ended {
        let path = self.path();
        let args = ["restore", path.to_str().unwrap(), name, "web1"];
        self.backup(&[&args[..], more].concat())
    }

    fn creating(&self, name: &str) -> Running {
        let path = self.path();
        let args = ["backup", "create", "web1", path.to_str().unwrap(), "--name", name];
        Running::start(self.member.address(), &args)
    }

    /// How many bytes of blocks' data have come over since the last question.
    fn sent_bytes(&self) -> usize {
        std::mem::take(&mut self.member.node().sent_bytes)
    }

    #[track_caller]
    fn nothing_is_left(&self) {
        let node = self.member.node();
        assert!(node.snapshots.is_empty(), "{:?}", node.snapshots.keys());
        assert!(node.images.is_empty(), "{:?}", node.images.keys());
    }
}

fn block_files(path: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for folder in std::fs::read_dir(path.join("blocks")).unwrap() {
        let folder = std::fs::read_dir(folder.unwrap().path()).unwrap();
        files.extend(folder.map(|entry| entry.unwrap().path()));
    }
    files.sort();
    files
}

fn manifests(path: &Path) -> usize {
    std::fs::read_dir(path.join("backups")).map_or(0, Iterator::count)
}

/// Two disks, zeros, equal blocks and a short end; then one block changes: it alone comes over,
/// and both backups bring back exactly what was there.
#[test]
fn what_was_backed_up_comes_back_and_the_second_sends_what_changed() {
    let before = vec![disk(&[1, 0, 2, 1, 0], 512), disk(&[0, 3], 0)];
    let world = World::new(before.clone());
    let first = world.create("one");
    assert_eq!(first.code, 0, "{first:#?}");
    assert_eq!(world.sent_bytes(), 4 * BLOCK + 512);
    let (received, added) = (&first.json()["received_bytes"], &first.json()["added_blocks"]);
    assert_eq!((received, added), (&(4 * BLOCK + 512).into(), &4.into()), "one is there twice");
    assert_eq!(first.json()["disks"][0]["block_count"], 4);
    world.nothing_is_left();
    assert_eq!(block_files(&world.path()).len(), 4);

    let mut after = before.clone();
    after[0][2 * BLOCK + 5] ^= 1;
    after[1][BLOCK..].fill(0);
    world.member.node().disks = after.clone();
    let second = world.create("two");
    assert_eq!(second.code, 0, "{second:#?}");
    assert_eq!(world.sent_bytes(), BLOCK, "what has not changed does not come again");
    assert_eq!(second.json()["added_blocks"], 1);
    let third = world.create("three");
    assert_eq!((third.code, world.sent_bytes()), (0, 0), "nothing has changed");

    for (name, content) in [("one", &before), ("two", &after), ("three", &after)] {
        world.member.node().disks = vec![vec![7; before[0].len()], vec![7; before[1].len()]];
        let restored = world.restore(name, &["--yes"]);
        let said = format!("disks 0 and 1 of web1 hold what {name} has\n");
        assert_eq!((restored.code, restored.stdout), (0, said), "{}", restored.stderr);
        assert!(world.member.node().disks == *content, "{name}");
        let asked = world.member.asked().did;
        let reinstalls: Vec<_> = asked.iter().filter(|did| did.starts_with("reinstall")).collect();
        let kept = |did: &&String| did.ends_with(", which it is not made of");
        assert!(!reinstalls.is_empty() && reinstalls.iter().all(kept), "{reinstalls:?}");
        world.nothing_is_left();
        for content in content {
            let import = world.member.wait_for_an_import();
            assert!(import.bytes == *content && import.end == End::Whole);
            let spec = &import.specs[0];
            assert_eq!((&*spec.node, &*spec.pool), ("nodes/host1", "ssd"), "where it is needed");
        }
    }
}

/// A domain's one disk, and its name by the moment; then the oldest goes, with what only it needs.
#[test]
fn backups_are_listed_verified_and_deleted() {
    let world = World::new(vec![disk(&[1, 2], 0), disk(&[3], 0)]);
    let path = world.path();
    let path = path.to_str().unwrap();
    assert_eq!(world.create("one").code, 0);
    world.member.node().disks[0] = disk(&[1, 4], 0);
    let named = world.backup(&["create", "web1", path]);
    assert_eq!(named.code, 0, "{named:#?}");
    let name = named.stdout.split(' ').next().unwrap().to_owned();
    assert!(name.starts_with("web1-20") && name.len() == "web1-20261123-011600".len(), "{name}");
    assert!(named.stdout.contains(": 1 MiB came over, 1 MiB were new\n"), "{named:#?}");

    let list = world.backup(&["list", path]);
    let lines: Vec<_> = list.stdout.lines().collect();
    assert!(lines[0].starts_with("NAME"), "{list:#?}");
    assert!(lines[1].starts_with("one ") && lines[1].ends_with("yes      2       3 MiB   3 MiB"));
    assert!(lines[2].starts_with(&name) && lines.len() == 3, "{list:#?}");
    let json = world.backup(&["list", path, "-o=json"]).json();
    assert_eq!((&json[0]["name"], &json[1]["domain"]), (&"one".into(), &"domains/web1".into()));
    let whole = world.backup(&["verify", path]);
    assert_eq!((whole.code, whole.stdout.matches(" whole ").count()), (0, 2), "{whole:#?}");

    world.restore(&name, &["--yes", "--disk=0"]);
    assert_eq!(block_files(&world.path()).len(), 4);
    let deleted = world.backup(&["delete", path, "one"]);
    assert!(deleted.stdout.starts_with("one is deleted, which gave "), "{deleted:#?}");
    assert_eq!(block_files(&world.path()).len(), 3);
    let whole = world.backup(&["verify", path, &name, "-o=json"]).json();
    assert_eq!((&whole[0]["ok"], &whole[0]["block_count"]), (&true.into(), &3.into()));
    world.backup(&["delete", path, "one"]).says(3, "error: there is no backup one in");
    world.backup(&["verify", path, "one"]).says(3, "error: there is no backup one");
    assert_eq!(world.backup(&["delete", path, &name]).code, 0);
    assert!(block_files(&world.path()).is_empty());
}

/// One disk of several is put back, and the others are not touched.
#[test]
fn one_disk_can_be_restored() {
    let before = vec![disk(&[1], 0), disk(&[2], 0)];
    let world = World::new(before.clone());
    assert_eq!(world.create("one").code, 0);
    let lost = vec![vec![7; BLOCK], vec![8; BLOCK]];
    world.member.node().disks = lost.clone();
    let ended = world.restore("one", &["--yes", "--disk=1"]);
    assert_eq!((ended.code, &*ended.stdout), (0, "disk 1 of web1 holds what one has\n"));
    assert!(world.member.node().disks == [lost[0].clone(), before[1].clone()]);
}

/// Ctrl-C, and the end of a service, in the middle: the snapshot goes, there is no backup, and what
/// came over is used by the next one.
#[test]
fn what_is_broken_off_leaves_blocks_alone() {
    for signal in ["INT", "TERM", "HUP"] {
        let world = World::new(vec![disk(&[1, 2, 3, 4, 5, 6], 0)]);
        world.member.node().pause_after = Some(4);
        let creating = world.creating("one");
        world.member.wait_for_a_pause();
        assert_eq!(world.member.node().snapshots.len(), 1);
        creating.signal(signal);
        let (code, lines) = creating.end();
        assert_eq!(code, 130, "{lines:#?}");
        let said = "error: the backup of web1 was interrupted".to_owned();
        assert!(lines.contains(&said), "{lines:#?}");
        world.nothing_is_left();
        assert_eq!(manifests(&world.path()), 0);
        let there = block_files(&world.path()).len() as u64;
        world.member.go_on();
        let next = world.create("one");
        assert_eq!(next.code, 0, "{next:#?}");
        assert_eq!(next.json()["added_blocks"], 6 - there, "what is there is not written again");
        assert_eq!(world.restore("one", &["--yes"]).code, 0);
    }
}

/// `--timeout` ends it likewise, with its own exit code; the snapshot goes after the time is up.
#[test]
fn a_timeout_ends_a_backup() {
    let world = World::new(vec![disk(&[1, 2, 3], 0)]);
    world.member.node().pause_after = Some(1);
    let path = world.path();
    let ended =
        world.backup(&["create", "web1", path.to_str().unwrap(), "--name=one", "--timeout=1s"]);
    ended.says(6, "error: the backup of web1 is not done after ");
    world.nothing_is_left();
    assert_eq!(manifests(&path), 0);
}

/// Ctrl-C while the snapshot is being taken: its operation is asked to end, and it goes as soon as
/// it can.
#[test]
fn an_interrupt_while_the_snapshot_is_taken() {
    let disks = vec![disk(&[1], 0)];
    let running = operation(OperationKind::CreateSnapshot, OperationState::Running, "freezing");
    let member = Member::start(Script {
        watch: vec![running],
        domain: domain(DomainState::Running, &disks),
        node: Content { disks, busy: 2, ..Content::default() },
        ..Script::default()
    });
    let world = World { member, folder: tempfile::tempdir().unwrap() };
    let mut creating = world.creating("one");
    creating.wait_for("snapshot web1: freezing");
    creating.signal("INT");
    let (code, lines) = creating.end();
    assert_eq!(code, 130, "{lines:#?}");
    world.nothing_is_left();
    let did = world.member.asked().did;
    assert!(did.iter().any(|what| what.starts_with("cancel operations/")), "{did:?}");
    assert_eq!(did.iter().filter(|what| what.starts_with("delete snapshots/")).count(), 1);
}

/// A leader that dies in the middle: the next stream goes on, and nothing comes twice.
#[test]
fn a_stream_that_breaks_goes_on() {
    let content = disk(&[1, 2, 0, 3, 4, 5, 6], 0);
    let world = World::new(vec![content.clone()]);
    world.member.node().break_after = Some(4);
    let ended = world.create("one");
    assert_eq!(ended.code, 0, "{ended:#?}");
    assert!(ended.stderr.contains("disk 0: the stream broke (the leader is gone): going on"));
    assert_eq!(world.sent_bytes(), 6 * BLOCK);
    world.member.node().disks[0].fill(7);
    assert_eq!(world.restore("one", &["--yes"]).code, 0);
    assert!(world.member.node().disks[0] == content);
}

/// A node reads a few disks at once: the next in the queue waits.
#[test]
fn a_node_that_is_busy_is_waited_for() {
    let world = World::new(vec![disk(&[1], 0)]);
    world.member.node().crowded = 1;
    let ended = world.create("one");
    assert_eq!(ended.code, 0, "{ended:#?}");
    assert!(ended.stderr.contains("disk 0: nodes/host1 gives 4 volumes out already: waiting"));
}

/// A domain that was made anew, with a smaller disk, is not told of blocks that it cannot have.
#[test]
fn a_disk_may_be_smaller_than_in_the_backup_before() {
    let world = World::new(vec![disk(&[1, 2, 3], 0)]);
    assert_eq!(world.create("one").code, 0);
    world.sent_bytes();
    world.member.node().disks = vec![disk(&[1, 4], 0)];
    let ended = world.create("two");
    assert_eq!((ended.code, world.sent_bytes()), (0, BLOCK), "{ended:#?}");
}

/// A block that is not what its digest says is neither kept nor named.
#[test]
fn a_block_that_lies_is_refused() {
    let world = World::new(vec![disk(&[1, 2], 0)]);
    world.member.node().lies = true;
    world.create("one").says(1, "error: disk 0: block 0 is not what its digest says");
    world.nothing_is_left();
    assert_eq!(manifests(&world.path()), 0);
}

/// A disk of this machine that rots: `verify` names the block and the backups, a restore changes
/// nothing, and the next backup after `--remove-damaged` is whole again.
#[test]
fn a_damaged_block_is_found_before_anything_is_changed() {
    let world = World::new(vec![disk(&[1, 2], 0), disk(&[3], 0)]);
    let path = world.path();
    let path = path.to_str().unwrap();
    assert_eq!(world.create("one").code, 0);
    world.member.node().disks[1] = disk(&[4], 0);
    assert_eq!(world.create("two").code, 0);
    let content = world.member.node().disks.clone();
    // The one that only the second has: the newest.
    let newest = |file: &PathBuf| std::fs::metadata(file).unwrap().modified().unwrap();
    let file = block_files(&world.path()).into_iter().max_by_key(newest).unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();

    let found = world.backup(&["verify", path]);
    found.says(1, "error: 1 block is damaged or missing");
    let digest = file.file_name().unwrap().to_str().unwrap();
    assert!(found.stdout.contains(&format!("two: block {digest} is damaged: ")), "{found:#?}");
    assert_eq!(
        (found.stdout.matches("whole").count(), found.stdout.matches("DAMAGED").count()),
        (1, 2)
    );
    world.backup(&["verify", path, "one"]).says(0, "");

    let refused = world.restore("two", &["--yes"]);
    refused.says(1, "error: disk 1: block 0, ").says(1, "is damaged: ").says(1, digest);
    assert!(world.member.node().disks == content, "nothing was changed");
    world.nothing_is_left();

    world.backup(&["verify", path, "--remove-damaged"]).says(1, "error: 1 block is damaged");
    world.restore("two", &["--yes"]).says(1, "error: backup two is not whole: 1 block is missing");
    assert_eq!(world.create("three").code, 0);
    world.backup(&["verify", path]).says(0, "");
    assert_eq!(world.restore("two", &["--yes"]).code, 0);
}

/// Two at once would not know of each other's blocks.
#[test]
fn one_at_a_time() {
    let world = World::new(vec![disk(&[1, 2], 0)]);
    let path = world.path();
    let path = path.to_str().unwrap();
    assert_eq!(world.create("zero").code, 0);
    world.member.node().disks[0] = disk(&[3, 4], 0);
    world.member.node().pause_after = Some(1);
    let creating = world.creating("one");
    world.member.wait_for_a_pause();
    world.create("two").says(4, "is in use by another vpsctl");
    world.backup(&["delete", path, "zero"]).says(4, "is in use by another vpsctl");
    assert_eq!(world.backup(&["list", path]).code, 0, "looking is always possible");
    world.member.go_on();
    let (code, lines) = creating.end();
    assert_eq!(code, 0, "{lines:#?}");
    assert_eq!(world.backup(&["list", path, "-o=json"]).json()[1]["name"], "one");
}

/// Ctrl-C when a disk is being put back: the cluster goes on with it, so its image stays, and the
/// operator is told; the other image goes.
#[test]
fn an_interrupt_in_the_middle_of_a_restore() {
    let disks = vec![disk(&[1], 0), disk(&[2], 0)];
    let world = World::new(disks.clone());
    assert_eq!(world.create("one").code, 0);
    let running = operation(OperationKind::ReinstallDomain, OperationState::Running, "making it");
    let member = Member::start(Script {
        watch: vec![running],
        domain: domain(DomainState::Stopped, &disks),
        node: Content { disks, ..Content::default() },
        ..Script::default()
    });
    let path = world.path();
    let args = ["backup", "restore", path.to_str().unwrap(), "one", "web1", "--yes"];
    let mut restoring = Running::start(member.address(), &args);
    restoring.wait_for("reinstall domain web1: making it");
    restoring.signal("INT");
    let (code, lines) = restoring.end();
    assert_eq!(code, 130, "{lines:#?}");
    let images: Vec<_> = member.node().images.keys().cloned().collect();
    assert_eq!(images.len(), 1, "the one that is needed");
    let id = images[0].strip_prefix("images/").unwrap();
    let said = format!("disk 0 of web1 may still be put back, which needs image {id}");
    assert!(lines.contains(&said), "{lines:#?}");
}

/// What cannot be is said before anything is sent, and nothing is changed or left.
#[test]
fn what_cannot_be_is_said_first() {
    let disks = vec![disk(&[1], 0), disk(&[2], 0)];
    let world = World::new(disks.clone());
    assert_eq!(world.create("one").code, 0);
    world.create("one").says(4, "error: backup one exists already");
    world.restore("one", &[]).says(2, "error: --yes: is missing: what disks 0 and 1 of web1 hold");
    world.restore("none", &["--yes"]).says(3, "error: there is no backup none");
    world
        .restore("one", &["--yes", "--disk=2"])
        .says(2, "error: --disk: 2 is not in backup one, which has 2 disks, counted from 0");
    let did_before = world.member.asked().did.len();
    assert!(did_before > 0);

    let refused = |domain: Domain, code: i32, expected: &str| {
        let (member, path) =
            world.another(domain, Content { disks: disks.clone(), ..Content::default() });
        let path = path.to_str().unwrap();
        let args = ["backup", "restore", path, "one", "web1", "--yes"];
        run(member.address(), &args).says(code, expected);
        assert!(member.asked().did.is_empty() && member.node().images.is_empty());
    };
    let running = domain(DomainState::Running, &disks);
    refused(running, 4, "error: web1 is running: only a stopped domain can be restored");
    refused(domain(DomainState::Saved, &disks), 4, "error: web1 is saved, and what was saved");
    let small = [disk(&[1], 0), vec![0; BLOCK / 2]];
    let expected =
        "error: disk 1 of web1 has 512 KiB, the backup's 1 MiB: vpsctl domain resize web1";
    refused(domain(DomainState::Stopped, &small), 4, expected);
    let one_disk = domain(DomainState::Failed, &disks[..1]);
    refused(one_disk, 4, "error: web1 has 1 disk, so there is none for disk 1 of the backup");

    let diskless = domain(DomainState::Running, &[]);
    let (member, _) = world.another(diskless, Content::default());
    let new = world.folder.path().join("new");
    let args = ["backup", "create", "web1", new.to_str().unwrap()];
    run(member.address(), &args).says(4, "error: web1 has no disks: there is nothing to back up");
    assert!(!new.exists(), "nothing half done");
    let foreign = world.folder.path().to_str().unwrap();
    world
        .backup(&["create", "web1", foreign])
        .says(2, "error: DIR: ")
        .says(2, "holds other things");
}
