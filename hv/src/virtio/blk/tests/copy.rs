//! A disk that is copied while a driver writes it: what a migration rests on, with the real device
//! and the real backends.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use super::tracker::{BLOCK_BYTES, BlockSet};
use super::*;

/// Blocks of the volume; enough that some are read while others are written.
const BLOCKS: usize = 6;
const DISK_BYTES: usize = BLOCKS * BLOCK_BYTES as usize;
const ROUNDS: u64 = 150;
const SLOTS: u16 = 4;

fn copy_blocks(volume: &Volume, blocks: &BlockSet, copy: &mut [u8]) {
    let mut at = 0;
    while let Some((start, end)) = blocks.next_run(at) {
        volume.read_at(&mut copy[start as usize..end as usize], start).unwrap();
        at = end;
    }
}

/// Several requests at a time, and a reader that takes the marks and copies, as fast as it can and
/// in step with nothing. After the pause one more look makes the copy whole.
#[test]
fn a_copy_that_follows_the_marks_is_whole() {
    for which in backends() {
        let mut volume = None;
        let mut bench = Bench::with(file(DISK_BYTES / 512), false, |its| {
            volume = Some(Arc::clone(its));
            make(which, its)
        });
        let volume = volume.unwrap();
        let written = AtomicBool::new(false);
        let mut copy = vec![0; DISK_BYTES];
        volume.tracker().start(volume.bytes());
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut all = BlockSet::none(volume.bytes());
                all.insert(0, volume.bytes());
                let mut copy = vec![0; DISK_BYTES];
                copy_blocks(&volume, &all, &mut copy);
                let mut looks = 0u64;
                while !written.load(Ordering::SeqCst) || looks == 0 {
                    let taken = volume.tracker().take(volume.bytes());
                    copy_blocks(&volume, &taken, &mut copy);
                    looks += u64::from(!taken.is_empty());
                }
                (copy, looks)
            });
            let mut seed = 1u64;
            for _ in 0..ROUNDS {
                for slot in 0..SLOTS {
                    seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let sectors = 1 + (seed >> 40) % 24;
                    let sector = (seed >> 20) % (DISK_BYTES as u64 / 512 - sectors);
                    let (bytes, zeroes) =
                        ([seed as u8; 24 * 512], range(sector, sectors as u32, 0));
                    let ask = match (seed >> 50) % 8 {
                        0 => Ask { kind: DISCARD, output: &zeroes, ..Ask::default() },
                        1 => Ask { kind: WRITE_ZEROES, output: &zeroes, ..Ask::default() },
                        _ => {
                            let output = &bytes[..sectors as usize * 512];
                            Ask { kind: OUT, sector, output, ..Ask::default() }
                        }
                    };
                    bench.put(0, slot, ask);
                }
                bench.driver.kick(0);
                for _ in 0..SLOTS {
                    bench.driver.wait_used(0);
                }
                assert_eq!([0, 1, 2, 3].map(|slot| bench.status(slot)), [OK; 4]);
            }
            bench.driver.device.pause().unwrap();
            written.store(true, Ordering::SeqCst);
            let (copied, looks) = reader.join().unwrap();
            copy = copied;
            assert!(looks > 0, "the reader saw nothing");
        });
        copy_blocks(&volume, &volume.tracker().take(volume.bytes()), &mut copy);
        let mut disk = vec![0; DISK_BYTES];
        bench.file.reopen().unwrap().read_exact_at(&mut disk, 0).unwrap();
        assert!(copy == disk, "{which:?}: a write was missed");
    }
}
