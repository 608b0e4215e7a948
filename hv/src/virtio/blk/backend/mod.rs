//! Who does the work: [`Uring`] where the system allows it, [`Threads`] elsewhere.
//!
//! A backend is given jobs and gives them back when they are done, in any order. A descriptor is
//! readable when some are. Reading, writing and flushing go through io_uring; giving room back
//! and zeroing block inside of the kernel, and go through a thread always. [`at_once`] is for reads
//! of which io_uring would make more than they are.

mod at_once;
mod threads;
mod uring;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

pub(super) use threads::Threads;
pub(super) use uring::Uring;

use super::requests::Span;
use super::volume::Volume;
use crate::virtio::{Errand, Segment};

/// One request, from its start until the driver is told.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) work: Work,
    pub(super) reply: Reply,
}

/// What is to be done to the volume.
#[derive(Debug)]
pub(super) enum Work {
    /// From `offset` into the buffers.
    Read { offset: u64, buffers: Buffers },
    /// From the buffers to `offset`; `durable` before it is done.
    Write { offset: u64, buffers: Buffers, durable: bool },
    /// Make durable what was done before.
    Flush,
    /// Give this room back.
    Discard { spans: Vec<Span>, durable: bool },
    /// Fill with zeros.
    Zero { spans: Vec<Span>, durable: bool },
}

/// Whom to tell, and what.
#[derive(Debug)]
pub(super) struct Reply {
    /// The queue.
    pub(super) queue: usize,
    /// The chain.
    pub(super) head: u16,
    /// Where its status goes.
    pub(super) status: GuestAddress,
    /// Bytes that can be written before the status.
    pub(super) room_bytes: u64,
    /// How many of them are, when all goes well.
    pub(super) answer_bytes: u64,
    /// Bytes that the job moves.
    pub(super) moved_bytes: u64,
    /// Bytes of the volume that it changes.
    pub(super) changes: Vec<Span>,
    /// Guest memory that the kernel writes.
    pub(super) written: Vec<Segment>,
}

/// A job that is done, well or not.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) job: Job,
    pub(super) result: io::Result<()>,
}

/// Pointers into guest memory, shrinking from the front as bytes are transferred.
#[derive(Debug)]
pub(super) struct Buffers {
    list: Vec<libc::iovec>,
    first: usize,
}

// SAFETY: these are pointers into guest memory, which is mapped for all threads; the device that
// made them keeps it mapped until the job has come back.
unsafe impl Send for Buffers {}

impl Buffers {
    /// These, none of them empty.
    pub(super) fn new(list: Vec<libc::iovec>) -> Self {
        Self { list, first: 0 }
    }

    /// Nothing (more) to transfer.
    pub(super) fn is_empty(&self) -> bool {
        self.left().is_empty()
    }

    /// Bytes that are left to transfer.
    pub(super) fn bytes(&self) -> u64 {
        self.left().iter().map(|buffer| buffer.iov_len as u64).sum()
    }

    fn left(&self) -> &[libc::iovec] {
        &self.list[self.first..]
    }

    /// `bytes` of them are done with.
    fn advance(&mut self, mut bytes: usize) {
        while bytes > 0 && self.first < self.list.len() {
            let buffer = &mut self.list[self.first];
            if bytes < buffer.iov_len {
                buffer.iov_base = buffer.iov_base.wrapping_byte_add(bytes);
                buffer.iov_len -= bytes;
                return;
            }
            bytes -= buffer.iov_len;
            self.first += 1;
        }
    }
}

/// Does jobs.
pub(super) trait Backend: Send {
    /// A descriptor that is readable when jobs are done.
    fn fd(&self) -> RawFd;

    /// Jobs that were started and have not come back.
    fn in_flight(&self) -> usize;

    /// Takes a job. It need not begin before [`submit`](Self::submit).
    ///
    /// # Safety
    /// The job's buffers must be memory that is mapped until it comes back, or until the backend
    /// is dropped.
    unsafe fn start(&mut self, job: Job);

    /// Begins what was taken; false when the system had no room: to be called again, soon.
    fn submit(&mut self) -> bool;

    /// Gives back what is done, and makes the descriptor unreadable.
    fn finished(&mut self, done: &mut Vec<Done>);

    /// What the worker is to do without the device's lock; [`finished`](Self::finished) is called
    /// right behind it.
    fn errand(&mut self) -> Option<Errand> {
        None
    }

    /// Whether there is an errand.
    fn has_errand(&self) -> bool {
        false
    }

    /// Somebody waits for all that was taken, and has no worker: there is no errand any more, and
    /// the descriptor tells of the end of the one that is under way.
    fn recall(&mut self) {}
}

/// The best backend that the system allows.
///
/// # Errors
/// When the system has no eventfds left.
pub(super) fn best(volume: &Arc<Volume>, jobs_max: u32) -> io::Result<Box<dyn Backend>> {
    match Uring::new(volume, jobs_max) {
        Ok(uring) => Ok(Box::new(uring)),
        Err(error) => {
            tracing::info!(%error, "no io_uring here: a thread does the disk's work");
            Ok(Box::new(Threads::new(volume, Arc::new(eventfd()?))))
        }
    }
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// Waits until this is readable, or for so long; a signal ends it too.
pub(super) fn wait_readable(fd: RawFd, timeout: Duration) {
    // Rounded up, so that the time has passed when poll returns.
    let timeout = timeout.saturating_add(Duration::from_micros(999));
    let timeout_ms = timeout.as_millis().try_into().unwrap_or(i32::MAX);
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, borrowed mutably. What it answers does not matter: the caller looks.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) };
}

/// Does a job on this thread, to its end.
fn perform(volume: &Volume, work: &mut Work) -> io::Result<()> {
    let durable = match work {
        Work::Read { offset, buffers } => {
            transfer(libc::preadv, volume, *offset, buffers)?;
            false
        }
        Work::Write { offset, buffers, durable } => {
            transfer(libc::pwritev, volume, *offset, buffers)?;
            *durable
        }
        Work::Flush => true,
        Work::Discard { spans, durable } => {
            spans.iter().try_for_each(|span| volume.discard(*span))?;
            *durable
        }
        Work::Zero { spans, durable } => {
            spans.iter().try_for_each(|span| volume.zero(*span))?;
            *durable
        }
    };
    if durable { volume.flush() } else { Ok(()) }
}

type Vectored =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, i64) -> libc::ssize_t;

fn transfer(
    call: Vectored,
    volume: &Volume,
    mut offset: u64,
    buffers: &mut Buffers,
) -> io::Result<()> {
    while !buffers.is_empty() {
        let left = buffers.left();
        let (first, count) = (left.as_ptr(), left.len() as libc::c_int);
        // SAFETY: whoever started the job vouches for its buffers, and the count is theirs.
        let moved = unsafe { call(volume.fd(), first, count, offset as i64) };
        match usize::try_from(moved) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(moved) => {
                offset += moved as u64;
                buffers.advance(moved);
            }
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}
