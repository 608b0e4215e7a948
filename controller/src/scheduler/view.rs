//! The cluster as the scheduler sees it.

use std::collections::BTreeMap;

use crate::model::{DomainId, NodeId};

/// What a link is taken to carry when nobody has told: 1 Gbit/s.
pub const LINK_BYTES_PER_SECOND: u64 = 125_000_000;

/// What a domain needs and a node has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

impl Resources {
    /// Whether `self` holds at least `needs`.
    #[must_use]
    pub fn holds(self, needs: Resources) -> bool {
        self.vcpus >= needs.vcpus && self.memory_bytes >= needs.memory_bytes
    }

    /// What is left after `other`, never below nothing.
    #[must_use]
    pub fn less(self, other: Resources) -> Resources {
        Resources {
            vcpus: self.vcpus.saturating_sub(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Resources) -> Resources {
        Resources {
            vcpus: self.vcpus.saturating_add(other.vcpus),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
        }
    }
}

/// Bytes by pool id. A disk that names no pool is under the empty id: the node's first pool.
pub type PoolNeeds = BTreeMap<String, u64>;

/// A pool of a node and what is promised in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolView {
    /// What may be promised in all: its size times its overcommit.
    pub capacity_bytes: u64,
    /// The sizes of all volumes in it, and of those on their way to it.
    pub promised_bytes: u64,
    /// Why it takes nothing new.
    pub closed: Option<String>,
    /// What is there cannot be used either.
    pub broken: bool,
    /// Which pool it is, where several nodes share it; empty for the node's own.
    pub shared_uid: String,
}

/// Where the volumes of a domain that moves lie now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// The shared ones among its pools, by id: which they are.
    pub shared: BTreeMap<String, String>,
    /// It runs. Then its VMM knows which of its disks are shared, and both sides must agree.
    pub live: bool,
}

impl Origin {
    /// Which pool this id means where the domain is; empty for its node's own.
    #[must_use]
    pub fn uid(&self, pool: &str) -> &str {
        self.shared.get(pool).map_or("", String::as_str)
    }

    /// Whether what lies in it is in its place at the other node already.
    #[must_use]
    pub fn shares(&self, id: &str, there: &PoolView) -> bool {
        !there.shared_uid.is_empty() && self.uid(id) == there.shared_uid
    }
}

/// A node and what is promised on it.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeView {
    /// Its agent is heard.
    pub ready: bool,
    /// Takes no new domains.
    pub cordoned: bool,
    /// Is being emptied, or has been.
    pub draining: bool,
    /// What may be promised in all.
    pub capacity: Resources,
    /// What is promised: domains that it owns, and migrations on their way to it.
    pub reserved: Resources,
    /// Its pools, by id. Empty as well while its agent has not said which it has.
    pub pools: BTreeMap<String, PoolView>,
    /// What its link for migrations carries.
    pub link_bytes_per_second: u64,
    /// Migrations that come in or go out now.
    pub migrations: u32,
}

impl NodeView {
    /// Room that is not promised yet.
    #[must_use]
    pub fn free(&self) -> Resources {
        self.capacity.less(self.reserved)
    }

    /// Those of the needs that are not in their place here already.
    #[must_use]
    pub fn copied(&self, disks: &PoolNeeds, origin: &Origin) -> PoolNeeds {
        let stays = |id: &str| self.pools.get(id).is_some_and(|pool| origin.shares(id, pool));
        let copied = disks.iter().filter(|(id, _)| !stays(id));
        copied.map(|(id, bytes)| (id.clone(), *bytes)).collect()
    }

    /// The pool that this id means here; None when it has no such pool.
    #[must_use]
    pub fn pool_id(&self, id: &str) -> Option<String> {
        match id {
            "" => self.pools.keys().next().cloned(),
            id => self.pools.contains_key(id).then(|| id.to_owned()),
        }
    }
}

/// Whether and how a domain can go elsewhere now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mobility {
    /// It runs: a live migration.
    Live,
    /// Nothing runs: its disks are copied, if it has any, and its record moves.
    Cold,
    /// Not now, but later: something else works on it.
    Busy(String),
    /// Not as things are, for this reason (and what would help).
    Fixed(String),
}

