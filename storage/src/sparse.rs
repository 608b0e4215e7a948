//! Files with holes: finding data, copying it, and not writing zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::bulk::Bulk;

/// One read or write of a copy.
pub(crate) const PIECE_BYTES: usize = 1 << 20;
/// Zeros are looked for in blocks of this size: a filesystem's usual block.
const BLOCK_BYTES: usize = 4096;
/// Fewer zeros are written with what is around them: a thin pool gives room in no smaller pieces,
/// and each write is one more wait for the disk.
const GAP_BYTES: usize = 64 << 10;

/// Whether all of it is zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // In strides that compile to a few wide instructions each.
    let mut strides = bytes.chunks_exact(64);
    strides.all(|stride| stride.iter().fold(0, |all, byte| all | byte) == 0)
        && strides.remainder().iter().all(|byte| *byte == 0)
}

/// The parts of `bytes` that are worth writing: runs of blocks that are not zero, or nearly so.
pub(crate) fn data_runs(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (index, block) in bytes.chunks(BLOCK_BYTES).enumerate() {
        if is_zero(block) {
            continue;
        }
        let start = index * BLOCK_BYTES;
        match runs.last_mut() {
            Some(run) if start - run.end < GAP_BYTES => run.end = start + block.len(),
            _ => runs.push(start..start + block.len()),
        }
    }
    runs
}

/// The next range at or after `offset` that may hold data, before `end`; `None` when the rest
/// is a hole. Where the system cannot tell (a block device), all of it may.
pub(crate) fn next_data(file: &File, offset: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    if offset >= end {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some(offset..end)),
        Err(error) => return Err(error.into()),
    };
    if start >= end {
        return Ok(None);
    }
    let stop = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok(Some(start..stop.min(end)))
}

/// Makes `to`, which must be empty, hold what `from` holds: by sharing blocks where the
/// filesystem can, else by copying what is not zeros. False when `cancel` was set before its end.
pub(crate) fn copy(from: &File, to: &File, cancel: &AtomicBool) -> io::Result<bool> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => return Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    let (mut reader, mut writer) = (Bulk::new(from), Bulk::new(to));
    let result = copy_data((from, &mut reader), (to, &mut writer), cancel);
    reader.end(from)?;
    writer.end(to)?;
    result
}

fn copy_data(
    (from, reader): (&File, &mut Bulk),
    (to, writer): (&File, &mut Bulk),
    cancel: &AtomicBool,
) -> io::Result<bool> {
    let bytes = from.metadata()?.len();
    to.set_len(bytes)?;
    let mut offset = 0;
    while let Some(range) = next_data(from, offset, bytes)? {
        offset = range.start;
        while offset < range.end {
            if cancel.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let length = (range.end - offset).min(PIECE_BYTES as u64) as usize;
            let piece = reader.read(from, offset, length)?;
            for run in data_runs(piece) {
                writer.write(to, &piece[run.clone()], offset + run.start as u64)?;
            }
            offset += length as u64;
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn runs_cover_all_that_is_not_zero_and_little_else() {
        let mut bytes = vec![0_u8; 30 * BLOCK_BYTES + 100];
        assert!(data_runs(&bytes).is_empty());
        bytes[2 * BLOCK_BYTES - 1] = 1;
        bytes[4 * BLOCK_BYTES] = 1;
        bytes[30 * BLOCK_BYTES + 99] = 1;
        let end = bytes.len();
        let block = BLOCK_BYTES;
        assert_eq!(data_runs(&bytes), [block..5 * block, 30 * block..end]);
        for length in [1, 63, 64, 65, 127, 4096] {
            let mut bytes = vec![0_u8; length];
            assert!(is_zero(&bytes));
            bytes[length - 1] = 1;
            assert!(!is_zero(&bytes));
        }
    }

    #[test]
    fn a_copy_is_equal_and_as_sparse() {
        let dir = tempfile::tempdir().unwrap();
        let open = |name: &str| {
            let path = dir.path().join(name);
            File::options().read(true).write(true).create_new(true).open(path).unwrap()
        };
        let from = open("from");
        from.set_len((100 << 20) + 5).unwrap();
        from.write_all_at(b"first", 0).unwrap();
        from.write_all_at(&[7; 9000], (64 << 20) - 100).unwrap();
        from.write_all_at(&[0; 1 << 20], 70 << 20).unwrap();
        from.write_all_at(b"end", (100 << 20) + 2).unwrap();
        let to = open("to");
        assert!(copy(&from, &to, &AtomicBool::new(false)).unwrap());
        let read = |file: &File| {
            let mut bytes = vec![0; (100 << 20) + 5];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&from) == read(&to));
        assert_eq!(to.metadata().unwrap().len(), (100 << 20) + 5);
        // A copy leaves out even the zeros that were written.
        assert!(to.metadata().unwrap().blocks() <= from.metadata().unwrap().blocks());
    }
}
