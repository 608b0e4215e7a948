//! Drains and balances.

use drover_proto::agent::v1::{MigrationProgress as P, MigrationRole, ObservedState as S};
use drover_proto::v1::{DrainPolicy, DrainState, MoveState, OperationState, PlannedMove};

use super::lab::{Lab, MIB, Observe, ended, limits, new_domain, split};
use crate::model::{NodeId, OperationRecord};
use crate::scheduler::Strategy;
use crate::workflows::drain::{ATTEMPTS_MAX, STALL_WAIT_MS, begin_balance, begin_drain};
use crate::workflows::{Refusal, begin};

fn drain(lab: &mut Lab, node: &str) -> Result<OperationRecord, Refusal> {
    let id = NodeId::trusted(node);
    lab.with(|cx| begin_drain(cx, &id, &limits(), 3_600_000, Strategy::BestFit).map(split))
}

fn moves(lab: &Lab, drain: &OperationRecord) -> Vec<PlannedMove> {
    lab.operation(&drain.id).moves.into_iter().filter_map(|row| row.r#move).collect()
}

fn states(lab: &Lab, drain: &OperationRecord) -> Vec<MoveState> {
    moves(lab, drain).iter().map(PlannedMove::state).collect()
}

/// Three domains on `a`, room on `b` and `c`.
fn lab() -> Lab {
    let mut lab = Lab::with_nodes(&["a", "b", "c"]);
    let ids = ["vm1", "vm2", "vm3"];
    for id in ids {
        lab.create(id, "a").unwrap();
    }
    let all = ids.map(|id| lab.observed(id, 1, S::Running)).to_vec();
    lab.report("a", all);
    lab.settle();
    lab
}

/// The agents do what they are told, all at once; a move to `broken` fails.
fn agents_work(lab: &mut Lab, broken: Option<&str>) {
    for node in ["a", "b", "c"] {
        let mut said = Vec::new();
        for assignment in lab.desired(node) {
            let id = assignment.name.trim_start_matches("domains/").to_owned();
            let migration = lab.domain(&id).migration;
            let (role, of) = match &migration {
                None => (None, String::new()),
                Some(m) if m.from == node => (Some(MigrationRole::Source), m.id.clone()),
                Some(m) => (Some(MigrationRole::Destination), m.id.clone()),
            };
            let fails = migration.as_ref().is_some_and(|m| Some(m.to.as_str()) == broken);
            let told = assignment.outgoing.is_some();
            let domain = |state| lab.observed(&id, assignment.epoch, state);
            said.push(match role {
                None => domain(S::Running),
                Some(role @ MigrationRole::Source) if told && fails => {
                    domain(S::Running).migrating(&of, role, P::Failed)
                }
                Some(role @ MigrationRole::Source) if told => {
                    domain(S::HandedOver).migrating(&of, role, P::Succeeded)
                }
                Some(MigrationRole::Source) => domain(S::Running),
                Some(role) => {
                    let m = migration.as_ref().unwrap();
                    let other_told = m.address == "b:4000";
                    let progress = if other_told && !fails { P::Succeeded } else { P::Listening };
                    let state = if other_told && !fails { S::Running } else { S::Incoming };
                    domain(state).migrating(&of, role, progress)
                }
            });
        }
        lab.report(node, said);
    }
    lab.pass_time(500);
    lab.settle();
}

#[test]
fn a_node_is_drained_two_at_a_time_and_says_so_when_its_agent_confirms() {
    let mut lab = lab();
    let operation = drain(&mut lab, "a").unwrap();
    assert_eq!(moves(&lab, &operation).len(), 3);
    let node = lab.node("a");
    assert!(node.cordoned && node.drain_state() == DrainState::Draining);
    lab.settle();
    let moving = states(&lab, &operation).iter().filter(|s| **s == MoveState::Moving).count();
    assert_eq!(moving, 2, "a link of 1 Gbit/s carries two");
    for _ in 0..12 {
        agents_work(&mut lab, None);
    }
    let done = lab.operation(&operation.id);
    assert_eq!(done.state(), OperationState::Succeeded, "{done:?}");
    assert_eq!(states(&lab, &operation), [MoveState::Moved; 3]);
    assert_eq!(lab.node("a").drain_state(), DrainState::Drained);
    assert!(lab.desired("a").is_empty());
    for id in ["vm1", "vm2", "vm3"] {
        assert_eq!(lab.domain(id).epoch, 2);
    }
}

#[test]
fn drained_is_not_said_while_something_is_left_on_the_host() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    let stray = drover_proto::agent::v1::ObservedDomain {
        uid: "nobody-knows".into(),
        state: S::Running.into(),
        ..Default::default()
    };
    lab.report("a", vec![stray]);
    let operation = drain(&mut lab, "a").unwrap();
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    assert!(lab.operation(&operation.id).status_message.contains("waits for the agent"));
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
}

