//! The migration's two state machines under a deterministic simulator.
//!
//! A seed decides the order of everything: how many connections there are, whose step is next,
//! which connection is faster, when a message arrives, when a cable or the whole network is cut, when a side is killed, what a disk refuses, when the controller acts. After each
//! step the invariants are checked:
//!
//! - I1: never two machines that run. More strictly: never two sides that *may* resume by
//!   themselves.
//! - I5: a failure before the hand-over ends with the source running, and with a destination that
//!   will never run.
//! - Disks, local or shared: a side that runs has its disks open; of a shared one never both sides
//!   have. At the line no write that the guest had flushed is lost, whoever loses power then, and
//!   the disk is as it was in the pause. A source that goes on notes no writes any more.
//! - Nothing is stuck: when nothing more can happen, each side is in a state that ends, or waits
//!   for the controller, and the controller's decision brings the guest back unless its only copy
//!   was killed.
//!
//! `SIM_SEED=n` replays one seed, `SIM_SEEDS=n` tries that many.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

mod disk;
mod world;

use drover_hv::migration::destination_machine::DestinationState as DS;
use drover_hv::migration::source_machine::SourceState as SS;

use world::{Fault, Faults, World};

/// A source of chance that replays.
#[derive(Clone)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        n > 0 && self.below(n) == 0
    }
}

fn run(seed: u64, faults: Faults) -> (Option<SS>, Option<DS>, usize) {
    let mut world = World::new(seed, faults);
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.run()));
    if let Err(panic) = result {
        eprintln!("seed {seed} ({faults:?}); replay with SIM_SEED={seed}");
        eprintln!("{}", world.trace.join("\n"));
        std::panic::resume_unwind(panic);
    }
    let source = world.source.as_ref().map(|source| source.machine.state());
    let destination = world.destination.as_ref().map(|d| d.machine.state());
    (source, destination, world.steps)
}

fn seeds() -> Vec<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    match number("SIM_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("SIM_SEEDS").unwrap_or(3000)).collect(),
    }
}

#[test]
fn without_faults_every_migration_ends_well() {
    let mut moved = 0;
    for seed in seeds() {
        let faults = Faults { shared: seed % 2 == 1, ..Faults::default() };
        let (source, destination, _) = run(seed, faults);
        match source {
            Some(SS::Succeeded) => {
                assert_eq!(destination, Some(DS::Running));
                moved += 1;
            }
            // The policy gave up, or an answer took too long.
            Some(SS::Failed) => assert_ne!(destination, Some(DS::Running), "seed {seed}"),
            _ => assert_eq!(destination, Some(DS::Running), "seed {seed}: {source:?}"),
        }
    }
    assert!(moved * 2 > seeds().len(), "only {moved} moved");
}

#[test]
fn any_storm_of_faults_keeps_the_invariants() {
    let mut endings = std::collections::BTreeMap::new();
    for seed in seeds() {
        let mut chance = Chance(seed ^ 0xfau64);
        let mut pick = || [0, 0, 20, 60, 200][chance.below(5)];
        let faults = Faults {
            cut: pick(),
            cut_one: pick(),
            kill_source: pick(),
            kill_destination: pick(),
            cancel: pick(),
            disk: [0, 2, 10][(seed % 3) as usize],
            restore: [0, 3, 10][(seed / 3 % 3) as usize],
            at: None,
            shared: seed / 9 % 2 == 1,
        };
        let (source, destination, _) = run(seed, faults);
        *endings.entry(format!("{source:?}/{destination:?}")).or_insert(0) += 1;
    }
    // The storm reaches every corner, or it shows nothing.
    if seeds().len() > 1000 {
        for corner in [
            "Some(Succeeded)/Some(Running)",
            "Some(Failed)/Some(Failed)",
            "Some(Failed)/Some(Ready)",
            "Some(Owner)/None",
            "None/Some(Running)",
            "None/None",
        ] {
            assert!(endings.contains_key(corner), "never saw {corner}: {endings:#?}");
        }
    }
}

/// Each fault at each step of a migration, in many orders.
#[test]
fn every_fault_at_every_step_keeps_the_invariants() {
    for seed in seeds().into_iter().take(100) {
        let calm = Faults { shared: seed % 2 == 1, ..Faults::default() };
        let (_, _, steps) = run(seed, calm);
        for step in 1..=steps {
            for fault in [
                Fault::Cut,
                Fault::CutOne,
                Fault::KillSource,
                Fault::KillDestination,
                Fault::Cancel,
            ] {
                run(seed, Faults { at: Some((step, fault)), ..calm });
            }
        }
    }
}
