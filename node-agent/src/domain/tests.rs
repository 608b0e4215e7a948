//! A domain's task with real processes, sockets, locks and records. The VMM is scripted, because
//! the real one needs KVM (the lab has it): this test binary, started again through a script, so
//! that it is a process of its own with the domain's lock as its standard input.

mod disks;
mod guests;
mod quiet;
mod saved;
mod scripted;

use super::*;

use std::os::unix::fs::PermissionsExt;

use drover_proto::agent::v1::{
    AssignedDisk, Assignment, Desired, Incoming, MigrationProgress, Outgoing, Owner, WantedVolume,
    assignment,
};
use drover_proto::v1::{
    Boot, CloudInit, Disk, DiskLimits, DomainSpec, ExitReason, PowerState, RestartPolicy,
};

use crate::identity::Home;
use crate::node::{NodeHandle, start_without_network};

const UID: &str = "4d8e0f0e-6c6f-4d3b-8f1e-0c6f7a9b2d11";
const LONG: Duration = Duration::from_secs(60);

/// A node in a directory, whose agent can die and come back.
struct Host {
    dir: tempfile::TempDir,
    boot_id: String,
    term: u64,
    sequence: std::cell::Cell<u64>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, "not read by the scripted VMM").unwrap();
        let script = dir.path().join("vmm");
        let exe = std::env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\nexec env {}=\"$*\" {} --exact domain::tests::scripted::vmm --nocapture\n",
            scripted::ENV,
            exe.display()
        );
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, boot_id: "boot-1".into(), term: 1, sequence: std::cell::Cell::new(0) }
    }

    fn places(&self) -> Places {
        Places { state: self.dir.path().join("state"), run: self.dir.path().join("run") }
    }

    /// One pool of files.
    fn pools(&self) -> Vec<crate::storage::PoolFlag> {
        let dir = self.dir.path().join("pool");
        std::fs::create_dir_all(&dir).unwrap();
        vec![format!("main=dir:{}", dir.display()).parse().unwrap()]
    }

    fn files(&self) -> DomainFiles {
        self.places().domain(UID)
    }

    fn record(&self) -> DomainRecord {
        DomainRecord::load(&self.files()).unwrap().unwrap()
    }

    /// An agent in a runtime of its own, which dies with it as by SIGKILL: nothing is told to end.
    fn agent(&self) -> Agent {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let places = self.places();
        let home = self.home();
        let changed = watch::Sender::new(0);
        let quiescer = quiesce::Quiescer::new(places.clone());
        let storage = runtime.block_on(crate::storage::start(
            &self.pools(),
            "host1",
            &self.dir.path().join("storage"),
            quiescer.clone(),
            changed.clone(),
        ));
        let shared = Shared {
            storage: storage.unwrap().0,
            node: "host1".into(),
            quiescer: quiescer.clone(),
            places,
            vmm: self.dir.path().join("vmm"),
            bridge: "br0".into(),
            migration_listen: "127.0.0.1:0".into(),
            boot_id: self.boot_id.clone(),
            starts: Semaphore::new(2),
            clock: Instant::now(),
            changed,
        };
        let node = runtime.block_on(start_without_network(Arc::new(shared), home)).unwrap();
        Agent { runtime: Some(runtime), node, quiescer, term: self.term }
    }

    /// Another test that forks at the moment when the last agent dies has that one's lock, too,
    /// until its child is another program.
    fn home(&self) -> Home {
        let deadline = std::time::Instant::now() + LONG;
        loop {
            match Home::open(&self.places().state, "host1", "c1") {
                Err(Error::InUse(_)) if std::time::Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                home => return home.unwrap(),
            }
        }
    }

    fn spec(&self, behaviour: &str) -> DomainSpec {
        DomainSpec {
            vcpus: 1,
            memory_bytes: 64 << 20,
            boot: Some(Boot {
                kernel: self.dir.path().join("kernel").display().to_string(),
                initramfs: String::new(),
                command_line: behaviour.into(),
            }),
            ..DomainSpec::default()
        }
    }

    fn owner(&self, epoch: u64, power: PowerState) -> Assignment {
        let owner = Owner {
            power: power.into(),
            grace_period: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
            start_generation: 1,
        };
        Assignment {
            uid: UID.into(),
            name: "domains/web".into(),
            epoch,
            spec: Some(self.spec("")),
            role: Some(assignment::Role::Owner(owner)),
            ..Assignment::default()
        }
    }

    fn run(&self, epoch: u64) -> Assignment {
        self.owner(epoch, PowerState::Running)
    }

    fn incoming(&self, epoch: u64) -> Assignment {
        let incoming = Incoming { migration_id: "m1".into(), token: "t".into() };
        Assignment { role: Some(assignment::Role::Incoming(incoming)), ..self.run(epoch) }
    }

    fn outgoing(&self, epoch: u64, address: &str, cancel: bool) -> Assignment {
        let outgoing = Outgoing {
            migration_id: "m1".into(),
            address: address.into(),
            token: "t".into(),
            to_epoch: epoch + 1,
            limits: None,
            cancel,
        };
        Assignment { outgoing: Some(outgoing), ..self.run(epoch) }
    }

    /// The lines that the VMM has logged and that `says` picks, as soon as they fit.
    fn until_told(&self, fits: impl Fn(&[String]) -> bool, says: &[&str]) -> Vec<String> {
        let deadline = std::time::Instant::now() + LONG;
        loop {
            let log = std::fs::read_to_string(&self.files().log).unwrap_or_default();
            let picked = |line: &&str| says.iter().any(|word| line.contains(word));
            let told: Vec<String> = log.lines().filter(picked).map(str::to_owned).collect();
            if fits(&told) {
                return told;
            }
            assert!(std::time::Instant::now() < deadline, "{told:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn next(&self) -> u64 {
        self.sequence.set(self.sequence.get() + 1);
        self.sequence.get()
    }
}

impl Drop for Host {
    /// Whatever a failed test left running.
    fn drop(&mut self) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _guard = runtime.enter();
        if let Ok(Some(process)) = crate::process::Process::find(&self.files().lock) {
            let _ = process.kill();
        }
    }
}

