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

/// A disk more and a disk less: its VMM is told, and what it then has is reported.
#[test]
fn a_disk_comes_and_goes_while_its_domain_runs() {
    const DATA: &str = "0193f2a6-7e3c-7000-8000-00000000da7a";
    let host = Host::new();
    let agent = host.agent();
    let says = ["AttachDisk", "DetachDisk"];
    let with = |data: bool| {
        let mut assignment = with_disk(&host, "", host.run(3));
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
    };
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
