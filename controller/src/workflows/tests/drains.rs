//! Drains and balances.

use drover_proto::agent::v1::{MigrationProgress as P, MigrationRole, ObservedState as S};
use drover_proto::v1::{
    DomainState, DrainPolicy, DrainState, MoveState, OperationState, PlannedMove, PowerState,
};

use super::lab::{Lab, MIB, Observe, ended, limits, new_domain, split};
use crate::model::{NodeId, OperationRecord};
use crate::scheduler::Strategy;
use crate::store::Txn;
use crate::workflows::drain::{ATTEMPTS_MAX, STALL_WAIT_MS, begin_balance, begin_drain};
use crate::workflows::{Refusal, begin, plan};

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

/// What comes to the node is as good as there.
#[test]
fn drained_is_not_said_while_a_domain_is_on_its_way_there() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    lab.running("vm", "a");
    let migration = lab.migrate("vm", "b").unwrap();
    let operation = drain(&mut lab, "b").unwrap();
    lab.report("b", vec![]);
    lab.settle();
    // Its agent knows the rows, and has not begun.
    lab.report("b", vec![]);
    lab.settle();
    let held = lab.operation(&operation.id);
    assert_eq!(held.state(), OperationState::Running);
    assert!(held.status_message.contains("between it and another node"), "{held:?}");
    let after = u64::try_from(STALL_WAIT_MS).unwrap() + 1;
    for _ in 0..2 {
        lab.pass_time(after / 2);
        lab.beat("a");
        lab.beat("b");
        lab.settle();
    }
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running, "it is progress");
    lab.cancel(&migration.id).unwrap();
    lab.settle();
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    assert_eq!(lab.node("b").drain_state(), DrainState::Drained);
}

/// What an agent said before the drain got so far, or one that is gone, confirms nothing.
#[test]
fn only_an_agent_that_is_there_confirms() {
    let mut lab = Lab::with_nodes(&["a", "b"]);
    let before = lab.state.revision();
    let operation = drain(&mut lab, "a").unwrap();
    lab.report_knowing("a", before, vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    lab.report("a", vec![]);
    let seen = lab.observed.nodes.get_mut(&NodeId::trusted("a")).unwrap();
    std::sync::Arc::make_mut(seen).connected = false;
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    let seen = lab.observed.nodes.get_mut(&NodeId::trusted("a")).unwrap();
    std::sync::Arc::make_mut(seen).connected = true;
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
}

/// I3: what a drain writes about what it could not do stays small, however much that is.
#[test]
fn a_large_drain_that_is_blocked_ends() {
    let done = blocked_drain(40, 2, 800);
    let message = done.error.unwrap().message;
    assert!(message.contains("and 780 more") && message.len() < 2_000, "{message}");
    let reason = &done.moves[0].r#move.as_ref().unwrap().reason;
    assert!(reason.contains("and 34 more") && reason.len() < 1_000, "{reason}");

    let done = blocked_drain(40, 60, 1300);
    assert_eq!(done.moves.len(), 1300);
    let reason = &done.moves[0].r#move.as_ref().unwrap().reason;
    assert!(reason.ends_with("(cut)"), "{reason}");
}

/// A drain of the first of these nodes, with domains that are too large for every other one.
fn blocked_drain(nodes: usize, name_bytes: usize, domains: usize) -> OperationRecord {
    let names: Vec<String> = (0..nodes).map(|n| format!("n{n:0name_bytes$}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut lab = Lab::with_nodes(&names);
    let id = NodeId::trusted(names[0]);
    let ids: Vec<String> = (0..domains).map(|n| format!("{}-{n:04}", "d".repeat(58))).collect();
    for id in &ids {
        let mut row = crate::model::DomainRecord {
            id: id.clone(),
            uid: format!("uid-of-{id}"),
            spec: Some(new_domain(id, None).spec),
            node: names[0].to_owned(),
            epoch: 1,
            epoch_max: 1,
            ..Default::default()
        };
        row.spec.as_mut().unwrap().memory_bytes = 8192 * MIB;
        row.set_state(DomainState::Running);
        row.set_desired_power(PowerState::Running);
        assert!(lab.commit(&Txn::new().put(&row)));
    }
    let here: Vec<_> = ids.iter().map(|id| lab.observed(id, 1, S::Running)).collect();
    lab.report(names[0], here);
    lab.settle();
    let operation =
        lab.with(|cx| begin_drain(cx, &id, &limits(), 3_600_000, Strategy::BestFit).map(split));
    let operation = operation.unwrap();
    lab.settle();
    lab.pass_time(u64::try_from(STALL_WAIT_MS).unwrap());
    for name in &names {
        lab.beat(name);
    }
    lab.settle();
    let done = lab.operation(&operation.id);
    assert_eq!(ended(&done), (OperationState::Failed, "BLOCKED".into()));
    done
}

/// More than one row holds is refused at once, not begun and never ended.
#[test]
fn a_drain_that_no_row_holds_is_refused() {
    let mut lab = Lab::with_nodes(&["a"]);
    for n in 0..6_000 {
        let mut row = crate::model::DomainRecord {
            id: format!("{}-{n:04}", "d".repeat(58)),
            node: "a".into(),
            ..Default::default()
        };
        row.set_state(DomainState::Running);
        assert!(lab.commit(&Txn::new().put(&row)));
    }
    let refusal = drain(&mut lab, "a").unwrap_err();
    assert!(matches!(refusal, Refusal::Precondition { reason: "TOO_MANY_DOMAINS", .. }));
}

/// I3: rows as large as they may be are moved a few at a time, and another drain has its turn
/// in between.
#[test]
fn a_drain_of_large_rows_lets_another_one_have_its_turn() {
    let mut lab = Lab::with_nodes(&["a", "b", "c"]);
    lab.running("vm", "b");
    let ids = lab.large(60, "a", DomainState::Stopped);
    let large = drain(&mut lab, "a").unwrap();
    let small = drain(&mut lab, "b").unwrap();
    for _ in 0..2 {
        let world = lab.world();
        for step in plan(&lab.context(&world)) {
            assert!(lab.commit(&step.txn));
        }
    }
    let begun = states(&lab, &large).iter().filter(|state| **state == MoveState::Moving).count();
    assert!((1..60).contains(&begun), "{begun} at once");
    assert_eq!(states(&lab, &small), [MoveState::Moving]);
    lab.settle();
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&large.id).state(), OperationState::Succeeded);
    assert!(ids.iter().all(|id| lab.domain(id).node == "c"));
}

#[test]
fn a_second_drain_of_the_node_names_the_first() {
    let mut lab = lab();
    let first = drain(&mut lab, "a").unwrap();
    assert_eq!(
        drain(&mut lab, "a").unwrap_err(),
        Refusal::Busy { name: "nodes/a".into(), operation: first.id, cancellable: true }
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
    assert!(message.contains("domains/vm"), "{message}");
    let reason = &done.moves[0].r#move.as_ref().unwrap().reason;
    assert!(reason.contains("connection broke"), "{reason}");
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
