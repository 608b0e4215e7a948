//! What a plan promises, for any cluster: it never gives away what is not there, it says why
//! for every node it passes over, and it is the same each time.

use std::collections::BTreeMap;

use proptest::prelude::{
    Just, any, prop, prop_assert, prop_assert_eq, prop_assert_ne, prop_compose, prop_oneof,
    proptest,
};
// The trait and our enum share a name.
use proptest::strategy::Strategy as AnyOf;

use super::*;
use crate::model::{DomainId, NodeId};

const MIB: u64 = 1 << 20;

fn node_id(n: usize) -> NodeId {
    NodeId::trusted(&format!("host{n}"))
}

fn domain_id(n: usize) -> DomainId {
    DomainId::trusted(&format!("vm{n:03}"))
}

fn node(vcpus: u32, mib: u64) -> NodeView {
    NodeView {
        pools: BTreeMap::new(),
        ready: true,
        cordoned: false,
        draining: false,
        capacity: Resources { vcpus, memory_bytes: mib * MIB },
        reserved: Resources::default(),
        link_bytes_per_second: LINK_BYTES_PER_SECOND,
        migrations: 0,
    }
}

fn domain(on: usize, vcpus: u32, mib: u64) -> DomainView {
    DomainView {
        disks: PoolNeeds::new(),
        disk_bytes: 0,
        node: Some(node_id(on)),
        needs: Resources { vcpus, memory_bytes: mib * MIB },
        mobility: Mobility::Live,
        origin: super::Origin::default(),
        snapshots: 0,
        snapshots_shared: 0,
        cpu_millicores: 0,
    }
}

/// Puts the domains into the nodes' reservations.
fn cluster(nodes: Vec<NodeView>, domains: Vec<DomainView>) -> ClusterView {
    let mut view = ClusterView {
        nodes: nodes.into_iter().enumerate().map(|(n, node)| (node_id(n + 1), node)).collect(),
        domains: domains.into_iter().enumerate().map(|(n, d)| (domain_id(n), d)).collect(),
    };
    for domain in view.domains.values() {
        let owner = domain.node.as_ref().and_then(|n| view.nodes.get_mut(n));
        if let Some(node) = owner {
            node.reserved = node.reserved.plus(domain.needs);
        }
    }
    view
}

prop_compose! {
    fn any_node()(
        vcpus in 1_u32..64, mib in 64_u64..65_536,
        ready in prop::bool::weighted(0.9), cordoned in prop::bool::weighted(0.1),
    ) -> NodeView {
        NodeView { ready, cordoned, ..node(vcpus, mib) }
    }
}

prop_compose! {
    fn any_domain(nodes: usize)(
        on in 1..=nodes, vcpus in 1_u32..9, mib in 32_u64..8192,
        mobility in prop_oneof![
            6 => Just(Mobility::Live),
            2 => Just(Mobility::Cold),
            1 => Just(Mobility::Fixed("its policy is STAY".into())),
        ],
        cpu_millicores in 0_u32..8000,
    ) -> DomainView {
        DomainView { mobility, cpu_millicores, ..domain(on, vcpus, mib) }
    }
}

fn any_cluster() -> impl AnyOf<Value = ClusterView> {
    (1_usize..8).prop_flat_map(|n| {
        let nodes = prop::collection::vec(any_node(), n);
        let domains = prop::collection::vec(any_domain(n), 0..40);
        (nodes, domains).prop_map(|(nodes, domains)| cluster(nodes, domains))
    })
}

/// What the moves add to each destination must fit into what was free there.
fn added(moves: impl Iterator<Item = (NodeId, Resources)>) -> BTreeMap<NodeId, Resources> {
    moves.fold(BTreeMap::new(), |mut sum, (node, needs)| {
        let held = sum.entry(node).or_insert_with(Resources::default);
        *held = held.plus(needs);
        sum
    })
}

