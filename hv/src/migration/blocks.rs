//! Blocks of disks, in the shape in which they travel.

use std::io;
use std::ops::Range;

use super::wire::{EXTENTS_MAX, Extent};
use crate::virtio::blk::tracker::{BLOCK_BYTES, BlockSet};
use crate::virtio::blk::{Straight, Volume, is_zero};

/// Read from a disk at once.
const READ_BYTES: u64 = 512 << 10;
/// Read for one message, sent or not: between two messages somebody may cancel.
const LOOK_BYTES_MAX: u64 = 4 << 20;
/// Known to be zero and told in one message: the other side may have to look at each byte.
const HOLE_BYTES_MAX: u64 = 32 << 20;
/// Where zeros need not be told, they are looked for in pieces of this.
const PIECE_BYTES: usize = 4096;
/// More than one read makes.
const EXTENTS_A_READ: usize = READ_BYTES as usize / PIECE_BYTES;

/// One DISK message, whose data lie in a buffer.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) extents: Vec<Extent>,
    /// Where in the buffer, in the extents' order.
    pub(super) data: Vec<Range<usize>>,
    pub(super) data_bytes: usize,
    /// Zero, and told or not.
    pub(super) zero_bytes: u64,
    /// Read and found zero, or sent.
    looked_bytes: u64,
    /// Told without being read.
    hole_bytes: u64,
}

impl Batch {
    /// Adds bytes behind the last extent, or as one of their own.
    fn push(&mut self, extent: Extent) {
        match self.extents.last_mut() {
            Some(last)
                if (last.disk, last.zero) == (extent.disk, extent.zero)
                    && last.offset + last.bytes == extent.offset =>
            {
                last.bytes += extent.bytes;
            }
            _ => self.extents.push(extent),
        }
    }

    fn push_data(&mut self, data: Range<usize>) {
        self.data_bytes += data.len();
        match self.data.last_mut() {
            Some(last) if last.end == data.start => last.end = data.end,
            _ => self.data.push(data),
        }
    }

    fn is_full(&self) -> bool {
        self.extents.len() + EXTENTS_A_READ > EXTENTS_MAX
            || self.looked_bytes >= LOOK_BYTES_MAX
            || self.hole_bytes >= HOLE_BYTES_MAX
    }

    /// Bytes of the disk that it tells of.
    pub(super) fn told_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes).sum()
    }
}

/// What one pass goes through.
#[derive(Debug)]
enum What {
    /// All of it; where the other side reads as zeros, these are left out.
    All { zeroed: bool },
    /// These blocks.
    Blocks(BlockSet),
}

/// One pass over one disk.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    volume: &'a Volume,
    disk: u32,
    what: What,
    at: u64,
    /// In front of this nothing is a hole, as far as that is known.
    data_end: u64,
    /// For the first pass; what was written since is in the cache.
    straight: Option<Straight>,
}

/// Bytes that are looked at, or are known to be zero.
enum Piece {
    Data(u64, u64),
    Hole(u64, u64),
}

impl<'a> Pass<'a> {
    /// The first: all that is allocated.
    pub(super) fn all(volume: &'a Volume, disk: u32, zeroed: bool) -> Self {
        let straight = Straight::open(volume, false, READ_BYTES as usize);
        Self { volume, disk, what: What::All { zeroed }, at: 0, data_end: 0, straight }
    }

    /// A later one: what was written.
    pub(super) fn blocks(volume: &'a Volume, disk: u32, blocks: BlockSet) -> Self {
        Self { volume, disk, what: What::Blocks(blocks), at: 0, data_end: 0, straight: None }
    }

    /// Which disk, in the shape's order.
    pub(super) fn disk(&self) -> u32 {
        self.disk
    }

    /// Bytes in front of it.
    pub(super) fn left(&self) -> u64 {
        match &self.what {
            What::All { .. } => self.volume.bytes().saturating_sub(self.at),
            What::Blocks(blocks) => blocks.bytes_from(self.at),
        }
    }

