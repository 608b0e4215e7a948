//! The receiving direction: a frame is read straight into as many of the guest's buffers as the
//! longest frame could need, and what it did not need is given back.

use std::collections::VecDeque;
use std::io;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Bytes, GuestAddress};

use super::device::{
    BUFFERS_MAX, FRAME_BYTES_MAX, HEADER_BYTES, Net, NetCounters, RECEIVE, TURN_FRAMES_MAX,
};
use crate::memory::GuestMemory;
use crate::virtio::buffers::{gather, mark_written};
use crate::virtio::{Progress, Segment, Turn, Violation};

/// Any frame with its header fits into this many bytes.
const ROOM_BYTES: usize = HEADER_BYTES + FRAME_BYTES_MAX;
/// Where the header says over how many buffers the frame goes.
const BUFFER_COUNT_OFFSET: u32 = 10;

/// Chains that were taken from the queue and not used yet.
#[derive(Default)]
struct Taken {
    chains: VecDeque<Chain>,
    bytes: usize,
}

struct Chain {
    head: u16,
    segments: Vec<Segment>,
    bytes: usize,
}

impl Net {
    /// Gives the guest what has come.
    pub(super) fn receive(&mut self, turn: &mut Turn<'_>) -> Result<Progress, Violation> {
        let mut taken = Taken::default();
        let result = self.receive_into(turn, &mut taken);
        let queue = &mut turn.queues[RECEIVE];
        queue.rewind(taken.chains.len() as u16);
        queue.notify(turn.memory, turn.interrupt)?;
        result
    }

    fn receive_into(
        &mut self,
        turn: &mut Turn<'_>,
        taken: &mut Taken,
    ) -> Result<Progress, Violation> {
        let mergeable = self.has(VIRTIO_NET_F_MRG_RXBUF);
        turn.queues[RECEIVE].disable_kicks(turn.memory)?;
        for _ in 0..TURN_FRAMES_MAX {
            self.take_chains(turn, taken, mergeable)?;
            if taken.chains.is_empty() {
                if turn.queues[RECEIVE].enable_kicks(turn.memory)? {
                    continue;
                }
                self.has_buffers = false;
                return Ok(Progress::Done);
            }
            match self.read_frame(turn.memory, taken, mergeable) {
                Ok(Some(length)) => self.hand_over(turn, taken, length)?,
                // Dropped: too long for the guest's buffers.
                Ok(None) => NetCounters::add(&self.counters.dropped, 1),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Progress::Done);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.tap_failed(&error);
                    return Ok(Progress::Done);
                }
            }
        }
        Ok(Progress::More)
    }

    /// Takes chains until any frame fits; one only when the guest does not merge buffers.
    fn take_chains(
        &mut self,
        turn: &mut Turn<'_>,
        taken: &mut Taken,
        mergeable: bool,
    ) -> Result<(), Violation> {
        while taken.bytes < ROOM_BYTES && (mergeable || taken.chains.is_empty()) {
            let mut segments = Vec::new();
            let Some(head) = turn.queues[RECEIVE].pop(turn.memory, &mut segments)? else { break };
            segments.retain(|segment| segment.writable);
            let bytes: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
            if bytes < HEADER_BYTES as u64 {
                let what = "has no room for a frame's header";
                return Err(Violation::Shape { queue: RECEIVE, head, what });
            }
            let bytes = bytes as usize;
            taken.bytes += bytes;
            taken.chains.push_back(Chain { head, segments, bytes });
        }
        Ok(())
    }

    /// Reads one frame into the taken chains; answers its length with its header, or `None` when
    /// it did not fit.
    fn read_frame(
        &mut self,
        memory: &GuestMemory,
        taken: &Taken,
        mergeable: bool,
    ) -> io::Result<Option<usize>> {
        self.buffers.0.clear();
        let segments = || taken.chains.iter().flat_map(|chain| &chain.segments);
        let gathered = taken.bytes >= ROOM_BYTES
            && segments().all(|segment| gather(memory, *segment, &mut self.buffers.0))
            && self.buffers.0.len() <= BUFFERS_MAX;
        if gathered {
            // SAFETY: `gather` made the buffers from slices of guest memory, which stays mapped;
            // nothing here holds a reference into it.
            let length = unsafe { self.backend.read(&self.buffers.0) }?;
            mark_written(memory, segments(), length);
            return Ok(Some(length));
        }
        // Too little room for the longest frame: read it here, and see whether it fits.
        self.bounce.resize(ROOM_BYTES, 0);
        let buffer =
            libc::iovec { iov_base: self.bounce.as_mut_ptr().cast(), iov_len: self.bounce.len() };
        // SAFETY: the buffer is `bounce`, which nothing else touches during the call.
        let length = unsafe { self.backend.read(&[buffer]) }?;
        let room = if mergeable { taken.bytes } else { taken.chains[0].bytes };
        let fits = length <= room && copy(memory, segments(), &self.bounce[..length]);
        Ok(fits.then_some(length))
    }

    /// Completes the chains that a frame of this length went into.
    fn hand_over(
        &mut self,
        turn: &mut Turn<'_>,
        taken: &mut Taken,
        length: usize,
    ) -> Result<(), Violation> {
        let mut used = 0;
        let mut covered = 0;
        while covered < length.max(1) && used < taken.chains.len() {
            covered += taken.chains[used].bytes;
            used += 1;
        }
        let count = (used as u16).to_le_bytes();
        if let Some(first) = taken.chains.front() {
            copy_at(turn.memory, &first.segments, BUFFER_COUNT_OFFSET, &count);
        }
        let mut left = length;
        for chain in taken.chains.drain(..used) {
            let written = left.min(chain.bytes);
            left -= written;
            taken.bytes -= chain.bytes;
            turn.queues[RECEIVE].complete(turn.memory, chain.head, written as u32)?;
        }
        NetCounters::add(&self.counters.rx_bytes, length.saturating_sub(HEADER_BYTES) as u64);
        Ok(())
    }
}

/// Copies into the segments, one after the other; false when memory refused.
fn copy<'a>(
    memory: &GuestMemory,
    segments: impl Iterator<Item = &'a Segment>,
    mut bytes: &[u8],
) -> bool {
    for segment in segments {
        let (head, rest) = bytes.split_at(bytes.len().min(segment.len as usize));
        if memory.write_slice(head, segment.addr).is_err() {
            return false;
        }
        bytes = rest;
    }
    bytes.is_empty()
}

/// Writes bytes at an offset into the segments taken together, wherever these are cut.
fn copy_at(memory: &GuestMemory, segments: &[Segment], offset: u32, bytes: &[u8]) {
    let mut start = 0;
    for segment in segments {
        for (at, byte) in (offset..).zip(bytes) {
            if (start..start + segment.len).contains(&at) {
                let address = GuestAddress(segment.addr.0 + u64::from(at - start));
                // The segment was checked when it was taken.
                let _ = memory.write_obj(*byte, address);
            }
        }
        start = start.saturating_add(segment.len);
    }
}
