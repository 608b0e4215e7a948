//! The agent of a node: it makes what is on the node equal what the controller wants, and tells
//! the controller what is there. It starts one VMM a domain and talks to it only through its
//! socket; VMMs outlive it, and it finds them again.
//!
//! ```text
//!  controller ──Desired──► session ──► node ──Wanted──► domain (a task each)
//!             ◄─Report───          ◄──────── ◄─View────    │ decide(): what next?
//!                                                          │ act: records, taps, process,
//!                                                          ▼      VMM's API on its socket
//!                                                     drover-vmm
//! ```
//!
//! Both directions carry levels, never edges: whatever is lost, late or repeated, the next full
//! picture puts things right. What must be remembered is on disk before it is acted on.
//!
//! Beside the domains' tasks stands one for the pools ([`storage`]): it makes the volumes that
//! domains wait for. Other agents and the controllers call [`service`].
//!
//! Start reading at [`decide`], the pure function that holds every rule; [`mod@domain`] carries
//! its answers out; [`node`] has all domains, [`session`] the controller. [`records`] says where
//! everything lies on disk, and [`process`] how a VMM is known again.

pub mod cli;
pub mod console;
pub mod decide;
pub mod domain;
pub mod error;
pub mod identity;
pub mod net;
pub mod node;
pub mod observe;
pub mod process;
pub mod records;
pub mod seed;
pub mod service;
pub mod session;
pub mod storage;
pub mod usage;
pub mod wanted;