    /// The next piece, of at most so many bytes where it has to be read.
    fn piece(&mut self, read_max: u64) -> io::Result<Option<Piece>> {
        let end = self.volume.bytes();
        let (piece, at) = match &self.what {
            What::All { .. } => {
                // Asked once an extent: a filesystem may look through all of it to tell its end.
                // What was discarded since is read as zeros.
                let hole_end = if self.at < self.data_end {
                    self.at
                } else {
                    let data = self.volume.next_data(self.at)?;
                    let (start, stop) = data.unwrap_or((end, end));
                    self.data_end = stop;
                    start
                };
                match hole_end {
                    _ if self.at >= end => return Ok(None),
                    start if start == self.at => {
                        let stop = self.data_end.min(start + read_max);
                        (Piece::Data(start, stop - start), stop)
                    }
                    start => {
                        let stop = start.min(self.at + HOLE_BYTES_MAX);
                        // The rest of the hole is asked for again.
                        self.data_end = stop;
                        (Piece::Hole(self.at, stop - self.at), stop)
                    }
                }
            }
            What::Blocks(blocks) => {
                let run = blocks.next_run(self.at).filter(|(start, _)| *start < end);
                let Some((start, stop)) = run else { return Ok(None) };
                // The disk's last block may be shorter; a read ends with a block.
                let stop = stop.min(start + read_max / BLOCK_BYTES * BLOCK_BYTES);
                (Piece::Data(start, stop.min(end) - start), stop)
            }
        };
        self.at = at;
        Ok(Some(piece))
    }

