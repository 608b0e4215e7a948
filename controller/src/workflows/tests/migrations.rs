//! Every stage of a migration against what either side can report: where it goes from there,
//! and what both nodes are told. The table is the one in [`migration`](crate::workflows::migration).

use drover_proto::agent::v1::assignment::Role;
use drover_proto::agent::v1::{
    MigrationProgress as P, MigrationRole, ObservedDomain, ObservedState as S,
};
use drover_proto::v1::{DomainState, ExitReason, OperationState};

use super::lab::{Lab, Observe, ended};
use crate::model::MigrationStage as Stage;
use crate::workflows::Refusal;
use crate::workflows::migration::{
    CANCEL_WAIT_MS, COMMIT_WAIT_MS, PREPARE_WAIT_MS, SETTLE_WAIT_MS,
};

const SOURCE: MigrationRole = MigrationRole::Source;
const DESTINATION: MigrationRole = MigrationRole::Destination;

/// `vm` runs on `a` under epoch 1 and is asked to go to `b`, where it will have epoch 2.
struct Case {
    lab: Lab,
    id: String,
}

impl Case {
    fn begun() -> Self {
        let mut lab = Lab::with_nodes(&["a", "b"]);
        lab.running("vm", "a");
        let id = lab.migrate("vm", "b").unwrap().id;
        lab.settle();
        Self { lab, id }
    }

    fn copying() -> Self {
        let mut case = Self::begun();
        case.destination(S::Incoming, P::Listening);
        assert_eq!(case.stage(), Some(Stage::Copying));
        case
    }

    fn cancelling() -> Self {
        let mut case = Self::copying();
        case.source(S::Running, P::Copying);
        let id = case.id.clone();
        case.lab.cancel(&id).unwrap();
        case.lab.settle();
        assert_eq!(case.stage(), Some(Stage::Cancelling));
        case
    }

    fn handed_over() -> Self {
        let mut case = Self::copying();
        case.destination(S::Incoming, P::Ready);
        case.source(S::HandedOver, P::HandedOver);
        assert_eq!(case.stage(), Some(Stage::HandedOver));
        case
    }

    fn granted() -> Self {
        let mut case = Self::handed_over();
        case.after(u64::try_from(COMMIT_WAIT_MS).unwrap());
        assert_eq!(case.stage(), Some(Stage::Granted));
        case
    }

    fn says(&mut self, node: &str, domain: ObservedDomain) {
        self.lab.report(node, vec![domain]);
        self.lab.settle();
    }

    fn source(&mut self, state: S, progress: P) {
        let domain = self.lab.observed("vm", 1, state).migrating(&self.id, SOURCE, progress);
        self.says("a", domain);
    }

    fn destination(&mut self, state: S, progress: P) {
        let domain = self.lab.observed("vm", 2, state).migrating(&self.id, DESTINATION, progress);
        self.says("b", domain);
    }

    /// Time passes, both agents are heard.
    fn after(&mut self, ms: u64) {
        self.lab.pass_time(ms);
        self.lab.beat("a");
        self.lab.beat("b");
        self.lab.settle();
    }

    /// One node is silent until it is lost.
    fn lose(&mut self, lost: &str) {
        let heard = if lost == "a" { "b" } else { "a" };
        for _ in 0..2 {
            self.lab.pass_time(10_000);
            self.lab.beat(heard);
            self.lab.settle();
        }
    }

    fn stage(&self) -> Option<Stage> {
        self.lab.domain("vm").migration.map(|m| m.stage())
    }

    fn outcome(&self) -> (OperationState, String) {
        ended(&self.lab.operation(&self.id))
    }

    /// Who is told to own it now, with the epoch; both only while nobody may resume by itself.
    fn owners(&self) -> Vec<(&'static str, u64)> {
        ["a", "b"]
            .into_iter()
            .filter_map(|node| {
                let assignment = self.lab.assignment(node, "vm")?;
                matches!(assignment.role, Some(Role::Owner(_))).then_some((node, assignment.epoch))
            })
            .collect()
    }

