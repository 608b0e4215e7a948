//! Domains that do not run move with their disks: what each side is told, and every way in which
//! it ends.

use drover_proto::agent::v1::{ObservedState as S, ObservedVolume};
use drover_proto::v1::{
    DomainState, MigrationLimits, MigrationPhase, MoveState, OperationState, VolumeState,
};

use super::disks::{garbage, running, says, volume};
use super::lab::{Lab, ended, limits, split};
use crate::model::{DomainId, NodeId, OperationRecord};
use crate::scheduler::Strategy;
use crate::workflows::{begin, copy, drain};

/// `vm` is stopped on `a`, with a volume of 2 GiB.
pub(super) fn stopped() -> Lab {
    let mut lab = running();
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::stop_domain(cx, &id, 0).map(split)).unwrap();
    let stopped = lab.observed("vm", 1, S::Stopped);
    lab.report("a", vec![stopped]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
    lab
}

/// The same, on its way to `b`.
fn moving() -> (Lab, OperationRecord) {
    let mut lab = stopped();
    let operation = lab.migrate("vm", "b").unwrap();
    lab.settle();
    (lab, operation)
}

fn at_a(lab: &mut Lab) {
    let stopped = lab.observed("vm", 1, S::Stopped);
    lab.report("a", vec![stopped]);
}

#[test]
fn its_volumes_are_copied_and_then_it_is_there() {
    let (mut lab, operation) = moving();
    let uid = volume(&lab).uid;
    assert_eq!(operation.state(), OperationState::Running);
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
    // Nothing of it but its volume is at the destination, and the source keeps all of it.
    assert!(lab.desired("b").is_empty());
    let coming = lab.level("b").volumes;
    assert_eq!((coming[0].uid.as_str(), coming[0].copy_from.as_str()), (uid.as_str(), "a:7401"));
    assert!(coming[0].create && coming[0].image_digest.is_empty());
    assert_eq!(lab.desired("a").len(), 1);
    assert!(!lab.level("a").volumes[0].create);
    // Room is reserved.
    assert_eq!(lab.world().promised(&NodeId::trusted("b"))["ssd"], 2 << 30);
    let start = lab.with(|cx| begin::start_domain(cx, &DomainId::trusted("vm"), false).map(split));
    assert!(start.unwrap_err().to_string().contains("works on domains/vm"));

    says(&mut lab, "b", VolumeState::Creating);
    lab.report("b", vec![]);
    lab.settle();
    let held = lab.operation(&operation.id);
    assert_eq!(held.status_message, "nodes/b copies its volumes: 0 of 1 are there");
    let m = lab.domain("vm").migration.unwrap();
    let detail = copy::progress(&lab.observed, &m, [volume(&lab)].iter()).unwrap();
    assert_eq!(detail, "volumes/vm-0: said so");

    // Another leader, who has heard nobody yet, knows all of it from the rows.
    lab.term += 1;
    lab.leader_since_ms = lab.now.mono_ms;
    lab.observed = Default::default();
    lab.settle();
    for name in ["a", "b"] {
        lab.hello(name, "boot-1");
    }
    at_a(&mut lab);

    says(&mut lab, "b", VolumeState::Ready);
    lab.report("b", vec![]);
    lab.settle();
    let held = lab.operation(&operation.id);
    assert_eq!(held.state(), OperationState::Succeeded, "{held:?}");
    assert_eq!(held.migration.unwrap().phase(), MigrationPhase::Done);
    let domain = lab.domain("vm");
    assert_eq!((domain.node.as_str(), domain.epoch), ("b", 2));
    assert_eq!((domain.state(), domain.migration), (DomainState::Stopped, None));
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    assert!(!lab.level("b").volumes[0].create);
    assert_eq!(lab.desired("b").len(), 1);
    assert!(lab.desired("a").is_empty());
}

