//! What operators do to one domain with its disks: resize, reinstall, rescue, save.

mod saves;

use drover_proto::agent::v1::assignment::Role;
use drover_proto::agent::v1::{ObservedDomain, ObservedPool, ObservedState as S, ObservedVolume};
use drover_proto::v1::{
    Disk, DiskLimits, DiskResize, DomainState, ExitReason, OperationState, PoolState, PowerState,
    VolumeState,
};

use super::lab::{Lab, MIB, Observe, ended, new_domain, split};
use crate::model::{
    DomainId, GarbageRecord, ImageId, ImageRecord, NodeId, OperationRecord, VolumeRecord,
};
use crate::store::Txn;
use crate::workflows::begin::{self, Begun};
use crate::workflows::reinstall::reinstall_domain;
use crate::workflows::rescue::{end_rescue, rescue_domain};
use crate::workflows::resize::{Resize, resize_domain};
use crate::workflows::save::save_domain;
use crate::workflows::{Context, Refusal};

const GIB: u64 = 1024 * MIB;

/// `vm` runs on `a` with a disk of 2 GiB; there are images `debian` and `rescue` of 1 GiB, and
/// `large` of 4.
fn running() -> Lab {
    let mut lab = Lab::new();
    let pool = ObservedPool {
        id: "ssd".into(),
        state: PoolState::Ready.into(),
        size_bytes: 10 * GIB,
        overcommit: 1.0,
        ..ObservedPool::default()
    };
    for name in ["a", "b"] {
        lab.pools.insert(name.into(), vec![pool.clone()]);
        lab.hello(name, "boot-1");
    }
    for (id, gib) in [("debian", 1), ("rescue", 1), ("large", 4)] {
        let image = ImageRecord {
            id: id.into(),
            digest: format!("digest-of-{id}"),
            size_bytes: gib * GIB,
            ..ImageRecord::default()
        };
        assert!(lab.commit(&Txn::new().put(&image)));
    }
    let mut new = new_domain("vm", Some("a"));
    let image = "images/debian".to_owned();
    new.spec.disks = vec![Disk { image, size_bytes: 2 * GIB, ..Disk::default() }];
    lab.with(|cx| begin::create_domain(cx, &new).map(split)).unwrap();
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(lab.domain("vm").state(), DomainState::Running);
    lab
}

/// The same, stopped.
fn stopped() -> Lab {
    let mut lab = running();
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
    lab
}

/// All that is wanted is there, as large as it shall be, and in this state.
fn volumes(lab: &mut Lab, state: VolumeState) {
    let said = lab.level("a").volumes.into_iter().map(|wanted| ObservedVolume {
        uid: wanted.uid,
        pool: wanted.pool,
        state: state.into(),
        state_reason: if state == VolumeState::Failed { "no".into() } else { String::new() },
        size_bytes: wanted.size_bytes,
        ..ObservedVolume::default()
    });
    let said = said.collect();
    lab.volumes.insert("a".into(), said);
}

/// The agent reports under the domain's epoch.
fn says(lab: &mut Lab, state: S, exit: ExitReason) {
    let epoch = lab.domain("vm").epoch;
    says_under(lab, epoch, state, exit);
}

fn says_under(lab: &mut Lab, epoch: u64, state: S, exit: ExitReason) {
    let domain = lab.observed("vm", epoch, state).because(exit, "");
    report(lab, domain);
}

fn report(lab: &mut Lab, domain: ObservedDomain) {
    lab.report("a", vec![domain]);
    lab.settle();
}

fn report_nothing(lab: &mut Lab) {
    lab.report("a", vec![]);
    lab.settle();
}

