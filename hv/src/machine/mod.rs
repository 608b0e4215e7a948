//! The machine: KVM's VM, its vCPUs and devices, and what may be done with them.

pub mod migratable;
