//! What a destination does.

use super::cables::Message;
use super::{DA, DE, DS, World};

impl World {
    pub(super) fn step_destination(&mut self) -> bool {
        let Some(action) = self.destination.as_ref().and_then(|d| d.action) else {
            if self.destination.as_ref().is_some_and(|d| d.machine.state() == DS::Idle) {
                self.destination_event(DE::Start);
                return true;
            }
            return false;
        };
        match action {
            // The source's step connects. One that never comes is given up.
            DA::Listen if self.source_is_over() => self.destination_event(DE::Failed),
            DA::Listen => return false,
            DA::Greet => match self.cables.read(0, true, false, &mut self.chance) {
                Some(Some(Message::Hello)) => {
                    self.answer(0, Message::Welcome);
                    self.destination_event(DE::Accepted);
                }
                Some(Some(_)) => self.destination_event(DE::Rejected),
                Some(None) => self.destination_event(DE::LinkLost),
                None => return false,
            },
            DA::Join => {
                if self.destination.as_ref().is_some_and(|d| d.joined == self.cables.count()) {
                    self.destination_event(DE::Joined);
                    return true;
                }
                match self.cables.read_any(0, &mut self.chance) {
                    Some(Some((cable @ 1.., Message::Join))) => {
                        if let Some(destination) = &mut self.destination {
                            destination.joined += 1;
                        }
                        self.answer(cable, Message::Joined);
                    }
                    Some(Some((0, Message::Abort))) => self.destination_event(DE::Aborted),
                    Some(Some(other)) => panic!("{other:?} before all have joined"),
                    Some(None) => self.destination_event(DE::LinkLost),
                    None => return false,
                }
            }
            DA::Receive => return self.receive(),
            DA::Restore => {
                let failed = self.chance.one_in(self.faults.restore);
                self.destination_event(if failed { DE::Failed } else { DE::Restored });
            }
            DA::SyncDisks => {
                let failed = self.chance.one_in(self.faults.disk);
                if !failed {
                    self.disk.sync_there();
                }
                self.destination_event(if failed { DE::Failed } else { DE::Synced });
            }
            DA::LockDisks => {
                assert!(!self.disk.shared || !self.disk.open_here, "locked by two");
                let failed = self.chance.one_in(self.faults.disk * 4);
                self.disk.open_there = !failed;
                self.destination_event(if failed { DE::Failed } else { DE::DisksLocked });
            }
            DA::AwaitCommit => return self.await_commit(),
            DA::AwaitController => return false,
            DA::Resume => {
                self.disk.check_moved();
                if let Some(destination) = &mut self.destination {
                    destination.runs = true;
                }
                self.moved = true;
                self.answer(0, Message::Running);
                self.destination_event(DE::Resumed);
            }
            DA::Finish => return false,
        }
        true
    }

    /// What comes on any connection; behind a question of the first one, on the others alone,
    /// until all is here that it speaks of.
    fn receive(&mut self) -> bool {
        let Some(destination) = &mut self.destination else { return false };
        let here = match &destination.waits {
            Some(Message::Round(said) | Message::State(said)) => {
                destination.came.reaches(*said).then_some(*said)
            }
            _ => None,
        };
        if let Some(said) = here {
            if destination.waits.take() == Some(Message::State(said)) {
                assert_eq!(destination.came, said, "what was sent does not add up");
                self.destination_event(DE::StateReceived);
            } else {
                self.disk.sync_there();
                self.answer(0, Message::RoundAck);
            }
            return true;
        }
        let from = usize::from(destination.waits.is_some());
        match self.cables.read_any(from, &mut self.chance) {
            Some(Some((_, Message::Abort))) => self.destination_event(DE::Aborted),
            Some(Some((0, message @ (Message::Round(_) | Message::State(_))))) => {
                destination.waits = Some(message);
            }
            Some(Some((_, message))) => {
                destination.came.add(message.counts());
                match message {
                    Message::Pages => {}
                    Message::Blocks(blocks) => self.disk.receive(&blocks),
                    other => panic!("{other:?} among pages"),
                }
            }
            Some(None) => self.destination_event(DE::LinkLost),
            None => return false,
        }
        true
    }

    fn await_commit(&mut self) -> bool {
        if let Some(destination) = &mut self.destination
            && !std::mem::replace(&mut destination.said_ready, true)
        {
            if !self.answer(0, Message::Ready) {
                self.destination_event(DE::LinkLost);
            }
            return true;
        }
        match self.cables.read(0, true, false, &mut self.chance) {
            Some(Some(Message::Commit)) => self.destination_event(DE::CommitHeard),
            Some(Some(Message::Abort)) => self.destination_event(DE::Aborted),
            Some(Some(_)) => self.destination_event(DE::Failed),
            Some(None) => self.destination_event(DE::LinkLost),
            None => return false,
        }
        true
    }
}
