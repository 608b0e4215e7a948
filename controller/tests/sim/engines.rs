//! The disk on which the simulator runs the core behaves as the one that really is there.

use std::fs;
use std::path::{Path, PathBuf};

use drover_controller::store::{Batch, Engine, Family, KEY_END, KeyValue, OpenError, RocksEngine};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngExt as _, SeedableRng as _};

use super::disk::SimDisk;

fn all(engine: &dyn Engine, family: Family) -> Vec<KeyValue> {
    engine.scan(family, &[], usize::MAX).unwrap()
}

/// What any engine must do.
fn conforms(engine: &dyn Engine) {
    let pair = |key: &str, value: &str| (key.as_bytes().to_vec(), value.as_bytes().to_vec());
    let mut batch = Batch::default();
    for (key, value) in [("b", "2"), ("a", "1"), ("d", "4"), ("c", "3")] {
        batch.put(Family::Data, key, value.into());
    }
    batch.put(Family::Log, "a", b"other family".to_vec());
    engine.write(batch, true).unwrap();
    assert_eq!(engine.get(Family::Data, b"a").unwrap().unwrap(), b"1");
    assert_eq!(engine.get(Family::Log, b"a").unwrap().unwrap(), b"other family");
    assert_eq!(engine.get(Family::Events, b"a").unwrap(), None);
    let sorted = [pair("a", "1"), pair("b", "2"), pair("c", "3"), pair("d", "4")];
    assert_eq!(all(engine, Family::Data), sorted);
    // From a key on, the key included or not there at all; at most so many.
    assert_eq!(engine.scan(Family::Data, b"b", 2).unwrap(), sorted[1..3]);
    assert_eq!(engine.scan(Family::Data, b"bb", 9).unwrap(), sorted[2..]);
    assert_eq!(engine.scan(Family::Data, KEY_END, 9).unwrap(), []);

    // A batch is made in its order, and a range ends before its end.
    let mut batch = Batch::default();
    batch.put(Family::Data, "b", b"new".to_vec());
    batch.delete_range(Family::Data, "b", "d");
    batch.put(Family::Data, "c", b"again".to_vec());
    batch.delete(Family::Data, "a");
    batch.delete(Family::Data, "never was");
    engine.write(batch, false).unwrap();
    assert_eq!(all(engine, Family::Data), [pair("c", "again"), pair("d", "4")]);
    let mut batch = Batch::default();
    batch.clear(Family::Data);
    batch.put(Family::Data, "e", b"5".to_vec());
    engine.write(batch, false).unwrap();
    assert_eq!(all(engine, Family::Data), [pair("e", "5")]);
    assert_eq!(all(engine, Family::Log).len(), 1);
}

#[test]
fn both_engines_conform() {
    conforms(&SimDisk::default());
    let dir = tempfile::tempdir().unwrap();
    conforms(&RocksEngine::open(dir.path()).unwrap());
}

/// The same random batches give the same content, also after a crash behind a sync.
#[test]
fn both_engines_agree() {
    let dir = tempfile::tempdir().unwrap();
    let mut rng = SmallRng::seed_from_u64(1);
    let disk = SimDisk::default();
    for life in 0..5 {
        let rocks = RocksEngine::open(dir.path()).unwrap();
        for step in 0..100 {
            let batch = random_batch(&mut rng);
            let sync = step == 99 || rng.random_bool(0.3);
            disk.write(batch.clone(), sync).unwrap();
            rocks.write(batch, sync).unwrap();
        }
        for family in Family::ALL {
            assert_eq!(all(&disk, family), all(&rocks, family), "life {life}, {family:?}");
        }
        drop(rocks);
        disk.crash(0);
    }
}

fn random_batch(rng: &mut SmallRng) -> Batch {
    let key = |rng: &mut SmallRng| rng.random_range(0..200_u8).to_be_bytes().to_vec();
    let mut batch = Batch::default();
    for _ in 0..rng.random_range(1..10) {
        let family = Family::ALL[rng.random_range(0..Family::ALL.len())];
        match rng.random_range(0..8) {
            0..=5 => batch.put(family, key(rng), rng.next_u64().to_be_bytes().to_vec()),
            6 => batch.delete(family, key(rng)),
            _ => {
                let from = key(rng);
                let to = vec![from[0].saturating_add(rng.random_range(0..40))];
                batch.delete_range(family, from, to);
            }
        }
    }
    batch
}

/// A crash of the simulated disk keeps what was synced, and some prefix of the rest.
#[test]
fn an_unsynced_batch_may_be_lost() {
    for keep in 0..=2 {
        let disk = SimDisk::default();
        for (key, sync) in [("a", true), ("b", false), ("c", false)] {
            let mut batch = Batch::default();
            batch.put(Family::Log, key, Vec::new());
            disk.write(batch, sync).unwrap();
        }
        disk.crash(keep);
        assert_eq!(all(&disk, Family::Log).len(), 1 + keep);
    }
}

#[test]
fn a_directory_has_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let first = RocksEngine::open(dir.path()).unwrap();
    let error = RocksEngine::open(dir.path()).err().unwrap();
    assert!(matches!(error, OpenError::Locked(_)), "{error}");
    assert!(error.to_string().starts_with("--data-dir "), "{error}");
    drop(first);
    RocksEngine::open(dir.path()).unwrap();
}

/// A write-ahead log with 100 batches, closed.
fn with_write_ahead_log(dir: &Path) -> PathBuf {
    let rocks = RocksEngine::open(dir).unwrap();
    for i in 0..100_u64 {
        let mut batch = Batch::default();
        batch.put(Family::Log, i.to_be_bytes(), vec![7; 1000]);
        rocks.write(batch, true).unwrap();
    }
    drop(rocks);
    let files = fs::read_dir(dir.join("db")).unwrap().map(|file| file.unwrap().path());
    let logs = files.filter(|path| path.extension().is_some_and(|e| e == "log"));
    logs.max_by_key(|path| path.metadata().unwrap().len()).unwrap()
}

/// What a crash leaves at the log's end is forgiven, and what came before it is there.
#[test]
fn a_torn_tail_is_forgiven() {
    let dir = tempfile::tempdir().unwrap();
    let log = with_write_ahead_log(dir.path());
    let length = log.metadata().unwrap().len();
    assert!(length > 100_000, "{length}");
    fs::File::options().write(true).open(log).unwrap().set_len(length - 500).unwrap();
    let rocks = RocksEngine::open(dir.path()).unwrap();
    assert_eq!(all(&rocks, Family::Log).len(), 99);
}

/// Damage before the end is not: RocksDB's default would silently forget all behind it, which
/// may have been acknowledged.
#[test]
fn a_damaged_middle_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let log = with_write_ahead_log(dir.path());
    let mut bytes = fs::read(&log).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    fs::write(log, bytes).unwrap();
    let error = RocksEngine::open(dir.path()).err().unwrap();
    assert!(matches!(error, OpenError::Database { .. }), "{error}");
}
