//! Domains, nodes and operations through their lives.

use drover_proto::agent::v1::ObservedState as S;
use drover_proto::agent::v1::assignment::Role;
use drover_proto::v1::{DomainState, ExitReason, NodeState, OperationState, PowerState};

use super::lab::{Lab, MIB, Observe, ended, hello, new_domain, split};
use crate::model::{DomainId, DomainRecord, NodeId, OperationRecord};
use crate::store::Txn;
use crate::workflows::begin;
use crate::workflows::nodes::{delete_node, set_cordon};
use crate::workflows::{Refusal, nodes};

fn start(lab: &mut Lab, id: &str) -> Result<OperationRecord, Refusal> {
    let id = DomainId::trusted(id);
    lab.with(|cx| begin::start_domain(cx, &id, false).map(split))
}

fn stop(lab: &mut Lab, id: &str, grace_ms: u64) -> Result<OperationRecord, Refusal> {
    let id = DomainId::trusted(id);
    lab.with(|cx| begin::stop_domain(cx, &id, grace_ms).map(split))
}

fn delete(lab: &mut Lab, id: &str, force: bool) -> Result<OperationRecord, Refusal> {
    let id = DomainId::trusted(id);
    lab.with(|cx| begin::delete_domain(cx, &id, "", force).map(split))
}

fn outcome(lab: &Lab, operation: &OperationRecord) -> (OperationState, String) {
    ended(&lab.operation(&operation.id))
}

#[test]
fn a_domain_is_created_stopped_started_and_deleted() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    let create = lab.create("vm", "a").unwrap();
    assert_eq!(lab.domain("vm").state(), DomainState::Pending);
    assert!(lab.assignment("a", "vm").is_some() && lab.assignment("b", "vm").is_none());
    lab.report("a", vec![lab.observed("vm", 1, S::Starting)]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Starting);
    lab.report("a", vec![lab.observed("vm", 1, S::Running)]);
    lab.settle();
    assert_eq!(outcome(&lab, &create).0, OperationState::Succeeded);

    let stop = stop(&mut lab, "vm", 5_000).unwrap();
    let Some(Role::Owner(owner)) = lab.assignment("a", "vm").unwrap().role else { panic!() };
    assert_eq!((owner.power(), owner.grace_period.unwrap().seconds), (PowerState::Stopped, 5));
    lab.report("a", vec![lab.observed("vm", 1, S::Stopping)]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Stopping);
    let off = lab.observed("vm", 1, S::Stopped).because(ExitReason::Shutdown, "");
    lab.report("a", vec![off.clone()]);
    lab.settle();
    assert_eq!(outcome(&lab, &stop).0, OperationState::Succeeded);
    assert_eq!(lab.domain("vm").last_exit(), ExitReason::Shutdown);

    let start = start(&mut lab, "vm").unwrap();
    assert_eq!(lab.domain("vm").epoch, 2, "a start is a new epoch");
    lab.report("a", vec![off]);
    lab.settle();
    assert_eq!(outcome(&lab, &start).0, OperationState::Running, "that was the life before");
    lab.report("a", vec![lab.observed("vm", 2, S::Running)]);
    lab.settle();
    assert_eq!(outcome(&lab, &start).0, OperationState::Succeeded);

    let refusal = delete(&mut lab, "vm", false).unwrap_err();
    assert!(refusal.to_string().contains("stop it first"), "{refusal}");
    let delete = delete(&mut lab, "vm", true).unwrap();
    assert!(lab.assignment("a", "vm").is_none());
    lab.settle();
    assert_eq!(outcome(&lab, &delete).0, OperationState::Running, "it is still there");
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(outcome(&lab, &delete).0, OperationState::Succeeded);
    assert!(lab.view().get::<DomainRecord>("vm").is_none());
}

/// I7: a kernel that is no kernel leaves nothing behind, and says what was wrong.
#[test]
fn a_create_that_fails_leaves_nothing() {
    let mut lab = Lab::with_nodes(&["a"]);
    let create = lab.create("vm", "a").unwrap();
    let failed = lab.observed("vm", 1, S::Failed);
    let failed = failed.because(ExitReason::Error, "/boot/vmlinuz: no such file");
    lab.report("a", vec![failed]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Deleting);
    assert!(lab.assignment("a", "vm").is_none());
    assert!(matches!(lab.create("vm", "a"), Err(Refusal::Busy { .. })));
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(outcome(&lab, &create), (OperationState::Failed, "START_FAILED".into()));
    let message = lab.operation(&create.id).error.unwrap().message;
    assert_eq!(message, "/boot/vmlinuz: no such file");
    assert!(lab.view().get::<DomainRecord>("vm").is_none());
    lab.create("vm", "a").unwrap();
}

