//! A process that writes to a disk at a steady rate, as a customer's database does: some blocks,
//! one flush, a rest. It remembers what it wrote where, and reads some of it back from the disk
//! itself before it is overwritten, so that a write that a migration lost is noticed.
//!
//! Writes are numbered, which one goes to which block can be computed again, and a block tells by
//! its content which write it holds. So a later boot can say how far what the disk holds goes:
//! up to which number no write is missing, and goes on from there. What was flushed before power
//! was lost must be part of that.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use crate::load::{Shared, map, spawn_background};

/// Blocks are written whole.
const BLOCK_BYTES: usize = 64 << 10;
const BLOCK_KIB: usize = BLOCK_BYTES >> 10;
/// From one flush to the next.
const INTERVAL: Duration = Duration::from_millis(250);
const INTERVALS_PER_SECOND: usize = 4;
/// A disk writes this whole or not at all.
const SECTOR_BYTES: usize = 512;
/// No run has so many writes: what seems to be a later one is something else.
const VERSION_MAX: u64 = 1 << 40;
/// The driver may still be looking at the disk.
const DEVICE_PATIENCE: Duration = Duration::from_secs(30);
const DEVICE_RETRY: Duration = Duration::from_millis(20);

/// Starts it: `kib_per_second` on the last quarter of `device`. What the rest holds stays. With
/// `looks_back` it says first what an earlier boot's writes have left.
pub(crate) fn start_writing(
    shared: &Shared,
    device: &str,
    kib_per_second: usize,
    looks_back: bool,
) -> Result<(), String> {
    let blocks = kib_per_second / BLOCK_KIB / INTERVALS_PER_SECOND;
    if blocks == 0 {
        let least = BLOCK_KIB * INTERVALS_PER_SECOND;
        return Err(format!("drover.disk_kib={kib_per_second}: at least {least} are accepted"));
    }
    let wait = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let start = Instant::now();
    let file = loop {
        match open(device) {
            Err(e) if wait(&e) && start.elapsed() < DEVICE_PATIENCE => {
                std::thread::sleep(DEVICE_RETRY);
            }
            other => break other.map_err(|e| format!("drover.disk={device}: {e}"))?,
        }
    };
    let mut disk = Disk::new(file).map_err(|e| format!("drover.disk={device}: {e}"))?;
    if looks_back {
        let kept = disk.look_back().map_err(|e| format!("drover.disk={device}: {e}"))?;
        shared.disk_kept().store(kept, Relaxed);
    }
    spawn_background(|| disk.write_for_ever(shared, blocks))
}

fn open(device: &str) -> io::Result<File> {
    // Past the guest's page cache, which would answer what the disk has lost.
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device)
}

/// Which write goes to which block: the same on each boot.
#[derive(Clone, Copy)]
struct Schedule {
    random: u64,
    /// Of the write before.
    version: u64,
}

impl Schedule {
    const START: Self = Self { random: 0x2545_f491_4f6c_dd1d, version: 0 };

    /// The next write's block, of so many, and its number.
    fn next(&mut self, blocks: usize) -> (usize, u64) {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.version += 1;
        ((self.random % blocks as u64) as usize, self.version)
    }

    /// Passes all writes that blocks holding these show to be there, up to the first one missing.
    fn skip_kept(&mut self, held: &[u64]) {
        loop {
            let mut next = *self;
            let (block, version) = next.next(held.len());
            if held[block] < version {
                return;
            }
            *self = next;
        }
    }
}

struct Disk {
    file: File,
    /// Where the first block begins, bytes.
    start: u64,
    /// What was written last to each block: 0 for nothing yet, or when nobody can know.
    versions: Vec<u64>,
    schedule: Schedule,
    /// One block, on a page's boundary as O_DIRECT wants it.
    buffer: &'static mut [u8],
}

impl Disk {
    fn new(mut file: File) -> io::Result<Self> {
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        let blocks = bytes / 4 / BLOCK_BYTES as u64;
        if blocks == 0 {
            return Err(io::Error::other("is too small"));
        }
        let memory = map(BLOCK_BYTES, libc::MAP_PRIVATE)?;
        // SAFETY: just mapped, so long, never unmapped, and nobody else has it.
        let buffer = unsafe { std::slice::from_raw_parts_mut(memory, BLOCK_BYTES) };
        let start = (bytes / BLOCK_BYTES as u64 - blocks) * BLOCK_BYTES as u64;
        let schedule = Schedule::START;
        Ok(Self { file, start, versions: vec![0; blocks as usize], schedule, buffer })
    }

