//! io_uring: the kernel works on many jobs at a time, and no thread of ours waits for one.
//!
//! A job lies in `jobs` from its start until its completion has been read; its index there is the
//! entry's user data. What the kernel did by part is submitted again for the rest. Any thread may
//! call, one at a time: the device's worker does, and whoever pauses or resets the device.
//!
//! The ring's own descriptor is what tells of completions: it is readable while there are some. What
//! finds its data in the page cache is completed within [`submit`](Backend::submit), and whoever
//! looks right behind it is not woken for it again; an eventfd would have to be read for each.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::at_once::AtOnce;
use super::{Backend, Done, Job, Threads, Work, eventfd, wait_readable};
use crate::virtio::Errand;
use crate::virtio::blk::volume::Volume;

/// Entries that are handed over at once; what does not fit waits for the next call.
const ENTRIES_MAX: u32 = 128;
/// Kernel threads that may wait for the disk on behalf of one device, bounded and unbounded work.
/// The kernel's own limit grows with the host's CPUs.
const KERNEL_WORKERS_MAX: [u32; 2] = [8, 8];
/// Times that one job is tried again because the kernel was interrupted or short of memory.
const RETRIES_MAX: u32 = 16;
/// Between looks, while the system has no room for more.
const RETRY: Duration = Duration::from_millis(10);
/// User data of the entry that watches the event; a job's is its index.
const EVENT: u64 = u64::MAX;

/// The ring of one volume.
pub(in crate::virtio::blk) struct Uring {
    // Dropped in this order: the ring, its jobs, the file.
    ring: IoUring,
    jobs: Vec<Option<Slot>>,
    free: Vec<usize>,
    /// Jobs of `jobs` that are not in the ring yet.
    waiting: VecDeque<usize>,
    /// For what io_uring is not asked to do.
    helper: Threads,
    /// For reads that need not wait, where io_uring would.
    at_once: AtOnce,
    /// Whether there are such; unknown until the first read.
    reads_at_once: Option<bool>,
    /// Readable when one of these two is done with something.
    event: Arc<EventFd>,
    /// The ring has an entry that completes when it is.
    watches_event: bool,
    volume: Arc<Volume>,
}

struct Slot {
    job: Job,
    retries: u32,
}

impl Uring {
    /// A ring for at most `jobs_max` jobs.
    ///
    /// # Errors
    /// When the system does not allow it, or is too old to keep every completion (Linux 5.5).
    pub(in crate::virtio::blk) fn new(volume: &Arc<Volume>, jobs_max: u32) -> io::Result<Self> {
        let entries = jobs_max.min(ENTRIES_MAX);
        let ring = IoUring::builder().setup_cqsize(jobs_max.max(entries)).build(entries)?;
        if !ring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = Arc::new(eventfd()?);
        // Linux before 5.15 does not know it, and has its own limit.
        let _ = ring.submitter().register_iowq_max_workers(&mut KERNEL_WORKERS_MAX.clone());
        Ok(Self {
            ring,
            jobs: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            helper: Threads::new(volume, Arc::clone(&event)),
            at_once: AtOnce::new(volume, Arc::clone(&event)),
            reads_at_once: None,
            event,
            watches_event: false,
            volume: Arc::clone(volume),
        })
    }

    /// Has the worker do reads of what is cached, whatever the volume is.
    #[cfg(test)]
    pub(in crate::virtio::blk) fn with_reads_at_once(mut self) -> Self {
        self.reads_at_once = Some(true);
        self
    }

    /// Whether the worker is to do this.
    fn is_at_once(&mut self, work: &Work) -> bool {
        let Work::Read { offset, buffers } = work else { return false };
        let volume = &self.volume;
        *self.reads_at_once.get_or_insert_with(|| !volume.reads_without_waiting())
            && volume.is_cached(*offset, buffers.bytes())
    }

    /// A job for the ring.
    fn enqueue(&mut self, job: Job) {
        let slot = Some(Slot { job, retries: 0 });
        let index = if let Some(index) = self.free.pop() {
            self.jobs[index] = slot;
            index
        } else {
            self.jobs.push(slot);
            self.jobs.len() - 1
        };
        self.waiting.push_back(index);
    }

    /// Whether the event will tell of something.
    fn needs_event(&self) -> bool {
        self.helper.in_flight() > 0 || self.at_once.will_tell()
    }

    /// Jobs in `jobs`.
    fn held(&self) -> usize {
        self.jobs.len() - self.free.len()
    }

