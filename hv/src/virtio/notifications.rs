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
    wired: Mutex<Wired>,
}

#[derive(Default)]
struct Wired {
    /// Where the window was when they were wired, if they are.
    at: Option<u64>,
    /// The function has left the bus: a vCPU that still holds it wires nothing more.
    released: bool,
}

impl Notifications {
    pub(super) fn new(slot: u8, wiring: Arc<dyn Wiring>) -> Self {
        Self { slot, wiring, wired: Mutex::default() }
    }

    /// Wires each queue's to a window that begins here now. What cannot be wired, as a guest has
    /// put another window there, comes by a write to the window, only slower.
    pub(super) fn wire(&self, kicks: &[EventFd], window: Option<u64>) {
        let mut wired = self.wired.lock().unwrap_or_else(PoisonError::into_inner);
        if !wired.released {
            self.change(&mut wired, kicks, window);
        }
    }

    /// Unwires them for good.
    pub(super) fn release(&self, kicks: &[EventFd]) {
        let mut wired = self.wired.lock().unwrap_or_else(PoisonError::into_inner);
        self.change(&mut wired, kicks, None);
        wired.released = true;
    }

    fn change(&self, wired: &mut Wired, kicks: &[EventFd], window: Option<u64>) {
        if wired.at == window {
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
        if let Some(before) = wired.at {
            each(before, &|kick, address| self.wiring.remove_ioeventfd(kick, address));
        }
        if let Some(now) = window {
            each(now, &|kick, address| self.wiring.add_ioeventfd(kick, address));
        }
        wired.at = window;
    }
}
