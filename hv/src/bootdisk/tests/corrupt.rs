//! Real images, damaged at random: there is a kernel or an error, soon, and never a panic.
//!
//! `DROVER_FUZZ_RUNS` sets the number of damaged disks of each kind; a failure names its seed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;

/// Quick enough for each `cargo test`.
const RUNS: u64 = 400;
/// A damaged disk of a few MiB that takes longer leads in circles.
const TIME_MAX: Duration = Duration::from_secs(20);

/// Marsaglia's xorshift64*: the same everywhere.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Numbers at which code goes wrong.
const EDGES: [u32; 12] =
    [0, 1, 2, 0x7f, 0xff, 0x7fff, 0xffff, 0x1_0000, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, !0];

/// A disk with some places changed, without a copy of all of it.
struct Damaged {
    disk: Arc<Vec<u8>>,
    size: usize,
    changes: Vec<(usize, Vec<u8>)>,
}

impl Damaged {
    fn new(disk: &Arc<Vec<u8>>, used: &[usize], seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut changes = Vec::new();
        for _ in 0..1 + random.below(12) {
            // Where something is: most of a disk is empty.
            let at = used[random.below(used.len())] * 64 + random.below(64);
            let value = match random.below(3) {
                0 => random.next() as u32,
                _ => EDGES[random.below(EDGES.len())],
            };
            let width = [1, 2, 4][random.below(3)];
            let at = if random.below(2) == 0 { at & !(width - 1) } else { at };
            changes.push((at, value.to_le_bytes()[..width].to_vec()));
        }
        let cut = random.below(20) == 0;
        let size = if cut { random.below(disk.len()) } else { disk.len() };
        Self { disk: Arc::clone(disk), size, changes }
    }
}

impl ReadAt for Damaged {
    fn read_at(&self, offset: u64, target: &mut [u8]) -> std::io::Result<()> {
        self.disk.read_at(offset, target)?;
        for (at, bytes) in &self.changes {
            for (index, byte) in bytes.iter().enumerate() {
                let place = (at + index).checked_sub(offset as usize);
                if let Some(target) = place.and_then(|place| target.get_mut(place)) {
                    *target = *byte;
                }
            }
        }
        Ok(())
    }

    fn size(&self) -> u64 {
        self.size as u64
    }
}

fn damage(name: &str, disk: Vec<u8>) {
    let runs = std::env::var("DROVER_FUZZ_RUNS").ok();
    let runs = runs.map_or(RUNS, |runs| runs.parse().expect("DROVER_FUZZ_RUNS: a number"));
    let used = (0..disk.len() / 64).filter(|i| disk[i * 64..][..64].iter().any(|b| *b != 0));
    let used: Vec<usize> = used.collect();
    let disk = Arc::new(disk);
    let mut booted = 0;
    for seed in 0..runs {
        let damaged = Damaged::new(&disk, &used, seed);
        let started = Instant::now();
        let own_root = (seed % 2 == 0).then_some("vda");
        let found = std::panic::catch_unwind(|| find(Box::new(damaged), LIMITS, "", own_root));
        let took = started.elapsed();
        assert!(took < TIME_MAX, "{name}, seed {seed}: {took:?}");
        match found {
            Ok(Ok(_)) => booted += 1,
            Ok(Err(error)) => assert!(!error.to_string().is_empty()),
            Err(_) => panic!("{name}, seed {seed}: panicked, see above"),
        }
    }
    // Otherwise the damage is so great that nothing deep is reached.
    assert!(booted > 0, "{name}: none of {runs} disks was found to boot");
}

/// With checksums, which most damage does not pass.
#[test]
fn damaged_ext4() {
    damage("ext4", ext4(&debian_root().options("^has_journal")));
}

/// Without checksums, so that damage goes deep.
#[test]
fn damaged_ext4_without_checksums() {
    damage("plain ext4", ext4(&debian_root().options("^has_journal,^metadata_csum")));
}

/// Block lists instead of extents.
#[test]
fn damaged_ext2() {
    let options = "^has_journal,^metadata_csum,^extents,^64bit,^flex_bg";
    let large = debian_root().file("boot/vmlinuz-6.1.0-40-cloud-amd64", &vec![7; 300_000]);
    damage("ext2", ext4(&large.options(options)));
}

/// A journal that must be read, as a guest that was switched off leaves it.
#[test]
fn damaged_journal() {
    let kernel = "/boot/vmlinuz-6.1.0-40-cloud-amd64";
    let disk = ext4(&debian_root().options("has_journal,64bit,metadata_csum"));
    let disk = with_journalled_write(&disk, kernel, b"kernel 41");
    damage("journal", disk);
}

#[test]
fn damaged_fat() {
    let (path, text) = fedora_entry("6.1");
    let files: &[(&str, &[u8])] = &[
        (&path, text.as_bytes()),
        ("vmlinuz-6.1", &[7; 20_000]),
        ("initramfs-6.1.img", &[8; 20_000]),
    ];
    damage("FAT12", vfat(2, files));
    damage("FAT16", vfat(16, files));
}

#[test]
fn damaged_tables() {
    let small = vfat(2, &[("loader/entries/a.conf", b"linux /k\n"), ("k", b"kernel")]);
    let parts = [vec![1; 512], vec![1; 512], vec![1; 512], vec![1; 512], small];
    damage("GPT", gpt(&parts));
    damage("MBR", mbr(&parts));
}
