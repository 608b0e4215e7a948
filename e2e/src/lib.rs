//! The lab: real hosts anywhere, and what is tested and measured in it.
//!
//! A lab is a few Debian 13 machines in QEMU ([`host`]), each with its own kernel and KVM, a
//! small switch between them ([`switch`]), and a network namespace in which this machine takes
//! part: controllers and clients run there. Killing a host is killing its QEMU; cutting a cable
//! is one call.
//!
//! ```text
//!   namespace drover-NAME                      switch                    host1 (QEMU)
//!   mgmt0  10.77.0.1, .11, .12, .13  ──tap──  [mgmt]  ──unix socket──   eth0 10.77.0.101
//!   guest0 10.78.0.1                 ──tap──  [guest] ──unix socket──   eth1 ── br0 ── domains
//! ```
//!
//! Data flows so: [`image`] makes, once, what every lab starts from (a root disk, a kernel, the
//! guests' initramfs); [`lab::Lab`] starts a switch and hosts from it and keeps the processes'
//! identities in a state file, so that another process (`drover-lab ssh host1`) finds them.
//!
//! On top of it, [`cluster::Cluster`] runs Drover there as a provider would, [`client`] is what
//! its customers see, and [`demo`] tells the story of a drain. The same parts serve the tests
//! and benchmarks.
//!
//! Start reading at [`lab`]. Nothing in the other crates depends on this one.

pub mod bench;
pub mod client;
pub mod cluster;
pub mod demo;
pub mod error;
pub mod guests;
pub mod host;
pub mod image;
pub mod initramfs;
pub mod lab;
pub mod netns;
pub mod nfs;
pub mod paths;
pub mod process;
mod qmp;
pub(crate) mod snapshot;
pub mod ssh;
pub mod switch;
pub mod vps;
pub mod vpsctl;
pub mod website;

pub use cluster::Cluster;
pub use error::{Error, Result};
pub use lab::Lab;
