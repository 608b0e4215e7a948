//! What passes find goes over all connections, under one bandwidth limit.

use std::time::{Duration, Instant};

use super::super::pages::Batches;
use super::super::policy;
use super::super::wire::{self, EXTENTS_NONE, Join, Kind, Sent};
use super::super::{CONNECT_TIMEOUT, IDLE_TIMEOUT, MigrationError};
use super::senders::{Parcel, Senders};
use super::{Link, Source, SourceEvent, SourceState};
use crate::memory::{DirtyPages, PAGE_BYTES};

/// Longest time that pacing waits before it looks at the clock again.
const PACE_MAX: Duration = Duration::from_millis(100);
/// Whose first connection has been silent for so long says that it is there: the destination
/// gives up after [`IDLE_TIMEOUT`].
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);
/// The destination is asked for an answer each so many bytes of disks, and is never more than
/// twice that behind: one answer may be awaited while the next bytes go over. A few bytes may tell
/// of many that it has to look at or zero, and its disk may be slower than the link: without a
/// bound the answer at the end of a pass would come too late.
const ASK_BYTES: u64 = 16 << 20;

/// Keeps a pass to the bandwidth that was given, over all connections.
pub(super) struct Pacer {
    began: Instant,
    /// Bytes so far.
    sent: u64,
}

impl Pacer {
    pub(super) fn begin() -> Self {
        Self { began: Instant::now(), sent: 0 }
    }

    pub(super) fn count(&mut self, bytes: u64) {
        self.sent += bytes;
    }
}

impl Source<'_, '_> {
    /// Makes the further connections, each with a thread of its own.
    pub(super) fn join(&mut self) -> Result<SourceEvent, MigrationError> {
        if self.allowed <= 1 {
            return Ok(SourceEvent::Joined);
        }
        let mut senders = Senders::new(self.vm.memory().clone())?;
        for index in 1..self.allowed {
            let wanted = || !self.control.is_cancelled();
            let mut link = Link::connect(&self.config.address, CONNECT_TIMEOUT, wanted)?;
            self.control.add_socket(link.handle()?);
            let join = Join {
                migration_id: self.config.migration_id.clone(),
                token: self.config.token.clone(),
                index,
            };
            link.send(Kind::Join, &join.encode())?;
            link.expect(Kind::Joined, IDLE_TIMEOUT)?;
            senders.add(link, self.courtesy.inherited())?;
        }
        self.senders = Some(senders);
        Ok(SourceEvent::Joined)
    }

    /// What the other side says next on the first connection, unless another one fails.
    pub(super) fn hear(&mut self, kind: Kind, time: Duration) -> Result<Vec<u8>, MigrationError> {
        let began = Instant::now();
        if let (Some(link), Some(senders)) = (&self.link, &self.senders) {
            link.await_word(senders.alarm(), time)?;
        }
        self.link()?.expect(kind, time.saturating_sub(began.elapsed()).max(PACE_MAX))
    }

    /// Has a parcel sent by whoever is free first.
    pub(super) fn deliver(&mut self, parcel: Parcel) -> Result<(), MigrationError> {
        self.report.bytes_sent += parcel.bytes();
        let Some(senders) = &self.senders else { return self.send_here(parcel) };
        // The last one of a pass stays here: nobody needs to be woken for it.
        let Some(earlier) = self.held.replace(parcel) else { return Ok(()) };
        match senders.offer(earlier, &mut self.spares)? {
            None => Ok(()),
            Some(parcel) => self.send_here(parcel),
        }
    }

    /// All that was delivered is out, or on its way.
    pub(super) fn flush(&mut self) -> Result<(), MigrationError> {
        match self.held.take() {
            Some(parcel) => self.send_here(parcel),
            None => Ok(()),
        }
    }

    fn send_here(&mut self, parcel: Parcel) -> Result<(), MigrationError> {
        let memory = self.vm.memory().clone();
        parcel.send(self.link()?, &memory)?;
        self.spares.give(parcel.into_buffer());
        Ok(())
    }

