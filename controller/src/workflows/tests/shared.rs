//! Pools that several nodes share: nothing is copied between those nodes, nothing is removed
//! because one of them gave something up, and what is in such a pool counts once.

use drover_proto::agent::v1::{
    MigrationProgress as P, MigrationRole, ObservedPool, ObservedState as S,
};
use drover_proto::v1::{Disk, DomainState, OperationState, PoolState, SnapshotState, VolumeState};

use super::disks::{garbage, pool, says, volume};
use super::lab::{Lab, MIB, Observe, new_domain, split};
use crate::model::{DomainId, NodeId, SnapshotPart, SnapshotRecord, VolumeRecord};
use crate::scheduler::{DrainOptions, plan_drain};
use crate::store::Txn;
use crate::workflows::begin;

const GIB: u64 = 1 << 30;
const UID: &str = "0b6c9c0e-0000-4000-8000-000000000001";

fn shared() -> ObservedPool {
    ObservedPool { shared_uid: UID.into(), ..pool(PoolState::Ready) }
}

/// Nodes `a` and `b` share a pool of 10 GiB, `c` has one of its own by the same id; `vm` runs on
/// `a` with a volume of 2 GiB.
fn running() -> Lab {
    let mut lab = Lab::new();
    for name in ["a", "b", "c"] {
        let its = if name == "c" { pool(PoolState::Ready) } else { shared() };
        lab.pools.insert(name.into(), vec![its]);
        lab.hello(name, "boot-1");
    }
    // Before the rows say which pool it is, nothing is placed in it.
    let refused = create(&mut lab, "vm").unwrap_err();
    assert!(refused.contains("pool ssd is not known well enough yet"), "{refused}");
    lab.settle();
    assert_eq!(lab.node("a").shared_pools["ssd"], UID);
    assert!(lab.node("c").shared_pools.is_empty());
    create(&mut lab, "vm").unwrap();
    says(&mut lab, "a", VolumeState::Ready);
    let domain = lab.observed("vm", 1, S::Running);
    lab.report("a", vec![domain]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    lab
}

fn create(lab: &mut Lab, id: &str) -> Result<(), String> {
    let mut new = new_domain(id, Some("a"));
    new.spec.disks = vec![Disk { size_bytes: 2 * GIB, ..Disk::default() }];
    let created = lab.with(|cx| begin::create_domain(cx, &new).map(split));
    created.map(|_| ()).map_err(|err| err.to_string())
}

fn stopped() -> Lab {
    let mut lab = running();
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::stop_domain(cx, &id, 0).map(split)).unwrap();
    let stopped = lab.observed("vm", 1, S::Stopped);
    lab.report("a", vec![stopped]);
    lab.settle();
    lab
}

/// A snapshot of its volume, on `a`.
fn with_snapshot(lab: &mut Lab) {
    let (domain, volume) = (lab.domain("vm"), volume(lab));
    let part = SnapshotPart {
        uid: "part".into(),
        volume: volume.id,
        volume_uid: volume.uid,
        pool: volume.pool,
        size_bytes: volume.size_bytes,
    };
    let row = SnapshotRecord {
        id: "one".into(),
        domain: domain.id,
        domain_uid: domain.uid,
        node: "a".into(),
        state: SnapshotState::Ready.into(),
        parts: vec![part],
        ..SnapshotRecord::default()
    };
    assert!(lab.commit(&Txn::new().put(&row)));
}

fn promised(lab: &Lab) -> [u64; 3] {
    let view = lab.world().cluster_view(&lab.observed);
    ["a", "b", "c"].map(|node| view.nodes[&NodeId::trusted(node)].pools["ssd"].promised_bytes / GIB)
}

/// `b` takes it over, and both ends say so.
fn switches_over(lab: &mut Lab, id: &str, epoch: u64) {
    says(lab, "b", VolumeState::Ready);
    let listening = lab.observed("vm", epoch, S::Incoming);
    let listening = listening.migrating(id, MigrationRole::Destination, P::Listening);
    lab.report("b", vec![listening]);
    lab.settle();
    let ran = lab.observed("vm", epoch, S::Running);
    lab.report("b", vec![ran.migrating(id, MigrationRole::Destination, P::Succeeded)]);
    let over = lab.observed("vm", 1, S::HandedOver);
    lab.report("a", vec![over.migrating(id, MigrationRole::Source, P::Succeeded)]);
    lab.settle();
}

