//! The rules, row by row, over pools that exist only here.

mod shared;
mod snapshots;

use super::*;

const NOW: u64 = 1_000_000;
const MIB: u64 = 1 << 20;

fn uid(n: u8) -> String {
    format!("4d8e0f0e-6c6f-4d3b-8f1e-0000000000{n:02x}")
}

fn volume_id(n: u8) -> VolumeId {
    uid(n).parse().unwrap()
}

fn image_id(n: u8) -> ImageId {
    ImageId([n; 32])
}

fn volume_thing(n: u8) -> Thing {
    Thing { pool: "main".into(), id: Id::Volume(volume_id(n)) }
}

fn image_thing(n: u8) -> Thing {
    Thing { pool: "main".into(), id: Id::Image(image_id(n)) }
}

fn blank(n: u8) -> WantedVolume {
    WantedVolume {
        uid: uid(n),
        pool: "main".into(),
        size_bytes: MIB,
        create: true,
        ..WantedVolume::default()
    }
}

fn from_image(n: u8, image: u8) -> WantedVolume {
    WantedVolume {
        image_digest: image_id(image).to_string(),
        image_size_bytes: MIB,
        image_sources: vec!["10.0.0.1:7401".into()],
        ..blank(n)
    }
}

fn copied(n: u8) -> WantedVolume {
    WantedVolume { copy_from: "10.0.0.1:7401".into(), ..blank(n) }
}

fn garbage_volume(n: u8) -> Garbage {
    Garbage { pool: "main".into(), volume_uid: uid(n), ..Garbage::default() }
}

fn garbage_image(n: u8) -> Garbage {
    let image_digest = image_id(n).to_string();
    Garbage { pool: "main".into(), image_digest, ..Garbage::default() }
}

fn want(volumes: Vec<WantedVolume>) -> WantedStorage {
    WantedStorage { volumes, ..WantedStorage::default() }
}

/// One pool, `main`, and what is going on in it.
#[derive(Default)]
struct World {
    pools: BTreeMap<String, PoolSeen>,
    busy: BTreeMap<Thing, Busy>,
    failed: BTreeMap<Thing, Failure>,
    untaken: BTreeMap<SnapshotId, String>,
    quiesced: BTreeSet<SnapshotId>,
}

impl World {
    fn with(volumes: &[u8], images: &[u8]) -> Self {
        let mut inventory = Inventory::default();
        for n in volumes {
            let info = VolumeInfo {
                id: volume_id(*n),
                bytes: MIB,
                allocated_bytes: Some(4096),
                path: "/x".into(),
                active: true,
            };
            inventory.volumes.insert(info.id, info);
        }
        for n in images {
            let info = ImageInfo { id: image_id(*n), bytes: MIB, allocated_bytes: None };
            inventory.images.insert(info.id, info);
        }
        let mut world = Self::default();
        let seen = PoolSeen { inventory: Some(inventory), ..PoolSeen::default() };
        world.pools.insert("main".into(), seen);
        world
    }

    fn busy(mut self, thing: Thing, work: Work, done: u64, total: u64) -> Self {
        let progress = Arc::new(Progress::default());
        progress.set(done, total);
        self.busy.insert(thing, Busy { work, progress });
        self
    }

    fn failed(mut self, thing: Thing, count: u32, retry_ms: u64) -> Self {
        self.failed.insert(thing, Failure { reason: "why".into(), count, retry_ms });
        self
    }

    fn unreadable(mut self, inventory: bool) -> Self {
        let pool = self.pools.get_mut("main").unwrap();
        pool.fault = Some("the volume group is gone".into());
        if !inventory {
            pool.inventory = None;
        }
        self
    }

    fn plan(&self, wanted: impl Into<Option<WantedStorage>>) -> Plan {
        let wanted = wanted.into();
        plan(Facts {
            wanted: wanted.as_ref(),
            pools: &self.pools,
            busy: &self.busy,
            failed: &self.failed,
            untaken: &self.untaken,
            quiesced: &self.quiesced,
            now_ms: NOW,
        })
    }
}

