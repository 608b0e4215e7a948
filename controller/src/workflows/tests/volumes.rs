//! Volumes that no domain has: where they are made, who gets them, and that nothing takes them for
//! what nobody knows.

use drover_proto::agent::v1::{MigrationProgress as P, MigrationRole};
use drover_proto::agent::v1::{ObservedState as S, ObservedVolume};
use drover_proto::v1::{DiskLimits, DomainState, OperationState, VolumeState};

use super::copies::stopped;
use super::disks::{garbage, lab};
use super::lab::{Lab, Observe, ended, split};
use crate::model::{DomainId, NodeId, OperationRecord, VolumeId, VolumeRecord};
use crate::store::Txn;
use crate::workflows::volumes::{self, Attached, NewVolume};
use crate::workflows::{Refusal, begin, nodes};

const GIB: u64 = 1 << 30;

fn new(id: &str, node: Option<&str>, gib: u64) -> NewVolume {
    NewVolume {
        id: VolumeId::trusted(id),
        pool: String::new(),
        size_bytes: gib * GIB,
        image: String::new(),
        only: node.map(NodeId::trusted),
    }
}

fn create(lab: &mut Lab, new: &NewVolume) -> Result<OperationRecord, Refusal> {
    lab.with(|cx| volumes::create_volume(cx, new).map(split))
}

fn attach(lab: &mut Lab, id: &str, domain: &str) -> Result<(), Refusal> {
    attach_as(lab, id, domain, &Attached::default())
}

fn attach_as(lab: &mut Lab, id: &str, domain: &str, how: &Attached) -> Result<(), Refusal> {
    let (id, domain) = (VolumeId::trusted(id), DomainId::trusted(domain));
    lab.with(|cx| volumes::attach_volume(cx, &id, &domain, how, "").map(|txn| (txn, ())))
}

fn detach(lab: &mut Lab, id: &str) -> Result<(), Refusal> {
    let id = VolumeId::trusted(id);
    lab.with(|cx| volumes::detach_volume(cx, &id, "").map(|txn| (txn, ())))
}

fn delete(lab: &mut Lab, id: &str) -> Result<(), Refusal> {
    let id = VolumeId::trusted(id);
    lab.with(|cx| volumes::delete_volume(cx, &id, "").map(|txn| (txn, ())))
}

fn row(lab: &Lab, id: &str) -> Option<VolumeRecord> {
    lab.view().get::<VolumeRecord>(id).map(|row| row.value)
}

/// The node has all of these volumes, and says this of them.
fn has(lab: &mut Lab, node: &str, ids: &[&str], state: VolumeState) {
    let said = |id: &&str| ObservedVolume {
        uid: row(lab, id).unwrap().uid,
        pool: "ssd".into(),
        state: state.into(),
        state_reason: "said so".into(),
        ..ObservedVolume::default()
    };
    let volumes = ids.iter().map(said).collect();
    lab.volumes.insert(node.into(), volumes);
}

/// `vm`, stopped on `a` with `vm-0`; and `data` beside it, of 1 GiB.
fn with_data() -> Lab {
    let mut lab = stopped();
    create(&mut lab, &new("data", Some("a"), 1)).unwrap();
    has(&mut lab, "a", &["vm-0", "data"], VolumeState::Ready);
    at_rest(&mut lab);
    assert_eq!(row(&lab, "data").unwrap().state(), VolumeState::Ready);
    lab
}

fn at_rest(lab: &mut Lab) {
    let mut said = lab.observed("vm", lab.domain("vm").epoch, S::Stopped);
    said.set_exit_reason(drover_proto::v1::ExitReason::Shutdown);
    lab.report("a", vec![said]);
    lab.settle();
}