#[test]
fn a_create_that_nobody_answers_ends_at_its_deadline() {
    let mut lab = Lab::with_nodes(&["a"]);
    let create = lab.create("vm", "a").unwrap();
    for _ in 0..40 {
        lab.pass_time(10_000);
        lab.settle();
    }
    assert_eq!(outcome(&lab, &create), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    // Its agent comes back: what it holds is ended, then the row goes.
    assert!(lab.desired("a").is_empty());
    lab.hello("a", "boot-1");
    lab.settle();
    assert!(lab.view().get::<DomainRecord>("vm").is_none());
}

#[test]
fn a_create_is_cancelled_and_taken_back() {
    let mut lab = Lab::with_nodes(&["a"]);
    let create = lab.create("vm", "a").unwrap();
    lab.cancel(&create.id).unwrap();
    lab.settle();
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(outcome(&lab, &create), (OperationState::Cancelled, "CANCELLED".into()));
    assert!(lab.view().get::<DomainRecord>("vm").is_none());
    assert!(matches!(lab.cancel(&create.id), Err(Refusal::Precondition { .. })));
}

#[test]
fn a_guest_that_powers_itself_off_stays_off_and_one_that_crashes_says_why() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.running("off", "a");
    lab.running("bad", "a");
    let off = lab.observed("off", 1, S::Stopped).because(ExitReason::Shutdown, "");
    let bad = lab.observed("bad", 1, S::Failed).because(ExitReason::Crash, "panic: oh no");
    lab.report("a", vec![off, bad]);
    lab.settle();
    let off = lab.domain("off");
    assert_eq!((off.state(), off.desired_power()), (DomainState::Stopped, PowerState::Stopped));
    let bad = lab.domain("bad");
    assert_eq!((bad.state(), bad.state_reason.as_str()), (DomainState::Failed, "panic: oh no"));
    assert!(lab.events().contains(&"DOMAIN_CRASHED".into()));
}

#[test]
fn a_start_that_fails_does_not_start_later() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.running("vm", "a");
    let off = lab.observed("vm", 1, S::Stopped).because(ExitReason::Shutdown, "");
    lab.report("a", vec![off]);
    lab.settle();
    let start = start(&mut lab, "vm").unwrap();
    let failed = lab.observed("vm", 2, S::Failed).because(ExitReason::Error, "no such file");
    lab.report("a", vec![failed]);
    lab.settle();
    assert_eq!(outcome(&lab, &start), (OperationState::Failed, "START_FAILED".into()));
    assert_eq!(lab.domain("vm").desired_power(), PowerState::Stopped);
}

#[test]
fn a_node_is_lost_after_a_lease_and_found_again() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    lab.running("vm", "a");
    lab.pass_time(15_000);
    lab.beat("b");
    lab.settle();
    assert_eq!(lab.node("a").state(), NodeState::Ready, "not before the lease is over");
    lab.pass_time(1);
    lab.settle();
    assert_eq!(lab.node("a").state(), NodeState::Lost);
    assert_eq!(lab.domain("vm").state(), DomainState::Lost);
    assert_eq!(lab.domain("vm").state_reason, "nodes/a is lost");
    assert_eq!(lab.domain("vm").node, "a", "nobody else is given it");
    assert!(matches!(stop(&mut lab, "vm", 0), Err(Refusal::Precondition { .. })));

    lab.hello("a", "boot-1");
    lab.report("a", vec![lab.observed("vm", 1, S::Running)]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    assert_eq!(lab.domain("vm").epoch, 1);
    let events = lab.events();
    for reason in ["NODE_LOST", "DOMAIN_LOST", "NODE_READY", "DOMAIN_FOUND"] {
        assert!(events.contains(&reason.into()), "{reason} in {events:?}");
    }
}

/// Who has just begun to lead has heard nobody: that says nothing about the nodes.
#[test]
fn a_new_leader_waits_a_full_lease() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.pass_time(100_000);
    lab.term += 1;
    lab.observed = Default::default();
    lab.leader_since_ms = lab.now.mono_ms;
    lab.settle();
    lab.pass_time(15_000);
    lab.settle();
    assert_eq!(lab.node("a").state(), NodeState::Ready);
    lab.pass_time(1);
    lab.settle();
    assert_eq!(lab.node("a").state(), NodeState::Lost);
}