    /// Sends these pages; `fresh` when none was sent before.
    pub(super) fn send_pages(
        &mut self,
        pages: &DirtyPages,
        fresh: bool,
        pacer: &mut Pacer,
    ) -> Result<(), MigrationError> {
        let mut remaining = pages.bytes();
        let memory = self.vm.memory().clone();
        for batch in Batches::new(&memory, pages.ranges(), fresh) {
            if self.control.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            let handled = batch.zero_pages * PAGE_BYTES + batch.data_bytes as u64;
            self.report.zero_pages += batch.zero_pages;
            if !batch.runs.is_empty() {
                self.report.pages_sent += batch.data_bytes as u64 / PAGE_BYTES;
                let pages = batch.runs.iter().map(|run| u64::from(run.pages)).sum();
                self.copied.sent.add(Sent { pages, disk_bytes: 0 });
                let parcel = Parcel::pages(batch);
                pacer.count(parcel.bytes());
                self.deliver(parcel)?;
            }
            remaining = remaining.saturating_sub(handled);
            self.report.remaining_bytes = remaining;
            if self.pause.is_none() {
                self.pace(pacer)?;
                self.report(SourceState::Copying, false);
            }
        }
        Ok(())
    }

    /// Keeps to the bandwidth that was given.
    pub(super) fn pace(&mut self, pacer: &Pacer) -> Result<(), MigrationError> {
        let rate = self.config.limits.bandwidth_max;
        loop {
            self.show_life()?;
            if rate == 0 {
                return Ok(());
            }
            let due = Duration::from_secs_f64(pacer.sent as f64 / rate as f64);
            let early = due.saturating_sub(pacer.began.elapsed());
            if self.control.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            if early.is_zero() {
                return Ok(());
            }
            self.control.wait(early.min(PACE_MAX));
        }
    }

    /// The destination waits for the first connection, on which there may be little to send.
    fn show_life(&mut self) -> Result<(), MigrationError> {
        if self.link()?.silent_for() > SIGN_OF_LIFE {
            self.link()?.send(Kind::Disk, &EXTENTS_NONE)?;
        }
        Ok(())
    }

    /// So many bytes of disks were told of.
    pub(super) fn told(&mut self, bytes: u64) -> Result<(), MigrationError> {
        self.copied.sent.add(Sent { pages: 0, disk_bytes: bytes });
        self.unacked += bytes;
        if self.unacked >= ASK_BYTES { self.ask() } else { Ok(()) }
    }

    /// Asks for an answer, when the one before has come.
    fn ask(&mut self) -> Result<(), MigrationError> {
        self.flush()?;
        self.hear_answer(IDLE_TIMEOUT)?;
        self.unacked = 0;
        let round = wire::encode_round(self.copied.passes, self.copied.sent);
        self.link()?.send(Kind::Round, &round)?;
        self.asked = Some(round);
        Ok(())
    }

    /// The answer to the last question, if one is still to come.
    pub(super) fn hear_answer(&mut self, time: Duration) -> Result<(), MigrationError> {
        let Some(round) = self.asked.take() else { return Ok(()) };
        if self.hear(Kind::RoundAck, time)? != round {
            return Err(MigrationError::Protocol("what was sent does not add up".into()));
        }
        Ok(())
    }

    /// A pass is out: the destination has it all, durable what is of disks, and the rate is known.
    /// Nothing of the next pass is on its way before: it could overtake what is older.
    pub(super) fn end_pass(&mut self, began: Instant, before: u64) -> Result<(), MigrationError> {
        self.copied.passes += 1;
        self.ask()?;
        self.hear_answer(IDLE_TIMEOUT)?;
        let sent = self.report.bytes_sent - before;
        self.copied.rate = policy::rate_after(self.copied.rate, sent, began.elapsed());
        self.report.rate_bytes_per_second = self.copied.rate;
        Ok(())
    }
}
