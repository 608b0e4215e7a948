//! The table of decisions, row by row; then the rules that no combination may break, over all of
//! them.

mod live;
mod rules;

use super::*;
use crate::records::{Handover, OutgoingRecord, Run};
use crate::wanted::Disk;
use drover_proto::v1::{DiskLimits, DomainSpec};

const NOW: u64 = 1_000_000;
const M: &str = "migration-1";
const MEMORY: &str = "volume-1";

// --- what is on disk -------------------------------------------------------------------------

fn record() -> DomainRecord {
    DomainRecord { epoch: 5, start_generation: Some(1), ..DomainRecord::default() }
}

/// A VMM was started under epoch 5 and has run the guest.
fn ran() -> DomainRecord {
    let run = Run { epoch: 5, pid: Some(9), ran: true, ..Run::default() };
    DomainRecord { run: Some(run), ..record() }
}

/// A VMM was started to receive migration `id` under epoch 5.
fn waits(id: &str) -> DomainRecord {
    let run = Run { epoch: 5, incoming: Some(id.into()), pid: Some(9), ..Run::default() };
    DomainRecord { run: Some(run), start_generation: None, ..record() }
}

/// A VMM that ran the guest under epoch 5 has ended.
fn ended(reason: EndReason) -> DomainRecord {
    let end = End {
        epoch: 5,
        incoming: None,
        ran: true,
        reason,
        detail: String::new(),
        ordered: false,
        handover: None,
    };
    DomainRecord { end: Some(end), ..record() }
}

fn with_end(mut record: DomainRecord, change: impl FnOnce(&mut End)) -> DomainRecord {
    change(record.end.as_mut().unwrap());
    record
}

/// A VMM that handed the guest over to epoch 6 has ended.
fn handed_over() -> DomainRecord {
    with_end(ended(EndReason::Killed), |end| {
        end.handover = Some(Handover { migration_id: M.into(), to_epoch: 6 });
    })
}

// --- what runs -------------------------------------------------------------------------------

fn live(state: VmmState) -> Vmm {
    let handed_to = if state == VmmState::HandedOver { 6 } else { 0 };
    Vmm::Live { state, migration: None, handed_to }
}

fn migrating(state: VmmState, role: MigrationRole, progress: MigrationProgress) -> Vmm {
    let handed_to = if state == VmmState::HandedOver { 6 } else { 0 };
    Vmm::Live { state, migration: Some(Migration { id: M.into(), role, progress }), handed_to }
}

fn silent() -> Vmm {
    Vmm::Silent { since_ms: NOW - 1000, handed_to: 0 }
}

// --- what is wanted --------------------------------------------------------------------------

fn assigned(epoch: u64, role: Role) -> Wanted {
    let spec = DomainSpec::default();
    let name = "domains/web".into();
    Wanted::Assigned(Box::new(Assigned {
        name,
        epoch,
        spec,
        role,
        disks: Vec::new(),
        rescue: false,
        generation_id: None,
        memory: None,
        seed_slot: None,
    }))
}

fn owner(running: bool) -> Owner {
    let power = if running { Power::Running } else { Power::Stopped };
    Owner { power, grace: Duration::from_secs(60), start_generation: 1, outgoing: None }
}

fn run(epoch: u64) -> Wanted {
    assigned(epoch, Role::Owner(owner(true)))
}

fn stop(epoch: u64) -> Wanted {
    assigned(epoch, Role::Owner(owner(false)))
}

fn with_memory(mut wanted: Wanted) -> Wanted {
    if let Wanted::Assigned(assigned) = &mut wanted {
        let (volume, pool, serial) = (MEMORY.into(), "main".into(), String::new());
        let limits = DiskLimits::default();
        assigned.memory = Some(Disk { volume, pool, read_only: false, limits, serial, slot: None });
    }
    wanted
}

fn save(epoch: u64) -> Wanted {
    let owner = Owner { power: Power::Saved, ..owner(true) };
    with_memory(assigned(epoch, Role::Owner(owner)))
}