/// A domain, as far as placing goes.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainView {
    /// Its owner, when it has one.
    pub node: Option<NodeId>,
    /// What it is promised.
    pub needs: Resources,
    /// Of the pools.
    pub disks: PoolNeeds,
    /// What a move copies of its disks: what they take, as far as that is known, else their sizes.
    pub disk_bytes: u64,
    /// Whether it can be moved.
    pub mobility: Mobility,
    /// Where its volumes lie.
    pub origin: Origin,
    /// How many of its snapshots lie on its node: they stay there when it moves,
    pub snapshots: usize,
    /// but for these, which lie in shared pools alone: they stay only when it leaves those.
    pub snapshots_shared: usize,
    /// Measured, in thousandths of a core.
    pub cpu_millicores: u32,
}

/// The whole picture. Maps are ordered: whoever iterates gets the same order everywhere.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterView {
    /// All nodes.
    pub nodes: BTreeMap<NodeId, NodeView>,
    /// All domains.
    pub domains: BTreeMap<DomainId, DomainView>,
}

impl ClusterView {
    /// One more domain is promised its room on a node. What is shared is promised on all who share
    /// it, and not again where it lies there already.
    pub fn promise(&mut self, to: &NodeId, needs: Resources, disks: &PoolNeeds, origin: &Origin) {
        promise(&mut self.nodes, to, needs, disks, origin);
    }

    /// The domains that a node owns, by id.
    pub fn on<'a>(
        &'a self,
        node: &'a NodeId,
    ) -> impl Iterator<Item = (&'a DomainId, &'a DomainView)> {
        self.domains.iter().filter(move |(_, domain)| domain.node.as_ref() == Some(node))
    }
}

/// See [`ClusterView::promise`].
pub(super) fn promise(
    nodes: &mut BTreeMap<NodeId, NodeView>,
    to: &NodeId,
    needs: Resources,
    disks: &PoolNeeds,
    origin: &Origin,
) {
    let Some(node) = nodes.get_mut(to) else { return };
    node.reserved = node.reserved.plus(needs);
    for (id, bytes) in node.copied(disks, origin) {
        let Some(node) = nodes.get_mut(to) else { return };
        let Some(pool) = node.pool_id(&id).and_then(|id| node.pools.get_mut(&id)) else { continue };
        if pool.shared_uid.is_empty() {
            pool.promised_bytes = pool.promised_bytes.saturating_add(bytes);
            continue;
        }
        let uid = pool.shared_uid.clone();
        let all = nodes.values_mut().flat_map(|node| node.pools.values_mut());
        for pool in all.filter(|pool| pool.shared_uid == uid) {
            pool.promised_bytes = pool.promised_bytes.saturating_add(bytes);
        }
    }
}

impl DomainView {
    /// How many snapshots a move to that node leaves behind.
    #[must_use]
    pub fn left_behind(&self, to: &NodeView) -> usize {
        let shares =
            |id: &String| to.pools.get(id).is_some_and(|pool| self.origin.shares(id, pool));
        match self.origin.shared.keys().all(shares) {
            true => self.snapshots.saturating_sub(self.snapshots_shared),
            false => self.snapshots,
        }
    }

    /// What becomes of its disks on that node, to be put behind other words.
    #[must_use]
    pub fn disks_words(&self, to: &NodeView) -> &'static str {
        let copied = to.copied(&self.disks, &self.origin).len();
        match (self.disks.len(), copied) {
            (0, _) => "",
            (_, 0) => "; its disks are shared, none is copied",
            (all, some) if some < all => "; some of its disks are shared and not copied",
            _ => "",
        }
    }
}

/// What a move leaves behind, to be put behind other words; nothing where it leaves nothing.
pub(crate) fn stays_behind(snapshots: usize, from: &str) -> String {
    match snapshots {
        0 => String::new(),
        1 => format!("; its snapshot stays on nodes/{from}"),
        count => format!("; its {count} snapshots stay on nodes/{from}"),
    }
}

/// vCPUs for people.
pub(crate) fn vcpus(count: u32) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} vCPU{plural}")
}

/// Bytes for people: whole MiB, or GiB with one decimal from 10 GiB on.
pub(crate) fn size(bytes: u64) -> String {
    const MIB: u64 = 1 << 20;
    if bytes >= 10 << 30 {
        format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
    } else {
        format!("{} MiB", bytes.div_ceil(MIB))
    }
}
