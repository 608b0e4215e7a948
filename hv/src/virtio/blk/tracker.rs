//! Which blocks of a volume were written: what a migration has to send again.
//!
//! A request marks its blocks twice, before it begins and when it is done:
//!
//! ```text
//!   begin ── the volume is being written ── end
//!     │ mark                                 │ mark
//!         ▲ take, and the block is read: half of the write, or none of it
//! ```
//!
//! Whoever takes the marks and then reads a block that is being written has read some mixture; the
//! mark at the end brings the block back. So a block whose mark was taken is whole in what was read
//! afterwards, or it is marked again, at the latest when nothing is under way any more.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::requests::Span;

/// The unit of tracking, bytes.
pub const BLOCK_BYTES: u64 = 64 << 10;
const WORD_BLOCKS: u64 = 64;

/// A set of blocks of a volume: one bit a block.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockSet {
    words: Vec<u64>,
}

impl BlockSet {
    /// No block of a volume of this length.
    pub fn none(volume_bytes: u64) -> Self {
        let words = volume_bytes.div_ceil(BLOCK_BYTES).div_ceil(WORD_BLOCKS);
        Self { words: vec![0; words as usize] }
    }

    /// Adds the blocks that these bytes touch. Behind the end of the volume the set grows: the
    /// volume has.
    pub fn insert(&mut self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let (first, last) = (offset / BLOCK_BYTES, (offset + bytes - 1) / BLOCK_BYTES);
        let words = (last / WORD_BLOCKS + 1) as usize;
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        for word in first / WORD_BLOCKS..=last / WORD_BLOCKS {
            let from = first.max(word * WORD_BLOCKS) - word * WORD_BLOCKS;
            let to = last.min(word * WORD_BLOCKS + WORD_BLOCKS - 1) - word * WORD_BLOCKS;
            self.words[word as usize] |= u64::MAX >> (WORD_BLOCKS - 1 - to) & u64::MAX << from;
        }
    }

