//! A guest is written to its memory volume. That takes as long as the memory is large, and the
//! domain's task goes on with its other work meanwhile: it follows the VMM, and reports.
//!
//! An agent that dies in the middle asks again when it comes back: to the VMM it is the same
//! saving. How it ended is in the VMM's exit record, or in its answer when the guest runs on.

use std::path::PathBuf;
use std::time::Duration;

use drover_proto::vmm::v1::VmmStatus;
use tokio::task::JoinHandle;
use tonic::Code;

use super::Domain;
use super::client::is_refusal;
use crate::decide::Disks;
use crate::error::{Error, blocking};
use crate::observe::shorten;
use crate::records::SaveRecord;
use crate::wanted::Role;

/// A VMM that did not say what became of it is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// A saving that a VMM was asked for.
#[derive(Debug)]
pub(super) struct Saving {
    order: SaveRecord,
    path: PathBuf,
    task: JoinHandle<Result<VmmStatus, Error>>,
}

/// How the memory volume stands, in words of its own.
pub(super) fn memory_of(disks: Disks) -> Disks {
    match disks {
        Disks::Ready => Disks::Ready,
        Disks::Waiting(_) => Disks::Waiting("waits for the volume of its memory".into()),
        Disks::Failed(reason) => {
            let reason = reason.strip_prefix("disk 1: ").unwrap_or(&reason);
            Disks::Failed(format!("the volume of its memory: {reason}"))
        }
    }
}

/// What has become of the saving; for ever, if there is none. May be dropped and called again.
pub(super) async fn outcome(saving: &mut Option<Saving>) -> Result<VmmStatus, Error> {
    match saving {
        Some(saving) => match (&mut saving.task).await {
            Ok(result) => result,
            Err(_) => Err(Error::Ended("saving")),
        },
        None => std::future::pending().await,
    }
}

impl Domain {
    /// Asks the VMM to save its guest, and does not wait for it.
    pub(super) async fn save_guest(&mut self) -> Result<(), Error> {
        let assigned = self.assigned()?;
        let (Role::Owner(owner), Some(memory)) = (&assigned.role, assigned.memory) else {
            return Ok(());
        };
        // Its disks stand still under whoever reads them, and it does not end under them.
        let turn = self.shared.quiescer.turn(&self.uid)?;
        let mut client = self.client()?;
        let order = SaveRecord {
            memory: memory.volume.clone(),
            epoch: assigned.epoch,
            start_generation: owner.start_generation,
            error: String::new(),
        };
        let storage = self.storage.clone();
        let opened = blocking(move || storage.activate(&memory.pool, &memory.volume)).await;
        let path = match opened {
            Ok(path) => path,
            Err(error) => return self.note_unsaved(order, error.to_string()).await,
        };
        tracing::info!(uid = self.uid, domain = assigned.name, path = %path.display(), "saves it");
        let to = path.clone();
        let task = tokio::spawn(async move {
            let _turn = turn;
            client.save(&to).await
        });
        self.saving = Some(Saving { order, path, task });
        self.progress.saving = true;
        Ok(())
    }

    pub(super) async fn note_saved(&mut self, result: Result<VmmStatus, Error>) {
        let Some(Saving { order, path, .. }) = self.saving.take() else { return };
        let error = match result {
            // Its end says the rest.
            Ok(status) => return self.link.set_status(status),
            Err(error) => error,
        };
        self.progress.saving = false;
        self.progress.save_again_ms = self.now_ms() + ASK_AGAIN.as_millis() as u64;
        if !is_final(&error) {
            tracing::info!(uid = self.uid, %error, "the VMM does not say whether it is saved");
            return;
        }
        // A customer does not know the node's paths.
        let path = path.display().to_string();
        let text = error.to_string().replace(&path, "the volume of its memory");
        if let Err(error) = self.note_unsaved(order, text).await {
            tracing::warn!(uid = self.uid, %error, "cannot write the domain's record");
        }
    }

    /// The guest runs on, and this order is not tried again.
    async fn note_unsaved(&mut self, order: SaveRecord, error: String) -> Result<(), Error> {
        tracing::warn!(uid = self.uid, domain = self.name(), error, "could not be saved");
        let mut record = self.record.clone().unwrap_or_default();
        record.save = Some(SaveRecord { error: shorten(error), ..order });
        self.save(record).await
    }
}

/// The VMM has answered that the guest is not saved.
fn is_final(error: &Error) -> bool {
    match error {
        Error::Vmm { status, .. } if status.code() == Code::ResourceExhausted => true,
        error => is_refusal(error),
    }
}
