//! The destination's disks: filled while the guest runs elsewhere, durable before READY.

use std::io;

use super::super::MigrationError;
use super::super::wire::{self, EXTENT_BYTES};
use super::Destination;
use crate::machine::migratable::{MigratableDisk, MigratableVm};
use crate::migration::link::protocol;
use crate::virtio::blk::Volume;
use crate::virtio::blk::tracker::{BLOCK_BYTES, BlockSet};

/// So many bytes lie in the cache alone at most: making them durable must not take so long that
/// the source thinks we are gone, least of all in the pause.
const UNSYNCED_BYTES_MAX: u64 = 32 << 20;

/// The disks that are filled.
#[derive(Default)]
pub(super) struct Disks {
    /// In the shape's order; `None` for shared ones.
    targets: Vec<Option<Target>>,
    /// Bytes that came, zero ones included.
    pub(super) bytes: u64,
    unsynced: u64,
    buffer: Vec<u8>,
}

/// A disk that is filled.
struct Target {
    volume: Volume,
    /// Of one that read as zeros: what was written since. The rest needs no zeros.
    written: Option<BlockSet>,
}

impl Target {
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if let Some(written) = &mut self.written {
            written.insert(offset, bytes.len() as u64);
        }
        self.volume.write_at(bytes, offset)
    }

    fn clear(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let Some(written) = &self.written else { return self.volume.clear(offset, bytes) };
        let (mut at, end) = (offset / BLOCK_BYTES * BLOCK_BYTES, offset + bytes);
        while let Some((start, stop)) = written.next_run(at).filter(|(start, _)| *start < end) {
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
            let written = is_zero.then(|| BlockSet::none(target.bytes()));
            targets.push(Some(Target { volume: target, written }));
        }
        // Also what was emptied is to be durable.
        Ok((Self { targets, unsynced: 1, ..Self::default() }, zeroed))
    }

    /// Makes durable what came.
    pub(super) fn sync(&mut self) -> Result<(), MigrationError> {
        if std::mem::take(&mut self.unsynced) == 0 {
            return Ok(());
        }
        for (index, target) in self.targets.iter().enumerate() {
            let Some(target) = target else { continue };
            target.volume.sync().map_err(MigrationError::disk(index, "making it durable"))?;
        }
        Ok(())
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

impl Destination<'_, '_> {
    /// The body of a DISK message, through a buffer onto the disks.
    pub(super) fn receive_blocks(&mut self, length: usize) -> Result<(), MigrationError> {
        let mut count = [0; 4];
        self.link()?.receive_exact(&mut count)?;
        let count = u32::from_le_bytes(count) as usize;
        let table_bytes = count.saturating_mul(EXTENT_BYTES);
        let Some(data_bytes) = length.checked_sub(4).and_then(|rest| rest.checked_sub(table_bytes))
        else {
            let what = format!("{count} extents in {length} bytes");
            return Err(MigrationError::Protocol(what));
        };
        let mut table = vec![0; table_bytes];
        self.link()?.receive_exact(&mut table)?;
        let extents = wire::decode_extents(&table, count, data_bytes).map_err(protocol)?;
        // As long as the longest message was; no message is longer than the protocol allows.
        let mut buffer = std::mem::take(&mut self.disks.buffer);
        if buffer.len() < data_bytes {
            buffer.resize(data_bytes, 0);
        }
        self.link()?.receive_exact(&mut buffer[..data_bytes])?;
        let mut data = &buffer[..data_bytes];
        for extent in &extents {
            let index = extent.disk as usize;
            let target = self.disks.targets.get_mut(index).and_then(Option::as_mut);
            let end = extent.offset + extent.bytes;
            let target = target.filter(|target| end <= target.volume.bytes());
            let Some(target) = target else {
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
            self.disks.bytes += extent.bytes;
            self.disks.unsynced += if extent.zero { 1 } else { extent.bytes };
        }
        self.disks.buffer = buffer;
        if self.disks.unsynced >= UNSYNCED_BYTES_MAX {
            self.disks.sync()?;
        }
        Ok(())
    }
}
