//! Disks that come and go while the guest runs. Nothing is written down: the assignment says what
//! there shall be, and the VMM's status what there is.

use drover_proto::vmm::v1::VmmStatus;

use super::Domain;
use crate::error::{Error, blocking};

impl Domain {
    /// Gives the VMM the disk in this place of the assignment.
    pub(super) async fn attach_disk(&mut self, index: usize) -> Result<(), Error> {
        let assigned = self.assigned()?;
        // decide() counts in the same assignment.
        let disk = assigned.disks.get(index).cloned().ok_or(Error::Ended("assignment"))?;
        let mut client = self.client()?;
        let shared = self.shared.clone();
        // Nothing begins to write to disks that are being read.
        let _turn = shared.quiescer.turn(&self.uid)?;
        let (storage, its) = (self.storage.clone(), disk.clone());
        let activated = blocking(move || {
            let activated = storage.activate(&its.pool, &its.volume);
            activated.map_err(|error| Error::Domain(format!("disk {}: {error}", index + 1)))
        });
        let attached = match activated.await {
            Ok(path) => {
                let shared = self.storage.is_shared(&disk.pool);
                client.attach_disk(&disk, &path, shared).await
            }
            Err(error) => Err(error),
        };
        self.note_disk(attached)
    }

    /// Asks the guest to let go of a disk.
    pub(super) async fn detach_disk(&mut self, serial: &str) -> Result<(), Error> {
        let mut client = self.client()?;
        tracing::info!(uid = self.uid, serial, "the guest shall let go of a disk");
        let asked = client.detach_disk(serial).await;
        self.progress.detach_ms = Some(self.now_ms());
        let status = match asked {
            Ok(()) => client.status().await,
            Err(error) => Err(error),
        };
        self.note_disk(status)
    }

    fn note_disk(&mut self, done: Result<VmmStatus, Error>) -> Result<(), Error> {
        match done {
            Ok(status) => {
                self.progress.disk_error.clear();
                self.link.set_status(status);
                Ok(())
            }
            Err(error) => {
                self.progress.disk_error = error.to_string();
                Err(error)
            }
        }
    }
}