    fn on(&self) -> (String, u64, DomainState) {
        let domain = self.lab.domain("vm");
        (domain.node.clone(), domain.epoch, domain.state())
    }

    /// The operation has ended and the domain is `a`'s alone, as it was.
    fn stayed(&self, state: OperationState, reason: &str) {
        assert_eq!(self.outcome(), (state, reason.to_owned()));
        assert_eq!(self.on(), ("a".into(), 1, DomainState::Running));
        assert_eq!(self.owners(), [("a", 1)]);
        assert!(self.lab.assignment("b", "vm").is_none(), "the destination is dropped");
        assert!(self.lab.domain("vm").operation.is_empty());
    }

    fn moved(&self, epoch: u64) {
        assert_eq!(self.outcome(), (OperationState::Succeeded, String::new()));
        assert_eq!(self.on(), ("b".into(), epoch, DomainState::Running));
        assert_eq!(self.owners(), [("b", epoch)]);
    }
}

#[test]
fn the_straight_way() {
    let mut case = Case::begun();
    assert_eq!(case.stage(), Some(Stage::Preparing));
    let source = case.lab.assignment("a", "vm").unwrap();
    assert_eq!(source.outgoing, None, "the source hears of it once the destination listens");
    let incoming = case.lab.assignment("b", "vm").unwrap();
    assert_eq!(incoming.epoch, 2);
    assert!(matches!(incoming.role, Some(Role::Incoming(_))));

    case.destination(S::Incoming, P::Listening);
    let outgoing = case.lab.assignment("a", "vm").unwrap().outgoing.unwrap();
    assert_eq!((outgoing.address.as_str(), outgoing.to_epoch), ("b:4000", 2));
    assert!(!outgoing.cancel && outgoing.token.starts_with("token-"));

    case.source(S::Running, P::Copying);
    case.destination(S::Incoming, P::Copying);
    case.destination(S::Incoming, P::Ready);
    assert_eq!(case.stage(), Some(Stage::Copying));
    case.source(S::HandedOver, P::HandedOver);
    assert_eq!(case.stage(), Some(Stage::HandedOver));
    case.destination(S::Running, P::Succeeded);
    assert_eq!(case.stage(), Some(Stage::Settling));
    assert_eq!(case.owners(), [("a", 1), ("b", 2)], "the source waits, handed over, for its word");
    case.source(S::HandedOver, P::Succeeded);
    case.moved(2);
    assert!(case.lab.assignment("a", "vm").is_none(), "the source's VMM is ended");
}

#[test]
fn the_destination_runs_before_the_source_is_heard() {
    let mut case = Case::copying();
    case.destination(S::Running, P::Succeeded);
    assert_eq!(case.stage(), Some(Stage::Settling));
    assert_eq!(case.on(), ("b".into(), 2, DomainState::Running));
    case.after(u64::try_from(SETTLE_WAIT_MS).unwrap());
    case.moved(2);
}

#[test]
fn preparing_is_over_at_once_when_it_cannot_be() {
    let mut case = Case::begun();
    case.destination(S::Failed, P::Failed);
    case.stayed(OperationState::Failed, "DESTINATION_FAILED");

    let mut case = Case::begun();
    let id = case.id.clone();
    case.lab.cancel(&id).unwrap();
    case.lab.settle();
    case.stayed(OperationState::Cancelled, "CANCELLED");

    let mut case = Case::begun();
    case.lose("b");
    case.stayed(OperationState::Failed, "DESTINATION_LOST");

    let mut case = Case::begun();
    case.after(u64::try_from(PREPARE_WAIT_MS).unwrap() + 1);
    case.stayed(OperationState::Failed, "DESTINATION_FAILED");

    let mut case = Case::begun();
    case.lose("a");
    assert_eq!(case.outcome(), (OperationState::Failed, "SOURCE_LOST".into()));
    assert_eq!(case.on(), ("a".into(), 1, DomainState::Lost));
}

