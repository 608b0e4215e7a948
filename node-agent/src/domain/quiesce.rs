//! A guest that stands still while its disks are looked at: its filesystems frozen by the agent
//! inside it, or else its VMM paused.
//!
//! ```text
//!  hold:     mark on disk ─► freeze ──────────────────────► (Pause, if writes must stop)
//!                              └ fails ─► thaw ─► Pause
//!  release:  Resume ─► thaw ─► mark removed
//! ```
//!
//! The mark is durable before the guest is touched, and names what may have been done to it: an
//! agent that dies in between undoes that when it comes back ([`Quiescer::release_leftovers`]).
//! A VMM that somebody else paused has no mark, and stays paused.
//!
//! A domain is held by one at a time, and nothing of it is started, saved or sent away meanwhile
//! ([`Quiescer::turn`]).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use drover_proto::agent::v1::{MigrationProgress, MigrationRole};
use drover_proto::vmm::v1::{VmmState, VmmStatus};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::Code;

use super::client::{self, VmmClient};
use crate::error::{Error, blocking};
use crate::process::try_lock;
use crate::records::{DomainFiles, Places, load_json, save_json};
use crate::wanted::is_uid;

/// How long the guest's agent may take to freeze its filesystems, which it first writes out.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
/// And to thaw them.
const THAW_TIMEOUT: Duration = Duration::from_secs(5);
/// How long another's turn with the domain is waited for.
const TURN_TIMEOUT: Duration = Duration::from_secs(30);
/// So often a release is tried before whoever asked for it is told that it failed.
const RELEASE_TRIES_MAX: u32 = 3;
/// Between two tries.
const RELEASE_INTERVAL: Duration = Duration::from_secs(1);
/// So long it is tried afterwards; then the next agent's start will, or the next hold.
const RELEASE_LATER_MAX: Duration = Duration::from_secs(3600);
/// Version of [`Mark`]'s JSON.
const MARK_VERSION: u32 = 1;

/// Makes guests of this node stand still. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Quiescer {
    places: Places,
    turns: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

/// Whoever has it is the only one to hold the domain, start it, save it or send it away.
pub(crate) type Turn = tokio::sync::OwnedMutexGuard<()>;

/// A guest that stands still. Dropped without [`release`](Self::release), it is released in the
/// background.
#[derive(Debug)]
pub struct Held {
    quiescer: Quiescer,
    uid: String,
    /// None once it has been handed on.
    turn: Option<Turn>,
    /// Something is to be undone.
    marked: bool,
    /// The guest's agent said that it froze its filesystems.
    frozen: bool,
    /// Nothing ran.
    at_rest: bool,
}

/// What may have been done to a guest (`held` among its files).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    freeze: bool,
    pause: bool,
}

impl Quiescer {
    /// Of domains whose files lie in `places`.
    pub fn new(places: Places) -> Self {
        Self { places, turns: Arc::default() }
    }

    /// Makes the guest stand still: with its filesystems frozen when it can, with its VMM paused
    /// when it cannot, and both when `must_stop_writes`. One that does not run stands still.
    /// Takes at most a minute.
    ///
    /// # Errors
    /// When it cannot be said to stand still: its VMM does not answer, or it is being migrated.
    /// Then it runs as before.
    pub async fn hold(&self, domain_uid: &str, must_stop_writes: bool) -> Result<Held, Error> {
        let files = self.files(domain_uid)?;
        let busy = || busy(domain_uid);
        let waits = tokio::time::timeout(TURN_TIMEOUT, self.slot(domain_uid).lock_owned());
        let mut held = Held {
            quiescer: self.clone(),
            uid: domain_uid.to_owned(),
            turn: Some(waits.await.map_err(|_| busy())?),
            marked: false,
            frozen: false,
            at_rest: false,
        };
        // What is left of an earlier one would be mistaken for ours.
        self.undo(domain_uid, false).await?;
        let Some((mut vmm, status)) = call_up(&files).await? else {
            held.at_rest = true;
            return Ok(held);
        };
        match status.state() {
            VmmState::Running if is_leaving(&status) => {
                return Err(Error::Domain("the domain is being migrated away".into()));
            }
            VmmState::Running => {}
            // By somebody else, who will resume it.
            VmmState::Paused => return Ok(held),
            state => {
                return Err(Error::Domain(format!(
                    "the domain's VMM is {}: only one that runs can be held",
                    state.as_str_name()
                )));
            }
        }
        held.marked = true;
        match self.still(&files, &mut vmm, must_stop_writes).await {
            Ok(frozen) => {
                held.frozen = frozen;
                Ok(held)
            }
            Err(error) => {
                if let Err(error) = held.undo().await {
                    tracing::warn!(uid = domain_uid, %error, "a hold that failed: undone later");
                }
                Err(error)
            }
        }
    }

