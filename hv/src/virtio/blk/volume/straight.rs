//! A volume past the page cache, for a migration, which reads and writes each byte once: what it
//! moved through the cache would push out of it what guests use, and costs more than the copy.
//!
//! It is a descriptor of its own beside the one that the guest's I/O goes through; the kernel
//! keeps what both see the same. What is not aligned goes the usual way.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::Errno;

use super::Volume;

/// A multiple of every disk's block, as direct I/O wants places, lengths and buffers.
const ALIGN_BYTES: usize = 4096;

/// A descriptor for direct I/O, and a buffer that it takes.
#[derive(Debug)]
pub(crate) struct Straight {
    file: File,
    buffer: Vec<u8>,
    start: usize,
    length_max: usize,
}

impl Straight {
    /// For at most `length_max` bytes at once; `None` where the system has no direct I/O for the
    /// volume.
    pub(crate) fn open(volume: &Volume, write: bool, length_max: usize) -> Option<Self> {
        let flags = libc::O_DIRECT | libc::O_CLOEXEC;
        let open = |path: &Path| {
            OpenOptions::new().read(!write).write(write).custom_flags(flags).open(path)
        };
        let file = open(&volume.path).ok()?;
        if volume.is_another(&file).ok()? {
            return None;
        }
        let buffer = vec![0; length_max + ALIGN_BYTES];
        let start = buffer.as_ptr().align_offset(ALIGN_BYTES);
        Some(Self { file, buffer, start, length_max })
    }

    fn takes(&self, offset: u64, length: usize) -> bool {
        length <= self.length_max
            && length.is_multiple_of(ALIGN_BYTES)
            && offset.is_multiple_of(ALIGN_BYTES as u64)
    }

    /// Reads so many bytes; `None` when they have to be read the usual way.
    pub(crate) fn read(&mut self, offset: u64, length: usize) -> io::Result<Option<&[u8]>> {
        if !self.takes(offset, length) {
            return Ok(None);
        }
        let piece = &mut self.buffer[self.start..self.start + length];
        let read = self.file.read_exact_at(piece, offset);
        Ok(done(read)?.then_some(&*piece))
    }

    /// Writes these bytes; false when they have to be written the usual way.
    pub(crate) fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<bool> {
        if !self.takes(offset, bytes.len()) {
            return Ok(false);
        }
        let piece = &mut self.buffer[self.start..self.start + bytes.len()];
        piece.copy_from_slice(bytes);
        done(self.file.write_all_at(piece, offset))
    }
}

/// Whether it was done; not when the disk wants another alignment still.
fn done(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What went past the cache and what went through it are one content.
    #[test]
    fn both_ways_see_the_same() {
        // A tmpfs may have no direct I/O.
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let volume = Volume::open(file.path(), false).unwrap();
        let (Some(mut reader), Some(mut writer)) =
            (Straight::open(&volume, false, 64 << 10), Straight::open(&volume, true, 64 << 10))
        else {
            panic!("/var/tmp has no direct I/O");
        };
        let bytes: Vec<u8> = (0..64_usize << 10).map(|n| (n % 251) as u8).collect();
        volume.write_at(&bytes, 8192).unwrap();
        assert_eq!(reader.read(8192, bytes.len()).unwrap(), Some(&bytes[..]));
        assert!(writer.write(&bytes[..4096], 4096).unwrap());
        assert!(writer.write(&bytes, 512 << 10).unwrap());
        let mut seen = vec![0; bytes.len()];
        volume.read_at(&mut seen, 512 << 10).unwrap();
        assert!(seen == bytes);
        volume.read_at(&mut seen[..4096], 4096).unwrap();
        assert!(seen[..4096] == bytes[..4096]);
        // Not aligned, or too much: the usual way.
        assert_eq!(reader.read(512, 4096).unwrap(), None);
        assert_eq!(reader.read(0, 512).unwrap(), None);
        assert_eq!(reader.read(0, 128 << 10).unwrap(), None);
        assert!(!writer.write(&bytes[..100], 0).unwrap());
    }
}