    /// Moves what waits into the ring as far as there is room.
    fn fill(&mut self) {
        if self.needs_event() && !self.watches_event {
            let event = types::Fd(self.event.as_raw_fd());
            let entry = opcode::PollAdd::new(event, libc::POLLIN as u32).build().user_data(EVENT);
            // SAFETY: the entry points to no memory, and the event is open as long as the ring.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.watches_event = true;
        }
        while let Some(index) = self.waiting.front().copied() {
            let entry = self.entry(index);
            // SAFETY: the entry's buffers, and the list of them, live in `jobs` until the
            // completion is read; `drop` waits for it. The file is open as long as the ring.
            if unsafe { self.ring.submission().push(&entry) }.is_err() {
                return;
            }
            self.waiting.pop_front();
        }
    }

    fn entry(&self, index: usize) -> squeue::Entry {
        let file = types::Fd(self.volume.fd());
        let Some(slot) = &self.jobs[index] else { unreachable!("a job that waits is there") };
        let entry = match &slot.job.work {
            Work::Read { offset, buffers } => {
                let left = buffers.left();
                opcode::Readv::new(file, left.as_ptr(), left.len() as u32).offset(*offset).build()
            }
            Work::Write { offset, buffers, durable } => {
                let left = buffers.left();
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(file, left.as_ptr(), left.len() as u32)
                    .offset(*offset)
                    .rw_flags(flags)
                    .build()
            }
            Work::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Work::Discard { .. } | Work::Zero { .. } => unreachable!("the helper's"),
        };
        entry.user_data(index as u64)
    }

    /// A completion: the job's result, or `None` when the rest of it must be submitted.
    fn completed(&mut self, index: usize, answer: i32) -> Option<io::Result<()>> {
        let Some(slot) = self.jobs.get_mut(index).and_then(Option::as_mut) else {
            unreachable!("the kernel completes what was submitted, once");
        };
        let Ok(moved) = usize::try_from(answer) else {
            let error = io::Error::from_raw_os_error(-answer);
            let again =
                matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock);
            slot.retries += 1;
            return if again && slot.retries <= RETRIES_MAX { None } else { Some(Err(error)) };
        };
        match &mut slot.job.work {
            Work::Read { offset, buffers } | Work::Write { offset, buffers, .. } => {
                if moved == 0 {
                    return Some(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                *offset += moved as u64;
                buffers.advance(moved);
                buffers.is_empty().then_some(Ok(()))
            }
            _ => Some(Ok(())),
        }
    }

    /// Reads the completions that are there.
    fn reap(&mut self, done: &mut Vec<Done>) {
        loop {
            let next = self.ring.completion().next();
            let Some(entry) = next else { return };
            if entry.user_data() == EVENT {
                self.watches_event = false;
                continue;
            }
            let index = entry.user_data() as usize;
            match self.completed(index, entry.result()) {
                None => self.waiting.push_back(index),
                Some(result) => {
                    if let Some(Slot { job, .. }) = self.jobs[index].take() {
                        self.free.push(index);
                        done.push(Done { job, result });
                    }
                }
            }
        }
    }
}

impl Backend for Uring {
    fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.held() + self.helper.in_flight() + self.at_once.in_flight()
    }

    unsafe fn start(&mut self, job: Job) {
        if matches!(job.work, Work::Discard { .. } | Work::Zero { .. }) {
            // SAFETY: the caller vouches for the job.
            unsafe { self.helper.start(job) };
        } else if self.is_at_once(&job.work) {
            self.at_once.start(job);
        } else {
            self.enqueue(job);
        }
    }

    fn submit(&mut self) -> bool {
        loop {
            self.fill();
            if self.ring.submission().is_empty() {
                return true;
            }
            match self.ring.submit() {
                Ok(0) => return false,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Short of memory for now; nothing is lost.
                Err(_) => return false,
            }
        }
    }

    fn finished(&mut self, done: &mut Vec<Done>) {
        self.reap(done);
        if self.needs_event() {
            // First the event, then what is done: what comes in between tells again.
            let _ = self.event.read();
        }
        self.helper.take_done(done);
        self.at_once.take_done(done);
    }

    fn errand(&mut self) -> Option<Errand> {
        self.at_once.errand()
    }

    fn has_errand(&self) -> bool {
        self.at_once.waits()
    }

    fn recall(&mut self) {
        for job in self.at_once.recall() {
            self.enqueue(job);
        }
    }
}

impl Drop for Uring {
    /// The kernel may be writing into the buffers of what it was given: that is waited for.
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.held() > self.waiting.len() {
            // What lies in the ring cannot be told from what the kernel has: it is done too.
            let _ = self.ring.submit();
            wait_readable(self.fd(), RETRY);
            self.finished(&mut done);
        }
    }
}
