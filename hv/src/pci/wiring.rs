//! What a PCI function asks of the hypervisor.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// The message that an MSI writes: an address that names the local APIC, and the vector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Where it is written.
    pub address: u64,
    /// What is written.
    pub data: u32,
}

/// Joins eventfds to the guest: interrupts towards it, notifications from it.
///
/// There is one for a VM, which owns its interrupt routing table. Changing KVM's table waits for
/// all vCPUs' read-side sections, so changes are staged and committed together.
pub trait Wiring: Send + Sync {
    /// Gives the eventfd a line of its own; writing it raises what [`stage_msi`](Self::stage_msi)
    /// says for that line (nothing, before). Answers the line.
    fn add_irqfd(&self, fd: &EventFd) -> io::Result<u32>;

    /// Takes the line back from the eventfd.
    fn remove_irqfd(&self, fd: &EventFd, line: u32) -> io::Result<()>;

    /// From the next commit on, the line raises this message.
    fn stage_msi(&self, line: u32, message: MsiMessage);

    /// Makes what was staged true; does nothing when nothing changed.
    fn commit_msi(&self) -> io::Result<()>;

    /// Writes by the guest to this address, of any length, add 1 to the eventfd.
    fn add_ioeventfd(&self, fd: &EventFd, address: u64) -> io::Result<()>;

    /// They no longer do.
    fn remove_ioeventfd(&self, fd: &EventFd, address: u64) -> io::Result<()>;
}