#[test]
fn a_host_that_rebooted_starts_its_domains_again_under_a_new_epoch() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.running("vm", "a");
    lab.running("off", "a");
    let off = lab.observed("off", 1, S::Stopped).because(ExitReason::Shutdown, "");
    lab.report("a", vec![lab.observed("vm", 1, S::Running), off]);
    lab.settle();
    lab.hello("a", "boot-2");
    let domain = lab.domain("vm");
    assert_eq!((domain.epoch, domain.state()), (2, DomainState::Starting));
    assert_eq!(lab.assignment("a", "vm").unwrap().epoch, 2, "the first level says so already");
    assert_eq!(lab.domain("off").epoch, 1, "what was off stays off");
    let old = lab.observed("vm", 1, S::Stopped).because(ExitReason::Killed, "host rebooted");
    lab.report("a", vec![old]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Starting);
    lab.report("a", vec![lab.observed("vm", 2, S::Running)]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    assert!(lab.events().contains(&"DOMAIN_RESTARTED".into()));
}

#[test]
fn another_machine_under_a_known_name_is_refused() {
    let mut lab = Lab::with_nodes(&["a"]);
    let mut other = hello("a", "boot-1");
    other.node_uid = "another".into();
    let id = NodeId::trusted("a");
    let refusal =
        lab.with(|cx| Ok((nodes::register(cx, &id, &other)?.unwrap_or_default(), ()))).unwrap_err();
    assert!(refusal.to_string().contains("vpsctl node delete a"), "{refusal}");
}

#[test]
fn a_domain_larger_than_every_node_is_refused_with_each_reason() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    let mut new = new_domain("vm", None);
    new.spec.memory_bytes = 8192 * MIB;
    let refusal = lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap_err();
    let text = refusal.to_string();
    assert!(text.contains("a: needs 8192 MiB of memory, 4096 MiB of 4096 MiB free"), "{text}");
    assert!(text.contains("b: needs 8192 MiB"), "{text}");
    assert!(lab.world().domains.is_empty() && lab.world().operations.is_empty());
}

/// Two creates that were decided on the same picture cannot both have the last room.
#[test]
fn room_is_promised_once() {
    let mut lab = Lab::with_nodes(&["a"]);
    let world = lab.world();
    let (one, two) = {
        let cx = lab.context(&world);
        let begin = |id| begin::create_domain(&cx, &new_domain(id, None)).unwrap().txn;
        (begin("one"), begin("two"))
    };
    assert!(lab.commit(&one));
    assert!(!lab.commit(&two));
}

#[test]
fn a_node_with_domains_is_not_forgotten() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.running("vm", "a");
    let id = NodeId::trusted("a");
    let refusal = lab.with(|cx| Ok((delete_node(cx, &id, "")?, ()))).unwrap_err();
    assert!(refusal.to_string().contains("domains/vm"), "{refusal}");
    let refusal = lab.with(|cx| Ok((delete_node(cx, &id, "old")?, ()))).unwrap_err();
    assert!(matches!(refusal, Refusal::Changed { .. }));
}

#[test]
fn a_cordoned_node_takes_nothing_new() {
    let mut lab = Lab::with_nodes(&["a"]);
    let id = NodeId::trusted("a");
    lab.with(|cx| set_cordon(cx, &id, true)).unwrap();
    let refusal = lab.create("vm", "a").unwrap_err();
    assert!(refusal.to_string().contains("a: cordoned"), "{refusal}");
    lab.with(|cx| set_cordon(cx, &id, false)).unwrap();
    lab.create("vm", "a").unwrap();
}

/// A domain that is not running moves as a row.
#[test]
fn a_stopped_domain_moves_at_once() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    lab.running("vm", "a");
    let off = lab.observed("vm", 1, S::Stopped).because(ExitReason::Shutdown, "");
    lab.report("a", vec![off]);
    lab.settle();
    let migrate = lab.migrate("vm", "b").unwrap();
    assert_eq!(outcome(&lab, &migrate).0, OperationState::Succeeded);
    let domain = lab.domain("vm");
    assert_eq!((domain.node.as_str(), domain.epoch), ("b", 2));
    assert!(lab.assignment("a", "vm").is_none() && lab.assignment("b", "vm").is_some());
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
}

#[test]
fn a_new_leader_takes_operations_up() {
    let mut lab = Lab::with_nodes(&["a"]);
    let create = lab.create("vm", "a").unwrap();
    for expected in 1..=2 {
        lab.term += 1;
        lab.settle();
        assert_eq!(lab.operation(&create.id).resumed_count, expected);
    }
    lab.settle();
    assert_eq!(lab.operation(&create.id).resumed_count, 2, "once a leader");
}

