//! The hypervisor stack: one domain's machine on Linux KVM.
//!
//! The binary `drover-vmm` is one process a domain. It reads a [`config::DomainConfig`], makes
//! [`memory`], loads the kernel, runs the vCPUs, and serves `drover.vmm.v1.VmmService` on a unix
//! socket until the guest ends.
//!
//! Start reading at [`machine`], which owns everything that a guest can see; [`migratable`] is
//! the face that live migration drives.
//!
//! [`migratable`]: machine::migratable

pub mod acpi;
pub mod bootdisk;
pub mod config;
pub mod console;
pub mod guest_agent;
pub mod loader;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod pci;
pub mod saved;
pub mod serial;
pub mod server;
pub mod state;
pub mod virtio;
pub mod vmm;
