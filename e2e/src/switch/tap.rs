//! A TAP device: this machine's end of a segment.

use std::fs::File;
use std::os::fd::AsRawFd as _;

use crate::{Error, Result};

/// Makes the TAP of that name in the namespace of the calling thread. Reads and writes of the
/// file are frames, and never wait.
pub(super) fn open(name: &str) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    const PATH: &str = "/dev/net/tun";
    let file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(PATH)
        .map_err(Error::io("cannot open", PATH))?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the ioctl reads and writes one ifreq, which outlives it.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request) } < 0 {
        let error = std::io::Error::last_os_error();
        return Err(Error::other(format!("cannot make the TAP device {name}: {error}")));
    }
    Ok(file)
}
