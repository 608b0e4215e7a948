//! Disks read and written in bulk, past the page cache: what is copied once would push out of it
//! what guests use, and a page there costs more than the copy of its bytes.
//!
//! What direct I/O does not take (a filesystem without it, a piece that is not aligned) goes
//! through the cache. The kernel keeps both views of a file the same.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use crate::sparse::PIECE_BYTES;

/// A multiple of every disk's block, as direct I/O wants places, lengths and buffers.
const ALIGN_BYTES: usize = 4096;

/// A buffer for one file's content, [`PIECE_BYTES`] at a time.
#[derive(Debug)]
pub(crate) struct Bulk {
    buffer: Vec<u8>,
    start: usize,
    is_direct: bool,
}

impl Bulk {
    /// For `file`, which others do not use at the same time through this descriptor.
    pub(crate) fn new(file: &File) -> Self {
        let buffer = vec![0; PIECE_BYTES + ALIGN_BYTES];
        let start = buffer.as_ptr().align_offset(ALIGN_BYTES);
        Self { buffer, start, is_direct: set_direct(file, true).is_ok() }
    }

    /// Reads at most [`PIECE_BYTES`].
    pub(crate) fn read(&mut self, file: &File, offset: u64, length: usize) -> io::Result<&[u8]> {
        let start = self.start;
        self.perform(file, offset, length, |piece| file.read_exact_at(piece, offset))?;
        Ok(&self.buffer[start..start + length])
    }

    /// Writes all of it.
    pub(crate) fn write(&mut self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        for (index, part) in bytes.chunks(PIECE_BYTES).enumerate() {
            let at = offset + (index * PIECE_BYTES) as u64;
            self.perform(file, at, part.len(), |piece| {
                piece.copy_from_slice(part);
                file.write_all_at(piece, at)
            })?;
        }
        Ok(())
    }

    /// Leaves the descriptor as it was.
    pub(crate) fn end(self, file: &File) -> io::Result<()> {
        if self.is_direct { set_direct(file, false) } else { Ok(()) }
    }

    fn perform(
        &mut self,
        file: &File,
        offset: u64,
        length: usize,
        mut work: impl FnMut(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let piece = &mut self.buffer[self.start..self.start + length];
        let is_aligned =
            offset.is_multiple_of(ALIGN_BYTES as u64) && length.is_multiple_of(ALIGN_BYTES);
        if !self.is_direct {
            return work(piece);
        }
        if is_aligned {
            match work(piece) {
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                    self.is_direct = false;
                    set_direct(file, false)?;
                    return work(piece);
                }
                result => return result,
            }
        }
        set_direct(file, false)?;
        let result = work(piece);
        set_direct(file, true)?;
        result
    }
}

fn set_direct(file: &File, is_direct: bool) -> io::Result<()> {
    let mut flags = fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, is_direct);
    Ok(fcntl_setfl(file, flags)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of any place and length, with and without direct I/O, are the same content.
    #[test]
    fn what_is_written_is_read() {
        for dir in ["/var/tmp", "/dev/shm"] {
            let Ok(file) = tempfile::tempfile_in(dir) else { continue };
            let bytes: Vec<u8> = (0..3 * PIECE_BYTES + 700).map(|n| (n % 251) as u8).collect();
            let mut bulk = Bulk::new(&file);
            let mut at = 0_usize;
            for length in [4096, 8192, 1, 4095, 100_000, usize::MAX] {
                let end = bytes.len().min(at.saturating_add(length));
                bulk.write(&file, &bytes[at..end], at as u64).unwrap();
                at = end;
            }
            for (offset, length) in [(0, PIECE_BYTES), (4096, 4096), (5000, 3), (12_288, 99_999)] {
                let read = bulk.read(&file, offset as u64, length).unwrap();
                assert!(read == &bytes[offset..offset + length], "{dir:?}: {offset} {length}");
            }
            let end = 3 * PIECE_BYTES;
            assert!(bulk.read(&file, end as u64, 700).unwrap() == &bytes[end..], "{dir:?}");
            assert!(bulk.read(&file, end as u64, 701).is_err());
        }
    }
}
