//! How `vpsctl` behaves when the world does not: members that die in the middle of a wait, a
//! watch, a console or an import, Ctrl-C, timeouts, drains that leave domains; and what it asks and
//! shows of storage and networks.
//!
//! The members here are gRPC servers with a script, because a real controller cannot be told to
//! die between two events of one revision. What the API answers for real is `controller.rs`'s.

#![expect(clippy::unwrap_used, reason = "a test")]

mod backup;
#[path = "../common/mod.rs"]
mod common;
mod create;
mod disks;
mod import;
mod member;
mod storage;
mod stored;
mod verbs;

use common::{Running, run};
use drover_proto::v1::{
    ConsoleOutput, Domain, DomainState, Event, MigrationPhase, MigrationReport, MoveState,
    Operation, OperationError, OperationKind, OperationState, PlannedMove,
};
use member::{Member, Script};

const UUID: &str = "6f1c7b0e-8f3c-4c59-9d5e-0d6a3f0c1f1a";

fn operation(kind: OperationKind, state: OperationState, message: &str) -> Operation {
    let mut operation = Operation {
        name: format!("operations/{UUID}"),
        target: if kind == OperationKind::DrainNode { "nodes/host1" } else { "domains/web1" }
            .into(),
        status_message: message.to_owned(),
        ..Operation::default()
    };
    operation.set_kind(kind);
    operation.set_state(state);
    if !matches!(state, OperationState::Running | OperationState::Pending) {
        operation.finish_time = Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 });
    }
    operation
}

fn migration(state: OperationState, message: &str) -> Operation {
    let mut operation = operation(OperationKind::MigrateDomain, state, message);
    let mut report = MigrationReport {
        from_node: "nodes/host1".to_owned(),
        to_node: "nodes/host2".to_owned(),
        rounds: 3,
        memory_bytes: 128 << 20,
        pause_us: 30_000,
        ..MigrationReport::default()
    };
    report.set_phase(MigrationPhase::Done);
    operation.migration = Some(report);
    operation
}

/// A member that knows a migration that runs, and says no more.
fn member_with_a_running_migration() -> Member {
    let running = migration(OperationState::Running, "copying memory");
    Member::start(Script { watch: vec![running], ..Script::default() })
}

#[test]
fn a_wait_goes_on_at_the_next_member() {
    let first = member_with_a_running_migration();
    let more = migration(OperationState::Running, "handing over");
    let done = migration(OperationState::Succeeded, "");
    let second = Member::start(Script { watch: vec![more, done], ..Script::default() });
    let servers = format!("{},{}", first.address(), second.address());
    let mut wait = Running::start(&servers, &["operation", "wait", UUID]);
    wait.wait_for("migrate domain web1: copying memory");
    first.kill();
    wait.wait_for("migrate domain web1: handing over");
    let (code, lines) = wait.end();
    assert_eq!(code, 0, "{lines:#?}");
    assert!(lines.iter().any(|l| l == "pause         30.0 ms"), "{lines:#?}");
}

#[test]
fn ctrl_c_leaves_the_operation_running_and_says_so() {
    let member = member_with_a_running_migration();
    let mut wait = Running::start(member.address(), &["operation", "wait", UUID]);
    wait.wait_for("copying memory");
    wait.signal("INT");
    let (code, lines) = wait.end();
    assert_eq!(code, 130, "{lines:#?}");
    for text in [
        format!("error: interrupted: operations/{UUID} goes on"),
        format!("hint: look again: vpsctl operation wait {UUID}"),
        format!("      cancel:     vpsctl operation cancel {UUID}"),
    ] {
        assert!(lines.contains(&text), "no \"{text}\" in {lines:#?}");
    }
}

#[test]
fn a_timeout_leaves_the_operation_running_and_says_so() {
    let member = member_with_a_running_migration();
    let ended = run(member.address(), &["operation", "wait", UUID, "--timeout", "500ms"]);
    ended.says(6, &format!("error: timeout: operations/{UUID} is not done after"));
    ended.says(6, &format!("vpsctl operation cancel {UUID}"));
}

/// A drain shows each domain, prints what became of each, and is exit code 7 when one is left.
#[test]
fn a_drain_that_leaves_a_domain_is_its_own_exit_code() {
    let planned = |domain: &str, state, error: &str| {
        let mut planned = PlannedMove {
            domain: format!("domains/{domain}"),
            from_node: "nodes/host1".to_owned(),
            to_node: if state == MoveState::Blocked { "" } else { "nodes/host2" }.to_owned(),
            error: error.to_owned(),
            total_us: 3_000_000,
            pause_us: 45_000,
            ..PlannedMove::default()
        };
        planned.set_state(state);
        planned
    };
    let mut running = operation(OperationKind::DrainNode, OperationState::Running, "0 of 2");
    running.moves = vec![
        planned("web1", MoveState::Moving, ""),
        planned("db1", MoveState::Blocked, "its drain policy is stay"),
    ];
    let mut done = operation(OperationKind::DrainNode, OperationState::Failed, "");
    done.error = Some(OperationError {
        reason: "DOMAINS_LEFT".to_owned(),
        message: "1 domain could not move".to_owned(),
    });
    done.moves = running.moves.clone();
    done.moves[0].set_state(MoveState::Moved);
    let script = Script { watch: vec![running, done], ..Script::default() };
    let member = Member::start(script);
    let ended = run(member.address(), &["node", "drain", "host1"]);
    assert_eq!(ended.code, 7, "{ended:#?}");
    for text in [
        "web1: moving host1 -> host2",
        "web1: moved host1 -> host2 in 3.0 s, paused 45.0 ms",
        "db1: cannot move: its drain policy is stay",
        "error: drain node host1: failed: 1 domain could not move (DOMAINS_LEFT)",
    ] {
        assert!(ended.stderr.contains(text), "no \"{text}\": {ended:#?}");
    }
    assert!(ended.stdout.starts_with("DOMAIN   FROM    TO      STATE"), "{ended:#?}");

    let json = run(member.address(), &["-o", "json", "node", "drain", "host1"]);
    assert_eq!(json.code, 7);
    assert_eq!(json.json()["moves"][1]["state"], "blocked");
    assert_eq!(json.json()["error"]["reason"], "DOMAINS_LEFT");

    let detached = run(member.address(), &["node", "drain", "host1", "--detach"]);
    assert_eq!((detached.code, detached.stdout), (0, format!("operations/{UUID}\n")));
}

