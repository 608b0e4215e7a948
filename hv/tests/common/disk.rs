//! A disk whose guest is a thread: a real file, its writes noted as the block device does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use drover_hv::machine::migratable::MigratableDisk;
use drover_hv::virtio::blk::Volume;
use drover_hv::virtio::blk::tracker::BLOCK_BYTES;

/// Blocks of a test's disk.
pub(crate) const BLOCKS: u64 = 96;
pub(crate) const DISK_BYTES: u64 = BLOCKS * BLOCK_BYTES;
/// The guest writes records of this.
const RECORD_BYTES: u64 = 4096;

/// A file of the right size; `old` gives it content.
pub(crate) fn file(path: &Path, old: u8) {
    let file = File::create(path).unwrap();
    file.set_len(DISK_BYTES).unwrap();
    if old != 0 {
        for block in (0..BLOCKS).step_by(3) {
            file.write_all_at(&[old; 5000], block * BLOCK_BYTES + 512).unwrap();
        }
    }
}

/// Made as a machine makes it.
pub(crate) fn disk(path: &Path, read_only: bool, shared: bool, incoming: bool) -> MigratableDisk {
    let volume = if shared && incoming {
        Volume::unopened(path, read_only)
    } else {
        Volume::open(path, read_only)
    };
    let serial = path.file_name().unwrap().to_string_lossy().into_owned();
    MigratableDisk { volume: Arc::new(volume.unwrap()), serial, shared, zeroed: false }
}

/// One request of the guest: a record, or a discard. Marked before and after, as
/// `blk::tracker` wants it.
pub(crate) fn guest_writes(disk: &MigratableDisk, seed: u64) {
    let volume = &disk.volume;
    if volume.is_read_only() {
        return;
    }
    let (offset, bytes) = if seed.is_multiple_of(64) {
        ((seed >> 20) % BLOCKS * BLOCK_BYTES, BLOCK_BYTES)
    } else {
        ((seed >> 20) % (DISK_BYTES / RECORD_BYTES) * RECORD_BYTES, RECORD_BYTES)
    };
    volume.tracker().mark(offset, bytes);
    if bytes == BLOCK_BYTES {
        volume.clear(offset, bytes).unwrap();
    } else {
        volume.write_at(&seed.to_le_bytes().repeat(RECORD_BYTES as usize / 8), offset).unwrap();
    }
    volume.tracker().mark(offset, bytes);
}

pub(crate) fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}