#[test]
fn one_is_made_where_most_room_is() {
    let mut lab = lab();
    let on_b = create(&mut lab, &new("first", Some("b"), 4)).unwrap();
    assert_eq!(on_b.target, "volumes/first");
    // `b` has promised 4 GiB of its 10.
    let mut of_image = new("second", None, 0);
    of_image.image = "images/debian".into();
    create(&mut lab, &of_image).unwrap();
    let second = row(&lab, "second").unwrap();
    assert_eq!((second.node.as_str(), second.pool.as_str()), ("a", "ssd"));
    assert_eq!((second.size_bytes, second.image_digest.as_str()), (GIB, "d1"));
    let refused = create(&mut lab, &new("third", Some("b"), 7)).unwrap_err().to_string();
    let text = "no node can take it: b: needs 7168 MiB in pool ssd, 6144 MiB of 10.0 GiB free";
    assert_eq!(refused, text);

    let wanted = lab.level("b").volumes;
    assert!(wanted.len() == 1 && wanted[0].create);
    has(&mut lab, "b", &["first"], VolumeState::Ready);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&on_b.id).state(), OperationState::Succeeded);
    // One that is missing later is lost, and not made anew.
    assert!(!lab.level("b").volumes[0].create);
    has(&mut lab, "b", &["first"], VolumeState::Failed);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(row(&lab, "first").unwrap().state(), VolumeState::Failed);

    let taken = create(&mut lab, &new("first", None, 1)).unwrap_err();
    assert_eq!(taken, Refusal::AlreadyExists { name: "volumes/first".into() });
    let blank = create(&mut lab, &new("none", None, 0)).unwrap_err().to_string();
    assert!(blank.starts_with("volume.size_bytes: "), "{blank}");
    let node = create(&mut lab, &new("none", Some("z"), 1)).unwrap_err();
    assert_eq!(node, Refusal::NotFound { name: "nodes/z".into() });
}

#[test]
fn one_that_cannot_be_made_leaves_nothing() {
    for how in ["failed", "cancelled", "lost", "late"] {
        let mut lab = lab();
        let operation = create(&mut lab, &new("data", Some("a"), 1)).unwrap();
        lab.settle();
        let uid = row(&lab, "data").unwrap().uid;
        assert!(matches!(delete(&mut lab, "data"), Err(Refusal::Busy { .. })));
        let (state, reason) = match how {
            "failed" => {
                has(&mut lab, "a", &["data"], VolumeState::Failed);
                lab.report("a", vec![]);
                (OperationState::Failed, "VOLUME_FAILED")
            }
            "cancelled" => {
                lab.cancel(&operation.id).unwrap();
                (OperationState::Cancelled, "CANCELLED")
            }
            "lost" => {
                lab.pass_time(20_000);
                (OperationState::Failed, "NODE_LOST")
            }
            _ => {
                lab.pass_time(61 * 60_000);
                lab.beat("a");
                lab.beat("b");
                (OperationState::Failed, "DEADLINE_EXCEEDED")
            }
        };
        lab.settle();
        let held = lab.operation(&operation.id);
        assert_eq!(ended(&held), (state, reason.to_owned()), "{how}: {held:?}");
        assert!(row(&lab, "data").is_none());
        assert_eq!(garbage(&lab), [format!("a/{uid}")]);
        assert!(lab.level("a").volumes.is_empty());
    }
}