#[test]
fn the_source_stays_and_the_destination_is_dropped_only_then() {
    for (make, progress) in
        [(Case::copying as fn() -> Case, P::Failed), (Case::cancelling as fn() -> Case, P::Failed)]
    {
        let mut case = make();
        assert!(case.lab.assignment("b", "vm").is_some(), "kept until the source has spoken");
        let cancelled = case.stage() == Some(Stage::Cancelling);
        case.source(S::Running, progress);
        match cancelled {
            true => case.stayed(OperationState::Cancelled, "CANCELLED"),
            false => case.stayed(OperationState::Failed, "MIGRATION_FAILED"),
        }
    }
}

#[test]
fn a_destination_that_fails_or_is_lost_makes_the_source_be_asked() {
    let mut case = Case::copying();
    case.source(S::Running, P::Copying);
    case.destination(S::Failed, P::Failed);
    assert_eq!(case.stage(), Some(Stage::Cancelling));
    assert!(case.lab.assignment("a", "vm").unwrap().outgoing.unwrap().cancel);
    case.source(S::Running, P::Failed);
    case.stayed(OperationState::Failed, "DESTINATION_FAILED");

    let mut case = Case::copying();
    case.source(S::Running, P::Copying);
    case.lose("b");
    assert_eq!(case.stage(), Some(Stage::Cancelling));
    case.source(S::Running, P::Failed);
    case.stayed(OperationState::Failed, "DESTINATION_LOST");
}

/// What an agent that was never told to begin says when it is told to cancel.
#[test]
fn a_source_that_never_began_answers_a_cancel_by_running() {
    let mut case = Case::copying();
    let id = case.id.clone();
    case.lab.cancel(&id).unwrap();
    case.lab.settle();
    let plain = case.lab.observed("vm", 1, S::Running);
    // It does not know of the cancel yet: it may still begin.
    let before = case.lab.state.revision() - 1;
    case.lab.report_knowing("a", before, vec![plain.clone()]);
    case.lab.settle();
    assert_eq!(case.stage(), Some(Stage::Cancelling));
    case.says("a", plain);
    case.stayed(OperationState::Cancelled, "CANCELLED");
}

/// I1: an agent that has just started names a domain before it has looked at it, and one whose
/// record is damaged has no epoch. Neither says that the guest stays.
#[test]
fn a_source_that_has_not_looked_vouches_for_nothing() {
    for state in [S::Unspecified, S::Running, S::Stopped] {
        let mut case = Case::cancelling();
        let unseen = case.lab.observed("vm", 0, state);
        case.says("a", unseen);
        assert_eq!(case.stage(), Some(Stage::Cancelling), "{state:?}");
        assert!(case.lab.assignment("b", "vm").is_some(), "the destination may run it");
        case.source(S::HandedOver, P::HandedOver);
        assert_eq!(case.stage(), Some(Stage::HandedOver));
        case.destination(S::Running, P::Succeeded);
        case.source(S::HandedOver, P::Succeeded);
        case.moved(2);
    }
}

#[test]
fn a_cancel_that_comes_too_late_goes_forward() {
    let mut case = Case::cancelling();
    case.source(S::HandedOver, P::HandedOver);
    assert_eq!(case.stage(), Some(Stage::HandedOver));
    let id = case.id.clone();
    assert!(matches!(
        case.lab.cancel(&id),
        Err(Refusal::Precondition { reason: "POINT_OF_NO_RETURN", .. })
    ));
    case.destination(S::Running, P::Succeeded);
    case.source(S::HandedOver, P::Succeeded);
    case.moved(2);
}

#[test]
fn a_lost_commit_is_made_good_by_a_grant() {
    let mut case = Case::handed_over();
    case.after(u64::try_from(COMMIT_WAIT_MS).unwrap() - 1);
    assert_eq!(case.stage(), Some(Stage::HandedOver));
    case.after(1);
    assert_eq!(case.stage(), Some(Stage::Granted));
    assert_eq!(case.owners(), [("a", 1), ("b", 3)], "the source's epoch is the one it gave up");
    let running = case.lab.observed("vm", 3, S::Running);
    case.says("b", running);
    case.source(S::HandedOver, P::Succeeded);
    case.moved(3);
}

