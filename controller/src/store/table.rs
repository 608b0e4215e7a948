//! Tables, and what a row must know about itself.

/// The tables. A number is on disk and in the log: it is never changed nor used again.
///
/// A member that meets a number it does not know keeps and replicates the rows all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// The store's own rows: which storage each member has.
    Meta = 1,
    /// Hosts that run domains.
    Nodes = 2,
    /// Virtual machines.
    Domains = 3,
    /// Long-running work.
    Operations = 4,
    /// What was answered to which request id.
    Requests = 5,
    /// What happened, for people.
    Events = 6,
    /// What the cluster as a whole remembers: one row.
    Cluster = 7,
    /// Block devices of domains.
    Volumes = 8,
    /// Immutable sources of volumes.
    Images = 9,
    /// What nodes shall remove.
    Garbage = 10,
    /// Which addresses domains are given.
    Networks = 11,
    /// What domains' disks held at one moment.
    Snapshots = 12,
}

impl Table {
    /// The number on disk and in the log.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }
}

/// A row type: a protobuf message that belongs to one table and knows its key.
///
/// One table holds one record type; that is what makes reading a row infallible.
pub trait Record: prost::Message + Default {
    /// Where its rows live.
    const TABLE: Table;
    /// Its key, unique in the table.
    fn key(&self) -> String;
}

/// A row with its revisions.
#[derive(Clone, Debug, PartialEq)]
pub struct Versioned<T> {
    /// The row.
    pub value: T,
    /// The revision that created it; another one after a delete means another row.
    pub create_revision: u64,
    /// The revision that last wrote it.
    pub mod_revision: u64,
}