    /// Answers whether the guest has frozen its filesystems.
    async fn still(
        &self,
        files: &DomainFiles,
        vmm: &mut VmmClient,
        must_stop_writes: bool,
    ) -> Result<bool, Error> {
        let mut mark = Mark { freeze: true, pause: false };
        mark.write(files).await?;
        let frozen = match freeze(vmm).await {
            Ok(filesystems) => filesystems > 0,
            Err(error) => {
                tracing::info!(%error, "the guest's filesystems are not frozen: it is paused");
                false
            }
        };
        if !frozen {
            // It may be about to: an agent that was too slow hears this one behind the other.
            mark.freeze = match thaw(vmm).await {
                Ok(()) => false,
                Err(error) => !says_no(&error),
            };
        }
        if !frozen || must_stop_writes {
            mark.pause = true;
            mark.write(files).await?;
            vmm.pause().await?;
        }
        Ok(frozen)
    }

    /// Undoes what a mark on disk speaks of. `frozen`: that it froze its filesystems is known, so
    /// that an agent which has gone for a moment is no proof that there is nothing to thaw.
    async fn undo(&self, uid: &str, frozen: bool) -> Result<(), Error> {
        let files = self.files(uid)?;
        let Some(mark) = Mark::read(&files).await? else { return Ok(()) };
        if let Some((mut vmm, status)) = call_up(&files).await? {
            match status.state() {
                VmmState::Running => {}
                VmmState::Paused if mark.pause => drop(vmm.resume().await?),
                VmmState::Paused if mark.freeze => {
                    return Err(Error::Domain(
                        "its filesystems are frozen, and its VMM was paused by somebody: they \
                         are thawed when it is resumed"
                            .into(),
                    ));
                }
                // Nothing of the guest runs here.
                _ => return Mark::remove(&files).await,
            }
            if mark.freeze
                && let Err(error) = thaw(&mut vmm).await
                && (frozen || !says_no(&error))
            {
                return Err(error);
            }
        }
        Mark::remove(&files).await
    }

    /// Undoes what an agent that died has left: in the background, as soon as the VMMs answer.
    pub(crate) fn release_leftovers(&self, uids: &[String]) {
        for uid in uids {
            let Ok(files) = self.files(uid) else { continue };
            let Ok(turn) = self.slot(uid).try_lock_owned() else { continue };
            if files.held.exists() {
                tracing::info!(uid, "was held when the agent ended: it is released");
                tokio::spawn(self.clone().release_later(uid.clone(), turn, false));
            }
        }
    }

    async fn release_later(self, uid: String, _turn: Turn, frozen: bool) {
        let deadline = Instant::now() + RELEASE_LATER_MAX;
        let mut said = String::new();
        while let Err(error) = self.undo(&uid, frozen).await {
            let text = error.to_string();
            if Instant::now() >= deadline {
                tracing::error!(uid, error = text, "cannot thaw or resume the guest; given up");
                return;
            }
            if text != said {
                tracing::warn!(uid, error = text, "cannot thaw or resume the guest; tries again");
                said = text;
            }
            tokio::time::sleep(RELEASE_INTERVAL).await;
        }
    }

    /// A turn with the domain, if nobody has it.
    pub(crate) fn turn(&self, uid: &str) -> Result<Turn, Error> {
        self.slot(uid).try_lock_owned().map_err(|_| busy(uid))
    }

    fn slot(&self, uid: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, slot| Arc::strong_count(slot) > 1);
        Arc::clone(turns.entry(uid.to_owned()).or_default())
    }

    fn files(&self, uid: &str) -> Result<DomainFiles, Error> {
        match is_uid(uid) {
            true => Ok(self.places.domain(uid)),
            false => Err(Error::Domain(format!("domain_uid: {uid:?}: is no UUID"))),
        }
    }
}

