//! One VMM: the thread that owns the machine, and the handle through which everybody else speaks
//! to it.
//!
//! ```text
//! API ── Request (bounded) ─►┐
//! vCPUs ── guest's exit ────►├─ supervisor ── owns ── Machine
//! migration's thread ───────►┘       │  ▲
//!                                    ▼  └── handed back when it ends
//!                             migration's thread (the machine is moved there)
//! ```
//!
//! Every change of state goes through the supervisor, one after the other, so that there is
//! nothing to lock. While a migration has the machine, the supervisor has only the handles by
//! which a migration is cancelled or told the controller's decision. A saving has it in the same
//! way, so that there is never both.

mod adjust;
mod error;
mod migrate;
mod plug;
mod save;
mod shared;
mod supervisor;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError};
use std::time::Duration;

use drover_proto::vmm::v1::{
    AttachDiskRequest, CancelMigrationRequest, DetachDiskRequest, GrowDiskRequest,
    PrepareIncomingRequest, SaveRequest, SetDiskLimitsRequest, SetGenerationRequest,
    StartMigrationRequest, TakeOverRequest,
};
use tokio::sync::oneshot;

use crate::config::DomainConfig;
use crate::machine::exit::ExitRecord;
use crate::saved;
pub use error::VmmError;
pub use shared::Shared;
use supervisor::Event;

/// Longest wait for the supervisor's answer. A reset loads the kernel again, which takes longest.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How a VMM is started.
#[derive(Debug, Clone)]
pub struct Options {
    /// The domain.
    pub config: DomainConfig,
    /// Where exit and hand-over are written down.
    pub state_dir: PathBuf,
    /// Wait for a migration instead of booting.
    pub incoming: bool,
}

/// What can be asked of a VMM.
#[derive(Debug, Clone)]
pub enum Request {
    /// Stop the guest where it is.
    Pause,
    /// Let it run again.
    Resume,
    /// Press the power button.
    PowerButton,
    /// Start the machine again.
    Reset,
    /// Limit a disk.
    SetDiskLimits(SetDiskLimitsRequest),
    /// A disk's volume has grown.
    GrowDisk(GrowDiskRequest),
    /// Put in another disk.
    AttachDisk(AttachDiskRequest),
    /// Ask the guest to let go of a disk. The answer comes when it is asked.
    DetachDisk(DetachDiskRequest),
    /// The guest has become another one.
    SetGeneration(SetGenerationRequest),
    /// Write the guest to a file and end. The answer comes when it has ended.
    Save(SaveRequest),
    /// End the VMM; the text says on whose behalf.
    Quit(String),
    /// Destination: listen. The answer is the address.
    PrepareIncoming(PrepareIncomingRequest),
    /// Source: begin.
    StartMigration(StartMigrationRequest),
    /// Give up.
    CancelMigration(CancelMigrationRequest),
    /// The controller has decided that the guest runs here.
    TakeOver(TakeOverRequest),
}

/// What is answered when it was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Nothing more.
    Done,
    /// To `PrepareIncoming`: where.
    Listening(String),
    /// To `GrowDisk`: the volume's length before and now.
    Grown {
        /// Bytes before.
        bytes_before: u64,
        /// Bytes now.
        bytes: u64,
    },
}

type Answer = Result<Reply, VmmError>;

/// A handle of a VMM.
#[derive(Debug, Clone)]
pub struct Vmm {
    shared: Arc<Shared>,
    events: SyncSender<Event>,
}

impl Vmm {
    /// Makes the machine and starts it (or lets it wait for a migration). Answers when the guest
    /// runs; the receiver then says how it ended, when its exit is on disk.
    ///
    /// # Errors
    /// When the machine cannot be made or the kernel not be loaded. The exit is on disk then.
    pub fn start(options: Options) -> Result<(Self, oneshot::Receiver<ExitRecord>), ExitRecord> {
        supervisor::start(options)
    }

    /// Status, console, counters.
    pub fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// When it cannot be done; then nothing has changed.
    pub async fn ask(&self, request: Request) -> Answer {
        let (reply, answer) = oneshot::channel();
        let mut timeout = ANSWER_TIMEOUT;
        if matches!(request, Request::Save(_)) {
            timeout += saved::time_max(self.shared.status().memory_bytes);
        }
        match self.events.try_send(Event::Request(request, reply)) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                return Err(VmmError::Busy);
            }
        }
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(VmmError::Busy),
        }
    }
}