#[test]
fn a_running_domain_moves_without_its_volume() {
    let mut lab = running();
    with_snapshot(&mut lab);
    assert_eq!(promised(&lab), [2, 2, 0]);
    let operation = lab.migrate("vm", "b").unwrap();
    assert_eq!(operation.status_message, "nodes/b prepares", "nothing stays behind");
    lab.settle();
    assert_eq!(promised(&lab), [2, 2, 0], "once, on its way too");
    let there = lab.level("b").volumes;
    assert!(!there[0].create && there[0].copy_from.is_empty(), "{there:?}");
    assert_eq!(there[0].shared_uid, UID);
    switches_over(&mut lab, &operation.id, 2);
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    assert_eq!(lab.domain("vm").node, "b");
    assert!(garbage(&lab).is_empty());
    assert_eq!((lab.level("a").snapshots.len(), lab.level("b").snapshots.len()), (0, 1));
    // A late report of the source makes nothing garbage either.
    says(&mut lab, "a", VolumeState::Ready);
    lab.report("a", vec![]);
    lab.settle();
    assert!(garbage(&lab).is_empty());
}

/// Also where the source is lost meanwhile, the leader is new and nobody reports pools.
#[test]
fn what_is_shared_is_known_from_the_rows() {
    let mut lab = running();
    let id = lab.migrate("vm", "b").unwrap().id;
    lab.settle();
    lab.term += 1;
    lab.leader_since_ms = lab.now.mono_ms;
    lab.observed = Default::default();
    lab.pools.clear();
    for name in ["a", "b"] {
        lab.hello(name, "boot-1");
    }
    switches_over(&mut lab, &id, 2);
    assert_eq!(lab.domain("vm").node, "b");
    assert!(garbage(&lab).is_empty());
    assert_eq!(lab.node("a").shared_pools["ssd"], UID);
}

#[test]
fn a_move_that_fails_removes_nothing() {
    let mut lab = running();
    let id = lab.migrate("vm", "b").unwrap().id;
    lab.settle();
    // What the nodes call their pools now does not matter any more.
    lab.pools.insert("b".into(), vec![pool(PoolState::Ready)]);
    let failed =
        lab.observed("vm", 2, S::Failed).migrating(&id, MigrationRole::Destination, P::Failed);
    lab.report("b", vec![failed]);
    lab.settle();
    assert_eq!(lab.operation(&id).state(), OperationState::Failed);
    assert!(garbage(&lab).is_empty());
    assert_eq!(lab.domain("vm").node, "a");
}

/// A pool by the same id is not the same pool.
#[test]
fn to_another_pool_it_goes_only_when_it_is_stopped() {
    let mut lab = running();
    let refused = lab.migrate("vm", "c").unwrap_err().to_string();
    assert!(refused.contains("pool ssd is shared, but not with it; stop the domain"), "{refused}");

    let mut lab = stopped();
    with_snapshot(&mut lab);
    let uid = volume(&lab).uid;
    let operation = lab.migrate("vm", "c").unwrap();
    let stays = "nodes/c copies its volumes; its snapshot stays on nodes/a";
    assert_eq!(operation.status_message, stays);
    lab.settle();
    assert_eq!(lab.level("c").volumes[0].copy_from, "a:7401");
    assert_eq!(promised(&lab), [2, 2, 2]);
    says(&mut lab, "c", VolumeState::Ready);
    lab.report("c", vec![]);
    lab.settle();
    assert_eq!(lab.domain("vm").node, "c");
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    assert_eq!(lab.level("a").garbage[0].shared_uid, UID);
    assert_eq!(lab.level("a").snapshots.len(), 1);
}

#[test]
fn a_stopped_domain_moves_when_its_volume_was_seen_there() {
    let mut lab = stopped();
    with_snapshot(&mut lab);
    let operation = lab.migrate("vm", "b").unwrap();
    assert_eq!(operation.status_message, "nodes/b looks for its volumes");
    lab.settle();
    let there = lab.level("b").volumes;
    assert!(!there[0].create && there[0].copy_from.is_empty(), "{there:?}");
    says(&mut lab, "b", VolumeState::Ready);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    assert_eq!(lab.domain("vm").node, "b");
    assert!(garbage(&lab).is_empty());
    assert_eq!(lab.level("b").snapshots.len(), 1);

    // And back, where it is not found: it stays.
    let operation = lab.migrate("vm", "a").unwrap();
    lab.settle();
    says(&mut lab, "a", VolumeState::Failed);
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Failed);
    assert_eq!(lab.domain("vm").node, "b");
    assert!(garbage(&lab).is_empty());
}