fn fetch() -> Work {
    Work::Fetch { sources: vec!["10.0.0.1:7401".into()], bytes: MIB }
}

/// What it shows; what is there and wanted; what is begun, and what is told.
type Row = (&'static str, World, WantedVolume, Option<Work>, VolumeState, &'static str);

/// What is begun, and the state and reason of the first volume.
fn first(plan: &Plan) -> (&[(Thing, Work)], VolumeState, &str) {
    (&plan.begin, plan.volumes[0].state(), &plan.volumes[0].state_reason)
}

#[test]
fn before_the_first_desired_nothing_is_done_and_all_is_told() {
    let plan = World::with(&[1, 2], &[7]).plan(None);
    assert_eq!(plan.begin, []);
    assert_eq!((plan.volumes.len(), plan.images.len()), (2, 1));
    assert_eq!(plan.volumes[0].state(), VolumeState::Ready);
    assert_eq!(plan.volumes[0].allocated_bytes, 4096);
}

#[test]
fn volumes_are_made_as_they_are_wanted() {
    use VolumeState::{Creating, Failed, Ready};
    let not_wanted = WantedVolume { create: false, ..blank(1) };
    let larger = WantedVolume { size_bytes: 2 * MIB, ..blank(1) };
    let copy_work = Work::Copy { source: "10.0.0.1:7401".into(), bytes: MIB };
    let (blank_work, clone_work) =
        (Work::Create { bytes: MIB }, Work::Clone { image: image_id(7), bytes: MIB });
    let rows: Vec<Row> = vec![
        ("blank", World::with(&[], &[]), blank(1), Some(blank_work.clone()), Creating, ""),
        ("there", World::with(&[1], &[]), blank(1), None, Ready, ""),
        ("there, never made here", World::with(&[1], &[]), not_wanted.clone(), None, Ready, ""),
        ("lost", World::with(&[], &[]), not_wanted, None, Failed, "its data is not there"),
        ("smaller", World::with(&[1], &[]), larger, Some(Work::Grow { bytes: 2 * MIB }), Ready, ""),
        (
            "of an image",
            World::with(&[], &[7]),
            from_image(1, 7),
            Some(clone_work.clone()),
            Creating,
            "",
        ),
        (
            "is being made",
            World::with(&[], &[7]).busy(volume_thing(1), clone_work, 0, 0),
            from_image(1, 7),
            None,
            Creating,
            "is being made",
        ),
        (
            "of a volume elsewhere",
            World::with(&[], &[]),
            copied(1),
            Some(copy_work.clone()),
            Creating,
            "is to be copied from 10.0.0.1:7401",
        ),
        (
            "is coming",
            World::with(&[], &[]).busy(volume_thing(1), copy_work.clone(), 2, 5),
            copied(1),
            None,
            Creating,
            "copying from 10.0.0.1:7401, 40 %",
        ),
        (
            "is coming, nobody knows how much",
            World::with(&[], &[]).busy(volume_thing(1), copy_work, 0, 0),
            copied(1),
            None,
            Creating,
            "copying from 10.0.0.1:7401",
        ),
        ("has come", World::with(&[1], &[]), copied(1), None, Ready, ""),
        (
            "comes back while it goes",
            World::with(&[1], &[]).busy(volume_thing(1), Work::Delete, 0, 0),
            blank(1),
            None,
            Creating,
            "is being removed first",
        ),
        (
            "failed once, not yet again",
            World::with(&[], &[]).failed(volume_thing(1), 1, NOW + 1),
            blank(1),
            None,
            Creating,
            "tries again after: why",
        ),
        (
            "failed often, once more",
            World::with(&[], &[]).failed(volume_thing(1), TRIES_MAX, NOW),
            blank(1),
            Some(blank_work),
            Failed,
            "why",
        ),
        (
            "in a pool that is not here",
            World::with(&[], &[]),
            WantedVolume { pool: "other".into(), ..blank(1) },
            None,
            Failed,
            "pool \"other\": is not on this node, which has main",
        ),
        (
            "in a pool that fails",
            World::with(&[1], &[]).unreadable(true),
            blank(1),
            None,
            Failed,
            "pool main: the volume group is gone",
        ),
        (
            "with a digest that is none",
            World::with(&[], &[]),
            WantedVolume { image_digest: "x".into(), ..blank(1) },
            None,
            Failed,
            "image: x: accepted is 64 hexadecimal digits",
        ),
        (
            "without a uid",
            World::with(&[], &[]),
            WantedVolume { uid: "../x".into(), ..blank(1) },
            None,
            Failed,
            "volume: ../x: accepted is a UUID in lower case, hyphenated",
        ),
    ];
    for (what, world, wanted, work, state, reason) in rows {
        let plan = world.plan(want(vec![wanted]));
        let begin: Vec<_> = work.into_iter().map(|work| (volume_thing(1), work)).collect();
        assert_eq!(first(&plan), (begin.as_slice(), state, reason), "{what}");
        assert_eq!(plan.volumes.len(), 1, "{what}: told once");
    }
}

