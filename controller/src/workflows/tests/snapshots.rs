//! Snapshots through their lives: taken whole or not at all, put back, left behind, removed.

use drover_proto::agent::v1::{ObservedSnapshot, ObservedState as S};
use drover_proto::v1::{
    DomainState, OperationState, PoolState, PowerState, SnapshotState, VolumeState,
};

use super::copies::stopped;
use super::disks::{garbage, pool, running, says, volume};
use super::lab::{Lab, ended, limits, split};
use crate::model::{DomainId, NodeId, OperationRecord, SnapshotId, SnapshotRecord, VolumeRecord};
use crate::scheduler::Strategy;
use crate::store::Txn;
use crate::workflows::{Refusal, begin, drain, nodes, snapshot, volumes};

fn take(lab: &mut Lab, id: &str) -> Result<OperationRecord, Refusal> {
    let (id, domain) = (SnapshotId::trusted(id), DomainId::trusted("vm"));
    lab.with(|cx| snapshot::create_snapshot(cx, &id, &domain).map(split))
}

fn restore(lab: &mut Lab, id: &str) -> Result<OperationRecord, Refusal> {
    let id = SnapshotId::trusted(id);
    lab.with(|cx| snapshot::restore_snapshot(cx, &id).map(split))
}

fn delete(lab: &mut Lab, id: &str) -> Result<(), Refusal> {
    let id = SnapshotId::trusted(id);
    lab.with(|cx| snapshot::delete_snapshot(cx, &id, "").map(|txn| (txn, ())))
}

fn row(lab: &Lab, id: &str) -> Option<SnapshotRecord> {
    lab.view().get::<SnapshotRecord>(id).map(|row| row.value)
}

/// Node `a` says this of all parts of the snapshot, and its domain still is what it was.
fn node_says(lab: &mut Lab, id: &str, state: SnapshotState, quiesced: bool) {
    let parts = row(lab, id).unwrap().parts.into_iter().map(|part| ObservedSnapshot {
        uid: part.uid,
        volume_uid: part.volume_uid,
        pool: part.pool,
        state: state.into(),
        state_reason: "said so".into(),
        quiesced,
        ..ObservedSnapshot::default()
    });
    lab.snapshots.insert("a".into(), parts.collect());
    again(lab);
}

/// Node `a` reports once more.
fn again(lab: &mut Lab) {
    let domain = lab.domain("vm");
    let state = match domain.desired_power() {
        PowerState::Running => S::Running,
        _ => S::Stopped,
    };
    let said = lab.observed("vm", domain.epoch, state);
    lab.report("a", vec![said]);
    lab.settle();
}

fn taken(lab: &mut Lab, id: &str) {
    let operation = take(lab, id).unwrap();
    lab.settle();
    node_says(lab, id, SnapshotState::Ready, false);
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
}

/// Nothing of it is left but what its node has to remove.
fn is_gone(lab: &mut Lab, parts: &[String]) {
    assert!(lab.level("a").snapshots.is_empty());
    let expected: Vec<String> = parts.iter().map(|uid| format!("a/{uid}")).collect();
    assert_eq!(garbage(lab), expected);
    let listed: Vec<String> =
        lab.level("a").garbage.into_iter().map(|garbage| garbage.snapshot_uid).collect();
    assert_eq!(listed, parts);
    // The report still has it, then it has not.
    again(lab);
    assert_eq!(garbage(lab), expected);
    lab.snapshots.clear();
    again(lab);
    assert!(garbage(lab).is_empty());
}

/// The same for one that was given up: a part of it may come after a report without it.
fn is_gone_also_late(lab: &mut Lab, parts: &[String]) {
    let late = lab.snapshots.remove("a").unwrap_or_default();
    assert!(lab.level("a").snapshots.is_empty());
    let expected: Vec<String> = parts.iter().map(|uid| format!("a/{uid}")).collect();
    again(lab);
    assert_eq!(garbage(lab), expected, "nothing is there yet");
    lab.snapshots.insert("a".into(), late);
    lab.pass_time(20 * 60_000);
    again(lab);
    assert_eq!(garbage(lab), expected, "it has come");
    lab.snapshots.clear();
    again(lab);
    assert!(garbage(lab).is_empty());
}

