//! A domain that is on one node: its state follows what its owner reports.
//!
//! A report of something that *runs* is believed as it is. A report that nothing runs may be
//! from before the last start, so it counts only under the domain's present epoch, which every
//! start renews.

use drover_proto::agent::v1::{ObservedDomain, ObservedState};
use drover_proto::v1::{DomainState, EventSeverity, ExitReason, PowerState, RestartPolicy};

use super::resize::take_next;
use super::save;
use super::step::{Context, Work, error};
use crate::model::{DomainRecord, Side, has_memory, is_at_rest};

/// A start of a domain that is at rest: what its owner reports from now on is about this one.
pub(super) fn starts(cx: &Context<'_>, domain: &mut DomainRecord) {
    // What was saved goes on only with what it had.
    if !has_memory(domain) {
        take_next(domain);
    }
    domain.epoch_max += 1;
    domain.epoch = domain.epoch_max;
    domain.start_generation += 1;
    domain.set_desired_power(PowerState::Running);
    domain.grace_ms = 0;
    domain.boot_id = cx.boot_id(&domain.node);
    domain.set_state(DomainState::Starting);
    domain.state_reason.clear();
}

/// Takes in what the owner says.
pub(super) fn step(work: &mut Work<'_>) {
    let node = work.domain.node.clone();
    let side = work.cx.observed.side(&node, &work.domain.uid, work.row.mod_revision);
    if work.domain.state() == DomainState::Deleting {
        if side == Side::Absent && nothing_left_elsewhere(work) {
            work.remove();
        }
        return;
    }
    if is_at_rest(&work.domain) && !matches!(side, Side::Present(_)) {
        return;
    }
    if work.cx.is_lost(&node) {
        return lose(work);
    }
    match side {
        Side::Unknown => {}
        Side::Absent => absent(work),
        Side::Present(domain) => present(work, domain),
    }
}

/// A migration that was never settled leaves two nodes to ask.
fn nothing_left_elsewhere(work: &Work<'_>) -> bool {
    let ends = work.domain.migration.iter().flat_map(|m| [&m.from, &m.to]);
    let (uid, revision) = (&work.domain.uid, work.row.mod_revision);
    ends.into_iter().all(|node| {
        work.cx.node(node).is_none() || work.cx.observed.side(node, uid, revision) == Side::Absent
    })
}

fn lose(work: &mut Work<'_>) {
    if is_at_rest(&work.domain) {
        return;
    }
    let reason = format!("nodes/{} is lost", work.domain.node);
    if work.domain.state() != DomainState::Lost {
        let message = format!("{reason}: nobody can say whether it runs");
        work.event(EventSeverity::Error, "DOMAIN_LOST", message);
    }
    work.set_state(DomainState::Lost, reason);
}

/// Its agent knows that it should have it, and has nothing yet.
fn absent(work: &mut Work<'_>) {
    if work.domain.desired_power() == PowerState::Saved {
        save::cannot_be(work, "its agent has nothing of it");
    }
    match work.domain.desired_power() {
        PowerState::Stopped => stopped(work, None),
        _ if work.domain.state() == DomainState::Pending => {}
        _ => work.set_state(DomainState::Starting, ""),
    }
}

fn present(work: &mut Work<'_>, domain: &ObservedDomain) {
    let wanted = work.domain.desired_power();
    let about_this_start = domain.epoch >= work.domain.epoch;
    let knows = work.cx.observed.knows(&work.domain.node, work.row.mod_revision);
    match domain.state() {
        ObservedState::Running | ObservedState::Paused => runs(work, domain),
        ObservedState::Starting if wanted == PowerState::Running => {
            work.set_state(DomainState::Starting, domain.state_reason.clone());
        }
        ObservedState::Starting | ObservedState::Stopping if wanted == PowerState::Stopped => {
            work.set_state(DomainState::Stopping, "");
        }
        // One that does not know that it shall stop may be about to start.
        ObservedState::Stopped | ObservedState::Failed
            if wanted == PowerState::Stopped && knows =>
        {
            stopped(work, Some(domain));
        }
        ObservedState::Stopped | ObservedState::Failed if wanted == PowerState::Stopped => {}
        ObservedState::Stopped | ObservedState::Failed
            if work.domain.state() == DomainState::Saved => {}
        ObservedState::Stopped | ObservedState::Failed if about_this_start => {
            ended_by_itself(work, domain);
        }
        // Its migration was settled in its favour, or given up unseen: say so under a new epoch.
        ObservedState::HandedOver if domain.epoch == work.domain.epoch && knows => {
            work.domain.epoch = work.next_epoch();
            let message =
                format!("nodes/{} runs it on, epoch {}", work.domain.node, work.domain.epoch);
            work.event(EventSeverity::Warning, "DOMAIN_RESUMED", message);
            work.set_state(DomainState::Starting, "resumes after a migration that failed");
        }
        _ => {}
    }
}

