//! The source's disks: what has to go over, and the passes in which it does.

use std::time::Instant;

use super::super::MigrationError;
use super::super::blocks::Pass;
use super::super::policy::{self, DiskDecision, Progress, Stop};
use super::super::wire;
use super::{Pacer, Parcel, Source, SourceEvent, SourceState, gave_up};
use crate::machine::migratable::{MigratableDisk, MigratableVm};
use crate::virtio::blk::Closed;
use crate::virtio::blk::tracker::BlockSet;

/// The disks whose content goes over.
#[derive(Default)]
pub(super) struct Disks {
    /// With their numbers in the shape.
    local: Vec<(u32, MigratableDisk)>,
    /// All of them, shared ones too.
    all: Vec<MigratableDisk>,
    /// As the destination said: those that read as zeros there.
    zeroed: Vec<bool>,
    /// What the next pass sends, disk by disk; `None` before the first.
    dirty: Option<Vec<BlockSet>>,
    pub(super) remaining_before: Option<u64>,
    /// What they were open by, until the destination runs.
    closed: Vec<Closed>,
}

impl Disks {
    pub(super) fn of(vm: &dyn MigratableVm) -> Self {
        let all = vm.disks().to_vec();
        let local = (0..).zip(all.iter().cloned()).filter(|(_, disk)| !disk.shared).collect();
        Self { local, all, ..Self::default() }
    }

    /// WELCOME said which read as zeros there.
    pub(super) fn welcome(&mut self, payload: &[u8]) -> Result<(), crate::state::StateError> {
        self.zeroed = wire::decode_welcome(payload, self.all.len())?;
        Ok(())
    }

    fn start_tracking(&self) {
        for (_, disk) in &self.local {
            disk.volume.tracker().start(disk.volume.bytes());
        }
    }

    /// Nobody wants to know any more what is written.
    pub(super) fn stop_tracking(&self) {
        for (_, disk) in &self.local {
            disk.volume.tracker().stop();
        }
    }

    /// Adds what was written since to what the next pass sends; answers how much that is.
    pub(super) fn gather(&mut self) -> u64 {
        let Some(dirty) = &mut self.dirty else { return 0 };
        for (blocks, (_, disk)) in dirty.iter_mut().zip(&self.local) {
            blocks.merge(&disk.volume.tracker().take(disk.volume.bytes()));
        }
        dirty.iter().map(BlockSet::bytes).sum()
    }

    /// What the next pass sends; nothing is left.
    fn take(&mut self) -> Vec<BlockSet> {
        let none = self.local.iter().map(|(_, disk)| BlockSet::none(disk.volume.bytes()));
        self.dirty.replace(none.collect()).unwrap_or_default()
    }

    /// What lies in this node's cache is not seen by the other.
    pub(super) fn sync_shared(&self) -> Result<(), MigrationError> {
        let shared = self.all.iter().enumerate().filter(|(_, disk)| disk.shared);
        for (index, disk) in shared.filter(|(_, disk)| !disk.volume.is_read_only()) {
            disk.volume.sync().map_err(MigrationError::disk(index, "making it durable"))?;
        }
        Ok(())
    }

    /// Closes all of them: their locks are free, and nothing can be written from here. What the
    /// system has cached of local ones is of no use to anybody, so nobody waits for it to be
    /// written; a shared one is the destination's from here on.
    pub(super) fn release(&mut self) -> Result<(), MigrationError> {
        for (index, disk) in self.all.iter().enumerate() {
            let closed = disk.volume.close();
            let closed = closed.map_err(MigrationError::disk(index, "letting go of it"))?;
            if !disk.shared {
                self.closed.push(closed);
            }
        }
        Ok(())
    }
}