fn start_again(generation: u64) -> Wanted {
    assigned(5, Role::Owner(Owner { start_generation: generation, ..owner(true) }))
}

fn send(cancel: bool) -> Wanted {
    let outgoing = Outgoing {
        migration_id: M.into(),
        address: "10.0.0.2:1".into(),
        token: "t".into(),
        to_epoch: 6,
        limits: None,
        cancel,
    };
    assigned(5, Role::Owner(Owner { outgoing: Some(outgoing), ..owner(true) }))
}

fn receive(epoch: u64) -> Wanted {
    assigned(epoch, Role::Incoming { migration_id: M.into(), token: "t".into() })
}

fn on_crash(mut wanted: Wanted, policy: RestartPolicy) -> Wanted {
    if let Wanted::Assigned(assigned) = &mut wanted {
        assigned.spec.on_crash = policy.into();
    }
    wanted
}

fn on_reboot(mut wanted: Wanted, policy: RestartPolicy) -> Wanted {
    if let Wanted::Assigned(assigned) = &mut wanted {
        assigned.spec.on_reboot = policy.into();
    }
    wanted
}

fn progress() -> Progress {
    Progress { ended_ms: NOW, ..Progress::default() }
}

fn ask(
    record: impl Into<Option<DomainRecord>>,
    vmm: Vmm,
    wanted: Wanted,
    progress: Progress,
) -> Action {
    ask_with(&Disks::Ready, record.into(), &vmm, &wanted, &progress)
}

fn ask_with(
    disks: &Disks,
    record: Option<DomainRecord>,
    vmm: &Vmm,
    wanted: &Wanted,
    progress: &Progress,
) -> Action {
    decide(Facts { disks, ..facts(record.as_ref(), vmm, wanted, progress) })
}

/// Of a domain all of whose disks are here and are as its VMM has them.
fn facts<'a>(
    record: Option<&'a DomainRecord>,
    vmm: &'a Vmm,
    wanted: &'a Wanted,
    progress: &'a Progress,
) -> Facts<'a> {
    Facts {
        record,
        vmm,
        wanted,
        progress,
        disks: &Disks::Ready,
        memory: &Disks::Ready,
        live_disks: &[],
        plugged: &[],
        now_ms: NOW,
    }
}

