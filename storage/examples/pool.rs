//! Drives a real pool, by hand or in a lab host; LVM cannot be tried without root and a volume
//! group.
//!
//! ```text
//! pool SPEC tour               every operation, with checks of what the volumes hold
//! pool SPEC list|usage|clean-up
//! pool SPEC import raw|qcow2 FILE
//! pool SPEC hold VOLUME        opens it as a VMM does, until standard input ends
//! pool SPEC delete VOLUME
//! pool SPEC churn              the same volume over and over, until killed
//! pool SPEC recover            after churn was killed: nothing may be left, or half done
//! pool SPEC fill               imports until the pool says that it has no room
//! ```

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use drover_storage::image::{ImageLimits, ImageWriter, Import, Progress, Source, Watch, import};
use drover_storage::pool::{self, Contents, ImageInfo, SnapshotId, Thresholds, VolumeId};
use drover_storage::volume::VolumeWriter;
use drover_storage::{Pool, PoolError};
use uuid::Uuid;

type Done<T = ()> = Result<T, Box<dyn std::error::Error>>;

const MIB: u64 = 1 << 20;
/// What churn writes at the beginning of its volume, in turn; 7 is the image's.
const MARKS: [u8; 3] = [7, 21, 22];

fn main() -> Done {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let [spec, command, rest @ ..] = words.as_slice() else {
        return Err("pool SPEC COMMAND …: see the head of this file".into());
    };
    let pool = pool::open(&spec.parse()?, "example")?;
    match (*command, rest) {
        ("tour", []) => tour(&pool),
        ("list", []) => {
            println!("{:#?}", pool.list()?);
            Ok(())
        }
        ("usage", []) => {
            let usage = pool.usage()?;
            println!("{usage}: {:?}", usage.level(Thresholds::default()));
            Ok(())
        }
        ("clean-up", []) => {
            println!("removed {:?}", pool.clean_up()?);
            Ok(())
        }
        ("import", [format, file]) => import_file(&pool, format, Path::new(file)),
        ("hold", [volume]) => {
            let _file = hold(&pool.activate(volume.parse()?)?)?;
            println!("held");
            std::io::stdin().read_to_end(&mut Vec::new())?;
            Ok(())
        }
        ("delete", [volume]) => Ok(pool.delete_volume(volume.parse()?)?),
        ("churn", []) => churn(&pool),
        ("recover", []) => recover(&pool),
        ("fill", []) => fill(&pool),
        _ => Err(format!("{command}: see the head of this file").into()),
    }
}

fn volume_id(number: u128) -> VolumeId {
    Uuid::from_u128(number).into()
}

fn snapshot_id(number: u128) -> SnapshotId {
    Uuid::from_u128(number).into()
}

/// Opens and locks as a VMM does.
fn hold(path: &Path) -> Done<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let is_device = std::fs::canonicalize(path)?.starts_with("/dev");
    let flags = if is_device { libc::O_EXCL } else { 0 };
    let file = File::options().read(true).write(true).custom_flags(flags).open(path)?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

fn poke(path: &Path, offset: u64, byte: u8) -> Done {
    let file = hold(path)?;
    file.write_all_at(&[byte; 4096], offset)?;
    Ok(file.sync_all()?)
}

fn peek(path: &Path, offset: u64) -> Done<u8> {
    let mut byte = [0];
    File::open(path)?.read_exact_at(&mut byte, offset)?;
    Ok(byte[0])
}

/// 7 at its beginning, in its middle and at its end.
fn make_image(pool: &Arc<dyn Pool>, bytes: u64) -> Done<ImageInfo> {
    let mut writer = ImageWriter::new(pool, bytes, ImageLimits::default())?;
    for offset in [0, bytes / 2 / MIB * MIB, bytes - 512] {
        writer.write(offset, &[7; 512])?;
    }
    Ok(writer.finish(None)?)
}

/// Runs one step and says how long it took.
fn step<T>(name: &str, run: impl FnOnce() -> Done<T>) -> Done<T> {
    let started = Instant::now();
    let result = run().map_err(|error| format!("{name}: {error}"))?;
    println!("{name}: {:.2} s", started.elapsed().as_secs_f64());
    Ok(result)
}

fn expect_busy<T>(result: Result<T, PoolError>) -> Done {
    match result {
        Err(PoolError::Busy { .. }) => Ok(()),
        Err(error) => Err(format!("not the expected error: {error}").into()),
        Ok(_) => Err("what is in use was taken away".into()),
    }
}

