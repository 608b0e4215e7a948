//! Emptying a node: the complete plan, before anything moves.
//!
//! Domains are assigned largest first (best-fit decreasing), each taking room from the picture
//! as it is assigned, so the plan as a whole fits and not only each line of it. How many move
//! at once is [`parallel_moves`].

use std::collections::BTreeMap;
use std::time::Duration;

use super::place::{PlaceOptions, Strategy, place, shortage};
use super::view::{
    ClusterView, DomainView, Mobility, NodeView, Resources, size, stays_behind, vcpus,
};
use crate::model::{DomainId, NodeId};

/// Below this rate a migration is not worth starting beside others: with 100 ms of pause it
/// leaves 5 MiB to the last pass, and a guest that dirties faster never converges.
pub const RATE_FLOOR_BYTES_PER_SECOND: u64 = 50 << 20;

/// Promised vCPUs for each migration at once: what nodes commonly promise of one core.
const VCPUS_A_MOVE: u32 = 4;

/// However fast the link: each migration also costs CPU on both sides.
pub const PARALLEL_MOVES_MAX: u32 = 16;

/// Fixed cost of a move beside its copying: preparing, switching over, settling.
const MOVE_OVERHEAD: Duration = Duration::from_secs(1);

/// Pre-copy sends more than once what a guest goes on writing: this share of memory and disks on
/// top, in percent.
const RESENT_PERCENT: u64 = 20;

/// A line that is blocked names so many nodes with their reasons: it is kept with each domain.
const NODES_NAMED_MAX: usize = 5;

/// What the operator chose.
#[derive(Clone, Debug, Default)]
pub struct DrainOptions {
    /// How destinations are ranked.
    pub strategy: Strategy,
    /// A cap on each migration's bandwidth; 0 for none.
    pub bandwidth_max: u64,
    /// Destinations already tried in vain, by domain, each with what happened.
    pub failed: BTreeMap<DomainId, BTreeMap<NodeId, String>>,
}

/// One line of the plan.
#[derive(Clone, Debug, PartialEq)]
pub struct ProposedMove {
    /// Which domain.
    pub domain: DomainId,
    /// Where to; None when it cannot move now.
    pub to: Option<NodeId>,
    /// It only waits for other work to end, and is planned again then.
    pub waits: bool,
    /// Why there, or why it cannot move and what would help.
    pub reason: String,
    /// Its memory.
    pub memory_bytes: u64,
    /// From memory, what its disks take, and its share of the link.
    pub expected_time: Duration,
}

/// The whole plan, in the order in which moves are to start.
#[derive(Clone, Debug, PartialEq)]
pub struct DrainProposal {
    /// One line a domain.
    pub moves: Vec<ProposedMove>,
    /// How many at once.
    pub parallel: u32,
    /// Of all that can move.
    pub expected_time: Duration,
}

/// How many migrations a node's link and its processors carry at once:
///
/// ```text
/// clamp(floor(link / share), 1, PARALLEL_MOVES_MAX)      share = RATE_FLOOR_BYTES_PER_SECOND,
///                                                        or the operator's cap when lower
/// and at most one for each VCPUS_A_MOVE that it may promise, which are about one core's: a copy
/// takes up to a core, and the guests should not be left without one
/// ```
///
/// So each of them gets at least `share`. 1 Gbit/s gives 2, 10 Gbit/s gives 16 (23 by
/// bandwidth). The same holds at the destination, so one node is not flooded by many.
#[must_use]
pub fn parallel_moves(node: &NodeView, bandwidth_max: u64) -> u32 {
    let share = match bandwidth_max {
        0 => RATE_FLOOR_BYTES_PER_SECOND,
        cap => cap.min(RATE_FLOOR_BYTES_PER_SECOND),
    };
    let fits = u32::try_from(node.link_bytes_per_second / share).unwrap_or(u32::MAX);
    fits.min(node.capacity.vcpus / VCPUS_A_MOVE).clamp(1, PARALLEL_MOVES_MAX)
}

/// Plans where everything on `node` goes. `view` is not changed; an unknown node gives an
/// empty plan.
#[must_use]
pub fn plan_drain(view: &ClusterView, node: &NodeId, options: &DrainOptions) -> DrainProposal {
    let link = view.nodes.get(node).map_or(0, |n| n.link_bytes_per_second);
    let parallel = view.nodes.get(node).map_or(1, |n| parallel_moves(n, options.bandwidth_max));
    let mut domains: Vec<_> = view.on(node).collect();
    domains.sort_by(|(a_id, a), (b_id, b)| {
        let largest = |d: &DomainView| (d.needs.memory_bytes, d.needs.vcpus);
        largest(b).cmp(&largest(a)).then_with(|| a_id.cmp(b_id))
    });

    let mut room = view.clone();
    let mut moves = Vec::with_capacity(domains.len());
    for (id, domain) in domains {
        let share = rate_of_one(link, parallel, options.bandwidth_max);
        moves.push(plan_move(&mut room, node, id, domain, share, options));
    }

    let movable = moves.iter().filter(|m| m.to.is_some()).count();
    let parallel = parallel.min(u32::try_from(movable).unwrap_or(u32::MAX)).max(1);
    let total: Duration = moves.iter().filter(|m| m.to.is_some()).map(|m| m.expected_time).sum();
    DrainProposal { moves, parallel, expected_time: total / parallel }
}

