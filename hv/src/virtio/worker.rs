//! The thread of one device.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use super::core::{Core, Inner};
use super::{Event, Progress};

/// Tokens below this are queues.
const SOURCE: u64 = 1 << 32;
const WAKE: u64 = SOURCE + 1;
const TIMER: u64 = SOURCE + 2;
/// Events taken from the kernel at once; more come with the next call.
const EVENTS_MAX: usize = 8;

/// Starts the worker; it ends with [`Core::end`].
pub(super) fn spawn(core: Arc<Core>, name: String) -> io::Result<JoinHandle<()>> {
    let epoll = Epoll::new()?;
    for (kick, token) in core.kicks.iter().zip(0..) {
        // Each kick is told once, and need not be read: its counter never runs full.
        let edges = EventSet::IN | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, kick.as_raw_fd(), EpollEvent::new(edges, token))?;
    }
    watch(&epoll, core.wake.as_raw_fd(), WAKE)?;
    // Not epoll's own timeout, which counts in milliseconds: a disk may have a request each 50 µs.
    let timer = TimerFd::new()?;
    watch(&epoll, timer.as_raw_fd(), TIMER)?;
    std::thread::Builder::new().name(name).spawn(move || {
        let mut worker = Worker {
            core,
            epoll,
            timer,
            armed: None,
            queues: 0,
            source: false,
            source_fd: None,
            deadline: None,
        };
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
    /// Readable when its time has come, exactly.
    timer: TimerFd,
    /// The time for which it is set.
    armed: Option<Instant>,
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
            self.look(&core, &mut inner)?;
            let errand = inner.device.errand();
            drop(inner);
            if let Some(errand) = errand {
                errand();
                // What came of it is told before the kernel is asked what else there is.
                self.source = true;
                let Some(mut inner) = core.enter() else { return Ok(()) };
                self.look(&core, &mut inner)?;
            }
            self.arm()?;
        }
    }

    fn look(&mut self, core: &Core, inner: &mut Inner) -> io::Result<()> {
        if std::mem::take(&mut inner.look_at_all) {
            self.queues = (1 << core.kicks.len()) - 1;
        }
        if inner.is_live() {
            self.turns(core, inner);
        } else {
            (self.queues, self.source) = (0, false);
        }
        if inner.resetting {
            inner.reset(core);
        }
        self.watch_source(inner)?;
        self.deadline = if inner.works() { inner.device.deadline() } else { None };
        Ok(())
    }

    /// Each event that is due has one turn.
    fn turns(&mut self, core: &Core, inner: &mut Inner) {
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| deadline <= now)
            && inner.turn(core, Event::Timer, now) == Progress::More
        {
            self.source = true;
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
        let timeout_ms = if self.queues != 0 || self.source { 0 } else { -1 };
        let count = loop {
            match self.epoll.wait(timeout_ms, &mut events) {
                // The kernel has done some of its own work for a ring of ours, and tells of it next.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        for event in &events[..count] {
            match event.data() {
                SOURCE => self.source = true,
                WAKE => drop(self.core.wake.read()),
                TIMER => {
                    self.timer.wait()?;
                    self.armed = None;
                }
                queue => self.queues |= 1 << queue,
            }
        }
        Ok(())
    }

    /// Sets the timer to the deadline.
    fn arm(&mut self) -> io::Result<()> {
        if self.armed == self.deadline {
            return Ok(());
        }
        // Nothing turns it off, so that one that has passed is a moment from now.
        let left = self.deadline.map_or(Duration::ZERO, |deadline| {
            deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1))
        });
        self.timer.reset(left, None)?;
        self.armed = self.deadline;
        Ok(())
    }

    /// Epoll watches the source only while the device would read it. It is taken out rather than
    /// left without events, because a dead descriptor reports its error always.
    fn watch_source(&mut self, inner: &Inner) -> io::Result<()> {
        let wanted = inner.works() && inner.device.wants_source();
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
