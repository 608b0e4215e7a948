//! Import into a directory pool, and travel from one pool to another.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::Digest;

use super::*;
use crate::pool::{self, Contents, ImageInfo, Pool, Sha256};
use crate::{PoolError, Result};

const MIB: u64 = 1 << 20;

fn pool() -> (tempfile::TempDir, Arc<dyn Pool>) {
    let dir = tempfile::tempdir().unwrap();
    let spec = format!("dir:{}", dir.path().display()).parse().unwrap();
    let pool = pool::open(&spec, "a").unwrap();
    (dir, pool)
}

/// Five megabytes and a bit, mostly zeros.
fn content() -> Vec<u8> {
    let mut content = vec![0; (5 * MIB + 300) as usize];
    content[..4].copy_from_slice(b"boot");
    content[3_000_000..3_100_000].fill(9);
    content[5 * MIB as usize + 299] = 1;
    content
}

fn id_of(content: &[u8]) -> pool::ImageId {
    let mut digester = Digester::new((content.len() as u64).next_multiple_of(512));
    digester.data(content);
    digester.finish()
}

fn sha256(bytes: &[u8]) -> Sha256 {
    Sha256(sha2::Sha256::digest(bytes).into())
}

fn what(format: Format) -> Import {
    Import { format, sha256: None, limits: ImageLimits::default() }
}

fn run(pool: &Arc<dyn Pool>, source: Source<'_>, what: &Import) -> Result<ImageInfo> {
    let cancel = AtomicBool::new(false);
    import(pool, source, what, &mut Watch { progress: &mut |_| {}, cancel: &cancel })
}

fn stream(pool: &Arc<dyn Pool>, content: &[u8], bytes: u64, what: &Import) -> Result<ImageInfo> {
    run(pool, Source::Stream { reader: &mut &*content, bytes }, what)
}

#[test]
fn raw_files_and_streams_become_the_same_image_and_holes_stay_holes() {
    let (dir, pool) = pool();
    let content = content();
    let path = dir.path().join("disk.raw");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    file.write_all_at(&content[..4], 0).unwrap();
    file.write_all_at(&content[3_000_000..3_100_000], 3_000_000).unwrap();
    file.write_all_at(&[1], content.len() as u64 - 1).unwrap();

    let with_sha = Import { sha256: Some(sha256(&content)), ..what(Format::Raw) };
    let image = run(&pool, Source::File(&path), &with_sha).unwrap();
    assert_eq!((image.id, image.bytes), (id_of(&content), 5 * MIB + 512));
    assert!(image.allocated_bytes.unwrap() < MIB, "{image:?}");
    for what in [what(Format::Raw), with_sha] {
        assert_eq!(stream(&pool, &content, content.len() as u64, &what).unwrap().id, image.id);
    }
    let opened = pool.open_image(image.id).unwrap();
    assert_eq!(opened.verify().unwrap(), image.id);
    let mut back = std::fs::read(opened.path()).unwrap();
    back.truncate(content.len());
    assert!(back == content);
    assert_eq!(pool.list().unwrap().images.len(), 1);
}

#[test]
fn a_disk_of_zeros_is_an_image_too() {
    let (_dir, pool) = pool();
    let image = stream(&pool, &[0; 1024], 1024, &what(Format::Raw)).unwrap();
    assert_eq!(pool.open_image(image.id).unwrap().chunks(0).count(), 0);
    assert_eq!(pool.open_image(image.id).unwrap().verify().unwrap(), image.id);
}

#[test]
fn qcow2_becomes_the_image_of_its_content() {
    let (dir, pool) = pool();
    let path = dir.path().join("disk.qcow2");
    let (file, content) = qcow2::sample();
    std::fs::write(&path, &file).unwrap();
    let with_sha = Import { sha256: Some(sha256(&file)), ..what(Format::Qcow2) };
    let image = run(&pool, Source::File(&path), &with_sha).unwrap();
    assert_eq!(image.id, id_of(&content));
    assert_eq!(pool.open_image(image.id).unwrap().verify().unwrap(), image.id);

    // Stated as raw it is taken as raw: nothing is guessed.
    let as_raw = run(&pool, Source::File(&path), &what(Format::Raw)).unwrap();
    assert_eq!(as_raw.id, id_of(&file));
}

#[test]
fn bad_input_is_refused_by_its_field_and_leaves_nothing() {
    let (dir, pool) = pool();
    let content = content();
    let length = content.len() as u64;
    let path = dir.path().join("disk");
    std::fs::write(&path, &content).unwrap();
    let raw = what(Format::Raw);
    let wrong_sha = Import { sha256: Some(sha256(b"another")), ..raw };
    let small = |bytes_max, data_bytes_max| Import {
        limits: ImageLimits { bytes_max, data_bytes_max },
        ..raw
    };
    let file = |path: &Path, what: &Import| run(&pool, Source::File(path), what);
    let cases = [
        ("ends early", stream(&pool, &content, length + 1, &raw)),
        ("exactly the announced length", stream(&pool, &content, length - 1, &raw)),
        ("image size: 0: accepted is 1 to", stream(&pool, b"", 0, &raw)),
        ("image size: 18446744073709551615", stream(&pool, b"", u64::MAX, &raw)),
        ("sha256: expected", stream(&pool, &content, length, &wrong_sha)),
        ("sha256: expected", file(&path, &wrong_sha)),
        ("image size: 5243392", stream(&pool, &content, length, &small(MIB, MIB))),
        ("image data: more than 4096", file(&path, &small(1 << 40, 4096))),
        ("header.magic", file(&path, &what(Format::Qcow2))),
        ("source: a stream of qcow2", stream(&pool, &content, length, &what(Format::Qcow2))),
        ("a regular file", file(dir.path(), &raw)),
        ("a regular file", file(Path::new("/dev/null"), &raw)),
        ("missing: cannot look at", file(&dir.path().join("missing"), &raw)),
    ];
    for (says, result) in cases {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(says), "{says}: {error}");
    }
    assert_eq!(pool.list().unwrap(), Contents::default());
    assert!("vmdk".parse::<Format>().unwrap_err().to_string().contains("raw or qcow2"));
}