/// READY that was said before the destination was told counts for nothing.
#[test]
fn only_an_answer_counts() {
    let mut lab = stopped();
    let before = lab.state.revision();
    let operation = lab.migrate("vm", "b").unwrap();
    says(&mut lab, "b", VolumeState::Ready);
    lab.report_knowing("b", before, vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    assert_eq!(lab.domain("vm").node, "a");
}

/// It stays where it is, startable, and the destination's copy is garbage.
fn stays(lab: &mut Lab, operation: &OperationRecord, state: OperationState, reason: &str) {
    let held = lab.operation(&operation.id);
    assert_eq!(ended(&held), (state, reason.to_owned()), "{held:?}");
    let domain = lab.domain("vm");
    assert_eq!((domain.node.as_str(), domain.epoch), ("a", 1));
    assert_eq!((domain.state(), domain.migration), (DomainState::Stopped, None));
    assert_eq!(domain.operation, "");
    assert_eq!(garbage(lab), [format!("b/{}", volume(lab).uid)]);
    assert!(lab.level("b").volumes.is_empty());
    assert_eq!(lab.level("a").volumes.len(), 1);
}

#[test]
fn cancelled_it_stays() {
    let (mut lab, operation) = moving();
    lab.cancel(&operation.id).unwrap();
    lab.settle();
    stays(&mut lab, &operation, OperationState::Cancelled, "CANCELLED");
    // Not again before the destination has removed what it has.
    let refused = lab.migrate("vm", "b").unwrap_err().to_string();
    assert!(refused.contains("has yet to remove an earlier copy"), "{refused}");
}

#[test]
fn a_copy_that_fails_is_the_end_of_it() {
    let (mut lab, operation) = moving();
    says(&mut lab, "b", VolumeState::Failed);
    lab.report("b", vec![]);
    lab.settle();
    let error = lab.operation(&operation.id).error.unwrap();
    assert_eq!(error.message, "nodes/b: volumes/vm-0: said so");
    stays(&mut lab, &operation, OperationState::Failed, "DESTINATION_FAILED");
}

#[test]
fn past_its_deadline_it_stays() {
    let mut lab = stopped();
    let (id, to) = (DomainId::trusted("vm"), NodeId::trusted("b"));
    let limits = MigrationLimits::default();
    let operation =
        lab.with(|cx| begin::migrate_domain(cx, &id, Some(&to), &limits).map(split)).unwrap();
    lab.settle();
    // 10 minutes and the disk's 2 GiB at 10 MiB/s, and a minute.
    let deadline = operation.deadline.unwrap().seconds * 1000;
    let wait = u64::try_from(deadline - lab.now.wall_ms).unwrap();
    assert!((860_000..870_000).contains(&wait), "{wait}");
    for _ in 0..wait / 10_000 {
        lab.pass_time(10_000);
        lab.beat("a");
        lab.beat("b");
        lab.settle();
    }
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    lab.pass_time(10_000);
    lab.beat("a");
    lab.beat("b");
    lab.settle();
    stays(&mut lab, &operation, OperationState::Failed, "DEADLINE_EXCEEDED");
}

#[test]
fn a_lost_node_ends_it() {
    for (lost, other, reason) in [("a", "b", "SOURCE_LOST"), ("b", "a", "DESTINATION_LOST")] {
        let (mut lab, operation) = moving();
        // An agent's restart is no loss.
        lab.pass_time(10_000);
        lab.settle();
        assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
        lab.pass_time(10_000);
        lab.beat(other);
        lab.settle();
        assert_eq!(lab.node(lost).state(), drover_proto::v1::NodeState::Lost);
        stays(&mut lab, &operation, OperationState::Failed, reason);
    }
}

#[test]
fn what_is_not_there_is_not_copied() {
    let mut lab = stopped();
    let mut row = volume(&lab);
    row.set_state(VolumeState::Creating);
    assert!(lab.commit(&crate::store::Txn::new().put(&row)));
    let refused = lab.migrate("vm", "b").unwrap_err().to_string();
    assert!(refused.contains("volumes/vm-0 is being made: wait for it"), "{refused}");
    row.set_state(VolumeState::Failed);
    row.state_reason = "lost".into();
    assert!(lab.commit(&crate::store::Txn::new().put(&row)));
    let refused = lab.migrate("vm", "b").unwrap_err().to_string();
    assert!(refused.contains("volumes/vm-0 has failed (lost)"), "{refused}");
}

#[test]
fn a_drain_takes_it_along() {
    let mut lab = stopped();
    let node = NodeId::trusted("a");
    let plan = {
        let world = lab.world();
        let cx = lab.context(&world);
        drain::propose_drain(&cx, &node, &limits(), Strategy::BestFit).unwrap()
    };
    assert!(plan.moves[0].reason.ends_with("not running, its disks are copied"), "{plan:?}");
    assert!(plan.expected_time.as_secs() > 2, "{plan:?}");
    // Where it is known what the disk takes, that counts, and not its size.
    let said = |allocated_bytes| ObservedVolume {
        uid: volume(&lab).uid,
        pool: "ssd".into(),
        state: VolumeState::Ready.into(),
        allocated_bytes,
        ..ObservedVolume::default()
    };
    let sparse = said(12 << 20);
    lab.volumes.insert("a".into(), vec![sparse]);
    lab.report("a", vec![]);
    let less = {
        let world = lab.world();
        let cx = lab.context(&world);
        drain::propose_drain(&cx, &node, &limits(), Strategy::BestFit).unwrap()
    };
    assert!(less.expected_time < plan.expected_time / 2, "{less:?}");
    let operation = lab
        .with(|cx| {
            drain::begin_drain(cx, &node, &limits(), 3_600_000, Strategy::BestFit).map(split)
        })
        .unwrap();
    lab.settle();
    let line = lab.operation(&operation.id).moves[0].r#move.clone().unwrap();
    assert_eq!(line.state(), MoveState::Moving);
    let said = ObservedVolume {
        uid: volume(&lab).uid,
        pool: "ssd".into(),
        state: VolumeState::Ready.into(),
        ..ObservedVolume::default()
    };
    lab.volumes.insert("b".into(), vec![said]);
    lab.report("b", vec![]);
    lab.settle();
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(lab.domain("vm").node, "b");
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
}
