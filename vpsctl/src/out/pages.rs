//! What each answer looks like to a person: lists as tables, one object as a page, plans and
//! reports as text around a table.

use std::{fmt::Write, time::SystemTime};

use drover_proto::v1::{
    BalancePlan, ClusterStatus, Domain, DrainPlan, DrainState, Event, MigrationReport, MoveState,
    Node, NodeCapacity, NodeState, Operation, OperationKind, PlannedMove,
};

use super::{
    human::{
        age, count, elapsed, enum_name, operation_title, or_dash, plural, short, short_or_dash,
        size, time, time_of, time_us,
    },
    table::Table,
};

/// The nodes with their state and room.
pub(crate) fn nodes(nodes: &[Node], now: SystemTime) -> String {
    let mut table =
        Table::new(&["NAME", "STATE", "DOMAINS", "VCPUS", "MEMORY", "CPU", "ADDRESS", "AGE"]);
    for node in nodes {
        let (reserved, capacity) = room(node);
        table.row(vec![
            short(&node.name).to_owned(),
            node_state(node),
            node.domain_count.to_string(),
            format!("{} / {}", reserved.vcpus, capacity.vcpus),
            format!("{} / {}", size(reserved.memory_bytes), size(capacity.memory_bytes)),
            node.usage.as_ref().map_or_else(|| "-".to_owned(), |u| cores(u.cpu_millicores)),
            or_dash(&node.address),
            age(node.register_time.as_ref(), now),
        ]);
    }
    table.render()
}

fn room(node: &Node) -> (NodeCapacity, NodeCapacity) {
    (node.reserved.unwrap_or_default(), node.capacity.unwrap_or_default())
}

/// Thousandths of a core as `1.25 cores`.
fn cores(millicores: u32) -> String {
    format!("{:.2} cores", f64::from(millicores) / 1000.0)
}

/// `ready`, `lost`, and what else holds: `ready, draining`.
fn node_state(node: &Node) -> String {
    let mut states = vec![enum_name(node.state().as_str_name(), "NODE_STATE_")];
    match node.drain_state() {
        DrainState::Unspecified if node.cordoned => states.push("cordoned".to_owned()),
        DrainState::Unspecified => {}
        DrainState::Incomplete => states.push("drain incomplete".to_owned()),
        drain => states.push(enum_name(drain.as_str_name(), "DRAIN_STATE_")),
    }
    states.join(", ")
}

/// One node.
pub(crate) fn node(node: &Node, now: SystemTime) -> String {
    let (reserved, capacity) = room(node);
    let mut page = Page::default();
    page.line("node", short(&node.name));
    page.line("state", &with_reason(&node_state(node), &node.state_reason));
    if node.state() == NodeState::Lost {
        page.line("lost since", &format!("{} ago", age(node.state_time.as_ref(), now)));
    }
    page.line("domains", &node.domain_count.to_string());
    page.line("vcpus", &format!("{} promised of {}", reserved.vcpus, capacity.vcpus));
    page.line(
        "memory",
        &format!("{} promised of {}", size(reserved.memory_bytes), size(capacity.memory_bytes)),
    );
    if let Some(usage) = &node.usage {
        let memory = size(usage.memory_used_bytes);
        page.line("measured", &format!("{}, {memory}", cores(usage.cpu_millicores)));
    }
    page.line("address", &node.address);
    page.line("agent", &node.agent_version);
    page.line("kernel", &node.kernel_version);
    page.line("registered", &format!("{} ago", age(node.register_time.as_ref(), now)));
    page.line("uid", &node.uid);
    page.text
}

/// The domains and where they run.
pub(crate) fn domains(domains: &[Domain], now: SystemTime) -> String {
    let mut table =
        Table::new(&["NAME", "STATE", "NODE", "VCPUS", "MEMORY", "ADDRESSES", "AGE", "REASON"]);
    for domain in domains {
        let spec = domain.spec.clone().unwrap_or_default();
        table.row(vec![
            short(&domain.name).to_owned(),
            enum_name(domain.state().as_str_name(), "DOMAIN_STATE_"),
            short_or_dash(&domain.node),
            spec.vcpus.to_string(),
            size(spec.memory_bytes),
            or_dash(&domain.addresses.join(" ")),
            age(domain.create_time.as_ref(), now),
            domain.state_reason.clone(),
        ]);
    }
    table.render()
}

/// One domain, and how its node was chosen.
pub(crate) fn domain(domain: &Domain, now: SystemTime) -> String {
    let spec = domain.spec.clone().unwrap_or_default();
    let boot = spec.boot.clone().unwrap_or_default();
    let mut page = Page::default();
    page.line("domain", short(&domain.name));
    let state = enum_name(domain.state().as_str_name(), "DOMAIN_STATE_");
    page.line("state", &with_reason(&state, &domain.state_reason));
    page.line("node", &format!("{}, epoch {}", short_or_dash(&domain.node), domain.epoch));
    page.line("wanted", &enum_name(domain.desired_power().as_str_name(), "POWER_STATE_"));
    page.line("size", &format!("{} vCPU, {}", spec.vcpus, size(spec.memory_bytes)));
    page.line("addresses", &domain.addresses.join(" "));
    for nic in &spec.interfaces {
        let bridge = if nic.bridge.is_empty() { "the node's bridge" } else { &nic.bridge };
        page.line("interface", &format!("{} on {bridge}", or_dash(&nic.mac)));
    }
    page.line("kernel", &boot.kernel);
    page.line("initramfs", &boot.initramfs);
    page.line("command line", &boot.command_line);
    page.line("drain policy", &enum_name(spec.drain_policy().as_str_name(), "DRAIN_POLICY_"));
    if let Some(usage) = &domain.usage {
        let memory = size(usage.memory_resident_bytes);
        let uptime = time_of(usage.uptime.as_ref());
        page.line("measured", &format!("{}, {memory}, up {uptime}", cores(usage.cpu_millicores)));
    }
    page.line("last exit", &enum_name(domain.last_exit().as_str_name(), "EXIT_REASON_"));
    for (key, value) in &spec.labels {
        page.line("label", &format!("{key}={value}"));
    }
    page.line("operation", short(&domain.operation));
    page.line("created", &format!("{} ago", age(domain.create_time.as_ref(), now)));
    page.line("uid", &domain.uid);
    if let Some(placement) = &domain.placement {
        let when = age(placement.time.as_ref(), now);
        let chosen = short_or_dash(&placement.node);
        page.line("placed", &format!("{chosen}, score {:.3}, {when} ago", placement.score));
        for rejected in &placement.rejected {
            page.line("not", &format!("{}: {}", short(&rejected.node), rejected.reason));
        }
    }
    page.text
}

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

