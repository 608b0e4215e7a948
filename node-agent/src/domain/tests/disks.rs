//! What becomes of the disks of a domain: live, and of the one that rescues it.

use super::*;

/// A domain that runs hears of other limits and of a volume that has grown, and again after the
/// agent's death: what was told last is not known then.
#[test]
fn a_disk_changes_while_its_domain_runs() {
    let host = Host::new();
    let agent = host.agent();
    let says = ["SetDiskLimits", "GrowDisk"];
    let with_limit = |limit: u64| {
        let mut assignment = with_disk(&host, "", host.run(3));
        assignment.generation_id = "0193f2a5-7e3c-7000-8000-00000000000a".into();
        assignment.disks[0].serial = "root".into();
        assignment.disks[0].limits.as_mut().unwrap().requests_per_second = limit;
        assignment
    };
    agent.wish_with(&host, vec![with_limit(500)], vec![volume(true)]);
    agent.until_state(ObservedState::Running);
    let config = drover_hv::config::DomainConfig::load(&host.files().config).unwrap();
    assert_eq!(config.disks[0].serial, "root");
    assert_eq!(config.generation_id.as_deref(), Some("0193f2a5-7e3c-7000-8000-00000000000a"));

    agent.wish_with(&host, vec![with_limit(900)], vec![volume(true)]);
    let told = host.until_told(|told| !told.is_empty(), &says);
    assert_eq!(told, ["SetDiskLimits root 900"], "what it was started with is not told");
    let grown = WantedVolume { size_bytes: 64 << 20, ..volume(true) };
    agent.wish_with(&host, vec![with_limit(900)], vec![grown.clone()]);
    let told = host.until_told(|told| told.len() > 1, &says);
    assert_eq!(told[1..], ["GrowDisk root"]);
    drop(agent);

    let agent = host.agent();
    agent.wish_with(&host, vec![with_limit(900)], vec![grown]);
    let told = host.until_told(|told| told.len() > 3, &says);
    assert_eq!(told[2..], ["SetDiskLimits root 900", "GrowDisk root"]);
    assert_eq!(agent.until_state(ObservedState::Running).state_reason, "");
}

const DATA: &str = "0193f2a6-7e3c-7000-8000-00000000da7a";

/// A disk more and a disk less: its VMM is told, and what it then has is reported.
#[test]
fn a_disk_comes_and_goes_while_its_domain_runs() {
    let host = Host::new();
    let agent = host.agent();
    let says = ["AttachDisk", "DetachDisk"];
    let with = |data: bool| with_data(&host, "", data);
    let volumes = || vec![volume(true), WantedVolume { uid: DATA.into(), ..volume(true) }];
    agent.wish_with(&host, vec![with(false)], volumes());
    agent.until_state(ObservedState::Running);
    let config = drover_hv::config::DomainConfig::load(&host.files().config).unwrap();
    assert_eq!(config.disks[0].slot, Some(16));
    agent.wish_with(&host, vec![with(true)], volumes());
    let told = host.until_told(|told| !told.is_empty(), &says);
    assert_eq!(told, ["AttachDisk data 17"]);
    drop(agent);

    // Another agent asks for nothing twice.
    let agent = host.agent();
    agent.wish_with(&host, vec![with(true)], volumes());
    agent.until_state(ObservedState::Running);
    agent.wish_with(&host, vec![with(false)], volumes());
    let told = host.until_told(|told| told.len() > 1, &says);
    assert_eq!(told[1..], ["DetachDisk data"]);
}

/// With a second disk, or without it; both have slots of their own.
fn with_data(host: &Host, behaviour: &str, data: bool) -> Assignment {
    let mut assignment = with_disk(host, behaviour, host.run(3));
    (assignment.disks[0].slot, assignment.seed_slot) = (16, 31);
    if data {
        let disk = AssignedDisk {
            volume_uid: DATA.into(),
            pool: "main".into(),
            serial: "data".into(),
            slot: 17,
            ..Default::default()
        };
        assignment.disks.push(disk);
        let spec = assignment.spec.as_mut().unwrap();
        spec.disks.push(spec.disks[0].clone());
    }
    assignment
}

/// An agent that dies between being told and telling leaves it to the next one, which goes by what
/// the VMM has; what was taken back meanwhile, it takes out.
#[test]
fn an_agent_that_dies_leaves_no_disk_between() {
    let host = Host::new();
    let says = ["AttachDisk", "DetachDisk"];
    let data = |create| WantedVolume { uid: DATA.into(), ..volume(create) };
    let agent = host.agent();
    agent.wish_with(&host, vec![with_data(&host, "", false)], vec![volume(true)]);
    agent.until_state(ObservedState::Running);
    // Not here yet: this one plugs nothing, and dies.
    agent.wish_with(&host, vec![with_data(&host, "", true)], vec![volume(true)]);
    drop(agent);

    let agent = host.agent();
    agent.wish_with(&host, vec![with_data(&host, "", true)], vec![volume(true), data(true)]);
    assert_eq!(host.until_told(|told| !told.is_empty(), &says), ["AttachDisk data 17"]);
    let has = |wanted: bool| {
        move |domains: &[ObservedDomain]| {
            let disks = domains.first().map(|domain| domain.disks.clone()).unwrap_or_default();
            disks.iter().any(|disk| disk.serial == "data") == wanted
        }
    };
    agent.until("the disk", has(true));
    drop(agent);

    let agent = host.agent();
    agent.wish_with(&host, vec![with_data(&host, "", false)], vec![volume(true), data(true)]);
    let domain = agent.until("no disk", has(false)).remove(0);
    assert_eq!((domain.disks.len(), domain.disk_error.as_str()), (2, ""), "the root, the seed");
    let told = host.until_told(|told| told.len() > 1, &says);
    assert_eq!(told, ["AttachDisk data 17", "DetachDisk data"]);
}

