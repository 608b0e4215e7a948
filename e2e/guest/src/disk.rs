//! A process that writes to a disk at a steady rate, as a customer's database does: some blocks,
//! one flush, a rest. It remembers what it wrote where, and reads some of it back from the disk
//! itself before it is overwritten, so that a write that a migration lost is noticed.

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
/// The driver may still be looking at the disk.
const DEVICE_PATIENCE: Duration = Duration::from_secs(30);
const DEVICE_RETRY: Duration = Duration::from_millis(20);

/// Starts it: `kib_per_second` on the last quarter of `device`. What the rest holds stays.
pub(crate) fn start_writing(
    shared: &Shared,
    device: &str,
    kib_per_second: usize,
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
    let disk = Disk::new(file).map_err(|e| format!("drover.disk={device}: {e}"))?;
    spawn_background(|| disk.write_for_ever(shared, blocks))
}

fn open(device: &str) -> io::Result<File> {
    // Past the guest's page cache, which would answer what the disk has lost.
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device)
}

struct Disk {
    file: File,
    /// Where the first block begins, bytes.
    start: u64,
    /// What was written last to each block: 0 for nothing yet.
    versions: Vec<u64>,
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
        Ok(Self { file, start, versions: vec![0; blocks as usize], buffer })
    }

    fn write_for_ever(mut self, shared: &Shared, blocks: usize) -> ! {
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut due = Instant::now();
        let mut version = 0;
        loop {
            for index in 0..blocks {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let block = (random % self.versions.len() as u64) as usize;
                version += 1;
                // One of them is looked at: reading all would be another load.
                let is_well =
                    (index > 0 || self.is_as_written(block)) && self.write(block, version);
                if !is_well {
                    shared.disk_wrong().fetch_add(1, Relaxed);
                }
            }
            match self.file.sync_data() {
                Ok(()) => shared.disk_writes().fetch_add(blocks as u64, Relaxed),
                Err(_) => shared.disk_wrong().fetch_add(1, Relaxed),
            };
            due += INTERVAL;
            let now = Instant::now();
            // What could not be written in time is not made up for.
            due = due.max(now);
            std::thread::sleep(due - now);
        }
    }

    fn offset(&self, block: usize) -> u64 {
        self.start + (block * BLOCK_BYTES) as u64
    }

    fn write(&mut self, block: usize, version: u64) -> bool {
        fill(self.buffer, block, version);
        self.versions[block] = version;
        self.file.write_all_at(self.buffer, self.offset(block)).is_ok()
    }

    fn is_as_written(&mut self, block: usize) -> bool {
        let version = self.versions[block];
        let offset = self.offset(block);
        version == 0
            || self.file.read_exact_at(self.buffer, offset).is_ok()
                && is_filled(self.buffer, block, version)
    }
}

/// What a block holds, word by word.
fn words(block: usize, version: u64) -> impl Iterator<Item = u64> {
    let seed = version.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (block as u64) << 40;
    (0..(BLOCK_BYTES / 8) as u64).map(move |at| seed.wrapping_add(at))
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
}
