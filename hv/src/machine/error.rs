//! Why a machine could not be made, or not be started.

use std::io;
use std::path::PathBuf;

use vm_memory::GuestMemoryError;

use super::migratable::MigratableError;
use super::vcpu_state::VcpuStateError;
use crate::config::FieldError;
use crate::memory::MemoryError;
use crate::saved::RestoreError;

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// What was asked for is wrong: the field says where.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// KVM refused.
    #[error("{step}: {source}")]
    Kvm {
        /// What was tried.
        step: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// A vCPU could not be set up.
    #[error(transparent)]
    Vcpu(#[from] VcpuStateError),
    /// Memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The boot structures do not fit into memory.
    #[error("writing the ACPI tables: {0}")]
    Acpi(#[from] GuestMemoryError),
    /// There is no saved state that it could go on from.
    #[error("restore: {path}: {source}", path = .path.display())]
    Restore {
        /// The file or device.
        path: PathBuf,
        /// Why not.
        source: RestoreError,
    },
    /// It was made, and does not run.
    #[error("starting the guest: {0}")]
    Start(#[source] MigratableError),
    /// A device could not be made.
    #[error("making {device}: {source}")]
    Device {
        /// Which.
        device: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Names the step of KVM's that failed.
pub(super) fn kvm<T>(
    step: &'static str,
    result: Result<T, kvm_ioctls::Error>,
) -> Result<T, MachineError> {
    result.map_err(|source| MachineError::Kvm { step, source })
}