#[test]
fn a_second_drain_of_the_node_names_the_first() {
    let mut lab = lab();
    let first = drain(&mut lab, "a").unwrap();
    assert_eq!(
        drain(&mut lab, "a").unwrap_err(),
        Refusal::Busy { name: "nodes/a".into(), operation: first.id }
    );
}

#[test]
fn a_failed_move_is_tried_elsewhere() {
    let mut lab = lab();
    let operation = drain(&mut lab, "a").unwrap();
    lab.settle();
    let broken = moves(&lab, &operation)[0].to_node.trim_start_matches("nodes/").to_owned();
    for _ in 0..30 {
        agents_work(&mut lab, Some(&broken));
    }
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    for line in moves(&lab, &operation) {
        assert_ne!(line.to_node, format!("nodes/{broken}"));
    }
}

#[test]
fn a_domain_that_fails_everywhere_is_left_running_and_reported() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    lab.running("vm", "a");
    let operation = drain(&mut lab, "a").unwrap();
    lab.settle();
    for _ in 0..80 {
        for node in ["a", "b"] {
            let said = lab.desired(node).into_iter().map(|assignment| {
                let m = lab.domain("vm").migration;
                let of = m.map(|m| m.id).unwrap_or_default();
                let told = assignment.outgoing.is_some();
                match (node, told) {
                    ("a", false) => lab.observed("vm", 1, S::Running),
                    ("a", true) => lab.observed("vm", 1, S::Running).migrating(
                        &of,
                        MigrationRole::Source,
                        P::Failed,
                    ),
                    _ => lab.observed("vm", assignment.epoch, S::Incoming).migrating(
                        &of,
                        MigrationRole::Destination,
                        P::Listening,
                    ),
                }
            });
            let said = said.collect();
            lab.report(node, said);
        }
        lab.pass_time(1000);
        lab.settle();
    }
    let done = lab.operation(&operation.id);
    assert_eq!(ended(&done), (OperationState::Failed, "BLOCKED".into()));
    assert!(done.moves[0].attempts <= ATTEMPTS_MAX);
    let message = done.error.unwrap().message;
    assert!(message.contains("domains/vm") && message.contains("connection broke"), "{message}");
    let node = lab.node("a");
    assert!(node.cordoned && node.drain_state() == DrainState::Incomplete);
    assert_eq!(lab.domain("vm").node, "a");
}