/// A VMM that is killed just then is started again with the disk, in its slot.
#[test]
fn a_vmm_that_dies_starts_with_its_disk() {
    let host = Host::new();
    let agent = host.agent();
    let volumes = || vec![volume(true), WantedVolume { uid: DATA.into(), ..volume(true) }];
    agent.wish_with(&host, vec![with_data(&host, "", false)], volumes());
    agent.until_state(ObservedState::Running);
    let pid = host.record().run.unwrap().pid.unwrap();
    let mut wanted = with_data(&host, "", true);
    wanted.spec.as_mut().unwrap().set_on_crash(RestartPolicy::Restart);
    agent.wish_with(&host, vec![wanted], volumes());
    host.until_told(|told| !told.is_empty(), &["AttachDisk"]);
    agent.block_on(async {
        crate::process::Process::find(&host.files().lock).unwrap().unwrap().kill().unwrap();
    });
    agent.until("another VMM with the disk", |domains| {
        let other = host.record().run.and_then(|run| run.pid).is_some_and(|other| other != pid);
        other && domains[0].state() == ObservedState::Running && domains[0].disks.len() == 3
    });
    let config = drover_hv::config::DomainConfig::load(&host.files().config).unwrap();
    let slots: Vec<_> = config.disks.iter().map(|disk| disk.slot).collect();
    assert_eq!(slots, [Some(16), Some(17), Some(31)]);
}

/// A guest that lets go of nothing is asked again and again, but no oftener than that; when the
/// disk shall stay after all, the VMM is told so and nothing is left of it.
#[test]
fn a_guest_that_keeps_a_disk_may_keep_it() {
    let host = Host::new();
    let agent = host.agent();
    let says = ["AttachDisk", "DetachDisk"];
    let volumes = || vec![volume(true), WantedVolume { uid: DATA.into(), ..volume(true) }];
    let wish = |data| {
        agent.wish_with(&host, vec![with_data(&host, "keeps-disks", data)], volumes());
    };
    wish(true);
    agent.until_state(ObservedState::Running);
    wish(false);
    let is_detaching = |wanted: bool| {
        move |domains: &[ObservedDomain]| {
            let disks = domains.first().map(|domain| domain.disks.clone()).unwrap_or_default();
            disks.iter().any(|disk| disk.serial == "data" && disk.detaching == wanted)
        }
    };
    let domain = agent.until("it is asked", is_detaching(true)).remove(0);
    assert_eq!((domain.state(), domain.disk_error.as_str()), (ObservedState::Running, ""));
    wish(true);
    let domain = agent.until("it stays", is_detaching(false)).remove(0);
    assert_eq!((domain.state_reason.as_str(), domain.disk_error.as_str()), ("", ""));
    let told = host.until_told(|told| told.len() > 1, &says);
    assert_eq!(told, ["DetachDisk data", "AttachDisk data 17"]);
}

const RESCUE: &str = "0193f2a6-7e3c-7000-8000-00000000beef";

/// The rescue disk is booted in place of whatever the domain boots from, as its own root, before
/// the domain's own disks, with a seed of its own; afterwards all is as it was.
#[test]
fn a_rescue_disk_is_booted_before_the_domains_own() {
    let host = Host::new();
    let agent = host.agent();
    let own = |epoch| {
        let mut own = with_disk(&host, "single", host.run(epoch));
        own.spec.as_mut().unwrap().boot = host.spec("single").boot;
        own
    };
    let mut rescue = Assignment { rescue: true, ..own(3) };
    rescue.disks.insert(
        0,
        AssignedDisk { volume_uid: RESCUE.into(), pool: "main".into(), ..Default::default() },
    );
    let volumes = || vec![volume(true), WantedVolume { uid: RESCUE.into(), ..volume(true) }];
    agent.wish_with(&host, vec![rescue], volumes());
    agent.until_state(ObservedState::Running);
    let config = || drover_hv::config::DomainConfig::load(&host.files().config).unwrap();
    let seed = || String::from_utf8_lossy(&std::fs::read(&host.files().seed).unwrap()).into_owned();
    let rescued = config();
    let boot = rescued.boot_disk.unwrap();
    assert!(boot.own_root && rescued.kernel.is_none());
    assert_eq!((&boot.path, rescued.command_line.as_str()), (&rescued.disks[0].path, ""));
    let serials: Vec<_> = rescued.disks.iter().map(|disk| disk.serial.as_str()).collect();
    assert_eq!(serials, [&RESCUE.replace('-', "")[..20], "0193f2a57e3c70008000", "cidata"]);
    assert!(seed().contains(&format!("{UID}-rescue")));

    agent.wish_with(&host, vec![Assignment { ..host.owner(3, PowerState::Stopped) }], volumes());
    agent.until_state(ObservedState::Stopped);
    agent.wish_with(&host, vec![own(4)], volumes());
    agent.until_state(ObservedState::Running);
    let again = config();
    assert!(again.boot_disk.is_none() && again.kernel.is_some());
    assert_eq!((again.disks.len(), again.command_line.as_str()), (2, "single"));
    assert!(!seed().contains("-rescue"));
}
