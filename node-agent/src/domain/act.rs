//! Carrying out one action. Each writes down first what must not be forgotten, and can be done
//! again from the beginning after a crash at any point.

use std::time::Duration;

use drover_proto::vmm::v1::{PrepareIncomingRequest, StartMigrationRequest};
use drover_proto::vmm::v1::{VmmState, VmmStatus};
use tokio::time::Instant;

use super::client::{VmmClient, is_refusal};
use super::files::Opened;
use super::vmm::{Event, Link, describe};
use super::{Domain, files, seeding};
use crate::decide::{Action, CRASH_FORGIVEN_AFTER, Progress, restores};
use crate::error::{Error, blocking};
use crate::net;
use crate::records::{DomainRecord, End, EndReason, OutgoingRecord, Run};
use crate::wanted::{Assigned, Disk, Outgoing, Role, Wanted};

/// After a start, the VMM's first word is waited for so long before others may start.
const FIRST_WORD_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a VMM that is starting is called.
const FIRST_WORD_INTERVAL: Duration = Duration::from_millis(20);

impl Domain {
    pub(super) async fn act(&mut self, action: Action) -> Result<(), Error> {
        tracing::debug!(uid = self.uid, domain = self.name(), ?action, "acts");
        match action {
            Action::Nothing | Action::WaitUntil(_) | Action::Refuse(_) => Ok(()),
            Action::Adopt => self.adopt().await,
            Action::AwaitDisks => self.await_disks().await,
            Action::Settle => self.settle().await,
            Action::Start | Action::StartIncoming => self.start().await,
            Action::PrepareIncoming => self.prepare_incoming().await,
            Action::StartMigration => self.start_migration().await,
            Action::CancelMigration => self.cancel_migration().await,
            Action::TakeOver => self.take_over().await,
            Action::UpdateDisks => self.update_disks().await,
            Action::AttachDisk(index) => self.attach_disk(index).await,
            Action::DetachDisk(serial) => self.detach_disk(&serial).await,
            Action::Save => self.save_guest().await,
            Action::PowerButton => self.power_button().await,
            Action::Quit => self.quit().await,
            Action::Kill => self.kill(),
            Action::Remove => self.remove().await,
        }
    }

    pub(super) fn assigned(&self) -> Result<Assigned, Error> {
        // decide() asks for these actions only with an assignment.
        self.wanted.assigned().cloned().ok_or(Error::Ended("assignment"))
    }

    pub(super) fn client(&self) -> Result<VmmClient, Error> {
        self.link.client().ok_or_else(|| Error::Domain("the VMM does not answer".into()))
    }

    /// The record as the assignment changes it, before anything is done under it.
    fn record_for(&self, assigned: &Assigned) -> DomainRecord {
        let mut record = self.record.clone().unwrap_or_default();
        record.uid.clone_from(&self.uid);
        record.name.clone_from(&assigned.name);
        record.epoch = record.epoch.max(assigned.epoch);
        if let Role::Owner(owner) = &assigned.role {
            record.start_generation = Some(owner.start_generation);
        }
        record
    }

    async fn adopt(&mut self) -> Result<(), Error> {
        let assigned = self.assigned()?;
        let record = self.record_for(&assigned);
        self.save(record).await
    }

    /// The record of a domain that is to be started, and whose last VMM's end is history. An
    /// earlier hand-over is, too: the assignment's epoch is greater than what it went to.
    async fn await_disks(&mut self) -> Result<(), Error> {
        let assigned = self.assigned()?;
        let mut record = self.record_for(&assigned);
        record.crash_restarts = self.crash_restarts_after(&assigned);
        record.end = None;
        self.save(record).await
    }

