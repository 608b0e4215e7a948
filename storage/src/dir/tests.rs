//! What a directory pool promises, and a model that it is compared with.

mod shared;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use uuid::Uuid;

use super::*;
use crate::image::{CHUNK_BYTES, ImageLimits, ImageWriter, chunk_digest};
use crate::pool;
use crate::volume::VolumeWriter;

const MIB: u64 = 1 << 20;

fn pool() -> (tempfile::TempDir, Arc<dyn Pool>) {
    let dir = tempfile::tempdir().unwrap();
    let pool = pool::open(&PoolSpec::Dir { path: dir.path().to_owned() }, "a").unwrap();
    (dir, pool)
}

fn volume_id(number: u128) -> VolumeId {
    Uuid::from_u128(number).into()
}

fn snapshot_id(number: u128) -> SnapshotId {
    Uuid::from_u128(number).into()
}

/// An image of 6 MiB with a byte at its beginning, in the middle and at its end.
fn image(pool: &Arc<dyn Pool>, byte: u8) -> ImageInfo {
    let mut writer = ImageWriter::new(pool, 6 * MIB, ImageLimits::default()).unwrap();
    for offset in [0, 3 * MIB, 6 * MIB - 1] {
        writer.write(offset, &[byte]).unwrap();
    }
    writer.finish(None).unwrap()
}

fn poke(path: &Path, offset: u64, byte: u8) {
    File::options().write(true).open(path).unwrap().write_all_at(&[byte], offset).unwrap();
}

fn peek(path: &Path, offset: u64) -> u8 {
    let mut byte = [0];
    File::open(path).unwrap().read_exact_at(&mut byte, offset).unwrap();
    byte[0]
}

/// As a VMM opens a volume.
fn open_as_vmm(path: &Path) -> File {
    let file = File::options().read(true).write(true).open(path).unwrap();
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).unwrap();
    file
}

