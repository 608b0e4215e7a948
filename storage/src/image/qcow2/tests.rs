//! qcow2 files: made here in all ways, made by qemu-img where there is one, and damaged.
//!
//! `DROVER_FUZZ_RUNS` sets the number of damaged files; a failure names its seed.

use std::process::Command;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::fixture::{Cluster, Fixture, put};
use super::*;

/// Quick enough for each `cargo test`.
const RUNS: u64 = 3000;
/// A damaged file of some kilobytes that takes longer leads in circles.
const TIME_MAX: Duration = Duration::from_secs(5);
const DATA_MAX: u64 = 64 << 20;

#[derive(Debug)]
struct Bytes<'a>(&'a [u8]);

impl Input for Bytes<'_> {
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset as usize + buffer.len();
        let from = self.0.get(offset as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(from);
        Ok(())
    }
}

fn open(file: &[u8]) -> Result<Qcow2<Bytes<'_>>> {
    Qcow2::open(Bytes(file), file.len() as u64)
}

fn read(file: &[u8]) -> Result<Vec<u8>> {
    let disk = open(file)?;
    let mut content = vec![0; disk.bytes() as usize];
    disk.read_data(DATA_MAX, |offset, data| {
        content[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    })?;
    Ok(content)
}

/// One cluster of each kind, twice over, and a disk that ends within the last one.
fn fixture(cluster_bits: u32, zstd: bool) -> Fixture {
    let cluster = 1_usize << cluster_bits;
    let noise = |seed: usize| -> Vec<u8> {
        (0..cluster).map(|at| ((at * at + seed * at) >> 5) as u8).collect()
    };
    let kinds = [Cluster::Plain, Cluster::Hole, Cluster::Packed, Cluster::Zero];
    let one = kinds.iter().enumerate().map(|(seed, kind)| (*kind, noise(seed)));
    let clusters: Vec<_> = one.clone().chain(one).collect();
    let size = (clusters.len() * cluster - cluster) as u64 - 512;
    Fixture { version: 3, cluster_bits, zstd, size: size.max(512), clusters }
}

/// A file and what it holds, for the tests of import.
pub(in crate::image) fn sample() -> (Vec<u8>, Vec<u8>) {
    let fixture = fixture(16, true);
    (fixture.build(), fixture.content())
}

#[test]
fn clusters_of_all_sizes_and_kinds_are_read() {
    for cluster_bits in [9, 12, 16, 21] {
        for zstd in [false, true] {
            let fixture = fixture(cluster_bits, zstd);
            let read = read(&fixture.build()).unwrap();
            assert!(read == fixture.content(), "2^{cluster_bits}, zstd {zstd}");
        }
    }
    let mut old = fixture(16, false);
    old.version = 2;
    old.clusters.retain(|(kind, _)| *kind != Cluster::Zero);
    assert!(read(&old.build()).unwrap() == old.content());
}

/// What is refused, by which field's name.
#[test]
fn what_is_not_plainly_understood_is_refused_by_its_field() {
    let good = fixture(16, false).build();
    let be = |value: u32| value.to_be_bytes().to_vec();
    let be64 = |value: u64| value.to_be_bytes().to_vec();
    let cases = [
        (0, be(0x5146_49fc), "header.magic"),
        (4, be(1), "header.version"),
        (4, be(4), "header.version"),
        (8, be64(1), "header.backing_file_offset"),
        (20, be(8), "header.cluster_bits"),
        (20, be(22), "header.cluster_bits"),
        (20, be(0xffff_ffff), "header.cluster_bits"),
        (24, be64(0), "header.size"),
        (24, be64(u64::MAX), "header.size"),
        (24, be64(VOLUME_BYTES_MAX + 1), "header.size"),
        (24, be64(VOLUME_BYTES_MAX), "header.l1_size"),
        (32, be(1), "header.crypt_method"),
        (36, be(0), "header.l1_size"),
        (40, be64(0), "header.l1_table_offset"),
        (40, be64(513), "header.l1_table_offset"),
        (72, be64(1), "header.incompatible_features"),
        (72, be64(2), "header.incompatible_features"),
        (72, be64(4), "external data file"),
        (72, be64(16), "extended L2"),
        (72, be64(1 << 40), "unknown features"),
        (72, be64(8), "header.compression_type"),
        (104, vec![1], "header.compression_type"),
        (104, vec![2], "header.compression_type"),
    ];
    for (at, bytes, field) in cases {
        let mut file = good.clone();
        put(&mut file, at, &bytes);
        let error = open(&file).unwrap_err().to_string();
        assert!(error.contains(field) && error.contains("accepted is"), "{at}: {error}");
    }
    // Entries that have no meaning.
    for (entry, field) in [(1_u64 << 60, "L1 entry"), (1 << 56, "L1 entry"), (512, "L1 entry")] {
        let mut file = good.clone();
        put(&mut file, 1 << 16, &entry.to_be_bytes());
        let error = read(&file).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn a_file_that_ends_early_is_refused_wherever_it_ends() {
    let mut fixture = fixture(9, false);
    // The last one in the file is whole, so that each byte cut off is missed.
    fixture.clusters = vec![(Cluster::Plain, vec![1; 512]), (Cluster::Plain, vec![2; 512])];
    fixture.size = 1024;
    let file = fixture.build();
    assert!(read(&file).unwrap() == fixture.content());
    for length in 0..file.len() {
        let error = read(&file[..length]).unwrap_err();
        let is_named = matches!(error, PoolError::Truncated { .. } | PoolError::Invalid { .. });
        assert!(is_named, "{length}: {error}");
    }
}

/// All clusters of a terabyte point at the same one in the file.
#[test]
fn bombs_are_refused() {
    let mut fixture = fixture(16, false);
    for kind in [Cluster::Plain, Cluster::Packed] {
        fixture.clusters = vec![(kind, vec![7; 1 << 16])];
        fixture.size = 1 << 16;
        let mut file = fixture.build();
        let (l1, l2) = (1 << 16, 2 << 16);
        let entry: [u8; 8] = file[l2..l2 + 8].try_into().unwrap();
        for index in 0..1 << 13 {
            put(&mut file, l2 + index * 8, &entry);
        }
        let table: [u8; 8] = file[l1..l1 + 8].try_into().unwrap();
        for index in 0..1 << 11 {
            put(&mut file, l1 + index * 8, &table);
        }
        put(&mut file, 24, &(1_u64 << 40).to_be_bytes());
        put(&mut file, 36, &(1_u32 << 11).to_be_bytes());
        let disk = open(&file).unwrap();
        assert_eq!(disk.bytes(), 1 << 40);
        let mut seen = 0;
        let error = disk.read_data(DATA_MAX, |_, data| {
            seen += data.len() as u64;
            Ok(())
        });
        let error = error.unwrap_err().to_string();
        let (bound, says) = match kind {
            Cluster::Plain => (file.len() as u64, "each cluster used once"),
            _ => (DATA_MAX, "more than 67108864 bytes"),
        };
        assert!(error.contains(says), "{error}");
        assert!(seen <= bound, "{seen}");
    }
}

fn cluster() -> impl Strategy<Value = (Cluster, Vec<u8>)> {
    let kind = prop_oneof![
        Just(Cluster::Hole),
        Just(Cluster::Zero),
        Just(Cluster::Plain),
        Just(Cluster::Packed)
    ];
    (kind, prop::collection::vec(any::<u8>(), 0..512))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_file_that_is_written_is_read_back(
        cluster_bits in 9..15_u32,
        zstd: bool,
        clusters in prop::collection::vec(cluster(), 1..200),
        less in 0..512_u64,
    ) {
        let size = (clusters.len() as u64) * (1 << cluster_bits) - less;
        let fixture = Fixture { version: 3, cluster_bits, zstd, size, clusters };
        let mut content = fixture.content();
        content.resize(size.next_multiple_of(512) as usize, 0);
        prop_assert!(read(&fixture.build()).unwrap() == content);
    }
}

/// The reference's files, where it is installed.
#[test]
fn what_qemu_img_writes_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("disk.raw");
    let qcow2 = dir.path().join("disk.qcow2");
    let mut content = vec![0_u8; (5 << 20) + 1536];
    for (at, byte) in content.iter_mut().enumerate() {
        *byte = match at >> 18 {
            0 | 7 | 20 => (at / 3) as u8,
            3 => ((at * at) >> 7) as u8,
            _ => 0,
        };
    }
    std::fs::write(&raw, &content).unwrap();
    let variants: [&[&str]; 8] = [
        &["-o", "compat=1.1"],
        &["-o", "compat=0.10"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-c", "-o", "compression_type=zlib"],
        &["-c", "-o", "compression_type=zstd"],
        &["-c", "-o", "compression_type=zstd,cluster_size=4k"],
        &["-o", "preallocation=metadata"],
    ];
    for options in variants {
        let converted = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args(options)
            .args([&raw, &qcow2])
            .output();
        let output = match converted {
            // The fixtures above stand for it where it is not installed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            other => other.unwrap(),
        };
        assert!(output.status.success(), "{options:?}: {output:?}");
        let read = read(&std::fs::read(&qcow2).unwrap()).unwrap();
        assert!(read == content, "{options:?}");
    }
}

/// Marsaglia's xorshift64*: the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 8) as usize % end
    }
}

/// Numbers at which code goes wrong.
const EDGES: [u64; 8] = [0, 1, 0x200, 0xffff, 1 << 31, 1 << 62, u64::MAX >> 8, u64::MAX];

/// Whatever is in the file: an answer or an error, soon, within bounds, and never a panic.
#[test]
fn damaged_files_end_in_an_answer_or_an_error() {
    let runs = std::env::var("DROVER_FUZZ_RUNS").ok();
    let runs = runs.map_or(RUNS, |runs| runs.parse().expect("DROVER_FUZZ_RUNS: a number"));
    let goods: Vec<Vec<u8>> = [(9, false), (9, true), (12, false), (12, true)]
        .map(|(bits, zstd)| fixture(bits, zstd).build())
        .into();
    let mut answers = 0;
    for seed in 0..runs {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut file = goods[random.below(goods.len())].clone();
        for _ in 0..1 + random.below(4) {
            // In the header, in the tables that follow it, or anywhere.
            let end = [112, 4096, 4096, file.len()][random.below(4)];
            let at = random.below(end.min(file.len()) - 8);
            let width = [1, 2, 4, 8][random.below(4)];
            let value = match random.below(2) {
                0 => EDGES[random.below(EDGES.len())],
                _ => random.below(usize::MAX) as u64,
            };
            put(&mut file, at & !(width - 1), &value.to_be_bytes()[8 - width..]);
        }
        if random.below(16) == 0 {
            file.truncate(random.below(file.len()));
        }
        let started = Instant::now();
        let seen = open(&file).and_then(|disk| {
            let (mut seen, end) = (0, disk.bytes());
            disk.read_data(DATA_MAX, |offset, data| {
                assert!(offset >= seen && offset + data.len() as u64 <= end, "seed {seed}");
                seen = offset + data.len() as u64;
                Ok(())
            })
        });
        answers += u64::from(seen.is_ok());
        assert!(started.elapsed() < TIME_MAX, "seed {seed}: {:?}", started.elapsed());
    }
    // Else this test would try nothing but the checks of the header.
    assert!(answers * 5 > runs && answers < runs, "{answers} of {runs} were readable");
}
