//! What a source tells of its migration.

use std::time::{Duration, Instant};

use drover_proto::agent::v1::{MigrationProgress, MigrationRole, ObservedMigration};
use drover_proto::v1::MigrationPhase;

use super::super::MigrationError;
use super::super::policy::{Limits, Progress, Stop};
use super::{Source, SourceState};

/// How often counters alone are reported.
const REPORT_INTERVAL: Duration = Duration::from_millis(200);

impl Source<'_, '_> {
    /// Tells the observer; counters alone not too often.
    pub(super) fn report(&mut self, state: SourceState, now: bool) {
        let report = &mut self.report;
        if !now && self.reported.is_some_and(|last| last.elapsed() < REPORT_INTERVAL) {
            return;
        }
        // Inside the pause nobody is told: it would be paid by the guest.
        let paused = [
            SourceState::Stopping,
            SourceState::Sending,
            SourceState::AwaitingReady,
            SourceState::HandingOver,
            SourceState::Releasing,
            SourceState::Committing,
            SourceState::Resuming,
        ];
        if paused.contains(&state) {
            return;
        }
        report.total_us = self.started.elapsed().as_micros() as u64;
        report.pause_us = report.pause_stop_us
            + report.pause_memory_us
            + report.pause_state_us
            + report.pause_commit_us;
        let (progress, phase) = match state {
            SourceState::Succeeded => (MigrationProgress::Succeeded, MigrationPhase::Done),
            SourceState::HandedOver | SourceState::Relocking | SourceState::TakingOver => {
                (MigrationProgress::HandedOver, MigrationPhase::HandedOver)
            }
            SourceState::Failed | SourceState::Owner => {
                (MigrationProgress::Failed, MigrationPhase::Aborting)
            }
            SourceState::CopyingDisks if self.config.shape.disk_bytes() > 0 => {
                (MigrationProgress::Copying, MigrationPhase::CopyingDisks)
            }
            _ => (MigrationProgress::Copying, MigrationPhase::Copying),
        };
        report.phase = phase as i32;
        self.reported = Some(Instant::now());
        let observed = ObservedMigration {
            id: self.config.migration_id.clone(),
            role: MigrationRole::Source as i32,
            progress: progress as i32,
            report: Some(report.clone()),
            error: self.error.as_ref().map_or_else(String::new, ToString::to_string),
            ..Default::default()
        };
        (self.observer)(&observed);
    }
}

pub(super) fn gave_up(stop: Stop, progress: &Progress, limits: &Limits) -> MigrationError {
    let left = progress.remaining >> 10;
    let rate = progress.rate >> 10;
    let tried = match stop {
        Stop::Rounds => format!("{} passes (limits.rounds_max)", limits.rounds_max),
        Stop::Bytes => format!("{} bytes (limits.bytes_max)", limits.bytes_max),
        Stop::Time | Stop::Converged => format!("{:?} (limits.total_time)", limits.total_time),
    };
    MigrationError::Limits(format!(
        "the copy does not fit {tried}: the guest writes faster than it goes over; {left} KiB are \
         left at {rate} KiB/s, for a pause of {:?}",
        limits.downtime
    ))
}
