//! A disk whose blocks have versions: what the guest has written and flushed, what has gone over,
//! what survives which crash.
//!
//! It is local (a volume at each node, the content is copied) or shared (one volume, each node with
//! a cache of its own). The tracker is the real one.

use drover_hv::virtio::blk::tracker::{BLOCK_BYTES, WriteTracker};

use super::Chance;

const BLOCKS: usize = 6;
const BYTES: u64 = BLOCKS as u64 * BLOCK_BYTES;

/// What a block holds: the guest's count of writes, in the order in which they landed.
pub(crate) type Version = u32;

#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) shared: bool,
    tracker: WriteTracker,
    /// As the guest at the source sees it.
    here: [Version; BLOCKS],
    /// What it was told is durable.
    flushed: [Version; BLOCKS],
    version: Version,
    /// Requests that have begun, not landed and not ended.
    under_way: Vec<usize>,
    /// Of the pass that goes on: what is still to be read.
    to_read: Vec<usize>,
    passing: bool,
    first_done: bool,
    /// At the destination, or of a shared volume what any node sees that opens it.
    there: [Version; BLOCKS],
    there_durable: [Version; BLOCKS],
    pub(crate) open_here: bool,
    pub(crate) open_there: bool,
}

impl Disk {
    pub(crate) fn new(shared: bool) -> Self {
        // A local destination holds its disk all along.
        let there = if shared { 0 } else { 99 };
        Self {
            shared,
            open_here: true,
            open_there: !shared,
            there: [there; BLOCKS],
            there_durable: [there; BLOCKS],
            ..Self::default()
        }
    }

    fn mark(&self, block: usize) {
        self.tracker.mark(block as u64 * BLOCK_BYTES, 512);
    }

    /// The guest does something, while it runs at the source.
    pub(crate) fn guest(&mut self, chance: &mut Chance) {
        assert!(self.open_here, "a guest without its disk");
        match chance.below(5) {
            0 | 1 => {
                let block = chance.below(BLOCKS);
                self.mark(block);
                self.under_way.push(block);
            }
            2 | 3 if !self.under_way.is_empty() => {
                let request = chance.below(self.under_way.len());
                self.land(request);
            }
            _ => self.flush(),
        }
    }

    fn land(&mut self, request: usize) {
        let block = self.under_way.swap_remove(request);
        self.version += 1;
        self.here[block] = self.version;
        self.mark(block);
    }

    /// What has ended before is durable now.
    fn flush(&mut self) {
        self.flushed = self.here;
        if self.shared {
            self.there = self.here;
            self.there_durable = self.here;
        }
    }

    /// The pause: all that is under way ends; what another node cannot see becomes durable.
    pub(crate) fn settle(&mut self) {
        while !self.under_way.is_empty() {
            self.land(0);
        }
        if self.shared {
            self.flush();
        }
    }

    /// Reads some blocks of a pass, which begins with the first call: it takes its marks then.
    /// Nothing at the end of it.
    pub(crate) fn read(&mut self, most: usize) -> Vec<(usize, Version)> {
        if self.shared {
            return Vec::new();
        }
        if !std::mem::replace(&mut self.passing, true) {
            if std::mem::replace(&mut self.first_done, true) {
                let taken = self.tracker.take(BYTES);
                let marked = |b: &usize| {
                    let at = *b as u64 * BLOCK_BYTES;
                    taken.next_run(at).is_some_and(|(start, _)| start == at)
                };
                self.to_read = (0..BLOCKS).filter(marked).collect();
            } else {
                self.tracker.start(BYTES);
                self.to_read = (0..BLOCKS).collect();
            }
        }
        let now = self.to_read.split_off(self.to_read.len().saturating_sub(most));
        if now.is_empty() {
            self.passing = false;
        }
        now.into_iter().map(|block| (block, self.here[block])).collect()
    }

    /// The last pass, on its own in the pause.
    pub(crate) fn read_last(&mut self) -> Vec<(usize, Version)> {
        let mut last = self.read(BLOCKS);
        self.passing = false;
        last.extend(self.read(BLOCKS));
        last
    }

    pub(crate) fn receive(&mut self, blocks: &[(usize, Version)]) {
        assert!(self.open_there && !self.shared);
        for (block, version) in blocks {
            self.there[*block] = *version;
        }
    }

    pub(crate) fn sync_there(&mut self) {
        if !self.shared {
            self.there_durable = self.there;
        }
    }

    pub(crate) fn stop_tracking(&mut self) {
        self.tracker.stop();
    }

    pub(crate) fn is_tracked(&self) -> bool {
        self.tracker.is_on()
    }

    /// At the line: whichever node's power fails from here on, no flushed write is lost, and the
    /// guest finds its disk as it left it.
    pub(crate) fn check_moved(&self) {
        for block in 0..BLOCKS {
            let durable = self.there_durable[block];
            assert!(durable >= self.flushed[block], "a flushed write of block {block} is lost");
            assert_eq!(durable, self.here[block], "block {block} is not as it was in the pause");
        }
    }
}
