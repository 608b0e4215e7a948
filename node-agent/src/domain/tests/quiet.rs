//! A guest that stands still goes on afterwards: whatever its agent does, and whoever dies.

use super::*;

/// What the VMM was told by [`quiesce`], in order.
fn told(host: &Host) -> Vec<&'static str> {
    let log = std::fs::read_to_string(&host.files().log).unwrap();
    let words =
        [("freeze\"", "freeze"), ("thaw\"", "thaw"), ("Pause", "pause"), ("Resume", "resume")];
    let said =
        |line: &str| words.iter().find(|(word, _)| line.contains(word)).map(|(_, name)| *name);
    log.lines().filter_map(said).collect()
}

fn running(host: &Host, agent: &Agent, behaviour: &str) {
    let spec = Some(host.spec(behaviour));
    agent.wish(host, vec![Assignment { spec, ..host.run(1) }]);
    agent.until_state(ObservedState::Running);
}

#[test]
fn a_guest_is_frozen_by_its_agent_or_paused() {
    for (behaviour, must_stop, quiet, before, after) in [
        ("agent", false, true, &["freeze"][..], &["thaw"][..]),
        ("agent", true, true, &["freeze", "pause"], &["resume", "thaw"]),
        ("agent-slow", false, false, &["freeze", "thaw", "pause"], &["resume"]),
        ("no agent", false, false, &["freeze", "thaw", "pause"], &["resume"]),
    ] {
        let host = Host::new();
        let agent = host.agent();
        running(&host, &agent, behaviour);
        let held = agent.block_on(agent.quiescer.hold(UID, must_stop)).unwrap();
        assert_eq!(told(&host), before, "{behaviour}");
        assert!(host.files().held.exists(), "{behaviour}");
        assert_eq!(agent.block_on(held.release()).unwrap(), quiet, "{behaviour}");
        assert_eq!(told(&host), [before, after].concat(), "{behaviour}");
        assert!(!host.files().held.exists(), "{behaviour}");
        agent.until_state(ObservedState::Running);
    }
}

/// The mark outlives the agent, and the next one does what is due; a VMM that somebody else has
/// paused has no mark.
#[test]
fn what_an_agent_leaves_held_goes_on_with_the_next() {
    for (behaviour, must_stop) in [("agent", false), ("agent", true), ("no agent", false)] {
        let host = Host::new();
        let agent = host.agent();
        running(&host, &agent, behaviour);
        let held = agent.block_on(agent.quiescer.hold(UID, must_stop)).unwrap();
        // Its own way out is not walked: as by SIGKILL.
        std::mem::forget(held);
        drop(agent);
        let agent = host.agent();
        let deadline = std::time::Instant::now() + LONG;
        // Whoever undoes it has its turn with the domain, from before the agent is there.
        while agent.quiescer.turn(UID).is_err() {
            assert!(std::time::Instant::now() < deadline, "{behaviour}: {:?}", told(&host));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(!host.files().held.exists(), "{behaviour}");
        agent.until_state(ObservedState::Running);
        let undone = told(&host);
        let last = if behaviour == "agent" { "thaw" } else { "resume" };
        assert_eq!(undone.last(), Some(&last), "{behaviour}: {undone:?}");
    }
}

#[test]
fn one_that_was_paused_by_somebody_stays_so() {
    let host = Host::new();
    let agent = host.agent();
    running(&host, &agent, "agent");
    agent.block_on(async {
        client::connect(&host.files().socket).await.unwrap().pause().await.unwrap();
    });
    agent.until_state(ObservedState::Paused);
    let held = agent.block_on(agent.quiescer.hold(UID, true)).unwrap();
    assert!(!host.files().held.exists());
    assert!(!agent.block_on(held.release()).unwrap());
    assert_eq!(told(&host), ["pause"]);
    drop(agent);
    let agent = host.agent();
    agent.until_state(ObservedState::Paused);
    assert_eq!(told(&host), ["pause"]);
}

/// One that cannot be thawed at once is thawed as soon as it can be.
#[test]
fn a_guest_is_thawed_in_the_end() {
    let host = Host::new();
    let agent = host.agent();
    running(&host, &agent, "agent-stuck");
    let held = agent.block_on(agent.quiescer.hold(UID, true)).unwrap();
    let error = agent.block_on(held.release()).unwrap_err().to_string();
    assert!(error.contains("does not run"), "{error}");
    assert!(host.files().held.exists());
    // Nobody is mixed up with that: a hold waits for its end.
    std::fs::write(host.files().dir.join("thaw"), "").unwrap();
    let held = agent.block_on(agent.quiescer.hold(UID, false)).unwrap();
    assert!(agent.block_on(held.release()).unwrap());
    assert_eq!(told(&host).last(), Some(&"thaw"));
    agent.until_state(ObservedState::Running);
}

/// Whoever forgets to release is no danger to the guest.
#[test]
fn a_hold_that_is_dropped_is_released() {
    let host = Host::new();
    let agent = host.agent();
    running(&host, &agent, "no agent");
    agent.block_on(async { drop(agent.quiescer.hold(UID, false).await.unwrap()) });
    agent.until_state(ObservedState::Running);
    let held = agent.block_on(agent.quiescer.hold(UID, false)).unwrap();
    agent.block_on(held.release()).unwrap();
    assert_eq!(told(&host).iter().filter(|word| **word == "resume").count(), 2);
}

/// Nothing is started while the disks of a domain at rest are looked at.
#[test]
fn a_domain_starts_after_it_was_held() {
    let host = Host::new();
    let agent = host.agent();
    agent.wish(&host, vec![host.owner(1, PowerState::Stopped)]);
    agent.until_state(ObservedState::Stopped);
    let held = agent.block_on(agent.quiescer.hold(UID, true)).unwrap();
    agent.wish(&host, vec![host.run(1)]);
    agent.until("a reason", |domains| {
        domains.iter().any(|domain| domain.state_reason.contains("disks are being read"))
    });
    assert!(!host.files().lock.exists(), "no VMM was started");
    assert!(agent.block_on(held.release()).unwrap(), "nothing ran");
    agent.until_state(ObservedState::Running);

    // Nor is one sent away.
    let held = agent.block_on(agent.quiescer.hold(UID, true)).unwrap();
    agent.wish(&host, vec![host.outgoing(1, "copy", false)]);
    agent.until("a reason", |domains| domains[0].state_reason.contains("disks are being read"));
    agent.block_on(held.release()).unwrap();
    agent.until_progress(MigrationProgress::Copying);
    let error = agent.block_on(agent.quiescer.hold(UID, true)).unwrap_err().to_string();
    assert!(error.contains("migrated"), "{error}");
}
