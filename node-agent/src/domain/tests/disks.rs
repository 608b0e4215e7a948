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
