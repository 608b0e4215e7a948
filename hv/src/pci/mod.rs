//! PCI: one bus, a host bridge in slot 0, and functions with a memory window each.
//!
//! A guest reaches configuration space through mechanism #1 (ports 0xcf8 to 0xcff) and a function's
//! registers through its BAR. Both come in at [`PciBus`], which finds the [`PciFunction`]. BARs are
//! assigned here, and a guest may move them: Linux does so with those of functions that come while
//! it runs ([`HotPlug`]). Interrupts are MSI-X only ([`Msix`]): a vector is an eventfd that KVM
//! turns into a message; whoever owns the VM's routing table stands behind [`Wiring`], so that
//! nothing here needs KVM in a test.

mod bus;
mod config;
mod hot_plug;
mod kvm;
mod msix;
#[cfg(test)]
pub(crate) mod tests;
mod wiring;

pub use bus::{PciBus, PciFunction, RestoreError};
pub use config::{ClassCode, ConfigSpace, Identity, command};
pub use hot_plug::{HotPlug, REGISTER_BYTES as HOT_PLUG_REGISTER_BYTES};
pub use kvm::KvmWiring;
pub use msix::{MSIX_CAPABILITY_BYTES, Msix};
pub use wiring::{MsiMessage, Wiring};

/// Guest-physical addresses of the functions' windows; the ACPI tables name this range.
pub const MMIO_START: u64 = 0xe000_0000;
/// First address behind the windows.
pub const MMIO_END: u64 = 0xfeb0_0000;
/// First port of configuration mechanism #1.
pub const CONFIG_PORT_START: u16 = 0xcf8;
/// First port behind configuration mechanism #1.
pub const CONFIG_PORT_END: u16 = 0xd00;
/// Slots of the bus, the host bridge's included.
pub const SLOTS: u8 = 32;
/// Slots whose functions may come and go while the guest runs; those that the machine always has
/// lie below.
pub const HOT_PLUG_SLOTS: std::ops::RangeInclusive<u8> = 16..=31;
/// Size of each function's window, bytes.
pub const WINDOW_BYTES: u64 = 0x8000;
/// Where a slot's windows begin; 1 MiB apart, so that dumps read easily.
pub const fn window_start(slot: u8) -> u64 {
    MMIO_START + ((slot as u64) << 20)
}
