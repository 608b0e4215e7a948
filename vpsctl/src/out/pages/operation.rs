//! Operations, and what a migration was.

use std::time::SystemTime;

use drover_proto::v1::{MigrationReport, Operation, OperationKind};

use super::{Page, moves::moves_done};
use crate::out::{
    human::{
        age, count, elapsed, enum_name, operation_title, or_dash, plural, short, short_or_dash,
        size, time, time_us,
    },
    table::Table,
};

/// The operations, as the controller orders them.
pub(crate) fn operations(operations: &[Operation], now: SystemTime) -> String {
    let mut table = Table::new(&["ID", "WHAT", "STATE", "DONE", "AGE", "TOOK", "MESSAGE"]);
    for operation in operations {
        table.row(vec![
            short(&operation.name).to_owned(),
            operation_title(operation),
            enum_name(operation.state().as_str_name(), "OPERATION_STATE_"),
            format!("{}%", operation.progress_percent),
            age(operation.create_time.as_ref(), now),
            took(operation, now).unwrap_or_else(|| "-".to_owned()),
            operation_message(operation),
        ]);
    }
    table.render()
}

fn operation_message(operation: &Operation) -> String {
    match &operation.error {
        Some(error) if error.reason.is_empty() => error.message.clone(),
        Some(error) => format!("{} ({})", error.message, error.reason),
        None => operation.status_message.clone(),
    }
}

/// How long a finished operation took.
fn took(operation: &Operation, now: SystemTime) -> Option<String> {
    let whole = elapsed(operation.create_time.as_ref(), now)?;
    let since_end = elapsed(Some(operation.finish_time.as_ref()?), now)?;
    Some(time(whole.saturating_sub(since_end)))
}

/// One operation, with the report or the moves that it has.
pub(crate) fn operation(operation: &Operation, now: SystemTime) -> String {
    let mut page = Page::default();
    page.line("operation", short(&operation.name));
    page.line("what", &operation_title(operation));
    let state = enum_name(operation.state().as_str_name(), "OPERATION_STATE_");
    page.line("state", &format!("{state}, {}%", operation.progress_percent));
    page.line("message", &operation_message(operation));
    if operation.cancel_requested && operation.finish_time.is_none() {
        page.line("cancel", "asked for");
    }
    page.line("part of", short(&operation.parent));
    page.line("began", &format!("{} ago", age(operation.create_time.as_ref(), now)));
    page.line("took", &took(operation, now).unwrap_or_default());
    if operation.resumed_count > 0 {
        page.line("resumed", &format!("{}, by a new leader", times(operation.resumed_count)));
    }
    if let Some(report) = operation.migration.as_ref().filter(|r| r.memory_bytes > 0) {
        page.text.push('\n');
        page.text.push_str(&migration(&operation.target, report));
    }
    if !operation.moves.is_empty() {
        page.text.push('\n');
        page.text.push_str(&moves_done(&operation.moves));
    }
    page.text
}

fn times(number: u32) -> String {
    plural(number as usize, "time")
}

/// What a migration did: size, rate, and the pause in its parts.
pub(crate) fn migration(domain: &str, report: &MigrationReport) -> String {
    let mut page = Page::default();
    let phase = enum_name(report.phase().as_str_name(), "MIGRATION_PHASE_");
    let (from, to) = (short_or_dash(&report.from_node), short_or_dash(&report.to_node));
    page.line("migration", &format!("{} from {from} to {to}, {phase}", short(domain)));
    page.line("total time", &time_us(report.total_us));
    let sent = format!(
        "{} of {} in {}: {} pages, {} zero pages left out",
        size(report.bytes_sent),
        size(report.memory_bytes),
        plural(report.rounds as usize, "round"),
        count(report.pages_sent),
        count(report.zero_pages),
    );
    page.line("sent", &sent);
    let why = enum_name(&report.stop_reason, "");
    let rate =
        format!("{}/s, pre-copy ended: {}", size(report.rate_bytes_per_second), or_dash(&why));
    page.line("rate", &rate);
    page.line("disks", &disks_text(report));
    page.line("pause", &time_us(report.pause_us));
    for (part, us) in [
        ("stop the vCPUs and devices", report.pause_stop_us),
        ("last pages", report.pause_memory_us),
        ("device state, until ready", report.pause_state_us),
        ("hand over, until running", report.pause_commit_us),
    ] {
        page.line("", &format!("{:>9}  {part}", time_us(us)));
    }
    page.text
}

