//! Pages of guest memory, in the shape in which they travel.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::wire::{DATA_BYTES_MAX, RUNS_MAX, Run};
use crate::memory::{DirtyPages, GuestMemory, PAGE_BYTES, PageRange};

/// The pages that were ever written: the others are holes in the memory's file, and zero. Looking
/// there rather than into memory neither touches nor allocates them.
pub(crate) fn present(memory: &GuestMemory) -> DirtyPages {
    let mut pages = DirtyPages::none(memory);
    for region in memory.iter() {
        let Some(file) = region.file_offset() else {
            pages.insert(region.start_addr(), region.len());
            continue;
        };
        let (fd, base) = (file.file().as_raw_fd(), file.start());
        let end = base + region.len();
        let seek = |from: u64, whence| {
            // SAFETY: only moves the file's position, which nobody uses.
            let at = unsafe { libc::lseek(fd, from.cast_signed(), whence) };
            u64::try_from(at).map_err(|_| io::Error::last_os_error())
        };
        let mut at = base;
        while at < end {
            let (data, hole) = match seek(at, libc::SEEK_DATA) {
                Ok(data) => (data.min(end), seek(data, libc::SEEK_HOLE).unwrap_or(end).min(end)),
                // No data behind `at`.
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => break,
                // The file cannot tell: every page may hold something.
                Err(_) => (at, end),
            };
            if data >= end {
                break;
            }
            let start = region.start_addr().unchecked_add(data - base);
            pages.insert(start, hole - data);
            at = hole;
        }
    }
    pages
}

/// Makes all of memory zero again, and gives its pages back to the host.
pub(crate) fn clear(memory: &GuestMemory) -> io::Result<()> {
    for range in present(memory).ranges() {
        for slice in memory.get_slices(range.start, range.bytes as usize) {
            let slice = slice.map_err(io::Error::other)?;
            let (pointer, length) = (slice.ptr_guard_mut().as_ptr(), slice.len());
            // SAFETY: the range is page-aligned memory of the guest's own shared mapping, and no
            // guest runs; removed pages read as zero.
            let result = unsafe { libc::madvise(pointer.cast(), length, libc::MADV_REMOVE) };
            if result != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    Ok(())
}

/// Adds pointers to this memory; false when it is not (all) there.
pub(crate) fn gather(memory: &GuestMemory, run: &Run, buffers: &mut Vec<libc::iovec>) -> bool {
    let length = run.bytes() as usize;
    let mut gathered = 0;
    for slice in memory.get_slices(GuestAddress(run.start), length) {
        let Ok(slice) = slice else { return false };
        let pointer = slice.ptr_guard_mut().as_ptr();
        buffers.push(libc::iovec { iov_base: pointer.cast(), iov_len: slice.len() });
        gathered += slice.len();
    }
    gathered == length
}

/// Has the host make these pages, which are about to be written for the first time, all at once
/// rather than one by one as they are touched. Only a hint: an old kernel does not know it.
pub(crate) fn populate(buffers: &[libc::iovec]) {
    for buffer in buffers {
        // SAFETY: the buffers are page-aligned, mapped guest memory; its content stays as it is.
        unsafe { libc::madvise(buffer.iov_base, buffer.iov_len, libc::MADV_POPULATE_WRITE) };
    }
}

/// One PAGES message.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    pub(crate) runs: Vec<Run>,
    pub(crate) data_bytes: usize,
    pub(crate) zero_pages: u64,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.runs.len() >= RUNS_MAX || self.data_bytes >= DATA_BYTES_MAX
    }

    /// Adds a page behind the last run, or as a run of its own.
    fn push(&mut self, start: u64, zero: bool) {
        match self.runs.last_mut() {
            Some(last) if last.zero == zero && last.start + last.bytes() == start => {
                last.pages += 1;
            }
            _ => self.runs.push(Run { start, pages: 1, zero }),
        }
        if zero {
            self.zero_pages += 1;
        } else {
            self.data_bytes += PAGE_BYTES as usize;
        }
    }
}

/// Cuts a set of pages into batches.
pub(crate) struct Batches<'a, I> {
    memory: &'a GuestMemory,
    ranges: I,
    current: Option<PageRange>,
    /// Zero pages are left out: they are zero at the destination already.
    fresh: bool,
}

