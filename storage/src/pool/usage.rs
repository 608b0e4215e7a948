//! How full a pool is, and from where on that matters.

use std::fmt;

/// A pool's room.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolUsage {
    /// What it can hold, bytes.
    pub bytes: u64,
    /// What is taken, bytes; by others too, where they share the filesystem.
    pub used_bytes: u64,
    /// How much of the thin pool's metadata is taken, 0 to 1; only LVM has such.
    pub metadata_fraction: Option<f64>,
    /// What is wrong with the pool, in the tool's words ("out_of_data", "failed").
    pub fault: Option<String>,
}

/// From which fraction on a pool is filling or full, of data or of metadata.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// An event is due, and no new placements.
    pub filling: f64,
    /// Nothing more is imported.
    pub full: f64,
}

impl Default for Thresholds {
    /// Filling leaves a fifth: time for a person to act before a guest sees an error.
    fn default() -> Self {
        Self { filling: 0.80, full: 0.95 }
    }
}

/// How full a pool is, in a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// There is room.
    Fine,
    /// Somebody should act.
    Filling,
    /// Guests are about to see errors, or do already.
    Full,
}

impl PoolUsage {
    /// How much of the data is taken, 0 to 1. A pool without any room is full.
    pub fn data_fraction(&self) -> f64 {
        if self.bytes == 0 { 1.0 } else { self.used_bytes as f64 / self.bytes as f64 }
    }

    /// How much more it may hold before it is full.
    pub fn room_bytes(&self, thresholds: Thresholds) -> u64 {
        match self.level(thresholds) {
            Level::Full => 0,
            _ => ((self.bytes as f64 * thresholds.full) as u64).saturating_sub(self.used_bytes),
        }
    }

    /// Where this stands against the thresholds. A pool with a fault is full: it takes nothing.
    pub fn level(&self, thresholds: Thresholds) -> Level {
        let worst = self.data_fraction().max(self.metadata_fraction.unwrap_or(0.0));
        if self.fault.is_some() || worst >= thresholds.full {
            Level::Full
        } else if worst >= thresholds.filling {
            Level::Filling
        } else {
            Level::Fine
        }
    }
}

impl fmt::Display for PoolUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (percent, bytes) = (self.data_fraction() * 100.0, self.bytes);
        write!(f, "{percent:.1} % of {bytes} bytes are taken")?;
        if let Some(metadata) = self.metadata_fraction {
            write!(f, ", {:.1} % of its metadata", metadata * 100.0)?;
        }
        self.fault.iter().try_for_each(|fault| write!(f, ", and it says {fault}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worse_of_data_and_metadata_decides_and_a_fault_is_full() {
        let usage = |used, metadata| PoolUsage {
            bytes: 1000,
            used_bytes: used,
            metadata_fraction: metadata,
            fault: None,
        };
        let level = |usage: PoolUsage| usage.level(Thresholds::default());
        assert_eq!(level(usage(0, None)), Level::Fine);
        assert_eq!(level(usage(799, Some(0.1))), Level::Fine);
        assert_eq!(level(usage(800, Some(0.1))), Level::Filling);
        assert_eq!(level(usage(1, Some(0.80))), Level::Filling);
        assert_eq!(level(usage(950, None)), Level::Full);
        assert_eq!(level(usage(1, Some(0.96))), Level::Full);
        assert_eq!(level(PoolUsage { bytes: 0, ..usage(0, None) }), Level::Full);
        let room = |usage: PoolUsage| usage.room_bytes(Thresholds::default());
        assert_eq!((room(usage(0, None)), room(usage(900, None))), (950, 50));
        assert_eq!((room(usage(950, None)), room(usage(1, Some(0.96)))), (0, 0));
        let fault = Some("out_of_data".into());
        assert_eq!(level(PoolUsage { fault, ..usage(0, None) }), Level::Full);
    }
}
