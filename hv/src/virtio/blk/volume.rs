//! A volume on the node: a raw file or a block device, open and locked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::requests::Span;
use super::tracker::WriteTracker;

mod cache;
mod straight;
mod travel;

pub(crate) use straight::Straight;
pub(crate) use travel::{Closed, is_zero};

/// Virtio counts in these, whatever the disk's own block size.
pub(super) const SECTOR_BYTES: u64 = 512;
/// How long to wait for the lock: udev holds it for a moment when it looks at a new device, and
/// the machine before a reboot until its last user has let go.
const LOCK_WAIT_MAX: Duration = Duration::from_millis(500);
const LOCK_RETRY: Duration = Duration::from_millis(20);
/// Zeros in one write, where nothing faster is to be had.
const ZEROS_BYTES: usize = 64 << 10;
static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];

/// From `linux/fs.h`; each takes `[start, length]` in bytes.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;
/// From `linux/fs.h`: the logical block size, into an int.
const BLKSSZGET: libc::Ioctl = 0x1268;

/// Why a volume could not be used.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// It is not there, or may not be opened.
    #[error("{path}: {source}")]
    Open {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is a directory, a pipe or the like.
    #[error("{path}: is no regular file and no block device")]
    Kind {
        /// The path.
        path: PathBuf,
    },
    /// It has no whole number of sectors.
    #[error("{path}: has {bytes} bytes")]
    Size {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
    },
    /// It was cut short while it was open.
    #[error("{path}: has {bytes} bytes, and had {before}")]
    Shrunk {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: u64,
        /// Its length before.
        before: u64,
    },
    /// Somebody else has it open.
    #[error("{path}: is in use: locked by another VMM or disk, or mounted")]
    Busy {
        /// The path.
        path: PathBuf,
    },
}