#[test]
fn a_domain_gets_it_as_its_last_disk_and_gives_it_back() {
    let mut lab = with_data();
    attach(&mut lab, "data", "vm").unwrap();
    lab.settle();
    let level = lab.level("a");
    assert_eq!(level.domains[0].disks.len(), 2);
    assert_eq!(level.domains[0].disks[1].volume_uid, row(&lab, "data").unwrap().uid);
    assert_eq!(level.volumes.len(), 2);
    assert_eq!(lab.world().promised(&NodeId::trusted("a"))["ssd"], 3 * GIB);
    let refused = delete(&mut lab, "data").unwrap_err().to_string();
    assert!(refused.contains("belongs to domains/vm: detach it first"), "{refused}");
    let refused = attach(&mut lab, "data", "vm").unwrap_err().to_string();
    assert!(refused.contains("belongs to domains/vm"), "{refused}");
    let refused = detach(&mut lab, "vm-0").unwrap_err().to_string();
    assert!(refused.contains("detach the others first"), "{refused}");

    detach(&mut lab, "data").unwrap();
    lab.settle();
    let level = lab.level("a");
    assert_eq!((level.domains[0].disks.len(), level.volumes.len()), (1, 2));
    assert_eq!(lab.world().promised(&NodeId::trusted("a"))["ssd"], 3 * GIB);
    assert_eq!(row(&lab, "data").unwrap().node, "a");
    assert!(detach(&mut lab, "data").unwrap_err().to_string().contains("no domain has"));
    // The only one may go, too.
    detach(&mut lab, "vm-0").unwrap();
    at_rest(&mut lab);
    assert!(garbage(&lab).is_empty());
    assert_eq!(lab.level("a").volumes.len(), 2);

    // The domain goes without them.
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::delete_domain(cx, &id, "", false).map(split)).unwrap();
    lab.report("a", vec![]);
    lab.settle();
    assert!(lab.view().get::<crate::model::DomainRecord>("vm").is_none());
    assert!(garbage(&lab).is_empty());
    let node = NodeId::trusted("a");
    let refused = lab.with(|cx| nodes::delete_node(cx, &node, "").map(|txn| (txn, ())));
    assert!(refused.unwrap_err().to_string().contains("holds volumes/data, volumes/vm-0"));

    let uid = row(&lab, "data").unwrap().uid;
    delete(&mut lab, "data").unwrap();
    assert_eq!(garbage(&lab), [format!("a/{uid}")]);
    lab.volumes.clear();
    lab.report("a", vec![]);
    lab.settle();
    assert!(garbage(&lab).is_empty());
}

#[test]
fn a_domain_takes_what_it_has_along() {
    let mut lab = with_data();
    attach(&mut lab, "data", "vm").unwrap();
    let operation = lab.migrate("vm", "b").unwrap();
    lab.settle();
    assert_eq!(lab.level("b").volumes.len(), 2);
    has(&mut lab, "b", &["vm-0"], VolumeState::Ready);
    lab.report("b", vec![]);
    lab.settle();
    let held = lab.operation(&operation.id);
    assert_eq!(held.status_message, "nodes/b copies its volumes: 1 of 2 are there");
    has(&mut lab, "b", &["vm-0", "data"], VolumeState::Ready);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    assert_eq!(garbage(&lab).len(), 2);
    // Left there, it is there, and the old copy goes from where it was.
    detach(&mut lab, "data").unwrap();
    lab.settle();
    assert_eq!(row(&lab, "data").unwrap().node, "b");
    let refused = attach_after_moving_back(&mut lab);
    assert!(refused.contains("migrate the stopped domain to nodes/b first"), "{refused}");

    // What goes with the domain is what it has.
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::delete_domain(cx, &id, "", false).map(split)).unwrap();
    lab.report("a", vec![]);
    lab.report("b", vec![]);
    lab.settle();
    assert!(row(&lab, "vm-0").is_none());
    assert!(row(&lab, "data").is_some());
}

/// `vm` goes back to `a` without `data`.
fn attach_after_moving_back(lab: &mut Lab) -> String {
    lab.volumes.remove("a");
    lab.report("a", vec![]);
    lab.settle();
    assert!(garbage(lab).is_empty());
    let operation = lab.migrate("vm", "a").unwrap();
    lab.settle();
    has(lab, "a", &["vm-0"], VolumeState::Ready);
    lab.report("a", vec![]);
    lab.settle();
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    attach(lab, "data", "vm").unwrap_err().to_string()
}

/// A copy elsewhere of what a domain had and has no more is garbage where it was said to be, and
/// one that lies where its row says is never a stray.
#[test]
fn what_no_domain_has_is_no_stray() {
    let mut lab = with_data();
    for _ in 0..3 {
        lab.pass_time(5_000);
        at_rest(&mut lab);
        lab.report("b", vec![]);
        lab.settle();
    }
    attach(&mut lab, "data", "vm").unwrap();
    // A report from before it knew, and one from after.
    lab.report_knowing("a", 1, vec![]);
    lab.settle();
    at_rest(&mut lab);
    detach(&mut lab, "data").unwrap();
    lab.report_knowing("a", 1, vec![]);
    lab.settle();
    at_rest(&mut lab);
    assert!(garbage(&lab).is_empty());
}