fn tour(pool: &Arc<dyn Pool>) -> Done {
    let before = pool.list()?;
    println!("live snapshots: {}", pool.has_live_snapshots());
    let image = step("image", || make_image(pool, 10 * MIB + 512))?;
    let again = step("image again", || make_image(pool, 10 * MIB + 512))?;
    assert_eq!((again.id, again.bytes), (image.id, 10 * MIB + 512));
    step("image: verify and travel", || {
        let open = pool.open_image(image.id)?;
        assert_eq!(open.verify()?, image.id);
        expect_busy(pool.delete_image(image.id))?;
        let mut writer = ImageWriter::new(pool, open.bytes(), ImageLimits::default())?;
        for chunk in open.chunks(0) {
            let chunk = chunk?;
            writer.write(chunk.offset, &chunk.bytes)?;
        }
        assert_eq!(writer.finish(Some(image.id))?.id, image.id);
        Ok(())
    })?;

    let (empty, clone) = (volume_id(1), volume_id(2));
    let info = step("create", || Ok(pool.create_volume(empty, 50 * MIB)?))?;
    assert_eq!(info.bytes, (50 * MIB).next_multiple_of(pool.grain_bytes()));
    step("create again", || Ok(pool.create_volume(empty, 50 * MIB)?))?;
    let other = pool.create_volume(empty, 100 * MIB);
    assert!(matches!(other, Err(PoolError::Conflict { .. })), "{other:?}");
    step("clone", || Ok(pool.clone_image(clone, image.id, 64 * MIB)?))?;
    let path = step("activate", || Ok(pool.activate(clone)?))?;
    for (offset, byte) in [(0, 7), (5 * MIB, 7), (10 * MIB, 7), (11 * MIB, 0), (64 * MIB - 1, 0)] {
        assert_eq!(peek(&path, offset)?, byte, "at {offset}");
    }
    poke(&path, 0, 1)?;
    let one = step("snapshot", || Ok(pool.create_snapshot(clone, snapshot_id(1))?))?;
    assert_eq!(one.bytes, 64 * MIB);
    poke(&path, 0, 2)?;
    let vmm = hold(&path)?;
    vmm.write_all_at(&[3; 4096], 63 * MIB)?;
    step("snapshot while open", || Ok(pool.create_snapshot(clone, snapshot_id(2))?))?;
    step("grow while open", || Ok(pool.grow_volume(clone, 128 * MIB)?))?;
    assert_eq!(rustix::fs::seek(&vmm, rustix::fs::SeekFrom::End(0))?, 128 * MIB);
    vmm.write_all_at(&[4; 4096], 127 * MIB)?;
    step("refuse while open", || {
        expect_busy(pool.delete_volume(clone))?;
        expect_busy(pool.open_volume(clone))?;
        expect_busy(pool.deactivate(clone))
    })?;
    drop(vmm);
    let replaced = volume_id(4);
    step("clone a snapshot", || {
        Ok(pool.clone_snapshot(replaced, clone, snapshot_id(1), 128 * MIB)?)
    })?;
    let path = pool.activate(replaced)?;
    let bytes =
        [peek(&path, 0)?, peek(&path, 5 * MIB)?, peek(&path, 63 * MIB)?, peek(&path, 127 * MIB)?];
    assert_eq!(bytes, [1, 7, 0, 0]);
    step("read while nobody has it", || {
        let (volume, snapshot) =
            (pool.open_volume(replaced)?, pool.open_snapshot(clone, snapshot_id(2))?);
        assert_eq!((volume.bytes(), snapshot.bytes()), (128 * MIB, 64 * MIB));
        assert!(hold(&path).is_err(), "no VMM gets it meanwhile");
        expect_busy(pool.delete_volume(replaced))?;
        expect_busy(pool.delete_snapshot(clone, snapshot_id(2)))?;
        let chunks = snapshot.chunks(0).collect::<Result<Vec<_>, _>>()?;
        let begins: Vec<_> =
            chunks.iter().map(|chunk| (chunk.offset / MIB, chunk.bytes[0])).collect();
        assert_eq!(begins, [(0, 2), (5, 7), (10, 7), (63, 3)], "the open writer's bytes are there");
        Ok(())
    })?;
    step("copy", || {
        let (source, copied) = (pool.open_volume(replaced)?, volume_id(5));
        let mut writer = VolumeWriter::new(pool, source.bytes())?;
        for chunk in source.chunks(0) {
            let chunk = chunk?;
            writer.write(chunk.offset, &chunk.bytes)?;
        }
        assert!(pool.volume(copied)?.is_none());
        writer.finish(copied)?;
        assert_eq!(peek(&pool.activate(copied)?, 5 * MIB)?, 7);
        Ok(pool.delete_volume(copied)?)
    })?;
    step("drop a draft of a snapshot", || {
        let draft = pool.draft_snapshot(clone, snapshot_id(9), &AtomicBool::new(false))?;
        drop(draft);
        assert_eq!(pool.list()?.leftovers, before.leftovers);
        Ok(())
    })?;
    assert_eq!(pool.snapshots(clone)?.len(), 2);
    step("delete snapshot", || Ok(pool.delete_snapshot(clone, snapshot_id(1))?))?;
    assert_eq!(pool.snapshots(clone)?.len(), 1);
    let opened = pool.open_image(image.id)?;
    assert_eq!(opened.verify()?, image.id, "nothing above changed the image");
    drop(opened);
    step("deactivate", || Ok(pool.deactivate(clone)?))?;

    println!("{:#?}", pool.list()?);
    println!("{}", pool.usage()?);
    step("delete image", || Ok(pool.delete_image(image.id)?))?;
    let path = pool.activate(clone)?;
    assert_eq!(peek(&path, 5 * MIB)?, 7, "a clone stands by itself");
    step("delete", || Ok(pool.delete_volume(clone)?))?;
    assert_eq!(pool.snapshots(clone)?.len(), 1, "it stands by itself");
    let again = pool.clone_snapshot(clone, clone, snapshot_id(2), 64 * MIB)?;
    assert_eq!(peek(&pool.activate(again.id)?, 63 * MIB)?, 3);
    pool.delete_volume(clone)?;
    pool.delete_snapshot(clone, snapshot_id(2))?;
    pool.delete_volume(replaced)?;
    step("delete another", || Ok(pool.delete_volume(empty)?))?;
    step("delete what is gone", || Ok(pool.delete_volume(clone)?))?;
    assert_eq!(pool.list()?, before);
    println!("{}", pool.usage()?);
    Ok(())
}

