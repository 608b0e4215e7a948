//! The destination's disks: filled while the guest runs elsewhere, durable before READY.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use super::super::MigrationError;
use super::super::wire::{DATA_BYTES_MAX, Extent};
use crate::machine::migratable::{MigratableDisk, MigratableVm};
use crate::virtio::blk::tracker::{BLOCK_BYTES, BlockSet};
use crate::virtio::blk::{Straight, Volume};

/// So many bytes lie in the cache alone at most: making them durable must not take so long that
/// the source thinks we are gone, least of all in the pause.
const UNSYNCED_BYTES_MAX: u64 = 32 << 20;
/// So much in one place goes to the disk at once, while more comes in; less waits to be made
/// durable with its neighbours.
const BEGIN_BYTES_MIN: u64 = 64 << 10;

/// From this size on what comes is written past the cache; less waits there for its neighbours.
const STRAIGHT_BYTES_MIN: usize = 256 << 10;

/// The disks that are filled, by the threads of all connections.
#[derive(Default)]
pub(super) struct Disks {
    /// In the shape's order; `None` for shared ones.
    targets: RwLock<Vec<Option<Target>>>,
    unsynced: AtomicU64,
    /// Held by the one who makes durable: whoever comes meanwhile has to wait for it.
    syncing: Mutex<()>,
}

/// A disk that is filled.
struct Target {
    volume: Volume,
    /// Those that no thread writes through just now: never more than there are connections.
    straight: Mutex<Vec<Straight>>,
    /// Of one that read as zeros: what was written since. The rest needs no zeros.
    written: Option<Mutex<BlockSet>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Target {
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let length = bytes.len() as u64;
        if let Some(written) = &self.written {
            lock(written).insert(offset, length);
        }
        if bytes.len() >= STRAIGHT_BYTES_MIN && self.write_straight(bytes, offset)? {
            return Ok(());
        }
        self.volume.write_at(bytes, offset)?;
        if length >= BEGIN_BYTES_MIN {
            self.volume.begin_writing(offset, length);
        }
        Ok(())
    }

    /// False where that cannot be done.
    fn write_straight(&self, bytes: &[u8], offset: u64) -> io::Result<bool> {
        let spare = lock(&self.straight).pop();
        let Some(mut straight) =
            spare.or_else(|| Straight::open(&self.volume, true, DATA_BYTES_MAX))
        else {
            return Ok(false);
        };
        let is_written = straight.write(bytes, offset);
        lock(&self.straight).push(straight);
        is_written
    }

    /// No other thread has to do with these bytes: a pass has each of them once.
    fn clear(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let Some(written) = &self.written else { return self.volume.clear(offset, bytes) };
        let (mut at, end) = (offset / BLOCK_BYTES * BLOCK_BYTES, offset + bytes);
        let next = |at| lock(written).next_run(at).filter(|(start, _)| *start < end);
        while let Some((start, stop)) = next(at) {
            let (start, stop) = (start.max(offset), stop.min(end));
            self.volume.clear(start, stop - start)?;
            at = stop.next_multiple_of(BLOCK_BYTES);
        }
        Ok(())
    }
}

impl Disks {
    /// Gets the disks ready to be filled; answers which of them read as zeros.
    pub(super) fn prepare(disks: &[MigratableDisk]) -> Result<(Self, Vec<bool>), MigrationError> {
        let (mut targets, mut zeroed) = (Vec::new(), Vec::new());
        for (index, disk) in disks.iter().enumerate() {
            if disk.shared {
                targets.push(None);
                zeroed.push(false);
                continue;
            }
            let target = disk.volume.target();
            let target = target.map_err(|source| MigrationError::Volume { disk: index, source })?;
            let is_zero = disk.zeroed || target.make_empty();
            zeroed.push(is_zero);
            let written = is_zero.then(|| Mutex::new(BlockSet::none(target.bytes())));
            let straight = Mutex::default();
            targets.push(Some(Target { volume: target, straight, written }));
        }
        let targets = RwLock::new(targets);
        // Also what was emptied is to be durable.
        Ok((Self { targets, unsynced: AtomicU64::new(1), ..Self::default() }, zeroed))
    }

    /// Writes what a message tells of; its data lie behind each other.
    pub(super) fn take(&self, extents: &[Extent], mut data: &[u8]) -> Result<(), MigrationError> {
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        let mut unsynced = 0;
        for extent in extents {
            let index = extent.disk as usize;
            let target = targets.get(index).and_then(Option::as_ref);
            let end = extent.offset + extent.bytes;
            let Some(target) = target.filter(|target| end <= target.volume.bytes()) else {
                let what = format!("{extent:?} is on no disk that is copied");
                return Err(MigrationError::Protocol(what));
            };
            let written = if extent.zero {
                target.clear(extent.offset, extent.bytes)
            } else {
                let (now, later) = data.split_at(extent.bytes as usize);
                data = later;
                target.write(now, extent.offset)
            };
            written.map_err(MigrationError::disk(index, "writing it"))?;
            unsynced += if extent.zero { 1 } else { extent.bytes };
        }
        drop(targets);
        let before = self.unsynced.fetch_add(unsynced, Ordering::SeqCst);
        if before + unsynced >= UNSYNCED_BYTES_MAX { self.sync() } else { Ok(()) }
    }

    /// Makes durable what came: all that was taken before this is called, whoever took it. (One
    /// whose own attempt at that fails has not taken it: see [`take`](Self::take).)
    pub(super) fn sync(&self) -> Result<(), MigrationError> {
        let _one_at_a_time = lock(&self.syncing);
        if self.unsynced.swap(0, Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let targets = self.targets.read().unwrap_or_else(PoisonError::into_inner);
        for (index, target) in targets.iter().enumerate() {
            let Some(target) = target else { continue };
            target.volume.sync().map_err(MigrationError::disk(index, "making it durable"))?;
        }
        Ok(())
    }

    /// Nothing more is written.
    pub(super) fn close(&self) {
        self.targets.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Opens and locks those that the source had until now.
pub(super) fn lock_shared(vm: &dyn MigratableVm) -> Result<(), MigrationError> {
    for (index, disk) in vm.disks().iter().enumerate() {
        let opened = disk.volume.reopen();
        opened.map_err(|source| MigrationError::Volume { disk: index, source })?;
    }
    Ok(())
}
