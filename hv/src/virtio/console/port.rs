//! The host's end of a port: bytes in both directions, each with a bound.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use vmm_sys_util::eventfd::EventFd;

/// Bytes that wait for the listener before the guest's queue is left alone. One more buffer of the
/// guest may go beyond it.
pub(super) const UNHEARD_BYTES_MAX: usize = 64 << 10;

/// The guest has not opened the port, or not any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// The end of a port that the device and its user share.
#[derive(Debug)]
pub struct Port {
    inner: Mutex<Inner>,
    /// Readable when the device has something to do.
    wake: EventFd,
    /// The guest has said something, or closed the port.
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    /// A program of the guest has it open.
    open: bool,
    /// Somebody listens.
    heard: bool,
    to_guest: VecDeque<u8>,
    from_guest: Vec<u8>,
}

impl Port {
    /// A port that the guest has not opened.
    ///
    /// # Errors
    /// When the system has no eventfds left.
    pub fn new() -> io::Result<Arc<Self>> {
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Arc::new(Self { inner: Mutex::default(), wake, changed: Notify::new() }))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake_device(&self) {
        // Fails only when the counter is full, and then the device wakes anyway.
        let _ = self.wake.write(1);
    }

    /// Listens to what the guest says from now on. One at a time: a second one would take the
    /// first one's bytes.
    ///
    /// # Errors
    /// When the guest has not opened the port.
    pub fn listen(&self) -> Result<Listener<'_>, Closed> {
        let mut inner = self.inner();
        if !inner.open {
            return Err(Closed);
        }
        inner.heard = true;
        inner.from_guest.clear();
        Ok(Listener { port: self })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    /// The device has woken up.
    pub(super) fn awake(&self) {
        let _ = self.wake.read();
    }

    pub(super) fn is_open(&self) -> bool {
        self.inner().open
    }

    /// The guest has opened or closed it. What it has said before is still to be heard.
    pub(super) fn set_open(&self, open: bool) {
        let mut inner = self.inner();
        inner.open = open;
        if !open {
            inner.to_guest.clear();
        }
        self.changed.notify_one();
    }

    /// How many bytes wait for the guest.
    pub(super) fn unsaid(&self) -> usize {
        self.inner().to_guest.len()
    }

    /// The first of the bytes that wait for the guest, at most this many; they wait no more.
    pub(super) fn take(&self, bytes_max: usize) -> Vec<u8> {
        let mut inner = self.inner();
        let count = bytes_max.min(inner.to_guest.len());
        inner.to_guest.drain(..count).collect()
    }

    /// Whether the guest's next bytes are to be taken now, if only to be thrown away.
    pub(super) fn has_room(&self) -> bool {
        let inner = self.inner();
        !inner.heard || inner.from_guest.len() < UNHEARD_BYTES_MAX
    }

    /// Whether what the guest says is read by anybody.
    pub(super) fn is_heard(&self) -> bool {
        self.inner().heard
    }

    /// The guest says this.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut inner = self.inner();
        if inner.heard {
            inner.from_guest.extend_from_slice(bytes);
            self.changed.notify_one();
        }
    }
}

/// Somebody who speaks with the guest through a port. Whatever is left over when he goes is thrown
/// away.
#[derive(Debug)]
pub struct Listener<'a> {
    port: &'a Port,
}

impl Listener<'_> {
    /// Says something to the guest. Nothing waits for the guest to read it: the caller bounds what
    /// he says.
    pub fn say(&self, bytes: &[u8]) {
        self.port.inner().to_guest.extend(bytes);
        self.port.wake_device();
    }

    /// What the guest has said since the last call; waits until there is something.
    ///
    /// # Errors
    /// When the guest has closed the port, and all is heard.
    pub async fn hear(&self) -> Result<Vec<u8>, Closed> {
        loop {
            let (said, open) = {
                let mut inner = self.port.inner();
                (std::mem::take(&mut inner.from_guest), inner.open)
            };
            if !said.is_empty() {
                // There is room again.
                self.port.wake_device();
                return Ok(said);
            }
            if !open {
                return Err(Closed);
            }
            // What has changed since the look above has left a permit.
            self.port.changed.notified().await;
        }
    }
}

impl Drop for Listener<'_> {
    fn drop(&mut self) {
        let mut inner = self.port.inner();
        inner.heard = false;
        inner.from_guest = Vec::new();
        inner.to_guest.clear();
        drop(inner);
        self.port.wake_device();
    }
}