#[test]
fn no_room_is_its_own_exit_code() {
    let mut failed = operation(OperationKind::StartDomain, OperationState::Failed, "");
    failed.error = Some(OperationError { reason: "NO_ROOM".into(), message: "full".into() });
    let member = Member::start(Script { watch: vec![failed], ..Script::default() });
    let ended = run(member.address(), &["operation", "wait", UUID]);
    ended.says(5, "error: start domain web1: failed: full (NO_ROOM)");
}

/// A cancel that came too late says so: the domain has moved.
#[test]
fn a_late_cancel_is_a_conflict() {
    let running = migration(OperationState::Running, "handing over");
    let done = migration(OperationState::Succeeded, "");
    let script = Script { accepted: running.clone(), watch: vec![done], ..Script::default() };
    let member = Member::start(script);
    let ended = run(member.address(), &["operation", "cancel", UUID]);
    ended.says(4, "migrate domain web1: it was done before it could be cancelled");
    let cancelled = migration(OperationState::Cancelled, "");
    let member =
        Member::start(Script { accepted: running, watch: vec![cancelled], ..Script::default() });
    let ended = run(member.address(), &["operation", "cancel", UUID]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "migrate domain web1: cancelled\n"));
}

fn event(revision: u64, reason: &str) -> Event {
    Event {
        revision,
        subject: "domains/web1".to_owned(),
        reason: reason.to_owned(),
        ..Event::default()
    }
}

/// The first member dies between the two events of revision 6; each is printed once.
#[test]
fn a_watch_of_events_misses_and_repeats_nothing() {
    let all = [event(5, "A"), event(6, "B"), event(6, "C"), event(8, "D")];
    let first = Member::start(Script { events: all[..2].to_vec(), ..Script::default() });
    let second = Member::start(Script { events: all.to_vec(), ..Script::default() });
    let servers = format!("{},{}", first.address(), second.address());
    let args = ["events", "--follow", "--since", "4", "-o", "json"];
    let mut follow = Running::start(&servers, &args);
    follow.wait_for("\"B\"");
    first.kill();
    follow.wait_for("\"D\"");
    follow.signal("INT");
    let (code, lines) = follow.end();
    assert_eq!(code, 0, "Ctrl-C is how a watch ends: {lines:#?}");
    let objects = lines.iter().filter(|l| l.starts_with('{'));
    let reasons: Vec<_> = objects
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["reason"].clone())
        .collect();
    assert_eq!(reasons, ["A", "B", "C", "D"]);
}

fn running_domain() -> Domain {
    let mut domain = Domain { name: "domains/web1".to_owned(), ..Domain::default() };
    domain.set_state(DomainState::Running);
    domain
}

fn said(text: &str, history: bool) -> ConsoleOutput {
    ConsoleOutput { data: text.as_bytes().to_vec().into(), history }
}

/// History, then what comes; the console survives its member and does not repeat the history.
#[test]
fn a_console_is_attached_again() {
    let script = || Script {
        console: vec![said("booting\n", true)],
        domain: running_domain(),
        ..Script::default()
    };
    let (first, second) = (Member::start(script()), Member::start(script()));
    let servers = format!("{},{}", first.address(), second.address());
    let mut console = Running::start(&servers, &["domain", "console", "web1"]);
    console.wait_for("booting");
    console.type_in("one\n");
    console.wait_for("guest heard: one");
    first.kill();
    second.wait_for_a_console();
    console.type_in("two\n");
    console.wait_for("guest heard: two");
    console.close_stdin();
    let (code, lines) = console.end();
    assert_eq!(code, 0, "{lines:#?}");
    assert_eq!(lines.iter().filter(|l| l.contains("booting")).count(), 1, "{lines:#?}");
}

#[test]
fn a_console_can_show_its_history_only() {
    let console = vec![said("booting\n", true), said("login: \n", true), said("later\n", false)];
    let script = Script { console, domain: running_domain(), ..Script::default() };
    let member = Member::start(script);
    let ended = run(member.address(), &["domain", "console", "web1", "--history-only"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "booting\nlogin: \n"), "{ended:#?}");
}

/// The guest powered off: its console ends, and the command says why.
#[test]
fn a_console_ends_with_its_domain() {
    let mut domain = running_domain();
    domain.set_state(DomainState::Stopped);
    domain.state_reason = "the guest shut down".to_owned();
    let script = Script {
        console: vec![said("reboot: Power down\n", false)],
        console_ends: true,
        domain,
        ..Script::default()
    };
    let member = Member::start(script);
    let mut console = Running::start(member.address(), &["domain", "console", "web1"]);
    console.wait_for("web1 is stopped: the guest shut down");
    assert_eq!(console.end().0, 0);
}
