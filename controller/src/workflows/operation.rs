//! The operation that holds a domain: what it waits for, and how it ends.
//!
//! Beginning one is in [`begin`](super::begin); a migration ends in
//! [`migration`](super::migration); drains and balances hold no domain
//! ([`drain`](super::drain)).

use drover_proto::v1::{
    DomainState, EventSeverity, OperationError, OperationKind, OperationState, PowerState,
};

use super::step::{Work, error};
use super::{plug, reinstall, resize, save, snapshot};
use crate::model::{Side, has_memory};

/// A create that fails takes back what it made; past its deadline it waits this long for that.
const ROLLBACK_WAIT_MS: i64 = 60_000;

/// Ends the operation when the domain is where it wanted it, or cannot get there.
pub(super) fn step(work: &mut Work<'_>, removed: bool) {
    let Some(operation) = &work.operation else { return };
    match operation.kind() {
        OperationKind::CreateDomain => create(work, removed),
        kind @ (OperationKind::StartDomain | OperationKind::RescueDomain) => start(work, kind),
        OperationKind::StopDomain => stop(work),
        OperationKind::DeleteDomain => delete(work, removed),
        OperationKind::CreateSnapshot => snapshot::taking(work),
        OperationKind::RestoreSnapshot => snapshot::restoring(work),
        OperationKind::ReinstallDomain => reinstall::step(work),
        OperationKind::ResizeDomain => resize::step(work),
        OperationKind::SaveDomain => save::step(work),
        kind @ (OperationKind::AttachVolume | OperationKind::DetachVolume) => {
            plug::step(work, kind);
        }
        _ => {}
    }
}

/// Done when it has run. A create that fails leaves nothing behind.
fn create(work: &mut Work<'_>, removed: bool) {
    let rolling_back = work.domain.state() == DomainState::Deleting;
    if rolling_back {
        if removed || work.is_overdue(ROLLBACK_WAIT_MS) {
            let held = work.operation.as_ref().and_then(|op| op.error.clone());
            let state = match &held {
                Some(held) if held.reason == "CANCELLED" => OperationState::Cancelled,
                _ => OperationState::Failed,
            };
            work.end(state, held);
        }
        return;
    }
    match work.domain.state() {
        DomainState::Running => return work.end(OperationState::Succeeded, None),
        // It ran, and the guest chose to stop.
        DomainState::Stopped => return work.end(OperationState::Succeeded, None),
        _ => {}
    }
    if let Some(why) = failure(work, "it did not start") {
        let message = why.message.clone();
        work.event(EventSeverity::Error, "DOMAIN_CREATE_FAILED", message.clone());
        if let Some(operation) = &mut work.operation {
            operation.error = Some(why);
            operation.status_message = format!("removes what was made: {message}");
        }
        work.set_state(DomainState::Deleting, message);
        return;
    }
    say(work);
}

fn start(work: &mut Work<'_>, kind: OperationKind) {
    match work.domain.state() {
        DomainState::Running | DomainState::Stopped => {
            return work.end(OperationState::Succeeded, None);
        }
        _ => {}
    }
    let Some(why) = failure(work, "it did not start") else { return say(work) };
    if has_memory(&work.domain) && work.domain.state() != DomainState::Failed {
        // It may go on already, with what was saved used up: to stop it would lose that.
        let message = format!("{}; it goes on where it was when its agent can", why.message);
        return work.end(OperationState::Failed, Some(error(&why.reason, message)));
    }
    // Nothing half done: it does not start later, when nobody looks.
    work.domain.set_desired_power(PowerState::Stopped);
    work.domain.grace_ms = 0;
    if kind == OperationKind::RescueDomain {
        work.drop_rescue();
    }
    let state = match why.reason.as_str() {
        "CANCELLED" => OperationState::Cancelled,
        _ => OperationState::Failed,
    };
    work.end(state, Some(why));
}

fn stop(work: &mut Work<'_>) {
    match work.domain.state() {
        DomainState::Stopped | DomainState::Failed => {
            work.domain.set_desired_power(PowerState::Stopped);
            work.end(OperationState::Succeeded, None);
        }
        _ if work.is_overdue(0) => {
            let message = format!(
                "nodes/{} did not say that it has stopped; it stops when its agent is back",
                work.domain.node
            );
            work.end(OperationState::Failed, Some(error("DEADLINE_EXCEEDED", message)));
        }
        _ => say(work),
    }
}

fn delete(work: &mut Work<'_>, removed: bool) {
    if removed {
        work.event(EventSeverity::Info, "DOMAIN_DELETED", String::new());
        work.end(OperationState::Succeeded, None);
    } else if work.is_overdue(0) {
        let message = format!(
            "nodes/{} did not say that it is gone; it is removed when its agent is back",
            work.domain.node
        );
        work.end(OperationState::Failed, Some(error("DEADLINE_EXCEEDED", message)));
    }
}

/// Why it is not to be waited for any longer.
fn failure(work: &Work<'_>, what: &str) -> Option<OperationError> {
    if work.domain.state() == DomainState::Failed {
        return Some(error("START_FAILED", work.domain.state_reason.clone()));
    }
    if work.is_cancelled() {
        return Some(error("CANCELLED", "cancelled on request"));
    }
    if !work.is_overdue(0) {
        return None;
    }
    let node = &work.domain.node;
    let heard = work.cx.observed.side(node, &work.domain.uid, 0);
    let detail = match heard {
        _ if work.cx.is_lost(node) => "it is lost".to_owned(),
        Side::Present(domain) => {
            let state = domain.state().as_str_name().trim_start_matches("OBSERVED_STATE_");
            format!("it says {state} {}", domain.state_reason)
        }
        Side::Absent | Side::Unknown => "it says nothing of it".into(),
    };
    Some(error("DEADLINE_EXCEEDED", format!("{what} in time on nodes/{node}: {}", detail.trim())))
}

fn say(work: &mut Work<'_>) {
    let node = work.domain.node.clone();
    let lost = if work.cx.is_lost(&node) { " (lost)" } else { "" };
    let words = match work.domain.state() {
        DomainState::Starting if !work.domain.state_reason.is_empty() => {
            format!("nodes/{node}{lost}: {}", work.domain.state_reason)
        }
        DomainState::Pending => format!("waits for nodes/{node}{lost}"),
        DomainState::Stopping => format!("stops on nodes/{node}{lost}"),
        _ => format!("starts on nodes/{node}{lost}"),
    };
    work.status(words);
}
