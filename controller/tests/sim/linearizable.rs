//! Is this history of a register linearizable? (Wing and Gong's search, with Lowe's memory of
//! what was tried.)

use std::collections::HashSet;

/// What an operation did, as its client saw it. Written values are never written twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Write(u64),
    /// It saw this value, or none.
    Read(Option<u64>),
    /// From `old` to `new`: done, or refused because the value was another one.
    Swap {
        old: Option<u64>,
        new: u64,
        done: bool,
    },
}

/// One operation. Without an `end` nobody knows whether, or when, it took effect.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operation {
    pub(crate) start: u64,
    pub(crate) end: Option<u64>,
    pub(crate) action: Action,
}

/// What the action makes of the register; None when it could not have seen that.
fn step(value: Option<u64>, operation: &Operation) -> Option<Option<u64>> {
    match operation.action {
        Action::Write(new) => Some(Some(new)),
        Action::Read(seen) => (seen == value).then_some(value),
        Action::Swap { old, new, done } => {
            let matches = old == value;
            match (operation.end, matches) {
                (None, true) => Some(Some(new)),
                (None, false) => Some(value),
                (Some(_), true) => done.then_some(Some(new)),
                (Some(_), false) => (!done).then_some(value),
            }
        }
    }
}

/// Whether some order of the operations, each between its start and its end, explains what
/// all of them saw. The register begins empty.
pub(crate) fn check(operations: &[Operation]) -> bool {
    Search::new(operations).run()
}

/// Starts and ends in their order, as a list from which taken operations are lifted out.
struct Search<'a> {
    operations: &'a [Operation],
    /// (operation, is its end), by place; place 0 is the list's head.
    events: Vec<(usize, bool)>,
    next: Vec<usize>,
    previous: Vec<usize>,
    place_of_end: Vec<usize>,
    tried: HashSet<(Vec<u64>, Option<u64>)>,
}

impl<'a> Search<'a> {
    fn new(operations: &'a [Operation]) -> Self {
        let mut events: Vec<(u64, bool, usize)> = Vec::new();
        for (i, operation) in operations.iter().enumerate() {
            events.push((operation.start, false, i));
            events.push((operation.end.unwrap_or(u64::MAX), true, i));
        }
        // At one instant, starts come first: what touches overlaps.
        events.sort_unstable();
        let mut place_of_end = vec![0; operations.len()];
        for (place, (_, is_end, i)) in events.iter().enumerate() {
            if *is_end {
                place_of_end[*i] = place + 1;
            }
        }
        let count = events.len() + 1;
        Self {
            operations,
            events: std::iter::once((usize::MAX, true))
                .chain(events.into_iter().map(|(_, is_end, i)| (i, is_end)))
                .collect(),
            next: (1..=count).collect(),
            previous: (0..count).map(|place| place.saturating_sub(1)).collect(),
            place_of_end,
            tried: HashSet::new(),
        }
    }

    fn unlink(&mut self, place: usize) {
        let (previous, next) = (self.previous[place], self.next[place]);
        self.next[previous] = next;
        if next < self.previous.len() {
            self.previous[next] = previous;
        }
    }

    fn relink(&mut self, place: usize) {
        let (previous, next) = (self.previous[place], self.next[place]);
        self.next[previous] = place;
        if next < self.previous.len() {
            self.previous[next] = place;
        }
    }

    fn run(mut self) -> bool {
        let mut value = None;
        let mut taken = vec![0_u64; self.operations.len().div_ceil(64)];
        let mut stack: Vec<(usize, Option<u64>)> = Vec::new();
        let mut place = self.next[0];
        loop {
            if place >= self.events.len() {
                return true;
            }
            let (i, is_end) = self.events[place];
            if !is_end {
                let after = step(value, &self.operations[i]);
                taken[i / 64] |= 1 << (i % 64);
                if let Some(after) = after
                    && self.tried.insert((taken.clone(), after))
                {
                    stack.push((place, value));
                    value = after;
                    self.unlink(place);
                    self.unlink(self.place_of_end[i]);
                    place = self.next[0];
                } else {
                    taken[i / 64] &= !(1 << (i % 64));
                    place = self.next[place];
                }
                continue;
            }
            // The end of an operation that is not taken yet. If nobody saw it end, all that
            // did end are explained.
            if self.operations[i].end.is_none() {
                return true;
            }
            let Some((back, before)) = stack.pop() else { return false };
            let i = self.events[back].0;
            taken[i / 64] &= !(1 << (i % 64));
            value = before;
            self.relink(self.place_of_end[i]);
            self.relink(back);
            place = self.next[back];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Action::{Read, Swap, Write};
    use super::*;

    fn op(start: u64, end: u64, action: Action) -> Operation {
        Operation { start, end: Some(end), action }
    }

    fn lost(start: u64, action: Action) -> Operation {
        Operation { start, end: None, action }
    }

    #[test]
    fn orders_that_exist() {
        assert!(check(&[]));
        assert!(check(&[op(0, 1, Read(None)), op(2, 3, Write(1)), op(4, 5, Read(Some(1)))]));
        // Two overlapping writes, read in either order.
        let writes = [op(0, 10, Write(1)), op(0, 10, Write(2))];
        for last in [1, 2] {
            assert!(check(&[writes[0], writes[1], op(11, 12, Read(Some(last)))]));
        }
        // A write whose end nobody saw may come late, or never.
        assert!(check(&[lost(0, Write(1)), op(5, 6, Read(None)), op(7, 8, Read(Some(1)))]));
        assert!(check(&[lost(0, Write(1)), op(5, 6, Read(None))]));
        let swap = Swap { old: Some(1), new: 2, done: true };
        assert!(check(&[op(0, 1, Write(1)), op(2, 3, swap), op(4, 5, Read(Some(2)))]));
    }

    #[test]
    fn orders_that_do_not_exist() {
        // A lost write, a stale read, a read that goes back, a value from nowhere.
        assert!(!check(&[op(0, 1, Write(1)), op(2, 3, Read(None))]));
        let stale = [op(0, 1, Write(1)), op(2, 3, Write(2)), op(4, 5, Read(Some(1)))];
        assert!(!check(&stale));
        let back = [
            op(0, 1, Write(1)),
            op(2, 20, Write(2)),
            op(3, 4, Read(Some(2))),
            op(5, 6, Read(Some(1))),
        ];
        assert!(!check(&back));
        assert!(!check(&[op(0, 1, Read(Some(7)))]));
        // Both swaps cannot have found the same value.
        let both = [
            op(0, 1, Write(1)),
            op(2, 9, Swap { old: Some(1), new: 2, done: true }),
            op(2, 9, Swap { old: Some(1), new: 3, done: true }),
        ];
        assert!(!check(&both));
        // A swap that was refused although nothing had changed.
        let refused = [op(0, 1, Write(1)), op(2, 3, Swap { old: Some(1), new: 2, done: false })];
        assert!(!check(&refused));
    }
}