/// `vm` runs, and its VMM has these disks (one that is going is named so); `error`: what it says
/// of one that it cannot attach or detach.
fn runs(lab: &mut Lab, disks: &[(&str, bool)], error: &str) {
    let mut said = lab.observed("vm", lab.domain("vm").epoch, S::Running);
    said.disks_known = true;
    said.disk_error = error.into();
    let disk = |(id, detaching): &(&str, bool)| {
        let serial = row(lab, id).unwrap().serial;
        drover_proto::agent::v1::ObservedDisk { serial, detaching: *detaching }
    };
    said.disks = disks.iter().map(disk).collect();
    lab.report("a", vec![said]);
    lab.settle();
}

fn running() -> Lab {
    let mut lab = with_data();
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::start_domain(cx, &id, false).map(split)).unwrap();
    runs(&mut lab, &[("vm-0", false)], "");
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    lab
}

/// What holds `vm`.
fn held(lab: &Lab) -> OperationRecord {
    let id = lab.domain("vm").operation;
    lab.operation(&id)
}

/// What `vm`'s node is told of its disks: their slots.
fn told(lab: &mut Lab) -> Vec<u32> {
    let level = lab.level("a");
    let domain = &level.domains[0];
    assert_eq!(domain.spec.as_ref().unwrap().disks.len(), domain.disks.len());
    assert_eq!(level.volumes.len(), 2, "none is forgotten in between");
    domain.disks.iter().map(|disk| disk.slot).collect()
}

/// A guest that runs gets it, and lets go of it when it likes; what it had from the start stays
/// where it was.
#[test]
fn a_running_domain_gets_it_and_gives_it_back() {
    let mut lab = running();
    assert_eq!(told(&mut lab), [16]);
    attach(&mut lab, "data", "vm").unwrap();
    let operation = held(&lab);
    assert_eq!((operation.target.as_str(), operation.volume.as_str()), ("domains/vm", "data"));
    assert_eq!(told(&mut lab), [16, 17]);
    assert!(matches!(lab.migrate("vm", "b"), Err(Refusal::Busy { .. })));
    assert!(matches!(detach(&mut lab, "data"), Err(Refusal::Busy { .. })));
    // A VMM that does not answer has said nothing.
    let silent = lab.observed("vm", lab.domain("vm").epoch, S::Running);
    lab.report("a", vec![silent]);
    lab.settle();
    runs(&mut lab, &[("vm-0", false)], "");
    assert_eq!(held(&lab).state(), OperationState::Running);
    runs(&mut lab, &[("vm-0", false), ("data", false)], "");
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);

    let refused = detach(&mut lab, "vm-0").unwrap_err().to_string();
    assert!(refused.contains("detach the others first"), "{refused}");
    detach(&mut lab, "data").unwrap();
    let operation = held(&lab);
    assert_eq!(told(&mut lab), [16]);
    assert_eq!(row(&lab, "data").unwrap().domain, "vm", "its guest may still write to it");
    assert!(delete(&mut lab, "data").is_err());
    let silent = lab.observed("vm", lab.domain("vm").epoch, S::Running);
    lab.report("a", vec![silent]);
    lab.settle();
    runs(&mut lab, &[("vm-0", false), ("data", true)], "");
    let words = held(&lab).status_message;
    assert_eq!(words, "waits for the guest to let go of volumes/data");
    runs(&mut lab, &[("vm-0", false)], "");
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    let data = row(&lab, "data").unwrap();
    assert_eq!((data.domain.as_str(), data.node.as_str(), data.slot), ("", "a", 0));
    assert_eq!(told(&mut lab), [16]);
    assert!(garbage(&lab).is_empty());
}

