//! Domains with volumes: who shall make them, who may have them, and what becomes garbage when.

use drover_proto::agent::v1::{
    Garbage, MigrationProgress as P, MigrationRole, ObservedImage, ObservedPool,
    ObservedState as S, ObservedVolume,
};
use drover_proto::v1::{Disk, DomainState, Image, OperationState, PoolState, VolumeState};

use super::lab::{Lab, MIB, Observe, new_domain, split};
use crate::model::{GarbageRecord, ImageId, ImageRecord, NodeId, VolumeRecord};
use crate::store::Txn;
use crate::workflows::{Refusal, begin, image};

const DIGEST: &str = "d1";

/// Nodes `a` and `b` with a pool of 10 GiB each, and an image of 1 GiB that lies on `a`.
pub(super) fn lab() -> Lab {
    let mut lab = Lab::new();
    for name in ["a", "b"] {
        lab.pools.insert(name.into(), vec![pool(PoolState::Ready)]);
    }
    let image = ObservedImage { digest: DIGEST.into(), size_bytes: 1024 * MIB, pool: "ssd".into() };
    lab.images.insert("a".into(), vec![image]);
    let record = ImageRecord {
        id: "debian".into(),
        digest: DIGEST.into(),
        size_bytes: 1024 * MIB,
        nodes: vec!["a".into()],
        ..ImageRecord::default()
    };
    assert!(lab.commit(&Txn::new().put(&record)));
    for name in ["a", "b"] {
        lab.hello(name, "boot-1");
    }
    lab
}

pub(super) fn pool(state: PoolState) -> ObservedPool {
    ObservedPool {
        id: "ssd".into(),
        state: state.into(),
        size_bytes: 10 * 1024 * MIB,
        overcommit: 1.0,
        ..ObservedPool::default()
    }
}

fn create(lab: &mut Lab, id: &str, node: Option<&str>, gib: u64) -> Result<String, Refusal> {
    let mut new = new_domain(id, node);
    let image = "images/debian".to_owned();
    new.spec.disks = vec![Disk { image, size_bytes: gib * 1024 * MIB, ..Disk::default() }];
    lab.with(|cx| begin::create_domain(cx, &new).map(split)).map(|operation| operation.id)
}

pub(super) fn volume(lab: &Lab) -> VolumeRecord {
    lab.view().get::<VolumeRecord>("vm-0").unwrap().value
}

/// The node's agent has this to say of the volume.
pub(super) fn says(lab: &mut Lab, node: &str, state: VolumeState) {
    let volume = volume(lab);
    let said = ObservedVolume {
        uid: volume.uid,
        pool: volume.pool,
        state: state.into(),
        state_reason: "said so".into(),
        ..ObservedVolume::default()
    };
    lab.volumes.insert(node.into(), vec![said]);
}

/// `vm` runs on `a` with a volume of 2 GiB.
pub(super) fn running() -> Lab {
    let mut lab = lab();
    create(&mut lab, "vm", Some("a"), 2).unwrap();
    says(&mut lab, "a", VolumeState::Ready);
    let domain = lab.observed("vm", 1, S::Running);
    lab.report("a", vec![domain]);
    lab.settle();
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    lab
}

pub(super) fn garbage(lab: &Lab) -> Vec<String> {
    lab.view().all::<GarbageRecord>().map(|row| row.value.id).collect()
}

#[test]
fn a_volume_is_made_once() {
    let mut lab = lab();
    create(&mut lab, "vm", Some("b"), 2).unwrap();
    let held = volume(&lab);
    assert_eq!((held.state(), held.pool.as_str()), (VolumeState::Creating, "ssd"));
    let level = lab.level("b");
    let wanted = &level.volumes[0];
    assert!(wanted.create);
    assert_eq!(wanted.image_digest, DIGEST);
    assert_eq!(wanted.image_sources, ["a:7401"]);
    assert_eq!(level.domains[0].disks[0].volume_uid, wanted.uid);

    says(&mut lab, "b", VolumeState::Ready);
    let starting = lab.observed("vm", 1, S::Starting);
    lab.report("b", vec![starting]);
    lab.settle();
    assert_eq!(volume(&lab).state(), VolumeState::Ready);
    // From now on a missing one is lost data, and is not made anew.
    assert!(!lab.level("b").volumes[0].create);
    says(&mut lab, "b", VolumeState::Failed);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(volume(&lab).state(), VolumeState::Failed);
    assert!(lab.events().contains(&"VOLUME_FAILED".to_owned()));
}