/// The other side of the same race: COMMIT came after all.
#[test]
fn a_commit_that_arrives_after_the_grant_is_the_same_guest() {
    let mut case = Case::granted();
    case.destination(S::Running, P::Succeeded);
    case.source(S::HandedOver, P::Succeeded);
    case.moved(3);
}

#[test]
fn a_destination_gone_after_the_hand_over_gives_the_guest_back() {
    let mut case = Case::handed_over();
    case.destination(S::Failed, P::Failed);
    assert_eq!(case.outcome(), (OperationState::Failed, "DESTINATION_FAILED".into()));
    assert_eq!(case.owners(), [("a", 3)]);
    // The old word of the source is no news; that it runs under the new epoch is.
    case.source(S::HandedOver, P::HandedOver);
    assert_eq!(case.on(), ("a".into(), 3, DomainState::Starting));
    let resumed = case.lab.observed("vm", 3, S::Running);
    case.says("a", resumed);
    assert_eq!(case.on(), ("a".into(), 3, DomainState::Running));
}

/// Whoever was granted a domain may start it anew at any moment: it is not taken back.
#[test]
fn a_grant_is_not_taken_back() {
    let mut case = Case::granted();
    case.destination(S::Failed, P::Failed);
    assert_eq!(case.outcome(), (OperationState::Failed, "DESTINATION_FAILED".into()));
    assert_eq!(case.owners(), [("b", 3)]);
}

#[test]
fn nobody_is_granted_what_cannot_be_known() {
    let mut case = Case::handed_over();
    // READY was said before the node fell silent; COMMIT may have reached it since.
    let incoming = case.lab.observed("vm", 2, S::Incoming);
    case.lab.report("b", vec![incoming.migrating(&case.id.clone(), DESTINATION, P::Copying)]);
    case.lose("b");
    assert_eq!(case.stage(), Some(Stage::HandedOver));
    assert_eq!(case.on().2, DomainState::Lost);
    assert_eq!(case.owners(), [("a", 1)]);
    // The operation ends at its deadline, the question stays open.
    for _ in 0..80 {
        case.lab.pass_time(10_000);
        case.lab.beat("a");
        case.lab.settle();
    }
    assert_eq!(case.outcome(), (OperationState::Failed, "DESTINATION_LOST".into()));
    assert_eq!(case.stage(), Some(Stage::HandedOver));
    // Its agent comes back and says what is so.
    case.lab.hello("b", "boot-1");
    let running = case.lab.observed("vm", 2, S::Running);
    case.says("b", running.migrating(&case.id.clone(), DESTINATION, P::Succeeded));
    case.after(u64::try_from(SETTLE_WAIT_MS).unwrap());
    assert_eq!(case.on(), ("b".into(), 2, DomainState::Running));
    assert_eq!(case.owners(), [("b", 2)]);
}

#[test]
fn a_source_lost_in_the_middle() {
    // The destination runs: COMMIT was the last thing that the source did.
    let mut case = Case::copying();
    case.destination(S::Incoming, P::Ready);
    case.lose("a");
    assert_eq!(case.on().2, DomainState::Lost);
    assert_eq!(case.owners(), [("a", 1)], "READY without COMMIT: the source may still run it");
    case.destination(S::Running, P::Succeeded);
    case.moved(2);

    // The destination gave up: nothing of it can run there.
    let mut case = Case::copying();
    case.lose("a");
    case.destination(S::Failed, P::Failed);
    assert_eq!(case.outcome(), (OperationState::Failed, "SOURCE_LOST".into()));
    assert_eq!(case.on(), ("a".into(), 1, DomainState::Lost));
    assert!(case.lab.assignment("b", "vm").is_none());
}

