//! Guest memory, and which of its pages changed.
//!
//! RAM is one memfd, mapped shared. It lies at guest-physical 0 up to [`LOW_RAM_END`], and what
//! is more than that begins at 4 GiB: the hole between holds PCI windows, the I/O APIC and the
//! local APICs.
//!
//! A page can be written by two: by the guest, which KVM logs, and by the VMM itself (a device's
//! DMA), which KVM does not see. [`GuestMemory`] marks the latter in a bitmap of its own, as long
//! as the writer goes through `vm-memory`. [`DirtyTracker`] joins both.
//!
//! Reading KVM's log clears it. Whoever takes pages and then fails to send them must give them
//! back with [`DirtyTracker::put_back`].

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

/// Guest memory whose writes by the VMM are tracked page by page.
pub type GuestMemory = vm_memory::GuestMemoryMmap<AtomicBitmap>;

/// Bytes in a page, the unit of tracking.
pub const PAGE_BYTES: u64 = 4096;
/// Below this guest-physical address lies RAM, from here to 4 GiB devices.
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// RAM that does not fit below [`LOW_RAM_END`] begins here.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Pages in a word of a bitmap.
const WORD_PAGES: u64 = 64;

/// Guest memory could not be made or tracked.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The system has no memory file for us.
    #[error("guest memory of {bytes} bytes cannot be allocated: {source}")]
    Allocate {
        /// How much was asked for.
        bytes: u64,
        /// What the system said.
        source: io::Error,
    },
    /// The memory file could not be mapped.
    #[error("guest memory of {bytes} bytes cannot be mapped: {reason}")]
    Map {
        /// How much was asked for.
        bytes: u64,
        /// What the system said.
        reason: String,
    },
    /// KVM refused to log.
    #[error("the log of dirty pages failed while {step}: {source}")]
    DirtyLog {
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Where RAM of this size lies: `(start, length)` in bytes, ascending.
pub fn layout(memory_bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = memory_bytes.min(LOW_RAM_END);
    let mut ranges = vec![(GuestAddress(0), low)];
    if memory_bytes > low {
        ranges.push((GuestAddress(HIGH_RAM_START), memory_bytes - low));
    }
    ranges
}

/// Makes zeroed guest memory of this many bytes (a multiple of [`PAGE_BYTES`]), backed by one
/// sealed memfd. Pages take room on the host when they are first written.
///
/// # Errors
/// When the system has no room for it.
pub fn create(memory_bytes: u64) -> Result<GuestMemory, MemoryError> {
    assert!(memory_bytes > 0 && memory_bytes.is_multiple_of(PAGE_BYTES));
    let allocate = |source: rustix::io::Errno| MemoryError::Allocate {
        bytes: memory_bytes,
        source: source.into(),
    };
    let map = |reason: String| MemoryError::Map { bytes: memory_bytes, reason };

    let file =
        rustix::fs::memfd_create(c"guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(allocate)?;
    rustix::fs::ftruncate(&file, memory_bytes).map_err(allocate)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(allocate)?;

    let file = Arc::new(File::from(file));
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, length) in layout(memory_bytes) {
        let bytes = usize::try_from(length).map_err(|error| map(error.to_string()))?;
        let backing = FileOffset::from_arc(Arc::clone(&file), offset);
        let region = GuestRegionMmap::from_range(start, bytes, Some(backing))
            .map_err(|error| map(error.to_string()))?;
        // Where the node's /sys/kernel/mm/transparent_hugepage/shmem_enabled says `advise`: large
        // pages, of which the guest's CPU walks fewer. Elsewhere this changes nothing.
        // SAFETY: advice on our own fresh mapping, which spans these bytes.
        unsafe { libc::madvise(region.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        regions.push(region);
        offset += length;
    }
    GuestMemory::from_regions(regions).map_err(|error| map(error.to_string()))
}

/// Adjacent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRange {
    /// Guest-physical address of the first page.
    pub start: GuestAddress,
    /// Length in bytes, a multiple of [`PAGE_BYTES`].
    pub bytes: u64,
}

/// A set of guest pages: one bit a page, region by region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirtyPages {
    regions: Vec<RegionPages>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct RegionPages {
    start: u64,
    pages: u64,
    words: Vec<u64>,
}

impl RegionPages {
    fn new(region: &impl GuestMemoryRegion) -> Self {
        let pages = region.len() / PAGE_BYTES;
        let words = vec![0; pages.div_ceil(WORD_PAGES) as usize];
        Self { start: region.start_addr().raw_value(), pages, words }
    }

    fn merge(&mut self, words: &[u64]) {
        for (mine, other) in self.words.iter_mut().zip(words) {
            *mine |= other;
        }
        self.trim();
    }

    /// Forgets bits behind the last page.
    fn trim(&mut self) {
        let used = self.pages % WORD_PAGES;
        if let (1.., Some(last)) = (used, self.words.last_mut()) {
            *last &= (1 << used) - 1;
        }
    }

    /// The next run of set bits at or after `page`, as `(first, end)`.
    fn next_run(&self, page: u64) -> Option<(u64, u64)> {
        let first = self.next_bit(page, 0)?;
        let end = self.next_bit(first, u64::MAX).unwrap_or(self.pages);
        Some((first, end))
    }

    /// The first page at or after `page` whose bit is set in `words ^ flip`.
    fn next_bit(&self, page: u64, flip: u64) -> Option<u64> {
        let mut index = (page / WORD_PAGES) as usize;
        let mut word = (self.words.get(index)? ^ flip) & (u64::MAX << (page % WORD_PAGES));
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        let found = index as u64 * WORD_PAGES + u64::from(word.trailing_zeros());
        (found < self.pages).then_some(found)
    }
}

impl DirtyPages {
    /// No page of this memory.
    pub fn none(memory: &GuestMemory) -> Self {
        Self { regions: memory.iter().map(RegionPages::new).collect() }
    }

    /// Every page of this memory.
    pub fn all(memory: &GuestMemory) -> Self {
        let mut pages = Self::none(memory);
        for region in &mut pages.regions {
            region.words.fill(u64::MAX);
            region.trim();
        }
        pages
    }

    /// Adds the pages that these bytes touch; what lies outside of memory is ignored.
    pub fn insert(&mut self, start: GuestAddress, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let (start, last) = (start.raw_value(), start.raw_value().saturating_add(bytes - 1));
        for region in &mut self.regions {
            let region_last = region.start + region.pages * PAGE_BYTES - 1;
            if last < region.start || start > region_last {
                continue;
            }
            let first = (start.max(region.start) - region.start) / PAGE_BYTES;
            let end = (last.min(region_last) - region.start) / PAGE_BYTES;
            for page in first..=end {
                region.words[(page / WORD_PAGES) as usize] |= 1 << (page % WORD_PAGES);
            }
        }
    }

    /// Adds the pages of another set over the same memory.
    pub fn merge(&mut self, other: &Self) {
        assert_eq!(self.regions.len(), other.regions.len(), "sets over different memories");
        for (mine, other) in self.regions.iter_mut().zip(&other.regions) {
            assert_eq!((mine.start, mine.pages), (other.start, other.pages));
            mine.merge(&other.words);
        }
    }

    /// How many pages.
    pub fn count(&self) -> u64 {
        let words = self.regions.iter().flat_map(|region| &region.words);
        words.map(|word| u64::from(word.count_ones())).sum()
    }

    /// How many bytes.
    pub fn bytes(&self) -> u64 {
        self.count() * PAGE_BYTES
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(|region| region.words.iter().all(|word| *word == 0))
    }

    /// The pages as runs, ascending, none crossing a region.
    pub fn ranges(&self) -> impl Iterator<Item = PageRange> + '_ {
        self.regions.iter().flat_map(|region| {
            let mut page = 0;
            std::iter::from_fn(move || {
                let (first, end) = region.next_run(page)?;
                page = end;
                Some(PageRange {
                    start: GuestAddress(region.start + first * PAGE_BYTES),
                    bytes: (end - first) * PAGE_BYTES,
                })
            })
        })
    }
}

/// The log of pages that the *guest* wrote. KVM's is [`KvmDirtyLog`]; a test has its own.
pub trait DirtyLog: Send {
    /// Begins to log; what was logged before is forgotten.
    fn start(&mut self) -> io::Result<()>;

    /// The pages of a region (by its index) written since the last call that cleared: bit n of
    /// word n/64 is page n. With `clear`, they are logged anew from now on. Without, the same
    /// bits may come again.
    fn read(&mut self, region: usize, clear: bool) -> io::Result<Vec<u64>>;

    /// Ends the log.
    fn stop(&mut self) -> io::Result<()>;
}

/// Joins the guest's writes and the VMM's own.
pub struct DirtyTracker {
    memory: GuestMemory,
    log: Box<dyn DirtyLog>,
    put_back: DirtyPages,
    running: bool,
}

impl std::fmt::Debug for DirtyTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirtyTracker").field("running", &self.running).finish_non_exhaustive()
    }
}

