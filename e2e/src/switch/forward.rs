//! Where frames go: pure, no I/O.

use std::collections::HashMap;

use super::Segment;

/// Most moves of addresses kept, oldest first.
const MOVES_MAX: usize = 10_000;

/// Most addresses remembered a segment; a flood of invented ones must not eat memory.
const ADDRESSES_MAX: usize = 1024;
/// Destination and source address, type.
pub(super) const FRAME_BYTES_MIN: usize = 14;

pub(super) type Mac = [u8; 6];

/// Who was last seen where.
#[derive(Debug, Default)]
pub(super) struct Table {
    seen: HashMap<(Segment, Mac), usize>,
    /// Where each address was seen last, also when its cable was pulled since.
    last_port: HashMap<(Segment, Mac), usize>,
    moves: Vec<Move>,
}

/// An address was at work at another port than before, or for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    pub(super) segment: Segment,
    pub(super) mac: Mac,
    pub(super) port: usize,
}

/// Where one frame goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// To one port.
    To(usize),
    /// To every other port of the segment.
    Flood,
    /// Nowhere: its destination is behind the port that it came from, or it is no frame.
    Nowhere,
}

impl Table {
    /// Learns the frame's source and finds its destination.
    pub(super) fn route(&mut self, segment: Segment, from: usize, frame: &[u8]) -> Route {
        if frame.len() < FRAME_BYTES_MIN {
            return Route::Nowhere;
        }
        let (destination, source) = (mac(&frame[..6]), mac(&frame[6..12]));
        let room = self.seen.len() < ADDRESSES_MAX;
        if !is_multicast(source) && (room || self.seen.contains_key(&(segment, source))) {
            self.seen.insert((segment, source), from);
            if !is_announcement(frame) {
                self.note_move(segment, source, from);
            }
        }
        if is_multicast(destination) {
            return Route::Flood;
        }
        match self.seen.get(&(segment, destination)) {
            Some(port) if *port == from => Route::Nowhere,
            Some(port) => Route::To(*port),
            None => Route::Flood,
        }
    }

    fn note_move(&mut self, segment: Segment, mac: Mac, port: usize) {
        let before = self.last_port.insert((segment, mac), port);
        if before != Some(port) && self.moves.len() < MOVES_MAX {
            self.moves.push(Move { segment, mac, port });
        }
    }

    /// Each address's ports in the order in which it was at work there. One that goes back and
    /// forth is used by two machines.
    pub(super) fn moves(&self) -> &[Move] {
        &self.moves
    }

    /// Forgets who was behind a port (its cable was pulled).
    pub(super) fn forget(&mut self, port: usize) {
        self.seen.retain(|_, p| *p != port);
    }
}

fn mac(bytes: &[u8]) -> Mac {
    let mut mac = [0; 6];
    mac.copy_from_slice(bytes);
    mac
}

/// ARP and RARP: somebody says where an address is, which is not to be there. A destination says so
/// while the guest still stands at its source, whose last frames may come later.
fn is_announcement(frame: &[u8]) -> bool {
    matches!(frame[12..14], [0x08, 0x06] | [0x80, 0x35])
}

fn is_multicast(mac: Mac) -> bool {
    mac[0] & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut bytes = vec![2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from, 8, 0];
        if to == 0xff {
            bytes[..6].fill(0xff);
        }
        bytes
    }

    /// A domain that moves announces itself from its new host: the next frame must go there.
    #[test]
    fn an_address_that_moves_is_followed() {
        let mut table = Table::default();
        assert_eq!(table.route(Segment::Guest, 0, &frame(9, 1)), Route::Flood, "9 is unknown");
        assert_eq!(table.route(Segment::Guest, 1, &frame(1, 9)), Route::To(0));
        assert_eq!(table.route(Segment::Guest, 0, &frame(9, 1)), Route::To(1));
        // 9 announces itself by a broadcast on port 2.
        assert_eq!(table.route(Segment::Guest, 2, &frame(0xff, 9)), Route::Flood);
        assert_eq!(table.route(Segment::Guest, 0, &frame(9, 1)), Route::To(2));
        let ports = |mac: u8| -> Vec<usize> {
            table.moves().iter().filter(|m| m.mac[5] == mac).map(|m| m.port).collect()
        };
        assert_eq!((ports(1), ports(9)), (vec![0], vec![1, 2]));
    }

    /// An announcement moves frames, and is no sign of life; the first frame of its own is.
    #[test]
    fn who_announces_an_address_does_not_run_it() {
        let mut table = Table::default();
        let mut announcement = frame(0xff, 9);
        announcement[12..14].copy_from_slice(&[0x80, 0x35]);
        table.route(Segment::Guest, 1, &frame(1, 9));
        table.route(Segment::Guest, 2, &announcement);
        assert_eq!(table.route(Segment::Guest, 0, &frame(9, 1)), Route::To(2));
        table.route(Segment::Guest, 1, &frame(1, 9));
        let ports = |table: &Table| -> Vec<usize> {
            table.moves().iter().filter(|m| m.mac[5] == 9).map(|m| m.port).collect()
        };
        assert_eq!(ports(&table), [1]);
        table.route(Segment::Guest, 2, &announcement);
        table.route(Segment::Guest, 2, &frame(1, 9));
        assert_eq!(ports(&table), [1, 2]);
    }

    /// Pulling a cable and plugging it in again is no move.
    #[test]
    fn the_same_port_again_is_no_move() {
        let mut table = Table::default();
        table.route(Segment::Guest, 1, &frame(0xff, 9));
        table.forget(1);
        table.route(Segment::Guest, 1, &frame(0xff, 9));
        assert_eq!(table.moves().len(), 1);
    }

    #[test]
    fn segments_do_not_know_of_each_other() {
        let mut table = Table::default();
        table.route(Segment::Guest, 1, &frame(0xff, 9));
        assert_eq!(table.route(Segment::Mgmt, 0, &frame(9, 1)), Route::Flood);
    }

    #[test]
    fn what_is_behind_the_same_port_goes_nowhere() {
        let mut table = Table::default();
        table.route(Segment::Guest, 1, &frame(0xff, 9));
        assert_eq!(table.route(Segment::Guest, 1, &frame(9, 8)), Route::Nowhere);
        assert_eq!(table.route(Segment::Guest, 1, &[0; 13]), Route::Nowhere, "too short");
    }

    /// A guest that invents addresses fills the table, not the memory, and others still work.
    #[test]
    fn the_table_is_bounded() {
        let mut table = Table::default();
        table.route(Segment::Guest, 0, &frame(0xff, 1));
        for n in 0..10_000_u32 {
            let mut bytes = frame(0xff, 0);
            bytes[7..11].copy_from_slice(&n.to_be_bytes());
            table.route(Segment::Guest, 1, &bytes);
        }
        assert_eq!(table.seen.len(), ADDRESSES_MAX);
        assert_eq!(table.route(Segment::Guest, 2, &frame(1, 2)), Route::To(0));
        table.forget(1);
        assert_eq!(table.seen.len(), 1, "only 1 on port 0 is left: 2 came when it was full");
    }
}
