//! Evening out measured load with few moves.
//!
//! Greedy over single moves, best first. The imbalance is the standard deviation of the nodes'
//! load (CPU used by their domains, in thousandths of what the node may promise). Sums of
//! loads and of their squares are kept, so a candidate costs O(1) and a step O(domains×nodes).
//!
//! It must not fidget: below [`BalanceOptions::imbalance_min`] nothing is proposed, a move must
//! win at least [`BalanceOptions::gain_min`], and a domain moves once at most.

use std::collections::{BTreeMap, BTreeSet};

use super::place::shortage;
use super::view::{ClusterView, Mobility, NodeView, promise, stays_behind};
use crate::model::{DomainId, NodeId};

/// When to propose, and how much.
#[derive(Clone, Copy, Debug)]
pub struct BalanceOptions {
    /// At most so many moves.
    pub moves_max: usize,
    /// Leave the cluster alone below this imbalance, in thousandths.
    pub imbalance_min: f64,
    /// A move must lower the imbalance by at least this share of what it was.
    pub gain_min: f64,
}

impl Default for BalanceOptions {
    fn default() -> Self {
        Self { moves_max: 5, imbalance_min: 20.0, gain_min: 0.05 }
    }
}

/// One move.
#[derive(Clone, Debug, PartialEq)]
pub struct BalanceMove {
    /// Which domain.
    pub domain: DomainId,
    /// From where.
    pub from: NodeId,
    /// Where to.
    pub to: NodeId,
    /// For people: what it wins.
    pub reason: String,
    /// Its memory.
    pub memory_bytes: u64,
}

/// The moves, best first, and what they change.
#[derive(Clone, Debug, PartialEq)]
pub struct BalanceProposal {
    /// In the order in which they are to be made.
    pub moves: Vec<BalanceMove>,
    /// Standard deviation of the nodes' load before, in thousandths of their capacity.
    pub before: f64,
    /// The same after all moves.
    pub after: f64,
}

/// Proposes moves; none when the cluster is even enough.
#[must_use]
pub fn plan_balance(view: &ClusterView, options: &BalanceOptions) -> BalanceProposal {
    let mut room: BTreeMap<NodeId, NodeView> = view
        .nodes
        .iter()
        .filter(|(_, n)| n.ready && !n.cordoned && !n.draining && n.capacity.vcpus > 0)
        .map(|(id, node)| (id.clone(), node.clone()))
        .collect();
    let mut loads = Loads::of(view, &room);
    let before = loads.deviation();
    let mut moved = BTreeSet::new();
    let mut moves = Vec::new();
    while before >= options.imbalance_min && moves.len() < options.moves_max {
        let now = loads.deviation();
        let Some(best) = best_move(view, &room, &loads, &moved) else { break };
        if now - best.deviation < options.gain_min * before {
            break;
        }
        let domain = &view.domains[&best.domain];
        loads.shift(&best.from, &best.to, f64::from(domain.cpu_millicores));
        if let Some(node) = room.get_mut(&best.from) {
            node.reserved = node.reserved.less(domain.needs);
        }
        let to = &room[&best.to];
        let (stays, shared) = (domain.left_behind(to), domain.disks_words(to));
        promise(&mut room, &best.to, domain.needs, &domain.disks, &domain.origin);
        moved.insert(best.domain.clone());
        moves.push(BalanceMove {
            reason: format!(
                "imbalance {now:.0} → {:.0} ‰{shared}{}",
                best.deviation,
                stays_behind(stays, best.from.as_str())
            ),
            memory_bytes: domain.needs.memory_bytes,
            domain: best.domain,
            from: best.from,
            to: best.to,
        });
    }
    BalanceProposal { moves, before, after: loads.deviation() }
}

struct Candidate {
    domain: DomainId,
    from: NodeId,
    to: NodeId,
    deviation: f64,
}

fn best_move(
    view: &ClusterView,
    room: &BTreeMap<NodeId, NodeView>,
    loads: &Loads,
    moved: &BTreeSet<DomainId>,
) -> Option<Candidate> {
    let mut best: Option<Candidate> = None;
    for (id, domain) in &view.domains {
        let Some(from) = domain.node.as_ref().filter(|n| room.contains_key(*n)) else { continue };
        if domain.mobility != Mobility::Live || domain.cpu_millicores == 0 || moved.contains(id) {
            continue;
        }
        for (to, node) in room {
            let origin = Some(&domain.origin);
            if to == from || shortage(node, domain.needs, &domain.disks, origin).is_some() {
                continue;
            }
            let deviation = loads.deviation_after(from, to, f64::from(domain.cpu_millicores));
            if best.as_ref().is_none_or(|held| deviation < held.deviation) {
                let (domain, from, to) = (id.clone(), from.clone(), to.clone());
                best = Some(Candidate { domain, from, to, deviation });
            }
        }
    }
    best
}

/// Loads in thousandths, with their running sums.
struct Loads {
    /// Load and capacity in vCPUs.
    nodes: BTreeMap<NodeId, (f64, f64)>,
    sum: f64,
    squares: f64,
}

impl Loads {
    fn of(view: &ClusterView, room: &BTreeMap<NodeId, NodeView>) -> Self {
        let mut nodes: BTreeMap<NodeId, (f64, f64)> = room
            .iter()
            .map(|(id, node)| (id.clone(), (0.0, f64::from(node.capacity.vcpus))))
            .collect();
        for domain in view.domains.values() {
            if let Some((load, vcpus)) = domain.node.as_ref().and_then(|n| nodes.get_mut(n)) {
                *load += f64::from(domain.cpu_millicores) / *vcpus;
            }
        }
        let sum = nodes.values().map(|(load, _)| load).sum();
        let squares = nodes.values().map(|(load, _)| load * load).sum();
        Self { nodes, sum, squares }
    }

    fn deviation(&self) -> f64 {
        self.deviation_of(self.sum, self.squares)
    }

    fn deviation_of(&self, sum: f64, squares: f64) -> f64 {
        let n = self.nodes.len().max(1) as f64;
        // Rounding may leave a hair below zero.
        (squares / n - (sum / n).powi(2)).max(0.0).sqrt()
    }

    fn after(&self, from: &NodeId, to: &NodeId, millicores: f64) -> (f64, f64, f64, f64) {
        let (a, a_vcpus) = self.nodes[from];
        let (b, b_vcpus) = self.nodes[to];
        let (a_then, b_then) = (a - millicores / a_vcpus, b + millicores / b_vcpus);
        let sum = self.sum - a - b + a_then + b_then;
        let squares = self.squares - a * a - b * b + a_then * a_then + b_then * b_then;
        (a_then, b_then, sum, squares)
    }

    fn deviation_after(&self, from: &NodeId, to: &NodeId, millicores: f64) -> f64 {
        let (_, _, sum, squares) = self.after(from, to, millicores);
        self.deviation_of(sum, squares)
    }

    fn shift(&mut self, from: &NodeId, to: &NodeId, millicores: f64) {
        let (a, b, sum, squares) = self.after(from, to, millicores);
        (self.sum, self.squares) = (sum, squares);
        for (node, load) in [(from, a), (to, b)] {
            if let Some(held) = self.nodes.get_mut(node) {
                held.0 = load;
            }
        }
    }
}
