//! Where a function's window takes the driver's notifications, wired past the vCPU to the device.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::pci::Wiring;

/// Where they lie in the window.
pub(super) const NOTIFY: Range<u64> = 0x3000..0x4000;
/// Each queue's go to an address of their own.
pub(super) const NOTIFY_STRIDE: u64 = 4;

/// The addresses' wiring.
pub(super) struct Notifications {
    slot: u8,
    wiring: Arc<dyn Wiring>,
    /// Where the window was when they were wired, if they are.
    at: Mutex<Option<u64>>,
}

impl Notifications {
    pub(super) fn new(slot: u8, wiring: Arc<dyn Wiring>) -> Self {
        Self { slot, wiring, at: Mutex::default() }
    }

    /// Wires each queue's to a window that begins here now. What cannot be wired, as a guest has
    /// put another window there, comes by a write to the window, only slower.
    pub(super) fn wire(&self, kicks: &[EventFd], window: Option<u64>) {
        let mut at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        if *at == window {
            return;
        }
        let each = |start: u64, change: &dyn Fn(&EventFd, u64) -> io::Result<()>| {
            for (kick, queue) in kicks.iter().zip(0..) {
                let address = start + NOTIFY.start + queue * NOTIFY_STRIDE;
                if let Err(error) = change(kick, address) {
                    tracing::debug!(%error, slot = self.slot, "a queue's notifications");
                }
            }
        };
        if let Some(before) = *at {
            each(before, &|kick, address| self.wiring.remove_ioeventfd(kick, address));
        }
        if let Some(now) = window {
            each(now, &|kick, address| self.wiring.add_ioeventfd(kick, address));
        }
        *at = window;
    }
}