impl DirtyTracker {
    /// A tracker that does not run yet.
    pub fn new(memory: GuestMemory, log: Box<dyn DirtyLog>) -> Self {
        let put_back = DirtyPages::none(&memory);
        Self { memory, log, put_back, running: false }
    }

    /// Begins to track. Nothing counts as dirty yet: the caller sends every page once *after*
    /// this returned.
    pub fn start(&mut self) -> Result<(), MemoryError> {
        self.log.start().map_err(|source| MemoryError::DirtyLog { step: "starting", source })?;
        for region in self.memory.iter() {
            std::ops::Deref::deref(region).bitmap().reset();
        }
        self.put_back = DirtyPages::none(&self.memory);
        self.running = true;
        // The VMM's bits may be those of a write from before the reset; a page too many is fine.
        Ok(())
    }

    /// Takes the pages written since the last call (or the start), and those that were put back.
    pub fn take(&mut self) -> Result<DirtyPages, MemoryError> {
        self.read(true)
    }

    /// As [`take`](Self::take), for the last time before the guest goes elsewhere: cheaper, as
    /// pages are not protected again. The guest must be paused. Should the guest go on after all,
    /// the next `take` yields these pages once more.
    pub fn take_last(&mut self) -> Result<DirtyPages, MemoryError> {
        self.read(false)
    }