struct Agent {
    runtime: Option<tokio::runtime::Runtime>,
    node: NodeHandle,
    quiescer: quiesce::Quiescer,
    term: u64,
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(10));
        }
    }
}

impl Agent {
    fn wish(&self, host: &Host, domains: Vec<Assignment>) {
        self.wish_with(host, domains, vec![]);
    }

    fn wish_with(&self, host: &Host, domains: Vec<Assignment>, volumes: Vec<WantedVolume>) {
        let (term, sequence) = (self.term, host.next());
        let desired = Desired { term, sequence, domains, volumes, ..Desired::default() };
        self.block_on(self.node.desire(desired)).unwrap();
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.as_ref().unwrap().block_on(future)
    }

    /// Waits for a picture that fits; panics with the last one otherwise.
    fn until(&self, what: &str, fits: impl Fn(&[ObservedDomain]) -> bool) -> Vec<ObservedDomain> {
        let mut changed = self.node.changed();
        self.block_on(async {
            let deadline = Instant::now() + LONG;
            loop {
                changed.mark_unchanged();
                let domains = self.node.picture().await.unwrap().domains;
                if fits(&domains) {
                    return domains;
                }
                if tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
                    panic!("{what}: {domains:#?}");
                }
            }
        })
    }

    fn until_state(&self, state: ObservedState) -> ObservedDomain {
        let is = |domains: &[ObservedDomain]| domains.iter().any(|d| d.state() == state);
        self.until(state.as_str_name(), is).remove(0)
    }

    fn until_progress(&self, progress: MigrationProgress) -> ObservedDomain {
        let is = |domains: &[ObservedDomain]| {
            domains.iter().any(|d| d.migration.as_ref().is_some_and(|m| m.progress() == progress))
        };
        self.until(progress.as_str_name(), is).remove(0)
    }

    fn until_nothing(&self) {
        self.until("nothing", <[_]>::is_empty);
    }
}