type Row = (&'static str, Option<DomainRecord>, Vmm, Wanted, Action);

fn check(rows: Vec<Row>) {
    for (what, record, vmm, wanted, expected) in rows {
        assert_eq!(ask(record, vmm, wanted, progress()), expected, "{what}");
    }
}

#[test]
fn the_owner_runs_or_stops_it() {
    use Action::*;
    use VmmState::*;
    let restart = RestartPolicy::Restart;
    let many = DomainRecord { crash_restarts: CRASH_RESTARTS_MAX, ..ended(EndReason::Crash) };
    let twice = DomainRecord { crash_restarts: 2, ..ended(EndReason::Crash) };
    let ordered = with_end(ended(EndReason::Shutdown), |end| end.ordered = true);
    let in_6 = |reason| DomainRecord { epoch: 6, ..ended(reason) };
    let never_ran = with_end(ended(EndReason::Error), |end| end.ran = false);
    let came_and_ended = DomainRecord { start_generation: None, ..ended(EndReason::Shutdown) };
    check(vec![
        ("new", None, Vmm::Gone, run(5), Start),
        ("new, to be stopped", None, Vmm::Gone, stop(5), Adopt),
        ("known, never started", Some(record()), Vmm::Gone, run(5), Start),
        ("known, stopped", Some(record()), Vmm::Gone, stop(5), Nothing),
        ("stopped, new epoch", Some(record()), Vmm::Gone, stop(6), Adopt),
        ("runs", Some(ran()), live(Running), run(5), Nothing),
        ("paused by hand", Some(ran()), live(Paused), run(5), Nothing),
        ("starts", Some(waits("x")), silent(), run(5), WaitUntil(NOW + 59_000)),
        ("hangs", Some(ran()), silent(), run(5), Nothing),
        ("runs, later epoch", Some(ran()), live(Running), run(6), Adopt),
        ("runs, started again", Some(ran()), live(Running), start_again(2), Adopt),
        (
            "came in",
            Some(DomainRecord { start_generation: None, ..ran() }),
            live(Running),
            run(5),
            Adopt,
        ),
        ("to stop", Some(ran()), live(Running), stop(5), PowerButton),
        ("to stop, hangs", Some(ran()), silent(), stop(5), WaitUntil(NOW + 9000)),
        ("guest gone", Some(ran()), live(Exited), run(5), Nothing),
        ("VMM gone", Some(ran()), Vmm::Gone, run(5), Settle),
        ("VMM gone, stopped", Some(ran()), Vmm::Gone, stop(5), Settle),
        ("shut down", Some(ended(EndReason::Shutdown)), Vmm::Gone, run(5), Nothing),
        (
            "shut down, started again",
            Some(ended(EndReason::Shutdown)),
            Vmm::Gone,
            start_again(2),
            Start,
        ),
        // By itself, just when a save was given up: nobody has asked for a start.
        ("shut down, new epoch", Some(ended(EndReason::Shutdown)), Vmm::Gone, run(6), Adopt),
        ("shut down, epoch written", Some(in_6(EndReason::Shutdown)), Vmm::Gone, run(6), Nothing),
        ("rebooted, new epoch", Some(ended(EndReason::Reboot)), Vmm::Gone, run(6), Start),
        ("crashed, new epoch", Some(ended(EndReason::Crash)), Vmm::Gone, run(6), Start),
        ("stopped on order, to run", Some(ordered), Vmm::Gone, run(5), Start),
        ("shut down right after it came", Some(came_and_ended), Vmm::Gone, run(5), Adopt),
        (
            "rebooted, restart",
            Some(ended(EndReason::Reboot)),
            Vmm::Gone,
            on_reboot(run(5), restart),
            Start,
        ),
        ("rebooted", Some(ended(EndReason::Reboot)), Vmm::Gone, run(5), Start),
        (
            "rebooted, stop",
            Some(ended(EndReason::Reboot)),
            Vmm::Gone,
            on_reboot(run(5), RestartPolicy::Stop),
            Nothing,
        ),
        ("crashed", Some(ended(EndReason::Crash)), Vmm::Gone, run(5), Nothing),
        (
            "crashed, stop",
            Some(ended(EndReason::Crash)),
            Vmm::Gone,
            on_crash(run(5), RestartPolicy::Stop),
            Nothing,
        ),
        (
            "crashed, restart",
            Some(ended(EndReason::Crash)),
            Vmm::Gone,
            on_crash(run(5), restart),
            WaitUntil(NOW + 1000),
        ),
        (
            "crashed thrice",
            Some(twice),
            Vmm::Gone,
            on_crash(run(5), restart),
            WaitUntil(NOW + 4000),
        ),
        ("crashed too often", Some(many.clone()), Vmm::Gone, on_crash(run(5), restart), Nothing),
        (
            "crashed too often, started again",
            Some(many),
            Vmm::Gone,
            on_crash(start_again(2), restart),
            Start,
        ),
        ("killed", Some(ended(EndReason::Killed)), Vmm::Gone, run(5), Nothing),
        (
            "killed, restart",
            Some(ended(EndReason::Killed)),
            Vmm::Gone,
            on_crash(run(5), restart),
            WaitUntil(NOW + 1000),
        ),
        ("could not start", Some(never_ran), Vmm::Gone, on_crash(run(5), restart), Nothing),
        ("host rebooted", Some(ended(EndReason::HostRebooted)), Vmm::Gone, run(5), Start),
        (
            "host rebooted, stopped",
            Some(ended(EndReason::HostRebooted)),
            Vmm::Gone,
            stop(5),
            Nothing,
        ),
        ("start interrupted", Some(ended(EndReason::Interrupted)), Vmm::Gone, run(5), Start),
    ]);
}

#[test]
fn migrations_take_their_steps_once() {
    use Action::*;
    use MigrationProgress as P;
    use MigrationRole::{Destination, Source};
    use VmmState::*;
    let begun = DomainRecord {
        outgoing: Some(OutgoingRecord { migration_id: M.into(), error: None, pid: Some(9) }),
        ..ran()
    };
    let copying = || migrating(Running, Source, P::Copying);
    let waiting = |progress| migrating(Incoming, Destination, progress);
    let tried = with_end(ended(EndReason::Killed), |end| end.incoming = Some(M.into()));
    let interrupted = with_end(ended(EndReason::Interrupted), |end| end.incoming = Some(M.into()));
    check(vec![
        // Source.
        ("to send", Some(ran()), live(Running), send(false), StartMigration),
        ("begun on disk", Some(begun.clone()), live(Running), send(false), Nothing),
        ("begun in the VMM", Some(ran()), copying(), send(false), Nothing),
        (
            "failed",
            Some(begun.clone()),
            migrating(Running, Source, P::Failed),
            send(false),
            Nothing,
        ),
        ("cancel", Some(begun.clone()), copying(), send(true), CancelMigration),
        ("cancel before it began", Some(ran()), live(Running), send(true), Nothing),
        (
            "cancel too late",
            Some(begun),
            migrating(HandedOver, Source, P::HandedOver),
            send(true),
            Nothing,
        ),
        ("handed over", Some(ran()), live(HandedOver), run(5), Nothing),
        ("handed over, to stop", Some(ran()), live(HandedOver), stop(5), Nothing),
        ("handed over, the other's epoch", Some(ran()), live(HandedOver), run(6), Nothing),
        ("handed over, given back", Some(ran()), live(HandedOver), run(7), TakeOver),
        ("handed over, given back stopped", Some(ran()), live(HandedOver), stop(7), Quit),
        ("handed over, not listed", Some(ran()), live(HandedOver), Wanted::Absent, Quit),
        ("handed over and gone", Some(handed_over()), Vmm::Gone, run(5), Nothing),
        (
            "handed over and gone, the other's epoch",
            Some(handed_over()),
            Vmm::Gone,
            run(6),
            Nothing,
        ),
        ("handed over and gone, given back", Some(handed_over()), Vmm::Gone, run(7), Start),
        // Destination.
        ("to receive", None, Vmm::Gone, receive(5), StartIncoming),
        ("waits", Some(waits(M)), live(Incoming), receive(5), PrepareIncoming),
        ("listens", Some(waits(M)), waiting(P::Listening), receive(5), Nothing),
        ("failed here", Some(waits(M)), waiting(P::Failed), receive(5), Nothing),
        ("waits for another", Some(waits("old")), live(Incoming), receive(5), Quit),
        (
            "runs, not owner yet",
            Some(waits(M)),
            migrating(Running, Destination, P::Succeeded),
            receive(5),
            Nothing,
        ),
        (
            "runs here already",
            Some(ran()),
            live(Running),
            receive(6),
            Refuse("the domain runs here under epoch 5: it cannot come in".into()),
        ),
        ("tried and ended", Some(tried.clone()), Vmm::Gone, receive(5), Nothing),
        ("tried, interrupted", Some(interrupted), Vmm::Gone, receive(5), StartIncoming),
        ("tried, next one", Some(tried), Vmm::Gone, receive(6), StartIncoming),
        ("comes back to where it was", Some(ran()), live(HandedOver), receive(7), Quit),
        ("comes back, VMM gone", Some(handed_over()), Vmm::Gone, receive(7), StartIncoming),
        ("owner, COMMIT on its way", Some(waits(M)), waiting(P::Ready), run(5), Nothing),
        ("owner by decision", Some(waits(M)), waiting(P::Ready), run(6), TakeOver),
        ("owner by decision, nothing in it", Some(waits(M)), waiting(P::Copying), run(6), Quit),
        ("owner by decision, stopped", Some(waits(M)), waiting(P::Ready), stop(6), Quit),
    ]);
}

/// No VMM is started without all disks of its domain; nothing else waits for them.
#[test]
fn a_domain_starts_when_its_disks_are_here() {
    use Action::*;
    use VmmState::*;
    let other_start = DomainRecord { start_generation: Some(7), ..record() };
    let came = DomainRecord { start_generation: None, ..record() };
    // What is said of a wait is to count for this epoch and this start, so it is written first.
    let rows: Vec<Row> = vec![
        ("new", None, Vmm::Gone, run(5), AwaitDisks),
        ("written down", Some(record()), Vmm::Gone, run(5), Nothing),
        ("written for an older epoch", Some(record()), Vmm::Gone, run(6), AwaitDisks),
        ("written for another start", Some(other_start), Vmm::Gone, run(5), AwaitDisks),
        ("host rebooted", Some(ended(EndReason::HostRebooted)), Vmm::Gone, run(5), AwaitDisks),
        ("started again", Some(ended(EndReason::Shutdown)), Vmm::Gone, start_again(2), AwaitDisks),
        ("shut down", Some(ended(EndReason::Shutdown)), Vmm::Gone, run(5), Nothing),
        ("crashed", Some(ended(EndReason::Crash)), Vmm::Gone, run(5), Nothing),
        ("handed over", Some(handed_over()), Vmm::Gone, run(6), Nothing),
        ("handed over, given back", Some(handed_over()), Vmm::Gone, run(7), AwaitDisks),
        ("to stop", None, Vmm::Gone, stop(5), Adopt),
        ("no longer wanted", Some(record()), Vmm::Gone, Wanted::Absent, Remove),
        ("runs", Some(ran()), live(Running), run(5), Nothing),
        ("runs, to stop", Some(ran()), live(Running), stop(5), PowerButton),
        ("to receive", None, Vmm::Gone, receive(5), AwaitDisks),
        ("to receive, written down", Some(came), Vmm::Gone, receive(5), Nothing),
        ("waits for its guest", Some(waits(M)), live(Incoming), receive(5), PrepareIncoming),
    ];
    for disks in [Disks::Waiting("copying".into()), Disks::Failed("gone".into())] {
        for (what, record, vmm, wanted, expected) in &rows {
            let action = ask_with(&disks, record.clone(), vmm, wanted, &progress());
            assert_eq!(action, *expected, "{what}, {disks:?}");
        }
    }
    // What was written down for the wait is what the start goes on from.
    assert_eq!(ask(record(), Vmm::Gone, run(5), progress()), Start);
    assert_eq!(ask(record(), Vmm::Gone, receive(5), progress()), StartIncoming);
}

#[test]
fn without_a_desired_nothing_ends_and_without_a_place_in_it_all_does() {
    use Action::*;
    use VmmState::*;
    for vmm in [live(Running), live(Incoming), live(HandedOver), silent()] {
        assert_eq!(ask(ran(), vmm, Wanted::Unknown, progress()), Nothing);
    }
    check(vec![
        ("unknown, gone", Some(ran()), Vmm::Gone, Wanted::Unknown, Settle),
        (
            "unknown, ended",
            Some(ended(EndReason::HostRebooted)),
            Vmm::Gone,
            Wanted::Unknown,
            Nothing,
        ),
        (
            "unclear",
            Some(ran()),
            live(Running),
            Wanted::Unclear("why".into()),
            Refuse("why".into()),
        ),
        ("absent, runs", Some(ran()), live(Running), Wanted::Absent, Quit),
        ("absent, hangs", Some(ran()), silent(), Wanted::Absent, WaitUntil(NOW + 9000)),
        ("absent, waits", Some(waits(M)), live(Incoming), Wanted::Absent, Quit),
        ("absent, ended", Some(ended(EndReason::Crash)), Vmm::Gone, Wanted::Absent, Remove),
        ("absent, handed over", Some(handed_over()), Vmm::Gone, Wanted::Absent, Remove),
        ("absent, nothing known", None, Vmm::Gone, Wanted::Absent, Remove),
        ("absent, without a record", None, live(Running), Wanted::Absent, Quit),
    ]);
}

/// Each patience has its end.
#[test]
fn stopping_goes_from_the_button_to_the_kill() {
    use Action::*;
    let at = |progress: Progress| ask(ran(), live(VmmState::Running), stop(5), progress);
    let pressed = |ago: u64| Progress { button_ms: Some(NOW - ago), ..progress() };
    assert_eq!(at(progress()), PowerButton);
    assert_eq!(at(pressed(10_000)), WaitUntil(NOW + 50_000));
    assert_eq!(at(pressed(60_000)), Quit);
    let quit = |ago: u64| Progress { quit_ms: Some(NOW - ago), ..pressed(70_000) };
    assert_eq!(at(quit(1000)), WaitUntil(NOW + 9000));
    assert_eq!(at(quit(10_000)), Kill);
    assert_eq!(at(Progress { killed: true, ..quit(10_000) }), Nothing);
    let at_once = assigned(5, Role::Owner(Owner { grace: Duration::ZERO, ..owner(false) }));
    assert_eq!(ask(ran(), live(VmmState::Running), at_once, progress()), Quit);
    // Asked to run again while the guest obeys the button: a new start, once it is down.
    let again = ask(ran(), live(VmmState::Running), start_again(2), pressed(1000));
    assert_eq!(again, Nothing);
    // The guest is gone: the process has its time to write why.
    let exited = |ago| Progress { exited_ms: Some(NOW - ago), ..progress() };
    let gone = |ago| ask(ran(), live(VmmState::Exited), run(5), exited(ago));
    assert_eq!((gone(0), gone(10_000)), (WaitUntil(NOW + 10_000), Kill));
}

#[test]
fn a_stop_cancels_a_migration_first_and_once() {
    let mut wanted = send(false);
    if let Wanted::Assigned(assigned) = &mut wanted
        && let Role::Owner(owner) = &mut assigned.role
    {
        owner.power = Power::Stopped;
    }
    let copying =
        || migrating(VmmState::Running, MigrationRole::Source, MigrationProgress::Copying);
    assert_eq!(ask(ran(), copying(), wanted.clone(), progress()), Action::CancelMigration);
    let told = Progress { cancelled: Some(M.into()), ..progress() };
    assert_eq!(ask(ran(), copying(), send(true), told.clone()), Action::Nothing);
    assert_eq!(ask(ran(), copying(), wanted, told), Action::PowerButton);
}

#[test]
fn what_hangs_at_its_start_is_ended_and_what_has_run_is_not() {
    let long_ago = || Vmm::Silent { since_ms: NOW - 60_000, handed_to: 0 };
    assert_eq!(ask(waits(M), long_ago(), receive(5), progress()), Action::Kill);
    assert_eq!(ask(waits(M), long_ago(), run(5), progress()), Action::Kill);
    let killed = Progress { killed: true, ..progress() };
    assert_eq!(ask(waits(M), long_ago(), run(5), killed), Action::Nothing);
    assert_eq!(ask(ran(), long_ago(), run(5), progress()), Action::Nothing);
}

#[test]
fn a_vmm_is_told_once_to_take_over() {
    let told = |epoch| Progress { taken_over: Some(epoch), ..progress() };
    let ready =
        || migrating(VmmState::Incoming, MigrationRole::Destination, MigrationProgress::Ready);
    assert_eq!(ask(waits(M), ready(), run(6), told(6)), Action::Nothing);
    assert_eq!(ask(waits(M), ready(), run(7), told(6)), Action::TakeOver);
    assert_eq!(ask(ran(), live(VmmState::HandedOver), run(7), told(7)), Action::Nothing);
}

#[test]
fn a_vmm_that_cannot_listen_is_told_once() {
    let failed = Progress { prepare_failed: Some((M.into(), "no".into())), ..progress() };
    assert_eq!(ask(waits(M), live(VmmState::Incoming), receive(5), failed), Action::Nothing);
    let told = Progress { prepared: Some(M.into()), ..progress() };
    assert_eq!(ask(waits(M), live(VmmState::Incoming), receive(5), told), Action::Nothing);
}