impl<'a, I: Iterator<Item = PageRange>> Batches<'a, I> {
    /// Of these ranges. `fresh`: the destination has not been sent any of these pages before.
    pub(crate) fn new(memory: &'a GuestMemory, ranges: I, fresh: bool) -> Self {
        Self { memory, ranges, current: None, fresh }
    }

    fn next_page(&mut self) -> Option<u64> {
        let mut range = match self.current.take() {
            Some(range) => range,
            None => self.ranges.next()?,
        };
        let page = range.start.raw_value();
        range.start = GuestAddress(page + PAGE_BYTES);
        range.bytes -= PAGE_BYTES;
        if range.bytes > 0 {
            self.current = Some(range);
        }
        Some(page)
    }
}

impl<I: Iterator<Item = PageRange>> Iterator for Batches<'_, I> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let mut batch = Batch::default();
        let mut seen = false;
        while !batch.is_full() {
            let Some(page) = self.next_page() else { break };
            seen = true;
            let zero = is_zero(self.memory, page);
            if zero && self.fresh {
                batch.zero_pages += 1;
            } else {
                batch.push(page, zero);
            }
        }
        seen.then_some(batch)
    }
}

/// Whether a page holds zeros only. The guest may write it meanwhile: then it is in the log, and
/// comes again.
fn is_zero(memory: &GuestMemory, page: u64) -> bool {
    const BYTES: usize = PAGE_BYTES as usize;
    let Ok(pointer) = memory.get_host_address(GuestAddress(page)) else { return false };
    // SAFETY: the page is mapped as a whole (sets of pages hold whole pages of one region), and
    // `memcmp` only reads. A page is zero when its first word is, and each word equals the next.
    unsafe {
        pointer.cast::<u64>().read_volatile() == 0
            && libc::memcmp(pointer.cast(), pointer.add(8).cast(), BYTES - 8) == 0
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;

    fn memory() -> GuestMemory {
        crate::memory::create(1024 * PAGE_BYTES).unwrap()
    }

    fn batches(memory: &GuestMemory, pages: &DirtyPages, fresh: bool) -> Vec<Run> {
        Batches::new(memory, pages.ranges(), fresh).flat_map(|batch| batch.runs).collect()
    }

    #[test]
    fn untouched_memory_is_neither_looked_at_nor_sent() {
        let memory = memory();
        assert!(present(&memory).is_empty());
        memory.write_obj(1u8, GuestAddress(5 * PAGE_BYTES)).unwrap();
        memory.write_obj(0u8, GuestAddress(9 * PAGE_BYTES)).unwrap();
        let pages = present(&memory);
        assert_eq!(pages.count(), 2);
        let run = Run { start: 5 * PAGE_BYTES, pages: 1, zero: false };
        assert_eq!(batches(&memory, &pages, true), [run]);
        let zero = Run { start: 9 * PAGE_BYTES, pages: 1, zero: true };
        assert_eq!(batches(&memory, &pages, false), [run, zero]);
    }

    #[test]
    fn every_word_of_a_page_counts() {
        let memory = memory();
        memory.write_obj(0u8, GuestAddress(0)).unwrap();
        assert!(is_zero(&memory, 0));
        for at in [0, 7, 8, 100, 2048, 4095] {
            memory.write_obj(1u8, GuestAddress(at)).unwrap();
            assert!(!is_zero(&memory, 0), "byte {at}");
            memory.write_obj(0u8, GuestAddress(at)).unwrap();
        }
        assert!(is_zero(&memory, 0));
    }

    #[test]
    fn batches_are_bounded_and_lose_no_page() {
        let memory = memory();
        for page in 0..1024u64 {
            memory.write_obj(page % 3, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        let all = DirtyPages::all(&memory);
        let mut pages = 0;
        for batch in Batches::new(&memory, all.ranges(), false) {
            assert!(batch.runs.len() <= RUNS_MAX && batch.data_bytes <= DATA_BYTES_MAX);
            pages += batch.runs.iter().map(|run| u64::from(run.pages)).sum::<u64>();
        }
        assert_eq!(pages, 1024);
    }

    #[test]
    fn cleared_memory_is_zero_and_takes_no_room() {
        let memory = memory();
        memory.write_obj(7u64, GuestAddress(3 * PAGE_BYTES)).unwrap();
        clear(&memory).unwrap();
        assert!(present(&memory).is_empty());
        assert_eq!(memory.read_obj::<u64>(GuestAddress(3 * PAGE_BYTES)).unwrap(), 0);
    }
}