proptest! {
    #[test]
    fn a_placement_fits_and_every_other_node_has_its_reason(
        view in any_cluster(), vcpus in 1_u32..9, mib in 32_u64..16_384, spread in any::<bool>(),
    ) {
        let needs = Resources { vcpus, memory_bytes: mib * MIB };
        let strategy = if spread { Strategy::Spread } else { Strategy::BestFit };
        let options = PlaceOptions { strategy, ..PlaceOptions::default() };
        let answer = place(&view, needs, &options);
        prop_assert_eq!(&answer, &place(&view, needs, &options));
        let fits = |n: &NodeView| n.ready && !n.cordoned && n.free().holds(needs);
        let rejected = match &answer {
            Ok(decision) => {
                prop_assert!(fits(&view.nodes[&decision.node]));
                prop_assert!((0.0..=1.0).contains(&decision.score));
                &decision.rejected
            }
            Err(none) => &none.rejected,
        };
        let unfit: Vec<_> =
            view.nodes.iter().filter(|(_, n)| !fits(n)).map(|(id, _)| id.clone()).collect();
        prop_assert_eq!(unfit, rejected.iter().map(|r| r.node.clone()).collect::<Vec<_>>());
        prop_assert!(rejected.iter().all(|r| !r.reason.is_empty()));
    }

    #[test]
    fn a_drain_plan_is_complete_fits_as_a_whole_and_is_always_the_same(view in any_cluster()) {
        let from = node_id(1);
        let options = DrainOptions::default();
        let plan = plan_drain(&view, &from, &options);
        prop_assert_eq!(&plan, &plan_drain(&view, &from, &options));
        prop_assert_eq!(plan.moves.len(), view.on(&from).count());
        prop_assert!((1..=PARALLEL_MOVES_MAX).contains(&plan.parallel));
        for line in &plan.moves {
            prop_assert!(!line.reason.is_empty());
            prop_assert_ne!(line.to.as_ref(), Some(&from));
            let fixed = matches!(view.domains[&line.domain].mobility, Mobility::Fixed(_));
            prop_assert!(!(fixed && line.to.is_some()));
        }
        let placed = plan.moves.iter().filter_map(|m| {
            m.to.clone().map(|to| (to, view.domains[&m.domain].needs))
        });
        for (node, sum) in added(placed) {
            let node = &view.nodes[&node];
            prop_assert!(node.ready && !node.cordoned && node.free().holds(sum));
        }
    }

    #[test]
    fn a_balance_lowers_the_imbalance_and_fits(view in any_cluster()) {
        let options = BalanceOptions::default();
        let plan = plan_balance(&view, &options);
        prop_assert_eq!(&plan, &plan_balance(&view, &options));
        prop_assert!(plan.moves.len() <= options.moves_max);
        if plan.moves.is_empty() {
            prop_assert!((plan.after - plan.before).abs() < 1e-6);
        } else {
            prop_assert!(plan.after < plan.before);
        }
        // One after the other, as they will be made.
        let mut nodes = view.nodes.clone();
        for step in &plan.moves {
            let needs = view.domains[&step.domain].needs;
            prop_assert!(nodes[&step.to].free().holds(needs));
            let to = nodes.get_mut(&step.to).unwrap();
            to.reserved = to.reserved.plus(needs);
            let from = nodes.get_mut(&step.from).unwrap();
            from.reserved = from.reserved.less(needs);
        }
    }
}

#[test]
fn best_fit_fills_and_spread_spreads() {
    let view = cluster(vec![node(8, 4096), node(8, 4096)], vec![domain(2, 2, 512)]);
    let needs = Resources { vcpus: 1, memory_bytes: 256 * MIB };
    let ask = |strategy| place(&view, needs, &PlaceOptions { strategy, ..Default::default() });
    assert_eq!(ask(Strategy::BestFit).unwrap().node, node_id(2));
    assert_eq!(ask(Strategy::Spread).unwrap().node, node_id(1));
}

/// The texts that an operator reads: they name what is missing and how much there is.
#[test]
fn reasons_name_the_shortage() {
    let mut nodes = vec![node(2, 1024), node(8, 256), node(8, 8192), node(8, 8192)];
    nodes[2].cordoned = true;
    nodes[3].ready = false;
    let view = cluster(nodes, vec![]);
    let needs = Resources { vcpus: 4, memory_bytes: 512 * MIB };
    let none = place(&view, needs, &PlaceOptions::default()).unwrap_err();
    assert_eq!(
        none.reasons(),
        "host1: needs 4 vCPUs, 2 of 2 free; host2: needs 512 MiB of memory, 256 MiB of 256 MiB \
         free; host3: cordoned; host4: lost: its agent has not been heard"
    );
}

#[test]
fn a_blocked_domain_says_what_would_help() {
    let full =
        cluster(vec![node(8, 4096), node(8, 1024)], vec![domain(1, 1, 512), domain(2, 1, 768)]);
    let plan = plan_drain(&full, &node_id(1), &DrainOptions::default());
    assert!(plan.moves[0].to.is_none());
    assert!(plan.moves[0].reason.ends_with("free 256 MiB on host2, or add a node"));

    let mut cordoned = cluster(vec![node(8, 4096), node(8, 4096)], vec![domain(1, 1, 512)]);
    cordoned.nodes.get_mut(&node_id(2)).unwrap().cordoned = true;
    let plan = plan_drain(&cordoned, &node_id(1), &DrainOptions::default());
    assert!(plan.moves[0].reason.ends_with("uncordon host2"), "{}", plan.moves[0].reason);

    let alone = cluster(vec![node(8, 4096)], vec![domain(1, 1, 512)]);
    let plan = plan_drain(&alone, &node_id(1), &DrainOptions::default());
    assert!(plan.moves[0].reason.starts_with("there is no other node; add a node"));
}