/// However many wait for an image, it comes once, from all sources that they name together.
#[test]
fn an_image_is_fetched_once() {
    let mut second = from_image(2, 7);
    second.image_sources = vec!["10.0.0.2:7401".into(), "10.0.0.1:7401".into()];
    let wanted = want(vec![from_image(1, 7), second, from_image(3, 8)]);
    let plan = World::with(&[], &[]).plan(wanted.clone());
    let sources = vec!["10.0.0.1:7401".into(), "10.0.0.2:7401".into()];
    let both = Work::Fetch { sources, bytes: MIB };
    assert_eq!(plan.begin, [(image_thing(7), both), (image_thing(8), fetch())]);

    let coming = World::with(&[], &[]).busy(image_thing(7), fetch(), 2, 5);
    let plan = coming.plan(wanted.clone());
    assert_eq!(plan.begin, [(image_thing(8), fetch())]);
    assert_eq!(plan.volumes[0].state_reason, "copying the image, 40 %");
    assert_eq!(plan.volumes[1].state_reason, "copying the image, 40 %");

    let tried = World::with(&[], &[]).failed(image_thing(7), 1, NOW + 500);
    let plan = tried.plan(wanted);
    assert_eq!(plan.begin, [(image_thing(8), fetch())]);
    assert_eq!(plan.volumes[0].state_reason, "tries again after: why");
    assert_eq!(plan.wake_ms, Some(NOW + 500));
}

#[test]
fn only_garbage_is_removed_and_never_what_somebody_needs() {
    let world = || World::with(&[1, 2], &[7, 8]);
    let all = vec![garbage_volume(1), garbage_image(7), garbage_volume(9), garbage_image(9)];
    let plan = world().plan(WantedStorage { garbage: all.clone(), ..want(vec![]) });
    assert_eq!(plan.begin, [(volume_thing(1), Work::Delete), (image_thing(7), Work::Delete)]);
    assert_eq!(plan.volumes.len(), 2, "it is there until it is gone");

    // Wanted after all, or an assigned domain's: stays.
    let wanted = WantedStorage { garbage: all.clone(), ..want(vec![blank(1)]) };
    assert_eq!(world().plan(wanted).begin, [(image_thing(7), Work::Delete)]);
    let used = BTreeSet::from([uid(1)]);
    let wanted = WantedStorage { garbage: all.clone(), used, ..want(vec![]) };
    assert_eq!(world().plan(wanted).begin, [(image_thing(7), Work::Delete)]);
    // A volume is still to be made of it.
    let wanted = WantedStorage { garbage: all, ..want(vec![from_image(3, 7)]) };
    let begin = world().plan(wanted).begin;
    assert!(!begin.contains(&(image_thing(7), Work::Delete)), "{begin:?}");

    // An image goes from every pool, where none is named; one that cannot be read may still have it.
    let mut two = world();
    let other = World::with(&[], &[7]).pools.remove("main").unwrap();
    two.pools.insert("other".into(), other);
    let anywhere = Garbage { pool: String::new(), ..garbage_image(7) };
    let wanted = WantedStorage { garbage: vec![anywhere], ..want(vec![]) };
    let there = Thing { pool: "other".into(), ..image_thing(7) };
    let expected = [(image_thing(7), Work::Delete), (there, Work::Delete)];
    assert_eq!(two.plan(wanted.clone()).begin, expected);
    let plan = two.unreadable(false).plan(wanted);
    assert_eq!(plan.begin, expected[1..]);
    let digest = image_id(7).to_string();
    assert!(plan.images.iter().any(|image| image.pool == "main" && image.digest == digest));

    // One that is open is tried later.
    let open = world().failed(volume_thing(1), 3, NOW + 2000);
    let plan = open.plan(WantedStorage { garbage: vec![garbage_volume(1)], ..want(vec![]) });
    assert_eq!((plan.begin, plan.wake_ms), (vec![], Some(NOW + 2000)));
    assert_eq!(plan.volumes[0].state_reason, "cannot be removed: why");
}

