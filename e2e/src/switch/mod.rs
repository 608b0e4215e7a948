//! The switch between the hosts: a process of its own, two segments, one cable a port.
//!
//! QEMU's `-netdev stream` sends each Ethernet frame after its length (4 bytes, big endian) over
//! a unix socket; this machine takes part through a TAP a segment. The switch learns who is
//! where, floods what it does not know, and does to each cable what [`LinkState`] says: cut,
//! delay, drop. [`Control`] changes that while it runs.
//!
//! One thread and epoll: the emulated cores and the switch share the machine's cores, so it reads
//! and writes in batches. Every queue has a bound, and what does not fit is dropped, as a real
//! switch does.

mod control;
mod engine;
mod forward;
mod tap;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::process::{self, Process};
use crate::{Error, Result, paths};

pub use control::Control;
pub use engine::serve;

/// One of the two networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Segment {
    /// Controllers, agents, migrations: 10.77.0.0/24.
    Mgmt,
    /// The domains: 10.78.0.0/24.
    Guest,
}

impl Segment {
    /// Both, in the order of a host's NICs.
    pub const ALL: [Self; 2] = [Self::Mgmt, Self::Guest];

    /// Its TAP in the namespace.
    pub fn tap(self) -> &'static str {
        match self {
            Self::Mgmt => "mgmt0",
            Self::Guest => "guest0",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Mgmt => "mgmt",
            Self::Guest => "guest",
        }
    }
}

/// Where a cable ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Port {
    /// This machine's TAP.
    Client(Segment),
    /// A host's NIC.
    Host(usize, Segment),
}

impl Port {
    /// The segment it is on.
    pub fn segment(self) -> Segment {
        match self {
            Self::Client(segment) | Self::Host(_, segment) => segment,
        }
    }

    /// The socket that the host's QEMU connects to.
    pub fn socket(self, run_dir: &Path) -> PathBuf {
        run_dir.join(format!("{self}.sock"))
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Client(segment) => write!(f, "client-{}", segment.word()),
            Self::Host(number, segment) => write!(f, "host{number}-{}", segment.word()),
        }
    }
}

/// What a cable does to frames, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct LinkState {
    /// Nothing passes.
    pub cut: bool,
    /// Every frame comes so much later, in milliseconds.
    pub delay_ms: u32,
    /// Probability that a frame is lost, 0 to 1.
    pub drop: f64,
}

/// One port, as the switch sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PortReport {
    /// Which.
    pub port: Port,
    /// Whether a QEMU (or the TAP) is at its end.
    pub connected: bool,
    /// What its cable does.
    pub link: LinkState,
    /// Frames that came in.
    pub frames_in: u64,
    /// Bytes that came in.
    pub bytes_in: u64,
    /// Frames lost because of [`LinkState`].
    pub frames_lost: u64,
    /// Frames lost because the other end did not take them.
    pub frames_overflowed: u64,
}

/// An address was seen at another port than before, or for the first time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressMove {
    /// `52:54:00:…`.
    pub mac: String,
    /// Where frames from it came in.
    pub port: Port,
}

/// Starts the switch of a lab as a process of its own and waits until its TAPs are there.
pub fn start(lab: &str) -> Result<Process> {
    let run_dir = paths::run_dir(lab);
    let log = run_dir.join("switch.log");
    let mut command = Command::new(lab_program()?);
    command.args(["switch", "--name", lab]);
    let process = process::start_detached(command, &log)?;
    process::wait_for("the start of the switch", Duration::from_secs(20), || {
        if !process.is_alive() {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            return Err(Error::other(format!("the switch ended at once: {}", text.trim_end())));
        }
        Ok(control::socket(&run_dir).exists().then_some(()))
    })?;
    Ok(process)
}

/// `drover-lab` itself, also when a test asks.
fn lab_program() -> Result<PathBuf> {
    let me = std::env::current_exe().map_err(Error::io("cannot find", "this program"))?;
    if me.file_name().is_some_and(|n| n == "drover-lab") {
        return Ok(me);
    }
    let built = paths::program("drover-lab");
    if built.exists() { Ok(built) } else { Err(Error::other("drover-lab is not built")) }
}
