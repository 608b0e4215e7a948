//! The console device (VIRTIO 1.2, 5.3), for its ports and not as a console: one port by the name
//! [`AGENT_PORT`], on which the guest's agent listens. The serial port stays the console.
//!
//! [`device`] is the virtio side, [`port`] the host's end of the port.
//!
//! ```text
//!   GuestAgent ─ say ─► Port ─► receive queue ─► the guest's agent
//!              ◄ hear ─      ◄─ transmit queue ◄─
//! ```
//!
//! Both directions have a bound. What the guest says while nobody listens is thrown away; while
//! somebody does, what he has not read stays in the guest's queue. The port is open on the host's
//! side always, so that an agent without work waits instead of looking again and again.

mod device;
mod port;
#[cfg(test)]
pub(crate) mod tests;

pub use device::{AGENT_PORT, VirtioConsole};
pub use port::{Closed, Listener, Port};
