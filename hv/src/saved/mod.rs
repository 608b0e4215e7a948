//! A guest that is saved: its memory and state go to a file or block device, its VMM ends, and a
//! later one goes on from there.
//!
//! ```text
//! save                                        restore (a paused machine of the same shape)
//!   header: being written ── durable            header: whole, of this domain
//!   ═══ pause ═══                               every record, its checksum, every page
//!   shape, state, pages, end ── durable         state into the machine
//!   disks ── durable                            header: used up ── durable
//!   header: whole ── durable                    resume
//!   the VMM ends
//! ```
//!
//! Two rules follow from that order. A state that is half written is never taken for a whole one,
//! whenever the power fails, as the header says `whole` only when all else is on disk. And a guest
//! goes on from a state once: from the moment it runs its disks move on, and a memory that knows
//! older ones would destroy them. So the header says `used up` before it runs, and whoever finds
//! that boots.
//!
//! Whatever fails before the end of [`save`], the guest goes on as if nothing had been asked.
//! `docs/saved-state-format.md` is the format; [`write`] and [`read`] are free of machines, and
//! tested against a disk that loses what was not synced.

mod format;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::machine::migratable::{MigratableError, MigratableVm};
use crate::migration::Shape;
use crate::state::{self, StateError};
use crate::virtio::blk::{Volume, VolumeError};
use format::{Header, Stage};
use write::Content;

/// A target that is larger than memory by this always suffices: the state image has 16 MiB at
/// most, and each MiB of memory needs 32 bytes more.
pub const ROOM_BYTES: u64 = 64 << 20;
/// A state is written and read at this rate at least; a disk that is slower fails it.
const BYTES_PER_SECOND_MIN: u64 = 10 << 20;
/// And so long beside that, whatever the size.
const TIME_MIN: Duration = Duration::from_secs(60);

/// Longest time that saving or restoring so much memory takes.
pub fn time_max(memory_bytes: u64) -> Duration {
    TIME_MIN + Duration::from_secs(memory_bytes / BYTES_PER_SECOND_MIN)
}