/// What a domain boots from stays while it runs, whatever else it has; and a new disk's limits are
/// told with it.
#[test]
fn the_disk_that_a_domain_runs_from_stays() {
    let mut lab = running();
    let mut domain = lab.domain("vm");
    domain.spec.as_mut().unwrap().boot = None;
    assert!(lab.commit(&Txn::new().put(&domain)));
    for data in [false, true] {
        if data {
            let limits = DiskLimits { requests_per_second: 500, ..DiskLimits::default() };
            let how = Attached { read_only: true, limits: Some(limits) };
            attach_as(&mut lab, "data", "vm", &how).unwrap();
            let told = lab.level("a").domains.remove(0).disks.remove(1);
            assert_eq!((told.read_only, told.limits), (true, Some(limits)));
            runs(&mut lab, &[("vm-0", false), ("data", false)], "");
        }
        let before = lab.domain("vm");
        let refused = detach(&mut lab, "vm-0").unwrap_err();
        let Refusal::Precondition { reason, message, .. } = &refused else { panic!("{refused}") };
        assert_eq!(*reason, "BOOT_DISK");
        assert_eq!(message, "domains/vm runs from volumes/vm-0: stop it first");
        assert_eq!((lab.domain("vm"), row(&lab, "vm-0").unwrap().detaching), (before, false));
    }
    // One from before disks had slots of their own stays, too.
    let data = VolumeRecord { slot: 0, ..row(&lab, "data").unwrap() };
    assert!(lab.commit(&Txn::new().put(&data)));
    let refused = detach(&mut lab, "data").unwrap_err().to_string();
    assert!(refused.contains("before disks could leave a running guest: stop domains/vm first"));
}

/// One that moves gets nothing and gives nothing; where it goes on, its disks are in their slots,
/// and so they are when it starts anew.
#[test]
fn a_domain_that_moves_keeps_its_slots() {
    let mut lab = running();
    create(&mut lab, &new("more", Some("a"), 1)).unwrap();
    has(&mut lab, "a", &["vm-0", "data", "more"], VolumeState::Ready);
    attach(&mut lab, "data", "vm").unwrap();
    runs(&mut lab, &[("vm-0", false), ("data", false)], "");
    attach(&mut lab, "more", "vm").unwrap();
    runs(&mut lab, &[("vm-0", false), ("data", false), ("more", false)], "");
    detach(&mut lab, "data").unwrap();
    runs(&mut lab, &[("vm-0", false), ("more", false)], "");
    assert_eq!(held_by(&lab), "");

    let migration = lab.migrate("vm", "b").unwrap();
    lab.settle();
    assert!(matches!(attach(&mut lab, "data", "vm"), Err(Refusal::Busy { .. })));
    assert!(matches!(detach(&mut lab, "more"), Err(Refusal::Busy { .. })));
    let slots = |lab: &Lab, node: &str| -> Vec<u32> {
        let assignment = lab.assignment(node, "vm").unwrap();
        assignment.disks.iter().map(|disk| disk.slot).collect()
    };
    assert_eq!((slots(&lab, "a"), slots(&lab, "b")), (vec![16, 18], vec![16, 18]));

    // It fails: the domain is where it was, and gets what it shall.
    lab.cancel(&migration.id).unwrap();
    let back = lab.observed("vm", lab.domain("vm").epoch, S::Running).migrating(
        &migration.id,
        MigrationRole::Source,
        P::Failed,
    );
    lab.report("a", vec![back]);
    lab.report("b", vec![]);
    lab.settle();
    assert_eq!(held_by(&lab), "");
    runs(&mut lab, &[("vm-0", false), ("more", false)], "");
    attach(&mut lab, "data", "vm").unwrap();
    assert_eq!(slots(&lab, "a"), [16, 18, 19], "behind the others, so that it is the last");
}

/// The operation that holds `vm`.
fn held_by(lab: &Lab) -> String {
    lab.domain("vm").operation
}