/// One of its disks is the node's own.
#[test]
fn what_is_local_is_copied_beside_what_is_shared() {
    let mut lab = Lab::new();
    for name in ["a", "b"] {
        let own = ObservedPool { id: "own".into(), ..pool(PoolState::Ready) };
        lab.pools.insert(name.into(), vec![own, shared()]);
        lab.hello(name, "boot-1");
    }
    lab.settle();
    let mut new = new_domain("vm", Some("a"));
    let disk = |pool: &str| Disk { size_bytes: GIB, pool: pool.into(), ..Disk::default() };
    new.spec.disks = vec![disk("own"), disk("ssd")];
    lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap();
    let rows = ["vm-0", "vm-1"].map(|id| lab.view().get::<VolumeRecord>(id).unwrap().value);
    let said = rows.iter().map(|row| drover_proto::agent::v1::ObservedVolume {
        uid: row.uid.clone(),
        pool: row.pool.clone(),
        state: VolumeState::Ready.into(),
        ..Default::default()
    });
    let said: Vec<_> = said.collect();
    lab.volumes.insert("a".into(), said.clone());
    let domain = lab.observed("vm", 1, S::Running);
    lab.report("a", vec![domain]);
    lab.settle();

    let plan = plan_drain(
        &lab.world().cluster_view(&lab.observed),
        &NodeId::trusted("a"),
        &DrainOptions::default(),
    );
    let line = &plan.moves[0].reason;
    assert!(line.ends_with("; some of its disks are shared and not copied"), "{line}");
    let id = lab.migrate("vm", "b").unwrap().id;
    lab.settle();
    let made: Vec<bool> = lab.level("b").volumes.iter().map(|volume| volume.create).collect();
    assert_eq!(made, [true, false]);
    lab.volumes.insert("b".into(), said);
    let listening = lab.observed("vm", 2, S::Incoming);
    let listening = listening.migrating(&id, MigrationRole::Destination, P::Listening);
    lab.report("b", vec![listening]);
    lab.settle();
    let ran = lab.observed("vm", 2, S::Running);
    lab.report("b", vec![ran.migrating(&id, MigrationRole::Destination, P::Succeeded)]);
    let over = lab.observed("vm", 1, S::HandedOver);
    lab.report("a", vec![over.migrating(&id, MigrationRole::Source, P::Succeeded)]);
    lab.settle();
    assert_eq!(garbage(&lab), [format!("a/{}", rows[0].uid)]);
}

/// The node that should is away: another one that shares the pool removes it. The row of the one
/// that is away stays until it has a say: it might be about to make it.
#[test]
fn whoever_is_there_removes_it() {
    let mut lab = stopped();
    let uid = volume(&lab).uid;
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::delete_domain(cx, &id, "", true).map(split)).unwrap();
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    let lease_ms = lab.settings.lease_ms + 1000;
    lab.pass_time(lease_ms);
    for name in ["b", "c"] {
        lab.beat(name);
    }
    lab.settle();
    assert_eq!(garbage(&lab), [format!("a/{uid}"), format!("b/{uid}")]);
    assert_eq!(lab.level("b").garbage[0].shared_uid, UID);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    lab.volumes.remove("a");
    lab.report("a", vec![]);
    lab.settle();
    assert!(garbage(&lab).is_empty());
}

/// Room is promised once for all of them.
#[test]
fn a_shared_pool_is_full_for_all() {
    let mut lab = running();
    for id in ["vm2", "vm3", "vm4", "vm5"] {
        create(&mut lab, id).unwrap();
    }
    assert_eq!(promised(&lab), [10, 10, 0]);
    let mut new = new_domain("vm6", Some("b"));
    new.spec.disks = vec![Disk { size_bytes: MIB, ..Disk::default() }];
    let refused = lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap_err();
    assert!(refused.to_string().contains("needs 1 MiB in pool ssd, 0 MiB of"), "{refused}");
    // What is in it already needs no more to move, and says so.
    let plan = plan_drain(
        &lab.world().cluster_view(&lab.observed),
        &NodeId::trusted("a"),
        &DrainOptions::default(),
    );
    let line = plan.moves.iter().find(|line| line.domain.as_str() == "vm").unwrap();
    assert_eq!(line.to, Some(NodeId::trusted("b")));
    assert!(line.reason.ends_with("; its disks are shared, none is copied"), "{}", line.reason);
}
