//! One thread that does a volume's jobs one after the other.
//!
//! It is started with the first job: most guests with io_uring never need it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::{Backend, Done, Job, perform};
use crate::virtio::blk::volume::Volume;

/// System calls need no more.
const STACK_BYTES: usize = 64 << 10;

/// The thread, and what it shares with the device.
pub(in crate::virtio::blk) struct Threads {
    shared: Arc<Shared>,
    in_flight: usize,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    volume: Arc<Volume>,
    /// Readable when something is done.
    event: Arc<EventFd>,
    work: Mutex<Queues>,
    changed: Condvar,
}

/// Together never more than what is in flight, which the device bounds.
#[derive(Default)]
struct Queues {
    waiting: VecDeque<Job>,
    done: Vec<Done>,
    ended: bool,
}

impl Threads {
    /// A backend that tells of finished jobs with `event`.
    pub(in crate::virtio::blk) fn new(volume: &Arc<Volume>, event: Arc<EventFd>) -> Self {
        let shared = Arc::new(Shared {
            volume: Arc::clone(volume),
            event,
            work: Mutex::default(),
            changed: Condvar::new(),
        });
        Self { shared, in_flight: 0, thread: None }
    }

    /// Starts the thread if it does not run yet.
    fn ensure_thread(&mut self) -> io::Result<()> {
        if self.thread.is_none() {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name("volume".into()).stack_size(STACK_BYTES);
            self.thread = Some(thread.spawn(move || shared.run())?);
        }
        Ok(())
    }

    /// As [`Backend::finished`], without touching the eventfd.
    pub(super) fn take_done(&mut self, done: &mut Vec<Done>) {
        if self.in_flight == 0 {
            return;
        }
        let before = done.len();
        done.append(&mut self.shared.lock().done);
        self.in_flight -= done.len() - before;
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        while let Some(mut job) = self.next() {
            let result = perform(&self.volume, &mut job.work);
            self.lock().done.push(Done { job, result });
            self.tell();
        }
    }

    /// The next job; `None` at the end.
    fn next(&self) -> Option<Job> {
        let mut queues = self.lock();
        loop {
            if queues.ended {
                return None;
            }
            if let Some(job) = queues.waiting.pop_front() {
                return Some(job);
            }
            queues = self.changed.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn tell(&self) {
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = self.event.write(1);
    }
}

impl Backend for Threads {
    fn fd(&self) -> RawFd {
        self.shared.event.as_raw_fd()
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    unsafe fn start(&mut self, job: Job) {
        self.in_flight += 1;
        match self.ensure_thread() {
            Ok(()) => {
                self.shared.lock().waiting.push_back(job);
                self.shared.changed.notify_one();
            }
            Err(error) => {
                self.shared.lock().done.push(Done { job, result: Err(error) });
                self.shared.tell();
            }
        }
    }

    fn submit(&mut self) -> bool {
        true
    }

    fn finished(&mut self, done: &mut Vec<Done>) {
        if self.in_flight > 0 {
            // Not readable is fine.
            let _ = self.shared.event.read();
            self.take_done(done);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        // The job that is being done is done to its end; the buffers live as long.
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a volume's thread has panicked");
        }
    }
}
