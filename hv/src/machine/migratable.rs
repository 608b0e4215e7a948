//! What live migration needs from a machine.
//!
//! The protocol is driven against [`MigratableVm`], so that it can be tested with a machine made
//! of plain memory. The order of calls is a contract:
//!
//! ```text
//! source                                       destination (made with the source's shape)
//! start_dirty_log
//! every page of memory(), then take_dirty …    writes into memory()
//! pause                                        attract
//! save_state
//! take_last_dirty  (after save_state: saving
//!                   may itself write memory)
//!                                              restore_state   (still paused)
//! (hand-over written down)                     announce after resume
//!                                              resume
//! on failure before the hand-over:
//! resume, then stop_dirty_log
//! ```

use std::sync::Arc;

use crate::memory::{DirtyPages, GuestMemory, MemoryError};
use crate::migration::DiskShape;
use crate::virtio::blk::Volume;

/// The state of one part of the machine, as bytes that only that part can read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSection {
    /// The part: `vm`, `vcpu`, `serial`, `pci`, `virtio-net` ….
    pub kind: String,
    /// Which one, where there are several (the vCPU's index, the PCI device number).
    pub instance: u32,
    /// Version of `data`'s format, from 1. A part refuses a version that it does not know.
    pub version: u32,
    /// Little endian, in the part's own format.
    pub data: Vec<u8>,
}

/// Everything of a paused machine but its memory, in the order in which it is to be restored.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MachineState {
    /// The parts; `kind` and `instance` name each once.
    pub sections: Vec<StateSection>,
}

/// A disk of the machine.
#[derive(Debug, Clone)]
pub struct MigratableDisk {
    /// Where its content is. On a destination a shared one is not open yet.
    pub volume: Arc<Volume>,
    /// What the guest finds as its serial number.
    pub serial: String,
    /// Source and destination see the same volume.
    pub shared: bool,
    /// On a destination: it reads as zeros, as it was just made.
    pub zeroed: bool,
}

impl MigratableDisk {
    /// What must fit.
    pub fn shape(&self) -> DiskShape {
        DiskShape {
            serial: self.serial.clone(),
            bytes: self.volume.bytes(),
            read_only: self.volume.is_read_only(),
            shared: self.shared,
        }
    }
}

/// A machine could not do what a migration asked of it.
#[derive(Debug, thiserror::Error)]
pub enum MigratableError {
    /// The step that failed, and why.
    #[error("{step}: {reason}")]
    Step {
        /// What was tried, as in "saving vCPU 1".
        step: String,
        /// Why it did not work.
        reason: String,
    },
    /// The state does not fit this machine.
    #[error("the state does not fit this machine: {0}")]
    Mismatch(String),
    /// Guest memory failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A machine that can be moved. Whoever has it owns it: calls come from one thread.
pub trait MigratableVm: Send {
    /// The guest's memory. Its shape never changes.
    fn memory(&self) -> &GuestMemory;

    /// The guest's disks, in order. What the machine writes to them is in their trackers.
    fn disks(&self) -> &[MigratableDisk] {
        &[]
    }

    /// Stops vCPUs and devices: when this returns, no request to a disk is under way, and
    /// nothing writes guest memory but the caller.
    /// Does nothing when already paused.
    fn pause(&mut self) -> Result<(), MigratableError>;

    /// Lets devices and vCPUs run. Does nothing when they run.
    fn resume(&mut self) -> Result<(), MigratableError>;

    /// Everything but memory. Paused only. May write guest memory (which is then dirty).
    fn save_state(&mut self) -> Result<MachineState, MigratableError>;

    /// A state as [`save_state`](Self::save_state) will make it, from a machine that runs: each
    /// part is whole, together they are not of one moment. For a destination to practise with:
    /// whatever takes long the first time is not part of the pause then. `None` when there is
    /// nothing to practise.
    fn rehearsal_state(&mut self) -> Result<Option<MachineState>, MigratableError> {
        Ok(None)
    }

    /// Takes over a state. Paused only; may be called again before the first resume, and is of
    /// no use when it fails.
    fn restore_state(&mut self, state: MachineState) -> Result<(), MigratableError>;

    /// The state that was restored is a saved one: until the resume its guest stands still for as
    /// long as it may please, and its clock is set on by all of that.
    fn was_saved(&mut self) {}

    /// Begins to log writes to memory.
    fn start_dirty_log(&mut self) -> Result<(), MigratableError>;

    /// The pages written since the last call. Reading clears.
    fn take_dirty(&mut self) -> Result<DirtyPages, MigratableError>;

    /// As `take_dirty`, the last time before the switch-over, cheaper. Paused only.
    fn take_last_dirty(&mut self) -> Result<DirtyPages, MigratableError>;

    /// Gives back pages that were taken and not sent.
    fn put_back_dirty(&mut self, pages: &DirtyPages);

    /// Ends the log; does nothing when there is none. After `resume`, never inside the pause.
    fn stop_dirty_log(&mut self) -> Result<(), MigratableError>;

    /// Draws the guest's frames to this machine, where they wait until it runs. Paused only, while
    /// the guest stands still at the source. Failure is logged, not fatal.
    fn attract(&mut self);

    /// The guest has just come here and has to catch up: for a moment it goes before its
    /// neighbours. After `resume` on the destination.
    fn catch_up(&mut self) {}

    /// Tells the network where the guest's addresses are now. After `resume`; may be called again.
    /// Failure is logged, not fatal.
    fn announce(&mut self);
}
