//! Positional reads, and a bound on how many of them a disk may cost.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Most bytes that are read from one disk: kernel, initrd and what leads to them, many times over.
const BYTES_READ_MAX: u64 = 4 << 30;
/// Most reads of one disk. A damaged filesystem may point in circles; this ends them.
const READS_MAX: u64 = 1 << 21;

/// A disk, or a part of one.
pub trait ReadAt {
    /// Fills `target` from `offset` on.
    ///
    /// # Errors
    /// When that lies behind the end, or the disk cannot be read.
    fn read_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()>;

    /// Its length in bytes.
    fn size(&self) -> u64;
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(|_| behind_the_end())?;
        let end = start.checked_add(target.len()).ok_or_else(behind_the_end)?;
        target.copy_from_slice(self.get(start..end).ok_or_else(behind_the_end)?);
        Ok(())
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

impl<T: ReadAt + ?Sized> ReadAt for Arc<T> {
    fn read_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        (**self).read_at(offset, target)
    }

    fn size(&self) -> u64 {
        (**self).size()
    }
}

/// A raw image or a block device.
#[derive(Debug)]
pub struct DiskFile {
    file: File,
    size: u64,
}

impl DiskFile {
    /// Opens it to read.
    ///
    /// # Errors
    /// When it is not there, or is neither a regular file nor a block device.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Non-blocking: opening a FIFO must not wait for its writer.
        let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::other("is neither a regular file nor a block device"));
        }
        // A block device's metadata has no length.
        let size = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, size })
    }
}

impl ReadAt for DiskFile {
    fn read_at(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(target, offset)
    }

    fn size(&self) -> u64 {
        self.size
    }
}

fn behind_the_end() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "a read behind the end")
}

/// A disk whose reads are counted.
struct Metered {
    disk: Box<dyn ReadAt>,
    bytes_left: Cell<u64>,
    reads_left: Cell<u64>,
}

/// A part of a disk, cheap to clone.
#[derive(Clone)]
pub(super) struct Window {
    disk: Rc<Metered>,
    start: u64,
    length: u64,
}

impl Window {
    /// The whole disk.
    pub(super) fn whole(disk: Box<dyn ReadAt>) -> Self {
        let length = disk.size();
        let disk = Metered {
            disk,
            bytes_left: Cell::new(BYTES_READ_MAX),
            reads_left: Cell::new(READS_MAX),
        };
        Self { disk: Rc::new(disk), start: 0, length }
    }

    /// A part of this one; what of it lies behind the end is left out.
    pub(super) fn part(&self, start: u64, length: u64) -> Self {
        let start = start.min(self.length);
        let length = length.min(self.length - start);
        Self { disk: Rc::clone(&self.disk), start: self.start + start, length }
    }

    pub(super) fn size(&self) -> u64 {
        self.length
    }

    pub(super) fn read(&self, offset: u64, target: &mut [u8]) -> io::Result<()> {
        let bytes = target.len() as u64;
        if offset.checked_add(bytes).is_none_or(|end| end > self.length) {
            return Err(behind_the_end());
        }
        let left = (
            self.disk.bytes_left.get().checked_sub(bytes),
            self.disk.reads_left.get().checked_sub(1),
        );
        let (Some(bytes_left), Some(reads_left)) = left else {
            return Err(io::Error::other("it leads to more reads than a sound disk would"));
        };
        self.disk.bytes_left.set(bytes_left);
        self.disk.reads_left.set(reads_left);
        self.disk.disk.read_at(self.start + offset, target)
    }

    /// Some bytes, as an array.
    pub(super) fn array<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

/// Little-endian fields of a structure; what lies outside of it is zero.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = at.checked_add(N).and_then(|end| self.0.get(at..end));
        field.and_then(|field| field.try_into().ok()).unwrap_or([0; N])
    }

    pub(super) fn u8(&self, at: usize) -> u8 {
        self.bytes::<1>(at)[0]
    }

    pub(super) fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.bytes(at))
    }

    pub(super) fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.bytes(at))
    }
}
