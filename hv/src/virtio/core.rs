//! What the transport and the worker share: one lock around a device and its queues.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::{Event, GuestQueue, Interrupt, Progress, Turn, Unsettled, Violation, VirtioDevice};
use crate::memory::GuestMemory;

/// Violations of one device that are logged in the machine's life: a guest must not fill a log.
const VIOLATIONS_LOGGED_MAX: u32 = 8;

/// Bits of the status register.
pub(super) mod status {
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
}

pub(super) struct Core {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Interrupt,
    /// One for each queue; the guest's writes reach them through KVM.
    pub(super) kicks: Vec<EventFd>,
    /// Makes the worker look again.
    pub(super) wake: EventFd,
    inner: Mutex<Inner>,
    resumed: Condvar,
    /// Threads other than the worker that want the lock; the worker lets them go first.
    waiting: AtomicU32,
}

pub(super) struct Inner {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) queues: Vec<GuestQueue>,
    pub(super) status: u8,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) paused: bool,
    /// Every queue has a turn coming, whether it was kicked or not.
    pub(super) look_at_all: bool,
    /// The driver has reset the device, which has not let go of all that it began: its status is
    /// not 0 yet, for which a driver waits.
    pub(super) resetting: bool,
    /// The state was taken over and has not run yet: an interrupt may have been lost on the way.
    pub(super) restored: bool,
    pub(super) ended: bool,
    violations: u32,
}

impl Core {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Interrupt,
        device: Box<dyn VirtioDevice>,
    ) -> io::Result<Self> {
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let sizes = device.queue_sizes();
        let queues = sizes.iter().enumerate().map(|(i, size)| GuestQueue::new(i, *size)).collect();
        let inner = Inner {
            device,
            queues,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            paused: false,
            look_at_all: false,
            resetting: false,
            restored: false,
            ended: false,
            violations: 0,
        };
        Ok(Self {
            memory,
            interrupt,
            kicks: sizes.iter().map(|_| eventfd()).collect::<io::Result<_>>()?,
            wake: eventfd()?,
            inner: Mutex::new(inner),
            resumed: Condvar::new(),
            waiting: AtomicU32::new(0),
        })
    }

    /// For everyone but the worker.
    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        inner
    }

    /// For the worker: waits while the device is paused; `None` when it has ended.
    pub(super) fn enter(&self) -> Option<MutexGuard<'_, Inner>> {
        while self.waiting.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        while inner.paused && !inner.ended {
            inner = self.resumed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        if inner.ended { None } else { Some(inner) }
    }

    pub(super) fn wake(&self) {
        // Fails only when the counter is full, and then the worker wakes anyway.
        let _ = self.wake.write(1);
    }

    pub(super) fn kick(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            let _ = kick.write(1);
        }
    }

    /// When this returns well, the device touches neither memory nor its host side. Otherwise it
    /// runs as before.
    pub(super) fn pause(&self, wait_max: Duration) -> Result<(), Unsettled> {
        let mut inner = self.lock();
        let under_way = inner.settle(self, Instant::now() + wait_max);
        if under_way > 0 {
            let device = inner.device.kind().name;
            return Err(Unsettled { device, under_way, waited: wait_max });
        }
        if inner.resetting {
            inner.finish_reset(self);
        }
        inner.paused = true;
        Ok(())
    }

    /// Lets the device run, and has it look at every queue: a notification may have been lost
    /// with the machine that it came from.
    pub(super) fn resume(&self) {
        let mut inner = self.lock();
        if !inner.paused {
            return;
        }
        inner.paused = false;
        inner.look_at_all = true;
        let raise = std::mem::take(&mut inner.restored) && inner.is_live();
        if raise {
            for queue in &inner.queues {
                self.interrupt.raise_queue(queue.vector);
            }
        }
        drop(inner);
        self.resumed.notify_all();
        self.wake();
    }

    pub(super) fn end(&self) {
        self.lock().ended = true;
        self.resumed.notify_all();
        self.wake();
    }
}

impl Inner {
    /// The driver is ready, and has kept to the rules.
    pub(super) fn is_live(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET | status::FAILED)
            == status::DRIVER_OK
    }

    /// The device has something to do, be it only to come to its end.
    pub(super) fn works(&self) -> bool {
        self.is_live() || self.resetting
    }

    /// One turn of the device. A guest that broke the rules has lost the device afterwards.
    pub(super) fn turn(&mut self, core: &Core, event: Event, now: Instant) -> Progress {
        if !self.is_live() || matches!(event, Event::Queue(i) if !self.queues[i].ready()) {
            return Progress::Done;
        }
        let (device, mut turn) = self.split(core, now);
        match device.run(&mut turn, event) {
            Ok(progress) => progress,
            Err(violation) => {
                self.needs_reset(core, &violation);
                Progress::Done
            }
        }
    }

    /// Waits for what the device has begun; answers how much is under way all the same.
    fn settle(&mut self, core: &Core, deadline: Instant) -> usize {
        let live = self.is_live();
        let (device, mut turn) = self.split(core, Instant::now());
        let settled = device.settle(live.then_some(&mut turn), deadline);
        match settled {
            Ok(under_way) => under_way,
            Err(violation) => {
                self.needs_reset(core, &violation);
                // Nobody is to be told of the rest.
                self.device.settle(None, deadline).unwrap_or(0)
            }
        }
    }

    pub(super) fn split<'a>(
        &'a mut self,
        core: &'a Core,
        now: Instant,
    ) -> (&'a mut dyn VirtioDevice, Turn<'a>) {
        let Core { memory, interrupt, .. } = core;
        (self.device.as_mut(), Turn { memory, queues: &mut self.queues, interrupt, now })
    }

    pub(super) fn needs_reset(&mut self, core: &Core, violation: &Violation) {
        if self.violations < VIOLATIONS_LOGGED_MAX {
            self.violations += 1;
            let device = self.device.kind().name;
            tracing::warn!(device, %violation, "the guest broke virtio's rules: its device stops");
        }
        self.status |= status::NEEDS_RESET;
        core.interrupt.raise_config();
    }

    /// The driver wrote status 0, or the machine was reset. The reset is done when nothing is under
    /// way: at once, or the worker sees to it. Nobody waits for that, as a disk may hang.
    pub(super) fn reset(&mut self, core: &Core) {
        // Without a driver there is nobody to tell, and nothing that could go wrong.
        if self.device.settle(None, Instant::now()) == Ok(0) {
            self.finish_reset(core);
            return;
        }
        self.status = status::NEEDS_RESET;
        self.resetting = true;
    }

    fn finish_reset(&mut self, core: &Core) {
        self.resetting = false;
        self.device.reset();
        self.queues.iter_mut().for_each(GuestQueue::reset);
        self.status = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        self.restored = false;
        core.interrupt.reset();
    }
}