/// Why a guest was not saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The target cannot be had.
    #[error("path: {0}; accepted: {accepted}", accepted = .0.accepted())]
    Volume(#[from] VolumeError),
    /// It is too small.
    #[error("path: has {bytes} bytes, too few; accepted: {wanted}, which always suffice")]
    TooSmall {
        /// Its length.
        bytes: u64,
        /// What suffices.
        wanted: u64,
    },
    /// The target failed.
    #[error("{step}: {source}")]
    Write {
        /// What was tried.
        step: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A disk of the domain could not be made durable.
    #[error("disks[{disk}]: making it durable: {source}")]
    Disk {
        /// Which.
        disk: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The guest would stand still too long.
    #[error("writing it takes longer than {0:?}")]
    Time(Duration),
    /// The VMM was told to end.
    #[error("cancelled")]
    Cancelled,
    /// The machine could not do what was asked.
    #[error(transparent)]
    Machine(#[from] MigratableError),
    /// The state could not be put into a file.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why a guest did not go on from a saved state.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The file or device cannot be had.
    #[error("{0}; accepted: {accepted}", accepted = .0.accepted())]
    Volume(#[from] VolumeError),
    /// It cannot be read.
    #[error("reading it: {0}")]
    Read(io::Error),
    /// It cannot be written.
    #[error("noting that it is used up: {0}")]
    UseUp(io::Error),
    /// There is none.
    #[error("it holds no saved state")]
    Nothing,
    /// Another version wrote it.
    #[error("the saved state has version {found}; accepted: {accepted}")]
    Version {
        /// Its version.
        found: u16,
        /// What is read here.
        accepted: u16,
    },
    /// Whoever wrote it did not come to the end.
    #[error("the saved state is not whole: saving it did not come to its end")]
    Unfinished,
    /// Another domain's.
    #[error("the saved state is of another domain: uid: {found}; accepted: {accepted}")]
    Foreign {
        /// Whose.
        found: String,
        /// Whose it should be.
        accepted: String,
    },
    /// Of another machine.
    #[error("the saved state does not fit this machine: {0}")]
    Mismatch(String),
    /// It is not what was written.
    #[error("the saved state is damaged: {0}")]
    Damaged(String),
    /// The disk is too slow.
    #[error("reading it takes longer than {0:?}")]
    Time(Duration),
    /// The state's parts are not what they should be.
    #[error("the saved state is damaged: {0}")]
    State(#[from] StateError),
    /// The machine did not take it.
    #[error(transparent)]
    Machine(#[from] MigratableError),
}

/// Where a state lies.
trait Target {
    /// Its length; it does not grow.
    fn bytes(&self) -> u64;
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

impl Target for Volume {
    fn bytes(&self) -> u64 {
        Volume::bytes(self)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        Volume::read_at(self, buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        Volume::write_at(self, bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Volume::sync(self)
    }
}

/// Ends a saving, up to the moment when the state becomes whole.
#[derive(Debug, Clone, Default)]
pub struct SaveControl(Arc<AtomicU8>);

impl SaveControl {
    const GOING: u8 = 0;
    const CANCELLED: u8 = 1;
    const CLOSED: u8 = 2;

    /// For one saving.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives up; false when it is too late.
    pub fn cancel(&self) -> bool {
        self.leave(Self::CANCELLED)
    }

    fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst) == Self::CANCELLED
    }

    /// From now on it is too late; false when it was cancelled before.
    fn close(&self) -> bool {
        self.leave(Self::CLOSED)
    }

    fn leave(&self, to: u8) -> bool {
        match self.0.compare_exchange(Self::GOING, to, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(at) => at == to,
        }
    }
}

/// What was saved, or restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Saved {
    /// Pages that are not zero.
    pub pages: u64,
    /// Length in the file, from its beginning.
    pub bytes: u64,
    /// How long it took.
    pub took: Duration,
}

impl Saved {
    fn new(header: &Header, began: Instant) -> Self {
        let bytes = format::RECORDS_START + header.record_bytes;
        Self { pages: header.pages, bytes, took: began.elapsed() }
    }
}

/// How saving ended.
#[derive(Debug)]
pub enum SaveOutcome {
    /// The state is on disk. The machine stays paused for ever.
    Saved(Saved),
    /// The guest goes on as if nothing had been asked.
    Failed(SaveError),
    /// The guest should go on and could not be resumed: the machine is of no use.
    Broken(SaveError),
}

/// Saves a running machine to a file or block device, whose size bounds it.
pub fn save(
    vm: &mut dyn MigratableVm,
    shape: &Shape,
    path: &Path,
    control: &SaveControl,
) -> SaveOutcome {
    let error = match try_save(vm, shape, path, control) {
        Ok(saved) => return SaveOutcome::Saved(saved),
        Err(error) => error,
    };
    tracing::warn!(%error, "the guest is not saved and goes on");
    match vm.resume() {
        Ok(()) => SaveOutcome::Failed(error),
        Err(resume) => {
            tracing::error!(error = %resume, "it cannot go on");
            SaveOutcome::Broken(error)
        }
    }
}

fn try_save(
    vm: &mut dyn MigratableVm,
    shape: &Shape,
    path: &Path,
    control: &SaveControl,
) -> Result<Saved, SaveError> {
    let began = Instant::now();
    let target = Volume::open(path, false)?;
    let header = Header {
        stage: Stage::Writing,
        id: Uuid::new_v4().into_bytes(),
        uid: shape.uid.clone(),
        memory_bytes: shape.memory_bytes,
        record_bytes: 0,
        pages: 0,
    };
    write::begin(&target, &header)?;
    vm.pause()?;
    let image = state::encode(&vm.save_state()?)?;
    let time = time_max(shape.memory_bytes);
    let may_go_on = || {
        if control.is_cancelled() {
            return Err(SaveError::Cancelled);
        }
        if began.elapsed() > time { Err(SaveError::Time(time)) } else { Ok(()) }
    };
    // After the state, as saving that may write memory.
    let content = Content { shape, image: &image, memory: vm.memory() };
    let whole = write::write(&target, &header, &content, &may_go_on)?;
    // What the guest has written and not flushed is on its disks when it goes on, even if the
    // node fails meanwhile: its memory takes that for certain.
    for (disk, at) in vm.disks().iter().zip(0..) {
        if !disk.volume.is_read_only() {
            disk.volume.sync().map_err(|source| SaveError::Disk { disk: at, source })?;
        }
    }
    if !control.close() {
        return Err(SaveError::Cancelled);
    }
    write::commit(&target, &whole)?;
    let saved = Saved::new(&whole, began);
    tracing::info!(?saved, path = %path.display(), "the guest is saved");
    Ok(saved)
}

/// What lay there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Restored {
    /// A state; the machine has it, and is to be resumed. It is used up.
    Whole(Saved),
    /// A guest went on from it before. The machine is as it was.
    UsedUp,
}

/// Gives a machine that stands still, with empty memory, the state that was saved.
///
/// # Errors
/// When the state is not whole, of another domain, or does not fit; then it stays what it is, and
/// the machine is of no use.
pub fn restore(
    vm: &mut dyn MigratableVm,
    shape: &Shape,
    path: &Path,
) -> Result<Restored, RestoreError> {
    let began = Instant::now();
    let target = Volume::open(path, false)?;
    let Some(header) = read::open(&target, &shape.uid)? else { return Ok(Restored::UsedUp) };
    let time = time_max(shape.memory_bytes);
    let may_go_on = || if began.elapsed() > time { Err(RestoreError::Time(time)) } else { Ok(()) };
    let state = read::read(&target, &header, shape, vm.memory(), &may_go_on)?;
    vm.restore_state(state)?;
    vm.was_saved();
    write::use_up(&target, &header).map_err(RestoreError::UseUp)?;
    let saved = Saved::new(&header, began);
    tracing::info!(?saved, path = %path.display(), "the guest goes on from its saved state");
    Ok(Restored::Whole(saved))
}
