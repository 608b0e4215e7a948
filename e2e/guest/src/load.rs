//! What the guest keeps in memory: the counter, memory that changes, memory that must not, and
//! a watch over its clocks. All of it is there to notice a migration that went wrong.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use crate::sys::clock_ns;

const PAGE: usize = 4096;
const WORDS_PER_PAGE: usize = PAGE / 8;

/// Counters in memory that this process and the one that dirties memory share.
pub(crate) struct Shared {
    counters: *const [AtomicU64; 9],
}

// SAFETY: the pointer is to atomics in a mapping that is never unmapped.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    pub(crate) fn new() -> Result<Self, String> {
        let counters = map(PAGE, libc::MAP_SHARED).map_err(|e| format!("shared memory: {e}"))?;
        Ok(Self { counters: counters.cast() })
    }

    fn counters(&self) -> &[AtomicU64; 9] {
        // SAFETY: a page that is mapped for ever, zeroed, and only used as these atomics.
        unsafe { &*self.counters }
    }

    /// The counter grows by `n`; the new value.
    pub(crate) fn count(&self, n: u64) -> u64 {
        self.counters()[0].fetch_add(n, Relaxed) + n
    }
    /// Passes over the dirtied memory.
    pub(crate) fn passes(&self) -> &AtomicU64 {
        &self.counters()[1]
    }
    /// Words that were not as written.
    pub(crate) fn corrupt(&self) -> &AtomicU64 {
        &self.counters()[2]
    }
    /// Times that a clock went backwards.
    pub(crate) fn clock_back(&self) -> &AtomicU64 {
        &self.counters()[3]
    }
    /// Blocks that were written to a disk and flushed.
    pub(crate) fn disk_writes(&self) -> &AtomicU64 {
        &self.counters()[4]
    }
    /// Blocks that could not be written, or were not as written.
    pub(crate) fn disk_wrong(&self) -> &AtomicU64 {
        &self.counters()[5]
    }
    /// Of those, the times that the disk gave an error.
    pub(crate) fn disk_failed(&self) -> &AtomicU64 {
        &self.counters()[6]
    }
    /// The number of the newest write that was flushed.
    pub(crate) fn disk_flushed(&self) -> &AtomicU64 {
        &self.counters()[7]
    }
    /// Up to which write the disk had all of them at boot.
    pub(crate) fn disk_kept(&self) -> &AtomicU64 {
        &self.counters()[8]
    }
}

/// Memory of its own, zeroed and never unmapped.
pub(crate) fn map(size: usize, sharing: libc::c_int) -> io::Result<*mut u8> {
    // SAFETY: a new anonymous mapping wherever the kernel likes.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

/// Starts a process that writes `mib` MiB again and again, one pass after the other, and checks
/// before each write that the last pass's value is still there.
pub(crate) fn start_dirtying(
    shared: &Shared,
    mib: usize,
    interval: Duration,
) -> Result<(), String> {
    if mib == 0 {
        return Ok(());
    }
    let words = mib * (1 << 20) / 8;
    let memory = map(words * 8, libc::MAP_PRIVATE)
        .map_err(|e| format!("drover.dirty_mib={mib}: cannot map so much: {e}"))?;
    // SAFETY: mapped above, `words` words long, and only this process's.
    let memory = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u64>(), words) };
    spawn_background(|| dirty_for_ever(shared, memory, interval))
}

/// Does this in a process of its own. There may be no threads yet.
pub(crate) fn spawn_background(work: impl FnOnce()) -> Result<(), String> {
    // SAFETY: no threads yet; the child does its work and ends.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", io::Error::last_os_error())),
        0 => {
            // Work in the background, as a guest's batch job is: its server comes first.
            // SAFETY: plain values.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 10) };
            work();
            std::process::exit(1)
        }
        _ => Ok(()),
    }
}

fn dirty_for_ever(shared: &Shared, memory: &mut [u64], interval: Duration) -> ! {
    let value = |pass: u64, page: usize| pass.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page as u64;
    for pass in 1u64.. {
        for (index, page) in memory.chunks_exact_mut(WORDS_PER_PAGE).enumerate() {
            // First and last word: a page that came half is noticed.
            for at in [0, WORDS_PER_PAGE - 1] {
                let expected = if pass == 1 { 0 } else { value(pass - 1, index) };
                if page[at] != expected {
                    shared.corrupt().fetch_add(1, Relaxed);
                }
                page[at] = value(pass, index);
            }
        }
        // What was written must reach memory, whatever the compiler thinks of it.
        std::hint::black_box(&mut *memory);
        shared.passes().store(pass, Relaxed);
        if !interval.is_zero() {
            std::thread::sleep(interval);
        }
    }
    unreachable!("more passes than a u64 counts")
}

/// Memory filled once with noise that can be computed again.
pub(crate) struct Fill {
    words: Vec<u64>,
}

impl Fill {
    pub(crate) fn new(mib: usize) -> Self {
        let count = mib * (1 << 20) / 8;
        Self { words: Self::noise().take(count).collect() }
    }

    /// Words that are not as they were filled.
    pub(crate) fn wrong_words(&self) -> u64 {
        let words = std::hint::black_box(&self.words);
        words.iter().zip(Self::noise()).map(|(a, b)| u64::from(*a != b)).sum()
    }

    pub(crate) fn mib(&self) -> usize {
        self.words.len() * 8 / (1 << 20)
    }

    fn noise() -> impl Iterator<Item = u64> {
        let mut x = 0x2545_f491_4f6c_dd1d_u64;
        std::iter::repeat_with(move || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x
        })
    }
}

/// Watches that no clock goes backwards from one look to the next.
#[derive(Default)]
pub(crate) struct Clocks {
    last: [i64; 2],
}

impl Clocks {
    pub(crate) fn look(&mut self, shared: &Shared) {
        let clocks = [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME];
        for (last, clock) in self.last.iter_mut().zip(clocks) {
            let now = clock_ns(clock);
            if now < *last {
                shared.clock_back().fetch_add(1, Relaxed);
            }
            *last = now;
        }
    }
}