/// Starts, survives two deaths of the agent with the same process, stops by the power button,
/// starts again only when asked, and leaves nothing behind.
#[test]
fn a_domain_outlives_its_agent() {
    let host = Host::new();
    let agent = host.agent();
    agent.wish(&host, vec![host.run(3)]);
    let domain = agent.until_state(ObservedState::Running);
    assert_eq!((domain.epoch, domain.name.as_str()), (3, "domains/web"));
    let pid = host.record().run.unwrap().pid.unwrap();
    assert!(domain.usage.unwrap().memory_resident_bytes > 0);
    drop(agent);

    // No controller is there: it is found, and left as it is.
    let agent = host.agent();
    let domain = agent.until_state(ObservedState::Running);
    assert_eq!((domain.epoch, domain.name.as_str()), (3, "domains/web"));
    assert_eq!(host.record().run.unwrap().pid, Some(pid));
    drop(agent);

    let agent = host.agent();
    agent.wish(&host, vec![host.run(3)]);
    agent.until_state(ObservedState::Running);
    assert_eq!(host.record().run.unwrap().pid, Some(pid));
    agent.wish(&host, vec![host.owner(3, PowerState::Stopped)]);
    let domain = agent.until_state(ObservedState::Stopped);
    assert_eq!(domain.exit_reason(), ExitReason::Shutdown);
    agent.wish(&host, vec![host.run(4)]);
    let domain = agent.until_state(ObservedState::Running);
    assert_eq!(domain.epoch, 4);
    assert_ne!(host.record().run.unwrap().pid, Some(pid));

    agent.wish(&host, vec![]);
    agent.until_nothing();
    assert!(!host.files().dir.exists() && !host.files().run_dir.exists());
}

const VOLUME: &str = "0193f2a5-7e3c-7000-8000-0123456789ab";

/// With a disk of its own to boot from, and a seed.
fn with_disk(host: &Host, behaviour: &str, assignment: Assignment) -> Assignment {
    let spec = DomainSpec {
        boot: Some(Boot { command_line: behaviour.into(), ..Boot::default() }),
        disks: vec![Disk::default()],
        cloud_init: Some(CloudInit::default()),
        ..host.spec("")
    };
    let disk =
        AssignedDisk { volume_uid: VOLUME.into(), pool: "main".into(), ..Default::default() };
    let limits = Some(DiskLimits { requests_per_second: 500, ..DiskLimits::default() });
    let disk = AssignedDisk { limits, ..disk };
    Assignment { spec: Some(spec), disks: vec![disk], ..assignment }
}

fn volume(create: bool) -> WantedVolume {
    let size_bytes = 1 << 20;
    WantedVolume {
        uid: VOLUME.into(),
        pool: "main".into(),
        size_bytes,
        create,
        ..Default::default()
    }
}

