//! What clients ask, and what they are answered.

use drover_controller::raft::Input;
use drover_controller::store::{CommitError, Txn, View};
use rand::RngExt as _;

use super::{Event, KEYS, Live, PATIENCE_MS, Register, Waits, World};
use crate::sim::linearizable::Action;

impl World {
    pub(super) fn client(&mut self, client: usize) -> Result<(), String> {
        if client >= self.clients.len() {
            return Ok(());
        }
        let operation = self.begin(client);
        self.send_operation(operation)
    }

    pub(super) fn send_operation(&mut self, operation: usize) -> Result<(), String> {
        let live = &self.history[operation];
        if live.over {
            return Ok(());
        }
        let key = live.key.to_string();
        let id = self.rng.random_range(1..=self.settings.members);
        let put = |value| Txn::new().put(&Register { key: key.clone(), value });
        let input = match live.action {
            Action::Read(_) => Input::Read { waiter: Waits(operation) },
            Action::Write(value) => {
                Input::Propose { command: put(value).encode(), waiter: Waits(operation) }
            }
            Action::Swap { new, .. } => {
                let guard = match &live.swap_from {
                    Some(row) => Txn::new().unchanged(row),
                    None => Txn::new().absent::<Register>(&key),
                };
                let command = guard.and(put(new)).encode();
                Input::Propose { command, waiter: Waits(operation) }
            }
        };
        if self.members[&id].core.is_none() {
            let again = self.now + 50;
            self.at(again, Event::Send { operation });
            return Ok(());
        }
        self.history[operation].sent = true;
        self.input(id, input)
    }

    fn begin(&mut self, client: usize) -> usize {
        let key = self.rng.random_range(0..KEYS);
        let kind = self.rng.random_range(0..10);
        self.next_value += 1;
        let seen = self.clients[client].seen.get(&key).cloned();
        let (action, swap_from) = match (kind, seen) {
            (0..=3, _) => (Action::Write(self.next_value), None),
            (4..=5, Some(row)) => {
                let old = row.as_ref().map(|row| row.value.value);
                (Action::Swap { old, new: self.next_value, done: false }, row)
            }
            _ => (Action::Read(None), None),
        };
        let operation = self.history.len();
        self.history.push(Live {
            key,
            client,
            start: self.now,
            end: None,
            action,
            swap_from,
            sent: false,
            over: false,
            never: false,
        });
        self.at(self.now + PATIENCE_MS, Event::GiveUp { operation });
        operation
    }

    pub(super) fn committed(
        &mut self,
        operation: usize,
        result: Result<u64, CommitError>,
    ) -> Result<(), String> {
        if self.history[operation].over {
            return Ok(());
        }
        let done = match result {
            Ok(_) => true,
            Err(CommitError::Guard { .. }) => false,
            Err(CommitError::NotLeader { .. } | CommitError::Busy) => {
                // Surely not written: the client asks elsewhere.
                self.history[operation].sent = false;
                let again = self.now + self.rng.random_range(1..60);
                self.at(again, Event::Send { operation });
                return Ok(());
            }
            Err(error) => return Err(format!("operation {operation}: {error}")),
        };
        match &mut self.history[operation].action {
            Action::Swap { done: was_done, .. } => *was_done = done,
            Action::Write(_) if done => {}
            action => return Err(format!("{action:?} ended as done: {done}")),
        }
        if done {
            self.summary.acknowledged += 1;
        } else {
            self.summary.refused += 1;
        }
        self.end(operation);
        Ok(())
    }

    pub(super) fn read(&mut self, id: u64, operation: usize) {
        if self.history[operation].over {
            return;
        }
        let Some(core) = &self.members[&id].core else { return };
        let view = View::from(core.state().clone());
        let (key, client) = (self.history[operation].key, self.history[operation].client);
        let row = view.get::<Register>(&key.to_string());
        self.history[operation].action = Action::Read(row.as_ref().map(|row| row.value.value));
        if let Some(client) = self.clients.get_mut(client) {
            client.seen.insert(key, row);
        }
        self.summary.reads += 1;
        self.end(operation);
    }

    fn end(&mut self, operation: usize) {
        let live = &mut self.history[operation];
        live.end = Some(self.now);
        live.over = true;
        let (client, what) =
            (live.client, format!("{operation} on {}: {:?}", live.key, live.action));
        self.next(client);
        self.trace(|| what);
    }

    pub(super) fn give_up(&mut self, operation: usize) {
        let live = &mut self.history[operation];
        if live.over {
            return;
        }
        live.over = true;
        // A read that was not answered, or a write that nobody took, is nothing at all.
        live.never = !live.sent || matches!(live.action, Action::Read(_));
        let client = live.client;
        self.summary.unknown += 1;
        self.next(client);
    }

    fn next(&mut self, client: usize) {
        if client < self.clients.len() {
            let next = self.now + self.rng.random_range(1..400);
            self.at(next, Event::Client { client });
        }
    }
}
