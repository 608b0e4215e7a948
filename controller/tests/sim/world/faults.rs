//! What goes wrong, and its end.

use drover_controller::raft::Input;
use rand::RngExt as _;

use super::{Event, World};

impl World {
    pub(super) fn fault(&mut self) -> Result<(), String> {
        if self.calm {
            return Ok(());
        }
        let id = self.rng.random_range(1..=self.settings.members);
        match self.rng.random_range(0..12) {
            0..=2 => self.crash(id),
            3 => {
                for id in 1..=self.settings.members {
                    self.crash(id);
                }
            }
            4..=6 => {
                let writes = self.rng.random_range(0..6);
                self.members[&id].disk.fail_in(writes);
            }
            7..=10 => {
                self.network.change(self.settings.members, &mut self.rng);
                self.trace(|| "the network changes".into());
            }
            _ => self.input(id, Input::TransferLeadership)?,
        }
        let next = self.now + self.rng.random_range(200..2_500);
        self.at(next, Event::Fault);
        Ok(())
    }

    pub(super) fn end_faults(&mut self) -> Result<(), String> {
        self.calm = true;
        self.network.calm();
        for id in 1..=self.settings.members {
            self.members[&id].disk.fail_in(u32::MAX);
            if self.members[&id].core.is_none() {
                self.start(id)?;
            }
        }
        self.trace(|| "the faults are over".into());
        Ok(())
    }
}
