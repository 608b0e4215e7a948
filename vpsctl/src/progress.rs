//! How an operation goes, on stderr: bars on a terminal, a line for each change elsewhere.

use std::{collections::BTreeMap, io::IsTerminal, time::Duration};

use drover_proto::v1::{MigrationPhase, MigrationReport, MoveState, Operation, PlannedMove};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::out::human::{enum_name, operation_title, short, short_or_dash, size, time_us};

/// Shows one operation until it is dropped.
pub(crate) enum Progress {
    /// On a terminal: one bar for the operation and one for each move.
    Bars(Bars),
    /// Elsewhere: what changed, a line each.
    Lines(Lines),
}

impl Progress {
    /// Bars when stderr is a terminal.
    pub(crate) fn new() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bars(Bars::default())
        } else {
            Self::Lines(Lines::default())
        }
    }

    /// Shows the operation as it is now.
    pub(crate) fn update(&mut self, operation: &Operation) {
        match self {
            Self::Bars(bars) => bars.update(operation),
            Self::Lines(lines) => {
                for line in lines.changes(operation) {
                    eprintln!("{line}");
                }
            }
        }
    }

    /// A remark between the bars.
    pub(crate) fn note(&self, text: &str) {
        match self {
            Self::Bars(bars) => bars.group.suspend(|| eprintln!("{text}")),
            Self::Lines(_) => eprintln!("{text}"),
        }
    }
}

/// What the operation is doing now, with a migration's numbers.
fn now_doing(operation: &Operation) -> String {
    let mut text = operation.status_message.clone();
    if let Some(report) = &operation.migration {
        let numbers = migration_numbers(report);
        if !numbers.is_empty() {
            text = if text.is_empty() { numbers } else { format!("{text} ({numbers})") };
        }
    }
    if text.is_empty() {
        text = enum_name(operation.state().as_str_name(), "OPERATION_STATE_");
    }
    text
}

fn migration_numbers(report: &MigrationReport) -> String {
    match report.phase() {
        MigrationPhase::Copying if report.rounds > 0 => format!(
            "round {}, {} sent, {} left",
            report.rounds,
            size(report.bytes_sent),
            size(report.remaining_bytes)
        ),
        MigrationPhase::CopyingDisks if report.disk_bytes_total > 0 => format!(
            "pass {}, {} sent, {} left",
            report.disk_rounds,
            size(report.disk_bytes_sent),
            size(report.disk_remaining_bytes)
        ),
        _ => String::new(),
    }
}

/// `moved from host1 to host2 in 3.2 s, paused 45.1 ms`.
fn move_text(planned: &PlannedMove) -> String {
    let (from, to) = (short_or_dash(&planned.from_node), short_or_dash(&planned.to_node));
    let why = if planned.error.is_empty() { &planned.reason } else { &planned.error };
    match planned.state() {
        MoveState::Planned | MoveState::Unspecified => format!("waits to move {from} -> {to}"),
        MoveState::Moving => format!("moving {from} -> {to}"),
        // A stopped domain moves without a migration.
        MoveState::Moved if planned.total_us == 0 => format!("moved {from} -> {to}"),
        MoveState::Moved => format!(
            "moved {from} -> {to} in {}, paused {}",
            time_us(planned.total_us),
            time_us(planned.pause_us)
        ),
        MoveState::Blocked => format!("cannot move: {why}"),
        MoveState::Failed => format!("failed to move {from} -> {to}: {why}"),
        MoveState::Skipped => format!("skipped: {why}"),
    }
}

/// What was shown last.
#[derive(Default)]
pub(crate) struct Lines {
    message: String,
    moves: BTreeMap<String, String>,
}

impl Lines {
    /// The lines that are new since the last call. Numbers that count on are no news.
    fn changes(&mut self, operation: &Operation) -> Vec<String> {
        let mut lines = Vec::new();
        for planned in &operation.moves {
            let text = move_text(planned);
            if self.moves.get(&planned.domain) != Some(&text) {
                lines.push(format!("{}: {text}", short(&planned.domain)));
                self.moves.insert(planned.domain.clone(), text);
            }
        }
        let message = match operation.status_message.as_str() {
            "" => enum_name(operation.state().as_str_name(), "OPERATION_STATE_"),
            message => message.to_owned(),
        };
        if operation.finish_time.is_none() && message != self.message {
            let percent = operation.progress_percent;
            lines.push(format!("{}: {message} ({percent}%)", operation_title(operation)));
            self.message = message;
        }
        lines
    }
}

/// The bars on the terminal; gone when dropped.
#[derive(Default)]
pub(crate) struct Bars {
    group: MultiProgress,
    whole: Option<ProgressBar>,
    moves: BTreeMap<String, ProgressBar>,
}

/// Often enough for the elapsed time to look alive.
pub(crate) const TICK: Duration = Duration::from_millis(200);

pub(crate) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Bars {
    fn update(&mut self, operation: &Operation) {
        let whole = self.whole.get_or_insert_with(|| {
            let bar = self.group.add(ProgressBar::new(100));
            bar.set_style(style("{spinner} {prefix} [{bar:20}] {pos:>3}% {elapsed} {wide_msg}"));
            bar.enable_steady_tick(TICK);
            bar
        });
        whole.set_prefix(operation_title(operation));
        whole.set_position(u64::from(operation.progress_percent));
        whole.set_message(now_doing(operation));
        let width = operation.moves.iter().map(|m| short(&m.domain).chars().count()).max();
        for planned in &operation.moves {
            let bar = self.moves.entry(planned.domain.clone()).or_insert_with(|| {
                let bar = self.group.add(ProgressBar::new(100));
                bar.set_style(style("  {prefix} [{bar:20}] {pos:>3}% {wide_msg}"));
                bar
            });
            let name = short(&planned.domain);
            bar.set_prefix(format!("{name:<0$}", width.unwrap_or(0)));
            let percent = match planned.state() {
                MoveState::Moved => 100,
                _ => u64::from(planned.progress_percent),
            };
            bar.set_position(percent);
            bar.set_message(move_text(planned));
        }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        for bar in self.moves.values().chain(&self.whole) {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::OperationKind;

    fn drain(state: MoveState, percent: u32) -> Operation {
        let mut planned = PlannedMove {
            domain: "domains/web1".to_owned(),
            from_node: "nodes/host1".to_owned(),
            to_node: "nodes/host2".to_owned(),
            progress_percent: percent,
            total_us: 3_200_000,
            pause_us: 45_100,
            ..PlannedMove::default()
        };
        planned.set_state(state);
        let mut operation = Operation {
            target: "nodes/host1".to_owned(),
            status_message: "1 of 1 moves".to_owned(),
            moves: vec![planned],
            ..Operation::default()
        };
        operation.set_kind(OperationKind::DrainNode);
        operation
    }

    /// A log gets each step of each domain once, not each percent.
    #[test]
    fn lines_are_steps() {
        let mut lines = Lines::default();
        assert_eq!(
            lines.changes(&drain(MoveState::Moving, 1)),
            ["web1: moving host1 -> host2", "drain node host1: 1 of 1 moves (0%)"]
        );
        assert!(lines.changes(&drain(MoveState::Moving, 50)).is_empty());
        assert_eq!(
            lines.changes(&drain(MoveState::Moved, 100)),
            ["web1: moved host1 -> host2 in 3.2 s, paused 45.1 ms"]
        );
        assert!(lines.changes(&drain(MoveState::Moved, 100)).is_empty());
    }
}