#[test]
fn deleting_the_domain_makes_its_volume_garbage_until_the_agent_says_it_is_gone() {
    let mut lab = running();
    let uid = volume(&lab).uid;
    let id = crate::model::DomainId::trusted("vm");
    lab.with(|cx| begin::delete_domain(cx, &id, "", true).map(split)).unwrap();
    lab.settle();
    assert!(lab.level("a").volumes.is_empty());
    assert!(garbage(&lab).is_empty(), "the guest may still run");

    lab.report("a", vec![]);
    lab.settle();
    assert!(lab.view().get::<VolumeRecord>("vm-0").is_none());
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    let listed = Garbage { pool: "ssd".into(), volume_uid: uid, ..Garbage::default() };
    assert_eq!(lab.level("a").garbage, [listed]);

    // The report still has it, then it has not.
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(garbage(&lab).len(), 1);
    lab.volumes.clear();
    lab.report("a", vec![]);
    lab.settle();
    assert!(garbage(&lab).is_empty());
}

#[test]
fn a_migration_leaves_one_copy() {
    let mut lab = running();
    let uid = volume(&lab).uid;
    let id = lab.migrate("vm", "b").unwrap().id;
    lab.settle();
    let arriving = lab.level("b").volumes;
    assert!(arriving[0].create && arriving[0].image_digest.is_empty(), "{arriving:?}");
    assert!(!lab.level("a").volumes[0].create);

    // The destination fails: what it made is garbage, what the source has is not.
    let failed =
        lab.observed("vm", 2, S::Failed).migrating(&id, MigrationRole::Destination, P::Failed);
    lab.report("b", vec![failed]);
    lab.settle();
    assert_eq!(lab.operation(&id).state(), OperationState::Failed);
    assert_eq!(garbage(&lab), [format!("b/{uid}")]);
    assert!(lab.level("b").volumes.is_empty());

    // A second try waits until it is gone.
    says(&mut lab, "b", VolumeState::Ready);
    lab.report("b", vec![]);
    let refused = lab.migrate("vm", "b").unwrap_err().to_string();
    assert!(refused.contains("has yet to remove an earlier copy of volumes/vm-0"), "{refused}");
    lab.volumes.remove("b");
    lab.report("b", vec![]);
    lab.settle();

    // And succeeds: the source's copy is garbage, but not before the migration is settled.
    let id = lab.migrate("vm", "b").unwrap().id;
    lab.settle();
    says(&mut lab, "b", VolumeState::Ready);
    let listening = lab.observed("vm", 3, S::Incoming);
    let listening = listening.migrating(&id, MigrationRole::Destination, P::Listening);
    lab.report("b", vec![listening]);
    lab.settle();
    assert!(!lab.level("b").volumes[0].create, "a copy that vanishes now is not made anew");
    let ran = lab.observed("vm", 3, S::Running);
    lab.report("b", vec![ran.migrating(&id, MigrationRole::Destination, P::Succeeded)]);
    let over = lab.observed("vm", 1, S::HandedOver);
    lab.report("a", vec![over.clone().migrating(&id, MigrationRole::Source, P::HandedOver)]);
    lab.settle();
    assert!(garbage(&lab).is_empty());
    lab.report("a", vec![over.migrating(&id, MigrationRole::Source, P::Succeeded)]);
    lab.settle();
    assert_eq!(lab.operation(&id).state(), OperationState::Succeeded);
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    assert_eq!(lab.domain("vm").node, "b");
}