fn parts(lab: &Lab, id: &str) -> Vec<String> {
    row(lab, id).unwrap().parts.into_iter().map(|part| part.uid).collect()
}

#[test]
fn it_is_taken_once_and_then_kept() {
    let mut lab = running();
    let operation = take(&mut lab, "one").unwrap();
    lab.settle();
    let wanted = lab.level("a").snapshots;
    assert!(wanted[0].create);
    assert_eq!(wanted[0].domain_uid, lab.domain("vm").uid);
    assert_eq!(wanted[0].parts[0].volume_uid, volume(&lab).uid);
    // Nothing else is done with the domain meanwhile, and the name is taken.
    assert!(lab.migrate("vm", "b").unwrap_err().to_string().contains("works on domains/vm"));
    assert!(matches!(take(&mut lab, "one"), Err(Refusal::AlreadyExists { .. })));
    let busy = delete(&mut lab, "one").unwrap_err();
    assert!(matches!(&busy, Refusal::Busy { name, .. } if name == "snapshots/one"), "{busy}");

    node_says(&mut lab, "one", SnapshotState::Creating, false);
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
    node_says(&mut lab, "one", SnapshotState::Ready, true);
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    let held = row(&lab, "one").unwrap();
    assert_eq!((held.state(), held.quiesced), (SnapshotState::Ready, true));
    assert!(!lab.level("a").snapshots[0].create, "one that is missing now is lost");

    // Its agent does not find it, and then it does.
    node_says(&mut lab, "one", SnapshotState::Failed, false);
    let held = row(&lab, "one").unwrap();
    assert_eq!(held.state(), SnapshotState::Failed);
    assert_eq!(held.state_reason, "volumes/vm-0: said so");
    assert!(restore(&mut lab, "one").unwrap_err().to_string().contains("stop it first"));
    node_says(&mut lab, "one", SnapshotState::Ready, false);
    let held = row(&lab, "one").unwrap();
    assert_eq!((held.state(), held.quiesced), (SnapshotState::Ready, true));

    let uids = parts(&lab, "one");
    delete(&mut lab, "one").unwrap();
    is_gone(&mut lab, &uids);
}

/// FAILED, a cancel, the deadline, a lost node: the row goes, and what was made of it.
#[test]
fn a_taking_that_fails_leaves_nothing() {
    for how in ["failed", "cancelled", "late", "lost"] {
        let mut lab = running();
        let operation = take(&mut lab, "one").unwrap();
        lab.settle();
        let uids = parts(&lab, "one");
        let (state, reason) = match how {
            "failed" => {
                node_says(&mut lab, "one", SnapshotState::Failed, false);
                (OperationState::Failed, "SNAPSHOT_FAILED")
            }
            "cancelled" => {
                node_says(&mut lab, "one", SnapshotState::Creating, false);
                lab.cancel(&operation.id).unwrap();
                lab.settle();
                (OperationState::Cancelled, "CANCELLED")
            }
            "late" => {
                for _ in 0..13 {
                    lab.pass_time(10_000);
                    lab.beat("a");
                    lab.beat("b");
                    lab.settle();
                }
                (OperationState::Failed, "DEADLINE_EXCEEDED")
            }
            _ => {
                lab.pass_time(20_000);
                lab.settle();
                (OperationState::Failed, "NODE_LOST")
            }
        };
        let held = lab.operation(&operation.id);
        assert_eq!(ended(&held), (state, reason.to_owned()), "{how}: {held:?}");
        assert!(row(&lab, "one").is_none(), "{how}");
        assert_eq!(lab.domain("vm").operation, "", "{how}");
        // Whatever was made has to be removed.
        let parts = uids.iter().map(|uid| ObservedSnapshot {
            uid: uid.clone(),
            pool: "ssd".into(),
            ..ObservedSnapshot::default()
        });
        lab.snapshots.insert("a".into(), parts.collect());
        is_gone_also_late(&mut lab, &uids);
    }
}

