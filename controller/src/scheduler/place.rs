//! One domain, one node: filter, then rank.

use std::collections::BTreeMap;

use super::view::{ClusterView, NodeView, Origin, PoolNeeds, PoolView, Resources, size, vcpus};
use crate::model::NodeId;

/// Why the nodes that the caller did not ask for were passed over.
pub const OTHER_NODE: &str = "another node was asked for";

/// How the nodes that have room are ranked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// The fullest first: keeps whole nodes free for large domains and for maintenance.
    #[default]
    BestFit,
    /// The emptiest first: a failing node takes fewer domains with it.
    Spread,
}

/// What the caller wants beyond room.
#[derive(Clone, Debug, Default)]
pub struct PlaceOptions {
    /// How to rank.
    pub strategy: Strategy,
    /// This node or none.
    pub only: Option<NodeId>,
    /// Nodes ruled out, each with the reason.
    pub excluded: BTreeMap<NodeId, String>,
    /// Room that its disks need.
    pub disks: PoolNeeds,
    /// Of one that moves: where they lie now.
    pub origin: Option<Origin>,
}

/// A node that was passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The node.
    pub node: NodeId,
    /// For people.
    pub reason: String,
}

/// A node was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Where to.
    pub node: NodeId,
    /// 0 to 1: how much of the node is promised then, vCPUs and memory alike.
    pub score: f64,
    /// All other nodes that were ruled out; those that were merely ranked lower are not here.
    pub rejected: Vec<Rejection>,
}

/// No node was found: every node is here with its reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no node has room: {}", self.reasons())]
pub struct NoRoom {
    /// One line a node.
    pub rejected: Vec<Rejection>,
}

impl NoRoom {
    /// `host1: cordoned; host2: …`, for people.
    #[must_use]
    pub fn reasons(&self) -> String {
        if self.rejected.is_empty() {
            return "the cluster has no nodes".into();
        }
        let lines = self.telling().into_iter().map(|r| format!("{}: {}", r.node, r.reason));
        lines.collect::<Vec<_>>().join("; ")
    }

    /// Without those that were not asked for, unless there are no others.
    #[must_use]
    pub fn telling(&self) -> Vec<&Rejection> {
        let asked_for: Vec<_> = self.rejected.iter().filter(|r| r.reason != OTHER_NODE).collect();
        if asked_for.is_empty() { self.rejected.iter().collect() } else { asked_for }
    }
}

/// Chooses a node that has room for `needs`.
///
/// # Errors
/// None has; each says why not.
pub fn place(
    view: &ClusterView,
    needs: Resources,
    options: &PlaceOptions,
) -> Result<Decision, NoRoom> {
    let mut rejected = Vec::new();
    let mut best: Option<(NodeId, f64)> = None;
    for (id, node) in &view.nodes {
        if let Some(reason) = unfit(id, node, needs, options) {
            rejected.push(Rejection { node: id.clone(), reason });
            continue;
        }
        let score = fullness(node, needs);
        // Strictly better only: ties go to the first id, always.
        let better = match (&best, options.strategy) {
            (None, _) => true,
            (Some((_, held)), Strategy::BestFit) => score > *held,
            (Some((_, held)), Strategy::Spread) => score < *held,
        };
        if better {
            best = Some((id.clone(), score));
        }
    }
    match best {
        Some((node, score)) => Ok(Decision { node, score, rejected }),
        None => Err(NoRoom { rejected }),
    }
}

/// Why a node cannot take it; None when it can.
fn unfit(id: &NodeId, node: &NodeView, needs: Resources, options: &PlaceOptions) -> Option<String> {
    if options.only.as_ref().is_some_and(|only| only != id) {
        return Some(OTHER_NODE.into());
    }
    if let Some(reason) = options.excluded.get(id) {
        return Some(reason.clone());
    }
    if !node.ready {
        return Some("lost: its agent has not been heard".into());
    }
    if node.draining {
        return Some("draining or drained".into());
    }
    if node.cordoned {
        return Some("cordoned".into());
    }
    shortage(node, needs, &options.disks, options.origin.as_ref())
}

/// What a node lacks, for people: "needs 512 MiB, 130 of 2048 MiB free".
pub(crate) fn shortage(
    node: &NodeView,
    needs: Resources,
    disks: &PoolNeeds,
    origin: Option<&Origin>,
) -> Option<String> {
    let free = node.free();
    let mut lacks = Vec::new();
    if free.vcpus < needs.vcpus {
        lacks.push(format!(
            "needs {}, {} of {} free",
            vcpus(needs.vcpus),
            free.vcpus,
            node.capacity.vcpus
        ));
    }
    if free.memory_bytes < needs.memory_bytes {
        lacks.push(format!(
            "needs {} of memory, {} of {} free",
            size(needs.memory_bytes),
            // Rounded down: it must not read as enough.
            size(free.memory_bytes & !((1 << 20) - 1)),
            size(node.capacity.memory_bytes)
        ));
    }
    lacks.extend(disks.iter().filter_map(|(id, bytes)| pool_shortage(node, id, *bytes, origin)));
    (!lacks.is_empty()).then(|| lacks.join(" and "))
}

fn pool_shortage(node: &NodeView, id: &str, bytes: u64, origin: Option<&Origin>) -> Option<String> {
    let Some((id, pool)) = node.pool_id(id).and_then(|id| node.pools.get_key_value(&id)) else {
        return Some(match id {
            "" => "has no pool".into(),
            id => format!("has no pool {id}"),
        });
    };
    if origin.is_some_and(|origin| origin.shares(id, pool)) {
        // Nothing new comes into it.
        let why = pool.closed.as_ref().filter(|_| pool.broken)?;
        return Some(format!("pool {id} {why}"));
    }
    if let Some(why) = origin.and_then(|origin| is_another(id, pool, origin)) {
        return Some(why);
    }
    if let Some(why) = &pool.closed {
        return Some(format!("pool {id} {why}"));
    }
    let free = pool.capacity_bytes.saturating_sub(pool.promised_bytes);
    (free < bytes).then(|| {
        format!(
            "needs {} in pool {id}, {} of {} free",
            size(bytes),
            size(free & !((1 << 20) - 1)),
            size(pool.capacity_bytes)
        )
    })
}

/// Why a running domain cannot go from its pool to this one, though they have one id.
fn is_another(id: &str, there: &PoolView, origin: &Origin) -> Option<String> {
    let here = origin.uid(id);
    if !origin.live || here == there.shared_uid {
        return None;
    }
    Some(match (here.is_empty(), there.shared_uid.is_empty()) {
        (false, false) => format!("pool {id} is another shared pool there; stop the domain first"),
        (false, true) => format!("pool {id} is shared, but not with it; stop the domain first"),
        _ => format!("pool {id} is a shared one there, and not here; stop the domain first"),
    })
}

/// The share that is promised once `needs` is there, mean of vCPUs and memory.
fn fullness(node: &NodeView, needs: Resources) -> f64 {
    let then = node.reserved.plus(needs);
    let share = |used: f64, of: f64| if of > 0.0 { used / of } else { 1.0 };
    let vcpus = share(f64::from(then.vcpus), f64::from(node.capacity.vcpus));
    let memory = share(then.memory_bytes as f64, node.capacity.memory_bytes as f64);
    f64::midpoint(vcpus, memory)
}