    fn read(&mut self, clear: bool) -> Result<DirtyPages, MemoryError> {
        assert!(self.running, "dirty pages taken from a tracker that does not run");
        let mut pages = std::mem::replace(&mut self.put_back, DirtyPages::none(&self.memory));
        for (index, region) in self.memory.iter().enumerate() {
            // Ours first: should KVM's fail, the bits are not lost.
            let own = std::ops::Deref::deref(region).bitmap().get_and_reset();
            pages.regions[index].merge(&own);
            match self.log.read(index, clear) {
                Ok(words) => pages.regions[index].merge(&words),
                Err(source) => {
                    self.put_back.merge(&pages);
                    return Err(MemoryError::DirtyLog { step: "reading", source });
                }
            }
        }
        Ok(pages)
    }

    /// Gives back pages that were taken and not sent; the next [`take`](Self::take) yields them.
    pub fn put_back(&mut self, pages: &DirtyPages) {
        self.put_back.merge(pages);
    }

    /// Ends tracking, so that the guest's writes cost nothing again. Does nothing when it does
    /// not run. This takes time that grows with memory: not to be called while a guest is paused
    /// for a migration.
    pub fn stop(&mut self) -> Result<(), MemoryError> {
        if !self.running {
            return Ok(());
        }
        self.running = false;
        self.log.stop().map_err(|source| MemoryError::DirtyLog { step: "stopping", source })
    }
}

