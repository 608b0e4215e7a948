//! What agents say: in the leader's memory, never written.
//!
//! A report is a level: it replaces the one before. Whether it can be taken as an answer to
//! something that the store says depends on what the agent knew when it wrote it; that is
//! [`NodeObservation::taken_in`].

use std::collections::BTreeMap;
use std::sync::Arc;

use drover_proto::agent::v1::{
    ObservedDomain, ObservedImage, ObservedPool, ObservedSnapshot, ObservedVolume, Report,
};
use drover_proto::v1::NodeUsage;

use super::{GarbageRecord, NodeId};

/// What one node's agent said last.
#[derive(Clone, Debug, Default)]
pub struct NodeObservation {
    /// A session is open.
    pub connected: bool,
    /// When it was last heard, on the leader's monotonic clock, in milliseconds.
    pub heard_ms: u64,
    /// It has reported since the session opened: `domains` is all that is there.
    pub reported: bool,
    /// The store's revision whose wishes the report knows: nothing in it answers a row that
    /// was written later.
    pub taken_in: u64,
    /// The host as a whole.
    pub usage: NodeUsage,
    /// Everything on the node, by the domain's uid.
    pub domains: BTreeMap<String, ObservedDomain>,
    /// Its pools, by their ids; the first one is what a disk that names none gets.
    pub pools: BTreeMap<String, ObservedPool>,
    /// Every volume in them, by uid.
    pub volumes: BTreeMap<String, ObservedVolume>,
    /// Every image in them.
    pub images: Vec<ObservedImage>,
    /// Every part of a snapshot in them, and those that shall be there, by uid.
    pub snapshots: BTreeMap<String, ObservedSnapshot>,
}

impl NodeObservation {
    /// Takes a report in.
    pub fn take(&mut self, report: Report, taken_in: u64, now_ms: u64) {
        self.heard_ms = now_ms;
        self.reported = true;
        self.taken_in = taken_in;
        self.usage = report.usage.unwrap_or_default();
        self.domains = report.domains.into_iter().map(|d| (d.uid.clone(), d)).collect();
        self.pools = report.pools.into_iter().map(|p| (p.id.clone(), p)).collect();
        self.volumes = report.volumes.into_iter().map(|v| (v.uid.clone(), v)).collect();
        self.images = report.images;
        self.snapshots = report.snapshots.into_iter().map(|s| (s.uid.clone(), s)).collect();
    }

    /// What was on a host before it rebooted is no fact any more.
    pub fn forget(&mut self) {
        self.domains.clear();
        self.pools.clear();
        self.volumes.clear();
        self.images.clear();
        self.snapshots.clear();
    }

    /// Whether it has reported without what it shall remove, knowing the revision.
    #[must_use]
    pub fn is_without(&self, garbage: &GarbageRecord, revision: u64) -> bool {
        self.reported
            && self.taken_in >= revision
            && !self.volumes.contains_key(&garbage.volume_uid)
            && !self.snapshots.contains_key(&garbage.snapshot_uid)
            && !self.images.iter().any(|image| image.digest == garbage.image_digest)
    }
}

/// All nodes, as their agents say. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// By node; a node that this leader has not heard is not here.
    pub nodes: BTreeMap<NodeId, Arc<NodeObservation>>,
}

/// What a node says about one domain.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Side<'a> {
    /// Nothing, or nothing that answers the row as it is now.
    Unknown,
    /// It knows the row as it is, and there is nothing of the domain on it.
    Absent,
    /// This.
    Present(&'a ObservedDomain),
}

impl Observed {
    /// What `node` says about the domain `uid`, whose row was last written at `mod_revision`.
    #[must_use]
    pub fn side(&self, node: &str, uid: &str, mod_revision: u64) -> Side<'_> {
        let Some(node) = self.nodes.get(&NodeId::trusted(node)) else { return Side::Unknown };
        match node.domains.get(uid) {
            Some(domain) => Side::Present(domain),
            None if node.reported && node.taken_in >= mod_revision => Side::Absent,
            None => Side::Unknown,
        }
    }

    /// Whether what `node` says was said in knowledge of the revision.
    #[must_use]
    pub fn knows(&self, node: &str, revision: u64) -> bool {
        self.nodes
            .get(&NodeId::trusted(node))
            .is_some_and(|node| node.reported && node.taken_in >= revision)
    }

    /// What one node says about a volume, whatever it knew.
    #[must_use]
    pub fn volume(&self, node: &str, uid: &str) -> Option<&ObservedVolume> {
        self.nodes.get(&NodeId::trusted(node))?.volumes.get(uid)
    }

    /// What one node says about a snapshot's part, whatever it knew.
    #[must_use]
    pub fn snapshot(&self, node: &str, part: &str) -> Option<&ObservedSnapshot> {
        self.nodes.get(&NodeId::trusted(node))?.snapshots.get(part)
    }

    /// What one node says about a domain, whatever it knew.
    #[must_use]
    pub fn domain(&self, node: &str, uid: &str) -> Option<&ObservedDomain> {
        self.nodes.get(&NodeId::trusted(node))?.domains.get(uid)
    }
}
