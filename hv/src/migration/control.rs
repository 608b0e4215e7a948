//! The handles by which the rest of the VMM speaks to a migration that has its machine.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

/// Why a migration did not do what it was told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The hand-over is on disk: there is no way back but the controller's decision.
    #[error("the migration has handed over: it cannot be cancelled")]
    HandedOver,
    /// Only a destination that is READY may be told to take over.
    #[error("the destination is not ready: it cannot take over")]
    NotReady,
    /// The decision is not newer than what is known.
    #[error("epoch: {epoch}; accepted: greater than {known}")]
    OldEpoch {
        /// The decision's.
        epoch: u64,
        /// The greatest known here.
        known: u64,
    },
}

/// Ends a source's migration, up to the hand-over.
#[derive(Debug, Clone, Default)]
pub struct SourceControl {
    shared: Arc<SourceShared>,
}

#[derive(Debug, Default)]
struct SourceShared {
    inner: Mutex<SourceInner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct SourceInner {
    cancelled: bool,
    handed_over: bool,
    sockets: Vec<TcpStream>,
}

impl SourceControl {
    /// For one migration.
    pub fn new() -> Self {
        Self::default()
    }

    fn inner(&self) -> MutexGuard<'_, SourceInner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up, at once: also what waits for the network is interrupted.
    ///
    /// # Errors
    /// When it is too late.
    pub fn cancel(&self) -> Result<(), ControlError> {
        let mut inner = self.inner();
        if inner.handed_over {
            return Err(ControlError::HandedOver);
        }
        inner.cancelled = true;
        for socket in &inner.sockets {
            // It may be gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
        drop(inner);
        self.shared.changed.notify_all();
        Ok(())
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.inner().cancelled
    }

    /// From now on `cancel` interrupts this connection too.
    pub(super) fn add_socket(&self, socket: TcpStream) {
        let mut inner = self.inner();
        if inner.cancelled {
            let _ = socket.shutdown(Shutdown::Both);
        }
        inner.sockets.push(socket);
    }

    /// The hand-over is about to be written: from now on `cancel` is too late. False when it was
    /// cancelled before.
    pub(super) fn close(&self) -> bool {
        let mut inner = self.inner();
        inner.handed_over = !inner.cancelled;
        inner.handed_over
    }

    /// Waits for this long, or until the cancellation.
    pub(super) fn wait(&self, time: Duration) {
        let inner = self.inner();
        let wait = self.shared.changed.wait_timeout_while(inner, time, |inner| !inner.cancelled);
        drop(wait);
    }
}

/// Tells a destination of the controller's decisions.
#[derive(Debug, Clone)]
pub struct DestinationControl {
    shared: Arc<DestinationShared>,
}

#[derive(Debug)]
struct DestinationShared {
    inner: Mutex<DestinationInner>,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct DestinationInner {
    epoch: u64,
    ready: bool,
    take_over: bool,
    ended: bool,
}

impl DestinationControl {
    /// For one migration, after which the domain runs under `epoch`.
    ///
    /// # Errors
    /// When the system has no eventfd left.
    pub fn new(epoch: u64) -> io::Result<Self> {
        let inner = Mutex::new(DestinationInner { epoch, ..Default::default() });
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { shared: Arc::new(DestinationShared { inner, wake }) })
    }

    fn inner(&self) -> MutexGuard<'_, DestinationInner> {
        self.shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The controller has decided that the guest runs here, under this epoch.
    ///
    /// # Errors
    /// When the destination is not READY, or the epoch is not the expected one or a greater one.
    pub fn take_over(&self, epoch: u64) -> Result<(), ControlError> {
        let mut inner = self.inner();
        if !inner.ready {
            return Err(ControlError::NotReady);
        }
        if epoch < inner.epoch {
            return Err(ControlError::OldEpoch { epoch, known: inner.epoch.saturating_sub(1) });
        }
        inner.epoch = epoch;
        inner.take_over = true;
        self.wake();
        Ok(())
    }

    /// Nobody wants it any more: it fails, unless the guest runs already.
    pub fn end(&self) {
        self.inner().ended = true;
        self.wake();
    }

    /// The epoch under which the guest runs, or will.
    pub fn epoch(&self) -> u64 {
        self.inner().epoch
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then it wakes anyway.
        let _ = self.shared.wake.write(1);
    }

    pub(super) fn set_ready(&self, ready: bool) {
        self.inner().ready = ready;
    }

    pub(super) fn taken_over(&self) -> bool {
        self.inner().take_over
    }

    pub(super) fn is_ended(&self) -> bool {
        self.inner().ended
    }

    /// Readable when there is something to look at.
    pub(super) fn wake_fd(&self) -> &EventFd {
        &self.shared.wake
    }
}
