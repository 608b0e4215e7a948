//! The host's end of a network device: a tap, opened by name.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use super::device::HEADER_BYTES;

/// What a tap does for the guest's kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// The guest takes frames without a checksum.
    pub checksum: bool,
    /// The guest takes TCP segments larger than a frame, over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// The same with ECN's bits.
    pub ecn: bool,
}

/// The host's end; each frame has a 12-byte virtio header before it, both ways.
pub trait Backend: Send {
    /// A descriptor that is readable when a frame is there.
    fn fd(&self) -> RawFd;

    /// Reads one frame into these buffers, which together are long enough for any; answers its
    /// length.
    ///
    /// # Safety
    /// The buffers must be writable memory that lives during the call.
    unsafe fn read(&mut self, buffers: &[libc::iovec]) -> io::Result<usize>;

    /// Writes one frame.
    ///
    /// # Safety
    /// The buffers must be readable memory that lives during the call.
    unsafe fn write(&mut self, buffers: &[libc::iovec]) -> io::Result<usize>;

    /// What may come with frames from now on.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()>;
}

/// Why a tap could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is no such interface.
    #[error("tap: {name}: no such network interface; accepted: a tap device that exists")]
    Missing {
        /// The name.
        name: String,
    },
    /// It could not be opened, or is no tap.
    #[error("tap: {name}: {step}: {source}")]
    Open {
        /// The name.
        name: String,
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A tap device.
#[derive(Debug)]
pub struct Tap {
    file: File,
}

impl Tap {
    /// Opens an existing tap.
    ///
    /// # Errors
    /// When there is none of this name, it is busy, or no tap.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let known = name.len() < libc::IFNAMSIZ
            && !name.contains('/')
            && Path::new("/sys/class/net").join(name).exists();
        if name.is_empty() || !known {
            // TUNSETIFF would make one, which no bridge knows.
            return Err(TapError::Missing { name: name.to_owned() });
        }
        let open = |step, source| TapError::Open { name: name.to_owned(), step, source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")
            .map_err(|source| open("opening /dev/net/tun", source))?;
        // SAFETY: an `ifreq` of zeros is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        let tap = Self { file };
        tap.ioctl(libc::TUNSETIFF as _, (&raw mut request).cast())
            .map_err(|source| open("TUNSETIFF (busy, or no tap?)", source))?;
        let mut header = HEADER_BYTES as libc::c_int;
        tap.ioctl(libc::TUNSETVNETHDRSZ as _, (&raw mut header).cast())
            .map_err(|source| open("TUNSETVNETHDRSZ", source))?;
        Ok(tap)
    }

    fn ioctl(&self, request: libc::Ioctl, argument: *mut libc::c_void) -> io::Result<()> {
        // SAFETY: the callers pass the argument that each request reads or writes, alive for the
        // call; TUNSETOFFLOAD takes a number in place of a pointer.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Backend for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    unsafe fn read(&mut self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the buffers.
        unsafe { vectored(libc::readv, self.fd(), buffers) }
    }

    unsafe fn write(&mut self, buffers: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the buffers.
        unsafe { vectored(libc::writev, self.fd(), buffers) }
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let mut flags = 0;
        for (on, flag) in [
            (offloads.checksum, libc::TUN_F_CSUM),
            (offloads.tso4, libc::TUN_F_TSO4),
            (offloads.tso6, libc::TUN_F_TSO6),
            (offloads.ecn, libc::TUN_F_TSO_ECN),
        ] {
            flags |= if on { flag } else { 0 };
        }
        self.ioctl(libc::TUNSETOFFLOAD as _, flags as usize as *mut libc::c_void)
    }
}

/// One vectored read or write.
///
/// # Safety
/// The buffers must be memory that `call` may use, alive for the call.
pub(super) unsafe fn vectored(
    call: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t,
    fd: RawFd,
    buffers: &[libc::iovec],
) -> io::Result<usize> {
    // SAFETY: the caller vouches for the buffers, and the count is theirs.
    let done = unsafe { call(fd, buffers.as_ptr(), buffers.len() as libc::c_int) };
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}
