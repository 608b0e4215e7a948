//! The rules of a pool that several nodes share.

use super::*;

const POOL: &str = "0b6c9c0e-0000-4000-8000-000000000001";

fn shared(volumes: &[u8], is_stale: bool) -> World {
    let mut world = World::with(volumes, &[]);
    let seen = world.pools.get_mut("main").unwrap();
    seen.shared_uid = POOL.into();
    seen.is_stale = is_stale;
    world
}

fn there(n: u8) -> WantedVolume {
    WantedVolume { create: false, shared_uid: POOL.into(), ..blank(n) }
}

fn garbage(n: u8) -> Garbage {
    Garbage { shared_uid: POOL.into(), ..garbage_volume(n) }
}

fn states(plan: &Plan) -> Vec<(String, VolumeState)> {
    plan.volumes.iter().map(|said| (said.uid.clone(), said.state())).collect()
}

/// Every node sees every file, and speaks of those that are its business.
#[test]
fn a_node_speaks_only_of_what_it_was_told_of() {
    let world = shared(&[1, 2, 3], false);
    let wanted = WantedStorage {
        volumes: vec![there(1)],
        garbage: vec![garbage(3)],
        ..WantedStorage::default()
    };
    let plan = world.plan(wanted);
    assert_eq!(states(&plan), [(uid(1), VolumeState::Ready), (uid(3), VolumeState::Ready)]);
    assert_eq!(plan.begin, [(volume_thing(3), Work::Delete)]);
    assert!(states(&world.plan(None::<WantedStorage>)).is_empty());
}

/// What another node has made or is about to remove is not lost, nor gone, before a look.
#[test]
fn nothing_is_called_missing_before_another_look() {
    let wanted = WantedStorage {
        volumes: vec![there(1)],
        garbage: vec![garbage(2)],
        ..WantedStorage::default()
    };
    let plan = shared(&[], true).plan(wanted.clone());
    assert_eq!(states(&plan), [(uid(1), VolumeState::Creating), (uid(2), VolumeState::Creating)]);
    assert!(plan.begin.is_empty(), "{plan:?}");
    let plan = shared(&[], false).plan(wanted);
    assert_eq!(states(&plan), [(uid(1), VolumeState::Failed)], "and the other is gone");
}

/// Under the same id there may be another pool than the controller knows: it is left alone.
#[test]
fn in_another_pool_nothing_is_made_or_removed() {
    let own = |volume: WantedVolume| WantedVolume { shared_uid: String::new(), ..volume };
    let wanted = WantedStorage {
        volumes: vec![own(there(1)), WantedVolume { create: true, ..own(there(3)) }],
        garbage: vec![garbage_volume(2)],
        ..WantedStorage::default()
    };
    let plan = shared(&[1, 2], false).plan(wanted);
    assert!(plan.begin.is_empty(), "{plan:?}");
    let expected = [
        (uid(1), VolumeState::Creating),
        (uid(3), VolumeState::Creating),
        (uid(2), VolumeState::Failed),
    ];
    assert_eq!(states(&plan), expected);
    assert!(plan.volumes[0].state_reason.contains("and the node's own is meant"), "{plan:?}");

    let wanted = WantedStorage {
        volumes: vec![there(1)],
        garbage: vec![garbage(2)],
        ..WantedStorage::default()
    };
    let plan = World::with(&[1, 2], &[]).plan(wanted);
    assert!(plan.begin.is_empty(), "{plan:?}");
    assert_eq!(states(&plan), [(uid(1), VolumeState::Creating), (uid(2), VolumeState::Failed)]);
}

/// Whoever names something anew wants to know how it stands now.
#[test]
fn what_is_named_anew_asks_for_a_look() {
    let before = want(vec![there(1)]);
    assert!(!before.speaks_of_more(&before, "main"));
    assert!(want(vec![there(1), there(2)]).speaks_of_more(&before, "main"));
    assert!(!want(vec![there(1), there(2)]).speaks_of_more(&before, "other"));
    let garbage = WantedStorage { garbage: vec![garbage(1)], ..WantedStorage::default() };
    assert!(garbage.speaks_of_more(&before, "main"));
    assert!(!garbage.speaks_of_more(&garbage, "main"));
}