/// A domain starts when its disk is here, with the disk and its seed, and is told apart from one
/// whose data is lost.
#[test]
fn a_domain_waits_for_its_disk() {
    let host = Host::new();
    let agent = host.agent();
    let assignment = || with_disk(&host, "", host.run(3));
    agent.wish(&host, vec![assignment()]);
    let domain = agent.until_state(ObservedState::Starting);
    assert_eq!((domain.epoch, domain.state_reason.as_str()), (3, "waits for its disk"));
    agent.wish_with(&host, vec![assignment()], vec![volume(false)]);
    let domain = agent.until_state(ObservedState::Failed);
    assert_eq!(domain.state_reason, "disk 1: its data is not there");
    assert!(host.record().run.is_none() && !host.files().lock.exists(), "no VMM was started");

    agent.wish_with(&host, vec![assignment()], vec![volume(true)]);
    agent.until_state(ObservedState::Running);
    let config = drover_hv::config::DomainConfig::load(&host.files().config).unwrap();
    assert_eq!(config.disks.len(), 2);
    let (disk, seed) = (&config.disks[0], &config.disks[1]);
    assert_eq!((disk.serial.as_str(), disk.read_only), ("0193f2a57e3c70008000", false));
    assert_eq!((disk.limits.iops, disk.limits.bytes_per_second), (500, 0));
    assert_eq!(config.boot_disk.unwrap().path, disk.path);
    assert!(config.guest_agent);
    assert!(std::fs::metadata(&disk.path).unwrap().len() >= 1 << 20);
    assert_eq!((&seed.path, seed.read_only), (&host.files().seed, true));
    let bytes = std::fs::read(&seed.path).unwrap();
    assert!(bytes.windows(36).any(|text| text == UID.as_bytes()), "the instance id");

    agent.wish_with(&host, vec![], vec![volume(false)]);
    agent.until_nothing();
    assert!(!host.files().dir.exists());
}

/// What a VMM says of a path on the node, its customer hears of a disk.
#[test]
fn a_disk_that_does_not_boot_is_told_in_words() {
    let host = Host::new();
    let agent = host.agent();
    let assignment = with_disk(&host, "no-boot", host.run(1));
    agent.wish_with(&host, vec![assignment], vec![volume(true)]);
    let domain = agent.until_state(ObservedState::Failed);
    assert_eq!(domain.state_reason, "boot_disk: disk 1: has no partitions");
    assert_eq!(domain.exit_reason(), ExitReason::Error);
}

#[test]
fn a_destination_waits_for_its_disk() {
    let host = Host::new();
    let agent = host.agent();
    let assignment = || with_disk(&host, "", host.incoming(4));
    agent.wish(&host, vec![assignment()]);
    let domain = agent.until_state(ObservedState::Incoming);
    assert_eq!((domain.epoch, domain.state_reason.as_str()), (4, "waits for its disk"));
    assert!(domain.migration.is_none() && host.record().run.is_none());
    agent.wish_with(&host, vec![assignment()], vec![volume(true)]);
    agent.until_progress(MigrationProgress::Listening);
    assert!(host.files().seed.exists());
}

/// The reasons of an end are told apart, after the agent's own death as well.
#[test]
fn ends_reach_the_report() {
    let host = Host::new();
    let agent = host.agent();
    for (epoch, behaviour, state, exit, words) in [
        (1, "crash", ObservedState::Failed, ExitReason::Crash, "Kernel panic"),
        (2, "no-kernel", ObservedState::Failed, ExitReason::Error, "is no kernel"),
        (3, "abort", ObservedState::Failed, ExitReason::Error, "last line of stderr"),
        (4, "poweroff", ObservedState::Stopped, ExitReason::Shutdown, ""),
    ] {
        let spec = Some(host.spec(behaviour));
        agent.wish(&host, vec![Assignment { spec, ..host.run(epoch) }]);
        let domain = agent
            .until(behaviour, |domains| {
                domains.iter().any(|d| d.epoch == epoch && d.state() == state)
            })
            .remove(0);
        assert_eq!(domain.exit_reason(), exit, "{behaviour}");
        assert!(domain.state_reason.contains(words), "{}", domain.state_reason);
    }
    // It stays off under another epoch; only a start wakes it.
    agent.wish(&host, vec![host.run(5)]);
    agent.until("the epoch", |domains| domains[0].epoch == 5 && host.record().run.is_none());
    agent.wish(&host, vec![saved::started(host.run(5))]);
    agent.until_state(ObservedState::Running);
    let pid = host.record().run.unwrap().pid.unwrap();
    drop(agent);
    let process = |pid| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let process =
                crate::process::Process::follow(pid, &host.files().lock).unwrap().unwrap();
            process.kill().unwrap();
            tokio::time::timeout(LONG, process.ended()).await.unwrap();
        });
    };
    process(pid);
    let agent = host.agent();
    let domain = agent.until_state(ObservedState::Failed);
    assert_eq!(domain.exit_reason(), ExitReason::Killed);
    assert!(domain.state_reason.contains("no exit record"), "{}", domain.state_reason);
}