/// The request that `kvm-ioctls` has no call for.
mod request {
    #![allow(missing_docs, reason = "the macro gives its function no documentation")]
    use super::{KVMIO, ioctl_iowr_nr, kvm_clear_dirty_log};
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
}

/// KVM's log of one VM.
///
/// With manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, bits initially set) switching the
/// log on touches no page, and reading it without clearing leaves the page tables alone: the
/// pause's pass costs one ioctl. Without it (old kernels) each read protects the pages again.
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: Arc<VmFd>,
    slots: Vec<kvm_userspace_memory_region>,
    manual_protect: bool,
}

impl KvmDirtyLog {
    /// Registers this memory as the VM's RAM, slot by slot, without logging.
    ///
    /// # Errors
    /// When KVM refuses a slot.
    pub fn register(vm: Arc<VmFd>, memory: &GuestMemory) -> Result<Self, MemoryError> {
        let failed = |step| {
            move |error: kvm_ioctls::Error| MemoryError::DirtyLog { step, source: error.into() }
        };
        let supported = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let manual_protect = supported & wanted.cast_signed() == wanted.cast_signed();
        if manual_protect {
            let mut cap =
                kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
            cap.args[0] = u64::from(wanted);
            vm.enable_cap(&cap).map_err(failed("enabling manual protection"))?;
        }
        let slots: Vec<_> = memory
            .iter()
            .zip(0u32..)
            .map(|(region, slot)| kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            })
            .collect();
        let log = Self { vm, slots, manual_protect };
        log.set_flags(0)
            .map_err(|source| MemoryError::DirtyLog { step: "registering RAM", source })?;
        Ok(log)
    }

    fn set_flags(&self, flags: u32) -> io::Result<()> {
        for slot in &self.slots {
            let slot = kvm_userspace_memory_region { flags, ..*slot };
            // SAFETY: the slot describes a live mapping of `GuestMemory`, whose owner (the
            // machine) keeps it mapped for as long as the VM exists.
            unsafe { self.vm.set_user_memory_region(slot) }.map_err(io::Error::from)?;
        }
        Ok(())
    }

    /// Clears the bits that are set in `words`, and protects those pages.
    fn clear(&self, slot: &kvm_userspace_memory_region, words: &mut [u64]) -> io::Result<()> {
        let pages = slot.memory_size / PAGE_BYTES;
        let num_pages = u32::try_from(pages).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let request = kvm_clear_dirty_log {
            slot: slot.slot,
            num_pages,
            first_page: 0,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words.as_mut_ptr().cast(),
            },
        };
        // SAFETY: KVM reads one bit for each of the slot's pages, and `words` came from
        // KVM_GET_DIRTY_LOG on the same slot, so that it is that long.
        let result =
            unsafe { ioctl_with_ref(self.vm.as_ref(), request::KVM_CLEAR_DIRTY_LOG(), &request) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn get(&self, slot: &kvm_userspace_memory_region) -> io::Result<Vec<u64>> {
        let bytes = usize::try_from(slot.memory_size).map_err(io::Error::other)?;
        self.vm.get_dirty_log(slot.slot, bytes).map_err(io::Error::from)
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&mut self) -> io::Result<()> {
        self.set_flags(KVM_MEM_LOG_DIRTY_PAGES)?;
        if self.manual_protect {
            // Every bit begins set. Clearing them all protects all pages, once.
            for slot in &self.slots {
                let mut words = self.get(slot)?;
                self.clear(slot, &mut words)?;
            }
        }
        Ok(())
    }

    fn read(&mut self, region: usize, clear: bool) -> io::Result<Vec<u64>> {
        let slot = &self.slots[region];
        let mut words = self.get(slot)?;
        if clear && self.manual_protect && words.iter().any(|word| *word != 0) {
            self.clear(slot, &mut words)?;
        }
        Ok(words)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.set_flags(0)
    }
}

impl AsRawFd for KvmDirtyLog {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.vm.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn layout_leaves_the_hole_below_4_gib() {
        assert_eq!(layout(128 << 20), [(GuestAddress(0), 128 << 20)]);
        assert_eq!(
            layout(4 << 30),
            [(GuestAddress(0), LOW_RAM_END), (GuestAddress(HIGH_RAM_START), 1 << 30)]
        );
    }

