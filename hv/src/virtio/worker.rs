//! The thread of one device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::core::{Core, Inner};
use super::{Event, Progress};

/// Tokens below this are queues.
const SOURCE: u64 = 1 << 32;
const WAKE: u64 = SOURCE + 1;
/// Events taken from the kernel at once; more come with the next call.
const EVENTS_MAX: usize = 8;

/// Starts the worker; it ends with [`Core::end`].
pub(super) fn spawn(core: Arc<Core>, name: String) -> io::Result<JoinHandle<()>> {
    let epoll = Epoll::new()?;
    for (kick, token) in core.kicks.iter().zip(0..) {
        watch(&epoll, kick.as_raw_fd(), token)?;
    }
    watch(&epoll, core.wake.as_raw_fd(), WAKE)?;
    std::thread::Builder::new().name(name).spawn(move || {
        let mut worker =
            Worker { core, epoll, queues: 0, source: false, source_fd: None, deadline: None };
        if let Err(error) = worker.run() {
            tracing::error!(%error, "a device's worker has ended");
        }
    })
}

fn watch(epoll: &Epoll, fd: RawFd, token: u64) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, token))
}

struct Worker {
    core: Arc<Core>,
    epoll: Epoll,
    /// Queues that have a turn coming, one bit each.
    queues: u64,
    /// The source has a turn coming.
    source: bool,
    /// The source, while epoll watches it.
    source_fd: Option<RawFd>,
    deadline: Option<Instant>,
}

impl Worker {
    fn run(&mut self) -> io::Result<()> {
        let core = Arc::clone(&self.core);
        loop {
            self.wait()?;
            let Some(mut inner) = core.enter() else { return Ok(()) };
            if std::mem::take(&mut inner.look_at_all) {
                self.queues = (1 << core.kicks.len()) - 1;
            }
            if inner.is_live() {
                self.turns(&core, &mut inner);
            } else {
                (self.queues, self.source) = (0, false);
            }
            self.watch_source(&inner)?;
            self.deadline = if inner.is_live() { inner.device.deadline() } else { None };
        }
    }

    /// Each event that is due has one turn.
    fn turns(&mut self, core: &Core, inner: &mut Inner) {
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            inner.turn(core, Event::Timer, now);
        }
        for queue in 0..core.kicks.len() {
            let bit = 1 << queue;
            if self.queues & bit != 0
                && inner.turn(core, Event::Queue(queue), now) == Progress::Done
            {
                self.queues &= !bit;
            }
        }
        if self.source {
            self.source = inner.turn(core, Event::Source, now) == Progress::More;
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS_MAX];
        let count = match self.epoll.wait(self.timeout_ms(), &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        for event in &events[..count] {
            match event.data() {
                SOURCE => self.source = true,
                WAKE => drop(self.core.wake.read()),
                queue => {
                    drop(self.core.kicks[queue as usize].read());
                    self.queues |= 1 << queue;
                }
            }
        }
        Ok(())
    }

    fn timeout_ms(&self) -> i32 {
        if self.queues != 0 || self.source {
            return 0;
        }
        let Some(deadline) = self.deadline else { return -1 };
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up, so that the deadline has passed when epoll returns.
        (left + Duration::from_micros(999)).as_millis().try_into().unwrap_or(i32::MAX)
    }

    /// Epoll watches the source only while the device would read it. It is taken out rather than
    /// left without events, because a dead descriptor reports its error always.
    fn watch_source(&mut self, inner: &Inner) -> io::Result<()> {
        let wanted = inner.is_live() && inner.device.wants_source();
        match (self.source_fd, inner.device.source()) {
            (None, Some(fd)) if wanted => {
                watch(&self.epoll, fd, SOURCE)?;
                self.source_fd = Some(fd);
            }
            (Some(fd), _) if !wanted => {
                self.source_fd = None;
                self.source = false;
                self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default())?;
            }
            _ => {}
        }
        Ok(())
    }
}