    /// Fills the buffer; or does not, and answers false, as all of it would be zeros.
    fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        if let Some(straight) = &mut self.straight
            && let Some(read) = straight.read(offset, buffer.len())?
        {
            let is_data = !is_zero(read);
            if is_data {
                buffer.copy_from_slice(read);
            }
            return Ok(is_data);
        }
        self.volume.read_at(buffer, offset)?;
        Ok(true)
    }

    /// The next message; its data are in the buffer, whose length is their bound. `None` at the
    /// end of the pass.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> io::Result<Option<Batch>> {
        let (mut batch, mut used, mut seen) = (Batch::default(), 0, false);
        let skip_zeros = matches!(self.what, What::All { zeroed: true });
        let granule = if skip_zeros { PIECE_BYTES } else { BLOCK_BYTES as usize };
        while !batch.is_full() {
            let room = (buffer.len() - used) as u64;
            if room < BLOCK_BYTES {
                break;
            }
            let Some(piece) = self.piece(room.min(READ_BYTES))? else { break };
            seen = true;
            let (offset, bytes) = match piece {
                Piece::Data(offset, bytes) => (offset, bytes),
                Piece::Hole(offset, bytes) => {
                    batch.zero_bytes += bytes;
                    if !skip_zeros {
                        batch.hole_bytes += bytes;
                        batch.push(Extent { disk: self.disk, offset, bytes, zero: true });
                    }
                    continue;
                }
            };
            let end = used + bytes as usize;
            let is_hole = !self.read(offset, &mut buffer[used..end])?;
            batch.looked_bytes += bytes;
            let before = batch.data_bytes;
            for from in (used..end).step_by(granule) {
                let data = from..end.min(from + granule);
                let (bytes, zero) = (data.len() as u64, is_hole || is_zero(&buffer[data.clone()]));
                let offset = offset + (from - used) as u64;
                if !(zero && skip_zeros) {
                    batch.push(Extent { disk: self.disk, offset, bytes, zero });
                }
                if zero {
                    batch.zero_bytes += bytes;
                } else {
                    batch.push_data(data);
                }
            }
            if batch.data_bytes > before {
                used = end;
            }
        }
        Ok(seen.then_some(batch))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::*;
    use crate::migration::wire::DATA_BYTES_MAX;

    /// Sends a pass to a model of the other side; answers the messages' number and data.
    fn send(mut pass: Pass<'_>, there: &mut [u8]) -> (usize, usize) {
        let mut buffer = vec![0xee; DATA_BYTES_MAX];
        let (mut messages, mut sent, mut left) = (0, 0, pass.left());
        while let Some(batch) = pass.next(&mut buffer).unwrap() {
            assert!(batch.extents.len() <= EXTENTS_MAX && batch.data_bytes <= DATA_BYTES_MAX);
            assert!(pass.left() < left, "no progress");
            left = pass.left();
            let data: Vec<u8> =
                batch.data.iter().flat_map(|r| &buffer[r.clone()]).copied().collect();
            assert_eq!(data.len(), batch.data_bytes);
            let mut data = &data[..];
            for extent in &batch.extents {
                let range = extent.offset as usize..(extent.offset + extent.bytes) as usize;
                if extent.zero {
                    there[range].fill(0);
                } else {
                    let (now, later) = data.split_at(range.len());
                    there[range].copy_from_slice(now);
                    data = later;
                }
            }
            assert!(data.is_empty());
            (messages, sent) = (messages + 1, sent + batch.data_bytes);
        }
        (messages, sent)
    }

    const BYTES: usize = (3 << 20) + 512;

    fn volume(content: &[(u64, &[u8])]) -> (NamedTempFile, Volume) {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(BYTES as u64).unwrap();
        for (at, bytes) in content {
            file.as_file().write_all_at(bytes, *at).unwrap();
        }
        let volume = Volume::open(file.path(), false).unwrap();
        (file, volume)
    }

    fn content(volume: &Volume) -> Vec<u8> {
        let mut all = vec![0; BYTES];
        volume.read_at(&mut all, 0).unwrap();
        all
    }

    #[test]
    fn holes_and_zeros_do_not_go_over() {
        let zeros = vec![0; 256 << 10];
        let (_file, volume) =
            volume(&[(8192, &[5; 512]), (1 << 20, &zeros), ((2 << 20) + 100, &[6; 8000])]);
        let mut there = vec![0; BYTES];
        let (messages, sent) = send(Pass::all(&volume, 0, true), &mut there);
        assert_eq!(there, content(&volume));
        assert_eq!((messages, sent), (1, 3 * 4096));
        // To a disk of unknown content zeros are told.
        let mut there = vec![9; BYTES];
        send(Pass::all(&volume, 0, false), &mut there);
        assert_eq!(there, content(&volume));
    }

    #[test]
    fn a_block_that_became_zero_is_told_and_not_sent() {
        let (_file, volume) = volume(&[(0, &[1; 512]), (BYTES as u64 - 512, &[2; 512])]);
        let mut there = vec![9; BYTES];
        let mut blocks = BlockSet::none(volume.bytes());
        blocks.insert(0, 1);
        blocks.insert(5 * BLOCK_BYTES, 2 * BLOCK_BYTES);
        blocks.insert(BYTES as u64 - 1, 1);
        let pass = Pass::blocks(&volume, 0, blocks);
        assert_eq!(pass.left(), 4 * BLOCK_BYTES);
        let (messages, sent) = send(pass, &mut there);
        assert_eq!((messages, sent), (1, BLOCK_BYTES as usize + 512));
        assert_eq!(there.iter().filter(|byte| **byte == 0).count(), (3 << 16) - 512);
        assert_eq!(there[BYTES - 512..], [2; 512]);
    }

    proptest! {
        /// Whatever is where: the first pass makes the copy, later ones keep it.
        #[test]
        fn passes_make_a_copy(
            writes in prop::collection::vec((0u64..700, 1usize..40, 0u8..3), 0..30),
            later in prop::collection::vec((0u64..700, 1usize..40, 0u8..3), 0..10),
            zeroed in any::<bool>(),
        ) {
            let (file, volume) = volume(&[]);
            let write = |(page, pages, value): (u64, usize, u8)| {
                let bytes = (pages * 4096).min(BYTES - page as usize * 4096);
                file.as_file().write_all_at(&vec![value; bytes], page * 4096).unwrap();
                (page * 4096, bytes as u64)
            };
            for one in writes {
                write(one);
            }
            let mut there = vec![if zeroed { 0 } else { 7 }; BYTES];
            send(Pass::all(&volume, 0, zeroed), &mut there);
            prop_assert_eq!(&there, &content(&volume));
            let mut blocks = BlockSet::none(volume.bytes());
            for (offset, bytes) in later.into_iter().map(write) {
                blocks.insert(offset, bytes);
            }
            send(Pass::blocks(&volume, 0, blocks), &mut there);
            prop_assert_eq!(&there, &content(&volume));
        }
    }
}