/// A crash is followed by a restart where the policy says so.
#[test]
fn a_crash_restarts_by_policy() {
    let host = Host::new();
    let agent = host.agent();
    let spec = DomainSpec { on_crash: RestartPolicy::Restart.into(), ..host.spec("crash-once") };
    agent.wish(&host, vec![Assignment { spec: Some(spec), ..host.run(1) }]);
    agent.until("a restart", |domains| {
        domains[0].state() == ObservedState::Running && host.record().crash_restarts == 1
    });
}

#[test]
fn missing_files_are_named_before_anything_is_started() {
    let host = Host::new();
    let agent = host.agent();
    let mut spec = host.spec("");
    spec.boot.as_mut().unwrap().initramfs = "/nonexistent/initrd".into();
    agent.wish(&host, vec![Assignment { spec: Some(spec), ..host.run(1) }]);
    let domain = agent.until_state(ObservedState::Failed);
    assert_eq!(
        domain.state_reason,
        "boot.initramfs: /nonexistent/initrd: no such file on node host1"
    );
    assert!(!host.files().config.exists());
    // The operator puts it right, and starts it again.
    agent.wish(&host, vec![saved::started(host.run(1))]);
    agent.until_state(ObservedState::Running);
}

/// After the hand-over the guest is run here again only under an epoch beyond the other's, with
/// its VMM alive or gone, the host rebooted or not.
#[test]
fn what_was_handed_over_stays_so() {
    let mut host = Host::new();
    let agent = host.agent();
    agent.wish(&host, vec![host.run(3)]);
    agent.until_state(ObservedState::Running);
    agent.wish(&host, vec![host.outgoing(3, "hand-over", false)]);
    let domain = agent.until_state(ObservedState::HandedOver);
    assert_eq!(domain.epoch, 3);
    let pid = host.record().run.unwrap().pid.unwrap();
    drop(agent);

    let agent = host.agent();
    agent.wish(&host, vec![host.run(4)]);
    agent.until_state(ObservedState::HandedOver);
    agent.wish(&host, vec![host.run(5)]);
    let domain = agent.until_state(ObservedState::Running);
    assert_eq!((domain.epoch, host.record().run.unwrap().pid), (5, Some(pid)));

    // Again, and now the whole host goes down.
    let mut away = host.outgoing(5, "hand-over", false);
    away.outgoing.as_mut().unwrap().migration_id = "m2".into();
    agent.wish(&host, vec![away]);
    // Not a status of the first hand-over that was still on its way.
    agent.until("the second hand-over", |domains| {
        domains[0].state() == ObservedState::HandedOver
            && domains[0].migration.as_ref().is_some_and(|migration| migration.id == "m2")
    });
    drop(agent);
    kill(&host);
    host.boot_id = "boot-2".into();
    let agent = host.agent();
    let domain = agent.until_state(ObservedState::HandedOver);
    assert_eq!(domain.migration.unwrap().id, "m2");
    agent.wish(&host, vec![host.run(6)]);
    let domain = agent.until("still", |domains| !domains[0].state_reason.is_empty()).remove(0);
    assert_eq!(domain.state(), ObservedState::HandedOver);
    assert!(domain.state_reason.contains("rebooted"), "{}", domain.state_reason);
    agent.wish(&host, vec![host.run(7)]);
    assert_eq!(agent.until_state(ObservedState::Running).epoch, 7);
}