    /// Up to which write no write is missing; it goes on from there.
    fn look_back(&mut self) -> io::Result<u64> {
        let mut oldest = vec![0; self.versions.len()];
        for (block, oldest) in oldest.iter_mut().enumerate() {
            self.file.read_exact_at(self.buffer, self.offset(block))?;
            let (from, to) = held(self.buffer, block);
            *oldest = from;
            // One that was being written may be half the one and half the other.
            self.versions[block] = if from == to { from } else { 0 };
        }
        self.schedule.skip_kept(&oldest);
        Ok(self.schedule.version)
    }

    fn write_for_ever(mut self, shared: &Shared, blocks: usize) -> ! {
        let mut due = Instant::now();
        let mut unflushed = Vec::with_capacity(blocks);
        loop {
            let mut failed = 0;
            unflushed.clear();
            for index in 0..blocks {
                let (block, version) = self.schedule.next(self.versions.len());
                // One of them is looked at: reading all would be another load.
                match if index == 0 { self.is_as_written(block) } else { Ok(true) } {
                    Ok(true) => {}
                    Ok(false) => {
                        shared.disk_wrong().fetch_add(1, Relaxed);
                    }
                    Err(_) => failed += 1,
                }
                unflushed.push(block);
                failed += u64::from(self.write(block, version).is_err());
            }
            let flushed = self.file.sync_data();
            failed += u64::from(flushed.is_err());
            if flushed.is_ok() {
                shared.disk_writes().fetch_add(blocks as u64, Relaxed);
            }
            if failed == 0 {
                shared.disk_flushed().store(self.schedule.version, Relaxed);
            } else {
                // Whether the old or the new is there, nobody can know.
                unflushed.iter().for_each(|block| self.versions[*block] = 0);
                shared.disk_failed().fetch_add(failed, Relaxed);
                shared.disk_wrong().fetch_add(failed, Relaxed);
            }
            due += INTERVAL;
            let now = Instant::now();
            if due <= now {
                // What could not be written in time is not made up for, and a slow disk gets its
                // rest all the same.
                due = now + INTERVAL;
            }
            std::thread::sleep(due - now);
        }
    }

    fn offset(&self, block: usize) -> u64 {
        self.start + (block * BLOCK_BYTES) as u64
    }

    fn write(&mut self, block: usize, version: u64) -> io::Result<()> {
        fill(self.buffer, block, version);
        self.versions[block] = version;
        self.file.write_all_at(self.buffer, self.offset(block))
    }

    fn is_as_written(&mut self, block: usize) -> io::Result<bool> {
        let version = self.versions[block];
        if version == 0 {
            return Ok(true);
        }
        self.file.read_exact_at(self.buffer, self.offset(block))?;
        Ok(is_filled(self.buffer, block, version))
    }
}

/// What a block holds, word by word.
fn words(block: usize, version: u64) -> impl Iterator<Item = u64> {
    let seed = version.wrapping_mul(FACTOR) ^ (block as u64) << 40;
    (0..(BLOCK_BYTES / 8) as u64).map(move |at| seed.wrapping_add(at))
}

/// Odd, so that it can be divided by.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
const FACTOR_INVERSE: u64 = {
    // Each step doubles the bits that are right, of which three are at the start.
    let (mut inverse, mut step) = (FACTOR, 0);
    while step < 5 {
        inverse = inverse.wrapping_mul(2u64.wrapping_sub(FACTOR.wrapping_mul(inverse)));
        step += 1;
    }
    inverse
};

/// The oldest and the newest write of which this block has sectors; 0 for a sector that is none's.
fn held(buffer: &[u8], block: usize) -> (u64, u64) {
    let sectors = buffer.chunks_exact(SECTOR_BYTES).enumerate();
    sectors.fold((u64::MAX, 0), |(oldest, newest), (index, sector)| {
        let version = version_of(sector, index, block).unwrap_or(0);
        (oldest.min(version), newest.max(version))
    })
}

