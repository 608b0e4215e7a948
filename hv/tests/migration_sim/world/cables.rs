//! The cables: a connection each, on which messages keep their order; between two connections
//! nothing does. The first is where all is said.

use std::collections::VecDeque;

use drover_hv::migration::wire::Sent;

use super::super::Chance;
use super::super::disk::Version;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Message {
    Hello,
    Welcome,
    Join,
    Joined,
    Pages,
    Blocks(Vec<(usize, Version)>),
    Round(Sent),
    RoundAck,
    State(Sent),
    Ready,
    Commit,
    Running,
    Abort,
}

impl Message {
    /// What both sides count of it.
    pub(super) fn counts(&self) -> Sent {
        match self {
            Self::Pages => Sent { pages: 1, disk_bytes: 0 },
            Self::Blocks(blocks) => Sent { pages: 0, disk_bytes: blocks.len() as u64 },
            _ => Sent::default(),
        }
    }
}

#[derive(Default)]
struct Cable {
    to_destination: VecDeque<Message>,
    to_source: VecDeque<Message>,
    cut: bool,
}

/// What a side gets when it reads: nothing yet, or a message, or that the connection is gone.
pub(super) type Read = Option<Option<Message>>;

pub(super) struct Cables {
    cables: Vec<Cable>,
    /// Both sides have them open.
    pub(super) connected: bool,
    /// There is a network at all.
    pub(super) up: bool,
}

impl Cables {
    pub(super) fn new(count: usize) -> Self {
        let cables = (0..count).map(|_| Cable::default()).collect();
        Self { cables, connected: false, up: true }
    }

    pub(super) fn count(&self) -> usize {
        self.cables.len()
    }

    pub(super) fn is_lost(&self, cable: usize) -> bool {
        !self.connected || self.cables[cable].cut
    }

    fn any_lost(&self) -> bool {
        (0..self.count()).any(|cable| self.is_lost(cable))
    }

    /// Says so on the first connection; whether it is heard is another matter.
    pub(super) fn last_words(&mut self, to_destination: bool) {
        if !self.cables[0].cut {
            self.queue(0, to_destination).push_back(Message::Abort);
        }
        self.connected = false;
    }

    fn queue(&mut self, cable: usize, to_destination: bool) -> &mut VecDeque<Message> {
        let cable = &mut self.cables[cable];
        if to_destination { &mut cable.to_destination } else { &mut cable.to_source }
    }

    /// Sends, unless the cable is cut: then the sender may or may not notice, and the message is
    /// gone.
    pub(super) fn send(
        &mut self,
        cable: usize,
        to_destination: bool,
        message: Message,
        chance: &mut Chance,
    ) -> bool {
        if self.is_lost(cable) {
            return self.cables[cable].cut && chance.one_in(2);
        }
        self.queue(cable, to_destination).push_back(message);
        true
    }

    /// The next message of one connection; `all`: the end of any other is the end of this.
    pub(super) fn read(
        &mut self,
        cable: usize,
        to_destination: bool,
        all: bool,
        chance: &mut Chance,
    ) -> Read {
        let lost = self.is_lost(cable) || (all && self.any_lost());
        // Whoever has two things to look at may look at either first.
        if lost && all && chance.one_in(2) {
            return Some(None);
        }
        match self.queue(cable, to_destination).pop_front() {
            Some(message) => Some(Some(message)),
            None if lost => Some(None),
            None => None,
        }
    }

    /// The next message towards the destination of any connection from this one on.
    pub(super) fn read_any(
        &mut self,
        from: usize,
        chance: &mut Chance,
    ) -> Option<Option<(usize, Message)>> {
        let full: Vec<usize> =
            (from..self.count()).filter(|n| !self.cables[*n].to_destination.is_empty()).collect();
        let lost = self.any_lost();
        if full.is_empty() || (lost && chance.one_in(2)) {
            return lost.then_some(None);
        }
        let cable = full[chance.below(full.len())];
        let message = self.cables[cable].to_destination.pop_front();
        Some(message.map(|message| (cable, message)))
    }

    /// One of them, or all. What is on its way is lost, or was already there.
    pub(super) fn cut(&mut self, one: Option<usize>, chance: &mut Chance) {
        self.up &= one.is_some();
        let all = 0..self.cables.len();
        for cable in all.filter(|cable| one.is_none_or(|one| one == *cable)) {
            let cable = &mut self.cables[cable];
            cable.cut = true;
            for queue in [&mut cable.to_source, &mut cable.to_destination] {
                if chance.one_in(2) {
                    queue.clear();
                }
            }
        }
    }
}
