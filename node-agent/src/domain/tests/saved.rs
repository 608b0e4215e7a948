//! A guest is saved, goes on from there, and is not lost between the two.

use super::*;

const MEMORY: &str = "0193f2a7-7e3c-7000-8000-000000000001";

fn memory() -> WantedVolume {
    WantedVolume { uid: MEMORY.into(), ..volume(true) }
}

fn with_memory(host: &Host, behaviour: &str, assignment: Assignment) -> Assignment {
    let disk =
        AssignedDisk { volume_uid: MEMORY.into(), pool: "main".into(), ..Default::default() };
    Assignment { spec: Some(host.spec(behaviour)), memory: Some(disk), ..assignment }
}

fn to_save(host: &Host, behaviour: &str, epoch: u64) -> Assignment {
    with_memory(host, behaviour, host.owner(epoch, PowerState::Saved))
}

/// With the operator's start.
pub(super) fn started(mut assignment: Assignment) -> Assignment {
    if let Some(assignment::Role::Owner(owner)) = &mut assignment.role {
        owner.start_generation += 1;
    }
    assignment
}

fn running(host: &Host, agent: &Agent, behaviour: &str) {
    let spec = Some(host.spec(behaviour));
    agent.wish(host, vec![Assignment { spec, ..host.run(3) }]);
    agent.until_state(ObservedState::Running);
}

/// It is saved when there is room for it, and goes on under the next epoch, once: what comes
/// after that boots.
#[test]
fn a_guest_is_saved_and_goes_on_once() {
    let host = Host::new();
    let agent = host.agent();
    running(&host, &agent, "");
    agent.wish(&host, vec![to_save(&host, "", 3)]);
    agent.until_state(ObservedState::Running);
    agent.wish_with(&host, vec![to_save(&host, "", 3)], vec![memory()]);
    let domain = agent.until_state(ObservedState::Stopped);
    assert_eq!(domain.exit_reason(), ExitReason::Saved);
    assert_eq!((domain.save_error.as_str(), domain.state_reason.as_str()), ("", ""));
    drop(agent);

    let agent = host.agent();
    let again = |epoch| with_memory(&host, "", host.run(epoch));
    agent.wish_with(&host, vec![again(4)], vec![memory()]);
    agent.until_state(ObservedState::Running);
    let config = || drover_hv::config::DomainConfig::load(&host.files().config).unwrap();
    assert!(config().restore.is_some() && config().disks.is_empty());
    assert_eq!(host.record().restored.as_deref(), Some(MEMORY));

    // Its end is no return to what it went on from, even while that is still assigned.
    kill(&host);
    agent.until_state(ObservedState::Failed);
    agent.wish(&host, vec![started(again(4))]);
    agent.until_state(ObservedState::Running);
    assert!(config().restore.is_none());
}

/// One that cannot be saved runs on, is asked once, and can be tried with another volume.
#[test]
fn a_guest_that_cannot_be_saved_runs_on() {
    let host = Host::new();
    let agent = host.agent();
    running(&host, &agent, "save-fails");
    let said = |domains: &[ObservedDomain]| {
        domains[0].state() == ObservedState::Running
            && domains[0]
                .save_error
                .ends_with("Save: the volume of its memory: the state does not fit")
    };
    let order = || vec![to_save(&host, "save-fails", 3)];
    agent.wish_with(&host, order(), vec![WantedVolume { create: false, ..memory() }]);
    agent.until("no volume", |domains| domains[0].save_error.contains("its data is not there"));
    agent.wish_with(&host, order(), vec![memory()]);
    agent.until("the error", said);
    drop(agent);
    let agent = host.agent();
    agent.wish_with(&host, order(), vec![memory()]);
    agent.until("the error again", said);
    agent.wish(&host, vec![Assignment { spec: Some(host.spec("save-fails")), ..host.run(3) }]);
    agent.until("no error", |domains| domains[0].save_error.is_empty());
    assert_eq!(host.until_told(|_| true, &["Save "]).len(), 1);
}

/// The agent may die in the middle, and the domain's task has time for other things.
#[test]
fn a_saving_outlives_the_agent() {
    let host = Host::new();
    let agent = host.agent();
    running(&host, &agent, "save-slowly");
    let order = || vec![to_save(&host, "save-slowly", 3)];
    agent.wish_with(&host, order(), vec![memory()]);
    agent.until_state(ObservedState::Paused);
    let error = agent.block_on(async { agent.quiescer.turn(UID).map(drop) }).unwrap_err();
    assert!(error.to_string().contains(UID), "{error}");
    drop(agent);
    let agent = host.agent();
    agent.wish_with(&host, order(), vec![memory()]);
    host.until_told(|told| told.len() == 2, &["Save "]);
    std::fs::write(host.files().dir.join("saved"), "").unwrap();
    let domain = agent.until_state(ObservedState::Stopped);
    assert_eq!(domain.exit_reason(), ExitReason::Saved);
}

#[test]
fn a_state_that_is_damaged_is_told_in_words() {
    let host = Host::new();
    let agent = host.agent();
    let assignment = with_memory(&host, "no-state", host.run(1));
    agent.wish_with(&host, vec![assignment], vec![memory()]);
    let domain = agent.until_state(ObservedState::Failed);
    assert_eq!(domain.state_reason, "restore: the saved memory: is damaged");
    // The operator discards it.
    let anew = Assignment { spec: Some(host.spec("no-state")), ..host.run(1) };
    agent.wish(&host, vec![started(anew)]);
    agent.until_state(ObservedState::Running);
}