fn ask(
    lab: &mut Lab,
    begin: impl FnOnce(&Context<'_>, &DomainId) -> Result<Begun, Refusal>,
) -> Result<OperationRecord, Refusal> {
    let id = DomainId::trusted("vm");
    lab.with(|cx| begin(cx, &id).map(split))
}

fn start(lab: &mut Lab, discard: bool) -> OperationRecord {
    ask(lab, |cx, id| begin::start_domain(cx, id, discard)).unwrap()
}

fn save(lab: &mut Lab) -> OperationRecord {
    ask(lab, save_domain).unwrap()
}

fn resize(lab: &mut Lab, resize: Resize) -> Result<OperationRecord, Refusal> {
    ask(lab, |cx, id| resize_domain(cx, id, &resize))
}

fn rescue(lab: &mut Lab) -> Result<OperationRecord, Refusal> {
    ask(lab, |cx, id| rescue_domain(cx, id, &ImageId::trusted("rescue")))
}

fn reinstall(lab: &mut Lab, disk: u32, image: Option<&str>) -> Result<OperationRecord, Refusal> {
    let image = image.map(ImageId::trusted);
    ask(lab, |cx, id| reinstall_domain(cx, id, disk, image.as_ref(), false))
}

fn outcome(lab: &Lab, operation: &OperationRecord) -> (OperationState, String) {
    ended(&lab.operation(&operation.id))
}

const DONE: (OperationState, String) = (OperationState::Succeeded, String::new());

fn volume(lab: &Lab, id: &str) -> Option<VolumeRecord> {
    lab.view().get::<VolumeRecord>(id).map(|row| row.value)
}

fn garbage(lab: &Lab) -> Vec<String> {
    lab.view().all::<GarbageRecord>().map(|row| row.value.volume_uid).collect()
}

fn power(lab: &Lab) -> PowerState {
    let Some(Role::Owner(owner)) = lab.assignment("a", "vm").unwrap().role else { panic!() };
    owner.power()
}

fn field(refused: Result<OperationRecord, Refusal>) -> (String, String) {
    let Err(Refusal::Invalid { field, expected, .. }) = refused else { panic!("{refused:?}") };
    (field, expected)
}

fn reason(refused: Result<OperationRecord, Refusal>) -> &'static str {
    let Err(Refusal::Precondition { reason, .. }) = refused else { panic!("{refused:?}") };
    reason
}

#[test]
fn a_reinstalled_disk_is_the_same_disk_with_other_content() {
    let mut lab = running();
    assert_eq!(reason(reinstall(&mut lab, 0, None)), "WRONG_STATE");
    let mut lab = stopped();
    let before = volume(&lab, "vm-0").unwrap();
    let domain = lab.domain("vm");
    let serial = lab.assignment("a", "vm").unwrap().disks[0].serial.clone();
    assert_eq!((serial.len(), serial.contains('-')), (20, false));

    let begun = reinstall(&mut lab, 0, None).unwrap();
    let after = volume(&lab, "vm-0").unwrap();
    assert_ne!(after.uid, before.uid);
    assert_eq!(garbage(&lab), [before.uid]);
    assert_ne!(lab.domain("vm").generation_id, domain.generation_id);
    let wanted = &lab.level("a").volumes[0];
    assert!(wanted.create && wanted.image_digest == "digest-of-debian", "{wanted:?}");
    assert_eq!(lab.assignment("a", "vm").unwrap().disks[0].serial, serial);
    assert!(matches!(lab.cancel(&begun.id), Err(Refusal::Precondition { .. })));
    // What the old content's node says is not said of the new one.
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(outcome(&lab, &begun).0, OperationState::Running);

    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(outcome(&lab, &begun), DONE);
    assert!(garbage(&lab).is_empty());
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
    assert!(!lab.level("a").volumes[0].create);

    let begun = reinstall(&mut lab, 0, Some("rescue")).unwrap();
    assert_eq!(lab.domain("vm").spec.unwrap().disks[0].image, "images/rescue");
    volumes(&mut lab, VolumeState::Failed);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "VOLUME_FAILED".into()));
    assert!(lab.level("a").volumes[0].create, "its agent goes on trying");
}

