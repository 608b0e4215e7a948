//! A device's interrupts: one for each queue, one for its configuration.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};

use super::queue::NO_VECTOR;
use crate::pci::Msix;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Raises a device's interrupts.
#[derive(Debug)]
pub struct Interrupt {
    msix: Arc<Msix>,
    pub(super) isr: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) generation: AtomicU8,
}

impl Interrupt {
    /// Interrupts by these vectors.
    pub fn new(msix: Arc<Msix>) -> Self {
        Self {
            msix,
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            generation: AtomicU8::new(0),
        }
    }

    /// A queue with this vector has used chains.
    pub fn raise_queue(&self, vector: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        self.msix.raise(vector);
    }

    /// The device's configuration or status has changed.
    pub fn raise_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.msix.raise(self.config_vector.load(Ordering::SeqCst));
    }

    pub(super) fn reset(&self) {
        self.isr.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
    }
}
