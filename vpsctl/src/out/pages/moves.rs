//! Plans of drains and balances, and what became of them.

use std::fmt::Write;

use drover_proto::v1::{BalancePlan, DrainPlan, MoveState, PlannedMove};

use crate::out::{
    human::{enum_name, plural, short, short_or_dash, size, time_of, time_us},
    table::Table,
};

/// The whole plan of a drain.
pub(crate) fn drain_plan(plan: &DrainPlan) -> String {
    let node = short(&plan.node);
    if plan.moves.is_empty() {
        return format!("{node} holds no domain: a drain would only cordon it.\n");
    }
    let blocked = blocked(&plan.moves);
    let going = plan.moves.len() - blocked;
    let mut text = format!("Drain of {node}: {} can move", plural(going, "domain"));
    if blocked > 0 {
        let _ = write!(text, ", {blocked} cannot");
    }
    if going > 0 {
        let expected = time_of(plan.expected_time.as_ref());
        let _ = write!(text, "; about {expected}, {} at a time", plan.parallel_moves.max(1));
    }
    text.push_str(".\n\n");
    text.push_str(&moves_planned(&plan.moves));
    text
}

/// How many rows of a plan cannot move.
pub(crate) fn blocked(moves: &[PlannedMove]) -> usize {
    moves.iter().filter(|m| m.state() == MoveState::Blocked).count()
}

/// How many are left where they were when it has ended.
pub(crate) fn left(moves: &[PlannedMove]) -> usize {
    moves.iter().filter(|m| !matches!(m.state(), MoveState::Moved | MoveState::Skipped)).count()
}

fn moves_planned(moves: &[PlannedMove]) -> String {
    let mut table = Table::new(&["DOMAIN", "MEMORY", "FROM", "TO", "TIME", "WHY"]);
    for planned in moves {
        let cannot = planned.state() == MoveState::Blocked;
        table.row(vec![
            short(&planned.domain).to_owned(),
            size(planned.memory_bytes),
            short_or_dash(&planned.from_node),
            if cannot { "cannot move".to_owned() } else { short_or_dash(&planned.to_node) },
            if cannot { "-".to_owned() } else { time_of(planned.expected_time.as_ref()) },
            planned.reason.clone(),
        ]);
    }
    table.render()
}

/// What became of each move.
pub(crate) fn moves_done(moves: &[PlannedMove]) -> String {
    let mut table = Table::new(&["DOMAIN", "FROM", "TO", "STATE", "TOTAL", "PAUSE", "WHY"]);
    let measured = |us| if us == 0 { "-".to_owned() } else { time_us(us) };
    for done in moves {
        let why = if done.error.is_empty() { &done.reason } else { &done.error };
        table.row(vec![
            short(&done.domain).to_owned(),
            short_or_dash(&done.from_node),
            short_or_dash(&done.to_node),
            enum_name(done.state().as_str_name(), "MOVE_STATE_"),
            measured(done.total_us),
            measured(done.pause_us),
            why.clone(),
        ]);
    }
    table.render()
}

/// The moves that the balancer proposes.
pub(crate) fn balance_plan(plan: &BalancePlan) -> String {
    if plan.moves.is_empty() {
        let imbalance = plan.imbalance_before;
        return format!(
            "Nothing to move: no migration would even out the load ({imbalance:.1}).\n"
        );
    }
    format!(
        "{} would bring the imbalance from {:.1} to {:.1} (standard deviation of the nodes' load, \
         in thousandths of their capacity).\n\n{}",
        plural(plan.moves.len(), "move"),
        plan.imbalance_before,
        plan.imbalance_after,
        moves_planned(&plan.moves)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(domain: &str, state: MoveState) -> PlannedMove {
        let mut planned = PlannedMove {
            domain: format!("domains/{domain}"),
            from_node: "nodes/host1".to_owned(),
            memory_bytes: 256 << 20,
            ..PlannedMove::default()
        };
        planned.set_state(state);
        planned
    }

    /// The plan says what goes where, for how long, and what cannot go and why.
    #[test]
    fn a_drain_plan_reads_whole() {
        let mut web = planned("web1", MoveState::Planned);
        web.to_node = "nodes/host2".to_owned();
        web.reason = "best fit".to_owned();
        web.expected_time = Some(prost_types::Duration { seconds: 4, nanos: 200_000_000 });
        let mut db = planned("db1", MoveState::Blocked);
        db.reason = "its drain policy is stay".to_owned();
        let plan = DrainPlan {
            node: "nodes/host1".to_owned(),
            moves: vec![web, db],
            expected_time: Some(prost_types::Duration { seconds: 5, nanos: 0 }),
            parallel_moves: 2,
        };
        let expected = "\
Drain of host1: 1 domain can move, 1 cannot; about 5.0 s, 2 at a time.

DOMAIN   MEMORY    FROM    TO            TIME    WHY
web1     256 MiB   host1   host2         4.2 s   best fit
db1      256 MiB   host1   cannot move   -       its drain policy is stay
";
        assert_eq!(drain_plan(&plan), expected);
        assert_eq!(blocked(&plan.moves), 1);
    }
}