/// A destination that failed before is not tried again for that domain, with the reason shown.
#[test]
fn a_failed_destination_is_left_out_for_that_domain_only() {
    let view = cluster(
        vec![node(8, 4096), node(8, 4096), node(8, 8192)],
        vec![domain(1, 1, 512), domain(1, 1, 256), domain(2, 2, 1024)],
    );
    let first = plan_drain(&view, &node_id(1), &DrainOptions::default());
    assert_eq!(first.moves[0].to, Some(node_id(2)));
    let failed = BTreeMap::from([(
        domain_id(0),
        BTreeMap::from([(node_id(2), "the migration there failed".to_owned())]),
    )]);
    let again = plan_drain(&view, &node_id(1), &DrainOptions { failed, ..Default::default() });
    assert_eq!(again.moves[0].to, Some(node_id(3)));
    assert_eq!(again.moves[1].to, Some(node_id(2)));
}

/// A disk of 10 GiB over 1 Gbit/s is most of the time that a move takes.
#[test]
fn local_disks_take_their_time() {
    let with = |disk_mib, mobility| {
        let vm = DomainView { disk_bytes: disk_mib * MIB, mobility, ..domain(1, 1, 512) };
        let view = cluster(vec![node(4, 4096), node(4, 4096)], vec![vm]);
        plan_drain(&view, &node_id(1), &DrainOptions::default()).expected_time.as_secs_f64()
    };
    let sends = |mib: f64| 1.0 + mib * f64::from(1 << 20) / LINK_BYTES_PER_SECOND as f64;
    let near = |a: f64, b: f64| assert!((a - b).abs() < 0.01, "{a} {b}");
    near(with(0, Mobility::Live), sends(512.0 * 1.2));
    near(with(10_240, Mobility::Live), sends((512.0 + 10_240.0) * 1.2));
    // Nobody writes to what does not run.
    near(with(10_240, Mobility::Cold), sends(10_240.0));
    assert_eq!(with(0, Mobility::Cold), 0.0);
}

#[test]
fn parallelism_follows_the_link_and_the_processors() {
    let with = |vcpus, link_bytes_per_second| NodeView { link_bytes_per_second, ..node(vcpus, 1) };
    assert_eq!(parallel_moves(&with(256, 0), 0), 1);
    assert_eq!(parallel_moves(&with(256, 12_500_000), 0), 1);
    assert_eq!(parallel_moves(&with(256, LINK_BYTES_PER_SECOND), 0), 2);
    assert_eq!(parallel_moves(&with(256, LINK_BYTES_PER_SECOND), 12_500_000), 10);
    assert_eq!(parallel_moves(&with(256, 1_250_000_000), 0), PARALLEL_MOVES_MAX);
    // A copy on a node with one core leaves nothing for another.
    assert_eq!(parallel_moves(&with(4, 1_250_000_000), 0), 1);
    assert_eq!(parallel_moves(&with(0, 1_250_000_000), 0), 1);
}

#[test]
fn an_even_cluster_is_left_alone() {
    let mut domains = vec![domain(1, 1, 256), domain(2, 1, 256)];
    domains[0].cpu_millicores = 500;
    domains[1].cpu_millicores = 480;
    let view = cluster(vec![node(8, 4096), node(8, 4096)], domains);
    assert!(plan_balance(&view, &BalanceOptions::default()).moves.is_empty());
}

/// Scale: 1,000 nodes and 10,000 domains: one node is emptied.
#[test]
fn ten_thousand_domains_are_planned() {
    let nodes: Vec<_> = (0..1000).map(|_| node(64, 65_536)).collect();
    let domains: Vec<_> = (0..10_000_usize)
        .map(|n| {
            let mut domain = domain(n % 1000 + 1, 2, 2048);
            domain.cpu_millicores = (n as u32 * 7919) % 2000;
            domain
        })
        .collect();
    let view = cluster(nodes, domains);
    let plan = plan_drain(&view, &node_id(1), &DrainOptions::default());
    assert_eq!(plan.moves.len(), 10);
    assert!(plan.moves.iter().all(|m| m.to.is_some()));
}