fn import_file(pool: &Arc<dyn Pool>, format: &str, file: &Path) -> Done {
    let what = Import { format: format.parse()?, sha256: None, limits: ImageLimits::default() };
    let cancel = AtomicBool::new(false);
    let mut last = None;
    let mut progress = |at: Progress| {
        let percent = at.done * 100 / at.total.max(1);
        if last.replace((at.stage, percent)) != Some((at.stage, percent)) {
            println!("{:?} {percent} %", at.stage);
        }
    };
    let mut watch = Watch { progress: &mut progress, cancel: &cancel };
    let image = step("import", || Ok(import(pool, Source::File(file), &what, &mut watch)?))?;
    println!("{image:?}");
    let found = step("verify", || Ok(pool.open_image(image.id)?.verify()?))?;
    assert_eq!(found, image.id);
    Ok(())
}

fn churn(pool: &Arc<dyn Pool>) -> Done {
    let (volume, snapshot) = (volume_id(3), snapshot_id(3));
    loop {
        let image = make_image(pool, 8 * MIB)?;
        pool.clone_image(volume, image.id, 64 * MIB)?;
        poke(&pool.activate(volume)?, 0, MARKS[1])?;
        pool.create_snapshot(volume, snapshot)?;
        poke(&pool.activate(volume)?, 0, MARKS[2])?;
        pool.deactivate(volume)?;
        pool.delete_volume(volume)?;
        pool.clone_snapshot(volume, volume, snapshot, 64 * MIB)?;
        assert_eq!(peek(&pool.activate(volume)?, 0)?, MARKS[1]);
        pool.delete_volume(volume)?;
        pool.delete_snapshot(volume, snapshot)?;
        pool.delete_image(image.id)?;
        println!("round");
    }
}

fn recover(pool: &Arc<dyn Pool>) -> Done {
    println!("removed {:?}", pool.clean_up()?);
    let all = pool.list()?;
    assert!(all.leftovers.is_empty(), "{all:#?}");
    if let Some(volume) = pool.volume(volume_id(3))? {
        assert_eq!(volume.bytes, 64 * MIB);
        let path = pool.activate(volume.id)?;
        let (first, middle) = (peek(&path, 0)?, peek(&path, 4 * MIB)?);
        assert!(MARKS.contains(&first) && middle == 7, "{first} {middle}");
        println!("the volume is there, with mark {first}");
    }
    for image in &all.images {
        assert_eq!(pool.open_image(image.id)?.verify()?, image.id);
        pool.delete_image(image.id)?;
    }
    pool.delete_volume(volume_id(3))?;
    pool.delete_snapshot(volume_id(3), snapshot_id(3))?;
    let strangers = all.strangers;
    assert_eq!(pool.list()?, Contents { strangers, ..Contents::default() });
    println!("nothing is left");
    Ok(())
}

fn fill(pool: &Arc<dyn Pool>) -> Done {
    let image = ImageWriter::new(pool, 1 << 40, ImageLimits::default());
    let mut writer = image?;
    let noise: Vec<u8> = (0..MIB).map(|index| (index * 7 + index / 251) as u8 | 1).collect();
    for index in 0.. {
        match writer.write(index * MIB, &noise) {
            Ok(()) => {}
            Err(PoolError::NoRoom { detail, .. }) => {
                println!("no room after {index} MiB: {detail}");
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    drop(writer);
    println!("{}", pool.usage()?);
    Ok(())
}
