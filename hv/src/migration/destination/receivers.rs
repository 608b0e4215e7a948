//! The destination's further connections: a thread for each, from its first word on. Whoever
//! connects and is silent, or does not know the token, has a thread of its own to wait in, and
//! harms nobody.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::super::courtesy::{Courtesy, Inherited};
use super::super::link::{Link, protocol, wait_for};
use super::super::wire::{self, Join, Kind};
use super::super::{IDLE_TIMEOUT, MigrationError};
use super::HELLO_TIMEOUT;
use super::inbox::Inbox;

const STACK_BYTES: usize = 128 << 10;

/// What a connection has to know, and which of them are there.
struct Gate {
    migration_id: String,
    token: String,
    /// By index; that of HELLO is there.
    joined: Mutex<Vec<bool>>,
}

impl Gate {
    /// Whether this one belongs to the migration, and is the only one of its index.
    fn admits(&self, payload: &[u8]) -> Result<(), String> {
        let join = Join::decode(payload).map_err(|error| error.to_string())?;
        let known =
            join.migration_id == self.migration_id && wire::same_secret(&join.token, &self.token);
        if !known {
            return Err("this migration is not expected here".into());
        }
        let mut joined = self.joined.lock().unwrap_or_else(PoisonError::into_inner);
        let last = joined.len() - 1;
        match joined.get_mut(usize::from(join.index)) {
            Some(here) if !*here => {
                *here = true;
                Ok(())
            }
            Some(_) => Err(format!("index: {}; accepted: one that is not taken", join.index)),
            None => Err(format!("index: {}; accepted: 1 to {last}", join.index)),
        }
    }
}

/// The threads. They end when this is dropped.
pub(super) struct Receivers {
    gate: Arc<Gate>,
    threads: Vec<(TcpStream, JoinHandle<()>)>,
}

impl Receivers {
    /// For so many connections, the first included.
    pub(super) fn new(migration_id: &str, token: &str, connections: u16) -> Self {
        let mut joined = vec![false; usize::from(connections.max(1))];
        joined[0] = true;
        let gate = Gate {
            migration_id: migration_id.to_owned(),
            token: token.to_owned(),
            joined: Mutex::new(joined),
        };
        Self { gate: Arc::new(gate), threads: Vec::new() }
    }

    /// Whether all are there.
    pub(super) fn are_complete(&self) -> bool {
        let joined = self.gate.joined.lock().unwrap_or_else(PoisonError::into_inner);
        joined.iter().all(|joined| *joined)
    }

    /// Whether there are any but the first.
    pub(super) fn are_none(&self) -> bool {
        self.threads.is_empty()
    }

    /// Somebody has connected.
    pub(super) fn add(
        &mut self,
        stream: TcpStream,
        inbox: &Arc<Inbox>,
        courtesy: Inherited,
    ) -> Result<(), MigrationError> {
        let link = Link::new(stream)?;
        let handle = link.handle()?;
        let (gate, inbox) = (Arc::clone(&self.gate), Arc::clone(inbox));
        let thread = std::thread::Builder::new()
            .name("mover-link".into())
            .stack_size(STACK_BYTES)
            .spawn(move || receive(link, &gate, &inbox, courtesy.begin()))
            .map_err(MigrationError::link("starting a thread for a connection"))?;
        self.threads.push((handle, thread));
        Ok(())
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        for (socket, thread) in self.threads.drain(..) {
            // It may be gone already. One that waits for its other side waits no longer.
            let _ = socket.shutdown(Shutdown::Both);
            if thread.join().is_err() {
                tracing::error!("a thread of a connection has panicked");
            }
        }
    }
}

fn receive(mut link: Link, gate: &Gate, inbox: &Inbox, courtesy: Courtesy) {
    let first = link.first(Kind::Join, HELLO_TIMEOUT).map_err(|error| error.to_string());
    if let Err(why) = first.and_then(|message| gate.admits(&message.payload)) {
        tracing::warn!(why, "a connection was refused");
        // It may be gone already.
        let _ = link.send(Kind::Refuse, &wire::encode_reason(&why));
        return link.close();
    }
    // The one who counts them looks again.
    inbox.alarm.nudge();
    let Err(error) = receive_all(&mut link, inbox, courtesy);
    inbox.fail(error);
}

/// Ends with the link, as nothing else does.
fn receive_all(
    link: &mut Link,
    inbox: &Inbox,
    mut courtesy: Courtesy,
) -> Result<std::convert::Infallible, MigrationError> {
    link.send(Kind::Joined, &[])?;
    let mut buffer = Vec::new();
    loop {
        // There may be nothing to send here for as long as the migration lasts, which the first
        // connection watches over: whoever ends it shuts this one. Keepalive sees the rest.
        let waited = wait_for(&[link.stream().as_fd()], None);
        waited.map_err(MigrationError::link("receiving"))?;
        let message = link.receive(IDLE_TIMEOUT)?;
        if !inbox.is_first_pass() {
            courtesy.end();
        }
        if message.kind == Kind::Abort {
            let why = wire::decode_reason(&message.payload).map_err(protocol)?;
            return Err(MigrationError::Aborted(why));
        }
        inbox.take(link, &message, &mut buffer)?;
    }
}