/// A backup's content comes by an image that is deleted afterwards: the disk goes on saying what
/// it was made of, and can be made of that again.
#[test]
fn an_image_that_only_brings_content_leaves_no_name_behind() {
    let mut lab = stopped();
    let carrier = ImageRecord {
        id: "restore-1".into(),
        digest: "digest-of-restore-1".into(),
        size_bytes: GIB,
        nodes: vec!["b".into()],
        ..ImageRecord::default()
    };
    assert!(lab.commit(&Txn::new().put(&carrier)));
    let image = ImageId::trusted("restore-1");
    let begun = ask(&mut lab, |cx, id| reinstall_domain(cx, id, 0, Some(&image), true)).unwrap();
    let wanted = &lab.level("a").volumes[0];
    assert!(wanted.create && wanted.image_digest == "digest-of-restore-1", "{wanted:?}");
    assert_eq!(wanted.image_sources.len(), 1, "from where the carrier lies: {wanted:?}");
    assert_eq!(lab.domain("vm").spec.unwrap().disks[0].image, "images/debian");
    assert_eq!(volume(&lab, "vm-0").unwrap().image, "debian");
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(outcome(&lab, &begun), DONE);

    assert!(lab.commit(&Txn::new().delete::<ImageRecord>("restore-1")));
    reinstall(&mut lab, 0, None).unwrap();
    assert_eq!(lab.level("a").volumes[0].image_digest, "digest-of-debian");
}

#[test]
fn a_reinstall_that_cannot_be_says_what_can() {
    let mut lab = stopped();
    let before = lab.state.revision();
    let (name, expected) = field(reinstall(&mut lab, 1, None));
    assert_eq!((name.as_str(), expected.contains("0 to 0")), ("disk", true), "{expected}");
    let (name, expected) = field(reinstall(&mut lab, 0, Some("large")));
    assert_eq!((name.as_str(), expected.contains("resize the disk")), ("image", true));
    let refused = reinstall(&mut lab, 0, Some("none")).unwrap_err();
    assert_eq!(refused, Refusal::NotFound { name: "images/none".into() });
    assert_eq!(lab.state.revision(), before, "nothing has changed");
    assert!(lab.commit(&Txn::new().delete::<ImageRecord>("debian")));
    let (name, expected) = field(reinstall(&mut lab, 0, None));
    assert_eq!((name.as_str(), expected.contains("another image")), ("image", true));
}

#[test]
fn disks_grow_while_the_guest_runs_and_memory_waits_for_the_next_start() {
    let mut lab = running();
    let limits = DiskLimits { requests_per_second: 500, ..DiskLimits::default() };
    let disk = DiskResize { disk: 0, size_bytes: 3 * GIB, limits: Some(limits) };
    let more = Resize { vcpus: 2, memory_bytes: GIB, disks: vec![disk] };
    let begun = resize(&mut lab, more).unwrap();
    let assignment = lab.assignment("a", "vm").unwrap();
    let spec = assignment.spec.unwrap();
    assert_eq!((spec.vcpus, spec.memory_bytes), (1, 256 * MIB), "what runs keeps what it has");
    assert_eq!(assignment.disks[0].limits, Some(limits));
    assert_eq!(lab.level("a").volumes[0].size_bytes, 3 * GIB);
    let reserved = lab.world().reserved(&NodeId::trusted("a"));
    assert_eq!((reserved.vcpus, reserved.memory_bytes), (2, GIB));

    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(outcome(&lab, &begun).0, OperationState::Running);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(outcome(&lab, &begun), DONE);

    // Taken back; it needs no node.
    let same = resize(&mut lab, Resize { vcpus: 1, ..Resize::default() }).unwrap();
    assert_eq!(outcome(&lab, &same), DONE);
    assert_eq!(lab.domain("vm").next_vcpus, 0);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    start(&mut lab, false);
    let domain = lab.domain("vm");
    let spec = domain.spec.unwrap();
    assert_eq!((spec.vcpus, spec.memory_bytes, domain.next_memory_bytes), (1, GIB, 0));

    // At rest there is no next start to wait for; zeros lift limits.
    let mut lab = stopped();
    let disk = DiskResize { limits: Some(DiskLimits::default()), ..DiskResize::default() };
    let more = Resize { vcpus: 4, disks: vec![disk], ..Resize::default() };
    let begun = resize(&mut lab, more).unwrap();
    assert_eq!(outcome(&lab, &begun), DONE);
    let spec = lab.domain("vm").spec.unwrap();
    assert_eq!((spec.vcpus, spec.disks[0].limits), (4, None));
}

