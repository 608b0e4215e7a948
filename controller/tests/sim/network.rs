//! Links between members: each direction is a connection that keeps its order, until it
//! breaks and takes what was under way with it.

use std::collections::{BTreeMap, BTreeSet};

use rand::RngExt as _;
use rand::rngs::SmallRng;

type Way = (u64, u64);

/// How one run's network behaves.
pub(crate) struct Network {
    links: BTreeMap<Way, Link>,
    cut: BTreeSet<Way>,
    delay_ms: u64,
    /// Of a message to break its connection.
    breaks: f64,
    /// Of a message to come twice.
    doubles: f64,
}

#[derive(Default)]
struct Link {
    /// Counts the connections; what belongs to an older one never arrives.
    connection: u64,
    busy_until: u64,
    down_until: u64,
}

/// A message on its way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    pub(crate) at: u64,
    pub(crate) connection: u64,
    pub(crate) twice: bool,
}

impl Network {
    pub(crate) fn new(rng: &mut SmallRng) -> Self {
        Self {
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            delay_ms: *[1, 5, 30].get(rng.random_range(0..3)).unwrap(),
            breaks: rng.random_range(0.0..0.01),
            doubles: rng.random_range(0.0..0.02),
        }
    }

    pub(crate) fn calm(&mut self) {
        self.cut.clear();
        self.breaks = 0.0;
        self.doubles = 0.0;
    }

    /// Puts a message on its way; None when it cannot be sent.
    pub(crate) fn send(&mut self, now: u64, way: Way, rng: &mut SmallRng) -> Option<Ticket> {
        let link = self.links.entry(way).or_default();
        if now < link.down_until {
            return None;
        }
        if rng.random_bool(self.breaks) {
            link.connection += 1;
            link.down_until = now + rng.random_range(20..1000);
            return None;
        }
        if self.cut.contains(&way) {
            // It leaves, and does not arrive.
            return Some(Ticket { at: now, connection: u64::MAX, twice: false });
        }
        let delay = if rng.random_bool(0.02) { self.delay_ms * 20 } else { self.delay_ms };
        let at = (now + rng.random_range(0..=delay)).max(link.busy_until);
        link.busy_until = at;
        Some(Ticket { at, connection: link.connection, twice: rng.random_bool(self.doubles) })
    }

    /// Whether what left on that connection arrives.
    pub(crate) fn arrives(&self, way: Way, connection: u64) -> bool {
        !self.cut.contains(&way)
            && self.links.get(&way).is_some_and(|link| link.connection == connection)
    }

    /// Ends the connection of one direction.
    pub(crate) fn reset(&mut self, way: Way) {
        self.links.entry(way).or_default().connection += 1;
    }

    /// Cuts some links, in one direction or both, or heals all.
    pub(crate) fn change(&mut self, members: u64, rng: &mut SmallRng) {
        self.cut.clear();
        if rng.random_bool(0.4) {
            return;
        }
        let lonely = rng.random_range(1..=members);
        let (out, back) = *[(true, true), (true, false), (false, true)]
            .get(rng.random_range(0..3_usize))
            .unwrap();
        for other in (1..=members).filter(|id| *id != lonely) {
            // Sometimes only some of its links.
            if rng.random_bool(0.25) {
                continue;
            }
            if out {
                self.cut.insert((lonely, other));
            }
            if back {
                self.cut.insert((other, lonely));
            }
        }
    }
}
