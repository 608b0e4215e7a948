//! The lines of a drain's or balance's plan: how they are kept, how they end, how they are shown.

use drover_proto::v1::{MoveState, OperationState, PlannedMove};
use prost::Message;

use super::ATTEMPTS_MAX;
use crate::model::{MoveRecord, NodeId, OperationRecord};
use crate::scheduler::{BalanceMove, BalanceProposal, DrainProposal, ProposedMove};
use crate::store::TXN_BYTES_ENOUGH;
use crate::workflows::desired::duration;
use crate::workflows::refusal::cut;

/// What is kept of the reason for which a move failed, in bytes.
const WHY_BYTES_MAX: usize = 500;
/// And when there are very many.
const WHY_BYTES_MIN: usize = 100;

/// Keeps the row well below what one transaction holds, by saying less with each move when there
/// are very many; false when that is not enough.
pub(super) fn fits(operation: &mut OperationRecord) -> bool {
    if operation.encoded_len() > TXN_BYTES_ENOUGH {
        for line in operation.moves.iter_mut().filter_map(|row| row.r#move.as_mut()) {
            line.reason = cut(&line.reason, WHY_BYTES_MIN);
            line.error = cut(&line.error, WHY_BYTES_MIN);
        }
    }
    operation.encoded_len() <= TXN_BYTES_ENOUGH
}

/// A move whose migration has ended.
pub(super) fn settle(row: &mut MoveRecord, child: Option<&OperationRecord>, last_try: bool) {
    let Some(line) = row.r#move.as_mut() else { return };
    if let Some(child) = child.filter(|child| child.state() == OperationState::Succeeded) {
        line.set_state(MoveState::Moved);
        line.progress_percent = 100;
        if let Some(report) = &child.migration {
            line.pause_us = report.pause_us;
            line.total_us = report.total_us;
        }
        return;
    }
    let why = child.and_then(|child| child.error.as_ref());
    line.error = match why {
        Some(why) => cut(&why.message, WHY_BYTES_MAX),
        None => "its migration is not known".into(),
    };
    row.attempts += 1;
    if let Ok(node) = NodeId::from_name(&line.to_node) {
        row.failed_nodes.push(node.as_str().to_owned());
    }
    let again = !last_try && row.attempts < ATTEMPTS_MAX;
    line.set_state(if again { MoveState::Planned } else { MoveState::Failed });
}

pub(super) fn rows(proposal: &DrainProposal, node: &NodeId) -> Vec<MoveRecord> {
    proposal.moves.iter().map(|line| planned(line, node)).collect()
}

pub(super) fn planned(line: &ProposedMove, from: &NodeId) -> MoveRecord {
    MoveRecord { r#move: Some(planned_move(line, from)), ..MoveRecord::default() }
}

/// One line of a plan, as the API shows it.
#[must_use]
pub fn planned_move(line: &ProposedMove, from: &NodeId) -> PlannedMove {
    let blocked = line.to.is_none() && !line.waits;
    let state = if blocked { MoveState::Blocked } else { MoveState::Planned };
    PlannedMove {
        domain: line.domain.name(),
        from_node: from.name(),
        to_node: line.to.as_ref().map(NodeId::name).unwrap_or_default(),
        reason: line.reason.clone(),
        state: state.into(),
        memory_bytes: line.memory_bytes,
        expected_time: Some(duration(ms(line.expected_time))),
        ..PlannedMove::default()
    }
}

pub(super) fn balance_rows(proposal: &BalanceProposal) -> Vec<MoveRecord> {
    let lines = proposal.moves.iter().map(balance_move);
    lines.map(|line| MoveRecord { r#move: Some(line), ..MoveRecord::default() }).collect()
}

/// One line of a balance, as the API shows it.
#[must_use]
pub fn balance_move(line: &BalanceMove) -> PlannedMove {
    PlannedMove {
        domain: line.domain.name(),
        from_node: line.from.name(),
        to_node: line.to.name(),
        reason: line.reason.clone(),
        state: MoveState::Planned.into(),
        memory_bytes: line.memory_bytes,
        ..PlannedMove::default()
    }
}

/// "2 of 6 moved, 2 moving, 1 blocked".
pub(super) fn summary(moves: &[MoveRecord]) -> String {
    let count = |state| moves.iter().filter(|row| is(row, state)).count();
    let mut text = format!("{} of {} moved", count(MoveState::Moved), moves.len());
    for (state, word) in [
        (MoveState::Moving, "moving"),
        (MoveState::Blocked, "blocked"),
        (MoveState::Failed, "failed"),
        (MoveState::Skipped, "skipped"),
    ] {
        let n = count(state);
        if n > 0 {
            text.push_str(&format!(", {n} {word}"));
        }
    }
    text
}

pub(super) fn is(row: &MoveRecord, state: MoveState) -> bool {
    row.r#move.as_ref().is_some_and(|line| line.state() == state)
}

pub(super) fn domain_of(row: &MoveRecord) -> &str {
    row.r#move.as_ref().map_or("", |line| line.domain.as_str())
}

pub(super) fn ms(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