impl VolumeError {
    /// What would have been accepted.
    pub fn accepted(&self) -> &'static str {
        match self {
            Self::Open { .. } => "a file or block device that this process may open and lock",
            Self::Kind { .. } => "a regular file (raw) or a block device",
            Self::Size { .. } => "a multiple of 512 bytes, at least 512",
            Self::Shrunk { .. } => "a volume that has grown",
            Self::Busy { .. } => "a volume that nobody else has open",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Device,
}

/// An open volume. It is locked until the last handle of it is dropped.
#[derive(Debug)]
pub struct Volume {
    /// A descriptor that no I/O can be done with while the volume is closed ([`Volume::close`]).
    file: File,
    path: PathBuf,
    tracker: WriteTracker,
    kind: Kind,
    /// Grows.
    bytes: AtomicU64,
    block_bytes: u32,
    read_only: bool,
}

impl Volume {
    /// Opens and locks a volume. The lock is an exclusive `flock`, for readers too; a block
    /// device is also claimed with O_EXCL, which a mounted filesystem, LVM or MD does as well.
    ///
    /// # Errors
    /// When it is not there, of another kind or an odd size, or in use.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, VolumeError> {
        let open = |source| VolumeError::Open { path: path.to_owned(), source };
        // Looked at first: opening a pipe would wait for its other end.
        let kind = kind(path, &std::fs::metadata(path).map_err(open)?)?;
        let file = open_locked(path, read_only, kind)?;
        // What is open counts, not what lay there before.
        if self::kind(path, &file.metadata().map_err(open)?)? != kind {
            return Err(VolumeError::Kind { path: path.to_owned() });
        }
        let (bytes, block_bytes) = measure(&file, kind).map_err(open)?;
        let path = path.to_owned();
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(VolumeError::Size { path, bytes });
        }
        let (bytes, tracker) = (AtomicU64::new(bytes), WriteTracker::default());
        Ok(Self { file, path, tracker, kind, bytes, block_bytes, read_only })
    }

    /// Looks how long it is now. Answers its length before and now, in bytes.
    ///
    /// # Errors
    /// When it has shrunk or has an odd size; then it counts as long as before.
    pub(super) fn measure_again(&self) -> Result<(u64, u64), VolumeError> {
        let path = || self.path.clone();
        let (bytes, _) = measure(&self.file, self.kind)
            .map_err(|source| VolumeError::Open { path: path(), source })?;
        let before = self.bytes.load(Ordering::SeqCst);
        if bytes < before {
            return Err(VolumeError::Shrunk { path: path(), bytes, before });
        }
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(VolumeError::Size { path: path(), bytes });
        }
        self.bytes.store(bytes, Ordering::SeqCst);
        Ok((before, bytes))
    }

    /// Its length in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.bytes.load(Ordering::SeqCst) / SECTOR_BYTES
    }

    /// The unit in which it is best addressed, bytes.
    pub(super) fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Whether the guest can only read it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Notes what is written, for a migration.
    pub fn tracker(&self) -> &WriteTracker {
        &self.tracker
    }

    /// Whether zeros can be had by giving room back.
    pub(super) fn zeroes_may_unmap(&self) -> bool {
        self.kind == Kind::File
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Makes durable what was written.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives back the room of these bytes; what they hold afterwards does not matter.
    pub(super) fn discard(&self, span: Span) -> io::Result<()> {
        match self.kind {
            Kind::File => self.punch(span),
            Kind::Device => self.ioctl_span(BLKDISCARD, span),
        }
    }

    /// Fills these bytes with zeros, by the first way that works here.
    pub(super) fn zero(&self, span: Span) -> io::Result<()> {
        let fast = match self.kind {
            Kind::File if span.unmap => self.punch(span).or_else(|_| self.zero_range(span)),
            Kind::File => self.zero_range(span),
            Kind::Device => self.ioctl_span(BLKZEROOUT, span),
        };
        match fast {
            Err(error) if is_unsupported(&error) => self.write_zeros(span),
            other => other,
        }
    }

    /// Fills these bytes with zeros where the system has nothing for that.
    pub(super) fn write_zeros(&self, span: Span) -> io::Result<()> {
        let mut at = span.offset;
        let end = span.offset + span.bytes;
        while at < end {
            let here = (end - at).min(ZEROS_BYTES as u64);
            self.file.write_all_at(&ZEROS[..here as usize], at)?;
            at += here;
        }
        Ok(())
    }

    fn punch(&self, span: Span) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, span.offset, span.bytes)?)
    }

    fn zero_range(&self, span: Span) -> io::Result<()> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, span.offset, span.bytes)?)
    }

    fn ioctl_span(&self, request: libc::Ioctl, span: Span) -> io::Result<()> {
        let range = [span.offset, span.bytes];
        // SAFETY: both requests read two 64-bit words, which live until the call returns.
        match unsafe { libc::ioctl(self.fd(), request, range.as_ptr()) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Opens and locks it, waiting a little where somebody else has it.
fn open_locked(path: &Path, read_only: bool, kind: Kind) -> Result<File, VolumeError> {
    let exclusive = if kind == Kind::Device { libc::O_EXCL } else { 0 };
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    let mut write = !read_only;
    loop {
        let opened = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(exclusive | libc::O_CLOEXEC)
            .open(path);
        let locked = opened.and_then(|file| {
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            Ok(file)
        });
        match locked {
            Ok(file) => return Ok(file),
            // A network filesystem gives an exclusive lock only to those who may write.
            Err(error) if !write && error.raw_os_error() == Some(libc::EBADF) => write = true,
            Err(error) if !is_busy(&error) => {
                return Err(VolumeError::Open { path: path.to_owned(), source: error });
            }
            Err(_) if Instant::now() >= deadline => {
                return Err(VolumeError::Busy { path: path.to_owned() });
            }
            Err(_) => std::thread::sleep(LOCK_RETRY),
        }
    }
}

fn kind(path: &Path, metadata: &std::fs::Metadata) -> Result<Kind, VolumeError> {
    let file_type = metadata.file_type();
    if file_type.is_file() {
        Ok(Kind::File)
    } else if file_type.is_block_device() {
        Ok(Kind::Device)
    } else {
        Err(VolumeError::Kind { path: path.to_owned() })
    }
}

/// Length and block size.
fn measure(file: &File, kind: Kind) -> io::Result<(u64, u32)> {
    if kind == Kind::File {
        return Ok((file.metadata()?.len(), SECTOR_BYTES as u32));
    }
    let mut block_bytes: libc::c_int = 0;
    // SAFETY: the request writes one int, which is borrowed mutably.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut block_bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let block_bytes = u32::try_from(block_bytes).map_err(io::Error::other)?;
    // The end of a device is its length; nothing here uses the file's own position.
    let bytes = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
    Ok((bytes, block_bytes.max(SECTOR_BYTES as u32)))
}

fn is_busy(error: &io::Error) -> bool {
    let busy = [Errno::WOULDBLOCK, Errno::BUSY];
    error.raw_os_error().is_some_and(|code| busy.iter().any(|errno| errno.raw_os_error() == code))
}

/// The filesystem or the device has no such call, or not for blocks of this size.
fn is_unsupported(error: &io::Error) -> bool {
    let codes = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENOTTY, libc::EINVAL];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}