#[test]
fn a_resize_that_has_no_room_changes_nothing() {
    let mut lab = running();
    let before = lab.state.revision();
    let disk = |size_bytes| vec![DiskResize { size_bytes, ..DiskResize::default() }];
    for (more, lacks) in [
        (Resize { vcpus: 17, ..Resize::default() }, "needs 16 vCPUs, 15 of 16 free"),
        (Resize { memory_bytes: 8 * GIB, ..Resize::default() }, "needs 7936 MiB of memory"),
        (Resize { disks: disk(11 * GIB), ..Resize::default() }, "needs 9216 MiB in pool ssd"),
    ] {
        let refused = resize(&mut lab, more).unwrap_err();
        assert!(matches!(refused, Refusal::NoRoomThere { .. }), "{refused}");
        assert!(refused.to_string().contains(lacks), "{refused}");
    }
    let (name, expected) =
        field(resize(&mut lab, Resize { disks: disk(GIB), ..Resize::default() }));
    assert_eq!((name.as_str(), expected.contains("never shrinks")), ("disks[0].size_bytes", true));
    let other = vec![DiskResize { disk: 3, size_bytes: GIB, limits: None }];
    let (name, _) = field(resize(&mut lab, Resize { disks: other, ..Resize::default() }));
    assert_eq!(name, "disks[0].disk");
    assert_eq!(lab.state.revision(), before);
    // Less is always there.
    resize(&mut lab, Resize { memory_bytes: 64 * MIB, ..Resize::default() }).unwrap();
}

/// Data that is lost is not grown, and is what a reinstall is for.
#[test]
fn a_disk_that_is_lost_is_made_anew() {
    let mut lab = stopped();
    volumes(&mut lab, VolumeState::Failed);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(volume(&lab, "vm-0").unwrap().state(), VolumeState::Failed);
    let disks = vec![DiskResize { size_bytes: 3 * GIB, ..DiskResize::default() }];
    assert_eq!(reason(resize(&mut lab, Resize { disks, ..Resize::default() })), "WRONG_STATE");
    let begun = reinstall(&mut lab, 0, None).unwrap();
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(outcome(&lab, &begun), DONE);
    assert_eq!(volume(&lab, "vm-0").unwrap().state(), VolumeState::Ready);
}

/// I3: its node is silent.
#[test]
fn a_reinstall_and_a_resize_end_at_their_deadlines() {
    let mut lab = stopped();
    let disks = vec![DiskResize { size_bytes: 3 * GIB, ..DiskResize::default() }];
    let begun = resize(&mut lab, Resize { disks, ..Resize::default() }).unwrap();
    assert!(matches!(reinstall(&mut lab, 0, None), Err(Refusal::Busy { .. })));
    lab.pass_time(5 * 60_000 + 1);
    lab.settle();
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    lab.hello("a", "boot-1");
    lab.settle();
    let begun = reinstall(&mut lab, 0, None).unwrap();
    lab.pass_time(60 * 60_000 + 1);
    lab.settle();
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    assert!(lab.domain("vm").operation.is_empty());
}

#[test]
fn a_grow_that_fails_says_why() {
    let mut lab = running();
    let disks = vec![DiskResize { size_bytes: 3 * GIB, ..DiskResize::default() }];
    let begun = resize(&mut lab, Resize { disks, ..Resize::default() }).unwrap();
    lab.volumes.get_mut("a").unwrap()[0].state_reason = "the pool is full".into();
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "VOLUME_FAILED".into()));
    let message = lab.operation(&begun.id).error.unwrap().message;
    assert!(message.contains("volumes/vm-0: the pool is full"), "{message}");
}