fn plan_move(
    room: &mut ClusterView,
    from: &NodeId,
    id: &DomainId,
    domain: &DomainView,
    rate: u64,
    options: &DrainOptions,
) -> ProposedMove {
    let memory_bytes = domain.needs.memory_bytes;
    let blocked = |reason: String| ProposedMove {
        domain: id.clone(),
        to: None,
        waits: false,
        reason,
        memory_bytes,
        expected_time: Duration::ZERO,
    };
    let live = match &domain.mobility {
        Mobility::Fixed(reason) => return blocked(reason.clone()),
        Mobility::Busy(reason) => {
            return ProposedMove { waits: true, ..blocked(reason.clone()) };
        }
        Mobility::Live => true,
        Mobility::Cold => false,
    };
    let mut excluded = options.failed.get(id).cloned().unwrap_or_default();
    excluded.insert(from.clone(), "it is there now".into());
    let choice = PlaceOptions {
        strategy: options.strategy,
        only: None,
        excluded,
        disks: domain.disks.clone(),
        origin: Some(domain.origin.clone()),
    };
    match place(room, domain.needs, &choice) {
        Ok(decision) => {
            let (mut copied, mut stays, mut shared) = (domain.disks.clone(), domain.snapshots, "");
            if let Some(target) = room.nodes.get(&decision.node) {
                copied = target.copied(&domain.disks, &domain.origin);
                (stays, shared) = (domain.left_behind(target), domain.disks_words(target));
            }
            room.promise(&decision.node, domain.needs, &domain.disks, &domain.origin);
            let how = match options.strategy {
                Strategy::BestFit => "best fit",
                Strategy::Spread => "emptiest",
            };
            // What is allocated is known of all disks together.
            let (all, some) = (domain.disks.values().sum::<u64>(), copied.values().sum());
            let disk_bytes =
                if some < all { domain.disk_bytes.min(some) } else { domain.disk_bytes };
            let (what, expected_time) = match live {
                true => ("", copy_time(with_resent(memory_bytes, disk_bytes), rate)),
                false if disk_bytes > 0 => {
                    ("; not running, its disks are copied", copy_time(disk_bytes, rate))
                }
                false => ("; not running, only its record moves", Duration::ZERO),
            };
            ProposedMove {
                domain: id.clone(),
                reason: format!(
                    "{how}, then {:.0} % promised{what}{shared}{}",
                    decision.score * 100.0,
                    stays_behind(stays, from.as_str())
                ),
                to: Some(decision.node),
                waits: false,
                memory_bytes,
                expected_time,
            }
        }
        Err(none) => {
            let others = none.rejected.iter().filter(|r| r.node != *from);
            let others = others.map(|r| format!("{}: {}", r.node, r.reason));
            let why = match listed(others, NODES_NAMED_MAX, "; ") {
                names if names.is_empty() => "there is no other node".into(),
                names => format!("no node fits ({names})"),
            };
            blocked(format!("{why}; {}", what_would_help(room, domain.needs, &choice)))
        }
    }
}

/// The first few for people, and how many more there are; empty when there are none.
pub(crate) fn listed(
    mut lines: impl Iterator<Item = String>,
    lines_max: usize,
    between: &str,
) -> String {
    let text = lines.by_ref().take(lines_max).collect::<Vec<_>>().join(between);
    match lines.count() {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// The cheapest thing that an operator can do about it.
fn what_would_help(room: &ClusterView, needs: Resources, choice: &PlaceOptions) -> String {
    let open = |id: &&NodeId| !choice.excluded.contains_key(*id);
    let candidates =
        || room.nodes.iter().filter(|(id, n)| open(id) && n.ready && n.capacity.holds(needs));
    let disks = &choice.disks;
    let origin = choice.origin.as_ref();
    let closed = candidates()
        .find(|(_, n)| (n.cordoned || n.draining) && shortage(n, needs, disks, origin).is_none());
    if let Some((id, _)) = closed {
        return format!("uncordon {id}");
    }
    let least = candidates()
        .filter(|(_, n)| !n.cordoned && !n.draining && shortage(n, needs, disks, origin).is_some())
        .min_by_key(|(_, n)| (needs.less(n.free()).memory_bytes, needs.less(n.free()).vcpus));
    let Some((id, node)) = least else {
        return "add a node with room for it, or stop it and start it later".into();
    };
    let lacks = needs.less(node.free());
    let mut parts = Vec::new();
    if lacks.memory_bytes > 0 {
        parts.push(size(lacks.memory_bytes));
    }
    if lacks.vcpus > 0 {
        parts.push(vcpus(lacks.vcpus));
    }
    if parts.is_empty() {
        return "make room in a pool of its disks' ids on another node".into();
    }
    format!("free {} on {id}, or add a node", parts.join(" and "))
}

fn rate_of_one(link: u64, parallel: u32, bandwidth_max: u64) -> u64 {
    let share = link / u64::from(parallel.max(1));
    if bandwidth_max == 0 { share } else { share.min(bandwidth_max) }
}

/// What a live move sends.
fn with_resent(memory_bytes: u64, disk_bytes: u64) -> u64 {
    memory_bytes.saturating_add(disk_bytes).saturating_mul(100 + RESENT_PERCENT) / 100
}

fn copy_time(bytes: u64, rate: u64) -> Duration {
    MOVE_OVERHEAD + Duration::from_millis(bytes.saturating_mul(1000) / rate.max(1))
}
