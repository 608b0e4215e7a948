//! The rules for snapshots, row by row.

use drover_proto::agent::v1::WantedSnapshotPart;
use drover_proto::v1::SnapshotState;

use super::*;

fn part_id(n: u8) -> SnapshotId {
    uid(0x10 + n).parse().unwrap()
}

fn part_thing(n: u8) -> Thing {
    Thing { pool: "main".into(), id: Id::Snapshot(part_id(n)) }
}

/// Of volumes 1 and 2.
fn snapshot() -> WantedSnapshot {
    let part =
        |n: u8| WantedSnapshotPart { uid: uid(0x10 + n), volume_uid: uid(n), pool: "main".into() };
    WantedSnapshot { domain_uid: uid(0xd0), parts: vec![part(1), part(2)], create: true }
}

fn take() -> Take {
    let part = |n| Part { pool: "main".into(), volume: volume_id(n), snapshot: part_id(n) };
    Take { domain: uid(0xd0), parts: vec![part(1), part(2)] }
}

fn with(snapshot: WantedSnapshot) -> WantedStorage {
    WantedStorage { snapshots: vec![snapshot], ..WantedStorage::default() }
}

fn of_snapshot(n: u8, part: u8) -> WantedVolume {
    let source =
        VolumeSource { pool: "main".into(), volume_uid: uid(part), snapshot_uid: uid(0x10 + part) };
    WantedVolume { snapshot: Some(source), ..blank(n) }
}

fn garbage_part(n: u8) -> Garbage {
    Garbage { pool: "main".into(), snapshot_uid: uid(0x10 + n), ..Garbage::default() }
}

impl World {
    /// With volumes 1 and 2 and these parts of the snapshot.
    fn parts(parts: &[u8]) -> Self {
        let mut world = Self::with(&[1, 2], &[]);
        let inventory = world.pools.get_mut("main").unwrap().inventory.as_mut().unwrap();
        for n in parts {
            let info = SnapshotInfo {
                volume: volume_id(*n),
                id: part_id(*n),
                bytes: MIB,
                allocated_bytes: Some(512),
            };
            inventory.snapshots.insert(info.id, info);
        }
        world
    }

    fn untaken(mut self, n: u8) -> Self {
        self.untaken.insert(part_id(n), "why".into());
        self
    }

    fn without_volume(mut self, n: u8) -> Self {
        let pool = self.pools.get_mut("main").unwrap();
        pool.inventory.as_mut().unwrap().volumes.remove(&volume_id(n));
        self
    }
}