    /// A guest that writes by fiat: the bits stay until they are read with `clear`.
    struct FakeLog(Arc<Mutex<(Vec<u64>, bool)>>);

    impl DirtyLog for FakeLog {
        fn start(&mut self) -> io::Result<()> {
            self.0.lock().unwrap().0.fill(0);
            Ok(())
        }
        fn read(&mut self, _: usize, clear: bool) -> io::Result<Vec<u64>> {
            let mut log = self.0.lock().unwrap();
            if log.1 {
                return Err(io::ErrorKind::Other.into());
            }
            let words = log.0.clone();
            if clear {
                log.0.fill(0);
            }
            Ok(words)
        }
        fn stop(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn pages(set: &DirtyPages) -> Vec<(u64, u64)> {
        set.ranges().map(|r| (r.start.0 / PAGE_BYTES, r.bytes / PAGE_BYTES)).collect()
    }

    /// The guest's and the VMM's writes come out together, once; put back, they come again; and a
    /// failed read loses neither.
    #[test]
    fn tracker_joins_both_writers_and_forgets_nothing() {
        let memory = create(200 * PAGE_BYTES).unwrap();
        let log = Arc::new(Mutex::new((vec![0u64; 4], false)));
        let mut tracker = DirtyTracker::new(memory.clone(), Box::new(FakeLog(Arc::clone(&log))));
        memory.write_obj(1u8, GuestAddress(0)).unwrap();
        tracker.start().unwrap();
        assert!(tracker.take().unwrap().is_empty(), "writes before the start do not count");

        memory.write_obj(1u64, GuestAddress(7 * PAGE_BYTES - 4)).unwrap();
        log.lock().unwrap().0 = vec![1 << 63, 1, 0, 1 << 7];
        let taken = tracker.take().unwrap();
        assert_eq!(pages(&taken), [(6, 2), (63, 2), (199, 1)].map(|(a, n)| (a, n)));
        assert_eq!((taken.count(), taken.bytes()), (5, 5 * PAGE_BYTES));
        assert!(tracker.take().unwrap().is_empty());

        tracker.put_back(&taken);
        assert_eq!(tracker.take().unwrap(), taken);

        memory.write_obj(1u8, GuestAddress(9 * PAGE_BYTES)).unwrap();
        log.lock().unwrap().1 = true;
        tracker.take().unwrap_err();
        log.lock().unwrap().1 = false;
        assert_eq!(pages(&tracker.take().unwrap()), [(9, 1)]);

        log.lock().unwrap().0[0] = 1;
        assert_eq!(pages(&tracker.take_last().unwrap()), [(0, 1)]);
        assert_eq!(pages(&tracker.take().unwrap()), [(0, 1)], "the guest went on after all");
    }

    #[test]
    fn sets_know_their_bounds() {
        let memory = create(100 * PAGE_BYTES).unwrap();
        let all = DirtyPages::all(&memory);
        assert_eq!(pages(&all), [(0, 100)]);
        let mut some = DirtyPages::none(&memory);
        some.insert(GuestAddress(99 * PAGE_BYTES + 1), u64::MAX);
        some.insert(GuestAddress(3 * PAGE_BYTES - 1), 2);
        some.insert(GuestAddress(5 * PAGE_BYTES), 0);
        assert_eq!(pages(&some), [(2, 2), (99, 1)]);
        some.merge(&all);
        assert_eq!(some, all);
    }

    #[test]
    fn memory_is_zero_and_keeps_what_is_written() {
        let memory = create(2 * PAGE_BYTES).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(4092)).unwrap(), 0);
        memory.write_slice(b"hello", GuestAddress(4094)).unwrap();
        let mut back = [0; 5];
        memory.read_slice(&mut back, GuestAddress(4094)).unwrap();
        assert_eq!(&back, b"hello");
    }
}
