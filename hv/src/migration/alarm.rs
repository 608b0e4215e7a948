//! How the threads of a migration's further connections speak to the one that leads it: that the
//! attempt is lost, or that there is something to look at.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::MigrationError;

/// Raised once: what came first is why the attempt failed.
#[derive(Debug)]
pub(super) struct Alarm {
    state: Mutex<State>,
    event: EventFd,
}

#[derive(Debug, Default)]
struct State {
    raised: bool,
    error: Option<MigrationError>,
}

impl Alarm {
    pub(super) fn new() -> Result<Self, MigrationError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let event = event.map_err(MigrationError::link("setting up the connections"))?;
        Ok(Self { state: Mutex::default(), event })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The attempt is lost.
    pub(super) fn raise(&self, error: MigrationError) {
        let mut state = self.state();
        if !std::mem::replace(&mut state.raised, true) {
            state.error = Some(error);
        }
        drop(state);
        self.nudge();
    }

    /// Whoever waits shall look.
    pub(super) fn nudge(&self) {
        // Fails only when the counter is full, and then it wakes anyway.
        let _ = self.event.write(1);
    }

    /// It was looked.
    pub(super) fn calm(&self) {
        // Nothing to read is as good.
        let _ = self.event.read();
    }

    /// Fails when it was raised: with the reason the first time.
    pub(super) fn check(&self) -> Result<(), MigrationError> {
        let mut state = self.state();
        if !state.raised {
            return Ok(());
        }
        let again = || MigrationError::Link {
            step: "speaking over several connections",
            source: io::ErrorKind::ConnectionAborted.into(),
        };
        Err(state.error.take().unwrap_or_else(again))
    }

    /// Readable when there is something to look at.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd is open as long as `self` lives.
        unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) }
    }
}
