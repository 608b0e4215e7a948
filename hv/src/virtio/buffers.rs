//! Guest memory as the kernel's vectored calls take it, and the marks that such writes need.

use vm_memory::bitmap::Bitmap;
use vm_memory::{
    GuestAddress, GuestMemory as GuestMemoryTrait, GuestMemoryBackend, GuestMemoryRegion,
    MemoryRegionAddress, Permissions,
};

use super::Segment;
use crate::memory::GuestMemory;

/// Adds pointers to a segment's memory; false when it is not (all) there.
pub(super) fn gather(
    memory: &GuestMemory,
    segment: Segment,
    buffers: &mut Vec<libc::iovec>,
) -> bool {
    let access = if segment.writable { Permissions::Write } else { Permissions::Read };
    let slices = GuestMemoryTrait::get_slices(memory, segment.addr, segment.len as usize, access);
    let Ok(slices) = slices else {
        return false;
    };
    let mut length = 0;
    for slice in slices {
        let Ok(slice) = slice else { return false };
        let pointer = slice.ptr_guard_mut().as_ptr();
        buffers.push(libc::iovec { iov_base: pointer.cast(), iov_len: slice.len() });
        length += slice.len();
    }
    length == segment.len as usize
}

/// The kernel wrote the first `length` bytes of these segments past `vm-memory`'s eyes: marks
/// their pages as written.
pub(super) fn mark_written<'a>(
    memory: &GuestMemory,
    segments: impl Iterator<Item = &'a Segment>,
    length: usize,
) {
    let mut left = length;
    for segment in segments {
        let mut at = segment.addr;
        let mut bytes = left.min(segment.len as usize);
        left -= bytes;
        while bytes > 0 {
            let Some((region, MemoryRegionAddress(offset))) = memory.to_region_addr(at) else {
                break;
            };
            let here = bytes.min((region.len() - offset) as usize);
            region.bitmap().mark_dirty(offset as usize, here);
            bytes -= here;
            at = GuestAddress(at.0 + here as u64);
        }
        if left == 0 {
            return;
        }
    }
}
