//! What a destination does next: pure, as its counterpart.

use std::fmt;

/// Where a destination is. Its guest runs in none of them but [`Running`](Self::Running).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DestinationState {
    /// Nothing was done.
    Idle,
    /// Waiting for the source.
    Listening,
    /// Somebody connected: HELLO is awaited and checked.
    Greeting,
    /// It was the source: its further connections are awaited.
    Joining,
    /// Pages come in.
    Receiving,
    /// The state is here and is being restored.
    Restoring,
    /// Restored; what came for the disks is being made durable.
    Syncing,
    /// All is here, durable and verified: COMMIT, or the controller.
    Ready,
    /// The disks are being locked, where another VMM had them.
    Locking,
    /// The guest is being resumed.
    Resuming,
    /// The guest runs here.
    Running,
    /// It never ran here and never will.
    Failed,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationEvent {
    /// Begin.
    Start,
    /// Somebody connected.
    Connected,
    /// It was the source, and the machines fit.
    Accepted,
    /// All its connections are there.
    Joined,
    /// It was not the source.
    Rejected,
    /// The last page and the state are here.
    StateReceived,
    /// The machine has taken the state over.
    Restored,
    /// Nothing of the disks is in the cache alone any more.
    Synced,
    /// COMMIT.
    CommitHeard,
    /// The link is gone.
    LinkLost,
    /// The source gave up before the hand-over, and says so.
    Aborted,
    /// The controller says that the guest runs here, under a greater epoch.
    TakeOver,
    /// All disks are open and locked.
    DisksLocked,
    /// The guest runs.
    Resumed,
    /// Anything else went wrong.
    Failed,
}

/// What to do now. Each ends with an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationAction {
    /// Wait for a connection.
    Listen,
    /// Read HELLO and answer it.
    Greet,
    /// Take the further connections that WELCOME allowed.
    Join,
    /// Take in pages until the state comes.
    Receive,
    /// Restore the state.
    Restore,
    /// Make the disks durable.
    SyncDisks,
    /// Say READY; wait for COMMIT, the loss of the link, or the controller.
    AwaitCommit,
    /// Wait for the controller alone.
    AwaitController,
    /// Open and lock the disks that are shared with the source.
    LockDisks,
    /// Let the guest run, announce it, say RUNNING.
    Resume,
    /// Nothing more.
    Finish,
}

/// An event that cannot happen in this state: a defect of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IllegalTransition {
    /// The state.
    pub state: DestinationState,
    /// The event.
    pub event: DestinationEvent,
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "destination: {:?} in state {:?}", self.event, self.state)
    }
}

/// A destination's state machine.
#[derive(Debug, Clone)]
pub struct DestinationMachine {
    state: DestinationState,
}

impl Default for DestinationMachine {
    fn default() -> Self {
        Self::new()
    }
}

impl DestinationMachine {
    /// Idle.
    pub fn new() -> Self {
        Self { state: DestinationState::Idle }
    }

    /// Where it is.
    pub fn state(&self) -> DestinationState {
        self.state
    }

    /// Takes an event; answers what to do.
    ///
    /// # Errors
    /// When the event is not legal here; the state stays.
    pub fn step(
        &mut self,
        event: DestinationEvent,
    ) -> Result<DestinationAction, IllegalTransition> {
        let Some((state, action)) = transition(self.state, event) else {
            return Err(IllegalTransition { state: self.state, event });
        };
        self.state = state;
        Ok(action)
    }
}

/// The table of legal transitions.
fn transition(
    state: DestinationState,
    event: DestinationEvent,
) -> Option<(DestinationState, DestinationAction)> {
    use {DestinationAction as A, DestinationEvent as E, DestinationState as S};
    Some(match (state, event) {
        (S::Idle, E::Start) => (S::Listening, A::Listen),
        (S::Listening, E::Connected) => (S::Greeting, A::Greet),
        // A stranger must not end a migration.
        (S::Greeting, E::Rejected | E::LinkLost) => (S::Listening, A::Listen),
        (S::Greeting, E::Accepted) => (S::Joining, A::Join),
        (S::Joining, E::Joined) => (S::Receiving, A::Receive),
        (S::Receiving, E::StateReceived) => (S::Restoring, A::Restore),
        (S::Restoring, E::Restored) => (S::Syncing, A::SyncDisks),
        (S::Syncing, E::Synced) => (S::Ready, A::AwaitCommit),
        (S::Ready, E::CommitHeard | E::TakeOver) => (S::Locking, A::LockDisks),
        (S::Locking, E::DisksLocked) => (S::Resuming, A::Resume),
        // The source may have handed over: only the controller knows.
        (S::Ready, E::LinkLost | E::Failed) => (S::Ready, A::AwaitController),
        // It has not handed over and never will.
        (S::Joining | S::Receiving | S::Restoring | S::Syncing | S::Ready, E::Aborted) => {
            (S::Failed, A::Finish)
        }
        (S::Resuming, E::Resumed) => (S::Running, A::Finish),
        (S::Listening | S::Greeting, E::Failed)
        | (S::Joining | S::Receiving | S::Restoring | S::Syncing, E::Failed | E::LinkLost)
        | (S::Locking | S::Resuming, E::Failed) => (S::Failed, A::Finish),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use DestinationEvent as E;
    use DestinationState as S;

    const STATES: [S; 12] = [
        S::Idle,
        S::Listening,
        S::Greeting,
        S::Joining,
        S::Receiving,
        S::Restoring,
        S::Syncing,
        S::Ready,
        S::Locking,
        S::Resuming,
        S::Running,
        S::Failed,
    ];
    const EVENTS: [E; 15] = [
        E::Start,
        E::Connected,
        E::Accepted,
        E::Joined,
        E::Rejected,
        E::StateReceived,
        E::Restored,
        E::Synced,
        E::CommitHeard,
        E::LinkLost,
        E::Aborted,
        E::TakeOver,
        E::DisksLocked,
        E::Resumed,
        E::Failed,
    ];

    /// I1: the way to the guest begins at READY alone, with COMMIT or the controller alone, and
    /// leads over the disks' locks.
    #[test]
    fn only_commit_or_a_decision_resumes_and_only_when_ready() {
        for state in STATES {
            for event in EVENTS {
                let action = transition(state, event).map(|(_, action)| action);
                let locks = action == Some(DestinationAction::LockDisks);
                let allowed = state == S::Ready && matches!(event, E::CommitHeard | E::TakeOver);
                assert_eq!(locks, allowed, "{state:?} {event:?}");
                let resumes = action == Some(DestinationAction::Resume);
                let locked = state == S::Locking && event == E::DisksLocked;
                assert_eq!(resumes, locked, "{state:?} {event:?}");
            }
        }
    }

    /// READY is said when all that came for the disks is durable, and at no other time.
    #[test]
    fn nothing_is_ready_that_is_not_durable() {
        for (state, event) in STATES.iter().flat_map(|s| EVENTS.map(|event| (*s, event))) {
            let action = transition(state, event).map(|(_, action)| action);
            let ready = action == Some(DestinationAction::AwaitCommit);
            assert_eq!(ready, event == E::Synced && state == S::Syncing, "{state:?} {event:?}");
        }
    }

    /// Once it has failed, nothing brings it back: its memory may be half a guest.
    #[test]
    fn a_failed_destination_stays_failed() {
        assert!(EVENTS.iter().all(|event| transition(S::Failed, *event).is_none()));
    }
}