    /// Starts a VMM, to boot the guest or to wait for it. What makes it impossible is written
    /// down as the end of a VMM that never was: it is reported, and not tried for ever.
    async fn start(&mut self) -> Result<(), Error> {
        let assigned = self.assigned()?;
        let incoming = match &assigned.role {
            Role::Incoming { migration_id, .. } => Some(migration_id.clone()),
            Role::Owner(_) => None,
        };
        let mut record = self.record_for(&assigned);
        record.crash_restarts = self.crash_restarts_after(&assigned);
        // Before the queue: a pool that hangs keeps no other domain from its start.
        let opened = match self.open_disks(&assigned).await {
            Ok(opened) => opened,
            Err(error) => return self.could_not_start(record, &assigned, incoming, &error).await,
        };
        let shared = self.shared.clone();
        let Ok(_permit) = shared.starts.acquire().await else {
            return Err(Error::Ended("start queue"));
        };
        // Nothing begins to write to disks that are being read.
        let _turn = shared.quiescer.turn(&self.uid)?;
        if self.wanted_source.has_changed().unwrap_or(true) {
            // Something else may be wanted after the wait: decide again.
            return Ok(());
        }
        tracing::info!(
            uid = self.uid,
            domain = assigned.name,
            epoch = assigned.epoch,
            incoming = incoming.is_some(),
            "starts the VMM"
        );
        let config = match self.prepare_start(&assigned, opened, incoming.is_none()).await {
            Ok(config) => config,
            Err(error) => return self.could_not_start(record, &assigned, incoming, &error).await,
        };
        // From here on a VMM may exist: the record says so first, and knows its epoch.
        record.end = None;
        record.run = Some(Run {
            epoch: assigned.epoch,
            incoming: incoming.clone(),
            boot_id: self.shared.boot_id.clone(),
            pid: None,
            ran: false,
            restore: restores(self.record.as_ref(), &assigned).map(|memory| memory.volume.clone()),
        });
        self.save(record.clone()).await?;
        let told_disks = Some(self.live_disks.clone());
        self.progress = Progress { told_disks, ..Progress::default() };
        if let Err(error) = self.spawn(config, incoming.is_some()).await {
            record.run = None;
            return self.could_not_start(record, &assigned, incoming, &error).await;
        }
        self.await_first_word().await;
        Ok(())
    }

    /// Restarts in a row, if this start comes of a crash and not of the operator.
    fn crash_restarts_after(&self, assigned: &Assigned) -> u32 {
        let Some(record) = &self.record else { return 0 };
        // It waited for its disks since.
        let Some(end) = &record.end else { return record.crash_restarts };
        let asked = match &assigned.role {
            Role::Owner(owner) => record.start_generation != Some(owner.start_generation),
            Role::Incoming { .. } => true,
        };
        let crashed = matches!(end.reason, EndReason::Crash | EndReason::Killed | EndReason::Error);
        match crashed && !asked && !end.ordered && assigned.epoch == end.epoch {
            true => record.crash_restarts + 1,
            false => 0,
        }
    }

    /// Where the domain's volumes can be opened now.
    async fn open_disks(&self, assigned: &Assigned) -> Result<Opened, Error> {
        let storage = self.storage.clone();
        let disks = assigned.disks.clone();
        let assigned_pools: Vec<String> = disks.iter().map(|disk| disk.pool.clone()).collect();
        let rescue = assigned.rescue;
        let memory = restores(self.record.as_ref(), assigned).cloned();
        blocking(move || {
            let activate = |name: &str, disk: &Disk| {
                storage
                    .activate(&disk.pool, &disk.volume)
                    .map_err(|err| Error::Domain(format!("{name}: {err}")))
            };
            let disks = disks.iter().enumerate().map(|(index, disk)| match (rescue, index) {
                (true, 0) => activate("the rescue disk", disk),
                (true, index) => activate(&format!("disk {index}"), disk),
                (false, index) => activate(&format!("disk {}", index + 1), disk),
            });
            let pools = assigned_pools.into_iter().filter(|pool| storage.is_shared(pool));
            Ok(Opened {
                shared_pools: pools.collect(),
                disks: disks.collect::<Result<_, _>>()?,
                memory: memory.map(|memory| activate("the saved memory", &memory)).transpose()?,
            })
        })
        .await
    }