/// A word from before the node was told that it shall take it does not fail it.
#[test]
fn only_an_answer_counts() {
    let mut lab = running();
    let before = lab.state.revision();
    let operation = take(&mut lab, "one").unwrap();
    let part = row(&lab, "one").unwrap().parts.remove(0);
    let said = ObservedSnapshot {
        uid: part.uid,
        state: SnapshotState::Failed.into(),
        ..ObservedSnapshot::default()
    };
    lab.snapshots.insert("a".into(), vec![said]);
    let runs = lab.observed("vm", 1, S::Running);
    lab.report_knowing("a", before, vec![runs]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Running);
}

#[test]
fn what_cannot_be_taken_is_refused() {
    let mut lab = running();
    let none = DomainId::trusted("none");
    let id = SnapshotId::trusted("one");
    let refused = lab.with(|cx| snapshot::create_snapshot(cx, &id, &none).map(split));
    assert_eq!(refused.unwrap_err(), Refusal::NotFound { name: "domains/none".into() });

    lab.pools.insert("a".into(), vec![pool(PoolState::Filling)]);
    again(&mut lab);
    let refused = take(&mut lab, "one").unwrap_err().to_string();
    assert!(refused.contains("pool ssd of nodes/a takes nothing new"), "{refused}");
    lab.pools.insert("a".into(), vec![pool(PoolState::Ready)]);
    again(&mut lab);

    for n in 0..snapshot::SNAPSHOTS_MAX {
        let held = SnapshotRecord {
            id: format!("s{n}"),
            domain: "vm".into(),
            domain_uid: lab.domain("vm").uid,
            node: "a".into(),
            state: SnapshotState::Ready.into(),
            ..SnapshotRecord::default()
        };
        assert!(lab.commit(&Txn::new().put(&held)));
    }
    let refused = take(&mut lab, "one").unwrap_err().to_string();
    assert!(refused.contains("has 64 snapshots"), "{refused}");
    // A node that is lost.
    lab.pass_time(20_000);
    lab.settle();
    let refused = take(&mut lab, "one").unwrap_err().to_string();
    assert!(refused.contains("domains/vm is LOST"), "{refused}");
}

#[test]
fn restoring_puts_new_volumes_in_the_place_of_the_old() {
    let mut lab = stopped();
    taken(&mut lab, "one");
    let (before, generation) = (volume(&lab), lab.domain("vm").generation_id);
    // It has grown since.
    let grown = VolumeRecord { size_bytes: 2 * before.size_bytes, ..before.clone() };
    assert!(lab.commit(&Txn::new().put(&grown)));

    let operation = restore(&mut lab, "one").unwrap();
    lab.settle();
    let now = volume(&lab);
    assert_ne!(now.uid, before.uid);
    assert_eq!((now.state(), now.size_bytes), (VolumeState::Creating, grown.size_bytes));
    assert_ne!(lab.domain("vm").generation_id, generation);
    assert_eq!(garbage(&lab), [format!("a/{}", before.uid)]);
    let wanted = lab.level("a").volumes.remove(0);
    let source = wanted.snapshot.unwrap();
    assert!(wanted.create && wanted.image_digest.is_empty());
    assert_eq!(source.snapshot_uid, parts(&lab, "one")[0]);
    assert_eq!(source.volume_uid, before.uid);
    // Not while it is needed; and what is gone is gone.
    let refused = delete(&mut lab, "one").unwrap_err().to_string();
    assert!(refused.contains("volumes/vm-0 is being filled with it"), "{refused}");
    assert!(lab.cancel(&operation.id).is_err());
    let start = lab.with(|cx| begin::start_domain(cx, &DomainId::trusted("vm"), false).map(split));
    assert!(matches!(start, Err(Refusal::Busy { .. })));

    says(&mut lab, "a", VolumeState::Ready);
    again(&mut lab);
    let held = lab.operation(&operation.id);
    assert_eq!(held.state(), OperationState::Succeeded, "{held:?}");
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
    assert_eq!(row(&lab, "one").unwrap().state(), SnapshotState::Ready);
    // As often as one likes.
    restore(&mut lab, "one").unwrap();
}

