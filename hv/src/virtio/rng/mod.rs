//! The entropy device: what the guest asks for comes from the host's getrandom.

use std::cmp::min;

use vm_memory::Bytes;

use super::{DeviceKind, Event, Progress, Segment, Turn, Violation, VirtioDevice};
use crate::pci::ClassCode;
use crate::state::{Decoder, Encoder, StateError, kind};

#[cfg(test)]
mod tests;

const QUEUE: usize = 0;
const QUEUE_SIZES: [u16; 1] = [64];
/// Bytes made in one turn, so that a greedy guest lets its other devices live.
const TURN_BYTES_MAX: usize = 16 << 10;
const CHUNK_BYTES: usize = 256;

/// The device. It has no state of its own.
#[derive(Debug, Default)]
pub struct Rng {
    segments: Vec<Segment>,
}

impl Rng {
    /// A device.
    pub fn new() -> Self {
        Self::default()
    }

    /// Fills the chain that was taken; answers how many bytes were written.
    fn fill(&self, turn: &Turn<'_>, budget: usize) -> usize {
        let mut written = 0;
        for segment in self.segments.iter().filter(|segment| segment.writable) {
            let mut at = segment.addr;
            let mut left = min(segment.len as usize, budget - written);
            while left > 0 {
                let mut chunk = [0; CHUNK_BYTES];
                let chunk = &mut chunk[..min(left, CHUNK_BYTES)];
                // The host's pool is ready since its boot; up to 256 bytes never fail or block.
                if random(chunk).is_err() || turn.memory.write_slice(chunk, at).is_err() {
                    return written;
                }
                written += chunk.len();
                left -= chunk.len();
                at.0 += chunk.len() as u64;
            }
        }
        written
    }
}

fn random(bytes: &mut [u8]) -> std::io::Result<()> {
    // SAFETY: the kernel writes at most `bytes.len()` bytes to the slice that is borrowed mutably.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got) == Ok(bytes.len()) {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind {
            number: 4,
            name: "virtio-rng",
            class: ClassCode(0x10, 0x80, 0x00),
            section: kind::VIRTIO_RNG,
            section_version: 1,
        }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, _features: u64) {}

    fn reset(&mut self) {}

    fn run(&mut self, turn: &mut Turn<'_>, event: Event) -> Result<Progress, Violation> {
        if event != Event::Queue(QUEUE) {
            return Ok(Progress::Done);
        }
        let mut budget = TURN_BYTES_MAX;
        let mut chains = QUEUE_SIZES[QUEUE];
        let mut progress = Progress::More;
        turn.queues[QUEUE].disable_kicks(turn.memory)?;
        while budget > 0 && chains > 0 {
            let Some(head) = turn.queues[QUEUE].pop(turn.memory, &mut self.segments)? else {
                if turn.queues[QUEUE].enable_kicks(turn.memory)? {
                    continue;
                }
                progress = Progress::Done;
                break;
            };
            // A short answer is a legal one.
            let written = self.fill(turn, budget);
            turn.queues[QUEUE].complete(turn.memory, head, written as u32)?;
            budget -= written;
            chains -= 1;
        }
        turn.queues[QUEUE].notify(turn.memory, turn.interrupt)?;
        Ok(progress)
    }

    fn save(&self, _out: &mut Encoder) {}

    fn restore(
        &mut self,
        _version: u32,
        _fields: &mut Decoder<'_>,
        _features: Option<u64>,
    ) -> Result<(), StateError> {
        Ok(())
    }
}
