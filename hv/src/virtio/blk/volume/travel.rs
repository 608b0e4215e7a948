//! What a migration does to a volume: reads what is allocated, fills the copy, and hands the right
//! to write from one VMM to the other.
//!
//! That right is the open descriptor itself. A volume that was closed is still the device's, under
//! the same number, but nothing can be read or written through it: so a source that has handed
//! over cannot write any more, whatever goes wrong, and a destination cannot before its time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::AtomicU64;

use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Kind, SECTOR_BYTES, Span, Volume, VolumeError, WriteTracker, kind, measure};

/// A device that is to be zeroed is looked at first in pieces of this: what is zero already stays
/// without room where the device gives room on writing.
const LOOK_BYTES: usize = 256 << 10;

/// Whether these bytes are all zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Each equals the one before it: a comparison of memory, which is fast.
    bytes.first().is_none_or(|first| *first == 0 && bytes[1..] == bytes[..bytes.len() - 1])
}

/// What a volume was open by. It holds no lock, and nobody reads or writes through it.
#[derive(Debug)]
pub struct Closed(#[allow(dead_code)] File);

impl Volume {
    /// A volume that another VMM still has: nothing is opened or locked before
    /// [`reopen`](Self::reopen).
    ///
    /// # Errors
    /// When it is not there, or of another kind or an odd size.
    pub fn unopened(path: &Path, read_only: bool) -> Result<Self, VolumeError> {
        let open = |source| VolumeError::Open { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(open)?;
        let kind = kind(path, &metadata)?;
        let (bytes, block_bytes) = match kind {
            Kind::File => (metadata.len(), SECTOR_BYTES as u32),
            Kind::Device => measure_closed(metadata.rdev()).map_err(open)?,
        };
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(VolumeError::Size { path: path.to_owned(), bytes });
        }
        let (path, tracker) = (path.to_owned(), WriteTracker::default());
        let bytes = AtomicU64::new(bytes);
        let file = nothing().map_err(open)?;
        Ok(Self { file, path, tracker, kind, bytes, block_bytes, read_only })
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.sectors() * SECTOR_BYTES
    }

    /// Whether it can be read and written (and is locked).
    pub fn is_open(&self) -> bool {
        rustix::fs::fcntl_getfl(&self.file).is_ok_and(|flags| !flags.contains(OFlags::PATH))
    }

    /// Lets go of the volume and its lock. Nothing may be under way.
    ///
    /// What comes back is to be dropped when there is time: with the last descriptor of a block
    /// device the system writes out all that it has cached of it, which takes seconds.
    ///
    /// # Errors
    /// When the system has no descriptors left; then it is still open.
    pub fn close(&self) -> io::Result<Closed> {
        let closed = Closed(self.file.try_clone()?);
        self.put(&nothing()?)?;
        rustix::fs::flock(&closed.0, rustix::fs::FlockOperation::Unlock)?;
        Ok(closed)
    }

    /// Opens and locks it again; does nothing when it is open.
    ///
    /// # Errors
    /// As [`open`](Self::open), and when its size is another one meanwhile.
    pub fn reopen(&self) -> Result<(), VolumeError> {
        if self.is_open() {
            return Ok(());
        }
        let open = |source| VolumeError::Open { path: self.path.clone(), source };
        let file = super::open_locked(&self.path, self.read_only, self.kind)?;
        if kind(&self.path, &file.metadata().map_err(open)?)? != self.kind {
            return Err(VolumeError::Kind { path: self.path.clone() });
        }
        let (bytes, _) = measure(&file, self.kind).map_err(open)?;
        if bytes < self.bytes() {
            return Err(VolumeError::Size { path: self.path.clone(), bytes });
        }
        // What this node may still have cached of it is not what it holds now. Only a hint, and
        // only pages that nobody has written here.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
        self.put(&file).map_err(open)
    }

    /// From here on the volume's descriptor is what this one is.
    fn put(&self, file: &File) -> io::Result<()> {
        // SAFETY: the number stays ours and open; what it stood for is closed by the system at
        // the same moment.
        let result =
            unsafe { libc::dup3(file.as_raw_fd(), self.file.as_raw_fd(), libc::O_CLOEXEC) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Fills the buffer from `offset` on.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// The first bytes at or after `offset` that may hold something, as `(start, end)`; the rest
    /// reads as zeros without being read.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let end = self.bytes();
        if offset >= end {
            return Ok(None);
        }
        if self.kind == Kind::Device {
            return Ok(Some((offset, end)));
        }
        // Nothing uses the file's own position.
        let start = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            // Also where somebody has cut it, and that is no hole.
            Err(Errno::NXIO) if self.file.metadata()?.len() < end => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Err(Errno::NXIO) => return Ok(None),
            // The filesystem cannot tell.
            Err(Errno::INVAL) => return Ok(Some((offset, end))),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?;
        Ok((start < end).then_some((start, hole.min(end))))
    }

    /// The volume for the one who fills it, also where the guest may only read.
    ///
    /// # Errors
    /// When it cannot be written, or is not what was opened.
    pub fn target(&self) -> Result<Self, VolumeError> {
        let path = &self.path;
        let open = |source| VolumeError::Open { path: path.clone(), source };
        let file = if self.read_only {
            // The lock is ours already.
            let flags = libc::O_CLOEXEC;
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
        } else {
            self.file.try_clone()
        };
        let file = file.map_err(open)?;
        if self.is_another(&file).map_err(open)? {
            return Err(open(io::Error::other("it is another one meanwhile")));
        }
        let (path, tracker) = (path.clone(), WriteTracker::default());
        let bytes = AtomicU64::new(self.bytes());
        let Self { kind, block_bytes, .. } = *self;
        Ok(Self { file, path, tracker, kind, bytes, block_bytes, read_only: false })
    }

    /// Whether this is open on something else.
    pub(super) fn is_another(&self, file: &File) -> io::Result<bool> {
        let id = |file: &File| file.metadata().map(|data| (data.dev(), data.ino(), data.rdev()));
        Ok(id(file)? != id(&self.file)?)
    }

    /// Empties a file: it reads as zeros, and takes no room. Answers whether that is so.
    pub fn make_empty(&self) -> bool {
        let all = Span { offset: 0, bytes: self.bytes(), unmap: true };
        self.kind == Kind::File && self.punch(all).is_ok()
    }

    /// Writes all of this at `offset`.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Has the system begin to write these bytes to the disk, so that making them durable later
    /// has little left to wait for. Only a hint.
    pub(crate) fn begin_writing(&self, offset: u64, bytes: u64) {
        let (fd, flags) = (self.fd(), libc::SYNC_FILE_RANGE_WRITE);
        // SAFETY: only tells the system about a range of an open file.
        unsafe { libc::sync_file_range(fd, offset.cast_signed(), bytes.cast_signed(), flags) };
    }

    /// Makes these bytes zero, and gives their room back where that is sure to read as zeros.
    pub fn clear(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.kind == Kind::File {
            return self.zero(Span { offset, bytes, unmap: true });
        }
        let mut buffer = vec![0; LOOK_BYTES];
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let piece = &mut buffer[..(end - at).min(LOOK_BYTES as u64) as usize];
            self.read_at(piece, at)?;
            if !is_zero(piece) {
                self.zero(Span { offset: at, bytes: piece.len() as u64, unmap: false })?;
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// Makes durable what was written.
    pub fn sync(&self) -> io::Result<()> {
        self.flush()
    }
}

/// A descriptor with which nothing can be done.
fn nothing() -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open("/")
}

/// Length and block size of a device, without opening it: another node may have it.
fn measure_closed(device: u64) -> io::Result<(u64, u32)> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let number = |file: &str| -> io::Result<u64> {
        let path = format!("/sys/dev/block/{major}:{minor}/{file}");
        std::fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
    };
    // A partition has none of its own.
    let block_bytes = number("queue/logical_block_size").unwrap_or(SECTOR_BYTES);
    let block_bytes = u32::try_from(block_bytes).map_err(io::Error::other)?;
    Ok((number("size")? * SECTOR_BYTES, block_bytes))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    fn file(bytes: usize) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&vec![7; bytes]).unwrap();
        file
    }

    /// Whoever has closed a volume can do nothing to it, and somebody else can have it; and back.
    #[test]
    fn a_closed_volume_is_out_of_reach() {
        let file = file(4096);
        let mine = Volume::open(file.path(), false).unwrap();
        let theirs = Volume::unopened(file.path(), false).unwrap();
        assert_eq!((mine.is_open(), theirs.is_open(), theirs.bytes()), (true, false, 4096));
        assert!(matches!(theirs.reopen(), Err(VolumeError::Busy { .. })));
        mine.close().unwrap();
        assert!(mine.write_at(&[1], 0).is_err() && mine.flush().is_err() && !mine.is_open());
        theirs.reopen().unwrap();
        theirs.write_at(&[2], 0).unwrap();
        assert!(matches!(mine.reopen(), Err(VolumeError::Busy { .. })));
        drop(theirs);
        mine.reopen().unwrap();
        mine.reopen().unwrap();
        let mut byte = [0];
        mine.read_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [2]);
        assert!(matches!(Volume::open(file.path(), true), Err(VolumeError::Busy { .. })));
    }

    #[test]
    fn a_copy_is_filled_also_where_the_guest_may_only_read() {
        let file = file(1 << 20);
        let volume = Volume::open(file.path(), true).unwrap();
        assert!(volume.write_at(&[1], 0).is_err());
        let target = volume.target().unwrap();
        assert!(target.make_empty());
        assert_eq!(volume.next_data(0).unwrap(), None);
        target.write_at(&[9; 4096], 512 << 10).unwrap();
        target.sync().unwrap();
        assert_eq!(volume.next_data(0).unwrap(), Some((512 << 10, (512 << 10) + 4096)));
        target.clear(512 << 10, 4096).unwrap();
        let mut all = vec![1; 1 << 20];
        volume.read_at(&mut all, 0).unwrap();
        assert!(is_zero(&all));
        assert_eq!(volume.next_data(1 << 20).unwrap(), None);
    }

    #[test]
    fn every_byte_counts_for_zero() {
        assert!(is_zero(&[]) && is_zero(&[0]) && is_zero(&[0; 4096]));
        for at in [0, 1, 2047, 4095] {
            let mut bytes = [0; 4096];
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "byte {at}");
        }
    }
}