    async fn prepare_start(
        &self,
        assigned: &Assigned,
        opened: Opened,
        boots: bool,
    ) -> Result<drover_hv::config::DomainConfig, Error> {
        let shared = self.shared.clone();
        let files = self.files.clone();
        let uid = self.uid.clone();
        let assigned = assigned.clone();
        blocking(move || {
            let spec = &assigned.spec;
            // First what changes nothing.
            let names: Vec<String> =
                (0..spec.interfaces.len()).map(|index| net::tap_name(&uid, index)).collect();
            let seed = seeding::seed_bytes(&uid, &assigned)?;
            let seed_path = seed.as_ref().map(|_| files.seed.as_path());
            let config = files::domain_config(&uid, &assigned, &names, &opened, seed_path)?;
            if boots {
                files::check_boot_files(&config, &shared.node)?;
            }
            net::ensure_taps(&uid, &spec.interfaces, &shared.bridge, &shared.node)?;
            // The last VMM's words have been taken in; the next one's must not be mixed up.
            drover_storage::create_dir(&files.dir)?;
            drover_storage::remove(&files.exit)?;
            drover_storage::remove(&files.handover)?;
            drover_storage::remove(&files.held)?;
            seeding::place(&files.seed, seed.as_deref())?;
            Ok(config)
        })
        .await
    }

    async fn could_not_start(
        &mut self,
        mut record: DomainRecord,
        assigned: &Assigned,
        incoming: Option<String>,
        error: &Error,
    ) -> Result<(), Error> {
        let detail = self.in_a_customers_words(error.to_string()).await;
        tracing::warn!(uid = self.uid, domain = assigned.name, error = detail, "could not start");
        // An earlier hand-over is history: the record's epoch is greater than what it went to.
        record.end = Some(End {
            epoch: assigned.epoch,
            incoming,
            ran: false,
            reason: EndReason::Error,
            detail,
            ordered: false,
            handover: None,
        });
        self.progress.ended_ms = self.now_ms();
        self.save(record).await
    }

    /// A VMM speaks of paths on the node; a customer knows the first, the second … disk.
    async fn in_a_customers_words(&self, detail: String) -> String {
        let config = self.files.config.clone();
        let plain = detail.clone();
        blocking(move || Ok(files::name_disks(detail, &config))).await.unwrap_or(plain)
    }

    /// Waits until the new VMM answers or ends, for a while.
    async fn await_first_word(&mut self) {
        let until = Instant::now() + FIRST_WORD_TIMEOUT;
        while Instant::now() < until {
            if self.call_up().await.is_ok() {
                self.learn().await;
                return;
            }
            tokio::select! {
                event = self.link.event() => {
                    let now_ms = self.now_ms();
                    let ended = matches!(event, Event::Ended);
                    self.link.take(event, now_ms);
                    if ended {
                        return;
                    }
                }
                () = tokio::time::sleep(FIRST_WORD_INTERVAL) => {}
            }
        }
    }

    /// Writes down how the VMM ended.
    async fn settle(&mut self) -> Result<(), Error> {
        let Some(mut record) = self.record.clone() else { return Ok(()) };
        let Some(run) = record.run.take() else { return Ok(()) };
        let files = self.files.clone();
        let leaving = self.wanted == Wanted::Absent;
        let (exit, handover, last_line) = blocking(move || {
            let handover = match files::read_handover(&files.handover) {
                Err(error) if !leaving => return Err(error),
                handover => handover.unwrap_or_default(),
            };
            Ok((
                files::ExitFile::read(&files.exit),
                handover,
                files::last_log_line(&files.log).unwrap_or_default(),
            ))
        })
        .await?;
        let (reason, detail) = self.why_it_ended(&run, exit, last_line);
        let detail = self.in_a_customers_words(detail).await;
        let told = self.progress.button_ms.is_some() || self.progress.quit_ms.is_some();
        let ordered = told || self.wanted.wants_end();
        let lived = self.live_since.map_or(Duration::ZERO, |since| since.elapsed());
        if lived >= CRASH_FORGIVEN_AFTER {
            record.crash_restarts = 0;
        }
        tracing::info!(
            uid = self.uid,
            domain = record.name,
            ?reason,
            detail,
            handed_over = handover.is_some(),
            "the VMM has ended"
        );
        // Only a guest that ran ends like this, even if it was too quick to be seen.
        let ran = run.ran
            || matches!(
                reason,
                EndReason::Shutdown | EndReason::Reboot | EndReason::Crash | EndReason::Saved
            );
        if ran && run.restore.is_some() {
            record.restored = run.restore;
        }
        record.end = Some(End {
            // A promise made before this run's epoch has been overruled since.
            handover: handover.filter(|handover| handover.to_epoch > run.epoch),
            epoch: run.epoch,
            incoming: run.incoming,
            ran,
            reason,
            detail,
            ordered,
        });
        self.save(record).await?;
        self.progress = Progress { ended_ms: self.now_ms(), ..Progress::default() };
        self.live_since = None;
        self.link = Link::gone();
        Ok(())
    }