fn busy(uid: &str) -> Error {
    Error::Busy(format!("domain {uid}: its disks are being read or it is just starting"))
}

impl Held {
    /// Lets the guest go on. True when its filesystems were frozen by its agent meanwhile, or
    /// nothing of it ran.
    ///
    /// # Errors
    /// When it cannot be resumed or thawed; that is tried on in the background.
    pub async fn release(mut self) -> Result<bool, Error> {
        let quiet = self.frozen || self.at_rest;
        self.undo().await.map(|()| quiet)
    }

    async fn undo(&mut self) -> Result<(), Error> {
        if !self.marked {
            return Ok(());
        }
        let mut tries = 1;
        while let Err(error) = self.quiescer.undo(&self.uid, self.frozen).await {
            if tries >= RELEASE_TRIES_MAX {
                return Err(error);
            }
            tries += 1;
            tokio::time::sleep(RELEASE_INTERVAL).await;
        }
        self.marked = false;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let (Some(turn), true) = (self.turn.take(), self.marked) else { return };
        // Without a runtime the agent is ending; the mark is for the next one.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let uid = std::mem::take(&mut self.uid);
            runtime.spawn(self.quiescer.clone().release_later(uid, turn, self.frozen));
        }
    }
}

impl Mark {
    async fn write(self, files: &DomainFiles) -> Result<(), Error> {
        let path = files.held.clone();
        blocking(move || save_json(&path, MARK_VERSION, &self)).await
    }

    /// One that cannot be read speaks of everything.
    async fn read(files: &DomainFiles) -> Result<Option<Self>, Error> {
        let path = files.held.clone();
        let mark = blocking(move || Ok(load_json(&path, MARK_VERSION))).await?;
        Ok(mark.unwrap_or(Some(Self { freeze: true, pause: true })))
    }

    async fn remove(files: &DomainFiles) -> Result<(), Error> {
        let path = files.held.clone();
        blocking(move || Ok(drover_storage::remove(&path)?)).await
    }
}

/// The domain's VMM and what it says; `None` when no process of it is there.
async fn call_up(files: &DomainFiles) -> Result<Option<(VmmClient, VmmStatus)>, Error> {
    let error = match client::connect(&files.socket).await {
        Ok(mut vmm) => match vmm.status().await {
            Ok(status) if status.state() != VmmState::Exited => return Ok(Some((vmm, status))),
            Ok(_) => Error::Domain("its VMM is just ending".into()),
            Err(error) => error,
        },
        Err(error) => error,
    };
    let lock = files.lock.clone();
    let runs = move || match lock.exists() {
        true => match try_lock(&lock) {
            Ok(free) => Ok(free.is_none()),
            Err(source) => Err(Error::io("lock", &lock, source)),
        },
        false => Ok(false),
    };
    if blocking(runs).await? { Err(error) } else { Ok(None) }
}

fn is_leaving(status: &VmmStatus) -> bool {
    status.migration.as_ref().is_some_and(|migration| {
        let ended = matches!(
            migration.progress(),
            MigrationProgress::Failed | MigrationProgress::Succeeded
        );
        migration.role() == MigrationRole::Source && !ended
    })
}

/// Answers how many filesystems are frozen.
async fn freeze(vmm: &mut VmmClient) -> Result<u64, Error> {
    let command = r#"{"execute":"guest-fsfreeze-freeze"}"#;
    let result = vmm.guest_agent_call(command.to_owned(), FREEZE_TIMEOUT).await?;
    result.trim().parse().map_err(|_| {
        Error::Domain("the guest's agent does not say how many filesystems it has frozen".into())
    })
}

async fn thaw(vmm: &mut VmmClient) -> Result<(), Error> {
    let command = r#"{"execute":"guest-fsfreeze-thaw"}"#;
    vmm.guest_agent_call(command.to_owned(), THAW_TIMEOUT).await.map(drop)
}

/// There is no agent, or it refuses: it has done nothing, and will not.
fn says_no(error: &Error) -> bool {
    match error {
        Error::Vmm { status, .. } => {
            matches!(status.code(), Code::FailedPrecondition | Code::Unavailable)
        }
        _ => false,
    }
}