/// I3: rows of drains are large; a new leader takes them up a few at a time.
#[test]
fn a_new_leader_takes_up_operations_of_any_size() {
    let mut lab = Lab::new();
    let large = "x".repeat(10_000);
    for n in 0..200 {
        let row = OperationRecord {
            id: format!("00000000-0000-4000-9000-{n:012}"),
            state: OperationState::Running.into(),
            status_message: large.clone(),
            ..OperationRecord::default()
        };
        assert!(lab.commit(&Txn::new().put(&row)));
    }
    lab.settle();
    let rows: Vec<_> = lab.view().all::<OperationRecord>().collect();
    assert_eq!(rows.len(), 200);
    assert!(rows.iter().all(|row| row.value.resumed_count == 1 && row.value.term == 1));
}

/// I3: with many large rows the host must register all the same. What is not started again with
/// it, its agent starts under the epoch that it had.
#[test]
fn a_host_with_many_large_rows_registers_after_a_reboot() {
    let mut lab = Lab::with_nodes(&["a"]);
    let ids = lab.large(40, "a", DomainState::Running);
    lab.hello("a", "boot-2");
    assert_eq!(lab.node("a").boot_id, "boot-2");
    let epochs: Vec<u64> = ids.iter().map(|id| lab.domain(id).epoch).collect();
    assert!(epochs.contains(&2) && epochs.contains(&1), "{epochs:?}");
    let ended = |lab: &Lab, id: &String| {
        lab.observed(id, 1, S::Stopped).because(ExitReason::Killed, "host a rebooted")
    };
    let report: Vec<_> = ids.iter().map(|id| ended(&lab, id)).collect();
    lab.report("a", report);
    lab.settle();
    assert!(ids.iter().all(|id| lab.domain(id).state() == DomainState::Starting));
    let report = ids.iter().zip(&epochs).map(|(id, epoch)| lab.observed(id, *epoch, S::Running));
    let report = report.collect();
    lab.report("a", report);
    lab.settle();
    for id in &ids {
        let domain = lab.domain(id);
        assert_eq!((domain.state(), domain.boot_id.as_str()), (DomainState::Running, "boot-2"));
    }
}

#[test]
fn a_placement_keeps_a_bounded_number_of_reasons() {
    let names: Vec<String> = (0..60).map(|n| format!("n{n:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut lab = Lab::with_nodes(&names);
    lab.create("asked", "n59").unwrap();
    assert_eq!(lab.domain("asked").placement.unwrap().rejected, []);
    for name in &names[..59] {
        let id = NodeId::trusted(name);
        lab.with(|cx| set_cordon(cx, &id, true)).unwrap();
    }
    lab.with(|cx| begin::create_domain(cx, &new_domain("any", None)).map(split)).unwrap();
    let placement = lab.domain("any").placement.unwrap();
    assert_eq!((placement.node.as_str(), placement.rejected.len()), ("nodes/n59", 32));
}

/// Somebody who does not want to wait for the grace period any longer.
#[test]
fn a_stop_is_hurried_on() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.running("vm", "a");
    let first = stop(&mut lab, "vm", 3_600_000).unwrap();
    let grace = |lab: &Lab| {
        let Some(Role::Owner(owner)) = lab.assignment("a", "vm").unwrap().role else { panic!() };
        owner.grace_period.unwrap().seconds
    };
    assert_eq!(grace(&lab), 3600);
    let refusal = stop(&mut lab, "vm", 5_000).unwrap_err();
    assert!(refusal.to_string().contains("wait for it (it cannot be cancelled)"), "{refusal}");
    let hurried = stop(&mut lab, "vm", 0).unwrap();
    assert_eq!((hurried.id.as_str(), grace(&lab)), (first.id.as_str(), 0));
    assert_eq!(stop(&mut lab, "vm", 0).unwrap().id, first.id, "once more changes nothing");
    // Its wait is as short as that of any forced stop.
    lab.pass_time(60_001);
    lab.beat("a");
    lab.settle();
    assert_eq!(outcome(&lab, &first), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    lab.report("a", vec![lab.observed("vm", 1, S::Stopped)]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);

    // Nothing else that holds a domain is taken over.
    let begun = start(&mut lab, "vm").unwrap();
    let refusal = stop(&mut lab, "vm", 0).unwrap_err();
    let busy = Refusal::Busy { name: "domains/vm".into(), operation: begun.id, cancellable: true };
    assert_eq!(refusal, busy);
    assert!(refusal.to_string().contains("cancel it"), "{refusal}");
}
