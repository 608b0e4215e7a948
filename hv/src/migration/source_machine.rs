//! What a source does next: pure, so that a simulator can crash it between any two steps.

use std::fmt;

/// Where a source is. The guest runs in all states up to [`Copying`](Self::Copying).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceState {
    /// Nothing was done.
    Idle,
    /// Making the connection.
    Connecting,
    /// HELLO is out.
    Greeting,
    /// The further connections are being made.
    Joining,
    /// Disks go over, the guest runs.
    CopyingDisks,
    /// Pages go over, and what is written to disks; the guest runs.
    Copying,
    /// The guest is being stopped, its state saved.
    Stopping,
    /// The last pages and the state go over.
    Sending,
    /// The destination restores.
    AwaitingReady,
    /// The hand-over is being written down.
    HandingOver,
    /// It is on disk; the disks are being let go of.
    Releasing,
    /// COMMIT goes out, or is out.
    Committing,
    /// It failed in time: the guest is being resumed here.
    Resuming,
    /// The destination runs.
    Succeeded,
    /// The guest runs here as if nothing had happened.
    Failed,
    /// Handed over, and the destination was not heard: the controller decides.
    HandedOver,
    /// The controller decided that the guest runs here; its disks are being locked again.
    Relocking,
    /// It is being resumed.
    TakingOver,
    /// It runs here again, by the controller's decision.
    Owner,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceEvent {
    /// Begin.
    Start,
    /// There is a connection.
    Connected,
    /// WELCOME.
    Welcomed,
    /// All connections are there.
    Joined,
    /// A pass over disks or memory is done, and another is worth it.
    RoundDone,
    /// What is left of the disks goes along with memory.
    DisksCopied,
    /// A pass is done, and the rest fits the pause.
    Converged,
    /// The guest stands still, and its state is saved.
    Stopped,
    /// The last pages and the state are out.
    LastSent,
    /// READY.
    ReadyHeard,
    /// The hand-over is on disk.
    HandoverWritten,
    /// It could not be written, and is surely not on disk.
    HandoverWithdrawn,
    /// It could not be written, and may be on disk all the same.
    HandoverUnclear,
    /// The disks are closed, and their locks free.
    DisksReleased,
    /// RUNNING.
    RunningHeard,
    /// Anything went wrong: the link, the machine, a limit, a cancellation.
    Failed,
    /// The guest runs again.
    Resumed,
    /// The controller says that the guest runs here, under a greater epoch.
    TakeOver,
    /// The disks are open and locked again.
    DisksLocked,
}

/// What to do now. Each ends with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceAction {
    /// Connect.
    Connect,
    /// Send HELLO, wait for the answer.
    Greet,
    /// Make the further connections that WELCOME allows.
    Join,
    /// One pass over the disks.
    CopyDisks,
    /// One pass over memory, and what was written to disks.
    CopyRound,
    /// Stop the guest, save its state.
    Stop,
    /// Send the last blocks, the last pages and the state.
    SendLast,
    /// Wait for READY.
    AwaitReady,
    /// Write the hand-over down.
    WriteHandover,
    /// Close the disks: from here on nothing can be written to them.
    ReleaseDisks,
    /// Send COMMIT, wait for RUNNING.
    Commit,
    /// Open and lock the disks.
    LockDisks,
    /// Let the guest run here.
    Resume,
    /// Nothing more by itself.
    Finish,
}

/// An event that cannot happen in this state: a defect of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalTransition {
    /// The state.
    pub state: SourceState,
    /// The event.
    pub event: SourceEvent,
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "source: {:?} in state {:?}", self.event, self.state)
    }
}

/// A source's state machine.
#[derive(Debug, Clone)]
pub struct SourceMachine {
    state: SourceState,
}

impl Default for SourceMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl SourceMachine {
    /// Idle.
    pub fn new() -> Self {
        Self { state: SourceState::Idle }
    }

    /// Where it is.
    pub fn state(&self) -> SourceState {
        self.state
    }

    /// Takes an event; answers what to do.
    ///
    /// # Errors
    /// When the event is not legal here; the state stays.
    pub fn step(&mut self, event: SourceEvent) -> Result<SourceAction, IllegalTransition> {
        let Some((state, action)) = transition(self.state, event) else {
            return Err(IllegalTransition { state: self.state, event });
        };
        self.state = state;
        Ok(action)
    }
}