fn runs(work: &mut Work<'_>, domain: &ObservedDomain) {
    work.domain.boot_id = work.cx.boot_id(&work.domain.node);
    let knows = work.cx.observed.knows(&work.domain.node, work.row.mod_revision);
    let mut saves = false;
    match work.domain.desired_power() {
        PowerState::Stopped => return work.set_state(DomainState::Stopping, ""),
        PowerState::Saved if knows && !domain.save_error.is_empty() => {
            save::give_up(work, error("SAVE_FAILED", domain.save_error.clone()));
        }
        PowerState::Saved => saves = true,
        // It has used up what was saved, or was never ended to be saved.
        _ if has_memory(&work.domain)
            && domain.epoch >= work.domain.epoch
            && domain.state() == ObservedState::Running =>
        {
            work.drop_memory();
        }
        _ => {}
    }
    match work.domain.state() {
        DomainState::Running | DomainState::Migrating => {}
        DomainState::Lost => {
            let message = format!("it runs on nodes/{}", work.domain.node);
            work.event(EventSeverity::Info, "DOMAIN_FOUND", message);
        }
        _ => {
            let message = format!("on nodes/{}, epoch {}", work.domain.node, work.domain.epoch);
            work.event(EventSeverity::Info, "DOMAIN_STARTED", message);
        }
    }
    let reason = match domain.state() {
        _ if saves => "its state is being saved".to_owned(),
        ObservedState::Paused => "paused".to_owned(),
        _ => domain.state_reason.clone(),
    };
    work.set_state(DomainState::Running, reason);
}

/// As it was told to.
fn stopped(work: &mut Work<'_>, domain: Option<&ObservedDomain>) {
    if matches!(work.domain.state(), DomainState::Stopped | DomainState::Failed) {
        return;
    }
    if let Some(domain) = domain {
        work.domain.last_exit = domain.exit_reason;
    }
    work.event(EventSeverity::Info, "DOMAIN_STOPPED", "as it was told to".into());
    // It was to go on from there, and was stopped before it said that it does.
    let kept = if has_memory(&work.domain) { "what was saved is kept" } else { "" };
    work.set_state(DomainState::Stopped, kept);
}

/// It was to run, and nothing runs. What the domain's policies restart, its agent restarts.
fn ended_by_itself(work: &mut Work<'_>, domain: &ObservedDomain) {
    if matches!(work.domain.state(), DomainState::Stopped | DomainState::Failed) {
        return;
    }
    if work.domain.desired_power() == PowerState::Saved {
        if domain.exit_reason() == ExitReason::Saved {
            return saved(work);
        }
        save::cannot_be(work, &domain.state_reason);
    }
    let restarts_after_reboot =
        work.domain.spec.as_ref().is_some_and(|spec| spec.on_reboot() != RestartPolicy::Stop);
    let why = domain.state_reason.clone();
    work.domain.last_exit = domain.exit_reason;
    match domain.exit_reason() {
        ExitReason::Shutdown => powered_off(work, "the guest powered itself off"),
        ExitReason::Reboot if !restarts_after_reboot => {
            powered_off(work, "the guest rebooted; its policy is to stop");
        }
        // In between two runs: the agent starts it again.
        ExitReason::Reboot => work.set_state(DomainState::Starting, why),
        _ if domain.state() == ObservedState::Stopped => {
            work.set_state(DomainState::Starting, why);
        }
        exit => {
            let reason = if exit == ExitReason::Crash { "DOMAIN_CRASHED" } else { "DOMAIN_FAILED" };
            // A new epoch would make an agent try again: only `start` may ask for that.
            work.domain.set_desired_power(PowerState::Stopped);
            work.event(EventSeverity::Error, reason, why.clone());
            work.set_state(DomainState::Failed, why);
        }
    }
}

fn saved(work: &mut Work<'_>) {
    work.domain.set_last_exit(ExitReason::Saved);
    let message = format!("to volumes/{}", work.domain.memory_volume);
    work.event(EventSeverity::Info, "DOMAIN_SAVED", message);
    work.set_state(DomainState::Saved, "");
}

/// The guest's own decision becomes what is wanted: nothing starts it again by itself.
fn powered_off(work: &mut Work<'_>, message: &str) {
    work.domain.set_desired_power(PowerState::Stopped);
    // A save was given up, and it ended before it was seen to run on: what it wrote is of no use.
    if has_memory(&work.domain) {
        work.drop_memory();
    }
    work.event(EventSeverity::Info, "DOMAIN_STOPPED", message.into());
    work.set_state(DomainState::Stopped, message);
}