/// A copy keeps its source from being used: it is given up when it is not wanted any more. What
/// may still come of it is told, so that it stays garbage until it is gone.
#[test]
fn a_copy_that_is_not_wanted_is_given_up() {
    let work = Work::Copy { source: "10.0.0.1:7401".into(), bytes: MIB };
    let coming = World::with(&[], &[]).busy(volume_thing(1), work, 2, 5);
    assert_eq!(coming.plan(want(vec![copied(1)])).cancel, []);
    let elsewhere = WantedVolume { copy_from: "10.0.0.2:7401".into(), ..blank(1) };
    let never = WantedVolume { create: false, ..copied(1) };
    for wanted in [vec![], vec![elsewhere], vec![never], vec![copied(2)]] {
        assert_eq!(coming.plan(want(wanted)).cancel, [volume_thing(1)]);
    }
    let garbage = WantedStorage { garbage: vec![garbage_volume(1)], ..want(vec![]) };
    let plan = coming.plan(garbage);
    assert_eq!((plan.cancel.len(), first(&plan).1), (1, VolumeState::Creating));
    assert_eq!(plan.volumes.len(), 1);
}

/// The controller takes what is missing from a report for gone.
#[test]
fn what_lies_in_a_pool_that_cannot_be_read_is_still_told() {
    for inventory in [true, false] {
        let world = World::with(&[1], &[7]).unreadable(inventory);
        let garbage = vec![garbage_volume(1), garbage_image(7)];
        let plan = world.plan(WantedStorage { garbage, ..want(vec![]) });
        assert_eq!(plan.begin, []);
        let (_, state, reason) = first(&plan);
        assert_eq!(state, VolumeState::Failed);
        assert_eq!(reason, "pool main: the volume group is gone");
        assert_eq!((plan.volumes.len(), plan.images.len()), (1, 1));
    }
}

#[test]
fn pauses_grow_and_end_somewhere() {
    let mut failure = Failure::again(None, "why".into(), NOW);
    let mut pauses = vec![failure.retry_ms - NOW];
    for _ in 0..40 {
        failure = Failure::again(Some(&failure), "why".into(), NOW);
        pauses.push(failure.retry_ms - NOW);
    }
    assert_eq!(pauses[..4], [1000, 2000, 4000, 8000]);
    assert_eq!((pauses[40], failure.count), (RETRY_MS_MAX, 41));
    // A node that gives the image to others first is no failure, however long that takes.
    let mut busy = Failure::not_yet(None, "busy".into(), NOW);
    for _ in 0..2 * TRIES_MAX {
        busy = Failure::not_yet(Some(&busy), "busy".into(), NOW);
    }
    let mut world = World::with(&[], &[]);
    world.failed.insert(image_thing(7), busy);
    let plan = world.plan(want(vec![from_image(1, 7)]));
    assert_eq!(first(&plan), (&[][..], VolumeState::Creating, "busy"));
}