fn version_of(sector: &[u8], index: usize, block: usize) -> Option<u64> {
    let first = u64::from_ne_bytes(sector.first_chunk().copied()?);
    let seed = first.wrapping_sub((index * SECTOR_BYTES / 8) as u64);
    let version = (seed ^ (block as u64) << 40).wrapping_mul(FACTOR_INVERSE);
    let mut expected = words(block, version).skip(index * SECTOR_BYTES / 8);
    let is_whole = sector
        .chunks_exact(8)
        .all(|bytes| expected.next().is_some_and(|w| bytes == w.to_ne_bytes()));
    (is_whole && version <= VERSION_MAX).then_some(version)
}

fn fill(buffer: &mut [u8], block: usize, version: u64) {
    for (bytes, word) in buffer.chunks_exact_mut(8).zip(words(block, version)) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
}

fn is_filled(buffer: &[u8], block: usize, version: u64) -> bool {
    buffer
        .chunks_exact(8)
        .zip(words(block, version))
        .all(|(bytes, word)| bytes == word.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An older write, another block's, and one byte that is not as written are all noticed.
    #[test]
    fn a_lost_write_is_noticed() {
        let mut buffer = vec![0; BLOCK_BYTES];
        fill(&mut buffer, 3, 7);
        assert!(is_filled(&buffer, 3, 7));
        assert!(!is_filled(&buffer, 3, 6) && !is_filled(&buffer, 2, 7));
        buffer[BLOCK_BYTES - 1] ^= 1;
        assert!(!is_filled(&buffer, 3, 7));
    }

    /// A block tells which writes its sectors are of.
    #[test]
    fn a_block_tells_what_it_holds() {
        let mut buffer = vec![0; BLOCK_BYTES];
        assert_eq!(held(&buffer, 3), (0, 0));
        fill(&mut buffer, 3, 7);
        assert_eq!(held(&buffer, 3), (7, 7));
        assert_eq!(held(&buffer, 2).0, 0, "another block's");
        let mut newer = vec![0; BLOCK_BYTES];
        fill(&mut newer, 3, 12);
        buffer[..SECTOR_BYTES].copy_from_slice(&newer[..SECTOR_BYTES]);
        assert_eq!(held(&buffer, 3), (7, 12), "one that was being written");
        buffer[BLOCK_BYTES - 1] ^= 1;
        assert_eq!(held(&buffer, 3), (0, 12));
    }

    /// All writes up to the first that is missing are kept, whatever came after it.
    #[test]
    fn the_first_missing_write_is_found() {
        const BLOCKS: usize = 8;
        let mut held = vec![0; BLOCKS];
        let mut schedule = Schedule::START;
        for _ in 0..100 {
            let (block, version) = schedule.next(BLOCKS);
            held[block] = version;
        }
        let kept = |held: &[u64]| {
            let mut schedule = Schedule::START;
            schedule.skip_kept(held);
            schedule.version
        };
        assert_eq!(kept(&held), 100);
        let lost = held.iter().position(|version| *version == 100).unwrap();
        held[lost] = 1;
        assert!(kept(&held) < 100, "its last write is lost");
        assert_eq!(kept(&[0; BLOCKS]), 0);
    }

    /// A disk that loses a flushed write says so, and the next boot goes on where it can.
    #[test]
    fn a_later_boot_finds_what_is_there() {
        let path = std::env::temp_dir().join(format!("drover-guest-disk-{}", std::process::id()));
        let open =
            || File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = open().unwrap();
        file.set_len(64 * BLOCK_BYTES as u64).unwrap();
        let mut disk = Disk::new(file).unwrap();
        assert_eq!(disk.look_back().unwrap(), 0);
        for _ in 0..40 {
            let (block, version) = disk.schedule.next(disk.versions.len());
            disk.write(block, version).unwrap();
        }
        let mut later = Disk::new(open().unwrap()).unwrap();
        assert_eq!(later.look_back().unwrap(), 40);
        assert_eq!(later.versions, disk.versions);
        let newest = disk.versions.iter().position(|version| *version == 40).unwrap();
        fill(later.buffer, newest, 1);
        later.file.write_all_at(later.buffer, later.offset(newest)).unwrap();
        assert!(Disk::new(open().unwrap()).unwrap().look_back().unwrap() < 40);
        std::fs::remove_file(&path).unwrap();
    }
}
