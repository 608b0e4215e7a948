//! The source's further connections: a thread for each, which sends what the mover has read. They
//! take from one short queue, so a slow connection takes less and none waits for another. When
//! the queue is full the mover sends on its own connection: it is one of them.
//!
//! What the mover has given away counts as sent. Whether it came is the destination's to say: it
//! answers a ROUND when so much has come over all connections together, and READY likewise.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use super::super::alarm::Alarm;
use super::super::courtesy::{Courtesy, Inherited};
use super::super::link::{Link, buffer};
use super::super::wire::{self, DATA_BYTES_MAX, HEADER_BYTES, Kind, Run};
use super::super::{MigrationError, blocks, pages};
use crate::memory::GuestMemory;

/// Messages that wait for a thread, for each of them: while the mover sends one by itself, or
/// reads the next, the threads have something to do.
const WAITING_MAX: usize = 2;
const STACK_BYTES: usize = 128 << 10;

/// A PAGES or DISK message that is complete, but for the pages' content.
pub(super) struct Parcel {
    kind: Kind,
    table: Vec<u8>,
    data_bytes: usize,
    data: Data,
}

/// Where a message's data lie.
enum Data {
    /// In guest memory: sent as they are then.
    Pages(Vec<Run>),
    /// In a buffer.
    Blocks(Vec<u8>, Vec<Range<usize>>),
}

impl Parcel {
    pub(super) fn pages(batch: pages::Batch) -> Self {
        let table = wire::encode_runs(&batch.runs);
        let data = Data::Pages(batch.runs);
        Self { kind: Kind::Pages, table, data_bytes: batch.data_bytes, data }
    }

    /// Of blocks that were read into this buffer.
    pub(super) fn blocks(batch: blocks::Batch, buffer: Vec<u8>) -> Self {
        let table = wire::encode_extents(&batch.extents);
        let data = Data::Blocks(buffer, batch.data);
        Self { kind: Kind::Disk, table, data_bytes: batch.data_bytes, data }
    }

    fn length(&self) -> usize {
        self.table.len() + self.data_bytes
    }

    /// Its bytes on the wire.
    pub(super) fn bytes(&self) -> u64 {
        (HEADER_BYTES + self.length()) as u64
    }

    pub(super) fn send(&self, link: &mut Link, memory: &GuestMemory) -> Result<(), MigrationError> {
        let header = wire::header(self.kind, self.length());
        let mut buffers = vec![buffer(&header), buffer(&self.table)];
        match &self.data {
            Data::Pages(runs) => {
                for run in runs.iter().filter(|run| !run.zero) {
                    let gathered = pages::gather(memory, run, &mut buffers);
                    assert!(gathered, "a dirty page outside of memory");
                }
            }
            Data::Blocks(bytes, ranges) => {
                buffers.extend(ranges.iter().map(|range| buffer(&bytes[range.clone()])));
            }
        }
        // SAFETY: the buffers are the header, the table, and mapped guest memory or parts of a
        // vector, all alive and borrowed until the call returns.
        unsafe { link.send_buffers(&mut buffers) }
    }

    /// Its buffer, if it has one.
    pub(super) fn into_buffer(self) -> Option<Vec<u8>> {
        match self.data {
            Data::Pages(_) => None,
            Data::Blocks(buffer, _) => Some(buffer),
        }
    }
}

/// Buffers that are empty.
#[derive(Debug, Default)]
pub(super) struct Spares(Vec<Vec<u8>>);

impl Spares {
    /// One for the blocks of a message. There are never more than messages under way and one.
    pub(super) fn take(&mut self) -> Vec<u8> {
        self.0.pop().unwrap_or_else(|| vec![0; DATA_BYTES_MAX])
    }

    pub(super) fn give(&mut self, buffer: Option<Vec<u8>>) {
        self.0.extend(buffer);
    }
}

#[derive(Default)]
struct Queue {
    parcels: VecDeque<Parcel>,
    spares: Vec<Vec<u8>>,
    ended: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    /// There is a parcel, or the end.
    more: Condvar,
    alarm: Alarm,
    memory: GuestMemory,
    /// The first pass is over: nobody stands back any more.
    hurry: AtomicBool,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next parcel; `None` at the end. Waits as long as the migration lasts, which has its own
    /// bounds: whoever ends it ends this.
    fn next(&self) -> Option<Parcel> {
        let mut queue = self.queue();
        loop {
            if queue.ended {
                return None;
            }
            if let Some(parcel) = queue.parcels.pop_front() {
                return Some(parcel);
            }
            queue = self.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn work(&self, mut link: Link, mut courtesy: Courtesy) {
        while let Some(parcel) = self.next() {
            if self.hurry.load(Ordering::Relaxed) {
                courtesy.end();
            }
            let sent = parcel.send(&mut link, &self.memory);
            self.queue().spares.extend(parcel.into_buffer());
            if let Err(error) = sent {
                return self.alarm.raise(error);
            }
        }
    }
}

/// The threads. They end when this is dropped.
pub(super) struct Senders {
    shared: Arc<Shared>,
    threads: Vec<(TcpStream, JoinHandle<()>)>,
}

impl Senders {
    pub(super) fn new(memory: GuestMemory) -> Result<Self, MigrationError> {
        let shared = Shared {
            queue: Mutex::default(),
            more: Condvar::new(),
            alarm: Alarm::new()?,
            memory,
            hurry: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), threads: Vec::new() })
    }

    /// Another connection, which the destination has taken.
    pub(super) fn add(&mut self, link: Link, courtesy: Inherited) -> Result<(), MigrationError> {
        let handle = link.handle()?;
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new()
            .name("mover-link".into())
            .stack_size(STACK_BYTES)
            .spawn(move || shared.work(link, courtesy.begin()))
            .map_err(MigrationError::link("starting a thread for a connection"))?;
        self.threads.push((handle, thread));
        Ok(())
    }

    pub(super) fn alarm(&self) -> &Alarm {
        &self.shared.alarm
    }

    pub(super) fn hurry(&self) {
        self.shared.hurry.store(true, Ordering::Relaxed);
    }

    /// Gives a parcel to whoever is free first; answers it where all have enough to do. Buffers
    /// that have become empty come back.
    pub(super) fn offer(
        &self,
        parcel: Parcel,
        spares: &mut Spares,
    ) -> Result<Option<Parcel>, MigrationError> {
        self.shared.alarm.check()?;
        let mut queue = self.shared.queue();
        spares.0.append(&mut queue.spares);
        if queue.parcels.len() >= WAITING_MAX * self.threads.len() {
            return Ok(Some(parcel));
        }
        queue.parcels.push_back(parcel);
        drop(queue);
        self.shared.more.notify_one();
        Ok(None)
    }
}

impl Drop for Senders {
    fn drop(&mut self) {
        self.shared.queue().ended = true;
        self.shared.more.notify_all();
        for (socket, thread) in self.threads.drain(..) {
            // It may be gone already. One that waits for room in it waits no longer.
            let _ = socket.shutdown(Shutdown::Both);
            if thread.join().is_err() {
                tracing::error!("a thread of a connection has panicked");
            }
        }
    }
}