#[test]
fn a_restore_that_fails_is_said_and_may_still_come_true() {
    let mut lab = stopped();
    taken(&mut lab, "one");
    let operation = restore(&mut lab, "one").unwrap();
    lab.settle();
    says(&mut lab, "a", VolumeState::Failed);
    again(&mut lab);
    let held = lab.operation(&operation.id);
    assert_eq!(ended(&held), (OperationState::Failed, "RESTORE_FAILED".into()));
    assert!(held.error.unwrap().message.contains("volumes/vm-0: said so"));
    assert!(lab.level("a").volumes[0].create, "its agent goes on trying");
}

#[test]
fn a_snapshot_stays_where_it_is() {
    let mut lab = stopped();
    taken(&mut lab, "one");
    taken(&mut lab, "two");
    let node = NodeId::trusted("a");
    let plan = {
        let world = lab.world();
        drain::propose_drain(&lab.context(&world), &node, &limits(), Strategy::BestFit).unwrap()
    };
    let reason = &plan.moves[0].reason;
    assert!(reason.ends_with("; its 2 snapshots stay on nodes/a"), "{reason}");
    let operation = lab.migrate("vm", "b").unwrap();
    let text = "nodes/b copies its volumes; its 2 snapshots stay on nodes/a";
    assert_eq!(operation.status_message, text);
    lab.settle();
    says(&mut lab, "b", VolumeState::Ready);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(lab.domain("vm").node, "b");
    // The source still has them in its level, and is told of nothing else.
    assert_eq!(lab.level("a").snapshots.len(), 2);
    lab.volumes.remove("a");
    lab.report("a", vec![]);
    lab.settle();
    let refused = restore(&mut lab, "one").unwrap_err().to_string();
    assert!(refused.contains("migrate the stopped domain to nodes/a first"), "{refused}");

    // The node cannot be forgotten with them.
    std::sync::Arc::make_mut(lab.observed.nodes.get_mut(&node).unwrap()).connected = false;
    let forget = |lab: &mut Lab| lab.with(|cx| nodes::delete_node(cx, &node, "").map(|t| (t, ())));
    let refused = forget(&mut lab).unwrap_err().to_string();
    assert!(refused.contains("snapshots/one, snapshots/two"), "{refused}");

    // The domain's deletion takes them along, wherever they are.
    let uids = [parts(&lab, "one"), parts(&lab, "two")].concat();
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::delete_domain(cx, &id, "", false).map(split)).unwrap();
    lab.report("b", vec![]);
    lab.settle();
    assert!(row(&lab, "one").is_none() && row(&lab, "two").is_none());
    assert!(uids.iter().all(|uid| garbage(&lab).contains(&format!("a/{uid}"))));
    assert!(lab.level("a").snapshots.is_empty());
    // Its parts are not awaited any more once the node is forgotten.
    std::sync::Arc::make_mut(lab.observed.nodes.get_mut(&node).unwrap()).connected = false;
    forget(&mut lab).unwrap();
    lab.settle();
    assert!(garbage(&lab).iter().all(|id| !id.starts_with("a/")));
}

/// What a snapshot does not hold, or holds of a disk that the domain has no more, is left alone.
#[test]
fn only_what_is_still_a_disk_is_put_back() {
    let mut lab = stopped();
    taken(&mut lab, "one");
    let id = crate::model::VolumeId::trusted("vm-0");
    lab.with(|cx| volumes::detach_volume(cx, &id, "").map(|txn| (txn, ()))).unwrap();
    lab.settle();
    let before = volume(&lab);
    let refused = restore(&mut lab, "one").unwrap_err().to_string();
    assert!(refused.contains("holds volumes/vm-0, none of which is a disk"), "{refused}");
    assert_eq!(volume(&lab), before);
}

/// An operation that is not there any more must not leave one CREATING.
#[test]
fn one_that_nobody_takes_goes() {
    let mut lab = running();
    let operation = take(&mut lab, "one").unwrap();
    lab.settle();
    let uids = parts(&lab, "one");
    assert!(lab.commit(&Txn::new().delete::<OperationRecord>(operation.id)));
    lab.settle();
    assert!(row(&lab, "one").is_none());
    let part = ObservedSnapshot { uid: uids[0].clone(), ..ObservedSnapshot::default() };
    lab.snapshots.insert("a".into(), vec![part]);
    is_gone_also_late(&mut lab, &uids);
}