/// Who leads, who is reachable, and how much there is.
pub(crate) fn cluster(status: &ClusterStatus) -> String {
    let mut page = Page::default();
    page.line("cluster", &status.cluster_id);
    let leader = match status.leader_id {
        0 => "none is known".to_owned(),
        id => format!("member {id}, term {}", status.term),
    };
    page.line("leader", &leader);
    page.line("revision", &status.revision.to_string());
    page.line("nodes", &format!("{} ready, {} lost", status.nodes_ready, status.nodes_lost));
    let domains = format!("{} running of {}", status.domains_running, status.domains_total);
    page.line("domains", &domains);
    page.line("operations", &format!("{} active", status.operations_active));
    let mut table = Table::new(&["MEMBER", "ADDRESS", "ROLE", "REACHABLE", "APPLIED"]);
    for member in &status.members {
        let applied = if member.applied_index == 0 {
            "-".to_owned()
        } else {
            member.applied_index.to_string()
        };
        let answered = if member.id == status.answered_by { " (answered)" } else { "" };
        table.row(vec![
            format!("{}{answered}", member.id),
            member.address.clone(),
            or_dash(&member.role.to_ascii_lowercase()),
            if member.reachable { "yes" } else { "no" }.to_owned(),
            applied,
        ]);
    }
    format!("{}\n{}", page.text, table.render())
}

/// One event, on one line.
pub(crate) fn event(event: &Event) -> String {
    let severity = enum_name(event.severity().as_str_name(), "EVENT_SEVERITY_");
    let time = event.time.map(|t| seconds_only(&t.to_string())).unwrap_or_default();
    let line = format!(
        "{:>8}  {time}  {severity:<7}  {:<24}  {}: {}",
        event.revision,
        event.subject,
        event.reason,
        event.message.replace(['\n', '\r'], " ")
    );
    format!("{}\n", line.trim_end_matches(": "))
}

/// RFC 3339 without its fraction.
fn seconds_only(time: &str) -> String {
    match time.split_once('.') {
        Some((seconds, _)) => format!("{seconds}Z"),
        None => time.to_owned(),
    }
}

/// One sentence on what an operation that succeeded has done.
pub(crate) fn done(operation: &Operation, now: SystemTime) -> String {
    let target = short(&operation.target);
    let what = match operation.kind() {
        OperationKind::StartDomain => format!("{target} is started"),
        OperationKind::StopDomain => format!("{target} is stopped"),
        OperationKind::DeleteDomain => format!("{target} is deleted"),
        OperationKind::MigrateDomain => {
            let to = operation.migration.as_ref().map_or("", |report| short(&report.to_node));
            format!("{target} is on {to} now; it does not run, so nothing was copied")
        }
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

fn with_reason(state: &str, reason: &str) -> String {
    if reason.is_empty() { state.to_owned() } else { format!("{state}: {reason}") }
}

/// Lines of `label  value`; those without a value are left out.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn line(&mut self, label: &str, value: &str) {
        if !value.is_empty() && value != "-" {
            let _ = writeln!(self.text, "{label:<13} {value}");
        }
    }
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
            ..MigrationReport::default()
        };
        report.set_phase(drover_proto::v1::MigrationPhase::Done);
        let text = migration("domains/web1", &report);
        for line in [
            "migration     web1 from host1 to host2, done",
            "total time    1.8 s",
            "sent          140 MiB of 128 MiB in 3 rounds: 35,840 pages, 12,000 zero pages left out",
            "rate          100 MiB/s, pre-copy ended: converged",
            "pause         30.0 ms",
            "                12.0 ms  last pages",
        ] {
            assert!(text.lines().any(|l| l == line), "no \"{line}\" in\n{text}");
        }
    }

    #[test]
    fn a_node_says_all_that_holds() {
        let mut it = Node { name: "nodes/host1".to_owned(), cordoned: true, ..Node::default() };
        it.set_state(NodeState::Ready);
        assert_eq!(node_state(&it), "ready, cordoned");
        it.set_drain_state(DrainState::Draining);
        assert_eq!(node_state(&it), "ready, draining");
    }

    #[test]
    fn an_event_is_one_line() {
        let mut it = Event {
            revision: 12,
            time: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 1_000_000 }),
            subject: "domains/web1".to_owned(),
            reason: "DOMAIN_STARTED".to_owned(),
            message: "on host1\nwith care".to_owned(),
            ..Event::default()
        };
        it.set_severity(drover_proto::v1::EventSeverity::Info);
        let line = "      12  2023-11-14T22:13:20Z  info     domains/web1              \
                    DOMAIN_STARTED: on host1 with care\n";
        assert_eq!(event(&it), line);
    }
}