/// The table of legal transitions.
fn transition(state: SourceState, event: SourceEvent) -> Option<(SourceState, SourceAction)> {
    use {SourceAction as A, SourceEvent as E, SourceState as S};
    Some(match (state, event) {
        (S::Idle, E::Start) => (S::Connecting, A::Connect),
        (S::Connecting, E::Connected) => (S::Greeting, A::Greet),
        (S::Greeting, E::Welcomed) => (S::Joining, A::Join),
        (S::Joining, E::Joined) | (S::CopyingDisks, E::RoundDone) => {
            (S::CopyingDisks, A::CopyDisks)
        }
        (S::CopyingDisks, E::DisksCopied) => (S::Copying, A::CopyRound),
        (S::Copying, E::RoundDone) => (S::Copying, A::CopyRound),
        (S::Copying, E::Converged) => (S::Stopping, A::Stop),
        (S::Stopping, E::Stopped) => (S::Sending, A::SendLast),
        (S::Sending, E::LastSent) => (S::AwaitingReady, A::AwaitReady),
        (S::AwaitingReady, E::ReadyHeard) => (S::HandingOver, A::WriteHandover),

        // The guest has not been stopped: nothing to undo.
        (S::Connecting | S::Greeting | S::Joining | S::CopyingDisks | S::Copying, E::Failed) => {
            (S::Failed, A::Finish)
        }
        // It may have been, and COMMIT is not out: it runs here.
        (S::Stopping | S::Sending | S::AwaitingReady | S::HandingOver, E::Failed)
        | (S::HandingOver, E::HandoverWithdrawn) => (S::Resuming, A::Resume),
        (S::Resuming, E::Resumed) => (S::Failed, A::Finish),

        // The line. Behind it nothing but the controller makes the guest run here.
        (S::HandingOver, E::HandoverWritten) => (S::Releasing, A::ReleaseDisks),
        (S::Releasing, E::DisksReleased) => (S::Committing, A::Commit),
        // Without its disks the destination could not run: no COMMIT.
        (S::HandingOver, E::HandoverUnclear)
        | (S::Releasing | S::Committing | S::Relocking, E::Failed) => (S::HandedOver, A::Finish),
        (S::Committing, E::RunningHeard) => (S::Succeeded, A::Finish),
        // No guest without the locks of its disks.
        (S::HandedOver, E::TakeOver) => (S::Relocking, A::LockDisks),
        (S::Relocking, E::DisksLocked) => (S::TakingOver, A::Resume),
        (S::TakingOver, E::Resumed) => (S::Owner, A::Finish),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use SourceEvent as E;
    use SourceState as S;

    const STATES: [S; 19] = [
        S::Idle,
        S::Connecting,
        S::Greeting,
        S::Joining,
        S::CopyingDisks,
        S::Copying,
        S::Stopping,
        S::Sending,
        S::AwaitingReady,
        S::HandingOver,
        S::Releasing,
        S::Committing,
        S::Resuming,
        S::Succeeded,
        S::Failed,
        S::HandedOver,
        S::Relocking,
        S::TakingOver,
        S::Owner,
    ];
    const EVENTS: [E; 19] = [
        E::Start,
        E::Connected,
        E::Welcomed,
        E::Joined,
        E::RoundDone,
        E::DisksCopied,
        E::Converged,
        E::Stopped,
        E::LastSent,
        E::ReadyHeard,
        E::HandoverWritten,
        E::HandoverWithdrawn,
        E::HandoverUnclear,
        E::DisksReleased,
        E::RunningHeard,
        E::Failed,
        E::Resumed,
        E::TakeOver,
        E::DisksLocked,
    ];

    /// I1: from behind the line no event but the controller's decision leads to a resume, however
    /// long the chain of events.
    #[test]
    fn nothing_but_a_decision_resumes_after_the_hand_over() {
        let mut reached = vec![S::Releasing, S::HandedOver, S::Succeeded];
        let mut next = 0;
        while let Some(state) = reached.get(next).copied() {
            next += 1;
            for event in EVENTS.into_iter().filter(|event| *event != E::TakeOver) {
                if let Some((to, action)) = transition(state, event) {
                    assert_ne!(action, SourceAction::Resume, "{state:?} {event:?}");
                    if !reached.contains(&to) {
                        reached.push(to);
                    }
                }
            }
        }
    }

    /// I5: before the line, every state takes a failure, and ends in one in which the guest runs.
    #[test]
    fn every_failure_before_the_hand_over_ends_with_the_guest_running() {
        for state in STATES {
            let stopped = [S::Stopping, S::Sending, S::AwaitingReady, S::HandingOver];
            let running = [S::Connecting, S::Greeting, S::Joining, S::CopyingDisks, S::Copying];
            match transition(state, E::Failed) {
                Some((to, _)) if running.contains(&state) => assert_eq!(to, S::Failed),
                Some((to, action)) if stopped.contains(&state) => {
                    assert_eq!((to, action), (S::Resuming, SourceAction::Resume));
                    assert_eq!(transition(to, E::Resumed).map(|(to, _)| to), Some(S::Failed));
                }
                Some((to, _)) => {
                    assert!([S::Releasing, S::Committing, S::Relocking].contains(&state));
                    assert_eq!(to, S::HandedOver);
                }
                None => assert!(!running.contains(&state) && !stopped.contains(&state)),
            }
        }
    }

    /// Locks: COMMIT is said when the disks are closed and at no other time; a source that comes
    /// back has locked them first.
    #[test]
    fn no_commit_with_locks_and_no_take_over_without() {
        for (state, event) in STATES.iter().flat_map(|s| EVENTS.map(|event| (*s, event))) {
            let Some((to, action)) = transition(state, event) else { continue };
            let released = event == E::DisksReleased;
            assert_eq!(action == SourceAction::Commit, released, "{state:?} {event:?}");
            assert_eq!(to == S::TakingOver, event == E::DisksLocked, "{state:?} {event:?}");
        }
    }

    #[test]
    fn an_illegal_event_changes_nothing() {
        let mut machine = SourceMachine::new();
        assert!(machine.step(E::ReadyHeard).is_err());
        assert_eq!(machine.state(), S::Idle);
    }
}