impl Source<'_, '_> {
    /// One pass over the disks: all that is allocated, or what was written since the last one.
    pub(super) fn copy_disks(&mut self) -> Result<SourceEvent, MigrationError> {
        if self.disks.local.is_empty() {
            return Ok(SourceEvent::DisksCopied);
        }
        let began = Instant::now();
        let before = self.report.bytes_sent;
        self.send_disks(&mut Pacer::begin(), SourceState::CopyingDisks)?;
        self.end_pass(began, before)?;
        let remaining = self.disks.gather();
        let progress = Progress {
            rounds: self.copied.passes,
            remaining,
            remaining_before: self.disks.remaining_before.replace(remaining),
            sent: self.report.bytes_sent,
            elapsed: self.started.elapsed(),
            rate: self.copied.rate,
        };
        self.report.remaining_bytes = remaining;
        self.report.disk_remaining_bytes = remaining;
        tracing::debug!(?progress, "a pass over the disks is done");
        match policy::decide_disks(&progress, &self.config.limits) {
            DiskDecision::Copy => Ok(SourceEvent::RoundDone),
            DiskDecision::Memory => Ok(SourceEvent::DisksCopied),
            DiskDecision::GiveUp(stop) => {
                self.report.stop_reason = stop.name().to_owned();
                Err(gave_up(stop, &progress, &self.config.limits))
            }
        }
    }

    /// Sends what the disks' next pass has to, in this state.
    pub(super) fn send_disks(
        &mut self,
        pacer: &mut Pacer,
        state: SourceState,
    ) -> Result<(), MigrationError> {
        if self.disks.local.is_empty() {
            return Ok(());
        }
        let fresh = self.disks.dirty.is_none();
        if fresh {
            // From here on every write is noted; so what is read now and written later, or
            // meanwhile, is.
            self.disks.start_tracking();
        }
        let mut blocks = self.disks.take().into_iter();
        let zeroed = self.disks.zeroed.clone();
        let local = self.disks.local.clone();
        let mut passes: Vec<Pass<'_>> = local
            .iter()
            .map(|(number, disk)| match blocks.next() {
                Some(blocks) => Pass::blocks(&disk.volume, *number, blocks),
                None => Pass::all(&disk.volume, *number, zeroed[*number as usize]),
            })
            .collect();
        let mut buffer = self.spares.take();
        let mut left: u64 = passes.iter().map(Pass::left).sum();
        if left > 0 || fresh {
            self.report.disk_rounds += 1;
        }
        for pass in &mut passes {
            loop {
                self.may_go_on()?;
                let disk = pass.disk() as usize;
                let before = pass.left();
                let next = pass.next(&mut buffer);
                let Some(batch) = next.map_err(MigrationError::disk(disk, "reading it"))? else {
                    break;
                };
                left = left.saturating_sub(before.saturating_sub(pass.left()));
                self.report.disk_remaining_bytes = left;
                self.report.disk_zero_bytes += batch.zero_bytes;
                if !batch.extents.is_empty() {
                    let told = batch.told_bytes();
                    self.report.disk_bytes_sent += batch.data_bytes as u64;
                    let parcel = Parcel::blocks(batch, buffer);
                    pacer.count(parcel.bytes());
                    self.deliver(parcel)?;
                    self.told(told)?;
                    buffer = self.spares.take();
                }
                if self.pause.is_none() {
                    self.report.remaining_bytes = left;
                    self.pace(pacer)?;
                    self.report(state, false);
                }
            }
        }
        self.spares.give(Some(buffer));
        Ok(())
    }

    /// Between two messages of the disks, of which there may be hours full.
    fn may_go_on(&mut self) -> Result<(), MigrationError> {
        if self.control.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        let elapsed = self.started.elapsed();
        let limits = &self.config.limits;
        if self.pause.is_none() && elapsed >= limits.total_time {
            let stop = Stop::Time;
            self.report.stop_reason = stop.name().to_owned();
            let remaining = self.report.disk_remaining_bytes;
            let progress = Progress { remaining, rate: self.copied.rate, ..Default::default() };
            return Err(gave_up(stop, &progress, limits));
        }
        Ok(())
    }
}