    /// Adds the blocks of another set.
    pub fn merge(&mut self, other: &Self) {
        if self.words.len() < other.words.len() {
            self.words.resize(other.words.len(), 0);
        }
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// Bytes of all blocks; the volume's last one counts as a whole one.
    pub fn bytes(&self) -> u64 {
        self.bytes_from(0)
    }

    /// Bytes of the blocks at or behind `offset`, a multiple of [`BLOCK_BYTES`].
    pub fn bytes_from(&self, offset: u64) -> u64 {
        let block = offset / BLOCK_BYTES;
        let words = self.words.iter().skip((block / WORD_BLOCKS) as usize);
        let all: u64 = words.map(|word| u64::from(word.count_ones())).sum();
        let first = self.words.get((block / WORD_BLOCKS) as usize).copied().unwrap_or(0);
        let before = first & !(u64::MAX << (block % WORD_BLOCKS));
        (all - u64::from(before.count_ones())) * BLOCK_BYTES
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The first run of blocks that ends behind `offset`, as `(start, end)` in bytes; `start` is
    /// not before `offset`, which is a multiple of [`BLOCK_BYTES`].
    pub fn next_run(&self, offset: u64) -> Option<(u64, u64)> {
        let first = self.next_bit(offset / BLOCK_BYTES, 0)?;
        let all = self.words.len() as u64 * WORD_BLOCKS;
        let end = self.next_bit(first, u64::MAX).unwrap_or(all);
        Some((first * BLOCK_BYTES, end * BLOCK_BYTES))
    }

    /// The first block at or after this one whose bit is set in `words ^ flip`.
    fn next_bit(&self, block: u64, flip: u64) -> Option<u64> {
        let mut index = (block / WORD_BLOCKS) as usize;
        let mut word = (self.words.get(index)? ^ flip) & (u64::MAX << (block % WORD_BLOCKS));
        while word == 0 {
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
        Some(index as u64 * WORD_BLOCKS + u64::from(word.trailing_zeros()))
    }
}

/// Notes the blocks that are written, while somebody wants to know.
#[derive(Debug, Default)]
pub struct WriteTracker {
    /// `None`: nobody wants to know. The lock is held for a few bits.
    written: Mutex<Option<BlockSet>>,
}

impl WriteTracker {
    fn written(&self) -> MutexGuard<'_, Option<BlockSet>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on every write is noted, also the end of one that is under way. What was noted
    /// before is forgotten.
    pub fn start(&self, volume_bytes: u64) {
        *self.written() = Some(BlockSet::none(volume_bytes));
    }

    /// Nobody wants to know any more.
    pub fn stop(&self) {
        *self.written() = None;
    }

    /// Whether somebody wants to know.
    pub fn is_on(&self) -> bool {
        self.written().is_some()
    }

    /// The blocks written since the last call; reading clears. None when it is off.
    pub fn take(&self, volume_bytes: u64) -> BlockSet {
        let none = BlockSet::none(volume_bytes);
        match &mut *self.written() {
            Some(written) => std::mem::replace(written, none),
            None => none,
        }
    }

    /// These bytes are being written, or may be.
    pub fn mark(&self, offset: u64, bytes: u64) {
        if let Some(written) = &mut *self.written() {
            written.insert(offset, bytes);
        }
    }

    pub(super) fn mark_all(&self, spans: &[Span]) {
        spans.iter().for_each(|span| self.mark(span.offset, span.bytes));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blocks(set: &BlockSet) -> Vec<u64> {
        let mut blocks = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = set.next_run(at) {
            assert!(start >= at && end > start);
            blocks.extend(start / BLOCK_BYTES..end / BLOCK_BYTES);
            at = end;
        }
        blocks
    }

    proptest! {
        /// A set is the blocks that were touched, however they lie.
        #[test]
        fn a_set_holds_what_was_touched(
            spans in prop::collection::vec((0u64..300 * BLOCK_BYTES, 0u64..5 * BLOCK_BYTES), 0..8),
        ) {
            let mut set = BlockSet::none(128 * BLOCK_BYTES + 512);
            let mut model = std::collections::BTreeSet::new();
            for (offset, bytes) in spans {
                set.insert(offset, bytes);
                model.extend((0..bytes).step_by(512).map(|at| (offset + at) / BLOCK_BYTES));
                if bytes > 0 {
                    model.insert((offset + bytes - 1) / BLOCK_BYTES);
                }
            }
            prop_assert_eq!(set.bytes(), model.len() as u64 * BLOCK_BYTES);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert_eq!(blocks(&set), model.into_iter().collect::<Vec<_>>());
        }
    }

    /// One step of a world with a volume of one block: writes that begin, land and end, and a
    /// reader that takes the marks and then, some time later, reads.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Begin,
        Land(usize),
        End(usize),
        Take,
        Read,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            Just(Step::Begin),
            (0usize..4).prop_map(Step::Land),
            (0usize..4).prop_map(Step::End),
            Just(Step::Take),
            Just(Step::Read),
        ]
    }

    proptest! {
        /// The race that matters: however writes and reads of a block interleave, once nothing is
        /// under way the copy is the block, or the block is marked.
        #[test]
        fn no_write_is_missed(steps in prop::collection::vec(step(), 0..60)) {
            let tracker = WriteTracker::default();
            // The bulk pass: tracking is on, then the block is read.
            let (mut block, mut version) = (0u64, 0u64);
            // Writes under way: what they write, and whether it is in the block.
            let mut under_way: Vec<(u64, bool)> = vec![(u64::MAX, false)];
            tracker.start(BLOCK_BYTES);
            let mut copy = block;
            let mut to_read = false;
            for step in steps {
                match step {
                    Step::Begin => {
                        version += 1;
                        tracker.mark(512, 512);
                        under_way.push((version, false));
                    }
                    Step::Land(index) => if let Some(write) = under_way.get_mut(index) {
                        block = write.0;
                        write.1 = true;
                    },
                    Step::End(index) => if index < under_way.len() {
                        let (value, landed) = under_way.swap_remove(index);
                        if !landed {
                            block = value;
                        }
                        tracker.mark(512, 512);
                    },
                    Step::Take => to_read |= !tracker.take(BLOCK_BYTES).is_empty(),
                    Step::Read => if std::mem::take(&mut to_read) {
                        copy = block;
                    },
                }
            }
            // The pause: all that is under way ends, then the marks are taken a last time.
            for (value, landed) in under_way {
                if !landed {
                    block = value;
                }
                tracker.mark(512, 512);
            }
            if to_read || !tracker.take(BLOCK_BYTES).is_empty() {
                copy = block;
            }
            prop_assert_eq!(copy, block);
        }
    }

    /// The same with threads and a file's place taken by an atomic: writers never stop, the
    /// reader copies what is marked.
    #[test]
    fn threads_miss_no_write_either() {
        use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
        const BLOCKS: u64 = 8;
        let tracker = WriteTracker::default();
        let disk: Vec<AtomicU64> = (0..BLOCKS).map(|_| AtomicU64::new(0)).collect();
        tracker.start(BLOCKS * BLOCK_BYTES);
        let mut copy = vec![0; BLOCKS as usize];
        let copy_marked = |copy: &mut Vec<u64>| {
            for block in blocks(&tracker.take(BLOCKS * BLOCK_BYTES)) {
                copy[block as usize] = disk[block as usize].load(SeqCst);
            }
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..3u64)
                .map(|writer| {
                    let (tracker, disk) = (&tracker, &disk);
                    scope.spawn(move || {
                        for round in 1..2000u64 {
                            let block = (round * (writer + 1)) % BLOCKS;
                            tracker.mark(block * BLOCK_BYTES, 512);
                            disk[block as usize].store(round << 2 | writer, SeqCst);
                            tracker.mark(block * BLOCK_BYTES, 512);
                        }
                    })
                })
                .collect();
            while writers.iter().any(|writer| !writer.is_finished()) {
                copy_marked(&mut copy);
            }
        });
        copy_marked(&mut copy);
        let disk: Vec<u64> = disk.iter().map(|block| block.load(SeqCst)).collect();
        assert_eq!(copy, disk);
    }

    #[test]
    fn off_means_off() {
        let tracker = WriteTracker::default();
        tracker.mark(0, 512);
        assert!(!tracker.is_on() && tracker.take(BLOCK_BYTES).is_empty());
        tracker.start(BLOCK_BYTES);
        tracker.mark(0, 512);
        tracker.start(BLOCK_BYTES);
        assert!(tracker.take(BLOCK_BYTES).is_empty(), "an earlier attempt's marks");
        tracker.stop();
        assert!(!tracker.is_on());
    }
}