/// `3.2 GiB of 10 GiB in 4 passes, 7 GiB of zeros left out`; empty where no disk was copied.
fn disks_text(report: &MigrationReport) -> String {
    if report.disk_bytes_total == 0 {
        return String::new();
    }
    let passes = match report.disk_rounds {
        1 => "1 pass".to_owned(),
        number => format!("{number} passes"),
    };
    format!(
        "{} of {} in {passes}, {} of zeros left out",
        size(report.disk_bytes_sent),
        size(report.disk_bytes_total),
        size(report.disk_zero_bytes),
    )
}

/// One sentence on what an operation that succeeded has done.
pub(crate) fn done(operation: &Operation, now: SystemTime) -> String {
    let target = short(&operation.target);
    let what = match operation.kind() {
        OperationKind::StartDomain => format!("{target} is started"),
        OperationKind::StopDomain => format!("{target} is stopped"),
        OperationKind::DeleteDomain => format!("{target} is deleted"),
        OperationKind::MigrateDomain => {
            let report = operation.migration.clone().unwrap_or_default();
            let to = short(&report.to_node);
            match report.disk_bytes_total {
                0 => format!("{target} is on {to} now; it does not run"),
                bytes => format!(
                    "{target} is on {to} now, with its disks of {}; it does not run",
                    size(bytes)
                ),
            }
        }
        OperationKind::ResizeDomain => format!("{target} is resized"),
        OperationKind::ReinstallDomain => format!("{target} has a new disk, and is stopped"),
        OperationKind::RescueDomain => format!("{target} runs from its rescue disk"),
        OperationKind::EndRescue => format!("{target} starts from its own disks again"),
        OperationKind::SaveDomain => format!("{target} is saved"),
        OperationKind::CreateSnapshot => format!("the snapshot of {target} is taken"),
        OperationKind::RestoreSnapshot => format!("the disks of {target} are put back"),
        OperationKind::CreateVolume => format!("{target} is created"),
        OperationKind::BalanceCluster if operation.moves.is_empty() => {
            return "nothing to move\n".to_owned();
        }
        _ => format!("{}: done", operation_title(operation)),
    };
    match took(operation, now) {
        Some(took) => format!("{what} (took {took})\n"),
        None => format!("{what}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pause is shown with its parts, in one unit a line.
    #[test]
    fn a_migration_report_breaks_the_pause() {
        let mut report = MigrationReport {
            from_node: "nodes/host1".to_owned(),
            to_node: "nodes/host2".to_owned(),
            rounds: 3,
            memory_bytes: 128 << 20,
            bytes_sent: 140 << 20,
            pages_sent: 35_840,
            zero_pages: 12_000,
            rate_bytes_per_second: 100 << 20,
            total_us: 1_800_000,
            pause_us: 30_000,
            pause_stop_us: 1_000,
            pause_memory_us: 12_000,
            pause_state_us: 10_000,
            pause_commit_us: 7_000,
            stop_reason: "CONVERGED".to_owned(),
            disk_bytes_total: 10 << 30,
            disk_bytes_sent: 3 << 30,
            disk_zero_bytes: 7 << 30,
            disk_rounds: 4,
            ..MigrationReport::default()
        };
        report.set_phase(drover_proto::v1::MigrationPhase::Done);
        let text = migration("domains/web1", &report);
        for line in [
            "migration     web1 from host1 to host2, done",
            "total time    1.8 s",
            "sent          140 MiB of 128 MiB in 3 rounds: 35,840 pages, 12,000 zero pages left out",
            "rate          100 MiB/s, pre-copy ended: converged",
            "disks         3 GiB of 10 GiB in 4 passes, 7 GiB of zeros left out",
            "pause         30.0 ms",
            "                12.0 ms  last pages",
        ] {
            assert!(text.lines().any(|l| l == line), "no \"{line}\" in\n{text}");
        }
    }
}