    fn why_it_ended(
        &self,
        run: &Run,
        exit: Option<files::ExitFile>,
        last_line: String,
    ) -> (EndReason, String) {
        if let Some(exit) = exit {
            let detail = if exit.detail.is_empty() { last_line } else { exit.detail.clone() };
            if exit.reason() == EndReason::Saved {
                // It speaks of a path.
                return (EndReason::Saved, String::new());
            }
            let quiet = matches!(exit.reason(), EndReason::Shutdown | EndReason::Reboot);
            return (exit.reason(), if quiet { exit.detail } else { detail });
        }
        if run.boot_id != self.shared.boot_id {
            return (EndReason::HostRebooted, format!("host {} rebooted", self.shared.node));
        }
        if let Some(status) = self.link.exit_status {
            return match status.code() {
                Some(_) if last_line.is_empty() => (EndReason::Error, describe(status)),
                Some(_) => (EndReason::Error, last_line),
                None => (EndReason::Killed, describe(status)),
            };
        }
        if run.pid.is_none() {
            return (EndReason::Interrupted, "the agent ended while it was starting it".into());
        }
        (EndReason::Killed, "the VMM was killed: it left no exit record".into())
    }

    async fn prepare_incoming(&mut self) -> Result<(), Error> {
        let assigned = self.assigned()?;
        let Role::Incoming { migration_id, token } = assigned.role else { return Ok(()) };
        let mut client = self.client()?;
        let request = PrepareIncomingRequest {
            migration_id: migration_id.clone(),
            token,
            listen_address: self.shared.migration_listen.clone(),
            epoch: assigned.epoch,
        };
        match client.prepare_incoming(request).await {
            Ok(address) => {
                tracing::info!(uid = self.uid, migration = migration_id, address, "listens");
                self.progress.prepared = Some(migration_id);
                self.refresh(&mut client).await
            }
            Err(error) if is_refusal(&error) => {
                self.progress.prepare_failed = Some((migration_id, error.to_string()));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn start_migration(&mut self) -> Result<(), Error> {
        let Some(outgoing) = self.outgoing() else { return Ok(()) };
        // A guest that is frozen is thawed by this node.
        let _turn = self.shared.quiescer.turn(&self.uid)?;
        let mut client = self.client()?;
        let id = outgoing.migration_id.clone();
        let request = StartMigrationRequest {
            migration_id: outgoing.migration_id,
            address: outgoing.address,
            token: outgoing.token,
            to_epoch: outgoing.to_epoch,
            limits: outgoing.limits,
        };
        let error = match client.start_migration(request).await {
            Ok(status) => {
                tracing::info!(uid = self.uid, domain = self.name(), migration = id, "migrates");
                self.link.set_status(status);
                None
            }
            Err(error) if is_refusal(&error) => Some(error.to_string()),
            Err(error) => return Err(error),
        };
        // An agent that dies before this line sees the migration in the VMM's status.
        let mut record = self.record.clone().unwrap_or_default();
        let pid = self.link.pid();
        record.outgoing = Some(OutgoingRecord { migration_id: id, error, pid });
        self.save(record).await?;
        self.learn().await;
        Ok(())
    }

    fn outgoing(&self) -> Option<Outgoing> {
        self.wanted.owner().and_then(|owner| owner.outgoing.clone())
    }

    async fn cancel_migration(&mut self) -> Result<(), Error> {
        let Some(outgoing) = self.outgoing() else { return Ok(()) };
        let id = outgoing.migration_id;
        match self.client()?.cancel_migration(id.clone()).await {
            Ok(status) => self.link.set_status(status),
            // Too late: it has handed over, or it had ended already. The status says which.
            Err(error) if is_refusal(&error) => {
                tracing::info!(uid = self.uid, migration = id, %error, "cannot be cancelled");
            }
            Err(error) => return Err(error),
        }
        self.progress.cancelled = Some(id);
        self.learn().await;
        Ok(())
    }

    /// Runs the guest here under the assignment's epoch, which is on disk before the VMM is told.
    async fn take_over(&mut self) -> Result<(), Error> {
        let assigned = self.assigned()?;
        let before = self.link.status().map(VmmStatus::state);
        // The start generation is as it was: taking over is no start.
        let mut record = self.record_for(&assigned);
        self.save(record.clone()).await?;
        let mut client = self.client()?;
        match client.take_over(assigned.epoch).await {
            Ok(status) => {
                tracing::info!(
                    uid = self.uid,
                    domain = assigned.name,
                    epoch = assigned.epoch,
                    ?before,
                    "takes over"
                );
                self.link.set_status(status);
            }
            // A guest that runs goes on under the new epoch: the record is what enforces it.
            Err(error)
                if is_refusal(&error)
                    && matches!(before, Some(VmmState::Running | VmmState::Paused)) =>
            {
                if let Some(run) = &mut record.run {
                    run.epoch = assigned.epoch;
                }
                self.save(record).await?;
            }
            Err(error) => return Err(error),
        }
        // Its status says when it runs, and under which epoch; that is written down then.
        self.progress.taken_over = Some(assigned.epoch);
        self.learn().await;
        Ok(())
    }

    /// Tells the VMM what it does not know of its disks. Whatever it was told before an error, it
    /// is told again.
    async fn update_disks(&mut self) -> Result<(), Error> {
        let mut client = self.client()?;
        let disks = self.live_disks.clone();
        let told = self.progress.told_disks.take().unwrap_or_default();
        for disk in &disks {
            let before = told.iter().find(|before| before.serial == disk.serial);
            if before.is_none_or(|before| before.limits != disk.limits) {
                tracing::info!(uid = self.uid, ?disk, "tells the VMM of limits");
                client.set_disk_limits(&disk.serial, disk.limits).await?;
            }
            let grown = before.is_none_or(|before| before.size_bytes != disk.size_bytes);
            if grown && disk.size_bytes > 0 {
                tracing::info!(uid = self.uid, ?disk, "tells the VMM of a size");
                client.grow_disk(&disk.serial).await?;
            }
        }
        self.progress.told_disks = Some(disks);
        Ok(())
    }

    async fn power_button(&mut self) -> Result<(), Error> {
        let status = self.client()?.power_button().await;
        // The grace period counts from here whether or not the guest could be told.
        self.progress.button_ms = Some(self.now_ms());
        match status {
            Ok(status) => self.link.set_status(status),
            Err(error) => tracing::warn!(uid = self.uid, %error, "cannot press the power button"),
        }
        Ok(())
    }

    async fn quit(&mut self) -> Result<(), Error> {
        self.progress.quit_ms = Some(self.now_ms());
        if let Err(error) = self.client()?.quit().await {
            // It may have ended before it could answer; if not, it is killed in a while.
            tracing::debug!(uid = self.uid, %error, "quit");
        }
        Ok(())
    }

    fn kill(&mut self) -> Result<(), Error> {
        tracing::warn!(
            uid = self.uid,
            domain = self.name(),
            pid = self.link.pid(),
            "kills the VMM"
        );
        self.link.kill()?;
        self.progress.killed = true;
        Ok(())
    }

    /// Removes all that is left of the domain, the record last.
    async fn remove(&mut self) -> Result<(), Error> {
        let files = self.files.clone();
        let uid = self.uid.clone();
        blocking(move || {
            net::remove_taps(&uid)?;
            remove_dir(&files.run_dir)?;
            if !files.dir.exists() {
                return Ok(());
            }
            for path in [&files.config, &files.exit, &files.lock, &files.log, &files.seed] {
                drover_storage::remove(path)?;
            }
            // These two keep the domain from being run again by mistake.
            drover_storage::remove(&files.handover)?;
            drover_storage::remove(&files.record)?;
            remove_dir(&files.dir)
        })
        .await?;
        if let Some(record) = &self.record {
            tracing::info!(uid = self.uid, domain = record.name, "removed what was left of it");
        }
        self.record = None;
        self.record_damage = None;
        Ok(())
    }

    async fn refresh(&mut self, client: &mut VmmClient) -> Result<(), Error> {
        let status = client.status().await?;
        self.link.set_status(status);
        self.learn().await;
        Ok(())
    }
}

fn remove_dir(path: &std::path::Path) -> Result<(), Error> {
    match std::fs::remove_dir_all(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io("remove", path, err))
        }
        _ => Ok(()),
    }
}