/// The host died right after the hand-over and came back: its record on disk decides.
#[test]
fn a_rebooted_source_that_had_handed_over_lets_the_destination_take_over() {
    let mut case = Case::copying();
    case.destination(S::Incoming, P::Ready);
    case.lose("a");
    case.lab.hello("a", "boot-2");
    case.source(S::HandedOver, P::HandedOver);
    case.after(u64::try_from(COMMIT_WAIT_MS).unwrap());
    assert_eq!(case.owners(), [("a", 1), ("b", 3)]);
    let running = case.lab.observed("vm", 3, S::Running);
    case.says("b", running);
    case.after(u64::try_from(SETTLE_WAIT_MS).unwrap());
    case.moved(3);
}

/// It had not handed over: what it held is gone, and what the destination holds may be older
/// than what the guest did last. It starts again where it was.
#[test]
fn a_rebooted_source_that_had_not_handed_over_keeps_the_domain() {
    let mut case = Case::copying();
    case.destination(S::Incoming, P::Ready);
    case.lab.hello("a", "boot-2");
    let ended = case.lab.observed("vm", 1, S::Stopped);
    case.says("a", ended.because(ExitReason::Killed, "the host rebooted"));
    assert_eq!(case.outcome(), (OperationState::Failed, "MIGRATION_FAILED".into()));
    assert_eq!(case.owners(), [("a", 1)]);
}

#[test]
fn a_deadline_asks_the_source_and_ends_the_operation_even_if_it_is_silent() {
    let mut case = Case::copying();
    case.source(S::Running, P::Copying);
    case.after(661_000);
    assert_eq!(case.stage(), Some(Stage::Cancelling));
    assert_eq!(case.outcome().0, OperationState::Running);
    case.after(u64::try_from(CANCEL_WAIT_MS).unwrap());
    assert_eq!(case.outcome(), (OperationState::Failed, "DEADLINE_EXCEEDED".into()));
    assert_eq!(case.stage(), Some(Stage::Cancelling), "the question stays open");
    case.source(S::Running, P::Failed);
    assert_eq!(case.on(), ("a".into(), 1, DomainState::Running));
    assert!(case.lab.assignment("b", "vm").is_none());
}

/// A guest that stops in the middle of being copied takes its migration with it.
#[test]
fn a_guest_that_ends_while_it_is_copied() {
    let mut case = Case::copying();
    let off = case.lab.observed("vm", 1, S::Stopped).because(ExitReason::Shutdown, "off");
    case.says("a", off.migrating(&case.id.clone(), SOURCE, P::Failed));
    assert_eq!(case.outcome(), (OperationState::Failed, "MIGRATION_FAILED".into()));
    assert_eq!(case.on(), ("a".into(), 1, DomainState::Stopped));
}

/// Reports about another migration of the same domain are no news about this one.
#[test]
fn an_older_migration_is_not_this_one() {
    let mut case = Case::copying();
    let stale = case.lab.observed("vm", 1, S::Running).migrating("older", SOURCE, P::Failed);
    case.says("a", stale);
    assert_eq!(case.stage(), Some(Stage::Copying));
    let stale = case.lab.observed("vm", 1, S::Failed).migrating("older", DESTINATION, P::Failed);
    case.says("b", stale);
    assert_eq!(case.stage(), Some(Stage::Copying));
}

#[test]
fn one_migration_at_a_time_and_never_to_where_it_is() {
    let mut case = Case::begun();
    let second = case.lab.migrate("vm", "b");
    let id = case.id.clone();
    let busy = Refusal::Busy { name: "domains/vm".into(), operation: id, cancellable: true };
    assert_eq!(second.unwrap_err(), busy);
    let mut lab = Lab::with_nodes(&["a", "b"]);
    lab.running("vm", "a");
    let refusal = lab.migrate("vm", "a").unwrap_err();
    assert!(matches!(refusal, Refusal::Precondition { reason: "ALREADY_THERE", .. }), "{refusal}");
    assert!(matches!(lab.migrate("vm", "c"), Err(Refusal::NotFound { .. })));
}