/// What it shows; what is there and wanted; what is begun, whether it is taken, and what is told
/// of both parts.
type Row = (
    &'static str,
    World,
    WantedStorage,
    Vec<(Thing, Work)>,
    bool,
    [(SnapshotState, &'static str); 2],
);

#[test]
fn snapshots_are_taken_whole_or_not_at_all() {
    use SnapshotState::{Creating, Failed, Ready};
    let kept = || with(WantedSnapshot { create: false, ..snapshot() });
    let delete = |n| (part_thing(n), Work::Delete);
    let taking = (Creating, "is being taken");
    let lost = (Failed, "is not there any more");
    let ready = (Ready, "");
    let mut coming = with(snapshot());
    coming.volumes = vec![blank(2)];
    let mut grows = with(snapshot());
    grows.volumes = vec![WantedVolume { size_bytes: 2 * MIB, ..blank(1) }];
    let grow = (volume_thing(1), Work::Grow { bytes: 2 * MIB });
    let waits = |n: u8| format!("waits for volume {}", volume_id(n)).leak() as &'static str;
    let gone = format!("volume {}: is not there", volume_id(2)).leak() as &'static str;
    let mut nameless = snapshot();
    nameless.parts[1].uid = "x".into();
    let mut elsewhere = snapshot();
    elsewhere.parts[1].pool = "other".into();
    let rows: Vec<Row> = vec![
        ("none is there", World::parts(&[]), with(snapshot()), vec![], true, [taking; 2]),
        (
            "is being taken",
            World::parts(&[])
                .busy(part_thing(1), Work::Take, 0, 0)
                .busy(part_thing(2), Work::Take, 0, 0)
                .busy(volume_thing(1), Work::Take, 0, 0),
            with(snapshot()),
            vec![],
            false,
            [taking; 2],
        ),
        ("all are there", World::parts(&[1, 2]), with(snapshot()), vec![], false, [ready; 2]),
        ("all are there, kept", World::parts(&[1, 2]), kept(), vec![], false, [ready; 2]),
        ("one is lost", World::parts(&[1]), kept(), vec![], false, [ready, lost]),
        ("all are lost", World::parts(&[]), kept(), vec![], false, [lost; 2]),
        (
            "a crash came between",
            World::parts(&[2]),
            with(snapshot()),
            vec![delete(2)],
            false,
            [(Creating, "what a crash left of it is removed first"); 2],
        ),
        (
            "and it is being removed",
            World::parts(&[2]).busy(part_thing(2), Work::Delete, 0, 0),
            with(snapshot()),
            vec![],
            false,
            [(Creating, "is being removed first"); 2],
        ),
        (
            "could not be taken",
            World::parts(&[]).untaken(1),
            with(snapshot()),
            vec![],
            false,
            [(Failed, "why"); 2],
        ),
        (
            "somebody was busy",
            World::parts(&[]).failed(part_thing(1), 0, NOW + 1),
            with(snapshot()),
            vec![],
            false,
            [(Creating, "why"); 2],
        ),
        (
            "somebody was busy, once more",
            World::parts(&[]).failed(part_thing(1), 0, NOW),
            with(snapshot()),
            vec![],
            true,
            [taking; 2],
        ),
        (
            "a volume is gone",
            World::parts(&[]).without_volume(2),
            with(snapshot()),
            vec![],
            false,
            [(Failed, gone); 2],
        ),
        (
            "a volume is still to come",
            World::parts(&[]).without_volume(2),
            coming,
            vec![(volume_thing(2), Work::Create { bytes: MIB })],
            false,
            [(Creating, waits(2)); 2],
        ),
        (
            "a volume is to grow",
            World::parts(&[]),
            grows,
            vec![grow],
            false,
            [(Creating, waits(1)); 2],
        ),
        (
            "the pool fails",
            World::parts(&[1, 2]).unreadable(true),
            with(snapshot()),
            vec![],
            false,
            [(Failed, "pool main: the volume group is gone"); 2],
        ),
        (
            "a part without a uid",
            World::parts(&[]),
            with(nameless),
            vec![],
            false,
            [(Failed, "snapshot: x: accepted is a UUID in lower case, hyphenated"); 2],
        ),
        (
            "a pool that is not here",
            World::parts(&[]),
            with(elsewhere),
            vec![],
            false,
            [(Failed, "pool \"other\": is not on this node"); 2],
        ),
    ];
    for (what, world, wanted, begin, is_taken, told) in rows {
        let plan = world.plan(wanted);
        assert_eq!(plan.begin, begin, "{what}");
        assert_eq!(plan.takes, is_taken.then(take).into_iter().collect::<Vec<_>>(), "{what}");
        let said: Vec<_> =
            plan.snapshots.iter().map(|part| (part.state(), part.state_reason.as_str())).collect();
        assert_eq!(said, told, "{what}");
    }
}

/// Two snapshots of the same volumes take turns.
#[test]
fn a_volume_is_in_one_snapshot_at_a_time() {
    let mut other = snapshot();
    other.parts.iter_mut().zip([8, 9]).for_each(|(part, n)| part.uid = uid(0x10 + n));
    let mut wanted = with(snapshot());
    wanted.snapshots.push(other);
    let plan = World::parts(&[]).plan(wanted);
    assert_eq!((plan.takes, plan.snapshots.len()), (vec![take()], 4));
    let reason = format!("waits for volume {}", volume_id(1));
    assert_eq!(plan.snapshots[2].state_reason, reason);
    // Nor does one grow that is in one.
    let larger = WantedVolume { size_bytes: 2 * MIB, ..blank(1) };
    let taken = World::parts(&[]).busy(volume_thing(1), Work::Take, 0, 0);
    let plan = taken.plan(want(vec![larger]));
    assert_eq!(first(&plan), (&[][..], VolumeState::Ready, ""));
}

#[test]
fn a_volume_is_made_of_a_snapshot_in_its_pool() {
    let clone = Work::CloneSnapshot { volume: volume_id(1), snapshot: part_id(1), bytes: MIB };
    let plan = World::parts(&[1]).plan(want(vec![of_snapshot(5, 1)]));
    assert_eq!(first(&plan), (&[(volume_thing(5), clone)][..], VolumeState::Creating, ""));
    let plan = World::parts(&[]).plan(want(vec![of_snapshot(5, 1)]));
    let reason = format!("snapshot {}: is not in pool main", part_id(1));
    assert_eq!(first(&plan), (&[][..], VolumeState::Failed, reason.as_str()));
    let mut elsewhere = of_snapshot(5, 1);
    elsewhere.snapshot.as_mut().unwrap().pool = "other".into();
    let plan = World::parts(&[1]).plan(want(vec![elsewhere]));
    assert!(
        plan.begin.is_empty() && plan.volumes[0].state_reason.contains("in its own pool, main")
    );
}

#[test]
fn only_parts_that_nobody_needs_are_removed() {
    let all = vec![garbage_part(1), garbage_part(2), garbage_part(9)];
    let garbage = || WantedStorage { garbage: all.clone(), ..want(vec![]) };
    let delete = |n| (part_thing(n), Work::Delete);
    let plan = World::parts(&[1, 2]).plan(garbage());
    assert_eq!(plan.begin, [delete(1), delete(2)]);
    assert_eq!(plan.snapshots.len(), 2, "they are there until they are gone");
    // Its volume is not in its way.
    assert_eq!(World::parts(&[1, 2]).without_volume(1).plan(garbage()).begin.len(), 2);
    // Nor does it keep its volume.
    let volume = WantedStorage { garbage: vec![garbage_volume(1)], ..want(vec![]) };
    assert_eq!(World::parts(&[1]).plan(volume).begin, [(volume_thing(1), Work::Delete)]);

    let wanted = WantedStorage { snapshots: vec![snapshot()], ..garbage() };
    assert_eq!(World::parts(&[1, 2]).plan(wanted).begin, []);
    let source = WantedStorage { volumes: vec![of_snapshot(5, 1)], ..garbage() };
    let begin = World::parts(&[1, 2]).plan(source).begin;
    assert!(begin.contains(&delete(2)) && !begin.contains(&delete(1)), "{begin:?}");

    // What is being taken may be there any moment; what cannot be read may be, too.
    let taking = World::parts(&[]).busy(part_thing(1), Work::Take, 0, 0);
    let plan = taking.plan(garbage());
    assert_eq!((plan.begin, plan.snapshots.len()), (vec![], 1));
    for inventory in [true, false] {
        let plan = World::parts(&[1, 2]).unreadable(inventory).plan(garbage());
        assert_eq!((plan.begin, plan.snapshots.len()), (vec![], 3));
        assert_eq!(plan.snapshots[0].state(), SnapshotState::Failed);
    }
    // One that is read.
    let plan = World::parts(&[1]).failed(part_thing(1), 0, NOW + 2000).plan(garbage());
    assert_eq!(plan.snapshots[0].state_reason, "cannot be removed: why");
}

#[test]
fn everything_that_is_there_is_told() {
    let mut world = World::parts(&[1, 2]);
    world.quiesced.insert(part_id(2));
    for wanted in [None, Some(with(snapshot()))] {
        let plan = world.plan(wanted);
        let told: Vec<_> = plan
            .snapshots
            .iter()
            .map(|part| (part.uid.clone(), part.volume_uid.clone(), part.quiesced))
            .collect();
        assert_eq!(told, [(uid(0x11), uid(1), false), (uid(0x12), uid(2), true)]);
        assert!(plan.begin.is_empty() && plan.snapshots[0].allocated_bytes == 512);
    }
}