#[test]
fn pools_bound_what_is_placed() {
    let mut lab = lab();
    create(&mut lab, "vm", Some("a"), 8).unwrap();
    let refused = create(&mut lab, "vm2", Some("a"), 3).unwrap_err().to_string();
    assert!(refused.contains("needs 3072 MiB in pool ssd, 2048 MiB of 10.0 GiB free"), "{refused}");
    create(&mut lab, "vm2", None, 3).unwrap();
    assert_eq!(lab.domain("vm2").node, "b");

    // Past its threshold it takes nothing, and that is an event, once.
    lab.pools.insert("b".into(), vec![pool(PoolState::Filling)]);
    lab.report("b", vec![]);
    lab.settle();
    let refused = create(&mut lab, "vm3", Some("b"), 1).unwrap_err().to_string();
    assert!(refused.contains("pool ssd is past its threshold"), "{refused}");
    let troubled = |lab: &Lab| lab.events().iter().filter(|e| *e == "POOL_TROUBLED").count();
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(troubled(&lab), 1);

    let refused = create(&mut lab, "small", None, 0).map(|_| ()).map_err(|e| e.to_string());
    assert_eq!(refused, Ok(()), "the image's size");
    let mut new = new_domain("vm4", None);
    new.spec.disks = vec![Disk { image: "images/none".into(), ..Disk::default() }];
    let refused = lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap_err();
    assert_eq!(refused, Refusal::NotFound { name: "images/none".into() });
    new.spec.disks = vec![Disk::default()];
    let refused = lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap_err();
    assert!(refused.to_string().contains("domain.spec.disks[0].size_bytes"), "{refused}");
    new.spec.disks =
        vec![Disk { image: "images/debian".into(), size_bytes: MIB, ..Disk::default() }];
    let refused = lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap_err();
    assert!(refused.to_string().contains("at least 1073741824"), "{refused}");
}

/// Its copies go from every node that has one, from one that is away when it is back; till then the
/// same content cannot come in there, as it would be removed.
#[test]
fn a_deleted_image_goes_from_nodes_that_are_away() {
    let mut lab = lab();
    let copy = ObservedImage { digest: DIGEST.into(), pool: "hdd".into(), ..Default::default() };
    lab.images.insert("b".into(), vec![copy]);
    lab.report("a", vec![]);
    lab.report("b", vec![]);
    lab.settle();
    // Nobody remembers what `b` has but the row.
    lab.observed.nodes.remove(&NodeId::trusted("b"));
    let id = ImageId::trusted("debian");
    lab.with(|cx| image::delete(cx, &id, "").map(|txn| (txn, ()))).unwrap();
    assert_eq!(garbage(&lab), [format!("a/{DIGEST}"), format!("b/{DIGEST}")]);
    let listed = Garbage { image_digest: DIGEST.into(), ..Garbage::default() };
    assert_eq!(lab.level("b").garbage, [listed], "from whichever pool");

    let said = Image { digest: DIGEST.into(), size_bytes: MIB, ..Image::default() };
    let import = |lab: &mut Lab, node| {
        let node = NodeId::trusted(node);
        lab.with(|cx| image::register(cx, &id, &node, &said).map(|txn| (txn, ())))
    };
    lab.images.remove("a");
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(garbage(&lab), [format!("b/{DIGEST}")], "it is away");
    let refused = import(&mut lab, "b").unwrap_err().to_string();
    assert!(refused.contains("nodes/b is still removing a deleted image"), "{refused}");
    import(&mut lab, "a").unwrap();

    // It is back with its copy, which is listed until a report comes without it.
    lab.hello("b", "boot-1");
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(garbage(&lab), [format!("b/{DIGEST}")]);
    lab.images.remove("b");
    lab.report("b", vec![]);
    lab.settle();
    assert!(garbage(&lab).is_empty());
}

/// A node that was forgotten with a copy, and is known again: the copy is old, and must be neither
/// taken for a blank volume nor kept.
#[test]
fn a_copy_that_nobody_knows_of_is_removed() {
    let mut lab = running();
    let uid = volume(&lab).uid;
    says(&mut lab, "b", VolumeState::Ready);
    lab.report("b", vec![]);
    let refused = lab.migrate("vm", "b").unwrap_err().to_string();
    assert!(refused.contains("has an earlier copy of volumes/vm-0"), "{refused}");
    lab.settle();
    assert_eq!(garbage(&lab), [format!("b/{uid}")]);
    assert!(lab.level("a").garbage.is_empty());
}