#[test]
fn what_cannot_be_a_pool_is_refused() {
    let (dir, _pool) = pool();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    for path in [dir.path().join("missing"), file] {
        let error = pool::open(&PoolSpec::Dir { path: path.clone() }, "a").unwrap_err();
        assert!(matches!(error, PoolError::Unfit { .. }), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn a_volume_lives_and_each_step_may_be_repeated() {
    let (_dir, pool) = pool();
    let id = volume_id(1);
    for _ in 0..2 {
        let volume = pool.create_volume(id, 5 * MIB + 512).unwrap();
        assert_eq!((volume.bytes, volume.allocated_bytes), (8 * MIB, Some(0)));
    }
    assert!(matches!(pool.create_volume(id, 9 * MIB), Err(PoolError::Conflict { .. })));
    let path = pool.activate(id).unwrap();
    poke(&path, 8 * MIB - 1, 1);
    for _ in 0..2 {
        assert_eq!(pool.grow_volume(id, 12 * MIB).unwrap().bytes, 12 * MIB);
    }
    let error = pool.grow_volume(id, 8 * MIB).unwrap_err().to_string();
    assert!(error.contains("cannot shrink"), "{error}");
    assert_eq!((peek(&path, 8 * MIB - 1), peek(&path, 12 * MIB - 1)), (1, 0));
    pool.deactivate(id).unwrap();
    for _ in 0..2 {
        pool.delete_volume(id).unwrap();
    }
    assert_eq!(pool.list().unwrap(), Contents::default());
    assert!(matches!(pool.activate(id), Err(PoolError::NotFound { .. })));
    pool.deactivate(id).unwrap();
}

#[test]
fn sizes_that_cannot_be_are_refused_and_nothing_is_left() {
    let (_dir, pool) = pool();
    for bytes in [0, 1, 513, pool::VOLUME_BYTES_MAX + 512, u64::MAX, u64::MAX - 511] {
        let error = pool.create_volume(volume_id(1), bytes).unwrap_err().to_string();
        assert!(error.starts_with("bytes: ") && error.contains("multiple of 512"), "{error}");
    }
    assert_eq!(pool.list().unwrap(), Contents::default());
}

#[test]
fn a_clone_begins_with_its_image_and_stands_by_itself() {
    let (_dir, pool) = pool();
    let image = image(&pool, 7);
    let clone = pool.clone_image(volume_id(1), image.id, 10 * MIB).unwrap();
    assert_eq!(clone.bytes, 12 * MIB);
    let bytes: Vec<_> = [0, 3 * MIB, 6 * MIB - 1, 6 * MIB].map(|at| peek(&clone.path, at)).into();
    assert_eq!(bytes, [7, 7, 7, 0]);
    poke(&clone.path, 0, 9);
    assert_eq!(pool.open_image(image.id).unwrap().verify().unwrap(), image.id);
    assert_eq!(pool.clone_image(volume_id(1), image.id, 10 * MIB).unwrap().bytes, 12 * MIB);
    assert_eq!(peek(&clone.path, 0), 9, "a repeated clone must not overwrite");
    pool.delete_image(image.id).unwrap();
    pool.delete_image(image.id).unwrap();
    assert_eq!(peek(&clone.path, 3 * MIB), 7);

    let error = pool.clone_image(volume_id(2), image.id, 10 * MIB).unwrap_err();
    assert!(matches!(error, PoolError::NotFound { .. }), "{error}");
    let image = self::image(&pool, 7);
    let error = pool.clone_image(volume_id(2), image.id, 4 * MIB).unwrap_err().to_string();
    assert!(error.contains("at least 6291456"), "{error}");
    assert_eq!(pool.list().unwrap().volumes.len(), 1);
}

#[test]
fn images_are_read_only_shared_by_readers_and_kept_while_read() {
    let (_dir, pool) = pool();
    let image = image(&pool, 7);
    assert_eq!(self::image(&pool, 7), image, "the same content is the same image");
    let (one, two) = (pool.open_image(image.id).unwrap(), pool.open_image(image.id).unwrap());
    let mode = fs::metadata(one.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o400);
    assert!(matches!(pool.delete_image(image.id), Err(PoolError::Busy { .. })));
    drop((one, two));
    pool.delete_image(image.id).unwrap();
    assert!(matches!(pool.open_image(image.id), Err(PoolError::NotFound { .. })));
    assert_eq!(pool.list().unwrap(), Contents::default());
}

#[test]
fn what_a_vmm_has_open_is_not_taken_away() {
    let (_dir, pool) = pool();
    let id = volume_id(1);
    let path = pool.create_volume(id, 4 * MIB).unwrap().path;
    pool.create_snapshot(id, snapshot_id(1)).unwrap();
    let vmm = open_as_vmm(&path);
    let is_busy = |result: Result<()>| matches!(result, Err(PoolError::Busy { .. }));
    assert!(is_busy(pool.delete_volume(id)));
    assert!(is_busy(pool.open_volume(id).map(drop)), "nor read");
    assert!(is_busy(pool.deactivate(id)));
    pool.open_snapshot(id, snapshot_id(1)).unwrap();
    pool.grow_volume(id, 8 * MIB).unwrap();
    pool.create_snapshot(id, snapshot_id(2)).unwrap();
    assert_eq!(vmm.metadata().unwrap().len(), 8 * MIB);
    drop(vmm);
    pool.delete_volume(id).unwrap();
    assert_eq!(pool.list().unwrap().volumes, []);
}

#[test]
fn what_is_read_is_neither_opened_by_a_vmm_nor_deleted() {
    let (_dir, pool) = pool();
    let (id, snapshot) = (volume_id(1), snapshot_id(1));
    let path = pool.create_volume(id, 4 * MIB).unwrap().path;
    poke(&path, 3 * MIB - 1, 7);
    pool.create_snapshot(id, snapshot).unwrap();
    let (one, two) = (pool.open_volume(id).unwrap(), pool.open_volume(id).unwrap());
    let vmm = File::options().write(true).open(&path).unwrap();
    assert!(rustix::fs::flock(&vmm, FlockOperation::NonBlockingLockExclusive).is_err());
    assert!(matches!(pool.delete_volume(id), Err(PoolError::Busy { .. })));
    let chunks: Vec<_> = one.chunks(0).map(Result::unwrap).collect();
    assert_eq!((one.bytes(), chunks.len(), chunks[0].offset), (4 * MIB, 1, 2 * MIB));
    assert_eq!(chunks[0].bytes[MIB as usize - 1], 7);
    drop((one, two));
    rustix::fs::flock(&vmm, FlockOperation::NonBlockingLockExclusive).unwrap();

    let open = pool.open_snapshot(id, snapshot).unwrap();
    assert!(matches!(pool.delete_snapshot(id, snapshot), Err(PoolError::Busy { .. })));
    assert_eq!(open.chunks(0).count(), 1);
    drop(open);
    pool.delete_snapshot(id, snapshot).unwrap();
    assert!(matches!(pool.open_snapshot(id, snapshot), Err(PoolError::NotFound { .. })));
    assert!(matches!(pool.open_volume(volume_id(2)), Err(PoolError::NotFound { .. })));
}

/// Whichever goes first, the other stays whole; and what was made of a snapshot needs neither.
#[test]
fn a_snapshot_outlives_its_volume_and_becomes_others() {
    let (_dir, pool) = pool();
    let (id, snapshot) = (volume_id(1), snapshot_id(1));
    let path = pool.create_volume(id, 4 * MIB).unwrap().path;
    poke(&path, 5, 7);
    pool.create_snapshot(id, snapshot).unwrap();
    poke(&path, 5, 8);
    pool.delete_volume(id).unwrap();
    assert_eq!(pool.list().unwrap().snapshots.len(), 1);
    for _ in 0..2 {
        let clone = pool.clone_snapshot(volume_id(2), id, snapshot, 12 * MIB).unwrap();
        assert_eq!(clone.bytes, 12 * MIB);
    }
    let small = pool.clone_snapshot(volume_id(3), id, snapshot, 512);
    assert!(small.is_ok(), "as large as the snapshot, rounded up: {small:?}");
    let other = pool.clone_snapshot(volume_id(2), id, snapshot, 4 * MIB);
    assert!(matches!(other, Err(PoolError::Conflict { .. })), "{other:?}");
    pool.delete_snapshot(id, snapshot).unwrap();
    let missing = pool.clone_snapshot(volume_id(4), id, snapshot, 4 * MIB);
    assert!(matches!(missing, Err(PoolError::NotFound { .. })), "{missing:?}");
    let path = pool.activate(volume_id(2)).unwrap();
    assert_eq!((peek(&path, 5), peek(&path, 12 * MIB - 1)), (7, 0));

    pool.create_snapshot(volume_id(2), snapshot_id(2)).unwrap();
    let small = pool.clone_snapshot(volume_id(5), volume_id(2), snapshot_id(2), 4 * MIB);
    assert!(small.unwrap_err().to_string().contains("at least 12582912, which snapshot"));
}

/// Several are taken at one moment and seen together or not at all.
#[test]
fn a_draft_of_a_snapshot_is_nothing_until_it_is_published() {
    let (_dir, pool) = pool();
    let (id, snapshot) = (volume_id(1), snapshot_id(1));
    let path = pool.create_volume(id, 4 * MIB).unwrap().path;
    poke(&path, 0, 1);
    let draft = pool.draft_snapshot(id, snapshot, &AtomicBool::new(false)).unwrap();
    poke(&path, 0, 2);
    assert_eq!(pool.list().unwrap().snapshots, []);
    assert_eq!(pool.list().unwrap().leftovers.len(), 1);
    drop(draft);
    assert_eq!(pool.list().unwrap().leftovers, [""; 0]);
    let draft = pool.draft_snapshot(id, snapshot, &AtomicBool::new(false)).unwrap();
    poke(&path, 0, 3);
    assert_eq!(draft.publish().unwrap().bytes, 4 * MIB);
    let chunk = pool.open_snapshot(id, snapshot).unwrap().chunks(0).next().unwrap().unwrap();
    assert_eq!(chunk.bytes[0], 2);
    let cancelled = pool.draft_snapshot(id, snapshot_id(2), &AtomicBool::new(true));
    if !pool.has_live_snapshots() {
        assert!(matches!(cancelled, Err(PoolError::Cancelled)), "{cancelled:?}");
    }
}

#[test]
fn a_volume_from_elsewhere_is_seen_when_it_is_whole() {
    let (_dir, pool) = pool();
    let id = volume_id(1);
    let mut writer = VolumeWriter::new(&pool, 8 * MIB).unwrap();
    writer.write(0, &[7; 5000]).unwrap();
    writer.write(3 * MIB, &[8; 512]).unwrap();
    for (offset, bytes) in [(2 * MIB, &[9; 512][..]), (8 * MIB - 1, &[9; 2]), (u64::MAX, &[9])] {
        let error = writer.write(offset, bytes).unwrap_err();
        assert!(error.to_string().contains("content between 3146240 and 8388608"), "{error}");
    }
    assert_eq!((pool.volume(id).unwrap(), pool.list().unwrap().leftovers.len()), (None, 1));
    assert_eq!(writer.finish(id).unwrap().bytes, 8 * MIB);
    let path = pool.activate(id).unwrap();
    assert_eq!([0, 4999, 5000, 3 * MIB].map(|at| peek(&path, at)), [7, 7, 0, 8]);
    drop(VolumeWriter::new(&pool, 8 * MIB).unwrap());
    let again = VolumeWriter::new(&pool, 12 * MIB).unwrap().finish(id);
    assert!(matches!(again, Err(PoolError::Conflict { .. })), "{again:?}");
    assert_eq!(pool.list().unwrap().leftovers, [""; 0]);
}

#[test]
fn a_short_chunk_counts_as_filled_with_zeros() {
    let mut whole = vec![0; CHUNK_BYTES as usize];
    whole[..1536].fill(5);
    assert_eq!(chunk_digest(&whole), chunk_digest(&[5; 1536]));
    assert_eq!(chunk_digest(&whole), chunk_digest(&whole[..MIB as usize - 512]));
    assert_ne!(chunk_digest(&whole), chunk_digest(&[5; 1537]));
}

#[test]
fn what_a_crash_leaves_is_listed_removed_and_nothing_else_is() {
    let (dir, pool) = pool();
    let image = image(&pool, 1);
    pool.create_volume(volume_id(1), MIB).unwrap();
    pool.create_snapshot(volume_id(1), snapshot_id(1)).unwrap();
    // A process that died holds no lock.
    let dead = dir.path().join("new").join(Uuid::from_u128(5).to_string());
    fs::write(&dead, b"half").unwrap();
    fs::write(dir.path().join("volumes/disk.qcow2"), b"").unwrap();
    let mut writer = ImageWriter::new(&pool, 2 * MIB, ImageLimits::default()).unwrap();
    writer.write(0, b"alive").unwrap();
    let before = pool.list().unwrap();
    assert_eq!(
        (before.leftovers.len(), &before.strangers[..]),
        (2, &["volumes/disk.qcow2".into()][..])
    );
    assert_eq!(pool.clean_up().unwrap(), [format!("new/{}", Uuid::from_u128(5))]);
    writer.finish(None).unwrap();
    let after = pool.list().unwrap();
    assert!(after.leftovers.is_empty());
    assert_eq!((after.volumes, after.snapshots), (before.volumes, before.snapshots));
    assert_eq!(after.images.len(), 2);
    assert!(after.images.contains(&image));
    assert_eq!(after.strangers, ["volumes/disk.qcow2"]);
}

#[test]
fn a_dropped_draft_and_a_wrong_digest_leave_nothing() {
    let (_dir, pool) = pool();
    let mut writer = ImageWriter::new(&pool, 2 * MIB, ImageLimits::default()).unwrap();
    writer.write(512, b"x").unwrap();
    drop(writer);
    let mut writer = ImageWriter::new(&pool, 2 * MIB, ImageLimits::default()).unwrap();
    writer.write(512, b"x").unwrap();
    let error = writer.finish(Some(ImageId([1; 32]))).unwrap_err();
    assert!(matches!(error, PoolError::Digest { field: "image", .. }), "{error}");
    assert_eq!(pool.list().unwrap(), Contents::default());
}

#[test]
fn usage_tells_of_the_filesystem() {
    let (_dir, pool) = pool();
    let usage = pool.usage().unwrap();
    assert!(usage.bytes > 0 && usage.used_bytes <= usage.bytes, "{usage:?}");
}

/// What is done to a pool with at most three volumes and three snapshots of each.
#[derive(Debug, Clone)]
enum Step {
    Create(u128, u64),
    Clone(u128, u64),
    Poke(u128, u8),
    Grow(u128, u64),
    Snapshot(u128, u128),
    CloneSnapshot(u128, (u128, u128), u64),
    DeleteSnapshot(u128, u128),
    Delete(u128),
    CleanUp,
}

fn step() -> impl Strategy<Value = Step> {
    let (volume, grains) = (0..3_u128, 1..4_u64);
    let pair = (0..3_u128, 0..3_u128);
    prop_oneof![
        1 => (volume.clone(), grains.clone()).prop_map(|(v, size)| Step::Create(v, size)),
        1 => (volume.clone(), grains.clone()).prop_map(|(v, size)| Step::Clone(v, size)),
        3 => (volume.clone(), any::<u8>()).prop_map(|(v, byte)| Step::Poke(v, byte)),
        1 => (volume.clone(), grains.clone()).prop_map(|(v, size)| Step::Grow(v, size)),
        2 => pair.clone().prop_map(|(v, s)| Step::Snapshot(v, s)),
        2 => (volume.clone(), pair.clone(), grains)
            .prop_map(|(v, of, size)| Step::CloneSnapshot(v, of, size)),
        1 => pair.prop_map(|(v, s)| Step::DeleteSnapshot(v, s)),
        1 => volume.prop_map(Step::Delete),
        1 => Just(Step::CleanUp),
    ]
}

/// Size in grains, and the byte at each grain's beginning.
type Content = (u64, [u8; 4]);

#[derive(Debug, Default, PartialEq)]
struct Model {
    volumes: BTreeMap<u128, Content>,
    snapshots: BTreeMap<(u128, u128), Content>,
}

impl Model {
    /// What should happen; false when the step should be refused.
    fn step(&mut self, step: &Step) -> bool {
        match *step {
            Step::Create(v, size) => self.volumes.entry(v).or_insert((size, [0; 4])).0 == size,
            Step::Clone(v, size) => match self.volumes.get(&v) {
                Some(have) => have.0 == size,
                None if size < 2 => false,
                None => self.volumes.insert(v, (size, [7, 0, 0, 0])).is_none(),
            },
            Step::Poke(v, byte) => self.volumes.get_mut(&v).is_some_and(|volume| {
                let grain = u64::from(byte) % volume.0;
                volume.1[grain as usize] = byte;
                true
            }),
            Step::Grow(v, size) => self.volumes.get_mut(&v).is_some_and(|volume| {
                let fits = size >= volume.0;
                volume.0 = volume.0.max(size);
                fits
            }),
            Step::Snapshot(v, s) => match self.volumes.get(&v) {
                Some(volume) => {
                    self.snapshots.entry((v, s)).or_insert(*volume);
                    true
                }
                // One that is there needs no volume.
                None => self.snapshots.contains_key(&(v, s)),
            },
            Step::CloneSnapshot(v, of, size) => match self.volumes.get(&v) {
                Some(have) => have.0 == size,
                None => match self.snapshots.get(&of) {
                    Some(snapshot) if snapshot.0 <= size => {
                        self.volumes.insert(v, (size, snapshot.1)).is_none()
                    }
                    _ => false,
                },
            },
            Step::DeleteSnapshot(v, s) => {
                self.snapshots.remove(&(v, s));
                true
            }
            Step::Delete(v) => {
                self.volumes.remove(&v);
                true
            }
            Step::CleanUp => true,
        }
    }
}

fn carry_out(pool: &dyn Pool, image: ImageId, step: &Step) -> Result<()> {
    // Ids of snapshots are unique in a pool.
    let snapshot = |v: u128, s: u128| snapshot_id(v * 10 + s);
    match *step {
        Step::Create(v, size) => pool.create_volume(volume_id(v), size * GRAIN_BYTES).map(drop),
        Step::Clone(v, size) => pool.clone_image(volume_id(v), image, size * GRAIN_BYTES).map(drop),
        Step::Poke(v, byte) => {
            let path = pool.activate(volume_id(v))?;
            let grains = fs::metadata(&path).unwrap().len() / GRAIN_BYTES;
            poke(&path, u64::from(byte) % grains * GRAIN_BYTES, byte);
            Ok(())
        }
        Step::Grow(v, size) => pool.grow_volume(volume_id(v), size * GRAIN_BYTES).map(drop),
        Step::Snapshot(v, s) => pool.create_snapshot(volume_id(v), snapshot(v, s)).map(drop),
        Step::CloneSnapshot(v, (of, s), size) => pool
            .clone_snapshot(volume_id(v), volume_id(of), snapshot(of, s), size * GRAIN_BYTES)
            .map(drop),
        Step::DeleteSnapshot(v, s) => pool.delete_snapshot(volume_id(v), snapshot(v, s)),
        Step::Delete(v) => pool.delete_volume(volume_id(v)),
        Step::CleanUp => pool.clean_up().map(drop),
    }
}

/// What the pool holds, as the model says it.
fn observe(pool: &dyn Pool) -> Model {
    let content = |path: &Path| {
        let size = fs::metadata(path).unwrap().len() / GRAIN_BYTES;
        let mut bytes = [0; 4];
        (0..size).for_each(|grain| bytes[grain as usize] = peek(path, grain * GRAIN_BYTES));
        (size, bytes)
    };
    let number = |id: VolumeId| Uuid::from(id).as_u128();
    let PoolSpec::Dir { path: root } = pool.spec() else { panic!("a directory") };
    let all = pool.list().unwrap();
    assert!(all.leftovers.is_empty() && all.strangers.is_empty(), "{all:?}");
    let volumes = all.volumes.iter().map(|volume| (number(volume.id), content(&volume.path)));
    let snapshots = all.snapshots.iter().map(|snapshot| {
        let path = root.join("snapshots").join(snapshot_name(snapshot.volume, snapshot.id));
        let id = Uuid::from(snapshot.id).as_u128() - number(snapshot.volume) * 10;
        ((number(snapshot.volume), id), content(&path))
    });
    Model { volumes: volumes.collect(), snapshots: snapshots.collect() }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is done in whatever order: the pool holds what the model holds, and says no
    /// where the model does.
    #[test]
    fn any_sequence_of_steps_ends_as_the_model_says(steps in prop::collection::vec(step(), 1..24)) {
        let (_dir, pool) = pool();
        let image = image(&pool, 7).id;
        let mut model = Model::default();
        for step in steps {
            let result = carry_out(pool.as_ref(), image, &step);
            prop_assert_eq!(result.is_ok(), model.step(&step), "{:?}: {:?}", &step, result);
            prop_assert_eq!(&observe(pool.as_ref()), &model, "after {:?}", &step);
        }
    }
}