#[test]
fn a_domain_is_rescued_and_the_rescue_ended() {
    let mut lab = running();
    assert_eq!(reason(rescue(&mut lab)), "WRONG_STATE");
    let mut lab = stopped();
    assert_eq!(reason(ask(&mut lab, end_rescue)), "NOT_RESCUED");
    let begun = rescue(&mut lab).unwrap();
    let made = volume(&lab, "vm-rescue").unwrap();
    assert_eq!((made.size_bytes, made.pool.as_str()), (GIB, "ssd"));
    let assignment = lab.assignment("a", "vm").unwrap();
    assert!(assignment.rescue);
    let uids: Vec<_> = assignment.disks.iter().map(|disk| disk.volume_uid.clone()).collect();
    assert_eq!(uids, [made.uid.clone(), volume(&lab, "vm-0").unwrap().uid]);
    let pools = lab.world().promised(&NodeId::trusted("a"));
    assert_eq!(pools["ssd"], 3 * GIB);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    assert_eq!(outcome(&lab, &begun), DONE);
    assert_eq!(volume(&lab, "vm-rescue").unwrap().state(), VolumeState::Ready);

    assert_eq!(reason(ask(&mut lab, end_rescue)), "WRONG_STATE");
    says(&mut lab, S::Stopped, ExitReason::Shutdown);
    assert_eq!(reason(rescue(&mut lab)), "RESCUED");
    let over = ask(&mut lab, end_rescue).unwrap();
    assert_eq!(outcome(&lab, &over), DONE);
    assert!(volume(&lab, "vm-rescue").is_none());
    assert_eq!(garbage(&lab), [made.uid]);
    let assignment = lab.assignment("a", "vm").unwrap();
    assert!(!assignment.rescue && assignment.disks.len() == 1);
    assert_eq!(lab.domain("vm").state(), DomainState::Stopped);
}

/// I7: nothing half done.
#[test]
fn a_rescue_that_does_not_start_leaves_no_rescue_disk() {
    let mut lab = stopped();
    let begun = rescue(&mut lab).unwrap();
    volumes(&mut lab, VolumeState::Ready);
    let epoch = lab.domain("vm").epoch;
    let failed = lab.observed("vm", epoch, S::Failed).because(ExitReason::Error, "no kernel");
    report(&mut lab, failed);
    assert_eq!(outcome(&lab, &begun), (OperationState::Failed, "START_FAILED".into()));
    let domain = lab.domain("vm");
    assert_eq!((domain.rescue_image.as_str(), domain.state()), ("", DomainState::Failed));
    assert!(volume(&lab, "vm-rescue").is_none());
    assert_eq!(garbage(&lab).len(), 1);
    // And it can be tried again at once: another uid is another volume.
    rescue(&mut lab).unwrap();
}

#[test]
fn deleting_takes_what_it_was_rescued_with_and_saved_to() {
    let mut lab = stopped();
    rescue(&mut lab).unwrap();
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Running, ExitReason::Unspecified);
    save(&mut lab);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Saved);
    assert_eq!(lab.domain("vm").state(), DomainState::Saved);
    assert!(lab.assignment("a", "vm").unwrap().rescue, "it goes on with its rescue disk");
    assert_eq!(reason(ask(&mut lab, end_rescue)), "SAVED");
    ask(&mut lab, |cx, id| begin::delete_domain(cx, id, "", false)).unwrap();
    report_nothing(&mut lab);
    assert_eq!(garbage(&lab).len(), 3);
    assert!(lab.world().volumes.is_empty() && lab.world().domains.is_empty());
}

/// A drain treats it as one that is stopped.
#[test]
fn a_saved_domain_does_not_run() {
    let mut lab = running();
    save(&mut lab);
    volumes(&mut lab, VolumeState::Ready);
    says(&mut lab, S::Stopped, ExitReason::Saved);
    let view = lab.world().cluster_view(&lab.observed);
    let saved = view.domains[&DomainId::trusted("vm")].mobility.clone();
    let mut lab = stopped();
    let view = lab.world().cluster_view(&lab.observed);
    assert_eq!(saved, view.domains[&DomainId::trusted("vm")].mobility);
    let stop = ask(&mut lab, |cx, id| begin::stop_domain(cx, id, 0));
    assert_eq!(reason(stop), "WRONG_STATE");
}