#[test]
fn a_migration_is_begun_once_and_can_be_given_up() {
    let host = Host::new();
    let agent = host.agent();
    agent.wish(&host, vec![host.run(3)]);
    agent.until_state(ObservedState::Running);
    agent.wish(&host, vec![host.outgoing(3, "copy", false)]);
    agent.until_progress(MigrationProgress::Copying);
    drop(agent);
    let agent = host.agent();
    agent.wish(&host, vec![host.outgoing(3, "copy", false)]);
    agent.until_progress(MigrationProgress::Copying);
    agent.wish(&host, vec![host.outgoing(3, "copy", true)]);
    let domain = agent.until_progress(MigrationProgress::Failed);
    assert_eq!(domain.state(), ObservedState::Running);
    let log = std::fs::read_to_string(&host.files().log).unwrap();
    assert_eq!(log.matches("StartMigration m1").count(), 1, "{log}");

    let mut refused = host.outgoing(3, "refuse", false);
    refused.outgoing.as_mut().unwrap().migration_id = "m2".into();
    agent.wish(&host, vec![refused]);
    let said = |domains: &[ObservedDomain]| {
        domains[0].migration.as_ref().is_some_and(|m| m.id == "m2" && m.error.contains("refused"))
    };
    agent.until("refusal", said);
}

/// A destination listens, survives its agent, and runs the guest by a decision; one whose VMM is
/// killed says that the guest never ran.
#[test]
fn a_destination_waits_and_takes_over() {
    let host = Host::new();
    let agent = host.agent();
    agent.wish(&host, vec![host.incoming(4)]);
    let domain = agent.until_progress(MigrationProgress::Listening);
    assert_eq!(domain.state(), ObservedState::Incoming);
    assert_eq!(domain.migration.unwrap().listen_address, "127.0.0.1:4242");
    drop(agent);
    let agent = host.agent();
    agent.until_progress(MigrationProgress::Listening);
    agent.wish(&host, vec![host.incoming(4)]);
    // The scripted VMM is READY as soon as there is a file of that name.
    std::fs::write(host.files().dir.join("ready"), "").unwrap();
    agent.until_progress(MigrationProgress::Ready);
    agent.wish(&host, vec![host.run(5)]);
    assert_eq!(agent.until_state(ObservedState::Running).epoch, 5);
    agent.wish(&host, vec![]);
    agent.until_nothing();

    agent.wish(&host, vec![host.incoming(8)]);
    agent.until_progress(MigrationProgress::Listening);
    kill(&host);
    let domain = agent.until_progress(MigrationProgress::Failed);
    assert!(domain.migration.unwrap().error.contains("signal 9"));
    agent.wish(&host, vec![]);
    agent.until_nothing();
}

/// A damaged record: what runs goes on and tells what was in it; what does not is never started.
#[test]
fn a_damaged_record_starts_nothing() {
    let host = Host::new();
    let agent = host.agent();
    agent.wish(&host, vec![host.run(3)]);
    agent.until_state(ObservedState::Running);
    drop(agent);
    std::fs::write(host.files().record, "drover-record 1 length=9").unwrap();
    let agent = host.agent();
    assert_eq!(agent.until_state(ObservedState::Running).epoch, 3);
    assert_eq!(host.record().epoch, 3, "it was written again");
    drop(agent);

    kill(&host);
    std::fs::write(host.files().record, "drover-record 1 length=9").unwrap();
    let agent = host.agent();
    agent.wish(&host, vec![host.run(9)]);
    let domain = agent.until_state(ObservedState::Failed);
    assert!(domain.state_reason.contains("damaged"), "{}", domain.state_reason);
    agent.wish(&host, vec![]);
    agent.until_nothing();
}

/// SIGKILL to the VMM, wherever it is.
fn kill(host: &Host) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let found = crate::process::Process::find(&host.files().lock).unwrap().unwrap();
        found.kill().unwrap();
        tokio::time::timeout(LONG, found.ended()).await.unwrap();
    });
}
