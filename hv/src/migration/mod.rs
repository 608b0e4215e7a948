//! Live migration: a running machine moves to another VMM over TCP, on one connection or several.
//!
//! ```text
//! source                                      destination (a paused machine of the same shape)
//!   connect ─────────────── HELLO ───────────►  token, shape, CPU features: WELCOME or REFUSE
//!   connect again, some times ─ JOIN ────────►  token, index: JOINED or REFUSE
//!   note writes; what disks hold, and what was
//!   written meanwhile ────── DISK … ROUND ───►  written, durable: ROUND_ACK
//!   log writes; every page ─ PAGES … ────────►  written into memory
//!   a state, to practise with ─ REHEARSAL ───►  restored; REHEARSED
//!   what was written meanwhile, again and       (the guest runs on the source)
//!   again ── DISK … PAGES … ROUND ───────────►  ROUND_ACK
//!   ═══ pause ═══
//!   save, last ones ─── DISK … PAGES … ──────►
//!   device state ─────────── STATE ──────────►  restored, verified; disks durable
//!           ◄─────────────── READY ───────────
//!   ─── handover.json is on disk ─── from here on the source never resumes by itself
//!   disks closed, unlocked
//!           ──────────────── COMMIT ─────────►  lock shared disks, resume, announce
//!           ◄─────────────── RUNNING ─────────
//! ```
//!
//! Before the hand-over any failure means that the source goes on as if nothing had happened, and
//! the destination is of no use any more. After it, the destination resumes on COMMIT; when either
//! end does not hear the other, it waits for the controller, which decides under a greater epoch
//! ([`SourceControl`], [`DestinationControl`]). So the guest never runs twice.
//!
//! Pages and blocks go over all connections, a thread each at both ends (`source/senders`,
//! `destination/receivers`); all else is said on the first. Between two connections nothing keeps
//! its order. So a pass has each page and block once, and the next begins when the destination has
//! answered that it has all of it: both sides count, and what is counted is written.
//!
//! What decides is pure: [`source_machine`] and [`destination_machine`] are state machines with a
//! table of legal transitions, [`policy`] says when to stop copying. [`source`] and
//! [`destination`] are the shells that do what these say. The machine is lent to them mutably for
//! the whole time, so that nothing else can touch it. The wire format is
//! `docs/migration-format.md`.
//!
//! A failed attempt leaves no trace in the log of dirty pages, nor in that of written blocks: each
//! attempt begins with everything, and the logs are switched off when one ends.
//!
//! The right to write a disk is an open, locked descriptor of it. Local disks have two volumes,
//! and each side holds its own; of a shared one there is never more than one open: the source
//! closes all of its disks behind the hand-over, before COMMIT.

mod alarm;
mod blocks;
mod control;
mod courtesy;
pub mod destination;
pub mod destination_machine;
mod features;
mod handover;
mod link;
pub(crate) mod pages;
pub mod policy;
pub mod source;
pub mod source_machine;
pub mod wire;

use std::time::Duration;

pub use control::{ControlError, DestinationControl, SourceControl};
pub use destination::{DestinationConfig, DestinationOutcome, Incoming};
pub use features::{DiskShape, FeatureWord, Shape, cpu_features};
pub use handover::{Handover, remove_handover};
pub use policy::Limits;
pub use source::{SourceConfig, SourceOutcome};

use crate::machine::migratable::MigratableError;
use crate::state::StateError;
use crate::virtio::blk::VolumeError;

/// Most connections by default. [`connections`] tells why there are not always so many.
const CONNECTIONS_DEFAULT_MAX: u16 = 4;

/// How many connections this side is good for: one of its processors each.
pub fn connections() -> u16 {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u16::try_from(processors).unwrap_or(u16::MAX).min(CONNECTIONS_DEFAULT_MAX)
}

/// Longest wait for a connection to be made.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for anything from, or room towards, the other side while the guest runs. A
/// network that is cut for ten seconds comes back in time: TCP tries again after 12.6 s at most.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for READY, from the pause on: the guest stands still meanwhile.
pub const READY_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for RUNNING after COMMIT.
pub const RUNNING_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait of a destination for its source to connect.
pub const LISTEN_TIMEOUT: Duration = Duration::from_secs(120);

/// Who is told of a migration's progress; called from the migration's thread, must not block.
pub type Observer<'a> = &'a mut dyn FnMut(&drover_proto::agent::v1::ObservedMigration);

/// Why a migration ended, or this side of it.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The other side cannot be reached, or is gone.
    #[error("{step}: {source}")]
    Link {
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The other side's bytes are not of the protocol.
    #[error("the other side broke the protocol: {0}")]
    Protocol(String),
    /// The other side refused before anything was copied.
    #[error("the destination refused: {0}")]
    Refused(String),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Aborted(String),
    /// The copy would not have come to an end within its limits.
    #[error("{0}")]
    Limits(String),
    /// Somebody asked for the end.
    #[error("cancelled")]
    Cancelled,
    /// The machine could not do what was asked.
    #[error(transparent)]
    Machine(#[from] MigratableError),
    /// A state could not be written or read.
    #[error(transparent)]
    State(#[from] StateError),
    /// A disk could not be read or written.
    #[error("disks[{disk}]: {step}: {source}")]
    Disk {
        /// Which.
        disk: usize,
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A volume could not be had.
    #[error("disks[{disk}].path: {source}; accepted: {}", source.accepted())]
    Volume {
        /// Which disk.
        disk: usize,
        /// Why.
        source: VolumeError,
    },
    /// The hand-over could not be written down.
    #[error("handover.json: {0}")]
    Handover(std::io::Error),
}

impl MigrationError {
    fn link(step: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Link { step, source }
    }

    fn disk(disk: usize, step: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Disk { disk, step, source }
    }
}
