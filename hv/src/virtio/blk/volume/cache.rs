//! What of a volume lies in the host's page cache, and how it can be read from there.

use std::io;

use super::Volume;

/// How much of a range lies in the page cache (Linux 6.5).
const SYS_CACHESTAT: libc::c_long = 451;
/// The unit in which the kernel counts there.
const PAGE_BYTES: u64 = 4096;

impl Volume {
    /// Whether the kernel can read what is cached without ever waiting. A file system mostly can, a
    /// thin volume of LVM cannot.
    pub(in crate::virtio::blk) fn reads_without_waiting(&self) -> bool {
        let mut byte = 0u8;
        let buffer = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
        // SAFETY: one buffer of one byte, which both live until the call returns.
        let read = unsafe { libc::preadv2(self.fd(), &raw const buffer, 1, 0, libc::RWF_NOWAIT) };
        // Other errors say nothing about it.
        read >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::EOPNOTSUPP)
    }

    /// Whether all these bytes lie in the page cache, as far as the kernel tells: it may give them
    /// up at any time, or be about to read them.
    pub(in crate::virtio::blk) fn is_cached(&self, offset: u64, bytes: u64) -> bool {
        let range = [offset, bytes];
        // Pages that are cached; then dirty, under writeback, evicted, and evicted of late.
        let mut pages = [0u64; 5];
        let (from, to) = (range.as_ptr(), pages.as_mut_ptr());
        // SAFETY: the call reads two words and writes five, which live until it returns.
        let answer = unsafe { libc::syscall(SYS_CACHESTAT, self.fd(), from, to, 0) };
        let wanted = (offset + bytes).div_ceil(PAGE_BYTES) - offset / PAGE_BYTES;
        answer == 0 && bytes > 0 && pages[0] >= wanted
    }
}