#[test]
fn what_fits_nowhere_and_what_must_stay_is_said() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    lab.running("big", "a");
    let mut stay = new_domain("stay", Some("a"));
    stay.spec.set_drain_policy(DrainPolicy::Stay);
    lab.with(|cx| begin::create_domain(cx, &stay).map(split)).unwrap();
    let mut filler = new_domain("filler", Some("b"));
    filler.spec.memory_bytes = 4000 * MIB;
    lab.with(|cx| begin::create_domain(cx, &filler).map(split)).unwrap();
    let here = ["big", "stay"].map(|id| lab.observed(id, 1, S::Running)).to_vec();
    lab.report("a", here);
    lab.report("b", vec![lab.observed("filler", 1, S::Running)]);
    lab.settle();
    let operation = drain(&mut lab, "a").unwrap();
    lab.settle();
    assert_eq!(states(&lab, &operation), [MoveState::Blocked; 2]);
    let reasons: Vec<_> = moves(&lab, &operation).into_iter().map(|line| line.reason).collect();
    assert!(reasons[0].contains("free 160 MiB on b"), "{reasons:?}");
    assert!(reasons[1].contains("STAY"), "{reasons:?}");
    for _ in 0..3 {
        lab.pass_time(u64::try_from(STALL_WAIT_MS).unwrap() / 2);
        lab.beat("a");
        lab.beat("b");
        lab.settle();
    }
    let done = lab.operation(&operation.id);
    assert_eq!(ended(&done), (OperationState::Failed, "BLOCKED".into()));
    assert!(done.error.unwrap().message.contains("domains/stay"));
}

#[test]
fn a_cancelled_drain_finishes_what_moves_and_keeps_the_cordon() {
    let mut lab = lab();
    let operation = drain(&mut lab, "a").unwrap();
    lab.settle();
    lab.cancel(&operation.id).unwrap();
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    for _ in 0..8 {
        agents_work(&mut lab, None);
    }
    let done = lab.operation(&operation.id);
    assert_eq!(ended(&done), (OperationState::Cancelled, "CANCELLED".into()));
    let mut after = states(&lab, &operation);
    after.sort_by_key(|state| *state as i32);
    assert_eq!(after, [MoveState::Planned, MoveState::Moved, MoveState::Moved]);
    assert!(lab.node("a").cordoned);
}

#[test]
fn a_drain_past_its_deadline_stops_nothing() {
    let mut lab = Lab::with_nodes(&["a"]);
    lab.running("vm", "a");
    let id = NodeId::trusted("a");
    let operation = lab
        .with(|cx| begin_drain(cx, &id, &limits(), 5_000, Strategy::BestFit).map(split))
        .unwrap();
    lab.settle();
    lab.pass_time(5_001);
    lab.beat("a");
    lab.settle();
    let done = lab.operation(&operation.id);
    assert_eq!(ended(&done), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    assert_eq!(lab.domain("vm").node, "a");
    assert!(lab.assignment("a", "vm").is_some());
}

/// The next leader goes on where the last one was.
#[test]
fn a_drain_survives_a_change_of_leader() {
    let mut lab = lab();
    let operation = drain(&mut lab, "a").unwrap();
    lab.settle();
    agents_work(&mut lab, None);
    lab.term += 1;
    lab.leader_since_ms = lab.now.mono_ms;
    lab.observed = Default::default();
    lab.settle();
    for name in ["a", "b", "c"] {
        lab.hello(name, "boot-1");
    }
    for _ in 0..12 {
        agents_work(&mut lab, None);
    }
    let done = lab.operation(&operation.id);
    assert_eq!((done.state(), done.resumed_count), (OperationState::Succeeded, 1));
}

#[test]
fn a_balance_moves_what_it_proposed() {
    let mut lab = lab();
    let busy = ["vm1", "vm2", "vm3"].map(|id| {
        let mut domain = lab.observed(id, 1, S::Running);
        domain.usage =
            Some(drover_proto::v1::DomainUsage { cpu_millicores: 4000, ..Default::default() });
        domain
    });
    lab.report("a", busy.to_vec());
    let operation = lab.with(|cx| begin_balance(cx, 5, &limits()).map(split)).unwrap();
    assert_eq!(operation.moves.len(), 2, "one stays");
    let again = lab.with(|cx| begin_balance(cx, 5, &limits()).map(split));
    assert!(matches!(again, Err(Refusal::Busy { .. })));
    for _ in 0..12 {
        lab.settle();
        agents_work(&mut lab, None);
    }
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    let on: Vec<_> = ["vm1", "vm2", "vm3"].map(|id| lab.domain(id).node).to_vec();
    let distinct: std::collections::BTreeSet<_> = on.iter().collect();
    assert_eq!(distinct.len(), 3, "{on:?}");
}