/// What cannot be done is undone: the rows are as they were, and say why.
#[test]
fn a_guest_that_does_not_play_along_changes_nothing() {
    for how in ["refused", "cancelled", "late"] {
        let expected = match how {
            "refused" => (OperationState::Failed, "DISK_FAILED"),
            "cancelled" => (OperationState::Cancelled, "CANCELLED"),
            _ => (OperationState::Failed, "DEADLINE_EXCEEDED"),
        };
        let give_up = |lab: &mut Lab, disks: &[(&str, bool)]| {
            let operation = held(lab);
            match how {
                "cancelled" => lab.cancel(&operation.id).unwrap(),
                "late" => lab.pass_time(61_000),
                _ => {}
            }
            runs(lab, disks, if how == "refused" { "no" } else { "" });
            let ended = lab.operation(&operation.id);
            let reason = ended.error.clone().unwrap_or_default().reason;
            assert_eq!((ended.state(), reason.as_str()), expected, "{how}: {ended:?}");
            assert!(lab.domain("vm").operation.is_empty());
        };
        let mut lab = running();
        attach(&mut lab, "data", "vm").unwrap();
        give_up(&mut lab, &[("vm-0", false)]);
        let data = row(&lab, "data").unwrap();
        assert_eq!((data.domain.as_str(), data.node.as_str(), data.slot), ("", "a", 0), "{how}");
        assert_eq!(told(&mut lab), [16]);

        attach(&mut lab, "data", "vm").unwrap();
        runs(&mut lab, &[("vm-0", false), ("data", false)], "");
        detach(&mut lab, "data").unwrap();
        give_up(&mut lab, &[("vm-0", false), ("data", true)]);
        let data = row(&lab, "data").unwrap();
        assert_eq!((data.domain.as_str(), data.slot, data.detaching), ("vm", 17, false), "{how}");
        assert_eq!(told(&mut lab), [16, 17]);
    }
}

/// A guest that ends meanwhile finds its disks as the rows say.
#[test]
fn a_domain_that_ends_has_what_it_was_given() {
    let mut lab = running();
    attach(&mut lab, "data", "vm").unwrap();
    let operation = held(&lab);
    at_rest(&mut lab);
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    assert_eq!(told(&mut lab), [16, 17]);

    let mut lab = running();
    attach(&mut lab, "data", "vm").unwrap();
    runs(&mut lab, &[("vm-0", false), ("data", false)], "");
    detach(&mut lab, "data").unwrap();
    let operation = held(&lab);
    at_rest(&mut lab);
    assert_eq!(lab.operation(&operation.id).state(), OperationState::Succeeded);
    assert_eq!(row(&lab, "data").unwrap().domain, "");
}

#[test]
fn what_is_not_there_is_not_attached() {
    let mut lab = with_data();
    assert_eq!(
        attach(&mut lab, "data", "none"),
        Err(Refusal::NotFound { name: "domains/none".into() })
    );
    assert_eq!(
        attach(&mut lab, "none", "vm"),
        Err(Refusal::NotFound { name: "volumes/none".into() })
    );
}

#[test]
fn a_guest_has_so_many_disks() {
    let mut lab = with_data();
    let mut ids = vec!["vm-0".to_owned(), "data".to_owned()];
    for n in 1..7 {
        let id = format!("d{n}");
        create(&mut lab, &new(&id, Some("a"), 1)).unwrap();
        ids.push(id);
    }
    let all: Vec<&str> = ids.iter().map(String::as_str).collect();
    has(&mut lab, "a", &all, VolumeState::Ready);
    at_rest(&mut lab);
    for n in 1..7 {
        attach(&mut lab, &format!("d{n}"), "vm").unwrap();
    }
    let refused = attach(&mut lab, "data", "vm").unwrap_err().to_string();
    assert!(refused.contains("domains/vm has 7 disks: no more fit"), "{refused}");
    // Nor while it runs.
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin::start_domain(cx, &id, false).map(split)).unwrap();
    let disks: Vec<_> = all.iter().filter(|id| **id != "data").map(|id| (*id, false)).collect();
    runs(&mut lab, &disks, "");
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    let refused = attach(&mut lab, "data", "vm").unwrap_err().to_string();
    assert!(refused.contains("domains/vm has 7 disks: no more fit"), "{refused}");
}
