//! Reads of what lies in the host's page cache, done by the device's own worker.
//!
//! io_uring does such a read within its submission, if the volume can be read without waiting. A
//! thin volume of LVM cannot: there each read goes to a thread of the kernel, and the way there and
//! back takes longer than to copy a few pages. The worker has the time: it would only wait.
//!
//! It reads between two turns, when nobody holds the device's lock. What was in the cache may have
//! left it, and then the read takes as long as the disk does: the job is under way meanwhile like
//! any other, and who pauses or resets the device waits for it no longer than for others.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::{Done, Job, perform};
use crate::virtio::Errand;
use crate::virtio::blk::volume::Volume;

/// Bytes after which an errand ends, so that the driver is told, and works on while the next is
/// done. One more job may go beyond it.
const ERRAND_BYTES_MAX: u64 = 256 << 10;

/// Jobs that wait for the worker, and those that it has.
pub(super) struct AtOnce {
    shared: Arc<Shared>,
    waiting: VecDeque<Job>,
    /// Jobs of an errand.
    begun: usize,
    /// The end of an errand is told with the event: somebody other than the worker waits for it.
    is_told: bool,
}

struct Shared {
    volume: Arc<Volume>,
    event: Arc<EventFd>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Never more than what an errand has taken.
    done: Vec<Done>,
    is_told: bool,
}

impl AtOnce {
    pub(super) fn new(volume: &Arc<Volume>, event: Arc<EventFd>) -> Self {
        let shared = Shared { volume: Arc::clone(volume), event, state: Mutex::default() };
        Self { shared: Arc::new(shared), waiting: VecDeque::new(), begun: 0, is_told: false }
    }

    pub(super) fn in_flight(&self) -> usize {
        self.waiting.len() + self.begun
    }

    pub(super) fn start(&mut self, job: Job) {
        self.waiting.push_back(job);
    }

    /// Whether something waits for the worker.
    pub(super) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the event will tell of something.
    pub(super) fn will_tell(&self) -> bool {
        self.is_told && self.begun > 0
    }

    /// What the worker is to do next.
    pub(super) fn errand(&mut self) -> Option<Errand> {
        let (mut jobs, mut bytes) = (Vec::new(), 0);
        while bytes < ERRAND_BYTES_MAX
            && let Some(job) = self.waiting.pop_front()
        {
            bytes += job.reply.moved_bytes;
            jobs.push(job);
        }
        if jobs.is_empty() {
            return None;
        }
        self.begun += jobs.len();
        // The worker looks when it is back.
        self.is_told = false;
        self.shared.lock().is_told = false;
        let shared = Arc::clone(&self.shared);
        Some(Box::new(move || shared.run(jobs)))
    }

    /// Somebody waits, and the worker may not come: gives back what it has not begun, and has the
    /// event tell of the rest.
    pub(super) fn recall(&mut self) -> VecDeque<Job> {
        self.is_told = true;
        self.shared.lock().is_told = true;
        std::mem::take(&mut self.waiting)
    }

    pub(super) fn take_done(&mut self, done: &mut Vec<Done>) {
        if self.begun > 0 {
            let before = done.len();
            done.append(&mut self.shared.lock().done);
            self.begun -= done.len() - before;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, jobs: Vec<Job>) {
        let finish = |mut job: Job| {
            let result = perform(&self.volume, &mut job.work);
            Done { job, result }
        };
        let done: Vec<Done> = jobs.into_iter().map(finish).collect();
        let mut state = self.lock();
        state.done.extend(done);
        if state.is_told {
            // Fails only when the counter is full, and then it is readable anyway.
            let _ = self.event.write(1);
        }
    }
}
