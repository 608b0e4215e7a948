//! Where pages and blocks go that come in, on whatever connection.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::super::alarm::Alarm;
use super::super::link::{Link, Received, protocol};
use super::super::wire::{self, EXTENT_BYTES, Kind, RUN_BYTES, Sent};
use super::super::{IDLE_TIMEOUT, MigrationError, pages};
use super::disks::Disks;
use crate::memory::GuestMemory;

/// Shared by the threads of all connections.
pub(super) struct Inbox {
    memory: GuestMemory,
    pub(super) disks: Disks,
    /// What came, over all connections, and is where it belongs.
    came: Mutex<Sent>,
    /// There is more, or an alarm.
    more: Condvar,
    pub(super) alarm: Alarm,
    /// Pages are written for the first time; and whoever writes them stands back for the guests.
    first_pass: AtomicBool,
}

impl Inbox {
    pub(super) fn new(memory: GuestMemory, disks: Disks) -> Result<Self, MigrationError> {
        Ok(Self {
            memory,
            disks,
            came: Mutex::default(),
            more: Condvar::new(),
            alarm: Alarm::new()?,
            first_pass: AtomicBool::new(true),
        })
    }

    fn came(&self) -> MutexGuard<'_, Sent> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_first_pass(&self) -> bool {
        self.first_pass.load(Ordering::Relaxed)
    }

    pub(super) fn end_first_pass(&self) {
        self.first_pass.store(false, Ordering::Relaxed);
    }

    /// The attempt is lost.
    pub(super) fn fail(&self, error: MigrationError) {
        self.alarm.raise(error);
        // Not between somebody's look at the alarm and the wait.
        drop(self.came());
        self.more.notify_all();
    }

    /// Takes the body of a PAGES or DISK message. What came is counted when it is in memory or
    /// written, and made durable where that was due: what fails was never here.
    pub(super) fn take(
        &self,
        link: &mut Link,
        message: &Received,
        buffer: &mut Vec<u8>,
    ) -> Result<(), MigrationError> {
        let taken = match message.kind {
            Kind::Pages => self.take_pages(link, message.length)?,
            Kind::Disk => self.take_blocks(link, message.length, buffer)?,
            kind => return Err(MigrationError::Protocol(format!("{kind:?} among pages"))),
        };
        self.came().add(taken);
        self.more.notify_all();
        Ok(())
    }

    /// Waits until this much is here. `exactly`: and nothing else is; `now`: there is nothing to
    /// wait for.
    pub(super) fn await_all(
        &self,
        said: Sent,
        now: bool,
        exactly: bool,
    ) -> Result<(), MigrationError> {
        let mut came = self.came();
        let mut deadline = Instant::now() + IDLE_TIMEOUT;
        loop {
            if came.reaches(said) {
                if exactly && *came != said {
                    let what = format!("{said:?} was sent, {:?} came", *came);
                    return Err(MigrationError::Protocol(what));
                }
                return Ok(());
            }
            self.alarm.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            if now || left.is_zero() {
                let what = format!("{said:?} was sent, {:?} came", *came);
                return Err(MigrationError::Protocol(what));
            }
            let before = *came;
            (came, _) = self.more.wait_timeout(came, left).unwrap_or_else(PoisonError::into_inner);
            if *came != before {
                deadline = Instant::now() + IDLE_TIMEOUT;
            }
        }
    }

    /// Straight into memory.
    fn take_pages(&self, link: &mut Link, length: usize) -> Result<Sent, MigrationError> {
        let (table, count, data_bytes) = receive_table(link, length, RUN_BYTES)?;
        let runs = wire::decode_runs(&table, count, data_bytes).map_err(protocol)?;
        let mut buffers = Vec::with_capacity(runs.len());
        let mut pages = 0;
        for run in &runs {
            let mut here = Vec::new();
            if !pages::gather(&self.memory, run, &mut here) {
                return Err(MigrationError::Protocol(format!("{run:?} is outside of memory")));
            }
            if run.zero {
                for buffer in here {
                    // SAFETY: `gather` made it from mapped guest memory; no guest runs here.
                    unsafe { buffer.iov_base.cast::<u8>().write_bytes(0, buffer.iov_len) };
                }
            } else {
                buffers.extend(here);
            }
            pages += u64::from(run.pages);
        }
        if self.is_first_pass() {
            pages::populate(&buffers);
        }
        // SAFETY: the buffers are mapped guest memory, to which nothing holds a reference.
        unsafe { link.receive_buffers(&mut buffers) }?;
        Ok(Sent { pages, disk_bytes: 0 })
    }

    /// Through a buffer onto the disks.
    fn take_blocks(
        &self,
        link: &mut Link,
        length: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<Sent, MigrationError> {
        let (table, count, data_bytes) = receive_table(link, length, EXTENT_BYTES)?;
        let extents = wire::decode_extents(&table, count, data_bytes).map_err(protocol)?;
        // As long as the longest message was; no message is longer than the protocol allows.
        if buffer.len() < data_bytes {
            buffer.resize(data_bytes, 0);
        }
        link.receive_exact(&mut buffer[..data_bytes])?;
        self.disks.take(&extents, &buffer[..data_bytes])?;
        let disk_bytes = extents.iter().map(|extent| extent.bytes).sum();
        Ok(Sent { pages: 0, disk_bytes })
    }
}

/// The table that begins a message of this length: its bytes, how many entries it has, and how
/// many bytes of data follow.
fn receive_table(
    link: &mut Link,
    length: usize,
    entry_bytes: usize,
) -> Result<(Vec<u8>, usize, usize), MigrationError> {
    let mut count = [0; 4];
    link.receive_exact(&mut count)?;
    let count = u32::from_le_bytes(count) as usize;
    let table_bytes = count.saturating_mul(entry_bytes);
    let Some(data_bytes) = length.checked_sub(4).and_then(|rest| rest.checked_sub(table_bytes))
    else {
        let what = format!("{count} entries in {length} bytes");
        return Err(MigrationError::Protocol(what));
    };
    let mut table = vec![0; table_bytes];
    link.receive_exact(&mut table)?;
    Ok((table, count, data_bytes))
}