#[test]
fn progress_grows_to_its_total_and_a_cancelled_import_leaves_nothing() {
    let (dir, pool) = pool();
    let content = content();
    let path = dir.path().join("disk");
    std::fs::write(&path, &content).unwrap();
    let what = Import { sha256: Some(sha256(&content)), ..what(Format::Raw) };
    let cancel = AtomicBool::new(false);
    let mut seen: Vec<Progress> = Vec::new();
    let mut progress = |at| seen.push(at);
    let mut watch = Watch { progress: &mut progress, cancel: &cancel };
    let image = import(&pool, Source::File(&path), &what, &mut watch).unwrap();
    assert!(seen.iter().all(|at| at.total == content.len() as u64 && at.done <= at.total));
    let writing: Vec<u64> =
        seen.iter().filter(|at| at.stage == Stage::Writing).map(|at| at.done).collect();
    assert!(writing.is_sorted() && writing.last() == Some(&(content.len() as u64)));
    assert_eq!(seen[0].stage, Stage::Verifying);
    pool.delete_image(image.id).unwrap();

    let mut calls = 0;
    let mut progress = |_| {
        calls += 1;
        cancel.store(calls == 8, Ordering::Relaxed);
    };
    let mut watch = Watch { progress: &mut progress, cancel: &cancel };
    let result = import(&pool, Source::File(&path), &what, &mut watch);
    assert!(matches!(result, Err(PoolError::Cancelled)), "{result:?}");
    assert_eq!(pool.list().unwrap(), Contents::default());
}

/// What happens to chunks on their way.
type Change<'a> = &'a dyn Fn(&mut Vec<Chunk>);

/// As two agents do it; and what is changed on the way is noticed.
#[test]
fn an_image_travels_by_chunks_and_arrives_as_it_was_or_not_at_all() {
    let ((_a, here), (_b, there)) = (pool(), pool());
    let content = content();
    let image = stream(&here, &content, content.len() as u64, &what(Format::Raw)).unwrap();
    let opened = here.open_image(image.id).unwrap();
    let chunks: Vec<Chunk> = opened.chunks(0).map(|chunk| chunk.unwrap()).collect();
    let offsets: Vec<u64> = chunks.iter().map(|chunk| chunk.offset / MIB).collect();
    assert_eq!(offsets, [0, 2, 5], "chunks of zeros stay at home");
    assert_eq!(opened.chunks(2 * MIB + 1).next().unwrap().unwrap(), chunks[1]);

    let send = |chunks: &[Chunk]| {
        let mut writer = ImageWriter::new(&there, opened.bytes(), ImageLimits::default())?;
        chunks.iter().try_for_each(|chunk| writer.write(chunk.offset, &chunk.bytes))?;
        writer.finish(Some(image.id))
    };
    let changes: [Change<'_>; 4] = [
        &|chunks| drop(chunks.pop()),
        &|chunks| chunks[1].bytes[MIB as usize - 1] ^= 1,
        &|chunks| chunks[1].offset += 512,
        &|chunks| chunks[0].bytes.truncate(MIB as usize / 2),
    ];
    // The last one takes away zeros only, which are zeros without being sent.
    for (change, is_harmless) in changes.iter().zip([false, false, false, true]) {
        let mut changed = chunks.clone();
        change(&mut changed);
        match send(&changed) {
            Ok(arrived) => assert!(is_harmless && arrived.id == image.id),
            Err(PoolError::Digest { field: "image", .. }) => assert!(!is_harmless),
            Err(error) => panic!("{error}"),
        }
    }
    let changes: [Change<'_>; 2] = [&|chunks| chunks.swap(0, 1), &|chunks| chunks[2].offset += MIB];
    for change in changes {
        let mut changed = chunks.clone();
        change(&mut changed);
        let error = send(&changed).unwrap_err().to_string();
        assert!(error.contains("offset") && error.contains("accepted is content"), "{error}");
    }
    there.delete_image(image.id).unwrap();
    assert_eq!(there.list().unwrap(), Contents::default());
    assert_eq!(send(&chunks).unwrap().id, image.id);
    assert_eq!(there.open_image(image.id).unwrap().verify().unwrap(), image.id);
}

/// Damage on the disk shows when the image is read.
#[test]
fn a_damaged_image_is_another_image() {
    let (dir, pool) = pool();
    let image = stream(&pool, &[5; 4096], 4096, &what(Format::Raw)).unwrap();
    let path = dir.path().join("images").join(image.id.to_string());
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, [6; 4096]).unwrap();
    assert_ne!(pool.open_image(image.id).unwrap().verify().unwrap(), image.id);
}
